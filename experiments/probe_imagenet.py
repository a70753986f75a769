"""An attentive probe on ImageNet-1k with most of the paper's settings (RECIPE.md §11 lists the differences).

    python -m aimv2_jax.prepare --input 'imagenet/train/*.tar' --output data/imagenet/train \\
      --caption alt=cls --label class=cls
    python -m aimv2_jax.prepare --input 'imagenet/val/*.tar' --output data/imagenet/val \\
      --caption alt=cls --label class=cls
    python experiments/probe_imagenet.py --checkpoint gs://BUCKET/large --train data/imagenet/train \\
      --test data/imagenet/val --json imagenet.json

The input is webdataset tars whose samples have the class in `.cls`. Published top-1, frozen trunk, 224 px (RECIPE.md
§10): L 86.6, H 87.5, 1B 88.1, 3B 88.5. Other flags of `aimv2_jax.eval.probes` may be added, such as --image-size 448.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aimv2_jax.eval.probes.__main__ import main

FLAGS = [
    "--kind=attentive", "--grid=full", "--augment=crops", "--epochs=100", "--warmup-epochs=5", "--batch-size=1024",
    "--label=class", "--validation=0.02", "--no-refit", "--dtype=bfloat16", "--encoder-batch=256",
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main([*FLAGS, *sys.argv[1:]]))
