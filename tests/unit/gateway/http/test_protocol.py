"""The connections of the HTTP door, fed by hand: what is read, what is written, in which order, and when a connection ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn
from uvicorn.server import ServerState

from gateway.api_keys import KeyBook, create_key
from gateway.contracts.transaction import MESSAGE_BYTES_MAX, RefusedError, encode_json
from gateway.errors import GatewayError, OverloadedError, Problem
from gateway.http.batcher import Done
from gateway.http.connections import HOLD_LEAST_S, HOLD_MAX_S, LEAVING_GRACE_S, SHED_PER_S_MAX, Connections, Limits
from gateway.http.door import DISCARD_BYTES_MAX, ScoreDoor
from gateway.http.protocol import HEAD_BYTES_MAX, PIPELINED_MAX, DoorProtocol, protocol_of
from gateway.metrics import Metrics
from gateway.scoring.job import Job
from tests.unit.gateway.factories import decided, make_transaction, read_job

pytestmark = pytest.mark.anyio

REQUEST_S, IDLE_S = 10.0, 75.0


class FakeTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False
        self.reading = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class HeldBatcher:
    """Stands for gateway.http.batcher.Batcher: answers when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Job, Done]] = []
        self.full = False

    def refusal(self) -> type[GatewayError] | None:
        return OverloadedError if self.full else None

    def submit(
        self, body: bytes, received_s: float, deadline_s: float, done: Done, explain: bool, traceparent: bytes | None
    ) -> None:
        job = read_job(body, received_s, deadline_s)
        if isinstance(job, RefusedError):
            done(job, received_s)
        else:
            job.traceparent = traceparent
            self.waiting.append((job, done))

    def answer(self, i: int = 0) -> None:
        job, done = self.waiting.pop(i)
        done(decided(job), 0.0)


class Line:
    """One or more connections to one door, whose clock the test sets."""

    def __init__(self, connections_max: int = 100) -> None:
        self.now_s = 0.0
        self.metrics = Metrics()
        self.batcher = HeldBatcher()
        door = ScoreDoor(self.batcher, self.metrics, 80, clock_s=lambda: self.now_s)  # type: ignore[arg-type]
        self.shared = Connections(Limits(connections_max, REQUEST_S, IDLE_S), self.metrics, clock_s=lambda: self.now_s)
        self._make = protocol_of(door, self.shared)
        self._config = uvicorn.Config(
            self._app, http=self._make, ws="none", interface="asgi3", proxy_headers=False, log_config=None
        )
        self._state = ServerState()
        self.slow: list[str] = []
        self.protocol, self.transport = self.connect()

    async def _app(self, scope: Any, _receive: Any, send: Any) -> None:
        self.slow.append(scope["method"] + " " + scope["path"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def connect(self) -> tuple[DoorProtocol, FakeTransport]:
        transport = FakeTransport()
        protocol = self._make(self._config, self._state, {})
        protocol.connection_made(transport)
        return protocol, transport

    def feed(self, data: bytes) -> None:
        self.protocol.data_received(data)

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds
        self.shared.look()

    def replies(self) -> list[tuple[int, dict[str, str], bytes]]:
        """(status, headers, body) of each answer that was written."""
        found, rest = [], self.transport.written
        while rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            length = int(headers.get("content-length", "0"))
            found.append((int(first.split()[1]), headers, rest[:length]))
            rest = rest[length:]
        return found

    def statuses(self) -> list[int]:
        return [status for status, _, _ in self.replies()]


def post(transaction_id: str = "t1", *headers: str, body: bytes | None = None, version: str = "1.1") -> bytes:
    body = encode_json(make_transaction(transaction_id)) if body is None else body
    lines = [f"POST /score HTTP/{version}", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def reason_of(reply: tuple[int, dict[str, str], bytes]) -> str:
    return msgspec.json.decode(reply[2], type=Problem).reason


async def test_a_transaction_is_answered_on_a_connection_that_stays_open() -> None:
    line = Line()
    for name in ("a", "b"):
        line.feed(post(name))
        line.batcher.answer()
    assert line.statuses() == [200, 200]
    assert [msgspec.json.decode(body)["transaction_id"] for _, _, body in line.replies()] == ["a", "b"]
    assert line.replies()[0][1]["content-type"] == "application/json"
    assert not line.transport.closed


async def test_a_request_that_comes_byte_by_byte_is_one_request() -> None:
    line = Line()
    for byte in post("a"):
        line.feed(bytes([byte]))
    line.batcher.answer()
    assert line.statuses() == [200]


async def test_a_callers_trace_goes_with_its_transaction_and_with_no_other_of_the_connection() -> None:
    line = Line()
    line.feed(post("a", "TraceParent: 00-1-2-01") + post("b"))
    assert [job.traceparent for job, _ in line.batcher.waiting] == [b"00-1-2-01", None]


async def test_a_chunked_body_is_one_body() -> None:
    line, body = Line(), encode_json(make_transaction())
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]))
    line.feed(b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nX-Trailer: 1\r\n\r\n")
    line.batcher.answer()
    assert line.statuses() == [200]


async def test_answers_keep_the_order_of_pipelined_requests() -> None:
    line = Line()
    line.feed(post("a") + post("b") + post("c"))
    line.batcher.answer(2)
    line.batcher.answer(1)
    assert line.statuses() == []
    line.batcher.answer(0)
    assert [msgspec.json.decode(body)["transaction_id"] for _, _, body in line.replies()] == ["a", "b", "c"]


async def test_other_paths_and_methods_go_to_fastapi_in_their_turn() -> None:
    line = Line()
    line.feed(post("a") + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET /score HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.sleep(0)
    assert (line.slow, line.statuses()) == ([], [])
    line.batcher.answer()
    for _ in range(5):
        await asyncio.sleep(0)
    assert line.slow == ["GET /healthz", "GET /score"]
    assert line.statuses() == [200, 204, 204]


async def test_a_connection_with_too_many_unanswered_requests_is_not_read() -> None:
    line = Line()
    line.feed(b"".join(post(f"t{i}") for i in range(PIPELINED_MAX)))
    read = [line.transport.reading]
    line.feed(post("more"))
    read.append(line.transport.reading)
    line.batcher.answer()
    read.append(line.transport.reading)
    assert read == [True, False, True]


@pytest.mark.parametrize("request_", [post("a", "Connection: close"), post("a", version="1.0")])
async def test_who_wants_the_connection_closed_is_told_and_obeyed(request_: bytes) -> None:
    line = Line()
    line.feed(request_)
    line.batcher.answer()
    assert line.replies()[0][1]["connection"] == "close"
    assert line.transport.closed


async def test_who_asks_before_it_sends_is_told_to_go_on() -> None:
    line = Line()
    head, _, body = post("a", "Expect: 100-continue").partition(b"\r\n\r\n")
    line.feed(head + b"\r\n\r\n")
    assert line.transport.written == b"HTTP/1.1 100 Continue\r\n\r\n"
    line.feed(body)
    line.batcher.answer()
    assert b"HTTP/1.1 200 OK" in line.transport.written


async def test_an_overload_is_answered_before_the_body_and_the_body_is_dropped() -> None:
    line = Line()
    line.batcher.full = True
    head, _, body = post("a").partition(b"\r\n\r\n")
    line.feed(head + b"\r\n\r\n")
    [reply] = line.replies()
    assert (reply[0], reply[1]["retry-after"], reason_of(reply)) == (429, "1", "overloaded")
    line.feed(body)
    line.batcher.full = False
    line.now_s += HOLD_LEAST_S
    line.shared.release()
    line.feed(post("b"))
    line.batcher.answer()
    assert line.statuses() == [429, 200]
    line.shared.look()
    assert 'fraudgate_refused_total{door="http",reason="overloaded"} 1.0' in line.metrics.text().decode()


async def test_who_was_told_429_is_not_read_for_a_moment_and_what_waited_too_long_is_refused_again() -> None:
    line = Line()
    line.batcher.full = True
    line.feed(post("a"))
    read = [line.transport.reading]
    line.shared.release()
    read.append(line.transport.reading)
    line.now_s += HOLD_MAX_S
    line.shared.release()
    read.append(line.transport.reading)
    assert read == [False, False, True]
    line.batcher.full = False
    # It lay in the socket meanwhile.
    line.feed(post("b"))
    assert line.statuses() == [429, 429]
    line.now_s += HOLD_MAX_S
    line.shared.release()
    for _ in range(4):
        await asyncio.sleep(0)
    line.feed(post("c"))
    line.batcher.answer()
    assert line.statuses() == [429, 429, 200]


async def test_many_that_were_told_429_are_read_again_at_a_bounded_rate() -> None:
    line = Line(connections_max=1000)
    line.batcher.full = True
    transports = []
    for i in range(100):
        protocol, transport = line.connect()
        protocol.data_received(post(f"t{i}"))
        transports.append(transport)
    line.now_s = HOLD_LEAST_S + 10 / SHED_PER_S_MAX
    line.shared.release()
    assert sum(t.reading for t in transports) in (10, 11)


@pytest.mark.parametrize("declared", [True, False])
async def test_one_byte_more_than_a_body_may_have_is_refused_and_the_connection_lives(declared: bool) -> None:
    line, body = Line(), b" " * (MESSAGE_BYTES_MAX + 1)
    chunked = b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    line.feed(post(body=body) if declared else chunked)
    line.feed(post("b"))
    line.batcher.answer()
    assert line.statuses() == [413, 200]


async def test_an_endless_body_ends_the_connection() -> None:
    line = Line()
    line.feed(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
    piece = b" " * 1_000_000
    for _ in range(DISCARD_BYTES_MAX // len(piece)):
        line.feed(piece)
        assert not line.transport.closed
    line.feed(piece)
    assert line.statuses() == [413]
    assert line.transport.closed


async def test_a_head_beyond_its_limit_is_refused_and_kept_nowhere() -> None:
    line = Line()
    line.feed(b"POST /score HTTP/1.1\r\nX-Long: " + b"x" * (HEAD_BYTES_MAX - 40))
    assert not line.transport.closed
    line.feed(b"x" * 41)
    assert reason_of(line.replies()[0]) == "head_too_large"
    assert line.transport.closed


async def test_what_is_no_http_is_told_so_behind_the_answers_that_are_due() -> None:
    line = Line()
    line.feed(post("a") + b"\x16\x03\x01 what\r\n\r\n")
    line.batcher.answer()
    assert line.statuses() == [200, 400]
    assert reason_of(line.replies()[1]) == "malformed_request"
    assert line.transport.closed


async def test_a_caller_that_left_is_not_written_to() -> None:
    line = Line()
    line.feed(post("a"))
    line.transport.closed = True
    line.protocol.connection_lost(None)
    line.batcher.answer()
    assert line.transport.written == b""


async def test_an_answer_for_a_connection_that_is_being_closed_is_dropped() -> None:
    line = Line()
    line.feed(post("a"))
    line.transport.close()
    line.batcher.answer()
    assert line.transport.written == b""


async def test_who_does_not_read_its_answers_is_not_read_and_in_the_end_cut_off() -> None:
    line = Line()
    line.protocol.pause_writing()
    assert not line.transport.reading
    line.pass_s(REQUEST_S + 1)
    assert line.transport.closed


@pytest.mark.parametrize("part", [b"POST /sc", post("a")[:60], post("a")[:-1]])
async def test_a_request_that_does_not_come_to_its_end_is_timed_out(part: bytes) -> None:
    line = Line()
    line.feed(part)
    line.pass_s(REQUEST_S)
    assert not line.transport.closed
    line.pass_s(1)
    assert reason_of(line.replies()[0]) == "request_timeout"
    assert line.transport.closed


async def test_an_idle_connection_is_closed_and_one_that_waits_for_its_answer_is_not() -> None:
    line = Line()
    line.feed(post("a"))
    line.pass_s(IDLE_S + 1)
    assert not line.transport.closed
    line.batcher.answer()
    line.protocol.since_s = line.now_s
    line.pass_s(IDLE_S)
    assert not line.transport.closed
    line.pass_s(1)
    assert line.transport.closed


async def test_one_connection_more_than_the_limit_is_told_to_come_back() -> None:
    line = Line(connections_max=2)
    assert not line.connect()[1].closed
    _, third = line.connect()
    assert third.closed
    assert third.written.startswith(b"HTTP/1.1 429 ")
    assert "fraudgate_http_connections_refused_total 1.0" in line.metrics.text().decode()


async def test_a_gateway_that_leaves_answers_what_comes_and_says_that_it_is_the_last() -> None:
    line = Line()
    line.feed(post("a"))
    line.shared.leave()
    line.protocol.shutdown()
    line.batcher.answer()
    assert line.replies()[0][1]["connection"] == "close"
    other, transport = line.connect()
    line.pass_s(LEAVING_GRACE_S / 2)
    other.data_received(post("b"))
    line.batcher.answer()
    assert b"connection: close" in transport.written
    assert transport.closed
    _, idle = line.connect()
    line.pass_s(LEAVING_GRACE_S + 0.1)
    assert idle.closed


def locked(tmp_path: Path, rate: int = 2) -> tuple[Line, str]:
    """A line whose door asks for a key, and the key."""
    secret, _ = create_key(tmp_path / "keys.json", "shop", ["score"], rate)
    line = Line()
    line.protocol.door.keys = KeyBook(tmp_path / "keys.json", lambda: line.now_s)
    return line, secret


async def test_a_door_that_asks_for_keys_opens_to_both_headers(tmp_path: Path) -> None:
    line, secret = locked(tmp_path)
    line.feed(post("t1", f"Authorization: Bearer {secret}"))
    line.feed(post("t2", f"X-API-Key: {secret}"))
    line.batcher.answer()
    line.batcher.answer()
    assert line.statuses() == [200, 200]


async def test_without_a_key_a_body_is_neither_read_nor_decided(tmp_path: Path) -> None:
    line, _ = locked(tmp_path)
    line.feed(post("t1"))
    line.feed(post("t2", "Authorization: Bearer fg_wrong"))
    assert line.statuses() == [401, 401]
    assert {reason_of(reply) for reply in line.replies()} == {"unauthorized"}
    assert line.replies()[0][1]["www-authenticate"] == "Bearer"
    assert line.batcher.waiting == []


async def test_a_key_of_another_scope_is_refused_with_403(tmp_path: Path) -> None:
    line, _ = locked(tmp_path)
    secret, _ = create_key(tmp_path / "keys.json", "analyst", ["review"], 5)
    assert line.protocol.door.keys is not None
    line.protocol.door.keys.refresh()
    line.feed(post("t1", f"Authorization: Bearer {secret}"))
    assert [reason_of(reply) for reply in line.replies()] == ["forbidden"]


async def test_one_request_more_than_a_keys_rate_gets_429_and_the_key_stands_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line, secret = locked(tmp_path, rate=2)
    for i in range(3):
        line.feed(post(f"t{i}", f"Authorization: Bearer {secret}"))
    line.batcher.answer()
    line.batcher.answer()
    assert line.statuses() == [200, 200, 429]
    reply = line.replies()[2]
    assert (reason_of(reply), reply[1]["retry-after"]) == ("rate_limited", "1")
    line.now_s += 0.5
    line.feed(post("t4", f"Authorization: Bearer {secret}"))
    line.batcher.answer()
    assert line.statuses()[3] == 200
    line.shared.look()
    assert secret not in line.metrics.text().decode() + caplog.text
    assert 'reason="rate_limited"' in line.metrics.text().decode()
