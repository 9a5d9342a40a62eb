import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.api_keys import KeyBook, create_key
from gateway.contracts.decision import Answer
from gateway.contracts.transaction import MESSAGE_BYTES_MAX, RefusedError, encode_json
from gateway.errors import GatewayError, OverloadedError, Problem
from gateway.http.batcher import Done
from gateway.http.door import ScoreDoor
from gateway.metrics import Metrics
from gateway.scoring.job import Job, Result, Verdict
from tests.unit.gateway.factories import NOW_MS, decided, make_transaction, read_job

pytestmark = pytest.mark.anyio

GOOD = encode_json(make_transaction())


class StubBatcher:
    """Stands for gateway.http.batcher.Batcher: one verdict for all."""

    def __init__(self, verdict: Verdict = Verdict.DECIDED, full: bool = False) -> None:
        self._verdict = verdict
        self._full = full
        self.jobs: list[Job] = []

    def refusal(self) -> type[GatewayError] | None:
        return OverloadedError if self._full else None

    def submit(
        self, body: bytes, received_s: float, deadline_s: float, done: Done, explain: bool, traceparent: bytes | None
    ) -> None:
        job = read_job(body, received_s, deadline_s)
        if isinstance(job, RefusedError):
            done(job, 5.0)
            return
        job.explain = explain
        job.traceparent = traceparent
        self.jobs.append(job)
        done(decided(job) if self._verdict is Verdict.DECIDED else Result(job, self._verdict), 5.0)


class Caller:
    """Sends one request's parts to the ASGI application and keeps what it answers."""

    def __init__(self, parts: list[bytes], *, then_leaves: bool = False) -> None:
        self._messages = self._of(parts, then_leaves)
        self.received = 0
        self.answer: list[dict[str, Any]] = []

    async def _of(self, parts: list[bytes], then_leaves: bool) -> AsyncIterator[dict[str, Any]]:
        for i, part in enumerate(parts):
            yield {"type": "http.request", "body": part, "more_body": then_leaves or i < len(parts) - 1}
        if then_leaves:
            yield {"type": "http.disconnect"}
        await asyncio.Event().wait()

    async def receive(self) -> dict[str, Any]:
        self.received += 1
        return await anext(self._messages)

    async def send(self, message: Any) -> None:
        self.answer.append(dict(message))


async def call(
    *parts: bytes,
    method: str = "POST",
    batcher: StubBatcher | None = None,
    headers: list[tuple[bytes, bytes]] | None = None,
    keys: KeyBook | None = None,
) -> tuple[int, dict[bytes, bytes], bytes]:
    caller = Caller(list(parts or (b"",)))
    door = ScoreDoor(batcher or StubBatcher(), Metrics(), 80, clock_s=lambda: 5.0, keys=keys)  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        await door({"type": "http", "method": method, "headers": headers or []}, caller.receive, caller.send)
    start, body = caller.answer
    return start["status"], dict(start["headers"]), body["body"]


async def test_a_transaction_is_answered_with_its_decision() -> None:
    batcher = StubBatcher()
    status, headers, body = await call(GOOD, batcher=batcher)
    assert status == 200
    assert headers[b"content-type"] == b"application/json"
    assert msgspec.json.decode(body, type=Answer).transaction_id == "t1"
    [job] = batcher.jobs
    assert job.arrived_ms == NOW_MS
    assert job.deadline_s == pytest.approx(5.08)


async def test_a_body_in_pieces_is_one_body() -> None:
    assert (await call(GOOD[:5], b"", GOOD[5:]))[0] == 200


DEEP = b"[" * 100_000
CARD = encode_json(make_transaction(card_id="4111111111111111"))


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "malformed_json"),
        (b"{", 400, "malformed_json"),
        (b"[]", 400, "malformed_json"),
        (b"null", 400, "malformed_json"),
        (b'{"a":' * 2000, 400, "malformed_json"),
        (b"\xff\xfe", 400, "not_utf8"),
        (GOOD.replace(b'"t1"', b'"\xff"'), 400, "not_utf8"),
        (GOOD[:-1] + b',"mcc":"5411"}', 400, "duplicate_key"),
        (GOOD[:-1] + b',"x":1}', 422, "unknown_field"),
        (GOOD.replace(b'"mcc":"5411",', b""), 422, "missing_field"),
        (GOOD.replace(b"1234", b'"1234"'), 422, "wrong_type"),
        (GOOD.replace(b"1234", b"12.5"), 422, "wrong_type"),
        (GOOD.replace(b"1234", b"1e400"), 422, "wrong_type"),
        (GOOD.replace(b"1234", b"NaN"), 400, "malformed_json"),
        (GOOD.replace(b"1234", b"Infinity"), 400, "malformed_json"),
        (GOOD.replace(b"1234", b"-5"), 422, "amount_out_of_range"),
        (GOOD.replace(b"1234", b"1000000001"), 422, "amount_out_of_range"),
        (GOOD.replace(b"1234", b"9" * 400), 422, "wrong_type"),
        (GOOD.replace(b"EUR", b"EUX"), 422, "unknown_currency"),
        (GOOD.replace(b'"DE"', b'"de"'), 422, "bad_format"),
        (GOOD.replace(str(NOW_MS).encode(), b"99999999999999"), 422, "event_time_in_future"),
        (GOOD.replace(str(NOW_MS).encode(), b"-1"), 422, "event_time_too_old"),
        (CARD, 422, "card_number"),
        (b" " * (MESSAGE_BYTES_MAX + 1), 413, "too_large"),
    ],
)
async def test_hostile_bodies_get_their_documented_error(body: bytes, status: int, reason: str) -> None:
    found, headers, answer = await call(body)
    problem = msgspec.json.decode(answer, type=Problem)
    assert (found, problem.status, problem.reason) == (status, status, reason)
    assert headers[b"content-type"] == b"application/problem+json"
    assert b"4111" not in answer


async def test_a_body_at_the_limit_is_read_and_one_byte_more_is_not() -> None:
    padded = GOOD + b" " * (MESSAGE_BYTES_MAX - len(GOOD))
    assert (await call(padded))[0] == 200
    assert (await call(padded, b" "))[0] == 413
    assert (await call(GOOD, b"x" * 1_000_000, b"x" * 1_000_000))[0] == 413


async def test_a_declared_length_is_refused_without_reading_it_into_memory() -> None:
    assert (await call(b"x", headers=[(b"content-length", b"1000000")]))[0] == 413


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_other_methods_are_told_to_post(method: str) -> None:
    status, headers, body = await call(method=method)
    assert (status, headers[b"allow"]) == (405, b"POST")
    assert (body == b"") == (method == "HEAD")


async def test_an_overload_is_answered_before_the_body_is_read() -> None:
    batcher = StubBatcher(full=True)
    status, headers, _ = await call(GOOD, batcher=batcher)
    assert (status, headers[b"retry-after"]) == (429, b"1")
    assert batcher.jobs == []


@pytest.mark.parametrize(("verdict", "reason"), [(Verdict.CONFLICT, "idempotency_conflict"), (Verdict.IN_PROGRESS, "in_progress")])
async def test_what_can_not_be_answered_is_a_409_with_its_reason(verdict: Verdict, reason: str) -> None:
    status, headers, body = await call(GOOD, batcher=StubBatcher(verdict))
    assert (status, msgspec.json.decode(body, type=Problem).reason) == (409, reason)
    assert (b"retry-after" in headers) == (verdict is Verdict.IN_PROGRESS)


@pytest.mark.parametrize(("value", "deadline_s"), [(b"20", 5.02), (b"80", 5.08), (b"999999", 5.08)])
async def test_a_callers_own_deadline_can_only_shorten_the_budget(value: bytes, deadline_s: float) -> None:
    batcher = StubBatcher()
    assert (await call(GOOD, batcher=batcher, headers=[(b"fraudgate-deadline-ms", value)]))[0] == 200
    assert batcher.jobs[0].deadline_s == pytest.approx(deadline_s)


@pytest.mark.parametrize("value", [b"", b"0", b"-1", b"1.5", b"soon", b"1000000", b"1" * 5000])
async def test_a_deadline_that_can_not_be_meant_is_refused(value: bytes) -> None:
    status, _, body = await call(GOOD, headers=[(b"fraudgate-deadline-ms", value)])
    assert (status, msgspec.json.decode(body, type=Problem).reason) == (400, "bad_deadline")


@pytest.mark.parametrize(("value", "explain"), [(None, False), (b"true", True), (b"True", True), (b"false", False)])
async def test_a_caller_may_ask_for_the_reasons_of_an_approval(value: bytes | None, explain: bool) -> None:
    batcher = StubBatcher()
    headers = [] if value is None else [(b"fraudgate-explain", value)]
    assert (await call(GOOD, batcher=batcher, headers=headers))[0] == 200
    assert batcher.jobs[0].explain is explain


async def test_a_callers_trace_goes_with_its_transaction() -> None:
    batcher = StubBatcher()
    for headers in ([(b"traceparent", b"00-1-2-01")], []):
        assert (await call(GOOD, batcher=batcher, headers=headers))[0] == 200
    assert [job.traceparent for job in batcher.jobs] == [b"00-1-2-01", None]


async def test_a_wish_that_can_not_be_meant_is_refused() -> None:
    status, _, body = await call(GOOD, headers=[(b"fraudgate-explain", b"maybe")])
    assert (status, msgspec.json.decode(body, type=Problem).reason) == (400, "bad_explain")


async def test_a_caller_that_leaves_in_the_middle_is_not_answered() -> None:
    caller = Caller([GOOD[:10]], then_leaves=True)
    batcher = StubBatcher()
    door = ScoreDoor(batcher, Metrics(), 80)  # type: ignore[arg-type]
    await door({"type": "http", "method": "POST", "headers": []}, caller.receive, caller.send)
    assert (caller.answer, batcher.jobs) == ([], [])


async def test_any_asgi_server_asks_for_the_key_too(tmp_path: Path) -> None:
    secret, _ = create_key(tmp_path / "keys.json", "shop", ["score"], 5)
    keys = KeyBook(tmp_path / "keys.json")
    status, headers, _ = await call(GOOD, keys=keys)
    assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
    status, _, _ = await call(GOOD, keys=keys, headers=[(b"authorization", f"Bearer {secret}".encode())])
    assert status == 200
