import asyncio
from collections.abc import Sequence

import pytest

from gateway.contracts.reasons import Refusal
from gateway.contracts.transaction import RefusedError, encode_json
from gateway.errors import DrainingError, OverloadedError
from gateway.http.admission import AdaptiveLimit
from gateway.http.batcher import FULL_ROWS, HURRY_S, OVERLAP_ROWS_MIN, Batcher
from gateway.kafka.records import Record
from gateway.metrics import Metrics
from gateway.scoring.job import Job, Result, Verdict
from gateway.scoring.requests import Requests
from gateway.scoring.scorer import TAIL_BUDGET_MS
from tests.unit.gateway.factories import NOW_MS, decided, make_transaction

pytestmark = pytest.mark.anyio


class GatedScorer:
    """Stands for gateway.scoring.scorer.Scorer: decides a batch when the test opens the gate."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.jobs: list[Job] = []
        self.deciding: set[str] = set()
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def decide(self, jobs: Sequence[Job], requests: Requests | None) -> list[Result]:
        assert requests is None or len(requests) == len(jobs)
        self.jobs += jobs
        self.batches.append([job.transaction_id for job in jobs])
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [decided(job) for job in jobs]


class StubPublisher:
    """Stands for gateway.kafka.publisher.Publisher: acknowledges at once or never."""

    def __init__(self, acknowledges: bool = True) -> None:
        self.sent: list[Record] = []
        self._acknowledges = acknowledges

    def send(self, records: Sequence[Record]) -> asyncio.Future[None]:
        self.sent += records
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._acknowledges:
            future.set_result(None)
        return future


def make_batcher(
    scorer: GatedScorer,
    publisher: StubPublisher | None = None,
    *,
    rows: int = 3,
    in_flight: int = 100,
    publish_budget_s: float = 1,
    batch_interval_s: float = 0,
) -> Batcher:
    return Batcher(
        scorer,  # type: ignore[arg-type]
        publisher or StubPublisher(),  # type: ignore[arg-type]
        Metrics(),
        batch_rows_max=rows,
        limit=AdaptiveLimit(in_flight, 0.08),
        publish_budget_s=publish_budget_s,
        batch_interval_s=batch_interval_s,
        now_ms=lambda: NOW_MS,
        clock_s=lambda: 0.0,
    )


def submit(batcher: Batcher, body: bytes, deadline_s: float = 10.0) -> asyncio.Future[Result | None]:
    """The future of what the batcher tells the caller."""
    told: asyncio.Future[Result | None] = asyncio.get_running_loop().create_future()

    def done(result: Result | RefusedError | None, _: float) -> None:
        if isinstance(result, RefusedError):
            told.set_exception(result)
        else:
            told.set_result(result)

    batcher.submit(body, 0.0, deadline_s, done)
    return told


async def verdict_of(batcher: Batcher, body: bytes) -> Verdict | None:
    result = await submit(batcher, body)
    return None if result is None else result.verdict


def body_of(name: str, **changes: int) -> bytes:
    return encode_json(make_transaction(name, **changes))


async def turns(n: int = 5) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def test_the_next_batch_collects_while_one_is_in_flight() -> None:
    scorer = GatedScorer()
    batcher = make_batcher(scorer)
    first = submit(batcher, body_of("a"))
    await turns()
    assert scorer.batches == [["a"]]
    rest = [submit(batcher, body_of(name)) for name in "bcdef"]
    await turns()
    assert scorer.batches == [["a"]]
    scorer.gate.set()
    results = await asyncio.gather(first, *rest)
    assert scorer.batches == [["a"], ["b", "c", "d"], ["e", "f"]]
    assert [r.job.transaction_id for r in results if r is not None] == list("abcdef")
    assert batcher.in_flight == 0
    assert scorer.deciding == set()


class ClaimedElsewhere(GatedScorer):
    """Another process holds the claims, which are free in `free_in_s`; then they are decided here."""

    def __init__(self, free_in_s: float) -> None:
        super().__init__()
        self.gate.set()
        self.free_in_s = free_in_s

    async def decide(self, jobs: Sequence[Job], requests: Requests | None) -> list[Result]:
        results = await super().decide(jobs, requests)
        return results if len(self.batches) > 1 else [Result(j, Verdict.IN_PROGRESS, free_in_s=self.free_in_s) for j in jobs]


async def test_what_another_process_claimed_just_now_is_tried_again_when_it_is_free() -> None:
    scorer = ClaimedElsewhere(0.01)
    batcher = make_batcher(scorer)
    first, retry = submit(batcher, body_of("a")), submit(batcher, body_of("a"))
    results = await asyncio.gather(first, retry)
    assert [r.verdict for r in results if r is not None] == [Verdict.DECIDED] * 2
    assert scorer.batches == [["a"], ["a"]]
    assert (batcher.in_flight, scorer.deciding) == (0, set())


async def test_who_has_no_time_to_wait_for_another_process_is_told_that_it_is_deciding() -> None:
    scorer = ClaimedElsewhere(20.0)
    batcher = make_batcher(scorer)
    assert await verdict_of(batcher, body_of("a")) is Verdict.IN_PROGRESS
    assert scorer.batches == [["a"]]
    assert batcher.in_flight == 0


async def test_both_records_of_a_decision_are_published_before_the_reply() -> None:
    scorer, publisher = GatedScorer(), StubPublisher()
    scorer.gate.set()
    await submit(make_batcher(scorer, publisher), body_of("a"))
    assert [r.topic for r in publisher.sent] == ["transactions", "decisions"]
    assert publisher.sent[0].headers == (("fraudgate-scored", b"http"),)
    assert {r.key for r in publisher.sent} == {b"card-1"}


async def test_a_batch_whose_publishing_fails_is_answered_so_and_does_not_stop_the_door(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(StubPublisher):
        def send(self, records: Sequence[Record]) -> asyncio.Future[None]:
            if not self.sent:
                self.sent = list(records)
                raise RuntimeError("a bug")
            return super().send(records)

    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer, Fails())
    assert await submit(batcher, body_of("a")) is None
    assert "a batch of 1 failed" in caplog.text
    assert (batcher.in_flight, scorer.deciding) == (0, set())
    assert await verdict_of(batcher, body_of("b")) is Verdict.DECIDED


async def test_an_error_behind_the_answers_does_not_stop_the_door(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer)
    with monkeypatch.context() as broken:
        broken.setattr(batcher._metrics.http_level, "answered", None)
        assert await verdict_of(batcher, body_of("a")) is Verdict.DECIDED
        await turns()
    assert "was not brought to its end" in caplog.text
    assert await verdict_of(batcher, body_of("b")) is Verdict.DECIDED


async def test_a_silent_kafka_costs_the_publish_budget_and_no_answer() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer, StubPublisher(acknowledges=False), publish_budget_s=0.01)
    assert await verdict_of(batcher, body_of("a")) is Verdict.DECIDED


async def test_nobody_waits_for_kafka_past_a_deadline() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer, StubPublisher(acknowledges=False), publish_budget_s=60)
    result = await submit(batcher, body_of("a"), HURRY_S + 0.02)
    assert result is not None and result.verdict is Verdict.DECIDED


async def test_what_waits_for_kafka_holds_the_next_batch_up_until_as_many_are_waiting() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer, StubPublisher(acknowledges=False), rows=100, publish_budget_s=30)
    submit(batcher, body_of("first"))
    await turns()
    for i in range(OVERLAP_ROWS_MIN - 1):
        submit(batcher, body_of(f"t{i}"))
    await turns()
    assert [len(batch) for batch in scorer.batches] == [1]
    submit(batcher, body_of("last"))
    await turns()
    assert [len(batch) for batch in scorer.batches] == [1, OVERLAP_ROWS_MIN]


async def test_all_that_one_pass_of_the_loop_brought_is_one_batch() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer)
    await asyncio.gather(*[submit(batcher, body_of(name)) for name in "abc"])
    assert scorer.batches == [["a", "b", "c"]]


async def test_who_can_not_wait_for_redis_is_decided_first_and_alone() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer, StubPublisher(acknowledges=False), publish_budget_s=30)
    deadlines_s = {"a": HURRY_S, "b": -1.0, "c": HURRY_S - 0.001}
    told = {name: submit(batcher, body_of(name), deadline_s) for name, deadline_s in deadlines_s.items()}
    await told["b"]
    await told["c"]
    await turns()
    assert scorer.batches == [["b", "c"], ["a"]]
    # What the scorer waits for Redis ends here, and what is late already stays late.
    assert {job.transaction_id: job.deadline_s for job in scorer.jobs} == {"a": HURRY_S, "b": -1.0, "c": TAIL_BUDGET_MS / 1000}
    assert not told["a"].done()


async def test_one_more_than_the_limit_is_refused_before_it_is_read() -> None:
    scorer = GatedScorer()
    batcher = make_batcher(scorer, in_flight=2)
    waiters = []
    for name in "ab":
        assert batcher.refusal() is None
        waiters.append(submit(batcher, body_of(name)))
    assert batcher.refusal() is OverloadedError
    scorer.gate.set()
    await asyncio.gather(*waiters)
    assert batcher.refusal() is None


async def test_a_retry_in_flight_waits_for_the_first_and_is_scored_once() -> None:
    scorer = GatedScorer()
    batcher = make_batcher(scorer)
    first, retry = submit(batcher, body_of("a")), submit(batcher, body_of("a"))
    other = submit(batcher, body_of("a", amount_minor=2))
    conflict = await other
    assert conflict is not None
    assert conflict.verdict is Verdict.CONFLICT
    scorer.gate.set()
    assert await first is await retry
    assert scorer.batches == [["a"]]


async def test_who_is_refused_costs_the_others_of_its_batch_nothing() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer)
    first, bad, last = (submit(batcher, body) for body in (body_of("a"), body_of("b", amount_minor=-1), body_of("c")))
    with pytest.raises(RefusedError) as refused:
        await bad
    assert refused.value.reason is Refusal.AMOUNT_OUT_OF_RANGE
    assert [r.job.transaction for r in await asyncio.gather(first, last) if r is not None] == [
        make_transaction("a"),
        make_transaction("c"),
    ]
    assert scorer.batches == [["a", "c"]]
    assert batcher.in_flight == 0


async def test_a_batch_of_nothing_but_refusals_lets_the_next_one_pass() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer)
    with pytest.raises(RefusedError):
        await submit(batcher, b"{")
    assert await verdict_of(batcher, body_of("a")) is Verdict.DECIDED
    assert scorer.batches == [["a"]]


async def test_a_bug_in_the_scorer_fails_its_batch_and_not_the_next() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    scorer.error = ZeroDivisionError()
    batcher = make_batcher(scorer)
    assert await submit(batcher, body_of("a")) is None
    scorer.error = None
    assert await verdict_of(batcher, body_of("a")) is Verdict.DECIDED


async def test_a_caller_that_can_not_be_told_costs_the_others_nothing() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer)

    def fails(_: Result | RefusedError | None, __: float) -> None:
        raise RuntimeError

    batcher.submit(body_of("a"), 0.0, 10.0, fails)
    assert await verdict_of(batcher, body_of("b")) is Verdict.DECIDED
    assert batcher.in_flight == 0


async def test_draining_takes_nothing_new_and_answers_what_it_has() -> None:
    scorer = GatedScorer()
    batcher = make_batcher(scorer)
    waiter = submit(batcher, body_of("a"))
    draining = asyncio.create_task(batcher.drain(5))
    await turns()
    assert batcher.refusal() is DrainingError
    assert not draining.done()
    scorer.gate.set()
    await draining
    assert waiter.done()


async def test_a_batch_close_behind_another_waits_to_grow_and_no_longer_than_it_must() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    # The clock stands still: only the timer, the number or a near deadline can end the wait.
    batcher = make_batcher(scorer, rows=100, batch_interval_s=30)
    assert await verdict_of(batcher, body_of("first")) is Verdict.DECIDED
    waiting = [submit(batcher, body_of(f"t{i}"), deadline_s=100) for i in range(FULL_ROWS - 1)]
    await turns()
    assert [len(batch) for batch in scorer.batches] == [1]
    waiting.append(submit(batcher, body_of("last"), deadline_s=100))
    await asyncio.gather(*waiting)
    assert [len(batch) for batch in scorer.batches] == [1, FULL_ROWS]
    batcher = make_batcher(scorer, rows=100, batch_interval_s=0.2)
    await submit(batcher, body_of("second"))
    patient = submit(batcher, body_of("patient"))
    await turns()
    assert not patient.done()
    await submit(batcher, body_of("urgent"), deadline_s=HURRY_S / 2)
    assert scorer.batches[-1] == ["urgent"]
    # The one that begins the wait is as urgent as one that comes during it; and others who are urgent too don't keep it from its turn.
    await asyncio.gather(patient, *[submit(batcher, body_of(f"hurry-{i}"), deadline_s=HURRY_S / 2) for i in range(2)])
    assert ["patient"] in scorer.batches
    # Nor does one that would have no time for Redis left when it has waited.
    alone = make_batcher(scorer, rows=100, batch_interval_s=30)
    await submit(alone, body_of("begins"))
    await submit(alone, body_of("near"), deadline_s=30 + HURRY_S / 2)
    assert scorer.batches[-1] == ["near"]
    short = make_batcher(scorer, rows=100, batch_interval_s=0.001)
    await submit(short, body_of("a"))
    assert await verdict_of(short, body_of("b")) is Verdict.DECIDED
