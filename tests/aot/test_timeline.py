"""Simulated overlap of hand-written schedules: 1000 cycles take 1 us, 1 MB over one link 1 ms (a ring has two)."""

from __future__ import annotations

import pytest

from aimv2_jax.aot.collectives import Collectives
from aimv2_jax.aot.cost_model.cycles import CompiledCostModel, Source
from aimv2_jax.aot.cost_model.kernels import accessed_bytes
from aimv2_jax.aot.cost_model.timeline import ScheduleTimes, simulate
from aimv2_jax.aot.hlo import Module, scheduled, trip_count
from tests.aot.modules import CHIP, collectives, compute, milliseconds, module, row_groups, square

MB = 1_000_000
GATHER_MS = milliseconds(4 * MB, links=2)  # f32[1000000] over a row of four: 1.5 ms.
GROUPS = f"channel_id=1, replica_groups={row_groups()}, dimensions={{0}}"


def simulated(parsed: Module, layout=None) -> ScheduleTimes:
    read = collectives(parsed, layout)
    cost_model = CompiledCostModel(parsed, read, CHIP)
    return simulate(
        parsed,
        read,
        lambda instruction, computation: cost_model.estimate(instruction, computation).cycles / CHIP.clock_hz,
    )


def exposed_ms(parsed: Module, layout=None) -> list[float]:
    return [exposed_s * 1e3 for _, _, exposed_s in simulated(parsed, layout).collectives]


def gather_pair(name: str, channel: int) -> tuple[str, str]:
    start = (
        f"  %{name} = (f32[250000]{{0}}, f32[1000000]{{0}}) all-gather-start(%x), channel_id={channel}, "
        f"replica_groups={row_groups()}, dimensions={{0}}"
    )
    return start, f"  %{name}.done = f32[1000000]{{0}} all-gather-done(%{name})"


def test_step_when_a_collective_is_synchronous_then_nothing_hides_it():
    parsed = module(
        "\n".join(
            [
                compute("a", "x", 5 * MB),
                f"  %gather = f32[1000000]{{0}} all-gather(%a), {GROUPS}",
                compute("b", "a", 5 * MB),
            ]
        )
    )
    result = simulated(parsed)
    assert result.compute_s * 1e3 == pytest.approx(10)
    assert result.communication_s * 1e3 == pytest.approx(GATHER_MS)
    assert result.with_overlap_s == pytest.approx(result.without_overlap_s)
    ((collective, times, _),) = result.collectives
    assert (collective.kind, collective.num_bytes, collective.axes) == ("all-gather", 4 * MB, ("fsdp",))
    assert (collective.asynchronous, times) == (False, 1)


@pytest.mark.parametrize(("cycles", "left_ms"), [(0.5 * MB, 1.0), (1.5 * MB, 0.0), (9 * MB, 0.0)])
def test_exposure_when_asynchronous_then_what_runs_between_start_and_done_hides_it(cycles, left_ms):
    start, done = gather_pair("g", 1)
    parsed = module("\n".join([start, compute("a", "x", int(cycles)), done, compute("b", "a", 9 * MB)]))
    assert exposed_ms(parsed) == [pytest.approx(left_ms)]


def test_exposure_when_two_share_a_link_then_the_second_waits_for_the_first():
    starts, dones = zip(gather_pair("g", 1), gather_pair("h", 2))
    parsed = module("\n".join([*starts, compute("a", "x", 2 * MB), *dones]))
    assert exposed_ms(parsed) == [0, pytest.approx(2 * GATHER_MS - 2)]


def test_exposure_when_on_different_links_then_both_run_at_once():
    start, done = gather_pair("g", 1)
    columns = "{{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}"
    other = start.replace("%g", "%h").replace(row_groups(), columns)
    parsed = module("\n".join([start, other, compute("a", "x", int(1.5 * MB)), done, done.replace("%g", "%h")]))
    assert exposed_ms(parsed) == [0, 0]
    assert [collective.axes for collective, _, _ in simulated(parsed).collectives] == [("fsdp",), ("data",)]


ASYNC_FUSIONS = f"""\
%begin (p: f32[250000]) -> (f32[250000], f32[1000000]) {{
  %p = f32[250000]{{0}} parameter(0)
  %all-gather.1 = f32[1000000]{{0}} all-gather(%p), {GROUPS}
  ROOT %c = (f32[250000]{{0}}, f32[1000000]{{0}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}
%async_collective_fusion.1 (p: f32[1024]) -> f32[1024] {{
  %p = f32[1024]{{0}} parameter(0)
  %all-gather.2 = f32[1000000]{{0}} all-gather(%p), {GROUPS}
  ROOT %add = f32[1024]{{0}} add(%p, %p)
}}
%end (p: f32[1000000]) -> f32[1000000] {{
  %p = f32[1000000]{{0}} parameter(0)
  %all-gather.3 = f32[1000000]{{0}} all-gather(%p), {GROUPS}
  ROOT %c = f32[1000000]{{0}} custom-call(%p, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}}
"""


def test_collective_when_split_into_fusions_then_it_is_counted_once():
    carrier = compute("m", "x", MB).replace("%double", "%async_collective_fusion.1")
    parsed = module(
        "  %async-collective-start = (f32[250000]{0}, f32[1000000]{0}) fusion(%x), kind=kCustom, calls=%begin\n"
        f"{carrier}\n{carrier.replace('%m ', '%n ')}\n"
        "  %async-collective-done = f32[1000000]{0} fusion(%async-collective-start), kind=kCustom, calls=%end",
        ASYNC_FUSIONS,
    )
    result = simulated(parsed)
    ((collective, times, exposed),) = result.collectives
    assert (collective.num_bytes, collective.asynchronous, times, exposed) == (4 * MB, True, 1, 0)
    assert result.compute_s * 1e3 == pytest.approx(2)


def test_reduce_scatter_when_written_as_a_custom_fusion_then_its_input_counts_once():
    before = f"""\
%all-reduce-scatter.7 (p: f32[1000,1000]) -> f32[250,1000] {{
  %p = f32[1000,1000]{{1,0}} parameter(0)
  %all-reduce.1 = f32[1000,1000]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={row_groups()}, to_apply=%sum
  ROOT %slice = f32[250,1000]{{1,0}} dynamic-slice(%all-reduce.1, %p, %p), dynamic_slice_sizes={{250,1000}}
}}
"""
    parsed = module("  %f = f32[250,1000]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7", before)
    result = simulated(parsed)
    ((collective, _, exposed),) = result.collectives
    assert (collective.kind, collective.num_bytes, collective.asynchronous) == ("reduce-scatter", 4 * MB, False)
    assert exposed * 1e3 == pytest.approx(GATHER_MS)
    assert result.compute_s == 0


def test_slices_when_sent_through_the_host_then_between_send_and_receive():
    transfer = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="all-reduce.3_0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    gradient = 'metadata={op_name="jit(step)/transpose(jvp(AIMv2))/dot"}'
    parsed = module(
        f"  %g = f32[1000,1000]{{1,0}} fusion(%x), kind=kLoop, calls=%double, {gradient}\n"
        "  %b = f32[1000000]{0} bitcast(%g)\n"
        f"  %send = (f32[1000000]{{0}}, u32[], token[]) send(%b, %t), channel_id=4, {transfer}\n"
        f"{compute('a', 'x', 30 * MB)}\n"
        f"  %recv = (f32[1000000]{{0}}, u32[], token[]) recv(%t), channel_id=3, {transfer}\n"
        "  %recv-done = (f32[1000000]{0}, token[]) recv-done(%recv), channel_id=3, frontend_attributes={"
        '_xla_host_transfer_handler_name="xla_megascale_runtime"}\n'
        f"{compute('late', 'a', 30 * MB)}"
    )
    ((collective, _, exposed),) = simulated(parsed, square(num_slices=2)).collectives
    assert (collective.kind, collective.num_bytes, collective.axes) == ("all-reduce between slices", 4 * MB, ("slice",))
    assert "transpose(" in collective.op_name  # The name of the operation before the bitcast.
    assert exposed * 1e3 == pytest.approx(40 - 30)


LOOP = """\
%body (t: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %t = (s32[], f32[1024]{0}) parameter(0)
  %v = f32[1024]{0} get-tuple-element(%t), index=1
%COMPUTE
  %gather = f32[1000000]{0} all-gather(%v), %GROUPS
  ROOT %r = (s32[], f32[1024]{0}) tuple(%v, %w)
}
%bound (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %c = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%p, %c), direction=LT
}
%condition (t: (s32[], f32[1024])) -> pred[] {
  %t = (s32[], f32[1024]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %f = pred[] fusion(%i), kind=kLoop, calls=%bound
}
"""


@pytest.mark.parametrize(
    ("note", "trips"), [("", 7), (', backend_config={"known_trip_count":{"n":"5"}}', 5)], ids=["constant", "noted"]
)
def test_loop_when_its_length_is_known_then_its_body_counts_so_often(note, trips):
    before = LOOP.replace("%COMPUTE", compute("w", "v", 2 * MB)).replace("%GROUPS", GROUPS)
    parsed = module(f"  %loop = (s32[], f32[1024]{{0}}) while(%x), condition=%condition, body=%body{note}", before)
    assert trip_count(parsed, parsed.computations["main"][-1]) == trips
    assert {item.times for item in scheduled(parsed) if item.computation == "body"} == {trips}
    result = simulated(parsed)
    assert result.compute_s * 1e3 == pytest.approx(2 * trips)
    assert result.exposed_s * 1e3 == pytest.approx(GATHER_MS * trips)
    assert [(times, collective.num_bytes) for collective, times, _ in result.collectives] == [(trips, 4 * MB)]


def test_charges_when_a_kernel_states_its_cost_then_the_slower_of_both_halves_of_the_rule():
    def kernel(flops: float, num_bytes: float) -> float:
        cost = f'{{"cost_estimate":{{"flops":"{flops:.0f}","bytes_accessed":"{num_bytes:.0f}"}}}}'
        parsed = module(f'  %k = f32[1024]{{0}} custom-call(%x), custom_call_target="tpu_custom_call", {cost}')
        estimate = CompiledCostModel(parsed, Collectives(parsed, square()), CHIP).estimate(
            parsed.computations["main"][-1], "main"
        )
        assert estimate.source is Source.KERNEL
        return estimate.cycles / CHIP.clock_hz

    assert kernel(CHIP.peak_flops, 0) == pytest.approx(1 / 0.5)
    assert kernel(0, CHIP.hbm_bytes_per_s) == pytest.approx(1 / 0.8)
    assert kernel(CHIP.peak_flops, CHIP.hbm_bytes_per_s) == pytest.approx(2)


def test_charges_when_a_kernel_states_nothing_then_its_operands_and_results_count():
    parsed = module('  %online-softmax.1 = f32[1024]{0} custom-call(%x), custom_call_target="tpu_custom_call"')
    estimate = CompiledCostModel(parsed, Collectives(parsed, square()), CHIP).estimate(
        parsed.computations["main"][-1], "main"
    )
    assert estimate.cycles / CHIP.clock_hz == pytest.approx(2 * 4096 / 0.8 / CHIP.hbm_bytes_per_s)


STACK = """\
%pick (s: f32[24,512,1024], i: s32[]) -> f32[1,512,1024] {
  %s = f32[24,512,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice = f32[1,512,1024]{2,1,0} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,512,1024}
}
%layer (i: s32[], s: f32[24,512,1024]) -> (f32[24,512,1024], f32[512,1024]) {
  %i = s32[] parameter(0)
  %s = f32[24,512,1024]{2,1,0} parameter(1)
  %one = f32[1,512,1024]{2,1,0} fusion(%s, %i), kind=kLoop, calls=%pick
  %flat = f32[512,1024]{1,0} bitcast(%one)
  %twice = f32[512,1024]{1,0} add(%flat, %flat)
  %back = f32[1,512,1024]{2,1,0} bitcast(%twice)
  %new = f32[24,512,1024]{2,1,0} dynamic-update-slice(%s, %back, %i, %i, %i)
  ROOT %both = (f32[24,512,1024]{2,1,0}, f32[512,1024]{1,0}) tuple(%new, %twice)
}
"""


def test_bytes_when_one_layer_of_a_stack_is_read_and_written_in_place_then_the_layer_counts():
    parsed = module("  %f = (f32[24,512,1024]{2,1,0}, f32[512,1024]{1,0}) fusion(%x, %x), calls=%layer", STACK)
    layer = 4 * 512 * 1024
    assert accessed_bytes(parsed.computations["main"][-1], "main", parsed) == 3 * layer + 4  # Plus the index.
