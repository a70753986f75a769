"""The probes of one set: attentive, linear, k-NN and zero-shot, on features that are computed once. M test images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from aimv2_jax.eval.probes.dataset import LabelledDataset, split
from aimv2_jax.eval.probes.knn import DINO_COUNTS, vote
from aimv2_jax.eval.probes.protocol import ProbeConfig, protocol_notes
from aimv2_jax.eval.probes.report import classification_metrics, score_metrics
from aimv2_jax.eval.probes.run import KeptFeatures, head_probe, kept_features
from aimv2_jax.eval.prompts import class_prompts, names_of_classes, read_templates
from aimv2_jax.eval.suite.catalogue import SuiteSet
from aimv2_jax.eval.zeroshot import class_similarities
from aimv2_jax.pretrained.dual_encoder import PretrainedDualEncoder
from aimv2_jax.pretrained.encoder import PretrainedEncoder

ATTENTIVE, LINEAR, KNN, ZEROSHOT = PROBES = ("attentive", "linear", "knn", "zeroshot")
SKIPPED = "skipped"
"""Key of a result without metrics, whose value is the reason."""
_TEMPLATE = "a photo of a {}."


@dataclasses.dataclass(frozen=True)
class SuiteModel:
    """The encoder, and the model with a text tower that it belongs to, or None."""

    encoder: PretrainedEncoder
    dual: PretrainedDualEncoder | None


@dataclasses.dataclass(frozen=True)
class SetProbes:
    """The probes of one set, in the order of `PROBES`: features of all patches, if they are kept, also give the means.

    Args:
      attentive: settings of the attentive probe, which follow those of `reference`.
      linear: settings of the linear probe.
      wanted: the probes that will run.
    """

    model: SuiteModel
    entry: SuiteSet
    datasets: tuple[LabelledDataset, LabelledDataset]
    attentive: ProbeConfig
    reference: ProbeConfig
    linear: ProbeConfig
    wanted: tuple[str, ...] = PROBES

    def run(self, probe: str) -> dict[str, Any]:
        """The metrics of `probe`, one of `PROBES`.

        Raises:
          UserError: for images, features or texts that cannot be used.
        """
        runs: Mapping[str, Callable[[], dict[str, Any]]] = {
            ATTENTIVE: self._attentive,
            LINEAR: self._linear,
            KNN: self._knn,
            ZEROSHOT: self._zeroshot,
        }
        train, test = self.datasets
        examples = {"train": len(train), "test": len(test), "classes": len(train.names)}
        return {**runs[probe](), "examples": examples}

    @cached_property
    def _patches(self) -> KeptFeatures:
        return kept_features(self.attentive.feature_cache(self.model.encoder), self.datasets)

    @cached_property
    def _means(self) -> KeptFeatures:
        if "_patches" in vars(self):  # The attentive probe, which comes first, has computed them.
            train, test = self._patches
            return train.means(), test.means()
        cache = self.linear.feature_cache(self.model.encoder)
        flips = cache.flips and LINEAR in self.wanted  # k-NN has no use for mirror images.
        return kept_features(dataclasses.replace(cache, flips=flips), self.datasets)

    def _attentive(self) -> dict[str, Any]:
        kept = None if self.attentive.random_views else self._patches
        train = self.datasets[0]
        notes = protocol_notes(self.attentive, self.reference, len(train), len(train.names))
        return self._head(self.attentive, kept) | {"protocol": notes}

    def _linear(self) -> dict[str, Any]:
        return self._head(self.linear, None if self.linear.random_views else self._means)

    def _head(self, config: ProbeConfig, kept: KeptFeatures | None) -> dict[str, Any]:
        fit_idx, val_idx = split(self.datasets[0], config.validation, config.seed)
        outcome = head_probe(self.model.encoder, self.datasets, fit_idx, val_idx, config, kept)
        metrics = classification_metrics(self.datasets[1], outcome.predicted)
        return metrics | {"best": outcome.best, "grid": outcome.grid, "validation": len(val_idx)}

    def _knn(self) -> dict[str, Any]:
        train, test = (feature_set.features[:, 0, 0].astype(np.float32) for feature_set in self._means)
        votes = vote(train, self.datasets[0].classes, test, DINO_COUNTS, len(self.datasets[0].names))
        return best_of_neighbours(self.datasets[1], dict(zip(DINO_COUNTS, votes)))

    def _zeroshot(self) -> dict[str, Any]:
        assert self.model.dual is not None
        test, description = self.datasets[1], self.entry.description
        if description.classes is None and all(name.isdecimal() for name in test.names):
            return {SKIPPED: "its labels are numbers: name the classes in its set.json"}
        names = {label: (label.replace("_", " "),) for label in test.names}
        if description.classes is not None:
            names = names_of_classes(description.classes, test, description.without)
            test = test.with_classes(list(names))
        templates = [_TEMPLATE] if description.templates is None else read_templates(description.templates)
        scores = class_similarities(self.model.dual, test, class_prompts(names.values(), templates))
        return score_metrics(test, scores) | {"templates": len(templates)}


def best_of_neighbours(test: LabelledDataset, votes: Mapping[int, Int[np.ndarray, " M"]]) -> dict[str, Any]:
    """The metrics of the number of neighbours that is best on the test images, as DINO reports it; and top1 of each."""
    top1 = {count: float(np.mean(predicted == test.classes)) for count, predicted in votes.items()}
    best = max(top1, key=lambda count: (top1[count], -count))
    neighbours = {str(count): value for count, value in top1.items()}
    return classification_metrics(test, votes[best]) | {"best": {"neighbours": best}, "by_neighbours": neighbours}
