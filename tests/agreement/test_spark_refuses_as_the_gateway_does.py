"""The parser of the feature jobs against the gateway's decoders, on the hostile corpus and on what only Kafka can carry."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastavro
import pytest
from pyspark.sql import Row, SparkSession

from feature_jobs.lake import DDL
from feature_jobs.parse import parse
from feature_jobs.session import build_session
from gateway.contracts import tables
from gateway.contracts.reasons import Refusal
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, LABELS, SCORED_HEADER, SCORED_NEVER, TOPICS, TRANSACTIONS
from gateway.contracts.transaction import FIELDS, RefusedError, Transaction
from gateway.contracts.wire import frame
from gateway.kafka.avro import SchemaBook
from loadtest.hostile import hostile_cases

pytestmark = [
    pytest.mark.spark,
    # py4j leaves its sockets to the garbage collector, which says so.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]

NOW_MS = 1_700_000_000_000
SCHEMA_ID = 7
SCHEMAS = {topic: {SCHEMA_ID + i: TOPICS[topic].schema_text} for i, topic in enumerate((TRANSACTIONS, DECISIONS, LABELS))}
VALID: dict[str, Any] = {
    "transaction_id": "t-1",
    "event_time_ms": NOW_MS,
    "card_id": "c-1",
    "customer_id": "u-1",
    "merchant_id": "m-1",
    "amount_minor": 500,
    "currency": "EUR",
    "channel": "pos",
    "mcc": "5411",
    "country": "DE",
    "latitude": 1.5,
    "longitude": 2,
}


def _more_cases() -> dict[str, bytes | None]:
    """What a body over HTTP can't be, and where a parser that reads ahead or stops early would go astray."""
    text = json.dumps(VALID)
    record = next(c.value for c in hostile_cases(NOW_MS, SCHEMA_ID) if c.name == "Avro: valid")
    return {
        "no value": None,
        "nothing": b"",
        "a second object behind a bracket": f"{text}],[{text}".encode(),
        "a second object": f"{text},{text}".encode(),
        "a repeated key in what ends too early": b'{"a":{"b":1,"b":2}, x',
        "a repeated key in a list": b'[{"a":1,"a":1}]',
        "many strings and no end": b"{" + b'"",' * 5000 + b"}",
        "many escapes": b'{"a":"' + b'\\"' * 8000 + b'"}',
        "many brackets and no end": b'{"a":' + b"[" * 16_000,
        "brackets in a text": text.replace("c-1", "[" * 100).encode(),
        "an escaped pair of surrogates": text.replace("c-1", "\\ud83d\\ude00").encode(),
        "an escaped backslash before what looks like a surrogate": text.replace("c-1", "\\\\ud800").encode(),
        "an escaped letter": text.replace("c-1", "\\u0063").encode(),
        "the least number of 64 bits": text.replace("500", str(-(2**63))).encode(),
        "Avro: a byte behind the record": record + b"\0",
        "Avro: no UTF-8": record.replace(b"EUR", b"E\xffR"),
        "Avro: another topic's schema id": frame(SCHEMA_ID + 1, record[5:]),
    }


@pytest.fixture(scope="module")
def spark(settings: Settings) -> Iterator[SparkSession]:
    session = build_session(settings)
    yield session
    session.stop()


@pytest.fixture(scope="module")
def values() -> dict[str, bytes | None]:
    return {c.name: c.value for c in hostile_cases(NOW_MS, SCHEMA_ID)} | _more_cases()


@pytest.fixture(scope="module")
def parsed(spark: SparkSession, values: dict[str, bytes | None]) -> dict[str, Row]:
    found = _parse(spark, [(value, None) for value in values.values()])
    return dict(zip(values, found, strict=True))


Headers = list[tuple[str, bytes]] | None


def _parse(
    spark: SparkSession, records: list[tuple[bytes | None, Headers]], schemas: dict[str, dict[int, str]] = SCHEMAS
) -> list[Row]:
    """Values and headers of the transactions topic as the feature jobs read them, in the order given."""
    at = dt.datetime.fromtimestamp(NOW_MS / 1000, dt.UTC)
    rows = [(TRANSACTIONS, 0, i, None, value, headers, at, at, 0) for i, (value, headers) in enumerate(records)]
    found = parse(spark.createDataFrame(rows, DDL[tables.BRONZE]).coalesce(1), schemas).collect()
    return sorted(found, key=lambda row: int(row["offset"]))


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory, values: dict[str, bytes | None]) -> SchemaBook:
    """The gateway's book of schemas, with a registry that is down and a local copy of one schema."""
    copy: Path = tmp_path_factory.mktemp("schemas")
    (copy / f"id-{SCHEMA_ID}.json").write_text(json.dumps({"schema": TOPICS[TRANSACTIONS].schema_text}))
    made = SchemaBook(SchemaRegistry("http://127.0.0.1:1", copy))
    asyncio.run(made.learn([value for value in values.values() if value is not None]))
    return made


def _by_gateway(book: SchemaBook, value: bytes | None) -> Transaction | tuple[str, str | None]:
    try:
        return book.decode_transaction(value, NOW_MS)
    except RefusedError as exc:
        return exc.reason.value, exc.field


def _by_spark(row: Row) -> Transaction | tuple[str, str | None]:
    if row["reason"] is not None:
        return row["reason"], row["field"]
    return Transaction(**{name: row["t"][name] for name in FIELDS})


def test_each_record_gets_the_same_verdict_reason_and_field(
    values: dict[str, bytes | None], parsed: dict[str, Row], book: SchemaBook
) -> None:
    different = {}
    for name, value in values.items():
        gateway, spark = _by_gateway(book, value), _by_spark(parsed[name])
        if gateway != spark:
            different[name] = (gateway, spark)
    assert not different


def test_the_corpus_reaches_every_reason_that_a_record_alone_can_have(parsed: dict[str, Row]) -> None:
    reached = {row["reason"] for row in parsed.values()}
    assert {r.value for r in Refusal} - reached == {Refusal.IDEMPOTENCY_CONFLICT.value}


def test_refused_records_keep_their_bytes_and_are_nobodys_duplicate(
    values: dict[str, bytes | None], parsed: dict[str, Row]
) -> None:
    refused = {name: row for name, row in parsed.items() if row["reason"] is not None}
    assert {name: bytes(row["value"]) for name, row in refused.items()} == {name: values[name] or b"" for name in refused}
    assert len({row["dedup_key"] for row in refused.values()}) == len(refused)


def test_the_mark_of_who_scored_is_found_among_other_headers_and_missed_without_harm(spark: SparkSession) -> None:
    value = json.dumps(VALID).encode()
    mark, other = (SCORED_HEADER, SCORED_NEVER), ("traceparent", b"00-1-2-01")
    cases: list[Headers] = [None, [], [other], [mark], [mark, other], [other, mark], [other, other]]
    found = [row["scored_by"] for row in _parse(spark, [(value, headers) for headers in cases])]
    history = SCORED_NEVER.decode()
    assert found == [None, None, None, history, history, history, None]


def test_a_record_of_an_older_schema_is_read_into_todays_and_must_be_whole_too(spark: SparkSession) -> None:
    older = json.loads(TOPICS[TRANSACTIONS].schema_text)
    older["fields"] = [f for f in older["fields"] if f["name"] not in ("latitude", "longitude", "card_bin")]
    out = io.BytesIO()
    optional = dict.fromkeys(FIELDS)
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(json.dumps(older))), optional | VALID)
    value = frame(SCHEMA_ID + 9, out.getvalue())
    schemas = SCHEMAS | {TRANSACTIONS: SCHEMAS[TRANSACTIONS] | {SCHEMA_ID + 9: json.dumps(older)}}
    whole, longer, shorter = _parse(spark, [(value, None), (value + b"\0", None), (value[:-1], None)], schemas)
    assert _by_spark(whole) == Transaction(**(VALID | {"latitude": None, "longitude": None}))
    assert longer["reason"] == shorter["reason"] == Refusal.MALFORMED_AVRO
