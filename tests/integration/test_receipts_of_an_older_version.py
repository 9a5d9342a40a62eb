"""Receipts and tables of before the newest fields, read by the feature jobs of today: on real Spark and Delta."""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import json
from collections.abc import Iterator
from pathlib import Path

import fastavro
import msgspec
import pytest
from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from feature_jobs import lake
from feature_jobs.lake import DDL
from feature_jobs.parse import LABEL_FIELDS, parse, receipt_columns
from feature_jobs.session import build_session
from gateway.contracts import tables
from gateway.contracts.decision import Outcome, Receipt
from gateway.contracts.label import Label
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, LABELS, TOPICS, TRANSACTIONS
from gateway.contracts.wire import frame
from gateway.kafka.avro import encode_receipt
from tests.integration.test_jobs import make_label, make_receipt
from tests.unit.gateway.factories import make_transaction

pytestmark = [
    pytest.mark.spark,
    pytest.mark.slow,
    # py4j leaves its sockets to the garbage collector, which says so.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]

NEW_FIELDS = ("routed_by", "policy_decision", "propensity", "list_hits", "shadow_hits", "rule_errors", "lists_version")
OLD_ID, NEW_ID = 1, 2


@pytest.fixture(scope="module")
def spark(settings: Settings) -> Iterator[SparkSession]:
    session = build_session(settings)
    yield session
    session.stop()


def old_schema() -> str:
    schema = json.loads(TOPICS[DECISIONS].schema_text)
    return json.dumps(schema | {"fields": [f for f in schema["fields"] if f["name"] not in NEW_FIELDS]})


def old_value(receipt: Receipt) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(old_schema())), msgspec.to_builtins(receipt))
    return frame(OLD_ID, out.getvalue())


def without_new_fields(ddl: str) -> StructType:
    whole = StructType.fromDDL(ddl)
    assert isinstance(whole, StructType)
    return StructType([f for f in whole.fields if f.name not in NEW_FIELDS])


def test_old_and_new_receipts_of_one_topic_land_in_a_table_of_before(
    spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    own = dataclasses.replace(settings, tables_uri=str(tmp_path))
    uri = tables.table_uri(own.tables, tables.DECISIONS)
    DeltaTable.createIfNotExists(spark).location(uri).addColumns(without_new_fields(DDL[tables.DECISIONS])).execute()
    lake.create_tables(spark, own)

    old = make_receipt(make_transaction("old"), Outcome.DECLINE)
    new = msgspec.structs.replace(
        make_receipt(make_transaction("new"), Outcome.APPROVE),
        routed_by="share",
        policy_decision="decline",
        propensity=0.02,
        list_hits=["watched"],
        shadow_hits=["r1"],
        rule_errors=["r2"],
        lists_version=3,
    )
    at = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    values = [old_value(old), frame(NEW_ID, encode_receipt(new))]
    bronze = [(DECISIONS, 0, i, None, value, None, at, at, 0) for i, value in enumerate(values)]
    schemas = {
        TRANSACTIONS: {10: TOPICS[TRANSACTIONS].schema_text},
        DECISIONS: {OLD_ID: old_schema(), NEW_ID: TOPICS[DECISIONS].schema_text},
        LABELS: {11: TOPICS[LABELS].schema_text},
    }
    parsed = parse(spark.createDataFrame(bronze, DDL[tables.BRONZE]).coalesce(1), schemas).persist()
    source = [F.col("partition"), F.col("offset"), F.col("kafka_timestamp"), F.lit(0).cast("bigint").alias("batch_id")]
    rows = parsed.where("d is not null").select(*receipt_columns(), *source)
    lake.append(rows, uri, "test", 0, "silver")

    found = {row["transaction_id"]: row for row in spark.read.format("delta").load(uri).collect()}
    assert [found["old"][name] for name in NEW_FIELDS] == ["only", "decline", 1.0, [], [], [], -1]
    assert [found["new"][name] for name in NEW_FIELDS] == ["share", "decline", 0.02, ["watched"], ["r1"], ["r2"], 3]


def test_old_and_new_labels_of_one_topic_land_in_a_table_of_before(spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    own = dataclasses.replace(settings, tables_uri=str(tmp_path))
    uri = tables.table_uri(own.tables, tables.LABELS)
    added = ("amount_minor", "effective_at_ms")
    today = StructType.fromDDL(DDL[tables.LABELS])
    assert isinstance(today, StructType)
    before = StructType([f for f in today.fields if f.name not in added])
    DeltaTable.createIfNotExists(spark).location(uri).addColumns(before).execute()
    lake.create_tables(spark, own)

    old = make_label(make_transaction("old"), True, 5)
    new = msgspec.structs.replace(make_label(make_transaction("new"), True, 6), amount_minor=250, effective_at_ms=7)
    schema = json.loads(TOPICS[LABELS].schema_text)
    old_text = json.dumps(schema | {"fields": [f for f in schema["fields"] if f["name"] not in added]})
    values = [_label_value(OLD_ID, old_text, old), _label_value(NEW_ID, TOPICS[LABELS].schema_text, new)]
    values.append(msgspec.json.encode(msgspec.structs.replace(new, transaction_id="json", amount_minor=None)))
    at = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    bronze = [(LABELS, 0, i, None, value, None, at, at, 0) for i, value in enumerate(values)]
    schemas = {
        TRANSACTIONS: {10: TOPICS[TRANSACTIONS].schema_text},
        DECISIONS: {11: TOPICS[DECISIONS].schema_text},
        LABELS: {OLD_ID: old_text, NEW_ID: TOPICS[LABELS].schema_text},
    }
    parsed = parse(spark.createDataFrame(bronze, DDL[tables.BRONZE]).coalesce(1), schemas).persist()
    source = [F.col("partition"), F.col("offset"), F.col("kafka_timestamp"), F.lit(0).cast("bigint").alias("batch_id")]
    lake.append(parsed.where("l is not null").select(*(f"l.{name}" for name in LABEL_FIELDS), *source), uri, "test", 0, "silver")

    found = {row["transaction_id"]: tuple(row[name] for name in added) for row in spark.read.format("delta").load(uri).collect()}
    assert found == {"old": (None, None), "new": (250, 7), "json": (None, 7)}


def _label_value(schema_id: int, schema: str, label: Label) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(schema)), msgspec.structs.asdict(label))
    return frame(schema_id, out.getvalue())
