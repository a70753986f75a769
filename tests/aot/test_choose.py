"""Choice of mesh, passes and recomputation for rented chips."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from functools import partial

import pytest

from aimv2_jax.aot import choose as chooser
from aimv2_jax.aot.__main__ import main
from aimv2_jax.aot.candidates import enumerate_candidates
from aimv2_jax.aot.choose import choice_lines, choose, cubic_shape, parse_chips
from aimv2_jax.aot.predict import GIB, predict_step
from aimv2_jax.aot.prediction import Figures, Prediction
from aimv2_jax.aot.topology import parse_topology
from aimv2_jax.config.load import load_config
from aimv2_jax.errors import UserError
from tests.aot.test_program import needs_compiler, settings
from tests.aot.test_summary import GOOD, REFUSED
from tests.helpers.tiny import QUICKSTART, ROOT

SMALL = [(key, value) for key, value in settings() if key != "mesh.fsdp"]
PLAIN = {"model.remat": "none", "model.decoder.remat": "none"}


def experiment(size: str, *overrides: tuple[str, str]):
    return load_config(ROOT / f"experiments/pretrain.py:{size}", overrides)


def built(size: str, changes: Mapping[str, str]):
    return experiment(size, *changes.items())


def command(chips: str, *flags: str, overrides=SMALL) -> list[str]:
    keys = (f"--config.{key}={value}" for key, value in overrides)
    return [f"--config={QUICKSTART}", "--choose", f"--chips={chips}", *flags, *keys]


@pytest.mark.parametrize(
    ("chips", "name"),
    [
        ("v6e:64", "v6e:8x8"),
        ("v6e:128", "v6e:8x16"),
        ("v5e:4x8", "v5e:4x8"),
        ("v5p:4", "v5p:2x2x1"),
        ("v5p:32", "v5p:2x4x4"),
        ("v7x:64", "v7x:4x4x4"),
    ],
)
def test_chips_when_counted_or_shaped(chips, name):
    """A count becomes the shape whose sizes differ least."""
    assert parse_chips(chips, None, 1).name == name
    assert parse_chips(chips, name, 2).slices == 2


def test_shape_when_the_count_is_prime_then_a_line():
    assert cubic_shape(7, 2) == (1, 7) and cubic_shape(7, 3) == (7, 1, 1)


@pytest.mark.parametrize(
    ("chips", "topology", "message"),
    [
        ("v9:64", None, "--chips names an unknown chip: 'v9'. Use one of v4, v5e, v5p, v6e, v7x"),
        ("v6e", None, "--chips is not CHIP:SHAPE: 'v6e'"),
        ("v6e:0", None, "--chips is not CHIP:SHAPE: 'v6e:0'"),
        ("v6e:64", "v6e:8x16", "'v6e:8x16 has 128 v6e chips, --chips is v6e:64'. Give a shape of 64 chips"),
        ("v6e:64", "v5e:8x8", "'v5e:8x8 has 64 v5e chips, --chips is v6e:64'"),
    ],
)
def test_chips_when_they_cannot_be(chips, topology, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_chips(chips, topology, 1)


@pytest.mark.parametrize(("flag", "message"), [("--price=0", "'0' is not a number"), ("--price=nan", "'nan' is not")])
def test_price_when_not_positive(flag, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command("v5e:4", flag))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--choose"], ["--chips=v5e:4"], []])
def test_choose_and_chips_go_together(flags, capsys):
    with pytest.raises(SystemExit):
        main([f"--config={QUICKSTART}", *flags])
    assert "--choose and --chips" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "meshes"),
    [
        ("v6e:8x8", {(64, 1), (8, 8), (1, 64)}),
        ("v5p:2x2x4", {(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)}),
        ("v7x:4x4x4", {(128, 1), (64, 2), (32, 4), (16, 8), (8, 16), (4, 32), (2, 64), (1, 128)}),
        ("v5e:16x16", {(256, 1), (16, 16)}),  # 1024 rows over 256 chips would leave 4 of a tile's 8.
    ],
)
def test_candidates_keep_the_batch_and_follow_the_axes(name, meshes):
    topology = parse_topology(name)
    found = enumerate_candidates(experiment("large"), topology, {})
    assert {(candidate.data, candidate.fsdp) for candidate in found} == meshes
    for candidate in found:
        assert topology.num_devices * candidate.passes * candidate.images == 8192
    assert [candidate.seconds for candidate in found] == sorted(candidate.seconds for candidate in found)
    assert len(set(found)) == len(found)


def test_candidates_when_keys_are_set_then_only_those():
    topology = parse_topology("v6e:8x8")
    found = enumerate_candidates(experiment("large"), topology, {"mesh.fsdp": "8", "model.remat": "gate"})
    assert {(candidate.fsdp, candidate.remat[0]) for candidate in found} == {(8, "gate")}
    assert enumerate_candidates(experiment("large"), topology, {"mesh.data": "-1", "seed": "3"})
    with pytest.raises(UserError, match=r"no candidate with the values given: 'mesh.fsdp=5'. Leave out"):
        enumerate_candidates(experiment("large"), topology, {"mesh.fsdp": "5"})


def test_batch_when_no_candidate_divides_it():
    config = experiment("large", ("data.batch_size", "8191"))
    with pytest.raises(UserError, match="does not divide over the devices of --chips: '8191 examples, 64 devices"):
        enumerate_candidates(config, parse_topology("v6e:8x8"), {})


# Compiled sizes in GiB: results/aot.md.
@pytest.mark.parametrize(
    ("run", "name", "fsdp", "remat", "gib"),
    [
        ("large", "v5e:16x16", 16, ("none", "none"), 11.94),
        ("large", "v6e:16x16", 16, ("none", "none"), 9.02),
        ("base", "v5e:16x16", 1, ("none", "none"), 8.57),
        ("huge", "v5p:4x4x16", 16, ("none", "none"), 14.20),
        ("1b", "v5e:16x16", 16, ("matmuls", "matmuls"), 13.33),
        ("3b", "v6e:16x16", 16, ("none", "none"), 23.70),
        ("3b", "v5e:16x16", 16, ("gate", "full"), 14.73),
    ],
)
def test_estimated_memory_is_near_the_compilers(run, name, fsdp, remat, gib):
    """At most a quarter above it, the share that pruning allows for, and not far below."""
    found = enumerate_candidates(experiment(run), parse_topology(name), {"mesh.fsdp": str(fsdp)})
    [estimate] = [each.num_bytes / GIB for each in found if each.passes == 1 and each.remat == remat]
    assert 0.8 * estimate <= gib <= 1.25 * estimate


def figures(hours: float, spare: float = 0.5) -> Figures:
    outcome = Prediction.from_json(GOOD).outcome
    return dataclasses.replace(outcome, chip_hours=hours, hbm_spare=spare)


def test_choose_when_one_does_not_fit_then_the_next_remat(monkeypatch):
    """The budget ends the search; those that fit are ranked by chip-hours, the others come last."""
    refused = Prediction.from_json(REFUSED).outcome
    outcomes = iter([refused, figures(90, spare=0.01), figures(300), figures(200), figures(100)])
    monkeypatch.setattr(chooser, "predict_step", lambda *_: next(outcomes))
    topology, lines = parse_topology("v6e:8x16"), []
    choices = choose(partial(built, "large"), topology, {}, 4, False, lines.append)
    assert [choice.fits for choice in choices] == [True, True, False, False] and len(lines) == 4
    assert [getattr(choice.outcome, "chip_hours", None) for choice in choices] == [200, 300, 90, None]
    tried = [re.search(r": (data .*), remat ([\w/]+),", line).groups() for line in lines]
    assert tried[0][0] == tried[1][0] and [remat for _, remat in tried[:2]] == ["none", "matmuls"]
    table = choice_lines(choices, topology, "experiments/pretrain.py:large", {"seed": "1"}, price=2.5)
    assert "500" in table[3] and "does not compile: exceeds" in table[6]
    assert "--config.seed=1" in table[-1] and "--topology=v6e:8x16" in table[-1]


def test_choose_when_nothing_fits_then_the_least(monkeypatch):
    message = r"none of 0 compiled candidates fits with 5% to spare: 'v5e:1x1: the least is \d\d\.\d GiB of 15\.8"
    with pytest.raises(UserError, match=f"{message}.*Take more chips"):
        choose(partial(built, "3b"), parse_topology("v5e:1x1"), {}, 4, False, print)
    monkeypatch.setattr(chooser, "predict_step", lambda *_: figures(9, spare=0.02))
    with pytest.raises(UserError, match=r"none of 2 compiled candidates .*the least is 9\.0 GiB"):
        choose(partial(built, "large"), parse_topology("v6e:8x16"), {}, 2, False, print)


def test_choose_when_a_candidate_has_no_step(monkeypatch):
    """Its error stands in the table; if no other fits, or the topology cannot be, it ends the command."""
    topology, error = parse_topology("v6e:8x16"), UserError("libtpu cannot print it", "x", "Change it")
    unknown = UserError("--topology is not one that libtpu knows", "v6e:8x16", "Give another")
    outcomes = iter([error, figures(7), error, unknown])

    def outcome(*_):
        result = next(outcomes)
        if isinstance(result, UserError):
            raise result
        return result

    monkeypatch.setattr(chooser, "predict_step", outcome)
    choices = choose(partial(built, "large"), topology, {}, 2, False, print)
    assert [choice.fits for choice in choices] == [True, False]
    assert "does not compile: libtpu cannot print it" in choice_lines(choices, topology, "a.py", {}, None)[4]
    for message in ("libtpu cannot print it", "not one that libtpu knows"):
        with pytest.raises(UserError, match=message):
            choose(partial(built, "large"), topology, {}, 1, False, print)


@needs_compiler
@pytest.mark.slow
def test_command_when_choosing_for_four_chips(tmp_path, capsys):
    """It compiles two candidates, and the flags that it prints give the figures of the first again."""
    report = tmp_path / "best.json"
    keys = [*SMALL, *PLAIN.items(), ("train.microbatches", "1")]
    flags = ("--candidates=2", "--price=3", f"--json={report}")
    assert main(command("v5e:4", *flags, overrides=keys)) == 0
    shown, best = capsys.readouterr().out, json.loads(report.read_text())
    assert "PREDICTIONS" in shown and "v5e:2x2, 4 chips" in shown and "2 of at most 2" in shown
    times = [float(line.split()[-5]) for line in shown.splitlines() if re.match(r"data \d+.*remat", line)]
    assert len(times) == 2 and times == sorted(times) and times[0] == round(best["predicted_ms"], 1)
    again = shown.splitlines()[-1].split()[3:]
    assert main([*again, "--no-xla-attention", f"--json={tmp_path / 'again.json'}"]) == 0
    second = json.loads((tmp_path / "again.json").read_text())
    for key in ("predicted_ms", "hbm_gib", "mesh", "overrides"):
        assert second[key] == best[key]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x1", "v6e:2x2"])
def test_ranking_agrees_with_full_predictions(name):
    """Of the same candidates, on topologies that no experiment names."""

    def build(changes):
        return load_config(QUICKSTART, [*SMALL, *changes.items()])

    topology = parse_topology(name)
    choices = choose(build, topology, PLAIN, 4, False, print)
    assert len(choices) == 4 and choices[0].fits
    full = [predict_step(build(choice.candidate.overrides), topology, full=True).chip_hours for choice in choices]
    for choice, hours in zip(choices, full):
        assert choice.outcome.chip_hours == pytest.approx(hours, rel=0.02)
    # Two that differ by less than the proxy's error have no order.
    assert all(first <= 1.02 * second for first, second in itertools.pairwise(full))
