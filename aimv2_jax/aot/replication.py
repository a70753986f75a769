"""Detection of tensors that are replicated on every device although the mesh should split them.

The compiled module is checked; its shapes are per device. The rules:

* Parameters and optimiser: a tensor that the rule table splits must enter and leave the step as one shard; and every
  tensor of 4 MiB or more must have a rule that splits it, if the mesh has axes for it.
* Gradients: a gradient is the result of a reduction over devices. If its parameter is split, it must be a
  reduce-scatter: no result may have as many entries as the whole parameter, or as one layer of its stack. (The sum over
  a device's own rows has the global shape before the reduction; that is not replication.)
* Activations: no result may have more rows than one device's share of the batch, with or without its tokens.
* Master weights are gathered in the compute dtype: a float32 gather of a parameter's size is reported if they differ.

A contrastive loss is excepted: every device has the embeddings of the whole batch, and their products with its own
rows; and the few weights from features to embeddings are used in float32, gathered and reduced whole.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence

from aimv2_jax.aot.collectives import Collectives
from aimv2_jax.aot.hlo import Array, Instruction, Module, scheduled
from aimv2_jax.aot.program import ProgramFacts
from aimv2_jax.config.schema import Config
from aimv2_jax.models.kernels.short_attention import MAX_HEADS_PER_PROGRAM
from aimv2_jax.models.sizes import num_kept_tokens, swiglu_hidden

_MIN_LARGE_BYTES = 2**20  # Smaller results are not worth splitting.
_MIN_UNSPLIT_BYTES = 4 * 2**20  # Only biases have no splitting rule, and they are smaller.
_TO_EMBEDDINGS = tuple(f"params/{part}/" for part in ("head", "image_projection", "text_projection"))


def find_replicated(
    module: Module,
    collectives: Collectives,
    facts: ProgramFacts,
    config: Config,
    min_unsplit_bytes: int = _MIN_UNSPLIT_BYTES,
) -> list[str]:
    """Returns one line for each violation of the rules above; empty if there is none."""
    violations = [
        *_state(module, facts, min_unsplit_bytes),
        *_gradients(module, collectives, facts, config),
        *_activations(module, facts, config),
    ]
    return list(dict.fromkeys(violations))


def _state(module: Module, facts: ProgramFacts, min_unsplit_bytes: int) -> Iterator[str]:
    splits = math.prod(size for axis, size in facts.mesh.items() if axis not in ("slice", "data")) > 1
    state = [tensor for tensor in facts.tensors if tensor.kind != "batch"]
    for tensor in state:
        if splits and tensor.bytes >= min_unsplit_bytes and not tensor.is_split:
            yield f"{tensor.kind} {tensor.name} {tensor.shape}: no rule splits it"
    expected = {tensor.name: tensor for tensor in facts.tensors}
    for parameter in module.entry_parameters:
        tensor = expected.get(_path(parameter.op_name))
        if tensor and parameter.arrays and list(parameter.arrays[0].dims) != tensor.part:
            yield f"{tensor.kind} {tensor.name} enters as {list(parameter.arrays[0].dims)}, not {tensor.part}"
    # The new state is the first result, in tree order.
    for tensor, array in zip(state, module.root(module.entry).arrays):
        if list(array.dims) != tensor.part:
            yield f"{tensor.kind} {tensor.name} leaves as {list(array.dims)}, not {tensor.part}"


def _path(op_name: str) -> str:
    """Converts state.params['encoder']['kernel'] to params/encoder/kernel."""
    name = re.sub(r"^(state|batch)\.?", "", op_name)
    return re.sub(r"[\[\].']+", "/", name).strip("/")


def _gradients(module: Module, collectives: Collectives, facts: ProgramFacts, config: Config) -> Iterator[str]:
    unsplit: dict[int, str] = {}
    for tensor in facts.tensors:
        if tensor.kind == "parameter" and tensor.is_split:
            unsplit[math.prod(tensor.shape)] = tensor.name
            if "/blocks/" in tensor.name:
                unsplit[math.prod(tensor.shape[1:])] = tensor.name + " (one layer)"
    # Shapes of shards; a result of such a shape is not replicated, even if its size matches another parameter's.
    parts = {_plain(shape) for tensor in facts.tensors for shape in (tensor.part, tensor.part[1:])}
    parts |= {_plain(tensor.shape) for tensor in facts.tensors if tensor.name.startswith(_TO_EMBEDDINGS)}
    rows = _rows_of_one_device(facts, config)
    mixed = config.model.compute_dtype != config.model.param_dtype
    for collective in collectives.all():
        reduced = collective.kind == "all-reduce"
        gathered = collective.kind == "all-gather" and mixed
        for array in collective.arrays if reduced or gathered else ():
            if array.size not in unsplit or array.bytes < _MIN_LARGE_BYTES:
                continue
            if array.dims[0] in rows or _plain(array.dims) in parts:
                continue
            if reduced:
                yield f"gradient of {unsplit[array.size]}: {array} is reduced to every device"
            elif array.dtype == "f32" and config.model.param_dtype == "float32":
                yield f"{unsplit[array.size]}: {array} is gathered in the parameters' dtype"


def _activations(module: Module, facts: ProgramFacts, config: Config) -> Iterator[str]:
    own = _rows_of_one_device(facts, config)
    axes = [size for axis, size in facts.mesh.items() if axis != "tensor" and size > 1]
    replicated_rows = {
        rows * math.prod(sizes)
        for rows in own
        for count in range(1, len(axes) + 1)
        for sizes in itertools.combinations(axes, count)
    } - own
    lengths = _lengths(config)
    flat = {rows * length for rows in replicated_rows for length in lengths}
    ambiguous = replicated_rows & _model_sizes(config)  # These sizes may be widths instead of rows.
    contrasted = _contrasted_sizes(own, config)
    parameters = {
        _plain(shape)
        for tensor in facts.tensors
        if tensor.kind != "batch"
        for stack in (tensor.shape, tensor.part)
        for shape in (stack, stack[1:])
    }
    for item in scheduled(module):
        if item.instruction.name.startswith("slice-"):
            continue  # A slice on its way to VMEM; the array itself is checked.
        for array in item.instruction.arrays:
            if array.bytes < _MIN_LARGE_BYTES or _plain(array.dims) in parameters or _is_scratch(array):
                continue
            if len(array.dims) == 2 and array.dims[0] in replicated_rows and array.dims[1] in contrasted:
                continue
            rows = (replicated_rows - ambiguous) & set(array.dims) if len(array.dims) > 2 else set()
            if not rows and array.dims[0] in (replicated_rows - ambiguous) | flat:
                rows = {array.dims[0]}
            if not rows and array.dims[0] in ambiguous and set(array.dims[1:]) & lengths:
                rows = {array.dims[0]}
            if rows:
                yield _violation(item.instruction, array, rows.pop())


def _is_scratch(array: Array) -> bool:
    """Whether it is a VMEM buffer of full tiles, the accumulator of an asynchronous reduce-scatter."""
    return array.dtype == "f32" and array.dims[1:] == (8, 128) and "S(1)" in array.layout


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the sorted sizes above 1: the compiler may transpose and drop unit dimensions."""
    return tuple(sorted(size for size in shape if size > 1))


def _violation(instruction: Instruction, array: Array, rows: int) -> str:
    where = re.sub(r"^jit\(\w+\)/", "", instruction.op_name) or instruction.stem
    return f"activation {array.dtype}{list(array.dims)} of {where}: {rows} rows"


def _rows_of_one_device(facts: ProgramFacts, config: Config) -> set[int]:
    """Returns the rows that a device holds of the batch and of one microbatch."""
    num_shards = math.prod(size for axis, size in facts.mesh.items() if axis != "tensor")
    rows = config.batch_shapes[0].examples // num_shards
    return {rows, rows // config.train.microbatches}


def _contrasted_sizes(own_rows: set[int], config: Config) -> set[int]:
    """Second sizes of the arrays of a contrastive loss that have a row for each pair: embedding, and own rows."""
    if config.task != "lit":
        return set()
    return {config.lit.embed_dim} | {-(-rows // config.lit.chunks) for rows in own_rows}


def _lengths(config: Config) -> set[int]:
    length, text = config.batch_shapes[0].patches, config.text.text_length
    images = {length, num_kept_tokens(config.model.decoder.token_keep_rate, length)}
    if config.teacher_image_size is not None:
        images.add(math.prod(config.teacher_grid))
    sizes = {text - 1, text}
    for image in images:
        sizes |= {image - 1, image, image + text - 1, image + text}
    return sizes


def _model_sizes(config: Config) -> set[int]:
    sizes = {config.text.vocab_size, *_lengths(config)}
    for trunk in config.trunks.values():
        sizes |= {
            trunk.width,
            trunk.heads,
            trunk.depth,
            # Widths of the head groups that one program of the attention kernel computes.
            *(heads * trunk.width // trunk.heads for heads in range(1, MAX_HEADS_PER_PROGRAM + 1)),
            trunk.hidden or swiglu_hidden(trunk.width),
        }
    return sizes
