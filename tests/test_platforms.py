"""Tests that JAX skips an absent TPU, and that present accelerators and the user's choice are respected."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from aimv2_jax import platforms
from aimv2_jax.platforms import may_have_gpu, may_have_tpu, repeat_gpu_sums, skip_absent_tpu
from tests.helpers.tiny import ROOT

COMMANDS = ["aimv2_jax.main", "aimv2_jax.eval.visualize", "aimv2_jax.eval.heldout", "aimv2_jax.checkpoint.verify"]
COMMANDS += [f"tests.stress.{name}" for name in ("kill", "corrupt", "goodput", "hang")]
COMMANDS += ["experiments.benchmarks.recompute"]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or may_have_tpu(),
    reason="needs libtpu on a machine without TPUs",
)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["null", "vfio/vfio", "accel/accel0"], False),  # The control file of vfio alone, and another vendor's chip.
        (["accel0"], True),  # TPU v4.
        (["vfio/0", "vfio/vfio"], True),  # TPU v5e.
    ],
)
def test_may_have_tpu_by_device_files(files, expected, tmp_path):
    """A TPU may be present where one of the files is by which libtpu opens chips."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert may_have_tpu(tmp_path) is expected


def test_may_have_gpu_with_driver(tmp_path):
    """A GPU may be present if its driver is present."""
    assert not may_have_gpu(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert may_have_gpu(tmp_path)


@pytest.fixture
def set_machine(monkeypatch):
    """Sets the accelerators and JAX plugins of this machine, and clears the user's choice; jax is not imported yet."""

    def set_machine(tpu: bool = False, gpu: bool = False, plugins: Sequence[str] = ()) -> None:
        monkeypatch.setattr(platforms, "may_have_tpu", lambda: tpu)
        monkeypatch.setattr(platforms, "may_have_gpu", lambda: gpu)
        entries = [SimpleNamespace(name=name) for name in plugins]
        monkeypatch.setattr(platforms.metadata, "entry_points", lambda group: entries)

    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setitem(sys.modules, "jax", None)
    set_machine()
    return set_machine


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({}, "cpu"),
        ({"plugins": ["xla_cuda12"]}, "cpu"),
        ({"gpu": True, "plugins": ["xla_cuda12"]}, "cuda,cpu"),
        ({"gpu": True}, None),
        ({"plugins": ["xla_cuda12", "other"]}, None),
        ({"tpu": True}, None),
        ({"tpu": True, "gpu": True, "plugins": ["xla_cuda12"]}, None),
    ],
)
def test_platforms_chosen_by_machine(machine, expected, set_machine):
    """Without a TPU the present platforms are chosen; TPUs, unknown plugins and GPUs without one are left to JAX."""
    set_machine(**machine)
    skip_absent_tpu()
    assert os.environ.pop("JAX_PLATFORMS", None) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_PLATFORMS", ""),
        ("JAX_PLATFORMS", "tpu,cpu"),
        ("JAX_FORCE_TPU_INIT", "1"),
        ("PJRT_NAMES_AND_LIBRARY_PATHS", "other:/lib/other.so"),
    ],
)
def test_platforms_left_to_the_user(name, value, set_machine, monkeypatch):
    """A platform that the user chose by one of JAX's variables stays."""
    monkeypatch.setenv(name, value)
    skip_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == (value if name == "JAX_PLATFORMS" else None)


def quietly(statements: str) -> subprocess.CompletedProcess:
    """Runs Python without a chosen platform; prints whether libtpu was loaded, and the platform of the devices."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "TPU_", "XLA_"))}
    code = f"{statements}; print('libtpu.so' in open('/proc/self/maps').read(), jax.devices()[0].platform)"
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


@needs_libtpu
@pytest.mark.parametrize("order", ["{skip}; import jax; jax.devices()", "import jax; {skip}; jax.devices()"])
def test_jax_skips_absent_tpu(order):
    """After skip_absent_tpu, JAX does not load libtpu and prints no message."""
    skip = "from aimv2_jax.platforms import skip_absent_tpu; skip_absent_tpu()"
    done = quietly(order.format(skip=skip))
    assert (done.stdout, done.stderr, done.returncode) == ("False cpu\n", "", 0)


@needs_libtpu
def test_jax_without_skip_absent_tpu():
    """Without skip_absent_tpu JAX loads libtpu and complains; once this test fails, the module can be deleted."""
    done = quietly("import jax; jax.devices()")
    assert done.stdout == "True cpu\n" and "TPU" in done.stderr


def test_jax_when_its_config_names_a_platform_then_left_alone(set_machine, monkeypatch):
    config = SimpleNamespace(jax_platforms="cuda")
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(config=config))
    skip_absent_tpu()
    assert config.jax_platforms == "cuda" and "JAX_PLATFORMS" not in os.environ


@pytest.mark.parametrize("command", COMMANDS)
def test_command_when_it_begins_then_an_absent_tpu_is_left_alone(command, monkeypatch):
    module = importlib.import_module(command)

    def called():
        raise InterruptedError("called")

    monkeypatch.setattr(module, "skip_absent_tpu", called)
    with pytest.raises(InterruptedError, match="called"):
        module.main([])


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [({}, "0"), ({"NCCL_NVLS_ENABLE": "1"}, "1"), ({"NCCL_ALGO": "NVLS"}, None)],
)
def test_nccl_sums_repeat_unless_chosen(chosen, expected, monkeypatch):
    """NVLS is off, unless the user sets it or names an algorithm."""
    for name in ("NCCL_ALGO", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    monkeypatch.setattr(os, "environ", before)
    repeat_gpu_sums()
    assert before.get("NCCL_NVLS_ENABLE") == expected
