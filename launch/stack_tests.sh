#!/usr/bin/env bash
# Runs the tests that depend on the versions of Python and jax: numerics, models, step, sharding, checkpoint and resume,
# export, AOT. Arguments go to pytest.
# Usage: PYTHON=python3.11 VENV=.venv-3.11 launch/stack_tests.sh
set -euo pipefail
exec bash "$(dirname "$0")/test.sh" -m "not slow" "$@" \
  tests/test_golden.py \
  tests/test_versions.py \
  tests/launch/test_environment.py \
  tests/models \
  tests/train/test_task.py \
  tests/train/test_optimizer.py \
  tests/train/test_sharding.py \
  tests/checkpoint/test_checkpointer.py \
  tests/end_to_end/test_loop.py \
  tests/end_to_end/test_tiers.py \
  tests/export \
  tests/aot
