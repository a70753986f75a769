"""Draws a checkpoint's predictions, captions and training curves.

    python -m aimv2_jax.eval.visualize --checkpoint SPEC --output DIR [--examples N]

DIR/predictions.png   held-out images, the prefix given to the model, and its predictions of the other patches
DIR/captions.png      held-out images, the model's caption of each, and the true captions
DIR/curves.png        the run's losses, learning rate, gradient norm and speed over its steps
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.cli import Parser, make_output_folder, positive
from aimv2_jax.data.pipeline import evaluation_batches
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.data.transforms.geometry import unpatchify
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.eval.cli import add_checkpoint
from aimv2_jax.eval.generate import Captions, greedy
from aimv2_jax.eval.plots import image_cards, image_grid
from aimv2_jax.eval.reconstruction import denormalise, fade_hidden, fill_predictions
from aimv2_jax.monitoring.curves import curves_figure
from aimv2_jax.monitoring.metrics import read_metrics
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.model import PretrainedModel, check_held_out, load
from aimv2_jax.train.evaluate import fixed_prefixes
from aimv2_jax.train.task import Batch, Params

DOTS_PER_INCH = 150
MAX_EXAMPLES = 100  # Each example is a row; much taller figures can be neither viewed nor written.


@dataclasses.dataclass(frozen=True)
class Examples:
    """Held-out images as a batch with empty captions, and the true captions of each image by kind."""

    batch: dict[str, np.ndarray]
    captions: list[dict[str, str]]


def read_examples(loaded: PretrainedModel, tokenizer: Tokenizer, count: int) -> Examples:
    """The first `count` usable images of the held-out sources, taken from the sources in turn.

    Captions are cleaned and truncated as in training.
    """
    check_held_out(loaded)
    size = count * len(loaded.config.eval.sources)
    # Without an area all images are squares, which can be drawn in a grid.
    config = loaded.with_eval(max_examples=count, batch_size=size, area=None).config
    names = ("patches", "coords", "valid")
    rows: dict[bytes, dict[str, np.ndarray]] = {}
    captions: dict[bytes, dict[str, str]] = {}
    for kind, batch in evaluation_batches(config, np.arange(size), tokenizer):
        arrays = batch.arrays
        for row in _in_turn(arrays["source"], arrays["valid"].any(axis=1)):
            key = arrays["patches"][row].tobytes()
            rows.setdefault(key, {name: arrays[name][row] for name in names})
            text = tokenizer.decode(arrays["tokens"][row][arrays["token_valid"][row]])
            captions.setdefault(key, {})[kind] = text
    chosen = list(rows)[:count]
    if not chosen:
        raise UserError("no held-out image is usable", dict(config.eval.sources), "Prepare the dataset again")
    images = {name: np.stack([rows[key][name] for key in chosen]) for name in names}
    shape = len(chosen), config.model.decoder.text_length
    batch = {**images, "tokens": np.zeros(shape, np.int32), "token_valid": np.zeros(shape, bool)}
    return Examples(batch, [captions[key] for key in chosen])


def _in_turn(sources: np.ndarray, usable: np.ndarray) -> list[int]:
    """Indices of the usable rows: the first of each source, then the second of each, …"""
    rank = np.zeros(len(sources), int)
    for source in np.unique(sources):
        rank[sources == source] = np.cumsum(usable[sources == source])
    return [int(row) for row in np.lexsort((sources, rank)) if usable[row]]


def predictions_figure(loaded: PretrainedModel, examples: Examples) -> Figure:
    """Each image, the image for a prediction of zero, and the predictions at each prefix of config `eval.prefixes`."""
    config, task = loaded.config, dataclasses.replace(loaded.task, weights={"image": 1.0})
    grid, size = config.grid, config.model.patch_size
    restore = partial(denormalise, mean=task.pixel_mean, std=task.pixel_std, eps=task.target_eps)
    patches_BLP, batch = examples.batch["patches"], loaded.put(examples.batch)

    def draw(images: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [unpatchify(patches, grid, size) for patches in images]

    predict = jax.jit(lambda params, batch, prefix: task.predict(params, batch, prefix).pixels)
    flat = [restore(np.zeros_like(patches[1:], np.float32), patches) for patches in patches_BLP]
    groups = [
        ("held-out image", {"original": draw(patches_BLP)}),
        ("without a model", {"zero predicted": draw(flat)}),
    ]
    for prefix_B in fixed_prefixes(config.eval.prefixes, examples.batch["valid"]):
        pixels_BMP = np.asarray(predict(loaded.params, batch, loaded.put(prefix_B)))
        given, predicted = [], []
        for patches, pixels, prefix in zip(patches_BLP, pixels_BMP, prefix_B):
            given.append(fade_hidden(patches, prefix))
            predicted.append(fill_predictions(patches, restore(pixels, patches), prefix))
        title = f"prefix of {prefix_B[0]} of {config.num_patches} patches"
        groups.append((title, {"given": draw(given), "predicted": draw(predicted)}))
    note = (
        "Each patch after the prefix is predicted from all true patches before it in raster order: one step ahead,"
        " not a continuation.\nThe model predicts patches of mean 0 and variance 1; the true mean and variance of each"
        " are restored. A prediction of zero gives the second column."
    )
    return image_grid(groups, f"Next-patch predictions, step {loaded.step:,}", note)


def captions_figure(loaded: PretrainedModel, tokenizer: Tokenizer, examples: Examples) -> Figure:
    """Each image with the model's greedy caption and its true captions."""
    config, task = loaded.config, loaded.task

    @jax.jit
    def generate(params: Params, batch: Batch) -> Captions:
        images = task.normalise(batch), batch["coords"], batch["valid"]
        return greedy(task.model, params, *images, tokenizer.eos_id, num_pieces=tokenizer.num_pieces)

    captions = jax.device_get(generate(loaded.params, loaded.put(examples.batch)))
    texts = []
    for tokens, length, true in zip(captions.tokens, captions.lengths, examples.captions):
        texts.append({"model": tokenizer.decode(tokens[:length]), **{f"true, {kind}": true[kind] for kind in true}})
    images = [unpatchify(patches, config.grid, config.model.patch_size) for patches in examples.batch["patches"]]
    note = "Blue: the greedy caption, given the whole image. Below it: the true captions, by kind."
    return image_cards(images, texts, f"Captions of held-out images, step {loaded.step:,}", note)


def run_curves(loaded: PretrainedModel) -> Figure:
    """Training curves of the whole run, up to its newest line of metrics, with a line at the checkpoint."""
    training, evaluation = read_metrics(loaded.workdir)
    return curves_figure([*training, *evaluation], {f"checkpoint, step {loaded.step:,}": [loaded.step]})


def save(figure: Figure, path: Path) -> None:
    """Writes `figure` as PNG and prints its path."""
    figure.savefig(path, dpi=DOTS_PER_INCH)
    print(path)


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    parser = Parser(prog="python -m aimv2_jax.eval.visualize", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the PNGs")
    parser.add_argument(
        "--examples",
        type=partial(positive, most=MAX_EXAMPLES),
        default=8,
        metavar="N",
        help=f"held-out images, up to {MAX_EXAMPLES} (default: 8)",
    )
    args = parser.parse_args(arguments)
    loaded = load(args.checkpoint, args.weights)
    make_output_folder(args.output)
    tokenizer = loaded.tokenizer()
    examples = read_examples(loaded, tokenizer, args.examples)
    if "image" in loaded.task.weights:
        save(predictions_figure(loaded, examples), args.output / "predictions.png")
    if "text" in loaded.task.weights:
        save(captions_figure(loaded, tokenizer, examples), args.output / "captions.png")
    save(run_curves(loaded), args.output / "curves.png")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
