"""Random damage: no crash, no hang, and every sample is counted.

`python -c "from tests.prepare.inputs.test_fuzz import main; main(2000)"` runs more rounds.
"""

import contextlib
import gzip
import io
import random
import signal
import tarfile
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import parquet, reader
from aimv2_jax.prepare.inputs.samples import InputShard
from tests.helpers.small_inputs import image_bytes, lost, packed, pairs, read_all

ROUNDS, TABLE_ROUNDS = 300, 60
COUNT = 12
SECONDS_A_ROUND = 5  # A round usually takes 2 ms.
BLOCK = 512


def _shuffled():
    members = list(pairs(COUNT).items())
    random.Random(0).shuffle(members)
    return members


TARS = [
    packed(pairs(COUNT)),
    packed(_shuffled()),
    packed(pairs(COUNT, stem="a/long/folder/" * 9 + "{:09d}"), tarfile.GNU_FORMAT),
    packed(pairs(COUNT, stem="schöne Bilder/{:09d}"), tarfile.PAX_FORMAT),
    gzip.compress(packed(_shuffled())),
]


def damaged(rng, data):
    """`data` after one to four accidents: flipped bits, a cut, a lost piece, swapped, repeated or zeroed blocks."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        blocks = max(2, len(data) // BLOCK)
        first, second = (BLOCK * rng.randrange(blocks) for _ in range(2))
        accident = rng.choice(("bits", "bits", "header", "cut", "lost", "swap", "swap", "repeat", "zero", "noise"))
        if accident == "bits":
            for _ in range(rng.randint(1, 20)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif accident == "header":  # The checksum stays valid: one bit is set and the same bit is cleared.
            places = [first + rng.randrange(BLOCK) for _ in range(40)]
            bit = 1 << rng.randrange(3)
            up = [place for place in places if place < len(data) and not data[place] & bit]
            down = [place for place in places if place < len(data) and data[place] & bit]
            for place in (*up[:1], *down[:1]):
                data[place] ^= bit
        elif accident == "cut":
            del data[rng.randrange(1, len(data)) :]
        elif accident == "lost":
            del data[first : first + rng.choice((BLOCK, rng.randrange(1, 3000)))]
        elif accident == "swap":
            data[first : first + BLOCK], data[second : second + BLOCK] = (
                data[second : second + BLOCK],
                data[first : first + BLOCK],
            )
        elif accident == "repeat":
            data[first:first] = data[second : second + BLOCK * rng.randint(1, 9)]
        elif accident == "zero":
            data[first : first + BLOCK] = bytes(BLOCK)
        else:
            data[first : first + BLOCK] = rng.randbytes(BLOCK)
        if not data:
            return b"\0"
    return bytes(data)


@contextlib.contextmanager
def no_hang():
    def stop(*_):
        raise TimeoutError(f"more than {SECONDS_A_ROUND} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_A_ROUND)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tar_round(folder, seed):
    """(samples, lost samples, skipped bytes) of one damaged tar, whose counts must add up."""
    rng = random.Random(seed)
    data = damaged(rng, TARS[seed % len(TARS)])
    (folder / "0.tar").write_bytes(data)
    (folder / "0_stats.json").write_text(f'{{"successes": {COUNT}}}')
    (folder / "1.tar").write_bytes(data)
    with no_hang():
        shards = [InputShard("webdataset", str(folder / name), len(data)) for name in ("0.tar", "1.tar")]
        (samples, bad_inputs), (bare_samples, _) = (read_all(shard) for shard in shards)
        reader.default_captions(shards[0])
    assert len(samples) + lost(bad_inputs) == COUNT, seed
    # Statistics only drop fragments, no whole pairs, unless repeated blocks with truncated names add surplus pairs.
    keys, bare_keys = ({sample.key for sample in found} for found in (samples, bare_samples))
    whole = {sample.key for sample in bare_samples if sample.image and sample.fields}
    assert keys <= bare_keys and (whole <= keys or len(whole) > COUNT), seed
    return len(samples), lost(bad_inputs), sum(bad_input.num_bytes for bad_input in bad_inputs)


def test_tars_when_damaged_at_random_then_the_books_balance(tmp_path):
    totals = [sum(column) for column in zip(*(tar_round(tmp_path, seed) for seed in range(ROUNDS)))]
    assert totals[0] + totals[1] == ROUNDS * COUNT
    assert totals[0] > 0.6 * ROUNDS * COUNT  # Most samples are recovered.
    assert min(totals) > 0


def _parquet(row_group_size, **options):
    buffer = io.BytesIO()
    columns = {
        "key": [f"{n:09d}" for n in range(40)],
        "caption": pyarrow.array([f"caption {n % 9}" for n in range(40)]).dictionary_encode(),
        "score": pyarrow.array([f"{n}.5" for n in range(40)]).cast(pyarrow.decimal128(9, 2)),
        "jpg": [image_bytes(n) for n in range(40)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, row_group_size=row_group_size, **options)
    return buffer.getvalue()


PARQUETS = [
    _parquet(10, write_page_checksum=True),
    _parquet(20),  # Changed pages stay readable.
    _parquet(20, use_dictionary=False, compression="none"),
]


def parquet_round(folder, seed):
    """Number of samples announced in a damaged table, whose counts must add up; None if unknown."""
    rng = random.Random(seed)
    path, data = folder / "0.parquet", PARQUETS[seed % len(PARQUETS)]
    if rng.random() < 0.8:  # Only pages are damaged; the footer and its count stay intact.
        num_footer_bytes = 8 + int.from_bytes(data[-8:-4], "little")
        num_page_bytes = len(data) - num_footer_bytes
        pages = damaged(rng, data[:num_page_bytes])[:num_page_bytes].ljust(num_page_bytes, b"\0")
        data = pages + data[num_page_bytes:]
    else:
        data = damaged(rng, data)
    path.write_bytes(data)
    try:
        footer = pyarrow.parquet.read_metadata(path)
        groups = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        announced = footer.num_rows if min(groups) >= 0 and sum(groups) == footer.num_rows else None
    except Exception:  # The footer is damaged.
        announced = None
    with no_hang():
        if isinstance(parquet.shards(str(path), len(data)), UserError):
            return None
        samples, bad_inputs = read_all(InputShard("parquet", str(path), len(data)))
    assert announced is None or len(samples) + lost(bad_inputs) == announced, seed
    return announced


def table_round(folder, seed):
    """Number of rows of a damaged table, whose counts must add up."""
    kind, rows = ("jsonl", b'{"file_name": "a.jpg"}\n') if seed % 2 else ("csv", b'"a.jpg","a caption"\n')
    header = b"" if seed % 2 else b"file_name,caption,a,b,c\n"  # An intact header with surplus columns for noise.
    data = header + damaged(random.Random(seed), rows * 200)
    (folder / f"0.{kind}").write_bytes(data)
    with no_hang():
        samples, bad_inputs = read_all(InputShard(kind, str(folder / f"0.{kind}"), len(data)))
    lines = [line for line in data.split(b"\n") if line.strip()]
    num_rows = len(samples) + lost(bad_inputs) + (kind == "csv")
    # Noise can contain a quote and its partner some lines later; these lines then form one cell.
    num_inner = sum(stored(sample).count(b"\n") for sample in samples)
    assert len(lines) - num_inner <= num_rows <= len(lines), seed
    return num_rows


def stored(sample):
    cells = (value for value in sample.fields.values() if isinstance(value, str | bytes))
    return b"".join(value if isinstance(value, bytes) else value.encode() for value in cells)


@pytest.mark.parametrize("round", [parquet_round, table_round])
def test_tables_when_damaged_at_random_then_the_books_balance(tmp_path, round):
    compared = [round(tmp_path, seed) for seed in range(TABLE_ROUNDS)]
    assert sum(1 for number in compared if number) > 0.7 * TABLE_ROUNDS


def main(rounds):
    with tempfile.TemporaryDirectory() as folder:
        totals = [sum(column) for column in zip(*(tar_round(Path(folder), seed) for seed in range(rounds)))]
        print(f"{rounds} tars: {totals[0]} samples given, {totals[1]} lost, {totals[2]} bytes passed over")
        for name, round in (("parquet", parquet_round), ("tables", table_round)):
            for seed in range(rounds):
                round(Path(folder), seed)
            print(f"{rounds} {name}")
