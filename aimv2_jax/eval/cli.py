"""Command-line arguments and results files shared by the evaluation commands."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aimv2_jax.cli import check_output, positive
from aimv2_jax.errors import UserError
from aimv2_jax.pretrained.model import Resolution

_RUN_HELP = "WORKDIR (its best step), WORKDIR:STEP or WORKDIR:last"


def add_checkpoint(parser: argparse.ArgumentParser, help_text: str = _RUN_HELP) -> None:
    """Adds the flags that name a trained model."""
    parser.add_argument("--checkpoint", required=True, metavar="SPEC", help=help_text)
    _add_weights(parser)


def add_encoder(parser: argparse.ArgumentParser, with_layer: bool = True) -> None:
    """Adds the flags that name an encoder and its image preprocessing; --layer only with `with_layer`."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="SPEC", help="the encoder, see below")
    if with_layer:
        layer_help = "features after block N, or 0: before the first block (default: after the final norm)"
        add("--layer", type=int, metavar="N", help=layer_help)
    add("--image-size", type=positive, metavar="PIXELS", help="side of the centre square (default: the model's own)")
    area_help = "use whole images in at most this many patches (native-resolution models)"
    add("--area", type=positive, metavar="PATCHES", help=area_help)
    dtype_help = "dtype of the encoder's computation (default %(default)s)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype_help)
    add("--heads", type=positive, metavar="N", help="attention heads, for a .safetensors file without a config")
    _add_weights(parser)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    weights_help = "averaged parameters if the run kept them, or the raw ones of that step (default %(default)s)"
    parser.add_argument("--weights", choices=("average", "raw"), default="average", help=weights_help)


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name the classes of a labelled dataset, and the files for results on them."""
    add = parser.add_argument
    add("--label", required=True, metavar="NAME", help="the label to predict")
    add("--by", metavar="NAME", help="another label; results are also reported for each of its values")
    add("--without", type=_names, default=(), metavar="A,B", help="excluded values of --label")
    add("--json", type=Path, metavar="FILE", help="write the metrics to this file")
    add("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix")


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def resolution(text: str) -> Resolution:
    """Parses `336` (pixels) or `native:256` (patches); for argparse's `type=`."""
    native, _, number = text.rpartition(":")
    if not number.isdecimal() or native not in ("", "native"):
        raise UserError("--resolution is unknown", text, "Give pixels such as 336, or native:256 (patches)")
    return Resolution(area=int(number)) if native else Resolution(image_size=int(number))


def check_layer(layer: int | None, depth: int) -> None:
    """Raises `UserError` unless `layer` is None or 0 to `depth`."""
    if layer is not None and not 0 <= layer <= depth:
        raise UserError("--layer is out of range", layer, f"Give 0 to {depth}")


def check_files(**files: Path | None) -> None:
    """Checks the results files before any work, keyed by their flags: `json`, and the others for figures."""
    for flag, file in files.items():
        if file is not None:
            check_output(file, "" if flag == "json" else ".png", f"--{flag}")


def write_json(file: Path, metrics: Mapping[str, Any]) -> None:
    """Writes the metrics to the `file` of --json and creates its folder."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError("--json cannot be written", str(file), f"Give another file: {error.strerror}") from error
