"""Writes an encoder for others, and proves what it wrote.

    python -m aimv2_jax.export.hf --checkpoint runs/mine --output exported         # for Hugging Face's transformers
    python -m aimv2_jax.export.hf --checkpoint runs/mine --output exported --format orbax          # for users of JAX
    python -m aimv2_jax.export.hf --checkpoint runs/mine --output exported --whole # with decoder and tokenizer
    python -m aimv2_jax.export.hf --import apple.safetensors --output imported --format orbax

With --format hf the folder has model.safetensors, config.json, preprocessor_config.json and a model card, README.md:
`transformers` reads it by Aimv2VisionModel.from_pretrained and AutoImageProcessor.from_pretrained. With --format orbax
it is a checkpoint of the encoder's parameters alone, with --whole of all parameters: what takes --checkpoint or
init.path takes the folder. At the end what was written is read back and compared, on real pictures.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from aimv2_jax.errors import EXIT_FINISHED, UserError, reports_user_errors
from aimv2_jax.export.check import check_model, check_written
from aimv2_jax.export.orbax import write_encoder, write_model
from aimv2_jax.export.source import open_weights
from aimv2_jax.export.transformers import write_folder
from aimv2_jax.flags import Parser, make_output_folder, positive
from aimv2_jax.platforms import skip_absent_tpu

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked flags of a command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.export.hf", description=summary, epilog=epilog)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="SPEC", help="WORKDIR (its best step), WORKDIR:STEP or WORKDIR:last")
    source.add_argument(
        "--import",
        dest="foreign",
        metavar="PATH",
        help="a folder of Hugging Face's, or a .safetensors file in its or Apple's names",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    add("--format", choices=("hf", "orbax"), default="hf", help="default %(default)s")
    add("--whole", action="store_true", help="encoder, decoder, tokenizer and config, for aimv2_jax")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of --format hf (default float32)")
    add(
        "--max-file-size",
        type=_size,
        default=5 * 10**9,
        metavar="N",
        help="such as 5GB, the default; above, several files",
    )
    add("--heads", type=positive, metavar="N", help="of a file by itself, where they are not 128 wide")
    add(
        "--weights",
        choices=("average", "raw"),
        default="average",
        help="of a run that kept an average (default %(default)s)",
    )
    flags = parser.parse_args(arguments)
    if flags.whole and flags.foreign:
        parser.error("--whole is for --checkpoint: an imported model has no decoder")
    if flags.dtype and (flags.whole or flags.format == "orbax"):
        parser.error("--dtype is for --format hf: checkpoints are float32")
    if flags.heads and not flags.foreign:
        parser.error("--heads is for --import")
    return flags


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)([KMG]B)?", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB")
    return int(match[1]) * _UNITS[match[2] or ""]


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    weights = open_weights(flags.checkpoint or flags.foreign, flags.heads, flags.weights)
    if weights.left:
        print(f"left there: {len(weights.left)} tensors of other parts of the model, such as {weights.left[0]}")
    make_output_folder(flags.output)
    if any(flags.output.iterdir()):
        raise UserError("--output is not empty", str(flags.output), "Give a new folder")
    if flags.whole:
        write_model(flags.output, flags.checkpoint, flags.weights)
    elif flags.format == "orbax":
        write_encoder(flags.output, weights)
    else:
        write_folder(flags.output, weights, flags.dtype or "float32", flags.max_file_size)
    if flags.whole:
        print(check_model(flags.output, flags.checkpoint, flags.weights))
    else:
        print(check_written(flags.output, weights, flags.dtype or "float32"))
    print(f"wrote {flags.output}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
