#!/usr/bin/env bash
# Runs the tests that launch/test.sh skips: stress tests, long drills, large compiles. Arguments go to pytest.
set -euo pipefail
exec bash "$(dirname "$0")/test.sh" -m slow "$@"
