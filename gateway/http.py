"""The HTTP door: a raw ASGI application for /score. Reads a bounded body, decodes it, waits for its result, writes JSON.

Whatever a caller sends ends in a documented answer; no input ends in a 5xx.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from gateway.avro import encode_transaction
from gateway.batcher import Batcher
from gateway.contracts.decision import Answer, Door
from gateway.contracts.reasons import Refusal
from gateway.contracts.transaction import MESSAGE_BYTES_MAX, RefusedError, decode_json
from gateway.errors import GatewayError, Headers, InProgressError, MethodNotAllowedError, problem_reply
from gateway.job import HTTP_POSITION, Job, Result, Verdict, fingerprint_of
from gateway.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

SCORE_PATH = "/score"
# How much of a refused body is read and thrown away, so that its sender gets to see the answer.
DISCARD_BYTES_MAX = 8 * 1024 * 1024
DISCARD_TIMEOUT_S = 5.0
_CONTENT_TYPE = (b"content-type", b"application/json")
_encoder = msgspec.json.Encoder()


class DisconnectedError(Exception):
    """The client went away before its body was complete."""


class ScoreDoor:
    """`now_ms` is the wall clock, `clock_s` the monotonic one that deadlines are on."""

    def __init__(
        self,
        batcher: Batcher,
        metrics: Metrics,
        decision_budget_ms: int,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batcher = batcher
        self._metrics = metrics
        self._budget_s = decision_budget_ms / 1000
        self._now_ms = now_ms
        self._clock_s = clock_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            status, headers, body = await self._answer(scope, receive)
        except DisconnectedError:
            return
        except RefusedError as exc:
            status, headers, body = problem_reply(exc)
            self._metrics.refused.labels(exc.reason.value, Door.HTTP.value).inc()
        except GatewayError as exc:
            status, headers, body = problem_reply(exc)
            self._metrics.refused.labels(exc.reason, Door.HTTP.value).inc()
        if scope["method"] == "HEAD":
            body = b""
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, Headers, bytes]:
        received_s = self._clock_s()
        if scope["method"] != "POST":
            raise MethodNotAllowedError
        self._batcher.admit()
        body = await _read(scope, receive)
        now_ms = self._now_ms()
        t = decode_json(body, now_ms)
        payload = encode_transaction(t)
        job = Job(
            transaction=t,
            payload=payload,
            fingerprint=fingerprint_of(payload),
            position=HTTP_POSITION,
            door=Door.HTTP,
            arrived_ms=now_ms,
            received_ms=now_ms,
            received_s=received_s,
            deadline_s=received_s + self._budget_s,
        )
        return _reply(await self._batcher.submit(job))


def _reply(result: Result) -> tuple[int, Headers, bytes]:
    if result.verdict is Verdict.CONFLICT:
        raise RefusedError(Refusal.IDEMPOTENCY_CONFLICT, "transaction_id")
    if result.answer is None:
        raise InProgressError
    body = encode_answer(result.answer)
    return 200, [_CONTENT_TYPE, (b"content-length", str(len(body)).encode())], body


def encode_answer(answer: Answer) -> bytes:
    return _encoder.encode(answer)


async def _read(scope: Scope, receive: Receive) -> bytes:
    """The body, of at most MESSAGE_BYTES_MAX. Raises `RefusedError` once it is known to be larger and mostly thrown away."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > MESSAGE_BYTES_MAX:
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
