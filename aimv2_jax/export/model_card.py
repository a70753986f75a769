"""Model card of an export: architecture, usage and training."""

from __future__ import annotations

import fnmatch
import math
import re
from pathlib import Path

from aimv2_jax.config.load import config_text
from aimv2_jax.config.schema import Config, mixture_counts
from aimv2_jax.data.sampling.schedule import BatchSchedule
from aimv2_jax.export import usage
from aimv2_jax.monitoring.metrics import has_metrics, read_metrics
from aimv2_jax.pretrained.dual_encoder_spec import DualEncoderSpec, TextSpec
from aimv2_jax.pretrained.encoder_spec import EncoderSpec
from aimv2_jax.pretrained.lazy_weights import LazyWeights, TrainingInfo
from aimv2_jax.pretrained.param_names import Naming
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


def model_card(weights: LazyWeights, dtype: str, tensors: int, naming: Naming = "hf") -> str:
    """The model card as Markdown, with the metadata header of model hubs."""
    count = sum(math.prod(shape) for shape in weights.shapes.values())
    spec, dual = weights.image, isinstance(weights.spec, DualEncoderSpec)
    library = "timm" if naming == "apple" else "transformers"
    pipeline = "zero-shot-image-classification" if dual else "image-feature-extraction"
    title = "An AIMv2 vision encoder with a text tower" if dual else "An AIMv2 vision encoder"
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: {pipeline}\ntags:\n- aimv2\n- vision\n---",
        f"# {title}",
        f"{count:,} parameters in {tensors} tensors, {dtype}; {_sizes(spec)}, patches of {spec.patch_size} x "
        f"{spec.patch_size} pixels. {_text_sizes(weights.spec) if dual else ''}"
        "Method: [AIMv2](https://arxiv.org/abs/2411.14402).",
        _usage(weights, naming),
    ]
    if weights.training is None:
        parts.append(f"Converted from {_escape(Path(weights.source).name)}. Its training details are unknown.")
    else:
        parts += ["Trained and exported by aimv2_jax.", *_training(weights.training)]
    return "\n\n".join(parts) + "\n"


def _sizes(spec: EncoderSpec | TextSpec) -> str:
    return f"{spec.depth} blocks, width {spec.width}, {spec.heads} heads"


def _text_sizes(spec: DualEncoderSpec) -> str:
    return f"Text tower: {_sizes(spec.text)}, {spec.text.vocab_size:,} tokens; embeddings of {spec.embed_dim}. "


def _usage(weights: LazyWeights, naming: Naming) -> str:
    if naming == "apple":
        return usage.apple_names(weights.spec)
    if isinstance(weights.spec, DualEncoderSpec):
        return usage.transformers_dual_encoder(weights.spec, weights.tokenizer is not None)
    return usage.transformers_encoder(weights.spec)


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
