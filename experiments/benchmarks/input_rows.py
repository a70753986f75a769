"""Rows of the input benchmark: each is a loop over the same crops of the same JPEGs, in its own process."""

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

from aimv2_jax.config.load import build_config
from aimv2_jax.config.schema import Config, mixture_counts
from aimv2_jax.data.records import decode
from aimv2_jax.data.sampling.counter_rng import example_rng
from aimv2_jax.data.sampling.mixture import MixtureSampler
from aimv2_jax.data.sampling.schedule import BatchSchedule
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms import geometry
from aimv2_jax.data.transforms.decode import open_encoded

TARGET = 224
BATCH = 32
TOKENIZER = "package:data/sample/tokenizer.model"
_EXAMPLES = 96  # Crops in the loop: several of each image, with more data than any cache.


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurement of one loop; `stages_ms` (per image) and `worker_mib` only for the pipeline."""

    images: int
    seconds: float
    stages_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    worker_mib: float | None = None


Loop = Callable[[float], Measured]
"""Runs for about the given number of seconds."""


def config_of(folder: str, workers: int, target: int = TARGET) -> Config:
    """Returns the config of a run on one prepared dataset."""
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


def examples(config: Config) -> list[tuple[bytes, geometry.Box]]:
    """Returns JPEGs and crops of a run's first examples, chosen by the mixture sampler and the crop transform."""
    [(name, path)] = config.data.sources.items()
    source, data = Source(name, path), config.data
    sampler = MixtureSampler(
        config.seed, BatchSchedule(config.seed, config.batch_shapes), {name: len(source)}, mixture_counts(data.mixture)
    )
    crops = []
    for example in range(_EXAMPLES):
        image = decode(source.read(next(sampler.records(sampler.draw(example))))).image
        rng = example_rng(config.seed, "crop", example)
        crops.append((image, geometry.crop_box(rng, *open_encoded(image).size, data.crop_area, data.crop_ratio)))
    return crops


def _looped(process: Callable[[int], Any]) -> Loop:
    """Returns a loop that calls `process` with the number of each example, repeatedly."""
    numbers = itertools.cycle(range(_EXAMPLES))

    def run(seconds: float) -> Measured:
        start, images = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds or not images:
            process(next(numbers))
            images += 1
        return Measured(images, passed)

    return run


def decode_whole(folder: str, cores: int) -> Loop:
    """(a) Decodes the JPEG to RGB at full size."""
    crops = examples(config_of(folder, 1))
    return _looped(lambda i: simplejpeg.decode_jpeg(crops[i][0], "RGB"))


def decode_scaled(folder: str, cores: int) -> Loop:
    """(a) Decodes the JPEG to RGB at the scale and region that its crop needs."""
    opened = [(open_encoded(data), box) for data, box in examples(config_of(folder, 1))]
    return _looped(lambda i: opened[i][0].decode(opened[i][1], TARGET))


def bare(folder: str, cores: int) -> Loop:
    """(b) Decodes, crops and resizes like the pipeline, with headers and crops prepared in advance."""
    opened = [(open_encoded(data), box) for data, box in examples(config_of(folder, 1))]

    def process(i: int) -> np.ndarray:
        image, box = opened[i]
        return geometry.resize(*image.decode(box, TARGET), TARGET)

    return _looped(process)


def pillow(folder: str, cores: int) -> Loop:
    """(e) Decodes, crops and resizes like torchvision's RandomResizedCrop on Pillow images."""
    crops = examples(config_of(folder, 1))

    def process(i: int) -> np.ndarray:
        data, box = crops[i]
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return np.asarray(image.crop(box).resize((TARGET, TARGET), Image.Resampling.BICUBIC))

    return _looped(process)


def pipeline(folder: str, cores: int) -> Loop:
    """(c) The pipeline from records to uint8 batches, without tokenizer; one worker a core, the trainer on the rest.

    The trainer's side only receives finished batches. If no core is left, it shares the workers' cores.
    """
    return _pipeline(folder, cores, tokenize=False, apart=True)


def pipeline_tokens(folder: str, cores: int) -> Loop:
    """(c) The pipeline with tokens, which the trainer's side computes."""
    return _pipeline(folder, cores, tokenize=True, apart=True)


def pipeline_together(folder: str, cores: int) -> Loop:
    """(c) The pipeline without the tokenizer, with the trainer's side on the workers' cores too."""
    return _pipeline(folder, cores, tokenize=False, apart=False)


def _pipeline(folder: str, cores: int, tokenize: bool, apart: bool) -> Loop:
    from aimv2_jax.data.pipeline import training_batches

    config = config_of(folder, cores)
    tokenizer = None
    if tokenize:
        from aimv2_jax.data.tokenizer import Tokenizer

        tokenizer = Tokenizer(TOKENIZER, config.model.decoder.text_length, config.model.decoder.vocab_size)
    ahead = 2 + cores * (config.data.prefetch + 1) + 1  # Batches that may be ready before the measurement.

    worker_cpus = os.sched_getaffinity(0)
    other_cpus = set(range(os.cpu_count() or 1)) - worker_cpus

    def run(seconds: float) -> Measured:
        _pin(worker_cpus)  # The workers inherit it.
        with training_batches(config, range, 0, tokenizer) as batches:
            next(batches)
            if apart and other_cpus:
                _pin(other_cpus)
            for _ in range(ahead - 1):
                next(batches)
            stages: dict[str, float] = {}
            start, images = time.perf_counter(), 0
            # Whole rounds, because the workers deliver in turn.
            while (passed := time.perf_counter() - start) < seconds or not images:
                for _ in range(cores):
                    batch = next(batches)
                    images += int(batch.arrays["valid"].all(1).sum())
                    for stage, spent in batch.seconds.items():
                        stages[stage] = stages.get(stage, 0.0) + spent
            memory = max(_peak_mib(process.pid) for process in multiprocessing.active_children())
        per_image = {stage: 1000 * spent / images for stage, spent in stages.items()}
        # The trainer tokenises, not the workers.
        workers_own = sum(spent for stage, spent in per_image.items() if stage != "tokenise")
        per_image["rest"] = 1000 * passed * cores / images - workers_own
        return Measured(images, passed, per_image, memory)

    return run


def _pin(cpus: set[int]) -> None:
    """Pins every thread of this process to `cpus`."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # The thread has just ended, or the CPUs are not available.
            os.sched_setaffinity(int(thread), cpus)


def _peak_mib(pid: int | None) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def tf_data(folder: str, cores: int) -> Loop:
    """(d) tf.data like big_vision, with antialiasing."""
    return _tf_data(folder, cores, antialias=True)


def tf_data_aliased(folder: str, cores: int) -> Loop:
    """(d) tf.data without antialiasing, big_vision's default."""
    return _tf_data(folder, cores, antialias=False)


def _tf_data(folder: str, cores: int, antialias: bool) -> Loop:
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(cores)
    tf.config.threading.set_inter_op_parallelism_threads(cores)
    crops = examples(config_of(folder, 1))
    boxes = np.array([(top, left, bottom - top, right - left) for _, (left, top, right, bottom) in crops], np.int32)

    def view(data: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_jpeg(data, channels=3)
        crop = tf.slice(image, [box[0], box[1], 0], [box[2], box[3], 3])
        square = tf.image.resize(crop, (TARGET, TARGET), "bicubic", antialias=antialias)
        return tf.cast(tf.clip_by_value(square, 0, 255), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1
    dataset = tf.data.Dataset.from_tensor_slices(([data for data, _ in crops], boxes)).repeat()
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
"""Rows without parallelism of their own: they run one process on each core."""


PIPELINES = {"pipeline", "pipeline, tokens", "pipeline, trainer too"}


def serve(connection: Any, cpus: list[int]) -> None:
    """Runs rows on `cpus` in a process: receives (row, folder, seconds), sends a `Measured`; None ends it."""
    os.sched_setaffinity(0, cpus)
    loops: dict[tuple[str, str], Loop] = {}
    while (request := connection.recv()) is not None:
        row, folder, seconds = request
        if (row, folder) not in loops:
            loops[row, folder] = ROWS[row](folder, len(cpus))
            if row not in PIPELINES:  # Pipelines discard their first batches themselves.
                loops[row, folder](0.0)
        connection.send(loops[row, folder](seconds))


def qualities(folder: str) -> Iterator[tuple[int, list[float], float]]:
    """Yields targets (224, 336, 448), PSNRs in dB of our crops against Pillow's full decode, and the equal fraction.

    Equal crops have no PSNR; the list has 99 for them.
    """
    for target in (224, 336, 448):
        psnr_db = []
        for data, box in examples(config_of(folder, 1, target)):
            ours = geometry.resize(*open_encoded(data).decode(box, target), target)
            with Image.open(io.BytesIO(data)) as image:
                whole = image.convert("RGB").crop(box).resize((target, target), Image.Resampling.BICUBIC)
            error = np.mean((ours.astype(np.float64) - np.asarray(whole)) ** 2)
            psnr_db.append(99.0 if error == 0 else min(99.0, 10 * np.log10(255**2 / error)))
        yield target, psnr_db, sum(value == 99 for value in psnr_db) / len(psnr_db)
