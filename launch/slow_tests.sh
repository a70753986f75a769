#!/usr/bin/env bash
# Runs the tests that launch/test.sh leaves out: stress, drills at length, big compiles. Arguments go to pytest.
set -euo pipefail
exec bash "$(dirname "$0")/test.sh" -m slow "$@"
