"""Reading ahead: the same fetches in the same order, many at a time, within bounds; a slow disk slows no host."""

import collections
import pickle
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from slow_reads import SlowSource, journal_lines

from aimv2_jax.data import pipeline, readahead
from aimv2_jax.data.readahead import ReadAhead

# Tests with worker processes run one after another: several at a time would starve those that watch the clock.
pytestmark = pytest.mark.xdist_group("shared-memory")


class Fetch:
    """Says what was done with it; those of batch 3 fail."""

    size = 10

    def __init__(self, log, batch, place):
        self.log, self.batch, self.place, self.thread = log, batch, place, None

    def advance(self):
        self.thread = threading.current_thread()
        self.log.append((self.batch, self.place))
        if self.batch == 3:
            raise KeyError(self.place)


def fetches_of(log, count=4):
    return lambda batch: [Fetch(log, batch, place) for place in range(count)]


def taken(reads, batch, fetches):
    return [(fetch.batch, fetch.place) for fetch in reads(batch, fetches)]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("stride", [None, 1, 2])
def test_fetches_when_taken_then_those_of_the_batch_in_order_each_made_once(threads, stride):
    log = []
    reads, fetches = ReadAhead(threads, stride), fetches_of(log)
    for batch in (4, 6, 8, 5, 5):
        assert taken(reads, batch, fetches) == [(batch, place) for place in range(4)]
    if threads == 0 or stride is None:
        assert log.count((5, 0)) == 2 and len(log) == 20
    elif stride == 2:
        known = [(batch, place) for batch in (4, 6, 8) for place in range(4)]
        assert all(log.count(fetch) == 1 for fetch in known)
        # When one begins, each other thread may have taken an earlier one that has not begun yet.
        assert all(log.index(fetch) > index - threads for index, fetch in enumerate(known))


def test_fetches_when_the_next_batch_is_known_then_started_while_this_one_is_taken():
    log = []
    window = iter(ReadAhead(threads=2, stride=2)(4, fetches_of(log)))
    next(window)
    wait_until(lambda: len(log) == 5)  # One was taken, and two a thread are under way or ready.
    assert sorted(log) == [(4, 0), (4, 1), (4, 2), (4, 3), (6, 0)]


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_fetches_when_what_waits_is_large_then_few_wait(monkeypatch):
    monkeypatch.setattr(readahead, "MAX_WAITING_BYTES", 30)  # Three fetches.
    log = []
    for count, _ in enumerate(ReadAhead(threads=8, stride=1)(0, fetches_of(log, 50)), start=1):
        time.sleep(0.002)
        assert len(log) <= count + 4  # Three wait, and one is taken.
    assert count == 50


def test_fetches_when_they_are_larger_than_expected_then_fewer_wait(monkeypatch):
    monkeypatch.setattr(readahead, "MAX_WAITING_BYTES", 30)
    log = []

    class Growing(Fetch):
        def advance(self):
            super().advance()
            self.size = 1000

    window = iter(ReadAhead(threads=1, stride=1)(0, lambda batch: [Growing(log, batch, place) for place in range(9)]))
    for taken_so_far in range(1, 9):
        next(window)
        time.sleep(0.01)
        # Those that were under way before it was known how large they are, and then one at a time.
        assert len(log) <= max(4, taken_so_far + 1)


def test_error_when_a_fetch_fails_then_raised_in_its_turn_and_the_next_batch_is_whole():
    reads, fetches = ReadAhead(threads=3, stride=1), fetches_of([])
    assert taken(reads, 2, fetches) == [(2, place) for place in range(4)]
    with pytest.raises(KeyError, match="0"):
        taken(reads, 3, fetches)
    assert taken(reads, 4, fetches) == [(4, place) for place in range(4)]


def test_read_ahead_when_pickled_then_without_its_threads():
    reads, fetches = ReadAhead(threads=2, stride=1), fetches_of([])
    taken(reads, 0, fetches)
    assert taken(pickle.loads(pickle.dumps(reads)), 1, fetches) == [(1, place) for place in range(4)]


def test_read_ahead_when_forgotten_then_its_threads_end():
    reads = ReadAhead(threads=2, stride=1)
    threads = {fetch.thread for fetch in reads(0, fetches_of([], 20))}
    assert threads and threading.current_thread() not in threads
    del reads
    wait_until(lambda: not any(thread.is_alive() for thread in threads))


@pytest.fixture
def slow_sources(monkeypatch, tmp_path):
    """Every source of a pipeline takes `delay_s` a read; the journal of the reads."""

    def slow_down(delay_s) -> Path:
        journal = tmp_path / "journal"
        monkeypatch.setattr(pipeline, "Source", partial(SlowSource, delay_s=delay_s, journal=journal))
        return journal

    return slow_down


def test_rate_when_every_read_takes_50_ms_then_two_workers_give_500_records_a_second(make_config, slow_sources):
    slow_sources(0.05)
    config = make_config(data__workers=2, data__batch_size=32)
    with pipeline.training_batches(config, range, 0) as batches:
        for _ in range(6):  # What the workers had ready when they were asked first.
            next(batches)
        start = time.monotonic()
        for _ in range(40):
            next(batches)
        assert 40 * 32 / (time.monotonic() - start) > 500


def test_rate_when_the_trainer_reads_itself_then_reads_go_on_side_by_side_too(make_config, slow_sources):
    journal = slow_sources(0.05)
    config = make_config(data__workers=0, data__batch_size=32)
    with pipeline.training_batches(config, range, 0) as batches:
        for _ in range(10):
            next(batches)
    assert max(count for *_, count in journal_lines(journal)) > 16


def test_replacements_when_captions_are_missing_then_read_in_the_threads_too(make_config, make_dataset, slow_sources):
    """Half of the records lack the caption: were they replaced one after another, this would take over 6 seconds."""
    slow_sources(0.05)
    silent = {i: {"captions": {"alt": "a"}} for i in range(0, 40, 2)}
    sources = {"red": make_dataset("red", 40, silent)}
    config = make_config(sources, {"red": {"synthetic": 1.0}}, data__workers=1, data__batch_size=32)
    with pipeline.training_batches(config, range, 0) as batches:
        next(batches)
        start = time.monotonic()
        faults = sum(len(next(batches).faults) for _ in range(8))
        assert faults > 100 and time.monotonic() - start < 3


@pytest.mark.parametrize("start", [0, 10**6])
def test_reads_when_batches_come_from_workers_then_each_record_once_and_none_of_other_steps(
    make_config, slow_sources, start
):
    journal = slow_sources(0)
    config = make_config(data__workers=2)
    with pipeline.training_batches(config, range, start) as batches:
        for _ in range(5):
            next(batches)
        read = collections.Counter((name, index) for _, name, index, _ in journal_lines(journal))
    # Five batches taken, three finished ones, four of each worker (two ready, one on its way, one being built), and two
    # records a thread of each.
    most = 8 * (5 + 3 + 2 * 4) + 2 * 2 * config.data.read_threads
    plan = pipeline.training_plan(config, pipeline.open_sources(config.data.sources))
    draws = [plan.draw(8 * start + example) for example in range(2 * most)]
    wanted = [(draw.source, next(plan.records(draw))) for draw in draws]
    assert collections.Counter(wanted[:40]) <= read <= collections.Counter(wanted)
    assert read.total() <= most


@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize(
    ("slow", "last_here"), [([], (8, 3)), ([(6, 1)], (8, 3)), ([(6, i) for i in range(4)] + [(7, 0)], (6, 3))]
)
def test_fetches_when_they_are_quick_then_made_where_they_are_taken_until_four_are_slow(
    monkeypatch, stride, slow, last_here
):
    log, now = [], [0.0]
    monkeypatch.setattr(readahead.time, "perf_counter", lambda: now[0])

    class Sometimes(Fetch):
        def advance(self):
            super().advance()
            now[0] += 0.05 if (self.batch, self.place) in slow else 0.0001

    reads = ReadAhead(threads=3, stride=stride, quick_s=0.0005)
    threads = {}
    for batch in range(4, 9):
        for fetch in reads(batch, lambda batch: [Sometimes(log, batch, place) for place in range(4)]):
            threads[fetch.batch, fetch.place] = fetch.thread
    assert list(threads) == [(batch, place) for batch in range(4, 9) for place in range(4)]
    here = [place for place, thread in threads.items() if thread is threading.current_thread()]
    assert here == [place for place in threads if place <= last_here]
    assert all(log.count(place) == 1 for place in threads)
