"""Dataset statistics: counts add up, and the sum over parts equals the whole."""

import json
import random

import numpy as np
import pytest

from aimv2_jax.data.dataset_stats import (
    ASPECT,
    FIRST_KEYS,
    SIDE,
    DatasetStats,
    Histogram,
    LostInput,
    MapCount,
    SampleCount,
)


def build_stats(events):
    stats = DatasetStats()
    for kind, *arguments in events:
        getattr(stats, kind)(*arguments)
    return stats


def random_events(rng, count):
    events = []
    for i in range(count):
        kind = rng.choice(["keep", "drop", "change", "lose"])
        if kind == "keep":
            captions = {name: "x" for name in ("alt", "synthetic") if rng.random() < 0.7}
            labels = {name: rng.choice("abc") for name in ("l", "m") if rng.random() < 0.7}
            values = np.full((2, 3), rng.randint(0, 255), rng.choice([np.uint8, np.uint16]))
            maps = {"mask": MapCount.of(values, f"k{i}")} if rng.random() < 0.5 else {}
            events.append((kind, captions, labels, (rng.randint(1, 9000), rng.randint(1, 9000)), maps))
            events.append(("declare", "l", rng.choice([["c", "a"], ["c", "a", "d"]])))
        elif kind == "lose":
            events.append((kind, rng.choice("ab"), rng.randint(0, 5), rng.randint(0, 999), rng.choice([None, f"k{i}"])))
        else:
            events.append((kind, rng.choice("ab"), f"k{i}"))
    return events


def test_books_when_of_parts_then_add_up_to_those_of_the_whole():
    rng = random.Random(0)
    events = random_events(rng, 300)
    whole, total = build_stats(events), DatasetStats()
    for start in range(0, len(events), 70):
        part = build_stats(events[start : start + 70])
        total.add(DatasetStats.from_tree(json.loads(json.dumps(part.to_tree()))))
    assert total.to_tree() == whole.to_tree()
    counts = [event[0] for event in events]
    lost = sum(event[2] for event in events if event[0] == "lose")
    assert whole.samples == counts.count("keep") + counts.count("drop") + lost
    assert sum(whole.histograms[SIDE].counts) == sum(whole.histograms[ASPECT].counts) == counts.count("keep")


def test_dropped_keys_first_ten_and_cut():
    """Of many dropped samples, the statistics have the first ten keys, and long keys are cut."""
    stats = build_stats([("drop", "why", f"k{i}" if i else "x" * 10**5) for i in range(50)])
    assert stats.drops["why"].count == 50
    assert len(stats.drops["why"].keys) == FIRST_KEYS and stats.drops["why"].keys[1:3] == ("k1", "k2")
    assert len(stats.drops["why"].keys[0]) == 200
    assert build_stats([("lose", "torn", 3, 10, None), ("lose", "torn", 0, 5, "a")]).lost == {
        "torn": LostInput(3, 15, ("a",))
    }
    assert SampleCount(1, ("a",)).plus(1, ("b",)) == SampleCount(2, ("a", "b"))


@pytest.mark.parametrize(
    ("size", "side", "aspect"),
    [
        ((1, 1), 0, 1),
        ((32, 640), 32, 1 / 20),
        ((512, 512), 512, 1),
        ((640, 480), 384, 4 / 3),
        ((90_000, 9_000), 3072, 10),
        ((10**5, 1), 0, 10**5),
    ],
)
def test_histogram_bin_of_image(size, side, aspect):
    """An image that is not dropped is counted in the histogram bin of its size."""
    histograms = build_stats([("keep", {}, {}, size)]).histograms
    for histogram, value in ((histograms[SIDE], side), (histograms[ASPECT], aspect)):
        index = histogram.counts.index(1)
        assert sum(histogram.counts) == 1
        low = 0 if index == 0 else histogram.edges[index]
        assert low <= value
        assert index == len(histogram.counts) - 1 or value < histogram.edges[index + 1]


def test_histogram_when_its_counts_do_not_fit_then_refused():
    with pytest.raises(ValueError, match="2 counts between 2 edges"):
        Histogram((1.0, 2.0), (1, 2))
