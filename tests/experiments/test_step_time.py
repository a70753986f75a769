"""The step-time benchmark: its presets, the search for the largest batch, and its user errors."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.monitoring.flops import flops_per_example
from aimv2_jax.parallel import hardware
from experiments.benchmarks import recompute, step_time
from experiments.benchmarks.step_time import fits, largest_batch, main, preset_config


def test_preset_of_a_pretraining_run():
    """It has the run's model, on a mesh of one device."""
    config = preset_config("large_224", [("data.batch_size", "24")])
    assert (config.model.encoder.width, config.model.encoder.depth, config.model.compute_dtype) == (
        1024,
        24,
        "bfloat16",
    )
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.data.batch_size) == (1, 1, 1, 24)


@pytest.mark.parametrize("name", step_time.PRESETS)
def test_preset_builds_a_config(name):
    """Every preset gives a valid config with synthetic data."""
    assert preset_config(name).data.sources == {"synthetic": ""}


def test_preset_overrides_are_parsed():
    """Overrides are texts, parsed as on a command line."""
    config = preset_config("tiny", [("model.remat", "full"), ("optimizer.betas", "(0.5, 0.6)")])
    assert (config.model.remat, config.optimizer.betas) == ("full", (0.5, 0.6))


@pytest.mark.parametrize("key", ["model.rematt", "modell.remat", "model"])
def test_preset_refuses_a_misspelt_key(key):
    """The error names the key."""
    with pytest.raises(UserError, match=key):
        preset_config("tiny", [(key, "full")])


@pytest.mark.parametrize(
    ("capacity", "expected", "tried"),
    [
        (8, 8, [8, 16]),
        (100, 96, [8, 16, 32, 64, 128, 96, 112, 104]),
        (112, 112, [8, 16, 32, 64, 128, 96, 112, 120]),
        (10**6, 512, [8, 16, 32, 64, 128, 256, 512]),
    ],
)
def test_largest_batch_is_found_to_an_eighth(capacity, expected, tried):
    """The search doubles the batch until it fails, then bisects to an eighth; `most` bounds it."""
    sizes = []

    def fits_in_memory(size: int) -> bool:
        sizes.append(size)
        return size <= capacity

    assert largest_batch(fits_in_memory, most=512) == expected
    assert sizes == tried


def test_largest_batch_when_nothing_fits():
    """A user error reports too little memory."""
    with pytest.raises(UserError, match="memory"):
        largest_batch(lambda size: False)


class Trainer:
    """A fake trainer that runs out of memory above 20 examples, with the given error."""

    def __init__(self, config, error: str):
        self.size, self.error = config.data.batch_size, error

    def train(self):
        if self.size > 20:
            raise jax.errors.JaxRuntimeError(self.error)
        return jax.numpy.zeros(())


def with_batch(size: int):
    config = preset_config("tiny")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))


@pytest.mark.parametrize(
    "error",
    ["RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.", "RESOURCE_EXHAUSTED: Ran out of HBM"],
)
def test_fits_is_false_out_of_memory(error, monkeypatch):
    """Both of XLA's messages about memory are recognised."""
    monkeypatch.setattr(step_time, "Trainer", lambda config: Trainer(config, error))
    assert largest_batch(lambda size: fits(with_batch(size))) == 16
    assert fits(with_batch(20)) and not fits(with_batch(21))


def test_fits_raises_other_errors(monkeypatch):
    """An error that is not about memory is raised."""
    monkeypatch.setattr(step_time, "Trainer", lambda config: Trainer(config, "INTERNAL: broken"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        fits(with_batch(21))


@pytest.mark.parametrize(("platform", "words"), [("gpu", "no NVIDIA GPU was found"), ("tpu", "no TPU was found")])
def test_missing_chip_is_a_user_error(platform, words, capsys, monkeypatch):
    """The command prints one line on stderr and exits with code 2."""
    missing = dataclasses.replace(step_time.PLATFORMS[platform], is_here=lambda: False)
    monkeypatch.setitem(step_time.PLATFORMS, platform, missing)
    assert main(["--preset=large_224", f"--platform={platform}"]) == 2
    output = capsys.readouterr()
    assert words in output.err and output.err.count("\n") == 1 and not output.out


def test_batch_for_a_pod_is_refused_on_a_cpu(capsys):
    """The error asks for `--batch`."""
    assert main(["--preset=large_224"]) == 2
    assert "Give --batch" in capsys.readouterr().err


def test_cost_of_the_sdc_check_is_measured():
    """Plain and checked steps are each timed `rounds` times."""
    plain_s, checked_s = recompute.measure(preset_config("tiny"), rounds=2)
    assert len(plain_s) == len(checked_s) == 2 and min(plain_s + checked_s) > 0


def test_mfu_is_that_of_the_models_flops(monkeypatch):
    """MFU is FLOPs of an image x images a second over the chip's peak, at the patches of the batch."""
    kind = hardware.ChipKind("stand-in", jax.devices()[0].device_kind, 1e12)
    monkeypatch.setattr(hardware, "_KINDS", (kind,))
    overrides = [("model.compute_dtype", "bfloat16"), ("model.encoder.position", "sincos"), ("data.areas", "(16,)")]
    config = preset_config("tiny", overrides)
    line = step_time.measure(config, rounds=1, steps=1, matmul_side=8)
    assert line["mfu"] == pytest.approx(line["images_per_s"] * flops_per_example(config, 16) / 1e12)


def test_turns_print_a_rate_for_each_line(monkeypatch, capsys):
    """Two lines on stdin give two rates on stdout."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    assert main(["--preset", "tiny", "--turns", "--steps", "1"]) == 0
    rates = [json.loads(line)["images_per_s"] for line in capsys.readouterr().out.splitlines()]
    assert len(rates) == 2 and min(rates) > 0
