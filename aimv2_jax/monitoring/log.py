"""The log of a run: a standard logger whose lines go to stdout, on process 0 only."""

from __future__ import annotations

import logging

import jax

from aimv2_jax.console import print_line


class _Console(logging.Handler):
    """Prints each message as a line, and survives a closed terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        if jax.process_index() == 0:
            print_line(record.getMessage())


logger = logging.getLogger("aimv2_jax.train")
logger.setLevel(logging.INFO)
logger.propagate = False  # Handlers of the root logger, such as absl's, would print each line again.
logger.addHandler(_Console())
