"""Fixtures for encoded images and inputs made from them."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.storage.bucket import file_system
from tests.helpers.datasets import datasets, make_dataset, make_record  # noqa: F401
from tests.helpers.preparing import run_prepare  # noqa: F401


def encoded(width=60, height=40, format="JPEG", mode="RGB", seed=0, **options):
    """Encodes an image of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_image():
    return encoded


@pytest.fixture(scope="session")
def make_tar():
    def make(path, samples):
        """Writes a webdataset tar of {key: {extension: bytes, or a dict for json}}."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for key, members in samples.items():
                for extension, data in members.items():
                    data = json.dumps(data).encode() if isinstance(data, dict) else data
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return path

    return make


@pytest.fixture(scope="session")
def tars(tmp_path_factory, make_tar):
    """A folder of six tars of ten pairs with 12-kB images."""
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(6):
        samples = {}
        for number in range(10):
            fields = {"alt": f"Thing {number}", "word": "even" if number % 2 == 0 else "odd"}
            image = encoded(100, 90, seed=100 * shard + number, quality=90)
            samples[f"{shard:05d}{number:04d}"] = {"jpg": image, "txt": b"A thing.", "json": fields}
        make_tar(folder / f"{shard:05d}.tar", samples)
    return folder


@pytest.fixture
def files_of():
    def files(folder):
        """All files of a folder with their bytes."""
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return files


@pytest.fixture(scope="session")
def upload():
    def upload(server, folder, url):
        """Writes all files of a local folder to the folder `url` of a server, which it returns."""
        for path in folder.rglob("*"):
            if path.is_file():
                server.write(f"{url}/{path.relative_to(folder)}", path.read_bytes())
        return url

    return upload


@pytest.fixture(scope="session")
def objects_of():
    def objects(url):
        """All objects of a folder of a bucket with their bytes."""
        system, root = file_system(url), url.partition("://")[2]
        return {path[len(root) + 1 :]: system.cat_file(path) for path in system.find(url)}

    return objects


@pytest.fixture(scope="session")
def bitmap_header():
    def header(width, height):
        """A BMP of that size that consists of its header only."""
        sizes = width.to_bytes(4, "little") + height.to_bytes(4, "little")
        return (
            b"BM"
            + bytes(8)
            + (54).to_bytes(4, "little")
            + (40).to_bytes(4, "little")
            + sizes
            + b"\1\0\x18\0"
            + bytes(24)
        )

    return header
