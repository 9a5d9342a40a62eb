"""What the console makes of other processes' answers, asked over real connections."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from gateway.console.sources import Source, asking, poll, read_jobs


def asked(source: Source, session: Callable[[], aiohttp.ClientSession] = asking) -> Source:
    async def once() -> None:
        async with session() as opened:
            await poll(opened, source)

    asyncio.run(once())
    return source


@pytest.fixture
def jobs_url() -> Any:
    """A metrics page as the feature jobs serve it, by prometheus_client, which compresses for whoever takes it so."""
    registry = CollectorRegistry()
    Gauge("fraudgate_jobs_up", "", ["query"], registry=registry).labels("gold").set(1)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_feature_jobs_metrics_are_read(jobs_url: str) -> None:
    source = asked(Source("feature jobs", jobs_url, read_jobs))
    assert source.trouble is None
    assert source.value.total("fraudgate_jobs_up", query="gold") == 1


def test_the_page_of_this_test_is_compressed_for_whoever_takes_it_so(jobs_url: str) -> None:
    def taking_gzip() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(headers={"Accept-Encoding": "gzip"}, auto_decompress=False)

    source = asked(Source("feature jobs", jobs_url, read_jobs), taking_gzip)
    assert source.trouble == "its answer can't be read (UnicodeDecodeError)"


def test_an_answer_that_can_not_be_read_leaves_what_was_said_before(jobs_url: str) -> None:
    source = asked(Source("feature jobs", jobs_url, read_jobs))
    source.note(b"\xff", "", source.got_s + 1)  # type: ignore[operator]
    assert source.trouble == "its answer can't be read (UnicodeDecodeError)"
    assert source.value.total("fraudgate_jobs_up", query="gold") == 1
    assert source.age_s(source.got_s + 5) == 5  # type: ignore[operator]


def test_where_nobody_listens_is_said_so() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert (
            asked(Source("feature jobs", f"http://127.0.0.1:{bound.getsockname()[1]}/metrics", read_jobs)).trouble
            == "nobody listens"
        )
