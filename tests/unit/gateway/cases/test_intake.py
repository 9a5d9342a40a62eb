"""What is read from Kafka: what can't be read is left out, what can't be understood yet is tried again, and nothing is taken twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.cases.app import BoundedBodies
from gateway.cases.errors import OutboxFullError
from gateway.cases.intake import Intake
from gateway.cases.metrics import CaseMetrics
from gateway.cases.outbox import Drainer, put
from gateway.cases.schemas import Schemas
from gateway.cases.service import CaseService, now_ms
from gateway.cases.webhook_file import Webhook
from gateway.cases.webhook_queue import WebhookQueue
from gateway.contracts.decision import Outcome
from gateway.contracts.registry import RegistryUnavailableError, SchemaRegistry, UnknownSchemaError
from gateway.contracts.topics import ALERTS, AUDIT, DECISIONS, LABELS, TOPICS
from gateway.contracts.wire import frame
from gateway.kafka.avro import encode, encode_receipt
from gateway.kafka.records import Record
from tests.helpers import until
from tests.integration.test_jobs import make_receipt
from tests.unit.gateway.cases.factories import VIEW, a_service, outbox
from tests.unit.gateway.factories import make_transaction

pytestmark = pytest.mark.anyio

IDS = {1: DECISIONS, 2: ALERTS}
HOOKS = {"desk": Webhook("desk", "http://127.0.0.1:1", (b"k",), frozenset({"burst"}))}


class FakeRegistry(SchemaRegistry):
    """Knows our schemas by the numbers above; `down` is an outage."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1")
        self.down = False

    def schema(self, schema_id: int) -> str:
        if self.down:
            raise RegistryUnavailableError
        if schema_id not in IDS:
            raise UnknownSchemaError
        return TOPICS[IDS[schema_id]].schema_text


def message(topic: str, value: bytes | None) -> Any:
    return SimpleNamespace(topic=lambda: topic, value=lambda: value, partition=lambda: 0, offset=lambda: 7)


def a_decision(transaction_id: str, outcome: Outcome) -> Any:
    fields = make_receipt(make_transaction(transaction_id, event_time_ms=now_ms()), outcome)
    return message(DECISIONS, frame(1, encode_receipt(fields)))


def an_alert(kind: str, transaction_id: str = "") -> Any:
    fields = {"transaction_id": transaction_id, "card_id": "", "merchant_id": "m", "decision": "", "risk_score": 0}
    fields |= {"reasons": [], "decided_at_ms": now_ms(), "kind": kind, "detail": "d"}
    return message(ALERTS, frame(2, encode(ALERTS, fields)))


def an_intake(service: CaseService, registry: FakeRegistry) -> Intake:
    metrics = CaseMetrics()
    queue = WebhookQueue(HOOKS, metrics, queue_max=10, dedup_window_ms=1000, age_max_ms=10**9)
    return Intake(
        service.database,
        Schemas(registry),
        metrics,
        queue,
        lambda: VIEW,
        bootstrap="127.0.0.1:1",
        group="g",
        reviews_max=10,
        now_ms=now_ms,
    )


def rows(service: CaseService, query: str) -> list[tuple[Any, ...]]:
    return service.database.call(lambda c: [tuple(row) for row in c.execute(query)])


BROKEN: list[bytes | None] = [
    None,
    b"",
    b"\0",
    b"\0\0\0\0\1",
    b"\0\0\0\0\1" + b"\xff" * 200,
    b"\0\0\0\0\x63abc",
    b'{"transaction_id": "j", "decision": "review", "risk_score": {}}',
]


def test_what_cannot_be_read_is_counted_and_its_neighbours_are_taken(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, _):
        intake = an_intake(service, FakeRegistry())
        sent = [message(topic, value) for topic in (DECISIONS, ALERTS) for value in BROKEN]
        intake.take([a_decision("a", Outcome.REVIEW), *sent, a_decision("b", Outcome.REVIEW)])
        assert rows(service, "select transaction_id from reviews") == [("a",), ("b",)]
        unreadable = [
            intake._metrics.registry.get_sample_value("fraudgate_cases_unreadable_total", {"topic": t}) for t in (DECISIONS, ALERTS)
        ]
        assert unreadable == [len(BROKEN), len(BROKEN)]


def test_while_the_registry_is_down_nothing_is_taken_and_nothing_lost(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, _):
        registry = FakeRegistry()
        registry.down = True
        intake = an_intake(service, registry)
        with pytest.raises(RegistryUnavailableError):
            intake.take([a_decision("a", Outcome.REVIEW)])
        assert rows(service, "select * from reviews") == []
        registry.down = False
        intake.take([a_decision("a", Outcome.REVIEW)])
        assert len(rows(service, "select * from reviews")) == 1


def test_a_decision_is_told_by_its_routes_and_other_alerts_by_their_kind(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, _):
        intake = an_intake(service, FakeRegistry())
        sent = [a_decision("a", Outcome.DECLINE), a_decision("b", Outcome.APPROVE), an_alert("decision", "a")]
        sent += [an_alert("burst"), an_alert("guard")]
        intake.take(sent)
        intake.take(sent)
        found = rows(service, "select webhook, kind, subject from deliveries order by kind desc")
        assert [(webhook, kind) for webhook, kind, _ in found] == [("desk", "decision"), ("desk", "burst")]
        assert found[0][2] == "a"


async def test_a_body_that_does_not_arrive_is_answered_408() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        raise AssertionError("nobody is asked")

    await BoundedBodies(app, 0.01)({"type": "http", "headers": []}, receive, send)
    assert sent[0]["status"] == 408 and b"request_timeout" in sent[1]["body"]


async def test_what_waits_for_kafka_is_counted_and_outlives_the_process(tmp_path: Path) -> None:
    registry = FakeRegistry()
    with a_service(tmp_path) as (service, _):
        metrics = CaseMetrics()
        service.database.call(lambda c: put(c, [Record(LABELS, b"c", b"x"), Record(AUDIT, b"a", b"y")], 2))
        with pytest.raises(OutboxFullError):
            service.database.call(lambda c: put(c, [Record(AUDIT, b"a", b"y")], 2))
        drainer = Drainer(service.database, Schemas(registry), metrics, "127.0.0.1:1")
        drainer.start()
        await until(lambda: metrics.registry.get_sample_value("fraudgate_cases_outbox_records") == 2, 20)
        drainer.stop()
    with a_service(tmp_path) as (service, _):
        assert [record.topic for record in outbox(service)] == [LABELS, AUDIT]
