#!/usr/bin/env bash
# Prints the interpreter to use: $PYTHON if set, otherwise the newest supported Python that runs.
# Each candidate is executed, since a pyenv shim on the path may not work; pyenv's own versions are tried next.
# Usage: launch/find_python.sh [VERSION...]    VERSION: a candidate, such as 3.11 (default: all that setup.py allows)
set -euo pipefail
shopt -s nullglob
supported=(3.13 3.12 3.11)
[ $# -gt 0 ] || set -- "${supported[@]}"
listed=$(printf '%s, ' "${supported[@]}")
listed=${listed%, }

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

if [ -n "${PYTHON:-}" ]; then
  found=$(version "$PYTHON")
  if [[ " ${supported[*]} " != *" ${found:-none} "* ]]; then
    problem="is Python $found"
    [ -n "$found" ] || problem="does not run"
    echo "error: PYTHON=$PYTHON $problem. Name one of Python $listed, or leave PYTHON unset to have one found." >&2
    exit 2
  fi
  if ! has_venv "$PYTHON"; then
    echo "error: PYTHON=$PYTHON has no venv. Install it (Debian: python$found-venv), or name another Python." >&2
    exit 2
  fi
  echo "$PYTHON"
  exit
fi

pyenv=${PYENV_ROOT:-$(pyenv root 2>/dev/null || true)}
for wanted in "$@"; do
  candidates=("python$wanted" python3)
  if [ -n "$pyenv" ]; then # The newest patch first.
    mapfile -t -O 2 candidates < <(printf '%s\n' "$pyenv/versions/$wanted".*/bin/python | sort --version-sort --reverse)
  fi
  for candidate in "${candidates[@]}"; do
    if [ "$(version "$candidate")" = "$wanted" ] && has_venv "$candidate"; then
      echo "$candidate"
      exit
    fi
  done
done
echo "error: no Python ${*} with venv was found. Install one of Python $listed, or set PYTHON=/path/to/python." >&2
exit 2
