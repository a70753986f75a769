"""Simulates the input of a pod: start, memory, requests and their cost, with 12 billion records in a bucket.

    python experiments/benchmarks/pod_input.py --output experiments/results/pod_input.md

Opens sparse datasets of this size with the program's own code, in processes of their own, and lists their shards from a
server on loopback. What needs a real bucket and a network is computed from Google's published limits and prices
(pod_model.py) and from the rates given as flags. The folder of --scratch needs a file system with sparse files; the
datasets of the default size take about 100 MB there and a million inodes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax import untrusted  # noqa: E402
from aimv2_jax.cli import Parser, check_output  # noqa: E402
from aimv2_jax.data import bag  # noqa: E402
from aimv2_jax.data.record_index import ENTRY_BYTES  # noqa: E402
from aimv2_jax.errors import UserError, cli_main  # noqa: E402
from aimv2_jax.storage.retries import _MAX_PAUSE_S, _MIN_PAUSE_S, patience_s  # noqa: E402
from experiments import base  # noqa: E402
from experiments.benchmarks import pod_measure, pod_model  # noqa: E402

_PACKAGES = ("numpy", "grain", "gcsfs", "tensorstore")
_NETWORK_GB_PER_S = (0.25, 1.0, 2.0)
_BOOT_DISK_GB_PER_S = 0.17  # Assumed, as the network's rates are.
_DAY_S = 86_400
_LATENCY_S = 0.05  # A read that is answered takes this long.
_NEIGHBOUR_BATCHES = 8
_BLOCKS = (16, 64)


def dataset(text: str) -> tuple[int, int]:
    """Shards and bytes a record, from "SHARDS:BYTES"."""
    shards, _, record_bytes = text.partition(":")
    return int(shards), int(record_bytes)


def measured_datasets(flags: argparse.Namespace) -> list[dict[str, float]]:
    """Measures each dataset: what its start and its memory cost a host."""
    columns = []
    for shards, record_bytes in flags.datasets:
        with tempfile.TemporaryDirectory(dir=flags.scratch) as folder:
            made = pod_measure.make_dataset(Path(folder) / "set", flags.records, shards, record_bytes, flags.reads)
            columns.append(pod_measure.measure(made))
        print(f"{shards:,} shards measured", file=sys.stderr)
    return columns


def start_table(flags: argparse.Namespace, columns: list[dict[str, float]]) -> list[str]:
    """The measurements of each dataset, and the limits on the number of shards."""
    rows = {
        "dataset.json, MiB": "json_mib",
        "- parsed, s": "parse_s",
        "trainer: dataset opened from a disk, s": "open_s",
        "- resident memory, MiB": "trainer_mib",
        "source sent to a worker, MiB": "pickle_mib",
        "- unpickled there, s": "unpickle_s",
        "- resident memory of a worker, MiB": "worker_mib",
        "- growth after {:,} reads, MiB": "worker_growth_mib",
        "CPU a read, local, ms": "read_ms",
        "listing over loopback, s": "listing_s",
        "- CPU of the trainer, s": "listing_cpu_s",
        "- resident memory afterwards, MiB": "listing_mib",
    }
    heads = [f"{shards:,} shards, {size / 1000:.0f} kB a record" for shards, size in flags.datasets]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for title, key in rows.items():
        values = " | ".join(f"{column[key]:.3g}" for column in columns)
        lines.append(f"| {title.format(flags.reads)} | {values} |")
    pages = [-(-(shards + 2) // pod_model.OBJECTS_PER_PAGE) for shards, _ in flags.datasets]
    listed = " | ".join(f"{count * flags.page_s:.0f}" for count in pages)
    lines.append(f"| listing a bucket at {flags.page_s:g} s a page of {pod_model.OBJECTS_PER_PAGE:,}, s | {listed} |")
    per_shard = columns[-1]["json_mib"] * 2**20 / flags.datasets[-1][0]
    limits = [
        f"Limits: a shard has less than {bag.MAX_BYTES / 2**30:.0f} GiB, so {flags.records:,} records of 60 kB need at "
        f"least {-(-flags.records * 60_000 // bag.MAX_BYTES):,} shards; dataset.json may have "
        f"{untrusted.MAX_JSON_BYTES / 2**20:.0f} MiB, which is {untrusted.MAX_JSON_BYTES / per_shard:,.0f} shards.",
    ]
    return [*lines, "", *limits]


def index_table(flags: argparse.Namespace) -> list[str]:
    """How long a host copies the index, at several rates of the network and two of its disk."""
    size_gb, checked_gb_per_s = ENTRY_BYTES * flags.records / 1e9, pod_measure.crc32_bytes_per_s() / 1e9
    lines = [
        f"The index has {size_gb:.3g} GB. Its checksum, in one thread while it is copied, runs at "
        f"{checked_gb_per_s:.2g} GB/s here.",
        "",
        f"| network of a host, GB/s | fast disk, s | boot disk of {_BOOT_DISK_GB_PER_S} GB/s, s |",
        "|---|---|---|",
    ]
    for network in _NETWORK_GB_PER_S:
        fast, slow = (
            size_gb / min(network, checked_gb_per_s, disk) for disk in (checked_gb_per_s, _BOOT_DISK_GB_PER_S)
        )
        lines.append(f"| {network:g} | {fast:.0f} | {slow:.0f} |")
    return lines


def requests_table(flags: argparse.Namespace, throttled: pod_model.Throttled, patience: float) -> list[str]:
    """Requests of the pod with one request a record, the bucket's limit, and their cost."""
    rate, size = flags.images_per_s, flags.datasets[0][1]
    ramp = pod_model.ramp(rate)
    run_days = flags.records / rate / _DAY_S
    terabytes = flags.records * size / 1e12
    storage = terabytes * 1000 * pod_model.STORAGE_USD_PER_GB_MONTH
    return [
        "| one request a record | |",
        "|---|---|",
        f"| requests a second of the pod, at {rate:,} images/s | {rate:,} |",
        f"| bytes a second of the pod | {rate * size / 1e9:.2f} GB |",
        f"| bytes a second of a host | {rate * size / flags.hosts / 1e6:.0f} MB |",
        f"| the bucket's limit at first | {pod_model.INITIAL_READS_PER_S:,} reads/s |",
        f"| time until the limit is no longer below the pod's rate | {ramp.seconds / 60:.0f} min |",
        f"| training time lost by then | {ramp.lost_s / 60:.0f} min of {run_days:.1f} days |",
        f"| while the limit is {pod_model.INITIAL_READS_PER_S:,}: reads/s, attempts a read | "
        f"{throttled.reads_per_s:,.0f}, {throttled.attempts_per_read:.1f} |",
        f"| - longest time for which a read is refused, in {flags.throttled_s:g} s | {throttled.longest_s:.0f} s |",
        f"| - reads refused for longer than {patience:.0f} s (watch.data_s / 4) while others succeed | "
        f"{throttled.share_over_patience:.2g} of all |",
        f"| {flags.records:,} reads | ${flags.records * pod_model.READ_USD:,.0f} |",
        f"| a start: listings by {flags.hosts} hosts, copies of the index | ${start_usd(flags):.2f} |",
        f"| for comparison: {terabytes:,.0f} TB stored for a month | ${storage:,.0f} |",
    ]


def start_usd(flags: argparse.Namespace) -> float:
    """Cost of the requests of one start of the pod."""
    from aimv2_jax.storage.host_cache import _COPY_BYTES

    shards, _ = flags.datasets[0]
    pages, ranges = -(-shards // pod_model.OBJECTS_PER_PAGE), -(-ENTRY_BYTES * flags.records // _COPY_BYTES)
    return flags.hosts * (pages * pod_model.LIST_USD + ranges * pod_model.READ_USD)


def blocks_table(flags: argparse.Namespace) -> list[str]:
    """Blocks of neighbouring records a request, against the neighbours that a batch then has."""
    lines = [
        "| records a request | shuffled over | requests/s | ramp, min | cost of the run | neighbours in a batch | "
        "buffer of a host |",
        "|---|---|---|---|---|---|---|",
    ]
    batch, size = flags.batch_size, flags.datasets[0][1]
    orders = [(1, 1, pod_model.exact_order(0, flags.records))]
    for block in _BLOCKS:
        for batches in (0, 1, 16, 128):
            window = max(1, batches * batch // block)
            records = flags.records // (block * window) * block * window
            orders.append((block, window, pod_model.block_order(0, records, block, window)))
    for block, window, order in orders:
        pairs = pod_model.neighbour_pairs(order, flags.records - batch, batch, _NEIGHBOUR_BATCHES)
        over = "all records" if block == 1 else f"{window * block:,} records"
        buffered = 0 if block == 1 else block * window * size / flags.hosts / 1e9
        lines.append(
            f"| {block} | {over} | {flags.images_per_s / block:,.0f} "
            f"| {pod_model.ramp(flags.images_per_s / block).seconds / 60:.0f} "
            f"| ${flags.records / block * pod_model.READ_USD:,.0f} | {pairs:,.1f} | {buffered:.2g} GB |"
        )
        print(f"blocks of {block} over {window}", file=sys.stderr)
    expected = batch**2 / flags.records
    return [*lines, "", f"Pairs of neighbouring records in a batch of {batch:,} by chance: {expected:.3f}."]


def conclusion(
    flags: argparse.Namespace, columns: list[dict[str, float]], throttled: pod_model.Throttled, workers: int
) -> list[str]:
    """What breaks first, what it costs, and whether blocks are worth it."""
    rate, size = flags.images_per_s, flags.datasets[0][1]
    lost = pod_model.ramp(rate).lost_s
    usd = flags.records * pod_model.READ_USD
    storage_usd = flags.records * size / 1e9 * pod_model.STORAGE_USD_PER_GB_MONTH
    memory = [column["trainer_mib"] + workers * column["worker_mib"] for column in columns]
    asked = rate / pod_model.INITIAL_READS_PER_S
    return [
        f"1. The rate of requests breaks first: the pod asks for {asked:.0f} times what a bucket allows at first. It "
        f"trains slowly until the limit has grown, and loses {lost / 60:.0f} minutes of "
        f"{flags.records / rate / _DAY_S:.1f} days. Meanwhile single reads are refused for up to "
        f"{throttled.longest_s:.0f} s although others succeed: a deadline on a single read would end the run, one on "
        "the bucket as a whole does not.",
        f"2. The index comes next: {ENTRY_BYTES * flags.records / 1e9:.0f} GB on each host's disk. Of a boot disk of "
        "100 GB this is half, and its copy takes minutes.",
        f"3. The list of shards costs a host {memory[0]:,.0f} MiB of memory (trainer and {workers} workers) with "
        f"{flags.datasets[0][0]:,} shards, and {memory[-1]:,.0f} MiB with {flags.datasets[-1][0]:,}: give large "
        "datasets large shards (`--shard-size 4GB`).",
        f"4. Requests cost ${usd:,.0f} for the run; to store the dataset costs ${storage_usd:,.0f} a month.",
        "5. Blocks are not what makes a pod possible. They would save the hour of slow training and most of the cost "
        "of the requests. But a batch then holds whole blocks of neighbours, unless the pod buffers and shuffles "
        "millions of records; and since the rows of a batch are the same on any number of hosts, a host has all "
        "records of a block only if its rows are multiples of the block. They are not built.",
    ]


def _heading(command: str) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return (
        f"`{command}`, {datetime.date.today()}, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}, {versions}."
    )


@cli_main
def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--records", type=int, default=12_000_000_000, help="records of the dataset, and of the run")
    sizes = [(100_000, 35_000), (200_000, 60_000), (720_000, 60_000)]
    parser.add_argument("--datasets", type=dataset, nargs="+", metavar="SHARDS:BYTES", default=sizes)
    parser.add_argument("--reads", type=int, default=100_000, help="records that a worker reads")
    parser.add_argument("--hosts", type=int, default=64)
    # The prediction for pretrain:large on v5e:16x16 (experiments/results/aot.md).
    parser.add_argument("--images-per-s", type=int, default=45_000, help="images that the pod trains a second")
    parser.add_argument("--batch-size", type=int, default=16_384, help="batch of which neighbours are counted")
    parser.add_argument("--page-s", type=float, default=0.3, help="time of a page of a listing")
    parser.add_argument("--throttled-s", type=float, default=600.0, help="simulated time below the bucket's limit")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, metavar="FILE.md")
    flags = parser.parse_args()
    if flags.records < max(flags.batch_size, 1) * 256:
        raise UserError("--records is too small", flags.records, "Give at least 256 batches")
    if flags.output:
        check_output(flags.output, ".md", "--output")
    config = base.get_config()
    workers, patience = config.data.workers, patience_s(config.watch.data_s)
    readers = flags.hosts * workers * config.data.read_threads
    pauses_s = (_MIN_PAUSE_S, _MAX_PAUSE_S)
    throttled = pod_model.throttle(
        readers, pod_model.INITIAL_READS_PER_S, _LATENCY_S, patience, flags.throttled_s, pauses_s
    )
    columns = measured_datasets(flags)
    sections = {
        "What breaks first, and what it costs": conclusion(flags, columns, throttled, workers),
        "Start and memory of a host": start_table(flags, columns),
        "Copy of the index": index_table(flags),
        "Requests": requests_table(flags, throttled, patience),
        "Blocks": blocks_table(flags),
    }
    command = " ".join(["python", "experiments/benchmarks/pod_input.py", *sys.argv[1:]])
    text = "\n\n".join([_heading(command), *(f"## {title}\n\n" + "\n".join(sections[title]) for title in sections)])
    print(text)
    if flags.output:
        flags.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
