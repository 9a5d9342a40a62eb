"""Audit records into the topic `audit`, acknowledged by all replicas before anything is done that they tell of."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from confluent_kafka import KafkaException, Producer

from gateway.contracts.audit import AuditRecord
from gateway.contracts.registry import IncompatibleSchemaError, RegistryUnavailableError, SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import AUDIT
from gateway.contracts.wire import frame
from gateway.kafka.avro import encode

ACKNOWLEDGED_WITHIN_S = 15.0


class NotPublishedError(RuntimeError):
    """Kafka or the schema registry didn't take the records."""


def publish_audit(settings: Settings, records: Sequence[AuditRecord]) -> None:
    """Returns when Kafka has acknowledged all of them. Raises `NotPublishedError`."""
    try:
        schema_id = SchemaRegistry(settings.registry, settings.schemas_path).id_of(AUDIT)
    except (RegistryUnavailableError, IncompatibleSchemaError) as exc:
        raise NotPublishedError(f"the audit record's schema can't be had: {exc}") from exc
    problems: list[str] = []
    producer = Producer(
        {
            "bootstrap.servers": settings.bootstrap,
            "acks": "all",
            "enable.idempotence": True,
            "message.max.bytes": 1_048_576,
            "message.timeout.ms": int(ACKNOWLEDGED_WITHIN_S * 1000),
        }
    )
    try:
        for record in records:
            producer.produce(
                AUDIT,
                frame(schema_id, encode(AUDIT, msgspec.structs.asdict(record))),
                key=record.subject,
                on_delivery=lambda error, _: problems.append(str(error)) if error is not None else None,
            )
        left = producer.flush(ACKNOWLEDGED_WITHIN_S + 1)
    except (KafkaException, BufferError) as exc:
        raise NotPublishedError(f"Kafka doesn't take the audit record: {exc}") from exc
    if left or problems:
        raise NotPublishedError(f"Kafka didn't acknowledge the audit record: {problems[0] if problems else 'no answer'}")
