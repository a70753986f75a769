"""Random corruptions of shards: every read returns the original record or raises `BadRecord`, without a crash.

    python tests/data/test_fuzz_records.py COUNT SEED

runs any number of corruptions.
"""

import collections
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
COUNT, SEED = 200, 0


def flip(data, rng):
    for _ in range(rng.choice([1, 1, 1, 10, 200])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_in_block_header(data, rng):
    """Flips a bit in a Riegeli block header (the format below ArrayRecord): every 64 KiB, and at the footer."""
    start = rng.choice([0, len(data) // 65536 // 2 * 65536, len(data) - 65536])
    data[start + rng.randrange(64)] ^= 1 << rng.randrange(8)


def cut(data, rng):
    del data[rng.randrange(len(data)) :]


def insert(data, rng):
    position = rng.randrange(len(data))
    data[position:position] = rng.randbytes(rng.randint(1, 300))


def swap(data, rng):
    length = rng.randint(1, len(data) // 3)
    one, two = rng.randrange(len(data) - length), rng.randrange(len(data) - length)
    data[one : one + length], data[two : two + length] = data[two : two + length], data[one : one + length]


def overwrite(data, rng):
    position, length = rng.randrange(len(data)), rng.choice([50, 600, 70_000])
    size = len(data[position : position + length])
    data[position : position + length] = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)


CORRUPTIONS = (flip, flip_in_block_header, cut, insert, swap, overwrite)


def fuzz(count, seed):
    from aimv2_jax.data.dataset_info import write_dataset
    from aimv2_jax.data.records import BadRecord, Record, decode
    from aimv2_jax.data.sources import Source

    rng = random.Random(seed)
    records = [Record(f"k{i}", rng.randbytes(rng.randint(100, 9000)), {"alt": f"caption {i}"}) for i in range(40)]
    outcomes = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        clean, folder = Path(folder) / "clean", Path(folder) / "set"
        info = write_dataset(clean, records, shard_bytes=70_000)
        for number in range(count):
            shutil.copytree(clean, folder, dirs_exist_ok=True)
            shard, corruption = rng.choice(info.shards), rng.choice(CORRUPTIONS)
            data = bytearray((folder / shard.file).read_bytes())
            corruption(data, rng)
            (folder / shard.file).write_bytes(data)
            source = Source("fuzzed", str(folder))
            bad = 0
            for index, record in enumerate(records):
                try:
                    read = decode(source.read(index))
                except BadRecord:
                    bad += 1
                else:
                    assert read == record, f"corruption {number}, {corruption.__name__}: record {index} differs"
            assert bad <= shard.records, f"corruption {number}, {corruption.__name__}: other shards are bad too"
            outcomes[corruption.__name__, "harmed" if bad else "unharmed"] += 1
    for (name, outcome), times in sorted(outcomes.items()):
        print(f"{name} {outcome} {times}")


def test_shards_when_corrupted_at_random_then_every_read_is_exact_or_a_bad_record():
    """Runs in a subprocess, so that a crash of the C++ reader fails this test and not the whole suite."""
    command = [sys.executable, __file__, str(COUNT), str(SEED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    assert sum(int(times) for _, _, times in words) == COUNT
    assert {name for name, outcome, _ in words if outcome == "harmed"} == {c.__name__ for c in CORRUPTIONS}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    fuzz(int(sys.argv[1]), int(sys.argv[2]))
