"""The blocking half of the Kafka door: one consumer and its producers, by librdkafka. Called by gateway/kafka/door.py, in two threads.

librdkafka (confluent-kafka) and not aiokafka, because it commits offsets with the consumer's group metadata (KIP-447): the broker
refuses the commit of a member whose partitions have gone to another, and a new owner waits for offsets that an open transaction
still holds. Measured beside aiokafka in one run, chunks of 512, transactions: 5.0 us of CPU an event for consuming and producing
against 6.5. Its calls block, but not the interpreter.

Two producers take turns. A broker lets a transactional id begin anew only when the markers of its last transaction are written, and
clients wait 20 ms before they ask again; with two, each has the other's transaction to do that in. Transactions end strictly one
after the other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from gateway.contracts.topics import SCORED_HEADER, TRANSACTIONS
from gateway.contracts.wire import frame
from gateway.kafka.avro import SchemaBook
from gateway.kafka.records import BATCH_BYTES_MAX, REQUEST_BYTES_MAX, Record, partition_of

log = logging.getLogger(__name__)

CHUNK_RECORDS_MAX = 512
POLL_S = 0.2
# The broker collects this much before it answers a fetch, or waits as long as Link is told: each fetch costs about 0.1 ms here.
FETCH_BYTES_MIN = 32_768
FETCH_WAIT_MS = 10
# What librdkafka holds of messages that no chunk has taken yet.
FETCHED_KB_MAX = 16_384
SESSION_TIMEOUT_MS = 10_000
HEARTBEAT_MS = 2000
# A transaction that is left open holds back the new owner of its partitions, and readers, until it times out.
TRANSACTION_TIMEOUT_MS = 10_000
COMMIT_TIMEOUT_S = TRANSACTION_TIMEOUT_MS / 1000
START_TIMEOUT_S = 30.0
# A chunk that takes longer than this has lost its partitions.
CHUNK_TIMEOUT_MS = 60_000
assert CHUNK_TIMEOUT_MS > COMMIT_TIMEOUT_S * 1000
# Calls are cut into slices of this length, so that a link can be told to give up.
SLICE_S = 0.5
METADATA_TIMEOUT_S = 5.0
PRODUCERS = 2
RECONNECT_MS_MAX = 1000


class LinkLostError(Exception):
    """This link can't go on; nothing of its open transaction will ever be seen. A new link starts from what is committed."""


class Polled(msgspec.Struct, gc=False):
    """One message of the transactions topic. `timestamp` is in milliseconds, 0 or less when it has none.

    The last of `records` that follow each other in a partition and were scored over HTTP stands for all of them, without key and value:
    nothing of them is looked at, and where only HTTP is used they are all there is.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    records: int = 1


class Membership:
    """One assignment of partitions. `metadata` names member and generation as they were when it was made, and so fences it."""

    __slots__ = ("metadata", "partitions")

    def __init__(self, metadata: Any, partitions: frozenset[int]) -> None:
        self.metadata = metadata
        self.partitions = partitions


class Link:
    """`poll` and `close_consumer` belong to one thread, everything else to another, but for `abandon` and `quiet`, which any may use.

    `quiet` is set while no chunk is under way: partitions are given away only then.
    """

    def __init__(
        self,
        bootstrap: str,
        group: str,
        instance: str,
        schemas: SchemaBook,
        *,
        exactly_once: bool,
        fetch_wait_ms: int = FETCH_WAIT_MS,
    ) -> None:
        self._schemas = schemas
        self._exactly_once = exactly_once
        self._turn = 0
        self._partitions: dict[str, int] = {}
        # By partition of transactions.
        self._ends: dict[int, int] = {}
        # Those of which offsets were committed here.
        self._moved: set[int] = set()
        self._abandoned = threading.Event()
        self._failed: list[KafkaError] = []
        self._all_down = False
        self.quiet = threading.Event()
        self.quiet.set()
        self.membership: Membership | None = None
        name = f"{group}-{instance}"
        common = {
            "bootstrap.servers": bootstrap,
            "log_level": 0,
            "socket.nagle.disable": True,
            "reconnect.backoff.max.ms": RECONNECT_MS_MAX,
        }
        producer = common | {
            "enable.idempotence": True,
            # Collected until they are flushed, and sent in whole batches then.
            "linger.ms": 100,
            "batch.size": BATCH_BYTES_MAX,
            "message.max.bytes": REQUEST_BYTES_MAX,
            "retry.backoff.ms": 5,
            "delivery.report.only.error": True,
            "on_delivery": self._note_failed,
            "error_cb": _ignore,
        }
        if exactly_once:
            transactional = {"transaction.timeout.ms": TRANSACTION_TIMEOUT_MS}
            self._producers = [Producer(producer | transactional | {"transactional.id": f"{name}-{i}"}) for i in range(PRODUCERS)]
        else:
            self._producers = [Producer(producer)]
        self._consumer: Any = None
        self._consumer_options = common | {
            "group.id": group,
            "group.instance.id": name,
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "fetch.min.bytes": FETCH_BYTES_MIN,
            "fetch.wait.max.ms": fetch_wait_ms,
            "queued.max.messages.kbytes": FETCHED_KB_MAX,
            "session.timeout.ms": SESSION_TIMEOUT_MS,
            "heartbeat.interval.ms": HEARTBEAT_MS,
            "max.poll.interval.ms": CHUNK_TIMEOUT_MS,
            "error_cb": self._note_error,
        }

    def open(self) -> None:
        """Fence a predecessor of the same name, which aborts its open transactions, then ask to join the group."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        if self._exactly_once:
            for producer in self._producers:
                self._until(deadline_s, producer.init_transactions)
        # Made only now, so that it has nothing to tell of a broker that was down before.
        self._consumer = Consumer(self._consumer_options)
        self._consumer.subscribe([TRANSACTIONS], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def poll(self) -> tuple[Membership | None, list[Polled]]:
        """What is there, up to CHUNK_RECORDS_MAX, waiting at most POLL_S for the first; and the membership that it came by."""
        first = self._consumer.poll(POLL_S)
        if self._all_down:
            raise LinkLostError("no broker can be reached")
        if first is None:
            return self.membership, []
        before = self.membership
        found = _messages([first, *self._consumer.consume(CHUNK_RECORDS_MAX - 1, 0)])
        if self.membership is not before:
            # Partitions went and came among these messages: which of them are ours can't be told, so they are read again.
            self._rewind()
            return self.membership, []
        for partition in {m.partition for m in found}:
            # Here and not where it is asked for: the client lets one thread in at a time, and a poll takes its time.
            end = self._consumer.get_watermark_offsets(TopicPartition(TRANSACTIONS, partition), cached=True)
            if end is not None and end[1] >= 0:
                self._ends[partition] = int(end[1])
        return before, found

    def commit(self, records: Sequence[Record], next_offsets: Mapping[int, int], membership: Membership) -> None:
        """Records and offsets, all or nothing; or, at least once, the records first. Sets `quiet` when it is through.

        Raises `LinkLostError`, among others when the partitions have another owner.
        """
        try:
            deadline_s = time.monotonic() + COMMIT_TIMEOUT_S
            offsets = [TopicPartition(TRANSACTIONS, partition, offset) for partition, offset in next_offsets.items()]
            self._moved.update(next_offsets)
            self._turn = (self._turn + 1) % len(self._producers)
            producer = self._producers[self._turn]
            if self._exactly_once:
                producer.begin_transaction()
                self._produce(producer, records)
                self._until(deadline_s, lambda s: producer.send_offsets_to_transaction(offsets, membership.metadata, s))
                self._until(deadline_s, producer.commit_transaction)
                return
            self._produce(producer, records)
            while producer.flush(SLICE_S):
                self._check(deadline_s)
            if self._failed:
                raise LinkLostError(f"{len(self._failed)} records were not delivered: {self._failed[0]}")
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except (KafkaException, BufferError) as exc:
            raise LinkLostError(str(exc)) from exc
        finally:
            self.quiet.set()

    def end_of(self, partition: int) -> int | None:
        """The end of a partition as the last fetch saw it."""
        return self._ends.get(partition)

    def abandon(self) -> None:
        """Whatever is under way gives up within about SLICE_S."""
        self._abandoned.set()
        self.quiet.set()

    def close_producers(self) -> None:
        """An open transaction stays open: the next link aborts it."""
        for producer in self._producers:
            producer.purge()
        self._producers.clear()

    def close_consumer(self) -> None:
        """In the thread that polls, after `abandon`, or when nothing is under way."""
        # Not `close`: a static member leaves no group by it, and in the middle of a join it waits for ever, holding the interpreter.
        self._consumer = None

    def _produce(self, producer: Producer, records: Sequence[Record]) -> None:
        ids = {topic: self._schemas.id_of(topic) for topic in {r.topic for r in records}}
        for topic in ids.keys() - self._partitions.keys():
            self._partitions[topic] = len(producer.list_topics(topic, timeout=METADATA_TIMEOUT_S).topics[topic].partitions)
        counts = self._partitions
        for r in records:
            value, partition = frame(ids[r.topic], r.payload), partition_of(r.key, counts[r.topic])
            if r.headers:
                producer.produce(r.topic, value, r.key, partition, headers=list(r.headers))
            else:
                # An empty list of headers would cost a third of the call.
                producer.produce(r.topic, value, r.key, partition)

    def _until(self, deadline_s: float, call: Callable[[float], None]) -> None:
        """`call`, which takes its longest time in seconds, again and again while it is not through."""
        while True:
            try:
                return call(SLICE_S)
            except KafkaException as exc:
                if not exc.args[0].retriable():
                    raise LinkLostError(str(exc)) from exc
                self._check(deadline_s)

    def _check(self, deadline_s: float) -> None:
        if self._abandoned.is_set():
            raise LinkLostError("abandoned")
        if time.monotonic() > deadline_s:
            raise LinkLostError("Kafka didn't answer in time")

    def _rewind(self) -> None:
        if self.membership is None or not self.membership.partitions:
            return
        ours = [TopicPartition(TRANSACTIONS, p) for p in self.membership.partitions]
        try:
            for at in self._consumer.committed(ours, timeout=METADATA_TIMEOUT_S):
                # In the middle of a rebalance the broker may not tell. To begin at the beginning then would decide everything again.
                if at.error is not None or (at.offset < 0 and at.partition in self._moved):
                    raise LinkLostError(f"where partition {at.partition} goes on can't be read: {at.error}")
                start = at.offset if at.offset >= 0 else OFFSET_BEGINNING
                self._consumer.seek(TopicPartition(TRANSACTIONS, at.partition, start))
        except KafkaException as exc:
            raise LinkLostError(str(exc)) from exc

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        metadata = consumer.consumer_group_metadata()
        # A member that was thrown out meanwhile has no name, and offsets without one are committed unfenced.
        known = bool(consumer.memberid())
        self.membership = Membership(metadata, frozenset(p.partition for p in partitions)) if known else None
        log.info("kafka: assigned partitions %s", sorted(p.partition for p in partitions))

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Partitions are given away only when the chunk that may hold their records is committed or given up."""
        self.quiet.wait(COMMIT_TIMEOUT_S)
        self.membership = None

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Others own them already: what is under way will be refused."""
        log.warning("kafka: lost partitions %s", sorted(p.partition for p in partitions))
        self.membership = None

    def _note_failed(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._failed.append(error)

    def _note_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._all_down = True


def _ignore(error: KafkaError) -> None:
    """What a producer meets comes out of its calls."""


def _messages(raw: Sequence[Message]) -> list[Polled]:
    found: list[Polled] = []
    # By partition, what stands for those scored over HTTP until another comes.
    skipped: dict[int, Polled] = {}
    for m in raw:
        error = m.error()
        if error is not None:
            if error.fatal() or error.code() == KafkaError._MAX_POLL_EXCEEDED:
                raise LinkLostError(str(error))
            log.debug("kafka: %s", error)
            continue
        headers, partition = m.headers() or (), m.partition()
        if not is_scored(headers):
            skipped.pop(partition, None)
            found.append(Polled(m.topic(), partition, m.offset(), m.timestamp()[1], m.key(), m.value(), headers))
            continue
        run = skipped.get(partition)
        if run is None:
            run = skipped[partition] = Polled(m.topic(), partition, m.offset(), 0, None, None, headers, 0)
            found.append(run)
        run.offset = m.offset()
        run.records += 1
    return found


def is_scored(headers: Sequence[tuple[str, bytes | None]]) -> bool:
    """True for a record of what was scored over HTTP."""
    return any([name == SCORED_HEADER for name, _ in headers])
