"""Random damage: no crash, no hang, and the books balance to the last sample.

`python -c "from data.inputs.test_fuzz import main; main(2000)"` in tests/ runs more rounds.
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
from small_inputs import books, lost, packed, pairs, picture

from aimv2_jax.data.inputs import parquet, read
from aimv2_jax.data.inputs.samples import InputShard
from aimv2_jax.errors import UserError

ROUNDS, TABLE_ROUNDS = 300, 60
COUNT = 12
SECONDS_A_ROUND = 5  # Usual are 2 ms.
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
        elif accident == "header":  # The sum stays right: one bit up, the same bit down.
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
    """(samples, samples lost, bytes passed over) of one damaged tar, whose books must balance."""
    rng = random.Random(seed)
    data = damaged(rng, TARS[seed % len(TARS)])
    (folder / "0.tar").write_bytes(data)
    (folder / "0_stats.json").write_text(f'{{"successes": {COUNT}}}')
    (folder / "1.tar").write_bytes(data)
    with no_hang():
        shards = [InputShard("webdataset", str(folder / name), len(data)) for name in ("0.tar", "1.tar")]
        (samples, damages), (bare_samples, _) = (books(shard) for shard in shards)
        read.default_captions(shards[0])
    assert len(samples) + lost(damages) == COUNT, seed
    # Statistics only leave fragments out: no whole pair, unless repeated pieces under cut names make too many.
    keys, bare_keys = ({sample.key for sample in found} for found in (samples, bare_samples))
    whole = {sample.key for sample in bare_samples if sample.image and sample.fields}
    assert keys <= bare_keys and (whole <= keys or len(whole) > COUNT), seed
    return len(samples), lost(damages), sum(damage.num_bytes for damage in damages)


def test_tars_when_damaged_at_random_then_the_books_balance(tmp_path):
    totals = [sum(column) for column in zip(*(tar_round(tmp_path, seed) for seed in range(ROUNDS)))]
    assert totals[0] + totals[1] == ROUNDS * COUNT
    assert totals[0] > 0.6 * ROUNDS * COUNT  # Most of them are saved.
    assert min(totals) > 0


def _parquet():
    buffer = io.BytesIO()
    columns = {"key": [f"{n:09d}" for n in range(40)], "caption": ["a"] * 40, "jpg": [picture(n) for n in range(40)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, row_group_size=10, write_page_checksum=True)
    return buffer.getvalue()


def parquet_round(folder, seed):
    path = folder / "0.parquet"
    data = damaged(random.Random(seed), _parquet())
    path.write_bytes(data)
    try:
        footer = pyarrow.parquet.read_metadata(path)
        groups = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        announced = footer.num_rows if min(groups) >= 0 and sum(groups) == footer.num_rows else None
    except Exception:  # The footer is gone, and with it the count.
        announced = None
    with no_hang():
        if isinstance(parquet.shards(str(path), len(data)), UserError):
            return
        samples, damages = books(InputShard("parquet", str(path), len(data)))
    assert announced is None or len(samples) + lost(damages) == announced, seed


def table_round(folder, seed):
    kind, rows = ("jsonl", b'{"file_name": "a.jpg"}\n') if seed % 2 else ("csv", b'"a.jpg","a caption"\n')
    header = b"" if seed % 2 else b"file_name,caption\n"
    data = damaged(random.Random(seed), header + rows * 200)
    (folder / f"0.{kind}").write_bytes(data)
    with no_hang():
        books(InputShard(kind, str(folder / f"0.{kind}"), len(data), 0, None))


@pytest.mark.parametrize("round", [parquet_round, table_round])
def test_tables_when_damaged_at_random_then_the_books_balance(tmp_path, round):
    for seed in range(TABLE_ROUNDS):
        round(tmp_path, seed)


def main(rounds):
    with tempfile.TemporaryDirectory() as folder:
        totals = [sum(column) for column in zip(*(tar_round(Path(folder), seed) for seed in range(rounds)))]
        print(f"{rounds} tars: {totals[0]} samples given, {totals[1]} lost, {totals[2]} bytes passed over")
        for name, round in (("parquet", parquet_round), ("tables", table_round)):
            for seed in range(rounds):
                round(Path(folder), seed)
            print(f"{rounds} {name}")
