"""Checkpoints in a bucket: atomic commit and delete without renames, and failures of the bucket that are no damage."""

from __future__ import annotations

import json

import pytest

from aimv2_jax.checkpoint import layout, manifest
from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader
from aimv2_jax.errors import EXIT_RETRY, StorageError, UserError, describe_exit
from aimv2_jax.storage.files import atomic_write, exists, list_names, list_objects, read_bytes, remove
from tests.helpers.checkpoints import CONFIG, abstract, assert_same, make_state, save_all
from tests.helpers.failing_bucket import fail, succeed

# Tests with servers run one at a time.
pytestmark = pytest.mark.xdist_group("processes")


def flip_a_bit(workdir: str, step: int) -> str:
    """Flips a bit in the largest file of a step; returns its path in the step's folder."""
    files = {name: size for name, size in list_objects(f"{workdir}/checkpoints/{step}").items() if "/d/" in name}
    name = max(files, key=files.__getitem__)
    data = bytearray(read_bytes(f"{workdir}/checkpoints/{step}/{name}"))
    data[len(data) // 2] ^= 16
    atomic_write(f"{workdir}/checkpoints/{step}/{name}", bytes(data))
    return name


def contents(folder: str) -> dict[str, bytes]:
    return {name: read_bytes(f"{folder}/{name}") for name in list_objects(folder)}


def test_bucket_newest_step_damaged(gcs_folder):
    """The step is set aside by an added object, its files stay, and the next step is used."""
    checkpoints = f"{gcs_folder}/checkpoints"
    save_all(gcs_folder, {10: None, 20: None})
    name = flip_a_bit(gcs_folder, 20)
    before = contents(f"{checkpoints}/20")
    with Checkpointer(gcs_folder, keep=2) as checkpointer:
        newest, [damage] = checkpointer.newest_intact()
        assert (newest, damage.step, damage.moved_to, checkpointer.steps()) == (10, 20, "20/set_aside.json", [10])
        assert f"{name}: other contents" in str(damage)
        assert_same(checkpointer.restore(10, abstract(make_state())), make_state(10))
        checkpointer.save(20, make_state(21), CONFIG)
    assert json.loads(read_bytes(f"{checkpoints}/20/set_aside.json")) == {"why": "damaged", "step": 20}
    remove(f"{checkpoints}/20/set_aside.json")
    assert contents(f"{checkpoints}/20") == before  # No file was copied, moved or deleted.
    remove(f"{checkpoints}/20/manifest.json")
    assert_same(CheckpointReader(gcs_folder).restore(20, abstract(make_state())), make_state(21))


def test_bucket_step_set_aside_again_and_again(gcs_folder):
    """Each save of the same step gets its own folder, and only the last one is the step."""
    with Checkpointer(gcs_folder, keep=1) as checkpointer:
        for seed in (1, 2, 3):
            checkpointer.save(10, make_state(0), CONFIG, eval_loss=1.0)
            checkpointer.save(20, make_state(seed), CONFIG)
            assert checkpointer.set_aside_newer(5, "rewound") == [10, 20]
        checkpointer.save(20, make_state(4), CONFIG)
        checkpointer.save(30, make_state(5), CONFIG)
    reader = CheckpointReader(gcs_folder)
    assert (reader.steps(), len(reader.set_aside())) == ([30], 6)  # `20-4` was a step, and is deleted as one.
    assert list_names(f"{gcs_folder}/checkpoints") == sorted(
        ["30", *(f"{step}{more}" for step in (10, 20) for more in ("", "-2", "-3"))]
    )


def test_bucket_step_that_cannot_be_deleted(failing_gcs, capsys):
    """It remains a step exactly if its manifest remains, and is deleted as soon as the bucket allows it."""
    workdir = failing_gcs.new_folder()
    with Checkpointer(workdir, keep=1) as checkpointer:
        checkpointer.save(20, make_state(1), CONFIG)
        checkpointer.set_aside_newer(5, "rewound")
        checkpointer.save(20, make_state(2), CONFIG)
        checkpointer.settle()
        fail(failing_gcs, "403", only="DELETE .*20-2")
        checkpointer.save(30, make_state(3), CONFIG)
        checkpointer.settle()
        assert exists(f"{workdir}/checkpoints/20-2/manifest.json") and checkpointer.steps() == [20, 30]
        fail(failing_gcs, "403", only="DELETE .*state")
        checkpointer.save(40, make_state(4), CONFIG)
        checkpointer.settle()
        assert checkpointer.steps() == CheckpointReader(workdir).steps() == [40]
        assert list_names(f"{workdir}/checkpoints") == ["20", "20-2", "30", "40"]
        succeed(failing_gcs)
    assert list_names(f"{workdir}/checkpoints") == ["20", "40"]
    assert capsys.readouterr().err.count("could not delete") == 2


def test_bucket_step_without_manifest(gcs_folder):
    """A folder without a manifest, as after a kill during its save, is no step, and is replaced."""
    save_all(gcs_folder, {10: None, 20: None, 30: None})
    remove(f"{gcs_folder}/checkpoints/30/manifest.json")
    assert CheckpointReader(gcs_folder).steps() == [10, 20]
    with Checkpointer(gcs_folder, keep=3) as checkpointer:
        assert checkpointer.newest_intact() == (20, [])
        checkpointer.save(30, make_state(31), CONFIG)
    assert_same(CheckpointReader(gcs_folder).restore(30, abstract(make_state())), make_state(31))


def test_bucket_step_no_step_while_deleted(gcs_folder, monkeypatch):
    """A step that is being deleted is no step before any other of its objects is deleted."""
    seen, delete_folder = [], layout.delete_folder

    def recording_delete(path):
        seen.append((path.name, CheckpointReader(gcs_folder).steps()))
        return delete_folder(path)

    monkeypatch.setattr(layout, "delete_folder", recording_delete)
    save_all(gcs_folder, {1: None, 2: None}, keep=1)
    assert seen == [("1", [2])]


# --- failures of the bucket ----------------------------------------------------------------------------------------


def test_bucket_without_right_to_see_its_metadata(failing_gcs):
    """Rights on objects suffice: nothing needs `storage.buckets.get`."""
    fail(failing_gcs, "403", only=r"GET /storage/v1/b/[^/?]+(\?|$)")
    workdir = failing_gcs.new_folder()
    save_all(workdir, {1: None, 2: None}, keep=1)
    assert_same(CheckpointReader(workdir).restore(2, abstract(make_state())), make_state(2))


@pytest.mark.parametrize(
    "kind, file",
    [
        ("404", "manifest.json"),
        ("503", "hashes.json"),
        ("404", "meta/metadata"),
        ("404", "state/d/"),
        ("cut", "state/d/"),
    ],
)
def test_bucket_fails_while_verifying(failing_gcs, kind, file):
    """A bucket that fails for a moment changes nothing; one that fails for long ends with 75, and damages no step."""
    workdir = failing_gcs.new_folder()
    save_all(workdir, {1: None, 2: None})
    only = f"GET .*checkpoints/2/{file}.*alt=media".replace("/", "(/|%2F)")
    fail(failing_gcs, kind, only=only, limit=2)
    with Checkpointer(workdir, keep=2) as checkpointer:
        assert checkpointer.newest_intact() == (2, [])
    assert failing_gcs.counts()["failures"][kind] >= 2
    fail(failing_gcs, "404", only=only)
    with pytest.raises(OSError, match="no such object") as caught, Checkpointer(workdir, keep=2) as checkpointer:
        checkpointer.newest_intact()
    assert describe_exit(caught.value)[0] == EXIT_RETRY
    succeed(failing_gcs)
    reader = CheckpointReader(workdir)
    assert (reader.steps(), reader.set_aside()) == ([1, 2], [])
    reader.verify(2)


def test_bucket_fails_while_restoring(failing_gcs):
    """A read of arrays that fails once is repeated; if it always fails, the run ends with 75 and no step is damaged."""
    workdir = failing_gcs.new_folder()
    save_all(workdir, {1: None})
    reader, arrays = CheckpointReader(workdir), r"GET .*state(/|%2F)(.*(/|%2F))?d(/|%2F).*alt=media"
    reader.verify(1)
    fail(failing_gcs, "404", only=arrays, limit=1)
    assert_same(reader.restore(1, abstract(make_state())), make_state(1))
    fail(failing_gcs, "404", only=arrays)
    with pytest.raises(OSError, match=r"the bucket fails|no such object") as caught:
        reader.restore(1, abstract(make_state()))
    assert describe_exit(caught.value)[0] == EXIT_RETRY
    succeed(failing_gcs)
    assert_same(reader.restore(1, abstract(make_state())), make_state(1))


@pytest.mark.parametrize("kind, error", [("503", StorageError), ("403", UserError)])
def test_bucket_fails_while_saving(failing_gcs, kind, error):
    """A save that fails is reported; the second in a row ends the run, with 75 only if waiting may help."""
    workdir = failing_gcs.new_folder()
    with Checkpointer(workdir, keep=2) as checkpointer:
        checkpointer.save(1, make_state(1), CONFIG)
        checkpointer.wait()
        fail(failing_gcs, kind, only="POST .*uploadType=multipart")  # Of gcsfs.
        checkpointer.save(2, make_state(2), CONFIG)
        checkpointer.settle()
        failure = checkpointer.check_errors()
        assert isinstance(failure, error) and "checkpoint of step 2" in str(failure) and "step 1, is" in str(failure)
        checkpointer.save(3, make_state(3), CONFIG)
        checkpointer.settle()
        with pytest.raises(error, match="checkpoint of step 3"):
            checkpointer.check_errors()
        succeed(failing_gcs)
        checkpointer.save(4, make_state(4), CONFIG)
        checkpointer.wait()
        assert checkpointer.steps() == CheckpointReader(workdir).steps() == [1, 4]


def test_bucket_manifest_of_vanished_object(gcs_folder):
    """An object that vanished from the listing is damage."""
    save_all(gcs_folder, {1: None, 2: None})
    name = next(name for name in list_objects(f"{gcs_folder}/checkpoints/2") if "/d/" in name)
    remove(f"{gcs_folder}/checkpoints/2/{name}")
    with Checkpointer(gcs_folder, keep=2) as checkpointer:
        newest, [damage] = checkpointer.newest_intact()
    assert newest == 1 and str(damage.wrong[0]) == f"{name}: {manifest.MISSING}"
