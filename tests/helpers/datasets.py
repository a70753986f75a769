"""Small prepared datasets and configs over them."""

import io

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.config.load import build_config
from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import Record

TOKENIZER = "package:data/sample/tokenizer.model"


def encoded(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_record():
    def make(name, number, **changes):
        """A record with a unique image and captions: noise seeded by name and number."""
        rng = np.random.default_rng([number, *name.encode()])
        height, width = rng.integers(30, 60, 2)
        fields = {
            "key": f"{name}/{number}",
            "image": encoded(rng.integers(0, 256, (height, width, 3), np.uint8), "JPEG"),
            "captions": {"alt": f"{name} number {number}", "synthetic": f"A picture of {name}, the {number}th."},
            "labels": {"number": str(number)},
        }
        return Record(**fields | changes)

    return make


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory, make_record):
    def make(name, size, changes=None, shard_bytes=10_000):
        """The folder of a dataset with `size` records; `changes` maps a record number to replaced fields."""
        folder = tmp_path_factory.mktemp("datasets") / name
        write_dataset(folder, (make_record(name, i, **(changes or {}).get(i, {})) for i in range(size)), shard_bytes)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def datasets(make_dataset):
    return {"red": make_dataset("red", 13), "blue": make_dataset("blue", 7)}


@pytest.fixture(scope="session")
def make_config(datasets):
    def make(sources=None, mixture=None, **changes):
        """A config over two small sources; `changes` are dotted keys with "__" for the dot."""
        from experiments import base

        tree = base.get_config().to_dict()
        tree["data"] |= {
            "batch_size": 8,
            "workers": 0,
            "image_size": 28,
            "sources": sources or datasets,
            "mixture": mixture or {"red": {"alt": 0.3, "synthetic": 0.3}, "blue": {"alt": 0.1, "synthetic": 0.3}},
        }
        tree["eval"] |= {"sources": sources or datasets, "batch_size": 8}
        tree["model"]["decoder"] |= {"vocab_size": 768, "text_length": 12}
        tree["tokenizer"]["path"] = TOKENIZER
        for key, value in changes.items():
            *sections, name = key.split("__")
            node = tree
            for section in sections:
                node = node[section]
            node[name] = value
        return build_config(tree)

    return make


@pytest.fixture(scope="session")
def tokenizer():
    from aimv2_jax.data.tokenizer import Tokenizer

    return Tokenizer(TOKENIZER, length=12, vocab_size=768)
