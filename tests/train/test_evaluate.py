"""Evaluation by hand: sums over unequal batches, divided once."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.train.evaluate import Totals, evaluate, fixed_prefixes, full_prefix
from aimv2_jax.train.task import SumCount

VALID = np.array([[True] * 8, [True] * 3 + [False] * 5, [True] + [False] * 7, [False] * 8])


def test_fixed_prefixes_of_any_patch_count():
    """A fixed prefix is the nearest share of the patches, within 1 and one less than their number."""
    quarter, half, most = fixed_prefixes((0.25, 0.5, 0.99), VALID)
    assert quarter.tolist() == [2, 1, 1, 1] and half.tolist() == [4, 2, 1, 1] and most.tolist() == [7, 2, 1, 1]
    assert full_prefix(VALID).tolist() == [8, 3, 1, 0]


def stand_in(weights, random_prefix=True):
    """A program whose loss of an example is known: image 10 x prefix over 2 patches, text 100 over `size` tokens."""

    def eval_sums(params, batch, prefix):
        usable = batch["valid"].any(axis=1)
        sums = {"image": 10.0 * (prefix * usable).sum(), "text": (params or 100.0) * usable.sum()}
        counts = {"image": 2 * usable.sum(), "text": batch["size"].sum()}
        return {name: SumCount(sums[name], counts[name]) for name in weights}

    settings = types.SimpleNamespace(prefixes=(0.25, 0.5), sources={"a": "folder"})
    task = types.SimpleNamespace(weights=weights, random_prefix=random_prefix)
    return types.SimpleNamespace(eval_sums=eval_sums, task=task, config=types.SimpleNamespace(eval=settings))


BATCHES = [
    {"valid": np.ones((2, 8), bool), "size": np.array([5, 7])},
    {"valid": np.array([[True] * 8, [False] * 8]), "size": np.array([4, 0])},  # with a row of filling
]


def test_evaluation_when_batches_are_unequal_then_sums_are_divided_once():
    values = evaluate(stand_in({"image": 0.4, "text": 1.0}), None, BATCHES, lambda arrays: arrays)
    image = (10 * (2 + 2 + 4 + 4) + 10 * (2 + 4)) / (2 * (2 + 2 + 1 + 1))
    text = 2 * 300 / (2 * 16)
    assert values == {
        "eval_loss": pytest.approx(text + 0.4 * image),
        "eval_loss_image": pytest.approx(image),
        "eval_loss_text": pytest.approx(text),
        "eval_loss_text_full_prefix": pytest.approx(300 / 16),
    }


def test_evaluation_without_text_loss():
    """An evaluation without a text loss has no text figures."""
    values = evaluate(stand_in({"image": 0.4}), None, BATCHES, lambda arrays: arrays)
    assert set(values) == {"eval_loss", "eval_loss_image"}


def test_evaluation_with_full_attention():
    """An evaluation with full attention reads the whole image for every figure."""
    program, prefixes = stand_in({"text": 1.0}, random_prefix=False), []
    eval_sums = program.eval_sums
    program.eval_sums = lambda params, batch, prefix: (prefixes.extend(prefix), eval_sums(params, batch, prefix))[1]
    values = evaluate(program, None, BATCHES, lambda arrays: arrays)
    assert values == dict.fromkeys(
        ("eval_loss", "eval_loss_text", "eval_loss_text_full_prefix"), pytest.approx(300 / 16)
    )
    assert prefixes == [8, 8, 8, 0]


def test_evaluation_with_ema_params():
    """An evaluation with averaged parameters has their figures beside the others."""
    values = evaluate(stand_in({"text": 1.0}), 100.0, BATCHES, lambda arrays: arrays, ema_params=60.0)
    names = ("eval_loss", "eval_loss_text", "eval_loss_text_full_prefix")
    assert values == {name: pytest.approx(300 / 16) for name in names} | {
        f"{name}_ema": pytest.approx(180 / 16) for name in names
    }


def test_evaluation_when_nothing_counts_then_refused_and_not_0():
    empty = [{"valid": np.zeros((2, 8), bool), "size": np.zeros(2, int)}]
    with pytest.raises(UserError, match="nothing to measure the image loss on: 'folder'"):
        evaluate(stand_in({"image": 0.4}), None, empty, lambda arrays: arrays)


def test_totals_when_terms_are_device_arrays_then_means_of_the_host():
    totals = Totals()
    totals.add_terms({"text": SumCount(jax.numpy.float32(3), jax.numpy.int32(2))})
    totals.add("text", 1, 2)
    assert totals.mean("text") == 1.0 and totals.mean("image") is None
