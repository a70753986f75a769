"""Parsing the text of compiled modules."""

from __future__ import annotations

from aimv2_jax.aot.cost_model.kernels import accessed_bytes
from aimv2_jax.aot.hlo import arrays, parse_module
from tests.aot.modules import module


def test_arrays_when_a_tuple_with_layouts_then_types_sizes_and_bytes():
    parsed = arrays("(bf16[8,128,64]{1,2,0:T(8,128)(2,1)S(1)}, /*index=1*/u32[]{:S(2)}, pred[3]{0}, s4[16]{0})")
    assert [(array.dtype, array.dims, array.bytes) for array in parsed] == [
        ("bf16", (8, 128, 64), 131072),
        ("u32", (), 4),
        ("pred", (3,), 3),
        ("s4", (16,), 8),
    ]
    assert "S(1)" in parsed[0].layout


def test_instruction_when_its_tuple_shape_nests_then_opcode_and_operands_are_found():
    parsed = module(
        "  %start = ((f32[1024]{0}), f32[512]{0:S(1)}, s32[]{:S(2)}) async-start(%x), calls=%double\n"
        "  ROOT %y = f32[1024]{0} negate(%x), metadata={op_name=\"jit(step)/a[\\'b\\']\"}, "
        'backend_config={"window_config":{"estimated_cycles":"77"}}'
    )
    start, last = parsed.computations["main"][1:]
    assert (start.opcode, start.operands, start.calls) == ("async-start", ["x"], "double")
    assert (last.op_name, last.estimated_cycles, last.root) == ("jit(step)/a['b']", 77, True)


def test_module_when_a_kernels_metadata_breaks_its_line_then_it_is_one_instruction():
    text = (
        "ENTRY %main (x: f32[4]) -> f32[4] {\n"
        "  %x = f32[4]{0} parameter(0)\n"
        '  ROOT %k = f32[4]{0} custom-call(%x), custom_call_target="tpu_custom_call", kernel_metadata={\n'
        ' "a": "b"\n}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"8"}}}\n'
        "}\n"
    )
    (_, kernel) = parse_module(text).computations["main"]
    assert kernel.opcode == "custom-call" and '"flops":"8"' in kernel.rest


def test_module_elements_of_tuples_are_instructions():
    """In a text that writes them as `%tuple#NUMBER`, their own bytes count, not the tuple's."""
    parsed = module(
        "  %two = (f32[8,128]{1,0:T(8,128)}, (s32[]{:S(2)}, u32[2]{0}), /*index=2*/bf16[1024]{0:S(1)}) fusion(%x)\n"
        "  %first = bf16[1024]{0} copy(%two#2)\n"
        "  ROOT %last = (bf16[1024]{0}, (s32[]{:S(2)}, u32[2]{0}), bf16[1024]{0:S(1)}) tuple(%first, %two#1, %two#2)"
    )
    lines = parsed.computations["main"][1:]
    assert [line.name for line in lines] == ["two", "two#2", "first", "two#1", "last"]
    assert [(line.opcode, line.shape, line.operands) for line in lines if "#" in line.name] == [
        ("get-tuple-element", "bf16[1024]{0:S(1)}", ["two"]),
        ("get-tuple-element", "(s32[]{:S(2)}, u32[2]{0})", ["two"]),
    ]
    assert accessed_bytes(lines[2], "main", parsed) == 2 * 2048
