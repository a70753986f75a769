"""Tests of the proxy before bucket servers, and of how servers end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers.buckets import ROOT, proxy

DATA = bytes(range(200))


@pytest.fixture(scope="module")
def proxied(fake_gcs):
    with proxy(fake_gcs) as proxied:
        yield proxied


@pytest.fixture
def target(proxied):
    """Path of an object's data; settings of the proxy are the defaults again."""
    proxied.configure()
    url = proxied.new_folder()
    proxied.write(f"{url}/a.bin", DATA)
    folder = url.rpartition("/")[2]
    return f"/storage/v1/b/{proxied.bucket}/o/{folder}%2Fa.bin?alt=media"


def ask(proxied, method, target, body=None, **fields):
    """Status, fields and body of an answer to a request on a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection(proxied.address)) as connection:
        connection.request(method, target, body, {name.replace("_", "-"): value for name, value in fields.items()})
        with connection.getresponse() as answer:
            return answer.status, answer.headers, answer.read()


def test_failures_are_reproducible_by_seed(proxied, target):
    """The same requests fail again with the same seed; others with another; about as many as asked."""

    def statuses(seed):
        proxied.configure(failures=0.3, kinds=["503", "429"], seed=seed)
        return [ask(proxied, "GET", target)[0] for _ in range(100)]

    first = statuses(1)
    assert statuses(1) == first != statuses(2)
    assert set(first) == {200, 429, 503} and 15 < sum(status != 200 for status in first) < 45


def test_failures_are_only_of_what_they_can_be(proxied, target):
    """404 is for reads of objects, 412 for requests with a precondition, and `only` limits all."""
    listing = target.partition("/o/")[0] + "/o"
    proxied.configure(failures=1.0, kinds=["404"])
    assert [ask(proxied, "GET", path)[0] for path in (listing, target)] == [200, 404]
    proxied.configure(failures=1.0, kinds=["412"])
    assert [ask(proxied, "GET", path)[0] for path in (target, f"{target}&ifGenerationMatch=1")] == [200, 412]
    proxied.configure(failures=1.0, kinds=["503"], only="^GET .*alt=media", limit=2)
    assert [ask(proxied, "GET", path)[0] for path in (listing, target, target, target)] == [200, 503, 503, 200]


@pytest.mark.parametrize(
    ("kind", "error"),
    [("reset", ConnectionResetError), ("cut", ConnectionResetError), ("short", http.client.IncompleteRead)],
)
def test_connection_is_lost(kind, error, proxied, target):
    """The request reaches the server and is counted; the client gets no answer, or half of one."""
    before = proxied.counts()["requests"]["POST write"]
    proxied.configure(failures=1.0, kinds=[kind])
    with pytest.raises(error):
        ask(proxied, "GET", target)
    upload = f"/upload/storage/v1/b/{proxied.bucket}/o?uploadType=media&name=lost-{kind}"
    with pytest.raises(error):
        ask(proxied, "POST", upload, b"x")
    proxied.configure()
    assert ask(proxied, "GET", f"/storage/v1/b/{proxied.bucket}/o/lost-{kind}?alt=media")[2] == b"x"
    assert proxied.counts()["requests"]["POST write"] == before + 1


def test_connection_is_kept_alive(proxied, target):
    """One connection carries all requests, also after an injected status."""
    proxied.configure(failures=0.5, kinds=["503"])
    sockets, statuses = set(), set()
    with contextlib.closing(http.client.HTTPConnection(proxied.address)) as connection:
        for _ in range(20):
            connection.request("GET", target, headers={"Range": "bytes=10-29"})
            answer = connection.getresponse()
            data = answer.read()
            assert answer.status == 503 or data == DATA[10:30]
            statuses.add(answer.status)
            sockets.add(connection.sock)
    assert statuses == {206, 503} and len(sockets) == 1 and None not in sockets


def test_upload_leads_back_through_the_proxy(proxied, target):
    """The server's own address in a resumable upload's Location becomes the proxy's."""
    start = f"/upload/storage/v1/b/{proxied.bucket}/o?uploadType=resumable&name=resumed"
    _, fields, _ = ask(proxied, "POST", start, json.dumps({"name": "resumed"}), Content_Type="application/json")
    assert fields["Location"].startswith(f"http://{proxied.address}/")


def test_requests_are_delayed_and_counted(proxied, target):
    proxied.configure(delay_ms=50)
    before, began_s = proxied.counts(), time.monotonic()
    assert ask(proxied, "GET", target)[2] == DATA
    assert time.monotonic() - began_s >= 0.05
    after = proxied.counts()
    assert after["requests"]["GET read"] == before["requests"].get("GET read", 0) + 1
    assert after["bytes"]["sent"] == before["bytes"]["sent"] + len(DATA)


def test_servers_end_with_a_killed_process():
    """SIGKILL of the process that started a server and a proxy ends both."""
    code = "from tests.helpers.buckets import *; from contextlib import ExitStack; import time; stack = ExitStack()\n"
    code += "server = stack.enter_context(fake_gcs_server()); proxied = stack.enter_context(proxy(server))\n"
    code += "print(server.address, proxied.address, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        addresses = process.stdout.readline().split()
        os.kill(process.pid, signal.SIGKILL)
    assert len(addresses) == 2
    for address in addresses:
        host, port = address.split(":")
        deadline_s = time.monotonic() + 10
        with pytest.raises(ConnectionRefusedError):
            while time.monotonic() < deadline_s:
                with contextlib.suppress(ConnectionResetError, TimeoutError):  # It is about to end.
                    socket.create_connection((host, int(port)), timeout=1).close()
