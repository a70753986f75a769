#!/usr/bin/env bash
# From nothing to a trained AIMv2 and its pictures: environment, training, pictures. Run again, it resumes.
# QUICKSTART_WORKDIR=... chooses where it writes (default runs/quickstart), PYTHON=... the interpreter.
set -euo pipefail
workdir=${QUICKSTART_WORKDIR:-$(dirname "$0")/../runs/quickstart}
mkdir -p "$workdir"
workdir=$(cd "$workdir" && pwd)
. "$(dirname "$0")/environment.sh"

"$venv/bin/python" -m aimv2_jax.main --config=experiments/quickstart.py --workdir="$workdir"
"$venv/bin/python" -m aimv2_jax.eval.show --checkpoint="$workdir" --output="$workdir/pictures"
"$venv/bin/python" -m aimv2_jax.eval.heldout --checkpoint="$workdir" --json="$workdir/heldout.json"

cat <<END

Done. Look at the pictures in $workdir/pictures:
  predictions.png  what the model saw of held-out pictures, and the next patches it predicted
  captions.png     what it writes about them, beside the true captions
  curves.png       how the losses went
Held-out figures: $workdir/heldout.json; all metrics: $workdir/metrics.jsonl

What to try next:
  captions alone (no image loss):
    $venv/bin/python -m aimv2_jax.main --config=experiments/quickstart.py --workdir=runs/captions --config.loss.image=False
  every key of a run, with its meaning: experiments/base.py; the paper's runs: experiments/pretrain_*_224.py
END
