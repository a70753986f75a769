#!/usr/bin/env bash
# Runs the tests whose outcome another Python or jax can change: numbers, models, step, sharding, checkpoint and resume,
# export, AOT. Usage: PYTHON=python3.11 VENV=.venv-3.11 launch/stack_tests.sh       Arguments go to pytest.
set -euo pipefail
exec bash "$(dirname "$0")/test.sh" -m "not slow" "$@" \
  tests/test_golden.py \
  tests/test_versions.py \
  tests/models \
  tests/aot \
  tests/export
