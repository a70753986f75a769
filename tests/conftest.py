"""Eight virtual CPU devices, checked shapes, and the place of the golden tensors."""

import os
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest
from jaxtyping import install_import_hook

# However the tests were started: nohup has it ignored, and so would every child.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Every annotated array of these modules is checked while the tests run.
CHECKED = ["models", "data.transforms", "data.plan", "data.tokenizer"]
CHECKED += ["train.losses", "train.task", "train.optimizer", "train.tally", "eval.generate"]
CHECKED += ["eval.features", "eval.likelihood", "eval.probes.neighbours", "eval.probes.sweep"]
install_import_hook([f"aimv2_jax.{module}" for module in CHECKED], "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="directory with the reference tensors; its README says what each file is",
    )


def pytest_collection_modifyitems(items):
    """With pytest-xdist, a file's tests stay in one process, so that its fixtures are made once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """What several tests compile alike, this process compiles once.

    Its children do not share that: several may write at a time, and one that is killed may leave half an entry.
    """
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def golden_dir(request) -> Path:
    return request.config.getoption("--golden")
