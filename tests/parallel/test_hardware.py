"""The table of accelerators: published figures, and the names that jax and libtpu give."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from aimv2_jax.aot.topology import parse_topology
from aimv2_jax.config.schema import TPU_OPTION_GROUPS
from aimv2_jax.errors import UserError
from aimv2_jax.monitoring.flops import model_flops_utilisation
from aimv2_jax.parallel.hardware import CHIPS, chip_kind, find_chip
from tests.helpers.tiny import ROOT, tiny_config

# Google's pages, a chip: bfloat16 TFLOP/s, GB/s and GiB of HBM, and GB/s of all links, both directions. Of v4's links
# they have only the all-reduce of a pod: 1.1 PB/s over 4096 chips, in one direction.
PUBLISHED = {
    "v4": (275, 1200, 32, 540),
    "v5e": (197, 819, 16, 400),
    "v5p": (459, 2765, 96, 1200),
    "v6e": (918, 1640, 32, 800),
    "v7x": (2307, 7380, 192, 1200),
}
SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "v7x:2x2x1"}
DESCRIBE = """
import json, sys
from aimv2_jax.aot.topology import described_devices, parse_topology
devices = described_devices(parse_topology(sys.argv[1]))
print(json.dumps([len(devices), devices[0].device_kind, [[*d.coords, d.core_on_chip] for d in devices]]))
"""


def device(kind: str) -> SimpleNamespace:
    return SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize("name", PUBLISHED)
def test_chip_has_the_published_figures(name):
    """Counted by chip; the memory that a program may use is a little less than all of it."""
    chip, (tflops, hbm_gb_per_s, gib, link_gb_per_s) = CHIPS[name], PUBLISHED[name]
    assert chip.devices * chip.peak_flops / 1e12 == pytest.approx(tflops, rel=3e-3)
    assert chip.devices * chip.hbm_bytes_per_s / 1e9 == pytest.approx(hbm_gb_per_s)
    assert 0.93 * gib < chip.devices * chip.hbm_limit_bytes / 2**30 <= gib
    assert 2 * 2 * chip.torus_axes * chip.link_bytes_per_s / 1e9 == pytest.approx(link_gb_per_s)
    assert chip.flops_per_cycle in (2**17, 2**18, 2**19)


def test_options_have_a_group_for_every_chip():
    assert ("all", *PUBLISHED) == TPU_OPTION_GROUPS and set(CHIPS) == set(PUBLISHED)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "v7x"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("TPU v4 lite", None),
        ("TPU8t", None),
        ("cpu", None),
    ],
)
def test_device_kind_when_seen_by_a_run(kind, name):
    """A chip that the table lacks has no kind, and no other chip's."""
    found = chip_kind(device(kind))
    assert (found and found.name) == name


def test_mfu_when_the_chip_is_unknown_then_none():
    """The run goes on without it; a v7x's two devices have half of a chip's peak each."""
    config = tiny_config(model__compute_dtype="bfloat16")
    assert model_flops_utilisation(config, 1.0, [device("TPU8t")]) is None
    two = model_flops_utilisation(config, 2307 / 2, [device("TPU7x")] * 2)
    assert two == pytest.approx(0.5, rel=1e-3)


def test_prediction_when_the_chip_is_unknown_then_refused():
    with pytest.raises(UserError, match=r"--chips names an unknown chip: .v8t.* v4, v5e, v5p, v6e, v7x"):
        find_chip("v8t", "--chips")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e .[tpu]")
@pytest.mark.parametrize("name", SMALLEST)
def test_topology_when_libtpu_describes_it(name):
    """It has as many devices as the table counts, of the kind that a run on it sees. Nothing is compiled."""
    topology = parse_topology(SMALLEST[name])
    command = [sys.executable, "-c", DESCRIBE, topology.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    count, kind, places = json.loads(done.stdout.splitlines()[-1])
    assert count == topology.num_devices == len({tuple(place) for place in places})
    assert {place[-1] for place in places} == set(range(CHIPS[name].devices))
    assert chip_kind(device(kind)) is CHIPS[name]
