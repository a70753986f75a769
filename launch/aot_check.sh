#!/usr/bin/env bash
# Predicts every experiment on its topologies, without a TPU, and writes experiments/results/aot.md. Takes hours.
# Existing reports in FOLDER are skipped, so the script can be stopped and restarted; delete a report to renew it.
# Usage: launch/aot_check.sh [FOLDER]      FULL="large huge" also compiles these in full on v5e (long).
set -euo pipefail
EXTRAS=tpu
. "$(dirname "$0")/environment.sh"
folder=${1:-experiments/results/aot}
mkdir -p "$folder"

predict() { # NAME EXPERIMENT TOPOLOGY FLAGS...
  local name=$1 config=experiments/$2 topology=$3
  shift 3
  if [ -f "$folder/$name.json" ]; then
    echo "$name: skipped, its report exists"
    return
  fi
  echo "$name: predicting ($(date +%H:%M))"
  "$venv/bin/python" -m aimv2_jax.aot --config="$config" --topology="$topology" --json "$folder/$name.part.json" \
    --breakdown "$@" > "$folder/$name.txt"
  mv "$folder/$name.part.json" "$folder/$name.json"
}

trap 'rm -f "$folder"/*.part.json' EXIT
for size in base large huge 1b 3b; do
  predict "1_v5e_$size" "pretrain.py:$size" v5e:16x16
done
for size in large huge 1b 3b; do # With the reference trainer's dtype for gradient reductions.
  predict "2_v5e_${size}_bf16" "pretrain.py:$size" v5e:16x16 --no-xla-attention --config.train.reduce_dtype=bfloat16
done
for size in ${FULL:-}; do
  predict "3_v5e_${size}_full" "pretrain.py:$size" v5e:16x16 --full --no-xla-attention
done
for size in large huge 1b 3b; do
  case $size in # v5p and v6e have enough memory without the recomputation for v5e.
    1b | 3b) saved="--config.model.remat=none --config.model.decoder.remat=none" ;;
    *) saved="" ;;
  esac
  # shellcheck disable=SC2086 # Several flags.
  predict "4_v5p_$size" "pretrain.py:$size" v5p:4x4x16 --no-xla-attention $saved
  # shellcheck disable=SC2086
  predict "5_v6e_$size" "pretrain.py:$size" v6e:16x16 --no-xla-attention $saved
done
predict 6_v5e_large_two_slices pretrain.py:large v5e:16x16 --slices 2 --no-xla-attention
for size in base large huge 1b 3b; do
  for pixels in 336 448; do
    predict "7_v5e_${size}_$pixels" "highres.py:$size,$pixels" v5e:16x16 --no-xla-attention
  done
done
for area in 128 256 512 1024 2048 4096; do
  predict "8_v5e_large_native_$(printf %04d "$area")" native.py:large v5e:16x16 --no-xla-attention --area "$area"
done
for topology in v5e:16x16 v5p:4x4x16; do
  for task in lit_large_224 distill_large_from_3b; do
    predict "9_${topology%%:*}_$task" "$task.py" "$topology" --no-xla-attention
  done
done

"$venv/bin/python" -m aimv2_jax.aot.summary "$folder" --output experiments/results/aot.md
