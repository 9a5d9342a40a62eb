"""`python -m loadtest.openloop.http`: requests at a constant rate over keep-alive connections, or as fast as answers come.

It shares two cores with what it measures, so it does without an event loop: plain non-blocking sockets and epoll, request bytes made
beforehand, and one wake-up a tick (TICK_S) that reads every answer that is there and sends every request that is due. A request goes
to the connection that has been idle longest; when all are busy it waits, in order, and its latency counts from when it was due.
One request at a time a connection. Without --rate each connection sends its next request as soon as it has its answer.

Measured against an empty handler on the other core: 23 us of CPU a request at 10,000 a second, the kernel's work in it
(docs/benchmarks.md). The tick makes latencies up to a millisecond longer than they were, never shorter.
"""

from __future__ import annotations

import argparse
import gc
import select
import socket
import sys
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np

from gateway.contracts.transaction import encode_json
from loadtest.latency import latency_of
from loadtest.openloop.payments import People, payments, run_name
from loadtest.openloop.report import cpu_s, tell
from loadtest.openloop.schedule import Record, Schedule, Windows

TICK_S = 0.001
CONNECTIONS = 64
REQUEST_TIMEOUT_S = 10.0
# After the last request is due: what has no answer by then is censored.
DRAIN_S = 10.0
CONNECT_TIMEOUT_S = 5.0
RECEIVE_BYTES = 65_536
FAILURES_MAX = 10_000
_LENGTH = b"content-length:"
_HEAD_END = b"\r\n\r\n"
HEAD_BYTES_MAX = 65_536


class GeneratorError(RuntimeError):
    """The load can't be made. The message says why."""


def status_and_size(data: bytes | bytearray) -> tuple[int, int] | None:
    """(status, bytes of the whole answer) once its head is complete, else None. Raises `GeneratorError` for what it can't read."""
    head_end = data.find(_HEAD_END)
    if head_end < 0:
        if len(data) > HEAD_BYTES_MAX:
            raise GeneratorError("an answer's head has no end")
        return None
    at = data.find(_LENGTH, 0, head_end)
    if at < 0:
        # Servers write it in any case; those measured here mostly in this one.
        at = bytes(data[:head_end]).lower().find(_LENGTH)
        if at < 0:
            raise GeneratorError("an answer names no content-length")
    end = data.find(b"\r\n", at)
    return int(data[9:12]), head_end + 4 + int(data[at + len(_LENGTH) : end])


class Connection:
    """A keep-alive connection: `request` is the number of the one under way, -1 when idle since `idle_since_s`."""

    __slots__ = ("buffer", "due_s", "fd", "idle_since_s", "recv", "request", "send", "sent_s", "sock")

    def __init__(self, sock: socket.socket, now_s: float) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.send, self.recv = sock.send, sock.recv
        self.request = -1
        self.due_s = self.sent_s = 0.0
        self.idle_since_s = now_s
        self.buffer: bytes = b""


class Driver:
    """One run. `bodies` are whole requests. `schedule` None: closed loop, until the windows are over.

    `clock_s` is monotonic; `nap` sleeps; `on_edge` is told the window that begins and how many were answered with 200 by then.
    """

    def __init__(
        self,
        address: tuple[str, int],
        requests: Sequence[bytes],
        schedule: Schedule | None,
        windows: Windows,
        *,
        connections: int = CONNECTIONS,
        clock_s: Callable[[], float] = time.monotonic,
        nap: Callable[[float], None] = time.sleep,
        on_edge: Callable[[int, int], None] = lambda _k, _done: None,
    ) -> None:
        self._address = address
        self._requests = requests
        self._schedule = schedule
        self._windows = windows
        self._connections_max = connections
        self._clock_s, self._nap, self._on_edge = clock_s, nap, on_edge
        self._poller = select.epoll()
        self._open: dict[int, Connection] = {}
        self._idle: deque[Connection] = deque()
        self.record = Record(len(requests) if schedule is not None else 0)
        self.closed_latency_s: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.sent = self.done = self.failed = 0
        self._turn_s = 0.0
        self._edge = 0
        self.start_s = self.end_s = 0.0

    def run(self) -> None:
        for _ in range(self._connections_max):
            self._connect()
        schedule = self._schedule
        self.start_s = self._turn_s = self._clock_s() if schedule is None else schedule.start_s
        edges_s = [self.start_s + s for s in self._windows.edges_s()]
        stop_s = edges_s[-1] + (DRAIN_S if schedule is not None else 0.0)
        look_s = self.start_s
        try:
            if schedule is not None:
                self._nap(max(0.0, schedule.start_s - self._clock_s()))
            while True:
                now = self._clock_s()
                while self._edge < len(edges_s) and now >= edges_s[self._edge]:
                    self._on_edge(self._edge, self.statuses[200])
                    self._edge += 1
                if now >= stop_s or (schedule is not None and self.done + self.failed == schedule.count and now >= edges_s[-1]):
                    break
                if now - look_s > 0.25:
                    look_s = now
                    self._give_up_on_silent(now)
                if schedule is None:
                    self._turn_closed(now, edges_s[self._edge] if self._edge < len(edges_s) else stop_s)
                else:
                    self._turn_open(now, schedule)
        finally:
            self.end_s = self._clock_s()
            for connection in self._open.values():
                connection.sock.close()
            self._poller.close()

    def _turn_open(self, now: float, schedule: Schedule) -> None:
        self._read_answers(0.0, now)
        due = schedule.due_by(now)
        idle, behind = self._idle, self.record.behind_s
        while self.sent < due and idle:
            connection = idle.popleft()
            i = self.sent
            due_s = schedule.due_s(i)
            behind[i] = max(0.0, now - max(due_s, connection.idle_since_s))
            self._send(connection, i, due_s, now)
        self._turn_s = now
        # The next tick, or at once when this turn took longer than one.
        rest = now + TICK_S - self._clock_s()
        if rest > 0:
            self._nap(rest)

    def _turn_closed(self, now: float, until_s: float) -> None:
        while self._idle:
            self._send(self._idle.popleft(), self.sent, now, now)
        self._read_answers(min(0.25, max(0.001, until_s - now)), now)

    def _send(self, connection: Connection, i: int, due_s: float, now: float) -> None:
        connection.request, connection.due_s, connection.sent_s = i, due_s, now
        self.sent += 1
        data = self._requests[i % len(self._requests)]
        try:
            if connection.send(data) != len(data):
                # A fresh request on an idle connection fits into the socket's buffer, or nobody reads at the other end.
                self._drop(connection)
        except OSError:
            self._drop(connection)

    def _read_answers(self, wait_s: float, now: float) -> None:
        events = self._poller.poll(wait_s)
        if self._schedule is None:
            now = self._clock_s()
        for fd, _ in events:
            connection = self._open.get(fd)
            if connection is not None:
                self._read(connection, now)

    def _read(self, connection: Connection, now: float) -> None:
        try:
            data = connection.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or connection.request < 0:
            # Closed by the server, or bytes that nobody asked for.
            self._drop(connection)
            return
        if connection.buffer:
            data = connection.buffer + data
        found = status_and_size(data)
        if found is None or len(data) < found[1]:
            connection.buffer = data
            return
        connection.buffer = b""
        self.statuses[found[0]] += 1
        self.done += 1
        if self._schedule is None:
            if self._edge:
                self.closed_latency_s.append(now - connection.sent_s)
        else:
            self.record.latency_s[connection.request] = now - connection.due_s
        connection.request = -1
        # Its answer may have been there since the turn before: the next request on it may be late by as much.
        connection.idle_since_s = self._turn_s
        self._idle.append(connection)

    def _drop(self, connection: Connection) -> None:
        """Close it and open another. A request under way on it failed, and waits for the end of the run in the record."""
        if connection.request >= 0:
            self.failed += 1
            connection.request = -1
        del self._open[connection.fd]
        self._poller.unregister(connection.fd)
        connection.sock.close()
        if connection in self._idle:
            self._idle.remove(connection)
        if self.failed > FAILURES_MAX:
            raise GeneratorError(f"more than {FAILURES_MAX} requests failed")
        self._connect()

    def _give_up_on_silent(self, now: float) -> None:
        for connection in list(self._open.values()):
            if connection.request >= 0 and now - connection.sent_s > REQUEST_TIMEOUT_S:
                self._drop(connection)

    def _connect(self) -> None:
        try:
            sock = socket.create_connection(self._address, CONNECT_TIMEOUT_S)
        except OSError as exc:
            raise GeneratorError(f"nobody answers at {self._address[0]}:{self._address[1]}: {exc}") from exc
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        connection = Connection(sock, self._clock_s())
        self._open[connection.fd] = connection
        self._poller.register(connection.fd, select.EPOLLIN)
        self._idle.append(connection)


def request_bytes(host: str, path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m loadtest.openloop.http", description=__doc__)
    parser.add_argument("url", help="where to POST to")
    parser.add_argument("--rate", type=float, metavar="N", help="requests a second (default: closed loop)")
    parser.add_argument("--connections", type=int, default=CONNECTIONS, metavar="N", help="default %(default)s")
    parser.add_argument("--warm-up", type=float, default=3.0, metavar="S", help="seconds that don't count (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of a window (default %(default)s)")
    parser.add_argument("--windows", type=int, default=3, metavar="N", help="default %(default)s")
    parser.add_argument("--run", default=run_name("r"), help="beginning of the transaction ids")
    parser.add_argument("--cards", type=int, default=People.cards, metavar="N", help="default %(default)s")
    parser.add_argument("--merchants", type=int, default=People.merchants, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=7, help="of the payments (default %(default)s)")
    parser.add_argument("--body", type=Path, metavar="FILE", help="send this body each time instead of payments")
    parser.add_argument("--requests", type=int, default=0, metavar="N", help="to make for a closed loop (default: 40,000 a second)")
    options = parser.parse_args(argv)
    parts = urllib.parse.urlsplit(options.url)
    if parts.hostname is None or not 1 <= options.connections <= 1024 or options.windows < 1 or options.seconds <= 0:
        parser.error("a URL, 1 to 1,024 connections and a window or more are needed")
    windows = Windows(options.warm_up, options.seconds, options.windows)
    count = int(windows.total_s * options.rate) if options.rate else options.requests or int(windows.total_s * 40_000)
    if not 1 <= count <= 5_000_000:
        parser.error("1 to 5,000,000 requests can be made")
    # Encoding takes some 10 us a request; the schedule begins when it is over for sure.
    begin_in_s = 1.0 + count * 2.5e-5
    first_ms = time.time_ns() // 1_000_000 + int(begin_in_s * 1000)
    start_s = time.monotonic() + begin_in_s
    people = People(options.cards, options.merchants)
    if options.body is not None:
        requests = [request_bytes(parts.netloc, parts.path, options.body.read_bytes())] * (count if options.rate else 1)
    else:
        made = payments(people, options.run, count, first_ms, options.rate or 20_000.0, options.seed)
        requests = [request_bytes(parts.netloc, parts.path, encode_json(t)) for t in made]
    schedule = Schedule(options.rate, max(start_s, time.monotonic() + 0.1), count) if options.rate else None
    used: list[float] = []

    def edge(k: int, done: int) -> None:
        used.append(cpu_s())
        tell(edge=k, done=done)

    driver = Driver((parts.hostname, parts.port or 80), requests, schedule, windows, connections=options.connections, on_edge=edge)
    # Hundreds of thousands of requests that live to the end are nothing to look through again and again.
    gc.collect()
    gc.disable()
    try:
        driver.run()
    except GeneratorError as exc:
        print(f"load: {exc}", file=sys.stderr)
        return 1
    tell(result=msgspec.to_builtins(result(driver, schedule, windows, used)))
    return 0


def result(driver: Driver, schedule: Schedule | None, windows: Windows, used: list[float]) -> dict[str, object]:
    """The run as plain data. `cpu_s` is the generator's own, by window."""
    out: dict[str, object] = {
        "sent": driver.sent,
        "done": driver.done,
        "failed": driver.failed,
        "statuses": {str(status): count for status, count in driver.statuses.items()},
        "cpu_s": np.diff(used).tolist(),
    }
    if schedule is not None:
        out["windows"] = [
            asdict(w) | {"void": w.void, "reached_rate": w.reached_rate}
            for w in (driver.record.window(k, windows, schedule, driver.end_s) for k in range(windows.count))
        ]
    else:
        out["latency"] = asdict(latency_of(driver.closed_latency_s))
    return out


if __name__ == "__main__":
    sys.exit(main())
