#!/usr/bin/env bash
# Makes the environment and runs the style checks and all tests except the slow ones (launch/slow_tests.sh).
# Arguments, if any, go to pytest instead: a path, -k NAME, --golden DIR, ...
set -euo pipefail
EXTRAS="test"
. "$(dirname "$0")/environment.sh"

if [ $# -eq 0 ]; then
  "$venv/bin/ruff" check .
  "$venv/bin/ruff" format --check .
  set -- -m "not slow"
fi
exec "$venv/bin/python" -m pytest --numprocesses=2 --dist=loadgroup --no-loadscope-reorder "$@"
