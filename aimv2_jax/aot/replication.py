"""Finding tensors that are whole on every device though the mesh should split them.

Read from the compiled module, where shapes are those of one device. The rules:

* Parameters and optimiser: what the rule table splits must enter and leave the step as one part; and no tensor of
  `WHOLE` bytes or more may be without a rule that splits it, while the mesh has axes for it.
* Gradients: a gradient is what a reduction over devices leaves. None may have as many entries as the whole parameter,
  or one layer of its stack, where the parameter is split: it must be a reduce-scatter. (The sum over a device's own
  rows has the whole shape before the reduction; that is not replication.)
* Activations: no result may have more rows than one device's share of the batch, with its tokens counted or not.
* Master weights are gathered in the compute type: a float32 gather of a parameter's size is found where they differ.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from aimv2_jax.aot.collectives import Collectives
from aimv2_jax.aot.hlo import Array, Instruction, Module
from aimv2_jax.aot.schedule import scheduled
from aimv2_jax.config import Config
from aimv2_jax.models.kernels.whole_row import MOST_HEADS
from aimv2_jax.models.sizes import kept_rows, swiglu_hidden

LARGE = 2**20  # Bytes: what is smaller is not worth splitting.
WHOLE = 4 * 2**20  # Bytes: what the rules may leave whole: biases only, and they are smaller.


def find_replicated(
    module: Module,
    collectives: Collectives,
    program: dict[str, Any],
    config: Config,
    large: int = LARGE,
    whole: int = WHOLE,
) -> list[str]:
    """Every offender against the rules above, a line each; empty if all is split as it should be."""
    found = [*_state(module, program, whole), *_gradients(module, collectives, program, config, large)]
    return list(dict.fromkeys([*found, *_activations(module, program, config, large)]))


def _state(module: Module, program: dict[str, Any], whole: int) -> Iterator[str]:
    expected = {tensor["name"]: tensor for tensor in program["tensors"]}
    split = math.prod(size for axis, size in zip(program["axes"], program["shape"]) if axis not in ("slice", "data"))
    for tensor in expected.values():
        if split > 1 and tensor["kind"] != "batch" and tensor["bytes"] >= whole and tensor["part"] == tensor["shape"]:
            yield f"{tensor['kind']} {tensor['name']} {tensor['shape']}: no rule splits it"
    root = next(one for one in module.computations[module.entry] if one.root)
    results = root.arrays
    for one in module.entry_parameters:
        name = _path(one.op_name)
        if name in expected and one.arrays and list(one.arrays[0].dims) != expected[name]["part"]:
            yield f"{expected[name]['kind']} {name} enters as {list(one.arrays[0].dims)}, not {expected[name]['part']}"
    state = [tensor for tensor in expected.values() if tensor["kind"] != "batch"]
    for tensor, array in zip(state, results):  # The new state comes first, in the order of its tree.
        if list(array.dims) != tensor["part"]:
            yield f"{tensor['kind']} {tensor['name']} leaves as {list(array.dims)}, not {tensor['part']}"


def _path(op_name: str) -> str:
    """state.params['encoder']['kernel'] as params/encoder/kernel."""
    name = re.sub(r"^(state|batch)\.?", "", op_name)
    return re.sub(r"[\[\].']+", "/", name).strip("/")


def _gradients(
    module: Module, collectives: Collectives, program: dict[str, Any], config: Config, large: int
) -> Iterator[str]:
    whole: dict[int, str] = {}
    for tensor in program["tensors"]:
        if tensor["kind"] == "parameter" and tensor["part"] != tensor["shape"]:
            whole[math.prod(tensor["shape"])] = tensor["name"]
            if "/blocks/" in tensor["name"]:
                whole[math.prod(tensor["shape"][1:])] = tensor["name"] + " (one layer)"
    # Of as many entries by chance, and as it should be.
    parts = {_plain(shape) for tensor in program["tensors"] for shape in (tensor["part"], tensor["part"][1:])}
    rows = _rows_of_one_device(program, config)
    mixed = config.model.compute_dtype != config.model.param_dtype
    for computation in {each.computation for each in scheduled(module)}:
        for marks in collectives.marks(computation).values():
            for collective in (mark.collective for mark in marks if mark.collective):
                reduced = collective.kind == "all-reduce"
                gathered = collective.kind == "all-gather" and mixed
                for text in collective.arrays if reduced or gathered else ():
                    dtype, dims = re.match(r"(\w+)\[([\d,]*)\]", text).groups()
                    array = Array(dtype, tuple(int(size) for size in dims.split(",") if size))
                    if array.size not in whole or array.bytes < large:
                        continue
                    if array.dims[0] in rows or _plain(array.dims) in parts:
                        continue
                    if reduced:
                        yield f"gradient of {whole[array.size]}: {text} is reduced to every device"
                    elif dtype == "f32" and config.model.param_dtype == "float32":
                        yield f"{whole[array.size]}: {text} is gathered in the parameters' type"


def _activations(module: Module, program: dict[str, Any], config: Config, large: int) -> Iterator[str]:
    own = _rows_of_one_device(program, config)
    axes = [size for axis, size in zip(program["axes"], program["shape"]) if axis != "tensor" and size > 1]
    more = {
        rows * math.prod(some)
        for rows in own
        for count in range(1, len(axes) + 1)
        for some in itertools.combinations(axes, count)
    } - own
    lengths = _lengths(config)
    flat = {rows * length for rows in more for length in lengths}
    unclear = more & _model_sizes(config)  # A width is no number of rows.
    parameters = {
        _plain(shape)
        for tensor in program["tensors"]
        if tensor["kind"] != "batch"
        for whole in (tensor["shape"], tensor["part"])
        for shape in (whole, whole[1:])
    }
    for each in scheduled(module):
        if each.instruction.name.startswith("slice-"):
            continue  # A piece, on its way to VMEM, of an array that is looked at itself.
        for array in each.instruction.arrays:
            if array.bytes < large or _plain(array.dims) in parameters or _is_scratch(array):
                continue
            rows = (more - unclear) & set(array.dims) if len(array.dims) > 2 else set()
            if not rows and array.dims[0] in (more - unclear) | flat:
                rows = {array.dims[0]}
            if not rows and array.dims[0] in unclear and set(array.dims[1:]) & lengths:
                rows = {array.dims[0]}
            if rows:
                yield _offender(each.instruction, array, rows.pop())


def _is_scratch(array: Array) -> bool:
    """Whether it is a buffer of whole tiles in VMEM, in which asynchronous reduce-scatters add up."""
    return array.dtype == "f32" and array.dims[1:] == (8, 128) and "S(1)" in array.layout


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without ones and without order: layouts are the compiler's."""
    return tuple(sorted(size for size in shape if size > 1))


def _offender(one: Instruction, array: Array, rows: int) -> str:
    where = re.sub(r"^jit\(\w+\)/", "", one.op_name) or re.sub(r"[.\d]+$", "", one.name)
    return f"activation {array.dtype}{list(array.dims)} of {where}: {rows} rows"


def _rows_of_one_device(program: dict[str, Any], config: Config) -> set[int]:
    """Rows of the batch, and of one of its microbatches, that a device holds."""
    split = math.prod(size for axis, size in zip(program["axes"], program["shape"]) if axis != "tensor")
    return {program["batch_size"] // split, program["batch_size"] // split // config.train.microbatches}


def _lengths(config: Config) -> set[int]:
    length, text = config.batch_shapes[0].patches, config.model.decoder.text_length
    sizes = {text - 1, text}
    for image in (length, kept_rows(config.model.decoder.keep_rows, length)):
        sizes |= {image - 1, image, image + text - 1, image + text}
    return sizes


def _model_sizes(config: Config) -> set[int]:
    sizes = {config.model.decoder.vocab_size, *_lengths(config)}
    for trunk in (config.model.encoder, config.model.decoder):
        sizes |= {
            trunk.width,
            trunk.heads,
            trunk.depth,
            *(heads * trunk.width // trunk.heads for heads in range(1, MOST_HEADS + 1)),  # Of a kernel's program.
            trunk.hidden or swiglu_hidden(trunk.width),
        }
    return sizes
