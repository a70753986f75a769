"""Background hashing of committed steps: each process hashes the files that it wrote, process 0 writes all hashes.

A step counts before it is hashed, so nothing waits for this. What is not hashed when a process ends, the next start of
the run hashes.
"""

from __future__ import annotations

import concurrent.futures
import re
import sys
import threading
import time
from typing import Any

import jax
from etils import epath

from aimv2_jax.checkpoint import layout, metadata
from aimv2_jax.checkpoint import manifest as manifests
from aimv2_jax.checkpoint.error_text import reason_of
from aimv2_jax.checkpoint.manifest import Manifest
from aimv2_jax.checkpoint.metadata import DamagedStep
from aimv2_jax.console import print_line
from aimv2_jax.distributed import coordination

_POLL_S = 0.2
_VISIBLE_WITHIN_S = 90.0  # Until other hosts see a renamed folder; NFS caches names for up to 60 s.
_WRITTEN_BY_PROCESS = re.compile(r"state/ocdbt\.process_(\d+)/")  # Folders of Orbax.


class _Stopped(Exception):
    """Hashing was stopped."""


class StepHasher:
    """Hashes steps one after another in a thread; every process creates one and adds the same steps.

    Attributes:
      lock: held while hashes are written, and by whoever deletes a step, sets it aside, or sweeps.
    """

    def __init__(self, folder: epath.Path):
        self.lock = threading.Lock()
        self._folder = folder
        self._stopped = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hashes")

    def add(self, step: int, name: str) -> None:
        """Hashes `step` later. `name` was never used before, and is the same on all processes."""
        self._pool.submit(self._hash, step, name)

    def stop(self) -> None:
        """Hashes nothing more, so that `close` does not wait."""
        self._stopped.set()

    def close(self) -> None:
        """Waits until all steps are hashed, unless `stop` was called."""
        self._pool.shutdown(cancel_futures=self._stopped.is_set())

    def _hash(self, step: int, name: str) -> None:
        try:
            manifest, hashes, reason = *self._hash_own(step, name), None
        except _Stopped:
            return
        # A DamagedStep is reported by whoever restores it.
        except (OSError, ValueError, DamagedStep) as error:
            manifest, hashes, reason = None, None, reason_of(error)
        coordination.publish(name, {"hashes": hashes, "reason": reason})
        if jax.process_index() == 0 and (hashes is not None or reason is not None):
            reason = self._write(step, name, manifest, {"hashes": hashes, "reason": reason})
            if reason is not None and not self._stopped.is_set():
                print_line(
                    f"the checkpoint of step {step} is saved and not hashed ({reason}); the next start hashes it",
                    sys.stderr,
                )

    def _hash_own(self, step: int, name: str) -> tuple[Manifest | None, dict[str, str] | None]:
        """The manifest of a step and the hashes of the files that this process wrote; None if the step was deleted."""
        manifest = self._read_manifest(step, name)
        if manifest is None:
            return None, None
        own = {file: size for file, size in manifest.sizes.items() if _owner(file) == jax.process_index()}
        try:
            return manifest, manifests.hash_files(layout.step_path(self._folder, step), own, self._check)
        except FileNotFoundError:
            if step in layout.committed_steps(self._folder):
                raise
            return None, None

    def _check(self, num_bytes: int = 0) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def _read_manifest(self, step: int, name: str) -> Manifest | None:
        end_s = time.monotonic() + _VISIBLE_WITHIN_S
        while True:
            self._check()
            manifest = metadata.read_manifest(self._folder, step)
            if manifest is not None or jax.process_index() == 0 or time.monotonic() > end_s:
                return manifest
            if 0 in coordination.published(name):  # Process 0 has looked for it, too.
                return None
            time.sleep(_POLL_S)

    def _write(self, step: int, name: str, manifest: Manifest | None, own: dict[str, Any]) -> str | None:
        """Waits for the hashes of all processes and writes them; returns the reason of a failure."""
        results = {0: own} if jax.process_count() == 1 else {}
        while len(results) < jax.process_count() and not self._stopped.wait(_POLL_S):
            results = coordination.published(name)
        coordination.unpublish(name)
        reasons = [result["reason"] for result in results.values() if result["reason"] is not None]
        if reasons:
            return reasons[0]
        files = {file: sha256 for result in results.values() for file, sha256 in (result["hashes"] or {}).items()}
        try:
            with self.lock:
                exists = step in layout.committed_steps(self._folder)
                if exists and metadata.read_manifest(self._folder, step) == manifest:
                    if files.keys() != manifest.sizes.keys():
                        return "another process does not see all files"
                    layout.commit_hashes(self._folder, step, manifests.make_hashes(manifest, files))
        except (OSError, DamagedStep) as error:
            return reason_of(error)
        return None


def _owner(file: str) -> int:
    """The process that hashes a file: the one that wrote it, if it is known; a later start may have fewer."""
    match = _WRITTEN_BY_PROCESS.match(file)
    return int(match[1]) % jax.process_count() if match else 0
