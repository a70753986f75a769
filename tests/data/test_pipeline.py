"""Input pipeline: the same batches for any workers, start and hosts; errors in order; light imports."""

import ast
import dataclasses
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import aimv2_jax.data
from aimv2_jax.data.loading.batch_builder import LocalBatch
from aimv2_jax.data.pipeline import (
    REASONS,
    BatchIterator,
    HostBatch,
    evaluation_batches,
    open_sources,
    to_devices,
    training_batches,
    training_sampler,
)
from aimv2_jax.data.records import decode
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms.decode import decode_image
from aimv2_jax.data.transforms.geometry import fit_grid, patch_coords, patchify, resize
from aimv2_jax.data.transforms.views import is_flipped
from aimv2_jax.errors import TrainingAborted, UserError

# Tests with worker processes run serially: in parallel they would starve the tests that measure time.
pytestmark = pytest.mark.xdist_group("data workers")

ROWS = range(8)


def take(config, count, start=0, rows=ROWS, tokenizer=None):
    with training_batches(config, range if rows is None else lambda _: rows, start, tokenizer) as batches:
        return list(itertools.islice(batches, count))


def assert_same(one, other):
    assert one.step == other.step and one.faults == other.faults
    assert list(one.arrays) == list(other.arrays)
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name, strict=True)


@pytest.fixture(scope="module")
def flawed(make_dataset):
    """Two sources, one of them with unusable records."""
    bad = {2: {"image": b"junk"}, 5: {"captions": {"alt": "", "synthetic": ""}}}
    return {"red": make_dataset("red", 13, bad), "blue": make_dataset("blue", 7)}


@pytest.fixture(scope="module")
def plain(make_config, flawed, tokenizer):
    """Six batches built in this process."""
    return take(make_config(sources=flawed), 6, tokenizer=tokenizer)


def test_batch_when_made_then_the_arrays_of_the_contract(plain, tokenizer):
    shapes = {name: (array.shape, array.dtype) for name, array in plain[0].arrays.items()}
    assert shapes == {
        "patches": ((8, 4, 588), np.uint8),
        "coords": ((8, 4, 2), np.int32),
        "valid": ((8, 4), bool),
        "tokens": ((8, 12), np.int32),
        "token_valid": ((8, 12), bool),
        "truncated": ((8,), bool),
        "read_retries": ((8,), np.int32),
        "example_index": ((8, 2), np.uint32),
        "source": ((8,), np.int32),
        "faults": ((8, len(REASONS)), np.int32),
    }
    assert [batch.step for batch in plain] == list(range(6))
    assert sum(batch.arrays["faults"].sum() for batch in plain) == sum(len(batch.faults) for batch in plain) > 0
    assert all(type(array) is np.ndarray for array in plain[0].arrays.values())
    assert tokenizer.decode(plain[0].arrays["tokens"][0]).split()[0] in ("a", "red", "blue")


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_when_made_then_says_how_long_each_stage_took(make_config, tokenizer, workers):
    [batch] = take(make_config(data__workers=workers), 1, tokenizer=tokenizer)
    assert set(batch.seconds) == {"read", "caption", "decode", "resize", "patchify", "tokenise"}
    assert all(spent > 0 for spent in batch.seconds.values())


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_when_built_by_workers_then_the_same_bytes(make_config, flawed, tokenizer, plain, workers):
    config = make_config(sources=flawed, data__workers=workers)
    for one, other in zip(plain, take(config, 6, tokenizer=tokenizer), strict=True):
        assert_same(one, other)
        assert all(type(array) is np.ndarray for array in other.arrays.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_when_started_anywhere_then_the_same_bytes(make_config, flawed, tokenizer, plain, workers):
    config = make_config(sources=flawed, data__workers=workers)
    for one, other in zip(plain[3:], take(config, 3, start=3, tokenizer=tokenizer), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("hosts", [2, 4])
def test_batches_split_over_hosts(make_config, flawed, tokenizer, plain, hosts):
    """The rows of batches that are split over hosts form the global batch together."""
    parts = [take(make_config(sources=flawed), 6, rows=ROWS[host::hosts], tokenizer=tokenizer) for host in range(hosts)]
    for whole, *shares in zip(plain, *parts, strict=True):
        for host, share in enumerate(shares):
            for name, array in share.arrays.items():
                np.testing.assert_array_equal(array, whole.arrays[name][host::hosts], err_msg=name)
        key = dataclasses.astuple
        assert sorted(map(key, itertools.chain(*(share.faults for share in shares)))) == sorted(map(key, whole.faults))


def test_batches_started_at_step_million(make_config):
    """Batches that start at step 1,000,000 are ready within a second."""
    start = time.process_time()  # CPU time of this process, so that load from other processes does not count.
    [batch] = take(make_config(), 1, start=10**6)
    assert time.process_time() - start < 1
    assert batch.step == 10**6 and batch.arrays["example_index"][0].tolist() == [0, 8 * 10**6]


def test_batches_when_no_tokenizer_then_tokens_are_zero(make_config):
    [batch] = take(make_config(), 1)
    assert not batch.arrays["tokens"].any() and not batch.arrays["token_valid"].any()


def test_batches_with_another_seed(make_config):
    """Another seed gives batches of other images."""
    [one], [other] = (
        take(make_config() if seed is None else dataclasses.replace(make_config(), seed=seed), 1) for seed in (None, 9)
    )
    assert (one.arrays["patches"] != other.arrays["patches"]).any(axis=(1, 2)).all()


def boom(step, status):
    if step == 4:
        raise UserError("the disk", step, "Fix it")
    return LocalBatch(step, {"x": np.full(3, step)}, [], [])


def as_host_batch(batch):
    return HostBatch(batch.step, batch.arrays, batch.faults)


def test_error_when_a_batch_cannot_be_built_then_raised_in_its_turn_and_ever_after():
    with BatchIterator(boom, range(2, 9), as_host_batch, workers=0, prefetch=2) as batches:
        assert [next(batches).step, next(batches).step] == [2, 3]
        for _ in range(2):
            with pytest.raises(UserError, match="the disk: 4"):
                next(batches)


def test_error_in_worker(make_config, make_dataset):
    """An error in a worker is raised when the batch that it belongs to is due."""
    bad = {i: {"image": b"junk"} for i in range(3)}
    config = make_config(sources={"red": make_dataset("red", 3, bad)}, mixture={"red": {"alt": 1.0}}, data__workers=1)
    with training_batches(config, range, 0) as batches, pytest.raises(TrainingAborted, match="3 x undecodable_image"):
        next(batches)


def test_error_when_finishing_fails_then_raised_in_its_turn():
    def finish(batch):
        raise KeyError("token")

    with (
        BatchIterator(boom, range(3), finish, workers=0, prefetch=2) as batches,
        pytest.raises(KeyError, match="token"),
    ):
        next(batches)


def test_batches_when_they_end_then_iteration_stops():
    with BatchIterator(boom, range(2), as_host_batch, workers=0, prefetch=2) as batches:
        assert [batch.arrays["x"].tolist() for batch in batches] == [[0, 0, 0], [1, 1, 1]]
        assert list(batches) == []


def test_close_when_batches_are_ready_then_the_thread_ends_and_nothing_follows():
    batches = BatchIterator(boom, range(4), as_host_batch, workers=0, prefetch=2)
    next(batches)
    batches.close()
    batches.close()
    assert "batches" not in {thread.name for thread in threading.enumerate()}
    assert list(batches) == []


def test_evaluation_kinds_in_turn(make_config, tokenizer):
    """Evaluation reads each caption kind in turn, gives the same batches twice, and starts no workers."""
    config = make_config(data__workers=2)
    runs = [list(evaluation_batches(config, ROWS, tokenizer)) for _ in range(2)]
    assert [(kind, batch.step) for kind, batch in runs[0]] == [(k, i) for k in ("alt", "synthetic") for i in range(3)]
    for (_, one), (_, other) in zip(*runs, strict=True):
        assert_same(one, other)
    assert [batch.arrays["valid"].any(1).sum() for _, batch in runs[0]] == [8, 8, 4] * 2
    last = runs[0][2][1].arrays
    assert not last["token_valid"][4:].any() and last["token_valid"][:4].any(1).all()
    assert [tokenizer.decode(row) for row in last["tokens"][:1]] == ["blue number 3"]


def test_evaluation_when_split_over_hosts_then_their_rows_put_together_are_the_same(make_config, tokenizer):
    whole = evaluation_batches(make_config(), ROWS, tokenizer)
    shares = [evaluation_batches(make_config(), ROWS[host::2], tokenizer) for host in range(2)]
    for (_, batch), *parts in zip(whole, *shares, strict=True):
        for host, (_, part) in enumerate(parts):
            for name, array in part.arrays.items():
                np.testing.assert_array_equal(array, batch.arrays[name][host::2])


def test_evaluation_when_limited_then_the_first_of_each_source(make_config, tokenizer):
    config = make_config(eval__max_examples=3, eval__caption_types=("alt",))
    [(_, batch)] = evaluation_batches(config, ROWS, tokenizer)
    texts = [tokenizer.decode(row) for row in batch.arrays["tokens"]]
    assert texts == [f"{name} number {i}" for name in ("red", "blue") for i in range(3)] + ["", ""]


def test_evaluation_source_without_kind(make_config, make_dataset, datasets):
    """Evaluation leaves out a source that lacks the caption kind, and yields nothing without sources."""
    silent = make_dataset("red", 3, {i: {"captions": {"synthetic": "a"}} for i in range(3)})
    config = make_config(eval__sources={"silent": silent, "blue": datasets["blue"]}, eval__caption_types=("alt",))
    [(_, batch)] = evaluation_batches(config, ROWS)
    assert batch.arrays["source"][:7].tolist() == [1] * 7 and batch.arrays["valid"].any(1).sum() == 7
    assert list(evaluation_batches(make_config(eval__sources={}), ROWS)) == []


def test_teacher_sees_the_same_crop_larger(make_config, flawed, tokenizer):
    """Its patches are those of a run at its image size, in training and evaluation, and the student's stay as they are.

    The images are too small to be decoded in a reduced size.
    """
    teacher = dict(task="distill", distill__path="teacher", distill__image_size=112, distill__pixels=0.0)
    changes = [dict(data__image_size=56, **teacher), dict(data__image_size=112), dict(data__image_size=56)]
    configs = [make_config(sources=flawed, **change) for change in changes]
    training = zip(*(take(config, 2, tokenizer=tokenizer) for config in configs))
    held_out = zip(*(evaluation_batches(config, ROWS, tokenizer) for config in configs))
    batches = [*training, *(tuple(batch for _, batch in each) for each in held_out)]
    for distilled, larger, alone in batches:
        arrays = dict(distilled.arrays)
        np.testing.assert_array_equal(arrays.pop("teacher_patches"), larger.arrays["patches"], strict=True)
        assert arrays.keys() == alone.arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, alone.arrays[name], err_msg=name, strict=True)
    assert len(batches) > 4


def test_open_sources_all_present(make_config):
    """All sources by name, in the config's order."""
    sources = open_sources(make_config())
    assert list(sources.training) == list(sources.held_out) == ["red", "blue"]


def test_open_sources_when_something_is_missing(make_config, make_dataset, datasets):
    """A user error names the source and what it lacks."""
    alt_only = {
        "red": make_dataset("red", 2, {i: {"captions": {"alt": "a"}} for i in range(2)}),
        "blue": datasets["blue"],
    }
    cases = [
        (make_config(sources=alt_only), "data.mixture.red asks .* lacks: 'synthetic'. It has alt."),
        (
            make_config(eval__caption_types=("alt", "long")),
            "no evaluation source has: 'long'. There is alt, synthetic.",
        ),
        (make_config(eval__sources={"held": "/nowhere"}), "config data source 'held': no such folder: '/nowhere'"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            open_sources(config)


def test_batches_when_sources_are_given(make_config, monkeypatch):
    """Sources that a start has opened are not opened again."""
    config = make_config()
    sources = open_sources(config)
    monkeypatch.setattr("aimv2_jax.data.pipeline.open_datasets", None)
    with training_batches(config, range, 0, sources=sources.training) as batches:
        assert next(batches).step == 0
    assert len(list(evaluation_batches(config, ROWS, sources=sources.held_out))) > 0


@pytest.mark.parametrize("axes", [("data",), ("data", "fsdp")])
def test_to_devices_when_rows_come_in_any_order_then_the_global_array(axes):
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp"))
    arrays = {"a": np.arange(16 * 3).reshape(16, 3).astype(np.int32), "b": np.arange(16, dtype=np.uint32)}
    rows = np.random.default_rng(0).permutation(16)
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    on_devices = to_devices({name: array[rows] for name, array in arrays.items()}, sharding, rows, 16)
    for name, array in on_devices.items():
        assert array.sharding == sharding
        np.testing.assert_array_equal(np.asarray(array), arrays[name])


def test_to_devices_missing_row():
    """A missing row is a bug of this package and raises AssertionError, not UserError."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    with pytest.raises(AssertionError, match="not read by its process"):
        to_devices({"a": np.zeros((3, 2))}, sharding, [0, 1, 2], 4)


def test_import_when_the_pipeline_is_then_no_tensorflow_and_no_backend():
    program = (
        "import sys, aimv2_jax.data.pipeline\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "print('tensorflow' in sys.modules, bool(bridge and bridge._backends))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_data_modules_import_no_jax():
    """No module of data or prepare imports JAX, TensorFlow, models or train."""
    package = Path(aimv2_jax.data.__file__).parents[1]
    for path in [*package.glob("data/**/*.py"), *package.glob("prepare/**/*.py")]:
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in ("jax", "flax", "optax", "tensorflow", "tensorflow_text"), path
                assert not name.startswith(("aimv2_jax.models", "aimv2_jax.train", "aimv2_jax.parallel")), path


@pytest.fixture(scope="module")
def native_config(make_config):
    """Batches of 64 patches: 16 images of at most 4 patches, 8 of 8, or 4 of 16."""
    from experiments import base

    encoder = base.get_config().model.encoder.to_dict() | {"position": "sincos"}
    return make_config(data__areas=(4, 8, 16), data__batch_size=4, model__encoder=encoder)


def test_native_batch_raster_order_and_padding(native_config):
    """A native batch has whole images as patches in raster order, and its padding is zero."""
    batches = take(native_config, 12, rows=None)
    sampler = training_sampler(native_config, open_sources(native_config).training)
    assert {batch.arrays["patches"].shape[:2] for batch in batches} == {(16, 4), (8, 8), (4, 16)}
    for batch in batches:
        arrays, first = batch.arrays, sampler.schedule.first_example(batch.step)
        examples, area = arrays["valid"].shape
        assert (examples, area) == sampler.schedule.shape(batch.step)
        np.testing.assert_array_equal(arrays["example_index"][:, 1], first + np.arange(examples))
        for row in range(examples):
            draw = sampler.draw(first + row)
            record = decode(
                Source(draw.source, native_config.data.sources[draw.source]).read(next(sampler.records(draw)))
            )
            image = decode_image(record.image)
            rows, columns = fit_grid(*image.size, area)
            flip = is_flipped(0, first + row, 0.5)
            pixels = resize(image, (0, 0, *image.size), (columns * 14, rows * 14), flip)
            used = rows * columns
            assert arrays["valid"][row].tolist() == [True] * used + [False] * (area - used)
            np.testing.assert_array_equal(arrays["patches"][row, :used], patchify(pixels, 14))
            np.testing.assert_array_equal(arrays["coords"][row, :used], patch_coords((rows, columns)))
            assert not arrays["patches"][row, used:].any() and not arrays["coords"][row, used:].any()


@pytest.mark.parametrize("hosts", [2, 4])
def test_native_batch_when_split_over_hosts_or_started_later_then_the_same_examples(native_config, hosts):
    whole = take(native_config, 8, rows=None)
    for later in take(native_config, 3, start=5, rows=None):
        assert_same(later, whole[later.step])
    for host in range(hosts):
        with training_batches(native_config, lambda size: range(host, size, hosts), 0) as batches:  # noqa: B023
            for batch, expected in zip(batches, whole):
                for name, array in batch.arrays.items():
                    np.testing.assert_array_equal(array, expected.arrays[name][host::hosts], err_msg=name)


def test_native_view_without_upscaling(make_config, native_config):
    """Small images keep their pixels if a native view does not upscale."""
    config = dataclasses.replace(native_config, data=dataclasses.replace(native_config.data, upscale=False))
    batches, upscaled = take(config, 12, rows=None), take(native_config, 12, rows=None)
    used = [batch.arrays["valid"].sum(axis=1) for batch in batches]
    assert max(count.max() for count in used) <= 16  # Images of 30 to 60 pixels have at most 4 x 4 patches.
    assert any((mine < batch.arrays["valid"].sum(axis=1)).any() for mine, batch in zip(used, upscaled))


def test_evaluation_with_area(native_config):
    """Evaluation with an area reads whole images and never flips them."""
    config = dataclasses.replace(native_config, eval=dataclasses.replace(native_config.eval, area=8))
    _, batch = next(evaluation_batches(config, ROWS))
    record = decode(Source("red", config.eval.sources["red"]).read(0))
    image = decode_image(record.image)
    rows, columns = fit_grid(*image.size, 8)
    assert batch.arrays["patches"].shape[:2] == (8, 8)
    pixels = resize(image, (0, 0, *image.size), (columns * 14, rows * 14))
    np.testing.assert_array_equal(batch.arrays["patches"][0, : rows * columns], patchify(pixels, 14))
