"""Captions found for pictures, and pictures for captions, by the decoder's likelihood.

    python -m aimv2_jax.eval.retrieval --checkpoint SPEC --data data/test --kind alt --picture retrieval.png

SPEC is a run with its decoder, or an export with --whole; --data a prepared set. Every caption is scored for every
picture, so the cost grows with the square of --examples. A picture is found by the caption's likelihood; a caption by
its likelihood standardised over the pictures, so that short, common or fickle captions do not win everywhere.
--json writes text_to_image and image_to_text, each {recall@1, recall@5, recall@10, chance@1}, and examples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from aimv2_jax.allocator import keep_freed_memory
from aimv2_jax.data import records
from aimv2_jax.data.records import BadRecord
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.eval.arguments import add_checkpoint
from aimv2_jax.eval.figures import picture_cards
from aimv2_jax.eval.images import NamedPicture
from aimv2_jax.eval.likelihood import Scorer
from aimv2_jax.eval.load import load
from aimv2_jax.flags import Parser, check_output, positive
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.untrusted import printable

_DEPTHS = (1, 5, 10)
_DRAWN, _SHOWN = 8, 3  # Pictures of --picture, and captions of each.


def read_pairs(path: str, kind: str, count: int) -> tuple[list[NamedPicture], list[str]]:
    """Pictures and captions of `count` records at even distances, no caption twice; of several captions the first.

    Raises:
      UserError: where fewer than two have a caption of this kind.
    """
    source = Source(path, path, "--data")
    if kind not in source.kinds:
        there = printable(", ".join(source.kinds))
        raise UserError(f"--data {path} has no captions of this kind", kind, f"It has {there}")
    found: dict[str, NamedPicture] = {}
    step = max(1, len(source) // count)
    order = [index for first in range(step) for index in range(first, len(source), step)]
    for index in order:
        try:
            record = records.decode(source.read(index))
        except BadRecord as error:
            raise UserError("--data has a record that cannot be read", index, "Prepare the set again") from error
        for caption in record.texts(kind)[:1]:
            found.setdefault(caption, NamedPicture(f"{path}: {record.key}", record.image))
        if len(found) == count:
            break
    if len(found) < 2:
        raise UserError(f"--data {path} has no two different captions of this kind", kind, "Give a larger set")
    return list(found.values()), list(found)


def ranks(scores: Float[np.ndarray, "N N"]) -> Int[np.ndarray, " N"]:
    """How many others score at least as high as the right one, the diagonal, in its row."""
    return (scores >= np.diag(scores)[:, None]).sum(1) - 1


def recalls(scores: Float[np.ndarray, "N N"]) -> dict[str, float]:
    """`recall@k` of rows that look for their own column, and what chance gives for k = 1."""
    place = ranks(scores)
    return {f"recall@{depth}": float((place < depth).mean()) for depth in _DEPTHS} | {"chance@1": 1 / len(scores)}


def retrieval_figure(
    pictures: Sequence[np.ndarray], captions: Sequence[str], scores: Float[np.ndarray, "N N"], note: str
) -> Figure:
    """Pictures beside the captions that were found for them, best first, and their own."""
    texts = []
    for row in range(min(_DRAWN, len(pictures))):
        best = np.argsort(-scores[row], kind="stable")[:_SHOWN]
        found = {f"found, {place + 1}": captions[column] for place, column in enumerate(best)}
        texts.append(found | {f"its own, at {ranks(scores)[row] + 1} of {len(captions)}": captions[row]})
    return picture_cards(pictures[: len(texts)], texts, "Captions found by likelihood", note)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked flags of a command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.eval.retrieval", description=summary, epilog=epilog)
    add_checkpoint(parser)
    add = parser.add_argument
    add("--data", required=True, metavar="DATA", help="a prepared set")
    add("--kind", default="alt", metavar="KIND", help="of captions (default %(default)s)")
    add("--examples", type=_several, default=128, metavar="N", help="pictures and captions (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="the figures")
    add("--picture", type=Path, metavar="FILE.png", help="some pictures with what was found")
    return parser.parse_args(arguments)


def _several(text: str) -> int:
    if positive(text) < 2:
        raise argparse.ArgumentTypeError("one example finds itself: give at least 2")
    return int(text)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    keep_freed_memory()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    for path, flag, suffix in ((flags.json, "--json", ""), (flags.picture, "--picture", ".png")):
        if path is not None:
            check_output(path, suffix, flag)
    pictures, captions = read_pairs(flags.data, flags.kind, flags.examples)
    scorer = Scorer(load(flags.checkpoint, flags.weights))
    scores = scorer(pictures, *scorer.encode(captions))
    standardised = (scores - scores.mean(0)) / np.maximum(scores.std(0), 1e-6)
    found = {"text_to_image": recalls(scores.T), "image_to_text": recalls(standardised)}
    for name, one in found.items():
        print(f"{name.replace('_', ' ')}: " + ", ".join(f"{key} {value:.3f}" for key, value in one.items()))
    if flags.json is not None:
        flags.json.write_text(json.dumps(found | {"examples": len(captions)}, indent=1) + "\n", encoding="utf-8")
    if flags.picture is not None:
        seen = [scorer.eyes.pixels(picture) for picture in pictures[:_DRAWN]]
        note = f"Of {len(captions)} captions ({flags.kind}), by likelihood standardised over the pictures."
        retrieval_figure(seen, captions, standardised, note).savefig(flags.picture, dpi=110)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
