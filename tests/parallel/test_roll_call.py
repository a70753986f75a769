"""The roll call at the start: nobody trains unless all are there, and those that are missing are named."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from several import HOST, Several, free_port
from tiny import tiny_arguments

from aimv2_jax.errors import EXIT_USER, UserError
from aimv2_jax.parallel.clusters import Place
from aimv2_jax.parallel.links import Link, call_roll

pytestmark = pytest.mark.xdist_group("shared-memory")


def refused(tmp_path, **options) -> dict[int, str]:
    """What processes say that are refused, by index."""
    arguments = tiny_arguments(tmp_path / "run", processes__startup_timeout_s=3)
    with Several(3, tmp_path / "out", arguments, **options) as several:
        codes = several.wait(60)
        said = {index: several.said(index)[1] for index in codes}
    assert set(codes.values()) == {EXIT_USER}, said
    assert all(line.startswith("error: ") and line.count("\n") == 1 for line in said.values()), said
    assert not (tmp_path / "run").exists()
    return said


def test_start_when_a_process_is_missing_then_all_are_refused_and_told_who_is_there_and_who_is_not(tmp_path):
    for line in refused(tmp_path, indices=(0, 2)).values():
        assert "only 2 of 3 processes have come within 3 s" in line
        assert f"there are 0 ({HOST}), 2 ({HOST}); missing: '1 (host unknown)'" in line


def test_start_when_process_0_is_missing_then_the_others_are_refused_and_told(tmp_path):
    for line in refused(tmp_path, indices=(1,)).values():
        assert "process 0 on 127.0.0.1 has not been reached within 3 s" in line


def test_start_when_a_process_has_another_config_then_all_are_refused_at_once(tmp_path):
    said = refused(tmp_path, changed={1: ["--config.seed=5"]})
    for index in (0, 1):  # Process 2 may come too late to be told.
        assert f"process 1 on {HOST} was started otherwise than process 0" in said[index]


def test_start_when_two_processes_are_process_0_then_the_second_is_refused(tmp_path):
    said = refused(tmp_path, indices=(0, 1), changed={1: ["--process=0"]})
    assert any("cannot be listened on" in line and "--process 0" in line for line in said.values())


def called(place: Place, answers: dict, timeout_s: float = 20.0) -> threading.Thread:
    def call() -> None:
        try:
            answers[place.index] = call_roll(place, f"host-{place.index}", "test", timeout_s)
        except UserError as error:
            answers[place.index] = error

    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_roll_when_all_come_in_any_order_and_strangers_too_then_all_know_all_hosts(tmp_path):
    port, answers = free_port(), {}
    places = [Place(f"127.0.0.1:{port}", 3, index) for index in range(3)]
    threads = [called(places[2], answers), called(places[0], answers)]
    strangers = []
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'{"index": 1}\n', b"\xff\n", b""):
        deadline_s = time.monotonic() + 10
        while True:
            try:
                strangers.append(socket.create_connection(("127.0.0.1", port)))
                break
            except OSError:
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
        strangers[-1].sendall(words)
    threads.append(called(places[1], answers))
    for thread in threads:
        thread.join(30)
    for stranger in strangers:
        stranger.close()
    assert all(dict(answers[index].hosts) == {0: "host-0", 1: "host-1", 2: "host-2"} for index in range(3))
    assert {index: set(answers[index].links) for index in range(3)} == {0: {1, 2}, 1: {0}, 2: {0}}
    with socket.create_server(("127.0.0.1", port)):  # As jax's coordinator will, beside the links that stay.
        pass
    answers[1].links[0].send({"text": "ä" * 10})
    deadline_s = time.monotonic() + 10
    while not (messages := answers[0].links[1].receive()):
        assert time.monotonic() < deadline_s
    assert messages == [{"text": "ä" * 10}]
    for team in answers.values():
        for link in team.links.values():
            link.close()


def test_roll_when_two_have_one_number_then_all_are_refused(tmp_path):
    port, answers = free_port(), {}
    threads = [called(Place(f"127.0.0.1:{port}", 3, 0), answers)]
    others = [dict(), dict()]
    for other in others:
        threads.append(called(Place(f"127.0.0.1:{port}", 3, 1), other))
    for thread in threads:
        thread.join(30)
    assert all("two processes have --process 1" in str(answer) for answer in (answers[0], *(o[1] for o in others)))


def test_link_when_much_is_sent_at_once_then_all_of_it_comes_in_order():
    one, other = map(Link, socket.socketpair())
    sent = [{"number": number, "text": "x" * 5000} for number in range(200)]
    for message in sent:
        one.send(message)
    came = []
    deadline_s = time.monotonic() + 10
    while len(came) < len(sent):
        came += other.receive()
        one.flush()
        assert time.monotonic() < deadline_s
    assert came == sent
    one.close()
    assert other.receive() == [] and other.closed
    other.close()
