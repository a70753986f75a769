"""Discovery of inputs in files, folders, globs and buckets."""

import dataclasses
import errno
import gzip
import os
import pickle
import sys
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pyarrow
import pyarrow.parquet
import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import discover, open_files, reader, tables
from tests.helpers.buckets import clients_of, proxy
from tests.helpers.small_inputs import image_bytes, packed, pairs, read_all

TABLE = pyarrow.table({"image": [b"1"], "caption": ["a"]})
LIST = pyarrow.table({"url": ["x"]})


@pytest.fixture
def tree(tmp_path):
    """A folder with an input of each format, and with other files."""
    root = tmp_path / "data"
    for folder in ("tars", "tables", "images", ".hidden"):
        (root / folder).mkdir(parents=True)
    (root / "tars/00000.tar").write_bytes(packed(pairs(2)))
    (root / "tars/00000_stats.json").write_text('{"successes": 2, "file_name": "x"}')
    (root / "tars/00000.json").write_text('{"file_name": "x"}')
    pyarrow.parquet.write_table(TABLE, root / "tars/00000.parquet")
    (root / "tars/packed").write_bytes(gzip.compress(packed(pairs(2))))
    pyarrow.parquet.write_table(TABLE, root / "tables/0.bin")
    (root / "images/captions.jsonl").write_text('{"file_name": "a.jpg"}\n')
    (root / "images/other.csv").write_text("path,caption\na.jpg,A\n")
    (root / "images/a.jpg").write_bytes(packed(pairs(1)))
    (root / "README.md").write_text("An image is worth\n")
    (root / "info.json").write_text('{\n "file_name": 1\n}')
    (root / ".hidden/00000.tar").write_bytes(packed(pairs(2)))
    return root


def found(*inputs):
    return [
        (shard.kind, "/".join(shard.path.split("/")[-2:])) for shard in discover.find_shards([str(i) for i in inputs])
    ]


ALL = [
    ("jsonl", "images/captions.jsonl"),
    ("csv", "images/other.csv"),
    ("parquet", "tables/0.bin"),
    ("webdataset", "tars/00000.tar"),
    ("webdataset", "tars/packed"),
]


def test_folder_when_given_then_all_inputs_in_it_by_their_content(tree):
    assert found(tree) == ALL


def test_inputs_when_given_twice_or_through_links_then_once(tree):
    (tree / "link.tar").symlink_to(tree / "tars/00000.tar")
    inputs = [
        tree / "tars/00000.tar",
        tree / "t*/*",
        tree,
        f"{tree}/../data/tars",
        tree / "**/*.tar",
        tree / "link.tar",
    ]
    assert found(*inputs) == ALL


def test_shards_absolute_sorted_picklable(tree, monkeypatch):
    """Discovered shards have absolute paths, are sorted and can be pickled."""
    monkeypatch.chdir(tree)
    shards = discover.find_shards(["tars", "tables", "images"])
    assert shards == discover.find_shards([str(tree)])
    assert shards == sorted(shards, key=lambda shard: shard.path)
    assert {*pickle.loads(pickle.dumps(shards))} == {*shards}
    tar = next(shard for shard in shards if shard.path.endswith("00000.tar"))
    assert (tar.num_bytes, tar.start, tar.stop) == (os.path.getsize("tars/00000.tar"), 0, None)


@pytest.mark.parametrize("name", ["00000.parquet", "00000.json", "00000_stats.json", "0*[nt]"])
def test_file_when_beside_a_tar_of_its_name_then_no_input(tree, name):
    with pytest.raises(UserError, match="no readable input files"):
        discover.find_shards([str(tree / "tars" / name)])


@pytest.mark.parametrize("name", ["missing", "missing/*.tar", "*.zip"])
def test_input_missing(tree, name):
    """An input that does not exist raises UserError."""
    with pytest.raises(UserError, match="does not exist"):
        discover.find_shards([str(tree), str(tree / name)])


@pytest.mark.parametrize("name", ["README.md", "info.json", "images/a.txt", "empty"])
def test_input_not_recognised(tree, name):
    """An input that is not recognised raises UserError that lists the supported inputs."""
    (tree / "images/a.txt").write_text("")
    (tree / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"no readable input files.*Supported inputs are webdataset tars, parquet .*jsonl"
    ):
        discover.find_shards([str(tree), str(tree / name)])


@pytest.mark.parametrize("data", [b"", bytes(1024), b"junk" * 999])
def test_tar_when_damaged_then_known_by_its_name(tree, data):
    (tree / "tars/00001.tar").write_bytes(data)
    assert ("webdataset", "tars/00001.tar") in found(tree)


def test_file_unreadable(tree):
    """A file that cannot be read raises UserError."""
    (tree / "tars/00001.tar").symlink_to(tree / "gone.tar")
    with pytest.raises(UserError, match=r"cannot be read.*00001\.tar"):
        discover.find_shards([str(tree)])


def test_link_out_of_a_folder_is_refused(tree, tmp_path):
    """The link is not opened, because its target may be endless."""
    (tmp_path / "private.tar").write_bytes(packed(pairs(1)))
    for target in (tmp_path / "private.tar", "/proc/kmsg", "/dev/zero"):
        (tree / "tars/link").unlink(missing_ok=True)
        (tree / "tars/link").symlink_to(target)
        with pytest.raises(UserError, match=r"leads out of its folder: '.*tars/link'.*--follow-links"):
            discover.find_shards([str(tree)])


def test_link_that_a_pattern_finds_is_refused(tree, tmp_path):
    (tmp_path / "private.tar").write_bytes(packed(pairs(1)))
    (tree / "tars/link.tar").symlink_to(tmp_path / "private.tar")
    with pytest.raises(UserError, match=r"leads out of its folder: '.*tars/link\.tar'.*--follow-links"):
        discover.find_shards([f"{tree}/tars/*.tar"])
    assert len(discover.find_shards([f"{tree}/tars/*.tar"], follow_links=True)) == 2


def test_snapshot_of_a_hub_is_an_input(tmp_path):
    """huggingface_hub keeps files in models--X/blobs, and links to them in models--X/snapshots/COMMIT."""
    snapshot, blobs = tmp_path / "datasets--x/snapshots/abc/data", tmp_path / "datasets--x/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "hash").write_bytes(packed(pairs(2)))
    (snapshot / "a.tar").symlink_to("../../../blobs/hash")
    (tmp_path / "private.tar").write_bytes(packed(pairs(1)))
    assert len(discover.find_shards([str(snapshot.parent)])) == 1
    (snapshot / "b.tar").symlink_to(tmp_path / "private.tar")
    with pytest.raises(UserError, match=r"leads out of its folder: '.*b\.tar'"):
        discover.find_shards([str(snapshot.parent)])


def test_link_out_of_a_folder_is_followed_if_asked(tree, tmp_path):
    (tmp_path / "private.tar").write_bytes(packed(pairs(1)))
    (tree / "tars/link.tar").symlink_to(tmp_path / "private.tar")
    assert found(tree / "tars/link.tar") == [("webdataset", "tars/link.tar")]  # The user has named it.
    shards = discover.find_shards([str(tree)], follow_links=True)
    assert {os.path.basename(shard.path) for shard in shards} > {"link.tar", "00000.tar"}
    assert all(shard.follow_links for shard in shards)


def test_pipe_when_in_a_folder_then_passed_over(tree):
    os.mkfifo(tree / "tars/pipe.tar")
    assert found(tree) == ALL


def test_parquet_without_images(tree):
    """Among other inputs, parquet without images raises UserError only if other parquet files have images."""
    pyarrow.parquet.write_table(LIST, tree / "tars/list.parquet")
    assert found(tree / "tars") == [("webdataset", "tars/00000.tar"), ("webdataset", "tars/packed")]
    with pytest.raises(UserError, match="no column of images"):
        discover.find_shards([str(tree)])


def test_parquet_pyarrow_missing(tree, monkeypatch):
    """A missing pyarrow raises UserError only if all inputs are parquet files."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert found(tree) == [input for input in ALL if input[0] != "parquet"]
    with pytest.raises(UserError, match=r"pip install aimv2_jax\[parquet\]"):
        discover.find_shards([str(tree / "tables")])


@pytest.fixture
def uploaded(tree, gcs_folder, fake_gcs, upload):
    def uploaded():
        """URL of a folder of a bucket with the files of `tree`."""
        return upload(fake_gcs, tree, gcs_folder)

    return uploaded


@pytest.mark.parametrize("given", ["", "/*/*"])
def test_bucket_input_gives_the_same_samples(tree, uploaded, given):
    """Inputs in a bucket are the same shards and samples as those of a disk."""
    (tree / "images/a.jpg").write_bytes(image_bytes(0))
    (tree / "images/.hidden").mkdir()
    (tree / "images/.hidden/00000.tar").write_bytes(packed(pairs(1)))
    bucket = uploaded()
    there, here = discover.find_shards([bucket + given]), discover.find_shards([str(tree)])
    assert [shard.path for shard in there] == [shard.path.replace(str(tree), bucket) for shard in here]
    assert [read_all(shard) for shard in there] == [read_all(shard) for shard in here]


@pytest.mark.parametrize(("given", "listings"), [("00000.parquet", 1), ("*.parquet", 1), ("*", 0), ("", 0)])
def test_bucket_folder_of_tables_is_listed_once(tree, uploaded, monkeypatch, given, listings):
    """Tables that may belong to tars cost one listing for each folder, not one for each table."""
    for number in range(10):
        (tree / f"tars/{number:05d}.tar").write_bytes(packed(pairs(1)))
        (tree / f"tars/{number:05d}.parquet").write_bytes(b"PAR1")
    bucket, listed = uploaded(), []
    list_names = discover.list_names
    monkeypatch.setattr(discover, "list_names", lambda folder: listed.append(folder) or list_names(folder))
    if given.endswith("parquet"):
        with pytest.raises(UserError, match="no readable input files"):
            discover.find_shards([f"{bucket}/tars/{given}"])
    else:
        assert {shard.kind for shard in discover.find_shards([f"{bucket}/tars/{given}"])} == {"webdataset"}
    assert listed == [f"{bucket}/tars"] * listings


def test_bucket_copy_disk_full(uploaded, full_disk):
    """If the copy of a shard from a bucket fills the disk, UserError blames the disk and not the input."""
    [found] = discover.find_shards([f"{uploaded()}/tars/00000.tar"])
    with full_disk, pytest.raises(UserError, match=r"no space in .*copy of an input \(No space.*00000\.tar'.*TMPDIR"):
        read_all(found)


def test_bucket_table_in_parts_is_copied_in_parts(tree, uploaded, monkeypatch):
    """Of a table in a bucket that is read in parts, no more than a part is copied."""
    monkeypatch.setattr(tables, "CHUNK_ROWS", 10)
    (tree / "images/other.csv").write_text("path,caption\n" + "".join(f"a.jpg,{n}\n" for n in range(25)))
    shards = discover.find_shards([f"{uploaded()}/images/other.csv"])
    copied = []
    pieces = open_files._remote_pieces
    monkeypatch.setattr(open_files, "_remote_pieces", lambda *a: (copied.append(len(d)) or d for d in pieces(*a)))
    assert [[sample.fields["caption"] for sample in read_all(shard)[0]] for shard in shards] == [
        [str(n) for n in range(first, min(25, first + 10))] for first in (0, 10, 20)
    ]
    assert copied == [shard.stop - shard.start for shard in shards]


def test_bucket_input_missing(uploaded):
    """An input that is missing in its bucket raises UserError, as does one in a bucket that does not exist."""
    with pytest.raises(UserError, match=r"^--input does not exist"):
        discover.find_shards([f"{uploaded()}/missing.tar"])
    with pytest.raises(UserError, match=r"^input cannot be read \(no such object or bucket.*gs://missing/tars"):
        discover.find_shards(["gs://missing/tars"])


def test_bucket_shard_deleted(uploaded):
    """A shard that is gone from its bucket raises UserError."""
    [shard] = discover.find_shards([f"{uploaded()}/tars/00000.tar"])
    with pytest.raises(UserError, match=r"input cannot be read \(no such object.*/tars/gone\.tar"):
        list(reader.read(dataclasses.replace(shard, path=shard.path.replace("00000", "gone"))))


def test_bucket_image_too_large(tree, uploaded, monkeypatch):
    """An image in a bucket that is too large is not read."""
    (tree / "images/a.jpg").write_bytes(image_bytes(0))
    monkeypatch.setattr(open_files, "MAX_FILE_BYTES", 100)
    with pytest.raises(open_files.FileUnavailable, match="oversized_file"):
        open_files.read_beside(f"{uploaded()}/images", "a.jpg")


@pytest.mark.parametrize("name", ["a.jpg", "gone.jpg", "../tars/00000.tar", "gs://bucket/tars/00000.tar"])
def test_bucket_image_unavailable(tree, uploaded, name):
    """An image that cannot be read from its bucket is reported as no_image, or by its path out of the folder."""
    (tree / "images/a.jpg").write_bytes(image_bytes(0))
    bucket = uploaded()
    if name == "a.jpg":
        assert open_files.read_beside(f"{bucket}/images", name) == image_bytes(0)
        return
    with pytest.raises(open_files.FileUnavailable, match="no_image" if name == "gone.jpg" else "path_out_of_folder"):
        open_files.read_beside(f"{bucket}/images", name)


def test_bucket_image_that_fails_is_not_missing(tree, uploaded, fake_gcs, monkeypatch):
    """An image whose bucket fails ends the preparation, which would otherwise depend on the moment."""
    (tree / "images/a.jpg").write_bytes(image_bytes(0))
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=AsyncMock()))
    bucket = uploaded()
    with proxy(fake_gcs, failures=1.0, kinds=("503",), only="a.jpg") as proxied, clients_of(proxied):
        with pytest.raises(OSError, match="the bucket fails") as failure:
            open_files.read_beside(f"{bucket}/images", "a.jpg")
        assert failure.value.errno == errno.EAGAIN
