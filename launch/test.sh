#!/usr/bin/env bash
# Makes what it needs and runs all tests; arguments go to pytest (-m "not slow", --golden DIR, ...).
set -euo pipefail
EXTRAS=test
. "$(dirname "$0")/environment.sh"

.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadgroup "$@"
