# Sourced by the other scripts: makes `.venv/` at the root of the checkout and installs the package with extras.
# Usage: EXTRAS=test . launch/environment.sh       PYTHON=... chooses the interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
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

# The stamp says what is installed; it changes with the requirements, the extras and the interpreter.
stamp=".venv/installed-$( (cat setup.py; echo "${EXTRAS:-}"; "$python" --version) | sha256sum | cut -c1-16)"
if [ ! -f "$stamp" ]; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "installing into .venv/ ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${EXTRAS:+[$EXTRAS]}"
  touch "$stamp"
fi
