"""Reading of tables beside their image files."""

import json
import os

import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import discover, open_files, tables
from aimv2_jax.prepare.inputs.samples import BadInput, Sample
from tests.helpers.small_inputs import image_bytes, read_all


@pytest.fixture
def folder(tmp_path):
    """A folder of four images, one of them in a subfolder."""
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b.jpg", "sub/c.jpg", "dö.jpg")):
        (root / name).write_bytes(image_bytes(number))
    return root


def jsonl(folder, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "captions.jsonl").write_bytes(b"\n".join(lines))
    [shard] = discover.find_shards([str(folder)])
    return shard


def table(folder, text, name="captions.csv"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    [shard] = discover.find_shards([str(folder)])
    return shard


@pytest.mark.parametrize("column", ["file_name", "image", "path", "filename", "filepath"])
def test_jsonl_when_read_then_a_sample_a_row(folder, column):
    rows = [{column: "a.jpg", "caption": "A"}, {column: "sub/c.jpg", "caption": "C", "n": 3}, {column: "dö.jpg"}]
    samples, bad_inputs = read_all(jsonl(folder, *rows))
    names = ["a.jpg", "sub/c.jpg", "dö.jpg"]
    assert samples == [Sample(name, image_bytes(n), row) for name, n, row in zip(names, (0, 2, 3), rows)]
    assert bad_inputs == []


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_when_read_then_a_sample_a_row(folder, delimiter, mark):
    text = 'file_name,caption\na.jpg,"A\nwith a line"\n\nsub/c.jpg,C\n'.replace(",", delimiter)
    samples, bad_inputs = read_all(table(folder, mark + text))
    assert samples == [
        Sample("a.jpg", image_bytes(0), {"file_name": "a.jpg", "caption": "A\nwith a line"}),
        Sample("sub/c.jpg", image_bytes(2), {"file_name": "sub/c.jpg", "caption": "C"}),
    ]
    assert bad_inputs == []


def test_csv_when_rows_are_short_or_long_then_what_they_have(folder):
    samples, _ = read_all(table(folder, "file_name,caption\na.jpg\nb.jpg,B,more\n"))
    assert [sample.fields for sample in samples] == [{"file_name": "a.jpg"}, {"file_name": "b.jpg", "caption": "B"}]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_caption_when_not_utf8_or_large_then_as_it_was_stored(folder, kind):
    long = "x" * 200_000
    if kind == "jsonl":
        shard = jsonl(folder, {"file_name": "a.jpg", "caption": long}, b'{"file_name": "b.jpg", "caption": "caf\xe9"}')
    else:
        shard = table(folder, f"file_name,caption\na.jpg,{long}\nb.jpg,caf".encode() + b"\xe9\n")
    samples, bad_inputs = read_all(shard)
    assert [sample.fields["caption"] for sample in samples] == [long, b"caf\xe9"]
    assert [sample.image for sample in samples] == [image_bytes(0), image_bytes(1)]
    assert bad_inputs == []


@pytest.mark.parametrize("line", [b"{", b"[]", b"junk", b'{"file_name": "a.jpg"', b"\xff\xfe"])
def test_line_when_no_object_then_one_sample_lost(folder, line):
    samples, bad_inputs = read_all(jsonl(folder, {"file_name": "a.jpg"}, line, b"  ", {"file_name": "b.jpg"}))
    assert [sample.key for sample in samples] == ["a.jpg", "b.jpg"]
    assert bad_inputs == [BadInput("damaged_row", 1, len(line) + 1, "captions.jsonl/1")]


def test_line_when_longer_than_memory_should_hold_then_one_sample_lost(folder, monkeypatch):
    monkeypatch.setattr(tables, "_MAX_LINE_BYTES", 100)
    rows = [{"file_name": "a.jpg"}, {"file_name": "b.jpg", "caption": "x" * 500}, {"file_name": "b.jpg"}]
    samples, bad_inputs = read_all(jsonl(folder, *rows))
    assert [sample.key for sample in samples] == ["a.jpg", "b.jpg"]
    assert [(bad_input.samples, bad_input.num_bytes > 500) for bad_input in bad_inputs] == [(1, True)]


def test_keys_when_the_tables_name_is_not_utf8_then_they_can_be_stored(folder):
    name = os.fsdecode(b"caf\xe9.jsonl")
    samples, bad_inputs = read_all(table(folder, b'{"file_name": "a.jpg"}\n{"n": 1}\n{', name))
    assert [samples[1].key, bad_inputs[0].key] == ["caf\\xe9.jsonl/1", "caf\\xe9.jsonl/2"]


@pytest.mark.parametrize(("limit", "most"), [("_MAX_LINE_BYTES", 100), ("_MAX_ROW_LINES", 20)])
def test_csv_when_a_cell_is_larger_than_any_caption_then_each_of_its_lines_is_a_row(folder, monkeypatch, limit, most):
    monkeypatch.setattr(tables, limit, most)
    samples, bad_inputs = read_all(
        table(folder, 'file_name,caption\na.jpg,A\nb.jpg,"' + "line\n" * 50 + '"\na.jpg,A\n')
    )
    assert [sample.key for sample in samples] == ["a.jpg", *["line"] * 49, "a.jpg"]
    assert [(bad_input.samples, bad_input.key) for bad_input in bad_inputs] == [
        (1, "captions.csv/1"),
        (1, "captions.csv/51"),
    ]


@pytest.mark.parametrize("row", ['b.jpg,"B', 'b.jpg,"B"" ', '"b.jpg,B', 'b.jpg,"B\r'])
@pytest.mark.parametrize("others", ["a.jpg,A", '"a.jpg","A"', 'a.jpg,"A\nof two ""lines"""'])
def test_csv_when_a_quote_is_not_closed_then_its_line_is_lost_and_no_other(folder, row, others):
    lines = ["file_name,caption", *[others] * 5, row, *[others] * 5]
    samples, bad_inputs = read_all(table(folder, "\n".join(lines)))
    assert [sample.image for sample in samples] == [image_bytes(0)] * 10
    assert {sample.fields["caption"] for sample in samples} <= {"A", 'A\nof two "lines"'}
    assert bad_inputs == [BadInput("damaged_row", 1, len(row) + 1, "captions.csv/5")]


@pytest.mark.parametrize("caption", ['"B" and more', 'B "and', '"B" "C"', '"B""" and'])
def test_csv_unescaped_quotes(folder, caption):
    """A CSV line with unescaped quotes gives its row."""
    samples, bad_inputs = read_all(table(folder, f"file_name,caption\na.jpg,A\nb.jpg,{caption}\na.jpg,A\n"))
    assert [sample.key for sample in samples] == ["a.jpg", "b.jpg", "a.jpg"]
    assert samples[1].fields["caption"].startswith("B")
    assert bad_inputs == []


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_table_when_it_has_a_zero_byte_then_still_a_table(folder, name):
    rows = (
        b'{"file_name": "a.jpg", "caption": "A"}\n\0\n' if name.endswith("jsonl") else b"file_name,caption\na.jpg,A\0\n"
    )
    samples, _ = read_all(table(folder, rows, name))
    assert samples[0].image == image_bytes(0)


def test_table_error_utf16(folder):
    """A table in UTF-16 raises a UserError that says so."""
    (folder / "captions.csv").write_text("file_name,caption\na.jpg,A\n", "utf-16")
    with pytest.raises(UserError, match=r"UTF-16.*captions\.csv.*Save it in UTF-8"):
        discover.find_shards([str(folder)])


def test_table_error_one_of_several_without_images(folder):
    """A table without image names beside some with them is a UserError unless it is of another kind."""
    (folder / "captions.jsonl").write_text('{"file_name": "a.jpg"}\n')
    (folder / "notes.csv").write_text("url,caption\nx,y\n")
    (folder / "notes.json").write_text('{"url": "x"}\n')
    assert len(discover.find_shards([str(folder)])) == 1
    (folder / "sub/captions.jsonl").write_text('{"url": "x"}\n')
    with pytest.raises(UserError, match=r"no column of image names.*url"):
        discover.find_shards([str(folder)])


def test_csv_when_its_header_is_damaged_then_rows_without_images(folder):
    samples, bad_inputs = read_all(table(folder, "file_name\r,caption\na.jpg,A\n"))
    assert ([sample.image for sample in samples], bad_inputs) == ([None], [])


@pytest.mark.parametrize(
    "name",
    ["missing.jpg", "../secret.jpg", "sub/../../secret.jpg", "ABSOLUTE", "gs://bucket/a.jpg", "", ".", "sub", "a\0.jpg"]
    + ["x" * 5000, "pipe", 7, None, ["a.jpg"]],
)
def test_row_of_unreadable_image_has_no_image(folder, name):
    """A row whose image cannot be read has no image."""
    (folder.parent / "secret.jpg").write_bytes(b"secret")
    os.mkfifo(folder / "pipe")
    if name == "ABSOLUTE":
        name = str(folder / "a.jpg")
    samples, bad_inputs = read_all(jsonl(folder, {"file_name": "b.jpg"}, {"file_name": name, "caption": "A"}))
    assert samples[1].image is None
    assert samples[1].fields == {"file_name": name, "caption": "A"}
    leads_out = isinstance(name, str) and (".." in name or name.startswith(("/", "gs://")))
    assert samples[1].absence == ("path_out_of_folder" if leads_out else "no_image")
    assert samples[1].key
    assert bad_inputs == []


def test_row_of_oversized_image_has_no_image(folder, monkeypatch):
    """A row whose image is too large has no image."""
    monkeypatch.setattr(open_files, "MAX_FILE_BYTES", 100)
    [sample], _ = read_all(jsonl(folder, {"file_name": "a.jpg"}))
    assert (sample.image, sample.absence) == (None, "oversized_file")


@pytest.fixture
def links(folder):
    """Links in `folder` that lead out of it, and one that does not."""
    (folder.parent / "secret.jpg").write_bytes(image_bytes(9))
    (folder / "link.jpg").symlink_to("../secret.jpg")
    (folder / "sub/dir").symlink_to("../..")
    (folder / "endless.jpg").symlink_to("/proc/kmsg")
    (folder / "inner.jpg").symlink_to(folder / "sub/c.jpg")
    (folder / "indirect.jpg").symlink_to("sub/dir/set/a.jpg")
    return ["link.jpg", "./link.jpg", "sub//./dir/secret.jpg", "endless.jpg", "inner.jpg", "indirect.jpg"]


def test_links_that_lead_out_of_the_folder_are_left(folder, links):
    rows = [{"file_name": name} for name in links]
    samples, bad_inputs = read_all(jsonl(folder, *rows))
    assert [sample.image for sample in samples] == [None] * 4 + [image_bytes(2), image_bytes(0)]
    assert [sample.absence for sample in samples[:4]] == ["link_out_of_folder"] * 4
    assert bad_inputs == []


def test_links_are_followed_if_asked(folder, links):
    rows = [json.dumps({"file_name": name}) for name in links]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    [shard] = discover.find_shards([str(folder)], follow_links=True)
    samples, _ = read_all(shard)
    images = [sample.image for sample in samples]
    # Endless files do not block. The kernel's log is empty or an error, by what it holds.
    assert not images.pop(3)
    assert images == [image_bytes(9)] * 3 + [image_bytes(2), image_bytes(0)]


def test_num_bytes_of_links_is_that_of_targets(folder, links):
    """Links count the bytes of their targets, so a folder of links becomes as many tasks as one of images."""
    assert jsonl(folder, *[{"file_name": "link.jpg"}] * 10).num_bytes >= 10 * len(image_bytes(9))


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_table_error_cr_line_ends(folder, name):
    """A table whose lines end in CR alone raises a UserError that says so."""
    text = (
        "file_name,caption\ra.jpg,A\r" if name.endswith("csv") else '{"file_name": "a.jpg"}\r{"file_name": "b.jpg"}\r'
    )
    (folder / name).write_bytes(text.encode())
    with pytest.raises(UserError, match=rf"lines end in CR alone.*{name}.*Save it with lines that end in LF"):
        discover.find_shards([str(folder)])


def test_row_nested_too_deep_costs_itself(folder):
    deep = b'{"file_name": "a.jpg", "x": ' + b"[" * 200 + b"]" * 200 + b"}"
    samples, bad_inputs = read_all(jsonl(folder, {"file_name": "a.jpg"}, deep, b'{"file_name": "b.jpg", "score": NaN}'))
    assert [sample.key for sample in samples] == ["a.jpg", "b.jpg"]
    assert [bad_input.samples for bad_input in bad_inputs] == [1]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_table_when_large_then_in_chunks_that_are_together_all_of_it(folder, monkeypatch, kind):
    monkeypatch.setattr(tables, "CHUNK_ROWS", 10)
    if kind == "jsonl":
        rows = b"\n".join(b'{"file_name": "a.jpg", "n": %d}' % n if n % 7 else b"\n{bad" for n in range(25))
    else:
        rows = b"file_name,n\n" + b"\n".join(b'a.jpg,"%d\n"' % n for n in range(25))
    (folder / f"captions.{kind}").write_bytes(rows)
    shards = discover.find_shards([str(folder)])
    assert [shard.first_row for shard in shards] == [0, 10, 20]
    found = [read_all(shard) for shard in shards]
    assert [len(samples) + len(bad_inputs) for samples, bad_inputs in found] == [10, 10, 5]
    numbers = [int(sample.fields["n"]) for samples, _ in found for sample in samples]
    assert numbers == [n for n in range(25) if n % 7 or kind == "csv"]
    keys = [bad_input.key for _, bad_inputs in found for bad_input in bad_inputs]
    assert keys == [f"captions.jsonl/{n}" for n in range(25) if n % 7 == 0 and kind == "jsonl"]
    # Each image has about a kilobyte.
    assert shards[0].num_bytes == pytest.approx(10 * len(image_bytes(0)), rel=0.3)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_table_when_in_chunks_then_each_reads_no_other(folder, monkeypatch, kind):
    monkeypatch.setattr(tables, "CHUNK_ROWS", 100)
    row = b'{"file_name": "a.jpg"}\n' if kind == "jsonl" else b"a.jpg,A\n"
    (folder / f"captions.{kind}").write_bytes(b"file_name,caption\n" * (kind == "csv") + row * 1000)
    shards = discover.find_shards([str(folder)])
    lines, asked = tables._lines, []

    def counted(file, stop=None):
        for line in lines(file, stop):
            asked.append(line.num_bytes)
            yield line

    monkeypatch.setattr(tables, "_lines", counted)
    assert sum(len(read_all(shard)[0]) for shard in shards) == 1000
    headers = len(shards) * (kind == "csv")
    assert sum(asked) == 1000 * len(row) + headers * len(b"file_name,caption\n")


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_table_error_without_image_column(folder, name):
    """A table without image names raises a UserError that says so."""
    (folder / name).write_text('{"url": "x"}\n' if name.endswith("jsonl") else "url,caption\nx,y\n")
    with pytest.raises(UserError, match=r"no column of image names.*url.*file_name, image, path"):
        discover.find_shards([str(folder)])


def test_columns_when_first_line_has_none_then_rows_without_images(folder):
    samples, bad_inputs = read_all(table(folder, b'{"file_name": "a.jpg"}\n' + b"\xff" * 999, "captions.jsonl"))
    assert (len(samples), [bad_input.samples for bad_input in bad_inputs]) == (1, [1])
