"""Tests of the exact versions in `constraints/`: within setup.py's bounds, the same with hashes, and as installed."""

from __future__ import annotations

import importlib.metadata
import re
import runpy

import pytest
from packaging.requirements import Requirement

from tests.helpers.tiny import ROOT

FOLDER = ROOT / "constraints"
TIERS = {"jax-0.10": "3.11", "jax-0.12": "3.13"}


def pins(name: str) -> dict[str, str]:
    """Returns package -> version; every other line must be a comment, or a hash of the package above."""
    versions = {}
    for line in (FOLDER / f"{name}.txt").read_text().splitlines():
        pin = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)( \\)?", line)
        if pin:
            versions[pin[1]] = pin[2]
        else:
            assert re.fullmatch(r"#.*|    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    return versions


@pytest.mark.parametrize("name", TIERS)
def test_constraints_when_read_then_within_the_bounds(name):
    """pip can install all pinned versions together with this package."""
    versions = pins(name)
    requirements = importlib.metadata.requires("aimv2_jax")
    environment = {"python_version": TIERS[name], "python_full_version": f"{TIERS[name]}.0"}
    required = [Requirement(text) for text in requirements]
    environment["extra"] = "test"
    applicable = [item for item in required if not item.marker or item.marker.evaluate(environment)]
    assert {"jax", "flax", "libtpu", "pytest"} <= {item.name for item in applicable}
    for item in applicable:
        package = item.name.lower()
        assert package == "torch" or item.specifier.contains(versions[package]), (str(item), versions.get(package))


@pytest.mark.parametrize("name", TIERS)
def test_constraints_when_hashed_then_the_same_versions(name):
    text = (FOLDER / f"{name}-hashes.txt").read_text()
    assert pins(f"{name}-hashes") == pins(name)
    assert all(re.search(rf"^{package}==.* \\\n    --hash=", text, re.M) for package in pins(name))


def test_versions_when_pinned_then_those_installed():
    versions, absent = runpy.run_path(str(FOLDER / "write.py"))["pinned"]()
    assert {name: importlib.metadata.version(name) for name in versions} == versions
    # Direct and indirect requirements.
    assert {"jax", "jaxlib", "opt-einsum", "pytest-xdist", "libtpu"} <= set(versions)
    assert not {"torch", "sympy", "triton", "aimv2-jax"} & set(versions) and not absent & set(versions)
