"""Settings of glibc's malloc: freed memory is kept, since taking it from the kernel again costs a page fault a page.

XLA's CPU backend allocates a step's buffers at every step. `AIMV2_JAX_MALLOC=default` leaves malloc as it is.
"""

from __future__ import annotations

import ctypes
import os

from aimv2_jax.errors import UserError
from aimv2_jax.platforms import is_cpu_only

VARIABLE = "AIMV2_JAX_MALLOC"
# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_NEVER_TRIM = -1
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> bool:
    """Keeps all freed memory where JAX computes on the CPU; returns whether it does. Call it before threads start.

    One arena, in which blocks of any size lie: those of other threads take no block of more than 64 MiB.

    Raises:
      UserError: where `AIMV2_JAX_MALLOC` has an unknown value.
    """
    if not _is_wanted() or not is_cpu_only():
        return False
    return _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER_TRIM, _ARENA_MAX: 1})


def keep_freed_pictures(bytes_kept: int = 128 << 20) -> bool:
    """Keeps up to `bytes_kept` of freed memory: a data worker's, which decodes into blocks of megabytes.

    Taking them again, page by page, takes 5 % of the time of a picture of 1600 pixels.
    """
    if not _is_wanted():
        return False
    return _set({_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _TRIM_THRESHOLD: bytes_kept})


def _is_wanted() -> bool:
    value = os.environ.get(VARIABLE, "keep")
    if value not in ("keep", "default"):
        raise UserError(f"{VARIABLE} is unknown", value, "Set it to keep (freed memory) or default (malloc as it is)")
    return value == "keep"


def _set(settings: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # Other C libraries have no such settings.
        return False
    return 0 not in [mallopt(parameter, value) for parameter, value in settings.items()]
