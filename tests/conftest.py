"""Test setup: eight virtual CPU devices, checked array annotations, compilation cache, golden tensors."""

import gc
import importlib.util
import math
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest
from jaxtyping import install_import_hook

from tests.helpers.buckets import fake_gcs, gcs_emulator, gcs_folder, moto_s3  # noqa: F401 (fixtures)
from tests.helpers.failing_bucket import failing_gcs, gcs_proxy  # noqa: F401 (fixtures)
from tests.helpers.tiny import only_devices

# Restores the default, since nohup ignores SIGHUP and child processes would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Array annotations of these modules are checked while the tests run.
CHECKED = ["models", "parallel.collectives", "data.transforms.geometry", "data.sampling.mixture", "data.tokenizer"]
CHECKED += ["train.losses", "train.task", "train.optimizer", "train.contrastive", "monitoring.counters"]
CHECKED += ["eval.generate", "eval.features", "eval.likelihood", "eval.probes.knn", "eval.probes.sweep"]
CHECKED += ["data.sentencepiece_model", "data.tokenizer_json", "train.pretrain_task", "train.lit_task"]
CHECKED += ["train.distill_losses", "train.distill_task", "eval.zeroshot", "eval.bootstrap"]
CHECKED += [f"eval.dense.{module}" for module in ("augment", "heads", "metrics", "optimizer")]
CHECKED = [f"aimv2_jax.{module}" for module in CHECKED]
assert all(map(importlib.util.find_spec, CHECKED))  # A hook for a missing module would be silent.
install_import_hook(CHECKED, "beartype.beartype")


# Folders and files of long tests, which start first.
LONG = {"end_to_end", "stress", "checkpoint", "distributed", "resilience", "train"}
LONG |= {"test_golden.py", "test_ablations.py"}


def pytest_configure(config):
    """Configures compilation for this process, pytest-xdist's workers and child processes; it dominates the test time.

    Compiled code runs for milliseconds here, so most optimisations are disabled, which saves two thirds of the compile
    time. Tests that compare with reference tensors enable them (`fully_optimized`). Compiled programs are cached across
    tests and runs of the same checkout in pytest's cache, which `--cache-clear` empties. The size limit makes jax lock
    the directory. Tests that kill trainers during compilation use another directory, since a partial entry may remain.
    Tests that read the compiler's output use `always_compiled`.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # Set by the process that started this one, or by the user.
        return
    if hasattr(config, "cache"):
        folder = config.cache.mkdir("compiled")
    else:  # `-p no:cacheprovider`
        folder = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": 2 << 30,
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_disable_most_optimizations": True,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="directory with the reference tensors; its README describes each file",
    )


@pytest.hookimpl(tryfirst=True)  # Runs before pytest-xdist reads the groups.
def pytest_collection_modifyitems(items):
    """Keeps the tests of a file in one pytest-xdist process, so that its fixtures run once; long files first."""
    items.sort(key=lambda item: not LONG & set(item.path.parts))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Freezes objects of earlier files (modules, jax's traces) after each file.

    Python's garbage collector otherwise spent a tenth of the suite's time on them.
    """
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_collection_finish():
    """Freezes the objects of the imported modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def two_devices():
    """Limits the runs of a file to two devices, which halves their time; for tests that do not depend on the mesh."""
    with only_devices(2):
        yield


@pytest.fixture
def fully_optimized():
    """Enables the compiler optimisations that users have."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def always_compiled():
    """Bypasses the compilation cache, for tests that read the compiler's output."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="session")
def golden_dir(request) -> Path:
    """Directory of the reference tensors."""
    return request.config.getoption("--golden")
