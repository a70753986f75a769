"""Runs a supervisor without jax: `python tests/helpers/watcher.py INDEX COUNT PORT WORKDIR TIMEOUT_S CODE`.

The trainer runs CODE in place of training, after `index = …`; CODE may set `code`, the trainer's exit code.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINER = """
import sys, time
sys.path.insert(0, {root!r})
from aimv2_jax.errors import TrainingAborted, StorageError, UserError
from aimv2_jax.distributed import coordination as processes
processes.initialize = lambda process, settings: None
processes.shutdown = lambda: None
index, trainer = {index}, processes.trainer()

def work():
    code = 0
{code}
    return code

sys.exit(trainer.run(work, None))
"""


def main() -> int:
    index, count = int(sys.argv[1]), int(sys.argv[2])
    port, workdir, timeout_s, code = sys.argv[3:7]
    sys.path.insert(0, str(ROOT))
    from aimv2_jax.config.schema import ProcessesConfig
    from aimv2_jax.distributed import supervisor
    from aimv2_jax.distributed.cluster import ProcessInfo
    from aimv2_jax.distributed.rendezvous import rendezvous
    from aimv2_jax.storage.append import AppendFile

    supervisor._UNWIND_S = 2.0
    process = ProcessInfo(f"127.0.0.1:{port}", count, index)
    group = rendezvous(process, f"host-{index}", {"config": "test"}, 20)
    log = AppendFile(supervisor.log_file(workdir, index))
    settings = ProcessesConfig(20, int(timeout_s), 20)
    program = TRAINER.format(root=str(ROOT), index=index, code=textwrap.indent(code, "    "))
    return supervisor.Supervisor(process, group, settings, log, workdir).run([sys.executable, "-c", program])


if __name__ == "__main__":
    sys.exit(main())
