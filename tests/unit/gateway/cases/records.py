"""Records of the outbox, read back."""

from __future__ import annotations

import io
import json
from typing import Any

import fastavro

from gateway.contracts.label import Label
from gateway.contracts.topics import AUDIT, LABELS, TOPICS
from gateway.kafka.records import Record


def fields_of(record: Record) -> dict[str, Any]:
    found: Any = fastavro.schemaless_reader(
        io.BytesIO(record.payload), fastavro.parse_schema(json.loads(TOPICS[record.topic].schema_text)), None
    )
    return dict(found)


def label_of(record: Record) -> Label:
    assert record.topic == LABELS
    return Label(**fields_of(record))


def audit_of(record: Record) -> dict[str, Any]:
    assert record.topic == AUDIT
    return fields_of(record)
