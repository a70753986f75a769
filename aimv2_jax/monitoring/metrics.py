"""Metrics of a run: JSON lines, TensorBoard, Weights & Biases, a progress line, and the stopwatch behind the rates.

`WORKDIR/metrics.jsonl` is the record. A line starts with its `step`, and no step occurs twice, not even after a
restart, since lines of lost steps are cut.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from aimv2_jax.config.load import config_text, config_to_dict
from aimv2_jax.config.schema import Config
from aimv2_jax.console import print_line
from aimv2_jax.errors import UserError
from aimv2_jax.storage.append import AppendFile, Upload, to_json, writing
from aimv2_jax.storage.files import atomic_write, exists, is_remote, make_parent, read_bytes
from aimv2_jax.untrusted import as_int, open_regular, parse_json_object, printable

_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes metrics to all configured outputs on process 0; does nothing on other processes.

    Args:
      workdir: the run's folder.
      tensorboard: also write event files to `WORKDIR/tensorboard`.
      wandb_project: also log to this project of Weights & Biases; a resumed run continues its W&B run.
      config: of the run; shown with its metrics.

    Raises:
      UserError: when Weights & Biases is requested but not installed, or the folder cannot be written.
    """

    def __init__(self, workdir: str | Path, tensorboard: bool, wandb_project: str | None, config: Config):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._path = epath.Path(workdir) / _FILE
        self._file = AppendFile(self._path)
        self._tensorboard = _TensorBoard(self._path.parent / "tensorboard", config) if tensorboard else None
        self._wandb = _start_wandb(self._path.parent, wandb_project, config) if wandb_project else None
        with writing(self._path):
            make_parent(self._path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends the line of `step`. A number that isn't finite becomes null, so that every line is JSON."""
        if not self._active:
            return
        record = {name: to_json(value) for name, value in values.items()}
        line = json.dumps({"step": int(step), **record}, allow_nan=False) + "\n"
        with writing(self._path):
            self._file.write(line.encode())
        scalars = {name: value for name, value in record.items() if isinstance(value, (int, float))}
        if self._tensorboard is not None:
            self._tensorboard.write(step, scalars)
        if self._wandb is not None:
            self._wandb.log(scalars, step=int(step))

    def flush(self) -> None:
        """Waits until all metrics are in the workdir; without it, a bucket may lag by some seconds."""
        if not self._active:
            return
        with writing(self._path):
            self._file.flush()
            if self._tensorboard is not None:
                self._tensorboard.flush()

    def cut_after(self, step: int) -> None:
        """Cuts lines after `step`, and an unfinished last line of a crash; call it after a restore.

        Weights & Biases cannot delete steps: it ignores the repeated ones, which is equivalent for an exact resume.
        """
        if not self._active:
            return
        with writing(self._path):
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.cut_after(step)
        cut_lines(self._path, step)

    def close(self) -> None:
        """Flushes and closes all outputs."""
        if not self._active:
            return
        with writing(self._path):
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def has_metrics(workdir: str | Path) -> bool:
    """Whether the folder has a metrics file."""
    return exists(epath.Path(workdir) / _FILE)


def read_metrics(workdir: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reads the training lines and the evaluation lines of a run, in the order of steps; null becomes None."""
    path = epath.Path(workdir) / _FILE
    lines = read_lines(path) if exists(path) else []
    if not lines:
        raise UserError("no metrics in this folder", str(path), "Give the --workdir of a training run")
    return [line for line in lines if "eval_loss" not in line], [line for line in lines if "eval_loss" in line]


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Reads all lines of a file of JSON objects with a `step`.

    An unfinished last line (a crash, or a running trainer) is skipped. A damaged line is skipped, too, and logged to
    stderr.
    """
    lines, damaged = _split(path)
    for number, text in damaged.items():
        print_line(f"{path}:{number} is skipped: it is not JSON with a step ({_shorten(text)})", sys.stderr)
    return lines


def _split(path: epath.Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """Valid lines of the file, and damaged ones by line number; an unfinished last line is dropped."""
    *complete, last = _read_bytes(path).split(b"\n")
    del last  # Empty or unfinished.
    lines, damaged = [], {}
    for number, text in enumerate(complete, start=1):
        try:
            line = parse_json_object(text)
            as_int(line["step"], 0, 2**63 - 1)
            lines.append(line)
        except (ValueError, KeyError):
            damaged[number] = text
    return lines, damaged


def _read_bytes(path: epath.Path) -> bytes:
    if is_remote(path):
        return read_bytes(path)
    try:
        with open_regular(path) as file:
            return file.read(os.fstat(file.fileno()).st_size)  # A running trainer may append to it.
    except ValueError as error:
        raise UserError("a file of the run is not a regular file", str(path), f"Move it away: {error}") from error


def _shorten(text: bytes) -> str:
    return printable(text[:80].decode(errors="replace"))


def cut_lines(path: epath.Path, step: int) -> None:
    """Removes lines after `step`, and an unfinished last line, from a file of `read_lines`, if it exists.

    Damaged lines are appended to the file `NAME.damaged` in the same folder, and logged.
    """
    if not exists(path):
        return
    lines, damaged = _split(path)
    kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
    aside = path.with_name(f"{path.name}.damaged")
    with writing(path):
        if damaged:
            file = AppendFile(aside)
            file.write(b"".join(text + b"\n" for text in damaged.values()))
            file.close()
        atomic_write(path, kept.encode())
    for number, text in damaged.items():
        print_line(
            f"{path}:{number} is not JSON with a step ({_shorten(text)}); the line was moved to {aside.name}",
            sys.stderr,
        )


class _TensorBoard:
    """TensorBoard event files, opened at the first value, when the step is known from which older values are purged."""

    def __init__(self, folder: epath.Path, config: Config):
        self._folder = folder
        self._config = config
        self._purge_step: int | None = None
        self._writer: Any = None
        self._scratch: tempfile.TemporaryDirectory | None = None  # For a bucket.
        self._upload: Upload | None = None

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._writer is None:
            self._open(step)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        if self._upload is not None:
            self._upload.changed()

    def _open(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        folder = self._folder
        if is_remote(folder):
            self._scratch = tempfile.TemporaryDirectory(prefix="tensorboard-")
            folder = self._scratch.name
        # tensorboardX names files by the second, so without a suffix a quick restart would overwrite the last file.
        suffix = f".{step:09d}.{os.getpid()}"
        self._writer = SummaryWriter(str(folder), purge_step=self._purge_step, filename_suffix=suffix)
        text = config_text(self._config).replace("\n", "\n    ")
        self._writer.add_text("config", f"    {text}", step)  # Indentation marks a code block in Markdown.
        if self._scratch is not None:
            [local] = Path(folder).iterdir()
            self._upload = Upload(local, self._folder / local.name)

    def cut_after(self, step: int) -> None:
        self.close()
        self._purge_step = step + 1

    def flush(self) -> None:
        if self._upload is not None:
            self._upload.flush()

    def close(self) -> None:
        writer, upload, scratch = self._writer, self._upload, self._scratch
        self._writer = self._upload = self._scratch = None
        if writer is not None:
            writer.close()
        if upload is not None:
            upload.changed()
            upload.close()
        if scratch is not None:
            scratch.cleanup()


def _start_wandb(workdir: epath.Path, project: str, config: Config) -> Any:
    """Starts or continues the W&B run of this workdir, whose id is stored in `WORKDIR/wandb_id`."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "config train.wandb_project needs the package wandb, which is not installed",
            project,
            'Leave the key at None, or install it: pip install "aimv2_jax[wandb]"',
        ) from error
    id_file = workdir / "wandb_id"
    run_id = read_bytes(id_file).decode() if exists(id_file) else secrets.token_hex(8)
    with writing(id_file):
        make_parent(id_file)
        atomic_write(id_file, run_id.encode())
    folder = None if is_remote(workdir) else str(workdir)  # W&B's local files.
    return wandb.init(project=project, id=run_id, resume="allow", dir=folder, config=config_to_dict(config))


class Stopwatch:
    """Measures step time and rates without compilation, evaluation and saving.

        with stopwatch.waiting():
            batch = next(batches)
        ...
        stopwatch.count(examples, flops)  # once a step
        with stopwatch.pause():
            evaluate()
        values = stopwatch.lap()       # once an interval

    Args:
      clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._begin()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time inside. A step inside (the first, which compiles) must not be counted."""
        start = self._clock()
        try:
            yield
        finally:
            self._excluded_s += self._clock() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data; not to be used inside `pause`."""
        start = self._clock()
        try:
            yield
        finally:
            self._waiting_s += self._clock() - start

    def count(self, images: int, flops: float) -> None:
        """Records a finished step of `images` examples and `flops` model FLOPs."""
        self._steps += 1
        self._images += images
        self._flops += flops

    def lap(self) -> dict[str, float | None]:
        """`images_per_s, model_tflops_per_s, step_time_s, data_wait_fraction` since the last lap, or None."""
        seconds = self._clock() - self._start_s - self._excluded_s
        steps, images, flops, waiting_s = self._steps, self._images, self._flops, self._waiting_s
        self._begin()
        if not steps or seconds <= 0:
            return dict.fromkeys(("images_per_s", "model_tflops_per_s", "step_time_s", "data_wait_fraction"))
        return {
            "images_per_s": images / seconds,
            "model_tflops_per_s": flops / seconds / 1e12,
            "step_time_s": seconds / steps,
            "data_wait_fraction": waiting_s / seconds,
        }

    def _begin(self) -> None:
        self._start_s = self._clock()
        self._excluded_s = self._waiting_s = 0.0
        self._steps = self._images = 0
        self._flops = 0.0


class ProgressLine:
    """Formats the progress line of a run: step, main metrics and remaining time.

    The remaining time is extrapolated from this process since its first line, evaluation and saving included.

    Args:
      total_steps: the last step of the run.
      clock: monotonic seconds.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic):
        self._total_steps = total_steps
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def text(self, step: int, values: Mapping[str, Any]) -> str:
        """The line of `step`; `values` as in `metrics.jsonl`. Missing values are omitted, null is a dash."""
        total = f"{self._total_steps:,}"
        parts = [f"step {step:>{len(total)},}/{total}"]
        for label, name, spec in _COLUMNS:
            if name in values:
                value = values[name]
                known = value is not None and math.isfinite(value)
                parts.append(f"{label} {format(value, spec) if known else '-':>{_WIDTH[spec]}}")
        remaining_s = self._remaining_s(step, values.get("step_time_s"))
        if remaining_s is not None:
            parts.append(f"{format_duration(remaining_s)} left" if step < self._total_steps else "done")
        return "  ".join(parts)

    def _remaining_s(self, step: int, step_time_s: float | None) -> float | None:
        now_s = self._clock()
        if self._first is None:
            self._first = step, now_s
        first_step, first_s = self._first
        if step > first_step:
            step_time_s = (now_s - first_s) / (step - first_step)
        return None if step_time_s is None else step_time_s * (self._total_steps - step)


# Label, metric and format of each column.
_COLUMNS = (
    ("loss", "loss", ".4f"),
    ("image", "loss_image", ".4f"),
    ("text", "loss_text", ".4f"),
    ("contrastive", "loss_contrastive", ".4f"),
    ("features", "loss_features", ".4f"),
    ("logits", "loss_logits", ".4f"),
    ("pixels", "loss_pixels", ".4f"),
    ("lr", "lr", ".2e"),
    ("grad", "grad_norm", ".3g"),
    ("images/s", "images_per_s", ".1f"),
    ("wait", "data_wait_fraction", ".0%"),
)
_WIDTH = {".4f": 6, ".2e": 8, ".3g": 5, ".1f": 6, ".0%": 3}


def format_duration(seconds: float) -> str:
    """Formats a duration with its two largest units, as `3 h 05 min`."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days} d {hours_left:02d} h"
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {seconds_left:02d} s" if minutes else f"{seconds_left} s"
