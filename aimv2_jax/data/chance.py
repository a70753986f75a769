"""Chance as a function of (seed, purpose, number): nothing is carried along, so any number can be the first."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from grain.experimental import index_shuffle

_SHUFFLE_ROUNDS = 4  # Grain's own choice for its global shuffle.
# index_shuffle walks through 2^16 codes to find one below a small size: 195 us at 209 records, 15 us at 4,096.
_TABLE_SIZE = 4096


def shuffled(index: int, size: int, seed: int) -> int:
    """Where `index` comes in a permutation of range(size) that `seed` (32 bits) chooses."""
    if size <= _TABLE_SIZE:
        return int(_permutation(size, seed)[index])
    return index_shuffle(index, max_index=size - 1, seed=seed, rounds=_SHUFFLE_ROUNDS)


def permutation(size: int, seed: int) -> np.ndarray:
    """The permutation of range(size) that `seed` (32 bits) chooses, spelt out."""
    # Raw draws, which numpy keeps the same in every version, and a stable sort, which has one answer.
    return np.argsort(np.random.Philox(key=seed).random_raw(size), kind="stable")


_permutation = functools.lru_cache(maxsize=256)(permutation)


def hash32(*parts: int | str) -> int:
    """32 bits of a hash of `parts`, the same on every machine."""
    return int.from_bytes(_digest(parts, 4), "little")


def example_rng(seed: int, purpose: str, example: int) -> np.random.Generator:
    """The random numbers of one example for one purpose: Philox, counting from the example's number."""
    key = np.array([seed, int.from_bytes(_digest((purpose,), 8), "little")], np.uint64)
    # The generator counts in word 0, so that examples never share a number.
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, example, 0, 0], np.uint64)))


def _digest(parts: tuple[int | str, ...], size: int) -> bytes:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=size).digest()
