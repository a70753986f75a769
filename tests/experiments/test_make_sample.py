"""The bundled sample dataset, and the program that makes it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aimv2_jax.data.records import decode
from aimv2_jax.data.sources import Source
from aimv2_jax.data.transforms.captions import clean
from aimv2_jax.data.transforms.decode import decode_image
from aimv2_jax.errors import UserError
from aimv2_jax.storage.paths import resolve_path
from experiments import make_sample

SAMPLE = resolve_path("package:data/sample")
SETS = {"train/photo": 209, "train/other": 289, "test/photo": 44, "test/other": 66}


@pytest.fixture(scope="module")
def records():
    sources = {name: Source(name, str(SAMPLE / name)) for name in SETS}
    return {name: [decode(source.read(i)) for i in range(len(source))] for name, source in sources.items()}


def test_sample_pairs_decode(records):
    """All 608 pairs of the sample decode, with both captions and three labels."""
    assert {name: len(found) for name, found in records.items()} == SETS
    for name, found in records.items():
        for record in found:
            assert set(record.labels) == {"label", "coarse", "kind"}
            assert (record.labels["kind"] == "photo") == name.endswith("photo")
            assert min(decode_image(record.image).size) > 50
            assert clean(record.captions["alt"]) and clean(record.captions["synthetic"])


def test_sample_when_compared_then_test_is_apart_from_train(records):
    train, test = (
        {r.key for name in SETS if name.startswith(split) for r in records[name]} for split in ("train", "test")
    )
    assert len(train) == 498 and len(test) == 110 and not train & test


def test_sample_size_and_attribution(records):
    """The sample has at most 4 MB, and every image has its attribution."""
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*")) <= 4 * 10**6
    attribution = (SAMPLE / "ATTRIBUTION.md").read_text()
    rows = {}
    for part in attribution.split("\n## ")[1:]:
        name, _, table = part.partition("\n")
        rows[name.strip()] = {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if " | " in line}
    keys = [record.key.split("/", 1) for found in records.values() for record in found]
    assert [(source, key) for source, key in keys if key not in rows[source]] == []
    assert {path.name for path in (SAMPLE / "licenses").iterdir()} >= {"CC-BY-SA-4.0.txt", "CC0-1.0.txt"}


def write_tar(path, count, kinds):
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number in reversed(range(count)):
            image_file = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(image_file, "JPEG")
            fields = {"source": "here", "picture_key": f"p{number}", "alt": f"Thing {number}"}
            fields |= {"synthetic": f"a thing, {number}.", "label": "thing", "coarse": "object"}
            fields["kind"] = kinds[number % len(kinds)]
            for extension, data in (("json", json.dumps(fields).encode()), ("jpg", image_file.getvalue())):
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_make_sample_when_run_twice_then_the_same_files_with_the_pairs_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(make_sample, "VOCAB_SIZE", 290)
    given = tmp_path / "given"
    write_tar(given / "train/00000.tar", 9, ["photo", "drawn", "art"])
    write_tar(given / "test/00000.tar", 4, ["photo", "drawn"])
    (given / "ATTRIBUTION.md").write_text("mine")
    (given / "licenses").mkdir()
    (given / "licenses/CC0.txt").write_text("free")
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output in (*outputs, outputs[0]):
        make_sample.make(given, output)
    files = [
        {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()} for output in outputs
    ]
    assert files[0] == files[1]
    assert {"tokenizer.model", "README.md", "ATTRIBUTION.md", "licenses/CC0.txt"} < set(files[0])
    source = Source("other", str(outputs[0] / "train/other"))
    assert [decode(source.read(i)).key for i in range(len(source))] == [f"here/p{i}" for i in (1, 2, 4, 5, 7, 8)]


def test_make_error_input_without_tars(tmp_path):
    """An input without tars is a UserError, and the output stays."""
    (tmp_path / "kept").touch()
    with pytest.raises(UserError, match=r"no train/\*\.tar"):
        make_sample.make(Path("/nowhere"), tmp_path)
    assert (tmp_path / "kept").exists()


def test_make_when_the_output_holds_something_else_then_refused_and_nothing_is_lost(tmp_path):
    (tmp_path / "input/train").mkdir(parents=True)
    (tmp_path / "input/train/a.tar").write_bytes(b"")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years")
    with pytest.raises(UserError, match="--output"):
        make_sample.make(tmp_path / "input", tmp_path / "home")
    assert (tmp_path / "home/thesis.txt").read_text() == "years"


def test_make_when_a_tar_is_damaged_then_it_is_named_before_anything_is_replaced(tmp_path):
    (tmp_path / "input/train").mkdir(parents=True)
    (tmp_path / "input/train/a.tar").write_bytes(b"x" * 3000)
    with pytest.raises(UserError, match=r"tar that cannot be read.*a\.tar"):
        make_sample.make(tmp_path / "input", tmp_path / "output")
    assert not (tmp_path / "output").exists()
