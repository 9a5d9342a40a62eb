"""The HTTP door: what POST /score does with a body, and how an answer looks. Whatever a caller sends ends in a documented answer.

`gateway.http.protocol` calls it straight from the parser of a connection; `ScoreDoor` is also a raw ASGI application that does the same
under any ASGI server. No input ends in a 5xx.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from gateway.api_keys import AUTHORIZATION, X_API_KEY, KeyBook, presented
from gateway.contracts.decision import Answer, Door
from gateway.contracts.reasons import Refusal
from gateway.contracts.transaction import MESSAGE_BYTES_MAX, RefusedError
from gateway.errors import (
    BadDeadlineError,
    BadExplainError,
    GatewayError,
    Headers,
    InProgressError,
    MethodNotAllowedError,
    OverloadedError,
    problem_reply,
)
from gateway.http.batcher import Batcher, Done
from gateway.metrics import Metrics
from gateway.scoring.job import Result, Verdict
from gateway.tracing.trace import TRACEPARENT_HEADER

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# (status, headers, body)
Reply = tuple[int, Headers, bytes]

SCORE_PATH = "/score"
# A caller's own time limit for its answer, milliseconds; it can only shorten the setting decision_budget_ms.
DEADLINE_HEADER = b"fraudgate-deadline-ms"
DEADLINE_DIGITS_MAX = 6
# Whether the answer is to have the model's reasons even if it is an approval.
EXPLAIN_HEADER = b"fraudgate-explain"
_EXPLAINS = {b"true": True, b"false": False}
# How much of a refused body is read and thrown away, so that its sender gets to see the answer.
DISCARD_BYTES_MAX = 8 * 1024 * 1024
DISCARD_TIMEOUT_S = 5.0
_CONTENT_TYPE = (b"content-type", b"application/json")
_encoder = msgspec.json.Encoder()


class DisconnectedError(Exception):
    """The client went away before its body was complete."""


class ScoreDoor:
    """`clock_s` is the monotonic clock that deadlines are on. Without `keys` nobody is asked for one."""

    def __init__(
        self,
        batcher: Batcher,
        metrics: Metrics,
        decision_budget_ms: int,
        clock_s: Callable[[], float] = time.monotonic,
        keys: KeyBook | None = None,
    ) -> None:
        self.keys = keys
        self._batcher = batcher
        self._metrics = metrics
        self.budget_s = decision_budget_ms / 1000
        self.clock_s = clock_s
        self.refusal = batcher.refusal

    def submit(self, body: bytes, received_s: float, budget_s: float, done: Done, explain: bool, traceparent: bytes | None) -> None:
        """Hand to the batcher, which reads the body and calls `done`."""
        self._batcher.submit(body, received_s, received_s + budget_s, done, explain, traceparent)

    def budget_of(self, value: bytes) -> float:
        """Seconds to answer in, from the value of the header. Raises `BadDeadlineError` unless it is a whole number above 0."""
        if not value.isdigit() or len(value) > DEADLINE_DIGITS_MAX or int(value) == 0:
            raise BadDeadlineError
        return min(self.budget_s, int(value) / 1000)

    @staticmethod
    def explain_of(value: bytes) -> bool:
        """From the value of the header. Raises `BadExplainError`."""
        explain = _EXPLAINS.get(value.lower())
        if explain is None:
            raise BadExplainError
        return explain

    def problem(self, error: RefusedError | GatewayError) -> Reply:
        """The answer to an error, which is counted."""
        reason = error.reason.value if isinstance(error, RefusedError) else error.reason
        self._metrics.refused.labels(reason, Door.HTTP.value).inc()
        if isinstance(error, GatewayError) and (error.http_status >= 500 or isinstance(error, OverloadedError)):
            self._metrics.http_level.failed(1)
        return problem_reply(error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            status, headers, body = await self._answer(scope, receive)
        except DisconnectedError:
            return
        except (RefusedError, GatewayError) as exc:
            status, headers, body = self.problem(exc)
        if scope["method"] == "HEAD":
            body = b""
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        received_s = self.clock_s()
        if scope["method"] != "POST":
            raise MethodNotAllowedError
        budget_s, explain, traceparent = self.budget_s, False, None
        if self.keys is not None:
            headers = dict(scope["headers"])
            self.keys.check(presented(headers.get(AUTHORIZATION), headers.get(X_API_KEY)), "score")
        for name, value in scope["headers"]:
            if name == DEADLINE_HEADER:
                budget_s = self.budget_of(value)
            elif name == EXPLAIN_HEADER:
                explain = self.explain_of(value)
            elif name == TRACEPARENT_HEADER:
                traceparent = value
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        body = await _read(scope, receive)
        waiter: asyncio.Future[Result | RefusedError | None] = asyncio.get_running_loop().create_future()

        def done(result: Result | RefusedError | None, _: float) -> None:
            if not waiter.done():
                waiter.set_result(result)

        self.submit(body, received_s, budget_s, done, explain, traceparent)
        answer = answer_of(await waiter)
        encoded = encode_answer(answer)
        return 200, [_CONTENT_TYPE, (b"content-length", str(len(encoded)).encode())], encoded


def answer_of(result: Result | RefusedError | None) -> Answer:
    """The decision of a result. Raises what has to be answered instead."""
    if isinstance(result, RefusedError):
        raise result
    if result is None:
        raise GatewayError
    if result.verdict is Verdict.CONFLICT:
        raise RefusedError(Refusal.IDEMPOTENCY_CONFLICT, "transaction_id")
    if result.answer is None:
        raise InProgressError
    return result.answer


def encode_answer(answer: Answer) -> bytes:
    return _encoder.encode(answer)


def declares_too_much(content_length: bytes) -> bool:
    return content_length.isdigit() and int(content_length[:20]) > MESSAGE_BYTES_MAX


async def _read(scope: Scope, receive: Receive) -> bytes:
    """The body, of at most MESSAGE_BYTES_MAX. Raises `RefusedError` once it is known to be larger and mostly thrown away."""
    for name, value in scope["headers"]:
        if name == b"content-length" and declares_too_much(value):
            await _discard(receive)
            raise RefusedError(Refusal.TOO_LARGE)
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > MESSAGE_BYTES_MAX:
            if more:
                await _discard(receive)
            raise RefusedError(Refusal.TOO_LARGE)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _discard(receive: Receive) -> None:
    """Read the rest of a body that is too large, within bounds, so that its sender reads our answer and not a broken pipe."""
    discarded = 0
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while discarded < DISCARD_BYTES_MAX:
                message = await receive()
                discarded += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
