"""Probes on frozen features, with hyperparameters chosen without the test images."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.transforms.decode import decode_image
from aimv2_jax.errors import UserError
from aimv2_jax.eval.probes import knn, report
from aimv2_jax.eval.probes import run as probe
from aimv2_jax.eval.probes.__main__ import main
from aimv2_jax.eval.probes.dataset import read_labelled_dataset, split
from aimv2_jax.eval.probes.features import FeatureCache
from aimv2_jax.eval.probes.head_batches import RandomViews
from aimv2_jax.eval.probes.sweep import (
    GRIDS,
    AttentiveHead,
    FeatureNorm,
    LinearHead,
    SweepConfig,
    epoch_batches,
    ordered_batches,
    predict,
    train_sweep,
)
from aimv2_jax.pretrained.encoder import PretrainedEncoder, encoder_of, load_encoder
from aimv2_jax.pretrained.source import open_weights
from tests.helpers.trained_run import COLORS, records

NAMES = list(COLORS)


def labelled(numbers):
    """Records of discs with their colour as label; every seventh has no label."""
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
def datasets(data):
    train = read_labelled_dataset(str(data / "train"), "--train", "color", "parity", ())
    return train, read_labelled_dataset(str(data / "test"), "--test", "color", "parity", (), train.names)


def run(workdir, data, *flags):
    arguments = [f"--checkpoint={workdir}", f"--train={data}/train", f"--test={data}/test", "--label=color"]
    return main([*arguments, "--encoder-batch=16", *flags])


def test_examples_are_those_with_the_label(datasets):
    """Records without the label are left out, and each example has its group."""
    train, test = datasets
    assert train.names == test.names == tuple(sorted(NAMES))
    assert len(train) == sum(1 for number in range(60) if number % 7)
    assert [train.names[c] for c in train.classes[:3]] == [NAMES[1], NAMES[2], NAMES[0]]
    assert train.groups[:2] == ("odd", "even")


def test_split_is_stratified_and_reproducible(datasets):
    """A split has the share of every class, is the same for the same seed, and differs for another."""
    fit_idx, val_idx = split(datasets[0], 0.2, seed=1)
    assert sorted([*fit_idx, *val_idx]) == list(range(len(datasets[0])))
    np.testing.assert_array_equal(split(datasets[0], 0.2, seed=1)[1], val_idx)
    for number in range(3):
        of_class = (datasets[0].classes == number).sum()
        assert (datasets[0].classes[val_idx] == number).sum() == round(0.2 * of_class)
    assert not np.array_equal(split(datasets[0], 0.2, seed=2)[1], val_idx)


def test_labelled_dataset_errors(data, datasets):
    """A dataset that cannot be probed raises a UserError that says why."""

    def read(label, names=None, without=(), by=None):
        return read_labelled_dataset(str(data / "test"), "--test", label, by, without, names)

    for arguments, sentence in (
        (dict(label="colour"), "no record with this label: 'colour'. Its labels are color, parity"),
        (dict(label="color", names=NAMES[:2]), f"9 records with a color that --train lacks: '{NAMES[2]}'"),
        (dict(label="color", without=NAMES[:2]), f"has only one color: '{NAMES[2]}'"),
        (dict(label="parity", by="color"), "no label for --by: 'color'. It has parity"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            read(**arguments)


def test_classes_of_two_lists_are_matched_by_name(tmp_path, data):
    """Classes are in the order of the train dataset's list, whatever that of the test dataset is."""
    images = [dataclasses.replace(record, labels={"kind": name}) for name in "cab" for record in records(range(2))]
    write_dataset(tmp_path / "train", images, classes={"kind": ["b", "none", "c", "a"]})
    write_dataset(tmp_path / "test", images[2:], classes={"kind": ["a", "b"]})
    train = read_labelled_dataset(str(tmp_path / "train"), "--train", "kind", None, ())
    test = read_labelled_dataset(str(tmp_path / "test"), "--test", "kind", None, (), train.names)
    assert train.names == test.names == ("b", "c", "a")
    assert train.classes.tolist() == [1, 1, 2, 2, 0, 0] and test.classes.tolist() == [2, 2, 0, 0]


def test_feature_cache_hit_and_miss(workdir, datasets, tmp_path, monkeypatch):
    """Stored features are read again, but not for another model or transform."""
    encoder = load_encoder(workdir)
    cache = FeatureCache(tmp_path, encoder, "patches", None, True, 16)
    computed = cache(datasets[0], "train")
    assert (
        computed.features.shape == (len(datasets[0]), 2, 16, 32)
        and computed.valid.all()
        and computed.seconds[0] > computed.seconds[1] > 0
    )
    image = decode_image(datasets[0].image(3).data)
    expected = encoder([image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    np.testing.assert_allclose(computed.features[3], expected, rtol=0, atol=2e-3 * np.abs(expected).max())

    def fail(*_, **__):
        raise AssertionError("features were computed again")

    with monkeypatch.context() as patched:
        patched.setattr(PretrainedEncoder, "features", fail)
        np.testing.assert_array_equal(cache(datasets[0], "train").features, computed.features)
        other = load_encoder(f"{workdir}:40")
        for changed in (dict(encoder=other), dict(pooling="mean"), dict(layer=1), dict(flips=False)):
            with pytest.raises(AssertionError, match="features were computed again"):
                dataclasses.replace(cache, **changed)(datasets[0], "train")
        with pytest.raises(AssertionError, match="features were computed again"):
            cache(datasets[1], "test")
    assert not list(tmp_path.glob("*.part"))


def test_native_features_mark_padding_as_invalid(workdir, datasets):
    """Padding of native-resolution features is not valid, and not in their mean."""
    weights = open_weights(workdir)
    spec = dataclasses.replace(weights.spec, position="sincos", area=18)
    encoder = encoder_of(dataclasses.replace(weights, spec=spec, shapes=spec.shapes()))
    computed = FeatureCache(None, encoder, "patches", None, False, 16)(datasets[1], "test")
    assert (computed.valid.sum(1) == 16).all() and computed.valid.shape[1] == 18
    mean = FeatureCache(None, encoder, "mean", None, False, 16)(datasets[1], "test")
    expected = computed.features[:, 0, :16].astype(np.float32).mean(1)
    np.testing.assert_allclose(mean.features[:, 0, 0], expected, rtol=0, atol=4e-3 * np.abs(expected).max())


def test_attentive_head_ignores_padding():
    """Padded patches do not change the output of the attentive head."""
    rng = np.random.default_rng(0)
    features, head = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32), AttentiveHead(2, 4)
    valid = jnp.ones((3, 5), bool)
    params = head.init(jax.random.key(0), features, valid)
    padded = jnp.concatenate([features, jnp.full((3, 2, 8), 9.0)], axis=1)
    mask = jnp.concatenate([valid, jnp.zeros((3, 2), bool)], axis=1)
    np.testing.assert_allclose(
        head.apply(params, padded, mask), head.apply(params, features, valid), rtol=2e-5, atol=1e-6
    )


def is_kernel(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def test_sweep_equals_separate_training_with_adamw():
    """Each point of a grid that is trained together equals one trained alone with optax's AdamW."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 1, 1, 6)).astype(np.float32)
    valid, classes = np.ones((20, 1), bool), rng.integers(3, size=20)
    grid = ((1e-2, 0.1), (3e-2, 0.01))
    config = SweepConfig(grid, epochs=4, warmup_epochs=1, batch_size=8, seed=0)
    head, norm, indices = LinearHead(3), FeatureNorm.fit(features, valid, np.arange(20)), np.arange(20)
    batches = epoch_batches(features, valid, classes, indices, config)
    together = train_sweep(head, norm, config, 3, batches, 6).params
    for point, (rate, decay) in enumerate(grid):
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 3, 12)
        optimizer = optax.adamw(schedule, weight_decay=decay, mask=is_kernel)
        params = head.init(jax.random.key(0), jnp.zeros((1, 1, 6)), jnp.ones((1, 1), bool))["params"]
        state = optimizer.init(params)
        for batch, mask_BL, numbers in epoch_batches(features, valid, classes, indices, config):
            rows = numbers >= 0

            def loss(params, batch=batch, mask_BL=mask_BL, numbers=numbers, rows=rows):
                scaled, valid_BL = jnp.asarray((batch - norm.mean) * norm.inv_std), jnp.asarray(mask_BL)
                logits = head.apply({"params": params}, scaled, valid_BL)
                return optax.softmax_cross_entropy_with_integer_labels(logits[rows], numbers[rows]).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        alone = jax.tree.map(lambda leaf, point=point: leaf[point], together)
        # The tolerance covers twelve float32 steps of Adam, which also normalises small gradients.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), alone, params)
    batches = ordered_batches(features, valid, indices, 8)
    log_probability = np.concatenate(list(predict(head, norm, together, batches)), axis=1)
    assert log_probability.shape == (2, 24, 3)


def test_feature_norm_standardises_valid_patches():
    """Over valid patches, scaled features have mean 0 and variance 1."""
    rng = np.random.default_rng(0)
    features = rng.normal(3, 5, size=(30, 2, 4, 6)).astype(np.float32)
    valid = rng.random((30, 4)) < 0.7
    features[~valid[:, None].repeat(2, 1)] = 1e4
    norm = FeatureNorm.fit(features, valid, np.arange(30))
    scaled = ((features - norm.mean) * norm.inv_std)[valid[:, None].repeat(2, 1)]
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(0), 1, atol=1e-4)


def test_knn_votes_are_weighted_by_cosine():
    """Two near neighbours outweigh three far ones."""
    train_features = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 1.0], [0.2, 1.0]], np.float32)
    classes = np.array([0, 0, 1, 1, 1])
    test = np.array([[1, 0.05], [0.0, 2.0]], np.float32)
    for votes in knn.vote(train_features, classes, test, (1, 5), 2):
        np.testing.assert_array_equal(votes, [0, 1])  # With all five, the two near ones outweigh the three far ones.


def test_interval_with_many_images():
    """The confidence interval for many images is the normal one."""
    correct = np.arange(2000) % 4 != 0
    low, high = report.interval(correct)
    spread = 1.96 * np.sqrt(0.75 * 0.25 / 2000)
    assert low == pytest.approx(0.75 - spread, abs=2e-3) and high == pytest.approx(0.75 + spread, abs=2e-3)


def test_top5_counts_the_five_best_classes(datasets):
    """Top-1 and top-5 are shares of images whose class is among the best one or five; of equals the first counts."""
    _, test = datasets
    test = dataclasses.replace(test, names=tuple("abcdefgh"), classes=np.arange(len(test)) % 8)
    scores = np.random.default_rng(0).integers(0, 6, (len(test), 8)).astype(np.float32)
    ranks = []
    for row, label in zip(scores.tolist(), test.classes):
        ranks.append(sum(score > row[label] or (score == row[label] and i < label) for i, score in enumerate(row)))
    metrics = report.score_metrics(test, scores)
    assert metrics["top1"] == pytest.approx(np.mean(np.array(ranks) < 1))
    assert metrics["top5"] == pytest.approx(np.mean(np.array(ranks) < 5)) and metrics["top1"] < metrics["top5"] < 1
    assert metrics["top5_ci95"] == report.interval(np.array(ranks) < 5)


@pytest.mark.parametrize("kind", ["attentive", "linear", "knn"])
def test_probe_of_colors_prints_and_writes_results(workdir, data, tmp_path, capsys, kind):
    """A probe of colors reaches a high accuracy, and its results are printed and written."""
    flags = [f"--kind={kind}", "--epochs=20", "--batch-size=16", "--by=parity", f"--json={tmp_path}/probe.json"]
    assert run(workdir, data, *flags, f"--confusion={tmp_path}/confusion.png", f"--cache={tmp_path}/cache") == 0
    result = json.loads((tmp_path / "probe.json").read_text())
    keys = {"top1", "ci95", "per_class", "kind", "label", "best", "floor", "examples"}
    assert keys <= result.keys() and result["kind"] == kind and set(result["per_class"]) == set(NAMES)
    assert result["top1"] >= 0.8 and result["ci95"][0] <= result["top1"] <= result["ci95"][1]
    assert result["examples"]["test"] == sum(1 for number in range(60, 90) if number % 7)
    correct = sum(part["top1"] * part["examples"] for part in result["by"].values())
    assert correct == pytest.approx(result["top1"] * result["examples"]["test"])
    assert 0 < result["floor"]["top1"] <= 1 and "validation_top1" in result["best"]
    with Image.open(tmp_path / "confusion.png") as drawn:
        assert drawn.size[0] > 300
    assert "in the encoder" in capsys.readouterr().out
    assert list((tmp_path / "cache").glob("*.npz"))


def test_probe_of_a_random_encoder_and_with_crops(workdir, data, tmp_path, capsys):
    """The command runs with a random encoder, and with new crops in each epoch."""
    arguments = [f"--train={data}/train", f"--test={data}/test", "--label=color", "--epochs=2", "--encoder-batch=16"]
    assert main(["--checkpoint=random", f"--like={workdir}", *arguments, "--kind=linear"]) == 0
    assert run(workdir, data, "--epochs=2", "--augment=crops", "--grid=full") == 0
    assert capsys.readouterr().out.count("top-1") == 2


def test_random_crops_by_epoch_and_seed(workdir, datasets):
    """Crops differ between epochs, and are the same in a second run of the same seed."""
    cache = FeatureCache(None, load_encoder(workdir), "patches", None, False, 16)
    fit_idx, _ = split(datasets[0], 0.2, seed=0)
    config = SweepConfig(((1e-3, 0.0),), epochs=2, warmup_epochs=0, batch_size=len(fit_idx), seed=0)
    runs = [list(RandomViews(cache, datasets).epochs(fit_idx, config)) for _ in range(2)]
    for (ours, _, classes), (theirs, _, numbers) in zip(*runs):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(classes, numbers)
    rngs = [np.random.default_rng(0)]
    orders = [rngs[0].permutation(fit_idx) for _ in range(2)]
    first, second = (features[np.argsort(order)] for (features, _, _), order in zip(runs[0], orders))
    assert len(runs[0]) == 2 and (np.abs(first - second).max(axis=(1, 2)) > 0.01).mean() > 0.9


def test_features_error_too_large_for_float16(workdir, datasets):
    """Features that are too large to be stored as float16 raise a UserError."""
    weights = open_weights(workdir)
    arrays = {name: leaf * (1e6 if name == "encoder/trunk/norm/scale" else 1) for name, leaf in weights.read().items()}
    huge = dataclasses.replace(weights, read_paths=lambda paths: {name: arrays[name] for name in paths})
    with pytest.raises(UserError, match="too large to be stored"):
        FeatureCache(None, encoder_of(huge), "patches", None, False, 16)(datasets[1], "test")


def test_split_keeps_one_example_of_each_class(datasets):
    """Each class keeps an example for fitting, however large the share of validation is."""
    fit_idx, _ = split(datasets[0], 0.99, seed=0)
    assert set(datasets[0].classes[fit_idx]) == {0, 1, 2}


def test_best_head_independent_of_test_images(workdir, data, tmp_path):
    """The best head is chosen without use of the test images."""
    best = []
    for name, test in (("own", "test"), ("other", "train")):
        arguments = [f"--checkpoint={workdir}", f"--train={data}/train", f"--test={data}/{test}", "--label=color"]
        flags = ["--kind=linear", "--epochs=3", "--encoder-batch=16", f"--json={tmp_path}/{name}.json"]
        assert main([*arguments, *flags]) == 0
        best.append(json.loads((tmp_path / f"{name}.json").read_text())["best"])
    assert best[0] == best[1]


@pytest.mark.parametrize("augment", ["flip", "crops"])
def test_head_refit_on_all_train_images(workdir, data, datasets, monkeypatch, augment):
    """The chosen head is trained again on all train images, unless --no-refit is given."""
    trainings = []

    def watched(head, norm, config, steps_per_epoch, batches, width):
        batches = list(batches)
        trainings.append((len(config.grid), sum(int((classes >= 0).sum()) for _, _, classes in batches)))
        assert len(batches) == steps_per_epoch * config.epochs
        return train_sweep(head, norm, config, steps_per_epoch, batches, width)

    monkeypatch.setattr(probe, "train_sweep", watched)
    flags = ["--kind=linear", "--epochs=2", "--batch-size=8", "--validation=0.2", "--no-floor", f"--augment={augment}"]
    assert run(workdir, data, *flags) == 0
    fit_idx, val_idx = split(datasets[0], 0.2, seed=0)
    grid = (len(GRIDS["small"]), 2 * len(fit_idx))
    assert trainings == [grid, (1, 2 * (len(fit_idx) + len(val_idx)))]
    trainings.clear()
    assert run(workdir, data, *flags, "--no-refit") == 0
    assert trainings == [grid]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--checkpoint=random"], "go together"),
        (["--like={run}"], "go together"),
        (["--kind=knn", "--augment=crops"], "not for knn"),
        (["--augment=crops", "--cache=kept"], "stores no features"),
        (["--seed=-1"], "not a whole number"),
        (["--cache={run}/metrics.jsonl"], "--cache is a file"),
        (["--layer=3"], "--layer is out of range: 3. Give 0 to 2"),
        (["--validation=1.5"], "'1.5' is not a share"),
        (["--json={run}/none/x.json"], "--json: no such folder"),
        (["--confusion=x.jpg"], "--confusion: the name does not end in .png"),
        (["--train=nowhere"], "--train: no such folder"),
        (["--image-size=20"], "not a multiple of the patch size 8"),
    ],
)
def test_probe_command_user_errors(workdir, data, capsys, flags, sentence):
    """A command that cannot work ends with one line and code 2."""
    try:
        code = run(workdir, data, *(flag.format(run=workdir) for flag in flags))
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and re.search(sentence, lines[-1]) and sum("error:" in line for line in lines) == 1
