#!/usr/bin/env bash
# Compares a small AIMv2 with its baselines on two CPU cores: each trains on the same number of examples, in 28 minutes
# at 185 images a second, and is then probed for the category of an image. The script resumes when run again. It writes the
# figures to WORKDIR/*.json and the tables to WORKDIR/comparison.md.
# Usage: launch/comparison.sh PAIRS [WORKDIR]    PAIRS: a folder with SOURCE/{train,test}/*.tar, as img2dataset writes
#                                                them, with captions in .txt and in the json's field "synthetic", labels
#                                                in its fields "coarse" and "source".
set -euo pipefail
. "$(dirname "$0")/pairs.sh" comparison "${1:-}" "${2:-}" --label coarse=json:coarse --label source=json:source

for model in aimv2 aimv2_alt captioning; do
  "$venv/bin/python" -m aimv2_jax.main --config="experiments/comparison.py:$model" --workdir="$workdir/$model" \
    --config.data.sources.pairs="$workdir/data/train" --config.eval.sources.pairs="$workdir/data/test"
done

probe() { # NAME FLAGS...    With all categories, and without the two that pixel statistics alone reveal.
  local name=$1
  shift
  for without in "" space,screen; do
    "$venv/bin/python" -m aimv2_jax.eval.probes "$@" --train "$workdir/data/train" --test "$workdir/data/test" \
      --label coarse --by source --without "$without" --json "$workdir/$name${without:+_without}.json"
  done
}
for model in aimv2 aimv2_alt captioning; do
  probe "$model" --checkpoint "$workdir/$model:last"
done
probe random --checkpoint random --like "$workdir/aimv2:last"
"$venv/bin/python" experiments/comparison_table.py "$workdir" | tee "$workdir/comparison.md"
