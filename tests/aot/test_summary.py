"""The summary table of many reports."""

from __future__ import annotations

import json

import pytest

from aimv2_jax.aot.prediction import Prediction
from aimv2_jax.aot.summary import main

GOOD = {
    "config": "experiments/pretrain.py:large",
    "topology": "v5e:16x16",
    "slices": 1,
    "area": None,
    "overrides": {},
    "full": False,
    "compiles": True,
    "mesh": {"slice": 1, "data": 16, "fsdp": 16},
    "hbm_gib": 9.0,
    "hbm_limit_gib": 15.75,
    "hbm_spare": 0.43,
    "hbm_parts_gib": {"parameters": 1.0, "optimiser": 2.0, "batch": 0.0, "activations": 6.0},
    "model_tflops_per_chip": 26.745,
    "model_tflops_per_chip_of_allowed_pairs": 26.0,
    "compiled_tflops_per_chip": 27.3,
    "recompute": 0.02,
    "predicted_mcycles": 270.0,
    "predicted_compute_ms": 180.0,
    "predicted_ms_without_overlap": 200.0,
    "predicted_ms": 190.0,
    "predicted_mfu": 0.77,
    "predicted_mfu_of_allowed_pairs": 0.76,
    "predicted_mfu_without_overlap": 0.7,
    "predicted_mfu_with_comms": 0.74,
    "images_per_s": 43000.0,
    "steps": 1500000,
    "days": 3.2,
    "chip_hours": 19000.0,
    "collectives": [],
    "gradient_dtypes": {"f32": 100, "bf16": 1},
    "between_slices": [],
    "replicated": [],
    "cycles_from": {"the compiler's estimate": 1.0},
    "kernels": [{"name": "whole_row_attention_forward", "states_its_cost": True, "count": 72, "mcycles": 20.2}],
    "top": [],
    "breakdown": {"encoder mlp": {"matmul": 200.0}},
    "versions": {"jax": "0.10.2", "libtpu": "0.0.52"},
    "compiler_options": {},
    "num_chips": 256,
    "batch_size": 8192,
    "patches": 256,
    "compile_s": 60.0,
}
REFUSED = {
    **{key: GOOD[key] for key in ("config", "topology", "slices", "area", "overrides", "full", "mesh", "versions")},
    **{key: GOOD[key] for key in ("num_chips", "batch_size", "patches", "hbm_limit_gib", "model_tflops_per_chip")},
    **dict.fromkeys(("hbm_gib", "predicted_ms", "predicted_mfu", "predicted_mfu_with_comms", "images_per_s")),
    "compiles": False,
    "refusal": "exceeds available HBM (15.75G)",
    "collectives": [],
}


def table(tmp_path, *reports) -> tuple[int, str]:
    for number, report in enumerate(reports):
        (tmp_path / f"{number}.json").write_text(json.dumps(report))
    page = tmp_path / "aot.md"
    return main([str(tmp_path), f"--output={page}"]), page.read_text()


def test_table_when_all_is_well_then_it_says_prediction_and_both_ways_are_compared(tmp_path):
    xla = GOOD | {"predicted_mfu": 0.66, "predicted_mfu_with_comms": 0.63}
    full = GOOD | {"full": True, "predicted_mcycles": 272.0}
    code, page = table(tmp_path, GOOD | {"xla_attention": xla}, full)
    assert code == 0
    assert "prediction by the TPU compiler" in page and "libtpu 0.0.52" in page
    assert "| pretrain:large | v5e:16x16 | data 16, fsdp 16 | proxy | 9.00 of 15.75 (43%) |" in page
    assert "| 0.770 | 0.740 | 0.660, 0.630 | f32 |" in page
    assert "270.0 Mcycles by the proxy, 272.0 in full, -0.74%" in page
    changed = GOOD | {"config": "experiments/native.py:large", "area": 4096, "overrides": {"model.remat": "none"}}
    assert "| native:large, 4096 patches, model.remat=none | v5e:16x16 |" in table(tmp_path, changed)[1]
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (REFUSED, "does not compile: exceeds available HBM (15.75G)"),
        (GOOD | {"hbm_spare": 0.04}, "leaves 4.0% of the memory"),
        (GOOD | {"replicated": ["gradient of w: f32[8] is reduced to every device"]}, "replicates gradient of w"),
        (
            GOOD | {"between_slices": [{"kind": "send", "carries": "other: all-gather", "count": 1, "bytes": 9}]},
            "sends other: all-gather between slices",
        ),
    ],
    ids=["refused", "full memory", "replicated", "crossing"],
)
def test_table_when_something_is_wrong_then_it_stands_there_and_the_code_is_3(bad, message, tmp_path, capsys):
    code, page = table(tmp_path, GOOD, bad)
    assert code == 3 and message in page and message in capsys.readouterr().err


def test_summary_refuses_other_json(tmp_path, capsys):
    """A file that is not a report is named."""
    (tmp_path / "other.json").write_text("[1]")
    assert main([str(tmp_path), f"--output={tmp_path / 'aot.md'}"]) == 2
    assert "other.json" in capsys.readouterr().err


HEADER = ("config", "topology", "slices", "area", "overrides", "full")
NESTED = {key: value for key, value in REFUSED.items() if key not in HEADER}


@pytest.mark.parametrize("report", [GOOD, REFUSED, GOOD | {"xla_attention": NESTED}], ids=["good", "refused", "xla"])
def test_prediction_json_round_trip(report):
    """A report that is read and written again has the same keys and values."""
    assert json.loads(json.dumps(Prediction.from_json(report).to_json())) == report


def test_table_when_there_are_no_reports_then_where_to_get_them(tmp_path, capsys):
    assert main([str(tmp_path), f"--output={tmp_path / 'aot.md'}"]) == 2
    assert "--json" in capsys.readouterr().err
