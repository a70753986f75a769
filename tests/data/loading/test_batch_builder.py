"""Rows of a batch in one process: exact transforms of exact records, and replacement of unusable ones."""

import collections
import time

import numpy as np
import pytest

from aimv2_jax.config.schema import BatchShape, mixture_counts
from aimv2_jax.data.loading.batch_builder import (
    BadExample,
    EvaluationBatches,
    TrainingBatches,
)
from aimv2_jax.data.records import REASONS, decode
from aimv2_jax.data.sampling.counter_rng import example_rng
from aimv2_jax.data.sampling.mixture import MixtureSampler
from aimv2_jax.data.sampling.schedule import BatchSchedule
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms import geometry
from aimv2_jax.data.transforms.captions import clean
from aimv2_jax.data.transforms.decode import decode_image
from aimv2_jax.data.transforms.views import RandomCrop, View
from aimv2_jax.errors import TrainingAborted

MIXTURE = {"red": {"alt": 0.5}, "blue": {"synthetic": 0.5}}


def training(paths, mixture=MIXTURE, rows=range(8), seed=0, flip=0.5):
    sources = {name: Source(name, path) for name, path in paths.items()}
    sizes = {name: len(source) for name, source in sources.items()}
    sampler = MixtureSampler(seed, BatchSchedule(seed, [BatchShape(8, 4)]), sizes, mixture_counts(mixture))
    crop = RandomCrop(seed, 28, (0.4, 1.0), (3 / 4, 4 / 3), flip)
    return TrainingBatches(sampler, sources, {8: tuple(rows)}, {4: crop}, 14)


def evaluation(paths, counts, rows=range(8), kind="alt"):
    sources = {name: Source(name, path) for name, path in paths.items()}
    view = View(28)
    return EvaluationBatches(sources, tuple(counts.items()), kind, 8, tuple(rows), lambda size: view, 4, 14)


def test_training_batch_when_built_then_each_row_is_its_examples_record_crop_and_flip(datasets):
    build = training(datasets)
    batch = build(5)
    assert batch.step == 5 and batch.faults == [] and batch.arrays["valid"].all()
    flips = 0
    for row, example in enumerate(range(40, 48)):
        draw = build.sampler.draw(example)
        record = decode(build.sources[draw.source].read(next(build.sampler.records(draw))))
        image = decode_image(record.image)
        box = geometry.crop_box(example_rng(0, "crop", example), *image.size, (0.4, 1.0), (3 / 4, 4 / 3))
        pixels = geometry.resize(image, box, 28)
        if example_rng(0, "flip", example).random() < 0.5:
            pixels, flips = pixels[:, ::-1], flips + 1
        np.testing.assert_array_equal(batch.arrays["patches"][row], geometry.patchify(pixels, 14))
        assert batch.captions[row] == clean(record.captions[draw.kind]).encode()
        assert batch.arrays["source"][row] == ["red", "blue"].index(draw.source)
        assert batch.arrays["example_index"][row].tolist() == [0, example]
    assert 0 < flips < 8
    assert batch.arrays["coords"][3].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_training_batch_when_far_away_then_the_example_number_is_in_two_words(datasets):
    batch = training(datasets, rows=[6])(10**11)
    assert batch.arrays["example_index"].tolist() == [[(8 * 10**11 + 6) >> 32, (8 * 10**11 + 6) & 0xFFFFFFFF]]


def test_training_batch_when_rows_are_some_in_any_order_then_those_of_the_whole(datasets):
    whole, part = training(datasets)(3), training(datasets, rows=[6, 1])(3)
    for name, array in part.arrays.items():
        np.testing.assert_array_equal(array, whole.arrays[name][[6, 1]])
    assert part.captions == [whole.captions[6], whole.captions[1]]


def test_batch_when_built_then_the_time_of_each_stage_within_its_own(datasets):
    for build in (training(datasets), evaluation(datasets, {"red": 13})):
        start = time.perf_counter()
        seconds = build(0).seconds
        passed = time.perf_counter() - start
        assert list(seconds) == ["read", "caption", "decode", "resize", "patchify"]
        assert min(seconds.values()) > 0 and sum(seconds.values()) <= passed


def test_training_shows_every_caption_of_a_record_in_turn(make_dataset):
    """Lists of one to three captions: each caption comes once in as many passes as the record has captions."""
    texts = {i: [f"caption {n} of {i}" for n in range(1 + i % 3)] for i in range(8)}
    path = make_dataset("red", 8, {i: {"captions": {"synthetic": found}} for i, found in texts.items()})
    build = training({"red": path}, {"red": {"synthetic": 1.0}})  # One batch is one pass.
    shown = collections.defaultdict(list)
    for step in range(6):
        for caption in build(step).captions:
            shown[int(caption.split()[-1])].append(caption.decode())
    for i, found in texts.items():
        assert sorted(shown[i][: len(found)]) == found and shown[i] == shown[i][: len(found)] * (6 // len(found))
    assert build(2).captions == build(2).captions
    other = training({"red": path}, {"red": {"synthetic": 1.0}}, seed=1)
    assert sorted(other(0).captions) != sorted(build(0).captions)


def test_evaluation_shows_the_first_caption_of_a_list(make_dataset):
    path = make_dataset("red", 2, {1: {"captions": {"alt": ["First.", "Second."]}}})
    assert evaluation({"red": path}, {"red": 2})(0).captions[:2] == [b"red number 0", b"first."]


BAD = {
    1: ({"captions": {"synthetic": "no alt here"}}, "missing_caption"),
    3: ({"captions": {"alt": " &nbsp; "}}, "empty_caption"),
    4: ({"image": b""}, "empty_image"),
    6: ({"image": b"\xff\xd8\xff nothing"}, "undecodable_image"),
}


def test_unusable_records_when_drawn_then_replaced_from_the_same_source_named_and_counted(make_dataset):
    paths = {"red": make_dataset("red", 12, {number: fields for number, (fields, _) in BAD.items()})}
    build = training(paths, {"red": {"alt": 1.0}})
    met, usable = collections.Counter(), set()
    for step in range(6):
        batch = build(step)
        assert batch.arrays["valid"].all() and all(batch.captions)
        totals = collections.Counter((fault.example - 8 * step, fault.reason) for fault in batch.faults)
        for (row, reason), count in totals.items():
            assert batch.arrays["faults"][row, REASONS.index(reason)] == count
        assert batch.arrays["faults"].sum() == len(batch.faults)
        for fault in batch.faults:
            assert (fault.source, fault.key, fault.reason) == ("red", f"red/{fault.record}", BAD[fault.record][1])
            draw = build.sampler.draw(fault.example)
            assert (
                fault.record
                in list(build.sampler.records(draw))[: batch.arrays["faults"][fault.example - 8 * step].sum()]
            )
        met.update(fault.record for fault in batch.faults)
        usable.update(batch.captions)
        again = build(step)
        assert again.faults == batch.faults
        np.testing.assert_array_equal(again.arrays["patches"], batch.arrays["patches"])
    # 48 draws are 4 epochs: each bad record is drawn once per epoch, and more often as a replacement.
    assert set(met) == set(BAD) and min(met.values()) >= 4
    assert usable == {f"red number {i}".encode() for i in set(range(12)) - set(BAD)}


def test_unusable_records_when_the_whole_source_is_then_the_guard_says_the_reasons(make_dataset):
    bad = {i: {"image": b"junk"} if i else {"image": b""} for i in range(5)}
    build = training({"red": make_dataset("red", 5, bad)}, {"red": {"alt": 1.0}})
    with pytest.raises(TrainingAborted, match="data source 'red' gave no usable record") as error:
        build(0)
    assert "4 x undecodable_image" in str(error.value) and "1 x empty_image" in str(error.value)


def test_unusable_record_when_its_key_is_long(make_dataset):
    """bad_records.jsonl keeps the two ends of a long key (see `records.bounded_key`)."""
    bad = {2: {"key": "a" + 400 * "x" + "z", "image": b"junk"}}
    batches = training({"red": make_dataset("red", 5, bad)}, {"red": {"alt": 1.0}})
    [key] = {fault.key for step in range(5) for fault in batches(step).faults}
    assert len(key) <= 200 and (key[0], key[-1]) == ("a", "z")


def test_unusable_record_when_it_is_the_only_one_then_the_guard_stops(make_dataset):
    build = training({"red": make_dataset("red", 1, {0: {"image": b"junk"}})}, {"red": {"alt": 1.0}})
    with pytest.raises(TrainingAborted, match="1 x undecodable_image"):
        build(0)


def test_evaluation_batches_when_run_through_then_every_record_once_in_order_and_filling_at_the_end(datasets):
    build = evaluation(datasets, {"red": 13, "blue": 7})
    assert len(build) == 3
    batches = [build(number) for number in range(3)]
    captions = [caption for batch in batches for caption in batch.captions]
    assert (
        captions
        == [f"red number {i}".encode() for i in range(13)] + [f"blue number {i}".encode() for i in range(7)] + [b""] * 4
    )
    arrays = {name: np.concatenate([batch.arrays[name] for batch in batches]) for name in batches[0].arrays}
    assert arrays["example_index"].tolist() == [[0, i] for i in range(24)]
    assert arrays["valid"].all(1).tolist() == arrays["valid"].any(1).tolist() == [True] * 20 + [False] * 4
    assert arrays["source"][:20].tolist() == [0] * 13 + [1] * 7
    record = decode(build.sources["blue"].read(2))
    image = decode_image(record.image)
    pixels = geometry.center_view(image, 28)
    np.testing.assert_array_equal(arrays["patches"][15], geometry.patchify(pixels, 14))


def test_evaluation_batch_when_a_record_is_unusable_then_a_row_of_filling_that_is_counted(make_dataset):
    build = evaluation({"red": make_dataset("red", 3, {1: {"image": b"junk"}})}, {"red": 3})
    batch = build(0)
    assert batch.arrays["valid"].any(1).tolist() == [True, False, True] + [False] * 5
    assert batch.faults == [BadExample(1, "red", 1, "red/1", "undecodable_image")]
    assert batch.arrays["faults"].sum(1).tolist() == [0, 1] + [0] * 6
    assert batch.captions[1] == b"" and not batch.arrays["patches"][1].any()
