"""Platform detection: keeps JAX from initialising a TPU that this machine does not have."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import sys
from importlib import metadata
from pathlib import Path

# Variables with which users choose JAX's platform.
_CHOICES = ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "PJRT_NAMES_AND_LIBRARY_PATHS")
# Variables of TPU VMs, GKE pods and slices.
_TPU_VARIABLES = ("TPU_WORKER_", "TPU_NAME", "TPU_ACCELERATOR_TYPE", "CLOUD_TPU_", "MEGASCALE_")
_DEVICES = Path("/dev")


def skip_absent_tpu() -> None:
    """Sets `JAX_PLATFORMS` to "cpu" or "cuda,cpu" where no TPU is attached, unless the user chose.

    JAX loads libtpu wherever it is installed (by the extras `tpu` and `test`): 470 MB from the disk and, without a TPU,
    long errors and retries. Commands call this before anything computes. Processes started later inherit the choice.

    JAX chooses by itself where a plugin other than CUDA's is installed, and where a GPU lacks its plugin, since JAX
    warns of that.
    """
    jax = sys.modules.get("jax")  # An imported JAX has read its environment already.
    chosen = any(name in os.environ for name in _CHOICES) or (jax is not None and jax.config.jax_platforms is not None)
    if chosen or may_have_tpu():
        return
    plugins = _plugins()
    if not all("cuda" in plugin for plugin in plugins) or (may_have_gpu() and not plugins):
        return
    platforms = "cuda,cpu" if may_have_gpu() else "cpu"
    os.environ["JAX_PLATFORMS"] = platforms
    if jax is not None:
        jax.config.update("jax_platforms", platforms)


def repeat_gpu_sums() -> None:
    """Switches off NCCL's sums in NVLink switches (NVLS), unless the user chose an algorithm.

    Their order of additions is not fixed: Megatron-LM's deterministic mode admits every algorithm of NCCL but this one.
    NCCL reads its environment at the first collective.
    """
    if "NCCL_ALGO" not in os.environ:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


def may_have_gpu(devices: Path = _DEVICES) -> bool:
    """Whether the driver of an NVIDIA GPU is present, by the device files that JAX looks for."""
    return any((devices / name).exists() for name in ("nvidia0", "nvidiactl", "dxg"))


def may_have_tpu(devices: Path = _DEVICES) -> bool:
    """Whether a TPU is attached, by the device files that libtpu opens: accel0, ... up to v4, vfio/0, ... since v5e.

    A container gets these files for the chips that it may use, while its PCI bus shows those of the whole host. Where
    it lacks them, the variables of a TPU VM or pod still leave the choice to JAX, whose error names the cause.
    """
    if any(name.startswith(_TPU_VARIABLES) for name in os.environ):
        return True
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))


def _plugins() -> list[str]:
    """Names of JAX's plugins for other platforms: entry points, and modules of the namespace package `jax_plugins`."""
    package = importlib.util.find_spec("jax_plugins")
    paths = list(package.submodule_search_locations or ()) if package is not None else []
    entries = [entry.name for entry in metadata.entry_points(group="jax_plugins")]
    return entries + [module.name for module in pkgutil.iter_modules(paths)]
