"""What the paper's pre-training runs have in common; `pretrain_SIZE_224.py` are the runs."""

from ml_collections import ConfigDict

from aimv2_jax.models.sizes import ENCODER_SIZES
from experiments import base, mixtures


def pretrain_config(
    size: str, *, peak_lr: float, fsdp: int, remat: str = "none", decoder_remat: str | None = None
) -> ConfigDict:
    """The run of an encoder of `size` at 224 px: 12 billion pairs of the paper's mixture in batches of 8192 [P].

    `fsdp` is ours: parameters and moments are split over so many chips, one ring of a pod whose gathers are cheap.
    `remat`, too: the least recomputation with which 32 pictures a chip fit a v5e (`experiments/results/aot.md`).
    """
    config = base.get_config()
    encoder = ENCODER_SIZES[size]
    config.model.encoder.update(width=encoder.width, depth=encoder.depth, heads=encoder.heads)
    config.optimizer.peak_lr = peak_lr
    config.mesh.fsdp = fsdp
    config.model.remat = remat
    config.model.decoder.remat = decoder_remat
    if remat != "none":
        # Weights that are gathered twice need the same matmuls to hide behind as gradients do. Not for all: without
        # the attention weights that these policies keep, libtpu 0.0.52 dies of it.
        config.train.tpu_compiler_options.v5e.xla_tpu_async_collective_fusion_fuse_multiple_collectives = "true"
    mixtures.use_paper_mixture(config)
    return config
