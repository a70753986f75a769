"""Fixtures of a tiny run: a dataset of synthetic images, and a workdir with random checkpoints and metrics."""

import io
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from aimv2_jax.checkpoint.checkpointer import Checkpointer
from aimv2_jax.config.load import build_config
from aimv2_jax.config.schema import Config
from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.identity import TOKENIZER
from aimv2_jax.data.records import Record
from aimv2_jax.monitoring.metrics import MetricsWriter
from aimv2_jax.train.builder import TrainSetup, build_setup
from aimv2_jax.train.step import TrainState
from experiments import base
from tests.helpers.tiny import tiny_config

COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


def disc_image(number: int) -> tuple[np.ndarray, str]:
    """An image of a disc of one colour on a white, partly noisy background, and the colour's name."""
    rng = np.random.default_rng(number)
    name = list(COLORS)[number % len(COLORS)]
    y, x = np.mgrid[:64, :64]
    pixels = np.full((64, 64, 3), 255.0)
    pixels[np.hypot(x - rng.uniform(20, 44), y - rng.uniform(20, 44)) < 18] = COLORS[name]
    pixels[40:] -= rng.uniform(0, 60, (24, 64, 3))
    return pixels.clip(0, 255).astype(np.uint8), name


def records(numbers):
    for number in numbers:
        pixels, name = disc_image(number)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        captions = {"alt": f"{name} disc {number}", "synthetic": f"a picture of a {name} disc on white"}
        yield Record(key=f"disc/{number}", image=file.getvalue(), captions=captions)


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Config:
    """Width 32, depth 2, 16 patches of 8 x 8 pixels; five held-out images in two sources, in batches of four."""
    data = tmp_path_factory.mktemp("data")
    for name, numbers in (("train", range(20)), ("round", range(20, 23)), ("other", range(23, 25))):
        write_dataset(data / name, records(numbers))
    tree = base.get_config()
    tree.model.patch_size = 8
    for part in (tree.model.encoder, tree.model.decoder):
        part.update(width=32, depth=2, heads=2, hidden=64)
    tree.model.decoder.update(vocab_size=1024, text_length=20)
    tree.model.update(layers="scan", compute_dtype="float32")
    tree.data.update(image_size=32, batch_size=8, workers=0)
    tree.data.sources = {"train": str(data / "train")}
    tree.data.mixture = {"train": {"alt": 1.0, "synthetic": 2.0}}
    tree.tokenizer.path = "package:data/sample/tokenizer.model"
    tree.eval.update(batch_size=8)
    tree.eval.sources = {"round": str(data / "round"), "other": str(data / "other")}
    return build_config(tree.to_dict())


def random_state(setup: TrainSetup) -> TrainState:
    """A random state of the right shapes, without compiling the initialisation.

    Every parameter is noise, as after some training; scales are around 1, and moments are zero.
    """
    rng, abstract = np.random.default_rng(0), setup.abstract_state

    def draw(path, leaf):
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        noise *= leaf.shape[-2] ** -0.5 if name == "kernel" else 0.1
        return (noise + (name == "scale")).astype(leaf.dtype)

    params, frozen = (jax.tree.map_with_path(draw, tree) for tree in (abstract.params, abstract.frozen))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    return jax.device_put(zeros.replace(params=params, frozen=frozen), setup.state_shardings)


def save_model(folder: Path, tokenizer: str, **changes: object) -> Path:
    """Saves random parameters of the tiny run as its first step, in place of a run of one step.

    Args:
      folder: the run's workdir, which is returned.
      tokenizer: first 16 digits of the digest of the run's tokenizer.
      changes: as in `tiny.overrides`.
    """
    config = tiny_config(**changes)
    with Checkpointer(folder, keep=1) as checkpointer:
        extra = {"data": {TOKENIZER: tokenizer}}
        checkpointer.save(1, random_state(build_setup(config)), config, extra=extra)
    return folder


@pytest.fixture(scope="session")
def state(config) -> TrainState:
    """The run's state at step 20, on one device, so that saving it compiles no slices of replicas."""
    return random_state(build_setup(config, jax.devices()[:1]))


@pytest.fixture(scope="session")
def workdir(config, state, tmp_path_factory) -> Path:
    """The run's workdir with steps 20 (the best) and 40; at 40 the parameters are twice those at 20."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpointer(folder, keep=2) as checkpointer:
        checkpointer.save(20, state, config, eval_loss=4.0)
        doubled = jax.tree.map(lambda leaf: jax.device_put(2 * np.asarray(leaf), leaf.sharding), state.params)
        later = state.replace(params=doubled)
        checkpointer.save(40, later, config, eval_loss=5.0)
    with MetricsWriter(folder, tensorboard=False, wandb_project=None, config=config) as writer:
        for step in range(2, 41, 2):
            falling = math.exp(-step / 20)
            writer.write(
                step,
                {
                    "loss": 3 + 4 * falling,
                    "loss_image": 0.6 + 0.4 * falling,
                    "loss_text": 3 + 3 * falling,
                    "lr": 1e-3 * (1 - step / 50),
                    "grad_norm": 1 + falling,
                    "images_per_s": None if step == 2 else 30.0,
                },
            )
            if step % 10 == 0:
                names = ("eval_loss", "eval_loss_image", "eval_loss_text", "eval_loss_text_full_prefix")
                writer.write(step, dict.fromkeys(names, 3 + falling))
    return folder
