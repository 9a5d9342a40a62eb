"""The Kafka door: transactions in, receipts, quarantine, alerts and consumed offsets out, one Kafka transaction a chunk.

A chunk is what one poll brings, of all partitions. A message that can't be read goes to quarantine by itself, and so does one that the
scorer fails for; their neighbours are scored. While a chunk is committed the next one is read and scored.

One session is one `Link` (gateway/kafka/link.py). Any trouble with Kafka ends it, its open transaction is never seen, and a new session
starts from the offsets that were really committed. What fences a gateway that lost its partitions stands in docs/exactly_once.md.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiokafka import TopicPartition
from confluent_kafka import KafkaException

from gateway.contracts.decision import Door
from gateway.contracts.layout import FINGERPRINT_BYTES
from gateway.contracts.reasons import Refusal
from gateway.contracts.registry import RegistryUnavailableError
from gateway.contracts.topics import QUARANTINE, TRANSACTIONS
from gateway.contracts.transaction import RefusedError
from gateway.kafka import avro
from gateway.kafka.avro import SchemaBook
from gateway.kafka.link import CHUNK_RECORDS_MAX, Link, LinkLostError, Membership, Polled, is_scored
from gateway.kafka.poison import PoisonFilter
from gateway.kafka.records import Record, decision_records
from gateway.kernels.intake import CLEAN
from gateway.metrics import Metrics
from gateway.scoring.job import Job, Result, Verdict, fingerprint_of, kafka_position
from gateway.scoring.requests import Int64s, fingerprints_of, read_requests
from gateway.scoring.scorer import Scorer
from gateway.tracing.trace import accepted_of
from gateway.tracing.tracer import Tracer

log = logging.getLogger(__name__)

# A chunk of nothing but records to skip (scored over HTTP) is committed with the next one, or after this time.
SKIPPED_COMMIT_S = 1.0
RETRY_FIRST_S = 0.2
RETRY_MAX_S = 5.0
CLOSE_TIMEOUT_S = 5.0
REASON_HEADER = "reason"
# While somebody waits at the HTTP door a batch of ours has no more rows than this: Redis answers theirs behind it, 30 us a row later.
SHARED_ROWS_MAX = 64
# A chunk of more rows is decided in two halves, so that Redis and this process work at the same time; a batch costs a millisecond.
HALF_ROWS_MIN = 64
# The reason of a message that can be read and that the scorer fails for.
FAILED = "failed"
# The quarantine topic takes messages twice as large as the others, so that original and envelope fit; a key may not come on top.
QUARANTINE_KEY_BYTES_MAX = 1024


@dataclass(slots=True)
class Chunk:
    """What a poll brought, sorted out. `next_offsets` is where to go on in each partition."""

    jobs: list[Job] = field(default_factory=list)
    sources: list[Any] = field(default_factory=list)
    quarantined: list[Record] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    next_offsets: dict[TopicPartition, int] = field(default_factory=dict)


class KafkaDoor:
    """Runs sessions until stopped. `make_link` makes the link of a new session. `tracer`, None: there is none, gets what is committed.

    Polls that bring less than a full chunk begin `chunk_interval_s` apart: each costs some milliseconds of CPU beside its records, here and
    at the broker.
    """

    def __init__(
        self,
        scorer: Scorer,
        schemas: SchemaBook,
        metrics: Metrics,
        make_link: Callable[[], Link],
        *,
        batch_rows_max: int,
        chunk_interval_s: float = 0.01,
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self._chunk_interval_s = chunk_interval_s
        self._scorer = scorer
        self._poison = PoisonFilter(scorer.decide)
        self._schemas = schemas
        self._metrics = metrics
        self._make_link = make_link
        self._batch_rows_max = batch_rows_max
        # Where partitions go on behind records that were skipped, not committed yet, and the membership they came by.
        self._carried: dict[TopicPartition, int] = {}
        self._carried_by: Membership | None = None
        self._committed_s = 0.0
        # Records that were read and whose offsets are not committed.
        self._uncommitted = 0
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._current: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self.connected = False

    @property
    def running(self) -> bool:
        """True from `start` until `stop` is through: it is in the group, or tries to be."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Nothing happens while it runs. After `stop` it begins anew."""
        if self.running:
            return
        self._stopping.clear()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run())

    async def stop(self, timeout_s: float) -> None:
        """Finish the chunk under way, commit it and leave, within `timeout_s` seconds."""
        self._stopping.set()
        if self._task is None:
            return
        _, late = await asyncio.wait({self._task}, timeout=timeout_s)
        if late:
            self._give_up()
            await asyncio.wait({self._task}, timeout=CLOSE_TIMEOUT_S)

    def partitions(self) -> frozenset[int] | None:
        """What this gateway is to move, None while it is in no group. From any thread."""
        link = self._link
        membership = None if link is None else link.membership
        return None if membership is None else membership.partitions

    def restart_session(self) -> None:
        """End the session, whatever it is at, and begin another. From any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        if self._link is not None:
            self._link.abandon()
        if self._current is not None:
            self._current.cancel()

    async def _run(self) -> None:
        pause_s = RETRY_FIRST_S
        while not self._stopping.is_set():
            began_s = time.monotonic()
            self._current = asyncio.create_task(self._session())
            await asyncio.wait({self._current})
            if not self._current.cancelled():
                _tell(self._current.exception())
            self.connected = False
            if time.monotonic() - began_s > RETRY_MAX_S:
                pause_s = RETRY_FIRST_S
            await self._pause(pause_s)
            pause_s = min(pause_s * 2, RETRY_MAX_S)

    async def _pause(self, seconds: float) -> None:
        if not self._stopping.is_set():
            stopped = asyncio.ensure_future(self._stopping.wait())
            await asyncio.wait({stopped}, timeout=seconds)
            stopped.cancel()

    async def _session(self) -> None:
        """One link, until told to stop. Raises `LinkLostError`, KafkaException, OSError or `RegistryUnavailableError`."""
        if not self._schemas.complete:
            await self._schemas.resolve()
        loop = asyncio.get_running_loop()
        # A link's two threads end with it: a call that hangs takes no successor with it.
        polls, commits = ThreadPoolExecutor(1, "kafka-poll"), ThreadPoolExecutor(1, "kafka-commit")
        link = self._link = self._make_link()
        committing: asyncio.Task[None] | None = None
        self._carried.clear()
        self._uncommitted = 0
        try:
            await loop.run_in_executor(commits, link.open)
            self._metrics.kafka_sessions.inc()
            log.info("kafka: consuming %s", TRANSACTIONS)
            while not self._stopping.is_set():
                began_s = time.monotonic()
                membership, messages = await loop.run_in_executor(polls, link.poll)
                self.connected = membership is not None
                if committing is not None and committing.done():
                    await committing
                    committing = None
                chunk, results, records = await self._decide(messages, membership)
                polled = sum(m.records for m in messages)
                self._uncommitted += polled
                if membership is not None and self._due(results, records):
                    if committing is not None:
                        await committing
                    link.quiet.clear()
                    offsets = {p.partition: offset for p, offset in self._carried.items()}
                    self._carried.clear()
                    self._committed_s = time.monotonic()
                    committed = loop.run_in_executor(commits, link.commit, records, offsets, membership)
                    committing = asyncio.create_task(self._note_commit(committed, link, chunk, results, self._uncommitted))
                    self._uncommitted = 0
                if 0 < polled < CHUNK_RECORDS_MAX:
                    # Also behind what was only skipped: of that the HTTP door publishes something all the time.
                    await asyncio.sleep(max(0.0, began_s + self._chunk_interval_s - time.monotonic()))
            if committing is not None:
                await committing
        finally:
            self._link = None
            link.abandon()
            if committing is not None:
                committing.cancel()
            for executor, close in ((commits, link.close_producers), (polls, link.close_consumer)):
                await asyncio.wait({loop.run_in_executor(executor, close)}, timeout=CLOSE_TIMEOUT_S)
                executor.shutdown(wait=False)

    def _due(self, results: Sequence[Result], records: Sequence[Record]) -> bool:
        """True when there is something to commit now. What was only skipped waits a little for company."""
        if results or records:
            return True
        return bool(self._carried) and time.monotonic() - self._committed_s > SKIPPED_COMMIT_S

    async def _decide(self, messages: Sequence[Polled], membership: Membership | None) -> tuple[Chunk, list[Result], list[Record]]:
        """Sort out and decide what one poll brought, for the partitions of `membership`."""
        if membership is not self._carried_by:
            # Another may own them now, and what was skipped is skipped again.
            self._carried.clear()
            self._carried_by = membership
            self._metrics.lag.clear()
        if not messages:
            return Chunk(), [], []
        if membership is None:
            raise LinkLostError("messages came without partitions")
        received_s = time.monotonic()
        await self._schemas.learn([m.value for m in messages if m.value is not None])
        polled: dict[TopicPartition, list[Any]] = {}
        for m in messages:
            polled.setdefault(TopicPartition(m.topic, m.partition), []).append(m)
        chunk = self._sort_out(polled, received_s)
        found = await self._decide_jobs(chunk.jobs)
        results = [result for result in found if result is not None]
        records = decision_records(results) + chunk.quarantined
        for result, source in zip(found, chunk.sources, strict=True):
            if result is None:
                chunk.refusals.append(FAILED)
                records.append(_quarantine(source, FAILED))
            elif result.verdict is Verdict.CONFLICT:
                chunk.refusals.append(Refusal.IDEMPOTENCY_CONFLICT)
                records.append(_quarantine(source, Refusal.IDEMPOTENCY_CONFLICT.value, "transaction_id"))
        self._carried.update(chunk.next_offsets)
        return chunk, results, records

    async def _decide_jobs(self, jobs: Sequence[Job]) -> list[Result | None]:
        """A result for each of `jobs`, None where it can't be decided: in batches, one at Redis while the one before is worked out."""
        # Of two records of one transaction the second is to see what became of the first.
        alike = len({job.transaction_id for job in jobs}) != len(jobs)
        found: list[Result | None] = []
        under_way: deque[asyncio.Task[list[Result | None]]] = deque()
        at = 0
        try:
            while at < len(jobs) or under_way:
                # The HTTP door's batches go between ours.
                if under_way and (at == len(jobs) or len(under_way) == 2 or alike or self._scorer.deciding):
                    found += await under_way[0]
                    under_way.popleft()
                    continue
                rows = SHARED_ROWS_MAX if self._scorer.deciding else max(HALF_ROWS_MIN, (len(jobs) + 1) // 2)
                batch = jobs[at : at + min(rows, self._batch_rows_max)]
                at += len(batch)
                under_way.append(asyncio.create_task(self._poison.decide(batch)))
        finally:
            for task in under_way:
                task.cancel()
            if under_way:
                # What ended the first of them is raised; how the other ended has nothing to add.
                await asyncio.gather(*under_way, return_exceptions=True)
        return found

    async def _note_commit(
        self, committed: asyncio.Future[None], link: Link, chunk: Chunk, results: Sequence[Result], consumed: int
    ) -> None:
        began_s = time.monotonic()
        await committed
        self._metrics.consumed.inc(consumed)
        self._count(chunk, results, began_s)
        self._note_lag(link, chunk.next_offsets)

    def _sort_out(self, polled: dict[TopicPartition, list[Any]], received_s: float) -> Chunk:
        chunk = Chunk()
        now_ms = time.time_ns() // 1_000_000
        wanted: list[Any] = []
        for partition, messages in polled.items():
            chunk.next_offsets[partition] = messages[-1].offset + 1
            wanted += [m for m in messages if not is_scored(m.headers)]
        if not wanted:
            return chunk
        arrived_ms = [m.timestamp if m.timestamp > 0 else now_ms for m in wanted]
        payloads = [self._schemas.payload_of(m.value) for m in wanted]
        requests = read_requests(payloads, np.array(arrived_ms, np.int64))
        clean = requests.state == CLEAN
        # What isn't has no text to be read, and is read below.
        requests.starts[~clean], requests.lengths[~clean] = 0, 0
        prints = fingerprints_of(requests)
        jobs: list[Job] = []
        sources: list[Any] = []
        times_ms: list[int] = []
        columns = (wanted, payloads, clean.tolist(), arrived_ms, requests.ids(), requests.cards(), requests.t_ms.tolist())
        for i, (m, payload, is_clean, m_arrived_ms, transaction_id, card_id, t_ms) in enumerate(zip(*columns, strict=True)):
            fingerprint = prints[i * FINGERPRINT_BYTES : (i + 1) * FINGERPRINT_BYTES]
            if not is_clean:
                # JSON, another schema, or something to look at more closely.
                try:
                    t = self._schemas.decode_transaction(m.value, m_arrived_ms)
                except RefusedError as exc:
                    chunk.refusals.append(exc.reason)
                    chunk.quarantined.append(_quarantine(m, exc.reason.value, exc.field))
                    continue
                payload, transaction_id, card_id, t_ms = (
                    avro.encode_transaction(t),
                    t.transaction_id,
                    t.card_id.encode(),
                    t.event_time_ms,
                )
                fingerprint = fingerprint_of(payload)
            job = Job(
                transaction_id=transaction_id,
                card_id=card_id,
                payload=payload,
                claim=fingerprint + kafka_position(m.partition, m.offset),
                door=Door.KAFKA,
                arrived_ms=m_arrived_ms,
                received_ms=now_ms,
                received_s=received_s,
                deadline_s=None,
                partition=m.partition,
                offset=m.offset,
            )
            if self._tracer is not None and m.headers:
                job.traceparent = accepted_of(m.headers)
            jobs.append(job)
            sources.append(m)
            times_ms.append(t_ms)
        order = by_event_time(np.array([m.partition for m in sources], np.int64), np.array(times_ms, np.int64))
        chunk.jobs = [jobs[i] for i in order]
        chunk.sources = [sources[i] for i in order]
        return chunk

    def _count(self, chunk: Chunk, results: Sequence[Result], published_from_s: float) -> None:
        metrics, door = self._metrics, Door.KAFKA.value
        now_s, now_ms = time.monotonic(), time.time_ns() // 1_000_000
        metrics.step_s.observe("commit", [now_s - published_from_s])
        if results:
            # Since the producer's timestamp: what somebody who waits for the receipt sees.
            latencies_s = [max(0, now_ms - r.job.arrived_ms) / 1000 for r in results]
            metrics.latency_s.observe(door, latencies_s)
            metrics.kafka_level.answered(latencies_s)
            if self._tracer is not None:
                self._tracer.finish(results, published_from_s, now_s)
        duplicates = sum(r.verdict is Verdict.DUPLICATE for r in results)
        if duplicates:
            metrics.duplicates.labels(door).inc(duplicates)
        failed = chunk.refusals.count(FAILED)
        if failed:
            metrics.kafka_level.failed(failed)
        for reason, n in Counter(chunk.refusals).items():
            metrics.refused.labels(str(reason), door).inc(n)

    def _note_lag(self, link: Link, next_offsets: dict[TopicPartition, int]) -> None:
        for partition, next_offset in next_offsets.items():
            end = link.end_of(partition.partition)
            if end is not None:
                self._metrics.lag.labels(str(partition.partition)).set(max(0, end - next_offset))


def _tell(exc: BaseException | None) -> None:
    """What ended a session. A bug must not end the door for good: the chunk is tried again, and the log tells."""
    if isinstance(exc, (LinkLostError, KafkaException, OSError, RegistryUnavailableError)):
        log.warning("kafka: the session ended (%s), a new one starts", exc)
    elif exc is not None:
        log.error("kafka: the session failed", exc_info=exc)


def by_event_time(partitions: Int64s, times_ms: Int64s) -> list[int]:
    """The order that keeps each partition's and takes the earliest event among the partitions' next ones; messages lie by partition.

    Entities that cards of several partitions share so see events in the order of time, as far as a chunk reaches.
    """
    # An event comes after those before it in its partition: its turn is that of the latest of them.
    turns = times_ms.copy()
    edges = [0, *(np.flatnonzero(np.diff(partitions)) + 1).tolist(), len(partitions)]
    for begin, end in itertools.pairwise(edges):
        np.maximum.accumulate(turns[begin:end], out=turns[begin:end])
    order: list[int] = np.argsort(turns, kind="stable").tolist()
    return order


def _quarantine(m: Any, reason: str, at_field: str | None = None) -> Record:
    """One message that is not decided, with its original bytes, keyed as it came."""
    payload = avro.encode_quarantined(
        {
            "reason": reason,
            "field": at_field,
            "topic": m.topic,
            "partition": m.partition,
            "offset": m.offset,
            "timestamp_ms": m.timestamp,
            "key": m.key,
            "value": m.value or b"",
            "quarantined_at_ms": time.time_ns() // 1_000_000,
        }
    )
    key = None if m.key is None else m.key[:QUARANTINE_KEY_BYTES_MAX]
    return Record(QUARANTINE, key, payload, ((REASON_HEADER, reason.encode()),))
