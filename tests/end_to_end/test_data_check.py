"""Tests that a resumed run needs the data and tokenizer it was trained on, the same on all processes."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece

from aimv2_jax.checkpoint.checkpointer import CheckpointReader
from aimv2_jax.data.dataset_info import write_dataset
from aimv2_jax.data.records import decode
from aimv2_jax.data.sources import Source
from aimv2_jax.errors import EXIT_FINISHED, EXIT_USER
from aimv2_jax.main import main
from aimv2_jax.monitoring.events import read_events
from aimv2_jax.resilience.progress import TrainProgress
from aimv2_jax.train.data_check import check_data
from tests.helpers.programs import shared_programs  # noqa: F401
from tests.helpers.several import HOST, LocalProcesses
from tests.helpers.tiny import ROOT, tiny_arguments

# Real processes: one test after another.
pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.usefixtures("two_devices", "shared_programs")]

MARK = b"<in between>"
SAMPLE = ROOT / "aimv2_jax/data/sample"
SMALL = dict(train__steps=4, train__save_every=2, eval__sources={})


def photos(folder: Path, records: slice) -> Path:
    """Writes some of the bundled photos as a dataset."""
    source = Source("photo", str(SAMPLE / "train/photo"))
    write_dataset(folder, [decode(source.read(index)) for index in range(len(source))[records]])
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Sixty photos, and fifty of them in reverse order."""
    folder = tmp_path_factory.mktemp("data")
    return {"60": photos(folder / "60", slice(60)), "50": photos(folder / "50", slice(49, None, -1))}


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory) -> Path:
    """The same pieces with the ids of two of them swapped: no other check rejects it."""
    [file] = SAMPLE.glob("*.model")
    model, pieces = file.read_bytes(), sentencepiece.SentencePieceProcessor(str(file))
    # A field of the protocol buffer: tag, length, text.
    fields = [b"\n%c%s" % (len(text), text) for text in (pieces.id_to_piece(i).encode() for i in range(300, 700))]
    one, other = next(
        (a, b) for a, b in itertools.combinations([f for f in fields if model.count(f) == 1], 2) if len(a) == len(b)
    )
    path = tmp_path_factory.mktemp("tokenizer") / "other.model"
    path.write_bytes(model.replace(one, MARK).replace(other, one).replace(MARK, other))
    return path


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> Path:
    """A run of two steps on sixty photos."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    assert main(arguments(workdir, data["60"], train__steps=2)) == EXIT_FINISHED
    return workdir


def arguments(workdir: Path, photo: Path, **changes) -> list[str]:
    return tiny_arguments(workdir, **SMALL | {"data__sources__photo": photo} | changes)


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def test_resume_when_the_tokenizer_differs(run, data, other_tokenizer, capsys):
    assert main(arguments(run, data["60"], tokenizer__path=other_tokenizer)) == EXIT_USER
    error = capsys.readouterr().err
    sides = r"'digest \w{16} before, digest \w{16} now'"
    assert re.search(rf"the tokenizer is not that of the steps up to 2: {sides}\. .*--accept_data=\w+", error), error
    assert CheckpointReader(run).steps() == [2]


def test_resume_when_the_data_differs_until_accepted(run, data, tmp_path, capsys):
    assert main(arguments(run, data["50"])) == EXIT_USER
    error = capsys.readouterr().err
    assert "data source 'photo' is not that of the steps up to 2: '60 records before, 50 records now'" in error
    flag = re.search(r"--accept_data=\w{8}", error)[0]
    assert main([*arguments(run, data["50"]), flag[:-1] + "x"]) == EXIT_USER  # The digest is that of this data only.
    capsys.readouterr()
    assert main([*arguments(run, data["50"], train__steps=3), flag]) == EXIT_FINISHED
    change = "data source 'photo': 60 records before, 50 records now"
    assert f"the data changes from step 2 on, as --accept_data allows: {change}" in capsys.readouterr().out
    [event] = [event for event in read_events(run) if event.kind == "data_changed"]
    assert (event.step, event.values["what"]) == (2, [change])
    # From now on this is the data of the run, at any path, and launchers may keep the flag.
    assert main([*arguments(run, shutil.copytree(data["50"], tmp_path / "moved")), flag]) == EXIT_FINISHED
    assert CheckpointReader(run).meta(4)["extra"]["data_changes"] == [{"step": 2, "what": [change]}]
    assert main(arguments(run, data["60"], train__steps=6)) == EXIT_USER


def test_replay_when_the_data_differs(run, data, capsys):
    assert main([*arguments(run, data["50"]), "--replay=3"]) == EXIT_USER
    assert "data source 'photo' is not that of the steps up to 2" in capsys.readouterr().err


def test_cooldown_when_the_data_differs(stopped, data, tmp_path, capsys):
    assert main(arguments(tmp_path, data["50"], train__cooldown_from=f"{stopped}:2")) == EXIT_USER
    assert "data source 'photo' is not that of the steps up to 2" in capsys.readouterr().err


def test_course_when_the_checkpoint_is_older(capsys):
    data = {"tokenizer": "0", "sources": {}}
    progress = check_data(TrainProgress.from_meta({"step": 7, "extra": {}}), data, None)
    assert progress.data == data and progress.data_changes == ()
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert "step 7 is of an older version and does not record its data and tokenizer" in output
    assert TrainProgress.from_meta({"step": 8, "extra": json.loads(json.dumps(progress.to_meta()))}).data == data
    check_data(TrainProgress(), data, None)
    assert not capsys.readouterr().out


def test_course_when_it_goes_back_then_its_data_stays():
    progress = TrainProgress(9, data={"tokenizer": "0", "sources": {}}, data_changes=({"step": 3, "what": ["x"]},))
    rewound = progress.rewound(4, progress.skips)
    assert (rewound.step, rewound.rewinds) == (4, 1)
    assert (rewound.data, rewound.data_changes) == (progress.data, progress.data_changes)


@pytest.mark.parametrize("purpose", ["training", pytest.param("evaluation", marks=pytest.mark.slow)])
def test_processes_when_one_has_other_data(data, tmp_path, purpose):
    """Each process reads a copy at the same path on its own disk, here in its home."""
    for index, copy in enumerate(("60", "50")):
        shutil.copytree(data[copy], tmp_path / f"home{index}/photo")
    setup = f"""
import os
os.environ["HOME"] = {str(tmp_path / "home")!r} + sys.argv[sys.argv.index("--process") + 1]
"""
    key, value = ("data__sources__photo", "~/photo")
    if purpose == "evaluation":
        key, value = "eval__sources", {"photo": "~/photo"}
    small = SMALL | {key: value}
    with LocalProcesses(2, tmp_path / "out", tiny_arguments(tmp_path / "run", **small), setup=setup) as several:
        codes, error = several.wait(), several.output(0)[1]
    assert codes == {0: EXIT_USER, 1: EXIT_USER}, (codes, error)
    what = f"data source 'photo' of the {purpose} differs between the processes"
    assert f"error: {what}: '60 records on process 0 ({HOST}); 50 records on process 1 ({HOST})'" in error, error
    assert not list((tmp_path / "run").glob("checkpoints/*"))
