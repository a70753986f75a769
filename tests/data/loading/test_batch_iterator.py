"""Workers that die or stall: reported with their record, and the batches stay the same."""

import dataclasses
import itertools
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from aimv2_jax.data.loading import worker_status, workers
from aimv2_jax.data.loading.batch_builder import LocalBatch
from aimv2_jax.data.loading.batch_iterator import BatchIterator, HostBatch
from aimv2_jax.data.pipeline import open_sources, training_batches, training_sampler
from aimv2_jax.errors import UserError

# Tests with worker processes run serially: in parallel they would starve the tests that measure time.
pytestmark = pytest.mark.xdist_group("data workers")


@dataclasses.dataclass(frozen=True)
class Fails:
    """Builds batches; batch 3 kills its worker, or hangs, once for every file in a folder."""

    folder: Path
    stalls: bool = False

    def __call__(self, step, status):
        status.update(worker_status.Activity.BUILDS, "nothing", step)
        files = list(self.folder.iterdir()) if step == 3 else []
        if files:
            files[0].unlink()
            time.sleep(0.3)  # Waits until the earlier batches are transferred.
            time.sleep(60) if self.stalls else os.kill(os.getpid(), signal.SIGKILL)
        return LocalBatch(step, {"x": np.full(3, step)}, [], [])


def as_host_batch(batch):
    return HostBatch(batch.step, batch.arrays, batch.faults)


def failing(folder, times, **options):
    for number in range(times):
        (folder / str(number)).touch()
    stalls = options.pop("stalls", False)
    return BatchIterator(Fails(folder, stalls), range(1, 20), as_host_batch, workers=1, prefetch=1, **options)


def test_worker_when_it_dies_twice_over_a_batch_then_named_and_an_error_in_its_turn(tmp_path, capfd):
    failures = []
    with failing(tmp_path, 3, on_restart=failures.append) as batches:
        assert [next(batches).step, next(batches).step] == [1, 2]
        with pytest.raises(
            UserError, match=r"died twice over the same batch: .*worker 0 of 1 .* exit code -9 .*batch 3"
        ):
            next(batches)
    [failure] = failures
    assert (failure.number, failure.worker, failure.what) == (3, 0, "died with exit code -9")
    assert failure.pid > 0 and failure.at.startswith("builds step 3 from nothing, for ")
    assert f"{failure}; restarting the workers from that batch" in capfd.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_worker_when_it_stalls_twice_over_a_batch_then_its_stacks_are_written_and_it_is_left_to_who_waits(
    tmp_path, capfd
):
    failures = []
    batches = failing(tmp_path, 2, stalls=True, stall_s=1.0, on_restart=failures.append)
    try:
        assert [next(batches).step, next(batches).step] == [1, 2]
        deadline_s = time.monotonic() + 30
        while not failures or list(tmp_path.iterdir()):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        time.sleep(2.5)
        assert len(workers.live_worker_pids()) == 1  # The worker was not ended a second time.
        [failure] = failures
        assert (failure.number, failure.worker, failure.what) == (3, 0, "has stalled for 1 s")
        assert batches.depth == 0 and batches.last_read().startswith("data worker 0 (process ")
        stacks = capfd.readouterr().err.split(f"--- stacks of data worker {failure.pid}:\n")[1]
        assert Path(__file__).name in stacks and "in __call__" in stacks and str(failure) in stacks
    finally:
        for pid in workers.live_worker_pids():
            os.kill(pid, signal.SIGKILL)
        batches.close()


class Unpicklable(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, what, value):
        super().__init__(what)


@dataclasses.dataclass(frozen=True)
class Raises:
    unpicklable: bool

    def __call__(self, step, status):
        raise Unpicklable("broken", 3) if self.unpicklable else KeyError("broken")


@pytest.mark.parametrize(("unpicklable", "raised"), [(False, KeyError), (True, RuntimeError)])
def test_error_when_a_worker_builds(unpicklable, raised):
    """The trainer raises the worker's error with its traceback; one that cannot be sent becomes a RuntimeError."""
    with (
        BatchIterator(Raises(unpicklable), range(3), as_host_batch, workers=1, prefetch=1) as batches,
        pytest.raises(raised, match="broken") as error,
    ):
        next(batches)
    assert Path(__file__).name in "".join([str(error.value), *getattr(error.value, "__notes__", [])])


@pytest.fixture
def hung_disk(make_config, datasets, tmp_path):
    """A config, and its open sources, of which one has an unreadable shard: a named pipe without a writer."""
    folder = tmp_path / "red"
    shutil.copytree(datasets["red"], folder)
    sources = {"red": str(folder), "blue": datasets["blue"]}
    config = make_config(sources=sources, data__workers=1, data__prefetch=1)
    opened = open_sources(config).training
    shard = folder / opened["red"].info.shards[1].file
    shard.rename(tmp_path / "kept")
    os.mkfifo(shard)

    def repair():
        shard.unlink(missing_ok=True)
        (tmp_path / "kept").rename(shard)

    return config, opened, shard, repair


def test_worker_when_the_disk_hangs_then_record_and_shard_are_named_and_the_examples_are_the_same(
    hung_disk, make_config
):
    config, sources, shard, repair = hung_disk
    failures = []

    def restart(failure):
        failures.append(failure)
        assert f"({shard.name})" in batches.last_read()
        repair()

    with training_batches(config, range, 0, stall_s=1.0, on_restart=restart, sources=sources) as batches:
        restarted = list(itertools.islice(batches, 4))
    [failure] = failures
    words = failure.at.split()
    assert words[:2] == ["reads", "record"] and shard.name in failure.at
    assert sources["red"].describe(int(words[2])) in failure.at
    sampler = training_sampler(config, sources)
    examples = range(sampler.schedule.first_example(failure.number), sampler.schedule.first_example(failure.number) + 8)
    assert int(words[2]) in [
        next(sampler.records(draw)) for draw in map(sampler.draw, examples) if draw.source == "red"
    ]
    with training_batches(make_config(), range, 0) as undisturbed:
        for one, other in zip(restarted, undisturbed):
            for name, array in one.arrays.items():
                np.testing.assert_array_equal(array, other.arrays[name], err_msg=name, strict=True)
        assert undisturbed.last_read().startswith("threads of the trainer: ")


def test_notes_when_many_threads_make_them_then_those_under_way_come_first_and_the_oldest_places_go():
    import threading

    status = worker_status.WorkerStatus()
    assert status.describe() == "has read nothing yet"

    def read(number):
        status.update(worker_status.Activity.READS, f"record {number}")
        if number != 7:
            status.update(worker_status.Activity.HAS_READ, f"record {number}")

    for number in range(100):
        thread = threading.Thread(target=read, args=(number,))
        thread.start()
        thread.join()
        if number == 20:
            assert status.describe().startswith("reads record 7, for 0.") and len(status.read()) == 21
    assert len(status.read()) == worker_status._MAX_THREADS
    status.update(worker_status.Activity.BUILDS, "ä" * 200, 12)
    assert status.describe().startswith("builds step 12 from ää")
