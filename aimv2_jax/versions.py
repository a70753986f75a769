"""Installed versions of what decides a run's numbers."""

from __future__ import annotations

import importlib.metadata
import platform

import aimv2_jax

# They compile and compute, decode images, clean and tokenize captions.
_PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "nvidia-cublas-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cuda-nvcc-cu12",
    "flax",
    "optax",
    "numpy",
    "grain",
    "pillow",
    "simplejpeg",
    "ftfy",
    "sentencepiece",
    "tensorflow-text",
)


def installed_versions() -> dict[str, str]:
    """name -> version; a package that is not installed has "none". Nothing is imported."""
    versions = {"aimv2_jax": aimv2_jax.__version__, "python": ".".join(platform.python_version_tuple()[:2])}
    return versions | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
