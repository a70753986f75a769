"""Resolved configs of all sizes against the paper (arXiv 2411.14402): Table A1, Table 2, §2.4 and §3.1."""

from pathlib import Path

import pytest

from aimv2_jax.config.load import load_config
from aimv2_jax.data.sampling.schedule import BLOCK, counts_in_block
from experiments.native import AREAS
from tests.experiments.test_mixtures import TABLE_2

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

PEAK_RATE = {"large": 1e-3, "huge": 8e-4, "1b": 8e-4, "3b": 4e-4}  # Table A1.
WIDTH = {"large": 1024, "huge": 1536, "1b": 2048, "3b": 3072}  # Table 1.


def weights(config):
    return {(source, kind): weight for source, kinds in config.data.mixture.items() for kind, weight in kinds.items()}


@pytest.mark.parametrize("size", PEAK_RATE)
def test_pretraining_of_every_size_has_table_a1(size):
    config = load_config(EXPERIMENTS / f"pretrain.py:{size}")
    optimizer, data, model = config.optimizer, config.data, config.model
    assert optimizer.peak_lr == PEAK_RATE[size]
    assert (optimizer.schedule, optimizer.end_lr, optimizer.warmup_steps) == ("cosine", 1e-5, 12_500)
    assert optimizer.schedule_steps == config.train.steps == 1_500_000
    assert (optimizer.betas, optimizer.weight_decay, optimizer.clip_norm) == ((0.9, 0.95), 1e-4, 1.0)
    assert (data.batch_size, data.image_size, data.flip) == (8192, 224, 0.5)
    assert data.crop_area == (0.4, 1.0) and data.crop_ratio == pytest.approx((0.75, 1.33), abs=0.004)
    assert (model.patch_size, model.decoder.text_length, config.loss.alpha) == (14, 77, 0.4)
    encoder, decoder = model.encoder, model.decoder
    assert (encoder.width, encoder.depth, decoder.width, decoder.depth) == (WIDTH[size], 24, 1024, 12)


@pytest.mark.parametrize("size", PEAK_RATE)
def test_pretraining_of_every_size_has_table_2(size):
    """test_mixtures.py checks the table's sizes."""
    shares = weights(load_config(EXPERIMENTS / f"pretrain.py:{size}"))
    assert shares == {(kind[0], kind[1]): pytest.approx(kind[3] / 100) for kind in TABLE_2}


@pytest.mark.parametrize("size", PEAK_RATE)
@pytest.mark.parametrize("pixels", [336, 448])
def test_high_resolution_has_section_2_4(size, pixels):
    config = load_config(EXPERIMENTS / f"highres.py:{size},{pixels}")
    samples = config.train.steps * config.data.batch_size
    assert samples == pytest.approx(2e9, rel=1e-4) and config.data.image_size == pixels
    assert config.optimizer.weight_decay == 0.0
    assert {kind for _, kind in weights(config)} == {"alt"}


def test_native_areas_have_the_rounded_normals_shares():
    """n ~ N(0, 1) truncated to [-1, 1], mapped linearly to [7, 12] and rounded: an area 2^n for each integer."""
    assert AREAS == (128, 256, 512, 1024, 2048, 4096)
    assert counts_in_block(len(AREAS)) == [78, 194, 228, 228, 194, 78] and BLOCK == 1000


def test_no_value_of_the_recipe_is_left_unsettled():
    files = [path for folder in (EXPERIMENTS, EXPERIMENTS.parent / "aimv2_jax") for path in folder.rglob("*")]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".md", ".txt")}
    assert len(texts) > 100
    assert [str(path) for path, text in texts.items() if "P" + "?" in text] == []
