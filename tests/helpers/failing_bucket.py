"""A bucket behind the proxy that injects failures, with clients that do not wait long."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Iterator

import pytest

from tests.helpers.buckets import BucketProxy, clients_of, proxy


@pytest.fixture(scope="session")
def gcs_proxy(fake_gcs) -> Iterator[BucketProxy]:
    """The proxy before fake-gcs-server."""
    with proxy(fake_gcs) as proxied:
        yield proxied


@pytest.fixture
def failing_gcs(gcs_proxy, monkeypatch) -> Iterator[BucketProxy]:
    """The proxy, to which the clients of this process are pointed; fails nothing until `configure`."""
    import gcsfs.retry

    # gcsfs and we make attempts without pauses.
    monkeypatch.setattr("aimv2_jax.storage.files._PAUSES_S", (0.0,) * 7)
    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda pause_s: asyncio.sleep(0)))
    with clients_of(gcs_proxy):
        yield gcs_proxy
        succeed(gcs_proxy)


def fail(proxied: BucketProxy, *kinds: str, only: str = "", limit: int | None = None) -> None:
    """Fails requests "METHOD TARGET" in which the expression `only` is found, `limit` of them or all."""
    proxied.configure(failures=1.0, kinds=kinds, only=only, limit=limit, slow_ms=10.0)


def succeed(proxied: BucketProxy) -> None:
    """Ends all failures."""
    proxied.configure(failures=0.0)
