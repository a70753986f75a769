"""A dense probe from two datasets to metrics of the second. N test images, C classes."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from aimv2_jax.errors import UserError
from aimv2_jax.eval.dense import metrics
from aimv2_jax.eval.dense.dataset import IGNORED, DenseDataset
from aimv2_jax.eval.dense.features import DenseEncoder
from aimv2_jax.eval.dense.predict import Prediction, predictor_of
from aimv2_jax.eval.dense.settings import DEPTH, DenseConfig
from aimv2_jax.eval.dense.train import train_head

_DRAWN = 12  # Test images that are kept for the figure, spread evenly over the set.


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The metrics, the predictions for a figure, and `seconds` by phase."""

    metrics: dict[str, Any]
    drawn: list[Prediction]
    seconds: dict[str, float]


def run_probe(
    encoder: DenseEncoder,
    train: DenseDataset,
    test: DenseDataset,
    names: list[str],
    config: DenseConfig,
    encoder_batch: int | None = None,
) -> Outcome:
    """Trains a head on `train` and evaluates it on `test`.

    Args:
      encoder: for the crops, or whole images, of the training.
      train: the train dataset.
      test: the test dataset.
      names: of the classes; empty for depth.
      config: of the probe.
      encoder_batch: windows in a batch of the encoder in the test; None: its default.

    Raises:
      UserError: if no test image has a pixel to evaluate, or the loss is not finite.
    """
    trained = train_head(train, encoder, config.bins if config.task == DEPTH else len(names), config)
    start = time.perf_counter()
    predictor = predictor_of(encoder, trained, config, test, encoder_batch or encoder.batch_size)
    step, drawn, values = max(1, len(test) // _DRAWN), [], []
    for index, prediction in enumerate(predictor(test)):
        truth = prediction.sample.map
        if config.task == DEPTH:
            counted = metrics.counted_depths(truth, config.depths, config.mask)
            errors = metrics.depth_errors(truth, prediction.predicted, counted)
            values += [] if errors is None else [errors]
        else:
            values.append(metrics.class_areas(truth, prediction.predicted, len(names), IGNORED))
        if index % step == 0 and len(drawn) < _DRAWN:
            drawn.append(prediction)
    if not values:
        raise UserError("--test has no pixel within --mask that counts", config.mask, "Give --mask full")
    stacked = np.stack(values)
    figures = (
        metrics.depth_metrics(stacked, config.seed)
        if config.task == DEPTH
        else metrics.segmentation_metrics(stacked, names, config.seed)
    )
    last = max(trained.losses)
    figures = {**figures, "train_loss": trained.losses[last], "evaluated": len(values)}
    return Outcome(figures, drawn, {"train": trained.seconds, "test": time.perf_counter() - start})
