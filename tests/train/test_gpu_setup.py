"""Configs on GPUs: compiler options, repeatable steps, memory. Devices are stand-ins with what jax's GPUs report."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from aimv2_jax.errors import UserError
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.mesh import build_mesh
from aimv2_jax.train.builder import build_setup
from aimv2_jax.train.device_memory import check_device_memory, least_bytes
from aimv2_jax.train.sdc_check import SdcCheck
from aimv2_jax.train.task import abstract_key
from aimv2_jax.train.tasks import build_task
from aimv2_jax.train.trainer import log_summary
from tests.helpers.tiny import tiny_config
from tests.parallel.test_mesh import gpus


def test_gpu_options_are_known_to_xla():
    """XLA knows every option that a GPU's step is compiled with by name and value; it refuses an unknown one."""
    options = build_setup(tiny_config(), gpus(1)).compiler_options
    assert options["xla_gpu_exclude_nondeterministic_ops"] is True and len(options) == 3
    assert build_setup(tiny_config()).compiler_options == {}
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert lowered.compile(compiler_options=options)(1.0) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_unheard_of"):
        lowered.compile(compiler_options={"xla_gpu_unheard_of": "true"})


def test_step_for_cuda_adds_in_a_fixed_order(monkeypatch):
    """Lowered for CUDA on a mesh, the step has cuDNN's attention on every device, and no scatter of repeated indices.

    One scanned block of the encoder calls cuDNN for two masks, one of the decoder for one, forward and backward.
    """
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda capability: False)
    mesh = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    config = tiny_config(**mesh, model__compute_dtype="bfloat16")
    setup = build_setup(config)
    setup = dataclasses.replace(setup, task=build_task(config, "gpu"))
    key = abstract_key()
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rules.replicated(setup.mesh))
    with rules.scope(setup.mesh):
        traced = setup.step.trace(setup.abstract_state, setup.abstract_batch(config.batch_shapes[0]), key)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@__cudnn$fmhaSoftmax(") == program.count("@__cudnn$fmhaSoftmaxBackward(") == 3
    scatters = [line for line in program.splitlines() if "stablehlo.scatter" in line]
    assert scatters and all("unique_indices = true" in line for line in scatters)


def test_sdc_check_on_gpus_needs_repeatable_steps():
    """Without an option that makes steps repeat, the check would end a healthy run; a CPU repeats by itself."""
    key = "train__gpu_compiler_options__xla_gpu_exclude_nondeterministic_ops"
    checked = dict(guard__sdc_check_every=5)
    build_setup(tiny_config(**checked), gpus(1))
    build_setup(tiny_config(**checked, **{key: "false"}))
    build_setup(tiny_config(**{key: "false"}), gpus(1))
    build_setup(
        tiny_config(**checked, **{key: "false"}, train__gpu_compiler_options__xla_gpu_deterministic_ops="true"), gpus(1)
    )
    with pytest.raises(UserError, match=r"guard\.sdc_check_every compares.*Set train\.gpu_compiler_options\.\w+=true"):
        build_setup(tiny_config(**checked, **{key: "false"}), gpus(1))


def test_sdc_check_on_gpus_keeps_the_devices():
    """The second computation is the same program, since NCCL's sums depend on the order of the devices."""
    mesh = build_mesh(1, -1, 1, 1, devices=gpus(1))
    calls = []
    check = SdcCheck(SimpleNamespace(mesh=mesh, rng="rng"), {"shape": lambda *a: calls.append(a)}, rotate_devices=True)
    check.start(jnp.ones(2), {}, "shape")
    assert len(calls) == 1 and calls[0][2] == "rng"


def test_summary_warns_of_fsdp_over_the_network(monkeypatch):
    """An fsdp axis over several nodes gets one sentence with the remedy; one within a node gets none."""
    lines = []
    monkeypatch.setattr("aimv2_jax.train.trainer.logger.info", lines.append)
    for fsdp, warned in ((16, True), (8, False)):
        lines.clear()
        log_summary(build_setup(tiny_config(mesh__fsdp=fsdp, data__batch_size=32), gpus(2)), "w", None, 0)
        assert any("mesh.fsdp=16 spans GPUs" in line for line in lines) is warned


def with_memory(free: int) -> SimpleNamespace:
    """A device with `free` bytes; memory statistics as jax's GPU client names them."""
    stats = {"bytes_limit": free + 100, "bytes_in_use": 100, "peak_bytes_in_use": free}
    return SimpleNamespace(memory_stats=lambda: stats)


def test_least_memory_is_state_gradients_and_batch():
    """Split parameters count once a device; the bound is that of the arrays themselves."""
    setup = build_setup(tiny_config(mesh__data=1, mesh__fsdp=4, mesh__tensor=2))
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), setup.abstract_state)
    device = jax.devices()[0]

    def held(tree):
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    batch = sum(leaf.size * leaf.dtype.itemsize for leaf in setup.abstract_batch(setup.config.batch_shapes[0]).values())
    assert least_bytes(setup) == held(state) + held(state.params) + batch // 4


def test_memory_when_too_little_then_refused():
    """The error has both figures and the remedy; a device with enough, or without statistics, passes."""
    setup = build_setup(tiny_config())
    needed = least_bytes(setup)
    check_device_memory(setup, [with_memory(needed), SimpleNamespace(memory_stats=lambda: None)])
    with pytest.raises(UserError, match=r"at least 0\.00 GiB .* 0\.00 GiB free on .*Raise mesh\.fsdp"):
        check_device_memory(setup, [with_memory(needed), with_memory(needed - 1)])
