# shellcheck shell=bash
# Sourced by the studies on image-text pairs: . launch/pairs.sh STUDY PAIRS WORKDIR FLAGS...
# Sets `workdir` (default runs/STUDY), makes the environment, and prepares the pairs once in "$workdir/data/train" and
# "$workdir/data/test"; FLAGS are additional flags of aimv2_jax.prepare.
study=$1 pairs=$2 workdir=$3
shift 3
[ -n "$pairs" ] || { echo "Name the folder with the pairs: launch/$study.sh PAIRS [WORKDIR]" >&2; exit 2; }
[ -d "$pairs" ] || { echo "error: no such folder: $pairs. Give one with SOURCE/{train,test}/*.tar." >&2; exit 2; }
pairs=$(cd "$pairs" && pwd)
workdir=${workdir:-$(dirname "$0")/../runs/$study}
mkdir -p "$workdir"
workdir=$(cd "$workdir" && pwd)
prepare_flags=("$@")
. "$(dirname "$0")/environment.sh"

for split in train test; do
  [ -f "$workdir/data/$split/dataset.json" ] ||
    "$venv/bin/python" -m aimv2_jax.prepare --input "$pairs/*/$split/*.tar" --output "$workdir/data/$split" \
      --caption alt=txt --caption synthetic=json:synthetic "${prepare_flags[@]}"
done
