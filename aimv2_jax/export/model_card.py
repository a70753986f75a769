"""Model card of an export: architecture, usage and training."""

from __future__ import annotations

import fnmatch
import math
import re
from pathlib import Path

from aimv2_jax.config.load import config_text
from aimv2_jax.config.schema import Config, mixture_counts
from aimv2_jax.data.sampling.schedule import BatchSchedule
from aimv2_jax.monitoring.metrics import has_metrics, read_metrics
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.lazy_weights import LazyWeights, TrainingInfo
from aimv2_jax.untrusted import printable

# Config keys with private paths and project names, which are left out of a published card.
_PRIVATE_KEYS = (
    "*.sources",
    "*.sources.*",
    "*.path",
    "train.cooldown_from",
    "train.wandb_project",
    "train.compilation_*",
)


def model_card(weights: LazyWeights, dtype: str, tensors: int) -> str:
    """The model card as Markdown, with the metadata header of model hubs."""
    spec = weights.spec
    count = sum(math.prod(shape) for shape in weights.shapes.values())
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\ntags:\n- aimv2\n- vision\n---",
        "# An AIMv2 vision encoder",
        f"{count:,} parameters in {tensors} tensors, {dtype}; {spec.depth} blocks, width {spec.width}, "
        f"{spec.heads} heads, patches of {spec.patch_size} x {spec.patch_size} pixels. "
        "Method: [AIMv2](https://arxiv.org/abs/2411.14402).",
        _usage(spec),
    ]
    if weights.training is None:
        parts.append(f"Converted from {_escape(Path(weights.source).name)}. Its training details are unknown.")
    else:
        parts += ["Trained and exported by aimv2_jax.", *_training(weights.training)]
    return "\n\n".join(parts) + "\n"


def _usage(spec: EncoderSpec) -> str:
    if spec.area is None:
        preprocessing = (
            f"The input is {spec.image_size} x {spec.image_size} pixels: the shorter side of an image is resized to "
            f"{spec.image_size}, then the centre is cropped."
        )
        size = ""
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


def _training(training: TrainingInfo) -> list[str]:
    config = training.config
    parts = [
        f"## Training\n\n{training.step:,} of {config.train.steps:,} steps, "
        f"{BatchSchedule(config.seed, config.batch_shapes).first_example(training.step):,} samples.",
        _mixture(config),
    ]
    evaluation = _evaluation(training.workdir, training.step) if training.evaluated else {}
    if evaluation:
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in evaluation.items())
        parts.append(f"Held-out metrics:\n\n| metric | value |\n|---|---|\n{rows}")
    return [*parts, f"## Config\n\nKeys with private paths are left out.\n\n```\n{_public_config(config)}\n```"]


def _public_config(config: Config) -> str:
    """The lines of `config_text` without private keys; none of them can end the code block."""
    lines = [printable(line, 2000) for line in config_text(config).splitlines()]
    public = (
        line for line in lines if not any(fnmatch.fnmatchcase(line.split(" = ")[0], key) for key in _PRIVATE_KEYS)
    )
    return "\n".join(public).replace("```", "~~~")


def _escape(text: str) -> str:
    """`text` on one line, with all Markdown markup escaped."""
    return re.sub(r"([^\w\s.,:/-]|_)", r"\\\1", printable(text))


def _mixture(config: Config) -> str:
    """The data mixture as a table, with the config's source names."""
    counts = mixture_counts(config.data.mixture)
    total = sum(sum(kinds.values()) for kinds in counts.values())
    rows = [
        f"| {_escape(name)} | {_escape(kind)} | {count / total:.1%} |"
        for name, kinds in counts.items()
        for kind, count in kinds.items()
    ]
    return "| source | captions | share |\n|---|---|---|\n" + "\n".join(rows)


def _evaluation(workdir: str, step: int) -> dict[str, float]:
    """The held-out losses of `step` in a run's metrics; empty if there are none."""
    if not has_metrics(workdir):  # An export has no metrics.
        return {}
    _, evaluations = read_metrics(workdir)
    metrics = next((line for line in evaluations if line["step"] == step), {})
    return {name: value for name, value in metrics.items() if name.startswith("eval_loss") and value is not None}
