import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax.data.pipeline import evaluation_batches, to_devices
from aimv2_jax.eval import heldout
from aimv2_jax.eval.heldout import CaptionSet, derangements, has_texture, held_out_metrics, main, text_sums
from aimv2_jax.pretrained.model import load
from aimv2_jax.train.builder import build_setup
from aimv2_jax.train.evaluate import evaluate

KEYS = {
    "loss_image",
    "loss_image_textured",
    "loss_text",
    "loss_text_shuffled",
    "loss_text_alt",
    "loss_text_synthetic",
    "loss_text_shuffled_alt",
    "loss_text_shuffled_synthetic",
    "unigram_entropy",
    "unigram_entropy_alt",
    "unigram_entropy_synthetic",
    "examples",
}
# Sums of the same float32 losses of single examples in another order.
RTOL = 1e-5


@pytest.fixture(scope="module")
def loaded(workdir):
    return load(str(workdir))


@pytest.fixture(scope="module")
def figures(loaded):
    return held_out_metrics(loaded)


def test_figures_have_the_documented_keys(figures):
    """Figures of a run have exactly the documented keys, and all are finite."""
    assert set(figures) == KEYS
    assert figures["examples"] == 5
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["loss_image"] != figures["loss_image_textured"]


def test_figures_equal_the_evaluation_of_training(figures, loaded):
    """Image loss and full-prefix text loss are those of the evaluation during training."""
    program = build_setup(loaded.config)
    rows = np.arange(8)
    batches = (batch.arrays for _, batch in evaluation_batches(loaded.config, rows, loaded.tokenizer()))
    params = jax.device_put(loaded.params, program.state_shardings.params)
    losses = evaluate(program, params, batches, lambda arrays: to_devices(arrays, program.batch_sharding, rows, 8))
    assert figures["loss_image"] == pytest.approx(losses["eval_loss_image"], rel=RTOL)
    assert figures["loss_text"] == pytest.approx(losses["eval_loss_text_full_prefix"], rel=RTOL)


def test_figures_independent_of_the_batch_size(figures, loaded):
    """Batches smaller than the held-out set give the same figures."""
    others = held_out_metrics(loaded.with_eval(batch_size=2))
    assert others == {key: pytest.approx(value, rel=RTOL) for key, value in figures.items()}


def test_figures_without_an_image_loss_are_null(loaded):
    """A run without an image loss has null image figures, and its text figures."""
    text = dataclasses.replace(loaded, task=dataclasses.replace(loaded.task, weights={"text": 1.0}))
    figures = held_out_metrics(text.with_eval(caption_types=("synthetic",)))
    assert figures["loss_image"] is None and figures["loss_image_textured"] is None
    assert figures["loss_text"] == figures["loss_text_synthetic"] > 0


def test_shuffled_text_equals_shuffled_images(loaded):
    """Permuting the captions of a batch gives the same sums as permuting its images."""
    [arrays] = [
        batch.arrays
        for kind, batch in evaluation_batches(loaded.config, np.arange(8), loaded.tokenizer())
        if kind == "alt"
    ]
    usable = arrays["valid"].any(axis=1)
    pairings = CaptionSet(arrays["tokens"], arrays["token_valid"], usable, arrays["source"]).pairings()
    assert len(pairings) == 5 and usable.sum() == 5
    rows = np.stack(pairings)
    sums = jax.jit(partial(text_sums, loaded.task))
    terms = sums(loaded.params, arrays, arrays["tokens"][rows], arrays["token_valid"][rows])
    loss = jax.jit(loaded.task.loss)
    for pairing, total, count in zip(pairings, *terms):
        inverse = np.argsort(pairing)
        moved = {**arrays, "patches": arrays["patches"][inverse], "valid": arrays["valid"][inverse]}
        expected = loss(loaded.params, moved, moved["valid"].sum(axis=1))["text"]
        assert count == expected.count
        np.testing.assert_allclose(total, expected.sum, rtol=RTOL)
    assert len(set(np.asarray(terms.sum).tolist())) == 5


@pytest.mark.parametrize("size", [2, 3, 110])
def test_derangements_move_everything(size):
    """No element stays in place, and no two permutations agree anywhere."""
    permutations = derangements(size, 4)
    assert len(permutations) == min(4, size - 1)
    for row in zip(np.arange(size), *permutations):
        assert len(set(map(int, row))) == len(row)
    for permutation in permutations:
        assert sorted(permutation) == list(range(size))


@pytest.mark.parametrize("size", [0, 1])
def test_derangements_of_fewer_than_two_items(size):
    """Fewer than two items have no derangement."""
    assert derangements(size, 4) == []


def test_has_texture_ignores_jpeg_noise():
    """A patch of one colour with JPEG noise has no texture; one with an edge or a gradient has."""
    noise = np.random.default_rng(0).integers(-1, 2, 588)
    flat = [np.full(588, 255), np.tile([200, 10, 30], 196), np.full(588, 128) + noise]
    edge = np.full(588, 255)
    edge[:42] = 200  # One of fourteen rows of pixels.
    textured = [edge, np.arange(588) // 4]
    result = has_texture(jnp.asarray(np.stack(flat + textured), jnp.uint8)[None], 3)
    assert result.tolist() == [[False] * 3 + [True] * 2]


def test_main_writes_json_and_prints_a_table(workdir, tmp_path, capsys, figures):
    """The command writes the figures as JSON and prints them as a table."""
    file = tmp_path / "deep" / "figures.json"
    assert main(["--checkpoint", f"{workdir}:20", "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == figures
    printed = capsys.readouterr().out
    assert f"{figures['loss_text_shuffled_alt']:.4f}" in printed and "5 held-out images" in printed


def test_main_with_resolutions(workdir, tmp_path, capsys, figures):
    """The output has figures at each named resolution, and those at the run's own resolution are unchanged."""
    file = tmp_path / "figures.json"
    arguments = ["--checkpoint", f"{workdir}:20", "--json", str(file), "--resolution", "32", "48"]
    assert main(arguments) == 0
    both = json.loads(file.read_text())
    assert both["32"] == figures and set(both["48"]) == KEYS
    assert both["48"]["loss_image"] != figures["loss_image"]
    assert "5 held-out images at 48" in capsys.readouterr().out


def test_main_limits_the_batch_to_the_held_out_set(workdir, monkeypatch):
    """A batch size beyond the held-out set is reduced to about its size."""
    sizes = []
    monkeypatch.setattr(heldout, "held_out_metrics", lambda loaded: sizes.append(loaded.config.eval.batch_size))
    with pytest.raises(TypeError):  # The patched metrics are None.
        main(["--checkpoint", str(workdir), "--batch-size", "1000000000"])
    assert sizes[0] < 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--checkpoint"),
        (["--checkpoint", "nowhere"], "'nowhere'"),
        (["--checkpoint", "{workdir}", "--steps", "3"], "--steps"),
        (["--checkpoint", "{workdir}", "--batch-size", "0"], "'0' is not a whole number above zero"),
        (["--checkpoint", "{workdir}", "--batch-size", "9" * 20], "is more than"),
        (["--checkpoint", "{workdir}:7"], "20, 40"),
        (["--checkpoint", "{workdir}", "--resolution", "tall"], "--resolution is unknown: 'tall'"),
        (["--checkpoint", "{workdir}", "--resolution", "native:"], "'native:'"),
        (["--checkpoint", "{workdir}", "--resolution", "36"], "36 px, patches of 8"),
        (["--checkpoint", "{workdir}", "--resolution", "native:16"], "needs position embeddings that accept any grid"),
        (["--checkpoint", "{workdir}", "--two\nlines"], "--two lines"),
    ],
)
def test_heldout_command_user_errors(workdir, capsys, arguments, message):
    """A wrong command line ends with one line and code 2."""
    try:
        code = main([argument.format(workdir=workdir) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith("error: ") and message in printed.err
