#!/usr/bin/env bash
# What one host of a TPU VM does; launch/tpu_vm.sh calls it on every worker, in the checkout that it copied there.
# Usage: bash launch/worker.sh install | start GENERATION SLICES [ARGUMENTS of aimv2_jax.main] | follow | over | code | stop
set -euo pipefail
cd "$(dirname "$0")/.."
run=../aimv2_jax_run # Its log, process and exit code; outside of the checkout, which the next copy replaces.

pid() { cat "$run/pid" 2>/dev/null || echo none; }
running() { grep -qsz worker.sh "/proc/$(pid)/cmdline"; } # After a reboot the number may be another program's.

case "${1:-}" in
install)
  if ! command -v python3.11 python3.12 python3.13 >/dev/null; then # The images of TPU VMs bring Python 3.10.
    sudo apt-get update -qq
    sudo apt-get install -qq -y python3.11 python3.11-venv
  fi
  EXTRAS=tpu
  . launch/environment.sh
  ;;
start)
  if running; then
    echo "error: a run is going on here (process $(pid)). Stop it first." >&2
    exit 2
  fi
  LIBTPU_INIT_ARGS="$(bash launch/xla_flags.sh "$2" "$3") ${LIBTPU_INIT_ARGS:-}"
  export LIBTPU_INIT_ARGS
  shift 3
  mkdir -p "$run"
  rm -f "$run/code"
  setsid nohup bash launch/worker.sh watch "$@" >>"$run/log" 2>&1 </dev/null & # Outlives this connection.
  echo $! >"$run/pid"
  ;;
watch) # Runs the training, hands SIGTERM on to it, and leaves its exit code, which appears whole.
  "${PYTHON:-${VENV:-.venv}/bin/python}" -m aimv2_jax.main "${@:2}" &
  child=$!
  trap 'kill -TERM "$child"' TERM
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # It was the signal that ended the wait.
    code=0
    wait "$child" || code=$?
  done
  echo "$code" >"$run/code.part"
  mv "$run/code.part" "$run/code"
  ;;
follow) # The log until the run is over.
  tail -n 20 -F -s 0.2 --pid="$(pid)" "$run/log"
  ;;
over) # Waits for the end of the run, which comes to all hosts within seconds.
  for ((waited_s = 0; waited_s < ${OVER_S:-600}; waited_s++)); do
    running || exit 0
    sleep 1
  done
  echo "error: the run goes on here, though it ended elsewhere (process $(pid))." >&2
  exit 1
  ;;
code) # Of the run that is over; "running", or "lost" where it ended without a word, as on a host that crashed.
  if running; then
    echo running
  else
    cat "$run/code" 2>/dev/null || echo lost
  fi
  ;;
stop) # It saves and exits with 75.
  if running; then
    kill -TERM "$(pid)"
  fi
  ;;
*)
  sed -n '2,3s/^# //p' "$0" >&2
  exit 2
  ;;
esac
