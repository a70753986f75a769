"""A server on loopback that lists any number of objects page by page, as Google Cloud Storage does; it has no data."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from experiments.benchmarks.pod_model import OBJECTS_PER_PAGE

BUCKET = "pod"


@contextlib.contextmanager
def serve(sizes: dict[str, int]) -> Iterator[str]:
    """Serves the listing of the bucket `BUCKET`, whose objects have these sizes by name, at the yielded address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, sizes), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _run(connection: Any, sizes: dict[str, int]) -> None:
    names = sorted(sizes)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            first = int(query.get("pageToken", ["0"])[0])
            last = first + min(int(query.get("maxResults", [OBJECTS_PER_PAGE])[0]), OBJECTS_PER_PAGE)
            page: dict[str, Any] = {"kind": "storage#objects", "items": [_item(n, sizes[n]) for n in names[first:last]]}
            if last < len(names):
                page["nextPageToken"] = str(last)
            body = json.dumps(page).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    connection.send(server.server_address[1])
    server.serve_forever()


def _item(name: str, size: int) -> dict[str, str]:
    """An object's metadata, with the fields of the JSON API."""
    url, time = f"https://www.googleapis.com/storage/v1/b/{BUCKET}/o/{name}", "2026-11-30T12:00:00.000Z"
    return {
        "kind": "storage#object",
        "id": f"{BUCKET}/{name}/1700000000000000",
        "selfLink": url,
        "mediaLink": f"{url}?generation=1700000000000000&alt=media",
        "name": name,
        "bucket": BUCKET,
        "generation": "1700000000000000",
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "storageClass": "STANDARD",
        "size": str(size),
        "md5Hash": "1B2M2Y8AsgTpgAmY7PhCfg==",
        "crc32c": "AAAAAA==",
        "etag": "CICAgICAgIADEAE=",
        "timeCreated": time,
        "updated": time,
        "timeStorageClassUpdated": time,
        "timeFinalized": time,
    }
