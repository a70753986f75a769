"""Code for a model card that loads an export in transformers or timm."""

from __future__ import annotations

from aimv2_jax.export.timm_config import timm_fields
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec
from aimv2_jax.pretrained.encoder_spec import EncoderSpec


def transformers_encoder(spec: EncoderSpec) -> str:
    """How transformers loads an encoder."""
    if spec.area is None:
        preprocessing, size = _center_square(spec), ""
    else:
        preprocessing = (
            "The input is a whole image at its own size and aspect ratio. **Resize it first so that both sides are "
            f"multiples of {spec.patch_size}**: `Aimv2VisionModel` drops the remaining pixels at the right and at the "
            "bottom, and the image processor does not resize. Pass one image per call, or images of one size. The "
            f"config lists the numbers of patches used in training; {spec.area} is a good default."
        )
        sides = f"[max(1, round(side / {spec.patch_size})) * {spec.patch_size} for side in image.size]"
        size = f"\nimage = image.resize({sides})"
    return f"""{preprocessing}

```python
from transformers import AutoImageProcessor, Aimv2VisionModel
from transformers.image_utils import load_image

processor = AutoImageProcessor.from_pretrained("PATH")
model = Aimv2VisionModel.from_pretrained("PATH")
image = load_image("image.jpg")  # Upright, in RGB.{size}
pixels = processor(image, return_tensors="pt").to(model.dtype)
features = model(**pixels).last_hidden_state  # [1, patches, {spec.width}]
```"""


def transformers_dual_encoder(spec: DualEncoderSpec, has_tokenizer: bool) -> str:
    """How transformers loads a model with both towers."""
    if spec.loss == "sigmoid":
        bias = " The logits of the sigmoid loss also have a bias, `aimv2_jax.logit_bias` of config.json."
    else:
        bias = ""
    length, end = spec.text.length, spec.text.end_id
    if has_tokenizer:
        tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("PATH")'
        tokens = (
            f'tokens = tokenizer(texts, padding="max_length", max_length={length}, truncation=True, '
            'return_tensors="pt")'
        )
    else:
        tokenizer = f"tokenizer = ...  # Rows of at most {length} tokens; the end token is {end}."
        tokens = "tokens = tokenizer(texts)  # input_ids and attention_mask"
    return f"""{_center_square(spec.image)} A text has at most {length} tokens; its embedding is that of its first end
token, {end}. The text tower is causal, for which transformers needs the attention mask and eager attention.{bias}

```python
from transformers import AutoImageProcessor, AutoTokenizer, Aimv2Model
from transformers.image_utils import load_image

processor = AutoImageProcessor.from_pretrained("PATH")
{tokenizer}
model = Aimv2Model.from_pretrained("PATH", attn_implementation="eager")
texts = ["a photo of a cat", "a photo of a dog"]
{tokens}
pixels = processor(load_image("image.jpg"), return_tensors="pt").to(model.dtype)
logits = model(**pixels, **tokens).logits_per_image  # [1, 2]
```"""


def apple_names(spec: EncoderSpec | DualEncoderSpec) -> str:
    """How timm loads an encoder under Apple's names, or which classes have these names."""
    if isinstance(spec, DualEncoderSpec) or not timm_fields(spec):
        image = spec.image if isinstance(spec, DualEncoderSpec) else spec
        return f"{_center_square(image)} The tensors have the names of Apple's ml-aim, `aim.v2.torch.models`."
    return f"""{_center_square(spec)}

```python
import timm

model = timm.create_model("local-dir:PATH", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model.forward_features(transform(image)[None])  # [1, patches, {spec.width}]
```

The tensors have the names of Apple's ml-aim, `aim.v2.torch.models`."""


def _center_square(spec: EncoderSpec) -> str:
    if spec.area is not None:
        return "The input is a whole image at its own size and aspect ratio."
    return (
        f"The input is {spec.image_size} x {spec.image_size} pixels: the shorter side of an image is resized to "
        f"{spec.image_size}, then the centre is cropped."
    )
