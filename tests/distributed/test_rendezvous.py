"""The rendezvous at startup: training starts only once all processes have joined, and missing ones are named."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time

import pytest

from aimv2_jax.distributed import rendezvous as rendezvous_module
from aimv2_jax.distributed.cluster import ProcessInfo
from aimv2_jax.distributed.rendezvous import SECRET, rendezvous
from aimv2_jax.errors import EXIT_USER, UserError
from aimv2_jax.version import installed_versions
from tests.helpers.package_metadata import install
from tests.helpers.several import HOST, LocalProcesses, free_port
from tests.helpers.tiny import tiny_arguments

pytestmark = pytest.mark.xdist_group("processes")


def refused(tmp_path, monkeypatch=None, **options) -> dict[int, str]:
    """Error messages of refused processes, by index; with `monkeypatch` all have a secret."""
    arguments = tiny_arguments(tmp_path / "run", processes__startup_timeout_s=3)
    if monkeypatch is not None:
        monkeypatch.setenv(SECRET, "of the run")
    with LocalProcesses(3, tmp_path / "out", arguments, **options) as several:
        codes = several.wait(60)
        errors = {index: several.output(index)[1] for index in codes}
    assert set(codes.values()) == {EXIT_USER}, errors
    assert all(line.startswith("error: ") and line.count("\n") == 1 for line in errors.values()), errors
    assert not (tmp_path / "run").exists()
    return errors


def test_start_error_missing_process(tmp_path):
    """All processes are refused if one is missing, with a message that says who joined and who did not."""
    for line in refused(tmp_path, indices=(0, 2)).values():
        assert "only 2 of 3 processes joined within 3 s" in line
        assert f"joined: 0 ({HOST}), 2 ({HOST}); missing: '1 (host unknown)'" in line


def test_start_error_missing_process_0(tmp_path):
    """Processes that miss process 0 are refused, with a message that says so."""
    for line in refused(tmp_path, indices=(1,)).values():
        assert "process 0 on 127.0.0.1 was not reached within 3 s" in line


def test_start_when_a_process_has_another_config_then_all_are_refused_at_once(tmp_path, monkeypatch):
    errors = refused(tmp_path, monkeypatch, changed={1: ["--config.seed=5"]})
    for index in (0, 1):  # Process 2 may join too late.
        assert f"process 1 on {HOST} was started differently from process 0 on {HOST}: 'config " in errors[index]


def test_start_when_a_process_has_the_other_tier(tmp_path, monkeypatch):
    """The error names both hosts and all differing versions; process 1 finds the other tier's metadata first."""
    other = {"python": "3.13", "jax": "0.12.0.1", "jaxlib": "0.12.0.1", "flax": "0.12.12"}
    if sys.version_info >= (3, 12):
        other = {"python": "3.11", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
    for name in ("jax", "jaxlib", "flax"):
        install(tmp_path / "other", name, other[name])
    setup = f"""
import platform, sys
if sys.orig_argv[-2:] == ["--process", "1"]:
    sys.path.insert(0, {str(tmp_path / "other")!r})
    platform.python_version_tuple = lambda: {(*other["python"].split("."), "0")!r}
"""
    errors, here = refused(tmp_path, monkeypatch, indices=(0, 1), setup=setup), installed_versions()
    differing = ", ".join(f"{name} {version} (process 0: {here[name]})" for name, version in other.items())
    for line in errors.values():
        assert f"process 1 on {HOST} was started differently from process 0 on {HOST}: '{differing}'. Start" in line


def test_start_when_two_processes_are_process_0_then_the_second_is_refused(tmp_path):
    errors = refused(tmp_path, indices=(0, 1), changed={1: ["--process=0"]})
    assert any("cannot listen on --coordinator" in line and "--process 0" in line for line in errors.values())


FACTS = {"numpy": "2.4.6", "config": "1f2e"}


def called(
    process: ProcessInfo, answers: dict, timeout_s: float = 20.0, secret: bytes = b"", **facts: str
) -> threading.Thread:
    """Runs the rendezvous in a thread, which stores its result in `answers`."""

    def call() -> None:
        try:
            answers[process.index] = rendezvous(process, f"host-{process.index}", FACTS | facts, timeout_s, secret)
        except UserError as error:
            answers[process.index] = error

    thread = threading.Thread(target=call)
    thread.start()
    return thread


def connected(port: int) -> socket.socket:
    """Connects a stranger to process 0, which may not listen yet."""
    deadline_s = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def close(answers: dict) -> None:
    for group in answers.values():
        for connection in group.connections.values():
            connection.close()


def test_roll_when_all_come_in_any_order_and_strangers_too_then_all_know_all_hosts(tmp_path):
    port, answers = free_port(), {}
    processes = [ProcessInfo(f"127.0.0.1:{port}", 3, index) for index in range(3)]
    threads = [called(processes[2], answers), called(processes[0], answers)]
    strangers = []
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"index": 1}\n', b"\xff\n", b""):
        strangers.append(connected(port))
        strangers[-1].sendall(words)
    threads.append(called(processes[1], answers))
    for thread in threads:
        thread.join(30)
    for stranger in strangers:
        stranger.close()
    assert all(dict(answers[index].hosts) == {0: "host-0", 1: "host-1", 2: "host-2"} for index in range(3))
    assert {index: set(answers[index].connections) for index in range(3)} == {0: {1, 2}, 1: {0}, 2: {0}}
    with socket.create_server(
        ("127.0.0.1", port)
    ):  # jax's coordinator listens there later, while the connections stay open.
        pass
    answers[1].connections[0].send({"text": "ä" * 10})
    deadline_s = time.monotonic() + 10
    while not (messages := answers[0].connections[1].receive()):
        assert time.monotonic() < deadline_s
    assert messages == [{"text": "ä" * 10}]
    close(answers)


def said_hello(**changes: object) -> bytes:
    """The hello of process 1 without a secret, with changed values."""
    return json.dumps({"index": 1, "host": "evil", "count": 2, "facts": FACTS, "proof": ""} | changes).encode()


STRANGERS = {
    "deep": b"[" * 200_000,
    "count": said_hello(count=99),
    "counts": said_hello(count=[2]),
    "huge": said_hello(count=10**400),
    "facts": said_hello(facts={"config": "another"}),
    "no-facts": said_hello(facts=None),
    "odd-facts": said_hello(facts={"config": 1}),
    "list": said_hello(index=[1]),
    "table": said_hello(index={}),
    "null": said_hello(index=None),
    "text": said_hello(index="1"),
    "beyond": said_hello(index=99),
    "negative": said_hello(index=-1),
    "bool": said_hello(index=True),
    "float": said_hello(index=1.0),
    "zero": said_hello(index=0),
    "host": said_hello(host=7, index=0),
    "proof": said_hello(proof="\u00e9"),
    "no-proof": said_hello(proof=3),
}


@pytest.mark.parametrize("secret", [b"", b"of the run"])
def test_roll_when_strangers_come(secret, capfd):
    """A stranger's message closes its own connection and does not affect the run."""
    port, answers = free_port(), {}
    first = called(ProcessInfo(f"127.0.0.1:{port}", 2, 0), answers, secret=secret)
    for words in STRANGERS.values():
        with connected(port) as stranger:
            stranger.sendall(words + b"\n")
            stranger.settimeout(10)
            while stranger.recv(1 << 16):  # A refusal may arrive before the end.
                pass
    other = called(ProcessInfo(f"127.0.0.1:{port}", 2, 1), answers, secret=secret)
    first.join(30), other.join(30)
    assert [dict(answers[index].hosts) for index in range(2)] == [{0: "host-0", 1: "host-1"}] * 2
    close(answers)
    assert "Traceback" not in capfd.readouterr().err


def test_roll_when_many_connect_and_say_nothing():
    """The oldest pending connections are closed, so that processes can join."""
    port, answers = free_port(), {}
    first = called(ProcessInfo(f"127.0.0.1:{port}", 2, 0), answers)
    strangers = [connected(port) for _ in range(100)]
    other = called(ProcessInfo(f"127.0.0.1:{port}", 2, 1), answers)
    first.join(30), other.join(30)
    assert dict(answers[1].hosts) == {0: "host-0", 1: "host-1"}
    for stranger in strangers:
        stranger.close()
    close(answers)


def test_roll_when_a_host_name_holds_escapes(capfd):
    port, answers = free_port(), {}
    first = called(ProcessInfo(f"127.0.0.1:{port}", 2, 0), answers, timeout_s=2)
    with connected(port) as stranger:
        stranger.sendall(said_hello(host="evil\x1b[31m", facts={"\x1b[2J": "\x07"}) + b"\n")
        first.join(30)
    assert "process 1 on evil\\x1b[31m" in str(answers[0]) and str(answers[0]).isprintable()
    assert "\x1b" not in capfd.readouterr().err


def test_roll_when_packages_differ():
    """With a secret, a process with other versions ends the run at once, and both sides are named."""
    port, answers = free_port(), {}
    processes = [ProcessInfo(f"127.0.0.1:{port}", 3, index) for index in range(3)]
    threads = [called(processes[0], answers, secret=b"of the run"), called(processes[2], answers, secret=b"of the run")]
    threads.append(called(processes[1], answers, secret=b"of the run", numpy="2.1.0"))
    for thread in threads:
        thread.join(30)
    for answer in (answers[0], answers[1]):
        assert "process 1 on host-1 was started differently from process 0 on host-0" in str(answer)
        assert "'numpy 2.1.0 (process 0: 2.4.6)'" in str(answer)


def test_roll_when_packages_differ_without_a_secret(capfd):
    """Only that process is refused at once; the run waits for another one and then starts."""
    port, answers, wrong = free_port(), {}, {}
    first = called(ProcessInfo(f"127.0.0.1:{port}", 2, 0), answers)
    called(ProcessInfo(f"127.0.0.1:{port}", 2, 1), wrong, numpy="2.1.0").join(30)
    assert "'numpy 2.1.0 (process 0: 2.4.6)'" in str(wrong[1])
    called(ProcessInfo(f"127.0.0.1:{port}", 2, 1), answers).join(30)
    first.join(30)
    assert dict(answers[0].hosts) == {0: "host-0", 1: "host-1"}
    close(answers)
    assert "refused a process, still waiting: process 1 on host-1 was started differently" in capfd.readouterr().err


def test_roll_when_a_process_lacks_the_secret():
    port, answers = free_port(), {}
    first = called(ProcessInfo(f"127.0.0.1:{port}", 2, 0), answers, timeout_s=2, secret=b"of the run")
    other = called(ProcessInfo(f"127.0.0.1:{port}", 2, 1), answers)
    first.join(30), other.join(30)
    assert "process 1 on host-1 does not have the secret of process 0: 'AIMV2_JAX_SECRET'" in str(answers[1])
    assert "refused: process 1 on host-1 does not have the secret" in str(answers[0])


@pytest.mark.parametrize("words", [b"[]", b"{}", b'{"hosts": {"0": "a"}}', b'{"hosts": {"0": "a", "1": 2}}'])
def test_roll_when_another_program_answers(words, monkeypatch):
    """Answers of another program at the coordinator's address are rejected, and the wait ends in time."""
    monkeypatch.setattr(rendezvous_module, "_ANSWER_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answers: dict = {}
        thread = called(ProcessInfo(f"127.0.0.1:{listener.getsockname()[1]}", 2, 1), answers, timeout_s=0.5)
        listener.settimeout(0.1)
        while thread.is_alive():
            with contextlib.suppress(TimeoutError), listener.accept()[0] as connection:
                connection.sendall(words + b"\n")
                connection.recv(1 << 16)
    thread.join(30)
    assert "process 0 on 127.0.0.1 was not reached" in str(answers[1])


def test_roll_when_two_have_one_number_then_all_are_refused():
    port, answers = free_port(), {}
    threads = [called(ProcessInfo(f"127.0.0.1:{port}", 3, 0), answers, secret=b"of the run")]
    others = [dict(), dict()]
    for other in others:
        threads.append(called(ProcessInfo(f"127.0.0.1:{port}", 3, 1), other, secret=b"of the run"))
    for thread in threads:
        thread.join(30)
    assert all("two processes have --process 1" in str(answer) for answer in (answers[0], *(o[1] for o in others)))
