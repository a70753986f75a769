# Sourced by the other scripts: makes `.venv/` at the root of the checkout and installs the package with extras.
# Usage: EXTRAS=test . launch/environment.sh       PYTHON=... chooses the interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  candidates=(python3.11 python3.12 python3.13 python3)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

python=$(find_python)
if [ -z "$python" ]; then
  echo "error: no Python 3.11, 3.12 or 3.13 with venv found${PYTHON:+ (PYTHON=$PYTHON)}. Install one, or set PYTHON=/path/to/python." >&2
  exit 2
fi

# One stamp says that the environment is whole and of which Python, another what is installed in it.
digest() { "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])'; }
made=".venv/made-$("$python" -c 'import sys; print(sys.executable, sys.version)' | digest)"
installed=".venv/installed-$( (cat setup.py; echo "${EXTRAS:-}") | digest)"
if [ ! -f "$made" ]; then
  "$python" -m venv --clear .venv
  touch "$made"
fi
if [ ! -f "$installed" ]; then
  echo "installing into .venv/ ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${EXTRAS:+[$EXTRAS]}"
  touch "$installed"
fi
