"""Counters of examples, bad records, truncated captions and retried reads by source, summed over all hosts.

S sources, R reasons, C = R + 3 counts (examples, reasons, truncated captions, retried reads), B batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int

from aimv2_jax.errors import TrainingAborted
from aimv2_jax.monitoring.metrics import cut_lines
from aimv2_jax.storage.append import AppendFile, writing

# A missing caption type is no damage: many datasets have synthetic captions for some images only.
_HARMLESS = ("missing_caption",)
_MIN_EXAMPLES = 1000  # Minimum denominator of the bad fraction, so that one early bad record does not stop a run.


class ExampleCounter:
    """On-device counters over the rows of the global batch, so that every host reads the same sums.

    Args:
      sources: names, in the order of the batch's `source` indices.
      reasons: reasons for bad records, in the order of the batch's `faults` columns.
      sharding: of the counts: replicated on every device.
    """

    def __init__(self, sources: Sequence[str], reasons: Sequence[str], sharding: NamedSharding):
        self._sources = list(sources)
        self._reasons = list(reasons)
        self._lap = np.zeros((len(sources), len(reasons) + 3), np.int32)
        self._seen = self._lap.astype(np.int64)
        # Computed: `device_put` compares the values of all processes, a collective that waits 30 s for a slow process.
        self._counts = jax.jit(partial(jnp.zeros, self._lap.shape, jnp.int32), out_shardings=sharding)()
        self._add = jax.jit(partial(_add, num_sources=len(sources)), out_shardings=sharding)

    def add(
        self,
        source: Int[Array, " B"],
        faults: Int[Array, "B R"],
        truncated: Bool[Array, " B"],
        read_retries: Int[Array, " B"],
    ) -> Int[Array, "S C"]:
        """Counts a batch asynchronously; returns the counts up to this batch, for `lap`."""
        self._counts = self._add(self._counts, source, faults, truncated, read_retries)
        return self._counts

    def forget(self) -> None:
        """Discards the counts since the last lap, for steps that a rewind rolls back."""
        self._lap = np.asarray(jax.device_get(self._counts))

    def lap(self, counts: Int[Array, "S C"]) -> dict[str, int | float]:
        """Metrics of the examples between the last lap's `counts` and these.

        `images/SOURCE`; `truncated_captions/SOURCE`, the share of images whose caption exceeds the text length; if
        there were any, `bad/SOURCE/REASON`, and `data_read_retries`, the reads of all sources that were retried.
        """
        current = np.asarray(jax.device_get(counts))
        counts = current - self._lap  # Correct even if int32 has wrapped over a long run.
        self._lap = current
        self._seen += counts
        values = {f"images/{name}": int(row[0]) for name, row in zip(self._sources, counts)}
        for name, row in zip(self._sources, counts):
            values |= {f"bad/{name}/{why}": int(n) for why, n in zip(self._reasons, row[1:-2]) if n}
            if row[0]:
                values[f"truncated_captions/{name}"] = float(row[-2] / row[0])
        if retries := int(counts[:, -1].sum()):
            values["data_read_retries"] = retries
        return values

    def check(self, max_bad_fraction: float) -> None:
        """Raises TrainingAborted if too many of the records read so far could not be used."""
        images = int(self._seen[:, 0].sum())
        harmful = [1 + i for i, reason in enumerate(self._reasons) if reason not in _HARMLESS]
        bad = int(self._seen[:, harmful].sum())
        if bad > max_bad_fraction * max(images, _MIN_EXAMPLES):
            raise TrainingAborted(
                f"{bad} of {images + bad} records read by this run could not be used, more than "
                f"data.max_bad_fraction={max_bad_fraction} allows; their keys are in bad_records.jsonl in the workdir"
            )


def _add(counts, source, faults, truncated, read_retries, *, num_sources: int):
    columns = jnp.ones_like(source)[:, None], faults, truncated.astype(faults.dtype)[:, None], read_retries[:, None]
    rows = jnp.concatenate(columns, axis=1)
    return counts + jax.ops.segment_sum(rows, source, num_segments=num_sources)


class BadRecordFile:
    """`WORKDIR/bad_records.jsonl`: every record that could not be used, with the step that read it.

    Each process writes its own records; process 1 and above have their index in the file name.
    """

    def __init__(self, workdir: epath.PathLike, process: int):
        self._path = epath.Path(workdir) / ("bad_records.jsonl" if process == 0 else f"bad_records.{process}.jsonl")
        self._file = AppendFile(self._path)

    def cut_after(self, step: int) -> None:
        """Cuts lines of steps after `step`, which will be written again."""
        self._file.close()
        cut_lines(self._path, step)

    def write(self, step: int, faults: Sequence[Any]) -> None:
        """Appends the bad examples (dataclasses of data.loading) of the batch of `step`."""
        lines = [json.dumps({"step": step, **vars(fault)}) + "\n" for fault in faults]
        if lines:
            with writing(self._path):
                self._file.write("".join(lines).encode())

    def flush(self) -> None:
        """Waits until all lines are in the workdir, which may be in a bucket."""
        with writing(self._path):
            self._file.flush()

    def __enter__(self) -> BadRecordFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
