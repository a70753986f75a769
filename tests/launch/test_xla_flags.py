"""The flags of launch/xla_flags.sh are known to the installed libtpu, for all TPU generations."""

import os
import subprocess
import sys

import pytest

from tests.helpers.launching import LAUNCH, run

libtpu = pytest.importorskip("libtpu")

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
ALIKE = [
    ("v4",),
    ("v5e", "v5p", "v7x"),
    ("v6e",),
]  # Generations with the same flags share a process, which reads them once.
COMPILE = """
import sys, jax
from jax.experimental import topologies
for topology in sys.argv[1:]:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((128, 128), "bfloat16", sharding=sharding)).compile()
"""


def compiles(topologies: list[str], flags: str) -> subprocess.CompletedProcess:
    described = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = os.environ | described | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
    return run([sys.executable, "-c", COMPILE, *topologies], environment)


def flags_of(generation: str, slices: int) -> str:
    done = run(["bash", LAUNCH / "xla_flags.sh", generation, slices])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("generations", ALIKE, ids="-".join)
def test_flags_when_given_to_libtpu_then_all_are_known(generations):
    [several] = {flags_of(generation, 2) for generation in generations}
    for generation in generations:
        assert several and set(flags_of(generation, 1).split()) < set(several.split())
    done = compiles([TOPOLOGIES[generation] for generation in generations], several)
    assert done.returncode == 0, done.stderr


def test_flag_when_unknown_to_libtpu_then_the_compile_ends():
    done = compiles(["v5e:2x2"], "--xla_tpu_unheard_of=true")
    assert done.returncode != 0 and "xla_tpu_unheard_of" in done.stderr


def test_flags_when_the_generation_is_unknown_then_code_2_and_the_known_ones():
    done = run(["bash", LAUNCH / "xla_flags.sh", "v3"])
    assert done.returncode == 2 and "v3" in done.stderr and "v5e" in done.stderr
