"""Configuration: turns an ml_collections config into frozen dataclasses and checks every value. Imports no jax.

`experiments/base.py` documents the keys and is the only file with default values; the dataclasses below have none.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import ml_collections

from aimv2_jax.errors import UserError

TPU_OPTION_GROUPS = ("all", "v4", "v5e", "v5p", "v6e")
Remat = Literal["none", "matmuls", "gate", "attention", "full"]  # models/layers.py lists what each saves.
AttentionMask = Literal["prefix", "full"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    width: int
    depth: int
    heads: int
    hidden: int | None
    position: Literal["learned", "sincos"]
    attention_mask: AttentionMask


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    width: int
    depth: int
    heads: int
    hidden: int | None
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
    attention: Literal["auto", "xla", "pallas"]
    compute_dtype: Literal["bfloat16", "float32"]
    param_dtype: Literal["float32"]

    @property
    def attention_trunks(self) -> dict[str, EncoderConfig | DecoderConfig]:
        """The trunks whose blocks have attention, by name."""
        trunks: dict[str, EncoderConfig | DecoderConfig] = {"encoder": self.encoder}
        return trunks if self.decoder.kind == "mlp" else trunks | {"decoder": self.decoder}


@dataclasses.dataclass(frozen=True)
class LossConfig:
    image: bool
    text: bool
    alpha: float
    predict_eos: bool
    target_eps: float


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


class BatchShape(typing.NamedTuple):
    """Examples per batch, and patches per example including padding."""

    examples: int
    patches: int


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    model: ModelConfig
    loss: LossConfig
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
        side = self.data.image_size // self.model.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

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


# --- from text and ConfigDict to dataclasses ---------------------------------------------------------------------


# Values outside this range would become zero or infinity on the devices.
_FLOAT32_TINY, _FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127


# Config keys of earlier commits -> their current names.
_RENAMED = {
    "eval.kinds": "caption_types",
    "guard.recompute_every": "sdc_check_every",
    "guard.recompute_elsewhere": "sdc_rotate_devices",
    "init.drop": "ignore",
    "init.fresh": "reinit",
    "model.decoder.keep_rows": "token_keep_rate",
}


# Sanity bound on worker processes, threads per worker, and prefetched batches per worker.
_MAX_DATA_WORKERS = 1024


class _FlagText(str):
    """A value as typed on the command line; the type of its key decides how it is parsed."""


def load_config(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Loads `path` (a file with `get_config()`), applies `(dotted key, text)` overrides, and checks every value.

    Raises:
      UserError: for a missing file, an unknown key, a value of the wrong type, or an invalid value.
    """
    tree = _read_experiment(Path(path))
    for key, text in overrides:
        _set_key(tree, key, _FlagText(text))
    return build_config(tree)


def build_config(tree: Mapping[str, Any]) -> Config:
    """Turns a nested mapping into a checked `Config`; raises `UserError` with key, value and remedy."""
    config = _build(Config, tree, "")
    _check(config)
    if config.cooldown is None:
        return config
    steps = config.cooldown.start + config.cooldown.steps
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def config_to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts, lists and numbers; the inverse of `build_config`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_digest(config: Config) -> str:
    """Eight hexadecimal digits that identify a resolved config."""
    return hashlib.sha256(config_text(config).encode()).hexdigest()[:8]


def config_text(config: Config) -> str:
    """The resolved config as `dotted.key = value` lines, for logs, golden files and diffs."""
    return "".join(f"{key} = {value!r}\n" for key, value in flatten(config_to_dict(config)).items())


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings into one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _read_experiment(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError("--config: no such file", str(path), "Give an experiment such as experiments/quickstart.py")
    # Experiments import each other with `from experiments import base`: the folder above `experiments` must be on
    # sys.path, also for an experiment in a subfolder.
    folders = path.resolve().parents
    root = str(next((folder for folder in folders if folder.name == "experiments"), folders[0]).parent)
    added = root not in sys.path
    if added:
        sys.path.insert(0, root)
    try:
        spec = importlib.util.spec_from_file_location(f"_experiment_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise UserError("--config: not a Python file", str(path), "Give a .py file that defines get_config()")
        module = importlib.util.module_from_spec(spec)
        with _experiment_errors(path):
            spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(
                "--config: the file has no get_config()", str(path), "Define get_config() -> ConfigDict in it"
            )
        with _experiment_errors(path):
            config = module.get_config()
    finally:
        if added:
            sys.path.remove(root)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            "--config: get_config() must return an ml_collections.ConfigDict",
            type(config).__name__,
            "Start from experiments/base.py",
        )
    return config.to_dict()


@contextlib.contextmanager
def _experiment_errors(path: Path) -> Iterator[None]:
    """Raises any error in an experiment file as a UserError with its line number."""
    try:
        yield
    except SyntaxError as error:
        location = f"{error.filename or path}:{error.lineno or 1}"
        raise UserError("--config: not valid Python", location, f"Fix it: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
        location = f"{path}:{lines[-1]}" if lines else str(path)
        message = str(error).strip().partition("\n")[0]
        raise UserError("--config: the file fails", location, f"Fix it: {type(error).__name__}: {message}") from error


def _set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError("unknown config key", dotted, f"{parent} holds a value, not keys")
        tree = child
    tree[leaf] = value


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"config {prefix.rstrip('.')} must hold keys", _plain(tree), "Set the keys below it one by one")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise UserError("unknown config key", f"{prefix}{key}", _remedy_for(prefix, str(key), hints))
    missing = [key for key in hints if key not in tree]
    if missing:
        raise UserError("config key missing", f"{prefix}{missing[0]}", "Start from experiments/base.py, which sets it")
    return cls(**{key: _convert(hint, tree[key], f"{prefix}{key}") for key, hint in hints.items()})


def _remedy_for(prefix: str, key: str, known: Mapping[str, Any]) -> str:
    """The remedy for an unknown key: its new name if it was renamed, or a similar key."""
    if f"{prefix}{key}" in _RENAMED:
        return f"It is called {prefix}{_RENAMED[f'{prefix}{key}']} now"
    matches = difflib.get_close_matches(key, known, n=1)
    return f"Did you mean {prefix}{matches[0]}" if matches else f"Known keys: {', '.join(known)}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Converts `value` to the type `hint`; raises a UserError with `key`."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # Unions in the config are always `X | None`.
        if value is None or (isinstance(value, _FlagText) and value.lower() == "none"):
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, key)
    if isinstance(value, _FlagText) and hint is not str and origin is not Literal:
        value = _literal(value)
    if origin is Literal:
        if str(value) in args:
            return str(value)
        raise UserError(f"config {key} has an unknown value", _plain(value), f"Choose one of {', '.join(args)}")
    if origin is tuple and isinstance(value, (list, tuple)):
        inner = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(inner) == len(value):
            return tuple(_convert(arg, item, f"{key}[{i}]") for i, (arg, item) in enumerate(zip(inner, value)))
        raise UserError(f"config {key} has the wrong length", _plain(value), f"Give {len(inner)} values")
    # The origin of Mapping[...] is collections.abc.Mapping.
    if origin is Mapping and isinstance(value, Mapping):
        return {str(name): _convert(args[1], item, f"{key}.{name}") for name, item in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < 2**31:  # Devices count in int32.
            return value
        raise UserError(f"config {key} is out of range", value, "Give a whole number below 2147483648")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if value == 0 or _FLOAT32_TINY <= abs(value) <= _FLOAT32_MAX:
            return float(value)
        raise UserError(f"config {key} must be finite in float32", value, "Give 0 or a magnitude from 1e-37 to 1e38")
    if hint is str and isinstance(value, str):
        return str(value)
    raise UserError(f"config {key} has the wrong type", _plain(value), f"Give {_type_name(hint)}")


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # The errors listed in its documentation.
        return str(text)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, _FlagText) else value


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    return "a list of values, as (a, b)" if typing.get_origin(hint) is tuple else "keys with values"


# --- checks of values, before anything compiles ---------------------------------------------------------------------


def _check(config: Config) -> None:
    model, data, optimizer, train, mesh = config.model, config.data, config.optimizer, config.train, config.mesh
    if not 0 <= config.seed < 2**31:
        raise UserError("config seed is out of range", config.seed, "Give a whole number from 0 to 2147483647")
    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        for key in ("width", "depth", "heads"):
            _at_least(1, getattr(part, key), f"model.{name}.{key}")
        if part.hidden is not None:
            _at_least(1, part.hidden, f"model.{name}.hidden")
        if part.width % part.heads:
            raise UserError(
                f"config model.{name}.heads does not divide model.{name}.width",
                f"{part.heads} heads, width {part.width}",
                "Choose heads so that width / heads is an integer (AIMv2 uses 128 channels per head)",
            )
    if model.encoder.position == "sincos" and model.encoder.width % 4:
        raise UserError(
            "config model.encoder.width must be a multiple of 4 for sin-cos positions",
            model.encoder.width,
            "Change the width, or set model.encoder.position=learned",
        )
    if model.decoder.kind == "mlp" and model.decoder.width % 4:
        raise UserError(
            "config model.decoder.width must be a multiple of 4 for the sin-cos positions of model.decoder.kind=mlp",
            model.decoder.width,
            "Change the width",
        )
    _at_least(2, model.decoder.vocab_size, "model.decoder.vocab_size")
    _at_least(2, model.decoder.text_length, "model.decoder.text_length")
    _at_least(1, model.patch_size, "model.patch_size")
    _positive(model.norm_eps, "model.norm_eps")
    for i, std in enumerate(model.pixel_std):
        _positive(std, f"model.pixel_std[{i}]")
    if data.image_size < 1 or data.image_size % model.patch_size:
        raise UserError(
            "config data.image_size is not a multiple of model.patch_size",
            f"{data.image_size} px, patches of {model.patch_size}",
            f"Use for example {max(2, round(data.image_size / model.patch_size)) * model.patch_size}",
        )
    if config.num_patches < 2:
        raise UserError(
            "config data.image_size gives only one patch", data.image_size, "Next-patch prediction needs two"
        )
    _check_losses(config)
    _check_optimizer(optimizer)
    _check_data(config)
    for key in ("steps", "log_every", "keep", "microbatches"):
        _at_least(1, getattr(train, key), f"train.{key}")
    for key in ("eval_every", "save_every"):
        _at_least(0, getattr(train, key), f"train.{key}")
    for i, step in enumerate(train.keep_steps):
        _at_least(1, step, f"train.keep_steps[{i}]")
    _check_cooldown(config)
    for generation in train.tpu_compiler_options:
        if generation not in TPU_OPTION_GROUPS:
            raise UserError(
                "config train.tpu_compiler_options has an unknown group",
                generation,
                f"Put options under one of {', '.join(TPU_OPTION_GROUPS)}",
            )
    for shape in config.batch_shapes:
        if shape.examples % train.microbatches:
            raise UserError(
                "config train.microbatches does not divide data.batch_size",
                f"{train.microbatches} microbatches, batch {shape.examples}",
                "Choose a divisor of the batch",
            )
    _at_least(1, mesh.slices, "mesh.slices")
    if train.profile is not None and not 1 <= train.profile[0] < train.profile[1]:
        raise UserError(
            "config train.profile is not a range of steps", train.profile, "Give (first, end), 1 <= first < end"
        )
    for key in ("startup_timeout_s", "heartbeat_timeout_s", "barrier_timeout_s"):
        _at_least(1, getattr(config.processes, key), f"processes.{key}")
    _check_guard(config.guard)
    for field in dataclasses.fields(config.watch):
        _at_least(0, getattr(config.watch, field.name), f"watch.{field.name}")
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(
            "config mesh.data, mesh.fsdp, mesh.tensor are not valid sizes",
            sizes,
            "Give sizes of at least 1; one of them may be -1, which takes the remaining devices",
        )


def _check_guard(guard: GuardConfig) -> None:
    for key in ("max_nonfinite", "rewind_batches"):
        _at_least(1, getattr(guard, key), f"guard.{key}")
    for key in ("max_rewinds", "sdc_check_every"):
        _at_least(0, getattr(guard, key), f"guard.{key}")
    _positive(guard.spike_sigma, "guard.spike_sigma")


def _check_losses(config: Config) -> None:
    loss = config.loss
    if not (loss.image or loss.text):
        raise UserError("config loss.image and loss.text are both off", False, "Switch at least one on")
    _at_least(0, loss.alpha, "loss.alpha")
    _positive(loss.target_eps, "loss.target_eps")
    encoder, decoder = config.model.encoder, config.model.decoder
    if loss.image and encoder.attention_mask == "full":
        raise UserError(
            "config model.encoder.attention_mask lets every patch attend to the one it predicts",
            encoder.attention_mask,
            "Set loss.image=False, or model.encoder.attention_mask=prefix",
        )
    if loss.text and decoder.kind == "mlp":
        raise UserError(
            "config model.decoder.kind is a patch head, which predicts no text",
            decoder.kind,
            "Set loss.text=False, or model.decoder.kind to joint or separate",
        )
    if not 0 < decoder.token_keep_rate <= 1:
        raise UserError(
            "config model.decoder.token_keep_rate is out of range",
            decoder.token_keep_rate,
            "Give a fraction above 0, up to 1",
        )
    if loss.image and decoder.token_keep_rate < 1:
        raise UserError(
            "config model.decoder.token_keep_rate drops tokens that the image loss needs",
            decoder.token_keep_rate,
            "Set loss.image=False, or model.decoder.token_keep_rate=1",
        )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    _positive(optimizer.peak_lr, "optimizer.peak_lr")
    for key in ("start_lr", "end_lr", "weight_decay", "warmup_steps", "cooldown_lr"):
        _at_least(0, getattr(optimizer, key), f"optimizer.{key}")
    _positive(optimizer.eps, "optimizer.eps")
    _positive(optimizer.clip_norm, "optimizer.clip_norm")
    for i, beta in enumerate(optimizer.betas):
        if not 0 <= beta < 1:
            raise UserError(f"config optimizer.betas[{i}] is out of range", beta, "Give a number in [0, 1)")
    if optimizer.weight_decay >= 1:
        raise UserError(
            "config optimizer.weight_decay is too large: it would flip the sign of parameters",
            optimizer.weight_decay,
            "It is the fraction removed at each step at the peak learning rate (the paper: 1e-4)",
        )
    if not 0 <= optimizer.ema_decay < 1:
        raise UserError(
            "config optimizer.ema_decay is out of range",
            optimizer.ema_decay,
            "Give a number in [0, 1); 0 keeps no average",
        )
    if optimizer.schedule_steps <= optimizer.warmup_steps:
        raise UserError(
            "config optimizer.schedule_steps must exceed optimizer.warmup_steps",
            f"{optimizer.schedule_steps} with {optimizer.warmup_steps} of warm-up",
            "The schedule includes its warm-up",
        )


def _check_cooldown(config: Config) -> None:
    share = config.optimizer.cooldown_share
    if not 0 < share < 1:
        remedy = "Give the cooldown's fraction of all steps of its run, such as 0.2"
        raise UserError("config optimizer.cooldown_share is not between 0 and 1", share, remedy)
    trunk = config.train.cooldown_from
    if trunk is None:
        return
    if not re.fullmatch(r".+:[0-9]{1,10}", trunk, re.DOTALL):
        raise UserError("config train.cooldown_from names no step of a run", trunk, "Give WORKDIR:STEP of the trunk")
    start, last = config.cooldown.start, config.cooldown.start + config.cooldown.steps
    if start < max(1, config.optimizer.warmup_steps):
        raise UserError(
            "config train.cooldown_from starts in the warm-up",
            f"step {start} of {config.optimizer.warmup_steps}",
            "Branch off at a later step",
        )
    if last >= 2**31:
        raise UserError("config train.cooldown_from is out of range", trunk, "Name a step that ends below 2147483648")


def _check_data(config: Config) -> None:
    data, evaluation = config.data, config.eval
    _at_least(1, data.batch_size, "data.batch_size")
    for key in ("read_threads", "prefetch"):
        _at_least(1, getattr(data, key), f"data.{key}")
    _at_least(0, data.workers, "data.workers")
    for key in ("workers", "read_threads", "prefetch"):
        if getattr(data, key) > _MAX_DATA_WORKERS:
            raise UserError(
                f"config data.{key} is too large",
                getattr(data, key),
                f"Give at most {_MAX_DATA_WORKERS}; a few are enough",
            )
    _in_order(data.crop_area, 1.0, "data.crop_area")
    _in_order(data.crop_ratio, math.inf, "data.crop_ratio")
    for key in ("flip", "max_bad_fraction"):
        if not 0 <= getattr(data, key) <= 1:
            raise UserError(f"config data.{key} is out of range", getattr(data, key), "Give a number from 0 to 1")
    _check_areas(config)
    if config.eval.area is not None:
        _at_least(2, config.eval.area, "eval.area")
    for key, value in (("data.areas", data.areas), ("eval.area", config.eval.area)):
        if value and config.model.encoder.position != "sincos":
            raise UserError(
                f"config {key} needs position embeddings for any grid",
                f"model.encoder.position={config.model.encoder.position}",
                f"Set model.encoder.position=sincos, or leave {key} out",
            )
    for name in data.mixture:
        if name not in data.sources:
            raise UserError(
                "config data.mixture has a weight for an unknown source",
                name,
                f"Add data.sources.{name}=PATH, or remove the weight; sources: {', '.join(data.sources) or 'none'}",
            )
    for name in data.sources:
        if not sum(data.mixture.get(name, {}).values()):
            raise UserError(
                "config data.sources has a source without a weight",
                name,
                f"Set data.mixture.{name}.KIND, or remove the source",
            )
    for name, kinds in data.mixture.items():
        for kind, weight in kinds.items():
            _at_least(0, weight, f"data.mixture.{name}.{kind}")
    if not data.sources:
        raise UserError("config data.sources is empty", {}, "Name at least one prepared dataset")
    cycle = mixture_counts(data.mixture)
    length = sum(sum(kinds.values()) for kinds in cycle.values())
    if length > 10**6:
        raise UserError(
            "config data.mixture has weights without a short common cycle",
            f"{length} examples per cycle",
            "Use weights with fewer digits, such as 0.28",
        )
    _at_least(1, evaluation.batch_size, "eval.batch_size")
    if evaluation.max_examples is not None:
        _at_least(1, evaluation.max_examples, "eval.max_examples")
    for i, prefix in enumerate(evaluation.prefixes):
        if not 0 < prefix < 1:
            raise UserError(f"config eval.prefixes[{i}] is out of range", prefix, "Give fractions between 0 and 1")
    if len(set(evaluation.caption_types)) < len(evaluation.caption_types):
        raise UserError(
            "config eval.caption_types names a caption kind twice", evaluation.caption_types, "Name each once"
        )
    if evaluation.sources and not (evaluation.caption_types and evaluation.prefixes):
        raise UserError(
            "config eval.caption_types or eval.prefixes is empty", (), "Name caption kinds and prefix fractions"
        )


def _check_areas(config: Config) -> None:
    areas, data = config.data.areas, config.data
    if not areas:
        return
    if min(areas) < 2 or list(areas) != sorted(set(areas)):
        raise UserError("config data.areas is not a rising list", areas, "Give areas in patches, such as (128, 256)")
    for area in areas:
        if data.batch_size * max(areas) % area:
            raise UserError(
                "config data.areas has an area that does not divide the patches of a batch",
                f"{area}, of {data.batch_size} x {max(areas)} patches",
                "Give areas that divide data.batch_size x the largest area, such as powers of two",
            )


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


def _at_least(low: float, value: float, key: str) -> None:
    if value < low:
        raise UserError(f"config {key} is too small", value, f"Give at least {low}")


def _positive(value: float, key: str) -> None:
    if value <= 0:
        raise UserError(f"config {key} must be above zero", value, "Give a positive number")


def _in_order(pair: tuple[float, float], high: float, key: str) -> None:
    if not 0 < pair[0] <= pair[1] <= high:
        raise UserError(f"config {key} is not a range", pair, f"Give (low, high) with 0 < low <= high <= {high}")
