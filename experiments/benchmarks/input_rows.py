"""The rows of the input benchmark: each a loop over the same crops of the same JPEGs, for a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from aimv2_jax.config import Config, build_config, mixture_counts
from aimv2_jax.data import transforms
from aimv2_jax.data.chance import example_rng
from aimv2_jax.data.pictures import open_picture
from aimv2_jax.data.plan import Plan
from aimv2_jax.data.records import decode
from aimv2_jax.data.sources import Source
from aimv2_jax.data.steps import Steps

TARGET = 224
BATCH = 32
TOKENIZER = "package:data/sample/tokenizer.model"
_EXAMPLES = 96  # Whose crops are gone through again and again: several times each picture, far more than any cache.


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one loop did: `stages_ms` an image and `worker_mib` are the pipeline's."""

    images: int
    seconds: float
    stages_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    worker_mib: float | None = None


Loop = Callable[[float], Measured]
"""Runs for about so many seconds."""


def config_of(folder: str, workers: int, target: int = TARGET) -> Config:
    """The config of a run over one prepared data set."""
    from experiments import base

    tree = base.get_config().to_dict()
    tree["data"] |= {
        "batch_size": BATCH,
        "workers": workers,
        "prefetch": 1,
        "image_size": target,
        "sources": {"photos": folder},
        "mixture": {"photos": {"alt": 1.0}},
    }
    tree["tokenizer"]["path"] = TOKENIZER
    tree["mesh"]["data"] = 1
    return build_config(tree)


def examples(config: Config) -> list[tuple[bytes, transforms.Box]]:
    """The JPEGs and crops of the first examples of a run, as its plan and its view choose them."""
    [(name, path)] = config.data.sources.items()
    source, data = Source(name, path), config.data
    plan = Plan(config.seed, Steps(config.seed, config.batch_shapes), {name: len(source)}, mixture_counts(data.mixture))
    found = []
    for example in range(_EXAMPLES):
        image = decode(source.read(next(plan.records(plan.draw(example))))).image
        rng = example_rng(config.seed, "crop", example)
        found.append((image, transforms.crop_box(rng, *open_picture(image).size, data.crop_area, data.crop_ratio)))
    return found


def _looped(each: Callable[[int], Any]) -> Loop:
    """A loop over `each` of the examples by number, again and again."""
    numbers = itertools.cycle(range(_EXAMPLES))

    def run(seconds: float) -> Measured:
        start, images = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds or not images:
            each(next(numbers))
            images += 1
        return Measured(images, passed)

    return run


def decode_whole(folder: str, cores: int) -> Loop:
    """(a) The JPEG to RGB at its full size."""
    found = examples(config_of(folder, 1))
    return _looped(lambda i: simplejpeg.decode_jpeg(found[i][0], "RGB"))


def decode_scaled(folder: str, cores: int) -> Loop:
    """(a) The JPEG to RGB as far as its crop needs it."""
    opened = [(open_picture(data), box) for data, box in examples(config_of(folder, 1))]
    return _looped(lambda i: opened[i][0].decode(opened[i][1], TARGET))


def bare(folder: str, cores: int) -> Loop:
    """(b) Decode, crop and resize, as in the pipeline; the header read and the crop drawn before."""
    opened = [(open_picture(data), box) for data, box in examples(config_of(folder, 1))]

    def each(i: int) -> np.ndarray:
        picture, box = opened[i]
        return transforms.resize(*picture.decode(box, TARGET), TARGET)

    return _looped(each)


def pillow(folder: str, cores: int) -> Loop:
    """(e) As torchvision's RandomResizedCrop works on Pillow's pictures."""
    found = examples(config_of(folder, 1))

    def each(i: int) -> np.ndarray:
        data, box = found[i]
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return np.asarray(image.crop(box).resize((TARGET, TARGET), Image.Resampling.BICUBIC))

    return _looped(each)


def pipeline(folder: str, cores: int) -> Loop:
    """(c) From prepared records to uint8 batches, without the tokenizer; a worker has each core, the trainer the rest.

    The trainer's side takes finished batches over, nothing else. Where no core is left, it shares the workers'.
    """
    return _pipeline(folder, cores, tokenize=False, apart=True)


def pipeline_tokens(folder: str, cores: int) -> Loop:
    """(c) The same with tokens, which the trainer's side makes."""
    return _pipeline(folder, cores, tokenize=True, apart=True)


def pipeline_together(folder: str, cores: int) -> Loop:
    """(c) The first of these with the trainer's side on the workers' cores, too."""
    return _pipeline(folder, cores, tokenize=False, apart=False)


def _pipeline(folder: str, cores: int, tokenize: bool, apart: bool) -> Loop:
    from aimv2_jax.data.pipeline import training_batches

    config = config_of(folder, cores)
    tokenizer = None
    if tokenize:
        from aimv2_jax.data.tokenizer import Tokenizer

        tokenizer = Tokenizer(TOKENIZER, config.model.decoder.text_length, config.model.decoder.vocab_size)
    ahead = 2 + cores * (config.data.prefetch + 1) + 1  # Batches that may have been ready before the clock starts.

    ours = os.sched_getaffinity(0)
    others = set(range(os.cpu_count() or 1)) - ours

    def run(seconds: float) -> Measured:
        _pin(ours)  # Which the workers inherit.
        with training_batches(config, range, 0, tokenizer) as batches:
            next(batches)
            if apart and others:
                _pin(others)
            for _ in range(ahead - 1):
                next(batches)
            stages: dict[str, float] = {}
            start, images = time.perf_counter(), 0
            # Whole rounds of the workers, which deliver in turn and all at once.
            while (passed := time.perf_counter() - start) < seconds or not images:
                for _ in range(cores):
                    batch = next(batches)
                    images += int(batch.arrays["valid"].all(1).sum())
                    for stage, spent in batch.seconds.items():
                        stages[stage] = stages.get(stage, 0.0) + spent
            memory = max(_peak_mib(process.pid) for process in multiprocessing.active_children())
        per_image = {stage: 1000 * spent / images for stage, spent in stages.items()}
        workers_own = sum(spent for stage, spent in per_image.items() if stage != "tokenise")  # That is done here.
        per_image["rest"] = 1000 * passed * cores / images - workers_own
        return Measured(images, passed, per_image, memory)

    return run


def _pin(cpus: set[int]) -> None:
    """Every thread of this process to `cpus`."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # One that has just ended, or cpus that are not ours to use.
            os.sched_setaffinity(int(thread), cpus)


def _peak_mib(pid: int | None) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def tf_data(folder: str, cores: int) -> Loop:
    """(d) tf.data as big_vision uses it, antialiased."""
    return _tf_data(folder, cores, antialias=True)


def tf_data_aliased(folder: str, cores: int) -> Loop:
    """(d) The same without antialiasing, which is big_vision's default."""
    return _tf_data(folder, cores, antialias=False)


def _tf_data(folder: str, cores: int, antialias: bool) -> Loop:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(cores)
    tf.config.threading.set_inter_op_parallelism_threads(cores)
    found = examples(config_of(folder, 1))
    boxes = np.array([(top, left, bottom - top, right - left) for _, (left, top, right, bottom) in found], np.int32)

    def view(data: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_jpeg(data, channels=3)
        crop = tf.slice(image, [box[0], box[1], 0], [box[2], box[3], 3])
        square = tf.image.resize(crop, (TARGET, TARGET), "bicubic", antialias=antialias)
        return tf.cast(tf.clip_by_value(square, 0, 255), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1
    dataset = tf.data.Dataset.from_tensor_slices(([data for data, _ in found], boxes)).repeat()
    dataset = dataset.map(view, num_parallel_calls=cores).batch(BATCH).prefetch(1).with_options(options)

    def run(seconds: float) -> Measured:
        batches = iter(dataset)
        for _ in range(2 + cores):
            next(batches)
        start, images = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds or not images:
            images += len(next(batches))
        del batches
        return Measured(images, passed)

    return run


ROWS: dict[str, Callable[[str, int], Loop]] = {
    "decode, whole": decode_whole,
    "decode, scaled": decode_scaled,
    "bare loop": bare,
    "pipeline": pipeline,
    "pipeline, tokens": pipeline_tokens,
    "pipeline, trainer too": pipeline_together,
    "tf.data, antialias": tf_data,
    "tf.data, no antialias": tf_data_aliased,
    "PIL": pillow,
}
ONE_LOOP_A_CORE = {"decode, whole", "decode, scaled", "bare loop", "PIL"}
"""Rows that know no parallelism of their own: all cores are as many processes."""


PIPELINES = {"pipeline", "pipeline, tokens", "pipeline, trainer too"}


def serve(connection: Any, cpus: list[int]) -> None:
    """A process that runs rows on `cpus` as it is told: (row, folder, seconds) in, a `Measured` out; None ends it."""
    os.sched_setaffinity(0, cpus)
    loops: dict[tuple[str, str], Loop] = {}
    while (asked := connection.recv()) is not None:
        row, folder, seconds = asked
        if (row, folder) not in loops:
            loops[row, folder] = ROWS[row](folder, len(cpus))
            if row not in PIPELINES:  # Which throw away their first batches themselves.
                loops[row, folder](0.0)
        connection.send(loops[row, folder](seconds))


def qualities(folder: str) -> Iterator[tuple[int, list[float], float]]:
    """For targets of 224, 336, 448: PSNR in dB of our crops against Pillow's of the whole, and the share of equal ones.

    Equal crops have no PSNR; they are among the list as 99.
    """
    for target in (224, 336, 448):
        found = []
        for data, box in examples(config_of(folder, 1, target)):
            ours = transforms.resize(*open_picture(data).decode(box, target), target)
            with Image.open(io.BytesIO(data)) as image:
                whole = image.convert("RGB").crop(box).resize((target, target), Image.Resampling.BICUBIC)
            error = np.mean((ours.astype(np.float64) - np.asarray(whole)) ** 2)
            found.append(99.0 if error == 0 else min(99.0, 10 * np.log10(255**2 / error)))
        yield target, found, sum(value == 99 for value in found) / len(found)
