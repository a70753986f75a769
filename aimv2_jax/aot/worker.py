"""Compile subprocess: `python -m aimv2_jax.aot.worker JOB.json`. The parent may kill it at any time.

It writes to the job's folder: `program.json` (`ProgramFacts`, before compilation starts); with `full`, `compiled.txt`
(the module after code generation); `error.txt` if compilation fails; `user_error.json` for a `UserError`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from aimv2_jax.aot.program import ProgramFacts, Tensor
from aimv2_jax.aot.topology import described_devices, parse_topology
from aimv2_jax.checkpoint.error_text import first_line
from aimv2_jax.config.load import build_config
from aimv2_jax.config.schema import BatchShape
from aimv2_jax.errors import UserError
from aimv2_jax.storage.files import atomic_write


@dataclasses.dataclass(frozen=True)
class Job:
    """Arguments of a worker process, all plain JSON."""

    config: dict[str, Any]
    topology: str
    slices: int
    full: bool  # Generate code too; otherwise the parent kills the worker after scheduling.
    folder: str

    def write(self) -> Path:
        file = Path(self.folder) / "job.json"
        atomic_write(file, json.dumps(dataclasses.asdict(self)).encode())
        return file


def run(job: Job) -> None:
    """Lowers and compiles the train step, and writes its files."""
    folder = Path(job.folder)
    try:
        _compile(job, folder)
    except UserError as error:
        atomic_write(folder / "user_error.json", json.dumps([error.what, str(error.value), error.remedy]).encode())


def _compile(job: Job, folder: Path) -> None:
    devices = described_devices(parse_topology(job.topology, job.slices))
    import jax

    from aimv2_jax.train.builder import build_setup

    config = build_config(job.config)
    setup = build_setup(config, devices)
    facts = _facts(setup, config.batch_shapes[0])
    lowered = setup.lower_step(config.batch_shapes[0])
    atomic_write(folder / "program.json", json.dumps(dataclasses.asdict(facts)).encode())
    try:
        compiled = lowered.compile(compiler_options=facts.compiler_options or None)
    except jax.errors.JaxRuntimeError as error:
        atomic_write(folder / "error.txt", str(error).encode())
        return
    if not job.full:
        return
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # On v5p and v6e, libtpu 0.0.52 emits modules that it cannot read.
        raise UserError(
            "libtpu compiled the step but cannot print the compiled module",
            first_line(error),
            "Change the program: model.remat, model.layers or train.tpu_compiler_options",
        ) from error
    atomic_write(folder / "compiled.txt", text.encode())


def _facts(setup: Any, shape: BatchShape) -> ProgramFacts:
    import flax
    import jax
    import libtpu

    return ProgramFacts(
        mesh=dict(setup.mesh.shape),
        coords=[[*device.coords, device.core_on_chip] for device in setup.mesh.devices.flat],
        tensors=[*_tensors(setup.abstract_state), *_tensors(setup.abstract_batch(shape), "batch")],
        compiler_options=dict(setup.compiler_options),
        versions={"jax": jax.__version__, "flax": flax.__version__, "libtpu": libtpu.__version__},
    )


def _tensors(tree: Any, kind: str | None = None) -> list[Tensor]:
    import jax

    tensors = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        part = leaf.sharding.shard_shape(leaf.shape)
        kind_of_leaf = kind or ("parameter" if name.startswith(("params/", "frozen/")) else "optimiser")
        num_bytes = math.prod(part) * leaf.dtype.itemsize
        tensors.append(Tensor(name, kind_of_leaf, list(leaf.shape), list(part), num_bytes))
    return tensors


if __name__ == "__main__":
    run(Job(**json.loads(Path(sys.argv[1]).read_text())))
