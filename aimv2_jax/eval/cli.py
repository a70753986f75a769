"""Command-line arguments shared by the evaluation commands."""

from __future__ import annotations

import argparse

from aimv2_jax.cli import positive
from aimv2_jax.errors import UserError


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a trained model."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="SPEC", help="WORKDIR (its best step), WORKDIR:STEP or WORKDIR:last"
    )
    parser.add_argument(
        "--weights",
        choices=("average", "raw"),
        default="average",
        help="averaged parameters if the run kept them (default), or the raw ones of that step",
    )


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name an encoder and its image preprocessing."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="SPEC", help="the encoder, see below")
    layer_help = "features after block N, or 0: before the first block (default: after the final norm)"
    add("--layer", type=int, metavar="N", help=layer_help)
    add("--image-size", type=positive, metavar="PIXELS", help="side of the centre square (default: the model's own)")
    area_help = "use whole images in at most this many patches (native-resolution models)"
    add("--area", type=positive, metavar="PATCHES", help=area_help)
    dtype_help = "dtype of the encoder's computation (default %(default)s)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    add("--heads", type=positive, metavar="N", help="attention heads, for a .safetensors file without a config")
    weights_help = "parameters of a run that kept an average (default %(default)s)"
    add("--weights", choices=("average", "raw"), default="average", help=weights_help)


def check_layer(layer: int | None, depth: int) -> None:
    """Raises `UserError` unless `layer` is None or 0 to `depth`."""
    if layer is not None and not 0 <= layer <= depth:
        raise UserError("--layer is out of range", layer, f"Give 0 to {depth}")
