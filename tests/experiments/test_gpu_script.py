"""The script for a GPU: its checks, PyTorch's model and the report; the whole script on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from aimv2_jax.errors import EXIT_USER, UserError
from aimv2_jax.models.kernels import cudnn_attention
from experiments.benchmarks import gpu_report
from experiments.benchmarks.gpu_checks import check_attention
from tests.helpers.tiny import ROOT

SCRIPT = ROOT / "experiments/benchmarks/gpu.sh"


def test_attention_check_finds_a_wrong_mask(monkeypatch):
    """The platform's attention passes; one that is causal where it should see a prefix fails."""
    case = (34, (20, 33), (34, 30), "prefix")
    line = check_attention("cpu", [case])
    assert line["passed"] and line["implementation"] == "cudnn_on_xla"
    right = cudnn_attention.attend
    monkeypatch.setattr(cudnn_attention, "attend", lambda *args, **kw: right(*args, **kw | dict(kind="causal")))
    assert not check_attention("cpu", [case])["passed"]


def torch_script(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "experiments/benchmarks/step_torch.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_torch_model_equals_the_reference(golden_dir):
    """Losses, gradients and three optimiser steps of the PyTorch model are the reference's, in float64."""
    pytest.importorskip("torch")
    done = torch_script("--golden", str(golden_dir))
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["largest_errors"]) == {"losses", "gradients", "parameters"}


def test_torch_script_without_jax(tmp_path):
    """The script has the config's model without jax, and reports a rate; bad input gets one line."""
    pytest.importorskip("torch")
    code = "import runpy, sys; sys.modules['jax'] = None; sys.argv[0] = sys.argv[1]; del sys.argv[1]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = ["--preset", "tiny", "--batch", "2", "--rounds", "1", "--steps", "1", "--eager"]
    command = [sys.executable, "-c", code, "experiments/benchmarks/step_torch.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images_per_s"] > 0
    missing = torch_script("--golden", str(tmp_path))
    assert missing.returncode == EXIT_USER and "--golden has no such file" in missing.stderr


LINES = {
    "jax": dict(images_per_s=300.0, mfu=0.5, batch=128, memory_gib=60.0, compile_s=40.0, device="H200", jax="0.12"),
    "torch": dict(images_per_s=200.0, batch=64, memory_gib=50.0, compile_s=50.0, torch="2.13"),
    "attention": dict(errors={"prefix 256": 0.001}, passed=True),
    "resumed": dict(passed=False),
}


def test_report_of_results():
    """It has both rates, PyTorch's MFU by JAX's FLOPs, failures as such, and what is missing."""
    text = gpu_report.report(LINES, "2026-01-01")
    assert "| JAX | 128 | 300.0 | 0.5 | 60 | 40 |\n| PyTorch | 64 | 200.0 | 0.333 | 50 | 50 |" in text
    assert "1.50 x the images of PyTorch, at another batch." in text
    assert "dense mask: passed; largest errors: prefix 256 1.0e-03" in text and "OTHER BITS" in text
    assert "Without a result: native, first, golden, torch_golden." in text


def test_report_refuses_what_is_no_result(tmp_path):
    """An empty folder and a broken file get one sentence."""
    with pytest.raises(UserError, match="has no results"):
        gpu_report.read(tmp_path)
    (tmp_path / "jax.json").write_text("[1")
    with pytest.raises(UserError, match="no JSON object"):
        gpu_report.read(tmp_path)


@pytest.mark.slow
def test_script_runs_on_a_cpu(tmp_path, golden_dir):
    """Every step leaves its result, the resumed run has the same bits, and the report misses nothing."""
    pytest.importorskip("torch")
    environment = os.environ | {"PLATFORM": "cpu", "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    command = ["bash", SCRIPT, tmp_path / "out", golden_dir]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = gpu_report.read(tmp_path / "out")
    assert set(lines) == set(gpu_report.STEPS)
    assert lines["resumed"]["resumed"] and lines["resumed"]["sha256"] == lines["first"]["sha256"]
    assert "Without a result" not in gpu_report.report(lines, "2026-01-01")


def test_script_refuses_an_unknown_platform(tmp_path):
    """One line, before anything runs."""
    environment = os.environ | {"PLATFORM": "abacus"}
    done = subprocess.run(["bash", SCRIPT, tmp_path], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "unknown PLATFORM: 'abacus'" in done.stderr
