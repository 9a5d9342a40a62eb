"""The connections of the HTTP door: POST /score goes from the parser's callbacks to the batcher and back to the socket.

No ASGI cycle, no task and no timer per request: a request costs a third of what it does through an empty ASGI application of
uvicorn (`fraudgate bench` prints both). Everything but POST /score takes uvicorn's own way to FastAPI. Answers keep the order of their
requests on a connection (HTTP/1.1 pipelining). `gateway.http.connections` ends those that are idle or slow, once a second for all of them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection
from typing import Any, ClassVar, cast

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.api_keys import AUTHORIZATION, X_API_KEY, presented
from gateway.contracts.reasons import Refusal
from gateway.contracts.transaction import MESSAGE_BYTES_MAX, RefusedError
from gateway.errors import GatewayError, HeadTooLargeError, MalformedRequestError, OverloadedError, RequestTimeoutError
from gateway.http.admission import TARGET_SHARE
from gateway.http.connections import CLOSE, Connection, Connections, reply_bytes
from gateway.http.door import (
    DEADLINE_HEADER,
    DISCARD_BYTES_MAX,
    EXPLAIN_HEADER,
    SCORE_PATH,
    ScoreDoor,
    answer_of,
    declares_too_much,
    encode_answer,
)
from gateway.scoring.job import Result
from gateway.tracing.trace import TRACEPARENT_HEADER

# Of the request line and the headers. What one read of a socket brings comes on top.
HEAD_BYTES_MAX = 32 * 1024
# Requests of one connection that are not answered yet; a connection that has more is not read meanwhile.
PIPELINED_MAX = 32
_SCORE_URL = SCORE_PATH.encode()
_SCORE_QUERY = _SCORE_URL + b"?"
_EXPECT, _LENGTH = b"expect", b"content-length"
# To pass over the headers that are none of ours without lowering their names.
_NAMES = (_EXPECT, _LENGTH, DEADLINE_HEADER, EXPLAIN_HEADER, AUTHORIZATION, X_API_KEY, TRACEPARENT_HEADER)
_LENGTHS_OF_NAMES = {len(name) for name in _NAMES}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Exchange:
    """One request to /score on its connection. `reply` is b"" once it was written before the request was read to its end."""

    __slots__ = (
        "authorization",
        "body",
        "budget_s",
        "explain",
        "keep_alive",
        "protocol",
        "read",
        "received_s",
        "reply",
        "shed",
        "traceparent",
        "x_api_key",
    )

    def __init__(self, protocol: DoorProtocol, received_s: float, budget_s: float, keep_alive: bool) -> None:
        self.protocol = protocol
        self.received_s = received_s
        self.budget_s = budget_s
        self.keep_alive = keep_alive
        self.explain = False
        self.authorization: bytes | None = None
        self.x_api_key: bytes | None = None
        self.traceparent: bytes | None = None
        self.body = b""
        self.read = False
        self.reply: bytes | None = None
        self.shed = False

    def done(self, result: Result | RefusedError | None, now_s: float) -> None:
        self.protocol.answered(self, result, now_s)


class DoorProtocol(HttpToolsProtocol):
    """One connection. Make the class that uvicorn takes with `protocol_of`."""

    door: ClassVar[ScoreDoor]
    shared: ClassVar[Connections]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._exchanges: deque[Exchange] = deque()
        self._reading: Exchange | None = None
        # A cycle of uvicorn's that waits for the answers before it.
        self._held: tuple[RequestResponseCycle, ASGI3Application] | None = None
        self._in_head = False
        self._slow = False
        self._bytes = 0
        self._gone = False
        # When the present wait began: for a request, or for the rest of one.
        self.since_s = 0.0
        self.in_request = False
        # Since when this connection was not read, while what it brings may have come before.
        self._held_from_s: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since_s = self.door.clock_s()
        if not self.shared.admits(cast(Collection[Connection], self.connections)):
            transport.write(self.shared.shed_reply(OverloadedError, keep_alive=False))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self._exchanges.clear()
        self._reading = self._held = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._gone or self.transport.is_closing():
            return
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Asked for another protocol, answered in this one: the request itself has been read, what follows can't be.
            self._end_after_answers()
            return
        except httptools.HttpParserError:
            self._break_off(MalformedRequestError)
            return
        if self.in_request:
            self._bytes += len(data)
            if self._bytes > (HEAD_BYTES_MAX if self._in_head else DISCARD_BYTES_MAX) and not self._slow:
                self._break_off(HeadTooLargeError if self._in_head else RequestTimeoutError)

    def pause_writing(self) -> None:
        # Who doesn't read answers is asked for no more requests.
        super().pause_writing()
        self.since_s = self.door.clock_s()
        self.flow.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.flow.resume_reading()

    def shutdown(self) -> None:
        """Each answer from now on says that it is the last; `gateway.http.connections` closes who asks nothing more."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        for exchange in self._exchanges:
            exchange.keep_alive = False

    # The parser's callbacks, in the order they come.

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self._in_head = self.in_request = True
        self._slow = False
        self._bytes = 0
        self.since_s = self.door.clock_s() if self._held_from_s is None else self._held_from_s

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._bytes = 0
        url, parser, cycle = self.url, self.parser, self.cycle
        if (
            (url != _SCORE_URL and not url.startswith(_SCORE_QUERY))
            or parser.get_method() != b"POST"
            or (cycle is not None and not cycle.response_complete)
        ):
            self._take_uvicorns_way()
            return
        keep_alive = (
            parser.should_keep_alive()
            and not self.shared.leaving
            and parser.get_http_version() == "1.1"
            and not parser.should_upgrade()
        )
        door = self.door
        exchange = self._reading = Exchange(self, self.since_s, door.budget_s, keep_alive)
        exchanges = self._exchanges
        exchanges.append(exchange)
        if len(exchanges) > PIPELINED_MAX:
            self.flow.pause_reading()
        expects, error = False, None
        for name, value in self.headers:
            if len(name) in _LENGTHS_OF_NAMES:
                try:
                    expects |= self._heed(exchange, name.lower(), value)
                except (RefusedError, GatewayError) as exc:
                    error = exc
        if door.keys is not None:
            error = self._unlocked(exchange) or error
        refusal = door.refusal()
        if self._held_from_s is not None and refusal is None and door.clock_s() - self._held_from_s > door.budget_s * TARGET_SHARE:
            # It may have waited in its socket for as long as that: too late to be decided in time.
            refusal = OverloadedError
        if expects and (refusal is not None or error is not None or exchanges[0] is not exchange):
            # It may or may not send the body now: nothing behind it can be told apart.
            exchange.keep_alive = False
        elif expects:
            self.transport.write(_CONTINUE)
        if refusal is not None:
            self._shed(exchange, refusal)
        elif error is not None:
            self._refuse(exchange, error)

    def _unlocked(self, exchange: Exchange) -> GatewayError | None:
        """Why its API key doesn't open the door."""
        assert self.door.keys is not None
        try:
            self.door.keys.check(presented(exchange.authorization, exchange.x_api_key), "score")
        except GatewayError as exc:
            return exc
        return None

    def _heed(self, exchange: Exchange, name: bytes, value: bytes) -> bool:
        """True when the caller waits for a word before it sends its body. Raises for what can't be accepted."""
        if name == DEADLINE_HEADER:
            exchange.budget_s = self.door.budget_of(value)
        elif name == EXPLAIN_HEADER:
            exchange.explain = self.door.explain_of(value)
        elif name == AUTHORIZATION:
            exchange.authorization = value
        elif name == X_API_KEY:
            exchange.x_api_key = value
        elif name == TRACEPARENT_HEADER:
            exchange.traceparent = value
        elif name == _LENGTH and declares_too_much(value):
            raise RefusedError(Refusal.TOO_LARGE)
        return name == _EXPECT and value.lower() == b"100-continue"

    def on_body(self, body: bytes) -> None:
        exchange = self._reading
        if exchange is None:
            if self._slow:
                super().on_body(body)
            return
        if exchange.reply is not None:
            return
        exchange.body = exchange.body + body if exchange.body else body
        if len(exchange.body) > MESSAGE_BYTES_MAX:
            exchange.body = b""
            self._refuse(exchange, RefusedError(Refusal.TOO_LARGE))

    def on_message_complete(self) -> None:
        self.in_request = False
        exchange, self._reading = self._reading, None
        if exchange is None:
            if self._slow:
                super().on_message_complete()
            return
        exchange.read = True
        if exchange.reply is not None:
            self._flush(exchange.received_s)
            if exchange.shed:
                self._hold()
            return
        body, exchange.body = exchange.body, b""
        door = self.door
        refusal = door.refusal()
        if refusal is not None:
            self._shed(exchange, refusal)
            self._hold()
            return
        door.submit(body, exchange.received_s, exchange.budget_s, exchange.done, exchange.explain, exchange.traceparent)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Our own watch ends idle connections.
        self._unset_keepalive_if_required()
        self.since_s = self.door.clock_s()

    def _take_uvicorns_way(self) -> None:
        """Give uvicorn what its own callbacks would have seen."""
        url, headers = self.url, self.headers
        self._slow = True
        super().on_message_begin()
        self.url = url
        for name, value in headers:
            super().on_header(name, value)
        super().on_headers_complete()
        if self.shared.leaving:
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if self._exchanges:
            self._held = cycle, app
        else:
            super()._start_asgi_task(cycle, app)

    # Answers.

    def answered(self, exchange: Exchange, result: Result | RefusedError | None, now_s: float) -> None:
        """The result of `exchange` is there."""
        if self._gone or self.transport.is_closing():
            return
        try:
            answer = answer_of(result)
        except (RefusedError, GatewayError) as exc:
            self._refuse(exchange, exc)
            return
        body = encode_answer(answer)
        exchange.reply = b"%b%bcontent-length: %d\r\n\r\n%b" % (
            self.shared.head_of_answer(self.server_state.default_headers),
            b"" if exchange.keep_alive else CLOSE,
            len(body),
            body,
        )
        self._flush(now_s)

    def _refuse(self, exchange: Exchange, error: RefusedError | GatewayError) -> None:
        if exchange.reply is None:
            reply = self.door.problem(error)
            exchange.reply = reply_bytes(reply, self.server_state.default_headers, exchange.keep_alive)
            self._flush(self.door.clock_s())

    def _shed(self, exchange: Exchange, refusal: type[GatewayError]) -> None:
        """Too much at the moment: answered from bytes that were made before."""
        exchange.shed = True
        exchange.reply = self.shared.shed_reply(refusal, exchange.keep_alive)
        self._flush(exchange.received_s)

    def _hold(self) -> None:
        if not self._exchanges and not self.transport.is_closing() and not self.shared.leaving:
            self._held_from_s = self.door.clock_s()
            self.flow.pause_reading()
            self.shared.hold(self)

    def read_again(self) -> None:
        """The hold after a 429 is over. What is read in this pass of the loop may have come at its beginning."""
        if not self._gone:
            self._read_on()

    def _read_on(self) -> None:
        if not self.transport.is_closing() and not self.flow.write_paused and len(self._exchanges) <= PIPELINED_MAX:
            self.flow.resume_reading()

    def forget_hold(self) -> None:
        """What is read from now on has not waited."""
        self._held_from_s = None

    def _flush(self, now_s: float) -> None:
        """Write the answers that are due, in the order of their requests."""
        exchanges = self._exchanges
        while exchanges:
            first = exchanges[0]
            if first.reply is None:
                break
            if first.reply:
                self.transport.write(first.reply)
                first.reply = b""
            if not first.read:
                break
            exchanges.popleft()
            if not first.keep_alive:
                exchanges.clear()
                self.transport.close()
                return
        self.since_s = now_s
        if not exchanges:
            if self._held is not None:
                held, self._held = self._held, None
                super()._start_asgi_task(*held)
        if (
            self.flow.read_paused
            and self._held_from_s is None
            and len(exchanges) <= PIPELINED_MAX
            and not self.flow.write_paused
            and not self.pipeline
        ):
            self.flow.resume_reading()

    def _end_after_answers(self) -> None:
        if self._exchanges:
            self._exchanges[-1].keep_alive = False
        elif self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        else:
            self.transport.close()

    def _break_off(self, error: type[GatewayError]) -> None:
        """The last answer on this connection, behind those that are due."""
        self.in_request = False
        exchange, self._reading = self._reading, None
        if exchange is None and self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()
            return
        if exchange is None:
            exchange = Exchange(self, self.since_s, 0.0, False)
            self._exchanges.append(exchange)
        exchange.keep_alive = False
        exchange.read = True
        self.flow.pause_reading()
        if exchange.reply is None:
            self._refuse(exchange, error())
        else:
            self._flush(self.since_s)

    def end_if_late(self, now_s: float, idle_s: float, request_s: float) -> None:
        """Ends a connection that asked nothing for `idle_s`, or took `request_s` over a request or over reading an answer."""
        waited_s = now_s - self.since_s
        if self.transport.is_closing():
            # What it was told last is not read.
            if waited_s > request_s:
                self.transport.abort()
        elif self.flow.write_paused or (self.in_request and self._slow):
            if waited_s > request_s:
                self.shared.slow()
                self.transport.abort()
        elif self.in_request:
            if waited_s > request_s:
                self.shared.slow()
                self._break_off(RequestTimeoutError)
        elif waited_s > idle_s and not self._exchanges and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()


def protocol_of(door: ScoreDoor, shared: Connections) -> type[DoorProtocol]:
    """The class for uvicorn.Config(http=...), whose connections serve `door`."""
    return type("BoundDoorProtocol", (DoorProtocol,), {"door": door, "shared": shared})
