# shellcheck shell=bash
# Sourced by the other scripts: makes a virtual environment at the root of the checkout and installs the package.
# Usage: EXTRAS=test . launch/environment.sh       PYTHON=... sets the interpreter, VENV=... the folder (default .venv).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
venv=${VENV:-.venv}
base=$(bash launch/find_python.sh) || exit 2

# One stamp file marks a complete environment and its Python, another the installed requirements.
digest() { "$base" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])'; }
made="$venv/made-$("$base" -c 'import os, sys; print(os.path.realpath(sys.executable), sys.version)' | digest)"
installed="$venv/installed-$( (cat setup.py; echo "${EXTRAS:-}") | digest)"
if [ ! -f "$made" ]; then
  if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && ! compgen -G "$venv/made-*" >/dev/null; then
    echo "error: $venv exists and was not made by launch/environment.sh. Delete it, or set VENV to another folder." >&2
    exit 2
  fi
  rm -rf "$venv"
  mkdir -p "$venv"
  touch "$venv/made-unfinished" # Marks the folder as made by this script, even if it is interrupted.
  "$base" -m venv "$venv"
  mv "$venv/made-unfinished" "$made"
fi
if [ ! -f "$installed" ]; then
  echo "installing into $venv/ with $("$base" -V) ..."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${EXTRAS:+[$EXTRAS]}"
  touch "$installed"
fi
