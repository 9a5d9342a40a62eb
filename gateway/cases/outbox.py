"""Records on their way to Kafka, written in the transaction of the change they tell of, and delivered in order whenever Kafka is up.

A thread sends the oldest, waits for the acknowledgements and takes off those up to the first that failed: nothing overtakes, nothing is
lost. After a crash between acknowledgement and deletion a record is sent again; labels and audit records are equal then, and their readers
take equal ones once.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Sequence
from typing import Any

import msgspec
from confluent_kafka import KafkaError, KafkaException, Producer

from gateway.cases.database import Database
from gateway.cases.errors import OutboxFullError
from gateway.cases.metrics import CaseMetrics
from gateway.cases.schemas import Schemas
from gateway.contracts.audit import AuditRecord
from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import AUDIT, LIBRDKAFKA_PARTITIONER
from gateway.contracts.wire import frame
from gateway.kafka.avro import encode
from gateway.kafka.records import Record

log = logging.getLogger(__name__)

BATCH_MAX = 500
POLL_S = 0.5
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 10.0
# librdkafka's own retries end after this; ours go on.
DELIVERY_TIMEOUT_S = 10.0
SEND_NOW_S = 5.0


def put(connection: sqlite3.Connection, records: Sequence[Record], most: int) -> None:
    """Into the outbox, in order. Raises `OutboxFullError` when more than `most` would wait."""
    if _count(connection) + len(records) > most:
        raise OutboxFullError
    connection.executemany(
        "insert into outbox (topic, key, payload) values (?, ?, ?)", [(r.topic, r.key, r.payload) for r in records]
    )


def audit_record(
    at_ms: int,
    who: str,
    action: str,
    subject: str,
    before: str | None,
    after: str | None,
    reason: str,
    detail: dict[str, Any] | None = None,
) -> Record:
    """A record of the topic `audit`."""
    made = AuditRecord(
        at_ms=at_ms,
        who=who,
        action=action,
        subject=subject,
        before=before,
        after=after,
        reason=reason,
        detail="" if detail is None else msgspec.json.encode(detail).decode(),
    )
    return Record(AUDIT, action.encode(), encode(AUDIT, msgspec.structs.asdict(made)))


class Drainer:
    """Empties the outbox, in a thread of its own. `wake` says that there is something new."""

    def __init__(self, database: Database, schemas: Schemas, metrics: CaseMetrics, bootstrap: str) -> None:
        self._database = database
        self._schemas = schemas
        self._metrics = metrics
        self._options = producer_options(bootstrap)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cases-outbox", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        self._wake.set()

    def stop(self) -> None:
        """What is left stays in the outbox until the next start."""
        self._stopping.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        producer = Producer(self._options)
        retry_s, in_trouble = RETRY_FIRST_S, False
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                sent = self._drain(producer)
            except (KafkaException, BufferError, RegistryUnavailableError, sqlite3.Error) as exc:
                if not in_trouble:
                    log.warning("cases: the outbox waits for Kafka: %s", exc)
                in_trouble = True
                self._stopping.wait(retry_s)
                # An idempotent one may be of no more use.
                producer = Producer(self._options)
                retry_s = min(RETRY_MAX_S, retry_s * 2)
                continue
            retry_s = RETRY_FIRST_S
            if sent and in_trouble:
                in_trouble = False
                log.info("cases: the outbox is delivered again")
            if not sent:
                self._wake.wait(POLL_S)

    def _drain(self, producer: Producer) -> int:
        """How many of the oldest were delivered. Raises what kept the next from it."""
        rows, waiting = self._database.call(_oldest)
        self._metrics.outbox.set(waiting)
        if not rows:
            return 0
        failed: dict[int, KafkaError] = {}
        done: set[int] = set()

        def note(seq: int, error: KafkaError | None) -> None:
            if error is None:
                done.add(seq)
            else:
                failed[seq] = error

        ids = {topic: self._schemas.id_of(topic) for topic in {row["topic"] for row in rows}}
        for row in rows:
            seq, topic = row["seq"], row["topic"]
            value = frame(ids[topic], row["payload"])
            producer.produce(topic, value, row["key"], on_delivery=lambda error, _, seq=seq: note(seq, error))
        producer.flush(DELIVERY_TIMEOUT_S + 1)
        acknowledged = []
        for row in rows:
            if row["seq"] not in done:
                break
            acknowledged.append(row["seq"])
        if acknowledged:
            self._metrics.outbox.set(self._database.call(lambda c: _take_off(c, acknowledged[-1])))
            self._metrics.outbox_delivered.inc(len(acknowledged))
        if len(acknowledged) < len(rows):
            producer.purge()
            error = failed.get(rows[len(acknowledged)]["seq"])
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT) if error is None else error)
        return len(acknowledged)


def producer_options(bootstrap: str) -> dict[str, object]:
    """An idempotent producer that keeps order and places a card where everybody does."""
    return {
        "bootstrap.servers": bootstrap,
        "enable.idempotence": True,
        "partitioner": LIBRDKAFKA_PARTITIONER,
        "linger.ms": 5,
        "delivery.timeout.ms": int(DELIVERY_TIMEOUT_S * 1000),
        "reconnect.backoff.max.ms": 1000,
        "log_level": 0,
        "error_cb": _ignore,
    }


def send_now(settings: Settings, record: Record) -> bool:
    """One record from a command that a person waits for: whether Kafka has it within SEND_NOW_S."""
    delivered: list[bool] = []
    try:
        value = frame(SchemaRegistry(settings.registry, settings.schemas_path).id_of(record.topic), record.payload)
        producer = Producer(producer_options(settings.bootstrap))
        producer.produce(record.topic, value, record.key, on_delivery=lambda error, _: delivered.append(error is None))
        producer.flush(SEND_NOW_S)
        producer.purge()
    except (KafkaException, BufferError, RegistryUnavailableError):
        return False
    return delivered == [True]


def _ignore(error: KafkaError) -> None:
    """What a producer meets comes out of its deliveries."""


def _oldest(connection: sqlite3.Connection) -> tuple[list[sqlite3.Row], int]:
    """Some, and how many there are."""
    rows = connection.execute("select seq, topic, key, payload from outbox order by seq limit ?", (BATCH_MAX,)).fetchall()
    return rows, _count(connection)


def _take_off(connection: sqlite3.Connection, seq: int) -> int:
    """How many are left."""
    connection.execute("delete from outbox where seq <= ?", (seq,))
    return _count(connection)


def _count(connection: sqlite3.Connection) -> int:
    [[waiting]] = connection.execute("select count(*) from outbox")
    return int(waiting)
