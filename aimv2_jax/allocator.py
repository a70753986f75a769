"""Settings of glibc's malloc that keep freed memory: taking it from the kernel again costs one page fault per page.

XLA's CPU backend allocates a step's buffers at every step. `AIMV2_JAX_MALLOC=default` leaves malloc as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys

from aimv2_jax.errors import UserError

VARIABLE = "AIMV2_JAX_MALLOC"
# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_NEVER_TRIM = -1
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> bool:
    """Makes malloc keep all freed memory if JAX computes on the CPU; returns whether it does.

    Call it after `skip_absent_tpu` and before threads start. All blocks come from one arena, because arenas of other
    threads hold no block of more than 64 MiB.

    Raises:
      UserError: where `AIMV2_JAX_MALLOC` has an unknown value.
    """
    if not _is_enabled() or not _computes_on_cpu():
        return False
    return _set_mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER_TRIM, _ARENA_MAX: 1})


def keep_freed_image_buffers(bytes_kept: int = 128 << 20) -> bool:
    """Makes malloc keep up to `bytes_kept` of freed memory, for data workers, which decode into blocks of megabytes.

    Otherwise the page faults of new blocks take 5 % of the time for an image of 1600 pixels.
    """
    if not _is_enabled():
        return False
    return _set_mallopt({_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _TRIM_THRESHOLD: bytes_kept})


def _is_enabled() -> bool:
    value = os.environ.get(VARIABLE, "keep")
    if value not in ("keep", "default"):
        raise UserError(f"{VARIABLE} is unknown", value, "Set it to keep (freed memory) or default (malloc as it is)")
    return value == "keep"


def _computes_on_cpu() -> bool:
    """Whether the CPU is JAX's only platform, by the user's choice or because no accelerator is present."""
    jax = sys.modules.get("jax")  # An imported JAX has read its environment already.
    return (os.environ.get("JAX_PLATFORMS") if jax is None else jax.config.jax_platforms) == "cpu"


def _set_mallopt(settings: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # Other C libraries lack mallopt.
        return False
    return 0 not in [mallopt(parameter, value) for parameter, value in settings.items()]
