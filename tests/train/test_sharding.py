"""Equal results on one device, on eight devices in any mesh, and for batches assembled from several hosts.

Meshes differ in the order of float32 sums over rows, hence tolerances of 2e-6 relative for losses and 2e-5 of each
tensor's largest entry for gradients, which are read from Adam's first moments after one step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
import pytest

from aimv2_jax.data import pipeline
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import UserError
from aimv2_jax.parallel import rules
from aimv2_jax.parallel.mesh import local_rows
from aimv2_jax.train.builder import TrainSetup, build_setup
from aimv2_jax.train.step import TrainState, accumulate
from tests.helpers.golden_names import paths
from tests.helpers.tiny import TASKS, tiny_config

STEP = 3
BATCH = 16
SIZES = dict(data__batch_size=BATCH, data__image_size=56, model__encoder__width=32, model__decoder__width=32)
SIZES |= dict(model__encoder__heads=4, model__decoder__heads=4)
MESHES = {"data": (8, 1, 1), "all three": (2, 2, 2), "fsdp": (1, 8, 1), "data x fsdp": (2, 4, 1)}
# Further combinations of what the short test run covers.
SLOW = {
    "data",
    "fsdp",
    "data x fsdp",
    "slices, a loop, recomputation",
    "slices and all others",
    "kernels on one device",
}


def mark_slow(names: Iterable[str]) -> list:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in names]


@pytest.fixture(scope="module")
def tokenizer():
    config = tiny_config(**SIZES)
    return Tokenizer(config.tokenizer.path, config.model.decoder.text_length, config.model.decoder.vocab_size)


def host_batch(rows, tokenizer) -> dict[str, np.ndarray]:
    """Builds the given rows of step 3 like the process that holds them."""
    with pipeline.training_batches(tiny_config(**SIZES), lambda _: rows, STEP, tokenizer) as batches:
        return next(batches).arrays


def run(setup: TrainSetup, arrays: dict[str, np.ndarray], initial: TrainState):
    """Returns prefixes, the state after one step from `initial`, and its metrics for one global batch."""
    batch = pipeline.to_devices(arrays, setup.batch_sharding, np.arange(BATCH), BATCH)
    batch = {name: batch[name] for name in setup.abstract_batch(setup.config.batch_shapes[0])}
    state = jax.device_put(initial, setup.state_shardings)
    with rules.scope(setup.mesh):
        prefix = jax.jit(setup.task.sample_prefix)(setup.rng, batch)
    after, metrics = setup.compile_step(setup.config.batch_shapes[0])(state, batch, setup.rng)
    return jax.device_get(prefix), after, jax.device_get(metrics)


def gradients(state) -> dict[str, np.ndarray]:
    """Adam's first moments after one step: (1 - beta) times the clipped gradient, whose norm is a metric."""
    return paths(jax.device_get(state.opt_state[1].mu))


@pytest.fixture(scope="module")
def initial() -> TrainState:
    """The initial state, the same on all meshes (tests/parallel/test_rules.py)."""
    return jax.device_get(build_setup(tiny_config(**SIZES, mesh__data=1), jax.devices()[:1]).init())


@pytest.fixture(scope="module")
def one_device(initial, tokenizer):
    setup = build_setup(tiny_config(**SIZES, mesh__data=1), jax.devices()[:1])
    return run(setup, host_batch(range(BATCH), tokenizer), initial)


def assert_same(first, second):
    prefix, state, metrics = first
    prefix_2, state_2, metrics_2 = second
    np.testing.assert_array_equal(prefix, prefix_2)
    ours, theirs = gradients(state), gradients(state_2)
    for path, leaf in ours.items():
        assert leaf.any(), path
        np.testing.assert_allclose(theirs[path], leaf, rtol=0, atol=2e-5 * np.abs(leaf).max(), err_msg=path)
    for name in metrics:
        if name.startswith("count_"):
            assert metrics_2[name] == metrics[name] > 0
        if name.startswith("loss") and not name.endswith("zscore"):
            assert metrics_2[name] == pytest.approx(metrics[name], rel=2e-6), name
    for name in ("param_norm", "lr"):
        assert metrics_2[name] == pytest.approx(metrics[name], rel=2e-6), name
    assert metrics_2["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=2e-5)
    assert int(state_2.step) == int(state.step) == 1


def assert_sharded_throughout(capfd) -> None:
    """Asserts that the compiler did not warn about gathering a tensor in order to reshard it."""
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("mesh", mark_slow(MESHES))
def test_step_when_on_eight_devices_then_the_numbers_of_one_device(
    mesh, initial, one_device, tokenizer, always_compiled, capfd
):
    data, fsdp, tensor = MESHES[mesh]
    setup = build_setup(tiny_config(**SIZES, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor))
    result = run(setup, host_batch(range(BATCH), tokenizer), initial)
    assert_same(one_device, result)
    assert_sharded_throughout(capfd)
    for leaf, sharding in zip(jax.tree.leaves(result[1]), jax.tree.leaves(setup.state_shardings)):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


TASK_PARTS = {"lit": {"lit__chunks": 2}, "distill": {"train__microbatches": 2}}
TASK_MESHES = {"all three": dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2), "fsdp": dict(mesh__fsdp=8, mesh__data=1)}


@pytest.mark.parametrize("task", sorted(TASKS.keys() - {"pretrain"}))
def test_step_of_each_task_when_sharded(task, tokenizer, always_compiled, capfd):
    """Other tasks give one device's numbers on meshes, too; frozen parameters keep their bits, and the guard holds."""
    sizes = SIZES | TASKS[task]
    one = build_setup(tiny_config(**sizes, mesh__data=1), jax.devices()[:1])
    initial = jax.device_get(one.init())
    with pipeline.training_batches(one.config, range, STEP, tokenizer) as batches:
        arrays = next(batches).arrays
    expected = run(one, arrays, initial)
    for mesh, further in zip(TASK_MESHES.values(), ({}, TASK_PARTS[task])):
        setup = build_setup(tiny_config(**sizes, **mesh, **further))
        result = run(setup, arrays, initial)
        assert_same(expected, result)
        for before, after in zip(jax.tree.leaves(initial.frozen), jax.tree.leaves(result[1].frozen), strict=True):
            np.testing.assert_array_equal(after, before)
    assert_sharded_throughout(capfd)
    nowhere_finite = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), initial.frozen)
    _, state, _ = run(one, arrays, dataclasses.replace(initial, frozen=nowhere_finite))
    for before, after in zip(jax.tree.leaves(initial.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(after, before)  # Left as they are by a step that is not finite.


WAYS = {
    "slices, a loop, recomputation": dict(
        mesh__slices=2, mesh__data=2, mesh__fsdp=2, model__layers="loop", model__remat="attention"
    ),
    "slices and all others": dict(mesh__slices=2, mesh__fsdp=2, mesh__tensor=2, model__remat="matmuls"),
    "kernels on every axis, microbatches": dict(
        mesh__slices=2,
        mesh__fsdp=2,
        mesh__tensor=2,
        model__attention="pallas",
        model__decoder__remat="full",
        train__microbatches=2,
    ),
    "cuDNN's masks on every axis": dict(
        mesh__slices=2, mesh__fsdp=2, mesh__tensor=2, model__attention="cudnn", model__remat="matmuls"
    ),
    "kernels on one device": dict(mesh__data=1, model__attention="pallas", model__layers="loop"),
}


@pytest.mark.parametrize("way", mark_slow(WAYS))
def test_step_when_run_in_any_way_then_the_numbers_of_the_plain_one(way, initial, one_device, tokenizer):
    config = tiny_config(**SIZES, **WAYS[way])
    setup = build_setup(config, jax.devices()[: 1 if config.mesh.data == 1 and config.mesh.slices == 1 else 8])
    assert_same(one_device, run(setup, host_batch(range(BATCH), tokenizer), initial))


def test_program_when_gradients_are_to_be_summed_in_bfloat16_on_cpus_then_refused():
    with pytest.raises(UserError, match=r"reduce_dtype.*'bfloat16'\. Set train\.reduce_dtype=float32"):
        build_setup(tiny_config(train__reduce_dtype="bfloat16"))


def test_step_when_in_bfloat16_then_its_loss_is_nearly_that_of_float32(initial, one_device, tokenizer):
    config = tiny_config(**SIZES, mesh__data=4, mesh__fsdp=2, model__compute_dtype="bfloat16")
    _, state, metrics = run(build_setup(config), host_batch(range(BATCH), tokenizer), initial)
    _, plain_state, plain = one_device
    expected = gradients(plain_state)
    assert metrics["loss"] != plain["loss"]
    assert metrics["loss"] == pytest.approx(plain["loss"], rel=5e-3)
    for path, leaf in gradients(state).items():
        assert leaf.dtype == np.float32
        # bfloat16 has eight bits, and a gradient is rounded about ten times.
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=5e-2 * np.abs(expected[path]).max(), err_msg=path)


@pytest.mark.slow  # One of the ways above has microbatches, too.
def test_step_when_microbatched_on_eight_devices_then_the_numbers_of_one_device(initial, one_device, tokenizer):
    setup = build_setup(tiny_config(**SIZES, mesh__data=4, mesh__fsdp=2, train__microbatches=2))
    assert_same(one_device, run(setup, host_batch(range(BATCH), tokenizer), initial))


def test_gradient_when_rows_are_dropped_and_decoders_separate_on_eight_devices_then_that_of_one(tokenizer):
    """Kept rows are gathered by example, which on a mesh each device does locally."""
    kind = dict(
        loss__image=False, model__decoder__kind="separate", model__decoder__token_keep_rate=0.4, model__layers="scan"
    )
    meshes = [dict(mesh__data=1), dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)]
    arrays, results, params = host_batch(range(BATCH), tokenizer), [], None
    for mesh in meshes:
        setup = build_setup(tiny_config(**SIZES, **kind, **mesh), jax.devices()[: 1 if mesh == meshes[0] else 8])
        arrays = {name: arrays[name] for name in setup.abstract_batch(setup.config.batch_shapes[0])}
        batch = pipeline.to_devices(arrays, setup.batch_sharding, np.arange(BATCH), BATCH)

        def gradient(params, batch, rng, task=setup.task):
            prefix, kept = task.sample_prefix(rng, batch), task.sample_kept_tokens(rng, batch)
            return kept, accumulate(params, {**batch, **kept}, prefix, task.counts(batch, prefix), task, 1)

        params = jax.device_get(setup.init().params) if params is None else params
        with rules.scope(setup.mesh):
            sharded = jax.device_put(params, setup.state_shardings.params)
            results.append(jax.device_get(jax.jit(gradient)(sharded, batch, setup.rng)))
    (kept, (sums, grads)), (kept_2, (sums_2, grads_2)) = results
    assert kept["kept"].shape == (BATCH, 6)
    np.testing.assert_array_equal(kept["kept"], kept_2["kept"])
    assert sums_2["text"] == pytest.approx(sums["text"], rel=2e-6)
    for path, leaf in paths(grads).items():
        np.testing.assert_allclose(paths(grads_2)[path], leaf, rtol=0, atol=2e-5 * np.abs(leaf).max(), err_msg=path)


def assemble_batch(setup: TrainSetup, hosts: int, tokenizer) -> dict[str, jax.Array]:
    """Assembles a global batch of which every host builds only the rows that its devices hold."""
    sharding, devices = setup.batch_sharding, sorted(jax.devices(), key=lambda device: device.id)
    share = len(devices) // hosts
    shards: dict[str, dict[jax.Device, jax.Array]] = {}
    for i in range(hosts):
        own = devices[i * share : (i + 1) * share]
        rows = local_rows(sharding, BATCH, own)
        local_index = {row: index for index, row in enumerate(rows.tolist())}
        for name, local in host_batch(rows, tokenizer).items():
            for device, index in sharding.devices_indices_map((BATCH,)).items():
                if device in own:
                    part = local[[local_index[row] for row in np.arange(BATCH)[index].tolist()]]
                    shards.setdefault(name, {})[device] = jax.device_put(part, device)
    return {
        name: jax.make_array_from_single_device_arrays(
            (BATCH, *next(iter(parts.values())).shape[1:]),
            sharding,
            [parts[device] for device in sharding.addressable_devices],
        )
        for name, parts in shards.items()
    }


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("mesh", [(2, 4, 1), (1, 2, 4)], ids=str)
def test_batch_when_put_together_from_hosts(hosts, mesh, tokenizer):
    """The batch has the same layout and examples as that of one host, so the step's results are the same."""
    data, fsdp, tensor = mesh
    setup = build_setup(tiny_config(**SIZES, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor))
    assembled = assemble_batch(setup, hosts, tokenizer)
    arrays = host_batch(range(BATCH), tokenizer)
    whole = pipeline.to_devices(arrays, setup.batch_sharding, np.arange(BATCH), BATCH)
    assert assembled.keys() == whole.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(assembled[name], array, name, strict=True)
        for part, part_2 in zip(assembled[name].addressable_shards, whole[name].addressable_shards, strict=True):
            assert (part.device, part.index) == (part_2.device, part_2.index)
