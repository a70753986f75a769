#!/usr/bin/env bash
# Predicts every experiment on its topologies, without a TPU, and writes experiments/results/aot.md. Takes hours.
# Existing reports in FOLDER are skipped, so the script can be stopped and restarted; delete a report to renew it.
# Usage: launch/aot_check.sh [FOLDER]
#   FULL="large huge"      also compiles these in full on v5e (long)
#   CHIPS="v6e v7x"        only these generations, and nothing but pre-training at 224 px
#   PRICE=2.70             of a chip-hour: the reports also say what a run costs
set -euo pipefail
EXTRAS=tpu
. "$(dirname "$0")/environment.sh"
folder=${1:-experiments/results/aot}
failed=()
mkdir -p "$folder"

predict() { # NAME EXPERIMENT TOPOLOGY FLAGS...
  local name=$1 config=experiments/$2 topology=$3
  shift 3
  if [ -f "$folder/$name.json" ]; then
    echo "$name: skipped, its report exists"
    return
  fi
  echo "$name: predicting ($(date +%H:%M))"
  local code=0
  "$venv/bin/python" -m aimv2_jax.aot --config="$config" --topology="$topology" --json "$folder/$name.part.json" \
    --breakdown ${PRICE:+--price="$PRICE"} "$@" > "$folder/$name.txt" < /dev/null || code=$?
  case $code in
  0) mv "$folder/$name.part.json" "$folder/$name.json" ;;
  1 | 2) failed+=("$name") ;; # The reason is on the terminal. The others go on, and the next start tries it again.
  *) exit "$code" ;;
  esac
}

finish() {
  if [ ${#failed[@]} -gt 0 ]; then
    echo "error: no report of ${failed[*]}" >&2
    exit 1
  fi
  exit
}

trap 'rm -f "$folder"/*.part.json' EXIT
# Every size on every generation, with its defaults: experiments/tpu.py.
runs=$("$venv/bin/python" -m experiments.tpu)
while read -r run topology; do
  size=${run%,*} chip=${run#*,} beside=--no-xla-attention
  case " ${CHIPS:-$chip} " in *" $chip "*) ;; *) continue ;; esac
  if [ "$chip" = v5e ]; then beside=""; fi # There, XLA's attention stands beside the kernels.
  # shellcheck disable=SC2086 # Maybe no flag.
  predict "1_${chip}_$size" "pretrain.py:$run" "$topology" $beside
done <<< "$runs"
if [ -n "${CHIPS:-}" ]; then
  finish
fi
for size in large huge 1b 3b; do # With the reference trainer's dtype for gradient reductions.
  predict "2_v5e_${size}_bf16" "pretrain.py:$size" v5e:16x16 --no-xla-attention --config.train.reduce_dtype=bfloat16
done
for size in ${FULL:-}; do
  predict "3_v5e_${size}_full" "pretrain.py:$size" v5e:16x16 --full --no-xla-attention
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
finish
