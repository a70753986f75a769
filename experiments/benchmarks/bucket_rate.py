"""Measures the records a second that one host's data workers read from a dataset in a bucket, without decoding them.

    python experiments/benchmarks/bucket_rate.py gs://BUCKET/SET --workers 2 --records 10000

Reads a run's first batches in its exact order, through the real worker processes and their read-ahead, and checks every
record's checksum. The first batches, which start the workers and the read-ahead, are not timed. Prints one line of
JSON. --proxy is the address of a counting proxy (tests/helpers/bucket_proxy.py) before the bucket: then requests and
bytes a record are reported too, in which what the workers have read beyond the last batch counts as overhead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, positive  # noqa: E402
from aimv2_jax.config.schema import BatchShape  # noqa: E402
from aimv2_jax.data.loading.batch_builder import LocalBatch, StageTimer  # noqa: E402
from aimv2_jax.data.loading.pools import WorkerFailure, WorkerPool  # noqa: E402
from aimv2_jax.data.loading.read_ahead import QUICK_S, ReadAhead  # noqa: E402
from aimv2_jax.data.loading.worker_status import WorkerStatus  # noqa: E402
from aimv2_jax.data.records import is_intact  # noqa: E402
from aimv2_jax.data.sampling.mixture import MixtureSampler  # noqa: E402
from aimv2_jax.data.sampling.schedule import BatchSchedule  # noqa: E402
from aimv2_jax.data.sources import Source  # noqa: E402
from aimv2_jax.errors import StorageError, UserError, cli_main  # noqa: E402
from aimv2_jax.storage.host_cache import HostCache  # noqa: E402
from aimv2_jax.storage.retries import DATA_RETRIES  # noqa: E402

_MAX_BATCHES = 1 << 32
_WARM_UP = 4  # Batches of each worker that are not timed.


@dataclasses.dataclass
class RecordRead:
    """The read of one record, which a thread of the read-ahead makes."""

    source: Source
    index: int
    data: bytes = b""

    def advance(self) -> None:
        """Reads the record."""
        self.data = self.source.read(self.index)

    @property
    def size(self) -> int:
        return len(self.data) or self.source.mean_bytes


@dataclasses.dataclass(frozen=True)
class ReadBatches:
    """batch number -> the bytes of its records, one after another, and their number."""

    sampler: MixtureSampler
    source: Source
    batch_size: int
    read_ahead: ReadAhead

    def __call__(self, number: int, status: WorkerStatus) -> LocalBatch:
        timer, records = StageTimer(), []
        for read in self.read_ahead(number, self._reads):
            timer.lap("read")
            if not is_intact(read.data):
                raise StorageError(f"{self.source.describe(read.index)} is damaged")
            records.append(read.data)
            timer.lap("check")
        counts = {"records": np.array(len(records)), "read_retries": np.array(DATA_RETRIES.take())}
        arrays = {"bytes": np.frombuffer(b"".join(records), np.uint8)} | counts
        return LocalBatch(number, arrays, [], [], timer.seconds)

    def _reads(self, number: int) -> Iterator[RecordRead]:
        for example in range(number * self.batch_size, (number + 1) * self.batch_size):
            yield RecordRead(self.source, next(self.sampler.records(self.sampler.draw(example))))


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Reads at least `flags.records` records; returns rates and counts."""
    source = Source("set", flags.url, "the dataset", cache=HostCache(flags.cache_dir))
    schedule = BatchSchedule(0, [BatchShape(flags.batch_size, 1)])
    sampler = MixtureSampler(0, schedule, {"set": len(source)}, {"set": {next(iter(source.kinds)): 1}})
    read_ahead = ReadAhead(flags.read_threads, flags.workers, QUICK_S)
    build = ReadBatches(sampler, source, flags.batch_size, read_ahead)
    warm_up = _WARM_UP * flags.workers
    batches = warm_up + -(-flags.records // flags.batch_size)
    before = _proxy_counts(flags.proxy)
    total = {"records": 0, "bytes": 0, "retries": 0}
    # No end of the numbers: the workers read ahead as in a run.
    pool = WorkerPool(build, range(_MAX_BATCHES), flags.workers, prefetch=2)
    try:
        for number in range(batches):
            if number == warm_up:
                start_s, start_cpu_s, timed = time.perf_counter(), _cpu_s(), total.copy()
            batch = pool.take()
            if isinstance(batch, WorkerFailure):
                raise StorageError(str(batch))
            total["records"] += int(batch.arrays["records"])
            total["bytes"] += batch.arrays["bytes"].size
            total["retries"] += int(batch.arrays["read_retries"])
        seconds, cpu_s = time.perf_counter() - start_s, _cpu_s() - start_cpu_s
        memory_mib = max(_peak_mib(process.pid) for process in multiprocessing.active_children())
    finally:
        pool.close()
    records = total["records"] - timed["records"]
    result = {
        "records_per_s": round(records / seconds, 1),
        "mb_per_s": round((total["bytes"] - timed["bytes"]) / seconds / 1e6, 2),
        "cpu_ms_per_record": round(1000 * cpu_s / records, 3),
        "worker_mib": round(memory_mib),
        "records": total["records"],
        "retries": total["retries"],
    }
    if before is not None:
        after = _proxy_counts(flags.proxy)
        for name, key in (("requests_per_record", "requests"), ("received_per_byte", "bytes")):
            divisor = total["records"] if key == "requests" else total["bytes"]
            result[name] = round((after[key] - before[key]) / divisor, 3)
    return result


def _cpu_s() -> float:
    """CPU time of the workers so far."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100  # USER_HZ.


def _peak_mib(pid: int | None) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def _proxy_counts(address: str | None) -> dict[str, int] | None:
    """Reads of objects through the proxy so far, and bytes sent to its clients."""
    if address is None:
        return None
    with urllib.request.urlopen(f"http://{address}/__proxy__/counts", timeout=10) as answer:
        counts = json.load(answer)
    return {"requests": counts["requests"].get("GET read", 0), "bytes": counts["bytes"]["sent"]}


@cli_main
def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("url", metavar="URL", help="a prepared dataset: gs://BUCKET/SET, s3://BUCKET/SET or a folder")
    parser.add_argument("--workers", type=positive, default=2, help="processes that read")
    parser.add_argument("--read-threads", type=positive, default=32, help="as data.read_threads")
    parser.add_argument("--batch-size", type=positive, default=64, help="records of a batch on this host")
    parser.add_argument("--records", type=positive, default=10_000, help="records that are timed, at least")
    parser.add_argument("--cache-dir", help="as data.cache_dir; the index is copied there before the measurement")
    parser.add_argument("--proxy", metavar="HOST:PORT", help="the counting proxy of the tests")
    flags = parser.parse_args()
    if flags.records >= 1 << 30:
        raise UserError("--records is too large", flags.records, "Give fewer, such as 10000")
    print(json.dumps(measure(flags)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
