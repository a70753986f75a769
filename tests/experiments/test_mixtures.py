"""The mixture of the experiments equals the paper's, as drawn by the sampler."""

import pytest

from aimv2_jax.config.schema import BatchShape, mixture_counts
from aimv2_jax.data.sampling.mixture import MixtureSampler
from aimv2_jax.data.sampling.schedule import BatchSchedule
from experiments import base, mixtures

# arXiv 2411.14402, Table 2: source, caption kind, image-text pairs, sampling probability in per cent.
TABLE_2 = [
    ("dfn", "alt", 1_901_228_573, 30),
    ("dfn", "synthetic", 3_802_457_146, 30),
    ("coyo", "alt", 560_171_533, 9),
    ("hqitp", "alt", 564_623_839, 28),
    ("hqitp", "synthetic", 431_506_953, 3),
]


def test_paper_mixture_is_table_2():
    rows = [
        (name, kind, pool.pairs, pool.probability)
        for name, pools in mixtures.PAPER.items()
        for kind, pool in pools.items()
    ]
    assert rows == [(name, kind, pairs, percent / 100) for name, kind, pairs, percent in TABLE_2]
    dfn = mixtures.PAPER["dfn"]
    assert dfn["synthetic"].pairs == 2 * dfn["alt"].pairs


def test_paper_run_passes_over_dfn_twice_in_alt_and_synthetic():
    """1.5 million steps of 8192: 1.94 passes over the images per kind, so 0.97 over two synthetic captions."""
    config = base.get_config()
    mixtures.use_paper_mixture(config)
    sizes = {name: pools["alt"].pairs for name, pools in mixtures.PAPER.items()}
    sampler = MixtureSampler(
        0, BatchSchedule(0, [BatchShape(8192, 256)]), sizes, mixture_counts(config.data.mixture.to_dict())
    )
    last = max(
        (draw for draw in map(sampler.draw, range(1_500_000 * 8192 - 100, 1_500_000 * 8192)) if draw.source == "dfn"),
        key=lambda draw: draw.number,
    )
    assert (last.number + 1) / sizes["dfn"] == pytest.approx(1.94, abs=0.005)
    assert sampler.epochs(1_500_000)["dfn"] == pytest.approx(2 * 1.94, abs=0.01)


def test_later_stages_leave_out_the_synthetic_captions():
    config = base.get_config()
    mixtures.use_alt_text_only(config)
    assert config.data.mixture.to_dict() == {"dfn": {"alt": 0.3}, "coyo": {"alt": 0.09}, "hqitp": {"alt": 0.28}}
