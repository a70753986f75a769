"""Candidates of how to run a config on a slice: mesh, passes over the batch, recomputation; with rough estimates.

The estimates only decide what is compiled, and in which order: memory to leave out what cannot fit, seconds to begin
with what is probably fast. They take no compiler and no JAX. Figures come from `predict`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

from aimv2_jax.aot.topology import Topology
from aimv2_jax.config.schema import Config, Remat, TrunkConfig
from aimv2_jax.errors import UserError
from aimv2_jax.models.sizes import swiglu_hidden
from aimv2_jax.monitoring.flops import flops_per_example, model_runs

# Recomputation of encoder and decoder, from the least to the most.
REMATS: tuple[tuple[Remat, Remat], ...] = (
    ("none", "none"),
    ("matmuls", "matmuls"),
    ("gate", "gate"),
    ("gate", "full"),
    ("attention", "full"),
    ("full", "full"),
)
_MIN_ROWS = 8  # Rows of a matrix that a device keeps at least: a tile of float32. With fewer, gathers become sums.
# An estimate is up to a fifth too high where it was compared with the compiler (results/aot.md).
_LEAST_SHARE = 0.8
_MAX_PASSES = 64
# Shares of peak that matrix products reach about, and of the gathered weights' time that is not hidden.
_OF_PEAK, _EXPOSED_GATHERS = 0.7, 0.25


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a config.

    Attributes:
      data: devices of a slice that replicate the parameters, `mesh.data`.
      fsdp: devices that split them, `mesh.fsdp`.
      passes: `train.microbatches`.
      images: examples of a device in a pass.
      remat: recomputation of encoder and decoder.
      num_bytes: estimated memory of a device.
      seconds: estimated time of a step.
    """

    data: int
    fsdp: int
    passes: int
    images: int
    remat: tuple[Remat, Remat]
    num_bytes: float
    seconds: float

    @property
    def overrides(self) -> dict[str, str]:
        """The keys of the config that make it."""
        return {
            "mesh.data": str(self.data),
            "mesh.fsdp": str(self.fsdp),
            "train.microbatches": str(self.passes),
            "model.remat": self.remat[0],
            "model.decoder.remat": self.remat[1],
        }

    @property
    def name(self) -> str:
        remat = self.remat[0] if len(set(self.remat)) == 1 else "/".join(self.remat)
        return f"data {self.data}, fsdp {self.fsdp}, {self.passes} x {self.images} images, remat {remat}"

    def may_fit(self, limit: float) -> bool:
        """Whether the memory may be enough, even if the estimate is too high."""
        return _LEAST_SHARE * self.num_bytes <= limit


def enumerate_candidates(config: Config, topology: Topology, fixed: Mapping[str, str]) -> list[Candidate]:
    """Returns all candidates of a config with its global batch, whether they fit or not, the fastest estimate first.

    Args:
      fixed: keys that the user has set, with their text: only candidates with these values are left.

    Raises:
      UserError: if the batch does not divide over the devices, or no candidate has the values of `fixed`.
    """
    examples = config.batch_shapes[0].examples
    shards = topology.num_devices // config.mesh.tensor
    if topology.num_devices % config.mesh.tensor or examples % shards:
        raise UserError(
            "config data.batch_size does not divide over the devices of --chips",
            f"{examples} examples, {shards} devices that split the batch",
            f"Use a multiple of {shards}, or fewer chips",
        )
    candidates = []
    for subset in _meshes(config, topology):
        for passes in _passes(config, examples // shards):
            images = examples // shards // passes
            for remat in REMATS if config.task != "lit" else REMATS[:1]:
                estimate = _Estimate(config, topology, subset, passes, images, remat)
                mesh = estimate.data, estimate.fsdp
                candidates.append(Candidate(*mesh, passes, images, remat, estimate.num_bytes(), estimate.seconds()))
    kept = [candidate for candidate in candidates if _agrees(candidate, fixed)]
    if not kept:
        keys = ", ".join(f"{key}={value}" for key, value in fixed.items() if key in candidates[0].overrides)
        raise UserError("--choose has no candidate with the values given", keys, "Leave out one of these keys")
    return sorted(kept, key=lambda candidate: candidate.seconds)


def _agrees(candidate: Candidate, fixed: Mapping[str, str]) -> bool:
    own = candidate.overrides
    return all(value in (own[key], "-1") for key, value in fixed.items() if key in own)


def _meshes(config: Config, topology: Topology) -> Iterator[tuple[int, ...]]:
    """Yields the axes of the topology that `mesh.fsdp` may span, as indices; one subset for each size.

    A subset of several axes with the same size has more links, so it comes first.
    """
    axes = topology.axes
    sizes = set()
    subsets = [subset for n in range(len(axes), -1, -1) for subset in itertools.combinations(range(len(axes)), n)]
    whole = {math.prod(axes[axis] for axis in subset) for subset in subsets}
    widths = [trunk.width for trunk in config.trunks.values()]
    for subset in subsets:
        fsdp = math.prod(axes[axis] for axis in subset)
        too_thin = fsdp > 1 and min(widths) // fsdp < _MIN_ROWS
        if fsdp in sizes or too_thin or fsdp * config.mesh.tensor not in whole:
            continue
        sizes.add(fsdp)
        yield tuple(axis for axis in subset if axes[axis] > 1)


def _passes(config: Config, images: int) -> Iterator[int]:
    """Yields numbers of passes that divide a device's images. LiT compares all pairs of a batch, in one pass."""
    passes = 1
    while images % passes == 0 and passes <= (_MAX_PASSES if config.task != "lit" else 1):
        yield passes
        passes *= 2


def _hidden(trunk: TrunkConfig) -> int:
    return trunk.hidden or swiglu_hidden(trunk.width)


def _parameters(trunk: TrunkConfig) -> int:
    return trunk.depth * (4 * trunk.width**2 + 3 * trunk.width * _hidden(trunk))


class _Estimate:
    """Rough memory and time of one candidate, on one device."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        subset: tuple[int, ...],
        passes: int,
        images: int,
        remat: tuple[Remat, Remat],
    ):
        self._config, self._topology, self._chip = config, topology, topology.chip
        self._passes, self._images, self._remat = passes, images, remat
        self._subset = subset
        self.fsdp = math.prod(topology.axes[axis] for axis in subset)
        self._split = self.fsdp * config.mesh.tensor
        self.data = topology.num_devices // topology.slices // self._split
        runs = model_runs(config, config.batch_shapes[0].patches)
        self._trunks = [trunk for run in runs for trunk in run.trunks]
        self._trained = sum(_parameters(run.trunk) for run in self._trunks if run.passes > 1)
        frozen = sum(_parameters(run.trunk) for run in self._trunks if run.passes == 1)
        # Embeddings and heads: the token table and its head, patches, positions.
        decoder = config.model.decoder
        self._trained += 2 * config.text.vocab_size * (decoder.width if config.task != "lit" else config.text.width)
        self._frozen = frozen

    def num_bytes(self) -> float:
        """Parameters and Adam's moments, gathered weights, gradients, activations, logits."""
        compute = 2 if self._config.model.compute_dtype == "bfloat16" else 4
        moments = 12 if not self._config.optimizer.ema_decay else 16
        state = (moments * self._trained + 4 * self._frozen) / self._split
        kept = {"none": 1.0, "full": 0.1}.get(self._remat[0], 0.5)
        weights = compute * kept * (self._trained + self._frozen) / self._config.mesh.tensor
        gradients = 4 * self._trained / self._split
        sums = gradients if self._passes > 1 else 0
        # Gradients grow while activations are freed.
        return state + weights + sums + max(gradients, self._activations(compute)) + self._logits()

    def _activations(self, compute: int) -> float:
        total, block = 0.0, 0.0
        for run in self._trunks:
            width, hidden = run.trunk.width, _hidden(run.trunk)
            remat = self._remat[run.mask == "causal"]
            everything = 6 * width + 3 * hidden
            saved = {
                "none": everything,
                "matmuls": 5 * width + 2 * hidden,
                "gate": 5 * width + hidden,
                "attention": 5 * width,
                "full": width,
            }[remat]
            rows = self._images * run.rows
            block = max(block, rows * everything * compute)
            if run.passes > 1:
                total += rows * run.trunk.depth * saved * compute
        return (total + (block if self._remat[0] != "none" else 0)) / self._config.mesh.tensor

    def _logits(self) -> float:
        text = self._config.text
        has_logits = self._config.task != "lit" and "logits" in self._config.outputs
        return 8.0 * self._images * text.text_length * text.vocab_size * has_logits

    def seconds(self) -> float:
        """Matrix products, gradients and gathered weights between devices, the optimiser's pass over its state."""
        config, chip = self._config, self._chip
        shape = config.batch_shapes[0]
        flops = flops_per_example(config, shape.patches) * shape.examples / self._topology.num_devices
        compute = flops * (1 + self._recompute()) / (_OF_PEAK * chip.peak_flops)
        gradient = 4 if config.train.reduce_dtype == "float32" else 2
        size = self._trained / config.mesh.tensor
        others = tuple(axis for axis in range(len(self._topology.axes)) if axis not in self._subset)
        between = self._time(gradient * size, self.fsdp, self._subset)
        between += 2 * self._time(gradient * size / self.fsdp, self.data, others)
        if self._topology.slices > 1:
            between += 2 * gradient * size / self.fsdp / chip.dcn_bytes_per_s
        gathers = 1 if self._remat[0] == "none" else 2
        between += _EXPOSED_GATHERS * gathers * self._time(2 * size, self.fsdp, self._subset)
        memory = 28 * self._trained / self._split + (8 * self._trained / self._split) * (self._passes - 1)
        return compute + self._passes * between + memory / chip.hbm_bytes_per_s

    def _recompute(self) -> float:
        """FLOPs of recomputed products, as a share of the step's."""
        total = extra = 0.0
        for run in self._trunks:
            width, hidden = run.trunk.width, _hidden(run.trunk)
            block = 4 * width**2 + 3 * width * hidden
            again = {"none": 0, "matmuls": 0.02 * block, "gate": width * hidden, "attention": 2 * width * hidden}
            total += run.passes * run.rows * run.trunk.depth * block
            if run.passes > 1:
                extra += run.rows * run.trunk.depth * again.get(self._remat[run.mask == "causal"], block)
        return extra / total

    def _time(self, num_bytes: float, devices: int, axes: tuple[int, ...]) -> float:
        """Seconds of a gather or a reduce-scatter of `num_bytes` over all links of some axes of the topology."""
        if devices == 1:
            return 0.0
        chip, shape = self._chip, self._topology.shape
        links = sum(
            0 if shape[axis] == 1 else 2 if shape[axis] % chip.ring_size == 0 else 1
            for axis in axes
            if axis < len(shape)
        )
        share = 1 if len(shape) in axes else 1 / chip.devices
        rate = links * share * chip.link_bytes_per_s or chip.die_bytes_per_s
        return (devices - 1) / devices * num_bytes / rate
