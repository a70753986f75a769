"""Matrix products of float32 that are computed in float32 on every platform."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp


def exact_products(dtype: Any) -> contextlib.AbstractContextManager:
    """Where products of operands of type `dtype` are traced: float32 ones are not rounded on the way.

    By default a TPU rounds float32 operands to bfloat16, and a GPU may round them to TF32. Gradients that jax derives
    from such a product are as exact. Products of narrower types stay as they are.
    """
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()
