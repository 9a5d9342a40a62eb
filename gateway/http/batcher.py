"""Micro-batches for callers that come one by one: while a batch is in flight the next one collects; nothing waits when idle.

No task and no future per transaction: a caller leaves a callback. A batch takes what all sockets that were readable in one pass of the
event loop brought.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from gateway.contracts.decision import Door
from gateway.contracts.layout import FINGERPRINT_BYTES
from gateway.contracts.transaction import RefusedError
from gateway.errors import DrainingError, GatewayError, OverloadedError
from gateway.http.admission import AdaptiveLimit
from gateway.http.bodies import read_bodies
from gateway.kafka.publisher import Publisher
from gateway.kafka.records import decision_records, transaction_records
from gateway.metrics import Metrics
from gateway.scoring.job import Job, Result, Verdict, http_job
from gateway.scoring.requests import Requests, fingerprints_of, read_requests
from gateway.scoring.scorer import REPLY_BUDGET_MS, TAIL_BUDGET_MS, Scorer
from gateway.tracing.trace import accepted as accepted_traceparent
from gateway.tracing.tracer import Tracer

log = logging.getLogger(__name__)

# Where Kafka is waited for, the next batch doesn't wait with it when so many, and as many as the one before has, have come.
OVERLAP_ROWS_MIN = 16

# A batch of so many doesn't wait to grow further: each transaction bears little of what a batch costs.
FULL_ROWS = 64

# With less time than this left, a transaction is decided without Redis: its wait could only be too short, and a wait that ends
# without a reply costs everybody the connection.
REDIS_WAIT_LEAST_S = 0.010
HURRY_S = TAIL_BUDGET_MS / 1000 + REDIS_WAIT_LEAST_S

# Called once with the result, or why there is none, and time.monotonic(); None means that the scorer failed. Must not raise.
Done = Callable[[Result | RefusedError | None, float], None]


class Accepted:
    """One body that is not answered yet, and whom to tell: its caller, then those who retried it meanwhile."""

    __slots__ = ("body", "deadline_s", "done", "explain", "job", "received_s", "retries", "traceparent", "waited")

    # Once the body is read.
    job: Job

    def __init__(
        self, body: bytes, received_s: float, deadline_s: float, done: Done, explain: bool, traceparent: bytes | None
    ) -> None:
        self.body = body
        self.received_s = received_s
        self.deadline_s = deadline_s
        self.done = done
        self.explain = explain
        self.traceparent = traceparent
        self.retries: list[Done] | None = None
        # For another process that had claimed the same transaction.
        self.waited = False

    def tell(self, result: Result | RefusedError | None, now_s: float) -> None:
        self.done(result, now_s)
        if self.retries is not None:
            for done in self.retries:
                done(result, now_s)


class Batcher:
    """The HTTP door's way to the scorer.

    At most `limit.limit` transactions are accepted and not yet answered; `loop_lag_s` tells how busy the event loop is. A retry of one
    of them waits for the first. Decisions are handed to the publisher and answered when its log has them; where it has none, when Kafka
    has acknowledged them, or `publish_budget_s` or their deadline is over. A batch that isn't full begins `batch_interval_s` after the one
    before, at the earliest. `tracer`, None: there is none, gets what is answered. `now_ms` is the wall clock, `clock_s` the monotonic one.
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
        batch_interval_s: float = 0.0,
        loop_lag_s: Callable[[], float] = lambda: 0.0,
        tracer: Tracer | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scorer = scorer
        self._publisher = publisher
        self._metrics = metrics
        self._batch_rows_max = batch_rows_max
        self._batch_interval_s = batch_interval_s
        self._full_rows = min(batch_rows_max, FULL_ROWS)
        self._limit = limit
        self._loop_lag_s = loop_lag_s
        self._publish_budget_s = publish_budget_s
        self._tracer = tracer
        self._now_ms = now_ms
        # Tells the claims of this process from all others'.
        self._process = secrets.randbits(32)
        self._clock_s = clock_s
        # Accepted and not answered, and those of them whose body is not read.
        self._open = 0
        self._pending: list[Accepted] = []
        # Those whose body is, by transaction_id.
        self._in_flight: dict[str, Accepted] = {}
        self._running: asyncio.Task[None] | None = None
        # When the last batch of those who can wait was taken; whether one of the others came after it; whether there is one to take now.
        self._taken_s = -math.inf
        self._hurried = False
        self._urgent = False
        # Set when the next batch may start, and how many must be waiting for that.
        self._next = asyncio.Event()
        self._next_rows = 0
        self._drained = asyncio.Event()
        self._draining = False
        # Asked for when somebody reads the metrics.
        metrics.in_flight.set_function(lambda: self._open)
        metrics.in_flight_limit.set_function(lambda: self._limit.limit)

    @property
    def in_flight(self) -> int:
        """Transactions accepted and not yet answered."""
        return self._open

    def refusal(self) -> type[GatewayError] | None:
        """Why nothing more can be taken now, None when it can. Asked before a body is read and again before it is decoded."""
        if self._draining:
            return DrainingError
        if self._open >= self._limit.limit:
            return OverloadedError
        return None

    def submit(
        self,
        body: bytes,
        received_s: float,
        deadline_s: float,
        done: Done,
        explain: bool = False,
        traceparent: bytes | None = None,
    ) -> None:
        """Take a body, which is read with the others of its batch. `done` is called later. `traceparent` is as the caller sent it."""
        self._open += 1
        self._pending.append(Accepted(body, received_s, deadline_s, done, explain, traceparent))
        if deadline_s - received_s < HURRY_S + self._batch_interval_s:
            # Waiting for company would leave no time for Redis.
            self._urgent = True
            self._next.set()
        self._begin()

    def _begin(self) -> None:
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
                while self._open:
                    self._drained.clear()
                    await self._drained.wait()
        except TimeoutError:
            log.error("batcher: %d transactions were not answered before the end", self._open)  # noqa: TRY400

    def _read(self, taken: list[Accepted]) -> tuple[list[Accepted], Requests | None]:
        """Those of `taken` that are to be decided, and their columns when all are. The others are answered, or wait for their first."""
        now_s, now_ms = self._clock_s(), self._now_ms()
        try:
            found, requests = read_bodies([accepted.body for accepted in taken], now_ms)
        except Exception:
            # A bug in the reading of one batch: its callers are told, the next ones are read.
            log.exception("http: %d bodies could not be read", len(taken))
            for accepted in taken:
                self._tell(accepted, None, now_s)
            return [], None
        if requests is None:
            readable: list[tuple[Accepted, bytes]] = []
            for accepted, record in zip(taken, found, strict=True):
                if isinstance(record, RefusedError):
                    self._tell(accepted, record, now_s)
                else:
                    readable.append((accepted, record))
            if not readable:
                return [], None
            taken, records = [accepted for accepted, _ in readable], [record for _, record in readable]
            requests = read_requests(records, np.full(len(records), -1, np.int64))
        else:
            records = found  # type: ignore[assignment]
        in_flight, deciding = self._in_flight, self._scorer.deciding
        batch: list[Accepted] = []
        prints = fingerprints_of(requests)
        columns = zip(taken, requests.ids(), requests.cards(), records, strict=True)
        for i, (accepted, transaction_id, card_id, record) in enumerate(columns):
            fingerprint = prints[i * FINGERPRINT_BYTES : (i + 1) * FINGERPRINT_BYTES]
            received_s = accepted.received_s
            received_ms = now_ms - round((now_s - received_s) * 1000)
            job = accepted.job = http_job(
                transaction_id, card_id, record, fingerprint, received_ms, now_ms, received_s, accepted.deadline_s, self._process
            )
            job.explain = accepted.explain
            job.patient = not accepted.waited
            if self._tracer is not None and accepted.traceparent is not None:
                job.traceparent = accepted_traceparent(accepted.traceparent)
            first = in_flight.setdefault(transaction_id, accepted)
            if first is not accepted:
                self._retried(first, accepted, now_s)
                continue
            deciding.add(job.transaction_id)
            batch.append(accepted)
        return batch, requests if len(batch) == len(requests) else None

    def _retried(self, first: Accepted, accepted: Accepted, now_s: float) -> None:
        if first.job.fingerprint != accepted.job.fingerprint:
            self._tell(accepted, Result(accepted.job, Verdict.CONFLICT), now_s)
            return
        self._metrics.duplicates.labels(Door.HTTP.value).inc()
        if first.retries is None:
            first.retries = []
        first.retries.append(accepted.done)

    async def _run(self) -> None:
        while self._pending:
            try:
                await self._next_batch()
            except Exception:
                # Its callers were told; what was to be counted behind it is lost. The door goes on.
                log.exception("http: a batch was not brought to its end")
            self._next_rows = 0
        self._running = None

    async def _next_batch(self) -> None:
        await self._collect()
        taken, hurried = self._take()
        batch, requests = self._read(taken)
        if not batch:
            return
        try:
            results = await self._scorer.decide([accepted.job for accepted in batch], requests)
            acknowledged = self._publisher.send([*transaction_records(results), *decision_records(results)])
        except Exception:
            # A bug must not leave callers waiting, nor stop the door.
            log.exception("scorer: a batch of %d failed", len(batch))
            self._answer(batch, [None] * len(batch))
            return
        now_s = self._clock_s()
        self._limit.note(now_s, now_s - batch[len(batch) // 2].received_s, self._open, self._loop_lag_s())
        self._next_rows = min(self._batch_rows_max, max(OVERLAP_ROWS_MIN, len(batch)))
        self._finish_when(acknowledged, batch, results, now_s, 0.0 if hurried else self._publish_time_s(batch, now_s))
        if len(self._pending) < self._next_rows:
            # A batch is in flight until Kafka has it: what comes meanwhile shares the next one's fixed costs, which at a few
            # hundred requests a second is a third of the CPU. With as many waiting there is little more to share.
            await self._next.wait()

    def _publish_time_s(self, batch: list[Accepted], now_s: float) -> float:
        """How long answers may wait for Kafka: its budget, or what the most urgent deadline leaves beside the reply."""
        left_s = min([accepted.deadline_s for accepted in batch]) - now_s - REPLY_BUDGET_MS / 1000
        return min(self._publish_budget_s, left_s)

    async def _collect(self) -> None:
        """While batches follow each other closely, leave the next one a little time to grow: it shares what each batch costs."""
        pause_s = self._taken_s + self._batch_interval_s - self._clock_s()
        if pause_s > 0 and not self._urgent and len(self._pending) < self._full_rows:
            self._next.clear()
            self._next_rows = self._full_rows
            timer = asyncio.get_running_loop().call_later(pause_s, self._next.set)
            await self._next.wait()
            timer.cancel()
            self._next_rows = 0
        self._urgent = False

    def _take(self) -> tuple[list[Accepted], bool]:
        """The next batch, and True when it is one of those that can't wait for anything. These go by themselves, and first, but not twice
        in a row while others wait.
        """
        batch, rest = self._pending[: self._batch_rows_max], self._pending[self._batch_rows_max :]
        now_s = self._clock_s()
        hurry_s = now_s + HURRY_S
        hurried = [a for a in batch if a.deadline_s < hurry_s]
        patient = [a for a in batch if a.deadline_s >= hurry_s] if hurried else batch
        if not hurried or (patient and self._hurried):
            self._hurried = False
            self._taken_s = now_s
            self._pending = hurried + rest
            return patient, False
        for accepted in hurried:
            accepted.deadline_s = min(accepted.deadline_s, now_s + TAIL_BUDGET_MS / 1000)
        self._hurried = True
        self._pending = patient + rest
        self._metrics.hurried.inc(len(hurried))
        return hurried, True

    def _finish_when(
        self,
        acknowledged: asyncio.Future[None],
        batch: list[Accepted],
        results: list[Result],
        published_from_s: float,
        budget_s: float,
    ) -> None:
        """Answer when the publisher has the decisions in its log or in Kafka, or the budget for that is over."""
        self._next.clear()
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
        answered, now_s = self._answer(batch, results)
        metrics = self._metrics
        metrics.step_s.observe("publish", [now_s - published_from_s])
        latencies_s = [now_s - accepted.received_s for accepted in answered]
        if not latencies_s:
            return
        metrics.latency_s.observe(Door.HTTP.value, latencies_s)
        metrics.http_level.answered(latencies_s)
        if self._tracer is not None:
            self._tracer.finish(results, published_from_s, now_s)
        verdicts = Counter([result.verdict for result in results])
        if verdicts[Verdict.DUPLICATE]:
            metrics.duplicates.labels(Door.HTTP.value).inc(verdicts[Verdict.DUPLICATE])

    def _answer(self, batch: list[Accepted], results: Sequence[Result | None]) -> tuple[list[Accepted], float]:
        """Tell every caller and forget the batch, but for those who wait on. Returns who was told, and when."""
        now_s = self._clock_s()
        in_flight, deciding = self._in_flight, self._scorer.deciding
        told: list[Accepted] = []
        for accepted, result in zip(batch, results, strict=True):
            transaction_id = accepted.job.transaction_id
            deciding.discard(transaction_id)
            if result is not None and result.free_in_s is not None and now_s + result.free_in_s < accepted.deadline_s:
                # Another process claimed it just now. By then it has an answer, or is to be decided here.
                accepted.waited = True
                asyncio.get_running_loop().call_later(result.free_in_s, self._again, accepted)
                continue
            del in_flight[transaction_id]
            told.append(accepted)
            self._tell(accepted, result, now_s)
        return told, now_s

    def _again(self, accepted: Accepted) -> None:
        self._pending.append(accepted)
        self._begin()

    def _tell(self, accepted: Accepted, result: Result | RefusedError | None, now_s: float) -> None:
        self._open -= 1 if accepted.retries is None else 1 + len(accepted.retries)
        try:
            accepted.tell(result, now_s)
        except Exception:
            # One caller's connection must not cost the others of its batch their answers.
            log.exception("http: an answer could not be given")
        if not self._open:
            self._drained.set()
