"""Full-precision float32 matrix products on every platform."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp


def exact_products(dtype: Any) -> contextlib.AbstractContextManager:
    """Context for tracing products of operands of type `dtype` that keeps float32 operands unrounded.

    By default a TPU rounds float32 operands to bfloat16, and a GPU may round them to TF32. Gradients that jax derives
    from such a product have the same precision. Products of narrower types are unchanged.
    """
    is_float32 = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest") if is_float32 else contextlib.nullcontext()
