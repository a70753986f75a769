#!/usr/bin/env bash
# Runs all fault-injection drills in the long form (half an hour on two CPU cores) and prints their results.
# Usage: launch/drills.sh [OUTPUT]    OUTPUT: a folder for the drills' logs and JSON (default runs/drills)
set -euo pipefail
output=${1:-$(dirname "$0")/../runs/drills}
mkdir -p "$output"
output=$(cd "$output" && pwd)
. "$(dirname "$0")/environment.sh"

drill() { # NAME FLAGS...
  local name=$1
  shift
  echo "--- $name $*"
  "$venv/bin/python" "tests/stress/$name.py" "$@" --json "$output/$name.json" 2>&1 | tee "$output/$name.log" | tail -n 20
}
drill kill --kills 200
drill corrupt --injections 200
drill goodput
drill hang --long
drill bucket --kills 10 --processes 2
