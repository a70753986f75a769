#!/usr/bin/env bash
# Makes the environment, trains a small AIMv2 and visualises its predictions. Resumes when run again.
# QUICKSTART_WORKDIR=... sets the output folder (default runs/quickstart), PYTHON=... the interpreter.
set -euo pipefail
workdir=${QUICKSTART_WORKDIR:-$(dirname "$0")/../runs/quickstart}
mkdir -p "$workdir"
workdir=$(cd "$workdir" && pwd)
. "$(dirname "$0")/environment.sh"

"$venv/bin/python" -m aimv2_jax.main --config=experiments/quickstart.py --workdir="$workdir"
"$venv/bin/python" -m aimv2_jax.eval.visualize --checkpoint="$workdir" --output="$workdir/images"
"$venv/bin/python" -m aimv2_jax.eval.heldout --checkpoint="$workdir" --json="$workdir/heldout.json"

cat <<END

Done. The images are in $workdir/images:
  predictions.png  held-out images as the model sees them, and the next patches that it predicts
  captions.png     generated captions next to the true captions
  curves.png       loss curves
Held-out figures: $workdir/heldout.json; all metrics: $workdir/metrics.jsonl

Next steps:
  captions alone (no image loss):
    $venv/bin/python -m aimv2_jax.main --config=experiments/quickstart.py --workdir=runs/captions --config.loss.image=False
  every config key, with its meaning: experiments/base.py; the paper's runs: experiments/pretrain.py
END
