"""Labelled sets of every kind: labels are the source's, counts add up, and bad input is named or refused."""

from __future__ import annotations

import collections
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from aimv2_jax.data.dataset_info import DatasetInfo
from aimv2_jax.data.transforms.decode import image_size
from aimv2_jax.prepare.__main__ import main
from tests.helpers import preparing
from tests.helpers.labelled_sets import (
    IMAGE,
    LABEL,
    hugging_face_rows,
    png,
    sample_images,
    save_to_disk,
    table,
    write_image_folder,
)
from tests.helpers.preparing import records_of

EXAMPLES = sample_images()
CLASSES = ["animal", "object", "vehicle"]  # Those with images, sorted.


@pytest.fixture
def run(run_prepare):
    return run_prepare


def refused(result):
    """The error's line; no dataset was written."""
    assert not (result[2] / "dataset.json").exists()
    return preparing.refused(result)


def info_of(folder):
    return DatasetInfo.from_json((folder / "dataset.json").read_text())


def write_set(kind, folder):
    """Writes the examples and one that is no image as a set of this kind; returns its --input and flags."""
    examples = [*EXAMPLES, EXAMPLES[0]._replace(name="page", image=b"<html>404</html>")]
    if kind == "imagefolder":
        write_image_folder(folder, examples)
        return f"imagefolder:{folder}", []
    if kind == "csv":
        write_image_folder(folder, examples)
        rows = [f"{label}/{name}.jpg,{label},{'train' if name != '01' else 'test'}" for name, _, label in examples]
        (folder / "set.csv").write_text("\n".join(["path,label,split", *rows]))
        return folder, ["--label", "class=label", "--split", "train"]
    if kind == "parquet":
        folder.mkdir()
        pyarrow.parquet.write_table(hugging_face_rows(examples), folder / "train-00000-of-00001.parquet")
        return folder, ["--label", "class=label"]
    save_to_disk(folder / "train", hugging_face_rows(examples), num_files=2)
    save_to_disk(folder / "test", hugging_face_rows(examples[:3]))
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder, ["--label", "class=label", "--split", "train"]


@pytest.mark.parametrize("kind", ["imagefolder", "csv", "parquet", "arrow"])
def test_labels_are_those_of_the_source(run, tmp_path, files_of, kind):
    """Every image has its label by name, classes have their numbers, counts add up; bytes are equal again."""
    given, flags = write_set(kind, tmp_path / "set")
    code, said, folder = run(given, *flags)
    assert code == 0
    expected = {example.image: example.label for example in EXAMPLES if kind != "csv" or example.name != "01"}
    records = records_of(folder)
    assert {record.image: record.labels for record in records} == {
        image: {"class": label} for image, label in expected.items()
    }
    assert all(record.captions == {} for record in records) and len(records) == len(expected)
    info = info_of(folder)
    counts = collections.Counter(expected.values())
    order = CLASSES if kind in ("imagefolder", "csv") else LABEL["names"]
    assert list(info.classes["class"].items()) == [(name, counts[name]) for name in order]
    dropped = {reason: drop.count for reason, drop in info.drops.items()}
    assert dropped == {"undecodable_image": 1} | ({"other_split": 1} if kind == "csv" else {})
    assert info.samples == len(EXAMPLES) + 1 == info.records + sum(dropped.values())
    assert f"labels: class with {len(order)} classes" in said and "captions: none" in said
    assert ("1 of them without a record (first: unicorn)" in said) == (order == LABEL["names"])
    again = run(given, *flags, "--shard-size", "1GB", output="again")
    assert files_of(again[2]) == files_of(folder)


def test_labels_by_default_and_by_name(run, tmp_path):
    """Without --label, columns of classes are the labels; --keep names a class, too."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(hugging_face_rows(EXAMPLES), path)
    code, _, folder = run(path, "--keep", "label=animal")
    assert code == 0
    assert {record.labels["label"] for record in records_of(folder)} == {"animal"}
    assert info_of(folder).drops["not_kept"].count == sum(example.label != "animal" for example in EXAMPLES)


def test_captions_are_still_required_where_there_are_some(run, tmp_path):
    """A set with captions and labels drops the samples without a caption, and --label keeps what it named before."""
    images = [example.image for example in EXAMPLES[:3]]
    rows = table({"image": IMAGE, "label": LABEL}, {"image": images, "label": [0, 1, 3], "text": ["a", "", "b"]})
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    code, _, folder = run(tmp_path / "a.parquet", "--label", "t=text")
    assert code == 0 and [(record.captions, record.labels) for record in records_of(folder)] == [
        ({"alt": "a"}, {"t": "a"}),
        ({"alt": "b"}, {"t": "b"}),
    ]
    assert info_of(folder).drops["no_caption"].count == 1


@pytest.mark.parametrize("number", [4, -2, 10**9])
def test_label_out_of_range_is_dropped(run, tmp_path, number):
    """A number that is no class is dropped by its key, and -1, which means none, has no label."""
    rows = hugging_face_rows(EXAMPLES[:4]).to_pydict()
    rows["label"][1:3] = [number, -1]
    rows = table({"image": IMAGE, "label": LABEL}, rows | {"image": [example.image for example in EXAMPLES[:4]]})
    save_to_disk(tmp_path / "set", rows)
    code, said, folder = run(tmp_path / "set")
    assert code == 0 and len(records_of(folder)) == 2
    assert info_of(folder).drops["label_out_of_range:label"].keys == ("data-00000-of-00001/1",)
    assert info_of(folder).drops["no_label"].keys == ("data-00000-of-00001/2",)
    assert "dropped: 1 label_out_of_range:label (first: data-00000-of-00001/1)" in said


def test_split_of_rows_files_and_folders(run, tmp_path):
    """--split takes files of its name, or rows; where there are neither, and of several splits none, it is refused."""
    for name in ("train", "test"):
        write_image_folder(tmp_path / "folder" / name, EXAMPLES[:9] if name == "test" else EXAMPLES)
        rows = hugging_face_rows(EXAMPLES[:9] if name == "test" else EXAMPLES)
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(rows, tmp_path / f"hub/data/{name}-00000-of-00001.parquet")
    for number, given in enumerate((f"imagefolder:{tmp_path}/folder", tmp_path / "hub")):
        code, said, _ = run(given, "--split", "test", output=f"out{number}")
        assert code == 0 and said.startswith("9 records of 9 samples")
    said = refused(run(f"imagefolder:{tmp_path}/folder"))
    assert "are splits, not classes" in said and "test, train" in said and "--split" in said
    said = refused(run(f"imagefolder:{tmp_path}/folder", "--split", "val"))
    assert "'val'. It has test, train." in said
    assert "no file or folder has this name" in refused(run(tmp_path / "hub", "--split", "val"))
    write_set("arrow", tmp_path / "dict")
    assert "several splits" in (said := refused(run(tmp_path / "dict"))) and "train, test" in said
    assert "no such split: 'val'. It has train, test" in refused(run(tmp_path / "dict", "--split", "val"))
    write_set("csv", tmp_path / "csv")
    assert "other_split" in refused(run(tmp_path / "csv", "--split", "val", "--label", "class=label"))


def test_set_that_is_half_downloaded_is_refused(run, tmp_path):
    """A missing file of a saved dataset or of a series, or an empty class, is named with the count."""
    for path in save_to_disk(tmp_path / "saved", hugging_face_rows(EXAMPLES), num_files=3)[1:]:
        path.unlink()
    said = refused(run(tmp_path / "saved"))
    assert "2 of 3 files of its state.json are missing" in said and "data-00001-of-00003.arrow" in said
    (tmp_path / "hub").mkdir()
    pyarrow.parquet.write_table(hugging_face_rows(EXAMPLES), tmp_path / "hub/train-00001-of-00004-0a1b.parquet")
    said = refused(run(tmp_path / "hub"))
    assert "3 of 4 files are missing" in said and "train-00000-of-00004" in said
    assert run(tmp_path / "hub/*.parquet")[0] == 0  # A glob says which files are wanted.
    write_image_folder(tmp_path / "folder", EXAMPLES)
    (tmp_path / "folder/zebra").mkdir()
    (tmp_path / "folder/zebra/0.jpg.part").write_bytes(b"half")
    said = refused(run(f"imagefolder:{tmp_path}/folder", output="other"))
    assert "1 of 4 class folders without an image" in said and "folder/zebra" in said


def write_masks(folder, masks):
    """A table with the masks of the first examples, by number; None for one that is missing."""
    folder.mkdir()
    rows = []
    for (name, image, _), mask in zip(EXAMPLES, masks):
        (folder / f"{name}.jpg").write_bytes(image)
        if mask is not None:
            (folder / f"{name}.png").write_bytes(mask)
        rows.append({"path": f"{name}.jpg", "mask": f"{name}.png"})
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "set.jsonl"


def size_of(number):
    """(height, width) of an example's image."""
    return image_size(EXAMPLES[number].image)[::-1]


def test_bad_masks_are_dropped_by_reason(run, tmp_path):
    """Masks that are missing, of another size, in colours, JPEGs or damaged cost their samples, each by its reason."""
    good = [png(np.full(size_of(number), number, np.uint8)) for number in range(6)]
    colours = png(np.zeros((*size_of(2), 3), np.uint8))
    other_size = png(np.zeros(size_of(3)[::-1] if size_of(3)[0] != size_of(3)[1] else (9, 9), np.uint8))
    given = write_masks(
        tmp_path / "set", [good[0], None, colours, other_size, good[4][:-20], EXAMPLES[5].image, good[0]]
    )
    code, said, folder = run(given, "--image", "mask=mask")
    info = info_of(folder)
    names = [f"{example.name}.jpg" for example in EXAMPLES[:7]]
    wanted = ["no_image", "map_with_colours", "other_size", "undecodable_map", "map_not_png"]
    expected = {f"{reason}:mask": (names[number],) for number, reason in enumerate(wanted, 1)}
    if size_of(6) != size_of(0):
        expected["other_size:mask"] = (names[3], names[6])
    assert code == 0 and {reason: drop.keys for reason, drop in info.drops.items()} == expected
    assert info.samples == 7 == info.records + sum(drop.count for drop in info.drops.values())
    [record] = [record for record in records_of(folder) if record.key == names[0]]
    assert record.images == {"mask": good[0]} and record.captions == record.labels == {}
    assert f"map_with_colours:mask (first: {names[2]}); second images have one channel" in said
    assert refused(run(given, "--image", "mask=masks", output="no")) and not (tmp_path / "no").exists()


def test_maps_of_8_and_of_16_bits_are_not_mixed(run, tmp_path):
    """A depth map of 8 bits among those of 16 is named; --image-bits drops it, and the values stay as they are."""
    maps = [np.full(size_of(number), 700 * number, np.uint16) for number in range(4)]
    files = [png(values) for values in maps]
    files[2] = png((maps[2] >> 8).astype(np.uint8))
    given = write_masks(tmp_path / "set", files)
    code, said, folder = run(given, "--image", "depth=mask")
    name = EXAMPLES[2].name
    assert code == 2 and not (folder / "dataset.json").exists()
    assert f"--image depth has 3 maps of 16 bits and 1 of 8 bits: '{name}.jpg'" in said and "--image-bits" in said
    code, said, folder = run(given, "--image", "depth=mask", "--image-bits", "depth=16", output="kept")
    assert code == 0 and "images: depth 3 of 16 bits, values up to 2100" in said
    assert info_of(folder).drops["other_bits:depth"].keys == (f"{name}.jpg",)
    assert [record.images["depth"] for record in records_of(folder)] == [files[0], files[1], files[3]]
    assert info_of(folder).made["image"] == {"depth": "mask"} and info_of(folder).made["image-bits"] == {"depth": 16}


@pytest.mark.parametrize("kind", ["imagefolder", "flat", "parquet", "arrow", "tar"])
def test_masks_of_every_input(run, tmp_path, make_tar, kind):
    """Each input gives every image its own mask, byte by byte."""
    examples = EXAMPLES[:5]
    masks = [png(np.full(size_of(number), 50 + number, np.uint8)) for number in range(5)]
    flags = ["--image", "mask=annotation"]
    if kind in ("imagefolder", "flat"):
        for (name, image, label), mask in zip(examples, masks):
            below = f"{label}/{name}" if kind == "imagefolder" else name
            for path, data in ((f"images/{below}.jpg", image), (f"annotations/{below}.png", mask)):
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_bytes(data)
        given, flags = f"imagefolder:{tmp_path}/images", ["--image", f"mask={tmp_path}/annotations"]
    elif kind == "tar":
        samples = {example.name: {"jpg": example.image, "seg.png": mask} for example, mask in zip(examples, masks)}
        given, flags = make_tar(tmp_path / "a.tar", samples), ["--image", "mask=seg.png"]
    else:
        features = {"image": IMAGE, "annotation": IMAGE}
        rows = table(features, {"image": [example.image for example in examples], "annotation": masks})
        given = tmp_path / "a.parquet" if kind == "parquet" else tmp_path / "set"
        pyarrow.parquet.write_table(rows, given) if kind == "parquet" else save_to_disk(given, rows)
    code, said, folder = run(given, *flags)
    assert code == 0, said
    expected = {example.image: {"mask": mask} for example, mask in zip(examples, masks)}
    assert {record.image: record.images for record in records_of(folder)} == expected
    info = info_of(folder)
    assert (info.records, info.samples, info.images["mask"].bits_8.count) == (5, 5, 5)
    assert str(tmp_path) not in (folder / "dataset.json").read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--image", "mask"], "--image: 'mask' is not of the form NAME=VALUE"),
        (["--image", "a=x", "a=y"], "--image names 'a' twice"),
        (["--image", "a=x"], "no such field of second images"),
        (["--image-bits", "a=16"], "--image-bits names no --image: 'a=16'. Give --image a=FIELD, too"),
        (["--image", "a=x", "--image-bits", "a=12"], "--image-bits: 'a=12' is not of the form NAME=8 or NAME=16"),
        (["--split", "a/b"], "--split is not a name: 'a/b'"),
        (["--split", ""], "--split is not a name: ''"),
        ([], "Give --caption KIND=FIELD, --label NAME=FIELD or --image NAME=FIELD"),
    ],
)
def test_flags_of_labelled_sets(tmp_path, capsys, flags, says):
    """Wrong flags are refused in one line before any work."""
    (tmp_path / "set.csv").write_text("path,label\na.jpg,x\n")
    try:
        code = main(["--input", str(tmp_path / "set.csv"), "--output", str(tmp_path / "out"), *flags])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err
    assert code == 2 and says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
