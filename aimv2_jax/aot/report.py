"""Text rendering of an ahead-of-time report."""

from __future__ import annotations

from typing import Any

from aimv2_jax.aot.cost_model.kernels import BANDWIDTH_SHARE, FLOPS_SHARE
from aimv2_jax.aot.topology import Topology


def report_lines(figures: dict[str, Any], topology: Topology, breakdown: bool) -> list[str]:
    """Returns a report's lines, from the figures of `predict.predict` or `predict.refused`."""
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1) or "one device"
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [
        f"PREDICTION by the TPU compiler, not a measurement: {slices}{topology.name}, {figures['num_chips']} chips",
        f"  {versions}; mesh {mesh}; batch {figures['batch_size']} x {figures['patches']} patches",
        "",
    ]
    if not figures["compiles"]:
        return [*lines, f"does not compile: {figures['refusal']}"]
    sections = [_summary(figures, topology), _sources(figures), _collectives(figures, topology)]
    sections += [_replicated(figures), _top(figures)]
    sections += [_breakdown(figures)] if breakdown else []
    for section in sections:
        lines += [*section, ""]
    return lines[:-1]


def _summary(figures: dict[str, Any], topology: Topology) -> list[str]:
    ghz = topology.chip.clock_hz / 1e9
    hbm = f"{figures['hbm_gib']:.2f} of {figures['hbm_limit_gib']:.2f} GiB, {figures['hbm_spare']:.0%} to spare"
    parts = ", ".join(f"{name} {size:.2f}" for name, size in figures["hbm_parts_gib"].items())
    convention = "2 a multiply-add, backward = 2 x forward, attention in full"
    rows = [
        ("compiles", "yes"),
        ("HBM a chip", hbm),
        ("  of which", parts),
        ("model FLOPs a chip", f"{figures['model_tflops_per_chip']:.3f} T a step ({convention})"),
        (
            "  by unmasked pairs",
            f"{figures['model_tflops_per_chip_of_allowed_pairs']:.3f} T (attention counts only unmasked pairs)",
        ),
        (
            "compiled FLOPs",
            f"{figures['compiled_tflops_per_chip']:.3f} T of products; recompute {figures['recompute']:+.1%}",
        ),
        (
            "predicted compute",
            f"{figures['predicted_compute_ms']:.1f} ms, {figures['predicted_mcycles']:.1f} Mcycles at {ghz:.2f} GHz",
        ),
        (
            "predicted step",
            f"{figures['predicted_ms']:.1f} ms, collectives overlap with what is scheduled between start and done",
        ),
        ("  without overlap", f"{figures['predicted_ms_without_overlap']:.1f} ms"),
        (
            "predicted MFU",
            f"{figures['predicted_mfu']:.3f} of compute alone "
            f"({figures['predicted_mfu_of_allowed_pairs']:.3f} by unmasked pairs)",
        ),
        (
            "  with collectives",
            f"{figures['predicted_mfu_with_comms']:.3f} "
            f"({figures['predicted_mfu_without_overlap']:.3f} without any overlap)",
        ),
        (
            "predicted rate",
            f"{figures['images_per_s']:,.0f} images/s; {figures['steps']:,} steps in {figures['days']:.1f} days, "
            f"{figures['chip_hours']:,.0f} chip-hours",
        ),
        ("gradients reduced in", _types(figures["gradient_dtypes"])),
    ]
    other = figures.get("xla_attention")
    if other and other["compiles"]:
        rows.append(
            (
                "with XLA attention",
                f"predicted MFU {other['predicted_mfu']:.3f}, with collectives "
                f"{other['predicted_mfu_with_comms']:.3f}, {other['predicted_ms']:.1f} ms, {other['hbm_gib']:.2f} GiB",
            )
        )
    elif other:
        rows.append(("with XLA attention", f"does not compile: {other['refusal']}"))
    return [f"{label:<25}{text}" for label, text in rows]


def _types(bytes_of: dict[str, int]) -> str:
    total = sum(bytes_of.values())
    return ", ".join(f"{name} ({size / total:.1%} of bytes)" for name, size in bytes_of.items()) or "no collective"


def _sources(figures: dict[str, Any]) -> list[str]:
    lines = ["sources of the cycle counts"]
    for source, share in sorted(figures["cycles_from"].items(), key=lambda item: -item[1]):
        lines.append(f"  {share:7.2%}  {source}")
    if figures["kernels"]:
        rule = f"max(FLOPs at {FLOPS_SHARE:.0%} of peak, bytes at {BANDWIDTH_SHARE:.0%} of HBM's rate)"
        lines.append(f"  the rule for kernels: {rule}; applied to")
    for kernel in figures["kernels"][:12]:
        cost = "declares its cost" if kernel["states_its_cost"] else "cost from its shapes"
        lines.append(f"    {kernel['name'][:44]:<44} x {kernel['count']:<4} {kernel['mcycles']:8.2f} Mcycles, {cost}")
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
    replicated = figures["replicated"]
    if not replicated:
        return ["replicated               no tensor that the mesh should split"]
    return ["replicated, but the mesh should split it:", *(f"  {line}" for line in replicated)]


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
