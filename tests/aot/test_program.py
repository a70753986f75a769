"""Ahead-of-time analysis of a small train step, compiled for described topologies."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys

import pytest

from aimv2_jax.aot import predict, topology
from aimv2_jax.aot.__main__ import main
from aimv2_jax.aot.compiler import compile_step
from aimv2_jax.aot.prediction import Figures, Prediction
from aimv2_jax.aot.topology import parse_topology
from aimv2_jax.aot.worker import Job
from aimv2_jax.config.load import config_to_dict, load_config
from aimv2_jax.errors import UserError
from aimv2_jax.models.aimv2 import count_parameters
from aimv2_jax.train.builder import build_setup
from tests.helpers.tiny import QUICKSTART, ROOT, TASKS

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed: pip install -e .[tpu]",
)
# Heads have 128 channels, so that the program contains the kernels of real runs.
SMALL = {
    "model.encoder.width": 128,
    "model.encoder.heads": 1,
    "model.encoder.hidden": 256,
    "model.encoder.depth": 2,
    "model.decoder.width": 128,
    "model.decoder.heads": 1,
    "model.decoder.hidden": 256,
    "model.decoder.depth": 2,
    "model.compute_dtype": "bfloat16",
    "data.batch_size": 64,
    "mesh.fsdp": 4,
}
HALVED = {"width": 256, "heads": 2, "depth": 1}  # Size of a trunk that two chips share.
KEYS = {
    *("compiles", "hbm_gib", "hbm_limit_gib", "model_tflops_per_chip", "predicted_ms", "predicted_mfu"),
    *("predicted_mfu_with_comms", "collectives", "images_per_s"),
}


def settings(**changes: object) -> list[tuple[str, str]]:
    """Returns overrides of the small run; `changes` are keys with `__` for the dot."""
    values = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    return [(key, str(value)) for key, value in values.items()]


def arguments(name: str, **changes: object) -> list[str]:
    """Returns a command line for the small run."""
    return [f"--config={QUICKSTART}", f"--topology={name}", *(f"--config.{k}={v}" for k, v in settings(**changes))]


def scheduled(name: str, slices: int, **changes: object) -> Figures:
    """Returns the figures of a step compiled up to its schedule, without a proxy (no fusion cycles)."""
    overrides = [("mesh.slices", str(slices)), *settings(**changes)]
    config, described = load_config(QUICKSTART, overrides), parse_topology(name, slices)
    return predict.predict(config, described, compile_step(config, described, full=False))


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory) -> tuple[str, dict, str]:
    """Module, figures and printed report of the small run on sixteen chips, with the default (proxy) compile.

    It runs in bfloat16 with gradients summed in float32; its encoder is deeper than its proxy's.
    """
    report, shown, compiled = tmp_path_factory.mktemp("sixteen") / "report.json", io.StringIO(), []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):

        def recorded_compile(*arguments, **options):
            compiled.append(compile_step(*arguments, **options))
            return compiled[-1]

        patch.setattr(predict, "compile_step", recorded_compile)
        assert main([*arguments("v5e:4x4", model__encoder__depth=3), "--no-xla-attention", f"--json={report}"]) == 0
    return compiled[0].text, json.loads(report.read_text()), shown.getvalue()


@needs_compiler
def test_gradients_bfloat16_rows_sum_in_float32(sixteen):
    """The sums are in float32 on each chip and between chips."""
    module, *_ = sixteen
    assert re.search(r"= f32\[[\d,]*\]\S* reduce\(", module)
    assert not re.findall(r"= bf16\[[\d,]*\]\S* reduce\(.*", module)
    assert re.search(r"= \(?f32\[[\d,]*\]\S* all-reduce\(", module)
    bfloat16 = re.findall(r"= \(?bf16\[.* all-reduce\((.*?)\)", module)
    # Exception: a small weight is gathered by an all-reduce in which each chip adds its shard to zeros.
    assert not [operands for operands in bfloat16 if re.sub(r"%dynamic-update-slice[.\d]*,? ?", "", operands)]


@needs_compiler
def test_step_when_on_a_mesh_of_sixteen_then_nothing_is_replicated_and_the_parts_add_up(sixteen):
    _, figures, _ = sixteen
    assert figures["replicated"] == []
    assert figures["mesh"] == {"slice": 1, "data": 4, "fsdp": 4, "tensor": 1}
    assert sum(figures["hbm_parts_gib"].values()) == pytest.approx(figures["hbm_gib"])
    assert figures["hbm_parts_gib"]["optimiser"] == pytest.approx(2 * figures["hbm_parts_gib"]["parameters"], rel=0.01)
    assert -0.05 < figures["recompute"] < 0.15  # Attention's backward kernel recomputes the scores.
    by = {(row["kind"], row["axis"]) for row in figures["collectives"] if row["bytes"] > 2**16}
    assert {("all-gather", "fsdp"), ("reduce-scatter", "fsdp"), ("all-reduce", "data")} <= by
    assert figures["between_slices"] == []
    kernels = {row["name"]: row for row in figures["kernels"]}
    for direction in ("forward", "backward"):
        assert kernels[f"whole_row_attention_{direction}"]["states_its_cost"]
        assert kernels[f"whole_row_attention_{direction}"]["count"] == 5


@needs_compiler
def test_default_way_takes_cycles_from_its_proxy(sixteen):
    """More than 0.7 of the cycles are those of the same fusion in the proxy."""
    _, figures, shown = sixteen
    assert "PREDICTION" in shown and "by part of the model" not in shown
    assert not figures["full"] and figures["compiles"] and set(figures) >= KEYS
    assert json.loads(json.dumps(Prediction.from_json(figures).to_json())) == figures
    # The schedule chooses the memory of a fusion's operands, so shares move between the two kinds of match.
    matched = [share for source, share in figures["cycles_from"].items() if source.startswith("the same fusion in the")]
    assert len(matched) == 2 and sum(matched) > 0.7, figures["cycles_from"]
    assert figures["predicted_mfu"] > figures["predicted_mfu_with_comms"] > figures["predicted_mfu_without_overlap"] > 0


@needs_compiler
def test_step_when_on_two_slices_then_only_gradients_and_sums_cross():
    figures = scheduled("v5e:2x2", 2)
    crossing = {row.carries: row.bytes for row in figures.between_slices}
    assert set(crossing) == {"gradients", "losses, counts and norms"}
    parts = figures.hbm_parts_gib["parameters"] * 2**30
    assert crossing["gradients"] == pytest.approx(parts, rel=0.05)  # Each chip sends its shard in float32.


@needs_compiler
def test_step_when_only_tensor_splits_then_compiles():
    """Each chip holds one head of two, and the kernels see only its columns."""
    sizes = {f"model__{trunk}__{key}": n for trunk in ("encoder", "decoder") for key, n in HALVED.items()}
    figures = scheduled("v5e:1x2", 1, mesh__data=1, mesh__fsdp=1, mesh__tensor=2, **sizes)
    assert figures.mesh == {"slice": 1, "data": 1, "fsdp": 1, "tensor": 2}
    kernels = {row.name: row.count for row in figures.kernels}
    assert kernels["whole_row_attention_forward"] == kernels["whole_row_attention_backward"] == 2


@needs_compiler
@pytest.mark.parametrize("task", sorted(TASKS.keys() - {"pretrain"}))
def test_frozen_parameters_count_as_parameters(task):
    """They are split over the chips like the others, without moments; the task's own tower is a part of the model."""
    figures = scheduled("v5e:2x2", 1, **TASKS[task])
    assert figures.replicated == []
    assert {"lit": "text tower", "distill": "teacher"}[task] in figures.breakdown
    frozen = build_setup(load_config(QUICKSTART, settings(**TASKS[task]))).abstract_state.frozen
    gib = figures.hbm_parts_gib
    expected = 4 * count_parameters(frozen) / 4 / 2**30  # Float32 on four chips.
    assert gib["parameters"] - gib["optimiser"] / 2 == pytest.approx(expected, rel=0.05)


@needs_compiler
def test_command_when_it_does_not_fit_then_the_compilers_sentence_and_no_figures(tmp_path, capsys):
    report = tmp_path / "report.json"
    flags = ["--no-xla-attention", f"--json={report}"]
    assert main([*arguments("v5e:2x2", data__batch_size=2**19), *flags]) == 0
    shown, figures = capsys.readouterr().out, json.loads(report.read_text())
    assert "does not compile" in shown and "exceeds available HBM (15.75G)" in shown
    assert not figures["compiles"] and figures["predicted_mfu"] is None and set(figures) >= KEYS
    assert json.loads(json.dumps(Prediction.from_json(figures).to_json())) == figures


@needs_compiler
def test_command_when_the_topology_cannot_be(capsys):
    assert main(arguments("v5e:3x3")) == 2
    assert "--topology is not one that libtpu knows: 'v5e:3x3'" in capsys.readouterr().err


@needs_compiler
def test_worker_when_the_mesh_cannot_be(tmp_path):
    """Invalid meshes are user errors, like invalid topologies. All cases run in one process."""
    cases = [
        ({"mesh__fsdp": 3}, "v5e:2x2", "does not fit the devices"),
        ({"mesh__fsdp": 8}, "v5e:4x4", "does not follow the axes of the topology: '2 x 8 x 1'"),
        ({"mesh__fsdp": 1, "mesh__tensor": 4}, "v5e:2x2", "does not divide model.encoder.heads: '4 devices, 1 heads'"),
    ]
    jobs = []
    for number, (changes, name, _) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        config = load_config(QUICKSTART, settings(**changes))
        jobs.append(Job(config_to_dict(config), name, 1, False, str(tmp_path / str(number))).write())
    program = "import json, sys; from aimv2_jax.aot.worker import Job, run\nfor job in sys.argv[1:]: "
    program += "run(Job(**json.load(open(job))))"
    subprocess.run([sys.executable, "-c", program, *map(str, jobs)], check=True, cwd=ROOT, capture_output=True)
    for job, (_, _, message) in zip(jobs, cases):
        assert message in str(UserError(*json.loads((job.parent / "user_error.json").read_text())))


@pytest.mark.parametrize("name", ["v9x:2x2", "v5e", "v5e:0x4", "16x16"])
def test_command_when_the_topology_is_no_name_then_an_example_is_given(name, capsys):
    assert main(arguments(name)) == 2
    assert "v5e:16x16" in capsys.readouterr().err


def test_command_when_the_compiler_is_not_installed_then_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert main(arguments("v5e:2x2")) == 2
    assert "pip install -e .[tpu]" in capsys.readouterr().err


@needs_compiler
@pytest.mark.slow
def test_default_way_agrees_with_the_full_compile(tmp_path, capsys):
    """For a model deeper than its proxy, the cycles of both ways agree to 1 %."""
    deep = arguments("v5e:2x2", model__encoder__depth=5, model__decoder__depth=4, mesh__fsdp=2)
    figures = []
    for flags in ([], ["--full", "--breakdown"]):
        report = tmp_path / "report.json"
        assert main([*deep, *flags, "--no-xla-attention", f"--json={report}"]) == 0
        shown = capsys.readouterr().out
        assert "PREDICTION" in shown and ("by part of the model" in shown) == bool(flags)
        figures.append(json.loads(report.read_text()))
    default, full = figures
    assert default["predicted_mcycles"] == pytest.approx(full["predicted_mcycles"], rel=0.01)
    for key in ("hbm_gib", "compiled_tflops_per_chip", "model_tflops_per_chip"):
        assert default[key] == pytest.approx(full[key], rel=1e-3)
    counted = [
        [(row["kind"], row["axis"], row["count"], row["bytes"]) for row in each["collectives"]] for each in figures
    ]
    assert sorted(counted[0]) == sorted(counted[1])
    # The schedule chooses the memory of a fusion's operands, so shares move between the two kinds of match.
    matched = [share for source, share in default["cycles_from"].items() if source.startswith("the same fusion in the")]
    # Our kernels, which declare their cost, take 0.2.
    assert len(matched) == 2 and sum(matched) > 0.7, default["cycles_from"]
    assert full["predicted_mfu"] > full["predicted_mfu_with_comms"] > full["predicted_mfu_without_overlap"]
    shares = sum(sum(v for k, v in row.items() if k != "exposed collectives") for row in full["breakdown"].values())
    assert shares == pytest.approx(full["predicted_mcycles"])
