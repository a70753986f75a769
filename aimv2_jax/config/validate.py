"""Checks of a config's values, before anything compiles."""

from __future__ import annotations

import math
import operator
import re

from aimv2_jax.config.checks import at_least, check_each, check_multiple, positive, require
from aimv2_jax.config.schema import TPU_OPTION_GROUPS, Config, mixture_counts
from aimv2_jax.config.validate_tasks import check_distill, check_lit

# Sanity bound on worker processes, threads per worker, and prefetched batches per worker.
_MAX_DATA_WORKERS = 1024


def validate(config: Config) -> None:
    """Raises UserError for the first invalid value, with its key and a remedy."""
    check_each(config, ["seed"], lambda seed: 0 <= seed < 2**31, "Give a whole number from 0 to 2147483647")
    _check_model(config)
    _check_image_size(config)
    _check_losses(config)
    check_lit(config)
    check_distill(config)
    _check_optimizer(config)
    _check_loader(config)
    _check_areas(config)
    _check_mixture(config)
    _check_evaluation(config)
    _check_train(config)
    _check_cooldown(config)
    _check_mesh(config)
    at_least(config, 1, "processes", "guard.max_nonfinite", "guard.rewind_batches")
    at_least(config, 0, "guard.max_rewinds", "guard.sdc_check_every", "watch")
    positive(config, "guard.spike_sigma")


def _check_model(config: Config) -> None:
    model = config.model
    for name in ("model.encoder", "model.decoder", "lit.text", "distill.encoder", "distill.decoder"):
        trunk = operator.attrgetter(name)(config)
        if trunk is None:
            continue
        at_least(config, 1, *(f"{name}.{key}" for key in ("width", "depth", "heads", "hidden")))
        require(
            trunk.width % trunk.heads == 0,
            f"{name}.heads does not divide {name}.width",
            f"{trunk.heads} heads, width {trunk.width}",
            "Choose heads so that width / heads is an integer (AIMv2 uses 128 channels per head)",
        )
    for name, encoder in (("model.encoder", model.encoder), ("distill.encoder", config.distill.encoder)):
        require(
            encoder.position != "sincos" or encoder.width % 4 == 0,
            f"{name}.width must be a multiple of 4 for sin-cos positions",
            encoder.width,
            f"Change the width, or set {name}.position=learned",
        )
    for name, decoder in (("model.decoder", model.decoder), ("distill.decoder", config.distill.decoder)):
        require(
            decoder is None or decoder.kind != "mlp" or decoder.width % 4 == 0,
            f"{name}.width must be a multiple of 4 for the sin-cos positions of {name}.kind=mlp",
            decoder and decoder.width,
            "Change the width",
        )
    for name in ("model.decoder", "lit.text"):
        at_least(config, 2, f"{name}.vocab_size", f"{name}.text_length")
    at_least(config, 1, "model.patch_size")
    positive(config, "model.norm_eps", "model.pixel_std")


def _check_image_size(config: Config) -> None:
    size, patch_size = config.data.image_size, config.model.patch_size
    check_multiple("data.image_size", size, patch_size)
    remedy = f"Give at least {2 * patch_size}: next-patch prediction needs two patches"
    require(config.num_patches >= 2, "data.image_size gives only one patch", size, remedy)


def _check_losses(config: Config) -> None:
    loss, encoder, decoder = config.loss, config.model.encoder, config.model.decoder
    require(loss.image or loss.text, "loss.image and loss.text are both off", False, "Switch at least one on")
    at_least(config, 0, "loss.alpha")
    positive(config, "loss.target_eps")
    require(
        not (loss.image and encoder.attention_mask == "full"),
        "model.encoder.attention_mask lets every patch attend to the one it predicts",
        encoder.attention_mask,
        "Set loss.image=False, or model.encoder.attention_mask=prefix",
    )
    require(
        not (loss.text and decoder.kind == "mlp"),
        "model.decoder.kind is a patch head, which predicts no text",
        decoder.kind,
        "Set loss.text=False, or model.decoder.kind to joint or separate",
    )
    keys = ["model.decoder.token_keep_rate"]
    check_each(config, keys, lambda rate: 0 < rate <= 1, "Give a fraction above 0, up to 1")
    require(
        not (loss.image and decoder.token_keep_rate < 1),
        "model.decoder.token_keep_rate drops tokens that the image loss needs",
        decoder.token_keep_rate,
        "Set loss.image=False, or model.decoder.token_keep_rate=1",
    )


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    positive(config, "optimizer.peak_lr")
    at_least(config, 0, *(f"optimizer.{key}" for key in ("start_lr", "end_lr", "weight_decay", "warmup_steps")))
    at_least(config, 0, "optimizer.cooldown_lr")
    positive(config, "optimizer.eps", "optimizer.clip_norm")
    check_each(config, ["optimizer.betas"], lambda beta: 0 <= beta < 1, "Give a number in [0, 1)")
    require(
        optimizer.weight_decay < 1,
        "optimizer.weight_decay is so large that it flips the signs of parameters",
        optimizer.weight_decay,
        "Give the fraction to remove at each step at the peak learning rate, below 1 (the paper: 1e-4)",
    )
    remedy = "Give a number in [0, 1); 0 keeps no average"
    check_each(config, ["optimizer.ema_decay"], lambda decay: 0 <= decay < 1, remedy)
    require(
        optimizer.schedule_steps > optimizer.warmup_steps,
        "optimizer.schedule_steps must exceed optimizer.warmup_steps",
        f"{optimizer.schedule_steps} schedule steps, {optimizer.warmup_steps} warm-up steps",
        "Increase optimizer.schedule_steps, which includes the warm-up, or reduce optimizer.warmup_steps",
    )


def _check_loader(config: Config) -> None:
    at_least(config, 1, "data.batch_size", "data.read_threads", "data.prefetch")
    at_least(config, 0, "data.workers", "data.cache_gb")
    require(
        not config.data.cache_gb or config.data.cache_dir is not None,
        "data.cache_gb needs data.cache_dir",
        config.data.cache_gb,
        "Set data.cache_dir to a folder on a disk of this host, or data.cache_gb to 0",
    )
    keys = ["data.workers", "data.read_threads", "data.prefetch"]
    remedy = f"Give at most {_MAX_DATA_WORKERS}; a few are enough"
    check_each(config, keys, lambda number: number <= _MAX_DATA_WORKERS, remedy, "is too large")
    for key, high in (("crop_area", 1.0), ("crop_ratio", math.inf)):
        first, last = getattr(config.data, key)
        remedy = f"Give (low, high) with 0 < low <= high <= {high}"
        require(0 < first <= last <= high, f"data.{key} is not a range", (first, last), remedy)
    keys = ["data.flip", "data.max_bad_fraction"]
    check_each(config, keys, lambda share: 0 <= share <= 1, "Give a number from 0 to 1")


def _check_areas(config: Config) -> None:
    areas, batch_size = config.data.areas, config.data.batch_size
    rising = not areas or (areas[0] >= 2 and list(areas) == sorted(set(areas)))
    require(rising, "data.areas is not a rising list", areas, "Give areas in patches, such as (128, 256)")
    for area in areas:
        require(
            batch_size * areas[-1] % area == 0,
            "data.areas has an area that does not divide the patches of a batch",
            f"{area}, for {batch_size} x {areas[-1]} patches",
            "Give areas that divide data.batch_size x the largest area, such as powers of two",
        )
    at_least(config, 2, "eval.area")
    position = config.model.encoder.position
    for key, value in (("data.areas", areas), ("eval.area", config.eval.area)):
        require(
            not value or position == "sincos",
            f"{key} needs position embeddings that accept any grid",
            f"model.encoder.position={position}",
            f"Set model.encoder.position=sincos, or leave {key} out",
        )


def _check_mixture(config: Config) -> None:
    sources, mixture = config.data.sources, config.data.mixture
    for name in mixture:
        remedy = f"Add data.sources.{name}=PATH, or remove the weight; sources: {', '.join(sources) or 'none'}"
        require(name in sources, "data.mixture has a weight for an unknown source", name, remedy)
    for name in sources:
        remedy = f"Set data.mixture.{name}.KIND, or remove the source"
        weighted = sum(mixture.get(name, {}).values()) != 0
        require(weighted, "data.sources has a source without a weight", name, remedy)
    at_least(config, 0, "data.mixture")
    require(bool(sources), "data.sources is empty", {}, "Name at least one prepared dataset")
    length = sum(sum(kinds.values()) for kinds in mixture_counts(mixture).values())
    require(
        length <= 10**6,
        "data.mixture has weights that repeat only after a very long cycle",
        f"{length} examples per cycle",
        "Use weights with fewer digits, such as 0.28",
    )


def _check_evaluation(config: Config) -> None:
    kinds, prefixes = config.eval.caption_types, config.eval.prefixes
    at_least(config, 1, "eval.batch_size", "eval.max_examples")
    check_each(config, ["eval.prefixes"], lambda prefix: 0 < prefix < 1, "Give fractions between 0 and 1")
    unique = len(set(kinds)) == len(kinds)
    require(unique, "eval.caption_types names a caption kind twice", kinds, "Name each kind once")
    complete = not config.eval.sources or (kinds and prefixes)
    remedy = "Name caption kinds and prefix fractions, or set eval.sources={}"
    require(complete, "eval.caption_types or eval.prefixes is empty", (), remedy)


def _check_train(config: Config) -> None:
    train = config.train
    at_least(config, 1, "train.steps", "train.log_every", "train.keep", "train.microbatches", "train.keep_steps")
    at_least(config, 0, "train.eval_every", "train.save_every")
    remedy = f"Put options under one of {', '.join(TPU_OPTION_GROUPS)}"
    for group in train.tpu_compiler_options:
        require(group in TPU_OPTION_GROUPS, "train.tpu_compiler_options has an unknown group", group, remedy)
    for shape in config.batch_shapes:
        require(
            shape.examples % train.microbatches == 0,
            "train.microbatches does not divide data.batch_size",
            f"{train.microbatches} microbatches, batch {shape.examples}",
            "Choose a divisor of the batch",
        )
    require(
        train.profile is None or 1 <= train.profile[0] < train.profile[1],
        "train.profile is not a range of steps",
        train.profile,
        "Give (first, end), 1 <= first < end",
    )


def _check_cooldown(config: Config) -> None:
    remedy = "Give the fraction of the run's steps that are cooldown, such as 0.2"
    keys = ["optimizer.cooldown_share"]
    check_each(config, keys, lambda share: 0 < share < 1, remedy, "is not between 0 and 1")
    branch_point = config.train.cooldown_from
    if branch_point is None:
        return
    names_step = re.fullmatch(r".+:[0-9]{1,10}", branch_point, re.DOTALL) is not None
    remedy = "Give WORKDIR:STEP of the run to branch off"
    require(names_step, "train.cooldown_from names no step of a run", branch_point, remedy)
    start, steps = config.cooldown.start, config.cooldown.steps
    require(
        start >= max(1, config.optimizer.warmup_steps),
        "train.cooldown_from starts in the warm-up",
        f"step {start} of {config.optimizer.warmup_steps}",
        "Branch off at a later step",
    )
    remedy = "Name an earlier step: the last step of the cooldown must be below 2147483648"
    require(start + steps < 2**31, "train.cooldown_from is out of range", branch_point, remedy)


def _check_mesh(config: Config) -> None:
    at_least(config, 1, "mesh.slices")
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    require(
        all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= (2 if sizes[:2] == (-1, -1) else 1),
        "mesh.data, mesh.fsdp, mesh.tensor are not valid sizes",
        sizes,
        "Give sizes of at least 1; one of them may be -1, which takes the remaining devices, or both data and fsdp",
    )
