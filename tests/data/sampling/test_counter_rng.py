"""Counter RNG: bijective permutations without correlations, and per-example generators."""

import hashlib
import itertools
import time

import numpy as np
import pytest

from aimv2_jax.data.sampling.counter_rng import example_rng, permute_index


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 100, 257, 1025, 4096, 4097, 5000, 2**14 + 1, 2**16, 2**16 + 1])
def test_shuffled_is_a_permutation(size):
    """Includes sizes 4^k + 1, for which grain's own shuffle is not a permutation."""
    assert np.bincount([permute_index(i, size, seed=5) for i in range(size)], minlength=size).tolist() == [1] * size


@pytest.mark.parametrize("size", [4**10 + 1, 4**16 + 1])
def test_shuffled_has_no_collision_at_4_to_the_k_plus_1(size):
    positions = [permute_index(i, size, seed) for seed in range(50) for i in (0, size - 1)]
    assert all(first != last for first, last in zip(positions[::2], positions[1::2]))
    assert max(positions) < size


@pytest.mark.parametrize("size", [4099, 1_000_003, 560_171_533, 1_901_228_573, 2**32, 10**12])
def test_shuffled_positions_do_not_correlate(size):
    """Correlation of positions `lag` apart: 20,000 independent pairs give a standard deviation of 0.007."""
    most = min(size, 20_000)
    positions = np.array([permute_index(i, size, seed=77_782) for i in range(most)], float)
    for lag in (1, 2, 4, 8, 64, 256, 1024):
        correlation = np.corrcoef(positions[:-lag], positions[lag:])[0, 1]
        assert abs(correlation) < (0.02 if most == 20_000 else 0.05), lag


def test_shuffled_batches_hold_as_many_neighbours_as_chance():
    """10,000,019 records in batches of 8,192: the number of neighbour pairs in ten batches is Poisson with mean 67."""
    size, batch, neighbours = 10_000_019, 8192, 0
    for first in range(0, 10 * batch, batch):
        positions = np.sort([permute_index(i, size, seed=9) for i in range(first, first + batch)])
        neighbours += int((np.diff(positions) == 1).sum())
    expected = 10 * batch * (batch - 1) / size
    assert abs(neighbours - expected) < 4 * expected**0.5


def test_shuffled_when_the_size_is_2_to_the_32_then_every_index_has_a_place_of_its_own_and_quickly():
    size = 2**32
    indices = [0, 1, size // 2, size - 2, size - 1, *np.random.default_rng(0).integers(0, size, 20_000).tolist()]
    indices = sorted(set(indices))
    start = time.perf_counter()
    positions = [permute_index(index, size, seed=9) for index in indices]
    assert (time.perf_counter() - start) / len(indices) < 100e-6  # Measured: 3 to 10 us.
    assert len(set(positions)) == len(indices)
    assert min(positions) >= 0 and max(positions) < size
    # Uniform over 16 parts of about 1,250 each; six standard deviations are 205.
    assert np.abs(np.bincount(np.array(positions) >> 28, minlength=16) - len(positions) / 16).max() < 210
    assert positions != indices and positions != [permute_index(index, size, seed=10) for index in indices]


def test_example_rng_when_seed_purpose_or_example_differ_then_other_numbers_and_else_the_same():
    draws = {
        (seed, purpose, example): tuple(example_rng(seed, purpose, example).random(20))
        for seed in (0, 1)
        for purpose in ("crop", "flip")
        for example in (0, 1, 2**40)
    }
    assert len(set(itertools.chain.from_iterable(draws.values()))) == 20 * len(draws)
    assert all(tuple(example_rng(*key).random(20)) == value for key, value in draws.items())


def test_example_rng_when_over_many_examples_then_uniform():
    first = np.sort([example_rng(7, "flip", example).random() for example in range(4000)])
    # Kolmogorov-Smirnov: one seed in a thousand exceeds 1.95 / sqrt(n).
    assert np.abs(first - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / np.sqrt(4000)


def test_example_rng_is_philox_keyed_by_seed_and_purpose():
    """Numbers, kept through versions, are those of numpy's Philox with this key and counter."""
    digest = hashlib.blake2b(b"crop", digest_size=8).digest()
    key = np.array([2**40 + 1, int.from_bytes(digest, "little")], np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key, counter=[0, 9, 0, 0]))
    rng = example_rng(2**40 + 1, "crop", 9)
    assert rng.random(9).tolist() == expected.random(9).tolist()
    assert rng.integers(7, size=9).tolist() == expected.integers(7, size=9).tolist()
