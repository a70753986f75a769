"""LiT runs as a source: embeddings, zero-shot classes, retrieval, image features, and what they cannot do."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aimv2_jax import load_dual_encoder, load_encoder, load_model
from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.config.load import build_config
from aimv2_jax.data.loading.batch_iterator import BOOKKEEPING
from aimv2_jax.data.pipeline import evaluation_batches
from aimv2_jax.data.sources import Source
from aimv2_jax.data.tokenizer import load_tokenizer
from aimv2_jax.errors import UserError
from aimv2_jax.eval import heldout, retrieval, visualize, zeroshot
from aimv2_jax.eval.probes.dataset import read_labelled_dataset, read_record
from aimv2_jax.eval.prompts import class_prompts, read_class_names
from aimv2_jax.export.__main__ import main as export
from aimv2_jax.models.aimv2 import take_rows
from aimv2_jax.train import lit_task, losses
from aimv2_jax.train.builder import build_setup
from aimv2_jax.train.task import merge

PHOTOS = "package:data/sample/test/photo"
TEMPLATES = ["a photo of a {}.", "{}", "one more picture of the {} in the distance"]


@pytest.fixture(scope="module")
def model(lit_workdir):
    return load_dual_encoder(lit_workdir)


@pytest.fixture(scope="module")
def photos():
    """44 photographs in 21 classes."""
    return read_labelled_dataset(PHOTOS, "--data", "label", None, ())


@pytest.fixture(scope="module")
def image_embeddings(model, photos):
    return model.image_embeddings([photos.image(index) for index in range(len(photos))])


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_lit_embeddings_are_those_of_its_task(lit_workdir, model):
    """Both towers give the embeddings that training computes, of held-out images and captions."""
    reader = CheckpointReader(lit_workdir)
    config = build_config(reader.meta(3)["config"])
    setup = build_setup(config, jax.devices()[:1])
    state = reader.restore(3, setup.abstract_state)
    kind, batch = next(evaluation_batches(config, np.arange(8), load_tokenizer(config)))
    source = Source("first", next(iter(config.eval.sources.values())))
    records = [read_record(source, index, "first")[1] for index in range(8)]

    @jax.jit
    def embed(params, arrays):
        task = setup.task
        pixels = losses.normalise_pixels(arrays["patches"], arrays["valid"], task.pixel_mean, task.pixel_std)
        texts = arrays["tokens"], lit_task.end_index(arrays)
        return task.model.apply({"params": params}, pixels, arrays["coords"], arrays["valid"], *texts)

    arrays = {name: array for name, array in batch.arrays.items() if name not in BOOKKEEPING}
    expected = embed(merge(state.params, state.frozen), arrays)
    images = model.image_embeddings([record.image for record in records])
    np.testing.assert_allclose(images, expected.image, atol=1e-6)
    texts = model.text_embeddings([record.texts(kind)[0] for record in records])
    np.testing.assert_allclose(texts, expected.text, atol=1e-6)
    assert model.logit_scale == pytest.approx(float(expected.scale))


def test_lit_encoder_is_the_one_it_started_from(lit_workdir, workdir, photos):
    """`load_encoder` of a LiT run gives the features of the frozen encoder, and vectors by the trained head."""
    images = [photos.image(index) for index in range(4)]
    encoder = load_encoder(lit_workdir)
    np.testing.assert_array_equal(encoder(images), load_encoder(f"{workdir}:20")(images))
    assert encoder.pooled(images).shape == (4, 32)


def test_class_scores_are_mean_cosines(model, photos, image_embeddings):
    """A class is the mean of the unit vectors of its texts, scaled to length 1: computed here text by text."""
    names = [(name, f"old {name}") if name == "beach" else (name,) for name in photos.names]
    prompts = class_prompts(names, TEMPLATES)
    expected = np.zeros((len(photos), len(names)))
    for column, texts in enumerate(prompts):
        direction = sum(unit(model.text_embeddings([text])[0].astype(np.float64)) for text in texts)
        expected[:, column] = image_embeddings @ unit(direction)
    scores = zeroshot.class_similarities(model, photos, prompts)
    np.testing.assert_allclose(scores, expected, atol=2e-6)


def test_templates_are_averaged_after_normalising(model, photos):
    """The mean of embeddings of length 1 is another class than the mean of the raw projections."""
    prompts = class_prompts([(name,) for name in photos.names], TEMPLATES)

    def project(tower, tokens, end_index):
        features, _ = tower.text(tokens)
        return tower.text_projection(take_rows(features, end_index[:, None])[:, 0])

    tokens, valid = model.tokenizer.encode([text.lower().encode() for texts in prompts for text in texts])
    tower = model.spec.model()
    raw = tower.apply({"params": model.params}, jnp.asarray(tokens), jnp.asarray(valid.sum(1)), method=project)
    raw = np.asarray(raw).reshape(len(prompts), len(TEMPLATES), -1)
    classifier = zeroshot.text_classifier(model, prompts)
    np.testing.assert_allclose(classifier, unit(unit(raw).mean(1)), atol=2e-6)
    assert np.abs(classifier - unit(raw.mean(1))).max() > 1e-4


def test_classes_in_another_order_and_with_more(lit_workdir, tmp_path, capsys):
    """Results do not depend on the order of the class file; classes without an image are candidates."""
    labels = ["animal", "building", "landscape", "plant"]
    lines = [*(f"{label}\t{label}" for label in labels[::-1]), "ship\tship", "car\tcar, automobile"]
    (tmp_path / "classes").write_text("\n".join(lines))
    arguments = [f"--checkpoint={lit_workdir}", f"--data={PHOTOS}", "--label=coarse", "--templates=simple"]
    results = []
    for flags in ([], [f"--classes={tmp_path}/classes"]):
        assert zeroshot.main([*arguments, *flags, f"--json={tmp_path}/z.json"]) == 0
        results.append(json.loads((tmp_path / "z.json").read_text()))
    plain, other = results
    assert len(plain["templates"]) == 7 and plain["examples"] == 44 and "less_prior" not in plain
    assert list(other["per_class"]) == labels[::-1] and list(other["classes"])[-2:] == ["ship", "car"]
    assert other["top1"] <= plain["top1"] and "44 images, 6 classes; chance 0.167" in capsys.readouterr().out


def test_swapped_names_swap_the_classes(model, photos, tmp_path):
    """A name of the class file belongs to its label: with the names of two labels swapped, so are their scores."""
    swapped = list(photos.names)
    swapped[1], swapped[4] = swapped[4], swapped[1]
    (tmp_path / "classes").write_text("\n".join(f"{label}\t{name}" for label, name in zip(photos.names, swapped)))
    names = read_class_names(f"{tmp_path}/classes", photos.names)
    scores = zeroshot.class_similarities(model, photos, class_prompts(names.values(), TEMPLATES))
    plain = zeroshot.class_similarities(model, photos, class_prompts([(name,) for name in photos.names], TEMPLATES))
    order = np.arange(len(swapped))
    order[[1, 4]] = 4, 1
    np.testing.assert_allclose(scores, plain[:, order], atol=1e-6)
    assert np.abs(plain[:, 1] - plain[:, 4]).max() > 1e-3


def test_zero_shot_command_with_a_lit_run(model, lit_workdir, photos, image_embeddings, tmp_path, capsys):
    """The command reports top-1 and top-5 with intervals, classes, groups and the confusion matrix."""
    arguments = [f"--checkpoint={lit_workdir}", f"--data={PHOTOS}", "--label=label", "--by=coarse", "--template=a {}"]
    assert zeroshot.main([*arguments, f"--json={tmp_path}/z.json", f"--confusion={tmp_path}/z.png"]) == 0
    metrics = json.loads((tmp_path / "z.json").read_text())
    scores = image_embeddings @ model.text_embeddings([f"a {name}" for name in photos.names]).T
    ranks = (scores > scores[np.arange(len(photos)), photos.classes][:, None]).sum(1)
    assert metrics["top1"] == pytest.approx((ranks < 1).mean()) and metrics["top5"] == pytest.approx((ranks < 5).mean())
    assert metrics["top1"] < metrics["top5"] < 1
    low, high = metrics["top5_ci95"]
    assert low < metrics["top5"] < high
    assert set(metrics["per_class"]) == set(photos.names) and metrics["by"]["landscape"]["examples"] == 32
    line = rf"zero-shot label, cosine: top-1 {metrics['top1']:.3f}, 95 % .*; top-5 {metrics['top5']:.3f}, "
    assert re.search(line, capsys.readouterr().out)
    with Image.open(tmp_path / "z.png") as drawn:
        assert drawn.size[0] > 300


def test_retrieval_command_with_a_lit_run(model, lit_workdir, tmp_path):
    """Recalls both ways are those of the cosines, and an image is drawn."""
    arguments = [f"--checkpoint={lit_workdir}", f"--data={PHOTOS}", "--kind=alt", "--examples=20"]
    assert retrieval.main([*arguments, f"--json={tmp_path}/r.json", f"--image={tmp_path}/r.png"]) == 0
    metrics = json.loads((tmp_path / "r.json").read_text())
    images, captions = retrieval.read_pairs(PHOTOS, "alt", 20)
    cosines = model.image_embeddings(images) @ model.text_embeddings(captions).T
    for name, scores in (("image_to_text", cosines), ("text_to_image", cosines.T)):
        rank = [int((row > row[index]).sum()) for index, row in enumerate(scores)]
        for depth in (1, 5, 10):
            assert metrics[name][f"recall@{depth}"] == pytest.approx(np.mean(np.array(rank) < depth))
    with Image.open(tmp_path / "r.png") as drawn:
        assert drawn.size[0] > 300


def test_long_text_is_cut_with_its_end(model):
    """A text longer than the text tower is cut, so that its end token is at the last position."""
    long = "a photo of many very different things that nobody ever counted"
    tokens, _ = model.tokenizer.encode([long.encode()])
    assert tokens[0, -1] == model.spec.text.end_id and (tokens[0, :-1] != model.spec.text.end_id).all()
    embeddings = model.text_embeddings([long, f"{long} and more", "A photo"])
    np.testing.assert_array_equal(embeddings[0], embeddings[1])
    np.testing.assert_array_equal(embeddings[2], model.text_embeddings(["a  photo", long, long])[0])


def test_text_without_a_letter(model):
    """A text that cleaning leaves empty raises UserError."""
    with pytest.raises(UserError, match="a caption has no letter"):
        model.text_embeddings(["cat", " "])


@pytest.mark.parametrize("command", [heldout.main, visualize.main], ids=["heldout", "visualize"])
def test_decoder_commands_refuse_a_lit_run(command, lit_workdir, tmp_path, capsys):
    """Commands that need a decoder end with code 2 and one sentence."""
    output = [f"--output={tmp_path}"] if command is visualize.main else []
    assert command([f"--checkpoint={lit_workdir}", *output]) == 2
    assert f"a LiT run has no decoder: '{lit_workdir}:3'. Give a pre-training run" in capsys.readouterr().err


def test_load_model_refuses_a_lit_run(lit_workdir):
    """`load_model` raises UserError for a LiT run."""
    with pytest.raises(UserError, match="a LiT run has no decoder"):
        load_model(str(lit_workdir))


def test_checkpoints_without_a_text_tower(workdir, golden_dir, capsys):
    """`load_dual_encoder` refuses a run with a decoder; zero-shot classification refuses an encoder alone."""
    with pytest.raises(UserError, match="the model has no text tower"):
        load_dual_encoder(workdir)
    assert zeroshot.main([f"--checkpoint={golden_dir / 'hf_head'}", f"--data={PHOTOS}", "--label=coarse"]) == 2
    assert "is an encoder without a text tower" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["orbax", "hf"])
def test_export_of_a_lit_run_embeds_alike(form, lit_workdir, model, photos, image_embeddings, tmp_path):
    """An export has both towers and the tokenizer: the embeddings of images and texts are the run's."""
    assert export([f"--checkpoint={lit_workdir}", f"--output={tmp_path / 'x'}", f"--format={form}"]) == 0
    exported = load_dual_encoder(tmp_path / "x")
    images = [photos.image(index) for index in range(len(photos))]
    np.testing.assert_allclose(exported.image_embeddings(images), image_embeddings, atol=1e-6)
    np.testing.assert_allclose(exported.text_embeddings(TEMPLATES), model.text_embeddings(TEMPLATES), atol=1e-6)
