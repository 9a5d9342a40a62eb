"""The console's application as a server calls it: files, streams, and the way to the case service."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from deploy.ports import free_ports
from gateway.api_keys import KeyBook, create_key
from gateway.console.access import SECURITY_HEADERS
from gateway.console.app import TYPES, Console
from gateway.contracts.settings import Settings
from gateway.metrics import Metrics
from tests.helpers import until
from tests.unit.gateway.console.factories import ROUTING, STATUS

pytestmark = pytest.mark.anyio
FILES = {path.name: path.read_text() for path in Path("gateway/console/static").iterdir()}


@dataclass
class Reply:
    """What was sent, as it comes. `gone` is set when the caller goes."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)


def make_console(tmp_path: Path, keys: KeyBook | None = None, **changes: Any) -> Console:
    values: dict[str, Any] = {
        "home": str(tmp_path),
        "kafka_port": 9,
        "registry_port": 9,
        "jobs_port": 9,
        "cases_port": 9,
        "alertmanager_port": 9,
    }
    settings = Settings(**(values | changes))
    return Console(settings, Metrics(), keys, kafka=False, accounts=lambda: (STATUS, ROUTING), texts=lambda: {})


async def call(
    console: Console, path: str, method: str = "GET", body: bytes = b"", reply: Reply | None = None, **headers: str
) -> Reply:
    """One request from this machine."""
    reply = Reply() if reply is None else reply
    path, _, query = path.partition("?")
    told = False
    sent = {"host": "127.0.0.1:18080"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "method": method,
        "path": f"/console{path}",
        "root_path": "/console",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 18080),
        "scheme": "http",
        "http_version": "1.1",
    }

    async def receive() -> dict[str, Any]:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        await reply.gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            reply.body += message["body"]
            reply.complete = not message.get("more_body", False)

    await console.app(scope, receive, send)
    return reply


@asynccontextmanager
async def running(console: Console) -> AsyncIterator[Console]:
    console.start()
    try:
        yield console
    finally:
        await console.stop()


async def test_the_page_and_all_that_it_names_are_there_and_nothing_else_is(tmp_path: Path) -> None:
    console = make_console(tmp_path)
    page = await call(console, "/")
    assert (page.status, page.headers["content-type"]) == (200, TYPES[".html"])
    named = set(re.findall(rb'(?:href|src)="([a-z.]+)"', page.body))
    for text in FILES.values():
        named |= {name.encode() for name in re.findall(r'from "\./([a-z]+\.js)"', text)}
    assert {name.decode() for name in named} == set(FILES) - {"index.html"}
    for name in named:
        assert (await call(console, f"/{name.decode()}")).status == 200
    for path in ("/nothing.js", "/../app.py", "/static/main.js", "//etc/passwd"):
        assert (await call(console, path)).status == 404
    assert (await call(console, "/", if_none_match=page.headers["etag"])).status == 304


async def test_nothing_is_inline_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    reply = await call(make_console(tmp_path), "/")
    assert reply.headers.items() >= SECURITY_HEADERS.items()
    page = reply.body.decode()
    assert not re.search(r"<script(?![^>]*src=)|\son[a-z]+=|\sstyle=|<style", page)
    for name, text in FILES.items():
        assert not re.search(r"https?://|//cdn|@import|url\(", text.replace("http://www.w3.org/2000/svg", "")), name
        # What comes from outside is set as text alone.
        assert not re.search(r"innerHTML\s*=[^=]|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name


async def test_every_answer_has_the_headers_refusals_too(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    create_key(path, "ann", ["review"], 5)
    for target in ("/events", "/reviews/reviews"):
        reply = await call(make_console(tmp_path, KeyBook(path)), target)
        assert reply.status == 401
        assert reply.headers.items() >= SECURITY_HEADERS.items()
        assert json.loads(reply.body)["reason"] == "unauthorized"


async def test_a_stream_begins_with_the_whole_picture_and_goes_on_until_the_viewer_goes(tmp_path: Path) -> None:
    async with running(make_console(tmp_path)) as console:
        reply = Reply()
        watching = asyncio.create_task(call(console, "/events", reply=reply))
        await until(lambda: reply.body.count(b"event: frame") >= 1, 10)
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.body.startswith(b"retry: ")
        assert reply.body.index(b"event: hello") < reply.body.index(b"event: frame")
        assert len(console.viewers) == 1
        reply.gone.set()
        async with asyncio.timeout(5):
            await watching
        assert len(console.viewers) == 0


async def test_one_too_many_is_told_to_come_again(tmp_path: Path) -> None:
    async with running(make_console(tmp_path, console_viewers_max=1)) as console:
        reply = Reply()
        watching = asyncio.create_task(call(console, "/events", reply=reply))
        await until(lambda: len(console.viewers) == 1, 5)
        refused = await call(console, "/events")
        assert (refused.status, json.loads(refused.body)["reason"]) == (503, "console_full")
        reply.gone.set()
        await watching


async def test_a_gateway_that_leaves_ends_the_streams_at_once(tmp_path: Path) -> None:
    async with running(make_console(tmp_path)) as console:
        reply = Reply()
        watching = asyncio.create_task(call(console, "/events", reply=reply))
        await until(lambda: b"event: hello" in reply.body, 10)
        console.leave()
        async with asyncio.timeout(2):
            await watching
        assert reply.complete
        assert reply.body.rstrip().endswith(b'data: {"dropped":false}')


async def test_a_key_that_is_revoked_ends_its_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.console.app.CHECK_S", 0.0)
    path = tmp_path / "keys.json"
    secret, _ = create_key(path, "ann", ["review"], 100)
    book = KeyBook(path)
    async with running(make_console(tmp_path, book)) as console:
        reply = Reply()
        watching = asyncio.create_task(call(console, "/events", reply=reply, authorization=f"Bearer {secret}"))
        await until(lambda: b"event: hello" in reply.body, 10)
        book._callers = {}
        async with asyncio.timeout(10):
            await watching
        assert reply.complete


@asynccontextmanager
async def cases(seen: list[web.Request], answer: bytes = b'{"reviews":[]}') -> AsyncIterator[int]:
    """A case service that notes what it is asked."""

    async def handle(request: web.Request) -> web.Response:
        await request.read()
        seen.append(request)
        return web.Response(body=answer, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    [port] = free_ports(1)
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield port
    finally:
        await runner.cleanup()


async def test_an_analysts_call_goes_on_with_her_key_and_nothing_else_of_hers(tmp_path: Path) -> None:
    seen: list[web.Request] = []
    path = tmp_path / "keys.json"
    secret, _ = create_key(path, "ann", ["review"], 100)
    async with cases(seen) as port, running(make_console(tmp_path, KeyBook(path), cases_port=port)) as console:
        key = f"Bearer {secret}"
        reply = await call(console, "/reviews/reviews?state=open&limit=5", cookie="a=b", authorization=key)
        assert (reply.status, reply.body) == (200, b'{"reviews":[]}')
        body = b'{"verdict":"fraud","note":""}'
        await call(console, "/reviews/reviews/t-1/decide", "POST", body, content_type="application/json", authorization=key)
    assert [str(r.rel_url) for r in seen] == ["/v1/reviews?state=open&limit=5", "/v1/reviews/t-1/decide"]
    assert all(r.headers["authorization"] == key and "cookie" not in r.headers for r in seen)
    assert await seen[1].read() == body


async def test_only_the_pages_own_calls_are_passed_on(tmp_path: Path) -> None:
    seen: list[web.Request] = []
    async with cases(seen) as port, running(make_console(tmp_path, cases_port=port)) as console:
        for method, path, kind, status in (
            ("GET", "/reviews/lists", "", 404),
            ("GET", "/reviews/reviews/a/../../keys", "", 404),
            ("POST", "/reviews/labels", "application/json", 404),
            ("POST", "/reviews/reviews/t-1", "application/json", 404),
            ("DELETE", "/reviews/reviews/t-1", "", 405),
            # What a form of another site can send.
            ("POST", "/reviews/reviews/t-1/decide", "text/plain", 422),
        ):
            reply = await call(console, path, method, b"{}", content_type=kind)
            assert (reply.status, path) == (status, path)
        reply = await call(
            console, "/reviews/reviews/t-1/claim", "POST", b"{}", content_type="application/json", origin="https://evil.example"
        )
        assert reply.status == 403
        reply = await call(console, "/reviews/reviews/t-1/decide", "POST", b"x" * 20_000, content_type="application/json")
        assert reply.status == 413
    assert seen == []


async def test_a_case_service_that_is_down_or_talks_without_end_is_told_as_one_that_does_not_answer(tmp_path: Path) -> None:
    async with running(make_console(tmp_path)) as console:
        reply = await call(console, "/reviews/reviews")
        assert (reply.status, json.loads(reply.body)["reason"]) == (503, "no_cases")
        assert json.loads(reply.body)["retriable"]
    async with cases([], b"x" * 1_200_000) as port, running(make_console(tmp_path, cases_port=port)) as console:
        assert (await call(console, "/reviews/reviews")).status == 503
