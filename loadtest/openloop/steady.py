"""`python -m loadtest.openloop.steady`: a constant load through both doors for a long time, sent as a payment service would.

Open loop: payments leave when they are due, whatever becomes of those before. Nine of ten are posted over keep-alive connections, one is
put on Kafka (`loadtest.openloop.feed`). What has no answer FIRST_TRY_S after it was sent, loses its connection or is told 503 is sent
once more, the same body on a new connection, as far as the retry budget goes; its latency still counts from when it was due. 429 is not
sent again. The gateway is told to answer within DEADLINE_MS. One wake-up a tick (1 ms) reads every answer that is there and sends
everything that is due; 35 us of CPU a payment.

Tells `start_s` (the machine's monotonic clock) and `start_ms`, then a line a second, then the result. SIGTERM ends the run early; what
was sent by then is written all the same. Called by `deploy.soak`.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from gateway.contracts.settings import load_settings
from loadtest.openloop.feed import Feeder
from loadtest.openloop.http import RECEIVE_BYTES, TICK_S, status_and_size
from loadtest.openloop.outcomes import (
    FAILED,
    MIXED_UP,
    NOT_SENT,
    Log,
    degraded_bits,
    is_kafka,
    outcome_number,
    reasons_hash,
)
from loadtest.openloop.report import cpu_s, tell
from loadtest.openloop.shoppers import Shoppers, Span

CONNECTIONS, CONNECTIONS_MAX = 64, 512
# What the gateway is told to answer within, and when the answer is asked for again on another connection: a payment service that has
# ANSWER_MS must leave some of it to its second attempt. That one is told what is left, less what the way takes.
ANSWER_MS = 100
DEADLINE_MS, DEADLINE_MS_LEAST = 50, 15
FIRST_TRY_S = 0.065
WAY_MS = 5
# A budget for second attempts, as clients of services have it (Finagle's figures): of 10 s a fifth of the payments, and 10 a second.
# Without one, a slow moment of a busy service is answered with half as much work again, which it may never get out of.
RETRY_SPAN_S, RETRY_SHARE, RETRIES_PER_S = 10.0, 0.2, 10.0
# From when it was due. Far beyond what counts as good: so that history knows of late answers too.
GIVE_UP_S = 2.0
WAITING_MAX = 20_000
DRAIN_S = 5.0
BLOCK = 64
# It shares the machine with what it measures: a generator that waits for a core measures itself.
NICENESS = -10
RETRIED = frozenset({503})


class _Reason(msgspec.Struct):
    code: str


class _Answer(msgspec.Struct):
    transaction_id: str
    decision: str
    risk_score: int
    reasons: list[_Reason]
    degraded: list[str]


_decoder = msgspec.json.Decoder(_Answer)


class Call:
    """Payment `number`, due at `due_s`, of which `attempts` have been sent."""

    __slots__ = ("attempts", "body", "due_s", "number")

    def __init__(self, number: int, due_s: float, body: bytes) -> None:
        self.number, self.due_s, self.body = number, due_s, body
        self.attempts = 0

    def deadline_ms(self, now: float) -> int:
        """What the gateway is told for the attempt that is made now."""
        if self.attempts <= 1:
            return DEADLINE_MS
        left_ms = ANSWER_MS - WAY_MS - round((now - self.due_s) * 1000)
        return min(DEADLINE_MS, max(DEADLINE_MS_LEAST, left_ms))


class Connection:
    """`call` is the one under way, None when idle. `pending`: not connected yet, it is sent then."""

    __slots__ = ("buffer", "call", "fd", "pending", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.call: Call | None = None
        self.pending = True
        self.buffer = b""


class RetryBudget:
    """How many second attempts there may be. `rate_per_s` is that of first ones, which bounds what is saved up."""

    def __init__(self, rate_per_s: float) -> None:
        self._most = RETRY_SPAN_S * (RETRY_SHARE * rate_per_s + RETRIES_PER_S)
        self._left, self._at_s = self._most, -1.0

    def sent(self, now_s: float) -> None:
        """A first attempt was made."""
        passed_s = 0.0 if self._at_s < 0 else now_s - self._at_s
        self._at_s = now_s
        self._left = min(self._most, self._left + RETRY_SHARE + RETRIES_PER_S * passed_s)

    def take(self) -> bool:
        """Whether there may be one now."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Caller:
    """The HTTP side. After `first_try_s` an answer is asked for again, as long as `budget` allows. `clock_s` is monotonic."""

    def __init__(
        self,
        address: tuple[str, int],
        run: str,
        log: Log,
        budget: RetryBudget,
        first_try_s: float = FIRST_TRY_S,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address, self._run, self._log, self._clock_s = address, run, log, clock_s
        self._host = f"{address[0]}:{address[1]}"
        self._first_try_s = first_try_s
        self._budget = budget
        self._poller = select.epoll()
        self._open: dict[int, Connection] = {}
        self._idle: deque[Connection] = deque()
        self._waiting: deque[Call] = deque()
        # When the calls under way are given up, in order, for the first attempt and for the second.
        self._first: deque[tuple[float, Connection, Call]] = deque()
        self._second: deque[tuple[float, Connection, Call]] = deque()
        self.under_way = self.answered = self.retried = self.unretried = 0
        self._connections_most = self._waiting_most = 0

    def submit(self, call: Call, now: float) -> None:
        """Send it on the connection that has been idle longest, on a new one, or as soon as one is free."""
        self.under_way += 1
        # Who waits goes first.
        if not self._waiting and self._starts(call, now):
            return
        if len(self._waiting) < WAITING_MAX:
            self._waiting.append(call)
            self._waiting_most = max(self._waiting_most, len(self._waiting))
        else:
            self._end(call, NOT_SENT, now)

    def _starts(self, call: Call, now: float) -> bool:
        while self._idle:
            connection = self._idle.popleft()
            if connection.fd in self._open and connection.call is None:
                self._send(connection, call, now)
                return True
        if len(self._open) < CONNECTIONS_MAX:
            self._on_a_new_one(call, now)
            return True
        return False

    def turn(self) -> None:
        """Read every answer that is there, and give up on what takes too long."""
        events = self._poller.poll(0)
        now = self._clock_s()
        for fd, event in events:
            connection = self._open.get(fd)
            if connection is None:
                continue
            if connection.pending and event & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
                self._connected(connection, now)
            elif event & (select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP):
                self._read(connection, now)
        self._give_up(self._first, now)
        self._give_up(self._second, now)
        while self._waiting and self._starts(self._waiting[0], now):
            self._waiting.popleft()

    def peaks(self) -> tuple[int, int]:
        """Most connections at once, and most payments that waited for one, since the last call."""
        found = self._connections_most, self._waiting_most
        self._connections_most, self._waiting_most = len(self._open), len(self._waiting)
        return found

    def close(self) -> None:
        for connection in list(self._open.values()):
            self._drop(connection)
        self._poller.close()

    def _on_a_new_one(self, call: Call, now: float) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock)
        self._open[connection.fd] = connection
        self._connections_most = max(self._connections_most, len(self._open))
        self._poller.register(connection.fd, select.EPOLLIN | select.EPOLLOUT)
        status = sock.connect_ex(self._address)
        self._begin(connection, call, now)
        if status not in (0, errno.EINPROGRESS):
            self._failed(connection, now)

    def _begin(self, connection: Connection, call: Call, now: float) -> None:
        connection.call = call
        call.attempts += 1
        if call.attempts == 1:
            self._log.late_us[call.number] = int((now - call.due_s) * 1e6)
            self._budget.sent(now)
            self._first.append((now + self._first_try_s, connection, call))
        else:
            self._second.append((call.due_s + GIVE_UP_S, connection, call))

    def _connected(self, connection: Connection, now: float) -> None:
        if connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._failed(connection, now)
            return
        connection.pending = False
        self._poller.modify(connection.fd, select.EPOLLIN)
        if connection.call is not None:
            self._write(connection, connection.call, now)

    def _send(self, connection: Connection, call: Call, now: float) -> None:
        self._begin(connection, call, now)
        self._write(connection, call, now)

    def _write(self, connection: Connection, call: Call, now: float) -> None:
        try:
            request = request_of(self._host, call.body, call.deadline_ms(now))
            if connection.sock.send(request) != len(request):
                # A request on an idle connection fits into the socket's buffer, or nobody reads at the other end.
                self._failed(connection, now)
        except OSError:
            self._failed(connection, now)

    def _read(self, connection: Connection, now: float) -> None:
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        call = connection.call
        if not data or call is None:
            self._failed(connection, now)
            return
        data = connection.buffer + data if connection.buffer else data
        found = status_and_size(data)
        if found is None or len(data) < found[1]:
            connection.buffer = data
            return
        connection.buffer = b""
        connection.call = None
        status, size = found
        if b"onnection: close" in data[:300] or len(self._open) > CONNECTIONS:
            self._drop(connection)
        else:
            self._idle.append(connection)
        if status in RETRIED and call.attempts == 1 and self._again(call, now):
            return
        if status == 200:
            status = self._note(call, data[data.find(b"\r\n\r\n") + 4 : size])
        self._end(call, status, now)

    def _note(self, call: Call, body: bytes) -> int:
        answer, log, i = _decoder.decode(body), self._log, call.number
        if answer.transaction_id != f"{self._run}-{i}":
            return MIXED_UP
        log.outcome[i] = outcome_number(answer.decision)
        log.score[i] = answer.risk_score
        if answer.reasons:
            log.reasons[i] = reasons_hash([r.code for r in answer.reasons])
        if answer.degraded:
            log.degraded[i] = degraded_bits(answer.degraded)
        return 200

    def _end(self, call: Call, status: int, now: float) -> None:
        log, i = self._log, call.number
        log.status[i], log.attempts[i] = status, call.attempts
        log.latency_us[i] = int((now - call.due_s) * 1e6)
        self.under_way -= 1
        self.answered += status == 200

    def _give_up(self, deadlines: deque[tuple[float, Connection, Call]], now: float) -> None:
        while deadlines and deadlines[0][0] <= now:
            _, connection, call = deadlines.popleft()
            if connection.call is call:
                self._failed(connection, now)

    def _failed(self, connection: Connection, now: float) -> None:
        """Whatever was under way on it is tried once more elsewhere."""
        call, connection.call = connection.call, None
        self._drop(connection)
        if call is None:
            return
        if call.attempts > 1 or not self._again(call, now):
            self._end(call, FAILED, now)

    def _again(self, call: Call, now: float) -> bool:
        """Send it once more. False: the budget is used up."""
        if not self._budget.take():
            self.unretried += 1
            return False
        self.retried += 1
        self._on_a_new_one(call, now)
        return True

    def _drop(self, connection: Connection) -> None:
        if self._open.pop(connection.fd, None) is not None:
            self._poller.unregister(connection.fd)
            connection.sock.close()


class Steady:
    """One run of `count` payments, `rate_per_s` a second from `start_s` on. `stop` ends it early."""

    def __init__(self, caller: Caller, feeder: Feeder, shoppers: Shoppers, rate_per_s: float, count: int) -> None:
        self._caller, self._feeder, self._shoppers = caller, feeder, shoppers
        self._rate_per_s, self._count = rate_per_s, count
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def run(self, start_s: float) -> int:
        """Returns how many were sent, once their answers are there or too late."""
        caller, feeder, rate = self._caller, self._feeder, self._rate_per_s
        sent, told_s = 0, start_s
        block: list[tuple[str, bytes]] = []
        time.sleep(max(0.0, start_s - time.monotonic()))
        while sent < self._count and not self._stopped:
            now = time.monotonic()
            caller.turn()
            due = min(self._count, int((now - start_s) * rate) + 1)
            while sent < due:
                at = sent % BLOCK
                if at == 0:
                    block = self._shoppers.block(sent, min(BLOCK, self._count - sent))
                self._submit(sent, start_s + sent / rate, *block[at])
                sent += 1
            feeder.turn()
            if now - told_s >= 1.0:
                told_s += 1.0
                connections, waiting = caller.peaks()
                tell(
                    second=round(told_s - start_s),
                    sent=sent,
                    answered=caller.answered,
                    retried=caller.retried,
                    connections=connections,
                    waiting=waiting,
                )
            rest = now + TICK_S - time.monotonic()
            if rest > 0:
                time.sleep(rest)
        give_up_s = time.monotonic() + DRAIN_S
        while caller.under_way and time.monotonic() < give_up_s:
            caller.turn()
            time.sleep(TICK_S)
        return sent

    def _submit(self, number: int, due_s: float, card: str, body: bytes) -> None:
        now = time.monotonic()
        if is_kafka(number):
            self._feeder.submit(number, due_s, card, body, now)
        else:
            self._caller.submit(Call(number, due_s, body), now)


def request_of(host: str, body: bytes, deadline_ms: int) -> bytes:
    return b"POST /score HTTP/1.1\r\nHost: %b\r\nFraudgate-Deadline-Ms: %d\r\nContent-Length: %d\r\n\r\n%b" % (
        *(host.encode(), deadline_ms, len(body)),
        body,
    )


def go_first() -> None:
    """Where the kernel groups processes by session (autogroup), only a session's own niceness counts among the others."""
    try:
        os.setsid()
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
        Path("/proc/self/autogroup").write_text(str(NICENESS))
    except OSError as exc:
        print(f"load: without the right to go first, it may be late and say so: {exc}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m loadtest.openloop.steady", description=__doc__)
    parser.add_argument("--run", required=True, help="beginning of the transaction ids")
    parser.add_argument("--rate", type=float, required=True, metavar="N", help="payments a second")
    parser.add_argument("--seconds", type=float, required=True, metavar="S", help="how long")
    parser.add_argument("--seed", type=int, required=True, help="of the payments")
    parser.add_argument("--skew", action="append", default=[], metavar="FROM:TO", help="seconds in which some clocks are wrong")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write what became of each payment (.npz)")
    options = parser.parse_args(argv)
    settings = load_settings()
    count = int(options.rate * options.seconds)
    skewed = [Span(*map(float, text.split(":"))) for text in options.skew]
    log = Log(count)
    feeder = Feeder(log, options.out.parent)
    go_first()
    start_s, start_ms = time.monotonic() + 1.0, time.time_ns() // 1_000_000 + 1000
    caller = Caller((settings.host, settings.gateway_port), options.run, log, RetryBudget(options.rate))
    shoppers = Shoppers(options.run, options.seed, options.rate, start_ms, skewed)
    steady = Steady(caller, feeder, shoppers, options.rate, count)
    signal.signal(signal.SIGTERM, lambda *_: steady.stop())
    # Whoever started this decides when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.disable()
    tell(start_s=start_s, start_ms=start_ms)
    sent = steady.run(start_s)
    caller.close()
    left = feeder.finish()
    log.save(options.out)
    tell(
        result={
            "sent": sent,
            "answered": caller.answered,
            "retried": caller.retried,
            "unretried": caller.unretried,
            "left": left,
            "cpu_s": cpu_s(),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
