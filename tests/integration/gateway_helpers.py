"""A caller of the running gateway, and a reader of what it writes to Kafka."""

from __future__ import annotations

import dataclasses
import http.client
import json
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from confluent_kafka import OFFSET_END, Consumer, KafkaError, Message, Producer, TopicPartition

from deploy.ports import free_ports
from gateway.contracts.decision import Receipt
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, LIBRDKAFKA_PARTITIONER, TRANSACTIONS
from gateway.contracts.transaction import Transaction, encode_json
from gateway.contracts.wire import unframe
from gateway.kafka.avro import receipt_of
from tests.unit.gateway import factories

TIMEOUT_S = 60.0
# What the broker takes by default.
MESSAGE_BYTES_MAX = 1_048_588


def make_transaction(transaction_id: str, event_time_ms: int | None = None, **changes: Any) -> Transaction:
    """A payment of its own card, customer and merchant, now unless told otherwise."""
    own = {field: f"{field.removesuffix('_id')}-{transaction_id}" for field in ("card_id", "customer_id", "merchant_id")}
    at_ms = time.time_ns() // 1_000_000 if event_time_ms is None else event_time_ms
    return factories.make_transaction(transaction_id, event_time_ms=at_ms, **(own | changes))


def name(prefix: str) -> str:
    """A new one each time, with too few digits to be taken for a card number."""
    return f"{prefix}-{secrets.token_hex(4)}"


def gateway_of_its_own(settings: Settings, folder: Path, instance: str) -> Settings:
    """With home, models and port of a test's own. Wide budgets: what is tested is what is answered, on machines however busy."""
    [port] = free_ports(1)
    return dataclasses.replace(
        settings,
        home=str(folder / "home"),
        gateway_port=port,
        model_dir=str(folder / "models"),
        instance_id=name(instance),
        feature_budget_ms=2000,
        decision_budget_ms=9000,
    )


def request(settings: Settings, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    """(status, decoded JSON) of one call. Raises OSError when nobody listens."""
    connection = http.client.HTTPConnection(settings.host, settings.gateway_port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def post(settings: Settings, t: Transaction | bytes) -> tuple[int, dict[str, Any]]:
    return request(settings, "POST", "/score", t if isinstance(t, bytes) else encode_json(t))


def post_together(settings: Settings, transactions: list[Transaction]) -> list[tuple[int, dict[str, Any]]]:
    with ThreadPoolExecutor(len(transactions)) as pool:
        return list(pool.map(lambda t: post(settings, t), transactions))


def ready_without(settings: Settings, *parts: str) -> bool:
    """True when the gateway is ready and does without none of `parts`."""
    try:
        status, body = request(settings, "GET", "/readyz")
    except OSError:
        return False
    return status == 200 and not set(parts) & set(body["degraded"])


def produce(settings: Settings, values: Iterable[tuple[str, bytes]], headers: list[tuple[str, bytes]] | None = None) -> None:
    """Sends (key, value) pairs to the transactions topic and waits for the broker's acknowledgements."""
    producer = Producer(
        {
            "bootstrap.servers": settings.bootstrap,
            "partitioner": LIBRDKAFKA_PARTITIONER,
            "linger.ms": 5,
            "message.max.bytes": MESSAGE_BYTES_MAX,
        }
    )
    failed: list[KafkaError] = []
    for key, value in values:
        producer.produce(
            TRANSACTIONS, value, key, headers=headers or [], on_delivery=lambda err, _: failed.append(err) if err else None
        )
        producer.poll(0)
    assert producer.flush(TIMEOUT_S) == 0
    assert not failed


# What a reader may be told while its broker is away.
_PASSING = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError._TIMED_OUT)


class Tail:
    """Reads a topic, committed records only, from its end at the time this was made."""

    def __init__(self, settings: Settings, topic: str) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": settings.bootstrap,
                "group.id": f"test-tail-{time.time_ns()}",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
            }
        )
        partitions = self._consumer.list_topics(topic, timeout=TIMEOUT_S).topics[topic].partitions
        ends = [
            TopicPartition(topic, p, self._consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=TIMEOUT_S)[1])
            for p in partitions
        ]
        assert all(end.offset not in (OFFSET_END, None) for end in ends)
        self._consumer.assign(ends)
        self._at_end: set[int] = set()
        self._partitions = len(ends)
        self.messages: list[Message] = []

    def _read(self, timeout_s: float) -> None:
        """Every way of reading goes through here: the client tells once that a partition is at its end, and mustn't tell it in vain."""
        for message in self._consumer.consume(500, timeout=timeout_s):
            error = message.error()
            if error is None:
                self.messages.append(message)
                self._at_end.discard(message.partition() or 0)
            elif error.code() == KafkaError._PARTITION_EOF:
                self._at_end.add(message.partition() or 0)
            elif not error.retriable() and error.code() not in _PASSING:
                raise AssertionError(str(error))

    def read_until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        """Read until `condition` holds and there is nothing more in any partition."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._read(0.2)
            if condition() and len(self._at_end) == self._partitions:
                return
        raise AssertionError(
            f"not within {timeout_s:.0f} s; {len(self.messages)} messages were read, {len(self._at_end)} of {self._partitions} partitions"
            f" to their ends, the condition is {condition()}"
        )

    def read_some(self, count: int, timeout_s: float = TIMEOUT_S) -> None:
        """Read until `count` messages more are there."""
        wanted = len(self.messages) + count
        deadline = time.monotonic() + timeout_s
        while len(self.messages) < wanted:
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {count} more messages"
            self._read(0.2)

    def close(self) -> None:
        self._consumer.close()


class Decisions(Tail):
    """The receipts since this was made, in order within each card."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, DECISIONS)

    def receipts(self) -> list[Receipt]:
        return [receipt_of(unframe(m.value() or b"")[1]) for m in self.messages]

    def of(self, transaction_ids: Iterable[str], timeout_s: float = TIMEOUT_S) -> dict[str, Receipt]:
        """The receipts of these transactions, each of which must have exactly one."""
        wanted = set(transaction_ids)
        self.read_until(lambda: wanted <= {r.transaction_id for r in self.receipts()}, timeout_s)
        found = [r for r in self.receipts() if r.transaction_id in wanted]
        assert len(found) == len(wanted), "a transaction has two receipts"
        return {r.transaction_id: r for r in found}
