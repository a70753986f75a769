"""Models that compare images with texts: by embeddings in one space, or by the likelihood of a text."""

from __future__ import annotations

from aimv2_jax.checkpoint.checkpointer import WeightChoice
from aimv2_jax.errors import UserError
from aimv2_jax.eval.likelihood import Scorer
from aimv2_jax.pretrained.dual_encoder import PretrainedDualEncoder, load_dual_encoder
from aimv2_jax.pretrained.hf_import import is_foreign
from aimv2_jax.pretrained.model import load
from aimv2_jax.pretrained.source import has_both_towers


def load_image_text_model(spec: str, weights: WeightChoice = "average") -> PretrainedDualEncoder | Scorer:
    """Loads a model with a text tower, or the decoder of a run.

    Args:
      spec: a LiT run, its export, a Hugging Face `Aimv2Model` folder or Apple's file; or a run with its decoder.
      weights: "average": averaged parameters if the run kept them; "raw": those of the step.

    Raises:
      UserError: for an unreadable model, or one with neither text tower nor decoder.
    """
    if has_both_towers(spec):
        return load_dual_encoder(spec, weights=weights)
    if is_foreign(spec):
        remedy = "Give a LiT run, its export, or an Aimv2Model; or a run with its decoder"
        raise UserError("--checkpoint is an encoder without a text tower", spec, remedy)
    return Scorer(load(spec, weights))
