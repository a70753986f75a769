"""Read-ahead: the same fetches in the same order, concurrent and bounded; a slow disk does not slow a host."""

import collections
import pickle
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from aimv2_jax.data import pipeline, sources
from aimv2_jax.data.loading import read_ahead
from aimv2_jax.data.loading.read_ahead import ReadAhead
from tests.helpers.slow_reads import SlowSource, journal_lines

# Tests with worker processes run serially: in parallel they would starve the tests that measure time.
pytestmark = pytest.mark.xdist_group("data workers")


class Fetch:
    """Logs its fetches; those of batch 3 fail."""

    size = 10

    def __init__(self, log, batch, index):
        self.log, self.batch, self.index, self.thread = log, batch, index, None

    def advance(self):
        self.thread = threading.current_thread()
        self.log.append((self.batch, self.index))
        if self.batch == 3:
            raise KeyError(self.index)


def fetches_of(log, count=4):
    return lambda batch: [Fetch(log, batch, index) for index in range(count)]


def taken(reads, batch, fetches):
    return [(fetch.batch, fetch.index) for fetch in reads(batch, fetches)]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("stride", [None, 1, 2])
def test_fetches_when_taken_then_those_of_the_batch_in_order_each_made_once(threads, stride):
    log = []
    reads, fetches = ReadAhead(threads, stride), fetches_of(log)
    for batch in (4, 6, 8, 5, 5):
        assert taken(reads, batch, fetches) == [(batch, index) for index in range(4)]
    if threads == 0 or stride is None:
        assert log.count((5, 0)) == 2 and len(log) == 20
    elif stride == 2:
        known = [(batch, index) for batch in (4, 6, 8) for index in range(4)]
        assert all(log.count(fetch) == 1 for fetch in known)
        # When a fetch starts, every other thread may hold an earlier one that has not started yet.
        assert all(log.index(fetch) > index - threads for index, fetch in enumerate(known))


def test_fetches_when_the_next_batch_is_known_then_started_while_this_one_is_taken():
    log = []
    window = iter(ReadAhead(threads=2, stride=2)(4, fetches_of(log)))
    next(window)
    wait_until(lambda: len(log) == 5)  # One was taken, and two per thread are in flight or ready.
    assert sorted(log) == [(4, 0), (4, 1), (4, 2), (4, 3), (6, 0)]


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_fetches_when_what_waits_is_large_then_few_wait(monkeypatch):
    monkeypatch.setattr(read_ahead, "MAX_WAITING_BYTES", 30)  # Three fetches.
    log = []
    for count, _ in enumerate(ReadAhead(threads=8, stride=1)(0, fetches_of(log, 50)), start=1):
        time.sleep(0.002)
        assert len(log) <= count + 4  # Three are waiting and one is taken.
    assert count == 50


def test_fetches_when_they_are_larger_than_expected_then_fewer_wait(monkeypatch):
    monkeypatch.setattr(read_ahead, "MAX_WAITING_BYTES", 30)
    log = []

    class Growing(Fetch):
        def advance(self):
            super().advance()
            self.size = 1000

    window = iter(ReadAhead(threads=1, stride=1)(0, lambda batch: [Growing(log, batch, index) for index in range(9)]))
    for taken_so_far in range(1, 9):
        next(window)
        time.sleep(0.01)
        # The fetches in flight before their size was known, then one at a time.
        assert len(log) <= max(4, taken_so_far + 1)


def test_error_when_a_fetch_fails_then_raised_in_its_turn_and_the_next_batch_is_whole():
    reads, fetches = ReadAhead(threads=3, stride=1), fetches_of([])
    assert taken(reads, 2, fetches) == [(2, index) for index in range(4)]
    with pytest.raises(KeyError, match="0"):
        taken(reads, 3, fetches)
    assert taken(reads, 4, fetches) == [(4, index) for index in range(4)]


def test_read_ahead_when_pickled_then_without_its_threads():
    reads, fetches = ReadAhead(threads=2, stride=1), fetches_of([])
    taken(reads, 0, fetches)
    assert taken(pickle.loads(pickle.dumps(reads)), 1, fetches) == [(1, index) for index in range(4)]


def test_read_ahead_when_forgotten_then_its_threads_end():
    reads = ReadAhead(threads=2, stride=1)
    threads = {fetch.thread for fetch in reads(0, fetches_of([], 20))}
    assert threads and threading.current_thread() not in threads
    del reads
    wait_until(lambda: not any(thread.is_alive() for thread in threads))


@pytest.fixture
def slow_sources(monkeypatch, tmp_path):
    """Delays every read of a pipeline by `delay_s`; returns the journal of the reads."""

    def slow_down(delay_s) -> Path:
        journal = tmp_path / "journal"
        monkeypatch.setattr(sources, "Source", partial(SlowSource, delay_s=delay_s, journal=journal))
        return journal

    return slow_down


def test_rate_when_every_read_takes_50_ms_then_two_workers_give_500_records_a_second(make_config, slow_sources):
    slow_sources(0.05)
    config = make_config(data__workers=2, data__batch_size=32)
    with pipeline.training_batches(config, range, 0) as batches:
        for _ in range(6):  # Batches that the workers had prefetched.
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
    """Half of the records lack the caption: replacing them serially would take over 6 seconds."""
    slow_sources(0.05)
    silent = {i: {"captions": {"alt": "a"}} for i in range(0, 40, 2)}
    red = make_dataset("red", 40, silent)
    config = make_config({"red": red}, {"red": {"synthetic": 1.0}}, data__workers=1, data__batch_size=32)
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
    # Five batches taken, three finished ones, three per worker (two ready, one being built), and two records per read
    # thread.
    limit = 8 * (5 + 3 + 2 * 3) + 2 * 2 * config.data.read_threads
    sampler = pipeline.training_sampler(config, pipeline.open_sources(config).training)
    draws = [sampler.draw(8 * start + example) for example in range(2 * limit)]
    wanted = [(draw.source, next(sampler.records(draw))) for draw in draws]
    assert collections.Counter(wanted[:40]) <= read <= collections.Counter(wanted)
    assert read.total() <= limit


@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize(
    ("slow", "last_here"), [([], (8, 3)), ([(6, 1)], (8, 3)), ([(6, i) for i in range(4)] + [(7, 0)], (6, 3))]
)
def test_fetches_when_they_are_quick_then_made_where_they_are_taken_until_four_are_slow(
    monkeypatch, stride, slow, last_here
):
    log, now = [], [0.0]
    monkeypatch.setattr(read_ahead.time, "perf_counter", lambda: now[0])

    class Sometimes(Fetch):
        def advance(self):
            super().advance()
            now[0] += 0.05 if (self.batch, self.index) in slow else 0.0001

    reads = ReadAhead(threads=3, stride=stride, quick_s=0.0005)
    threads = {}
    for batch in range(4, 9):
        for fetch in reads(batch, lambda batch: [Sometimes(log, batch, index) for index in range(4)]):
            threads[fetch.batch, fetch.index] = fetch.thread
    assert list(threads) == [(batch, index) for batch in range(4, 9) for index in range(4)]
    here = [index for index, thread in threads.items() if thread is threading.current_thread()]
    assert here == [index for index in threads if index <= last_here]
    assert all(log.count(index) == 1 for index in threads)


def test_fetches_of_much_cpu_work_start_no_threads(monkeypatch):
    """A fetch that computes for long, and waits for nothing, gains nothing from a thread."""
    now = [0.0]

    class Computes(Fetch):
        def advance(self):
            super().advance()
            now[0] += 0.05

    monkeypatch.setattr(read_ahead.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(read_ahead.time, "thread_time", lambda: now[0])
    reads = ReadAhead(threads=3, quick_s=0.0005)
    threads = {fetch.thread for fetch in reads(0, lambda batch: [Computes([], batch, index) for index in range(20)])}
    assert threads == {threading.current_thread()}
