"""Receipts read back from the decisions topic, and the recount of their features by the slow oracle."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from typing import Any

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from gateway.contracts.features import ENTITIES, FINGERPRINT
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import TOPICS
from gateway.contracts.transaction import Transaction
from loadtest.encoding import Reader
from tests.oracle import Past, differences, features_of

READ_WITHIN_S = 60.0


def read_topic(settings: Settings, topic: str) -> list[dict[str, Any]]:
    """Every committed record of a topic, from its beginning to its end as of now."""
    columns = [f["name"] for f in msgspec.json.decode(TOPICS[topic].schema_text)["fields"]]
    reader = Reader(topic, SchemaRegistry(settings.registry), tuple(columns))
    return [reader.read(value) for value in read_values(settings, topic)]


def read_values(settings: Settings, topic: str) -> list[bytes]:
    """The values of a topic as they lie there, read_committed."""
    consumer = Consumer(
        {
            "bootstrap.servers": settings.bootstrap,
            "group.id": "tests-never-committed",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in partitions])
        left, values = set(partitions), []
        deadline = time.monotonic() + READ_WITHIN_S
        while left:
            assert time.monotonic() < deadline, f"{topic} could not be read within {READ_WITHIN_S:.0f} s"
            for message in consumer.consume(1_000, 0.2):
                error = message.error()
                if error is None:
                    value = message.value()
                    assert value is not None
                    values.append(value)
                elif error.name() == "_PARTITION_EOF":
                    left.discard(message.partition())
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()
    return values


class Recount:
    """Recomputes features of receipts from all receipts, by each entity's order of observation."""

    def __init__(self, receipts: list[dict[str, Any]]) -> None:
        self.receipts = receipts
        self.transactions = [Transaction(**r["transaction"]) for r in receipts]
        self._pasts: dict[tuple[str, str], list[tuple[int, Transaction]]] = defaultdict(list)
        for r, t in zip(receipts, self.transactions, strict=True):
            for entity, seq in zip(ENTITIES, r["observed_seq"], strict=True):
                if seq >= 0:
                    self._pasts[entity.name, getattr(t, entity.field)].append((seq, t))
        for past in self._pasts.values():
            past.sort(key=lambda event: event[0])

    def gaps(self) -> list[str]:
        """Entities whose order of observation is not n, n + 1, n + 2 ...: something was lost or counted twice there."""
        return [
            f"{entity} {entity_id}: {[seq for seq, _ in past][:10]}"
            for (entity, entity_id), past in self._pasts.items()
            if [seq for seq, _ in past] != list(range(past[0][0], past[0][0] + len(past)))
        ]

    def differences(self, sample: int, seed: int) -> list[str]:
        """A line for each feature of `sample` receipts, drawn at random, that differs from its recount."""
        chosen = random.Random(seed).sample(range(len(self.receipts)), sample)
        lines = []
        for i in chosen:
            r, t = self.receipts[i], self.transactions[i]
            assert r["feature_fingerprint"] == FINGERPRINT
            pasts = {}
            for entity, seq in zip(ENTITIES, r["observed_seq"], strict=True):
                if getattr(t, entity.field) is not None:
                    assert seq >= 0, f"{t.transaction_id} was not observed for its {entity.name}"
                    events = self._pasts[entity.name, getattr(t, entity.field)]
                    pasts[entity.name] = Past([e for s, e in events if s < seq])
            lines += [f"{t.transaction_id} {line}" for line in differences(features_of(t, pasts), r["features"])]
        return lines
