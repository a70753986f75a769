"""Measures the images a second of the input pipeline, compared with bare decoding, tf.data and Pillow.

    python experiments/benchmarks/input_rate.py --json FILE [--input DIR ...] [--rounds 3] [--seconds 1.5]
    python experiments/benchmarks/input_rate.py --make DIR

Every row decodes the same crops (area 0.4 to 1, to 224 x 224) of the same JPEGs, on one core and on all cores. Each
round measures all rows in turn; the median over rounds is reported. "One core" pins a row's processes to it. For the
pipeline it is the core of its one worker; the trainer's side, which receives batches, has the others, except in the row
"trainer too". --input takes prepared datasets, each with images of about one size; without it, synthetic photographs of
512 and 1600 pixels are made. FILE gets a list with one object a row, and the file with the suffix .md gets the table.
Needs tensorflow.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from aimv2_jax.cli import Parser, check_output  # noqa: E402
from aimv2_jax.data.transforms.decode import open_encoded  # noqa: E402
from aimv2_jax.errors import UserError, cli_main  # noqa: E402
from experiments.benchmarks import input_rows, photos  # noqa: E402
from experiments.benchmarks.input_rows import Measured  # noqa: E402

BARE = "bare loop"
_PACKAGES = ("simplejpeg", "pillow", "numpy", "grain", "tensorflow")


class WorkerPool:
    """Processes that run the rows on a set of cores, started when a row first needs them."""

    def __init__(self, cpus: list[int], exits: contextlib.ExitStack):
        self.cores = len(cpus)
        self._cpus = cpus
        self._exits = exits
        self._started: dict[str, list[Any]] = {}

    def rate(self, row: str, folder: str, seconds: float) -> tuple[float, list[Measured]]:
        """Returns the images a second of a row, and the measurement of each of its processes."""
        connections = self._connections(row)
        try:
            for connection in connections:
                connection.send((row, folder, seconds))
            measured = [connection.recv() for connection in connections]
        except (EOFError, BrokenPipeError):
            raise UserError("a process of the benchmark ended early", row, "See its error above") from None
        return sum(result.images / result.seconds for result in measured), measured

    def _connections(self, row: str) -> list[Any]:
        # Separate processes: tensorflow's thread pools are global, and no other row may share memory with the pipeline.
        kind = "loops" if row in input_rows.ONE_LOOP_A_CORE else "pipeline" if row in input_rows.PIPELINES else "tf"
        if kind not in self._started:
            shares = [[cpu] for cpu in self._cpus] if kind == "loops" else [self._cpus]
            self._started[kind] = [_start(cpus, self._exits) for cpus in shares]
        return self._started[kind]


def _start(cpus: list[int], exits: contextlib.ExitStack) -> Any:
    context = multiprocessing.get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=input_rows.serve, args=(child_end, cpus))
    process.start()
    child_end.close()

    def end() -> None:
        with contextlib.suppress(OSError):
            parent_end.send(None)
        process.join()

    exits.callback(end)
    return parent_end


def measure(folders: list[str], rows: list[str], one_core: bool, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Returns one object for each row, size and number of cores: medians over rounds that interleave all of them."""
    cpus = sorted(os.sched_getaffinity(0))
    sizes = {folder: _side(folder) for folder in folders}
    rates: dict[tuple[str, str, int], list[float]] = {}
    last: dict[tuple[str, str, int], Measured] = {}
    with contextlib.ExitStack() as exits:
        pools = [WorkerPool(cpus[-1:], exits), *([] if one_core or len(cpus) == 1 else [WorkerPool(cpus, exits)])]
        for number in range(rounds):
            for folder in folders:
                for pool in pools:
                    for row in rows:
                        rate, [measured, *_] = pool.rate(row, folder, seconds)
                        rates.setdefault((row, folder, pool.cores), []).append(rate)
                        last[row, folder, pool.cores] = measured
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    lines = []
    for (row, folder, cores), round_rates in rates.items():
        ratios = [rate / whole for rate, whole in zip(round_rates, rates[BARE, folder, cores])]
        measured = last[row, folder, cores]
        lines.append(
            {
                "name": row,
                "size_px": sizes[folder],
                "cores": cores,
                "images_per_s": round(statistics.median(round_rates), 1),
                "ratio_to_bare": round(statistics.median(ratios), 3),
                "stages": {stage: round(spent, 3) for stage, spent in measured.stages_ms.items()},
                "worker_mib": measured.worker_mib and round(measured.worker_mib),
                "rounds": [round(rate, 1) for rate in round_rates],
            }
        )
    return lines


def measure_quality(folders: list[str]) -> Iterator[dict[str, Any]]:
    """Yields one object for each size and target: PSNR of our crops against Pillow's full decode."""
    for folder in folders:
        for target, psnr_db, equal in input_rows.qualities(folder):
            yield {
                "name": "quality",
                "size_px": _side(folder),
                "target_px": target,
                "psnr_db_median": round(statistics.median(psnr_db), 1),
                "psnr_db_worst": round(min(psnr_db), 1),
                "share_equal": round(equal, 2),
            }


def _side(folder: str) -> int:
    """Returns the median of the images' longer sides."""
    examples = input_rows.examples(input_rows.config_of(folder, 1))
    return round(statistics.median(max(open_encoded(data).size) for data, _ in examples))


def table(lines: list[dict[str, Any]], heading: str) -> str:
    """Formats the lines as Markdown."""
    rows = [line for line in lines if line["name"] != "quality"]
    text = [heading, "", "| row | px | cores | images/s | of bare | worker MiB |", "|---|---|---|---|---|---|"]
    for line in sorted(rows, key=lambda line: (line["size_px"], line["cores"])):
        memory = "" if line["worker_mib"] is None else line["worker_mib"]
        text.append(
            f"| {line['name']} | {line['size_px']} | {line['cores']} | {line['images_per_s']:.0f} "
            f"| {line['ratio_to_bare']:.2f} | {memory} |"
        )
    staged = [line for line in rows if line["stages"]]
    if staged:
        names = list(staged[0]["stages"])
        text += [
            "",
            "Milliseconds of a core per image, by stage (rest: transfer, batch arrays, the trainer's side):",
            "",
        ]
        text += [f"| row | px | cores | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
        for line in staged:
            spent = " | ".join(f"{line['stages'][name]:.2f}" for name in names)
            text.append(f"| {line['name']} | {line['size_px']} | {line['cores']} | {spent} |")
    quality = [line for line in lines if line["name"] == "quality"]
    text += ["", "PSNR against a full decode and resize of the same box by Pillow; 99 means equal crops:", ""]
    text += ["| px | to | median dB | worst dB | equal |", "|---|---|---|---|---|"]
    for line in quality:
        text.append(
            f"| {line['size_px']} | {line['target_px']} | {line['psnr_db_median']} | {line['psnr_db_worst']} "
            f"| {line['share_equal']:.0%} |"
        )
    return "\n".join(text) + "\n"


def _heading(command: str) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return (
        f"`{command}`, {datetime.date.today()}, {len(os.sched_getaffinity(0))} cores ({_processor()}), "
        f"Python {platform.python_version()}, {versions}."
    )


def _processor() -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text().split("model name")[1].split("\n")[0].strip("\t: ")
    return platform.machine()


@cli_main
def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", metavar="DIR", help="prepared datasets with alt captions, also gs:// or s3://"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE.json, the table to FILE.md")
    parser.add_argument("--make", metavar="DIR", help="only make the datasets, in DIR")
    parser.add_argument("--rows", nargs="+", choices=list(input_rows.ROWS), default=list(input_rows.ROWS))
    parser.add_argument("--one-core", action="store_true", help="leave out the rows on all cores")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median is reported")
    parser.add_argument("--seconds", type=float, default=1.5, help="duration of each row in each round")
    flags = parser.parse_args()
    if flags.rounds < 1:
        raise UserError("--rounds is too small", flags.rounds, "Give at least 1")
    if not 0 < flags.seconds < 3600:
        raise UserError("--seconds is out of range", flags.seconds, "Give some seconds, such as 1.5")
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        check_output(flags.json, ".json", "--json")
    if flags.make:
        print("\n".join(str(path) for path in photos.make(Path(flags.make))))
        return 0
    if BARE not in flags.rows:
        raise UserError("--rows lacks the reference row", flags.rows, f"Add {BARE!r}")
    with tempfile.TemporaryDirectory() as temporary:
        folders = flags.input or [str(path) for path in photos.make(Path(temporary))]
        lines = [*measure(folders, flags.rows, flags.one_core, flags.rounds, flags.seconds), *measure_quality(folders)]
    text = table(lines, _heading(" ".join(["python", "experiments/benchmarks/input_rate.py", *sys.argv[1:]])))
    print(text, end="")
    if flags.json:
        flags.json.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
        flags.json.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
