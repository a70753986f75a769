"""The table of a suite: JSON and Markdown, ours with intervals beside the paper's accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aimv2_jax.eval.suite.evaluate import ATTENTIVE, KNN, LINEAR, PROBES, ZEROSHOT
from aimv2_jax.eval.suite.paper_sets import SIZES, PaperSet, paper_scores
from aimv2_jax.plotting import counted

_HEADS = {ATTENTIVE: "attentive", LINEAR: "linear", KNN: "k-NN", ZEROSHOT: "zero-shot"}

_METHODS = {
    LINEAR: "Linear probe: the quick protocol, on the mean of the patches.",
    KNN: "k-NN: DINO's protocol, on the mean of the patches, cosine, temperature 0.07, best of 10, 20, 100 and 200 "
    "neighbours on the test images.",
    ZEROSHOT: "Zero-shot: the class whose texts have the nearest mean embedding.",
}


def row(
    name: str,
    title: str,
    paper: PaperSet | None,
    image_size: int | None,
    results: Mapping[str, Mapping[str, Any]],
    errors: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """One set as JSON: top1 and ci95 of each probe as shares, the paper's as percent.

    Args:
      image_size: side in pixels of our images; None for whole images.
      results: the finished probes.
      errors: what was refused, one sentence each.
      notes: what a reader should know about the set.
    """
    keys = ("top1", "ci95", "best")
    own = {probe: {key: result[key] for key in keys if key in result} for probe, result in results.items()}
    examples = next((result["examples"] for result in results.values()), None)
    reference = None
    if paper is not None:
        resolution, scores = paper_scores(paper, image_size)
        reference = {"resolution": resolution, **dict(zip(SIZES, scores))}
    return {
        "name": name, "title": title, "examples": examples, "results": own, "paper": reference,
        "errors": list(errors), "notes": list(notes),
    }  # fmt: skip


def markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown, with notes, refused sets and missing sets below it."""
    rows, model, protocol = table["sets"], table["model"], table["protocol"]
    probes = [probe for probe in PROBES if any(probe in entry["results"] for entry in rows)]
    heads = ["set", "train / test", *(_HEADS[probe] for probe in probes), *(f"AIMv2-{size}" for size in SIZES), "at"]
    methods = _METHODS | {ATTENTIVE: f"Attentive probe: {protocol['name']}."}
    lines = [
        f"# {model['source']}",
        "",
        f"Top-1 in percent with its 95 % bootstrap interval over test images, at {model['resolution']}. Published "
        "figures: arXiv 2411.14402, Table B2, attentive probe.",
        "",
        _line(heads),
        _line(["---", *["---:"] * (len(heads) - 1)]),
        *(_line(_cells(entry, probes)) for entry in rows),
        "",
        " ".join(methods[probe] for probe in probes),
    ]
    if ATTENTIVE not in probes:
        protocol = protocol | {"differs": [], "not_stated": []}
    lines += [f"- differs from the paper: {text}" for text in protocol["differs"]]
    lines += [f"- not stated in the paper: {text}" for text in protocol["not_stated"]]
    for entry in rows:
        lines += [f"- {entry['title']}: {text}" for text in (*entry["notes"], *entry["errors"])]
    lines += [f"- {name}: no set of Table B1 and without set.json, so left out" for name in table["ignored"]]
    if table["missing"]:
        lines += ["", f"## {counted(len(table['missing']), 'missing set')} of Table B1", ""]
        for entry in table["missing"]:
            lines += [f"- {entry['title']}: {entry['source']}", *(f"  - `{command}`" for command in entry["commands"])]
    return "\n".join(lines) + "\n"


def _cells(entry: Mapping[str, Any], probes: Sequence[str]) -> list[str]:
    examples, paper = entry["examples"], entry["paper"]
    sizes = f"{examples['train']:,} / {examples['test']:,}" if examples else ""
    published = [f"{paper[size]:.1f}" for size in SIZES] + [f"{paper['resolution']} px"] if paper else [""] * 5
    return [entry["title"], sizes, *(_result(entry["results"].get(probe)) for probe in probes), *published]


def _result(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    low, high = (f"{100 * value:.1f}" for value in result["ci95"])
    return f"{100 * result['top1']:.1f} ({low}–{high})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
