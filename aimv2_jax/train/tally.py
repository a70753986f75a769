"""Examples, bad records and truncated captions by source, summed over all hosts.

S sources, R reasons, C = R + 2 counts (examples, reasons, truncated captions), B batch.
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

from aimv2_jax.errors import GuardStop
from aimv2_jax.growing import GrowingFile, writing
from aimv2_jax.train.metrics import cut_lines

# A record without the asked caption kind is no damage: many sets have synthetic captions for some pictures only.
_HARMLESS = ("missing_caption",)
_LEAST_EXAMPLES = 1000  # The share of bad records is taken of at least so many: one early one is no verdict.


class Tally:
    """Counts on the devices, from the rows of the global batch, so that every host reads the same sums.

    Args:
      sources: their names, in the order of the batch's `source` numbers.
      reasons: what can be wrong with a record, in the order of the batch's `faults`.
      sharding: where the counts lie: whole on every device.
    """

    def __init__(self, sources: Sequence[str], reasons: Sequence[str], sharding: NamedSharding):
        self._sources, self._reasons = list(sources), list(reasons)
        self._lap = np.zeros((len(sources), len(reasons) + 2), np.int32)
        self._seen = self._lap.astype(np.int64)
        self._counts = jax.device_put(self._lap, sharding)
        self._add = jax.jit(partial(_add, num_sources=len(sources)), out_shardings=sharding)

    def add(
        self, source: Int[Array, " B"], faults: Int[Array, "B R"], truncated: Bool[Array, " B"]
    ) -> Int[Array, "S C"]:
        """Counts a batch and waits for nothing; the counts up to this batch, for `lap`."""
        self._counts = self._add(self._counts, source, faults, truncated)
        return self._counts

    def forget(self) -> None:
        """Leaves out what was counted since the last lap, by steps that the run goes back behind."""
        self._lap = np.asarray(jax.device_get(self._counts))

    def lap(self, counts: Int[Array, "S C"]) -> dict[str, int | float]:
        """What came between the last lap's `counts` and these.

        `images/SOURCE`; `truncated_captions/SOURCE`, the share of them whose caption has more tokens than fit; and
        where there were any, `bad/SOURCE/REASON`.
        """
        now = np.asarray(jax.device_get(counts))
        counts, self._lap = now - self._lap, now  # int32 may wrap over a long run; the difference is right all the same
        self._seen += counts
        values = {f"images/{name}": int(row[0]) for name, row in zip(self._sources, counts)}
        for name, row in zip(self._sources, counts):
            values |= {f"bad/{name}/{why}": int(n) for why, n in zip(self._reasons, row[1:-1]) if n}
            if row[0]:
                values[f"truncated_captions/{name}"] = float(row[-1] / row[0])
        return values

    def check(self, max_bad_fraction: float) -> None:
        """Raises GuardStop where too many of the records that were read so far could not be used."""
        images = int(self._seen[:, 0].sum())
        harmful = [1 + i for i, reason in enumerate(self._reasons) if reason not in _HARMLESS]
        bad = int(self._seen[:, harmful].sum())
        if bad > max_bad_fraction * max(images, _LEAST_EXAMPLES):
            raise GuardStop(
                f"{bad} of {images + bad} records read by this run could not be used, more than "
                f"data.max_bad_fraction={max_bad_fraction} allows; their keys are in bad_records.jsonl in the workdir"
            )


def _add(counts, source, faults, truncated, *, num_sources: int):
    columns = jnp.ones_like(source)[:, None], faults, truncated.astype(faults.dtype)[:, None]
    rows = jnp.concatenate(columns, axis=1)
    return counts + jax.ops.segment_sum(rows, source, num_segments=num_sources)


class BadRecordFile:
    """`WORKDIR/bad_records.jsonl`: every record that was met and could not be used, with the step that met it.

    Each process writes what it read itself; from the second on the file's name carries the process' number.
    """

    def __init__(self, workdir: epath.PathLike, process: int, last_step: int):
        """Opens the file; lines of steps beyond `last_step`, which will come again, are cut."""
        self._path = epath.Path(workdir) / ("bad_records.jsonl" if process == 0 else f"bad_records.{process}.jsonl")
        cut_lines(self._path, last_step)
        self._file = GrowingFile(self._path)

    def write(self, step: int, faults: Sequence[Any]) -> None:
        """Appends the faults (dataclasses of data.pipeline) of the batch that made `step`."""
        lines = [json.dumps({"step": step, **vars(fault)}) + "\n" for fault in faults]
        if lines:
            with writing(self._path):
                self._file.write("".join(lines).encode())

    def flush(self) -> None:
        """Returns when all of it is in the workdir, which may be in a bucket."""
        with writing(self._path):
            self._file.flush()

    def __enter__(self) -> BadRecordFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
