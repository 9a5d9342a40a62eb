"""The simulator's messages on a real broker, and accounting against a decider that makes mistakes on purpose."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import fastavro
import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from deploy.stack import Stack
from gateway.contracts.label import Label
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, LABELS, QUARANTINE, SCORED_HEADER, SCORED_NEVER, TOPICS, TRANSACTIONS
from gateway.contracts.transaction import Transaction, decode_json, from_fields
from gateway.contracts.wire import frame, is_framed, unframe
from loadtest.accounting import table
from loadtest.commands import report_as_dict, summary
from loadtest.events import Event
from loadtest.pace import Pace
from loadtest.run import LABELS_ALL, Load, RunReport, Simulation, run_load
from loadtest.simulator import SimulatorConfig

pytestmark = pytest.mark.integration

CONFIG = SimulatorConfig(cards=300)
COUNT = 400
READ_TIMEOUT_S = 30.0


def parsed(topic: str) -> Any:
    return fastavro.parse_schema(json.loads(TOPICS[topic].schema_text))


def ends(settings: Settings, topic: str) -> list[TopicPartition]:
    consumer = Consumer({"bootstrap.servers": settings.bootstrap, "group.id": "ends"})
    try:
        partitions = consumer.list_topics(topic, timeout=READ_TIMEOUT_S).topics[topic].partitions
        return [
            TopicPartition(topic, p, consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=READ_TIMEOUT_S)[1])
            for p in partitions
        ]
    finally:
        consumer.close()


def read_from(settings: Settings, starts: list[TopicPartition], count: int) -> list[Message]:
    """The next `count` messages behind `starts`, and no more may follow at once."""
    consumer = Consumer({"bootstrap.servers": settings.bootstrap, "group.id": "read", "isolation.level": "read_committed"})
    consumer.assign(starts)
    found: list[Message] = []
    deadline = time.monotonic() + READ_TIMEOUT_S
    try:
        while len(found) < count and time.monotonic() < deadline:
            found += consumer.consume(1_000, 0.2)
        found += consumer.consume(1_000, 0.3)
    finally:
        consumer.close()
    assert len(found) == count
    return found


def transaction_of(value: bytes, now_ms: int) -> Transaction:
    if not is_framed(value):
        return decode_json(value, now_ms)
    fields: Any = fastavro.schemaless_reader(io.BytesIO(unframe(value)[1]), parsed(TRANSACTIONS), None)
    return from_fields(fields, now_ms)


def simulate(settings: Settings, **options: Any) -> RunReport:
    values: dict[str, Any] = {"source": partial(Simulation, CONFIG, COUNT), "total": COUNT, "account": False, **options}
    return run_load(Load(**values), settings, show_progress=False)


@pytest.mark.parametrize("avro", [True, False], ids=["avro", "json"])
def test_what_was_simulated_is_what_kafka_holds_and_twice_the_same(stack: Stack, settings: Settings, avro: bool) -> None:
    events = list(Simulation(CONFIG, COUNT).events())
    now_ms = int(time.time() * 1000)
    runs = []
    for _ in range(2):
        starts = ends(settings, TRANSACTIONS)
        report = simulate(settings, avro=avro)
        assert report.kafka is not None
        assert (report.kafka.sent, report.kafka.delivered, report.kafka.failed) == (COUNT, COUNT, 0)
        runs.append(read_from(settings, starts, COUNT))
    for messages in runs:
        by_id = {t.transaction_id: (t, m) for m in messages for t in [transaction_of(m.value() or b"", now_ms)]}
        for event in events:
            t, message = by_id[event.transaction.transaction_id]
            assert t == event.transaction
            assert message.key() == t.card_id.encode()
            assert message.headers() is None
    content = [sorted((m.partition(), m.key(), m.value()) for m in messages) for messages in runs]
    assert content[0] == content[1]


def test_a_card_keeps_to_the_partition_of_the_java_client(stack: Stack, settings: Settings) -> None:
    starts = ends(settings, TRANSACTIONS)
    simulate(settings)
    for message in read_from(settings, starts, COUNT):
        assert message.partition() == (murmur2(message.key() or b"") & 0x7FFFFFFF) % len(starts)


def murmur2(data: bytes) -> int:
    """The hash of Kafka's Java client (org.apache.kafka.common.utils.Utils.murmur2), as unsigned 32 bits."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = (0x9747B28C ^ len(data)) & mask
    whole = len(data) // 4 * 4
    for (k,) in struct.iter_unpack("<I", data[:whole]):
        k = k * m & mask
        k = (k ^ (k >> 24)) * m & mask
        h = (h * m & mask) ^ k
    rest = data[whole:]
    if rest:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ (h >> 13)) * m & mask
    return h ^ (h >> 15)


def test_history_is_marked_and_labels_follow_in_due_order(stack: Stack, settings: Settings) -> None:
    transactions, labels = ends(settings, TRANSACTIONS), ends(settings, LABELS)
    report = simulate(settings, history=True, labels=LABELS_ALL)
    assert report.kafka is not None
    assert report.kafka.labels > 0
    for message in read_from(settings, transactions, COUNT):
        assert message.headers() == [(SCORED_HEADER, SCORED_NEVER)]
    source = Simulation(CONFIG, COUNT)
    list(source.events())
    expected = source.labels_remaining()
    assert report.kafka.labels == len(expected)
    found = [
        Label(**fastavro.schemaless_reader(io.BytesIO(unframe(m.value() or b"")[1]), parsed(LABELS), None))
        for m in read_from(settings, labels, len(expected))
    ]
    key: Callable[[Label], tuple[int, str, str]] = lambda x: (x.reported_at_ms, x.transaction_id, x.state)  # noqa: E731
    assert sorted(found, key=key) == sorted(expected, key=key)


class Decider:
    """Reads transactions and writes receipts in Kafka transactions, with the mistakes it was told to make, by transaction id."""

    def __init__(self, settings: Settings) -> None:
        self.forgets: set[str] = set()
        self.repeats: set[str] = set()
        self.quarantines: set[str] = set()
        self.quarantines_unreadably: set[str] = set()
        self.takes_back: set[str] = set()
        self._consumer = Consumer({"bootstrap.servers": settings.bootstrap, "group.id": "decider", "fetch.wait.max.ms": 10})
        self._consumer.assign(ends(settings, TRANSACTIONS))
        self._producer = Producer(
            {"bootstrap.servers": settings.bootstrap, "transactional.id": f"decider-{uuid.uuid4()}", "linger.ms": 0}
        )
        self._producer.init_transactions(READ_TIMEOUT_S)
        registry = SchemaRegistry(settings.registry)
        self._ids = {topic: registry.id_of(topic) for topic in (DECISIONS, QUARANTINE)}
        self._schemas = {topic: parsed(topic) for topic in (DECISIONS, QUARANTINE)}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stopped.is_set():
            messages = self._consumer.consume(100, 0.05)
            if not messages:
                continue
            self._producer.begin_transaction()
            taken_back = []
            for message in messages:
                t = transaction_of(message.value() or b"", int(time.time() * 1000))
                if t.transaction_id in self.takes_back:
                    taken_back.append(t)
                else:
                    self._handle(t, message)
            self._producer.commit_transaction(READ_TIMEOUT_S)
            if taken_back:
                self._producer.begin_transaction()
                for t in taken_back:
                    self._decide(t)
                self._producer.abort_transaction(READ_TIMEOUT_S)

    def _handle(self, t: Transaction, message: Message) -> None:
        if t.transaction_id in self.forgets:
            return
        if t.transaction_id in self.quarantines | self.quarantines_unreadably:
            readable = t.transaction_id in self.quarantines
            self._put(
                QUARANTINE,
                {
                    "reason": "bad_format" if readable else "malformed_json",
                    "field": None,
                    "topic": TRANSACTIONS,
                    "partition": message.partition(),
                    "offset": message.offset(),
                    "timestamp_ms": 0,
                    "key": None,
                    "value": message.value() if readable else b"\xff{",
                    "quarantined_at_ms": 0,
                },
            )
            return
        for _ in range(2 if t.transaction_id in self.repeats else 1):
            self._decide(t)

    def _decide(self, t: Transaction) -> None:
        # Risk by amount: declined from 100.00, challenged from 50.00.
        outcome = "decline" if t.amount_minor >= 10_000 else "challenge" if t.amount_minor >= 5_000 else "approve"
        names = {f["name"]: f["type"] for f in json.loads(TOPICS[DECISIONS].schema_text)["fields"]}
        blank: dict[str, Any] = {"string": "", "int": 0, "long": 0, "double": 1.0}
        record: dict[str, Any] = {
            name: None if isinstance(kind, list) else [] if isinstance(kind, dict) else blank[kind] for name, kind in names.items()
        }
        record |= {
            "transaction_id": t.transaction_id,
            "transaction": {f: getattr(t, f) for f in t.__struct_fields__},
            "door": "kafka",
            "decision": outcome,
            "probability": min(1.0, t.amount_minor / 1e6),
            "degraded": ["stale_features"] if outcome == "decline" else [],
            "features": [0.5] * 40,
        }
        self._put(DECISIONS, record)

    def _put(self, topic: str, record: dict[str, Any]) -> None:
        out = io.BytesIO()
        fastavro.schemaless_writer(out, self._schemas[topic], record)
        self._producer.produce(topic, frame(self._ids[topic], out.getvalue()))

    def __enter__(self) -> Decider:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(READ_TIMEOUT_S)
        self._consumer.close()


@contextmanager
def deciding(settings: Settings, **mistakes: set[str]) -> Iterator[None]:
    decider = Decider(settings)
    for name, ids in mistakes.items():
        setattr(decider, name, ids)
    with decider:
        yield


def sent_events() -> list[Event]:
    return list(Simulation(CONFIG, COUNT).events())


def test_everything_decided_once_is_complete(stack: Stack, settings: Settings) -> None:
    with deciding(settings):
        report = simulate(settings, account=True, pace=Pace(rate_per_s=800))
    a = report.accounting
    assert a is not None
    assert a.complete
    assert (a.events_in, a.decided, a.quarantined) == (COUNT, COUNT, 0)
    events = sent_events()
    declined = [e for e in events if e.transaction.amount_minor >= 10_000]
    assert a.outcomes["decline"] == a.degraded["stale_features"] == len(declined)
    assert sum(a.outcomes.values()) == COUNT
    assert a.quality.frauds == sum(e.is_fraud for e in events)
    assert a.quality.precision_declined == sum(e.is_fraud for e in declined) / len(declined)
    latency = a.latency["kafka"]
    assert 0 < latency.p50_ms <= latency.p99_ms <= latency.p999_ms <= latency.max_ms < READ_TIMEOUT_S * 1000
    assert "unaccounted" in table(a)
    assert "kafka: 400 payments" in summary(report)
    assert report_as_dict(report)["accounting"]["unaccounted"] == 0


def test_each_mistake_of_a_decider_is_found_by_id(stack: Stack, settings: Settings) -> None:
    # A seed of its own: what another test had decided would count as a retry.
    source = partial(Simulation, replace(CONFIG, seed=98), COUNT)
    ids = [e.transaction.transaction_id for e in source().events()]
    mistakes = {
        "forgets": {ids[0], ids[200]},
        "repeats": {ids[7]},
        "quarantines": {ids[11]},
        "quarantines_unreadably": {ids[12], ids[13]},
        # Decided in a transaction that is aborted: nobody may see it.
        "takes_back": {ids[COUNT - 1]},
    }
    with deciding(settings, **mistakes):
        a = simulate(settings, source=source, account=True, wait_s=9.0).accounting
    assert a is not None
    assert not a.complete
    assert a.unaccounted == [ids[0], ids[200], ids[COUNT - 1]]
    assert a.duplicates == [ids[7]]
    assert (a.decided, a.quarantined) == (COUNT - 6, 3)
    assert a.quarantine_reasons == {"bad_format": 1, "malformed_json": 2}
    assert a.waited_s >= 9.0


def test_payments_decided_by_an_earlier_run_are_retries_not_losses(stack: Stack, settings: Settings) -> None:
    source = partial(Simulation, replace(CONFIG, seed=99), COUNT)
    with deciding(settings):
        assert simulate(settings, source=source, account=True).accounting is not None
    # Nobody decides now, as the gateway wouldn't: the same payments again, and a few that are new.
    more = partial(Simulation, replace(CONFIG, seed=99), COUNT + 3)
    a = simulate(settings, source=more, total=COUNT + 3, account=True, wait_s=9.0).accounting
    assert a is not None
    assert (a.decided, a.decided_before, len(a.unaccounted)) == (0, COUNT, 3)


def test_json_on_kafka_is_accounted_for_like_avro(stack: Stack, settings: Settings) -> None:
    with deciding(settings):
        a = simulate(settings, account=True, avro=False).accounting
    assert a is not None
    assert a.complete
    assert a.decided == COUNT


def test_a_missing_registry_stops_avro_before_anything_is_sent_and_not_json(stack: Stack, settings: Settings) -> None:
    elsewhere = replace(settings, registry_url="http://127.0.0.1:9/apis/ccompat/v7", home=f"{settings.home}/elsewhere")
    starts = ends(settings, TRANSACTIONS)
    with pytest.raises(RuntimeError, match="FRAUDGATE_REGISTRY_URL"):
        simulate(elsewhere)
    assert [p.offset for p in ends(settings, TRANSACTIONS)] == [p.offset for p in starts]
    report = simulate(elsewhere, avro=False)
    assert report.kafka is not None
    assert report.kafka.delivered == COUNT
