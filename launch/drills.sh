#!/usr/bin/env bash
# Breaks small runs in every way that is known, in the long form (half an hour on two CPU cores), and prints what came of it.
# Usage: launch/drills.sh [OUTPUT]    OUTPUT: a folder for what the drills print and their JSON (runs/drills)
set -euo pipefail
output=${1:-$(dirname "$0")/../runs/drills}
mkdir -p "$output"
output=$(cd "$output" && pwd)
. "$(dirname "$0")/environment.sh"

drill() { # NAME FLAGS...
  local name=$1
  shift
  echo "--- $name $*"
  "$venv/bin/python" "experiments/drills/$name.py" "$@" --json "$output/$name.json" 2>&1 | tee "$output/$name.log" | tail -n 20
}
drill kill --kills 200
drill corrupt --injections 200
drill goodput
drill hang --long
