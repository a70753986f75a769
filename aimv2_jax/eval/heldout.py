"""Held-out metrics of a checkpoint.

    python -m aimv2_jax.eval.heldout --checkpoint SPEC [--json FILE] [--batch-size N]

loss_image            next-patch loss at the prefix lengths of config eval.prefixes, as eval_loss_image of the run
loss_image_textured   the same without patches of one flat colour, which are too easy to predict
loss_text             next-token loss with full attention over the whole image
loss_text_shuffled    the same with each caption paired with another example's image
unigram_entropy       entropy of the training captions' tokens: the text loss without context or image
examples              held-out images

loss_text, loss_text_shuffled and unigram_entropy are also given for each caption kind, as loss_text_KIND and so on.
Units are nats per token, or mean squared error per normalised pixel value. A value is null if the run has no such loss
or captions.

B batch, L patches, P pixel values per patch, T text, C captions paired with an image in turn, V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.cli import Parser, positive
from aimv2_jax.config.schema import Config
from aimv2_jax.data.pipeline import evaluation_batches
from aimv2_jax.data.sources import open_datasets
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import EXIT_FINISHED, cli_main
from aimv2_jax.eval.cli import add_checkpoint, resolution, write_json
from aimv2_jax.eval.token_entropy import entropy, token_frequencies
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.model import PretrainedModel, check_held_out, load
from aimv2_jax.train import losses
from aimv2_jax.train.evaluate import Totals, fixed_prefixes
from aimv2_jax.train.pretrain_task import PretrainTask
from aimv2_jax.train.task import Batch, Params, SumCount

# A patch is flat if its pixel values (0 … 1) vary within each channel by less than two of 255 levels, about the noise
# that JPEG adds. Channels may differ from each other (its colour): all flat patches of one colour have the same target.
FLAT_VARIANCE = (2 / 255) ** 2

# Images that each caption is paired with in turn. Four halve the noise from the choice of images.
SHUFFLES = 4


def has_texture(patches: UInt8[Array, "B L P"], channels: int) -> Bool[Array, "B L"]:
    """True for patches of more than one flat colour."""
    values = patches.reshape(*patches.shape[:2], -1, channels) / 255
    return jnp.mean(jnp.var(values, axis=2), axis=-1) >= FLAT_VARIANCE


def derangements(size: int, count: int) -> list[Int[np.ndarray, " size"]]:
    """Up to `count` deterministic permutations of 0 … size-1 without fixed points; no two agree at any index.

    They are the shifts of one shuffled cycle, of which there are size - 1.
    """
    cycle = np.random.default_rng(0).permutation(size)
    permutations = []
    for shift in range(1, min(count, size - 1) + 1):
        permutation = np.empty(size, np.int64)
        permutation[cycle] = np.roll(cycle, shift)
        permutations.append(permutation)
    return permutations


@dataclasses.dataclass(frozen=True)
class CaptionSet:
    """All held-out captions of a kind, one row per example in evaluation order, padding rows included."""

    tokens: Int[np.ndarray, "N T"]
    token_valid: Bool[np.ndarray, "N T"]
    usable: Bool[np.ndarray, " N"]
    source: Int[np.ndarray, " N"]

    def pairings(self) -> list[Int[np.ndarray, " N"]]:
        """Caption row for each example: first its own, then those of other examples in turn (see `derangements`)."""
        [rows] = np.nonzero(self.usable)
        pairings = [np.arange(len(self.usable))]
        for permutation in derangements(len(rows), SHUFFLES):
            pairing = pairings[0].copy()
            pairing[rows] = rows[permutation]
            pairings.append(pairing)
        return pairings


def read_captions(config: Config, tokenizer: Tokenizer) -> dict[str, CaptionSet]:
    """Reads the held-out captions, by kind."""
    parts: dict[str, list[CaptionSet]] = collections.defaultdict(list)
    for kind, batch in evaluation_batches(config, np.arange(config.eval.batch_size), tokenizer):
        arrays = batch.arrays
        usable = arrays["valid"].any(axis=1)
        parts[kind].append(CaptionSet(arrays["tokens"], arrays["token_valid"], usable, arrays["source"]))
    fields = [field.name for field in dataclasses.fields(CaptionSet)]
    return {
        kind: CaptionSet(**{name: np.concatenate([getattr(part, name) for part in batches]) for name in fields})
        for kind, batches in parts.items()
    }


def count_images(captions: Mapping[str, CaptionSet]) -> int:
    """Number of distinct images: a source has the same images for each of its caption kinds."""
    by_source: collections.Counter[int] = collections.Counter()
    for caption_set in captions.values():
        by_source |= collections.Counter(caption_set.source[caption_set.usable].tolist())
    return by_source.total()


def image_sums(task: PretrainTask, params: Params, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, SumCount]:
    """Image loss sums of a batch: over all patches of the loss mask, and over the textured ones."""
    pixels = task.normalise(batch)
    predicted = task.model.apply(
        {"params": params}, pixels, batch["coords"], batch["valid"], batch["tokens"], prefix, ("pixels",)
    ).pixels
    targets = losses.patch_targets(pixels, task.target_eps)
    loss_mask = losses.image_loss_mask(prefix, batch["valid"])
    textured = loss_mask & has_texture(batch["patches"], len(task.pixel_mean))
    return {
        name: SumCount(losses.image_loss_sum(predicted, targets, mask), jnp.sum(mask))
        for name, mask in (("image", loss_mask), ("image_textured", textured))
    }


def text_sums(
    task: PretrainTask, params: Params, batch: Batch, tokens: Int[Array, "C B T"], token_valid: Bool[Array, "C B T"]
) -> SumCount:
    """Text loss sums [C] of a batch's images with each of C caption assignments; one encoder pass, full attention."""
    text = dataclasses.replace(task, weights={"text": 1.0})
    prefix = jnp.sum(batch["valid"], axis=1)

    def loss(tokens, token_valid):
        return text.loss(params, {**batch, "tokens": tokens, "token_valid": token_valid}, prefix)["text"]

    return jax.vmap(loss)(tokens, token_valid)


def held_out_metrics(loaded: PretrainedModel) -> dict[str, float | int | None]:
    """All metrics, keyed as in the JSON file."""
    config, task, params = loaded.config, loaded.task, loaded.params
    check_held_out(loaded)
    tokenizer = loaded.tokenizer()
    captions = read_captions(config, tokenizer)
    pairings = {kind: captions[kind].pairings() for kind in captions}
    sum_images, sum_texts = jax.jit(partial(image_sums, task)), jax.jit(partial(text_sums, task))
    totals = Totals()
    for kind, host_batch in evaluation_batches(config, np.arange(config.eval.batch_size), tokenizer):
        batch = loaded.put(host_batch.arrays)
        if "image" in task.weights:
            for prefix in fixed_prefixes(config.eval.prefixes, host_batch.arrays["valid"]):
                for name, term in sum_images(params, batch, loaded.put(prefix)).items():
                    totals.add(f"loss_{name}", term.sum, term.count)
        if "text" in task.weights:
            rows = host_batch.step * config.eval.batch_size + np.arange(config.eval.batch_size)
            caption_rows = np.stack([pairing[rows] for pairing in pairings[kind]])
            tokens, token_valid = captions[kind].tokens[caption_rows], captions[kind].token_valid[caption_rows]
            terms = sum_texts(params, batch, tokens, token_valid)
            for name, part in (("loss_text", slice(1)), ("loss_text_shuffled", slice(1, None))):
                for key in (name, f"{name}_{kind}"):
                    totals.add(key, *(np.sum(np.asarray(values)[part], dtype=np.float64) for values in terms))
    frequencies = token_frequencies(config, tokenizer)
    kinds = config.eval.caption_types
    return {
        "loss_image": totals.mean("loss_image"),
        "loss_image_textured": totals.mean("loss_image_textured"),
        "loss_text": totals.mean("loss_text"),
        "loss_text_shuffled": totals.mean("loss_text_shuffled"),
        **{f"loss_text_{kind}": totals.mean(f"loss_text_{kind}") for kind in kinds},
        **{f"loss_text_shuffled_{kind}": totals.mean(f"loss_text_shuffled_{kind}") for kind in kinds},
        "unigram_entropy": entropy(sum(frequencies.values())),
        **{f"unigram_entropy_{kind}": entropy(frequencies[kind]) if kind in frequencies else None for kind in kinds},
        "examples": count_images(captions),
    }


def table(metrics: Mapping[str, float | int | None], kinds: tuple[str, ...]) -> str:
    """The metrics as a text table, one line per metric and one column per caption kind."""
    lines = [
        ("image loss", "loss_image"),
        ("  without flat patches", "loss_image_textured"),
        ("text loss", "loss_text"),
        ("  with shuffled images", "loss_text_shuffled"),
        ("unigram entropy", "unigram_entropy"),
    ]
    columns = ("all", *kinds)
    text = [" " * 26 + "".join(f"{column:>12}" for column in columns)]
    for title, name in lines:
        values = [metrics.get(name if column == "all" else f"{name}_{column}", "") for column in columns]
        text.append(f"{title:<26}" + "".join(f"{_format(value):>12}" for value in values))
    return "\n".join(line.rstrip() for line in text)


def _format(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4f}"


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    parser = Parser(prog="python -m aimv2_jax.eval.heldout", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics to this file")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="examples per batch (default: the run's)")
    parser.add_argument(
        "--resolution",
        type=resolution,
        nargs="+",
        metavar="R",
        help="pixels such as 336, or native:256 for whole images in at most 256 patches (default: the run's own)",
    )
    args = parser.parse_args(arguments)
    loaded = load(args.checkpoint, args.weights)
    if args.batch_size:
        # A batch beyond the number of images would only add padding rows, which take memory.
        num_images = sum(len(source) for source in open_datasets(loaded.config.eval.sources).values())
        loaded = loaded.with_eval(batch_size=max(1, min(args.batch_size, num_images)))
    models = {str(wanted): loaded.at_resolution(wanted) for wanted in args.resolution or ()}
    by_resolution = {name: held_out_metrics(model) for name, model in (models or {"": loaded}).items()}
    for name, metrics in by_resolution.items():
        suffix = f" at {name}" if name else ""
        caption_types = loaded.config.eval.caption_types
        print(f"{loaded.name}, {metrics['examples']} held-out images{suffix}\n\n{table(metrics, caption_types)}\n")
    if args.json:
        write_json(args.json, by_resolution if models else by_resolution[""])
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
