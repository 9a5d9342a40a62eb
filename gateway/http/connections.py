"""What the connections of the HTTP door share: limits, prepared bytes, and the watch that ends who is idle, slow or too many.

One walk over all connections a second, instead of a timer for each request.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from gateway.contracts.decision import Door
from gateway.errors import TITLES, GatewayError, problem_reply
from gateway.http.door import Reply
from gateway.metrics import Metrics

WATCH_S = 1.0
LEAVING_WATCH_S = 0.1
# How long a gateway that leaves still serves connections on which nothing is under way: a request may be on its way.
LEAVING_GRACE_S = 2.0
CLOSE = b"connection: close\r\n"

# A connection that was told 429 is not read for a moment, so that callers who come back at once can't spend our CPU on being told again:
# all of them together are read again at most at this rate, and each within the bounds.
SHED_PER_S_MAX = 2000
HOLD_LEAST_S = 0.005
HOLD_MAX_S = 0.25

WireHeaders = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Limits:
    """`idle_s`: without a request. `request_s`: for a request to arrive, or an answer to be read."""

    connections_max: int
    request_s: float
    idle_s: float


class Connection(Protocol):
    def end_if_late(self, now_s: float, idle_s: float, request_s: float) -> None: ...

    def read_again(self) -> None: ...

    def forget_hold(self) -> None: ...


class Connections:
    """One for all connections of a process."""

    def __init__(self, limits: Limits, metrics: Metrics, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.leaving = False
        self._metrics = metrics
        self._clock_s = clock_s
        # The server's own set.
        self._open: Collection[Connection] = ()
        self._head_for: WireHeaders | None = None
        self._head = b""
        self._shed: dict[tuple[type[GatewayError], bool], bytes] = {}
        self.shed: dict[str, int] = {}
        self._held: deque[tuple[float, Connection]] = deque()

    def admits(self, connections: Collection[Connection]) -> bool:
        """True unless this one, which is in `connections` already, is one too many."""
        self._open = connections
        if len(connections) <= self.limits.connections_max:
            return True
        self._metrics.connections_refused.inc()
        return False

    def leave(self) -> None:
        """Each answer from now on is the last of its connection, and who asks nothing for a while is disconnected."""
        self.leaving = True

    def head_of_answer(self, default_headers: WireHeaders) -> bytes:
        """What stands before the content-length of an answer. The server makes new default headers each second."""
        if default_headers is not self._head_for:
            self._head_for = default_headers
            lines = b"".join(b"%b: %b\r\n" % header for header in default_headers)
            self._head = b"HTTP/1.1 200 OK\r\n%bcontent-type: application/json\r\n" % lines
        return self._head

    def shed_reply(self, refusal: type[GatewayError], keep_alive: bool) -> bytes:
        """Bytes made once. They carry no date, which a server without a clock may leave out."""
        key = refusal, keep_alive
        if key not in self._shed:
            self._shed[key] = reply_bytes(problem_reply(refusal()), [], keep_alive)
        self.shed[refusal.reason] = self.shed.get(refusal.reason, 0) + 1
        return self._shed[key]

    def hold(self, connection: Connection) -> None:
        """Call `read_again` of a connection that was just told 429, in a while."""
        now_s = self._clock_s()
        after_s = self._held[-1][0] + 1 / SHED_PER_S_MAX if self._held else 0.0
        self._held.append((min(max(after_s, now_s + HOLD_LEAST_S), now_s + HOLD_MAX_S), connection))
        if len(self._held) == 1:
            asyncio.get_running_loop().call_later(HOLD_LEAST_S, self.release)

    def release(self) -> None:
        """Read again whose time has come."""
        now_s, released = self._clock_s(), []
        while self._held and self._held[0][0] <= now_s:
            connection = self._held.popleft()[1]
            connection.read_again()
            released.append(connection)
        loop = asyncio.get_running_loop()
        # What lies in their sockets is read before the pass after the next begins; what comes later has not waited.
        loop.call_soon(loop.call_soon, _forget_holds, released)
        if self._held:
            loop.call_later(max(0.001, self._held[0][0] - now_s), self.release)

    def slow(self) -> None:
        """A connection is ended because it takes too long."""
        self._metrics.connections_slow.inc()

    async def watch(self) -> None:
        """Runs until cancelled."""
        while True:
            await asyncio.sleep(LEAVING_WATCH_S if self.leaving else WATCH_S)
            self.look()

    def look(self) -> None:
        """End who is late, and count."""
        now_s, limits = self._clock_s(), self.limits
        idle_s = LEAVING_GRACE_S if self.leaving else limits.idle_s
        for connection in list(self._open):
            connection.end_if_late(now_s, idle_s, limits.request_s)
        self._metrics.connections.set(len(self._open))
        self._metrics.connections_held.set(len(self._held))
        for reason, n in self.shed.items():
            self._metrics.refused.labels(reason, Door.HTTP.value).inc(n)
            self._metrics.http_level.failed(n)
        self.shed.clear()


def _forget_holds(released: list[Connection]) -> None:
    for connection in released:
        connection.forget_hold()


def reply_bytes(reply: Reply, default_headers: WireHeaders, keep_alive: bool) -> bytes:
    """An answer as it goes over the wire."""
    status, headers, body = reply
    lines = [b"%b: %b\r\n" % header for header in (*default_headers, *headers)]
    return b"HTTP/1.1 %d %b\r\n%b%b\r\n%b" % (
        status,
        TITLES[status].encode(),
        b"".join(lines),
        b"" if keep_alive else CLOSE,
        body,
    )
