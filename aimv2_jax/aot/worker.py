"""Compile subprocess: `python -m aimv2_jax.aot.worker JOB.json`. The parent may kill it at any time.

It writes to the job's folder: `program.json` (a description of the program, before compilation starts); with `full`,
`compiled.txt` and `compiled.json` (the module after code generation, its memory); `error.txt` if compilation fails;
`user_error.json` if the config or the topology is invalid.
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
from aimv2_jax.storage.files import atomic_write


@dataclasses.dataclass(frozen=True)
class Job:
    """Arguments of a worker process, all plain JSON."""

    config: dict[str, Any]
    topology: str
    slices: int
    full: bool  # Run code generation too; otherwise the parent kills the worker after scheduling.
    folder: str

    def write(self) -> Path:
        file = Path(self.folder) / "job.json"
        atomic_write(file, json.dumps(dataclasses.asdict(self)).encode())
        return file


def run(job: Job) -> None:
    """Describes, lowers and compiles the train step."""
    folder = Path(job.folder)
    topology = parse_topology(job.topology, job.slices)
    try:
        devices = described_devices(topology)
        from aimv2_jax.train.builder import build_setup

        config = build_config(job.config)
        program = build_setup(config, devices)
        facts = describe(program, config, topology)  # Written before compilation, which may be killed.
        lowered = program.lower_step(config.batch_shapes[0])
    except UserError as error:
        atomic_write(folder / "user_error.json", json.dumps([error.what, str(error.value), error.remedy]).encode())
        return
    atomic_write(folder / "program.json", json.dumps(facts).encode())
    import jax

    try:
        compiled = lowered.compile(compiler_options=facts["compiler_options"] or None)
    except jax.errors.JaxRuntimeError as error:
        atomic_write(folder / "error.txt", str(error).encode())
        return
    if job.full:
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
        try:
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError as error:  # On v5p and v6e, libtpu 0.0.52 emits modules that it cannot read.
            what = "libtpu compiled the step but cannot print the compiled module"
            remedy = "Change the program: model.remat, model.layers or train.tpu_compiler_options"
            atomic_write(folder / "user_error.json", json.dumps([what, str(error).splitlines()[0], remedy]).encode())
            return
        atomic_write(folder / "compiled.txt", text.encode())
        atomic_write(folder / "compiled.json", json.dumps({**sizes, "flops": cost.get("flops")}).encode())


def describe(program: Any, config: Config, topology: Topology) -> dict[str, Any]:
    """Returns the facts about a program that the analysis of its compiled module needs."""
    import flax
    import jax
    import libtpu

    from aimv2_jax.monitoring.flops import flops_per_example
    from aimv2_jax.monitoring.model_flops import flops_of_allowed_pairs

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
    """Returns name, kind, dtype, global shape, per-device shape (`part`), mesh axes and bytes of every leaf."""
    import jax

    tensors = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        part = leaf.sharding.shard_shape(leaf.shape)
        axes = [axis for entry in leaf.sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
        tensors.append(
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
    return tensors


def main() -> None:
    run(Job(**json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
