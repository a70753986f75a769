"""The version of this package, and the installed versions of the packages that affect a run's results."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys

from aimv2_jax.console import print_line

__version__ = "0.1.0"

# Packages that compile and compute, write checkpoints, decode images, clean and tokenize captions.
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
    "orbax-checkpoint",
    "numpy",
    "grain",
    "pillow",
    "simplejpeg",
    "ftfy",
    "sentencepiece",
    "tensorflow-text",
    "tokenizers",
)
_BOUNDED = ("jax", "flax")


def installed_versions() -> dict[str, str]:
    """Returns package name -> version, "none" for a package that is not installed. Imports none of them."""
    versions = {"aimv2_jax": __version__, "python": ".".join(platform.python_version_tuple()[:2])}
    return versions | {name: _version(name) for name in _PACKAGES}


def warn_of_versions() -> None:
    """Prints a warning where the installed jax or flax is outside the bounds in this package's metadata."""
    outside = _outside_bounds()
    if outside:
        python = ".".join(platform.python_version_tuple()[:2])
        bounds = f"{' and '.join(outside)}, the versions that aimv2_jax is tested with on Python {python}"
        print_line(f"warning: {bounds}. Results may differ", sys.stderr)


def _outside_bounds() -> list[str]:
    """Descriptions of packages outside their bounds; empty where this package is not installed."""
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version

    outside = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, InvalidVersion):
        for text in importlib.metadata.requires("aimv2_jax") or ():
            if not text.startswith(_BOUNDED):  # Parsing all requirements takes milliseconds.
                continue
            required = Requirement(text)
            if required.name in _BOUNDED and (required.marker is None or required.marker.evaluate()):
                installed = Version(importlib.metadata.version(required.name))
                if not required.specifier.contains(installed, prereleases=True):
                    bounds = ",".join(sorted(map(str, required.specifier), reverse=True))
                    outside.append(f"{required.name} {installed} is not {bounds}")
    return outside


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
