"""HTTP/1.1 reverse proxy before a bucket server: injects failures by a seed, adds latency and counts requests.

    python -m tests.helpers.bucket_proxy --upstream 127.0.0.1:4443 --failures 0.05 --kinds 429,503,reset --delay-ms 50

prints its port as a line of JSON and serves until it is killed. Two paths are its own: GET /__proxy__/counts returns
the counts, and POST /__proxy__/settings with JSON sets all settings (fields of `Settings`; the defaults where they are
not given) and restarts the sequence of failures. Only the standard library is imported, so that it starts fast. A core
carries 3,600 ranged reads of 60 kB a second.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import re
import socket
import struct
from urllib.parse import parse_qs, urlsplit

KINDS = ("429", "503", "reset", "cut", "slow", "short", "403", "412", "404")
"""Kinds of failures; any other HTTP status is one, too.

A status: the request does not reach the server. 412 is only for requests with a precondition, 404 only for reads of
objects. The others reach the server: `reset` resets the connection before the answer, `cut` in the middle of it;
`short` closes the connection in the middle of the answer; `slow` delays the first byte by `slow_ms`.
"""
CONTROL = "/__proxy__/"
_PIECE_BYTES = 1 << 18
_BUFFER_BYTES = 1 << 20
_PRECONDITIONS = {"if-match", "if-none-match", "x-goog-if-generation-match"}
_PRECONDITION_PARAMETERS = {"ifGenerationMatch", "ifMetagenerationMatch"}
_GCS_OBJECT = re.compile(r"/(?:download/)?storage/v1/b/[^/]+/o/[^/]+")
_GCS = re.compile(r"/(?:upload/|download/|batch/)?storage/v1")
_S3_CODES = {
    401: "InvalidAccessKeyId",
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    429: "SlowDown",
    503: "SlowDown",
}
_PEER_GONE = (ConnectionError, asyncio.IncompleteReadError)


@dataclasses.dataclass
class Settings:
    seed: int = 0
    failures: float = 0.0  # Fraction of the requests that fail.
    kinds: tuple[str, ...] = KINDS
    only: str = ""  # Regular expression; only requests "METHOD TARGET" in which it is found may fail.
    answered: str = (
        "$^"  # Regular expression; requests in which it is found are not refused (403) and find their object.
    )
    limit: int | None = None  # Failures until all requests succeed again.
    delay_ms: float = 0.0  # Added to every request.
    slow_ms: float = 500.0


class Request:
    """A request that was read whole."""

    def __init__(self, head: bytes, body: bytes):
        line, *lines = head[:-4].split(b"\r\n")
        self.method, self.target, self.version = line.decode("latin-1").split(" ", 2)
        self.fields = _parse_fields(lines)
        self._lines = [line, *(item for item in lines if not item.lower().startswith(b"expect:"))]
        self.body = body

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def parameters(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)

    @property
    def operation(self) -> str:
        """What the request does: read (of an object), stat, list, write, delete or other."""
        if self.method == "DELETE":
            return "delete"
        if self.method in ("PUT", "POST"):
            return "write"
        if _GCS.match(self.path):
            if _GCS_OBJECT.fullmatch(self.path):
                return "read" if "media" in self.parameters.get("alt", []) else "stat"
            return "list" if self.path.endswith("/o") else "other"
        if self.path.strip("/").count("/"):
            return "read" if self.method == "GET" else "stat"
        return "list" if self.method == "GET" else "other"

    def can_fail_by(self, kind: str) -> bool:
        if kind == "404":
            return self.operation == "read"
        if kind == "412":
            return bool(_PRECONDITIONS & self.fields.keys() or _PRECONDITION_PARAMETERS & self.parameters.keys())
        return True

    def encode(self) -> bytes:
        return b"\r\n".join(self._lines) + b"\r\n\r\n" + self.body


class Answer:
    """The head of an answer, and how its body ends."""

    def __init__(self, head: bytes, method: str):
        self._lines = head[:-4].split(b"\r\n")
        fields = _parse_fields(self._lines[1:])
        self.status = int(self._lines[0].split(b" ", 2)[1])
        self.chunked = "chunked" in fields.get("transfer-encoding", "").lower()
        self.length: int | None = None  # Bytes of the body; None if chunks or the connection's end tell.
        if method == "HEAD" or self.status in (204, 304):
            self.length, self.chunked = 0, False
        elif not self.chunked and "content-length" in fields:
            self.length = int(fields["content-length"])
        self.upstream_ends = self._lines[0].startswith(b"HTTP/1.0") or fields.get("connection", "").lower() == "close"

    @property
    def until_end(self) -> bool:
        return self.length is None and not self.chunked

    def encode(self, upstream: bytes, host: bytes) -> bytes:
        """The head for the client: HTTP/1.1, kept alive, and with our address in place of the server's."""
        lines = [line for line in self._lines[1:] if self.until_end or not line.lower().startswith(b"connection:")]
        status = b"HTTP/1.1" + self._lines[0][len("HTTP/1.x") :]
        return b"\r\n".join([status, *lines]).replace(b"http://" + upstream, b"http://" + host) + b"\r\n\r\n"


class Upstream:
    """The connection to the server that belongs to a client's connection; reopened when the server has closed it."""

    def __init__(self, host: str, port: int):
        self._address = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: Request) -> tuple[Answer, asyncio.StreamReader]:
        """Sends the request and reads the head of the answer."""
        if self._streams:  # The server may have closed it, since it was idle.
            with contextlib.suppress(*_PEER_GONE):
                return await self._ask(request)
            self.close()
        self._streams = await asyncio.open_connection(*self._address, limit=_BUFFER_BYTES)
        return await self._ask(request)

    async def _ask(self, request: Request) -> tuple[Answer, asyncio.StreamReader]:
        reader, writer = self._streams
        writer.write(request.encode())
        await writer.drain()
        return Answer(await reader.readuntil(b"\r\n\r\n"), request.method), reader

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
        self._streams = None


class Proxy:
    def __init__(self, upstream: str, settings: Settings):
        host, _, port = upstream.partition(":")
        self._upstream = host, int(port)
        self._settings = settings
        self._number = 0  # Requests of the sequence that may fail.
        self._failed = 0
        self._requests: collections.Counter[str] = collections.Counter()
        self._failures: collections.Counter[str] = collections.Counter()
        self._bytes: collections.Counter[str] = collections.Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves the requests of one client's connection."""
        writer.transport.set_write_buffer_limits(high=0)  # `drain` returns once all bytes are the system's.
        upstream = Upstream(*self._upstream)
        try:
            while await self._serve_request(reader, writer, upstream):
                pass
        except _PEER_GONE:
            pass
        finally:
            upstream.close()
            writer.close()

    async def _serve_request(self, reader, writer, upstream: Upstream) -> bool:
        """Serves one request; whether the client's connection goes on."""
        request = await _read_request(reader, writer)
        if request.target.startswith(CONTROL):
            writer.write(self._control(request))
            await writer.drain()
            return True
        self._requests[f"{request.method} {request.operation}"] += 1
        self._bytes["received"] += len(request.body)
        settings = self._settings
        if settings.delay_ms:
            await asyncio.sleep(settings.delay_ms / 1000)
        kind = self._draw_failure(request)
        if kind:
            self._failures[kind] += 1
        if kind and kind.isdecimal():
            writer.write(_error(request, int(kind)))
            await writer.drain()
        else:
            answer, body = await upstream.ask(request)
            if kind == "slow":
                await asyncio.sleep(settings.slow_ms / 1000)
            address = "{}:{}".format(*self._upstream).encode()
            head = answer.encode(address, request.fields.get("host", "").encode())
            if kind in ("reset", "cut", "short"):
                await self._break_off(kind, head, b"".join([piece async for piece in _pieces(answer, body)]), writer)
                return False
            await self._pass_on(head, answer, body, writer)
            if answer.upstream_ends:
                upstream.close()
            if answer.until_end:
                return False
        return request.version == "HTTP/1.1" and request.fields.get("connection", "").lower() != "close"

    async def _pass_on(self, head: bytes, answer: Answer, body, writer) -> None:
        async for piece in _pieces(answer, body):
            writer.write(head + piece)
            head = b""
            self._bytes["sent"] += len(piece)
            await writer.drain()
        if head:
            writer.write(head)
            await writer.drain()

    async def _break_off(self, kind: str, head: bytes, body: bytes, writer) -> None:
        """Ends the client's connection before or in the middle of the body; an empty one is withheld with its head."""
        if kind != "reset" and body:
            writer.write(head + body[: len(body) // 2])
            self._bytes["sent"] += len(body) // 2
            await writer.drain()
        if kind != "short":
            # With SO_LINGER at 0 seconds close(2) sends RST in place of FIN.
            lingering = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingering)
            writer.transport.abort()

    def _draw_failure(self, request: Request) -> str | None:
        settings = self._settings
        if not settings.failures or not re.search(settings.only, f"{request.method} {request.target}"):
            return None
        self._number += 1
        kinds = [kind for kind in settings.kinds if request.can_fail_by(kind)]
        if re.search(settings.answered, f"{request.method} {request.target}"):
            kinds = [kind for kind in kinds if kind not in ("403", "404")]
        draw = random.Random(f"{settings.seed} {self._number}")
        if self._failed == settings.limit or not kinds or draw.random() >= settings.failures:
            return None
        self._failed += 1
        return draw.choice(kinds)

    def _control(self, request: Request) -> bytes:
        status = 200
        if request.method == "POST" and request.path == f"{CONTROL}settings":
            self._settings = Settings(**json.loads(request.body))
            self._number = self._failed = 0
            answer = dataclasses.asdict(self._settings)
        elif request.method == "GET" and request.path == f"{CONTROL}counts":
            answer = {"requests": self._requests, "failures": self._failures, "bytes": self._bytes}
        else:
            status, answer = 404, {"error": f"no such control path: {request.path}"}
        return _encode_answer(status, json.dumps(answer).encode())


def _parse_fields(lines: list[bytes]) -> dict[str, str]:
    pairs = (line.decode("latin-1").partition(":") for line in lines)
    return {name.lower(): value.strip() for name, _, value in pairs}


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    request = Request(head, b"")
    if "expect" in request.fields:  # botocore waits for this before it sends the body.
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if "chunked" in request.fields.get("transfer-encoding", "").lower():
        request.body = b"".join([piece async for piece in _chunks(reader)])
    else:
        request.body = await reader.readexactly(int(request.fields.get("content-length", 0)))
    return request


async def _pieces(answer: Answer, reader: asyncio.StreamReader):
    """The body in pieces, as it is sent (with the sizes of its chunks, if it comes in chunks)."""
    if answer.chunked:
        async for chunk in _chunks(reader):
            yield chunk
        return
    left = answer.length
    while left != 0:
        piece = await reader.read(_PIECE_BYTES if left is None else min(left, _PIECE_BYTES))
        if not piece:
            if left is None:
                return
            raise ConnectionError("the server ended its answer early")
        left = left and left - len(piece)
        yield piece


async def _chunks(reader: asyncio.StreamReader):
    size = -1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        yield line + await reader.readexactly(size + 2)


def _error(request: Request, status: int) -> bytes:
    message = "injected by the proxy"
    if request.method == "HEAD":
        body = b""
    elif _GCS.match(request.path):
        body = json.dumps({"error": {"code": status, "message": message}}).encode()
    else:
        code = _S3_CODES.get(status, "InternalError")
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return _encode_answer(status, body)


def _encode_answer(status: int, body: bytes) -> bytes:
    kind = "application/xml" if body.startswith(b"<") else "application/json"
    head = f"HTTP/1.1 {status} Injected\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def serve(upstream: str, settings: Settings) -> None:
    """Serves on a free port of loopback, which is printed, until the process ends."""
    server = await asyncio.start_server(Proxy(upstream, settings).serve, "127.0.0.1", 0, limit=_BUFFER_BYTES)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT", help="the server")
    defaults = Settings()
    for name, kind in {"seed": int, "failures": float, "only": str, "limit": int, "delay_ms": float}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(defaults, name))
    parser.add_argument("--slow-ms", type=float, default=defaults.slow_ms)
    parser.add_argument("--kinds", type=lambda names: tuple(names.split(",")), default=KINDS)
    flags = vars(parser.parse_args())
    asyncio.run(serve(flags.pop("upstream"), Settings(**flags)))


if __name__ == "__main__":
    main()
