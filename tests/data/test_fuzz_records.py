"""Random corruptions of shards and indices: every read returns the original record or raises an error that says so."""

import collections
import random
import shutil

from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.record_index import INDEX_FILE
from aimv2_jax.data.records import BadRecord, Record, decode
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import UserError

COUNT, SEED = 200, 0


def flip(data, rng):
    for _ in range(rng.choice([1, 1, 1, 10, 200])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


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


CORRUPTIONS = (flip, cut, insert, swap, overwrite)
# Entries of an index that move whole would name other records. Its size is checked when a dataset is opened.
OF_INDEX = (flip, cut, overwrite)


def test_corrupted_dataset_is_never_misread(tmp_path):
    """After any damage a record is exact or bad; only a file that became shorter is an error of another kind."""
    rng = random.Random(SEED)
    records = [Record(f"k{i}", rng.randbytes(rng.randint(100, 9000)), {"alt": f"caption {i}"}) for i in range(40)]
    harmed = collections.Counter()
    clean, folder = tmp_path / "clean", tmp_path / "set"
    info = write_dataset(clean, records, shard_bytes=70_000)
    for number in range(COUNT):
        shutil.copytree(clean, folder, dirs_exist_ok=True)
        source = Source("fuzzed", str(folder), patience_s=0)
        name = INDEX_FILE if number % 5 == 0 else rng.choice(info.shards).file
        corruption = rng.choice(OF_INDEX if name == INDEX_FILE else CORRUPTIONS)
        data = bytearray((folder / name).read_bytes())
        corruption(data, rng)
        (folder / name).write_bytes(data)
        bad = 0
        for index, record in enumerate(records):
            try:
                read = decode(source.read(index))
            except BadRecord:
                bad += 1
            except UserError:
                assert corruption is cut
                bad += 1
            else:
                assert read == record, f"corruption {number}, {corruption.__name__}: record {index} differs"
        touched = next((shard.records for shard in info.shards if shard.file == name), len(records))
        assert bad <= touched, f"corruption {number}, {corruption.__name__}: other shards are bad too"
        harmed[corruption.__name__, name == INDEX_FILE] += bad > 0
    assert all(harmed[corruption.__name__, False] for corruption in CORRUPTIONS)
    assert all(harmed[corruption.__name__, True] for corruption in OF_INDEX)
