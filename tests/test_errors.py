"""Tests of error messages and exit codes of the commands."""

from __future__ import annotations

import errno
import os

import pytest

from aimv2_jax.errors import EXIT_GUARD, EXIT_INTERRUPTED, EXIT_USER, TrainingAborted, UserError, cli_main


@cli_main
def fail(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_command_when_the_system_refuses_a_file_then_one_line_names_it(code, capsys):
    assert fail(OSError(code, os.strerror(code), "/there/file")) == EXIT_USER
    message = capsys.readouterr().err.strip()
    assert os.strerror(code) in message and "/there/file" in message and message.count("\n") == 0


def test_command_when_a_file_of_ours_is_missing_then_it_is_our_bug():
    with pytest.raises(FileNotFoundError):
        fail(FileNotFoundError(errno.ENOENT, "No such file or directory", "ours"))


def test_command_when_a_guard_stops_it_then_code_3(capsys):
    assert fail(TrainingAborted("loss is nan")) == EXIT_GUARD
    assert capsys.readouterr().err == "stopped: loss is nan\n"


def test_command_when_interrupted_then_one_line_and_the_code_of_shells(capsys):
    assert fail(KeyboardInterrupt()) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_message_when_the_value_is_endless_then_shortened_and_on_one_line():
    message = str(UserError("config a\nb\x1b[2J", "x" * 10_000, "Fix it"))
    assert len(message) < 400 and message.isprintable() and message.endswith("Fix it.")
