"""Reading of parquet tables, intact and damaged."""

import decimal
import errno
import io
import os

import pyarrow
import pyarrow.parquet
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import arrow_columns, discover, open_files, parquet
from aimv2_jax.prepare.inputs.samples import BadInput, Sample
from tests.helpers.small_inputs import image_bytes, read_all


@pytest.fixture
def table(tmp_path):
    def make(columns, name="00000.parquet", row_group_size=None, **options):
        path = tmp_path / name
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size, **options)
        return path

    return make


def shard(path):
    [found] = discover.find_shards([str(path)])
    return found


def img2dataset(count):
    return {
        "key": [f"{n:09d}" for n in range(count)],
        "caption": [f"alt {n}" for n in range(count)],
        "status": ["success"] * count,
        "jpg": [image_bytes(n) for n in range(count)],
    }


def hugging_face(count):
    return {
        "image": [{"bytes": image_bytes(n), "path": None} for n in range(count)],
        "text": [f"text {n}" for n in range(count)],
        "label": list(range(count)),
    }


def test_img2dataset_when_read_then_key_image_and_columns(table):
    samples, bad_inputs = read_all(shard(table(img2dataset(70))))
    fields = {"key": "000000069", "caption": "alt 69", "status": "success"}
    assert (len(samples), samples[69]) == (70, Sample("000000069", image_bytes(69), fields))
    assert bad_inputs == []


def test_status_when_no_success_then_no_image(table):
    columns = img2dataset(3) | {"status": ["success", "failed_to_download", "failed_to_resize"]}
    columns["jpg"][1] = None
    samples, bad_inputs = read_all(shard(table(columns)))
    assert [sample.image for sample in samples] == [image_bytes(0), None, None]
    assert bad_inputs == []


@pytest.mark.parametrize("status", [[200] * 3, [b"success"] * 3, ["ok", None, ""]])
def test_status_when_not_of_img2dataset_then_the_images_stay(table, status):
    samples, _ = read_all(shard(table(img2dataset(3) | {"status": status})))
    assert [sample.image for sample in samples] == [image_bytes(n) for n in range(3)]


def test_images_when_in_a_dictionary_column_then_read(table):
    columns = img2dataset(3)
    columns["jpg"] = pyarrow.array(columns["jpg"]).dictionary_encode()
    samples, _ = read_all(shard(table(columns)))
    assert [sample.image for sample in samples] == [image_bytes(n) for n in range(3)]


def test_hugging_face_when_read_then_bytes_of_the_struct(table):
    columns = hugging_face(40)
    columns["image"][1] = {"bytes": None, "path": "a.jpg"}
    columns["image"][2] = None
    samples, bad_inputs = read_all(shard(table(columns, "train-00000-of-00001.parquet", row_group_size=7)))
    assert [sample.image for sample in samples] == [image_bytes(0), None, None] + [image_bytes(n) for n in range(3, 40)]
    assert samples[39].key == "train-00000-of-00001/39"
    assert samples[39].fields == {"text": "text 39", "label": 39}
    assert bad_inputs == []


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()])
def test_image_column_of_any_binary_type(table, kind):
    """Images are read from a column of any type of bytes."""
    [sample] = read_all(shard(table({"image": pyarrow.array([b"1"], kind)})))[0]
    assert sample == Sample("00000/0", b"1", {})


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
def test_text_when_not_utf8_then_bytes(table, kind):
    stored = pyarrow.array([b"ok", b"caf\xe9", None])
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, stored.buffers())
    texts = texts.cast(pyarrow.binary()).cast(kind, safe=False) if kind != pyarrow.string() else texts
    samples, _ = read_all(shard(table({"jpg": [b"1", b"2", b"3"], "caption": texts})))
    assert [sample.fields for sample in samples] == [{"caption": "ok"}, {"caption": b"caf\xe9"}, {}]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.list_(pyarrow.string()),
        pyarrow.large_list(pyarrow.large_string()),
        pyarrow.list_(pyarrow.string_view()),
        pyarrow.list_(pyarrow.string(), 2),
    ],
)
def test_lists_of_texts_are_fields_and_of_numbers_none(table, kind):
    lists = pyarrow.array([["a", "b"], ["", "ä"], ["c", "d"]], kind)
    found = shard(table({"jpg": [b"1", b"2", b"3"], "synthetic": lists, "numbers": [[1], [2], [3]]}))
    assert parquet.fields(found) == ["synthetic"]
    samples, bad_inputs = read_all(found)
    assert [sample.fields["synthetic"] for sample in samples] == [["a", "b"], ["", "ä"], ["c", "d"]]
    assert bad_inputs == []


def test_list_with_a_text_that_is_not_utf8_costs_that_text(table):
    stored = pyarrow.array([b"ok", b"caf\xe9", b"also", None])
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 4, stored.buffers())
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2, None, 4, 4], pyarrow.int32()), texts)
    samples, _ = read_all(shard(table({"jpg": [b"1", b"2", b"3", b"4"], "caption": lists})))
    assert [sample.fields.get("caption") for sample in samples] == [["ok", b"caf\xe9"], ["also", None], None, []]


def test_columns_when_read_then_all_that_a_text_can_be_made_of(table):
    columns = {
        "jpg": [b"1"],
        "caption": pyarrow.array(["a"]).dictionary_encode(),
        "score": [decimal.Decimal("1.50")],
        "half": pyarrow.array([0.5], pyarrow.float16()),
        "safe": [True],
        "time": pyarrow.array([1 << 60], pyarrow.timestamp("us")),
        "embedding": [[1.0]],
    }
    found = shard(table(columns))
    [sample], _ = read_all(found)
    assert sample.fields == {"caption": "a", "score": "1.50", "half": 0.5, "safe": True}
    assert parquet.fields(found) == list(sample.fields)


def test_columns_not_requested_are_not_read(table):
    """A column that is too wide or damaged is not read unless it is requested."""
    columns = img2dataset(40) | {"wide": [b"x" * 1000] * 40}
    path = table(columns, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[pyarrow.parquet.read_metadata(path).row_group(0).column(4).data_page_offset + 5000] ^= 1
    path.write_bytes(data)
    assert [bad_input.samples for bad_input in read_all(shard(path))[1]] == [40]
    items = list(parquet.read(shard(path), ["caption"]))
    assert [(item.key, item.image) for item in items] == [(f"{n:09d}", image_bytes(n)) for n in range(40)]
    assert items[3].fields == {"key": "000000003", "caption": "alt 3", "status": "success"}


def test_oversized_image_value(table, monkeypatch):
    """A value larger than any image is left out."""
    monkeypatch.setattr(open_files, "MAX_FILE_BYTES", 1000)
    samples, bad_inputs = read_all(shard(table({"jpg": [b"1", bytes(1001), bytes(1000)], "caption": ["a"] * 3})))
    assert [sample.image for sample in samples] == [b"1", None, bytes(1000)]
    assert (samples[1].absence, bad_inputs) == ("oversized_file", [])


@pytest.mark.parametrize("kind", ["bytes", "struct", "texts", "dictionary"])
def test_table_is_unpacked_up_to_a_limit(table, monkeypatch, kind):
    """A few kilobytes unpack to a large value for each of many rows."""
    monkeypatch.setattr(open_files, "_MIN_BOMB_BYTES", 1 << 20)
    value = bytes(100_000)
    columns = {
        "bytes": {"jpg": [value] * 90},
        "struct": {"image": [{"bytes": value, "path": None}] * 90},
        "texts": {"jpg": [b"1"] * 90, "caption": ["x" * 100_000] * 90},
        "dictionary": {"jpg": pyarrow.array([value] * 90).dictionary_encode()},
    }[kind]
    path = table(columns, row_group_size=40, compression="zstd")
    assert path.stat().st_size < 10_000
    samples, bad_inputs = read_all(shard(path))
    assert len(samples) == 10
    assert bad_inputs == [BadInput("decompression_bomb", 80, 0, "00000/10")]


def test_rows_are_read_one_by_one_where_they_may_be_large(table, monkeypatch):
    """A large dictionary value may occur in every row; a batch of rows stays below its limit."""
    monkeypatch.setattr(parquet, "_MAX_BATCH_BYTES", 250_000)
    path = table({"jpg": [bytes(100_000)] * 50, "caption": ["a"] * 50}, compression="zstd")
    batches = []
    of_batch = arrow_columns.Columns.samples

    def noted(self, batch, first):
        batches.append(batch.nbytes)
        return of_batch(self, batch, first)

    monkeypatch.setattr(arrow_columns.Columns, "samples", noted)
    assert len(read_all(shard(path))[0]) == 50
    assert max(batches) < 250_000


def test_keys_when_the_tables_name_is_not_utf8_then_they_can_be_stored(table):
    path = table(hugging_face(1))
    [sample], _ = read_all(shard(path.rename(path.with_name(os.fsdecode(b"caf\xe9.parquet")))))
    assert sample.key == "caf\\xe9/0"


def test_row_group_when_damaged_then_its_rows_are_counted(table):
    path = table(img2dataset(90), row_group_size=30, compression="none", use_dictionary=False, write_page_checksum=True)
    group = pyarrow.parquet.read_metadata(path).row_group(1)
    data = bytearray(path.read_bytes())
    data[group.column(3).data_page_offset + 5000] ^= 1  # After the page's header.
    path.write_bytes(data)
    samples, [bad_input] = read_all(shard(path))
    assert [sample.key for sample in samples] == [f"{n:09d}" for n in (*range(30), *range(60, 90))]
    assert bad_input == BadInput("damaged_parquet", 30, group.total_byte_size, "00000/30")


def test_unreadable_batch_counts_rest_of_row_group(table, monkeypatch):
    """A batch whose values cannot be read is counted as lost with the rest of its row group."""
    samples_of = arrow_columns.Columns.samples

    def failing(self, batch, first):
        if first == 32:  # pyarrow does so for indices beyond the end of a dictionary.
            raise pyarrow.ArrowIndexError("index out of bounds")
        return samples_of(self, batch, first)

    monkeypatch.setattr(arrow_columns.Columns, "samples", failing)
    samples, [bad_input] = read_all(shard(table(img2dataset(120), row_group_size=80)))
    assert [sample.key for sample in samples] == [f"{n:09d}" for n in (*range(32), *range(80, 120))]
    assert (bad_input.samples, bad_input.key) == (48, "00000/32")


@pytest.mark.parametrize("cut", [0, 3, 10, 0.5, 0.99])
def test_truncated_table_is_damaged(table, cut):
    """A truncated table is damage with an unknown number of samples."""
    path = table(img2dataset(9))
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    found = shard(path)
    assert read_all(found) == ([], [BadInput("damaged_parquet", 0, path.stat().st_size)])
    assert parquet.fields(found) is None


def test_table_when_the_disk_fails_then_the_error_passes(table, monkeypatch):
    found = shard(table(img2dataset(9)))

    def failing(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", failing)
    with pytest.raises(OSError, match="Input/output error"):
        read_all(found)


def test_footer_with_contradictory_counts_is_damaged(tmp_path):
    """A footer whose counts contradict each other is damage with an unknown number of samples."""
    pyarrow.parquet.write_table(pyarrow.table({"jpg": [b"1"]}), tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    for at in range(len(data) - 8, 0, -1):  # One of these bits belongs to a count of rows.
        changed = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        try:
            footer = pyarrow.parquet.ParquetFile(io.BytesIO(changed)).metadata
        except (ValueError, OSError):
            continue
        if footer.num_row_groups == 1 and footer.row_group(0).num_rows != footer.num_rows:
            break
    (tmp_path / "a.parquet").write_bytes(changed)
    assert read_all(shard(tmp_path / "a.parquet")) == ([], [BadInput("damaged_parquet", 0, len(changed))])


def test_counts_that_cannot_be_true_are_not_believed(table, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_SAMPLES", 8)
    path = table(img2dataset(9))
    assert read_all(shard(path)) == ([], [BadInput("damaged_parquet", 0, path.stat().st_size)])


@pytest.mark.parametrize("columns", [{"caption": ["a"]}, {"image": ["a.jpg"]}, {"image": [{"path": "a.jpg"}]}])
def test_table_error_without_image_column(table, columns):
    """The UserError for a table without images names its columns."""
    with pytest.raises(UserError, match=f"no column of images.*{next(iter(columns))}.*jpg.*image"):
        shard(table(columns))


def test_table_error_without_pyarrow(table, monkeypatch):
    """The UserError for a missing pyarrow says what to install."""
    path = table(img2dataset(1))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install aimv2_jax\[parquet\]"):
        shard(path)
