"""The child that compiles: `python -m aimv2_jax.aot.worker JOB.json`. It may be stopped, or die, at any time.

It leaves in the job's folder: `program.json` (what is compiled, before compiling starts); with `full`, `compiled.txt`
and `compiled.json` (the module after code generation, its memory); `error.txt` where the compiler says no;
`user_error.json` where the config or the topology is at fault.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from aimv2_jax.aot.topology import Topology, described_devices, parse_topology
from aimv2_jax.config import Config, build_config
from aimv2_jax.errors import UserError
from aimv2_jax.files import write_whole


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is asked. Everything in it is plain JSON."""

    config: dict[str, Any]
    topology: str
    slices: int
    full: bool  # Code generation too, not only until it is killed.
    folder: str

    def write(self) -> Path:
        file = Path(self.folder) / "job.json"
        write_whole(file, json.dumps(dataclasses.asdict(self)).encode())
        return file


def run(job: Job) -> None:
    """Describes, lowers and compiles."""
    folder = Path(job.folder)
    topology = parse_topology(job.topology, job.slices)
    try:
        devices = described_devices(topology)
        from aimv2_jax.train.program import build_program

        config = build_config(job.config)
        program = build_program(config, devices)
        facts = describe(program, config, topology)  # Before lowering: it says what is compiled.
        lowered = program.lower_step(config.batch_shapes[0])
    except UserError as error:
        write_whole(folder / "user_error.json", json.dumps([error.what, str(error.value), error.remedy]).encode())
        return
    write_whole(folder / "program.json", json.dumps(facts).encode())
    import jax

    try:
        compiled = lowered.compile(compiler_options=facts["compiler_options"] or None)
    except jax.errors.JaxRuntimeError as error:
        write_whole(folder / "error.txt", str(error).encode())
        return
    if job.full:
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
        try:
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError as error:  # libtpu 0.0.52 makes modules on v5p and v6e that it cannot read.
            said = ["libtpu compiled the step, and cannot say what it became", str(error).splitlines()[0]]
            remedy = "Change what it is asked: model.remat, model.layers or train.tpu_compiler_options"
            write_whole(folder / "user_error.json", json.dumps([*said, remedy]).encode())
            return
        write_whole(folder / "compiled.txt", text.encode())
        write_whole(folder / "compiled.json", json.dumps({**sizes, "flops": cost.get("flops")}).encode())


def describe(program: Any, config: Config, topology: Topology) -> dict[str, Any]:
    """What a reader of the compiled module needs to know about the program."""
    import flax
    import jax
    import libtpu

    from aimv2_jax.aot.model_flops import flops_of_allowed_pairs
    from aimv2_jax.train.flops import flops_per_example

    mesh, shape = program.mesh, config.batch_shapes[0]
    return {
        "axes": list(mesh.axis_names),
        "shape": list(mesh.devices.shape),
        "devices": [
            {"coords": list(device.coords), "slice": getattr(device, "slice_index", None) or 0}
            for device in mesh.devices.flat
        ],
        "tensors": [*_tensors(program.abstract_state), *_tensors(program.abstract_batch(shape), "batch")],
        "compiler_options": program.compiler_options,
        "flops_per_example": flops_per_example(config, shape.patches),
        "flops_of_allowed_pairs": flops_of_allowed_pairs(config),
        "batch_size": shape.examples,
        "patches": shape.patches,
        "steps": config.train.steps,
        "num_chips": topology.num_chips,
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "libtpu": libtpu.__version__},
    }


def _tensors(tree: Any, kind: str | None = None) -> list[dict[str, Any]]:
    """Name, kind, type, whole shape, one device's shape and mesh axes of every leaf."""
    import jax

    found = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        part = leaf.sharding.shard_shape(leaf.shape)
        axes = [axis for entry in leaf.sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
        found.append(
            {
                "name": name,
                "kind": kind or ("parameter" if name.startswith("params/") else "optimiser"),
                "dtype": leaf.dtype.name,
                "shape": list(leaf.shape),
                "part": list(part),
                "axes": axes,
                "bytes": math.prod(part) * leaf.dtype.itemsize,
            }
        )
    return found


def main() -> None:
    run(Job(**json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
