"""Example counters, the file of bad records, the limit on them, and model FLOPs."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from aimv2_jax.data.loading.batch_builder import BadExample
from aimv2_jax.errors import TrainingAborted
from aimv2_jax.monitoring.counters import BadRecordFile, ExampleCounter
from aimv2_jax.monitoring.flops import flops_per_example, model_flops_utilisation
from aimv2_jax.monitoring.model_flops import flops_of_allowed_pairs
from aimv2_jax.parallel.mesh import build_mesh
from aimv2_jax.parallel.rules import replicated
from tests.helpers.tiny import tiny_config

REASONS = ("corrupt_record", "missing_caption")


@pytest.fixture
def counter():
    return ExampleCounter(["a", "b"], REASONS, replicated(build_mesh(1, -1, 1, 1)))


def add(counter, source, faults, truncated=None, retries=None):
    truncated = [False] * len(source) if truncated is None else truncated
    retries = [0] * len(source) if retries is None else retries
    return counter.add(*map(jnp.asarray, (source, faults, truncated, retries)))


def test_laps_count_each_batch_once(counter):
    """A lap counts the batches since the previous one, by source and reason."""
    add(counter, [0, 1, 1], [[0, 0], [2, 0], [0, 1]], [True, False, False])
    counts = add(counter, [1, 1, 1], [[0, 0], [0, 0], [1, 0]], [True, False, True], [3, 0, 1])
    later = add(counter, [0], [[0, 0]])
    assert counter.lap(counts) == {
        "images/a": 1,
        "images/b": 5,
        "bad/b/corrupt_record": 3,
        "bad/b/missing_caption": 1,
        "truncated_captions/a": 1.0,
        "truncated_captions/b": 0.4,
        "data_read_retries": 4,
    }
    assert counter.lap(later) == {"images/a": 1, "images/b": 0, "truncated_captions/a": 0.0}


def test_check_aborts_above_the_bad_share(counter):
    """A share of bad records above the limit stops the run with a message that names the file of their keys."""
    counter.lap(add(counter, [0], [[10, 0]]))
    counter.check(0.01)  # 10 of at least 1,000
    counter.lap(add(counter, [0], [[1, 0]]))
    with pytest.raises(TrainingAborted, match=r"11 of 13 records.*max_bad_fraction=0\.01.*bad_records\.jsonl"):
        counter.check(0.01)


def test_check_tolerates_missing_caption_types(counter):
    """Missing caption types alone do not count as bad records."""
    counter.lap(add(counter, [0], [[0, 5000]]))
    counter.check(0.0)


def test_bad_record_file_is_cut_on_resume(tmp_path):
    """A resume cuts lines after its step, and an unfinished one."""
    faults = [BadExample(example=7, source="a", record=3, key="k", reason="corrupt_record")]
    with BadRecordFile(tmp_path, 0) as first:
        for step in (1, 2, 3):
            first.write(step, faults)
    path = tmp_path / "bad_records.jsonl"
    path.write_text(path.read_text() + '{"step": 1, "half')
    with BadRecordFile(tmp_path, 0) as second:
        second.cut_after(2)
        second.write(3, faults)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0] == {"step": 1, "example": 7, "source": "a", "record": 3, "key": "k", "reason": "corrupt_record"}


def test_bad_record_file_when_a_line_is_damaged(tmp_path):
    """The run continues, and the line is kept in a second file."""
    path = tmp_path / "bad_records.jsonl"
    path.write_text('{"step": 1}\n{garbage\n')
    with BadRecordFile(tmp_path, 0) as file:
        file.cut_after(2)
        file.write(3, [BadExample(example=7, source="a", record=3, key="k", reason="corrupt_record")])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
    assert (tmp_path / "bad_records.jsonl.damaged").read_text() == "{garbage\n"


class Device:
    def __init__(self, kind: str):
        self.device_kind = kind


def test_flops_when_counted_by_hand_then_equal():
    config = tiny_config()
    encoder = 4 * 588 * 32 + 2 * (4 * (4 * 32 * 32 + 3 * 32 * 64) + 2 * 4 * 4 * 32)
    rows = 4 + 12
    decoder = 4 * 32 * 16 + 2 * (rows * (4 * 16 * 16 + 3 * 16 * 32) + 2 * rows * rows * 16)
    heads = 3 * 16 * 588 + 12 * 16 * 1024
    assert flops_per_example(config) == 6 * (encoder + decoder + heads)


def test_flops_of_other_decoders_equal_a_hand_count():
    """FLOPs of the other decoders equal a count by hand."""
    encoder = 4 * 588 * 32 + 2 * (4 * (4 * 32 * 32 + 3 * 32 * 64) + 2 * 4 * 4 * 32)
    joint_block, text_head = 4 * 16 * 16 + 3 * 16 * 32, 12 * 16 * 1024

    def trunk(image: int, text: int) -> int:
        rows = image + text
        return image * 32 * 16 + 2 * (rows * joint_block + 2 * rows * rows * 16)

    separate = trunk(4, 0) + 3 * 16 * 588 + trunk(4, 12) + text_head
    assert flops_per_example(tiny_config(model__decoder__kind="separate")) == 6 * (encoder + separate)
    kept = tiny_config(loss__image=False, model__decoder__token_keep_rate=0.5)
    assert flops_per_example(kept) == 6 * (encoder + trunk(2, 12) + text_head)
    mlp = 3 * (32 * 16 + 2 * 3 * 16 * 32 + 16 * 588)
    assert flops_per_example(tiny_config(loss__text=False, model__decoder__kind="mlp")) == 6 * (encoder + mlp)
    # Pairs forbidden by a mask: none in an encoder with full attention, those above the diagonal in each decoder.
    free = tiny_config(loss__image=False, model__encoder__attention_mask="full")
    forbidden = 2 * 16 * (16 * 15 / 2)
    assert flops_of_allowed_pairs(free) == 6 * (encoder + trunk(4, 12) + text_head - 2 * forbidden)


def test_mfu_is_none_without_a_known_peak():
    """Utilisation is a share of the peak, and None where the peak or the rate is unknown."""
    config = tiny_config(model__compute_dtype="bfloat16")
    two = [Device("TPU v5 lite")] * 2
    assert model_flops_utilisation(config, 98.304, two) == pytest.approx(0.25)
    assert model_flops_utilisation(config, 45.8752, [Device("TPU v5p")]) == pytest.approx(0.1)
    assert model_flops_utilisation(config, 10.0, [Device("cpu")]) is None
    assert model_flops_utilisation(config, None, two) is None
    assert model_flops_utilisation(tiny_config(), 10.0, two) is None  # float32: another peak
