"""Trains from a bucket into a bucket, killed at random moments, and compares the result with a run on a disk.

python tests/stress/bucket.py --kills 10 --processes 2 --failures 0.05 --json bucket.json

The bundled images are packed into tars in the bucket, prepared from there into the bucket, and trained on, with the
workdir in the same bucket. Every second kill comes during a start, the others while the run trains and saves. Every
request goes to fake-gcs-server (tests/helpers/buckets.py) through the proxy, which fails the given fraction of them, in
every way that it knows (see FAILURES). At the end the datasets, the state and the metrics must equal those of an
undisturbed run on a disk bit for bit. The report has the proxy's counts of requests and failures, and the retries in
the metrics.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, check_output, positive  # noqa: E402
from aimv2_jax.data.records import Record, decode  # noqa: E402
from aimv2_jax.data.sources import Source  # noqa: E402
from aimv2_jax.errors import EXIT_FINISHED, EXIT_RETRY, cli_main  # noqa: E402
from aimv2_jax.platforms import skip_absent_tpu  # noqa: E402
from aimv2_jax.storage.files import list_names, read_bytes  # noqa: E402
from tests.helpers.buckets import clients_of, fake_gcs_server, proxy  # noqa: E402
from tests.helpers.several import LocalProcesses  # noqa: E402
from tests.stress.kill import compare  # noqa: E402
from tests.stress.trainer import TIMEOUT_S, trainer_flags  # noqa: E402

SAMPLE = "package:data/sample/train"
NAMES = ("photo", "other")
CAPTIONS = ("alt", "synthetic")
_PER_TAR = 20
# Orbax's and TensorStore's own requests are not refused (403), and find their objects (404): neither tries again then,
# and no real bucket does so for one request in a hundred. These are ours.
_OURS = r"data(/|%2F)|jsonl|hashes\.json|manifest\.json|config\.txt|prefix=[^&]*checkpoints(/|%2F)(&|$)"
# fake-gcs-server, unlike GCS, forgets a resumable upload as soon as it is complete, so that it cannot be repeated.
FAILURES = {"answered": f"^(?!.*({_OURS}))", "only": "^(?!.*uploadType=resumable)"}
_KILL_WITHIN_S = {"start": 20.0, "training": 3.0}  # A start takes about 20 s while requests fail, a save one or two.


@dataclasses.dataclass(frozen=True)
class Kill:
    """A kill: what the run was doing, seconds from the start of the processes, the killed ones, all exit codes, and the
    saved steps.
    """

    during: str
    after_s: float
    killed: tuple[int, ...]
    codes: tuple[int, ...]
    steps: tuple[int, ...]


def tars_of(name: str) -> list[bytes]:
    """The bundled images of a source as webdataset tars."""
    source = Source(name, f"{SAMPLE}/{name}")
    records = [decode(source.read(index)) for index in range(len(source))]
    return [_tar(name, records[start : start + _PER_TAR], start) for start in range(0, len(records), _PER_TAR)]


def _tar(name: str, records: Sequence[Record], start: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, record in enumerate(records, start):
            texts = {kind: record.texts(kind)[0] for kind in CAPTIONS}
            for suffix, data in (("jpg", record.image), ("json", json.dumps(texts).encode())):
                member = tarfile.TarInfo(f"{name}{number:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def prepare(inputs: str, output: str) -> None:
    """Prepares a dataset, again with --resume while the bucket fails."""
    command = [sys.executable, "-m", "aimv2_jax.prepare", "--input", f"{inputs}/*.tar", "--output", output]
    command += ["--shard-size", "300KB", "--workers", "2", "--caption", *(f"{kind}=json:{kind}" for kind in CAPTIONS)]
    for resume in ([], ["--resume"], ["--resume"], ["--resume"]):
        done = subprocess.run([*command, *resume], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            return
        print(f"prepare ended with {done.returncode}: {done.stderr.strip()[-300:]}", flush=True)
    raise RuntimeError("the dataset could not be prepared")


def contents(path: str) -> dict[str, bytes]:
    """The files of a dataset."""
    return {name: read_bytes(f"{path}/{name}") for name in list_names(path)}


def flags(workdir: Path | str, data: str, scratch: Path, steps: int) -> list[str]:
    """Flags of `aimv2_jax.main` for a small run."""
    config, _, *keys = trainer_flags(
        scratch / "run",
        train__steps=steps,
        train__save_every=5,
        train__eval_every=20,
        data__workers=1,
        data__read_threads=8,
        data__cache_dir=scratch / "cache",
        **{f"data__sources__{name}": f"{data}/{name}" for name in NAMES},
    )
    return [config, f"--workdir={workdir}", *keys]


def drill(kills: int, processes: int, failures: float, steps: int, seed: int, folder: Path) -> dict[str, object]:
    """Runs the drill and returns a report; raises AssertionError or RuntimeError if a check fails."""
    with fake_gcs_server() as server, proxy(server) as proxied, clients_of(proxied):
        url = proxied.new_folder()
        disk = folder / "disk"
        for name in NAMES:
            (disk / "tars" / name).mkdir(parents=True)
            for number, tar in enumerate(tars_of(name)):
                (disk / f"tars/{name}/{number:03d}.tar").write_bytes(tar)
                proxied.write(f"{url}/tars/{name}/{number:03d}.tar", tar)
            prepare(f"{disk}/tars/{name}", f"{disk}/data/{name}")
        with LocalProcesses(
            processes, folder / "undisturbed", flags(disk / "run", f"{disk}/data", folder, steps)
        ) as run:
            run.finish()
        proxied.configure(seed=seed, failures=failures, **FAILURES)
        for name in NAMES:
            prepare(f"{url}/tars/{name}", f"{url}/data/{name}")
            assert contents(f"{url}/data/{name}") == contents(f"{disk}/data/{name}"), "the datasets differ"
        done = _train(kills, processes, url, folder, steps, random.Random(seed))
        assert kills < 2 or any(kill.steps for kill in done), "no kill came after a save"
        failed = proxied.counts()["failures"]
        proxied.configure(failures=0.0)
        return {
            "kills": [dataclasses.asdict(one) for one in done],
            "processes": processes,
            "steps": steps,
            "numbers_compared": compare(f"{url}/run", disk / "run", steps),
            "failures": failed,
            "requests": sum(proxied.counts()["requests"].values()),
            "retries": retries(f"{url}/run"),
        }


def _train(kills: int, processes: int, url: str, folder: Path, steps: int, generator: random.Random) -> list[Kill]:
    """Kills the run `kills` times, and lets it finish then."""
    done, arguments = [], flags(f"{url}/run", f"{url}/data", folder, steps)
    for number in itertools.count():
        start = time.monotonic()
        during, killed = "training" if len(done) % 2 else "start", ()
        with LocalProcesses(processes, folder / f"start{number}", arguments) as run:
            if len(done) < kills:
                least = generator.randint(1, 30) if during == "training" else 0
                while _steps(run) < least and run.processes[0].poll() is None:
                    time.sleep(0.1)
                time.sleep(generator.uniform(0, _KILL_WITHIN_S[during]))
                killed = tuple(sorted(generator.sample(range(processes), generator.randint(1, processes))))
                for index in killed:
                    run.kill(index)
            after_s = time.monotonic() - start
            codes = tuple(run.wait(TIMEOUT_S)[index] for index in range(processes))
            log = "\n".join(run.output(index)[1][-2000:] for index in range(processes))
        if codes == (EXIT_FINISHED,) * processes:
            assert len(done) == kills, "the run finished before all kills: give more --steps"
            return done
        if set(codes) == {EXIT_RETRY}:  # The bucket failed for longer than a run waits.
            print(f"started again after exit code {EXIT_RETRY}", flush=True)
        elif killed and set(codes) <= {-signal.SIGKILL, EXIT_RETRY, EXIT_FINISHED}:
            done.append(Kill(during, round(after_s, 1), killed, codes, saved_steps(f"{url}/run")))
            print(f"kill {len(done)}/{kills}: {done[-1]}", flush=True)
        else:
            raise RuntimeError(f"the processes ended with {codes}:\n{log}")


def _steps(run: LocalProcesses) -> int:
    """Number of steps that the run has logged since its start."""
    return len(re.findall(r"^step +[\d,]+/", run.output(0)[0], re.M))


def saved_steps(workdir: str) -> tuple[int, ...]:
    from aimv2_jax.checkpoint.checkpointer import CheckpointReader

    return tuple(CheckpointReader(workdir).steps())


def retries(workdir: str) -> dict[str, int]:
    """Sums of the metrics that count retries. The metrics of steps that a kill has undone are not among them."""
    from aimv2_jax.monitoring.metrics import read_metrics

    lines, _ = read_metrics(workdir)
    names = ("data_read_retries", "storage_retries")
    return {name: int(sum(line.get(name, 0) for line in lines)) for name in names}


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    skip_absent_tpu()
    parser = Parser(prog="python tests/stress/bucket.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--kills", type=int, default=10, help="number of kills (default %(default)s)")
    add("--processes", type=positive, default=1, help="processes of the run (default %(default)s)")
    add("--failures", type=float, default=0.05, help="fraction of failing requests (default %(default)s)")
    add("--steps", type=positive, default=150, help="steps of the run (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of moments and failures (default %(default)s)")
    add("--json", type=Path, metavar="FILE", help="file for the report")
    given = parser.parse_args(arguments)
    if given.json:
        check_output(given.json, flag="--json")
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        report = drill(given.kills, given.processes, given.failures, given.steps, given.seed, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{given.kills} kills of {given.processes} process(es); {report['requests']:,} requests, failures "
        f"{report['failures']}; retries in the metrics {report['retries']}; all {report['numbers_compared']:,} values "
        "of the state and all metrics equal those of the run on a disk"
    )
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
