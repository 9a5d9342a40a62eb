"""What was decided without Redis: observed when it answers again, in order, once, and bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from gateway.metrics import Metrics
from gateway.redis.store import Observation
from gateway.redis.unobserved import BATCH_ROWS_MAX, Unobserved
from gateway.scoring.job import Job
from gateway.scoring.requests import Requests
from tests.helpers import until
from tests.unit.gateway.factories import StubStore, make_job, make_observation, make_transaction

pytestmark = pytest.mark.anyio


class FlakyStore(StubStore):
    """Silent for its first calls."""

    def __init__(self, silent_calls: int) -> None:
        super().__init__(None)
        self.silent_calls = silent_calls
        self.observed: list[str] = []

    async def observe_decided(self, batch: Sequence[Job], _requests: Requests, timeout_s: float) -> Observation | None:
        assert timeout_s > 0
        if self.silent_calls:
            self.silent_calls -= 1
            return None
        self.observed += [job.transaction.transaction_id for job in batch]
        return make_observation(len(batch))


def make_unobserved(store: StubStore, jobs_max: int = 1_000) -> tuple[Unobserved, Metrics]:
    metrics = Metrics()
    return Unobserved(store, metrics, jobs_max, retry_s=0.001), metrics  # type: ignore[arg-type]


async def test_everything_is_observed_in_order_once_redis_answers_and_its_answer_recorded() -> None:
    store = FlakyStore(silent_calls=3)
    unobserved, metrics = make_unobserved(store)
    names = [f"t{i}" for i in range(2 * BATCH_ROWS_MAX + 1)]
    for name in names:
        unobserved.add(make_job(make_transaction(name)), b"answer")
    task = asyncio.create_task(unobserved.run())
    try:
        await until(lambda: len(unobserved) == 0, 10)
        assert store.observed == names
        assert [job.transaction.transaction_id for job in store.recorded] == names
        # It waits for the next one, without asking Redis meanwhile.
        unobserved.add(make_job(make_transaction("later")), b"answer")
        await until(lambda: store.observed[-1:] == ["later"], 10)
    finally:
        task.cancel()
    await until(lambda: b"fraudgate_unobserved 0.0" in metrics.text(), 10)


async def test_nothing_is_asked_of_a_redis_that_is_not_there() -> None:
    store = FlakyStore(silent_calls=0)
    store.ready = False
    unobserved, _ = make_unobserved(store)
    unobserved.add(make_job(), b"answer")
    task = asyncio.create_task(unobserved.run())
    await asyncio.sleep(0.02)  # sleeps: longer than several retries
    assert store.observed == []
    store.ready = True
    await until(lambda: store.observed == ["t1"], 10)
    task.cancel()


async def test_beyond_the_bound_the_oldest_are_given_up_and_counted() -> None:
    store = FlakyStore(silent_calls=0)
    unobserved, metrics = make_unobserved(store, jobs_max=3)
    for i in range(5):
        unobserved.add(make_job(make_transaction(f"t{i}")), b"answer")
    assert b"fraudgate_unobserved_dropped_total 2.0" in metrics.text()
    task = asyncio.create_task(unobserved.run())
    await until(lambda: store.observed == ["t2", "t3", "t4"], 10)
    task.cancel()
