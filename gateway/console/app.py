"""The live console at /console: one screen of what the gateway and its surroundings do. Mounted in the gateway's FastAPI application.

Static files are read once at the start and served from memory. What is shown comes as server-sent events from one gatherer
(gateway/console/gather.py); the review queue goes on to the case service.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api_keys import KeyBook
from gateway.cases.schemas import Schemas
from gateway.console.access import SECURITY_HEADERS, Access
from gateway.console.alerts import AlertFollower
from gateway.console.gather import Gatherer, ReadOwn, event
from gateway.console.picture import State
from gateway.console.reviews import Reviews
from gateway.console.samples import Samples, Window, samples_of, samples_of_families
from gateway.console.sources import Source, read_alertmanager, read_cases, read_jobs
from gateway.console.tables import Tables
from gateway.console.tap import Tap
from gateway.console.verdict import Verdicts
from gateway.console.viewers import END, Viewer, Viewers
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.errors import GatewayError, RateLimitedError, problem_reply
from gateway.metrics import Metrics
from gateway.worker_metrics import WorkerMetrics

PATH = "/console"
WINDOW_S = 10.0
# A stream ends after so long and the page begins another, within the time that a deploy gives a gateway to drain (deploy/rollout); the key
# is looked at again meanwhile.
STREAM_S, CHECK_S = 25.0, 15.0
RECONNECT_MS = 1000
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
INDEX = "index.html"


class FullError(GatewayError):
    """As many watch as the setting `console_viewers_max` allows."""

    http_status = 503
    retriable = True
    reason = "console_full"
    text = "as many watch the console as may; it tries again by itself"


@dataclass(frozen=True)
class File:
    content: bytes
    kind: str
    tag: str


class Console:
    """`accounts` gives the gateway's own account of itself and of its routing, `texts` what each rule tells an analyst."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        keys: KeyBook | None,
        *,
        kafka: bool,
        accounts: Callable[[], tuple[Mapping[str, Any], Mapping[str, Any]]],
        texts: Callable[[], Mapping[str, str]],
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self.tap = Tap()
        self.access = Access(keys, settings.console_access)
        self.viewers = Viewers(settings.console_viewers_max, metrics, lambda: self._gatherer.wake())
        self.alerts = AlertFollower(settings.bootstrap, Schemas(SchemaRegistry(settings.registry, settings.schemas_path)))
        self.reviews = Reviews(settings.console_cases)
        self._accounts, self._texts = accounts, texts
        self._state = State(
            window=Window(WINDOW_S),
            status={},
            routing={},
            jobs=Source("feature jobs", f"{settings.console_jobs}/metrics", read_jobs),
            cases=Source("case service", f"{settings.console_cases}/metrics", read_cases),
            alertmanager=Source("Alertmanager", f"{settings.alertmanager}/api/v2/alerts?active=true", read_alertmanager),
            alerts=self.alerts,
            tables=Tables(),
            tap=self.tap,
            verdicts=Verdicts(),
            kafka_wanted=kafka,
        )
        self._gatherer = self._make_gatherer(None)
        self._task: asyncio.Task[None] | None = None
        self._files = _read_files()
        self.app = self._make_app()

    def _make_gatherer(self, read_workers: ReadOwn | None) -> Gatherer:
        return Gatherer(
            self._state,
            self.viewers,
            read_own=read_workers or self._read_own,
            accounts=self._accounts,
            texts=self._texts,
            several=read_workers is not None,
        )

    def start(self, workers: WorkerMetrics | None = None) -> None:
        """`workers` adds up the metrics of all workers, where there are several."""
        if workers is not None:

            async def read_workers(names: tuple[str, ...]) -> Samples:
                return samples_of_families(await workers.families(), names)

            self._gatherer = self._make_gatherer(read_workers)
        self._task = asyncio.create_task(self._gatherer.run())

    def leave(self) -> None:
        """The gateway ends: no stream may hold it."""
        self.viewers.close()

    async def stop(self) -> None:
        self.leave()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await asyncio.to_thread(self.alerts.close)
        await self.reviews.close()

    async def _read_own(self, names: tuple[str, ...]) -> Samples:
        return samples_of(self._metrics.registry.restricted_registry(names).collect())

    def _make_app(self) -> ASGIApp:
        routes = [
            Route("/events", self._events, methods=["GET"]),
            Route("/reviews/{path:path}", self._guarded(self.reviews.pass_on), methods=["GET", "POST"]),
            Route("/{name:path}", self._file, methods=["GET"]),
        ]

        def refused(_: Request, error: Exception) -> Response:
            assert isinstance(error, GatewayError)
            return _problem(error)

        return _Secured(Starlette(routes=routes, exception_handlers={GatewayError: refused}))

    def _guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            self._check(request)
            return await answer(request)

        return guarded

    def _check(self, request: Request) -> None:
        self.access.check(request.headers, None if request.client is None else request.client.host)

    async def _file(self, request: Request) -> Response:
        file = self._files.get(request.path_params["name"] or INDEX)
        if file is None:
            return Response("there is nothing of that name here\n", 404, {"content-type": "text/plain; charset=utf-8"})
        headers = {"etag": file.tag, "cache-control": "no-cache", "content-type": file.kind}
        if request.headers.get("if-none-match") == file.tag:
            return Response(b"", 304, headers)
        return Response(file.content, 200, headers)

    async def _events(self, request: Request) -> Response:
        """Raises what `Access.check` raises, and `FullError`."""
        self._check(request)
        viewer = self.viewers.join()
        if viewer is None:
            raise FullError
        return _Stream(self, request, viewer)

    async def next_frame(self, viewer: Viewer, until_s: float) -> bytes:
        """END when the stream is over: it is old enough (`until_s`, monotonic), was dropped, or the gateway leaves."""
        try:
            async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                return await viewer.frames.get()
        except TimeoutError:
            return END

    def still_open(self, request: Request) -> bool:
        try:
            self._check(request)
        except RateLimitedError:
            return True
        except GatewayError:
            return False
        return True

    async def hello(self) -> bytes:
        return await self._gatherer.hello()


class _Stream(Response):
    """Server-sent events to one viewer, until it goes, is dropped or has had its time."""

    def __init__(self, console: Console, request: Request, viewer: Viewer) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._console = console
        self._request = request
        self._viewer = viewer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        telling = asyncio.ensure_future(self._tell(send))
        try:
            await asyncio.wait({gone, telling}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._console.viewers.leave(self._viewer)
            for task in (gone, telling):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await telling

    async def _tell(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        until_s = time.monotonic() + STREAM_S
        checked_s = time.monotonic()
        frame = b"retry: %d\n\n" % RECONNECT_MS + await self._console.hello()
        while frame != END:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            if time.monotonic() - checked_s > CHECK_S:
                checked_s = time.monotonic()
                if not self._console.still_open(self._request):
                    break
            frame = await self._console.next_frame(self._viewer, until_s)
        # Whoever is left knows that this end is meant, and begins anew.
        last = event("end", {"dropped": self._viewer.dropped})
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Secured:
    """Every answer tells the browser what it may do with it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self._headers]}
            await send(message)

        await self._app(scope, receive, secured)


def _problem(error: GatewayError) -> Response:
    status, headers, body = problem_reply(error)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


def _read_files() -> dict[str, File]:
    found = {}
    for entry in files("gateway.console").joinpath("static").iterdir():
        kind = TYPES.get("." + entry.name.rpartition(".")[2])
        if kind is not None:
            content = entry.read_bytes()
            found[entry.name] = File(content, kind, f'"{hashlib.sha256(content).hexdigest()[:16]}"')
    return found
