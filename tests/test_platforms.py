"""Tests that JAX skips an absent TPU, and that present accelerators and the user's choice are respected."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from aimv2_jax import platforms
from aimv2_jax.platforms import may_have_gpu, may_have_tpu, platforms_without_tpu, skip_absent_tpu

COMMANDS = ["aimv2_jax.main", "aimv2_jax.eval.visualize", "aimv2_jax.eval.heldout", "aimv2_jax.checkpoint.verify"]
COMMANDS += [f"experiments.drills.{name}" for name in ("kill", "corrupt", "goodput", "hang")]
COMMANDS += ["experiments.benchmarks.recompute"]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or may_have_tpu(environment={}),
    reason="needs libtpu on a machine without TPUs",
)


def device(vendor: str, pci_class: str) -> dict[str, str]:
    folder = "sys/bus/pci/devices/0000:00:04.0"
    return {f"{folder}/vendor": f"{vendor}\n", f"{folder}/class": f"{pci_class}\n"}


# Case -> (the machine's files, its environment, whether a TPU may be present).
MACHINES = {
    "nothing": ({}, {}, False),
    "other chips": (device("0x10de", "0x120000"), {}, False),
    "Google's network card": (device("0x1ae0", "0x020000"), {}, False),
    "Google's disk": (device("0x1ae0", "0x010802"), {}, False),
    "the control file of vfio alone": ({"dev/vfio/vfio": ""}, {}, False),
    "what importing JAX and libtpu sets": ({}, {"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "libtpu.so"}, False),
    "TPU on the bus": (device("0x1ae0", "0x120000"), {}, True),
    "a device that cannot be read": ({"sys/bus/pci/devices/0000:00:04.0/vendor": "0x1ae0\n"}, {}, True),
    "TPU v4's device file": ({"dev/accel0": ""}, {}, True),
    "TPU v5's device file": ({"dev/vfio/0": ""}, {}, True),
    "a pod's variable": ({}, {"TPU_WORKER_ID": "0"}, True),
    "a slice's variable": ({}, {"MEGASCALE_SLICE_ID": "0"}, True),
    "the user forces it": ({}, {"JAX_FORCE_TPU_INIT": "1"}, True),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_tpu_when_anything_tells_of_it_then_it_may_be_there(machine, tmp_path):
    files, environment, expected = MACHINES[machine]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert may_have_tpu(tmp_path, environment) is expected


def test_gpu_when_the_driver_is_there_then_it_may_be_there(tmp_path):
    assert not may_have_gpu(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").write_text("")
    assert may_have_gpu(tmp_path)


@pytest.fixture
def bare_machine(monkeypatch):
    """A machine with libtpu installed, without TPU, GPU and user's choice."""
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.delenv("PJRT_NAMES_AND_LIBRARY_PATHS", raising=False)
    for name, answer in {"_libtpu_installed": True, "may_have_tpu": False, "may_have_gpu": False}.items():
        monkeypatch.setattr(platforms, name, lambda answer=answer: answer)


def install_plugin(name: str, folder: Path, monkeypatch) -> None:
    (folder / "jax_plugins" / name).mkdir(parents=True)
    (folder / "jax_plugins" / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(folder)


def test_platforms_when_there_is_nothing_but_libtpu_then_cpu(bare_machine):
    assert platforms_without_tpu() == "cpu"


def test_platforms_when_the_cuda_plugin_is_installed_then_gpu_before_cpu(bare_machine, tmp_path, monkeypatch):
    install_plugin("xla_cuda12", tmp_path, monkeypatch)
    assert platforms_without_tpu() == "cuda,cpu"


def test_platforms_when_a_plugin_is_unknown_then_left_to_jax(bare_machine, tmp_path, monkeypatch):
    install_plugin("xla_cuda12", tmp_path, monkeypatch)
    monkeypatch.setenv("PJRT_NAMES_AND_LIBRARY_PATHS", "other:/lib/other.so")
    assert platforms_without_tpu() is None


@pytest.mark.parametrize("name", ["may_have_tpu", "may_have_gpu"])
def test_platforms_when_an_accelerator_may_be_here_then_left_to_jax(name, bare_machine, monkeypatch):
    monkeypatch.setattr(platforms, name, lambda: True)
    assert platforms_without_tpu() is None


def test_platforms_when_libtpu_is_not_installed_then_left_to_jax(bare_machine, monkeypatch):
    monkeypatch.setattr(platforms, "_libtpu_installed", lambda: False)
    assert platforms_without_tpu() is None


@pytest.mark.parametrize("choice", ["", "tpu,cpu"])
def test_platforms_when_the_user_chose_then_left_alone(choice, bare_machine, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", choice)
    skip_absent_tpu()
    assert os.environ["JAX_PLATFORMS"] == choice


def quietly(statements: str) -> subprocess.CompletedProcess:
    """Runs Python without a chosen platform; prints whether libtpu was loaded, and the platform of the devices."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "TPU_", "XLA_"))}
    code = f"{statements}; print('libtpu.so' in open('/proc/self/maps').read(), jax.devices()[0].platform)"
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


@needs_libtpu
@pytest.mark.parametrize("order", ["{skip}; import jax; jax.devices()", "import jax; {skip}; jax.devices()"])
def test_jax_when_told_of_no_tpu_then_libtpu_is_not_loaded_and_nothing_is_said(order):
    skip = "from aimv2_jax.platforms import skip_absent_tpu; skip_absent_tpu()"
    done = quietly(order.format(skip=skip))
    assert (done.stdout, done.stderr, done.returncode) == ("False cpu\n", "", 0)


@needs_libtpu
def test_jax_when_not_told_then_it_loads_libtpu_and_complains():
    """The reason for the module: once this test fails, the module can be deleted."""
    done = quietly("import jax; jax.devices()")
    assert done.stdout == "True cpu\n" and "TPU" in done.stderr


def test_jax_when_its_config_names_a_platform_then_left_alone(bare_machine, monkeypatch):
    import jax

    assert jax.config.jax_platforms == "cpu"  # The test suite sets it before jax is imported.
    monkeypatch.setattr(platforms, "platforms_without_tpu", lambda: "cuda,cpu")
    skip_absent_tpu()
    assert jax.config.jax_platforms == "cpu" and "JAX_PLATFORMS" not in os.environ


@pytest.mark.parametrize("command", COMMANDS)
def test_command_when_it_begins_then_an_absent_tpu_is_left_alone(command, monkeypatch):
    module = importlib.import_module(command)

    def called():
        raise InterruptedError("called")

    monkeypatch.setattr(module, "skip_absent_tpu", called)
    with pytest.raises(InterruptedError, match="called"):
        module.main([])
