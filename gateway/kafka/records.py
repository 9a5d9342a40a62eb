"""Records on their way to Kafka, shared by both doors: partitioned by card as every producer does, and sent in whole batches.

Appending to a batch ourselves costs a third of aiokafka's `send`, which makes a future a message and wakes every waiter.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import murmur2

from gateway.contracts.decision import Outcome
from gateway.contracts.routing import Verdict
from gateway.contracts.topics import ALERTS, DECISIONS, SCORED_BY_HTTP, SCORED_HEADER, TRANSACTIONS
from gateway.contracts.wire import frame
from gateway.kafka import avro
from gateway.kafka.avro import SchemaBook
from gateway.scoring.job import Result
from gateway.tracing.trace import TRACEPARENT

# Largest batch of one partition. The broker's own limit is 1,048,588 bytes, records of a batch included.
BATCH_BYTES_MAX = 900_000
# Largest single record: a quarantined message may be as large as the broker takes.
REQUEST_BYTES_MAX = 8 * 1024 * 1024
# Counted up when fields are appended to decision.avsc or alert.avsc.
RECEIPT_FORM, ALERT_FORM = 2, 1
FORMS = {DECISIONS: RECEIPT_FORM, ALERTS: ALERT_FORM}
# What each form added to the one before it, as the schemas' defaults: to be appended to a record that was written without. The first of
# DECISIONS: routed_by, policy_decision, propensity; then list_hits, shadow_hits, rule_errors, lists_version. Of ALERTS: kind, detail.
DEFAULTS = {
    DECISIONS: (
        avro.encode_text("only") + avro.encode_text("") + struct.pack("<d", 1.0),
        avro.encode_texts(()) * 3 + avro.encode_long(-1),
    ),
    ALERTS: (avro.encode_text("decision") + avro.encode_text(""),),
}
assert all(len(DEFAULTS[topic]) == form for topic, form in FORMS.items())
_SCORED = ((SCORED_HEADER, SCORED_BY_HTTP),)


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`payload` is the Avro record without its frame: the schema's id is looked up when it is sent."""

    topic: str
    key: bytes | None
    payload: bytes
    headers: tuple[tuple[str, bytes], ...] = ()
    # Which fields a receipt or alert ends with: those of the local log of an earlier version lack the newest.
    form: int = 0


def of_today(record: Record) -> Record:
    """A record from a local log, by whichever version of the gateway, as one that the schemas of this version describe."""
    form = FORMS.get(record.topic, record.form)
    if record.form >= form:
        return record
    return msgspec.structs.replace(record, payload=b"".join((record.payload, *DEFAULTS[record.topic][record.form :])), form=form)


@lru_cache(maxsize=65_536)
def _hash_of(key: bytes) -> int:
    return int(murmur2(key)) & 0x7FFFFFFF


def partition_of(key: bytes | None, partitions: int) -> int:
    """Where the Java client's default partitioner puts `key`. Records without a key go to partition 0."""
    return 0 if key is None else _hash_of(key) % partitions


async def send_all(producer: AIOKafkaProducer, records: Sequence[Record], schemas: SchemaBook) -> list[asyncio.Future[Any]]:
    """Hand `records` to the producer, in order within each partition. The futures end when Kafka has acknowledged them."""
    grouped: dict[tuple[str, int], list[Record]] = {}
    counts = {topic: len(await producer.partitions_for(topic)) for topic in {r.topic for r in records}}
    for record in records:
        grouped.setdefault((record.topic, partition_of(record.key, counts[record.topic])), []).append(record)
    futures: list[asyncio.Future[Any]] = []
    now_ms = time.time_ns() // 1_000_000
    for (topic, partition), group in grouped.items():
        schema_id = schemas.id_of(topic)
        batch = producer.create_batch()
        for record in group:
            value = frame(schema_id, record.payload)
            if batch.append(timestamp=now_ms, key=record.key, value=value, headers=list(record.headers)) is None:
                futures.append(await producer.send_batch(batch, topic, partition=partition))
                batch = producer.create_batch()
                appended = batch.append(timestamp=now_ms, key=record.key, value=value, headers=list(record.headers))
                assert appended is not None, "the first record of a batch always fits"
        batch.close()
        futures.append(await producer.send_batch(batch, topic, partition=partition))
    return futures


def guard_record(verdict: Verdict) -> Record:
    """The alert that a challenger was taken out."""
    alert = {
        "transaction_id": "",
        "card_id": "",
        "merchant_id": "",
        "decision": "",
        "risk_score": 0,
        "reasons": [f"GUARD_{verdict.test.upper()}"],
        "decided_at_ms": verdict.at_ms,
        "kind": "guard",
        "detail": f"challenger {verdict.name} {verdict.version} is out: {verdict.detail}",
    }
    return Record(ALERTS, b"guard", avro.encode_alert(alert), form=ALERT_FORM)


def decision_records(results: Sequence[Result]) -> list[Record]:
    """The receipts, and the alerts of those declined, of what was decided."""
    records = []
    for result in results:
        if result.receipt is None:
            continue
        key, traceparent = result.job.card_id, result.job.traceparent
        headers = () if traceparent is None else ((TRACEPARENT, traceparent),)
        records.append(Record(DECISIONS, key, result.receipt, headers, form=RECEIPT_FORM))
        if result.outcome is Outcome.DECLINE:
            answer = result.answer
            assert answer is not None, "what was decided has an answer"
            alert = {
                "transaction_id": answer.transaction_id,
                "card_id": key.decode(),
                "merchant_id": result.job.transaction.merchant_id,
                "decision": answer.decision.value,
                "risk_score": answer.risk_score,
                "reasons": [r.code for r in answer.reasons],
                "decided_at_ms": time.time_ns() // 1_000_000,
                "kind": "decision",
                "detail": "",
            }
            records.append(Record(ALERTS, key, avro.encode_alert(alert), headers, form=ALERT_FORM))
    return records


def transaction_records(results: Sequence[Result]) -> list[Record]:
    """The transactions decided over HTTP, marked as scored, for the transactions topic."""
    return [Record(TRANSACTIONS, r.job.card_id, r.job.payload, _SCORED) for r in results if r.receipt is not None]
