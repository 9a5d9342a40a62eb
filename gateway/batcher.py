"""Micro-batches for callers that come one by one: while a batch is in flight the next one collects; nothing waits when idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable

from gateway.contracts.decision import Door
from gateway.errors import DrainingError, OverloadedError
from gateway.job import Job, Result, Verdict
from gateway.metrics import Metrics
from gateway.publisher import Publisher
from gateway.records import decision_records, transaction_records
from gateway.scorer import Scorer

log = logging.getLogger(__name__)

Waiter = asyncio.Future[Result]


class Batcher:
    """The HTTP door's way to the scorer.

    At most `in_flight_max` transactions are accepted and not yet answered. A retry of one of them waits for the first. Decisions
    are handed to the publisher and answered when Kafka has acknowledged them or `publish_budget_s` is over.
    """

    def __init__(
        self,
        scorer: Scorer,
        publisher: Publisher,
        metrics: Metrics,
        *,
        batch_rows_max: int,
        in_flight_max: int,
        publish_budget_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scorer = scorer
        self._publisher = publisher
        self._metrics = metrics
        self._batch_rows_max = batch_rows_max
        self._in_flight_max = in_flight_max
        self._publish_budget_s = publish_budget_s
        self._clock_s = clock_s
        self._pending: list[tuple[Job, Waiter]] = []
        # By transaction_id: the first job of it, and what its retries wait for too.
        self._in_flight: dict[str, tuple[Job, Waiter]] = {}
        self._running: asyncio.Task[None] | None = None
        self._finishing: set[asyncio.Task[None]] = set()
        self._draining = False

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def admit(self) -> None:
        """Raises `OverloadedError` or `DrainingError` when nothing more can be taken. Called before a body is read."""
        if self._draining:
            raise DrainingError
        if len(self._in_flight) >= self._in_flight_max:
            raise OverloadedError

    def submit(self, job: Job) -> Waiter:
        """The future of the job's result. Never cancel it: retries may wait for it too."""
        transaction_id = job.transaction.transaction_id
        first = self._in_flight.get(transaction_id)
        if first is not None:
            if first[0].fingerprint == job.fingerprint:
                self._metrics.duplicates.labels(Door.HTTP.value).inc()
                return first[1]
            conflict: Waiter = asyncio.get_running_loop().create_future()
            conflict.set_result(Result(job, Verdict.CONFLICT))
            return conflict
        waiter: Waiter = asyncio.get_running_loop().create_future()
        self._in_flight[transaction_id] = job, waiter
        self._scorer.deciding.add(transaction_id)
        self._pending.append((job, waiter))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return waiter

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait until everything accepted is answered, at most `timeout_s` seconds."""
        self._draining = True
        waiters = [waiter for _, waiter in self._in_flight.values()]
        if waiters:
            await asyncio.wait(waiters, timeout=timeout_s)

    async def _run(self) -> None:
        while self._pending:
            batch, self._pending = self._pending[: self._batch_rows_max], self._pending[self._batch_rows_max :]
            try:
                results = await self._scorer.decide([job for job, _ in batch])
            except Exception as exc:
                # A bug must not leave callers waiting, nor stop the door.
                log.exception("scorer: a batch of %d failed", len(batch))
                for _, waiter in batch:
                    waiter.set_exception(exc)
                    waiter.exception()
                self._forget(batch)
                continue
            finishing = asyncio.create_task(self._finish(batch, results))
            self._finishing.add(finishing)
            finishing.add_done_callback(self._finishing.discard)
            if len(self._pending) < self._batch_rows_max:
                # A batch is in flight until Kafka has it: what comes meanwhile shares the next one's fixed costs, which at a few
                # hundred requests a second is a third of the CPU. With a full batch waiting there is nothing more to share.
                await asyncio.wait({finishing})
        self._running = None

    async def _finish(self, batch: list[tuple[Job, Waiter]], results: list[Result]) -> None:
        """Publish, wait for Kafka within the budget, answer."""
        published_from_s = self._clock_s()
        acknowledged = self._publisher.send([*transaction_records(results), *decision_records(results)])
        if self._publish_budget_s > 0 and not acknowledged.done():
            await asyncio.wait({acknowledged}, timeout=self._publish_budget_s)
        now_s = self._clock_s()
        for (_, waiter), result in zip(batch, results, strict=True):
            waiter.set_result(result)
        self._forget(batch)
        metrics = self._metrics
        metrics.step_ms.observe("publish", [(now_s - published_from_s) * 1000])
        metrics.latency_ms.observe(Door.HTTP.value, [(now_s - job.received_s) * 1000 for job, _ in batch])
        metrics.in_flight.set(len(self._in_flight))
        verdicts = Counter(result.verdict for result in results)
        if verdicts[Verdict.DUPLICATE]:
            metrics.duplicates.labels(Door.HTTP.value).inc(verdicts[Verdict.DUPLICATE])

    def _forget(self, batch: list[tuple[Job, Waiter]]) -> None:
        for job, _ in batch:
            del self._in_flight[job.transaction.transaction_id]
            self._scorer.deciding.discard(job.transaction.transaction_id)
