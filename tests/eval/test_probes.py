"""Probes: labels told from frozen features, chosen without the test pictures."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from trained_run import COLORS, records

from aimv2_jax.data.datasets import write_dataset
from aimv2_jax.data.pictures import decode_image
from aimv2_jax.errors import UserError
from aimv2_jax.eval.encoders import LoadedEncoder, encoder_of, load_encoder
from aimv2_jax.eval.probes import methods, neighbours, report
from aimv2_jax.eval.probes.__main__ import main
from aimv2_jax.eval.probes.cache import FeatureCache
from aimv2_jax.eval.probes.examples import read_examples, split
from aimv2_jax.eval.probes.heads import AttentiveHead, LinearHead
from aimv2_jax.eval.probes.methods import NewCrops
from aimv2_jax.eval.probes.sweep import Plan, Standard, epochs_of, in_order, predict, train
from aimv2_jax.export.source import open_weights

NAMES = list(COLORS)


def labelled(numbers):
    """Discs with their colour as label; every seventh has none."""
    for number, record in zip(numbers, records(numbers)):
        labels = {"parity": "even" if number % 2 == 0 else "odd"}
        if number % 7:
            labels["color"] = NAMES[number % 3]
        yield dataclasses.replace(record, labels=labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    write_dataset(folder / "train", labelled(range(60)))
    write_dataset(folder / "test", labelled(range(60, 90)))
    return folder


@pytest.fixture(scope="module")
def sets(data):
    known = read_examples(str(data / "train"), "--train", "color", "parity", ())
    return known, read_examples(str(data / "test"), "--test", "color", "parity", (), known.names)


def run(workdir, data, *flags):
    arguments = [f"--checkpoint={workdir}", f"--train={data}/train", f"--test={data}/test", "--label=color"]
    return main([*arguments, "--encoder-batch=16", *flags])


def test_examples_when_read_then_those_with_the_label_and_their_groups(sets):
    known, asked = sets
    assert known.names == asked.names == tuple(sorted(NAMES))
    assert len(known) == sum(1 for number in range(60) if number % 7)
    assert [known.names[c] for c in known.classes[:3]] == [NAMES[1], NAMES[2], NAMES[0]]
    assert known.groups[:2] == ("odd", "even")


def test_split_when_made_then_a_share_of_every_class_and_the_same_again(sets):
    kept, held = split(sets[0], 0.2, seed=1)
    assert sorted([*kept, *held]) == list(range(len(sets[0])))
    np.testing.assert_array_equal(split(sets[0], 0.2, seed=1)[1], held)
    for number in range(3):
        of_class = (sets[0].classes == number).sum()
        assert (sets[0].classes[held] == number).sum() == round(0.2 * of_class)
    assert not np.array_equal(split(sets[0], 0.2, seed=2)[1], held)


def test_sets_when_they_cannot_be_probed_then_told(data, sets):
    ask = lambda label, names=None, without=(), by=None: read_examples(  # noqa: E731
        str(data / "test"), "--test", label, by, without, names
    )
    for arguments, sentence in (
        (dict(label="colour"), "no record with this label: 'colour'. Its labels are color, parity"),
        (dict(label="color", names=NAMES[:2]), f"a color that --train lacks: '{NAMES[2]}'"),
        (dict(label="color", without=NAMES[:2]), f"one color alone: '{NAMES[2]}'"),
        (dict(label="parity", by="color"), "no label for --by: 'color'. It has parity"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            ask(**arguments)


def test_features_when_kept_then_read_again_and_not_for_another_model_or_transform(
    workdir, sets, tmp_path, monkeypatch
):
    encoder = load_encoder(workdir)
    cache = FeatureCache(tmp_path, encoder, "patches", None, True, 16)
    made = cache(sets[0], "train")
    assert (
        made.features.shape == (len(sets[0]), 2, 16, 32) and made.valid.all() and made.seconds[0] > made.seconds[1] > 0
    )
    image = decode_image(sets[0].image(3).data)
    expected = encoder([image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    np.testing.assert_allclose(made.features[3], expected, rtol=0, atol=2e-3 * np.abs(expected).max())

    def computed(*_, **__):
        raise AssertionError("it was there")

    with monkeypatch.context() as patched:
        patched.setattr(LoadedEncoder, "features", computed)
        np.testing.assert_array_equal(cache(sets[0], "train").features, made.features)
        other = load_encoder(f"{workdir}:40")
        for changed in (dict(encoder=other), dict(pooling="mean"), dict(layer=1), dict(flips=False)):
            with pytest.raises(AssertionError, match="it was there"):
                dataclasses.replace(cache, **changed)(sets[0], "train")
        with pytest.raises(AssertionError, match="it was there"):
            cache(sets[1], "test")
    assert not list(tmp_path.glob("*.part"))


def test_native_features_when_made_then_filling_is_not_valid(workdir, sets):
    weights = open_weights(workdir)
    vision = dataclasses.replace(weights.vision, position="sincos", area=18)
    encoder = encoder_of(dataclasses.replace(weights, vision=vision, shapes=vision.shapes()))
    made = FeatureCache(None, encoder, "patches", None, False, 16)(sets[1], "test")
    assert (made.valid.sum(1) == 16).all() and made.valid.shape[1] == 18
    mean = FeatureCache(None, encoder, "mean", None, False, 16)(sets[1], "test")
    expected = made.features[:, 0, :16].astype(np.float32).mean(1)
    np.testing.assert_allclose(mean.features[:, 0, 0], expected, rtol=0, atol=4e-3 * np.abs(expected).max())


def test_attentive_head_when_patches_are_padded_then_the_same():
    rng = np.random.default_rng(0)
    features, head = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32), AttentiveHead(2, 4)
    valid = jnp.ones((3, 5), bool)
    params = head.init(jax.random.key(0), features, valid)
    padded = jnp.concatenate([features, jnp.full((3, 2, 8), 9.0)], axis=1)
    mask = jnp.concatenate([valid, jnp.zeros((3, 2), bool)], axis=1)
    np.testing.assert_allclose(
        head.apply(params, padded, mask), head.apply(params, features, valid), rtol=2e-5, atol=1e-6
    )


def test_grid_when_trained_together_then_each_point_as_alone_with_adamw():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 1, 1, 6)).astype(np.float32)
    valid, classes = np.ones((20, 1), bool), rng.integers(3, size=20)
    grid = ((1e-2, 0.1), (3e-2, 0.01))
    plan = Plan(grid, epochs=4, warmup_epochs=1, batch_size=8, seed=0)
    head, standard, every = LinearHead(3), Standard.of(features, valid, np.arange(20)), np.arange(20)
    together = train(head, standard, plan, 3, epochs_of(features, valid, classes, every, plan), 6)
    for point, (rate, decay) in enumerate(grid):
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 3, 12)
        mask = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)  # noqa: E731
        optimizer = optax.adamw(schedule, weight_decay=decay, mask=mask)
        params = head.init(jax.random.key(0), jnp.zeros((1, 1, 6)), jnp.ones((1, 1), bool))["params"]
        state = optimizer.init(params)
        for batch, mask_BL, numbers in epochs_of(features, valid, classes, every, plan):
            rows = numbers >= 0

            def loss(params, batch=batch, mask_BL=mask_BL, numbers=numbers, rows=rows):
                logits = head.apply({"params": params}, (batch - standard.mean) * standard.inverse, mask_BL)
                return optax.softmax_cross_entropy_with_integer_labels(logits[rows], numbers[rows]).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        alone = jax.tree.map(lambda leaf, point=point: leaf[point], together)
        # Twelve steps of Adam in float32, which normalises small gradients.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), alone, params)
    found = np.concatenate(list(predict(head, standard, together, in_order(features, valid, every, 8))), axis=1)
    assert found.shape == (2, 24, 3)


def test_standard_when_taken_then_mean_zero_and_variance_one_over_valid_patches():
    rng = np.random.default_rng(0)
    features = rng.normal(3, 5, size=(30, 2, 4, 6)).astype(np.float32)
    valid = rng.random((30, 4)) < 0.7
    features[~valid[:, None].repeat(2, 1)] = 1e4
    standard = Standard.of(features, valid, np.arange(30))
    scaled = ((features - standard.mean) * standard.inverse)[valid[:, None].repeat(2, 1)]
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(0), 1, atol=1e-4)


def test_neighbours_when_they_vote_then_weighted_by_cosine():
    train_features = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 1.0], [0.2, 1.0]], np.float32)
    classes = np.array([0, 0, 1, 1, 1])
    test = np.array([[1, 0.05], [0.0, 2.0]], np.float32)
    for votes in neighbours.vote(train_features, classes, test, (1, 5), 2):
        np.testing.assert_array_equal(votes, [0, 1])  # With all five, the near two outweigh the far three.


def test_interval_when_many_pictures_then_the_normal_one():
    right = np.arange(2000) % 4 != 0
    low, high = report.interval(right)
    spread = 1.96 * np.sqrt(0.75 * 0.25 / 2000)
    assert low == pytest.approx(0.75 - spread, abs=2e-3) and high == pytest.approx(0.75 + spread, abs=2e-3)


@pytest.mark.parametrize("kind", ["attentive", "linear", "knn"])
def test_probe_when_colours_are_asked_then_told_and_written(workdir, data, tmp_path, capsys, kind):
    flags = [f"--kind={kind}", "--epochs=20", "--batch-size=16", "--by=parity", f"--json={tmp_path}/probe.json"]
    assert run(workdir, data, *flags, f"--confusion={tmp_path}/confusion.png", f"--cache={tmp_path}/cache") == 0
    found = json.loads((tmp_path / "probe.json").read_text())
    keys = {"top1", "ci95", "per_class", "kind", "label", "best", "floor", "examples"}
    assert keys <= found.keys() and found["kind"] == kind and set(found["per_class"]) == set(NAMES)
    assert found["top1"] >= 0.8 and found["ci95"][0] <= found["top1"] <= found["ci95"][1]
    assert found["examples"]["test"] == sum(1 for number in range(60, 90) if number % 7)
    right = sum(part["top1"] * part["examples"] for part in found["by"].values())
    assert right == pytest.approx(found["top1"] * found["examples"]["test"])
    assert 0 < found["floor"]["top1"] <= 1 and "validation_top1" in found["best"]
    with Image.open(tmp_path / "confusion.png") as drawn:
        assert drawn.size[0] > 300
    assert "in the encoder" in capsys.readouterr().out
    assert list((tmp_path / "cache").glob("*.npz"))


def test_probe_when_the_encoder_is_random_or_crops_are_new_then_it_runs(workdir, data, tmp_path, capsys):
    arguments = [f"--train={data}/train", f"--test={data}/test", "--label=color", "--epochs=2", "--encoder-batch=16"]
    assert main(["--checkpoint=random", f"--like={workdir}", *arguments, "--kind=linear"]) == 0
    assert run(workdir, data, "--epochs=2", "--augment=crops", "--grid=full") == 0
    assert capsys.readouterr().out.count("top-1") == 2


def test_crops_when_new_then_others_in_every_epoch_and_the_same_again(workdir, sets):
    cache = FeatureCache(None, load_encoder(workdir), "patches", None, False, 16)
    fit, _ = split(sets[0], 0.2, seed=0)
    plan = Plan(((1e-3, 0.0),), epochs=2, warmup_epochs=0, batch_size=len(fit), seed=0)
    runs = [list(NewCrops(cache, sets).epochs(fit, plan)) for _ in range(2)]
    for (ours, _, classes), (theirs, _, numbers) in zip(*runs):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(classes, numbers)
    orders = [np.random.default_rng(0)]
    places = [orders[0].permutation(fit) for _ in range(2)]
    first, second = (features[np.argsort(order)] for (features, _, _), order in zip(runs[0], places))
    assert len(runs[0]) == 2 and (np.abs(first - second).max(axis=(1, 2)) > 0.01).mean() > 0.9


def test_features_when_too_large_for_what_is_kept_then_told(workdir, sets):
    weights = open_weights(workdir)
    arrays = {name: leaf * (1e6 if name == "encoder/trunk/norm/scale" else 1) for name, leaf in weights.read().items()}
    huge = dataclasses.replace(weights, read_paths=lambda paths: {name: arrays[name] for name in paths})
    with pytest.raises(UserError, match="too large to be kept"):
        FeatureCache(None, encoder_of(huge), "patches", None, False, 16)(sets[1], "test")


def test_split_when_a_share_would_take_all_then_one_of_a_class_stays(sets):
    kept, _ = split(sets[0], 0.99, seed=0)
    assert set(sets[0].classes[kept]) == {0, 1, 2}


def test_choice_when_made_then_without_a_look_at_the_test_pictures(workdir, data, tmp_path):
    best = []
    for name, test in (("own", "test"), ("other", "train")):
        arguments = [f"--checkpoint={workdir}", f"--train={data}/train", f"--test={data}/{test}", "--label=color"]
        flags = ["--kind=linear", "--epochs=3", "--encoder-batch=16", f"--json={tmp_path}/{name}.json"]
        assert main([*arguments, *flags]) == 0
        best.append(json.loads((tmp_path / f"{name}.json").read_text())["best"])
    assert best[0] == best[1]


@pytest.mark.parametrize("augment", ["flip", "crops"])
def test_head_when_chosen_then_trained_again_on_all_train_pictures(workdir, data, sets, monkeypatch, augment):
    trainings = []

    def watched(head, standard, plan, steps_per_epoch, batches, width):
        batches = list(batches)
        trainings.append((len(plan.grid), sum(int((classes >= 0).sum()) for _, _, classes in batches)))
        assert len(batches) == steps_per_epoch * plan.epochs
        return train(head, standard, plan, steps_per_epoch, batches, width)

    monkeypatch.setattr(methods, "train", watched)
    flags = ["--kind=linear", "--epochs=2", "--batch-size=8", "--validation=0.2", "--no-floor", f"--augment={augment}"]
    assert run(workdir, data, *flags) == 0
    fit, held = split(sets[0], 0.2, seed=0)
    grid = (len(methods.SMALL_GRID), 2 * len(fit))
    assert trainings == [grid, (1, 2 * (len(fit) + len(held)))]
    trainings.clear()
    assert run(workdir, data, *flags, "--no-refit") == 0
    assert trainings == [grid]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--checkpoint=random"], "go together"),
        (["--like={run}"], "go together"),
        (["--kind=knn", "--augment=crops"], "not for knn"),
        (["--augment=crops", "--cache=kept"], "keeps no features"),
        (["--seed=-1"], "not a whole number"),
        (["--cache={run}/metrics.jsonl"], "--cache is a file"),
        (["--layer=3"], "--layer is out of range: 3. Give 0 to 2"),
        (["--validation=1.5"], "'1.5' is no share"),
        (["--json={run}/none/x.json"], "--json: no such folder"),
        (["--confusion=x.jpg"], "--confusion: the name does not end in .png"),
        (["--train=nowhere"], "--train: no such folder"),
        (["--image-size=20"], "no multiple of the patch size 8"),
    ],
)
def test_command_line_when_it_cannot_work_then_one_line(workdir, data, capsys, flags, sentence):
    try:
        code = run(workdir, data, *(flag.format(run=workdir) for flag in flags))
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and re.search(sentence, said[-1]) and sum("error:" in line for line in said) == 1
