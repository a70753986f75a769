"""Arguments that the commands on a trained model share."""

from __future__ import annotations

import argparse

from aimv2_jax.errors import UserError
from aimv2_jax.flags import positive


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The flags that every one of them has."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="SPEC", help="WORKDIR (its best step), WORKDIR:STEP or WORKDIR:last"
    )
    parser.add_argument(
        "--weights",
        choices=("average", "raw"),
        default="average",
        help="the average of the parameters, where the run kept one (default), or those of that very step",
    )


def add_encoder(parser: argparse.ArgumentParser) -> None:
    """The flags of commands on an encoder: which, and how it sees pictures."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="SPEC", help="the encoder, see below")
    add("--layer", type=int, metavar="N", help="after block N, 0 before the first (default: after the final norm)")
    add("--image-size", type=positive, metavar="PIXELS", help="of the centre square, in place of the model's own")
    add("--area", type=positive, metavar="PATCHES", help="whole pictures in at most so many patches (native models)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the encoder (default %(default)s)")
    add("--heads", type=positive, metavar="N", help="of a .safetensors file that does not tell")
    add("--weights", choices=("average", "raw"), default="average", help="of a run that kept an average")


def check_layer(layer: int | None, depth: int) -> None:
    """Raises `UserError` for a --layer that an encoder of so many blocks does not have."""
    if layer is not None and not 0 <= layer <= depth:
        raise UserError("--layer is out of range", layer, f"Give 0 to {depth}")
