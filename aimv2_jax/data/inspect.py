"""A contact sheet of a prepared data set, or of the very batch that a config trains on at a step.

    python -m aimv2_jax.data.inspect DIR --output sheet.png
    python -m aimv2_jax.data.inspect experiments/quickstart.py --output sheet.png [--step N] [--config.KEY=VALUE ...]

DIR is a folder with dataset.json: pictures spread evenly over it, with their captions and labels, unusable records with
the reason, and what dataset.json counts. Of a config: the rows of the batch as the model gets them, cropped, flipped,
cut into patches and put together again, with the text that their tokens decode to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aimv2_jax.config import load_config
from aimv2_jax.data.datasets import DATASET_FILE
from aimv2_jax.data.locations import locate
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.flags import Parser, check_output, positive, split_overrides
from aimv2_jax.untrusted import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_STEP = 2**31 - 1
MOST_PICTURES = 200  # More make a sheet that no viewer likes to open.


def draw(what: str, overrides: Sequence[tuple[str, str]], step: int | None, most_pictures: int) -> Figure:
    """The contact sheet of a data set's folder or of a config; raises `UserError` if `what` is neither."""
    from aimv2_jax.data.batch_sheet import batch_sheet
    from aimv2_jax.data.dataset_sheet import dataset_sheet

    path = locate(what)
    if path.is_dir():
        if step is not None or overrides:
            raise UserError("--step and --config.KEY are for a config, and this is a folder", what, "Leave them out")
        return dataset_sheet(_dataset(what, path), what, most_pictures)
    if not path.is_file():
        raise UserError("no such folder or file", what, "Give the folder of a prepared data set, or a config's file")
    if path.suffix != ".py":
        raise UserError(
            "neither a prepared data set nor a config",
            what,
            f"Give the folder that holds {DATASET_FILE}, or a .py file",
        )
    return batch_sheet(load_config(path, overrides), what, step or 0, most_pictures)


def _dataset(what: str, path: Path) -> Source:
    if not (path / DATASET_FILE).is_file():
        inside = sorted(str(file.parent.relative_to(path)) for file in path.glob(f"*/{DATASET_FILE}"))
        names = printable(", ".join(inside))
        remedy = f"Give one of the data sets in it: {names}" if inside else "Prepare the data set first"
        raise UserError(f"neither a prepared data set nor a config: the folder has no {DATASET_FILE}", what, remedy)
    return Source(path.name, what, what="the data set")


def _parser() -> Parser:
    parser = Parser(prog="python -m aimv2_jax.data.inspect", description=__doc__)
    parser.add_argument("what", metavar="DIR_OR_CONFIG", help="a folder with dataset.json, or an experiment's file")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG", help="the file to write")
    parser.add_argument("--step", type=int, metavar="N", help="the step whose batch is shown, of a config (default: 0)")
    parser.add_argument(
        "--max-pictures",
        type=partial(positive, most=MOST_PICTURES),
        default=24,
        metavar="N",
        help=f"pictures shown at most, up to {MOST_PICTURES} (default: 24)",
    )
    return parser


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(rest)
    if args.step is not None and args.step < 0:
        raise UserError("--step is below zero", args.step, "Give 0 or more")
    if args.step is not None and args.step > MOST_STEP:
        raise UserError("--step is beyond any run", args.step, f"Give {MOST_STEP} or less")
    check_output(args.output, suffix=".png")
    figure = draw(args.what, overrides, args.step, args.max_pictures)
    from aimv2_jax.data.contact_sheet import save

    save(figure, args.output)
    print(args.output)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
