"""Checks of the values that belong to one task, before anything compiles."""

from __future__ import annotations

import operator

from aimv2_jax.config.checks import at_least, check_multiple, positive, require
from aimv2_jax.config.schema import LIT_TRAINABLE, Config


def check_lit(config: Config) -> None:
    at_least(config, 1, "lit.embed_dim", "lit.chunks")
    if config.task != "lit":
        return
    trainable, init = config.lit.trainable, config.init
    require(
        "encoder" not in trainable,
        "lit.trainable names the image tower, which stays frozen",
        trainable,
        "Leave encoder out; to train the encoder, use task=pretrain",
    )
    for name in trainable:
        remedy = f"Name some of {', '.join(LIT_TRAINABLE)}"
        require(name in LIT_TRAINABLE, "lit.trainable names no part of the model", name, remedy)
    require(trainable, "lit.trainable is empty", trainable, f"Name some of {', '.join(LIT_TRAINABLE)}")
    require(
        config.lit.loss == "sigmoid" or set(trainable) != {"logit_bias"},
        "lit.trainable names only a parameter that lit.loss=softmax lacks",
        trainable,
        f"Name some of {', '.join(LIT_TRAINABLE[:-1])}",
    )
    require(
        init.path or "encoder" in init.reinit,
        "init.path names no encoder, and the frozen image tower would keep random weights",
        init.path or "''",
        "Set init.path to a run, an export, a Hugging Face folder or a .safetensors file; to train on random features "
        "on purpose, set init.reinit=('encoder',)",
    )
    for key in ("data.batch_size", "eval.batch_size"):
        size = operator.attrgetter(key)(config)
        remedy = "Give at least 2: the other captions of a batch are an image's negatives"
        require(size >= 2, f"{key} is too small for a contrastive loss", size, remedy)
    require(
        config.train.microbatches == 1,
        "train.microbatches splits the batch, over which a contrastive loss compares",
        config.train.microbatches,
        "Set train.microbatches=1; to save memory, raise lit.chunks or set model.remat",
    )
    require(
        not config.data.areas,
        "data.areas gives batches of several sizes, and a contrastive loss depends on the size",
        config.data.areas,
        "Set data.areas=()",
    )


def check_distill(config: Config) -> None:
    distill = config.distill
    weights = ("features", "logits", "pixels", "own")
    at_least(config, 0, *(f"distill.{key}" for key in weights))
    positive(config, "distill.temperature")
    if config.task != "distill":
        return
    require(
        distill.path,
        "distill.path names no teacher",
        "''",
        "Set it to a run, an export, a Hugging Face folder or a .safetensors file",
    )
    require(
        distill.features or distill.logits or distill.pixels,
        "distill.features, distill.logits and distill.pixels are all 0, and nothing would be learnt from the teacher",
        0,
        "Give at least one of them a weight, or set task=pretrain",
    )
    for name in config.init.reinit:
        require(
            name.partition("/")[0] != "teacher",
            "init.reinit names the teacher, which stays as distill.path has it",
            name,
            "Leave it out; only the student is initialised",
        )
    _check_teacher_image(config)
    _check_teacher_decoder(config)


def _check_teacher_image(config: Config) -> None:
    size, position = config.distill.image_size, config.distill.encoder.position
    if size is not None:
        check_multiple("distill.image_size", size, config.model.patch_size)
    for key, value in (("data.areas", config.data.areas), ("eval.area", config.eval.area)):
        require(
            not value or size is None,
            f"distill.image_size gives the teacher crops, and {key} the student whole images",
            size,
            f"Set distill.image_size=None, or leave {key} out",
        )
        require(
            not value or position == "sincos",
            f"{key} needs a teacher whose position embeddings accept any grid",
            f"distill.encoder.position={position}",
            f"Choose a teacher with sin-cos positions, or leave {key} out",
        )


def _check_teacher_decoder(config: Config) -> None:
    distill, decoder = config.distill, config.model.decoder
    for output in config.teacher_outputs:
        require(
            distill.decoder is not None,
            f"distill.{output} needs a teacher with a decoder",
            "distill.decoder=None",
            f"Set distill.{output}=0, or choose a teacher with a decoder and give its sizes in distill.decoder",
        )
    for key, kind in (("model.decoder", decoder.kind), ("distill.decoder", distill.decoder and distill.decoder.kind)):
        require(
            not (distill.logits and kind == "mlp"),
            f"{key}.kind is a patch head, which predicts no text",
            kind,
            f"Set distill.logits=0, or {key}.kind to joint or separate",
        )
    if not distill.pixels:
        return
    require(
        config.teacher_image_size is None,
        "distill.pixels compares patches, and distill.image_size gives the teacher other ones",
        f"{distill.image_size} px, the student {config.data.image_size}",
        "Set distill.pixels=0, or distill.image_size=None",
    )
    require(
        config.model.encoder.attention_mask == "prefix",
        "distill.pixels needs patches that the encoder does not see",
        f"model.encoder.attention_mask={config.model.encoder.attention_mask}",
        "Set distill.pixels=0, or model.encoder.attention_mask=prefix",
    )
    require(
        decoder.token_keep_rate == 1,
        "model.decoder.token_keep_rate drops tokens that distill.pixels needs",
        decoder.token_keep_rate,
        "Set distill.pixels=0, or model.decoder.token_keep_rate=1",
    )
