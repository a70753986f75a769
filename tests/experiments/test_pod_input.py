"""The simulation of a pod's input: its arithmetic on small numbers, and the whole program on a tiny dataset."""

import pytest

from aimv2_jax.errors import UserError
from experiments.benchmarks import pod_input, pod_measure, pod_model


@pytest.mark.parametrize(
    ("reads_per_s", "minutes", "lost_minutes"),
    [(4_000, 0, 0), (5_000, 0, 0), (10_000, 20, 10), (40_000, 60, 60 - (5 + 10 + 20) * 20 / 40)],
)
def test_ramp_loses_what_limit_refuses(reads_per_s, minutes, lost_minutes):
    """The limit doubles every 20 minutes, and the reads that it refused until then are the time lost."""
    ramp = pod_model.ramp(reads_per_s)
    assert (ramp.seconds / 60, ramp.lost_s / 60) == pytest.approx((minutes, lost_minutes))


def throttle(readers, limit_per_s, patience_s=10.0):
    return pod_model.throttle(readers, limit_per_s, 0.05, patience_s, seconds=60, pauses_s=(0.05, 5.0))


def test_throttle_keeps_rate_at_limit():
    """Below the limit every read needs one attempt; above it the rate is the limit, and reads are refused."""
    free = throttle(10, 400)
    assert (free.attempts_per_read, free.longest_s, free.share_over_patience) == (1, 0, 0)
    assert free.reads_per_s == pytest.approx(200, rel=0.01)
    busy = throttle(400, 100)
    assert 95 < busy.reads_per_s <= 100 and busy.attempts_per_read > 2
    assert busy.longest_s > 10 and 0 < busy.share_over_patience < 1
    assert throttle(400, 100, patience_s=60).share_over_patience == 0


@pytest.mark.parametrize("order", ["exact", (4, 1), (4, 6), (16, 5)], ids=str)
def test_order_visits_each_record_once(order):
    """Every order is a permutation of the records."""
    record_of = pod_model.exact_order(3, 480) if order == "exact" else pod_model.block_order(3, 480, *order)
    assert sorted(map(record_of, range(480))) == list(range(480))


def test_block_order_has_neighbours_in_batch():
    """A batch of whole blocks has each block's neighbours; a window of many batches spreads them over these."""
    records, batch = 1 << 16, 256
    exact = pod_model.neighbour_pairs(pod_model.exact_order(0, records), records, batch, 8)
    blocks = [
        pod_model.neighbour_pairs(pod_model.block_order(0, records, 16, window), records, batch, 8)
        for window in (1, 16, 256)
    ]
    # Two of 256 chosen records are neighbours in 256 ** 2 / 65,536 pairs; a batch has 16 blocks of 15 pairs, and
    # with windows of 16 batches a sixteenth of that.
    assert exact < 3
    assert blocks[0] >= 240 and blocks[1] >= 240 and 10 < blocks[2] < 20


def test_pod_input_measures_tiny_dataset(monkeypatch, capsys, tmp_path):
    """The program opens, lists and reads sparse datasets, and writes its tables."""
    size = ["--records", "300000", "--datasets", "30:2000", "1500:60000", "--reads", "50", "--batch-size", "256"]
    words = [*size, "--hosts", "2", "--throttled-s", "10", "--scratch", tmp_path, "--output", tmp_path / "pod.md"]
    monkeypatch.setattr("sys.argv", ["pod_input.py", *map(str, words)])
    assert pod_input.main() == 0
    text = (tmp_path / "pod.md").read_text()
    assert text == capsys.readouterr().out
    assert "| | 30 shards, 2 kB a record | 1,500 shards, 60 kB a record |" in text
    assert "| 300,000 reads | $0 |" in text and "| 64 | 256 records |" in text
    assert not list(tmp_path.glob("*/set"))  # The datasets are gone.


def test_dataset_reads_sampled_records(tmp_path):
    """Records whose index entries were written are read; a shard beyond the format's limit is refused."""
    made = pod_measure.make_dataset(tmp_path / "set", 1000, 10, 500, 40)
    measured = pod_measure.measure(made)
    assert measured["read_ms"] > 0 and len(made.sampled) > 30
    with pytest.raises(UserError, match="--shards"):
        pod_measure.make_dataset(tmp_path / "large", 10_000_000, 100, 60_000, 40)
