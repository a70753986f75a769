"""The paper's pre-training runs at 224 px: base, large, huge, 1b and 3b.

python -m aimv2_jax.main --config=experiments/pretrain.py:large --workdir=DIR

Published top-1 of the attentive probe on ImageNet-1k: L 86.6, H 87.5, 1B 88.1, 3B 88.5 (RECIPE.md §10).
"""

from ml_collections import ConfigDict

from aimv2_jax.models.sizes import ENCODER_SIZES
from experiments import base, mixtures

# By size: the peak learning rate [P: Table A1]; the number of chips that split parameters and moments, one ring of a
# pod with cheap gathers [O]; the least recomputation with which 32 images a chip fit on a v5e (`results/aot.md`) [O].
SETTINGS = {
    "base": dict(peak_lr=1e-3, fsdp=1),  # [O: the rate of large; the paper has no base]
    "large": dict(peak_lr=1e-3, fsdp=16),
    "huge": dict(peak_lr=8e-4, fsdp=16),
    "1b": dict(peak_lr=8e-4, fsdp=16, remat="matmuls"),
    "3b": dict(peak_lr=4e-4, fsdp=16, remat="gate", decoder_remat="full"),
}
RUNS = tuple(SETTINGS)


def get_config(size: str) -> ConfigDict:
    """The run of an encoder of `size` at 224 px: the mixture of Table 2 for 1,500,000 steps of 8192 [P]."""
    config = base.get_config()
    encoder, settings = ENCODER_SIZES[size], SETTINGS[size]
    config.model.encoder.update(width=encoder.width, depth=encoder.depth, heads=encoder.heads)
    config.optimizer.peak_lr = settings["peak_lr"]
    config.mesh.fsdp = settings["fsdp"]
    if "remat" in settings:
        config.model.remat = settings["remat"]
        config.model.decoder.remat = settings.get("decoder_remat")
        # Weights that are gathered twice overlap with the same matmuls as gradients. Only for these policies: libtpu
        # 0.0.52 crashes with this option if the attention weights are not kept.
        config.train.tpu_compiler_options.v5e.xla_tpu_async_collective_fusion_fuse_multiple_collectives = "true"
    mixtures.use_paper_mixture(config)
    return config
