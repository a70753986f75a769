"""Tests of the command line: help, exit codes, and one line for every user error before anything compiles."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from aimv2_jax import errors
from aimv2_jax.checkpoint import layout
from aimv2_jax.checkpoint.checkpointer import Checkpointer
from aimv2_jax.cli import split_overrides
from aimv2_jax.main import main
from aimv2_jax.models.aimv2 import count_parameters
from aimv2_jax.train.builder import TrainSetup, build_setup
from experiments.benchmarks import step_time
from tests.helpers.several import free_port
from tests.helpers.tiny import ROOT, tiny_arguments, tiny_config
from tests.helpers.trained_run import random_state

MODULES = ["-m aimv2_jax.main", "-m aimv2_jax.export"]
MODULES += [
    f"-m aimv2_jax.eval.{name}" for name in ("visualize", "heldout", "features", "probes", "zeroshot", "retrieval")
]
MODULES += [
    "experiments/probe_imagenet.py",
    "experiments/make_sample.py",
    "experiments/benchmarks/step_time.py",
    "experiments/benchmarks/recompute.py",
    "-m aimv2_jax.checkpoint.verify",
    "-m aimv2_jax.monitoring.report",
]
MODULES += [f"tests/stress/{name}.py" for name in ("kill", "corrupt", "goodput", "hang")]


@pytest.fixture
def nothing_compiles(monkeypatch):
    """Raises where the run starts to compile or to compute."""

    def compiled(*_):
        raise AssertionError("the user error should have been reported before")

    monkeypatch.setattr(TrainSetup, "compile_step", compiled)
    monkeypatch.setattr(TrainSetup, "init", compiled)


def not_sentencepiece(folder: Path) -> Path:
    path = folder / "wrong.model"
    path.write_bytes(b"not a model")
    return path


def empty_folder(folder: Path) -> Path:
    path = folder / "empty"
    path.mkdir()
    return path


# Case -> (function from a folder to config changes, words of the error message).
REFUSED = {
    "misspelt key": (lambda _: {"train__stepz": 1}, ["train.stepz", "Did you mean train.steps"]),
    "ill-typed value": (lambda _: {"train__steps": "many"}, ["train.steps", "many", "whole number"]),
    "heads": (lambda _: {"model__encoder__heads": 3}, ["model.encoder.heads", "3 heads, width 32"]),
    "batch over devices": (
        lambda _: {"data__batch_size": 12},
        ["data.batch_size", "12 rows, 8 devices", "multiple of 8"],
    ),
    "evaluation batch": (lambda _: {"eval__batch_size": 12}, ["eval.batch_size", "12 rows"]),
    "mesh": (lambda _: {"mesh__data": 3}, ["mesh.data", "3 x 1 x 1 for 8 devices"]),
    "vocabulary": (lambda _: {"model__decoder__vocab_size": 100}, ["768", "model.decoder.vocab_size", "100"]),
    "tokenizer missing": (lambda d: {"tokenizer__path": d / "no.model"}, ["tokenizer.path", "no.model"]),
    "tokenizer of another kind": (
        lambda d: {"tokenizer__path": not_sentencepiece(d)},
        ["SentencePiece", "wrong.model"],
    ),
    "data missing": (lambda d: {"data__sources__photo": d / "nowhere"}, ["photo", "nowhere"]),
    "data empty": (lambda d: {"data__sources__photo": empty_folder(d)}, ["photo", "empty"]),
    "held-out data missing": (lambda d: {"eval__sources__photo": d / "nowhere"}, ["photo", "nowhere"]),
    "unknown source": (lambda _: {"data__mixture__cats__alt": 1}, ["data.mixture", "cats", "data.sources.cats"]),
    "caption kind": (lambda _: {"data__mixture__photo__poem": 1}, ["data.mixture.photo", "poem", "alt, synthetic"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_main_when_the_config_cannot_work_then_one_line_and_code_2(case, tmp_path, capsys, nothing_compiles):
    changes, words = REFUSED[case]
    assert main(tiny_arguments(tmp_path / "run", **changes(tmp_path))) == errors.EXIT_USER
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and message.count("\n") == 0
    assert all(word in message for word in words), message


def test_main_when_the_disk_has_no_room_for_two_checkpoints_then_refused(
    tmp_path, capsys, nothing_compiles, monkeypatch
):
    monkeypatch.setattr(layout, "free_bytes", lambda _: 1000)
    assert main(tiny_arguments(tmp_path)) == errors.EXIT_USER
    assert "two checkpoints" in capsys.readouterr().err


def test_main_when_the_workdir_has_another_model_then_refused_naming_the_key(tmp_path, capsys, nothing_compiles):
    config = tiny_config()
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(2, random_state(build_setup(config, jax.devices()[:1])), config)
    changes = {"model__encoder__width": 48, "optimizer__peak_lr": 0.5, "seed": 7}
    for key, value in changes.items():
        assert main(tiny_arguments(tmp_path, **{key: value})) == errors.EXIT_USER
        message = capsys.readouterr().err
        assert key.replace("__", ".") in message and str(value) in message


def test_main_when_the_workdir_is_a_file_then_refused(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    assert main(tiny_arguments(path)) == errors.EXIT_USER
    assert "--workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config"),
        (["--config=experiments/quickstart.py"], "--workdir"),
        (["--config=nowhere.py", "--workdir=x"], "nowhere.py"),
        (["--config=experiments/quickstart.py", "--workdir="], "--workdir"),
        (["--config=experiments/quickstart.py", "--workdir=nowhere://bucket/x"], "nowhere://bucket/x"),
        (["--config=experiments/quickstart.py", "--workdir=x", "--steps=3"], "--steps"),
        (["--config=experiments/quickstart.py", "--workdir=x", "--config.train.steps"], "train.steps"),
    ],
)
def test_main_when_flags_are_wrong_then_one_line_and_code_2(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    message = capsys.readouterr().err.strip()
    assert code == errors.EXIT_USER and words in message and message.count("\n") == 0


def test_overrides_when_given_in_either_form_then_split_from_the_rest():
    words = ["--config=a.py", "--config.seed=3", "--config.train.steps", "5", "--workdir", "w"]
    assert split_overrides(words) == (["--config=a.py", "--workdir", "w"], [("seed", "3"), ("train.steps", "5")])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("module", MODULES)
def test_module_help_code_0(module, capsys, monkeypatch):
    """Runs it as the main module of this process, with the import path that Python itself would have."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    for name in [name for name in sys.modules if name.partition(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:
        if module.startswith("-m "):
            runpy.run_module(module.removeprefix("-m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / module), run_name="__main__")
    output = capsys.readouterr()
    assert end.value.code == 0 and "usage" in output.out and not output.err


def test_process_when_the_user_is_wrong_then_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "aimv2_jax.main", *tiny_arguments(tmp_path, tokenizer__path="nowhere.model")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "nowhere.model" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_process_when_stopped_before_it_trains(number, tmp_path):
    """Process 0 of two waits for the other: there is nothing to save, and the code asks for a restart."""
    flags = ["--processes=2", "--process=0", f"--coordinator=127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "aimv2_jax.main", *tiny_arguments(tmp_path), *flags]
    with subprocess.Popen(command, cwd=ROOT) as process:
        caught = 0
        while not caught >> (number - 1) & 1:
            assert process.poll() is None
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
        process.send_signal(number)
        assert process.wait(30) == errors.EXIT_RETRY


def imported_by(statement: str, *names: str) -> str:
    code = f"import sys; {statement}; print([name for name in {names!r} if name in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    ).stdout.strip()


def test_import_when_the_package_or_main_is_imported_then_nothing_heavy_comes_along():
    assert imported_by("import aimv2_jax", "jax", "numpy", "tensorflow") == "[]"
    heavy = ("jax", "tensorflow", "aimv2_jax.train", "aimv2_jax.models", "grain")
    assert imported_by("import aimv2_jax.main", *heavy) == "[]"


def test_step_time_when_imported_and_built_then_needs_no_grain_orbax_or_tensorflow():
    statement = (
        "sys.path.insert(0, 'experiments/benchmarks'); import step_time; "
        "from aimv2_jax.train.builder import build_setup; "
        "import jax; build_setup(step_time.preset_config('reference', {}), jax.devices()[:1]).abstract_state"
    )
    assert imported_by(statement.replace("experiments", f"{ROOT}/experiments"), "grain", "orbax", "tensorflow") == "[]"


def test_step_time_when_run_then_prints_one_json_line_with_its_keys(tmp_path, capsys):
    file = tmp_path / "line.json"
    assert step_time.main(["--preset=tiny", "--rounds=1", "--steps=1", f"--json={file}"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    values = json.loads(line)
    assert values == json.loads(file.read_text())
    assert {"images_per_s", "matmul_gflop_per_s", "images_per_gflop", "preset", "platform", "batch"} < set(values)
    assert values["images_per_gflop"] == pytest.approx(values["images_per_s"] / values["matmul_gflop_per_s"])
    assert (values["preset"], values["platform"], values["batch"]) == ("tiny", "cpu", 2)


def test_step_time_when_the_preset_is_the_reference_then_it_has_the_size_of_the_torch_model():
    """Encoder 384 x 12, decoder 256 x 4, 112 px: 29,356,672 parameters, as in the PyTorch model of these sizes."""
    setup = build_setup(step_time.preset_config("reference"), jax.devices()[:1])
    assert count_parameters(setup.abstract_state.params) == 29_356_672
    assert setup.config.data.batch_size == 16
