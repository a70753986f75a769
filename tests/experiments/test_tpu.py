"""The defaults of TPU generations: what each changes, and that they fit their topologies."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest

from aimv2_jax.aot.topology import parse_topology
from aimv2_jax.config.load import config_to_dict, flatten, load_config
from aimv2_jax.errors import UserError
from aimv2_jax.parallel.hardware import CHIPS
from experiments import highres, native, pretrain, tpu
from tests.helpers.tiny import ROOT

GOLDEN = Path(__file__).parents[1] / "golden_configs/chips.txt"
_HOW_IT_RUNS = ("mesh.", "model.remat", "model.decoder.remat", "train.tpu_compiler_options.")


def changes(file: str, run: str, chip: str) -> dict[str, object]:
    """Returns the keys that a chip's defaults change in a run, or add to it; None for those that they take away."""
    plain, changed = (
        flatten(config_to_dict(load_config(ROOT / f"experiments/{file}.py:{name}"))) for name in (run, f"{run},{chip}")
    )
    return {
        key: changed.get(key)
        for key in dict.fromkeys([*plain, *changed])
        if plain.get(key) != changed.get(key) or (key in plain) != (key in changed)
    }


def summary() -> str:
    """Returns a paragraph for each size and chip: its topology, images a device, and the keys that it changes."""
    text = ""
    for chip, sizes in tpu.CHIPS.items():
        for size, defaults in sizes.items():
            images = 8192 // parse_topology(defaults.topology).num_devices
            text += f"pretrain:{size},{chip} on {defaults.topology}, {images} images a device\n"
            text += "".join(f"    {key} = {value!r}\n" for key, value in changes("pretrain", size, chip).items())
    return text


def test_defaults_change_what_was_reviewed():
    assert summary() == GOLDEN.read_text(), "if the change is intended, run python -m tests.write_golden_configs"


def test_every_chip_of_the_table_has_every_size():
    assert tpu.CHIPS.keys() == CHIPS.keys()
    assert all(tuple(sizes) == pretrain.SIZES for sizes in tpu.CHIPS.values())
    assert len(pretrain.RUNS) == 5 * (1 + 5) and len(highres.RUNS) == 10 * (1 + 5) and len(native.RUNS) == 1 + 5


@pytest.mark.parametrize("chip", CHIPS)
def test_chip_decides_how_a_run_goes_not_what_it_learns(chip):
    """All stages take the same defaults; on v5e they are the plain run."""
    assert all(key.startswith(_HOW_IT_RUNS) for key in changes("highres", "3b,448", chip))
    for size in pretrain.SIZES:
        changed = changes("pretrain", size, chip)
        assert all(key.startswith(_HOW_IT_RUNS) for key in changed)
        assert changes("highres", f"{size},336", chip) == changed
        assert chip != "v5e" or not changed
    assert changes("native", "large", chip) == changes("pretrain", "large", chip)
    assert changes("highres", "3b,448", "v5e") == {}


@pytest.mark.parametrize("chip", CHIPS)
def test_mesh_follows_the_topology(chip):
    """`fsdp` is a product of whole axes, the rest of the slice splits the batch, and tiles of a matrix stay whole."""
    for size, defaults in tpu.CHIPS[chip].items():
        topology = parse_topology(defaults.topology)
        assert topology.chip.name == chip and len(topology.shape) == topology.chip.torus_axes
        axes = topology.axes
        subsets = (subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n))
        assert defaults.fsdp in {math.prod(subset) for subset in subsets}
        config = load_config(ROOT / f"experiments/pretrain.py:{size},{chip}")
        assert config.data.batch_size % topology.num_devices == 0
        assert config.model.encoder.width % (8 * defaults.fsdp) == 0


def test_run_when_the_chip_is_unknown_then_the_known_ones():
    with pytest.raises(UserError, match=r"no such run of the file: 'large,v3'. Give .*large,v6e"):
        load_config(ROOT / "experiments/pretrain.py:large,v3")


def test_module_prints_runs_and_topologies():
    """launch/aot_check.sh reads them."""
    done = subprocess.run([sys.executable, "-m", "experiments.tpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [line.split() for line in done.stdout.splitlines()]
    assert len(runs) == 25 and ["large,v5e", "v5e:16x16"] in runs and all(run in pretrain.RUNS for run, _ in runs)
