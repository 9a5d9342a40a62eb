"""Payments to POST /score over keep-alive connections, open loop: latency counts from the time a request was meant to go out.

A small asyncio protocol on httptools instead of aiohttp: the load shares a machine with what it measures, and a request through
aiohttp's client costs several times as much CPU (docs/simulator.md has the figures).
"""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.parse
import urllib.request
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import httptools
import msgspec

from gateway.contracts.transaction import encode_json
from loadtest.events import Event, LoadError
from loadtest.latency import Latency, latency_of
from loadtest.ledger import Ledger
from loadtest.pace import Pace, Punctuality

REACH_TIMEOUT_S = 5.0
CONNECTIONS = 64
QUEUED_MAX = 1_024
REQUEST_TIMEOUT_S = 5.0
ATTEMPTS_MAX = 30
RETRY_MAX_S = 30.0
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.05, 2.0
NAP_MIN_S = 0.001
RESPONSE_BYTES_MAX = 1_000_000


def require_gateway(url: str) -> None:
    """Raise `LoadError` unless the gateway answers its health check."""
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=REACH_TIMEOUT_S):  # noqa: S310
            pass
    except (OSError, urllib.error.URLError) as exc:
        raise LoadError(
            f"the gateway doesn't answer at {url}: start it with fraudgate serve or fraudgate up --all, or set FRAUDGATE_HOST"
            " and FRAUDGATE_GATEWAY_PORT"
        ) from exc


@dataclass
class HttpReport:
    """`latencies_s` of answered requests, from the intended time of sending; `failed` got no answer within the retry bounds."""

    sent: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    failed: int = 0
    took_s: float = 0.0
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    punctuality: Punctuality = field(default_factory=Punctuality)

    @property
    def latency(self) -> Latency:
        return latency_of(self.latencies_s)


@dataclass
class _Request:
    transaction_id: str
    payload: bytes
    due: float


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._body: list[bytes] = []
        self._body_bytes = 0
        self.usable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.usable = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._fail(ConnectionError("the connection was lost"))

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            # Bytes that nobody asked for: the connection can't be trusted with the next answer.
            self.abort(ConnectionError("an answer without a request"))
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort(ConnectionError("the answer is not HTTP"))

    # Called by httptools.
    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > RESPONSE_BYTES_MAX:
            self.abort(ConnectionError("the answer is too long"))

    def on_message_complete(self) -> None:
        parser, self._parser = self._parser, None
        if parser is None:
            return
        if not parser.should_keep_alive():
            self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((parser.get_status_code(), b"".join(self._body)))

    def exchange(self, payload: bytes, loop: asyncio.AbstractEventLoop, timeout_s: float) -> asyncio.Future[tuple[int, bytes]]:
        """The answer to come: (status, body). Fails with ConnectionError or TimeoutError, and then the connection is closed."""
        assert self._transport is not None and self._parser is None
        self._parser = httptools.HttpResponseParser(self)
        self._body, self._body_bytes = [], 0
        answer: asyncio.Future[tuple[int, bytes]] = loop.create_future()
        self._answer = answer
        timer = loop.call_later(timeout_s, self.abort, TimeoutError("no answer in time"))
        answer.add_done_callback(lambda _: timer.cancel())
        self._transport.write(payload)
        return answer

    def abort(self, reason: Exception) -> None:
        self._fail(reason)
        self.close()

    def close(self) -> None:
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, reason: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(reason)


class HttpSender:
    """Bounded: `connections` requests under way, QUEUED_MAX waiting; when both are full the schedule slips, and that is reported.

    A request that meets a connection error or a timeout is sent again, the same body with the same transaction_id, at most
    `attempts_max` times within `retry_max_s`. Any answer, also a refusal, ends it.
    """

    def __init__(
        self,
        url: str,
        *,
        ledger: Ledger | None = None,
        connections: int = CONNECTIONS,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        attempts_max: int = ATTEMPTS_MAX,
        retry_max_s: float = RETRY_MAX_S,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError("the gateway's URL must start with http://")
        self.report = HttpReport()
        self._host, self._port = parts.hostname, parts.port or 80
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self._head = (
            f"POST /score HTTP/1.1\r\nHost: {parts.netloc}\r\n{more}Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._ledger = ledger
        self._connections = connections
        self._request_timeout_s = request_timeout_s
        self._attempts_max, self._retry_max_s = attempts_max, retry_max_s

    def run(self, events: Iterable[tuple[int, int, Event]], pace: Pace, progress: Callable[[int], None] | None = None) -> None:
        """Send (sequence, milliseconds of event time since the first, event) at their times and wait for every answer."""
        asyncio.run(self._run(events, pace, progress))

    async def _run(self, events: Iterable[tuple[int, int, Event]], pace: Pace, progress: Callable[[int], None] | None) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[_Request | None] = asyncio.Queue(QUEUED_MAX)
        started = epoch = None
        async with asyncio.TaskGroup() as workers:
            for _ in range(self._connections):
                workers.create_task(self._work(queue, loop, progress))
            for sequence, since_first_ms, event in events:
                if started is None or epoch is None:
                    # With the first payment in hand: building a world or opening a file is no part of the schedule.
                    started, epoch = loop.time(), time.time()
                due = pace.due_s(sequence, since_first_ms)
                now = loop.time() - started
                while due is not None and now < due:
                    await asyncio.sleep(max(due - now, NAP_MIN_S))
                    now = loop.time() - started
                t = event.transaction
                body = encode_json(t)
                meant = now if due is None else due
                if self._ledger is not None:
                    # Before it leaves, so that a decision never comes for a payment the ledger doesn't know.
                    self._ledger.add(t.transaction_id, event.is_fraud, "http", epoch + meant, time.time())
                await queue.put(_Request(t.transaction_id, b"%b%d\r\n\r\n%b" % (self._head, len(body), body), started + meant))
                if due is not None:
                    self.report.punctuality.note(loop.time() - started - due)
                self.report.sent += 1
            for _ in range(self._connections):
                await queue.put(None)
        self.report.took_s = 0.0 if started is None else loop.time() - started

    async def _work(
        self,
        queue: asyncio.Queue[_Request | None],
        loop: asyncio.AbstractEventLoop,
        progress: Callable[[int], None] | None,
    ) -> None:
        """One connection's life: request after request, reconnecting as needed."""
        connection: _Connection | None = None
        while (request := await queue.get()) is not None:
            connection = await self._answered(request, connection, loop)
            if progress is not None:
                progress(1)
        if connection is not None:
            connection.close()

    async def _answered(
        self, request: _Request, connection: _Connection | None, loop: asyncio.AbstractEventLoop
    ) -> _Connection | None:
        """Send until there is an answer or the bounds are reached. The connection to go on with."""
        give_up = loop.time() + self._retry_max_s
        for attempt in range(self._attempts_max):
            if attempt:
                self.report.retries += 1
                await asyncio.sleep(min(BACKOFF_FIRST_S * 2 ** (attempt - 1), BACKOFF_MAX_S))
            try:
                if connection is None or not connection.usable:
                    async with asyncio.timeout(self._request_timeout_s):
                        _, connection = await loop.create_connection(_Connection, self._host, self._port)
                status, body = await connection.exchange(request.payload, loop, self._request_timeout_s)
            except OSError:  # ConnectionError and TimeoutError among them
                connection = None
                if loop.time() > give_up:
                    break
                continue
            self.report.statuses[status] += 1
            self.report.latencies_s.append(loop.time() - request.due)
            if status != 200:
                self.report.refusals[_problem(body)] += 1
            return connection
        self.report.failed += 1
        return connection


def _problem(body: bytes) -> str:
    """The `reason` of a problem document, or what stands in for it."""
    try:
        problem = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return "unreadable"
    return str(problem.get("reason", "unnamed")) if isinstance(problem, dict) else "unreadable"
