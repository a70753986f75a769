"""Contact sheet of a prepared dataset, or of the exact batch that a config trains on at a step.

    python -m aimv2_jax.data.inspect DIR --output sheet.png
    python -m aimv2_jax.data.inspect experiments/quickstart.py --output sheet.png [--step N] [--config.KEY=VALUE ...]

DIR is a folder with dataset.json, local or in a bucket. Its sheet shows the counts of dataset.json, whether the index
of the records is that of the shards, and records spread evenly over the dataset: images with their captions and labels,
their masks and depth maps to their right, and the reason where a record is unusable. Masks have the colours of classes;
depths are dark where they are great, and grey where they are 0. The sheet of a config shows the rows of the batch as
the model gets them: images cropped, flipped, patchified and reassembled, and text decoded from tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from aimv2_jax.cli import Parser, check_output, positive, split_overrides
from aimv2_jax.config.load import load_config, split_run
from aimv2_jax.data.dataset_info import DATASET_FILE
from aimv2_jax.data.record_index import find_damage
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.storage.bucket import scheme_of
from aimv2_jax.storage.paths import resolve_path
from aimv2_jax.untrusted import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_STEP = 2**31 - 1
MAX_IMAGES = 200  # Image viewers have trouble with larger sheets.


def draw(target: str, overrides: Sequence[tuple[str, str]], step: int | None, max_images: int) -> Figure:
    """Draws the contact sheet of a dataset folder or a config; raises `UserError` if `target` is neither."""
    from aimv2_jax.data.inspect.batch import batch_sheet

    path = resolve_path(target)
    if scheme_of(target) or path.is_dir():
        if step is not None or overrides:
            raise UserError(
                "--step and --config.KEY are for a config, but this is a folder", target, "Leave these flags out"
            )
        if not (scheme_of(target) or (path / DATASET_FILE).is_file()):
            nested = sorted(str(file.parent.relative_to(path)) for file in path.glob(f"*/{DATASET_FILE}"))
            names = printable(", ".join(nested))
            remedy = f"Give one of the datasets in it: {names}" if nested else "Prepare the dataset first"
            raise UserError(
                f"neither a prepared dataset nor a config: the folder has no {DATASET_FILE}", target, remedy
            )
        return _draw_dataset(target, max_images)
    file, _ = split_run(path)
    if not file.is_file():
        raise UserError("no such folder or file", target, "Give the folder of a prepared dataset, or a config file")
    if file.suffix != ".py":
        remedy = f"Give the folder that holds {DATASET_FILE}, or a .py file"
        raise UserError("neither a prepared dataset nor a config", target, remedy)
    return batch_sheet(load_config(path, overrides), target, step or 0, max_images)


def _draw_dataset(target: str, max_images: int) -> Figure:
    from aimv2_jax.data.inspect.dataset import dataset_sheet

    source = Source(PurePath(target).name, target, what="the dataset")
    folder = target if scheme_of(target) else resolve_path(target)
    damage = find_damage(folder, source.info.shards, source.info.index_crc32)
    return dataset_sheet(source, target, max_images, index=damage or "that of all shards")


def _parser() -> Parser:
    parser = Parser(prog="python -m aimv2_jax.data.inspect", description=__doc__)
    parser.add_argument("what", metavar="DIR_OR_CONFIG", help="a folder with dataset.json, or an experiment file")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG", help="the file to write")
    parser.add_argument(
        "--step", type=int, metavar="N", help="the step whose batch is shown, for a config (default: 0)"
    )
    parser.add_argument(
        "--max-images",
        type=partial(positive, most=MAX_IMAGES),
        default=24,
        metavar="N",
        help=f"maximum number of images, up to {MAX_IMAGES} (default: 24)",
    )
    return parser


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(rest)
    if args.step is not None and args.step < 0:
        raise UserError("--step is below zero", args.step, "Give 0 or more")
    if args.step is not None and args.step > MAX_STEP:
        raise UserError("--step is too large", args.step, f"Give {MAX_STEP} or less")
    check_output(args.output, suffix=".png")
    draw(args.what, overrides, args.step, args.max_images).savefig(args.output, format="png")
    print(args.output)
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
