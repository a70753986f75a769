"""A watcher with a trainer that needs no jax: `python tests/watcher.py INDEX COUNT PORT WORKDIR TIMEOUT_S CODE`.

CODE is what the trainer does in the place of training, after `index = …`; it may set `code`, its exit code.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAINER = """
import sys, time
sys.path.insert(0, {root!r})
from aimv2_jax.errors import GuardStop, StorageError, UserError
from aimv2_jax.parallel import processes
processes.join = lambda place, settings: None
processes.leave = lambda: None
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
    from aimv2_jax.config import ProcessesConfig
    from aimv2_jax.growing import GrowingFile
    from aimv2_jax.parallel import supervisor
    from aimv2_jax.parallel.clusters import Place
    from aimv2_jax.parallel.roll_call import call_roll

    supervisor._UNWIND_S = 2.0
    place = Place(f"127.0.0.1:{port}", count, index)
    team = call_roll(place, f"host-{index}", {"config": "test"}, 20)
    log = GrowingFile(supervisor.log_file(workdir, index))
    settings = ProcessesConfig(20, int(timeout_s), 20)
    program = TRAINER.format(root=str(ROOT), index=index, code=textwrap.indent(code, "    "))
    return supervisor.Watcher(place, team, settings, log, workdir).run([sys.executable, "-c", program])


if __name__ == "__main__":
    sys.exit(main())
