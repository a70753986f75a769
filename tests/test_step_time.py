"""The step-time benchmark: its presets, the search for the largest batch, and the error if a chip is missing."""

from __future__ import annotations

import dataclasses
import io
import json

import jax
import pytest

from aimv2_jax.errors import UserError
from experiments.benchmarks import recompute, step_time
from experiments.benchmarks.step_time import fits, largest_batch, main, preset_config


def test_preset_when_it_is_a_pretraining_run_then_its_model_on_one_device():
    config = preset_config("large_224", [("data.batch_size", "24")])
    assert (config.model.encoder.width, config.model.encoder.depth, config.model.compute_dtype) == (
        1024,
        24,
        "bfloat16",
    )
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.data.batch_size) == (1, 1, 1, 24)


@pytest.mark.parametrize("name", step_time.PRESETS)
def test_preset_when_any_then_it_can_be_built(name):
    assert preset_config(name).data.sources == {"synthetic": ""}


def test_preset_when_keys_are_overridden_then_they_are_read_as_on_a_command_line():
    config = preset_config("tiny", [("model.remat", "full"), ("optimizer.betas", "(0.5, 0.6)")])
    assert (config.model.remat, config.optimizer.betas) == ("full", (0.5, 0.6))


@pytest.mark.parametrize("key", ["model.rematt", "modell.remat", "model"])
def test_preset_when_a_key_is_misspelt_then_refused_by_name(key):
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
def test_largest_batch_when_memory_has_an_end_then_found_to_an_eighth(capacity, expected, tried):
    sizes = []

    def fits_in_memory(size: int) -> bool:
        sizes.append(size)
        return size <= capacity

    assert largest_batch(fits_in_memory, most=512) == expected
    assert sizes == tried


def test_largest_batch_when_not_even_a_few_fit_then_refused():
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
def test_fits_when_the_step_runs_out_of_memory_then_no(error, monkeypatch):
    monkeypatch.setattr(step_time, "Trainer", lambda config: Trainer(config, error))
    assert largest_batch(lambda size: fits(with_batch(size))) == 16
    assert fits(with_batch(20)) and not fits(with_batch(21))


def test_fits_when_the_step_fails_otherwise_then_the_error_is_not_hidden(monkeypatch):
    monkeypatch.setattr(step_time, "Trainer", lambda config: Trainer(config, "INTERNAL: broken"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        fits(with_batch(21))


@pytest.mark.parametrize(("platform", "words"), [("gpu", "no NVIDIA GPU was found"), ("tpu", "no TPU was found")])
def test_step_time_when_the_chip_is_missing_then_one_sentence_and_code_2(platform, words, capsys, monkeypatch):
    missing = dataclasses.replace(step_time.PLATFORMS[platform], is_here=lambda: False)
    monkeypatch.setitem(step_time.PLATFORMS, platform, missing)
    assert main(["--preset=large_224", f"--platform={platform}"]) == 2
    output = capsys.readouterr()
    assert words in output.err and output.err.count("\n") == 1 and not output.out


def test_step_time_when_a_pod_s_batch_meets_a_cpu_then_a_batch_is_asked_for(capsys):
    assert main(["--preset=large_224"]) == 2
    assert "Give --batch" in capsys.readouterr().err


def test_recompute_when_measured_then_each_kind_of_step_as_often_as_asked():
    plain_s, checked_s = recompute.measure(preset_config("tiny"), rounds=2)
    assert len(plain_s) == len(checked_s) == 2 and min(plain_s + checked_s) > 0


def test_turns_when_asked_twice_then_two_rates(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    assert main(["--preset", "tiny", "--turns", "--steps", "1"]) == 0
    rates = [json.loads(line)["images_per_s"] for line in capsys.readouterr().out.splitlines()]
    assert len(rates) == 2 and min(rates) > 0
