"""Eight virtual CPU devices, checked shapes, and the place of the golden tensors."""

import gc
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
from tiny import only_devices

# However the tests were started: nohup has it ignored, and so would every child.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Every annotated array of these modules is checked while the tests run.
CHECKED = ["models", "data.transforms", "data.plan", "data.tokenizer"]
CHECKED += ["train.losses", "train.task", "train.optimizer", "train.tally", "eval.generate"]
CHECKED += ["eval.features", "eval.likelihood", "eval.probes.neighbours", "eval.probes.sweep"]
install_import_hook([f"aimv2_jax.{module}" for module in CHECKED], "beartype.beartype")


def pytest_configure(config):
    """How this process, pytest-xdist's workers and all that tests start compile, which is most of what the suite does.

    Compiled code runs for milliseconds here, so optimising it is left out: a third of the compiler's time stays. (Tests
    that compare with reference tensors have the optimisations: `fully_optimized`.) What several tests compile alike is
    compiled once, and found again by the next run in the same checkout: pytest's own cache keeps it, `--cache-clear`
    empties that. The limit of size makes jax lock the folder. A test that kills trainers while they compile gives them
    another folder, since half an entry may stay; one that reads what the compiler says takes `always_compiled`.
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
        help="directory with the reference tensors; its README says what each file is",
    )


@pytest.hookimpl(tryfirst=True)  # Before pytest-xdist reads the groups.
def pytest_collection_modifyitems(items):
    """With pytest-xdist, a file's tests stay in one process, so that its fixtures are made once; long files first."""
    items.sort(key=lambda item: not {"train", "parallel"} & set(item.path.parts))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Python's collector leaves alone what earlier files left (modules, jax's traces): walks over it took a tenth of
    the suite's time.
    """
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def two_devices():
    """A file's runs take two of the eight devices, for tests of what no mesh changes: half the time of a run."""
    with only_devices(2):
        yield


@pytest.fixture
def fully_optimized():
    """What is compiled meanwhile is compiled as users compile it."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def always_compiled():
    """What is compiled meanwhile is not kept, and so never found: for tests that read what the compiler says."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="session")
def golden_dir(request) -> Path:
    return request.config.getoption("--golden")
