"""End-to-end tests of the training loop through `aimv2_jax.main`: resume, stop, guards and output files."""

from __future__ import annotations

import itertools
import json
import logging
import re
import signal
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aimv2_jax import errors
from aimv2_jax.checkpoint.checkpointer import Checkpointer, CheckpointReader
from aimv2_jax.config.load import config_to_dict
from aimv2_jax.data import pipeline
from aimv2_jax.data.tokenizer import Tokenizer
from aimv2_jax.errors import UserError
from aimv2_jax.main import main
from aimv2_jax.monitoring.counters import ExampleCounter
from aimv2_jax.monitoring.events import EventLog, read_events
from aimv2_jax.monitoring.goodput import compute_goodput
from aimv2_jax.monitoring.metrics import read_metrics
from aimv2_jax.resilience import preemption
from aimv2_jax.resilience.repeated_failures import RepeatedFailures
from aimv2_jax.train import trainer
from aimv2_jax.train.builder import TrainSetup, build_setup
from aimv2_jax.train.evaluate import Evaluator
from aimv2_jax.train.step_metrics import StepMetrics
from tests.helpers.programs import shared_programs  # noqa: F401
from tests.helpers.runs import assert_bitwise, broken_source, saved_state
from tests.helpers.slow_reads import SlowSource
from tests.helpers.tiny import tiny_arguments, tiny_config

pytestmark = pytest.mark.usefixtures("two_devices", "shared_programs")

KEYS = {
    "step", "loss", "loss_image", "loss_text", "lr", "grad_norm", "param_norm",
    "images_per_s", "step_time_s", "data_wait_fraction", "data_queue_depth", "mfu",
}  # fmt: skip


def unevaluated(workdir: Path, **changes) -> list[str]:
    """Arguments of a run without evaluation."""
    return tiny_arguments(workdir, eval__sources={}, **changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """An uninterrupted run of 20 steps, evaluated at 10 and 20."""
    workdir = tmp_path_factory.mktemp("straight")
    assert main(tiny_arguments(workdir, train__eval_every=10, train__tensorboard=True)) == 0
    return workdir


def test_run_when_finished_then_metrics_have_their_keys_and_the_best_is_known(straight):
    training, evaluation = read_metrics(straight)
    assert [line["step"] for line in training] == [5, 10, 15, 20]
    assert all(set(line) >= KEYS for line in training)
    # The peak FLOP/s of a CPU are unknown.
    assert all(line["mfu"] is None and line["images_per_s"] > 0 for line in training)
    assert training[-1]["loss"] < training[0]["loss"]
    assert training[0]["images/photo"] + training[0]["images/other"] == 5 * 16
    assert [line["epochs/photo"] for line in training] == [steps * 8 / 209 for steps in (5, 10, 15, 20)]
    assert all(0 <= line["data_queue_depth"] <= 2 for line in training)
    assert [line["step"] for line in evaluation] == [10, 20]
    for line in evaluation:
        assert {"eval_loss", "eval_loss_image", "eval_loss_text", "eval_loss_text_full_prefix"} < set(line)
        assert line["eval_loss"] == pytest.approx(line["eval_loss_text"] + 0.4 * line["eval_loss_image"])
    reader = CheckpointReader(straight)
    best = min(evaluation, key=lambda line: line["eval_loss"])
    assert reader.best_step() == best["step"] and reader.meta(best["step"])["eval_loss"] == best["eval_loss"]
    assert (straight / "config.txt").is_file() and list((straight / "tensorboard").iterdir())


def test_run_when_started_again_then_says_it_is_finished_and_changes_nothing(straight, capsys):
    before = (straight / "metrics.jsonl").read_text()
    assert main(tiny_arguments(straight, train__eval_every=10, train__tensorboard=True)) == 0
    assert "already finished" in capsys.readouterr().out
    assert (straight / "metrics.jsonl").read_text() == before


def test_run_when_stopped_and_resumed_twice_then_bitwise_the_straight_run(straight, tmp_path):
    for steps in (7, 13, 20):
        assert main(unevaluated(tmp_path, train__steps=steps, train__save_every=100)) == 0
    assert_bitwise(saved_state(straight, 20), saved_state(tmp_path, 20))
    for name in ("loss", "epochs/other"):
        ours, theirs = ({line["step"]: line[name] for line in read_metrics(path)[0]} for path in (tmp_path, straight))
        assert {step: ours[step] for step in theirs} == theirs


def test_run_when_resumed_on_another_mesh_then_the_same_examples_and_nearly_the_same_numbers(straight, tmp_path):
    assert main(unevaluated(tmp_path, train__steps=10)) == 0
    assert main(unevaluated(tmp_path, mesh__data=1, mesh__fsdp=2, model__layers="loop")) == 0
    ours, theirs = ({line["step"]: line for line in read_metrics(path)[0]} for path in (tmp_path, straight))
    for step in (15, 20):
        assert ours[step]["count_image"] == theirs[step]["count_image"]  # The same prefixes.
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-4)  # Ten steps of other rounding.


def test_batch_when_taken_after_a_resume_then_equals_that_of_the_straight_run():
    config = tiny_config()
    with (
        pipeline.training_batches(config, range, 0) as straight,
        pipeline.training_batches(config, range, 10) as later,
    ):
        for _ in range(10):
            next(straight)
        one, other = next(straight), next(later)
    assert one.step == other.step == 10
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])


def test_train_step_when_20_steps_run_then_compiled_once(tmp_path, caplog):
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING, logger="jax"):
            # No other run of this file has this batch size: compiled programs are shared between runs.
            assert main(unevaluated(tmp_path, train__log_every=1, data__batch_size=24)) == 0
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert sum("train_step" in message for message in compiled) == 1
    assert len(read_metrics(tmp_path)[0]) == 20


def test_run_when_the_loss_is_not_finite_then_stops_naming_the_step_and_keeps_the_checkpoint(tmp_path, capsys):
    assert main(unevaluated(tmp_path, train__steps=10)) == 0
    kept = saved_state(tmp_path, 10)
    # The learning rate may not change on a resume, so the test sets one parameter of the state to NaN.
    config = tiny_config(train__steps=10)
    setup = build_setup(config)
    with Checkpointer(tmp_path, 3) as checkpointer:
        state = checkpointer.restore(10, setup.abstract_state)
        begin = state.params["decoder"]["begin"]
        state.params["decoder"]["begin"] = jax.device_put(np.full(begin.shape, np.nan, np.float32), begin.sharding)
        checkpointer.save(11, state.replace(step=state.step + 1), config)
    capsys.readouterr()
    assert main(unevaluated(tmp_path, train__save_every=1)) == 3
    message = capsys.readouterr().err
    assert "loss is nan at step 14, the last of 3 non-finite steps in a row" in message
    assert "newest checkpoint is that of step 11" in message and "--replay 14" in message
    assert CheckpointReader(tmp_path).steps() == [10, 11]
    assert_bitwise(saved_state(tmp_path, 10), kept)
    assert all(line["step"] <= 11 for line in read_metrics(tmp_path)[0])


def test_run_when_some_records_are_bad_then_counted_named_and_replaced(tmp_path):
    folder = broken_source(tmp_path / "data", good=50, bad=1)
    workdir = tmp_path / "run"
    assert main(unevaluated(workdir, data__sources__photo=folder, data__max_bad_fraction=0.5)) == 0
    counts = [line.get("bad/photo/undecodable_image", 0) for line in read_metrics(workdir)[0]]
    lines = [json.loads(line) for line in (workdir / "bad_records.jsonl").read_text().splitlines()]
    assert sum(counts) == len(lines) > 0
    assert {(line["source"], line["key"], line["reason"]) for line in lines} == {
        ("photo", "bad-0", "undecodable_image")
    }


def test_run_when_too_many_records_are_bad_then_stops_by_the_guard(tmp_path, capsys):
    folder = broken_source(tmp_path / "data", good=4, bad=4)
    assert main(tiny_arguments(tmp_path / "run", data__sources__photo=folder)) == 3
    message = capsys.readouterr().err
    assert "could not be used" in message and "data.max_bad_fraction=0.01" in message
    assert (tmp_path / "run/bad_records.jsonl").is_file()


def test_config_when_saved_with_a_checkpoint_then_the_run_is_known_from_it(straight):
    meta = CheckpointReader(straight).meta(20)
    assert meta["config"] == config_to_dict(tiny_config(train__eval_every=10, train__tensorboard=True))


def test_loop_when_it_runs_then_its_order_is_the_contract(tmp_path, monkeypatch):
    """The order is: dispatch i, then read i-1; where i is due: read i, evaluate, save."""
    events = []

    def recorded(owner, name, describe):
        original = getattr(owner, name)

        def call(self, *args, **kwargs):
            event = describe(args)
            events.append(event) if event else None
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    compile_step = TrainSetup.compile_step

    def counted_steps(setup, shape):
        step = compile_step(setup, shape)
        numbers = itertools.count(1)
        return lambda *args: (events.append(f"dispatch {next(numbers)}"), step(*args))[1]

    monkeypatch.setattr(TrainSetup, "compile_step", counted_steps)
    recorded(StepMetrics, "read", lambda args: f"read {args[0].number}")
    recorded(Evaluator, "evaluate", lambda args: f"evaluate {args[0]}")
    recorded(Checkpointer, "save", lambda args: f"save {args[0]}")
    assert main(tiny_arguments(tmp_path, train__steps=4, train__eval_every=2, train__save_every=2)) == 0
    assert events == [
        "dispatch 1",
        *("dispatch 2", "read 1", "read 2", "evaluate 2", "save 2"),
        "dispatch 3",
        *("dispatch 4", "read 3", "read 4", "evaluate 4", "save 4"),
    ]


def test_loop_when_a_step_is_running_then_the_next_batch_is_handed_to_the_devices_meanwhile(tmp_path, monkeypatch):
    compile_step, to_devices = TrainSetup.compile_step, pipeline.to_devices
    running, transferred = [], []

    @jax.jit
    def delayed(loss):
        """The loss, after some matrix products."""
        matrix = jax.lax.fori_loop(0, 100, lambda _, x: x @ x, jnp.zeros((512, 512)) * loss)
        return loss + matrix[0, 0]

    def long_step(setup, shape):
        step = compile_step(setup, shape)

        def call(*args):
            state, metrics = step(*args)
            metrics["loss"] = delayed(metrics["loss"].addressable_data(0))
            running.append(metrics["loss"])
            return state, metrics

        return call

    def watched(arrays, *args, **kwargs):
        batch = to_devices(arrays, *args, **kwargs)
        jax.block_until_ready(batch)  # The transfer is complete, not only started.
        if "source" in batch and running:
            transferred.append(not running[-1].is_ready())
        return batch

    monkeypatch.setattr(TrainSetup, "compile_step", long_step)
    monkeypatch.setattr(pipeline, "to_devices", watched)
    arguments = unevaluated(tmp_path, train__steps=5, train__save_every=0)
    assert main(arguments) == 0
    assert transferred == [True] * 4


def test_loop_when_it_starves_then_says_what_to_change(tmp_path, monkeypatch, capsys):
    slow = partial(SlowSource, delay_s=0.03, journal=tmp_path / "journal")
    monkeypatch.setattr("aimv2_jax.data.sources.Source", slow)
    assert main(unevaluated(tmp_path / "run", data__read_threads=1, train__steps=8, train__log_every=2)) == 0
    output = capsys.readouterr().out
    assert output.count("steps wait for data") == 1
    assert "slowest is read" in output and "raise data.read_threads from 1, or data.workers from 0" in output


def test_loop_when_steps_are_slow_then_they_do_not_wait_for_data(tmp_path, monkeypatch):
    """Batches of 0.15 s are built during steps of 0.3 s; one after the other, a third of the time would be waiting."""
    compile_step, batch_arrays = TrainSetup.compile_step, Tokenizer.batch_arrays

    def slow_step(setup, shape):
        step = compile_step(setup, shape)
        return lambda *args: (time.sleep(0.3), step(*args))[1]

    monkeypatch.setattr(TrainSetup, "compile_step", slow_step)
    monkeypatch.setattr(Tokenizer, "batch_arrays", lambda *args: (time.sleep(0.15), batch_arrays(*args))[1])
    assert main(unevaluated(tmp_path, train__steps=8, train__log_every=4)) == 0
    assert read_metrics(tmp_path)[0][-1]["data_wait_fraction"] < 0.1


def test_run_when_another_is_at_work_in_the_workdir_then_refused(tmp_path, capsys):
    with trainer.lock_workdir(tmp_path):
        assert main(tiny_arguments(tmp_path)) == 2
    assert "in use by another run" in capsys.readouterr().err


def test_run_when_the_held_out_set_cannot_be_used_then_refused_and_no_best(tmp_path, capsys):
    folder = broken_source(tmp_path / "data", good=0, bad=3)
    changes = {"eval__sources__photo": folder, "eval__sources__other": folder, "train__steps": 2}
    assert main(tiny_arguments(tmp_path / "run", **changes)) == 2
    assert "nothing to measure the image loss on" in capsys.readouterr().err
    assert CheckpointReader(tmp_path / "run").best_step() is None


def test_run_when_some_held_out_records_are_bad_then_left_out_counted_and_named(tmp_path):
    folder = broken_source(tmp_path / "data", good=3, bad=1)
    assert main(tiny_arguments(tmp_path / "run", eval__sources__photo=folder, train__steps=2)) == 0
    [line] = read_metrics(tmp_path / "run")[1]
    assert line["eval_bad_records"] == 2  # Once per caption type.
    names = [json.loads(line)["key"] for line in (tmp_path / "run/bad_records.jsonl").read_text().splitlines()]
    assert names == ["bad-0", "bad-0"]


def signalled(monkeypatch, step: int, numbers: list[int]) -> None:
    """Raises the signals in this process at that step of a new run."""
    add, steps = ExampleCounter.add, itertools.count(1)

    def counted(*args):
        if next(steps) == step:
            for number in numbers:
                signal.raise_signal(number)
        return add(*args)

    monkeypatch.setattr(ExampleCounter, "add", counted)


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGHUP]])
def test_run_when_asked_to_stop_then_saves_that_step_ends_with_75_and_goes_on_exactly(
    straight, tmp_path, monkeypatch, capsys, numbers
):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    before, while_compiling, compile_step = handlers(), [], TrainSetup.compile_step
    with monkeypatch.context() as patched:
        # While compiling there is nothing to save: a SIGTERM ends the process, also in C code.
        patched.setattr(
            TrainSetup, "compile_step", lambda *args: (while_compiling.append(handlers()), compile_step(*args))[1]
        )
        signalled(patched, 7, numbers)
        assert main(unevaluated(tmp_path, train__save_every=100)) == errors.EXIT_RETRY
    assert "stopped on request: step 7 of 20 is saved" in capsys.readouterr().out
    assert [before] == while_compiling and handlers() == before
    assert CheckpointReader(tmp_path).steps() == [7]
    assert main(unevaluated(tmp_path, train__save_every=100)) == 0
    assert_bitwise(saved_state(straight, 20), saved_state(tmp_path, 20))


def test_run_when_the_clock_is_set_back_then_said_and_its_numbers_are_those_of_the_straight_run(
    straight, tmp_path, monkeypatch, capsys
):
    arguments = unevaluated(tmp_path)
    with monkeypatch.context() as patched:
        signalled(patched, 7, [signal.SIGTERM])
        assert main(arguments) == errors.EXIT_RETRY
    wall_clock, back_s = time.time, iter(range(86_400, 10**9, 60))  # A day, and a minute more at every call.
    monkeypatch.setattr(time, "time", lambda: wall_clock() - next(back_s))
    monkeypatch.setattr(trainer, "EventLog", partial(trainer.EventLog, wall=time.time))
    capsys.readouterr()
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert re.search(r"the clock of this machine is [\d,]+ s behind the last line of the run's events\.jsonl", output)
    assert_bitwise(saved_state(straight, 20), saved_state(tmp_path, 20))
    assert [line["step"] for line in read_metrics(tmp_path)[0]] == [5, 10, 15, 20]
    assert CheckpointReader(tmp_path).steps() == CheckpointReader(straight).steps()
    report = compute_goodput(read_events(tmp_path))
    assert report.kept_steps == 20 and min(report.seconds.values()) >= 0


def test_run_when_interrupted_twice_then_ends_at_once_with_130(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "_DUPLICATE_SIGNAL_S", 0.0)
    signalled(monkeypatch, 7, [signal.SIGINT, signal.SIGINT])
    assert main(unevaluated(tmp_path, train__save_every=100)) == errors.EXIT_INTERRUPTED
    assert CheckpointReader(tmp_path).steps() == []


def test_run_when_asked_to_stop_at_its_last_step_then_it_is_finished(tmp_path, monkeypatch):
    signalled(monkeypatch, 4, [signal.SIGTERM])
    # Without evaluation, eval.batch_size need not be a multiple of the devices.
    assert main(unevaluated(tmp_path, train__steps=4, eval__batch_size=13)) == 0


@pytest.mark.parametrize(("steps", "code"), [(20, errors.EXIT_RETRY), (5, errors.EXIT_FINISHED)])
def test_run_when_asked_to_stop_in_an_evaluation(tmp_path, monkeypatch, capsys, steps, code):
    """The evaluation is abandoned after the current batch; the step is saved, also if it is the last one."""
    batches, taken = pipeline.evaluation_batches, []

    def signalling(*args):
        for batch in batches(*args):
            taken.append(batch)
            signal.raise_signal(signal.SIGTERM) if len(taken) == 2 else None
            yield batch

    monkeypatch.setattr(pipeline, "evaluation_batches", signalling)
    changes = dict(train__steps=steps, train__eval_every=5, train__save_every=100, eval__batch_size=8)
    assert main(tiny_arguments(tmp_path, **changes)) == code
    assert len(taken) == 2 and read_metrics(tmp_path)[1] == []
    output, finished = capsys.readouterr().out, code == errors.EXIT_FINISHED
    assert "asked to stop: the evaluation of step 5 is abandoned" in output
    assert CheckpointReader(tmp_path).steps() == [5]
    command = f"To evaluate it: python -m aimv2_jax.eval.heldout --checkpoint={tmp_path}:5\n"
    assert (f"step 5 is not evaluated, since the run was asked to stop. {command}" in output) == finished
    assert ("before the last step was evaluated" in read_events(tmp_path)[-1].values["why"]) == finished


def test_run_when_a_device_fails_twice_at_one_step(tmp_path, monkeypatch, capsys):
    """With the error of a compiled step (tests/resilience/test_device_errors.py): 75, then 4; checkpoints are kept."""
    compile_step = TrainSetup.compile_step

    def failing(setup, shape):
        step = compile_step(setup, shape)

        def call(*args):
            if int(args[0].step) == 6:
                raise jax.errors.JaxRuntimeError("INTERNAL: Core halted unexpectedly:")
            return step(*args)

        return call

    monkeypatch.setattr(TrainSetup, "compile_step", failing)
    arguments = unevaluated(tmp_path, train__save_every=5)
    for code, again in ((errors.EXIT_RETRY, ""), (errors.EXIT_HUNG, ", as before at this step")):
        assert main(arguments) == code
        assert f"failed at step 7{again}: INTERNAL: Core halted" in capsys.readouterr().err
    assert CheckpointReader(tmp_path).steps() == [5]
    last = read_events(tmp_path)[-1]
    assert (last.kind, last.values["code"]) == ("stop", errors.EXIT_HUNG)


@pytest.mark.parametrize(("owner", "name"), [(TrainSetup, "init"), (ExampleCounter, "__init__")])
def test_start_when_a_device_fails_twice(tmp_path, monkeypatch, capsys, owner, name):
    """An error of the devices anywhere before the first step asks for a restart, and a second one for help."""

    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: Core halted unexpectedly:")

    monkeypatch.setattr(owner, name, fail)
    for code in (errors.EXIT_RETRY, errors.EXIT_HUNG):
        assert main(unevaluated(tmp_path)) == code
        assert "failed at step 0" in capsys.readouterr().err
    assert [event.kind for event in read_events(tmp_path) if event.kind != "start"] == ["device_failure"] * 2


def test_start_when_other_versions_are_installed(tmp_path, capsys):
    start = dict(processes=1, devices=8, device_kind="cpu", config="ab", steps=4, save_every=2)
    with EventLog(tmp_path) as events:
        events.write("start", 0, **start, versions={"jax": "0.1\x1b", "flax": "2", "gone": "1"})
        events.write("save", 2, seconds=0.5)
        trainer._log_version_changes(events.last("start"), {"jax": "0.2", "flax": "2", "new": "1"})
        output = capsys.readouterr().out
        expected = "package versions changed since the last start of this run: jax 0.2 (0.1\\x1b before)\n"
        assert output.endswith(expected) and output.count("\n") == 1
        for versions in ({"jax": "0.2"}, [1]):
            events.write("start", 2, **start, versions=versions)
            trainer._log_version_changes(events.last("start"), {"jax": "0.2"})
    trainer._log_version_changes(EventLog(tmp_path / "new").last("start"), {"jax": "0.2"})
    assert capsys.readouterr().out == ""


def test_run_when_it_hung_before_what_it_saves(tmp_path):
    """Hangs up to the saved step no longer count; later ones do."""
    (tmp_path / "hangs").mkdir()
    for name in ("00000000-00000-start", "00000003-00001-step", "00000009-00000-data"):
        (tmp_path / f"hangs/{name}.txt").touch()
    assert main(unevaluated(tmp_path, train__steps=4)) == 0
    assert RepeatedFailures(tmp_path, 0).exit_code(0) == errors.EXIT_RETRY
    assert RepeatedFailures(tmp_path, 0).exit_code(3) == errors.EXIT_RETRY
    assert RepeatedFailures(tmp_path, 0).exit_code(9) == errors.EXIT_HUNG


def test_metrics_when_a_save_makes_steps_wait_then_the_next_line_says_how_long(tmp_path, monkeypatch):
    save = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save", lambda *args, **kwargs: (time.sleep(0.5), save(*args, **kwargs)))
    changes = dict(train__steps=9, train__save_every=3, train__log_every=2)
    assert main(unevaluated(tmp_path, **changes)) == 0
    stalls = {line["step"]: line["save_stall_s"] for line in read_metrics(tmp_path)[0]}
    assert stalls.keys() == {2, 4, 6, 8, 9}
    assert stalls[2] == stalls[6] == stalls[9] == 0
    assert stalls[4] >= 0.5 and stalls[8] >= 0.5  # From the saves of steps 3 and 6.


@pytest.mark.parametrize(
    ("setting", "platform", "folder"),
    [("workdir", "tpu", "/w/compiled"), ("workdir", "cpu", None), ("/c", "cpu", "/c"), (None, "tpu", None)],
)
def test_compiled_code_when_it_is_kept_then_in_its_folder(setting, platform, folder):
    assert trainer.cache_folder(setting, Path("/w"), platform) == folder


@pytest.mark.parametrize(("folder", "autotuned"), [("/w/compiled", True), ("gs://b/w/compiled", False)])
def test_autotune_cache_when_compiled_code_is_kept(folder, autotuned):
    """XLA writes this cache by file calls: with a bucket's address, jax would create a local folder `gs:`."""
    from jax._src import compiler

    folder_before = jax.config.jax_compilation_cache_dir
    caches_before = jax.config.jax_persistent_cache_enable_xla_caches
    try:
        trainer._use_compilation_cache(folder)
        options = compiler.get_compile_options(1, 1)
        build_options = options.executable_build_options  # Both objects stay alive: the values point into them.
        autotune_folder = build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir
        assert jax.config.jax_compilation_cache_dir == folder
        assert autotune_folder.startswith("/w/compiled/") == autotuned == bool(autotune_folder)
    finally:
        jax.config.update("jax_compilation_cache_dir", folder_before)
        jax.config.update("jax_persistent_cache_enable_xla_caches", caches_before)


def test_run_when_the_workdir_is_not_that_of_process_0_then_refused(tmp_path, monkeypatch):
    """As process 1 of two processes whose hosts share no disk."""
    monkeypatch.setattr(jax, "process_index", lambda *args: 1)
    with pytest.raises(UserError, match="--workdir is another folder here than on process 0's host"):
        trainer.train(tiny_config(), tmp_path, None)
