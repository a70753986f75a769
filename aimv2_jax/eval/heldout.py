"""The held-out figures of a checkpoint.

    python -m aimv2_jax.eval.heldout --checkpoint SPEC [--json FILE] [--batch-size N]

loss_image            next-patch loss at the prefix lengths of config eval.prefixes, as the loop's eval_loss_image
loss_image_textured   the same without patches of one flat colour, which are predicted too easily
loss_text             next-token loss where the encoder reads the whole picture freely
loss_text_shuffled    the same with each caption given another example's picture
unigram_entropy       of the training captions' tokens: what the text loss is without context or picture
examples              held-out pictures

loss_text, loss_text_shuffled and unigram_entropy also stand for each caption kind, as loss_text_KIND and so on. All are
in nats a token, or mean squared error a normalised number; null where the run has no such loss or captions.

B batch, L patches, P pixels a patch, T text, C captions given to a picture in turn, V vocabulary.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.config import Config
from aimv2_jax.data.pipeline import evaluation_batches, open_sources
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.eval.arguments import add_checkpoint
from aimv2_jax.eval.entropy import entropy, token_frequencies
from aimv2_jax.eval.load import Loaded, check_held_out, load
from aimv2_jax.flags import Parser, positive
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.train import losses
from aimv2_jax.train.evaluate import Totals, fixed_prefixes
from aimv2_jax.train.task import Batch, Params, PretrainTask, SumCount

# A patch is flat where its numbers (0 … 1) vary within the channels by less than two of 255 levels: JPEG makes about
# that much of nothing. Across channels they may differ: that is its colour, and the target of every flat patch of one
# colour is the same.
FLAT_VARIANCE = (2 / 255) ** 2

# Pictures that each caption is given in turn: the figure's noise from the choice of pictures is halved.
SHUFFLES = 4


def has_texture(patches: UInt8[Array, "B L P"], channels: int) -> Bool[Array, "B L"]:
    """Whether a patch is more than one flat colour."""
    values = patches.reshape(*patches.shape[:2], -1, channels) / 255
    return jnp.mean(jnp.var(values, axis=2), axis=-1) >= FLAT_VARIANCE


def derangements(size: int, count: int) -> list[Int[np.ndarray, " size"]]:
    """Up to `count` permutations of 0 … size-1 without fixed points, always the same; no two agree anywhere.

    They are the shifts of one shuffled circle; a size of n has n - 1.
    """
    circle = np.random.default_rng(0).permutation(size)
    permutations = []
    for shift in range(1, min(count, size - 1) + 1):
        permutation = np.empty(size, np.int64)
        permutation[circle] = np.roll(circle, shift)
        permutations.append(permutation)
    return permutations


@dataclasses.dataclass(frozen=True)
class CaptionSet:
    """All held-out captions of a kind, a row an example, as the evaluation numbers them; rows of filling included."""

    tokens: Int[np.ndarray, "N T"]
    token_valid: Bool[np.ndarray, "N T"]
    usable: Bool[np.ndarray, " N"]
    source: Int[np.ndarray, " N"]

    def given(self) -> list[Int[np.ndarray, " N"]]:
        """For each example the row of its own caption, then in turn those of other examples (see `derangements`)."""
        [rows] = np.nonzero(self.usable)
        turns = [np.arange(len(self.usable))]
        for permutation in derangements(len(rows), SHUFFLES):
            turn = turns[0].copy()
            turn[rows] = rows[permutation]
            turns.append(turn)
        return turns


def read_captions(config: Config, tokenizer: Tokenizer) -> dict[str, CaptionSet]:
    """The held-out captions by kind."""
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


def count_pictures(captions: Mapping[str, CaptionSet]) -> int:
    """Pictures behind the captions: those of one source are the same for every kind that it has."""
    by_source: collections.Counter[int] = collections.Counter()
    for kind in captions.values():
        by_source |= collections.Counter(kind.source[kind.usable].tolist())
    return by_source.total()


def image_sums(task: PretrainTask, params: Params, batch: Batch, prefix: Int[Array, " B"]) -> dict[str, SumCount]:
    """The image loss of a batch, over all counted patches and over those with texture."""
    pixels = task.normalise(batch)
    predicted = task.model.apply(
        {"params": params}, pixels, batch["coords"], batch["valid"], batch["tokens"], prefix, ("pixels",)
    ).pixels
    targets = losses.patch_targets(pixels, task.target_eps)
    counted = losses.counted_patches(prefix, batch["valid"])
    textured = counted & has_texture(batch["patches"], len(task.pixel_mean))
    return {
        name: SumCount(losses.image_loss_sum(predicted, targets, mask), jnp.sum(mask))
        for name, mask in (("image", counted), ("image_textured", textured))
    }


def text_sums(
    task: PretrainTask, params: Params, batch: Batch, tokens: Int[Array, "C B T"], token_valid: Bool[Array, "C B T"]
) -> SumCount:
    """The text loss of a batch's pictures with each of C sets of captions, [C]; the encoder reads freely, and once."""
    text = dataclasses.replace(task, weights={"text": 1.0})
    prefix = jnp.sum(batch["valid"], axis=1)

    def loss(tokens, token_valid):
        return text.loss(params, {**batch, "tokens": tokens, "token_valid": token_valid}, prefix)["text"]

    return jax.vmap(loss)(tokens, token_valid)


def held_out_figures(loaded: Loaded) -> dict[str, float | int | None]:
    """All figures by the names of the JSON file."""
    config, task, params = loaded.config, loaded.task, loaded.params
    check_held_out(loaded)
    tokenizer = loaded.tokenizer()
    captions = read_captions(config, tokenizer)
    given = {kind: captions[kind].given() for kind in captions}
    sum_images, sum_texts = jax.jit(partial(image_sums, task)), jax.jit(partial(text_sums, task))
    totals = Totals()
    for kind, host in evaluation_batches(config, np.arange(config.eval.batch_size), tokenizer):
        batch = loaded.put(host.arrays)
        if "image" in task.weights:
            for prefix in fixed_prefixes(config.eval.prefixes, host.arrays["valid"]):
                for name, term in sum_images(params, batch, loaded.put(prefix)).items():
                    totals.add(f"loss_{name}", term.sum, term.count)
        if "text" in task.weights:
            rows = host.step * config.eval.batch_size + np.arange(config.eval.batch_size)
            turns = np.stack([turn[rows] for turn in given[kind]])
            terms = sum_texts(params, batch, captions[kind].tokens[turns], captions[kind].token_valid[turns])
            for name, part in (("loss_text", slice(1)), ("loss_text_shuffled", slice(1, None))):
                for key in (name, f"{name}_{kind}"):
                    totals.add(key, *(np.sum(np.asarray(numbers)[part], dtype=np.float64) for numbers in terms))
    frequencies = token_frequencies(config, tokenizer)
    kinds = config.eval.kinds
    return {
        "loss_image": totals.mean("loss_image"),
        "loss_image_textured": totals.mean("loss_image_textured"),
        "loss_text": totals.mean("loss_text"),
        "loss_text_shuffled": totals.mean("loss_text_shuffled"),
        **{f"loss_text_{kind}": totals.mean(f"loss_text_{kind}") for kind in kinds},
        **{f"loss_text_shuffled_{kind}": totals.mean(f"loss_text_shuffled_{kind}") for kind in kinds},
        "unigram_entropy": entropy(sum(frequencies.values())),
        **{f"unigram_entropy_{kind}": entropy(frequencies[kind]) if kind in frequencies else None for kind in kinds},
        "examples": count_pictures(captions),
    }


def table(figures: Mapping[str, float | int | None], kinds: tuple[str, ...]) -> str:
    """The figures for a person: a line each, a column a caption kind."""
    lines = [
        ("image loss", "loss_image"),
        ("  without flat patches", "loss_image_textured"),
        ("text loss", "loss_text"),
        ("  with shuffled pictures", "loss_text_shuffled"),
        ("unigram entropy", "unigram_entropy"),
    ]
    columns = ("all", *kinds)
    text = [" " * 26 + "".join(f"{column:>12}" for column in columns)]
    for title, name in lines:
        values = [figures.get(name if column == "all" else f"{name}_{column}", "") for column in columns]
        text.append(f"{title:<26}" + "".join(f"{_shown(value):>12}" for value in values))
    return "\n".join(line.rstrip() for line in text)


def _shown(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4f}"


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes the figures to `path`, whose folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError("--json cannot be written", str(path), f"Give another file: {error.strerror}") from error


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    parser = Parser(prog="python -m aimv2_jax.eval.heldout", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written, beside the screen")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="examples at a time; the run's, unless given")
    parser.add_argument(
        "--resolution",
        nargs="+",
        metavar="R",
        help="pixels such as 336, or native:256 for whole pictures in so many patches; the run's own, unless given",
    )
    args = parser.parse_args(arguments)
    loaded = load(args.checkpoint, args.weights)
    if args.batch_size:
        # Not more than there are: rows of filling take memory, too.
        pictures = sum(len(source) for source in open_sources(loaded.config.eval.sources).values())
        loaded = loaded.with_eval(batch_size=max(1, min(args.batch_size, pictures)))
    seen = {name: loaded.seen_at(name) for name in args.resolution or ()}
    figures = {name: held_out_figures(each) for name, each in (seen or {"": loaded}).items()}
    for name, each in figures.items():
        at = f" at {name}" if name else ""
        print(f"{loaded.name}, {each['examples']} held-out pictures{at}\n\n{table(each, loaded.config.eval.kinds)}\n")
    if args.json:
        write_json(args.json, figures if seen else figures[""])
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
