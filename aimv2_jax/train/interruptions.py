"""Steps at which a run hung or its devices failed: a second time at the same step, starting it again is no help.

Each time leaves `WORKDIR/hangs/STEP-PROCESS-WHAT.txt`. When a later state than that of the start is saved, those of the
steps up to it are renamed and count no more: two hangs of a start, weeks apart, are not the same hang twice.
"""

from __future__ import annotations

import contextlib
import re

from etils import epath

from aimv2_jax.errors import EXIT_AGAIN, EXIT_HUNG
from aimv2_jax.files import write_whole

FOLDER = "hangs"
_COUNTED = re.compile(r"(\d+)-\d+-\w+\.txt")


class Interruptions:
    """Those of a run, as far as they count.

    Args:
      workdir: of the run.
      process_index: of this process, whose own are recorded.
    """

    def __init__(self, workdir: epath.PathLike, process_index: int):
        self.folder, self._process = epath.Path(workdir) / FOLDER, process_index
        self._steps = {step for step, _ in self._counted()}

    def exit_code(self, step: int) -> int:
        """EXIT_AGAIN the first time at `step`, then EXIT_HUNG."""
        return EXIT_HUNG if step in self._steps else EXIT_AGAIN

    def file(self, step: int, what: str) -> epath.Path:
        """Where an interruption of this process is recorded."""
        return self.folder / f"{step:08d}-{self._process:05d}-{what}.txt"

    def record(self, step: int, what: str, text: bytes) -> None:
        """Records that `what` hung or failed at `step`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.file(step, what), text)

    def retire(self, saved: int) -> None:
        """Counts none up to step `saved` any more, which has been saved since; process 0 renames all processes'."""
        if all(step > saved for step in self._steps):
            return
        self._steps = {step for step in self._steps if step > saved}
        if self._process == 0:
            for step, file in self._counted():
                if step <= saved:
                    # At worst one is counted that should not be; of a bucket, TensorFlow's and fsspec's own kinds.
                    with contextlib.suppress(Exception):
                        file.rename(file.with_name(f"{file.stem}-before-{saved:08d}.txt"))

    def _counted(self) -> list[tuple[int, epath.Path]]:
        try:
            files = list(self.folder.iterdir())
        except Exception:  # There is none; of a bucket, TensorFlow's and fsspec's own kinds.
            return []
        return [(int(found[1]), file) for file in files if (found := _COUNTED.fullmatch(file.name))]
