"""Scores of shadow models on their way to Kafka, from the thread that makes them (gateway/models/slack.py).

A producer of its own, with acknowledgements from the leader alone: a score that is lost is counted, and nobody waits for one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from gateway.contracts.topics import LIBRDKAFKA_PARTITIONER, SHADOW_SCORES
from gateway.contracts.wire import frame
from gateway.kafka.avro import SchemaBook, encode_shadow_scores
from gateway.metrics import Metrics
from gateway.models.model import Model
from gateway.models.slack import Floats, Int64s
from gateway.scoring.requests import Requests

QUEUED_MAX = 100_000
LINGER_MS = 500
FLUSH_S = 2.0
# After so many records the thread lets others run: it must not hold the interpreter, or the core, for longer.
TURN_ROWS, TURN_S = 16, 0.0002


class ShadowTopic:
    """`publish` and `close` are called by one thread."""

    def __init__(self, bootstrap: str, schemas: SchemaBook, metrics: Metrics) -> None:
        self._bootstrap = bootstrap
        self._schemas = schemas
        self._metrics = metrics
        self._producer: Producer | None = None

    def publish(self, payments: Sequence[tuple[Requests, Int64s]], scores: Sequence[tuple[Model, Floats]]) -> None:
        """Hand over a record a payment and model, keyed by card. Never waits for Kafka."""
        if not self._schemas.complete:
            self._metrics.shadow_unpublished.inc(sum(len(probability) for _, probability in scores))
            return
        if self._producer is None:
            self._producer = Producer(
                {
                    "bootstrap.servers": self._bootstrap,
                    "partitioner": LIBRDKAFKA_PARTITIONER,
                    "linger.ms": LINGER_MS,
                    "queue.buffering.max.messages": QUEUED_MAX,
                    "acks": 1,
                    "delivery.report.only.error": True,
                    "log_level": 0,
                }
            )
        producer, schema_id = self._producer, self._schemas.id_of(SHADOW_SCORES)
        ids: list[str] = []
        cards: list[str | None] = []
        times_ms: list[int] = []
        for requests, rows in payments:
            ids += [text or "" for text in requests.texts("transaction_id", rows)]
            cards += requests.texts("card_id", rows)
            times_ms += requests.t_ms[rows].tolist()
        now_ms, failed = time.time_ns() // 1_000_000, 0
        for model, probability in scores:
            records = encode_shadow_scores(model.ref, model.digest, ids, times_ms, probability.tolist(), now_ms)
            for i, (card, record) in enumerate(zip(cards, records, strict=True)):
                try:
                    producer.produce(SHADOW_SCORES, frame(schema_id, record), card, on_delivery=self._delivered)
                except (BufferError, KafkaException):
                    failed += 1
                if i % TURN_ROWS == TURN_ROWS - 1:
                    time.sleep(TURN_S)
            producer.poll(0)
        if failed:
            self._metrics.shadow_unpublished.inc(failed)

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self._metrics.shadow_unpublished.inc()

    def close(self) -> None:
        """Deliver what waits, for a moment."""
        if self._producer is not None:
            with contextlib.suppress(KafkaException):
                self._metrics.shadow_unpublished.inc(self._producer.flush(FLUSH_S))
