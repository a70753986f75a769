"""Fields of shards and default captions."""

import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import discover, reader, tables
from tests.helpers.small_inputs import packed, pairs

ROWS = {"caption": "a,caption,text", "text": "b,alt,text", "alt": "a,alt,TEXT", "TEXT": "b,TEXT"}


def only(*suffixes):
    return packed({name: data for name, data in pairs(3).items() if name.endswith(suffixes)})


@pytest.fixture
def table(tmp_path):
    def make(kind, columns):
        path = tmp_path / f"captions.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"jpg": [b"1"]} | {name: ["x"] for name in columns}), path)
        elif kind == "csv":
            path.write_text(",".join(["file_name", *columns]) + "\n" + "a.jpg" + ",x" * len(columns) + "\n")
        else:
            path.write_text('{"file_name": "a.jpg", ' + ", ".join(f'"{name}": "x"' for name in columns) + "}\n")
        [shard] = discover.find_shards([str(path)])
        return shard

    return make


@pytest.mark.parametrize(
    ("suffixes", "expected"),
    [
        (("jpg", "txt", "json"), {"alt": "txt"}),
        (("jpg", "json"), {"alt": "json:caption"}),
        (("jpg",), {}),
    ],
)
def test_captions_when_none_are_named_then_the_tars_texts(shard, suffixes, expected):
    assert reader.default_captions(shard(only(*suffixes))) == expected


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("expected", ROWS)
def test_captions_when_none_are_named_then_the_tables_first_of_the_usual(table, kind, expected):
    assert reader.default_captions(table(kind, ROWS[expected].split(","))) == {"alt": expected}


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_default_captions_absent(table, kind):
    """A table without captions has no default captions."""
    assert reader.default_captions(table(kind, ["words"])) == {}


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_field_missing_in_table(table, kind):
    """A field that is missing in a table raises UserError that lists the existing fields."""
    shard = table(kind, ["caption", "label"])
    reader.check_fields([shard], ["caption", "label"])
    with pytest.raises(UserError, match=r"no such field.*'colour'\. It has .*caption, label"):
        reader.check_fields([shard], iter(["caption", "colour"]))


def test_field_missing_in_tar(shard):
    """A field that is missing in a tar raises UserError that lists the existing fields."""
    found = shard(packed(pairs(3)))
    reader.check_fields([found], ["txt", "json:caption", "json:synthetic"])
    with pytest.raises(UserError, match=r"no such field.*'json:colour'\. It has txt, json:key, json:caption"):
        reader.check_fields([found], ["json:colour"])
    with pytest.raises(UserError, match=r"no such field.*'txt'\. It has only images"):
        reader.check_fields([shard(only("jpg"), "other.tar")], ["txt"])


def test_field_when_one_of_the_first_shards_has_it_then_the_others_may_lack_it(shard, table):
    bare, whole = shard(only("jpg")), shard(packed(pairs(3)), "1.tar")
    rows = table("jsonl", ["txt", "json:caption"])
    reader.check_fields([*[bare] * 4, whole, *[bare] * 9, rows], ["txt", "json:caption"])
    with pytest.raises(UserError, match="only images"):
        reader.check_fields([*[bare] * 5, whole, rows], ["txt"])  # Only the first five are opened.
    with pytest.raises(UserError, match=r"no such field.*captions\.jsonl"):
        reader.check_fields([whole, rows], ["json:key"])  # Each format needs the field.


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_field_of_late_row(tmp_path, kind, monkeypatch):
    """A field that only a late row has is recognised."""
    monkeypatch.setattr(tables, "_MAX_ROWS_PROBED", 10)
    if kind == "jsonl":
        rows = ['{"file_name": "a.jpg", "caption": "A"}'] * 50 + ['{"file_name": "a.jpg", "late": "x"}']
    else:
        rows = ["file_name,caption,late", *["a.jpg,A"] * 50, "a.jpg,A,x"]
    (tmp_path / f"captions.{kind}").write_text("\n".join(rows) + "\n")
    shards = discover.find_shards([str(tmp_path)])
    reader.check_fields(shards, ["caption", "late"])
    with pytest.raises(UserError, match=r"no such field.*'never'\. It has file_name, caption, late"):
        reader.check_fields(shards, ["caption", "late", "never"])


def test_field_names_are_printed_without_control_characters(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"file_name": "a.jpg", "\\u001b]0;X\\u0007": "x"}\n')
    with pytest.raises(UserError) as raised:
        reader.check_fields(discover.find_shards([str(tmp_path)]), ["caption"])
    assert str(raised.value).isprintable() and r"\x1b]0;X\x07" in str(raised.value)


@pytest.mark.parametrize("field", ["caption", "json:", "json", "alt=txt"])
def test_field_invalid_for_tar(shard, field):
    """A field that no tar can have raises UserError with the grammar of fields."""
    with pytest.raises(UserError, match="A field is txt, or json:NAME"):
        reader.check_fields([shard(packed(pairs(1)))], [field])


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.jsonl"])
def test_fields_when_the_shard_is_nothing_but_damage_then_not_judged(shard, name):
    found = shard(b"junk" * 300, name)
    reader.check_fields([found], ["txt"])
    assert reader.default_captions(found) == {}


def test_import_when_in_a_worker_then_no_jax_no_tensorflow_no_pyarrow_no_beam():
    code = "import sys, aimv2_jax.prepare.inputs.reader; print([m for m in sys.modules if m in sys.argv[1:]])"
    heavy = ["jax", "tensorflow", "pyarrow", "apache_beam"]
    assert subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True).stdout == "[]\n"
