#!/usr/bin/env bash
# Makes what it needs and runs all tests; arguments go to pytest (-m "not slow", --golden DIR, ...).
set -euo pipefail
EXTRAS=test
. "$(dirname "$0")/environment.sh"

if [ $# -eq 0 ]; then # The whole suite, so the style, too.
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
fi
exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadgroup "$@"
