"""The case service as it runs: receipts and alerts come from Kafka, verdicts and changes of lists go there, webhooks are called."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import http.client
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from deploy.ports import free_ports
from deploy.stack import Stack
from gateway.api_keys import create_key
from gateway.cases import reviews
from gateway.cases.database import Database
from gateway.cases.intake import Intake
from gateway.cases.metrics import CaseMetrics
from gateway.cases.policy_view import load_view
from gateway.cases.schemas import Schemas
from gateway.cases.service import now_ms
from gateway.cases.webhook_queue import WebhookQueue
from gateway.contracts.decision import Outcome, Receipt
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import ALERTS, AUDIT, DECISIONS, LABELS, LIBRDKAFKA_PARTITIONER, LIST_CHANGES
from gateway.contracts.wire import frame, unframe
from gateway.kafka.avro import encode_alert, encode_receipt
from gateway.kafka.records import Record
from gateway.policy.folder import SHIPPED
from tests.helpers import RunningCommand, run_command, running_command, wait_until
from tests.integration.gateway_helpers import Tail, make_transaction, name
from tests.integration.test_jobs import make_receipt
from tests.unit.gateway.cases.records import fields_of
from tests.unit.gateway.cases.test_webhooks import Receiver, listening, verified

pytestmark = pytest.mark.integration

WITHIN_S = 60.0
SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()
ANALYST, ADMIN = "ann", "root"


@dataclasses.dataclass
class Desk:
    """A running case service with its keys, and a webhook's receiver."""

    settings: Settings
    command: RunningCommand
    stack: Stack
    keys: dict[str, str]
    receiver: Receiver

    def ask(self, who: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.settings.host, self.settings.cases_port, timeout=WITHIN_S)
        try:
            headers = {"Authorization": f"Bearer {self.keys[who]}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read() or b"null")
        finally:
            connection.close()

    def queued(self, transaction_id: str) -> bool:
        return self.ask(ANALYST, "GET", f"/v1/reviews/{transaction_id}")[0] == 200


@contextmanager
def receiving(receiver: Receiver) -> Iterator[None]:
    """The receiver on an event loop in a thread of its own."""
    loop, ended, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    async def serve() -> None:
        async with listening(receiver):
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(WITHIN_S)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def desk(stack: Stack, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("cases")
    [port] = free_ports(1)
    keys_path = folder / "keys.json"
    keys = {ANALYST: create_key(keys_path, ANALYST, ["review"], 1000)[0], ADMIN: create_key(keys_path, ADMIN, ["admin"], 1000)[0]}
    receiver = Receiver()
    with receiving(receiver):
        webhooks = folder / "webhooks.yaml"
        url = f"http://127.0.0.1:{receiver.port}/in"
        webhooks.write_text(f"webhooks:\n  - {{name: desk, url: '{url}', secrets: ['{SECRET}'], kinds: [burst]}}\n")
        own = dataclasses.replace(
            settings,
            home=str(folder / "home"),
            cases_port=port,
            cases_group=name("cases"),
            api_keys_path=str(keys_path),
            webhooks_path=str(webhooks),
            policy_path=policy_folder(folder),
        )
        with running_command(own, "cases", log_path=folder / "cases.log") as command:
            found = Desk(own, command, stack, keys, receiver)
            command.wait_until(lambda: ready(own), WITHIN_S, "the case service is ready")
            yield found


def policy_folder(folder: Path) -> str:
    """The shipped policy, whose declines are led to the webhook."""
    target = folder / "policy"
    shutil.copytree(SHIPPED, target)
    file = target / "policy.yaml"
    text = file.read_text().replace("outcomes: [decline]}", "outcomes: [decline], webhooks: [desk]}")
    assert "webhooks: [desk]" in text
    file.write_text(text)
    return str(target)


def ready(settings: Settings) -> bool:
    connection = http.client.HTTPConnection(settings.host, settings.cases_port, timeout=5)
    try:
        connection.request("GET", "/metrics")
        return b"fraudgate_cases_kafka_connected 1.0" in connection.getresponse().read()
    except OSError:
        return False
    finally:
        connection.close()


def send(settings: Settings, *records: Record) -> None:
    registry = SchemaRegistry(settings.registry)
    producer = Producer({"bootstrap.servers": settings.bootstrap, "partitioner": LIBRDKAFKA_PARTITIONER})
    for record in records:
        producer.produce(record.topic, frame(registry.id_of(record.topic), record.payload), record.key)
    assert producer.flush(WITHIN_S) == 0


def a_receipt(transaction_id: str, outcome: Outcome, **changes: Any) -> tuple[Receipt, Record]:
    made = msgspec.structs.replace(make_receipt(make_transaction(transaction_id), outcome), **changes)
    return made, Record(DECISIONS, made.transaction.card_id.encode(), encode_receipt(made))


def find(tail: Tail, topic: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The one record that meets the condition, waiting for it."""

    def found() -> list[dict[str, Any]]:
        fields = [fields_of(Record(topic, None, unframe(m.value() or b"")[1])) for m in tail.messages]
        return [f for f in fields if condition(f)]

    tail.read_until(lambda: bool(found()), WITHIN_S)
    [one] = found()
    return one


def test_a_verdict_reaches_labels_and_audit_though_kafka_is_down_when_it_falls(desk: Desk) -> None:
    labels, audit = Tail(desk.settings, LABELS), Tail(desk.settings, AUDIT)
    try:
        transaction_id = name("review")
        made, record = a_receipt(transaction_id, Outcome.REVIEW, risk_score=700)
        # Twice, as after a crash of a gateway that delivers at least once.
        send(desk.settings, record, record)
        wait_until(lambda: desk.queued(transaction_id), WITHIN_S, "the review is queued")
        _, story = desk.ask(ANALYST, "GET", f"/v1/reviews/{transaction_id}")
        assert story["story"]["transaction"]["card_id"] == made.transaction.card_id
        assert desk.ask(ANALYST, "POST", f"/v1/reviews/{transaction_id}/claim", {})[0] == 200
        labels.read_until(lambda: True)
        audit.read_until(lambda: True)
        desk.stack.kill("kafka")
        try:
            status, review = desk.ask(
                ANALYST, "POST", f"/v1/reviews/{transaction_id}/decide", {"verdict": "fraud", "note": "stolen"}
            )
            assert (status, review["verdict"]) == (200, "fraud")
            assert desk.ask(ADMIN, "POST", "/v1/lists/blocked-cards/entries", {"entity_value": "c", "reason": "r"})[0] in (422, 503)
        finally:
            desk.stack.start(["kafka"])
        label = find(labels, LABELS, lambda f: f["transaction_id"] == transaction_id)
        assert (label["is_fraud"], label["source"], label["state"]) == (True, "analyst", "confirmed")
        told = find(audit, AUDIT, lambda f: f["subject"] == transaction_id)
        assert (told["who"], told["action"], told["reason"]) == (ANALYST, "review_decided", "stolen")
    finally:
        labels.close()
        audit.close()


def test_a_burst_alert_is_told_to_the_webhook_that_takes_its_kind(desk: Desk) -> None:
    merchant = name("merchant")
    alert = {
        "transaction_id": "",
        "card_id": "",
        "merchant_id": merchant,
        "decision": "",
        "risk_score": 0,
        "reasons": [],
        "decided_at_ms": make_transaction("t").event_time_ms,
        "kind": "burst",
        "detail": "40 declines in 5 min",
    }
    record = Record(ALERTS, merchant.encode(), encode_alert(alert))
    send(desk.settings, record, record)

    def told() -> list[tuple[dict[str, str], bytes]]:
        return [(headers, body) for headers, body in desk.receiver.requests if merchant.encode() in body]

    wait_until(told, WITHIN_S, "the webhook is called")
    [(headers, body)] = told()
    assert verified(SECRET, headers, body)
    assert json.loads(body)["type"] == "fraudgate.burst"


def test_a_decline_is_told_by_the_route_of_the_policy_and_a_review_is_not(desk: Desk) -> None:
    declined, reviewed = name("declined"), name("reviewed")
    records = [a_receipt(reviewed, Outcome.REVIEW)[1], a_receipt(declined, Outcome.DECLINE, rule_hits=["velocity"])[1]]
    send(desk.settings, *records, *records)

    def told() -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in desk.receiver.requests if declined.encode() in body or reviewed.encode() in body]

    wait_until(lambda: told() and desk.queued(reviewed), WITHIN_S, "the webhook is called and the review queued")
    [message] = told()
    assert (message["type"], message["data"]["transaction_id"]) == ("fraudgate.decision", declined)
    assert (message["data"]["routes"], message["data"]["rule_hits"]) == (["declines"], ["velocity"])


def test_a_change_of_a_list_is_in_kafka_when_it_is_answered_and_is_listed(desk: Desk) -> None:
    changes = Tail(desk.settings, LIST_CHANGES)
    try:
        card = name("card")
        path = "/v1/lists/blocked-cards/entries"
        status, added = desk.ask(ADMIN, "POST", path, {"entity_value": card, "reason": "stolen"})
        assert status == 200
        change = find(changes, LIST_CHANGES, lambda f: f["entity_value"] == card)
        assert (change["who"], change["list_id"], change["entity_field"]) == (ADMIN, "blocked-cards", "card_id")
        assert changes.messages[-1].offset() == added["version"] - 1

        def listed() -> bool:
            return card in [e["entity_value"] for e in desk.ask(ADMIN, "GET", path)[1]["entries"]]

        wait_until(listed, WITHIN_S, "the entry is listed")
        status, removed = desk.ask(ADMIN, "DELETE", f"{path}/{card}?reason=found")
        assert (status, removed["version"]) == (200, added["version"] + 1)
        wait_until(lambda: not listed(), WITHIN_S, "the entry is gone")
    finally:
        changes.close()


def test_no_more_reviews_are_open_than_may_be_and_the_next_waits_in_kafka(desk: Desk, tmp_path: Path) -> None:
    own, metrics, database = desk.settings, CaseMetrics(), Database(tmp_path / "cases.sqlite")
    group = name("few")
    start_at_the_end(own, group)
    intake = Intake(
        database,
        Schemas(SchemaRegistry(own.registry)),
        metrics,
        WebhookQueue({}, metrics, queue_max=1, dedup_window_ms=1, age_max_ms=1),
        lambda: load_view(own.policy_path),
        bootstrap=own.bootstrap,
        group=group,
        reviews_max=2,
        now_ms=now_ms,
    )
    ids = [name("few") for _ in range(3)]
    send(own, *(a_receipt(i, Outcome.REVIEW)[1] for i in ids))
    intake.start()
    try:
        wait_until(lambda: metrics.registry.get_sample_value("fraudgate_cases_intake_paused") == 1, WITHIN_S, "the intake pauses")
        assert database.call(reviews.open_count) == 2
        [first, *_] = database.call(lambda c: [row[0] for row in c.execute("select transaction_id from reviews")])
        database.call(lambda c: reviews.claim(c, first, ANALYST, now_ms() + 60_000, now_ms()))
        database.call(lambda c: reviews.decide(c, first, ANALYST, "legitimate", "", now_ms()))

        def known() -> set[str]:
            return database.call(lambda c: {row[0] for row in c.execute("select transaction_id from reviews")})

        wait_until(lambda: known() == set(ids), WITHIN_S, "the third is queued")
    finally:
        intake.stop()
        database.close()


def start_at_the_end(settings: Settings, group: str) -> None:
    """What is on the topics now has been read by the group."""
    consumer = Consumer({"bootstrap.servers": settings.bootstrap, "group.id": group})
    topics = consumer.list_topics(timeout=WITHIN_S).topics
    parts = [TopicPartition(topic, p) for topic in (DECISIONS, ALERTS) for p in topics[topic].partitions]
    ends = [TopicPartition(p.topic, p.partition, consumer.get_watermark_offsets(p, timeout=WITHIN_S)[1]) for p in parts]
    consumer.commit(offsets=ends, asynchronous=False)
    consumer.close()


def test_keys_never_stand_in_the_log(desk: Desk) -> None:
    text = desk.command.log()
    assert text and not any(secret in text for secret in (*desk.keys.values(), SECRET))


def test_the_command_says_why_it_does_not_start(settings: Settings, tmp_path: Path) -> None:
    bad = dataclasses.replace(settings, home=str(tmp_path), webhooks_path=str(tmp_path / "none.yaml"))
    done = run_command(bad, "cases")
    assert (done.returncode, "No such file" in done.stderr) == (2, True)
    open_host = dataclasses.replace(settings, home=str(tmp_path), host="0.0.0.0")  # noqa: S104
    assert "loopback" in run_command(open_host, "cases").stderr


def test_a_killed_service_goes_on_where_it_was(desk: Desk, tmp_path: Path) -> None:
    first, second = name("review"), name("review")
    send(desk.settings, a_receipt(first, Outcome.REVIEW)[1])
    wait_until(lambda: desk.queued(first), WITHIN_S, "the review is queued")
    assert desk.ask(ANALYST, "POST", f"/v1/reviews/{first}/claim", {})[0] == 200
    desk.command.kill()
    send(desk.settings, a_receipt(second, Outcome.REVIEW)[1])
    with running_command(desk.settings, "cases", log_path=tmp_path / "again.log") as command:
        command.wait_until(lambda: ready(desk.settings), WITHIN_S, "the case service is ready again")
        wait_until(lambda: desk.queued(second), WITHIN_S, "what came meanwhile is queued")
        status, story = desk.ask(ANALYST, "GET", f"/v1/reviews/{first}")
        assert (status, story["review"]["claimed_by"]) == (200, ANALYST)
