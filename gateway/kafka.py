"""The Kafka door: transactions in, receipts, quarantine, alerts and consumed offsets out, one Kafka transaction a chunk.

A chunk is what one poll brings, of all partitions. A message that can't be read goes to quarantine by itself; its neighbours are
scored. One session is a producer and a consumer: the producer starts first, which fences a predecessor of the same instance and
aborts its open transaction, so that the consumer finds the offsets that were really committed. Any trouble with Kafka ends the
session, whose transaction never commits, and a new session starts from those offsets.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError

from gateway import avro
from gateway.avro import SchemaBook
from gateway.contracts.decision import Door
from gateway.contracts.reasons import Refusal
from gateway.contracts.registry import RegistryUnavailableError
from gateway.contracts.topics import QUARANTINE, SCORED_HEADER, TRANSACTIONS
from gateway.contracts.transaction import RefusedError
from gateway.job import Job, Result, Verdict, fingerprint_of, kafka_position
from gateway.metrics import Metrics
from gateway.publisher import stop_producer
from gateway.records import BATCH_BYTES_MAX, REQUEST_BYTES_MAX, Record, decision_records, send_all
from gateway.scorer import Scorer

log = logging.getLogger(__name__)

CHUNK_RECORDS_MAX = 512
POLL_MS = 200
# aiokafka asks a broker for those partitions alone of which nothing is buffered, and waits this long for them before it asks for
# the others: its default of 500 ms would be their latency.
FETCH_WAIT_MS = 20
# A chunk of nothing but records to skip (scored over HTTP) is committed with the next one, or after this time.
SKIPPED_COMMIT_S = 1.0
RETRY_FIRST_S = 0.2
RETRY_MAX_S = 5.0
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 3.0
TRANSACTION_TIMEOUT_MS = 30_000
# A commit that takes longer has lost its transaction to the broker's timeout.
COMMIT_TIMEOUT_S = TRANSACTION_TIMEOUT_MS / 1000
SESSION_TIMEOUT_MS = 10_000
HEARTBEAT_MS = 2000
REASON_HEADER = "reason"
# The quarantine topic takes messages twice as large as the others, so that original and envelope fit; a key may not come on top.
QUARANTINE_KEY_BYTES_MAX = 1024


@dataclass(slots=True)
class Chunk:
    """What a poll brought, sorted out. `next_offsets` is where to go on in each partition."""

    jobs: list[Job] = field(default_factory=list)
    sources: list[Any] = field(default_factory=list)
    quarantined: list[Record] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    skipped: int = 0
    next_offsets: dict[TopicPartition, int] = field(default_factory=dict)


class KafkaDoor:
    """Runs sessions until stopped."""

    def __init__(
        self,
        scorer: Scorer,
        schemas: SchemaBook,
        metrics: Metrics,
        *,
        bootstrap: str,
        group: str,
        instance: str,
        batch_rows_max: int,
    ) -> None:
        self._scorer = scorer
        self._schemas = schemas
        self._metrics = metrics
        self._bootstrap = bootstrap
        self._group = group
        self._instance = instance
        self._batch_rows_max = batch_rows_max
        # Where partitions go on behind records that were skipped, not committed yet.
        self._carried: dict[TopicPartition, int] = {}
        self._committed_s = 0.0
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.connected = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self, timeout_s: float) -> None:
        """Finish the chunk under way, commit it and leave the group, within `timeout_s` seconds."""
        self._stopping.set()
        if self._task is None:
            return
        _, late = await asyncio.wait({self._task}, timeout=timeout_s)
        if late:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        pause_s = RETRY_FIRST_S
        while not self._stopping.is_set():
            began_s = time.monotonic()
            try:
                await self._session()
            except (KafkaError, OSError, RegistryUnavailableError) as exc:
                log.warning("kafka: the session ended (%r), a new one starts", exc)
            except Exception:
                # A bug must not end the door for good: the chunk is tried again, and the log tells.
                log.exception("kafka: the session failed")
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
        """One producer and one consumer, until told to stop. Raises `KafkaError`, OSError or `RegistryUnavailableError`."""
        if not self._schemas.complete:
            await self._schemas.resolve()
        producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap,
            transactional_id=f"{self._group}-{self._instance}",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            max_batch_size=BATCH_BYTES_MAX,
            max_request_size=REQUEST_BYTES_MAX,
        )
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            group_id=self._group,
            group_instance_id=f"{self._group}-{self._instance}",
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=FETCH_WAIT_MS,
            session_timeout_ms=SESSION_TIMEOUT_MS,
            heartbeat_interval_ms=HEARTBEAT_MS,
        )
        idle = asyncio.Event()
        idle.set()
        self._carried.clear()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await producer.start()
                consumer.subscribe([TRANSACTIONS], listener=_WaitForChunk(idle, self._carried))
                await consumer.start()
            self.connected = True
            self._metrics.kafka_sessions.inc()
            log.info("kafka: consuming %s in group %s", TRANSACTIONS, self._group)
            while not self._stopping.is_set():
                polled = await consumer.getmany(timeout_ms=POLL_MS, max_records=CHUNK_RECORDS_MAX)
                if not polled:
                    continue
                idle.clear()
                try:
                    self._note_lag(consumer, await self._chunk(producer, polled))
                finally:
                    idle.set()
        finally:
            await _stop_consumer(consumer)
            await stop_producer(producer, STOP_TIMEOUT_S)

    async def _chunk(self, producer: AIOKafkaProducer, polled: dict[TopicPartition, list[Any]]) -> dict[TopicPartition, int]:
        """Decide and commit what one poll brought. Returns where each partition goes on."""
        received_s = time.monotonic()
        await self._schemas.learn([m.value for messages in polled.values() for m in messages if m.value is not None])
        chunk = self._sort_out(polled, received_s)
        results: list[Result] = []
        for i in range(0, len(chunk.jobs), self._batch_rows_max):
            results += await self._scorer.decide(chunk.jobs[i : i + self._batch_rows_max])
            # The HTTP door's batches go between ours.
            await asyncio.sleep(0)
        records = decision_records(results) + chunk.quarantined
        for result, source in zip(results, chunk.sources, strict=True):
            if result.verdict is Verdict.CONFLICT:
                chunk.refusals.append(Refusal.IDEMPOTENCY_CONFLICT)
                records.append(_quarantine(source, RefusedError(Refusal.IDEMPOTENCY_CONFLICT, "transaction_id")))
        published_from_s = time.monotonic()
        self._carried.update(chunk.next_offsets)
        if results or records or published_from_s - self._committed_s > SKIPPED_COMMIT_S:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                await self._commit(producer, records, dict(self._carried))
            self._carried.clear()
            self._committed_s = published_from_s
            self._count(chunk, results, published_from_s)
        return chunk.next_offsets

    async def _commit(self, producer: AIOKafkaProducer, records: Sequence[Record], next_offsets: dict[TopicPartition, int]) -> None:
        """Records and offsets, all or nothing. An error leaves the transaction open: the next session's producer aborts it."""
        await producer.begin_transaction()
        for future in await send_all(producer, records, self._schemas):
            await future
        await producer.send_offsets_to_transaction(next_offsets, self._group)
        await producer.commit_transaction()

    def _sort_out(self, polled: dict[TopicPartition, list[Any]], received_s: float) -> Chunk:
        chunk = Chunk()
        now_ms = time.time_ns() // 1_000_000
        decoded: list[list[tuple[Job, Any]]] = []
        for partition, messages in polled.items():
            chunk.next_offsets[partition] = messages[-1].offset + 1
            good: list[tuple[Job, Any]] = []
            for m in messages:
                if any(name == SCORED_HEADER for name, _ in m.headers):
                    chunk.skipped += 1
                    continue
                arrived_ms = m.timestamp if m.timestamp > 0 else now_ms
                try:
                    t = self._schemas.decode_transaction(m.value, arrived_ms)
                except RefusedError as exc:
                    chunk.refusals.append(exc.reason)
                    chunk.quarantined.append(_quarantine(m, exc))
                    continue
                payload = avro.encode_transaction(t)
                job = Job(
                    transaction=t,
                    payload=payload,
                    fingerprint=fingerprint_of(payload),
                    position=kafka_position(m.partition, m.offset),
                    door=Door.KAFKA,
                    arrived_ms=arrived_ms,
                    received_ms=now_ms,
                    received_s=received_s,
                    deadline_s=None,
                    partition=m.partition,
                    offset=m.offset,
                )
                good.append((job, m))
            decoded.append(good)
        for job, m in merge_by_event_time(decoded):
            chunk.jobs.append(job)
            chunk.sources.append(m)
        return chunk

    def _count(self, chunk: Chunk, results: Sequence[Result], published_from_s: float) -> None:
        metrics, door = self._metrics, Door.KAFKA.value
        now_s, now_ms = time.monotonic(), time.time_ns() // 1_000_000
        metrics.step_ms.observe("commit", [(now_s - published_from_s) * 1000])
        if results:
            # Since the producer's timestamp: what somebody who waits for the receipt sees.
            metrics.latency_ms.observe(door, [max(0, now_ms - r.job.arrived_ms) for r in results])
        duplicates = sum(r.verdict is Verdict.DUPLICATE for r in results)
        if duplicates:
            metrics.duplicates.labels(door).inc(duplicates)
        for reason, n in Counter(chunk.refusals).items():
            metrics.refused.labels(reason.value, door).inc(n)

    def _note_lag(self, consumer: AIOKafkaConsumer, next_offsets: dict[TopicPartition, int]) -> None:
        assigned = consumer.assignment()
        for partition, next_offset in next_offsets.items():
            end = consumer.highwater(partition) if partition in assigned else None
            if end is not None:
                self._metrics.lag.labels(str(partition.partition)).set(max(0, end - next_offset))


class _WaitForChunk(ConsumerRebalanceListener):  # type: ignore[misc]
    """A partition is given away only when the chunk that may hold its records is committed or given up."""

    def __init__(self, idle: asyncio.Event, carried: dict[TopicPartition, int]) -> None:
        self._idle = idle
        self._carried = carried

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        await self._idle.wait()
        # Another may own them next, and what was skipped is skipped again.
        self._carried.clear()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        log.info("kafka: assigned partitions %s", sorted(p.partition for p in assigned))


def merge_by_event_time(partitions: Sequence[Sequence[tuple[Job, Any]]]) -> Iterator[tuple[Job, Any]]:
    """One sequence that keeps each partition's order and takes the earliest event among the partitions' next ones.

    Entities that cards of several partitions share so see events in the order of time, as far as a chunk reaches.
    """
    return heapq.merge(*partitions, key=lambda item: item[0].transaction.event_time_ms)


def _quarantine(m: Any, refused: RefusedError) -> Record:
    """One refused message with its original bytes, keyed as it came."""
    payload = avro.encode_quarantined(
        {
            "reason": refused.reason.value,
            "field": refused.field,
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
    return Record(QUARANTINE, key, payload, [(REASON_HEADER, refused.reason.value.encode())])


async def _stop_consumer(consumer: AIOKafkaConsumer) -> None:
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await consumer.stop()
    except (KafkaError, OSError) as exc:
        log.debug("kafka: the consumer didn't stop cleanly: %r", exc)
