"""The HTTP sender against a small server that misbehaves as told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deploy.ports import free_ports
from loadtest.events import Event
from loadtest.ledger import Ledger
from loadtest.pace import Pace
from loadtest.senders.http import HttpSender
from loadtest.simulator import Simulator, SimulatorConfig

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
BYE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
IN_PIECES = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
PROBLEM = b'{"type":"about:blank","reason":"wrong_type"}'
REFUSED = b"HTTP/1.1 422 Unprocessable\r\ncontent-length: %d\r\n\r\n%b" % (len(PROBLEM), PROBLEM)
CLOSE, SILENCE = b"close", b"silence"

EVENTS = list(Simulator(SimulatorConfig(cards=200)).events(300))


class Server:
    """Answers the n-th request (from 0) with `answer(n)`; CLOSE hangs up, SILENCE says nothing. Runs in a thread."""

    def __init__(self, port: int, answer: Callable[[int], bytes], delay_s: Callable[[int], float]) -> None:
        self.bodies: list[bytes] = []
        self.connections = 0
        self.heads: list[bytes] = []
        self._port, self._answer, self._delay_s = port, answer, delay_s
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        server = await asyncio.start_server(self._client, "127.0.0.1", self._port)
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                n = len(self.bodies)
                self.bodies.append(await reader.readexactly(length))
                await asyncio.sleep(self._delay_s(n))  # sleeps: a slow server
                answer = self._answer(n)
                if answer == CLOSE:
                    return
                if answer != SILENCE:
                    writer.write(answer)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(5)


@contextmanager
def serving(
    answer: Callable[[int], bytes] = lambda _: OK, delay_s: Callable[[int], float] = lambda _: 0.0
) -> Iterator[tuple[Server, str]]:
    (port,) = free_ports(1)
    with Server(port, answer, delay_s) as server:
        yield server, f"http://127.0.0.1:{port}"


def sequence(events: list[Event]) -> Iterator[tuple[int, int, Event]]:
    return ((i, 0, event) for i, event in enumerate(events))


def test_every_payment_is_sent_once_over_few_connections() -> None:
    with serving() as (server, url):
        ledger = Ledger()
        sender = HttpSender(url, ledger=ledger, connections=4)
        sender.run(sequence(EVENTS), Pace())
    assert {json.loads(b)["transaction_id"] for b in server.bodies} == {e.transaction.transaction_id for e in EVENTS}
    assert len(server.bodies) == len(EVENTS) == sender.report.statuses[200] == len(ledger)
    assert server.connections <= 4
    assert sender.report.retries == sender.report.failed == 0


@pytest.mark.parametrize("answer", [BYE, IN_PIECES], ids=["connection: close", "chunked"])
def test_other_forms_of_an_answer_are_understood(answer: bytes) -> None:
    with serving(lambda _: answer) as (_, url):
        sender = HttpSender(url, connections=2)
        sender.run(sequence(EVENTS[:20]), Pace())
    assert sender.report.statuses == {200: 20}
    assert sender.report.retries == 0


@pytest.mark.parametrize("fault", [CLOSE, b"no HTTP\r\n\r\n", SILENCE], ids=["hang-up", "garbage", "silence"])
def test_a_request_without_an_answer_is_sent_again_unchanged(fault: bytes) -> None:
    with serving(lambda n: fault if n == 3 else OK) as (server, url):
        sender = HttpSender(url, connections=1, request_timeout_s=0.3)
        sender.run(sequence(EVENTS[:10]), Pace())
    assert server.bodies[3] == server.bodies[4]
    assert len(server.bodies) == 11
    assert (sender.report.statuses, sender.report.retries, sender.report.failed) == ({200: 10}, 1, 0)


def test_retries_end_after_their_count_and_the_rest_goes_on() -> None:
    with serving(lambda n: CLOSE if n < 3 else OK) as (_, url):
        sender = HttpSender(url, connections=1, attempts_max=3)
        sender.run(sequence(EVENTS[:5]), Pace())
    assert (sender.report.failed, sender.report.retries, sender.report.statuses) == (1, 2, {200: 4})


def test_nobody_listening_ends_in_failures_not_in_waiting() -> None:
    (port,) = free_ports(1)
    sender = HttpSender(f"http://127.0.0.1:{port}", connections=2, attempts_max=30, retry_max_s=0.1)
    sender.run(sequence(EVENTS[:4]), Pace())
    assert sender.report.failed == sender.report.sent == 4
    assert sender.report.retries < 4 * 30


def test_a_refusal_is_counted_by_its_reason_and_not_repeated() -> None:
    with serving(lambda n: REFUSED if n % 2 else OK) as (server, url):
        sender = HttpSender(url, connections=1)
        sender.run(sequence(EVENTS[:10]), Pace())
    assert sender.report.statuses == {200: 5, 422: 5}
    assert sender.report.refusals == {"wrong_type": 5}
    assert len(server.bodies) == 10


def test_latency_counts_from_the_time_a_request_was_due() -> None:
    # The first answer takes 0.3 s; those due meanwhile wait for the only connection, and that is part of their latency.
    with serving(delay_s=lambda n: 0.3 if n == 0 else 0.0) as (_, url):
        sender = HttpSender(url, connections=1)
        sender.run(sequence(EVENTS[:20]), Pace(rate_per_s=100))
    latencies = list(sender.report.latencies_s)
    assert latencies[0] >= 0.3
    assert latencies[10] >= 0.15


def test_a_rate_is_kept_whatever_the_answers_take() -> None:
    with serving(delay_s=lambda _: 0.05) as (_, url):
        sender = HttpSender(url, connections=32)
        sender.run(sequence(EVENTS[:100]), Pace(rate_per_s=200))
    assert 0.45 <= sender.report.took_s < 2.0


def test_only_plain_http_is_spoken() -> None:
    with pytest.raises(ValueError, match="http://"):
        HttpSender("https://example.org")


def test_every_request_carries_the_headers_that_were_asked_for() -> None:
    with serving() as (server, url):
        HttpSender(url, connections=1, headers={"Authorization": "Bearer fg_abc"}).run(sequence(EVENTS[:3]), Pace())
    assert len(server.heads) == 3
    assert all(b"\r\nAuthorization: Bearer fg_abc\r\n" in head for head in server.heads)
