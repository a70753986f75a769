"""AIMv2 pre-training in JAX. Importing this touches no backend, no disk and no tensorflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aimv2_jax.eval.encoders import load_encoder
    from aimv2_jax.eval.load import load as load_model

__version__ = "0.1.0"
__all__ = ["load_encoder", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_encoder":
        from aimv2_jax.eval.encoders import load_encoder

        return load_encoder
    if name == "load_model":
        from aimv2_jax.eval.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
