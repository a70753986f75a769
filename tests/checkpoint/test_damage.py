"""Damaged steps are detected before use, reported and set aside; steps of other formats are refused."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import pytest

from aimv2_jax.checkpoint import checkpointer as checkpointer_module
from aimv2_jax.checkpoint import layout, manifest, metadata
from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader
from aimv2_jax.checkpoint.metadata import DamagedStep
from aimv2_jax.errors import UserError
from tests.helpers.checkpoints import CONFIG, abstract, assert_same, folders, make_state, save_all, set_format


def data_file(workdir: Path, step: int) -> Path:
    """The largest file of a step, which holds arrays."""
    files = (workdir / "checkpoints" / str(step) / "state" / "d").iterdir()
    return max(files, key=lambda file: file.stat().st_size)


def flip_a_bit(file: Path, bit: int = 1001) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    file.write_bytes(data)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


# --- reading -------------------------------------------------------------------------------------------------------


def test_restore_array_bit_flipped(tmp_path):
    """A step with a flipped bit in an array is not given out, and the error names the damaged file."""
    save_all(tmp_path, {1: None})
    file = data_file(tmp_path, 1)
    flip_a_bit(file)
    reader, state = CheckpointReader(tmp_path), make_state(1)
    for action in (
        lambda: reader.restore(1, abstract(state)),
        lambda: reader.restore_part(1, {"params": abstract(state.params)}),
        lambda: reader.verify(1),
    ):
        with pytest.raises(DamagedStep, match=f"/checkpoints/1: 'state/d/{file.name}: other contents'"):
            action()
    assert reader.meta(1)["step"] == 1  # The metadata file is intact.


def test_restore_compares_contents_once(tmp_path, monkeypatch):
    """A reader that restores a step twice compares its files once, unless the step was saved again."""
    compared, compare = [], manifest.compare
    monkeypatch.setattr(manifest, "compare", lambda *args: (compared.append(args[0].name), compare(*args))[1])
    save_all(tmp_path, {1: None})
    reader, shapes = CheckpointReader(tmp_path), abstract(make_state())
    reader.verify(1)
    reader.restore(1, shapes)
    reader.restore_part(1, {"params": shapes.params})
    assert compared == ["1"]
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, make_state(2), CONFIG)
    flip_a_bit(data_file(tmp_path, 1))
    with pytest.raises(DamagedStep):
        reader.restore(1, shapes)


class _SecondProcess:
    """The jax module as seen by process 1."""

    def __getattr__(self, name: str):
        return getattr(jax, name)

    def process_index(self) -> int:
        return 1


def test_state_when_this_is_not_the_first_process_then_the_word_of_that_one_is_taken(tmp_path, monkeypatch):
    save_all(tmp_path, {1: None})
    (tmp_path / "checkpoints/1/more").write_text("")
    with pytest.raises(DamagedStep, match="more: extra"):
        CheckpointReader(tmp_path).restore(1, abstract(make_state()))
    monkeypatch.setattr(checkpointer_module, "jax", _SecondProcess())
    assert_same(CheckpointReader(tmp_path).restore(1, abstract(make_state())), make_state(1))


def _meanwhile(monkeypatch, then) -> None:
    """Calls `then`, the action of a trainer, after the reader has read the first file of the step."""
    hash_file = manifest.hash_file

    def wrapped(path, *args, **kwargs):
        entry = hash_file(path, *args, **kwargs)
        monkeypatch.undo()
        then()
        return entry

    monkeypatch.setattr(manifest, "hash_file", wrapped)
    monkeypatch.setattr(manifest, "_THREADS", 1)


def test_verify_step_deleted_meanwhile(tmp_path, monkeypatch):
    """A step that its trainer deletes during verification is reported as vanished, not as damaged."""
    save_all(tmp_path, {1: None, 2: None})
    reader = CheckpointReader(tmp_path)
    _meanwhile(monkeypatch, lambda: layout.delete(reader._folder, 1))
    with pytest.raises(metadata.StepVanished, match="Existing steps: 2"):
        reader.verify(1)
    assert folders(tmp_path) == ["2"]


def test_verify_step_replaced_meanwhile(tmp_path, monkeypatch):
    """If a trainer saves a step again during its verification, the new step is compared."""
    save_all(tmp_path / "other", {1: None})
    save_all(tmp_path, {1: None})
    folder = tmp_path / "checkpoints" / "1"

    def replace():
        folder.rename(folder.with_name("rewound-1-1"))
        shutil.copytree(tmp_path / "other/checkpoints/1", folder)

    assert (folder / "manifest.json").read_bytes() != (tmp_path / "other/checkpoints/1/manifest.json").read_bytes()
    _meanwhile(monkeypatch, replace)
    CheckpointReader(tmp_path).verify(1)


# --- the newest intact step ----------------------------------------------------------------------------------------


def test_newest_intact_two_damaged_steps(tmp_path):
    """If the two newest steps are damaged, both are set aside and named, and the next one is used."""
    save_all(tmp_path, {10: 1.0, 20: None, 30: 0.5})
    checkpoints = tmp_path / "checkpoints"
    file, meta = data_file(tmp_path, 30), checkpoints / "20/meta/metadata"
    flip_a_bit(file)
    meta.write_bytes(meta.read_bytes()[:-1])
    (checkpoints / "20/more").write_text("")
    before = {step: contents(checkpoints / step) for step in ("20", "30")}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        newest, damages = checkpointer.newest_intact()
        assert (newest, checkpointer.steps(), checkpointer.best_step()) == (10, [10], 10)
        assert_same(checkpointer.restore(10, abstract(make_state())), make_state(10))
        size = len((checkpoints / "damaged-20-1/meta/metadata").read_bytes())
        assert [str(damage) for damage in damages] == [
            "the checkpoint of step 30 is damaged and was set aside as checkpoints/damaged-30-1: "
            f"state/d/{file.name}: other contents",
            "the checkpoint of step 20 is damaged and was set aside as checkpoints/damaged-20-1: "
            f"meta/metadata: size {size:,} instead of {size + 1:,}; more: extra",
        ]
        checkpointer.save(20, make_state(20), CONFIG)  # The numbers can be used again.
        checkpointer.save(30, make_state(31), CONFIG)
    assert folders(tmp_path) == ["10", "30", "damaged-20-1", "damaged-30-1"]
    assert (
        contents(checkpoints / "damaged-20-1") == before["20"]
        and contents(checkpoints / "damaged-30-1") == before["30"]
    )
    reader = CheckpointReader(tmp_path)
    assert (reader.steps(), reader.set_aside()) == ([10, 30], ["damaged-20-1", "damaged-30-1"])
    flip_a_bit(data_file(tmp_path, 30))
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.newest_intact()[1][0].moved_to == "damaged-30-2"


def test_newest_when_intact_then_older_ones_are_not_read_and_nothing_changes(tmp_path):
    save_all(tmp_path, {10: None, 20: None})
    flip_a_bit(data_file(tmp_path, 10))
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.newest_intact() == (20, [])
    assert folders(tmp_path) == ["10", "20"]


def test_newest_when_a_desktop_left_files_then_intact(tmp_path):
    save_all(tmp_path, {10: None, 20: None})
    for step in (10, 20):
        for name in (".DS_Store", "state/._d", "meta/.nfs00000000000af3c200000004"):
            (tmp_path / f"checkpoints/{step}" / name).write_text("")
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert checkpointer.newest_intact() == (20, [])
        assert_same(checkpointer.restore(20, abstract(make_state())), make_state(20))
        checkpointer.save(30, make_state(30), CONFIG)
    assert folders(tmp_path) == ["30"]


def test_newest_intact_without_steps(tmp_path):
    """Without steps, there is no newest intact step and no damage."""
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.newest_intact() == (None, [])


def test_newest_when_no_step_is_intact_then_user_error_names_them_and_they_stay(tmp_path):
    save_all(tmp_path, {10: None, 20: None})
    for step in (10, 20):
        flip_a_bit(data_file(tmp_path, step))
    for _ in range(2):  # A second start must not begin a new run.
        with (
            Checkpointer(tmp_path, keep=2) as checkpointer,
            pytest.raises(UserError, match=r"is intact: 'step 20: state/d/.*: other contents; step 10: state/d/"),
        ):
            checkpointer.newest_intact()
        assert folders(tmp_path) == ["10", "20"]


def test_newest_when_an_older_meta_cannot_be_read_then_that_step_is_set_aside_too(tmp_path):
    save_all(tmp_path, {10: 1.0, 20: 2.0, 30: 3.0})
    (tmp_path / "checkpoints/10/meta/metadata").write_text("")
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        newest, [damage] = checkpointer.newest_intact()
        assert (newest, damage.step, damage.wrong[0].file) == (30, 10, "meta/metadata")
        assert (checkpointer.steps(), checkpointer.best_step()) == ([20, 30], 20)
    assert folders(tmp_path) == ["20", "30", "damaged-10-1"]


def test_save_never_deletes_unreadable_meta(tmp_path):
    """A step with unreadable metadata is never deleted as long as no caller asks for the newest intact step."""
    save_all(tmp_path, {10: 1.0, 20: 2.0})
    (tmp_path / "checkpoints/10/meta/metadata").write_text("")
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step in (30, 40):
            checkpointer.save(step, make_state(step), CONFIG)
    assert folders(tmp_path) == ["10", "20", "40"]


def test_newest_when_its_manifest_is_gone_then_damaged_and_not_of_an_older_format(tmp_path):
    save_all(tmp_path, {10: None, 20: None})
    (tmp_path / "checkpoints/20/manifest.json").unlink()
    with pytest.raises(DamagedStep, match=r"manifest\.json: missing"):
        CheckpointReader(tmp_path).restore(20, abstract(make_state()))
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        newest, [damage] = checkpointer.newest_intact()
    assert (newest, damage.step, folders(tmp_path)) == (10, 20, ["10", "damaged-20-1"])


def test_step_when_its_folder_is_that_of_another_then_damaged(tmp_path):
    save_all(tmp_path, {10: None})
    (tmp_path / "checkpoints/10").rename(tmp_path / "checkpoints/20")
    with pytest.raises(DamagedStep, match=r"manifest\.json: that of step 10"):
        CheckpointReader(tmp_path).restore(20, abstract(make_state()))


def test_newest_intact_read_error(tmp_path, monkeypatch):
    """If the disk refuses to be read, the error is raised and no step is set aside."""
    save_all(tmp_path, {10: None, 20: None})

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "the file")

    with Checkpointer(tmp_path, keep=2) as checkpointer:
        monkeypatch.setattr(manifest, "hash_file", refuse)
        with pytest.raises(PermissionError):  # `describe_exit` has a message for it.
            checkpointer.newest_intact()
    assert folders(tmp_path) == ["10", "20"]


# --- rollback ------------------------------------------------------------------------------------------------------


def test_set_aside_newer_frees_step_numbers(tmp_path):
    """The numbers of newer steps that are set aside are free again, and none of their data is lost."""
    checkpoints = tmp_path / "checkpoints"
    with Checkpointer(tmp_path, keep=5, keep_steps=(30,)) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, make_state(step), CONFIG, eval_loss=40 - step)
        assert checkpointer.set_aside_newer(10, "rewound") == [20, 30]  # The last save was still in progress.
        assert (checkpointer.steps(), checkpointer.best_step()) == ([10], 10)
        checkpointer.save(20, make_state(21), CONFIG)
        assert_same(checkpointer.restore(20, abstract(make_state())), make_state(21))
        assert checkpointer.set_aside_newer(10, "rewound") == [20]
        assert checkpointer.set_aside_newer(10, "rewound") == []
    assert folders(tmp_path) == ["10", "rewound-20-1", "rewound-20-2", "rewound-30-1"]
    (checkpoints / "rewound-20-1").rename(checkpoints / "20")
    assert_same(CheckpointReader(tmp_path).restore(20, abstract(make_state())), make_state(20))


# --- commit --------------------------------------------------------------------------------------------------------

KILLED_BEFORE_THE_MANIFEST = """
import os, signal, sys
from tests.helpers import checkpoints as test
from aimv2_jax.checkpoint import manifest

with test.Checkpointer(sys.argv[1], keep=2) as checkpointer:
    checkpointer.save(1, test.make_state(1), test.CONFIG)
    checkpointer.wait()
    manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    checkpointer.save(2, test.make_state(2), test.CONFIG)
"""


def test_step_when_killed_after_orbax_and_before_the_manifest_then_no_step_and_swept(tmp_path):
    root = Path(__file__).parents[2]
    script = f"import sys; sys.path.insert(0, {str(root)!r})\n{KILLED_BEFORE_THE_MANIFEST}"
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert killed.returncode == -9, killed.stderr
    committed, partial = folders(tmp_path)
    assert committed == "1" and partial.startswith("2.orbax-checkpoint-tmp-saving-") and partial.count(".") == 1
    assert CheckpointReader(tmp_path).steps() == [1]
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.newest_intact() == (1, [])
        assert folders(tmp_path) == ["1"]


def test_save_step_folder_exists(tmp_path):
    """A save does not replace an existing folder that has the name of its step."""
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        (tmp_path / "checkpoints" / "5").mkdir()  # Its origin is unknown, so it stays even if empty.
        checkpointer.save(5, make_state(5), CONFIG)
        with pytest.raises(UserError, match="File exists"):
            checkpointer.wait()
    assert list((tmp_path / "checkpoints" / "5").iterdir()) == []


def test_temporary_names_when_orbax_has_them_then_they_are_those_that_are_swept():
    import orbax.checkpoint as ocp

    assert ocp.utils.TMP_DIR_SUFFIX == layout.TEMPORARY


# --- other formats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 4, 6])
def test_format_other_refused(tmp_path, version):
    """Steps of another format are neither restored nor set aside, since another aimv2_jax can read them."""
    save_all(tmp_path, {1: None, 2: None})
    set_format(tmp_path, 2, version)
    remedy = "Update" if version > 5 else "Use the aimv2_jax that wrote it, or start a new run"
    message = f"checkpoint .*/2 has a format .* read: 'format {version}, needed is 5'. {remedy}"
    reader = CheckpointReader(tmp_path)
    for act in (
        lambda: Checkpointer(tmp_path, 2),
        reader.best_step,
        partial(reader.verify, 2),
        partial(reader.meta, 2),
    ):
        with pytest.raises(UserError, match=message):
            act()
    assert reader.steps() == [1, 2] and reader.set_aside() == []
