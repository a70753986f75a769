# shellcheck shell=bash
# Sourced by the other scripts: makes an environment at the root of the checkout and installs the package with extras.
# Usage: EXTRAS=test . launch/environment.sh       PYTHON=... chooses the interpreter, VENV=... the folder (.venv).

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
venv=${VENV:-.venv}
base=$(bash launch/find_python.sh) || exit 2

# One stamp says that the environment is whole and of which Python, another what is installed in it.
digest() { "$base" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])'; }
made="$venv/made-$("$base" -c 'import os, sys; print(os.path.realpath(sys.executable), sys.version)' | digest)"
installed="$venv/installed-$( (cat setup.py; echo "${EXTRAS:-}") | digest)"
if [ ! -f "$made" ]; then
  if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && ! compgen -G "$venv/made-*" >/dev/null; then
    echo "error: $venv is there and was not made by launch/environment.sh. Delete it, or name another folder by VENV." >&2
    exit 2
  fi
  rm -rf "$venv"
  mkdir -p "$venv"
  touch "$venv/made-unfinished" # Whatever interrupts this, the folder is known as ours.
  "$base" -m venv "$venv"
  mv "$venv/made-unfinished" "$made"
fi
if [ ! -f "$installed" ]; then
  echo "installing into $venv/ with $("$base" -V) ..."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${EXTRAS:+[$EXTRAS]}"
  touch "$installed"
fi
