"""Weighted k nearest neighbours, and the floor that raw pixels give. N train pictures, M test pictures, D width."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from aimv2_jax.data.pictures import decode_image
from aimv2_jax.eval.probes.examples import Examples

TEMPERATURE = 0.07  # Of the vote's weights, exp(cosine / temperature): DINO's, now everybody's.
COUNTS = (1, 5, 10, 20)  # Neighbours: the validation pictures choose.
_FLOOR_SIDE = 16
_ROWS = 1024  # Test pictures at a time.


def vote(
    train: Float[np.ndarray, "N D"],
    classes: Int[np.ndarray, " N"],
    test: Float[np.ndarray, "M D"],
    counts: tuple[int, ...],
    num_classes: int,
) -> list[Int[np.ndarray, " M"]]:
    """The class of each test picture by its nearest in cosine, for each of `counts` neighbours."""
    train, test = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12) for one in (train, test))
    found: list[list[np.ndarray]] = [[] for _ in counts]
    for start in range(0, len(test), _ROWS):
        cosine = test[start : start + _ROWS] @ train.T
        most = min(max(counts), len(train))
        near = np.argsort(-cosine, axis=1, kind="stable")[:, :most]
        weights = np.exp(np.take_along_axis(cosine, near, axis=1) / TEMPERATURE)
        for number, count in enumerate(counts):
            votes = np.zeros((len(cosine), num_classes))
            for place in range(min(count, most)):
                np.add.at(votes, (np.arange(len(cosine)), classes[near[:, place]]), weights[:, place])
            found[number].append(votes.argmax(axis=1))
    return [np.concatenate(parts) for parts in found]


def pixel_floor(train: Examples, test: Examples) -> Int[np.ndarray, " M"]:
    """What the nearest train picture says of each test picture, by Euclidean distance of 16 x 16 pixels."""
    ours, theirs = (np.stack([_small(one.image(place)) for place in range(len(one))]) for one in (train, test))
    found = []
    for start in range(0, len(theirs), _ROWS):
        part = theirs[start : start + _ROWS]
        distance = np.square(part).sum(1)[:, None] - 2 * part @ ours.T + np.square(ours).sum(1)
        found.append(train.classes[distance.argmin(axis=1)])
    return np.concatenate(found)


def _small(data: bytes) -> np.ndarray:
    """The whole picture at 16 x 16, whatever its aspect."""
    image = decode_image(data).resize((_FLOOR_SIDE, _FLOOR_SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32).reshape(-1) / 255
