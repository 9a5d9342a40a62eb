"""Payments to the transactions topic: idempotent producer, a card always in the same partition, open loop.

Costs about 15 microseconds a payment with Avro (librdkafka does the rest in its own threads).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from gateway.contracts.label import Label
from gateway.contracts.topics import LABELS, LIBRDKAFKA_PARTITIONER, SCORED_HEADER, SCORED_NEVER, TRANSACTIONS
from gateway.contracts.transaction import Transaction
from loadtest.encoding import Encode
from loadtest.events import Event, LoadError
from loadtest.ledger import Ledger
from loadtest.pace import Pace, Punctuality

REACH_TIMEOUT_S = 5.0
BUFFERED_MESSAGES_MAX = 100_000
DELIVERY_TIMEOUT_MS = 60_000
# The longest wait for room in the buffer, after which Kafka counts as gone: no message can be older than its delivery timeout.
BUFFER_TIMEOUT_S = DELIVERY_TIMEOUT_MS / 1000 + 5
# Sleeping shorter than this costs more than it gains in punctuality.
NAP_MIN_S = 0.001
NAP_MAX_S = 0.1


def require_topics(bootstrap: str, topics: tuple[str, ...]) -> None:
    """Raise `LoadError` unless the broker answers and has `topics`."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0, "socket.timeout.ms": int(REACH_TIMEOUT_S * 1000)})
    try:
        known = admin.list_topics(timeout=REACH_TIMEOUT_S).topics
    except KafkaException as exc:
        raise LoadError(
            f"Kafka doesn't answer at {bootstrap}: start it with fraudgate up, or set FRAUDGATE_KAFKA_BOOTSTRAP or"
            " FRAUDGATE_KAFKA_PORT"
        ) from exc
    missing = [t for t in topics if t not in known]
    if missing:
        raise LoadError(f"Kafka at {bootstrap} has no topic {', '.join(missing)}: fraudgate up creates it")


@dataclass
class KafkaReport:
    """`failed` counts messages that Kafka didn't take in time; `buffer_waits` how often the buffer was full."""

    sent: int = 0
    delivered: int = 0
    failed: int = 0
    first_failure: str | None = None
    labels: int = 0
    buffer_waits: int = 0
    took_s: float = 0.0
    punctuality: Punctuality = field(default_factory=Punctuality)


class KafkaSender:
    """Sends transactions and labels. `history` marks transactions as never to be decided. Not for several threads."""

    def __init__(
        self,
        bootstrap: str,
        encode_transaction: Encode,
        encode_label: Encode,
        *,
        history: bool = False,
        ledger: Ledger | None = None,
        linger_ms: int = 2,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.report = KafkaReport()
        self._encode_transaction, self._encode_label = encode_transaction, encode_label
        self._headers = [(SCORED_HEADER, SCORED_NEVER)] if history else None
        self._ledger = ledger
        self._monotonic = monotonic
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "partitioner": LIBRDKAFKA_PARTITIONER,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": linger_ms,
                "delivery.timeout.ms": DELIVERY_TIMEOUT_MS,
                "queue.buffering.max.messages": BUFFERED_MESSAGES_MAX,
                "log_level": 0,
            }
        )

    def run(self, events: Iterable[tuple[int, int, Event]], pace: Pace, progress: Callable[[int], None] | None = None) -> None:
        """Send (sequence, milliseconds of event time since the first, event) at their times, then wait until Kafka has them.

        Raises `LoadError` when Kafka takes nothing any more.
        """
        started = epoch = None
        for sequence, since_first_ms, event in events:
            if started is None or epoch is None:
                # With the first payment in hand: building a world or opening a file is no part of the schedule.
                started, epoch = self._monotonic(), time.time()
            due = pace.due_s(sequence, since_first_ms)
            now = self._monotonic() - started
            while due is not None and now < due:
                self._producer.poll(0)
                time.sleep(min(max(due - now, NAP_MIN_S), NAP_MAX_S))
                now = self._monotonic() - started
            if due is not None:
                self.report.punctuality.note(now - due)
            self.send(event.transaction, event.is_fraud, epoch + (now if due is None else due))
            if progress is not None:
                progress(1)
        self.flush()
        self.report.took_s = 0.0 if started is None else self._monotonic() - started

    def send(self, t: Transaction, is_fraud: bool, intended_s: float) -> None:
        """One payment at once; it enters the ledger before it leaves. Raises `LoadError` when the buffer stays full."""
        value = self._encode_transaction(t)
        row = None if self._ledger is None else self._ledger.add(t.transaction_id, is_fraud, "kafka", intended_s, time.time())

        def delivered(error: KafkaError | None, message: Message) -> None:
            self._note(error)
            if error is None and row is not None and self._ledger is not None:
                partition, offset = message.partition(), message.offset()
                assert partition is not None and offset is not None
                self._ledger.positions[partition, offset] = row

        self._produce(TRANSACTIONS, t.card_id, value, delivered, self._headers)
        self.report.sent += 1

    def send_label(self, label: Label) -> None:
        self._produce(LABELS, label.card_id, self._encode_label(label), lambda error, _: self._note(error), None)
        self.report.labels += 1

    def send_raw(self, key: bytes, value: bytes, headers: list[tuple[str, bytes]] | None = None) -> None:
        """Any bytes to the transactions topic, for hostile messages."""
        self._produce(TRANSACTIONS, key, value, lambda error, _: self._note(error), headers)
        self.report.sent += 1

    def flush(self) -> None:
        """Wait until Kafka has taken or refused everything, at most the delivery timeout. Raises `LoadError` after that."""
        left = self._producer.flush(BUFFER_TIMEOUT_S)
        if left:
            raise LoadError(f"Kafka has not taken {left} messages within {BUFFER_TIMEOUT_S:.0f} s")

    def _note(self, error: KafkaError | None) -> None:
        if error is None:
            self.report.delivered += 1
            return
        self.report.failed += 1
        if self.report.first_failure is None:
            self.report.first_failure = str(error.str())

    def _produce(
        self,
        topic: str,
        key: str | bytes,
        value: bytes,
        on_delivery: Callable[[KafkaError | None, Message], None],
        headers: list[tuple[str, bytes]] | None,
    ) -> None:
        give_up = None
        while True:
            try:
                self._producer.produce(topic, value, key, on_delivery=on_delivery, headers=headers)
            except BufferError as exc:
                self.report.buffer_waits += 1
                now = self._monotonic()
                give_up = give_up or now + BUFFER_TIMEOUT_S
                if now > give_up:
                    raise LoadError("Kafka takes no more messages: the send buffer stays full") from exc
                self._producer.poll(NAP_MAX_S)
            except KafkaException as exc:
                raise LoadError(f"Kafka refuses messages: {exc}") from exc
            else:
                break
        self._producer.poll(0)


def make_kafka_sender(bootstrap: str, encoders: dict[str, Encode], **options: Any) -> KafkaSender:
    """A sender with the encoders of both topics, by topic name."""
    return KafkaSender(bootstrap, encoders[TRANSACTIONS], encoders[LABELS], **options)
