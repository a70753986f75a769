"""Image folders: classes, files, links, and what is refused."""

from __future__ import annotations

import pytest

from aimv2_jax.errors import UserError
from aimv2_jax.prepare.inputs import discover, image_folder, reader
from aimv2_jax.prepare.inputs.samples import BadInput, MapFile
from tests.helpers.small_inputs import image_bytes


@pytest.fixture
def folder(tmp_path):
    """Two classes, with files in subfolders, hidden and other files, and an image that has no class."""
    root = tmp_path / "set"
    for number, name in enumerate(("b/1.jpg", "b/deep/er/0.PNG", "b/10.jpeg", "a b/2.jpg", "stray.jpg")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_bytes(number))
    (root / "b/3.jpg.part").write_bytes(b"half")
    (root / "notes.txt").write_text("notes")
    for hidden in ("b/.hidden.jpg", ".git/x.jpg", "b/.cache/y.jpg"):
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).write_bytes(image_bytes(9))
    return root


def find(*inputs, **options):
    return discover.find_shards([f"imagefolder:{given}" for given in inputs], **options)


def read(shards, **options):
    return [item for shard in shards for item in reader.read(shard, **options)]


def test_classes_are_the_folders(folder):
    """Images have the class of their first folder; others are counted, hidden files are no part of the set."""
    items = read(find(folder))
    found = {item.key: item.fields.get("class") for item in items if not isinstance(item, BadInput)}
    expected = {"stray.jpg": None, "a b/2.jpg": "a b", "b/1.jpg": "b", "b/10.jpeg": "b", "b/deep/er/0.PNG": "b"}
    assert list(found.items()) == list(expected.items())
    assert [item for item in items if isinstance(item, BadInput)] == [BadInput("no_image_file", 0, 4, "b/3.jpg.part")]
    [data] = [item.image for item in items if item.key == "b/10.jpeg"]
    assert data == image_bytes(2)


def test_large_class_is_several_shards(folder, monkeypatch):
    """The parts of a class are its files in order, each once."""
    whole = read(find(folder))
    monkeypatch.setattr(image_folder, "CHUNK_FILES", 2)
    shards = find(folder)
    assert [(shard.start, shard.stop) for shard in shards if shard.path.endswith("/b")] == [(0, 2), (2, 3)]
    assert sorted(read(shards), key=lambda item: item.key) == sorted(whole, key=lambda item: item.key)
    assert sum(shard.num_bytes for shard in shards) > 0


def test_second_images_lie_in_the_same_places(folder, tmp_path):
    """A mask has its image's path in another folder, with the suffix .png; one that is missing is said."""
    (tmp_path / "masks/b/deep/er").mkdir(parents=True)
    (tmp_path / "masks/b/deep/er/0.png").write_bytes(b"mask")
    masks = str(tmp_path / "masks")
    found = {item.key: item.maps for item in read(find(folder), maps=[masks]) if not isinstance(item, BadInput)}
    assert found.pop("b/deep/er/0.PNG") == {masks: MapFile(b"mask")}
    assert set(map(str, found.values())) == {str({masks: MapFile(None, "no_image")})}


def test_links_out_of_the_folder(folder, tmp_path):
    """A class that is a link out of the folder is refused, an image dropped, and both followed with --follow-links."""
    (tmp_path / "private/deep").mkdir(parents=True)
    (tmp_path / "private/0.jpg").write_bytes(image_bytes(7))
    (folder / "b/link.jpg").symlink_to(tmp_path / "private/0.jpg")
    (folder / "b/linked").symlink_to(tmp_path / "private")
    [link] = [item for item in read(find(folder)) if item.key == "b/link.jpg"]
    assert (link.image, link.absence) == (None, "link_out_of_folder")
    assert "b/linked" in [item.key for item in read(find(folder)) if isinstance(item, BadInput)]
    [link] = [item for item in read(find(folder, follow_links=True)) if item.key == "b/link.jpg"]
    assert link.image == image_bytes(7)
    (folder / "c").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=r"leads out of its folder: '.*set/c'.*--follow-links"):
        find(folder)
    assert "c/0.jpg" in [item.key for item in read(find(folder, follow_links=True))]


def test_link_to_a_class_is_another_class(folder):
    """A class folder keeps its own name where it is a link to one in the same set."""
    (folder / "c").symlink_to("b")
    assert {shard.path.rpartition("/")[2] for shard in find(folder)} == {".", "a b", "b", "c"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "names no folder"),
        ("missing", "is no folder"),
        ("stray.jpg", "is no folder"),
        ("empty", "has no images"),
        ("texts", "has no images"),
        (".", "1 of 5 class folders without an image"),
        ("splits", "are splits, not classes"),
    ],
)
def test_folders_that_are_no_set(folder, monkeypatch, given, says):
    """What is no folder of classes is refused in one sentence."""
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "texts/c").mkdir(parents=True)
    (folder / "texts/c/a.txt").write_text("")
    for name in ("train", "Val"):
        (folder / f"splits/{name}/c").mkdir(parents=True)
        (folder / f"splits/{name}/c/a.jpg").write_bytes(b"")
    if given == ".":
        (folder / "texts/c/a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=says):
        find(given)


def test_bucket_folder_gives_the_same_samples(folder, gcs_folder, fake_gcs, upload):
    """An image folder in a bucket has the samples of the one on a disk, and its second images."""
    (folder / "b/x.png").write_bytes(image_bytes(5))
    url = upload(fake_gcs, folder, gcs_folder)
    here = read(find(folder), maps=[str(folder)])
    there = read(find(url), maps=[url])

    def known(items):
        return [(item.key, getattr(item, "image", None), list(getattr(item, "maps", {}).values())) for item in items]

    assert known(there) == known(here) and len(here) > 5
    [shard, *_] = find(url)
    assert image_folder.maps(shard, [url, f"{url}/none"]) == [url]
