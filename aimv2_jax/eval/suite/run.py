"""Runs a suite: the probes of every set under one ROOT, with one encoder, into one folder."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from aimv2_jax.console import print_line
from aimv2_jax.errors import UserError
from aimv2_jax.eval.probes.protocol import ProbeConfig, protocol_notes
from aimv2_jax.eval.suite import figure, table
from aimv2_jax.eval.suite.catalogue import Catalogue, SuiteSet, as_json, missing_lines
from aimv2_jax.eval.suite.evaluate import ATTENTIVE, SKIPPED, ZEROSHOT, SetProbes, SuiteModel
from aimv2_jax.eval.suite.results import Results
from aimv2_jax.pretrained.encoder import PretrainedEncoder
from aimv2_jax.storage.files import atomic_write
from aimv2_jax.storage.locks import lock_folder
from aimv2_jax.version import __version__

TABLE_FILE = "table.json"
_IMAGENET = "imagenet"
_UNBOUND = ("cache", "encoder_batch")  # Settings that change no result.


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """What a suite runs.

    Attributes:
      root: the folder of the sets.
      probes: those of `evaluate.PROBES` to run.
      attentive: settings of the attentive probe for sets other than ImageNet-1k, and `reference`, which they follow;
        `attentive_imagenet` and `reference_imagenet` are for that set.
      linear: settings of the linear probe.
    """

    root: Path
    probes: tuple[str, ...]
    attentive: ProbeConfig
    reference: ProbeConfig
    attentive_imagenet: ProbeConfig
    reference_imagenet: ProbeConfig
    linear: ProbeConfig

    def settings(self) -> dict[str, Any]:
        """Everything about the probes that changes their results, as JSON."""
        configs = {
            "attentive": self.attentive, "attentive_imagenet": self.attentive_imagenet, "linear": self.linear,
        }  # fmt: skip
        trees = {name: dataclasses.asdict(config) for name, config in configs.items()}
        return {name: {key: tree[key] for key in tree if key not in _UNBOUND} for name, tree in trees.items()}

    def attentive_of(self, entry: SuiteSet) -> tuple[ProbeConfig, ProbeConfig]:
        """Settings of the attentive probe on a set, and those that they follow."""
        if entry.name == _IMAGENET and entry.paper is not None:
            return self.attentive_imagenet, self.reference_imagenet
        return self.attentive, self.reference


def run_suite(
    config: SuiteConfig, catalogue: Catalogue, model: SuiteModel, output: Path, log: Callable[[str], None] = print_line
) -> dict[str, Any]:
    """Runs what is not finished yet, writes the table after every set, and returns it as JSON.

    A set that cannot be used is named in the table, and the others run. `output` is locked meanwhile.

    Raises:
      UserError: if `output` has results of another encoder or other settings, or is in use.
    """
    output.mkdir(parents=True, exist_ok=True)
    with lock_folder(output / ".lock", "--output", output):
        encoder = model.encoder
        results = Results(output, {"encoder": encoder.digest, "settings": config.settings()})
        rows: list[dict[str, Any]] = []
        tree: dict[str, Any] = {}
        for entry in catalogue.sets:
            rows.append(_run_set(config, entry, model, results, log))
            tree = _table(config, catalogue, encoder, rows)
            _write(output, tree)
        for line in missing_lines(catalogue, str(config.root)):
            log(line)
        for name in catalogue.ignored:
            log(f"{name} is no set of Table B1 and has no set.json: left out")
    return tree


def _run_set(
    config: SuiteConfig, entry: SuiteSet, model: SuiteModel, results: Results, log: Callable[[str], None]
) -> dict[str, Any]:
    """The set's row; what is wrong with the set is part of it."""
    done: dict[str, dict[str, Any]] = {}
    errors: list[str] = []
    notes: list[str] = []

    def refuse(error: UserError) -> None:
        errors.append(f"refused: {error}")
        log(f"{entry.title}: {errors[-1]}")

    try:
        identity = entry.identity()
        found = {probe: results.read(entry.name, probe, identity) for probe in config.probes}
        done = {probe: result for probe, result in found.items() if result is not None}
        wanted = [probe for probe in config.probes if probe not in done]
        if model.dual is None and ZEROSHOT in wanted:
            wanted.remove(ZEROSHOT)
        if not wanted:
            log(f"{entry.title}: finished before")
        else:
            attentive, reference = config.attentive_of(entry)
            probes = SetProbes(model, entry, entry.read(), attentive, reference, config.linear, tuple(wanted))
        for probe in wanted:
            log(f"{entry.title}: {probe}")
            try:
                done[probe] = probes.run(probe)
            except UserError as error:
                refuse(error)
                continue
            results.write(entry.name, probe, identity, done[probe])
            if (skipped := done[probe].get(SKIPPED)) is None:
                low, high = done[probe]["ci95"]
                log(f"{entry.title}: {probe} {done[probe]['top1']:.3f} ({low:.3f} to {high:.3f})")
            else:
                log(f"{entry.title}: no {probe} figure, since {skipped}")
    except UserError as error:
        refuse(error)
    notes += [f"no {probe} figure, since {done[probe][SKIPPED]}" for probe in done if SKIPPED in done[probe]]
    done = {probe: result for probe, result in done.items() if SKIPPED not in result}
    if done:
        examples = next(iter(done.values()))["examples"]
        notes += entry.size_notes(examples["train"], examples["test"], examples["classes"])
        if ATTENTIVE in done:
            common = _common_differences(config)
            notes += [text for text in done[ATTENTIVE]["protocol"]["differs"] if text not in common]
    spec = model.encoder.spec
    image_size = spec.image_size if spec.area is None else None
    return table.row(entry.name, entry.title, entry.paper, image_size, done, errors, notes)


def _common_differences(config: SuiteConfig) -> list[str]:
    """What differs from the paper whatever the set is."""
    return protocol_notes(config.attentive, config.reference, config.attentive.batch_size, 0)["differs"]


def _table(
    config: SuiteConfig, catalogue: Catalogue, encoder: PretrainedEncoder, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    spec = encoder.spec
    resolution = f"{spec.image_size} px" if spec.area is None else f"whole images in at most {spec.area} patches"
    return {
        "model": {"source": encoder.source, "resolution": resolution, "dtype": encoder.dtype},
        "protocol": protocol_notes(config.attentive, config.reference, config.attentive.batch_size, 0),
        "sets": list(rows),
        "missing": as_json(catalogue, str(config.root)),
        "ignored": list(catalogue.ignored),
        "version": __version__,
        # The sets that were not run yet are missing from a table that an interruption left.
        "complete": len(rows) == len(catalogue.sets),
    }


def _write(output: Path, tree: dict[str, Any]) -> None:
    atomic_write(output / "table.md", table.markdown(tree).encode())
    write_figure(output / "table.png", figure.suite_figure(tree))
    atomic_write(output / TABLE_FILE, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())


def write_figure(file: Path, drawn: Figure) -> None:
    """Writes a figure as PNG, as a whole or not at all."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    atomic_write(file, buffer.getvalue())
