"""The model card: what the model is, how it was made, and how to use it."""

from __future__ import annotations

import math
from pathlib import Path

from aimv2_jax.config import Config, config_text, mixture_counts
from aimv2_jax.data.steps import Steps
from aimv2_jax.export.vision import Vision
from aimv2_jax.export.weights import Trained, Weights
from aimv2_jax.train.metrics import has_metrics, read_metrics


def model_card(weights: Weights, dtype: str, tensors: int) -> str:
    """Markdown with the header that model hubs read."""
    vision = weights.vision
    count = sum(math.prod(shape) for shape in weights.shapes.values())
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\ntags:\n- aimv2\n- vision\n---",
        "# An AIMv2 vision encoder",
        f"{count:,} parameters in {tensors} tensors, {dtype}; {vision.depth} blocks, {vision.width} wide, "
        f"{vision.heads} heads, patches of {vision.patch_size} x {vision.patch_size} pixels. "
        "[The method](https://arxiv.org/abs/2411.14402).",
        _use(vision),
    ]
    if weights.trained is None:
        parts.append(f"Converted from `{Path(weights.source).name}`; how it was trained is not known here.")
    else:
        parts += ["Trained and exported by aimv2_jax.", *_training(weights.trained)]
    return "\n\n".join(parts) + "\n"


def _use(vision: Vision) -> str:
    if vision.area is None:
        how = (
            f"It sees {vision.image_size} x {vision.image_size} pixels: the shorter side of an image is resized to "
            "that, then the centre is cut out."
        )
        size = ""
    else:
        how = (
            "It sees whole pictures at their own size and aspect. **Resize them first so that both sides are multiples "
            f"of {vision.patch_size}**: `Aimv2VisionModel` cuts off what is left over at the right and at the bottom, "
            "and the image processor does not resize. Give one picture a call, or pictures of one size. How many "
            f"patches it saw in training says its config; {vision.area} are a good start."
        )
        sides = f"[max(1, round(side / {vision.patch_size})) * {vision.patch_size} for side in image.size]"
        size = f"\nimage = image.resize({sides})"
    return f"""{how}

```python
from transformers import AutoImageProcessor, Aimv2VisionModel
from transformers.image_utils import load_image

processor = AutoImageProcessor.from_pretrained("PATH")
model = Aimv2VisionModel.from_pretrained("PATH")
image = load_image("picture.jpg")  # Upright, in RGB.{size}
pixels = processor(image, return_tensors="pt").to(model.dtype)
features = model(**pixels).last_hidden_state  # [1, patches, {vision.width}]
```"""


def _training(trained: Trained) -> list[str]:
    config = trained.config
    parts = [
        f"## Training\n\n{trained.step:,} of {config.train.steps:,} steps, "
        f"{Steps(config.seed, config.batch_shapes).first_example(trained.step):,} samples.",
        _mixture(config),
    ]
    evaluation = _evaluation(trained.workdir, trained.step) if trained.evaluated else {}
    if evaluation:
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in evaluation.items())
        parts.append(f"Held out:\n\n| figure | value |\n|---|---|\n{rows}")
    return [*parts, f"## Config\n\n```\n{config_text(config)}```"]


def _mixture(config: Config) -> str:
    """The data mixture as a table: sources by the names that the config gives them."""
    counts = mixture_counts(config.data.mixture)
    whole = sum(sum(kinds.values()) for kinds in counts.values())
    rows = [f"| {name} | {kind} | {n / whole:.1%} |" for name, kinds in counts.items() for kind, n in kinds.items()]
    return "| source | captions | share |\n|---|---|---|\n" + "\n".join(rows)


def _evaluation(workdir: str, step: int) -> dict[str, float]:
    """The held-out losses of `step` in a run's metrics; none where there are none."""
    if not has_metrics(workdir):  # An export, which leaves them behind.
        return {}
    _, evaluations = read_metrics(workdir)
    at = next((line for line in evaluations if line["step"] == step), {})
    return {name: value for name, value in at.items() if name.startswith("eval_loss") and value is not None}
