"""Platform detection: keeps JAX from initialising a TPU that this machine does not have.

With libtpu installed (by the extras `tpu` and `test`) and no TPU present, JAX still loads it (470 MB from the disk) and
asks it for chips, and libtpu writes long errors to stderr.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

_GOOGLE_PCI_VENDOR = "0x1ae0"
# PCI classes of Google's other devices: disks (01) and network cards (02). Any other class counts as a TPU.
_NON_TPU_CLASSES = ("0x01", "0x02")
_NVIDIA_DEVICE_FILES = ("nvidia0", "nvidiactl", "dxg")  # The files by which JAX detects GPUs.
# Set by the import of JAX and libtpu, and for logging; they do not indicate a TPU.
_IGNORED_VARIABLES = (
    "TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH", "TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TPU_LOG_DIR",
)  # fmt: skip


def skip_absent_tpu() -> None:
    """Limits JAX to the platforms that may be present, unless the user chose (`JAX_PLATFORMS`, `jax_platforms`).

    Commands call it before anything computes. It changes nothing where a TPU may be present, where libtpu is missing,
    or where an unknown plugin is installed. A GPU whose plugin is installed remains the first choice. Processes started
    later inherit the choice.
    """
    platforms = platforms_without_tpu()
    if platforms is None:
        return
    jax = sys.modules.get("jax")
    if jax is not None:  # An imported JAX has read its environment already.
        if jax.config.jax_platforms is not None:
            return
        jax.config.update("jax_platforms", platforms)
    os.environ["JAX_PLATFORMS"] = platforms


def platforms_without_tpu() -> str | None:
    """The value for `JAX_PLATFORMS`, such as "cpu" or "cuda,cpu"; None leaves the choice to JAX."""
    if "JAX_PLATFORMS" in os.environ or not _libtpu_installed() or may_have_tpu():
        return None
    plugins = _plugins()
    if not plugins:
        # With a GPU and no plugin for it, JAX warns about the missing plugin, which the user should see.
        return None if may_have_gpu() else "cpu"
    if all("cuda" in plugin for plugin in plugins):
        return "cuda,cpu"  # JAX ignores "cuda" where there is no GPU.
    return None


def is_cpu_only() -> bool:
    """Whether JAX will compute on the CPU, by the user's choice or because no accelerator is present."""
    jax = sys.modules.get("jax")
    chosen = os.environ.get("JAX_PLATFORMS") if jax is None else jax.config.jax_platforms
    if not chosen:
        return not may_have_gpu() and not may_have_tpu() and not _plugins()
    # JAX ignores chosen platforms that are absent.
    present = {"cuda": may_have_gpu, "gpu": may_have_gpu, "tpu": may_have_tpu}
    return all(name == "cpu" or (name in present and not present[name]()) for name in chosen.split(","))


def may_have_gpu(root: Path = Path("/")) -> bool:
    """Whether the driver of an NVIDIA GPU is present."""
    return any((root / "dev" / name).exists() for name in _NVIDIA_DEVICE_FILES)


def may_have_tpu(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> bool:
    """Whether device files, the PCI bus, or the variables of a TPU VM or GKE pod indicate a TPU."""
    environment = os.environ if environment is None else environment
    if any(
        name.startswith(("TPU_", "CLOUD_TPU_", "MEGASCALE_")) for name in environment if name not in _IGNORED_VARIABLES
    ):
        return True
    if "JAX_FORCE_TPU_INIT" in environment or glob.glob(f"{root}/dev/accel*") or glob.glob(f"{root}/dev/vfio/[0-9]*"):
        return True
    for device in root.glob("sys/bus/pci/devices/*"):
        try:
            vendor, device_class = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:  # An unplugged or unreadable device might be a TPU.
            return True
        if vendor == _GOOGLE_PCI_VENDOR and not device_class.startswith(_NON_TPU_CLASSES):
            return True
    return False


def _libtpu_installed() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _plugins() -> list[str]:
    """Names of JAX's installed plugins for other platforms, such as "xla_cuda12"."""
    names = [name.split(":")[0] for name in os.environ.get("PJRT_NAMES_AND_LIBRARY_PATHS", "").split(",") if name]
    names += [entry.name for entry in metadata.entry_points(group="jax_plugins")]
    package = importlib.util.find_spec("jax_plugins")
    paths = package.submodule_search_locations if package is not None else None
    return names + [module.name for module in pkgutil.iter_modules(list(paths or []))]
