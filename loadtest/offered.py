"""An open-loop caller of POST /score: requests leave when they are due, whatever becomes of those before them.

Used by `fraudgate chaos` and the tests of overload and deploys. One process on one event loop, good for some 10,000 requests a second; a
run whose sender fell behind says so (`late_ms`). A request that finds no free connection is not sent and counted as such, as by a
caller with a bounded pool. Nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

TICK_S = 0.001
ANSWER_TIMEOUT_S = 10.0
FAILED, NOT_SENT = 0, -1


@dataclass
class Sample:
    """`at_s` is when it was due, from the beginning of the run; `status` FAILED: the connection ended without an answer.

    `degraded` is what stood in the answer's list, as text.
    """

    at_s: float
    status: int
    latency_s: float
    degraded: str = ""


@dataclass
class Offered:
    """What became of a run's requests. `mixed_up` are answers with another transaction_id than was asked for."""

    samples: list[Sample] = field(default_factory=list)
    mixed_up: int = 0
    late_ms: float = 0.0

    def statuses(self) -> Counter[int]:
        return Counter(s.status for s in self.samples)

    def answered(self, from_s: float = 0.0, to_s: float = float("inf")) -> list[float]:
        """Latencies of the decisions, sorted, seconds."""
        return sorted(s.latency_s for s in self.samples if s.status == 200 and from_s <= s.at_s < to_s)


def quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else float("nan")


class _Caller(asyncio.Protocol):
    def __init__(self, run: _Run) -> None:
        self._run = run
        self.transport: asyncio.WriteTransport | None = None
        self._buffer = b""
        self._due_s = 0.0
        self._id = b""
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, due_s: float, transaction_id: bytes, request: bytes) -> None:
        self._due_s, self._id, self.busy = due_s, transaction_id, True
        assert self.transport is not None
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n", 1)[0])
        if len(rest) < length:
            return
        self._buffer = b""
        self.busy = False
        status = int(head[9:12])
        if status == 200 and self._id not in rest:
            self._run.result.mixed_up += 1
        self._run.note(self._due_s, status, rest.partition(b'"degraded":[')[2].partition(b"]")[0].decode())
        if b"connection: close" in head:
            self._run.drop(self)
        else:
            self._run.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy:
            self.busy = False
            self._run.note(self._due_s, FAILED)
        self._run.drop(self)


class _Run:
    def __init__(self, host: str, port: int, connections: int) -> None:
        self._host, self._port, self._connections = host, port, connections
        self.result = Offered()
        self.idle: deque[_Caller] = deque()
        self._all: set[_Caller] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self.began_s = time.monotonic()

    def note(self, due_s: float, status: int, degraded: str = "") -> None:
        self.result.samples.append(Sample(due_s - self.began_s, status, time.monotonic() - due_s, degraded))

    def drop(self, caller: _Caller) -> None:
        self._all.discard(caller)
        if caller.transport is not None:
            caller.transport.close()

    @property
    def waiting(self) -> int:
        return sum(c.busy for c in self._all) + len(self._opening)

    @property
    def has_room(self) -> bool:
        return bool(self.idle) or len(self._all) + len(self._opening) < self._connections

    async def _open(self, due_s: float, transaction_id: bytes, request: bytes) -> None:
        try:
            _, caller = await asyncio.get_running_loop().create_connection(lambda: _Caller(self), self._host, self._port)
        except OSError:
            self.note(due_s, FAILED)
            return
        self._all.add(caller)
        caller.send(due_s, transaction_id, request)

    def send(self, due_s: float, transaction_id: bytes, request: bytes) -> None:
        while self.idle:
            caller = self.idle.popleft()
            if caller in self._all and caller.transport is not None and not caller.transport.is_closing():
                caller.send(due_s, transaction_id, request)
                return
        task = asyncio.create_task(self._open(due_s, transaction_id, request))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def close(self) -> None:
        for caller in list(self._all):
            caller.busy = False
            self.drop(caller)


def request_head(headers: bytes, body_bytes: int) -> bytes:
    return b"POST /score HTTP/1.1\r\nhost: gateway\r\n%bcontent-length: %d\r\n\r\n" % (headers, body_bytes)


async def offer(
    host: str,
    port: int,
    rate: Callable[[float], float],
    duration_s: float,
    request_of: Callable[[int], tuple[str, bytes]],
    connections: int = 256,
    headers: bytes = b"",
    enough: Callable[[], bool] = lambda: False,
) -> Offered:
    """`rate` tells the requests a second at a time of the run; `request_of(i)` the i-th's transaction_id and body.

    `headers` are lines that end with CRLF. It ends after `duration_s`, or when `enough` says so.
    """
    run = _Run(host, port, connections)
    run.began_s = due_s = time.monotonic()
    end_s = due_s + duration_s
    i = 0
    while due_s < end_s and not enough():
        now_s = time.monotonic()
        while due_s <= now_s and due_s < end_s:
            run.result.late_ms = max(run.result.late_ms, (now_s - due_s) * 1000)
            if run.has_room:
                transaction_id, body = request_of(i)
                run.send(due_s, transaction_id.encode(), request_head(headers, len(body)) + body)
            else:
                run.note(due_s, NOT_SENT)
            i += 1
            due_s += 1 / rate(due_s - run.began_s)
        await asyncio.sleep(TICK_S)
    give_up_s = time.monotonic() + ANSWER_TIMEOUT_S
    while run.waiting and time.monotonic() < give_up_s:  # noqa: ASYNC110
        await asyncio.sleep(TICK_S * 10)
    run.close()
    return run.result
