"""The report as people read it."""

from __future__ import annotations

from typing import Any

from aimv2_jax.aot.kernels import BANDWIDTH_SHARE, FLOPS_SHARE
from aimv2_jax.aot.topology import Topology


def report_lines(figures: dict[str, Any], topology: Topology, breakdown: bool) -> list[str]:
    """A report's lines, from the figures of `prediction.predict` or `refused`."""
    chip = topology.chip
    several = f"{topology.slices} slices of " if topology.slices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1) or "one device"
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [
        f"PREDICTION for {several}{topology.name} ({figures['num_chips']} chips), by the TPU compiler; not a measurement",
        f"  {versions}; mesh {mesh}; batch {figures['batch_size']}",
    ]
    if not figures["compiles"]:
        return [*lines, "", f"does not compile: {figures['refusal']}"]
    parts = figures["hbm_parts_gib"]
    lines += [
        "",
        "compiles                 yes",
        f"HBM a chip               {figures['hbm_gib']:.2f} of {figures['hbm_limit_gib']:.2f} GiB, "
        f"{figures['hbm_spare']:.0%} to spare",
        "  of which               " + ", ".join(f"{name} {size:.2f}" for name, size in parts.items()),
        f"model FLOPs a chip       {figures['model_tflops_per_chip']:.3f} T a step (2 a multiply-add, backward = 2 x "
        "forward, attention in full)",
        f"  by allowed pairs       {figures['model_tflops_per_chip_of_allowed_pairs']:.3f} T (of attention, what the "
        "masks let through)",
        f"compiled FLOPs           {figures['compiled_tflops_per_chip']:.3f} T of matrix products, "
        f"{figures['recompute']:+.1%}: recompute",
        f"predicted compute        {figures['predicted_compute_ms']:.1f} ms, {figures['predicted_mcycles']:.1f} Mcycles at "
        f"{chip.clock_hz / 1e9:.2f} GHz",
        f"predicted step           {figures['predicted_ms']:.1f} ms, collectives hidden only by what is scheduled "
        "between start and done",
        f"  without any overlap    {figures['predicted_ms_without_overlap']:.1f} ms",
        f"predicted MFU            {figures['predicted_mfu']:.3f} of compute alone ("
        f"{figures['predicted_mfu_of_allowed_pairs']:.3f} by allowed pairs)",
        f"  with collectives       {figures['predicted_mfu_with_comms']:.3f} ("
        f"{figures['predicted_mfu_without_overlap']:.3f} without any overlap)",
        f"predicted rate           {figures['images_per_s']:,.0f} images/s; {figures['steps']:,} steps take "
        f"{figures['days']:.1f} days, {figures['chip_hours']:,.0f} chip-hours",
        f"gradients are reduced in {_types(figures['gradient_dtypes'])}",
        *_beside(figures),
        "",
        *_sources(figures),
        "",
        *_collectives(figures, topology),
        "",
        *_replicated(figures),
        "",
        *_top(figures),
    ]
    return lines + (["", *_breakdown(figures)] if breakdown else [])


def _types(bytes_of: dict[str, int]) -> str:
    total = sum(bytes_of.values())
    return ", ".join(f"{name} ({size / total:.1%} of bytes)" for name, size in bytes_of.items()) or "no collective"


def _beside(figures: dict[str, Any]) -> list[str]:
    other = figures.get("xla_attention")
    if other is None:
        return []
    if not other["compiles"]:
        return [f"with XLA attention       does not compile: {other['refusal']}"]
    return [
        f"with XLA attention       predicted MFU {other['predicted_mfu']:.3f}, with collectives "
        f"{other['predicted_mfu_with_comms']:.3f}, {other['predicted_ms']:.1f} ms, {other['hbm_gib']:.2f} GiB"
    ]


def _sources(figures: dict[str, Any]) -> list[str]:
    lines = ["where the cycles come from"]
    lines += [
        f"  {share:7.2%}  {source}" for source, share in sorted(figures["cycles_from"].items(), key=lambda x: -x[1])
    ]
    if figures["kernels"]:
        lines.append(
            f"  the rule for kernels: max(FLOPs at {FLOPS_SHARE:.0%} of peak, bytes at {BANDWIDTH_SHARE:.0%} of HBM's rate); for"
        )
        for kernel in figures["kernels"][:12]:
            stated = "states its cost" if kernel["states_its_cost"] else "charged by its shapes"
            lines.append(
                f"    {kernel['name'][:44]:<44} x {kernel['count']:<4} {kernel['mcycles']:8.2f} Mcycles, {stated}"
            )
    return lines


def _collectives(figures: dict[str, Any], topology: Topology) -> list[str]:
    chip = topology.chip
    lines = [
        f"collectives, at {chip.link_bytes_per_s / 1e9:.0f} GB/s a link and direction"
        + (f", {chip.dcn_bytes_per_s / 1e9:.2f} GB/s a chip between slices" if topology.slices > 1 else ""),
        f"  {'kind':<26}{'mesh axis':<20}{'type':<12}{'way':<7}{'count':>6}{'GB':>9}{'ms':>8}{'exposed ms':>12}",
    ]
    for row in figures["collectives"]:
        way = "async" if row["asynchronous"] else "sync"
        lines.append(
            f"  {row['kind']:<26}{row['axis']:<20}{row['dtype'][:11]:<12}{way:<7}{row['count']:>6}"
            f"{row['bytes'] / 1e9:>9.3f}{row['ms']:>8.2f}{row['exposed_ms']:>12.2f}"
        )
    for row in figures["between_slices"]:
        lines.append(f"  between slices: {row['count']} x {row['carries']}, {row['bytes'] / 1e6:.2f} MB a chip")
    return lines


def _replicated(figures: dict[str, Any]) -> list[str]:
    found = figures["replicated"]
    if not found:
        return ["replicated               nothing that the mesh should split"]
    return ["replicated, though the mesh should split it:", *(f"  {line}" for line in found)]


def _top(figures: dict[str, Any]) -> list[str]:
    lines = [
        "most expensive operations",
        f"  {'part':<19}{'operation':<44}{'result':<40}{'count':>6}{'kcycles':>9}{'share':>8}{'of peak':>9}",
    ]
    for row in figures["top"]:
        peak = f"{row['of_peak']:.2f}" if row["of_peak"] else "-"
        lines.append(
            f"  {row['part']:<19}{row['operation'][-42:]:<44}{row['shape'][:38]:<40}{row['count']:>6}"
            f"{row['kcycles_each']:>9.1f}{row['share']:>8.1%}{peak:>9}"
        )
    return lines


def _breakdown(figures: dict[str, Any]) -> list[str]:
    kinds = ["matmul", "kernel", "elementwise", "copy", "other call", "exposed collectives"]
    total = figures["predicted_mcycles"]
    lines = [
        "megacycles by part of the model",
        f"  {'part':<20}{'all':>8}{'share':>8}" + "".join(f"{kind:>{max(9, len(kind) + 2)}}" for kind in kinds),
    ]
    for part, row in figures["breakdown"].items():
        compute = sum(value for kind, value in row.items() if kind != "exposed collectives")
        cells = "".join(f"{row.get(kind, 0):>{max(9, len(kind) + 2)}.2f}" for kind in kinds)
        lines.append(f"  {part:<20}{compute:>8.2f}{compute / total:>8.1%}{cells}")
    return lines
