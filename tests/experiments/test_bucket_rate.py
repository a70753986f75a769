"""The benchmark of undecoded reads runs. No rates are checked: machines differ."""

import json
import sys
from pathlib import Path

import pytest

from aimv2_jax.data.bag import SUFFIX
from experiments.benchmarks import bucket_rate
from tests.helpers import buckets


def rate(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bucket_rate.py", *map(str, words)])
    return bucket_rate.main()


@pytest.mark.parametrize("threads", [1, 8])
def test_bucket_rate_reads_through_workers(make_dataset, monkeypatch, capsys, threads):
    """Two workers read the records asked for, and those of the warm-up; nothing is retried."""
    words = ["--workers", 2, "--read-threads", threads, "--batch-size", 4, "--records", 22]
    assert rate(monkeypatch, make_dataset("noise", 12), *words) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["records"] == (8 + 6) * 4 and measured["retries"] == 0
    assert min(measured["records_per_s"], measured["mb_per_s"], measured["worker_mib"]) > 0


def test_bucket_rate_refuses_damaged_record(make_dataset, monkeypatch, capsys):
    """A record that differs from its checksum ends the measurement."""
    folder = Path(make_dataset("damaged", 12, shard_bytes=1 << 20))
    [shard] = folder.glob(f"*{SUFFIX}")
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    assert rate(monkeypatch, folder, "--batch-size", 4, "--records", 22) == 75
    assert "is damaged" in capsys.readouterr().err


def test_bucket_rate_counts_requests(fake_gcs, make_dataset, tmp_path, monkeypatch, capsys):
    """From a bucket, a record is one request of its own bytes, but for what workers read beyond the last batch."""
    with buckets.proxy(fake_gcs) as proxied, buckets.clients_of(proxied):
        url = proxied.new_folder()
        for file in Path(make_dataset("far", 40)).iterdir():
            proxied.write(f"{url}/{file.name}", file.read_bytes())
        words = ["--batch-size", 4, "--records", 480, "--read-threads", 4, "--cache-dir", tmp_path]
        assert rate(monkeypatch, url, *words, "--proxy", proxied.address) == 0
    measured = json.loads(capsys.readouterr().out)
    beyond = 2 * 3 * 4 + 2 * 2 * 4  # Two workers have up to three batches ready, and two fetches a thread.
    assert 1 <= measured["requests_per_record"] <= 1 + beyond / measured["records"]
    assert 1 <= measured["received_per_byte"] < 1.2 and measured["retries"] == 0
