"""Labels from other services and changes of lists: what is taken, what is refused, and what is told to Kafka."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.cases import lists
from gateway.cases.bodies import LABELS_MAX
from gateway.cases.database import Database, note_progress, progress_of
from gateway.cases.service import now_ms
from gateway.contracts.lists import REASON_CHARS_MAX, ListAction, ListChange
from gateway.contracts.topics import AUDIT, LABELS
from tests.unit.gateway.cases.factories import CARD_NUMBER, FakePublisher, a_service, ask, outbox
from tests.unit.gateway.cases.records import audit_of, label_of

pytestmark = pytest.mark.anyio

DAY_MS = 86_400_000


def label(of: str = "t1", **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "transaction_id": of,
        "card_id": "card-1",
        "is_fraud": True,
        "source": "chargeback",
        "state": "reported",
        "reported_at_ms": now_ms() - DAY_MS,
    }
    return made | changes


async def test_chargebacks_are_taken_once_with_amount_and_times(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, app):
        sent = [label("a", amount_minor=250, effective_at_ms=now_ms()), label("b")]
        for new in (2, 0):
            status, taken, _ = await ask(app, "POST", "/v1/labels", {"labels": sent, "reason": "file 17"}, fraudgate_analyst="psp")
            assert (status, taken) == (200, {"received": 2, "new": new})
        records = outbox(service)
        assert [(r.topic, r.key) for r in records] == [(LABELS, b"card-1"), (AUDIT, b"label_added")] * 2
        first = label_of(records[0])
        assert (first.amount_minor, first.effective_at_ms) == (250, sent[0]["effective_at_ms"])
        assert (audit_of(records[1])["who"], audit_of(records[1])["reason"]) == ("psp", "file 17")
        _, known, _ = await ask(app, "GET", "/v1/labels/a")
        assert [(k["source"], k["amount_minor"], k["who"]) for k in known["labels"]] == [("chargeback", 250, "psp")]
        assert (await ask(app, "GET", "/v1/labels/none"))[1] == {"labels": []}


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"transaction_id": "a b"}, "labels[1].transaction_id", "bad_format"),
        ({"card_id": CARD_NUMBER}, "labels[1].card_id", "card_number"),
        ({"state": "reversed"}, "labels[1].is_fraud", "invalid"),
        ({"state": "false_positive"}, "labels[1].is_fraud", "invalid"),
        ({"amount_minor": 1_000_000_001}, "labels[1].amount_minor", "invalid"),
        ({"amount_minor": -1}, "labels.1.amount_minor", "invalid"),
        ({"reported_at_ms": 1}, "labels[1].reported_at_ms", "invalid"),
        ({"effective_at_ms": 2**60}, "labels[1].effective_at_ms", "invalid"),
        ({"source": "rumour"}, "labels.1.source", "invalid"),
        ({"is_fraud": 1}, "labels.1.is_fraud", "invalid"),
        ({"reported_at_ms": 2**63}, "labels.1.reported_at_ms", "invalid"),
        ({"colour": "red"}, "body", "unknown_field"),
    ],
)
async def test_one_bad_label_keeps_all_out_and_is_named(tmp_path: Path, changes: dict[str, Any], field: str, reason: str) -> None:
    with a_service(tmp_path) as (service, app):
        status, problem, _ = await ask(app, "POST", "/v1/labels", {"labels": [label("a"), label("b", **changes)]})
        assert (status, problem["field"], problem["reason"]) == (422, field, reason)
        assert CARD_NUMBER not in json.dumps(problem)
        assert outbox(service) == []


async def test_one_label_too_many_is_refused(tmp_path: Path) -> None:
    with a_service(tmp_path) as (_, app):
        many = [label(f"t{i}") for i in range(LABELS_MAX + 1)]
        assert (await ask(app, "POST", "/v1/labels", {"labels": many}))[0] == 422
        assert (await ask(app, "POST", "/v1/labels", {"labels": []}))[0] == 422
        status, taken, _ = await ask(app, "POST", "/v1/labels", {"labels": many[1:]})
        assert (status, taken["new"]) == (200, LABELS_MAX)


async def test_a_change_of_a_list_is_answered_with_its_version_and_audited(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, app):
        fake = service.publisher
        assert isinstance(fake, FakePublisher)
        body = {"entity_value": "card-9", "expires_at_ms": now_ms() + DAY_MS, "reason": "stolen"}
        status, answer, _ = await ask(app, "POST", "/v1/lists/blocked-cards/entries", body, fraudgate_analyst="ann")
        assert (status, answer) == (200, {"version": 1})
        [change] = fake.sent
        assert (change.list_id, change.entity_field, change.action, change.who) == ("blocked-cards", "card_id", "add", "ann")
        service.database.call(lambda c: lists.apply(c, fake.sent))
        _, page, _ = await ask(app, "GET", "/v1/lists/blocked-cards/entries")
        assert [(e["entity_value"], e["reason"], e["who"]) for e in page["entries"]] == [("card-9", "stolen", "ann")]
        _, known, _ = await ask(app, "GET", "/v1/lists")
        assert {x["id"]: x["entries"] for x in known["lists"]} == {"blocked-cards": 1, "watched-cards": 0, "blocked-mccs": 0}
        status, answer, _ = await ask(app, "DELETE", "/v1/lists/blocked-cards/entries/card-9?reason=found", fraudgate_analyst="bob")
        assert (status, answer) == (200, {"version": 2})
        service.database.call(lambda c: lists.apply(c, fake.sent[1:]))
        assert (await ask(app, "GET", "/v1/lists/blocked-cards/entries"))[1]["entries"] == []
        added, removed = (audit_of(record) for record in outbox(service))
        assert (added["action"], added["who"], added["before"]) == ("list_entry_added", "ann", None)
        assert json.loads(added["detail"])["version"] == 1
        assert (removed["action"], removed["who"], removed["after"], removed["reason"]) == (
            "list_entry_removed",
            "bob",
            None,
            "found",
        )
        assert json.loads(removed["before"])["entity_value"] == "card-9"


@pytest.mark.parametrize(
    ("list_id", "body", "field", "reason"),
    [
        ("unknown", {"entity_value": "card-9", "reason": "r"}, "list_id", "unknown_list"),
        ("blocked-cards", {"entity_value": CARD_NUMBER, "reason": "r"}, "entity_value", "card_number"),
        ("blocked-cards", {"entity_value": "4111 1111 1111 1111", "reason": "r"}, "entity_value", "card_number"),
        ("blocked-cards", {"entity_value": "card-9", "reason": f"of {CARD_NUMBER}"}, "reason", "card_number"),
        ("blocked-cards", {"entity_value": "a b", "reason": "r"}, "entity_value", "bad_format"),
        ("blocked-mccs", {"entity_value": "541", "reason": "r"}, "entity_value", "bad_format"),
        ("blocked-cards", {"entity_value": "c" * 65, "reason": "r"}, "entity_value", "invalid"),
        ("blocked-cards", {"entity_value": "card-9", "reason": ""}, "reason", "invalid"),
        ("blocked-cards", {"entity_value": "card-9", "reason": "r" * (REASON_CHARS_MAX + 1)}, "reason", "invalid"),
        ("blocked-cards", {"entity_value": "card-9", "reason": "r", "expires_at_ms": 1}, "expires_at_ms", "invalid"),
        ("blocked-cards", {"entity_value": "card-9", "reason": "r", "expires_at_ms": 2**60}, "expires_at_ms", "invalid"),
    ],
)
async def test_what_can_stand_on_no_list_is_refused(
    tmp_path: Path, list_id: str, body: dict[str, Any], field: str, reason: str
) -> None:
    with a_service(tmp_path) as (service, app):
        status, problem, _ = await ask(app, "POST", f"/v1/lists/{list_id}/entries", body)
        assert (status, problem["field"], problem["reason"]) == (422, field, reason)
        fake = service.publisher
        assert isinstance(fake, FakePublisher) and fake.sent == []


async def test_a_change_that_kafka_does_not_acknowledge_is_503_and_leaves_no_trace(tmp_path: Path) -> None:
    with a_service(tmp_path) as (service, app):
        assert isinstance(service.publisher, FakePublisher)
        service.publisher.down = True
        status, problem, headers = await ask(app, "POST", "/v1/lists/blocked-cards/entries", {"entity_value": "c", "reason": "r"})
        assert (status, problem["reason"], headers["retry-after"]) == (503, "kafka_unavailable", "1")
        assert outbox(service) == []


async def test_a_full_book_takes_no_new_entry_but_changes_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "LIST_ENTRIES_MAX", 1)
    with a_service(tmp_path) as (service, app):
        fake, statuses = service.publisher, []
        assert isinstance(fake, FakePublisher)
        for value in ("a", "a", "b"):
            statuses.append((await ask(app, "POST", "/v1/lists/blocked-cards/entries", {"entity_value": value, "reason": "r"}))[0])
            service.database.call(lambda c: lists.apply(c, fake.sent))
        assert statuses == [200, 200, 409]


def change(action: ListAction, value: str) -> ListChange:
    return ListChange(
        list_id="l", entity_field="card_id", action=action, entity_value=value, expires_at_ms=None, reason="", who="w", at_ms=1
    )


async def test_entries_come_by_pages(tmp_path: Path) -> None:
    database = Database(tmp_path / "c.sqlite")
    changes = [change(ListAction.ADD, f"v{i}") for i in range(5)] + [change(ListAction.REMOVE, "v3")]
    database.call(lambda c: lists.apply(c, changes))
    found, after = [], None
    while True:
        page, after = database.call(lambda c, after=after: lists.page(c, "l", 2, after))  # type: ignore[misc]
        found += [e["entity_value"] for e in page]
        if after is None:
            break
    assert found == ["v0", "v1", "v2", "v4"]
    database.close()


def test_a_transaction_that_raises_leaves_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "c.sqlite")

    def work(connection: Any) -> None:
        note_progress(connection, "n", 7)
        raise KeyError

    with pytest.raises(KeyError):
        database.call(work)
    assert database.call(lambda c: progress_of(c, "n")) == 0
    database.call(lambda c: note_progress(c, "n", 8))
    database.close()
    again = Database(tmp_path / "c.sqlite")
    assert again.call(lambda c: progress_of(c, "n")) == 8
    again.call(lambda c: c.execute("select 1"))
    again.close()
    assert (tmp_path / "c.sqlite").stat().st_mode & 0o077 == 0
