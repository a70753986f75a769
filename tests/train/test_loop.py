"""The loop from outside, through `aimv2_jax.main` as a user starts it: resumed, killed, guarded, and what it writes."""

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
from programs import shared_programs  # noqa: F401
from runs import assert_bitwise, broken_source, saved_state
from slow_reads import SlowSource
from tiny import tiny_arguments, tiny_config

from aimv2_jax import errors
from aimv2_jax.config import config_to_dict
from aimv2_jax.data import pipeline
from aimv2_jax.errors import UserError
from aimv2_jax.main import main
from aimv2_jax.train import loop, stopping
from aimv2_jax.train.checkpoint import Checkpointer, CheckpointReader
from aimv2_jax.train.events import Events, read_events
from aimv2_jax.train.goodput import tell
from aimv2_jax.train.interruptions import Interruptions
from aimv2_jax.train.metrics import read_metrics
from aimv2_jax.train.program import Program, build_program
from aimv2_jax.train.run import Run
from aimv2_jax.train.tally import Tally

pytestmark = pytest.mark.usefixtures("two_devices", "shared_programs")

KEYS = {
    "step", "loss", "loss_image", "loss_text", "lr", "grad_norm", "param_norm",
    "images_per_s", "step_time_s", "data_wait_fraction", "data_queue_depth", "mfu",
}  # fmt: skip


def unevaluated(workdir: Path, **changes) -> list[str]:
    """Arguments of a run that measures nothing on the held-out set."""
    return tiny_arguments(workdir, eval__sources={}, **changes)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """20 steps in one go, evaluated at 10 and 20."""
    workdir = tmp_path_factory.mktemp("straight")
    assert main(tiny_arguments(workdir, train__eval_every=10, train__tensorboard=True)) == 0
    return workdir


def test_run_when_finished_then_metrics_have_their_keys_and_the_best_is_known(straight):
    training, evaluation = read_metrics(straight)
    assert [line["step"] for line in training] == [5, 10, 15, 20]
    assert all(set(line) >= KEYS for line in training)
    assert all(line["mfu"] is None and line["images_per_s"] > 0 for line in training)  # a CPU's peak is unknown
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
        assert ours[step]["count_image"] == theirs[step]["count_image"]  # the same prefixes
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-4)  # ten steps of other rounding


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
            # A batch that no other run of this file has: its programs are shared.
            assert main(unevaluated(tmp_path, train__log_every=1, data__batch_size=24)) == 0
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert sum("train_step" in message for message in compiled) == 1
    assert len(read_metrics(tmp_path)[0]) == 20


def test_run_when_the_loss_is_not_finite_then_stops_naming_the_step_and_keeps_the_checkpoint(tmp_path, capsys):
    assert main(unevaluated(tmp_path, train__steps=10)) == 0
    kept = saved_state(tmp_path, 10)
    # The rate may not change on a resume, so the state itself is spoilt: one parameter that is not a number.
    config = tiny_config(train__steps=10)
    program = build_program(config)
    with Checkpointer(tmp_path, 3) as checkpointer:
        state = checkpointer.restore(10, program.abstract_state)
        begin = state.params["decoder"]["begin"]
        state.params["decoder"]["begin"] = jax.device_put(np.full(begin.shape, np.nan, np.float32), begin.sharding)
        checkpointer.save(11, state.replace(step=state.step + 1), config)
    capsys.readouterr()
    assert main(unevaluated(tmp_path, train__save_every=1)) == 3
    message = capsys.readouterr().err
    assert "loss is nan at step 14, and so in 3 steps in a row" in message
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
    """Dispatch i, then read i-1; where i is due: read i, evaluate, save."""
    events = []

    def recorded(owner, name, say):
        plain = getattr(owner, name)

        def call(self, *args, **kwargs):
            event = say(args)
            events.append(event) if event else None
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    compile_step = Program.compile_step

    def counted_steps(program, shape):
        step = compile_step(program, shape)
        numbers = itertools.count(1)
        return lambda *args: (events.append(f"dispatch {next(numbers)}"), step(*args))[1]

    monkeypatch.setattr(Program, "compile_step", counted_steps)
    recorded(Run, "_read", lambda args: args[0] and f"read {args[0].number}")
    recorded(Run, "_evaluate", lambda args: f"evaluate {args[0]}")
    recorded(Checkpointer, "save", lambda args: f"save {args[0]}")
    assert main(tiny_arguments(tmp_path, train__steps=4, train__eval_every=2, train__save_every=2)) == 0
    assert events == [
        "dispatch 1",
        *("dispatch 2", "read 1", "read 2", "evaluate 2", "save 2"),
        "dispatch 3",
        *("dispatch 4", "read 3", "read 4", "evaluate 4", "save 4"),
    ]


def test_loop_when_a_step_is_running_then_the_next_batch_is_handed_to_the_devices_meanwhile(tmp_path, monkeypatch):
    compile_step, place = Program.compile_step, pipeline.to_devices
    running, handed_over = [], []

    @jax.jit
    def known_late(loss):
        """The loss, some matrix products later."""
        matrix = jax.lax.fori_loop(0, 100, lambda _, x: x @ x, jnp.zeros((512, 512)) * loss)
        return loss + matrix[0, 0]

    def long_step(program, shape):
        step = compile_step(program, shape)

        def call(*args):
            state, metrics = step(*args)
            metrics["loss"] = known_late(metrics["loss"].addressable_data(0))
            running.append(metrics["loss"])
            return state, metrics

        return call

    def watched(arrays, *args, **kwargs):
        batch = place(arrays, *args, **kwargs)
        jax.block_until_ready(batch)  # Wholly there, not only on its way.
        if "source" in batch and running:
            handed_over.append(not running[-1].is_ready())
        return batch

    monkeypatch.setattr(Program, "compile_step", long_step)
    monkeypatch.setattr(pipeline, "to_devices", watched)
    arguments = unevaluated(tmp_path, train__steps=5, train__save_every=0)
    assert main(arguments) == 0
    assert handed_over == [True] * 4


def test_loop_when_it_starves_then_says_what_to_change(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "Source", partial(SlowSource, delay_s=0.05, journal=tmp_path / "journal"))
    arguments = unevaluated(tmp_path / "run", data__read_threads=1)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("steps wait for data") == 1
    assert "slowest is read" in said and "raise data.read_threads from 1, or data.workers from 0" in said


def test_loop_when_steps_are_slow_then_they_do_not_wait_for_data(tmp_path, monkeypatch):
    compile_step = Program.compile_step

    def slow_step(program, shape):
        step = compile_step(program, shape)
        return lambda *args: (time.sleep(0.3), step(*args))[1]

    monkeypatch.setattr(Program, "compile_step", slow_step)
    assert main(unevaluated(tmp_path, train__steps=8, train__log_every=4)) == 0
    assert read_metrics(tmp_path)[0][-1]["data_wait_fraction"] < 0.02


def test_run_when_another_is_at_work_in_the_workdir_then_refused(tmp_path, capsys):
    with loop._claimed(tmp_path):
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
    assert line["eval_bad_records"] == 2  # once a caption kind
    names = [json.loads(line)["key"] for line in (tmp_path / "run/bad_records.jsonl").read_text().splitlines()]
    assert names == ["bad-0", "bad-0"]


def signalled(monkeypatch, step: int, numbers: list[int]) -> None:
    """Sends this process the signals while it is at that step of a run from the start."""
    add, steps = Tally.add, itertools.count(1)

    def counted(*args):
        if next(steps) == step:
            for number in numbers:
                signal.raise_signal(number)
        return add(*args)

    monkeypatch.setattr(Tally, "add", counted)


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGHUP]])
def test_run_when_asked_to_stop_then_saves_that_step_ends_with_75_and_goes_on_exactly(
    straight, tmp_path, monkeypatch, capsys, numbers
):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    before, while_compiling, compile_step = handlers(), [], Program.compile_step
    with monkeypatch.context() as patched:
        # Nothing could be saved yet: a SIGTERM ends the process, in whatever call of C, and its parent says so.
        patched.setattr(
            Program, "compile_step", lambda *args: (while_compiling.append(handlers()), compile_step(*args))[1]
        )
        signalled(patched, 7, numbers)
        assert main(unevaluated(tmp_path, train__save_every=100)) == errors.EXIT_AGAIN
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
        assert main(arguments) == errors.EXIT_AGAIN
    right, back_s = time.time, iter(range(86_400, 10**9, 60))  # A day, and a minute more at every look.
    monkeypatch.setattr(time, "time", lambda: right() - next(back_s))
    monkeypatch.setattr(loop, "Events", partial(loop.Events, wall=time.time))
    capsys.readouterr()
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert re.search(r"the clock of this machine is [\d,]+ s behind the last line of the run's events\.jsonl", said)
    assert_bitwise(saved_state(straight, 20), saved_state(tmp_path, 20))
    assert [line["step"] for line in read_metrics(tmp_path)[0]] == [5, 10, 15, 20]
    assert CheckpointReader(tmp_path).steps() == CheckpointReader(straight).steps()
    story = tell(read_events(tmp_path))
    assert story.kept_steps == 20 and min(story.seconds.values()) >= 0


def test_run_when_interrupted_twice_then_ends_at_once_with_130(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_SAME_S", 0.0)
    signalled(monkeypatch, 7, [signal.SIGINT, signal.SIGINT])
    assert main(unevaluated(tmp_path, train__save_every=100)) == errors.EXIT_INTERRUPTED
    assert CheckpointReader(tmp_path).steps() == []


def test_run_when_asked_to_stop_at_its_last_step_then_it_is_finished(tmp_path, monkeypatch):
    signalled(monkeypatch, 4, [signal.SIGTERM])
    # Where nothing is evaluated, 13 rows for 2 devices are no mistake.
    assert main(unevaluated(tmp_path, train__steps=4, eval__batch_size=13)) == 0


@pytest.mark.parametrize(("steps", "code"), [(20, errors.EXIT_AGAIN), (5, errors.EXIT_FINISHED)])
def test_run_when_asked_to_stop_in_an_evaluation(tmp_path, monkeypatch, capsys, steps, code):
    """It is given up after the batch that is computed; the step is saved, the last one, too."""
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
    said, finished = capsys.readouterr().out, code == errors.EXIT_FINISHED
    assert "asked to stop: the evaluation of step 5 is given up" in said
    assert CheckpointReader(tmp_path).steps() == [5]
    command = f"python -m aimv2_jax.eval.heldout --checkpoint={tmp_path}:5 does that"
    assert (f"step 5 is not evaluated, since the run was asked to stop: {command}" in said) == finished
    assert ("before the last step was evaluated" in read_events(tmp_path)[-1].values["why"]) == finished


def test_run_when_a_device_fails_twice_at_one_step(tmp_path, monkeypatch, capsys):
    """As a compiled step raises it (tests/train/test_device_errors.py): 75, then 4; what was saved stays."""
    compile_step = Program.compile_step

    def failing(program, shape):
        step = compile_step(program, shape)

        def call(*args):
            if int(args[0].step) == 6:
                raise jax.errors.JaxRuntimeError("INTERNAL: Core halted unexpectedly:")
            return step(*args)

        return call

    monkeypatch.setattr(Program, "compile_step", failing)
    arguments = unevaluated(tmp_path, train__save_every=5)
    for code, again in ((errors.EXIT_AGAIN, ""), (errors.EXIT_HUNG, ", as at this step before")):
        assert main(arguments) == code
        assert f"failed at step 7{again}: INTERNAL: Core halted" in capsys.readouterr().err
    assert CheckpointReader(tmp_path).steps() == [5]
    last = read_events(tmp_path)[-1]
    assert (last.kind, last.values["code"]) == ("stop", errors.EXIT_HUNG)


def test_start_when_a_device_fails_twice(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: Core halted unexpectedly:")

    monkeypatch.setattr(Program, "init", fail)
    for code in (errors.EXIT_AGAIN, errors.EXIT_HUNG):
        assert main(unevaluated(tmp_path)) == code
        assert "failed at step 0" in capsys.readouterr().err
    assert [event.kind for event in read_events(tmp_path)] == ["device_failure"] * 2


def test_start_when_other_versions_are_installed(tmp_path, capsys):
    start = dict(processes=1, devices=8, device_kind="cpu", config="ab", steps=4, save_every=2)
    with Events(tmp_path) as events:
        events.write("start", 0, **start, versions={"jax": "0.1\x1b", "flax": "2", "gone": "1"})
        events.write("save", 2, seconds=0.5)
        loop._tell_versions(events.last("start"), {"jax": "0.2", "flax": "2", "new": "1"})
        said = capsys.readouterr().out
        assert said.endswith("other versions were installed: jax 0.2 (0.1\\x1b before)\n") and said.count("\n") == 1
        for versions in ({"jax": "0.2"}, [1]):
            events.write("start", 2, **start, versions=versions)
            loop._tell_versions(events.last("start"), {"jax": "0.2"})
    loop._tell_versions(Events(tmp_path / "new").last("start"), {"jax": "0.2"})
    assert capsys.readouterr().out == ""


def test_run_when_it_hung_before_what_it_saves(tmp_path):
    """Those hangs count no more; where nothing new is saved, they do."""
    (tmp_path / "hangs").mkdir()
    for name in ("00000000-00000-start", "00000003-00001-step", "00000009-00000-data"):
        (tmp_path / f"hangs/{name}.txt").touch()
    assert main(unevaluated(tmp_path, train__steps=4)) == 0
    assert Interruptions(tmp_path, 0).exit_code(0) == errors.EXIT_AGAIN
    assert Interruptions(tmp_path, 0).exit_code(3) == errors.EXIT_AGAIN
    assert Interruptions(tmp_path, 0).exit_code(9) == errors.EXIT_HUNG


def test_metrics_when_a_save_makes_steps_wait_then_the_next_line_says_how_long(tmp_path, monkeypatch):
    save = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save", lambda *args, **kwargs: (time.sleep(0.5), save(*args, **kwargs)))
    changes = dict(train__steps=9, train__save_every=3, train__log_every=2)
    assert main(unevaluated(tmp_path, **changes)) == 0
    stalls = {line["step"]: line["save_stall_s"] for line in read_metrics(tmp_path)[0]}
    assert stalls.keys() == {2, 4, 6, 8, 9}
    assert stalls[2] == stalls[6] == stalls[9] == 0
    assert stalls[4] >= 0.5 and stalls[8] >= 0.5  # Of the saves of steps 3 and 6.


@pytest.mark.parametrize(
    ("setting", "platform", "folder"),
    [("workdir", "tpu", "/w/compiled"), ("workdir", "cpu", None), ("/c", "cpu", "/c"), (None, "tpu", None)],
)
def test_compiled_code_when_it_is_kept_then_in_its_folder(setting, platform, folder):
    assert loop.cache_folder(setting, Path("/w"), platform) == folder


@pytest.mark.parametrize(("folder", "autotuned"), [("/w/compiled", True), ("gs://b/w/compiled", False)])
def test_autotune_cache_when_compiled_code_is_kept(folder, autotuned):
    """XLA itself writes that one, by file calls: what jax would make of a bucket's address is a local folder `gs:`."""
    from jax._src import compiler

    kept, caches = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_enable_xla_caches
    try:
        loop._keep_compiled(folder)
        options = compiler.get_compile_options(1, 1)
        build_options = options.executable_build_options  # Both are kept: what they give points into them.
        autotune_folder = build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir
        assert jax.config.jax_compilation_cache_dir == folder
        assert autotune_folder.startswith("/w/compiled/") == autotuned == bool(autotune_folder)
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
        jax.config.update("jax_persistent_cache_enable_xla_caches", caches)


def test_run_when_the_workdir_is_not_that_of_process_0_then_refused(tmp_path, monkeypatch):
    """Of process 1 of two whose hosts share no disk."""
    monkeypatch.setattr(jax, "process_index", lambda *args: 1)
    with pytest.raises(UserError, match="--workdir is another folder here than on process 0's host"):
        loop.train(tiny_config(), tmp_path, None)
