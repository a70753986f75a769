#!/usr/bin/env bash
# Runs all stages of a small AIMv2 on two CPU cores in less than half an hour: pre-training at 112 px, 168 px, native
# resolution, and the held-out losses of the last two models at three resolutions. Resumes when run again.
# Usage: launch/stages.sh PAIRS [WORKDIR]    PAIRS: a folder with SOURCE/{train,test}/*.tar, as img2dataset writes them,
#                                            with captions in .txt and in the json's field "synthetic".
set -euo pipefail
. "$(dirname "$0")/pairs.sh" stages "${1:-}" "${2:-}"

train() { # STAGE FLAGS...
  local stage=$1
  shift
  "$venv/bin/python" -m aimv2_jax.main --config="experiments/stages.py:$stage" --workdir="$workdir/$stage" \
    --config.data.sources.pairs="$workdir/data/train" --config.eval.sources.pairs="$workdir/data/test" "$@"
}
train small
train larger --config.init.path="$workdir/small:last"
train native --config.init.path="$workdir/larger:last"

"$venv/bin/python" -m aimv2_jax.eval.heldout --checkpoint "$workdir/larger:last" --resolution 112 168 224 \
  --json "$workdir/larger.json"
"$venv/bin/python" -m aimv2_jax.eval.heldout --checkpoint "$workdir/native:last" --resolution 112 168 native:144 \
  --json "$workdir/native.json"
