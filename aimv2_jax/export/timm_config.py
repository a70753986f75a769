"""What timm reads of the config.json of a folder."""

from __future__ import annotations

from typing import Any

from aimv2_jax.pretrained.encoder_spec import EncoderSpec

# timm's names of the released sizes, by (width, depth, heads, hidden).
_TIMM_SIZES = {
    (1024, 24, 8, 2816): "large",
    (1536, 24, 12, 4096): "huge",
    (2048, 24, 16, 5632): "1b",
    (3072, 24, 24, 8192): "3b",
}
_TIMM_IMAGE_SIZES = (224, 336, 448)
_TIMM_NORM_EPS = 1e-5


def timm_fields(spec: EncoderSpec) -> dict[str, Any]:
    """The keys of config.json for `timm.create_model("local-dir:FOLDER")`; empty for an encoder that timm lacks.

    A size that was not released is one of timm's with other arguments.
    """
    if spec.position != "learned" or spec.head or spec.norm_eps != _TIMM_NORM_EPS:
        return {}
    size = _TIMM_SIZES.get((spec.width, spec.depth, spec.heads, spec.hidden))
    released = size is not None and spec.patch_size == 14 and spec.image_size in _TIMM_IMAGE_SIZES
    arguments = {
        "img_size": spec.image_size,
        "patch_size": spec.patch_size,
        "embed_dim": spec.width,
        "depth": spec.depth,
        "num_heads": spec.heads,
        "mlp_ratio": (spec.hidden + 0.5) / spec.width,  # timm rounds the product with the width down.
    }
    return {
        "architecture": f"aimv2_{size}_patch14_{spec.image_size}" if released else "aimv2_large_patch14_224",
        **({} if released else {"model_args": arguments}),
        "pretrained_cfg": {
            "input_size": [len(spec.pixel_mean), spec.image_size, spec.image_size],
            "fixed_input_size": True,
            "mean": list(spec.pixel_mean),
            "std": list(spec.pixel_std),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
