import asyncio
from collections.abc import Sequence

import pytest

from gateway.batcher import Batcher
from gateway.errors import DrainingError, OverloadedError
from gateway.job import Job, Result, Verdict
from gateway.metrics import Metrics
from gateway.records import Record
from tests.unit.gateway.factories import decided, make_job, make_transaction

pytestmark = pytest.mark.anyio


class GatedScorer:
    """Stands for gateway.scorer.Scorer: decides a batch when the test opens the gate."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.deciding: set[str] = set()
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def decide(self, jobs: Sequence[Job]) -> list[Result]:
        self.batches.append([job.transaction.transaction_id for job in jobs])
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [decided(job) for job in jobs]


class StubPublisher:
    """Stands for gateway.publisher.Publisher: acknowledges at once or never."""

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
    scorer: GatedScorer, publisher: StubPublisher | None = None, *, rows: int = 3, in_flight: int = 100, publish_budget_s: float = 1
) -> Batcher:
    return Batcher(
        scorer,  # type: ignore[arg-type]
        publisher or StubPublisher(),  # type: ignore[arg-type]
        Metrics(),
        batch_rows_max=rows,
        in_flight_max=in_flight,
        publish_budget_s=publish_budget_s,
        clock_s=lambda: 0.0,
    )


def job_of(name: str, **changes: int) -> Job:
    return make_job(make_transaction(name, **changes))


async def turns(n: int = 5) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def test_the_next_batch_collects_while_one_is_in_flight() -> None:
    scorer = GatedScorer()
    batcher = make_batcher(scorer)
    first = batcher.submit(job_of("a"))
    await turns()
    assert scorer.batches == [["a"]]
    rest = [batcher.submit(job_of(name)) for name in "bcdef"]
    await turns()
    assert scorer.batches == [["a"]]
    scorer.gate.set()
    results = await asyncio.gather(first, *rest)
    assert scorer.batches == [["a"], ["b", "c", "d"], ["e", "f"]]
    assert [r.job.transaction.transaction_id for r in results] == list("abcdef")
    assert batcher.in_flight == 0
    assert scorer.deciding == set()


async def test_both_records_of_a_decision_are_published_before_the_reply() -> None:
    scorer, publisher = GatedScorer(), StubPublisher()
    scorer.gate.set()
    await make_batcher(scorer, publisher).submit(job_of("a"))
    assert [r.topic for r in publisher.sent] == ["transactions", "decisions"]
    assert publisher.sent[0].headers == [("fraudgate-scored", b"http")]
    assert {r.key for r in publisher.sent} == {b"card-1"}


async def test_a_silent_kafka_costs_the_publish_budget_and_no_answer() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    batcher = make_batcher(scorer, StubPublisher(acknowledges=False), publish_budget_s=0.01)
    assert (await batcher.submit(job_of("a"))).verdict is Verdict.DECIDED


async def test_one_more_than_the_limit_is_refused_before_it_is_read() -> None:
    scorer = GatedScorer()
    batcher = make_batcher(scorer, in_flight=2)
    waiters = []
    for name in "ab":
        batcher.admit()
        waiters.append(batcher.submit(job_of(name)))
    with pytest.raises(OverloadedError):
        batcher.admit()
    scorer.gate.set()
    await asyncio.gather(*waiters)
    batcher.admit()


async def test_a_retry_in_flight_waits_for_the_first_and_is_scored_once() -> None:
    scorer = GatedScorer()
    batcher = make_batcher(scorer)
    first, retry = batcher.submit(job_of("a")), batcher.submit(job_of("a"))
    other = batcher.submit(job_of("a", amount_minor=2))
    assert (await other).verdict is Verdict.CONFLICT
    scorer.gate.set()
    assert await first is await retry
    assert scorer.batches == [["a"]]


async def test_a_bug_in_the_scorer_fails_its_batch_and_not_the_next() -> None:
    scorer = GatedScorer()
    scorer.gate.set()
    scorer.error = ZeroDivisionError()
    batcher = make_batcher(scorer)
    with pytest.raises(ZeroDivisionError):
        await batcher.submit(job_of("a"))
    scorer.error = None
    assert (await batcher.submit(job_of("a"))).verdict is Verdict.DECIDED


async def test_draining_takes_nothing_new_and_answers_what_it_has() -> None:
    scorer = GatedScorer()
    batcher = make_batcher(scorer)
    waiter = batcher.submit(job_of("a"))
    draining = asyncio.create_task(batcher.drain(5))
    await turns()
    with pytest.raises(DrainingError):
        batcher.admit()
    assert not draining.done()
    scorer.gate.set()
    await draining
    assert waiter.done()
