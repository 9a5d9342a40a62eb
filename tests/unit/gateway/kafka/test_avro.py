import io
import json
import math
import struct
import time
from pathlib import Path

import fastavro
import msgspec
import pytest

from gateway.contracts.decision import Door, Outcome, Receipt
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.reasons import Refusal
from gateway.contracts.registry import SchemaRegistry, UnknownSchemaError
from gateway.contracts.topics import DECISIONS, TOPICS, TRANSACTIONS
from gateway.contracts.transaction import RefusedError, Transaction, encode_json
from gateway.contracts.wire import frame
from gateway.kafka.avro import SchemaBook, encode_receipt, encode_transaction, receipt_of
from gateway.kafka.records import Record, of_today
from tests.unit.gateway.factories import NOW_MS, make_transaction

pytestmark = pytest.mark.anyio

FULL = make_transaction(
    device_id="device-1", ip="2001:db8::1", card_bin="45678901", card_country="FR", latitude=-33.5, longitude=151.25
)


def make_receipt(t: Transaction, **changes: object) -> Receipt:
    receipt = Receipt(
        transaction_id=t.transaction_id,
        transaction=t,
        door=Door.KAFKA,
        source_partition=3,
        source_offset=2**40,
        received_at_ms=NOW_MS,
        decided_at_ms=NOW_MS + 5,
        decision=Outcome.REVIEW,
        risk_score=1000,
        probability=0.25,
        reasons=["MODEL_SCORE_HIGH", "CARD_VELOCITY"],
        rule_hits=["card-fast"],
        degraded=[],
        model_name="fraudgate",
        model_version="12",
        model_digest="ab" * 32,
        route="champion",
        feature_fingerprint=FINGERPRINT,
        features=[float(i) for i in range(len(FEATURE_NAMES))],
        observed_seq=[0, 5, 4_294_967_295, -1, -1],
        label_changes=[0, 1_700_000_000_000_000],
        tiles_age_ms=1500,
        policy_digest="cd" * 32,
        code_version="0.1.0",
        admit_us=10,
        features_us=2**33,
        model_us=0,
        policy_us=127,
        routed_by="only",
        policy_decision="approve",
        propensity=1.0,
        list_hits=["bad_cards"],
        shadow_hits=["r7", "r8"],
        rule_errors=["r9"],
        lists_version=70_000,
    )
    return msgspec.structs.replace(receipt, **changes)


def by_fastavro(topic: str, record: object) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(TOPICS[topic].schema_text)), msgspec.to_builtins(record))
    return out.getvalue()


FORM_0 = {"routed_by": "only", "policy_decision": "", "propensity": 1.0}
FORM_1: dict[str, object] = {"list_hits": [], "shadow_hits": [], "rule_errors": [], "lists_version": -1}


@pytest.mark.parametrize(("form", "added"), [(0, FORM_0 | FORM_1), (1, FORM_1)])
def test_receipts_of_an_earlier_form_are_read_and_delivered_with_what_was_true_then(form: int, added: dict[str, object]) -> None:
    schema = json.loads(TOPICS[DECISIONS].schema_text)
    before = fastavro.parse_schema(schema | {"fields": schema["fields"][: -len(added)]})
    receipt = msgspec.to_builtins(make_receipt(FULL))
    out = io.BytesIO()
    fastavro.schemaless_writer(out, before, receipt)
    old = out.getvalue()
    # From the topic, by the schema that it was written with.
    read = fastavro.schemaless_reader(io.BytesIO(old), before, fastavro.parse_schema(schema))
    assert read == receipt | added
    # From the local log, whose records are framed when they are sent: by today's schema.
    kept: object = (DECISIONS, b"card-1", old, []) if form == 0 else Record(DECISIONS, b"card-1", old, form=form)
    [record] = msgspec.msgpack.decode(msgspec.msgpack.encode([kept]), type=list[Record])
    sent = of_today(record)
    assert msgspec.to_builtins(receipt_of(sent.payload)) == read
    assert of_today(sent) == sent


@pytest.mark.parametrize("t", [make_transaction(), FULL, make_transaction(device_id="d" * 64)])
def test_the_transaction_writer_equals_fastavro(t: Transaction) -> None:
    assert encode_transaction(t) == by_fastavro(TRANSACTIONS, t)


@pytest.mark.parametrize(
    "receipt",
    [
        make_receipt(FULL),
        make_receipt(
            make_transaction(),
            source_partition=None,
            source_offset=None,
            probability=None,
            model_name=None,
            model_version=None,
            model_digest=None,
            route=None,
            reasons=[],
            rule_hits=[],
            degraded=["stale_features", "rules_only"],
            tiles_age_ms=None,
        ),
    ],
)
def test_the_receipt_writer_equals_fastavro(receipt: Receipt) -> None:
    payload = encode_receipt(receipt)
    assert payload == by_fastavro("decisions", receipt)
    assert receipt_of(payload) == receipt


def test_an_unknown_feature_is_nan_in_the_receipt() -> None:
    read = receipt_of(encode_receipt(make_receipt(FULL, features=[math.nan] * len(FEATURE_NAMES))))
    assert all(math.isnan(v) for v in read.features)


@pytest.fixture
def book(tmp_path: Path) -> SchemaBook:
    """Knows schema 1 (ours), 2 (a newer one with another optional field) and 3 (of another record), from a local copy alone."""
    ours = TOPICS[TRANSACTIONS].schema_text
    newer = json.loads(ours)
    newer["fields"].append({"name": "wallet", "type": ["null", "string"], "default": None})
    copies = {1: ours, 2: json.dumps(newer), 3: TOPICS["labels"].schema_text}
    for schema_id, text in copies.items():
        (tmp_path / f"id-{schema_id}.json").write_text(json.dumps({"schema": text}))
    return SchemaBook(SchemaRegistry("http://127.0.0.1:9/", tmp_path))


async def refusal_of(book: SchemaBook, value: bytes | None) -> Refusal:
    if value is not None:
        await book.learn([value])
    with pytest.raises(RefusedError) as caught:
        book.decode_transaction(value, NOW_MS)
    return caught.value.reason


async def test_avro_and_json_of_a_transaction_decode_alike(book: SchemaBook) -> None:
    framed = frame(1, encode_transaction(FULL))
    await book.learn([framed])
    assert book.decode_transaction(framed, NOW_MS) == book.decode_transaction(encode_json(FULL), NOW_MS) == FULL


async def test_a_newer_schema_is_read_without_its_extra_field(book: SchemaBook) -> None:
    framed = frame(2, encode_transaction(FULL) + b"\2\6pay")
    await book.learn([framed])
    assert book.decode_transaction(framed, NOW_MS) == FULL


async def test_hostile_bytes_are_refused_with_their_reason(book: SchemaBook) -> None:
    good = encode_transaction(FULL)
    assert await refusal_of(book, None) is Refusal.MALFORMED_JSON
    assert await refusal_of(book, b"") is Refusal.MALFORMED_JSON
    assert await refusal_of(book, b"\0\0") is Refusal.MALFORMED_AVRO
    assert await refusal_of(book, frame(99, good)) is Refusal.UNKNOWN_SCHEMA_ID
    assert await refusal_of(book, frame(3, good)) is Refusal.UNKNOWN_SCHEMA_ID
    assert await refusal_of(book, frame(1, good[:-3])) is Refusal.MALFORMED_AVRO
    assert await refusal_of(book, frame(1, good + b"x")) is Refusal.MALFORMED_AVRO
    assert await refusal_of(book, frame(1, b"\xff" * 200)) is Refusal.MALFORMED_AVRO
    assert await refusal_of(book, frame(1, b"\x04\xff\xfe" + good[3:])) is Refusal.NOT_UTF8
    assert await refusal_of(book, frame(1, b"\0" * 20_000)) is Refusal.TOO_LARGE
    nan = encode_transaction(make_transaction(latitude=1.0, longitude=1.0))[:-8] + struct.pack("<d", math.nan)
    assert await refusal_of(book, frame(1, nan)) is Refusal.WRONG_TYPE


async def test_an_unknown_schema_id_is_asked_for_once_in_a_while(book: SchemaBook, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def schema(schema_id: int) -> str:
        asked.append(schema_id)
        raise UnknownSchemaError

    monkeypatch.setattr(book._registry, "schema", schema)
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    value = frame(77, b"x")
    await book.learn([value, value])
    await book.learn([value])
    assert asked == [77]
    now_s = 1031.0
    await book.learn([value])
    assert asked == [77, 77]
