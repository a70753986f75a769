"""AIMv2 in small on real pairs, compared with its baselines by probes; launch/comparison.sh runs all of them.

python -m aimv2_jax.main --config=experiments/comparison.py:aimv2 --workdir=runs/comparison/aimv2

Results: `results/comparison.md`, with the tables of `comparison_table.py`.
"""

from ml_collections import ConfigDict

from experiments import stages

# By run: the keys in which it differs from AIMv2's.
CHANGES = {
    "aimv2": {},
    # Alt-texts alone, since synthetic captions contain the labels of the probe.
    "aimv2_alt": {"data.mixture": {"pairs": {"alt": 1.0}}},
    # Captions alone, under prefix attention.
    "captioning": {"loss.image": False},
}
RUNS = tuple(CHANGES)


def get_config(run: str) -> ConfigDict:
    config = stages.small_config()  # The same pairs, captions and held-out dataset.
    config.data.update(
        image_size=84,  # 36 patches, so that two cores train on many images.
        batch_size=64,
        crop_area=(0.2, 1.0),  # Three thousand pairs are soon memorised; smaller crops delay that.
    )
    config.model.decoder.update(depth=2, text_length=24)
    config.optimizer.update(warmup_steps=100, schedule_steps=4800, peak_lr=1e-3, weight_decay=1e-3)
    config.train.update(steps=4800, log_every=20, eval_every=800, save_every=800, eval_at_start=False)
    config.update_from_flattened_dict(CHANGES[run])
    return config
