"""Text of a prediction."""

from __future__ import annotations

from aimv2_jax.aot.cost_model.kernels import BANDWIDTH_SHARE, FLOPS_SHARE
from aimv2_jax.aot.prediction import Figures, Prediction, Refusal
from aimv2_jax.parallel.hardware import Chip

_MAX_KERNELS = 12


def money(amount: float) -> str:
    """Returns an amount in the currency of `--price`, which is not known here."""
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:,.2f}"


def report_lines(prediction: Prediction, chip: Chip, with_breakdown: bool, price: float | None = None) -> list[str]:
    """Returns the lines of a report; `price` of a chip-hour adds what the run costs."""
    outcome = prediction.outcome
    slices = f"{prediction.slices} slices of " if prediction.slices > 1 else ""
    versions = ", ".join(f"{name} {version}" for name, version in outcome.versions.items())
    mesh = " x ".join(f"{axis} {size}" for axis, size in outcome.mesh.items() if size > 1) or "one device"
    lines = [
        f"PREDICTION by the TPU compiler, not a measurement: {slices}{prediction.topology}, {outcome.num_chips} chips",
        f"  {versions}; mesh {mesh}; batch {outcome.batch_size} x {outcome.patches} patches",
        "",
    ]
    if isinstance(outcome, Refusal):
        return [*lines, f"does not compile: {outcome.refusal}"]
    sections = [
        _summary(outcome, prediction.xla_attention, chip, price),
        _sources(outcome),
        _collectives(outcome, prediction.slices, chip),
        _replicated(outcome),
        _top(outcome),
    ]
    if with_breakdown:
        sections.append(_breakdown(outcome))
    for section in sections:
        lines += [*section, ""]
    return lines[:-1]


def _summary(figures: Figures, xla_attention: Figures | Refusal | None, chip: Chip, price: float | None) -> list[str]:
    parts = ", ".join(f"{name} {size:.2f}" for name, size in figures.hbm_parts_gib.items())
    reduced = sum(figures.gradient_dtypes.values())
    dtypes = [f"{name} ({size / reduced:.1%} of bytes)" for name, size in figures.gradient_dtypes.items()]
    hbm = "HBM a chip" if chip.devices == 1 else "HBM a device"
    rows = {
        "compiles": "yes",
        hbm: f"{figures.hbm_gib:.2f} of {figures.hbm_limit_gib:.2f} GiB, {figures.hbm_spare:.0%} to spare",
        "  of which": parts,
        "model FLOPs a chip": f"{figures.model_tflops_per_chip:.3f} T a step "
        "(2 a multiply-add, backward = 2 x forward, attention in full)",
        "  by unmasked pairs": f"{figures.model_tflops_per_chip_of_allowed_pairs:.3f} T "
        "(attention counts only unmasked pairs)",
        "compiled FLOPs": f"{figures.compiled_tflops_per_chip:.3f} T of products; recompute {figures.recompute:+.1%}",
        "predicted compute": f"{figures.predicted_compute_ms:.1f} ms, {figures.predicted_mcycles:.1f} Mcycles "
        f"at {chip.clock_hz / 1e9:.2f} GHz",
        "predicted step": f"{figures.predicted_ms:.1f} ms, "
        "collectives overlap with what is scheduled between start and done",
        "  without overlap": f"{figures.predicted_ms_without_overlap:.1f} ms",
        "predicted MFU": f"{figures.predicted_mfu:.3f} of compute alone "
        f"({figures.predicted_mfu_of_allowed_pairs:.3f} by unmasked pairs)",
        "  with collectives": f"{figures.predicted_mfu_with_comms:.3f} "
        f"({figures.predicted_mfu_without_overlap:.3f} without any overlap)",
        "predicted rate": f"{figures.images_per_s:,.0f} images/s; {figures.steps:,} steps in {figures.days:.1f} days, "
        f"{figures.chip_hours:,.0f} chip-hours",
        "gradients reduced in": ", ".join(dtypes) or "no collective",
    }
    if price:
        rows["predicted cost"] = f"{money(figures.chip_hours * price)} at {price:g} a chip-hour"
    if isinstance(xla_attention, Refusal):
        rows["with XLA attention"] = f"does not compile: {xla_attention.refusal}"
    elif xla_attention:
        rows["with XLA attention"] = (
            f"predicted MFU {xla_attention.predicted_mfu:.3f}, "
            f"with collectives {xla_attention.predicted_mfu_with_comms:.3f}, "
            f"{xla_attention.predicted_ms:.1f} ms, {xla_attention.hbm_gib:.2f} GiB"
        )
    return [f"{label:<25}{text}" for label, text in rows.items()]


def _sources(figures: Figures) -> list[str]:
    lines = ["sources of the cycle counts"]
    for source, share in sorted(figures.cycles_from.items(), key=lambda item: -item[1]):
        lines.append(f"  {share:7.2%}  {source}")
    if figures.kernels:
        rule = f"max(FLOPs at {FLOPS_SHARE:.0%} of peak, bytes at {BANDWIDTH_SHARE:.0%} of HBM's rate)"
        lines.append(f"  the roofline rule: {rule}; applied to")
    for kernel in figures.kernels[:_MAX_KERNELS]:
        cost = "declares its cost" if kernel.states_its_cost else "cost from its shapes"
        lines.append(f"    {kernel.name[:44]:<44} x {kernel.count:<4} {kernel.mcycles:8.2f} Mcycles, {cost}")
    return lines


def _collectives(figures: Figures, num_slices: int, chip: Chip) -> list[str]:
    network = f", {chip.dcn_bytes_per_s / 1e9:.2f} GB/s a chip between slices" if num_slices > 1 else ""
    lines = [
        f"collectives, at {chip.link_bytes_per_s / 1e9:.0f} GB/s a link and direction{network}",
        f"  {'kind':<26}{'mesh axis':<20}{'type':<12}{'way':<7}{'count':>6}{'GB':>9}{'ms':>8}{'exposed ms':>12}",
    ]
    for row in figures.collectives:
        way = "async" if row.asynchronous else "sync"
        lines.append(
            f"  {row.kind:<26}{row.axis:<20}{row.dtype[:11]:<12}{way:<7}{row.count:>6}"
            f"{row.bytes / 1e9:>9.3f}{row.ms:>8.2f}{row.exposed_ms:>12.2f}"
        )
    for row in figures.between_slices:
        lines.append(f"  between slices: {row.count} x {row.carries}, {row.bytes / 1e6:.2f} MB a chip")
    return lines


def _replicated(figures: Figures) -> list[str]:
    if not figures.replicated:
        return ["replicated               no tensor that the mesh should split"]
    return ["replicated, but the mesh should split it:", *(f"  {line}" for line in figures.replicated)]


def _top(figures: Figures) -> list[str]:
    lines = [
        "most expensive operations",
        f"  {'part':<19}{'operation':<44}{'result':<40}{'count':>6}{'kcycles':>9}{'share':>8}{'of peak':>9}",
    ]
    for row in figures.top:
        peak = f"{row.of_peak:.2f}" if row.of_peak else "-"
        lines.append(
            f"  {row.part:<19}{row.operation[-42:]:<44}{row.shape[:38]:<40}{row.count:>6}"
            f"{row.kcycles_each:>9.1f}{row.share:>8.1%}{peak:>9}"
        )
    return lines


def _breakdown(figures: Figures) -> list[str]:
    kinds = ["matmul", "kernel", "elementwise", "copy", "other call", "exposed collectives"]
    lines = [
        "megacycles by part of the model",
        f"  {'part':<20}{'all':>8}{'share':>8}" + "".join(f"{kind:>{max(9, len(kind) + 2)}}" for kind in kinds),
    ]
    for part, row in figures.breakdown.items():
        compute = sum(value for kind, value in row.items() if kind != "exposed collectives")
        cells = "".join(f"{row.get(kind, 0):>{max(9, len(kind) + 2)}.2f}" for kind in kinds)
        lines.append(f"  {part:<20}{compute:>8.2f}{compute / figures.predicted_mcycles:>8.1%}{cells}")
    return lines
