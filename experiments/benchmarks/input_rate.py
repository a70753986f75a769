"""Measures how many images a second the input pipeline makes, beside bare decoding, tf.data and Pillow.

    python experiments/benchmarks/input_rate.py --json FILE [--input DIR ...] [--rounds 3] [--seconds 1.5]
    python experiments/benchmarks/input_rate.py --make DIR

Every row goes through the same crops (area 0.4 to 1, to 224 x 224) of the same JPEGs, on one core and on all of them;
rounds go through all rows in turn, and the median counts. On one core means that a row's processes are pinned to it;
the pipeline's is the core of its one worker, and the trainer's side, which takes batches over, has the others, except
in the row "trainer too". --input takes prepared data sets, each of pictures of about one
size; without it, pictures like photographs of 512 and 1600 pixels are made. FILE gets a list with one object a row,
and the table goes beside it, with the suffix .md. Needs tensorflow.
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

from aimv2_jax.data.pictures import open_picture  # noqa: E402
from aimv2_jax.errors import UserError, reports_user_errors  # noqa: E402
from aimv2_jax.flags import Parser, check_output  # noqa: E402
from experiments.benchmarks import input_rows, photos  # noqa: E402
from experiments.benchmarks.input_rows import Measured  # noqa: E402

BARE = "bare loop"
_PACKAGES = ("simplejpeg", "pillow", "numpy", "grain", "tensorflow")


class Crew:
    """The processes that run the rows on some cores: of each row those that it needs, started when it first does."""

    def __init__(self, cpus: list[int], exits: contextlib.ExitStack):
        self.cores = len(cpus)
        self._cpus, self._exits = cpus, exits
        self._started: dict[str, list[Any]] = {}

    def rate(self, row: str, folder: str, seconds: float) -> tuple[float, list[Measured]]:
        """Images a second of a row, and what each of its processes measured."""
        connections = self._connections(row)
        try:
            for connection in connections:
                connection.send((row, folder, seconds))
            measured = [connection.recv() for connection in connections]
        except (EOFError, BrokenPipeError):
            raise UserError("a process of the benchmark ended early", row, "See above why it did") from None
        return sum(one.images / one.seconds for one in measured), measured

    def _connections(self, row: str) -> list[Any]:
        # Apart: tensorflow's threads are the process', and nothing else is to share memory with the pipeline.
        kind = "loops" if row in input_rows.ONE_LOOP_A_CORE else "pipeline" if row in input_rows.PIPELINES else "tf"
        if kind not in self._started:
            shares = [[cpu] for cpu in self._cpus] if kind == "loops" else [self._cpus]
            self._started[kind] = [_start(cpus, self._exits) for cpus in shares]
        return self._started[kind]


def _start(cpus: list[int], exits: contextlib.ExitStack) -> Any:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=input_rows.serve, args=(theirs, cpus))
    process.start()
    theirs.close()

    def end() -> None:
        with contextlib.suppress(OSError):
            ours.send(None)
        process.join()

    exits.callback(end)
    return ours


def measure(folders: list[str], rows: list[str], one_core: bool, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One object a row, size and number of cores: medians over rounds that interleave them all."""
    cpus = sorted(os.sched_getaffinity(0))
    sizes = {folder: _side(folder) for folder in folders}
    rates: dict[tuple[str, str, int], list[float]] = {}
    last: dict[tuple[str, str, int], Measured] = {}
    with contextlib.ExitStack() as exits:
        crews = [Crew(cpus[-1:], exits), *([] if one_core or len(cpus) == 1 else [Crew(cpus, exits)])]
        for number in range(rounds):
            for folder in folders:
                for crew in crews:
                    for row in rows:
                        rate, [measured, *_] = crew.rate(row, folder, seconds)
                        rates.setdefault((row, folder, crew.cores), []).append(rate)
                        last[row, folder, crew.cores] = measured
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    lines = []
    for (row, folder, cores), found in rates.items():
        ratios = [rate / whole for rate, whole in zip(found, rates[BARE, folder, cores])]
        measured = last[row, folder, cores]
        lines.append(
            {
                "name": row,
                "size_px": sizes[folder],
                "cores": cores,
                "images_per_s": round(statistics.median(found), 1),
                "ratio_to_bare": round(statistics.median(ratios), 3),
                "stages": {stage: round(spent, 3) for stage, spent in measured.stages_ms.items()},
                "worker_mib": measured.worker_mib and round(measured.worker_mib),
                "rounds": [round(rate, 1) for rate in found],
            }
        )
    return lines


def measure_quality(folders: list[str]) -> Iterator[dict[str, Any]]:
    """One object a size and target: PSNR of our crops against Pillow's of the whole picture."""
    for folder in folders:
        for target, found, equal in input_rows.qualities(folder):
            yield {
                "name": "quality",
                "size_px": _side(folder),
                "target_px": target,
                "psnr_db_median": round(statistics.median(found), 1),
                "psnr_db_worst": round(min(found), 1),
                "share_equal": round(equal, 2),
            }


def _side(folder: str) -> int:
    """The median of the pictures' longer sides."""
    found = input_rows.examples(input_rows.config_of(folder, 1))
    return round(statistics.median(max(open_picture(data).size) for data, _ in found))


def table(lines: list[dict[str, Any]], heading: str) -> str:
    """The lines as Markdown."""
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
            "Milliseconds of a core per image, by stage (rest: hand-over, batch arrays, the trainer's side):",
            "",
        ]
        text += [f"| row | px | cores | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
        for line in staged:
            spent = " | ".join(f"{line['stages'][name]:.2f}" for name in names)
            text.append(f"| {line['name']} | {line['size_px']} | {line['cores']} | {spent} |")
    quality = [line for line in lines if line["name"] == "quality"]
    text += ["", "PSNR against a full decode by Pillow and its resize of the same box; 99 stands for equal crops:", ""]
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


@reports_user_errors
def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--input", nargs="+", metavar="DIR", help="prepared data sets with alt captions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE.json, the table to FILE.md")
    parser.add_argument("--make", metavar="DIR", help="only make the data sets, in DIR")
    parser.add_argument("--rows", nargs="+", choices=list(input_rows.ROWS), default=list(input_rows.ROWS))
    parser.add_argument("--one-core", action="store_true", help="leave out the rows on all cores")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each row in each round")
    flags = parser.parse_args()
    if flags.rounds < 1:
        raise UserError("--rounds is too small", flags.rounds, "Give at least 1")
    if not 0 < flags.seconds < 3600:
        raise UserError("--seconds is no time", flags.seconds, "Give some seconds, such as 1.5")
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        check_output(flags.json, ".json", "--json")
    if flags.make:
        print("\n".join(str(path) for path in photos.make(Path(flags.make))))
        return 0
    if BARE not in flags.rows:
        raise UserError("--rows lacks the row that the others are compared with", flags.rows, f"Add {BARE!r}")
    with tempfile.TemporaryDirectory() as made:
        folders = flags.input or [str(path) for path in photos.make(Path(made))]
        lines = [*measure(folders, flags.rows, flags.one_core, flags.rounds, flags.seconds), *measure_quality(folders)]
    text = table(lines, _heading(" ".join(["python", "experiments/benchmarks/input_rate.py", *sys.argv[1:]])))
    print(text, end="")
    if flags.json:
        flags.json.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
        flags.json.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
