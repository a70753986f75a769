"""Mixture sampler: exact counts, even spread, whole epochs, replacements; functions of (seed, example number)."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2_jax.config.schema import BatchShape
from aimv2_jax.data.sampling.counter_rng import example_rng
from aimv2_jax.data.sampling.mixture import MAX_ATTEMPTS, Draw, MixtureSampler, interleave
from aimv2_jax.data.sampling.schedule import BatchSchedule

SIZES = {"dfn": 11, "coyo": 5, "hqitp": 3}
COUNTS = {"dfn": {"alt": 30, "synthetic": 30}, "coyo": {"alt": 9}, "hqitp": {"alt": 28, "synthetic": 3}}


def make_sampler(seed=3, sizes=SIZES, counts=COUNTS):
    return MixtureSampler(seed, BatchSchedule(seed, [BatchShape(8, 4)]), sizes, counts)


def drawn(sampler, examples):
    return [sampler.draw(example) for example in examples]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any))
def test_deal_when_any_counts_then_exact_and_within_one_of_the_share_at_every_slot(counts):
    order = interleave(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    so_far = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    share = np.arange(1, len(order) + 1)[:, None] * np.array(counts) / len(order)
    assert np.abs(so_far - share).max() < 1


def test_interleave_one_large_many_small():
    """Many small sources beside a large one are spread out and do not come together."""
    order = interleave([100] + [1] * 100)
    assert (np.diff(np.flatnonzero(order == 0)) <= 3).all()


def test_mixture_when_k_cycles_have_passed_then_counts_are_k_times_the_weights():
    sampler = make_sampler()
    counts = collections.Counter((d.source, d.kind) for d in drawn(sampler, range(7 * 100)))
    assert counts == {(name, kind): 7 * n for name, kinds in COUNTS.items() for kind, n in kinds.items()}


def test_mixture_when_any_window_then_each_source_is_within_2_of_its_share():
    sampler = make_sampler()
    names = np.array([draw.source for draw in drawn(sampler, range(300))])
    for name, kinds in COUNTS.items():
        so_far = np.concatenate([[0], np.cumsum(names == name)])
        for length in range(1, 300):
            inside = so_far[length:] - so_far[:-length]
            assert np.abs(inside - length * sum(kinds.values()) / 100).max() < 2


def test_draws_number_each_kind_of_a_source_without_gap():
    draws = drawn(make_sampler(), range(250))
    for name, kinds in COUNTS.items():
        for kind in kinds:
            numbers = [draw.number for draw in draws if (draw.source, draw.kind) == (name, kind)]
            assert numbers == list(range(len(numbers)))


def test_epochs_when_steps_have_passed_then_draws_over_size_and_exact_far_away():
    sampler = make_sampler()
    for steps in (0, 1, 7, 25, 31):
        counts = collections.Counter(draw.source for draw in drawn(sampler, range(8 * steps)))
        assert sampler.epochs(steps) == {name: counts[name] / size for name, size in SIZES.items()}
    far = make_sampler().epochs(25 * 10**9)  # 2e11 examples.
    assert far == {"dfn": 60 * 2 * 10**9 / 11, "coyo": 9 * 2 * 10**9 / 5, "hqitp": 31 * 2 * 10**9 / 3}


weights = st.dictionaries(
    st.sampled_from("abcdef"), st.dictionaries(st.sampled_from(("alt", "synthetic")), st.integers(1, 40), min_size=1),
    min_size=1,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(0, 10**12), st.integers(1, 4))
def test_mixture_cycles_and_windows_any_weights(counts, start, cycles):
    """For any weights, cycles are exact and every window is within 2 of each source's share."""
    sampler = make_sampler(sizes=dict.fromkeys(counts, 7), counts=counts)
    length = sum(sum(kinds.values()) for kinds in counts.values())
    draws = drawn(sampler, range(start, start + cycles * length))
    wanted = {(name, kind): cycles * n for name, kinds in counts.items() for kind, n in kinds.items()}
    assert collections.Counter((draw.source, draw.kind) for draw in draws) == wanted
    for name, kinds in counts.items():
        so_far = np.concatenate([[0], np.cumsum([draw.source == name for draw in draws])])
        # Drawn minus expected counts: its range bounds the error of every window.
        ahead = so_far - np.arange(len(so_far)) * sum(kinds.values()) / length
        assert ahead.max() - ahead.min() < 2


def test_draw_of_far_example():
    """The draw of an example far away is the same as if all draws before it had been counted."""
    sampler, far = make_sampler(), 10**13
    for example in range(100):
        name, number, kind = sampler.draw(example)
        assert sampler.draw(100 * far + example) == (name, number + far * COUNTS[name][kind], kind)


def test_plan_when_the_config_lists_sources_in_another_order_then_the_same():
    reordered = make_sampler(counts={name: dict(reversed(COUNTS[name].items())) for name in reversed(COUNTS)})
    assert drawn(reordered, range(200)) == drawn(make_sampler(), range(200))


def test_pass_over_a_kind_draws_every_record_once_in_a_new_order():
    sampler = make_sampler()
    orders = collections.defaultdict(list)
    for draw in drawn(sampler, range(800)):
        orders[draw.source, draw.kind].append(next(sampler.records(draw)))
    assert len(orders) == 5
    for (name, _), order in orders.items():
        size = SIZES[name]
        passes = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        assert len(passes) > 6
        assert all(sorted(order) == list(range(size)) for order in passes)
        assert len({tuple(order) for order in passes}) > 3


def test_passes_over_two_kinds_of_a_source_are_in_different_orders():
    sampler = make_sampler(sizes=SIZES | {"dfn": 500})
    orders = [[next(sampler.records(Draw("dfn", n, kind))) for n in range(500)] for kind in ("alt", "synthetic")]
    assert sum(a == b for a, b in zip(*orders)) < 10


def captions_by_pass(sampler, count, passes, size=11):
    """{record: caption index in each pass over the synthetic captions of dfn}, for records with `count` captions."""
    shown = collections.defaultdict(list)
    for number in range(passes * size):
        draw = Draw("dfn", number, "synthetic")
        record = next(sampler.records(draw))
        shown[record].append(sampler.caption(draw, record, count))
    return shown


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_captions_of_a_record_come_once_each_in_as_many_passes(count):
    for shown in captions_by_pass(make_sampler(), count, 2 * count).values():
        assert sorted(shown[:count]) == list(range(count)) and shown[:count] == shown[count:]


def test_captions_in_one_pass_are_uniform_over_the_records():
    size, count = 3000, 3
    shown = captions_by_pass(make_sampler(sizes=SIZES | {"dfn": size}), count, 1, size)
    times = np.bincount([first for [first] in shown.values()], minlength=count)
    assert np.abs(times - size / count).max() < 4 * np.sqrt(size * 2 / 9)  # The tolerance is four standard deviations.


def test_caption_depends_on_seed_record_and_kind_only():
    first = [make_sampler().caption(Draw("dfn", 0, "synthetic"), record, 1000) for record in range(11)]
    assert first == [make_sampler().caption(Draw("dfn", 10, "synthetic"), record, 1000) for record in range(11)]
    assert first != [make_sampler(seed=4).caption(Draw("dfn", 0, "synthetic"), record, 1000) for record in range(11)]
    assert first != [make_sampler().caption(Draw("dfn", 0, "alt"), record, 1000) for record in range(11)]


def test_records_order_differs_between_sources():
    """Two sources with the same images go through their records in different orders."""
    sampler = make_sampler(sizes={"dfn": 500, "coyo": 500, "hqitp": 500})
    orders = [[next(sampler.records(Draw(name, n, "alt"))) for n in range(500)] for name in SIZES]
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other)) < 10


def test_order_when_the_seed_differs_then_another():
    orders = [[next(make_sampler(seed).records(Draw("dfn", n, "alt"))) for n in range(11)] for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_records_source_of_2_to_the_32():
    """In a source of 2**32 records, the last position has a record and a new epoch follows it."""
    sampler = make_sampler(sizes=SIZES | {"dfn": 2**32})
    last, first = Draw("dfn", 2**32 - 1, "alt"), Draw("dfn", 2**32, "alt")
    assert 0 <= next(sampler.records(last)) < 2**32
    assert next(sampler.records(first)) != next(sampler.records(Draw("dfn", 0, "alt")))


def test_records_when_a_source_is_huge_then_indices_span_it():
    sampler = make_sampler(sizes=SIZES | {"dfn": 2**32})
    indices = [next(sampler.records(Draw("dfn", n, "alt"))) for n in range(2**32, 2**32 + 2000)]
    assert len(set(indices)) == 2000
    assert 0 <= min(indices) < 2**27 and 31 * 2**27 < max(indices) < 2**32


@pytest.mark.parametrize("size", [1, 2, 11, 1000])
def test_replacements_when_listed_then_all_different_bounded_and_repeatable(size):
    sampler = make_sampler(sizes=SIZES | {"dfn": size})
    firsts = collections.Counter()
    for number in range(50):
        records = list(sampler.records(Draw("dfn", number, "alt")))
        assert len(records) == len(set(records)) == min(size, MAX_ATTEMPTS)
        assert all(0 <= record < size for record in records)
        assert records == list(sampler.records(Draw("dfn", number, "alt")))
        firsts.update(records[1:2])
    assert len(firsts) >= min(size - 1, 9)


def test_first_example_when_far_then_exact():
    assert make_sampler().schedule.first_example(10**12) == 8 * 10**12


def test_plan_when_nothing_was_meant_to_change_then_the_same_examples_as_ever():
    """A change here changes which images every existing run sees after a resume."""
    sampler = make_sampler(sizes=SIZES | {"dfn": 1_901_228_573})
    got = [
        (d.source, d.number, d.kind, list(sampler.records(d))[:3]) for d in drawn(sampler, [0, 1, 2, 3, 12_345_678_901])
    ]
    assert got == PINNED
    assert example_rng(3, "crop", 12_345_678_901).random(2).tolist() == PINNED_RANDOM


PINNED = [
    ("dfn", 0, "alt", [543057722, 1826763534, 584615320]),
    ("dfn", 0, "synthetic", [939737613, 618332945, 968777242]),
    ("hqitp", 0, "alt", [1, 2, 0]),
    ("dfn", 1, "alt", [1852515928, 1111443102, 310856222]),
    ("dfn", 3703703670, "synthetic", [294869922, 589264503, 684933319]),
]
PINNED_RANDOM = [0.854931919664166, 0.2603456833402905]
