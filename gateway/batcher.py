"""Micro-batches for callers that come one by one: while a batch is in flight the next one collects; nothing waits when idle.

No task and no future per transaction: a caller leaves a callback. A batch takes what all sockets that were readable in one pass of the
event loop brought.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from gateway.admission import AdaptiveLimit
from gateway.contracts.decision import Door
from gateway.errors import DrainingError, GatewayError, OverloadedError
from gateway.job import Job, Result, Verdict
from gateway.metrics import Metrics
from gateway.publisher import Publisher
from gateway.records import Record, decision_records, transaction_records
from gateway.scorer import TAIL_BUDGET_MS, Scorer

log = logging.getLogger(__name__)

# The next batch doesn't wait for Kafka to acknowledge the one before when so many, and as many as that one has, are waiting.
OVERLAP_ROWS_MIN = 16

# With less time than this left, a transaction is decided without Redis: its wait could only be too short, and a wait that ends
# without a reply costs everybody the connection.
REDIS_WAIT_LEAST_S = 0.010
HURRY_S = TAIL_BUDGET_MS / 1000 + REDIS_WAIT_LEAST_S

# Called once with the result and time.monotonic(); None instead of a result means that the scorer failed. Must not raise.
Done = Callable[[Result | None, float], None]


class Accepted:
    """One transaction that is not answered yet, and whom to tell: its caller, then those who retried it meanwhile."""

    __slots__ = ("done", "job", "retries")

    def __init__(self, job: Job, done: Done) -> None:
        self.job = job
        self.done = done
        self.retries: list[Done] | None = None

    def tell(self, result: Result | None, now_s: float) -> None:
        self.done(result, now_s)
        if self.retries is not None:
            for done in self.retries:
                done(result, now_s)


class Batcher:
    """The HTTP door's way to the scorer.

    At most `limit.limit` transactions are accepted and not yet answered; `loop_lag_s` tells how busy the event loop is. A retry of one
    of them waits for the first. Decisions are handed to the publisher and answered when Kafka has acknowledged them or
    `publish_budget_s` is over.
    """

    def __init__(
        self,
        scorer: Scorer,
        publisher: Publisher,
        metrics: Metrics,
        *,
        batch_rows_max: int,
        limit: AdaptiveLimit,
        publish_budget_s: float,
        loop_lag_s: Callable[[], float] = lambda: 0.0,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scorer = scorer
        self._publisher = publisher
        self._metrics = metrics
        self._batch_rows_max = batch_rows_max
        self._limit = limit
        self._loop_lag_s = loop_lag_s
        self._publish_budget_s = publish_budget_s
        self._clock_s = clock_s
        self._pending: list[Accepted] = []
        # By transaction_id.
        self._in_flight: dict[str, Accepted] = {}
        self._running: asyncio.Task[None] | None = None
        # Set when the next batch may start, and how many must be waiting for that.
        self._next = asyncio.Event()
        self._next_rows = 0
        self._drained = asyncio.Event()
        self._draining = False

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def refusal(self) -> type[GatewayError] | None:
        """Why nothing more can be taken now, None when it can. Asked before a body is read and again before it is decoded."""
        if self._draining:
            return DrainingError
        if len(self._in_flight) >= self._limit.limit:
            return OverloadedError
        return None

    def submit(self, job: Job, done: Done) -> None:
        """`done` is called later, or at once when `job` contradicts one that is in flight."""
        transaction_id = job.transaction.transaction_id
        first = self._in_flight.get(transaction_id)
        if first is not None:
            self._retried(first, job, done)
            return
        accepted = self._in_flight[transaction_id] = Accepted(job, done)
        self._scorer.deciding.add(transaction_id)
        self._pending.append(accepted)
        if self._running is None:
            # A task starts in the next pass of the loop, when every socket that is readable in this one has been read.
            self._running = asyncio.create_task(self._run())
        elif len(self._pending) == self._next_rows:
            self._next.set()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait until everything accepted is answered, at most `timeout_s` seconds."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self._in_flight:
                    self._drained.clear()
                    await self._drained.wait()
        except TimeoutError:
            log.error("batcher: %d transactions were not answered before the end", len(self._in_flight))  # noqa: TRY400

    def _retried(self, first: Accepted, job: Job, done: Done) -> None:
        if first.job.fingerprint != job.fingerprint:
            done(Result(job, Verdict.CONFLICT), self._clock_s())
            return
        self._metrics.duplicates.labels(Door.HTTP.value).inc()
        if first.retries is None:
            first.retries = []
        first.retries.append(done)

    async def _run(self) -> None:
        while self._pending:
            batch, hurried = self._take()
            try:
                results = await self._scorer.decide([accepted.job for accepted in batch])
                records = [*transaction_records(results), *decision_records(results)]
            except Exception:
                # A bug must not leave callers waiting, nor stop the door.
                log.exception("scorer: a batch of %d failed", len(batch))
                self._answer(batch, [None] * len(batch))
                continue
            now_s = self._clock_s()
            self._limit.note(now_s, now_s - batch[len(batch) // 2].job.received_s, len(self._in_flight), self._loop_lag_s())
            self._next_rows = min(self._batch_rows_max, max(OVERLAP_ROWS_MIN, len(batch)))
            self._publish(batch, results, records, now_s, 0.0 if hurried else self._publish_budget_s)
            if len(self._pending) < self._next_rows:
                # A batch is in flight until Kafka has it: what comes meanwhile shares the next one's fixed costs, which at a few
                # hundred requests a second is a third of the CPU. With as many waiting there is little more to share.
                await self._next.wait()
            self._next_rows = 0
        self._running = None

    def _take(self) -> tuple[list[Accepted], bool]:
        """The next batch, and True when it is one of those that can't wait for anything. These go by themselves, and first."""
        batch, rest = self._pending[: self._batch_rows_max], self._pending[self._batch_rows_max :]
        now_s = self._clock_s()
        hurry_s = now_s + HURRY_S
        hurried = [a for a in batch if a.job.deadline_s is not None and a.job.deadline_s < hurry_s]
        if not hurried:
            self._pending = rest
            return batch, False
        for accepted in hurried:
            job = accepted.job
            job.deadline_s = min(job.deadline_s or hurry_s, now_s + TAIL_BUDGET_MS / 1000)
        chosen = set(map(id, hurried))
        self._pending = [a for a in batch if id(a) not in chosen] + rest
        self._metrics.hurried.inc(len(hurried))
        return hurried, True

    def _publish(
        self, batch: list[Accepted], results: list[Result], records: list[Record], published_from_s: float, budget_s: float
    ) -> None:
        """Hand over to Kafka, and answer when it has acknowledged or the budget for that is over."""
        self._next.clear()
        acknowledged = self._publisher.send(records)
        if budget_s <= 0 or acknowledged.done():
            self._finish(batch, results, published_from_s)
            return
        answered = False

        def finish(_: object = None) -> None:
            nonlocal answered
            if not answered:
                answered = True
                late.cancel()
                self._finish(batch, results, published_from_s)

        late = asyncio.get_running_loop().call_later(budget_s, finish)
        acknowledged.add_done_callback(finish)

    def _finish(self, batch: list[Accepted], results: Sequence[Result], published_from_s: float) -> None:
        self._next.set()
        now_s = self._answer(batch, results)
        metrics = self._metrics
        metrics.step_ms.observe("publish", [(now_s - published_from_s) * 1000])
        metrics.latency_ms.observe(Door.HTTP.value, [(now_s - accepted.job.received_s) * 1000 for accepted in batch])
        verdicts = Counter([result.verdict for result in results])
        if verdicts[Verdict.DUPLICATE]:
            metrics.duplicates.labels(Door.HTTP.value).inc(verdicts[Verdict.DUPLICATE])

    def _answer(self, batch: list[Accepted], results: Sequence[Result | None]) -> float:
        """Tell every caller and forget the batch. Returns when that was."""
        now_s = self._clock_s()
        in_flight, deciding = self._in_flight, self._scorer.deciding
        for accepted, result in zip(batch, results, strict=True):
            transaction_id = accepted.job.transaction.transaction_id
            del in_flight[transaction_id]
            deciding.discard(transaction_id)
            try:
                accepted.tell(result, now_s)
            except Exception:
                # One caller's connection must not cost the others of its batch their answers.
                log.exception("http: an answer could not be given")
        self._metrics.in_flight.set(len(in_flight))
        self._metrics.in_flight_limit.set(self._limit.limit)
        if not in_flight:
            self._drained.set()
        return now_s
