"""Which platforms may be here: JAX is kept from starting a TPU that this machine does not have.

With libtpu installed, as the extras `tpu` and `test` install it, and no TPU at hand, JAX loads it all the same (its 470
MB are read from the disk), asks it for chips, and libtpu complains at length to stderr.
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

_GOOGLE = "0x1ae0"  # Vendor on the PCI bus.
# Classes of what else Google puts there: disks (01) and network cards (02). Anything new is taken for a TPU.
_NO_TPU_CLASSES = ("0x01", "0x02")
_NVIDIA = ("nvidia0", "nvidiactl", "dxg")  # Where JAX, too, looks for GPUs.
# Set by the mere import of JAX and of libtpu, and for logs: they tell of no TPU.
_TELL_NOTHING = (
    "TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH", "TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TPU_LOG_DIR",
)  # fmt: skip


def skip_absent_tpu() -> None:
    """Limits JAX to the platforms that may be here, unless the user chose (`JAX_PLATFORMS`, `jax_platforms`).

    To be called by commands before anything computes. It changes nothing where there may be a TPU, where libtpu is not
    installed, or where a plugin of a kind it doesn't know is; a GPU whose plugin is installed stays the first choice.
    Processes that are started later inherit the choice.
    """
    platforms = platforms_without_tpu()
    if platforms is None:
        return
    jax = sys.modules.get("jax")
    if jax is not None:  # It has read its environment already.
        if jax.config.jax_platforms is not None:
            return
        jax.config.update("jax_platforms", platforms)
    os.environ["JAX_PLATFORMS"] = platforms


def platforms_without_tpu() -> str | None:
    """What `JAX_PLATFORMS` should be, such as "cpu" or "cuda,cpu"; None: leave it to JAX."""
    if "JAX_PLATFORMS" in os.environ or not _libtpu_installed() or may_have_tpu():
        return None
    plugins = _plugins()
    if not plugins:
        # JAX says so where there is a GPU and no plugin for it; that is worth more than quiet.
        return None if may_have_gpu() else "cpu"
    if all("cuda" in plugin for plugin in plugins):
        return "cuda,cpu"  # JAX passes over "cuda" where there is no GPU.
    return None


def is_cpu_only() -> bool:
    """Whether JAX will compute on the CPU: by the user's choice, or because nothing else is here."""
    jax = sys.modules.get("jax")
    chosen = os.environ.get("JAX_PLATFORMS") if jax is None else jax.config.jax_platforms
    if not chosen:
        return not may_have_gpu() and not may_have_tpu() and not _plugins()
    present = {"cuda": may_have_gpu, "gpu": may_have_gpu, "tpu": may_have_tpu}  # JAX passes over those that are absent.
    return all(name == "cpu" or (name in present and not present[name]()) for name in chosen.split(","))


def may_have_gpu(root: Path = Path("/")) -> bool:
    """Whether the driver of an NVIDIA GPU is here."""
    return any((root / "dev" / name).exists() for name in _NVIDIA)


def may_have_tpu(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> bool:
    """Whether anything tells of a TPU: its device files, the PCI bus, or the variables of a TPU VM or a GKE pod."""
    environment = os.environ if environment is None else environment
    if any(name.startswith(("TPU_", "CLOUD_TPU_", "MEGASCALE_")) for name in environment if name not in _TELL_NOTHING):
        return True
    if "JAX_FORCE_TPU_INIT" in environment or glob.glob(f"{root}/dev/accel*") or glob.glob(f"{root}/dev/vfio/[0-9]*"):
        return True
    for device in root.glob("sys/bus/pci/devices/*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:  # Unplugged, or not ours to read: then it is not known to be none.
            return True
        if vendor == _GOOGLE and not kind.startswith(_NO_TPU_CLASSES):
            return True
    return False


def _libtpu_installed() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _plugins() -> list[str]:
    """Names of JAX's installed plugins for other platforms, such as "xla_cuda12"."""
    names = [name.split(":")[0] for name in os.environ.get("PJRT_NAMES_AND_LIBRARY_PATHS", "").split(",") if name]
    names += [entry.name for entry in metadata.entry_points(group="jax_plugins")]
    package = importlib.util.find_spec("jax_plugins")
    places = package.submodule_search_locations if package is not None else None
    return names + [module.name for module in pkgutil.iter_modules(list(places or []))]
