#!/usr/bin/env bash
# Measures and checks the train step on one GPU, with PyTorch beside it, in under ten minutes:
#
#   bash experiments/benchmarks/gpu.sh OUT [GOLDEN]
#
# writes one JSON file for each step to the folder OUT; `python experiments/benchmarks/gpu_report.py OUT` makes
# experiments/results/gpu.md of them. GOLDEN is the folder of the reference's tensors; without it nothing is compared
# with them. Needs jax with CUDA, flax, optax, numpy, ml_collections, einops and jaxtyping; for PyTorch's part torch, and
# for GOLDEN safetensors. A step that fails or takes too long is reported and leaves the others as they are.
#
# PLATFORM=cpu runs all of it with a tiny model on a CPU, to test the script.
set -uo pipefail
out=${1:?"give the folder for the results"} golden=${2:-}
mkdir -p "$out"
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3} platform=${PLATFORM:-gpu}
case "$platform" in
gpu)
  preset=large_224 device=cuda eager=() batch=(--batch "${BATCH:-128}") native=(--batch 2)
  resume=(--preset base_224 --config.data.batch_size=32 --config.model.encoder.depth=2 --config.model.decoder.depth=2)
  ;;
cpu)
  preset=tiny device=cpu batch=(--batch 2) eager=(--eager) native=(--batch 1 --config.model.attention=cudnn)
  resume=(--preset tiny --config.model.attention=cudnn)
  ;;
*)
  echo "error: unknown PLATFORM: '$platform'. Give gpu or cpu." >&2
  exit 2
  ;;
esac
failed=0

step() { # step NAME SECONDS COMMAND...: runs a command that gets --json OUT/NAME.json; logs to OUT/NAME.log
  local name=$1 limit=$2 code
  shift 2
  rm -f "$out/$name.json"
  timeout "$limit" "$python" "$@" --json "$out/$name.json" >"$out/$name.log" 2>&1
  code=$?
  if [ "$code" -eq 0 ]; then
    echo "$name: done"
  else
    echo "$name: failed with code $code: $(tail -n 1 "$out/$name.log")"
    failed=1
  fi
}

rm -rf "$out/resume"
# The figures come first: they are what the time is for.
step jax 150 "$here/step_time.py" --platform "$platform" --preset "$preset" "${batch[@]}"
step torch 120 "$here/step_torch.py" --device "$device" --preset "$preset" "${batch[@]}" "${eager[@]}"
step native 90 "$here/step_time.py" --platform "$platform" --preset "$preset" "${native[@]}" --rounds 2 \
  "--config.data.areas=(4096,)" --config.model.encoder.position=sincos
step attention 60 "$here/gpu_checks.py" attention --platform "$platform"
step first 60 "$here/gpu_checks.py" resume --platform "$platform" --folder "$out/resume" "${resume[@]}"
step resumed 60 "$here/gpu_checks.py" resume --platform "$platform" --folder "$out/resume" "${resume[@]}"
if [ -n "$golden" ]; then
  step golden 45 "$here/gpu_checks.py" golden --platform "$platform" --golden "$golden"
  step torch_golden 45 "$here/step_torch.py" --device "$device" --golden "$golden"
fi
rm -rf "$out/resume"
exit "$failed"
