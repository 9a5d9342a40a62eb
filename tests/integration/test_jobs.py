"""The streams on real Kafka, Redis and registry, with the driver killed twice on the way. One pass serves all tests here."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import secrets
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import redis
from confluent_kafka import Producer
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from deploy.history.verify import verify
from deploy.stack import Stack
from gateway.contracts import layout, tables
from gateway.contracts.decision import Door, Outcome, Receipt
from gateway.contracts.features import ENTITIES, ENTITY_INDEX, FEATURE_NAMES, FINGERPRINT, LABELLED
from gateway.contracts.label import Label, precedence_of
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.tiles import tiles_of
from gateway.contracts.topics import ALERTS, DECISIONS, LABELS, LIBRDKAFKA_PARTITIONER, TRANSACTIONS
from gateway.contracts.transaction import Transaction, encode_json
from gateway.contracts.wire import frame
from gateway.kafka.avro import encode_receipt
from loadtest.encoding import avro_encoder
from tests.helpers import run_command, running_command
from tests.receipts import read_topic

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(360)]

ROWS = 3_000
# Declines that make a burst: the others' merchants stay below, and all cards with a BIN have the same one.
MERCHANT_DECLINES, BIN_DECLINES = 15, 100
HOUR_MS = 3_600_000


@dataclasses.dataclass
class Sent:
    """What went into Kafka. `bad` are the values that no one can read."""

    run: str
    transactions: list[Transaction]
    receipts: list[Receipt]
    labels: list[Label]
    bad: list[bytes]
    records: int


@dataclasses.dataclass
class Streamed:
    settings: Settings
    sent: Sent

    def table(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = read(self.settings, name).to_pylist()
        return rows

    def own(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.table(name) if row["transaction_id"].startswith(self.sent.run)]


def read(settings: Settings, name: str) -> pa.Table:
    return DeltaTable(tables.table_uri(settings.tables, name)).to_pyarrow_table()


def rows_of(settings: Settings, name: str) -> int:
    try:
        return int(read(settings, name).num_rows)
    except TableNotFoundError:
        return 0


def make_sent(run: str) -> Sent:
    """Transactions of a few entities, their receipts, labels of which some contradict each other, and values that can't be read."""
    rnd = random.Random(11)
    now_ms = time.time_ns() // 1_000_000
    transactions, receipts, labels = [], [], []
    for i in range(ROWS):
        card = rnd.randrange(120)
        t = Transaction(
            transaction_id=f"{run}-{i}",
            event_time_ms=now_ms - rnd.randrange(2 * HOUR_MS),
            card_id=f"{run}-card-{card}",
            customer_id=f"{run}-customer-{card // 2}",
            merchant_id=f"{run}-merchant-{rnd.randrange(30)}",
            amount_minor=rnd.randrange(1, 100_000),
            currency="EUR",
            channel="ecom",
            mcc="5411",
            country=rnd.choice(["DE", "FR"]),
            device_id=f"{run}-device-{card}" if card % 3 else None,
            ip=f"{run}:{rnd.randrange(50)}" if card % 4 else None,
            card_bin="123456" if card % 2 else None,
        )
        transactions.append(t)
        receipts.append(make_receipt(t, Outcome.DECLINE if i % 7 == 0 else Outcome.APPROVE))
        if i % 20 == 0:
            labels.append(make_label(t, True, now_ms))
        if i % 40 == 0:
            labels.append(make_label(t, False, now_ms + 1))
    bad = [b'{"transaction_id": "%s-bad-%d"' % (run.encode(), i) for i in range(ROWS // 100)]
    return Sent(run, transactions, receipts, labels, bad, 0)


def make_receipt(t: Transaction, decision: Outcome) -> Receipt:
    return Receipt(
        transaction_id=t.transaction_id,
        transaction=t,
        door=Door.KAFKA,
        received_at_ms=t.event_time_ms,
        decided_at_ms=t.event_time_ms + 5,
        decision=decision,
        risk_score=10,
        probability=0.01,
        reasons=[],
        rule_hits=[],
        degraded=[],
        feature_fingerprint=FINGERPRINT,
        features=[0.0] * len(FEATURE_NAMES),
        observed_seq=[0] * len(ENTITIES),
        label_changes=[0] * len(LABELLED),
        policy_digest="p",
        code_version="c",
        source_partition=None,
        source_offset=None,
        model_name=None,
        model_version=None,
        model_digest=None,
        route=None,
        tiles_age_ms=None,
        admit_us=1,
        features_us=1,
        model_us=1,
        policy_us=1,
        routed_by="only",
        policy_decision="approve",
        propensity=1.0,
    )


def make_label(t: Transaction, is_fraud: bool, reported_at_ms: int) -> Label:
    return Label(
        transaction_id=t.transaction_id,
        card_id=t.card_id,
        is_fraud=is_fraud,
        source="analyst",
        state="confirmed",
        reported_at_ms=reported_at_ms,
    )


def produce(settings: Settings, sent: Sent, first: int, end: int) -> None:
    """Part of what there is to send: JSON and Avro by turns, each fiftieth transaction twice, labels before their transactions."""
    registry = SchemaRegistry(settings.registry)
    as_avro, label_avro = (avro_encoder(topic, registry) for topic in (TRANSACTIONS, LABELS))
    receipt_id = registry.id_of(DECISIONS)
    producer = Producer({"bootstrap.servers": settings.bootstrap, "partitioner": LIBRDKAFKA_PARTITIONER})

    def send(topic: str, key: str, value: bytes) -> None:
        producer.produce(topic, value, key=key)
        producer.poll(0)
        sent.records += 1

    ids = {t.transaction_id for t in sent.transactions[first:end]}
    for label in sent.labels:
        if label.transaction_id in ids:
            send(LABELS, label.card_id, label_avro(label))
    for i in range(first, end):
        t = sent.transactions[i]
        value = as_avro(t) if i % 2 else encode_json(t)
        for _ in range(2 if i % 50 == 0 else 1):
            send(TRANSACTIONS, t.card_id, value)
        send(DECISIONS, t.card_id, frame(receipt_id, encode_receipt(sent.receipts[i])))
        if i % 100 == 0:
            send(TRANSACTIONS, "bad", sent.bad[i // 100])
    assert producer.flush(30) == 0


@pytest.fixture(scope="module")
def streamed(stack: Stack, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Streamed]:
    """Everything sent and processed: the JVM killed in the first third, the whole driver in the second."""
    home = tmp_path_factory.mktemp("jobs")
    own = dataclasses.replace(
        settings,
        tables_uri=str(home / "tables"),
        checkpoints_uri=str(home / "checkpoints"),
        bronze_offsets_max=3_000,
        bronze_trigger_ms=200,
        silver_trigger_ms=200,
        gold_trigger_ms=500,
        labels_trigger_ms=5_000,
        burst_window_s=6 * 3_600,
        burst_declines_merchant=MERCHANT_DECLINES,
        burst_declines_device=0,
        burst_declines_bin=BIN_DECLINES,
    )
    sent = make_sent(f"jobs{secrets.token_hex(3)}")
    third = ROWS // 3
    produce(own, sent, 0, third)
    with running_command(own, "jobs", log_path=home / "jobs.log") as driver:
        driver.wait_until(lambda: rows_of(own, tables.SILVER), 90, "silver has its first rows")
        produce(own, sent, third, 2 * third)
        seen = rows_of(own, tables.SILVER)
        # Children of the command: the JVM. It dies in whatever it is doing, and the command must notice.
        for child in Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        driver.kill()
    with running_command(own, "jobs", log_path=home / "jobs.log") as driver:
        produce(own, sent, 2 * third, ROWS)
        driver.wait_until(lambda: rows_of(own, tables.SILVER) > seen, 90, "silver goes on")
        driver.kill()
    ended = run_command(own, "jobs", "--once", timeout_s=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    yield Streamed(own, sent)


def test_bronze_holds_every_record_once(streamed: Streamed) -> None:
    rows = read(streamed.settings, tables.BRONZE)
    places = set(zip(*(rows[name].to_pylist() for name in ("topic", "partition", "offset")), strict=True))
    assert len(places) == rows.num_rows
    own = [k for k in rows["value"].to_pylist() if k is not None and streamed.sent.run.encode() in k]
    assert len(own) == streamed.sent.records


def test_silver_holds_every_valid_transaction_once_with_its_values(streamed: Streamed) -> None:
    rows = streamed.own(tables.SILVER)
    assert Counter(row["transaction_id"] for row in rows) == Counter(t.transaction_id for t in streamed.sent.transactions)
    by_id = {row["transaction_id"]: row for row in rows}
    for t in streamed.sent.transactions:
        assert {name: by_id[t.transaction_id][name] for name in t.__struct_fields__} == msgspec.structs.asdict(t)


def test_what_cannot_be_read_is_in_quarantine_once_with_its_reason_and_bytes(streamed: Streamed) -> None:
    rows = [
        row
        for row in streamed.table(tables.QUARANTINE)
        if row["value"].startswith(b'{"transaction_id": "' + streamed.sent.run.encode())
    ]
    assert Counter(row["value"] for row in rows) == Counter(streamed.sent.bad)
    assert {row["reason"] for row in rows} == {"malformed_json"}


def test_receipts_and_labels_are_there_once(streamed: Streamed) -> None:
    decisions = streamed.own(tables.DECISIONS)
    assert Counter(row["transaction_id"] for row in decisions) == Counter(r.transaction_id for r in streamed.sent.receipts)
    assert len(streamed.own(tables.LABELS)) == len(streamed.sent.labels)


def test_the_chain_of_receipts_holds_over_kills_and_replayed_batches(streamed: Streamed) -> None:
    verdict = verify(streamed.settings)
    assert (verdict.broken, verdict.older, verdict.unbounded) == (0, 0, []), verdict.breaks
    assert verdict.chained == rows_of(streamed.settings, tables.DECISIONS) >= ROWS
    by_id = {receipt.transaction_id: receipt for receipt in streamed.sent.receipts}
    for row in streamed.own(tables.DECISIONS):
        assert row["payload"] == encode_receipt(by_id[row["transaction_id"]])


def test_tiles_in_redis_equal_a_recount(streamed: Streamed) -> None:
    client = redis.Redis.from_url(streamed.settings.redis)
    with client:
        for index, entity in enumerate(ENTITIES):
            of: dict[str, list[Transaction]] = defaultdict(list)
            for t in streamed.sent.transactions:
                if getattr(t, entity.field) is not None:
                    of[getattr(t, entity.field)].append(t)
            for entity_id, events in of.items():
                value = client.get(layout.tiles_key(entity.name, entity_id))
                assert isinstance(value, bytes), (entity.name, entity_id)
                held = layout.unpack_tiles([value], [index], [layout.key_check(entity.name, entity_id)])
                expected, _ = tiles_of(
                    np.array([t.event_time_ms for t in events]),
                    np.array([t.amount_minor for t in events]),
                    [np.array([layout.dim_hash(getattr(t, dim)) for t in events], np.uint16) for dim in entity.dims],
                    np.zeros(len(events), np.int64),
                )
                assert held.tiles.tolist() == expected.tolist(), (entity.name, entity_id)


def test_labels_change_what_is_known_once_and_redis_has_their_sums(streamed: Streamed) -> None:
    rows = streamed.own(tables.LABEL_CHANGES)
    # One that came before its payment may still wait for the next batch of labels.
    assert 0 < len(rows) <= len(streamed.sent.labels)
    assert max(Counter((row["transaction_id"], row["reported_at_ms"]) for row in rows).values()) == 1
    frauds: Counter[tuple[str, str, int]] = Counter()
    changes: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for i in LABELLED:
            name = (ENTITIES[i].name, row[ENTITIES[i].field])
            frauds[*name, row["event_time_ms"] // HOUR_MS] += row["change"]
            changes[name] += row["change"] != 0
    with redis.Redis.from_url(streamed.settings.redis) as client:
        for (entity, entity_id), count in changes.items():
            value = client.get(layout.labels_key(entity, entity_id))
            assert isinstance(value, bytes) == (count > 0)
            if isinstance(value, bytes):
                hours = layout.fraud_hours(value, ENTITY_INDEX[entity], layout.key_check(entity, entity_id))
                found = {(entity, entity_id, int(r["hour"])): int(r["frauds"]) for r in hours if r["frauds"]}
                assert found == {key: n for key, n in frauds.items() if key[:2] == (entity, entity_id) and n}
                assert layout.LABELS_HEADER.unpack_from(value)[6] == count


def test_gold_sums_equal_a_recount(streamed: Streamed) -> None:
    expected: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for t, receipt in zip(streamed.sent.transactions, streamed.sent.receipts, strict=True):
        for entity in ENTITIES:
            entity_id = getattr(t, entity.field)
            if entity_id is not None:
                sums = expected[entity.name, entity_id, t.event_time_ms // HOUR_MS]
                sums[0] += 1
                sums[1] += t.amount_minor
                sums[2] += receipt.decision == Outcome.DECLINE
                sums[3] = max(sums[3], t.amount_minor)
    found: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in streamed.table(tables.GOLD_ENTITY_HOUR):
        if row["entity_id"].startswith(streamed.sent.run):
            sums = found[row["entity"], row["entity_id"], int(row["hour"].timestamp() * 1000) // HOUR_MS]
            for i, name in enumerate(("transactions", "amount_minor", "declined")):
                sums[i] += row[name]
            sums[3] = max(sums[3], row["largest_minor"] or 0)
    assert found == expected


def test_gold_joins_each_transaction_with_its_decision_and_the_label_that_stands(streamed: Streamed) -> None:
    newest = {label.transaction_id: label for label in sorted(streamed.sent.labels, key=precedence_of)}
    rows = streamed.own(tables.GOLD_DECISIONS)
    assert len(rows) == ROWS
    by_id = {row["transaction_id"]: row for row in rows}
    for t, receipt in zip(streamed.sent.transactions, streamed.sent.receipts, strict=True):
        row = by_id[t.transaction_id]
        label = newest.get(t.transaction_id)
        assert (row["card_id"], row["amount_minor"], row["decision"]) == (t.card_id, t.amount_minor, receipt.decision.value)
        assert row["is_fraud"] == (None if label is None else label.is_fraud)


def test_declines_at_one_merchant_and_of_one_bin_are_one_alert_each_whatever_was_killed(streamed: Streamed) -> None:
    declined = [t for t, r in zip(streamed.sent.transactions, streamed.sent.receipts, strict=True) if r.decision == Outcome.DECLINE]
    at_merchant = Counter(t.merchant_id for t in declined)
    expected = {("merchant_id", m) for m, n in at_merchant.items() if n >= MERCHANT_DECLINES}
    assert 0 < len(expected) < len(at_merchant)
    begun = [row for row in streamed.table(tables.BURSTS) if row["state"] == "begun"]
    own = [row for row in begun if row["entity_value"].startswith(streamed.sent.run)]
    assert Counter((row["entity"], row["entity_value"]) for row in own) == Counter(expected)
    assert sum(t.card_bin is not None for t in declined) >= BIN_DECLINES
    assert ("card_bin", "123456") in {(row["entity"], row["entity_value"]) for row in begun}
    # What a kill made come twice is word for word the same. Other tests have put alerts of their own on the topic.
    told = {a["detail"] for a in read_topic(streamed.settings, ALERTS) if a["kind"] == "burst"}
    alerts = [a for a in (json.loads(detail) for detail in told if streamed.sent.run in detail) if a["entity"] == "merchant_id"]
    assert Counter((a["entity"], a["value"]) for a in alerts) == Counter(expected)
    assert {a["id"] for a in alerts} == {row["burst_id"] for row in own}
