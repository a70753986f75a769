"""The config as frozen dataclasses. `experiments/base.py` documents the keys, and alone has default values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, NamedTuple

from aimv2_jax.parallel.hardware import CHIPS

TPU_OPTION_GROUPS = ("all", *CHIPS)
Remat = Literal["none", "matmuls", "gate", "attention", "full"]  # models/layers.py lists what each saves.
AttentionMask = Literal["prefix", "full"]
Output = Literal["pixels", "logits"]
LOSS_OUTPUTS: dict[str, Output] = {"image": "pixels", "text": "logits"}  # The decoder's output of each own loss.
LIT_TRAINABLE = ("head", "image_projection", "text", "text_projection", "logit_scale", "logit_bias")


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    width: int
    depth: int
    heads: int
    hidden: int | None


@dataclasses.dataclass(frozen=True)
class EncoderConfig(TrunkConfig):
    position: Literal["learned", "sincos"]
    attention_mask: AttentionMask


@dataclasses.dataclass(frozen=True)
class DecoderConfig(TrunkConfig):
    vocab_size: int
    text_length: int
    remat: Remat | None
    kind: Literal["joint", "separate", "mlp"]
    token_keep_rate: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    patch_size: int
    encoder: EncoderConfig
    decoder: DecoderConfig
    norm_eps: float
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    layers: Literal["scan", "loop"]
    remat: Remat
    attention: Literal["auto", "xla", "pallas", "cudnn"]
    compute_dtype: Literal["bfloat16", "float32"]
    param_dtype: Literal["float32"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    image: bool
    text: bool
    alpha: float
    predict_eos: bool
    target_eps: float


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(TrunkConfig):
    vocab_size: int
    text_length: int


@dataclasses.dataclass(frozen=True)
class LitConfig:
    text: TextTowerConfig
    embed_dim: int
    loss: Literal["softmax", "sigmoid"]
    chunks: int
    trainable: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TeacherEncoderConfig(TrunkConfig):
    position: Literal["learned", "sincos"]


@dataclasses.dataclass(frozen=True)
class TeacherDecoderConfig(TrunkConfig):
    kind: Literal["joint", "separate", "mlp"]


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    path: str
    encoder: TeacherEncoderConfig
    decoder: TeacherDecoderConfig | None
    image_size: int | None
    features: float
    logits: float
    pixels: float
    own: float
    feature_loss: Literal["cosine", "l2"]
    temperature: float


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    peak_lr: float
    start_lr: float
    end_lr: float
    warmup_steps: int
    schedule_steps: int
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float
    ema_decay: float
    schedule: Literal["cosine", "half_cosine"]
    cooldown_share: float
    cooldown_lr: float


@dataclasses.dataclass(frozen=True)
class DataConfig:
    batch_size: int
    workers: int
    read_threads: int
    prefetch: int
    cache_dir: str | None
    cache_gb: float
    image_size: int
    crop_area: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    sources: Mapping[str, str]
    mixture: Mapping[str, Mapping[str, float]]
    max_bad_fraction: float
    areas: tuple[int, ...]
    upscale: bool


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    path: str


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    sources: Mapping[str, str]
    caption_types: tuple[str, ...]
    batch_size: int
    prefixes: tuple[float, ...]
    max_examples: int | None
    area: int | None


@dataclasses.dataclass(frozen=True)
class InitConfig:
    path: str
    parts: Literal["model", "encoder"]
    ignore: tuple[str, ...]
    reinit: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    slices: int
    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    startup_timeout_s: int
    heartbeat_timeout_s: int
    barrier_timeout_s: int


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    max_nonfinite: int
    spike: Literal["off", "log", "skip", "rewind"]
    spike_sigma: float
    rewind_batches: int
    max_rewinds: int
    sdc_check_every: int
    sdc_rotate_devices: bool


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    start_s: int
    data_s: int
    step_s: int
    evaluation_s: int
    save_s: int
    stop_s: int


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int
    log_every: int
    eval_every: int
    eval_at_start: bool
    save_every: int
    keep: int
    microbatches: int
    reduce_dtype: Literal["float32", "bfloat16"]
    tpu_compiler_options: Mapping[str, Mapping[str, str]]
    gpu_compiler_options: Mapping[str, str]
    compilation_cache: str | None
    tensorboard: bool
    wandb_project: str | None
    profile: tuple[int, int] | None
    keep_steps: tuple[int, ...]
    cooldown_from: str | None


@dataclasses.dataclass(frozen=True)
class Cooldown:
    """A branch of the run in folder `trunk`: its first `start` steps, followed by `steps` cooldown steps."""

    trunk: str
    start: int
    steps: int


class BatchShape(NamedTuple):
    """Examples per batch, and patches per example including padding."""

    examples: int
    patches: int


@dataclasses.dataclass(frozen=True)
class Config:
    task: Literal["pretrain", "lit", "distill"]
    seed: int
    model: ModelConfig
    loss: LossConfig
    lit: LitConfig
    distill: DistillConfig
    optimizer: OptimizerConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    eval: EvalConfig
    init: InitConfig
    mesh: MeshConfig
    processes: ProcessesConfig
    train: TrainConfig
    guard: GuardConfig
    watch: WatchConfig

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a training image."""
        return self._grid(self.data.image_size)

    def _grid(self, image_size: int) -> tuple[int, int]:
        side = image_size // self.model.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def patch_pixels(self) -> int:
        """Pixel values of a patch."""
        return self.model.patch_size**2 * len(self.model.pixel_mean)

    @property
    def text(self) -> DecoderConfig | TextTowerConfig:
        """The trunk that reads captions; it has their length and vocabulary."""
        return self.lit.text if self.task == "lit" else self.model.decoder

    @property
    def attention_trunks(self) -> dict[str, TrunkConfig]:
        """The trunks whose blocks have attention, by config key."""
        return {key: trunk for key, trunk in self.trunks.items() if getattr(trunk, "kind", "joint") != "mlp"}

    @property
    def trunks(self) -> dict[str, TrunkConfig]:
        """The trunks of the task, by config key."""
        trunks: dict[str, TrunkConfig] = {"model.encoder": self.model.encoder}
        if self.task == "lit":
            return trunks | {"lit.text": self.lit.text}
        trunks["model.decoder"] = self.model.decoder
        if self.task == "distill":
            trunks["distill.encoder"] = self.distill.encoder
            if self.teacher_outputs:
                assert self.distill.decoder is not None  # validate.py
                trunks["distill.decoder"] = self.distill.decoder
        return trunks

    @property
    def own_losses(self) -> dict[str, float]:
        """Weights of the losses against image and caption, by name; without those that are switched off."""
        weights = {"image": self.loss.alpha} if self.loss.image else {}
        weights |= {"text": 1.0} if self.loss.text else {}
        if self.task != "distill":
            return weights
        return {name: self.distill.own * weight for name, weight in weights.items() if self.distill.own}

    @property
    def teacher_outputs(self) -> tuple[Output, ...]:
        """What the teacher's decoder predicts."""
        if self.task != "distill":
            return ()
        weights: dict[Output, float] = {"pixels": self.distill.pixels, "logits": self.distill.logits}
        return tuple(output for output, weight in weights.items() if weight)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What the decoder predicts in training, for its own losses and for those against a teacher."""
        own = {LOSS_OUTPUTS[name] for name in self.own_losses}
        return tuple(output for output in LOSS_OUTPUTS.values() if output in own or output in self.teacher_outputs)

    @property
    def teacher_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a teacher's training image."""
        return self._grid(self.distill.image_size or self.data.image_size)

    @property
    def teacher_image_size(self) -> int | None:
        """Side of the teacher's own training image; None without a teacher, or if it sees the student's image."""
        size = self.distill.image_size if self.task == "distill" else None
        return None if size == self.data.image_size else size

    @property
    def batch_shapes(self) -> tuple[BatchShape, ...]:
        """Shapes of training batches: one, or at native resolution one per area, all with equal numbers of patches."""
        data = self.data
        if not data.areas:
            return (BatchShape(data.batch_size, self.num_patches),)
        return tuple(BatchShape(data.batch_size * max(data.areas) // area, area) for area in data.areas)

    @property
    def cooldown(self) -> Cooldown | None:
        """The cooldown branch named by `train.cooldown_from`; None if the run is not a branch."""
        if self.train.cooldown_from is None:
            return None
        trunk, _, step = self.train.cooldown_from.rpartition(":")
        share = self.optimizer.cooldown_share
        return Cooldown(trunk, int(step), max(1, round(int(step) * share / (1 - share))))


def mixture_counts(mixture: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, int]]:
    """The smallest integers in the proportions of `mixture`, whose weights are read as exact decimals.

    `{"a": {"alt": 0.3}, "b": {"alt": 0.28}}` gives `{"a": {"alt": 15}, "b": {"alt": 14}}`. Weights of 0 are left out.
    """
    exact = {
        name: {kind: Fraction(repr(weight)) for kind, weight in kinds.items() if weight}
        for name, kinds in mixture.items()
        if any(kinds.values())
    }
    weights = [weight for kinds in exact.values() for weight in kinds.values()]
    scale = math.lcm(*(weight.denominator for weight in weights))
    divisor = math.gcd(*(int(weight * scale) for weight in weights))
    return {
        name: {kind: int(weight * scale) // divisor for kind, weight in kinds.items()} for name, kinds in exact.items()
    }
