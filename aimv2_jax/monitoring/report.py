"""Report of a run: its restarts and their cost, its time by class, and notable events.

    python -m aimv2_jax.monitoring.report WORKDIR [--output FILE.html]

Prints the report and writes an HTML page with the curves, the events marked in them, and the newest images and results
in the workdir: WORKDIR/report.html, unless --output names another file. The page needs no network and no other file.
A running trainer is not disturbed.

productive  steps that the current state depends on; their share of all time is the goodput
lost        steps that were done again, after a restart or a rewind
start-up    from the start of a process to its first step: imports, restoring, compilation
data        waiting for batches
evaluation  measuring held-out losses
saving      steps blocked on saves
down        from the last event of a start to the next start
other       everything else, such as a hang
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from aimv2_jax.cli import Parser, check_output
from aimv2_jax.errors import EXIT_FINISHED, cli_main
from aimv2_jax.monitoring.report_facts import gather
from aimv2_jax.monitoring.report_text import summary
from aimv2_jax.storage.files import atomic_write, is_remote

_PAGE = "report.html"


@cli_main
def main(arguments: Sequence[str] | None = None) -> int:
    text, _, epilog = __doc__.partition("\n\n")
    parser = Parser(prog="python -m aimv2_jax.monitoring.report", description=text, epilog=epilog)
    parser.add_argument("workdir", metavar="WORKDIR", help="folder of a training run, or gs://BUCKET/...")
    parser.add_argument("--output", metavar="FILE.html", help=f"HTML page to write (default: WORKDIR/{_PAGE})")
    flags = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if flags.output is not None and not is_remote(flags.output):
        check_output(Path(flags.output), ".html")
    facts = gather(flags.workdir)
    print(summary(facts))
    from aimv2_jax.monitoring.report_page import render_page

    output = flags.output or epath.Path(flags.workdir) / _PAGE
    atomic_write(output, render_page(facts).encode())
    print(f"\n{output}")
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
