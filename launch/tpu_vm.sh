#!/usr/bin/env bash
# Manages a run on Cloud TPU VMs, one slice or several, from creation to deletion. Uses gcloud.
#
#   bash launch/tpu_vm.sh COMMAND --name NAME --zone ZONE [FLAGS] [-- ARGUMENTS of aimv2_jax.main]
#
# Commands:
#   run      create, copy, start and follow; creates the TPU again after a preemption, restarts the run on exit code 75,
#            and up to five times in a row if it was killed (134, 137, 139, or a host crash)
#   create   requests the TPU (a queued resource) and waits until it is active
#   copy     copies the files that git tracks to every host, and makes the environment there
#   start    starts `python -m aimv2_jax.main ARGUMENTS` on every host
#   follow   shows the log of process 0 until the run is over; exits with the run's code
#   stop     SIGTERM to every host: the run saves and exits with 75
#   delete   deletes the TPU and the disks of its hosts
# Flags:
#   --type TYPE        v5litepod-256 (the default), v5p-512, v6e-256, ...
#   --runtime VERSION  the hosts' image (default: the one for TYPE)
#   --slices N         number of slices of TYPE (default 1)
#   --spot             cheaper, but preemptible at any time; --reserved: from your reservation
#   --project PROJECT  (default: gcloud's)
#   --flag FLAG        a flag for gcloud's create, as in --flag --service-account=...; may be repeated
#   --mount BUCKET     mounts gs://BUCKET read-only at /mnt/BUCKET on every host (gcsfuse), for what must be a path,
#                      such as tokenizer.path; may be repeated. Data and workdir need no mount: give gs:// URLs
#   --dry-run          prints the commands without running them
# For pods, first run `ssh-add ~/.ssh/google_compute_engine`, since gcloud connects to many hosts at a time.
# The hosts read and write buckets as the TPU's service account (default: Compute Engine's); README, "Buckets", names
# its roles. Its scope is all of Google Cloud, if no --flag --scopes=... narrows it.
set -euo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; }
fail() {
  echo "error: $1" >&2
  exit 2
}

case "${1:-}" in
run | create | copy | start | follow | stop | delete) command=$1 ;;
-h | --help) usage && exit 0 ;;
*) fail "no such command: '${1:-}'. See --help." ;;
esac
shift
name='' zone='' project='' type=v5litepod-256 runtime='' slices=1 dry=false
create_flags=() mounts=()
while [ $# -gt 0 ]; do
  case "$1" in
  --name | --zone | --project | --type | --runtime | --slices | --flag | --mount)
    [ $# -ge 2 ] || fail "$1 needs a value."
    case "$1" in
    --flag) create_flags+=("$2") ;;
    --mount) mounts+=("$2") ;;
    *) printf -v "${1#--}" %s "$2" ;;
    esac
    shift 2
    ;;
  --spot | --reserved) create_flags+=("$1") && shift ;;
  --dry-run) dry=true && shift ;;
  --) shift && break ;;
  *) fail "no such flag: '$1'. See --help." ;;
  esac
done
[ -n "$name" ] || fail "--name is missing: the name of the TPU."
[ -n "$zone" ] || fail "--zone is missing, such as us-west4-a."
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  fail "--name is not valid in Google Cloud: '$name'. Give small letters, digits and hyphens, a letter first."
for flag in zone project runtime; do
  [[ "${!flag}" =~ ^([a-z0-9][-a-z0-9.:]*)?$ ]] ||
    fail "--$flag has an invalid character: '${!flag}'. Give small letters, digits, hyphens and dots."
done
[[ "$type" =~ ^[-a-z0-9]+$ ]] || fail "--type is not a TPU type: '$type'. Give one such as v5litepod-256."
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || fail "--slices is not a number above zero: '$slices'."
for bucket in ${mounts[@]+"${mounts[@]}"}; do
  [[ "$bucket" =~ ^[a-z0-9][-a-z0-9_.]*$ ]] || fail "--mount is not a bucket: '$bucket'. Give its name, without gs://."
done
case "$type" in
v4-*) generation=v4 image=tpu-ubuntu2204-base ;;
v5litepod-*) generation=v5e image=v2-alpha-tpuv5-lite ;;
v5p-*) generation=v5p image=v2-alpha-tpuv5 ;;
v6e-*) generation=v6e image=v2-alpha-tpuv6e ;;
*) fail "--type is of an unknown generation: '$type'. Give v4-*, v5litepod-*, v5p-* or v6e-*." ;;
esac
if [ "$command" = run ] || [ "$command" = start ]; then
  [ $# -gt 0 ] || fail "nothing to start: give the arguments of aimv2_jax.main after --."
fi

poll_s=${POLL_S:-30}
folder='' # Folder of the archive that `copy` makes.
max_killed=5 # Restarts in a row after a signal; then restarting does not help.
root=$(dirname "$0")/..
worker=aimv2_jax/launch/worker.sh # Path on the hosts, relative to the home folder.

quoted() { # Prints a command with shell quoting.
  local word
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=@,-]+$ ]]; then printf '%s ' "$word"; else printf "'%s' " "${word//\'/\'\\\'\'}"; fi
  done
  echo
}
do_() { if $dry; then quoted "$@"; else "$@"; fi; }
tpu() { do_ gcloud compute tpus queued-resources "$@" --zone="$zone" ${project:+--project="$project"}; }
everywhere() { tpu ssh "$name" --node=all --worker=all --command="$1"; }
first() { tpu ssh "$name" --node=0 --worker=0 --command="$1"; }
state() { tpu describe "$name" --format='value(state.state)'; }
settled() { # Waits until the state is final and stores it in `now`.
  until now=$(state) && [[ "$now" =~ ^(ACTIVE|SUSPENDED|FAILED)$ ]]; do sleep "$poll_s"; done
}

create() {
  local nodes=(--node-id="$name")
  [ "$slices" -eq 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
  tpu create "$name" --accelerator-type="$type" --runtime-version="${runtime:-$image}" "${nodes[@]}" \
    ${create_flags[@]+"${create_flags[@]}"}
  if $dry; then return; fi
  settled
  [ "$now" = ACTIVE ] || fail "the TPU was not created; its state is $now. Delete it and create it again."
}
copy() {
  # The archive is in a private folder, which is deleted at exit.
  if [ -z "$folder" ]; then
    folder=${TMPDIR:-/tmp}/aimv2_jax.XXXXXX
    $dry || folder=$(mktemp -d "$folder")
    $dry || trap 'rm -rf "$folder"' EXIT
  fi
  do_ git -C "$root" archive --format=tar.gz --output="$folder/aimv2_jax.tar.gz" "$(tracked)"
  tpu scp "$folder/aimv2_jax.tar.gz" "$name:aimv2_jax.tar.gz" --node=all --worker=all
  everywhere "mkdir -p aimv2_jax && tar -xzf aimv2_jax.tar.gz -C aimv2_jax && bash $worker install"
}
tracked() { # Prints a commit, on no branch, of the current tracked files; new files need `git add`.
  local changed
  changed=$(git -C "$root" -c user.name=launch -c user.email=launch stash create)
  echo "${changed:-HEAD}"
}
start() { # Mounts buckets, then starts the run with a new secret for the authentication between processes.
  local secret=${AIMV2_JAX_SECRET:-}
  $dry || secret=${secret:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
  [ ${#mounts[@]} -eq 0 ] || everywhere "bash $worker mount ${mounts[*]}"
  everywhere "${secret:+AIMV2_JAX_SECRET=$(printf %q "$secret") }bash $worker start $generation $slices$(printf ' %q' "$@")"
}
stop() { everywhere "bash $worker stop"; }
delete() { tpu delete "$name" --force --quiet; }
follow() { first "bash $worker follow" || true; } # The connection may be lost; `code` returns the verdict.
code() { first "bash $worker code"; }
ended() { # Stores the exit code of process 0 in `verdict`; fails if the query fails or the run goes on.
  verdict=$(code | tail -n 1 | tr -d '\r') && [[ "$verdict" =~ ^([0-9]+|lost)$ ]]
}
watch() { # Follows until there is a verdict: an exit code, "lost", or "preempted" if the TPU is gone.
  while :; do
    follow
    settled
    if [ "$now" != ACTIVE ]; then verdict=preempted && return; fi
    if ended; then return; fi
    sleep "$poll_s"
  done
}
finish() {
  case "$verdict" in
  preempted) echo "The TPU was preempted. The command 'run' creates a new one and resumes." >&2 && exit 75 ;;
  lost) echo "error: process 0 ended without an exit code; see aimv2_jax_run/log on its host." >&2 && exit 1 ;;
  *) exit "$verdict" ;;
  esac
}

if [ "$command" = run ] || [ "$command" = copy ]; then
  new=$(git -C "$root" ls-files --others --exclude-standard)
  [ -z "$new" ] || echo "note: not copied, because git does not track them: ${new//$'\n'/, }" >&2
fi
case "$command" in
create | copy | stop | delete) $command ;;
start) start "$@" ;;
follow)
  if $dry; then follow && code && exit; fi
  watch
  finish
  ;;
run)
  if ! $dry && state >/dev/null 2>&1; then # The TPU exists; use it.
    settled
    if [ "$now" != ACTIVE ]; then
      delete
      create
    fi
    if ended || [ "$verdict" != running ]; then
      copy
      start "$@"
    fi
  else
    create
    copy
    start "$@"
  fi
  if $dry; then follow && code && exit; fi
  killed=0
  while watch; do
    case "$verdict" in
    75)
      everywhere "bash $worker over"
      killed=0
      ;;
    134 | 137 | 139 | lost)
      killed=$((killed + 1))
      [ "$killed" -le "$max_killed" ] || finish
      echo "process 0 was killed (${verdict/lost/its host crashed}), time $killed of $max_killed in a row" >&2
      everywhere "bash $worker over"
      ;;
    preempted)
      delete
      create
      copy
      ;;
    *) finish ;;
    esac
    echo "restarting the run"
    start "$@"
  done
  ;;
esac
