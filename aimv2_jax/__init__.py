"""AIMv2 pre-training in JAX. Importing this touches no backend, no disk and no tensorflow."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    _message = "aimv2_jax runs on Python 3.11, 3.12, 3.13; this is {}.{}.".format(*sys.version_info)
    if sys.argv[:1] == ["-m"]:  # A command prints one line and exits with the code of a user error.
        print("error: " + _message, file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(_message)

from aimv2_jax.version import __version__

if TYPE_CHECKING:
    from aimv2_jax.pretrained.encoder import load_encoder
    from aimv2_jax.pretrained.model import load as load_model

__all__ = ["__version__", "load_encoder", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_encoder":
        from aimv2_jax.pretrained.encoder import load_encoder

        return load_encoder
    if name == "load_model":
        from aimv2_jax.pretrained.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
