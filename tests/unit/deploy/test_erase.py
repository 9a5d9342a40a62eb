"""`fraudgate erase` on small Delta tables: the customer is gone from every file after the vacuum, and the chain verifies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from deploy.history import erase as module
from deploy.history.audit import audit
from deploy.history.erase import Person, erase, erase_person, find_person
from deploy.history.publish import NotPublishedError
from deploy.history.upkeep import delete, vacuum
from deploy.history.verify import verify
from gateway.contracts import tables
from gateway.contracts.audit import AuditRecord
from gateway.contracts.settings import Settings, load_settings
from gateway.contracts.topics import AUDIT, DECISIONS, LABELS, TRANSACTIONS
from gateway.contracts.transaction import encode_json
from gateway.contracts.wire import frame
from gateway.kafka.avro import encode_receipt, encode_transaction
from tests.factories_history import (
    SCHEMA_ID,
    make_receipt,
    read_rows,
    rewrite_decisions,
    write_decisions,
    write_rows,
)
from tests.unit.gateway.factories import make_transaction

WHO, CARD, SHARED, NEIGHBOUR = "customer-77", "card-771", "device-shared", "customer-770"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("FRAUDGATE_HOME", str(tmp_path))
    monkeypatch.setenv("FRAUDGATE_REGISTRY_URL", "http://127.0.0.1:9")
    settings = load_settings()
    payments = [
        make_transaction("a1", customer_id=WHO, card_id=CARD, device_id="device-own", ip="10.0.0.77"),
        make_transaction("b1", customer_id=NEIGHBOUR, card_id="card-7710", device_id=SHARED, ip="10.0.0.1"),
        make_transaction("a2", customer_id=WHO, card_id=CARD, device_id=SHARED),
        make_transaction("b2", customer_id=NEIGHBOUR, card_id="card-7710"),
    ]
    receipts = [make_receipt(t) for t in payments]
    write_decisions(settings, receipts, partitions=1)
    silver = [msgspec.to_builtins(t) | {"batch_id": 0} for t in payments]
    write_rows(settings, tables.SILVER, silver)
    write_rows(settings, tables.GOLD_DECISIONS, silver)
    raw = [(TRANSACTIONS, encode_json(t)) for t in payments] + [(TRANSACTIONS, frame(1, encode_transaction(t))) for t in payments]
    raw += [(DECISIONS, frame(SCHEMA_ID, encode_receipt(r))) for r in receipts]
    write_rows(
        settings,
        tables.BRONZE,
        [
            {
                "topic": topic,
                "partition": 0,
                "offset": i,
                "value": value,
                "key": None if topic == AUDIT else payments[i % 4].card_id.encode(),
            }
            for i, (topic, value) in enumerate([*raw, (AUDIT, b'{"who": "ann"}')])
        ],
    )
    write_rows(
        settings, tables.QUARANTINE, [{"topic": LABELS, "partition": 0, "offset": 0, "value": b'{"card_id": "%s"' % CARD.encode()}]
    )
    write_rows(settings, tables.LABELS, [{"transaction_id": t.transaction_id, "card_id": t.card_id} for t in payments])
    changes = [
        {
            "transaction_id": t.transaction_id,
            "customer_id": t.customer_id,
            "merchant_id": t.merchant_id,
            "partition": 0,
            "offset": i,
        }
        for i, t in enumerate(payments)
    ]
    write_rows(settings, tables.LABEL_CHANGES, changes)
    entities = [("customer", WHO), ("customer", NEIGHBOUR), ("card", CARD), ("device", "device-own"), ("device", SHARED)]
    write_rows(settings, tables.GOLD_ENTITY_HOUR, [{"entity": entity, "entity_id": entity_id} for entity, entity_id in entities])
    monkeypatch.setattr(module, "erase_in_redis", lambda *_: 0)
    yield settings


def published(settings: Settings) -> list[AuditRecord]:
    """Erases WHO; what was published is in the table `audit`, as the feature jobs would have put it there."""
    records: list[AuditRecord] = []
    for _ in erase_person(settings, find_person(settings, WHO), "ann@bank", "request 5", records.extend):
        pass
    write_rows(settings, tables.AUDIT, [msgspec.structs.asdict(r) | {"offset": i} for i, r in enumerate(records)])
    return records


def files(settings: Settings) -> Iterator[Path]:
    yield from (path for path in Path(settings.tables).rglob("*") if path.is_file())


def test_only_what_is_theirs_alone_is_theirs(settings: Settings) -> None:
    person = find_person(settings, WHO)
    assert person.transactions == {"a1", "a2"}
    assert person.entities == {"card": {CARD}, "customer": {WHO}, "device": {"device-own"}, "ip": {"10.0.0.77"}}


def test_the_chain_verifies_and_the_customer_is_in_no_file_after_the_vacuum(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    records = published(settings)
    for name in tables.TABLES:
        vacuum(settings, name, hours=0)
    verdict = verify(settings)
    assert (verdict.broken, verdict.erased, verdict.chained) == (0, 2, 4), verdict.breaks
    assert audit([]) == 0
    assert "2 of them erased on request" in capsys.readouterr().out
    assert audit(["--changes", "--action", "customer_erased"]) == 0
    assert "ann@bank" in capsys.readouterr().out
    for path in files(settings):
        # Parquet's pages are compressed; the logs and their statistics aren't.
        content = repr(pq.read_table(path, partitioning=None).to_pylist()) if path.suffix == ".parquet" else path.read_text()
        # Their neighbours' names begin like theirs.
        content = content.replace(NEIGHBOUR, "").replace("card-7710", "")
        assert [one for one in (WHO, CARD, "device-own", "10.0.0.77") if one in content] == [], path
    assert WHO not in json.dumps([msgspec.to_builtins(r) for r in records])


def test_the_others_keep_everything(settings: Settings) -> None:
    published(settings)
    assert sorted(row["transaction_id"] for row in read_rows(settings, tables.SILVER)) == ["b1", "b2"]
    assert sorted(row["offset"] for row in read_rows(settings, tables.BRONZE)) == [1, 3, 5, 7, 9, 11, 12]
    assert read_rows(settings, tables.QUARANTINE) == []
    kept = {row["transaction_id"]: row for row in read_rows(settings, tables.DECISIONS)}
    assert kept["b1"]["payload"] is not None
    assert kept["a1"]["payload"] is None
    assert (kept["a1"]["decision"], kept["a1"]["policy_digest"]) == ("approve", "p" * 64)
    changes = sorted(read_rows(settings, tables.LABEL_CHANGES), key=lambda row: row["offset"])
    assert [row["customer_id"] for row in changes] == [None, NEIGHBOUR, None, NEIGHBOUR]
    left = {(row["entity"], row["entity_id"]) for row in read_rows(settings, tables.GOLD_ENTITY_HOUR)}
    assert left == {("customer", NEIGHBOUR), ("device", SHARED)}


@pytest.mark.parametrize("tamper", [{"decision": "decline"}, {"card_id": CARD}, {"erased_at_ms": 5}, {"erased_at_ms": None}])
def test_an_erased_row_that_somebody_tampered_with_is_found(settings: Settings, tamper: dict[str, object]) -> None:
    published(settings)
    rows = read_rows(settings, tables.DECISIONS)
    rewrite_decisions(settings, [row | tamper if row["transaction_id"] == "a2" else row for row in rows])
    assert [(b.partition, b.offset) for b in verify(settings).breaks] == [(0, 2)]


def test_without_its_audit_record_an_erased_row_is_a_break(settings: Settings) -> None:
    published(settings)
    delete(settings, tables.AUDIT, "action = 'customer_erased'", ds.field("action") == "customer_erased")
    assert [b.what.split(",")[0] for b in verify(settings).breaks] == ["it says that it was erased"] * 2


def test_nothing_is_erased_when_nobody_can_be_told(settings: Settings) -> None:
    def refuse(_: list[AuditRecord]) -> None:
        raise NotPublishedError("no Kafka")

    with pytest.raises(NotPublishedError):
        list(erase_person(settings, find_person(settings, WHO), "ann", "", refuse))
    assert all(row["payload"] is not None for row in read_rows(settings, tables.DECISIONS))


def test_an_interrupted_erasure_is_run_again(settings: Settings) -> None:
    steps = erase_person(settings, find_person(settings, WHO), "ann", "", lambda _: None)
    next(steps)
    next(steps)
    steps.close()
    published(settings)
    assert sorted(row["transaction_id"] for row in read_rows(settings, tables.SILVER)) == ["b1", "b2"]


def test_without_yes_it_only_says_what_it_would_do(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert erase(["--customer", WHO]) == 0
    assert "2 payments; theirs alone: 1 card, 1 customer, 1 device, 1 ip" in capsys.readouterr().out
    assert len(read_rows(settings, tables.SILVER)) == 4
    assert erase(["--customer", "nobody"]) == 1
    assert "no such customer" in capsys.readouterr().err


def test_a_reason_that_names_the_customer_is_refused(settings: Settings) -> None:
    with pytest.raises(SystemExit):
        erase(["--customer", WHO, "--reason", f"{WHO} asked", "--yes"])
    assert Person(WHO).ids == []
