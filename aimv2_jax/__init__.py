"""AIMv2 pre-training in JAX. Importing this touches no backend, no disk and no tensorflow."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    _told = "aimv2_jax runs on Python 3.11, 3.12, 3.13; this is {}.{}.".format(*sys.version_info)
    if sys.argv[:1] == ["-m"]:  # A command is being started: one line, and the exit code of what a user can change.
        print("error: " + _told, file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(_told)

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
