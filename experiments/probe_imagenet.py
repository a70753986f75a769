"""The paper's attentive probe on ImageNet-1k (RECIPE.md §11: what the paper leaves open).

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

FLAGS = ["--protocol=paper", "--imagenet", "--label=class", "--dtype=bfloat16", "--encoder-batch=256"]

if __name__ == "__main__":
    sys.exit(main([*FLAGS, *sys.argv[1:]]))
