"""Measures what a dataset of a pod's size costs a host: processes that open a synthetic one and read from it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import resource
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from aimv2_jax.data import bag
from aimv2_jax.data.dataset_info import DATASET_FILE, DatasetInfo
from aimv2_jax.data.dataset_stats import DatasetStats
from aimv2_jax.data.record_index import ENTRY_BYTES, INDEX_FILE
from aimv2_jax.data.shards import Shard
from aimv2_jax.errors import UserError
from experiments.benchmarks import listing_server

_CHECKED_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset of equal shards of equal records. Only the index entries of the records `sampled` are written."""

    folder: Path
    info: DatasetInfo
    sampled: tuple[int, ...]


def make_dataset(folder: Path, records: int, shards: int, record_bytes: int, samples: int, seed: int = 0) -> Dataset:
    """Writes a dataset of sparse files, which take almost no disk, however large they are.

    Raises:
      UserError: if a shard would be longer than a bag file may be.
    """
    per_shard = records // shards
    if per_shard * record_bytes > bag.MAX_BYTES:
        fewest = -(-records * record_bytes // bag.MAX_BYTES)
        raise UserError("a shard would have over 4 GiB", per_shard * record_bytes, f"Give --shards {fewest} or more")
    stats = DatasetStats()
    stats.records = per_shard * shards
    stats.kinds["alt"] = stats.records_with["alt"] = stats.records
    size = per_shard * (record_bytes + bag.END_BYTES)
    files = [Shard(f"{number:06d}{bag.SUFFIX}", per_shard, size) for number in range(shards)]
    info = DatasetInfo.from_stats(stats, files, index_crc32=0, made={})
    folder.mkdir(parents=True)
    for shard in files:
        _make_sparse(folder / shard.file, shard.bytes)
    _make_sparse(folder / INDEX_FILE, ENTRY_BYTES * info.records)
    sampled = np.unique(np.random.default_rng(seed).integers(0, info.records, samples))
    with (folder / INDEX_FILE).open("r+b") as file:
        for index in sampled.tolist():
            start = index % per_shard * record_bytes
            entries = np.array([start, start + record_bytes], "<u4")[int(start == 0) :]
            file.seek(ENTRY_BYTES * (index + 1) - entries.nbytes)
            file.write(entries.tobytes())
    (folder / DATASET_FILE).write_text(info.to_json())
    return Dataset(folder, info, tuple(np.random.default_rng(seed).permutation(sampled).tolist()))


def _make_sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def measure(dataset: Dataset) -> dict[str, float]:
    """Measures a trainer that opens the dataset, a worker that gets it and reads, and the listing of a bucket."""
    trainer, source = _in_process(_trainer, dataset)
    worker = _in_process(_worker, source, dataset.sampled)
    sizes = {shard.file: shard.bytes for shard in dataset.info.shards}
    with listing_server.serve(sizes) as url:
        listing = _in_process(_listing, url, len(sizes))
    return trainer | worker | listing


def crc32_bytes_per_s() -> float:
    """Rate of the checksum of the index, which one thread computes while it is copied."""
    data = bytes(_CHECKED_BYTES)
    start_s = time.perf_counter()
    zlib.crc32(data)
    return _CHECKED_BYTES / (time.perf_counter() - start_s)


def _in_process(measurement: Any, *arguments: Any) -> Any:
    """The result of a function that is called in a new process, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measurement, arguments)


def _trainer(dataset: Dataset) -> tuple[dict[str, float], bytes]:
    from aimv2_jax.data.sources import Source

    text = (dataset.folder / DATASET_FILE).read_bytes()
    start_s = time.perf_counter()
    DatasetInfo.from_json(text)
    parse_s = time.perf_counter() - start_s
    before = _resident_mib()
    start_s = time.perf_counter()
    source = Source("set", str(dataset.folder))
    measured = {
        "json_mib": len(text) / 2**20,
        "parse_s": parse_s,
        "open_s": time.perf_counter() - start_s,
        "trainer_mib": _resident_mib() - before,
        "trainer_peak_mib": _peak_mib() - before,
    }
    start_s = time.perf_counter()
    pickled = pickle.dumps(source)
    return measured | {"pickle_s": time.perf_counter() - start_s, "pickle_mib": len(pickled) / 2**20}, pickled


def _worker(pickled: bytes, sampled: tuple[int, ...]) -> dict[str, float]:
    from aimv2_jax.data.sources import Source  # noqa: F401

    before = _resident_mib()
    start_s = time.perf_counter()
    source = pickle.loads(pickled)
    unpickle_s = time.perf_counter() - start_s
    opened = _resident_mib()
    start_s = time.process_time()
    for index in sampled:
        source.read(index)
    cpu_s = time.process_time() - start_s
    return {
        "unpickle_s": unpickle_s,
        "worker_mib": opened - before,
        "worker_growth_mib": _resident_mib() - opened,
        "read_ms": 1000 * cpu_s / len(sampled),
    }


def _listing(url: str, objects: int) -> dict[str, float]:
    os.environ["STORAGE_EMULATOR_HOST"] = url
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # It would ask another API for the kind of the bucket.
    import gcsfs  # noqa: F401

    from aimv2_jax.storage.bucket import open_folder

    before = _resident_mib()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    found = len(open_folder(f"gs://{listing_server.BUCKET}").sizes())
    assert found == objects, (found, objects)
    return {
        "listing_s": time.perf_counter() - start_s,
        "listing_cpu_s": time.process_time() - start_cpu_s,
        "listing_mib": _resident_mib() - before,
        "listing_peak_mib": _peak_mib() - before,
    }


def _resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
