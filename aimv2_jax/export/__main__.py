"""Exports an encoder or a whole model, and verifies the result.

    python -m aimv2_jax.export --checkpoint runs/mine --output exported         # for Hugging Face's transformers
    python -m aimv2_jax.export --checkpoint runs/mine --output exported --format orbax          # for users of JAX
    python -m aimv2_jax.export --checkpoint runs/mine --output exported --whole # with decoder and tokenizer
    python -m aimv2_jax.export --checkpoint runs/mine --output exported --format apple          # for timm and ml-aim
    python -m aimv2_jax.export --import apple.safetensors --output imported --format orbax

With --format hf the folder has model.safetensors, config.json, preprocessor_config.json and a model card, README.md.
`transformers` reads it with Aimv2VisionModel.from_pretrained and AutoImageProcessor.from_pretrained. A model with a
text tower is exported with it, for Aimv2Model.from_pretrained, unless --encoder-only is given. With --format apple the
tensors have the names of Apple's released files; timm.create_model("local-dir:DIR", pretrained=True) reads the folder.
With --format orbax the folder is a checkpoint of these parameters, with --whole of all parameters; --checkpoint and
init.path take such a folder. At the end the export is read back and compared with its source, also on real images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aimv2_jax.cli import Parser, make_output_folder, positive, size
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main
from aimv2_jax.export import apple_export, hf_export
from aimv2_jax.export.orbax_export import write_model, write_weights
from aimv2_jax.export.verify import check_model, check_written
from aimv2_jax.platforms import skip_absent_tpu
from aimv2_jax.pretrained.source import has_both_towers, open_dual_weights, open_weights

_MAX_FILE_SIZE = "5GB"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses and checks the command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.export", description=summary, epilog=epilog)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="SPEC", help="WORKDIR (its best step), WORKDIR:STEP or WORKDIR:last")
    source.add_argument(
        "--import",
        dest="foreign",
        metavar="PATH",
        help="a Hugging Face folder, or a .safetensors file in its or Apple's names",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    add("--format", choices=("hf", "apple", "orbax"), default="hf", help="default %(default)s")
    add("--whole", action="store_true", help="export encoder, decoder, tokenizer and config, for aimv2_jax")
    add("--encoder-only", action="store_true", help="export the image encoder of a model that has a text tower too")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype for --format hf and apple (default float32)")
    add(
        "--max-file-size",
        type=size,
        metavar="N",
        help=f"largest size of a file for --format hf (default {_MAX_FILE_SIZE})",
    )
    heads_help = "attention heads of a single .safetensors file, if they are not 128 wide"
    add("--heads", type=positive, metavar="N", help=heads_help)
    add(
        "--weights",
        choices=("average", "raw"),
        default="average",
        help="parameters of a run that kept an average (default %(default)s)",
    )
    flags = parser.parse_args(arguments)
    if flags.whole and flags.foreign:
        parser.error("--whole is for --checkpoint: an imported model has no decoder")
    if flags.dtype and (flags.whole or flags.format == "orbax"):
        parser.error("--dtype is for --format hf and apple: checkpoints are float32")
    if flags.max_file_size and (flags.whole or flags.format != "hf"):
        parser.error("--max-file-size is for --format hf")
    if flags.encoder_only and flags.whole:
        parser.error("--encoder-only and --whole exclude each other")
    if flags.heads and not flags.foreign:
        parser.error("--heads is for --import")
    return flags


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    source, dtype = flags.checkpoint or flags.foreign, flags.dtype or "float32"
    dual = not (flags.encoder_only or flags.whole) and has_both_towers(source)
    weights = (open_dual_weights if dual else open_weights)(source, flags.heads, flags.weights)
    if weights.ignored:
        count, example = len(weights.ignored), weights.ignored[0]
        print(f"ignored: {count} tensors of other parts of the model, such as {example}")
    print(weights.pixel_statistics())
    make_output_folder(flags.output)
    if any(flags.output.iterdir()):
        raise UserError("--output is not empty", str(flags.output), "Give a new folder")
    if flags.whole:
        write_model(flags.output, flags.checkpoint, flags.weights)
        print(check_model(flags.output, flags.checkpoint, flags.weights))
        print(f"wrote {flags.output}")
        return EXIT_FINISHED
    if flags.format == "orbax":
        write_weights(flags.output, weights)
    elif flags.format == "apple":
        apple_export.write_folder(flags.output, weights, dtype)
    else:
        hf_export.write_folder(flags.output, weights, dtype, flags.max_file_size or size(_MAX_FILE_SIZE))
    print(check_written(flags.output, weights, dtype))
    print(f"wrote {flags.output}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
