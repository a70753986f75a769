"""Damages files of saved steps in every way, and checks that each damage is detected, named and quarantined.

python tests/stress/corrupt.py --injections 200 --json corrupt.json

A small state of several files is saved at three steps. Each injection damages the newest step of a fresh copy; together
they damage every class of file in every way: flip a bit, truncate, delete, swap with another, empty, or add a file.
Then a reader must refuse to restore any part of that step and name the file; and a run that starts from it must move
the step aside unchanged and restore the previous step bit for bit.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader  # noqa: E402
from aimv2_jax.checkpoint.metadata import DamagedStep  # noqa: E402
from aimv2_jax.cli import Parser, check_output, positive  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, cli_main  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402

STEPS = (10, 20, 30)
WAYS = ("flip a bit", "truncate", "delete", "swap", "empty", "add")


@dataclasses.dataclass(frozen=True)
class Injection:
    """One damage and the files of the newest step that it affects; a swap affects two."""

    kind: str
    way: str
    files: tuple[str, ...]


def make_state(step: int) -> dict[str, Any]:
    """Returns parameters and moments that differ by step, large enough for several array files."""
    rng = np.random.default_rng(step)
    params = {
        "encoder": {f"layer{i}": jnp.asarray(rng.standard_normal((64, 32)), jnp.float32) for i in range(4)},
        "scale": jnp.asarray(rng.standard_normal(64), jnp.bfloat16),
    }
    return {"step": jnp.int32(step), "params": params, "opt_state": jax.tree.map(lambda x: x * 2, params)}


def save_steps(workdir: Path) -> None:
    with Checkpointer(workdir, keep=len(STEPS)) as checkpointer:
        for step in STEPS:
            checkpointer.save(step, make_state(step), None)


def kind_of(file: str) -> str:
    """Returns the class of a file: its path without Orbax's random names."""
    return "/".join("*" if len(part) == 32 else part for part in file.split("/"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def inject(step: Path, kind: str, way: str, rng: random.Random) -> Injection | None:
    """Damages a file of that class; returns None if that is impossible (such as truncating an empty file)."""
    contents = files_of(step)
    file = rng.choice([name for name in contents if kind_of(name) == kind])
    path, data = step / file, contents[file]
    if way == "flip a bit":
        if not data:
            return None
        bit = rng.randrange(8 * len(data))
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
    elif way in ("truncate", "empty"):
        if not data:
            return None
        path.write_bytes(data[: rng.randrange(len(data))] if way == "truncate" else b"")
    elif way == "delete":
        if file == "hashes.json":  # Without hashes a step is one that was killed before it was hashed.
            return None
        path.unlink()
    elif way == "swap":
        other = rng.choice([name for name, content in contents.items() if content != data])
        path.write_bytes(contents[other])
        (step / other).write_bytes(data)
        return Injection(kind, way, (file, other))
    else:
        file = f"{file}.more"
        (step / file).write_bytes(data)
    return Injection(kind, way, (file,))


def check(workdir: Path, injection: Injection) -> None:
    """Raises AssertionError unless the damage is detected, named and moved aside, and the previous step is used."""
    good, newest = STEPS[-2:]
    checkpoints = workdir / "checkpoints"
    damaged = files_of(checkpoints / str(newest))
    # A damaged manifest or hashes cannot report other files.
    signed = [file for file in ("manifest.json", "hashes.json") if file in injection.files]
    named = signed[:1] or list(injection.files)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(newest))
    for part in (wanted, {"params": wanted["params"]}):
        reader = CheckpointReader(workdir)
        try:
            reader.restore_part(newest, part) if part is not wanted else reader.restore(newest, part)
        except DamagedStep as error:
            assert error.wrong[0].file in named and any(file in str(error) for file in named), str(error)
        else:
            raise AssertionError("a damaged step was restored")
    with Checkpointer(workdir, keep=1) as checkpointer:
        step, damages = checkpointer.newest_intact()
        assert step == good and [damage.step for damage in damages] == [newest], (step, damages)
        assert sorted(wrong.file for wrong in damages[0].wrong) == sorted(named), damages[0]
        restored = checkpointer.restore(step, wanted)
    for actual, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(make_state(good)), strict=True):
        assert actual.dtype == expected.dtype and np.asarray(actual).tobytes() == np.asarray(expected).tobytes()
    assert files_of(checkpoints / damages[0].moved_to) == damaged, "the step that was moved aside has changed"
    assert CheckpointReader(workdir).steps() == [*STEPS[:-1]]


def drill(injections: int, seed: int, folder: Path) -> list[Injection]:
    """Damages copies of a run in `folder` and checks each; returns all injections."""
    clean = folder / "clean"
    save_steps(clean)
    kinds = sorted({kind_of(file) for file in files_of(clean / "checkpoints" / str(STEPS[-1]))})
    # In random order, so that even a few injections cover many classes and ways.
    rng = random.Random(seed)
    cases = list(itertools.product(kinds, WAYS))
    done: list[Injection] = []
    copy = folder / "copy"
    while len(done) < injections:
        rng.shuffle(cases)
        for kind, way in cases[: injections - len(done)]:
            shutil.copytree(clean, copy)
            injection = inject(copy / "checkpoints" / str(STEPS[-1]), kind, way, rng)
            if injection is not None:
                try:
                    check(copy, injection)
                except AssertionError as error:
                    raise AssertionError(f"injection {len(done) + 1}, {injection}: {error}") from error
                done.append(injection)
            shutil.rmtree(copy)
    return done


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(
        prog="python tests/stress/corrupt.py",
        description="Damages checkpoints in every way and checks the detection.",
    )
    parser.add_argument("--injections", type=positive, default=200, help="number of injections (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the files, bits and ways (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the report goes")
    flags = parser.parse_args(arguments)
    if flags.json:
        check_output(flags.json, flag="--json")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        done = drill(flags.injections, flags.seed, Path(folder))
    took_s = time.monotonic() - start
    by_kind, by_way = (collections.Counter(getattr(injection, name) for injection in done) for name in ("kind", "way"))
    report = {"injections": len(done), "seed": flags.seed, "took_s": round(took_s, 1)}
    report |= {"by_class_of_file": dict(sorted(by_kind.items())), "by_way": dict(by_way.most_common())}
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")
    for name, count in [*sorted(by_kind.items()), *by_way.most_common()]:
        print(f"{count:5} {name}")
    print(
        f"{len(done)} injections in {took_s:.0f} s: all detected and named, none restored in part, "
        "the previous step restored bit for bit, the damaged step moved aside unchanged"
    )
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
