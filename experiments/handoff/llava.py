"""Builds a LLaVA model of transformers from an exported encoder and a language model.

    python -m aimv2_jax.export --checkpoint RUN --output encoder
    python experiments/handoff/llava.py --encoder encoder --language-model llama --output llava

--output is a folder for `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`: the
encoder as vision tower, the language model, and a new connector of two layers, which has to be trained
(docs/handoff.md gives the paper's recipe). The folder is read back, and its image features are compared with those of
`load_encoder`.

Three settings differ from LLaVA's defaults, which are made for CLIP:
  vision_feature_select_strategy="full"  The default "default" drops the first feature of each image: CLIP's class
                                         token, but AIMv2's first patch.
  vision_feature_layer=-1                The default -2 is the block before the last.
  vision_config.tie_last_hidden_states=true  transformers takes AIMv2's last hidden state before the final norm; this
                                         key takes it after the norm, as `load_encoder` does. --layer N takes the
                                         features after block N, before the norm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from aimv2_jax.cli import Parser, make_output_folder, positive  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, UserError, cli_main, first_line  # noqa: E402
from aimv2_jax.eval.cli import check_layer  # noqa: E402
from aimv2_jax.export.verify import sample_images  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from aimv2_jax.pretrained.encoder import PretrainedEncoder, load_encoder  # noqa: E402
from aimv2_jax.pretrained.encoder_spec import EncoderSpec  # noqa: E402
from aimv2_jax.pretrained.hf_config import CONFIG  # noqa: E402
from aimv2_jax.pretrained.source import has_both_towers, open_weights  # noqa: E402

IMAGE_TOKEN = "<image>"
# Largest difference of image features, in units of the largest entry: float32 sums in another order, rounded weights.
_TOLERANCES = {"float32": 2e-5, "float16": 0.05, "bfloat16": 0.25}


def import_transformers() -> Any:
    """Returns transformers, which is not required by this package.

    Raises:
      UserError: if it is not installed.
    """
    sys.modules.setdefault("triton", None)  # CUDA builds of torch load it, and its LLVM crashes after jaxlib's.
    try:
        import transformers
    except ImportError as error:
        raise UserError("transformers cannot be imported", str(error), "Run pip install torch transformers") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def vision_settings(spec: EncoderSpec, layer: int | None) -> dict[str, Any]:
    """The fields of `LlavaConfig` that choose the image features: after the final norm, or after block `layer`."""
    rows, columns = spec.grid
    return {
        "vision_feature_layer": -1 if layer is None else layer,
        "vision_feature_select_strategy": "full",
        "image_seq_length": rows * columns,
    }


def build(encoder: Path, language_model: Path, spec: EncoderSpec, layer: int | None, dtype: str) -> tuple[Any, Any]:
    """A `LlavaForConditionalGeneration` with a new connector, and the tokenizer with the token `IMAGE_TOKEN`.

    Args:
      encoder: folder of an exported encoder.
      language_model: folder of a causal language model and its tokenizer.
      spec: the encoder's.
      layer: the block whose output the connector gets; None: the features after the final norm.
      dtype: of all weights.

    Raises:
      UserError: for a folder that transformers cannot load.
    """
    import torch

    transformers = import_transformers()
    tokenizer = _load(transformers.AutoTokenizer, language_model, "--language-model")
    language = _load_model(transformers.AutoModelForCausalLM, language_model, "--language-model", dtype)
    vision = _load_model(transformers.Aimv2VisionModel, encoder, "--encoder", dtype)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if len(tokenizer) > language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if layer is None:
        vision.config.tie_last_hidden_states = True
    config = transformers.LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=language.config.tie_word_embeddings,
        **vision_settings(spec, layer),
    )
    with torch.device("meta"):  # Only the connector is new, so that no weight is in memory twice.
        model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = vision, language.base_model
    model.lm_head = language.get_output_embeddings()
    connector = model.model.multi_modal_projector.to_empty(device="cpu")
    for name, parameter in connector.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.xavier_uniform_(parameter)
    model.generation_config = language.generation_config
    return model.to(getattr(torch, dtype)).eval(), tokenizer


def image_processor(spec: EncoderSpec, pad: bool) -> Any:
    """LLaVA's image processor for the encoder's square: images are padded to squares, or their centre is cropped."""
    transformers = import_transformers()
    side = spec.image_size
    return transformers.LlavaImageProcessorPil(
        do_pad=pad,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(spec.pixel_mean),
        image_std=list(spec.pixel_std),
    )


def image_features(model: Any, pixel_values: Any) -> np.ndarray:
    """What the connector gets for an image, [patches, width] in float32."""
    import torch

    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            model.get_image_features(
                pixel_values=pixel_values.to(model.dtype),
                vision_feature_layer=model.config.vision_feature_layer,
                vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            )
    finally:
        hook.remove()
    return seen[0][0].float().numpy()


def check_features(
    folder: Path, encoder: PretrainedEncoder, images: Sequence[Image.Image], layer: int | None, dtype: str
) -> float:
    """Reads the folder back and returns the largest difference of its image features from the encoder's.

    It is in units of the largest feature of the image.

    Raises:
      RuntimeError: if it is more than the rounding of `dtype`.
    """
    transformers = import_transformers()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    differences = []
    for image in images:
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        square = padded_to_square(image, encoder.spec.pixel_mean) if processor.image_processor.do_pad else image
        batch, _ = encoder.batch([encoder.pixels(square)], 1)
        expected = np.asarray(encoder.features(**batch, layer=layer))[0]
        theirs = image_features(model, pixels)
        if theirs.shape != expected.shape:
            raise RuntimeError(f"{folder} has image features of shape {theirs.shape}, not {expected.shape}")
        differences.append(float(np.abs(theirs - expected).max() / np.abs(expected).max()))
    if not max(differences) <= _TOLERANCES[dtype]:
        raise RuntimeError(
            f"{folder} has other image features than the encoder: they differ by {max(differences):.1e} of the largest "
            "entry. transformers 5.24 has the key tie_last_hidden_states; an older version may not"
        )
    return max(differences)


def padded_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The image in the centre of a square of the mean colour, as LLaVA's image processor pads it."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _load_model(cls: Any, folder: Path, flag: str, dtype: str) -> Any:
    model, report = _load(cls, folder, flag, dtype=dtype, output_loading_info=True)
    absent = sorted({*report["missing_keys"], *report["mismatched_keys"]})
    if absent:  # transformers would draw random weights for them.
        what = f"{flag} has no usable weights for {len(absent)} tensors of a {cls.__name__}, such as"
        raise UserError(what, absent[0], "Give the folder of the whole model")
    return model


def _load(cls: Any, folder: Path, flag: str, **kwargs: Any) -> Any:
    try:
        return cls.from_pretrained(folder, local_files_only=True, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        what = f"{flag}: transformers cannot load it ({first_line(error)})"
        raise UserError(what, str(folder), "Give a folder that save_pretrained or aimv2_jax.export wrote") from error


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    summary, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python experiments/handoff/llava.py", description=summary, epilog=epilog)
    add = parser.add_argument
    add("--encoder", required=True, type=Path, metavar="DIR", help="exported encoder (--format hf)")
    add("--language-model", required=True, type=Path, metavar="DIR", help="causal language model with its tokenizer")
    add("--output", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    add("--layer", type=positive, metavar="N", help="features after block N (default: after the final norm)")
    add("--image-size", type=positive, metavar="PIXELS", help="side of the square, for a native-resolution encoder")
    add("--crop", dest="pad", action="store_false", help="take the centre square of an image, in place of padding it")
    add("--dtype", choices=tuple(_TOLERANCES), default="float32", help="of all weights (default %(default)s)")
    return parser.parse_args(arguments)


def open_encoder(folder: Path, image_size: int | None) -> PretrainedEncoder:
    """The encoder of an exported folder, at the square that the vision tower will get.

    Raises:
      UserError: for another folder, or a size that transformers' model does not support.
    """
    if not (folder / CONFIG).is_file():
        remedy = "Give a folder of python -m aimv2_jax.export --format hf"
        raise UserError("--encoder is not an exported encoder", str(folder), remedy)
    if has_both_towers(folder):
        what = "--encoder has a text tower too, which a vision tower has not"
        raise UserError(what, str(folder), "Export the model again with --encoder-only")
    spec = open_weights(folder).spec
    if image_size is not None and spec.position != "sincos":
        what = "--image-size is for native-resolution encoders: transformers does not resize learned positions"
        raise UserError(what, image_size, f"Leave it out: the encoder takes {spec.image_size} pixels")
    return load_encoder(folder, image_size=image_size or spec.image_size)


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    encoder = open_encoder(flags.encoder, flags.image_size)
    check_layer(flags.layer, encoder.spec.depth)
    make_output_folder(flags.output)
    if any(flags.output.iterdir()):
        raise UserError("--output is not empty", str(flags.output), "Give a new folder")
    transformers = import_transformers()
    model, tokenizer = build(flags.encoder, flags.language_model, encoder.spec, flags.layer, flags.dtype)
    processor = transformers.LlavaProcessor(
        image_processor(encoder.spec, flags.pad),
        tokenizer,
        patch_size=encoder.spec.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
    )
    model.save_pretrained(flags.output)
    processor.save_pretrained(flags.output)
    del model
    difference = check_features(flags.output, encoder, sample_images(), flags.layer, flags.dtype)
    depth, patches = encoder.spec.depth, encoder.num_patches
    where = "after the final norm" if flags.layer is None else f"after block {flags.layer} of {depth}, before the norm"
    print(f"image features: all {patches} patches {where} (vision_feature_select_strategy=full)")
    print(f"verified: they differ from those of load_encoder by {difference:.1e} of the largest")
    print(f"wrote {flags.output}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
