"""cuDNN's attention: prefix masks made of its masks against the reference, and what it is asked for on CUDA.

No cuDNN is needed: the masks are those of `jax.nn.dot_product_attention`, whose implementation "xla" stands in. It is
made worse than cuDNN, which writes zeros behind the lengths that it is given: here they are NaN.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax._src.cudnn import fused_attention_stablehlo

from aimv2_jax.models.attention import MaskSpec, attend, causal_mask, choose_attention, full_mask, padded_rows
from aimv2_jax.models.kernels import cudnn_attention
from aimv2_jax.models.layers import Precision, Trunk, TrunkOptions

HEADS, HEAD_DIM = 2, 8
jax_attention = jax.nn.dot_product_attention


@jax.custom_vjp
def nan_behind(x, length):
    return jnp.where((jnp.arange(x.shape[1]) < length[:, None])[..., None, None], x, jnp.nan)


@jax.custom_vjp
def nan_gradient_behind(x, length):
    return x


# The kernel does not read the cotangent behind the lengths.
nan_behind.defvjp(
    lambda x, length: (nan_behind(x, length), length),
    lambda length, dy: (jnp.where((jnp.arange(dy.shape[1]) < length[:, None])[..., None, None], dy, 0), None),
)
nan_gradient_behind.defvjp(lambda x, length: (x, length), lambda length, dx: (nan_behind(dx, length), None))


def unclean(q, k, v, query_seq_lengths=None, key_value_seq_lengths=None, **rest):
    """jax's attention with NaN behind the lengths, in results and gradients."""
    if query_seq_lengths is not None:
        q = nan_gradient_behind(q, query_seq_lengths)
    if key_value_seq_lengths is not None:
        k, v = (nan_gradient_behind(x, key_value_seq_lengths) for x in (k, v))
    lengths = dict(query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths)
    out = jax_attention(q, k, v, **lengths, **rest)
    return out if query_seq_lengths is None else nan_behind(out, query_seq_lengths)


def leading(rows: int, counts) -> jax.Array:
    return jnp.arange(rows) < jnp.asarray(counts)[:, None]


def prefix_mask(rows: int, prefixes, counts) -> MaskSpec:
    return MaskSpec(jnp.asarray(prefixes, jnp.int32), leading(rows, counts))


CASES = {
    "prefixes from 1 to all but one": prefix_mask(256, (1, 255), (256, 256)),
    "odd, padding, a prefix that ends in it": prefix_mask(257, (100, 200), (257, 123)),
    "no prefix and nothing valid": prefix_mask(10, (0, 10), (10, 0)),
    "decoder": causal_mask(leading(333, (333, 290))),
    "full, padding, nothing valid": full_mask(leading(49, (49, 20, 0))),
}
# As for the Pallas kernels (test_kernels.py), relative to the largest entry.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def results(implementation: str, mask_spec: MaskSpec, dtype: str, heads: int = HEADS, head_dim: int = HEAD_DIM):
    """Output and gradients of q, k and v; rows that are not valid are excluded from output and loss."""
    shape = (*mask_spec.key_valid.shape, heads * head_dim)
    q, k, v, weight = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(4))
    valid = mask_spec.key_valid[..., None]

    def loss(q, k, v):
        out = jnp.where(valid, attend(q, k, v, mask_spec, None, heads, implementation), 0)
        return jnp.sum((out * weight).astype(jnp.float32)), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


def assert_close(ours, reference, dtype: str) -> None:
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), ours, reference, strict=True):
        atol = TOLERANCE[dtype] * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, "float32") for case in CASES), *((case, "bfloat16") for case in list(CASES)[1::2])]
)
def test_cudnn_attention_equals_the_reference(case, dtype, monkeypatch):
    """Results and gradients are those of attention with the dense mask, whatever lies behind the lengths."""
    reference = results("xla", CASES[case], dtype)
    monkeypatch.setattr(jax.nn, "dot_product_attention", unclean)
    assert_close(results("cudnn_on_xla", CASES[case], dtype), reference, dtype)


@pytest.mark.slow
def test_cudnn_attention_at_4096_patches():
    """At the longest native images the rows are those of the reference, too."""
    mask_spec = prefix_mask(4096, (1500,), (4000,))
    ours, reference = (results(name, mask_spec, "float32", 1, 8) for name in ("cudnn_on_xla", "xla"))
    assert_close(ours, reference, "float32")


@pytest.fixture
def cuda(monkeypatch):
    """jax as on a Hopper GPU with cuDNN 9.10, as far as lowering asks."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)


@pytest.mark.parametrize(
    ("kind", "masks"), [("prefix", ["CAUSAL", "PADDING"]), ("causal", ["CAUSAL"]), ("full", ["PADDING"])]
)
@pytest.mark.parametrize("rows", [334, 4096])
def test_cudnn_program_has_no_scores(kind, masks, rows, cuda):
    """Lowered for CUDA, forward and backward call cuDNN once a mask, and no array has rows times rows entries."""
    shape = jax.ShapeDtypeStruct((2, rows, 256), jnp.bfloat16)
    options = dict(kind=kind, head_dim=128)

    def loss(*arrays):
        return jnp.sum(cudnn_attention.attend(*arrays, **options).astype(jnp.float32))

    arguments = (*[shape] * 3, jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((2, rows), bool))

    def lowered():
        traced = jax.jit(jax.grad(lambda *args: loss(*args), (0, 1, 2))).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    program, scores = lowered(), f"x{rows}x{rows}x"
    for name in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
        calls = [line for line in program.splitlines() if f"@__cudnn${name}(" in line]
        assert sorted(re.search(r"mask_type[^A-Z]+([A-Z_]+)", line)[1] for line in calls) == masks
    assert "stablehlo.dot_general" not in program
    assert scores not in program
    options["implementation"] = "xla"
    assert scores in lowered()


@pytest.mark.parametrize(
    ("wanted", "head_dim", "platform", "dtype", "chosen"),
    [
        ("auto", 128, "gpu", "bfloat16", "cudnn"),
        ("auto", 64, "gpu", "bfloat16", "cudnn"),
        ("auto", 128, "gpu", "float32", "xla"),
        ("auto", 36, "gpu", "bfloat16", "xla"),
        ("auto", 256, "gpu", "bfloat16", "xla"),
        ("auto", 128, "tpu", "bfloat16", "pallas"),
        ("xla", 128, "gpu", "bfloat16", "xla"),
        ("cudnn", 128, "gpu", "bfloat16", "cudnn"),
        ("cudnn", 16, "cpu", "float32", "cudnn_on_xla"),
    ],
)
def test_cudnn_is_chosen_where_it_can_run(wanted, head_dim, platform, dtype, chosen):
    """ "auto" takes cuDNN's attention on GPUs for heads and dtypes that cuDNN takes."""
    assert choose_attention(wanted, head_dim, platform, dtype) == chosen


@pytest.mark.parametrize(("length", "rows"), [(333, 334), (257, 258), (4096, 4096)])
def test_cudnn_rows_are_even(length, rows):
    """Odd lengths, which some releases of cuDNN refuse in training, get one row of padding."""
    assert padded_rows(length, "cudnn") == rows


def test_trunk_with_padding_between_rows():
    """A decoder's padding lies between patches and text; results, hidden states and gradients are the reference's."""
    valid = jnp.asarray([[True] * 7, [True, True, False, False, True, True, False]])
    mask_spec = MaskSpec(jnp.asarray([3, 4]), valid)  # The second prefix has two valid rows.
    x, weight = (jax.random.normal(jax.random.key(i), (2, 7, 16)) for i in range(2))
    shared = dict(depth=2, heads=2, hidden=24, eps=1e-5, precision=Precision())
    params = meta.unbox(jax.jit(lambda key: Trunk(**shared).init(key, x, mask_spec))(jax.random.key(2)))

    def run(attention):
        trunk = Trunk(**shared, options=TrunkOptions(attention=attention))

        def loss(params, x):
            out, hidden_states, _ = trunk.apply(params, x, mask_spec, return_hidden_states=True)
            out, hidden_states = (jnp.where(valid[..., None], y, 0) for y in (out, hidden_states))
            return jnp.sum(out * weight), (out, hidden_states)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    for actual, expected in zip(jax.tree.leaves(run("cudnn_on_xla")), jax.tree.leaves(run("xla")), strict=True):
        atol = TOLERANCE["float32"] * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
