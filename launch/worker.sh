#!/usr/bin/env bash
# Commands on one host of a TPU VM; launch/tpu_vm.sh calls it on every worker, in the copied checkout.
# Usage: bash launch/worker.sh COMMAND, one of: install, mount BUCKET ..., start GENERATION SLICES [ARGUMENTS of
#   aimv2_jax.main], follow, over, code, stop
set -euo pipefail
cd "$(dirname "$0")/.."
run=../aimv2_jax_run # Log, process ID and exit code, outside the checkout, which the next copy replaces.

pid() { cat "$run/pid" 2>/dev/null || echo none; }
running() { grep -qsz worker.sh "/proc/$(pid)/cmdline"; } # After a reboot the PID may belong to another program.

case "${1:-}" in
install)
  if ! command -v python3.11 python3.12 python3.13 >/dev/null; then # The images of TPU VMs have Python 3.10.
    sudo apt-get update -qq
    sudo apt-get install -qq -y python3.11 python3.11-venv
  fi
  EXTRAS=tpu
  . launch/environment.sh
  ;;
mount) # Mounts buckets read-only at /mnt/BUCKET.
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
    curl -fsSL "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  for bucket in "${@:2}"; do
    folder=/mnt/$bucket
    if ! mountpoint -q "$folder"; then
      sudo install -d -o "$(id -u)" "$folder"
      # Objects in use never change, so that what gcsfuse knows of them does not expire.
      gcsfuse -o ro --implicit-dirs --metadata-cache-ttl-secs=-1 "$bucket" "$folder"
    fi
  done
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
  setsid nohup bash launch/worker.sh watch "$@" >>"$run/log" 2>&1 </dev/null & # Survives the connection.
  echo $! >"$run/pid"
  ;;
watch) # Runs the training, forwards SIGTERM to it, and writes its exit code atomically.
  "${PYTHON:-${VENV:-.venv}/bin/python}" -m aimv2_jax.main "${@:2}" &
  child=$!
  trap 'kill -TERM "$child"' TERM
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # The signal interrupted the wait.
    code=0
    wait "$child" || code=$?
  done
  echo "$code" >"$run/code.part"
  mv "$run/code.part" "$run/code"
  ;;
follow) # Prints the log until the run is over.
  tail -n 20 -F -s 0.2 --pid="$(pid)" "$run/log"
  ;;
over) # Waits until the run is over on this host; all hosts end within seconds.
  for ((waited_s = 0; waited_s < ${OVER_S:-600}; waited_s++)); do
    running || exit 0
    sleep 1
  done
  echo "error: the run continues on this host (process $(pid)), but ended on process 0." >&2
  exit 1
  ;;
code) # Prints the exit code; "running", or "lost" if the run ended without one, as in a host crash.
  if running; then
    echo running
  else
    cat "$run/code" 2>/dev/null || echo lost
  fi
  ;;
stop) # Sends SIGTERM; the run saves and exits with 75.
  if running; then
    kill -TERM "$(pid)"
  fi
  ;;
*)
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
  ;;
esac
