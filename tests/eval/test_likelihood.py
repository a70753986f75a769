"""Captions scored by the decoder: zero-shot classes and retrieval."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.transforms import geometry
from aimv2_jax.errors import UserError
from aimv2_jax.eval import retrieval, zeroshot
from aimv2_jax.eval.likelihood import Scorer
from aimv2_jax.eval.probes.dataset import read_labelled_dataset
from aimv2_jax.eval.prompts import class_prompts
from aimv2_jax.pretrained.model import load
from aimv2_jax.train import losses
from tests.helpers.trained_run import COLORS, disc_image, records

CAPTIONS = ["a red disc", "a picture of a green disc on white", "blue"]


@pytest.fixture(scope="module")
def loaded(workdir):
    return load(str(workdir))


@pytest.fixture(scope="module")
def scorer(loaded):
    return Scorer(loaded)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    names = list(COLORS)
    labelled = (
        dataclasses.replace(record, labels={"color": names[number % 3]})
        for number, record in zip(range(12), records(range(12)))
    )
    write_dataset(folder, labelled)
    return folder


def test_caption_score_is_minus_its_text_loss(loaded, scorer):
    """The score of a caption is minus its text loss by the whole decoder."""
    tokens, loss_mask = scorer.encode(CAPTIONS)
    images = [disc_image(number)[0] for number in range(4)]
    scores = scorer(images, tokens, loss_mask)
    assert scores.shape == (4, 3) and (scores < 0).all()
    predict = jax.jit(dataclasses.replace(loaded.task, weights={"text": 1.0}).predict)
    for row, image in enumerate(images):
        patches = geometry.patchify(scorer.encoder.pixels(image), 8)[None]
        for column in range(3):
            batch = {
                "patches": jnp.asarray(patches),
                "coords": jnp.asarray(geometry.patch_coords((4, 4)))[None],
                "valid": jnp.ones((1, 16), bool),
                "tokens": jnp.asarray(tokens[column : column + 1]),
                "token_valid": jnp.arange(tokens.shape[1])[None] < loss_mask[column].sum() - 1,
            }
            logits = predict(loaded.params, batch, jnp.array([16])).logits
            loss = losses.text_loss_sum(logits, batch["tokens"], jnp.asarray(loss_mask[column : column + 1]))
            assert scores[row, column] == pytest.approx(-float(loss), rel=2e-6)


def test_end_of_text_when_it_was_learned_then_counted(scorer):
    tokens, loss_mask = scorer.encode(["red"])
    assert loss_mask[0].sum() == 1 + (tokens[0] > 2).sum()


def test_class_scores_mean_and_prior(scorer, data):
    """Class scores are the mean over the templates, and the prior is the score of a flat image."""
    test = read_labelled_dataset(str(data), "--data", "color", None, ())
    templates = ["a {} disc", "{}"]
    prompts = class_prompts([(name,) for name in test.names], templates)
    scores, prior = zeroshot.class_likelihoods(scorer, test, prompts)
    one, two = (scorer.encode([template.format(name) for name in test.names]) for template in templates)
    images = [test.image(index) for index in range(12)]
    expected = (scorer(images, *one) + scorer(images, *two)) / 2
    np.testing.assert_allclose(scores, expected, rtol=2e-6)
    flat = np.full((50, 60, 3), (124, 116, 104), np.uint8)
    np.testing.assert_allclose(prior, (scorer([flat], *one) + scorer([flat], *two))[0] / 2, rtol=2e-6)


def test_zero_shot_command_writes_figures_and_a_matrix(workdir, data, tmp_path, capsys):
    """The zero-shot command writes accuracies with an interval, and draws the confusion matrix."""
    arguments = [f"--checkpoint={workdir}", f"--data={data}", "--label=color", "--template={} disc"]
    assert zeroshot.main([*arguments, f"--json={tmp_path}/z.json", f"--confusion={tmp_path}/z.png"]) == 0
    metrics = json.loads((tmp_path / "z.json").read_text())
    names = {"top1", "ci95", "top5", "top5_ci95", "per_class"}
    assert metrics.keys() == names | {"less_prior", "templates", "label", "examples"}
    assert metrics["less_prior"].keys() == names
    assert metrics["examples"] == 12 and metrics["templates"] == ["{} disc"]
    output = capsys.readouterr().out.splitlines()
    for line, title, part in zip(output, ("likelihood", "less the prior"), (metrics, metrics["less_prior"])):
        low, high = part["ci95"]
        interval = f"95 % interval {low:.3f} to {high:.3f}"
        assert line == f"zero-shot color, {title}: top-1 {part['top1']:.3f}, {interval}"
    assert output[2:] == ["12 images, 3 classes; chance 0.333"]
    with Image.open(tmp_path / "z.png") as drawn:
        assert drawn.size[0] > 300


def test_recall_of_known_ranks():
    """Recall at k is the share of ranks below k, and a tie counts as a miss."""
    scores = np.array([[9.0, 1, 0], [5, 4, 3], [3, 3, 3]])
    np.testing.assert_array_equal(retrieval.ranks(scores), [0, 1, 2])  # A tie counts as a miss.
    recall = retrieval.recalls(scores)
    assert recall["recall@1"] == pytest.approx(1 / 3) and recall["recall@5"] == 1


def test_retrieval_command(workdir, data, tmp_path):
    """The retrieval command scores both directions and draws an image."""
    arguments = [f"--checkpoint={workdir}", f"--data={data}", "--kind=alt", "--examples=6"]
    assert retrieval.main([*arguments, f"--json={tmp_path}/r.json", f"--image={tmp_path}/r.png"]) == 0
    metrics = json.loads((tmp_path / "r.json").read_text())
    assert metrics["examples"] == 6 and metrics["text_to_image"]["chance@1"] == pytest.approx(1 / 6)
    with Image.open(tmp_path / "r.png") as drawn:
        assert drawn.size[0] > 300


def test_pairs_when_captions_repeat_then_each_once(data):
    images, captions = retrieval.read_pairs(str(data), "synthetic", 10)
    assert len(captions) == len(set(captions)) == len(images) == 3
    with pytest.raises(UserError, match=r"no captions of this kind: 'none'\. It has alt, synthetic"):
        retrieval.read_pairs(str(data), "none", 10)


def test_scorer_empty_caption(scorer):
    """An empty caption raises UserError."""
    with pytest.raises(UserError, match="a caption has no letter"):
        scorer.encode(["red", " "])


def test_scorer_model_without_text(loaded):
    """A model that was not trained on text raises UserError."""
    silent = dataclasses.replace(loaded, task=dataclasses.replace(loaded.task, weights={"image": 1.0}))
    with pytest.raises(UserError, match="not trained to write text"):
        Scorer(silent)


def test_template_without_class(workdir, data, capsys):
    """A template that has no place for the class ends with code 2 and an error message."""
    with pytest.raises(SystemExit) as stopped:
        zeroshot.main([f"--checkpoint={workdir}", f"--data={data}", "--label=color", "--template=a disc"])
    assert stopped.value.code == 2 and re.search("has no {} for the class", capsys.readouterr().err)
