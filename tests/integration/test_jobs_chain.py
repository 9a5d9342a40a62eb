"""The chain of receipts as Spark writes it, on real Delta tables, without Kafka: replays, restarts, and others' commits."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from deploy.history.upkeep import NO_HOOKS, delete, replace
from deploy.history.verify import verify
from feature_jobs import lake
from feature_jobs.chain import Chain, content_column
from feature_jobs.lake import DDL
from feature_jobs.parse import parse, receipt_columns
from feature_jobs.session import build_session
from gateway.contracts import tables
from gateway.contracts.audit import DETAIL_BYTES_MAX
from gateway.contracts.settings import Settings
from gateway.contracts.topics import AUDIT, DECISIONS, LABELS, LIST_CHANGES, TOPICS, TRANSACTIONS
from gateway.contracts.wire import frame
from gateway.kafka.avro import encode, encode_receipt
from tests.factories_history import SCHEMA_ID, keep_schema, make_receipts

pytestmark = [
    pytest.mark.spark,
    pytest.mark.timeout(300),
    # py4j leaves its sockets to the garbage collector, which says so.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]

APP_ID = "test"
AT = dt.datetime(2026, 8, 1, 12, 0, 0, 123_000, tzinfo=dt.UTC)
SCHEMAS = {topic: {SCHEMA_ID + i: TOPICS[topic].schema_text} for i, topic in enumerate((DECISIONS, TRANSACTIONS, LABELS, AUDIT))}


@pytest.fixture(scope="module")
def spark(settings: Settings) -> Iterator[SparkSession]:
    session = build_session(settings)
    yield session
    session.stop()


@pytest.fixture
def own(spark: SparkSession, settings: Settings, tmp_path: Path) -> Settings:
    made = dataclasses.replace(
        settings, home=str(tmp_path / "home"), tables_uri=str(tmp_path / "tables"), registry_url="http://127.0.0.1:9"
    )
    keep_schema(made)
    lake.create_tables(spark, made)
    return made


@pytest.fixture(scope="module")
def receipts(spark: SparkSession) -> pa.Table:
    """Receipts of two partitions by turns, as silver has parsed them. Once: planning the parser takes seconds."""
    bronze = [
        (DECISIONS, i % 2, i // 2, None, frame(SCHEMA_ID, encode_receipt(receipt)), None, AT, AT, 0)
        for i, receipt in enumerate(make_receipts(41))
    ]
    # As in the stream, nothing is planned through the parser: that would take minutes.
    parsed = parse(spark.createDataFrame(bronze, DDL[tables.BRONZE]).coalesce(1), SCHEMAS).persist()
    others = [F.col(name) for name in ("payload", "schema_id", "partition", "offset", "kafka_timestamp")]
    found: pa.Table = parsed.where("reason is null").select(*receipt_columns(), *others).toArrow()
    return found


def batch(spark: SparkSession, receipts: pa.Table, batch_id: int, first: int, count: int) -> DataFrame:
    """A batch of silver."""
    rows = spark.createDataFrame(receipts.slice(first, count))
    return rows.withColumn("batch_id", lake.per_batch(batch_id, "offset")).withColumn("content_sha256", content_column())


def write(chain: Chain, own: Settings, rows: DataFrame, batch_id: int) -> bool:
    linked = chain.link(rows, batch_id)
    if linked is None:
        return False
    lake.append(linked.rows, tables.table_uri(own.tables, tables.DECISIONS), APP_ID, batch_id, "silver", linked.heads)
    chain.written()
    return True


def test_replays_restarts_and_other_writers_leave_one_unbroken_chain(
    spark: SparkSession, own: Settings, receipts: pa.Table
) -> None:
    uri = tables.table_uri(own.tables, tables.DECISIONS)
    chain = Chain(spark, uri)
    batches = [batch(spark, receipts, i, 10 * i, 10) for i in range(4)]
    assert write(chain, own, batches[0], 0)
    assert write(chain, own, batches[1], 1)
    # The driver died behind the append: a new one is given the same batch again.
    chain = Chain(spark, uri)
    assert not write(chain, own, batches[1], 1)
    # It died before the append.
    assert chain.link(batches[2], 2) is not None
    chain = Chain(spark, uri)
    assert write(chain, own, batches[2], 2)
    # Maintenance rewrites the files meanwhile.
    DeltaTable(uri).optimize.z_order(["transaction_id"])
    assert write(chain, own, batches[3], 3)
    assert write(Chain(spark, uri), own, batch(spark, receipts, 4, 40, 1), 4)
    verdict = verify(own)
    assert (verdict.broken, verdict.chained, verdict.unbounded) == (0, 41, []), verdict.breaks
    assert {p: offset for p, (offset, _) in verdict.heads.items()} == {0: 20, 1: 19}


def test_streams_pass_over_what_maintenance_and_erasure_commit(
    spark: SparkSession, own: Settings, receipts: pa.Table, tmp_path: Path
) -> None:
    uri = tables.table_uri(own.tables, tables.DECISIONS)
    chain = Chain(spark, uri)
    write(chain, own, batch(spark, receipts, 0, 0, 10), 0)

    def seen() -> list[str]:
        """What a stream like gold has read by now, from its own checkpoint."""
        rows: list[str] = []
        reader = spark.readStream.format("delta").option("skipChangeCommits", "true").load(uri)
        query = (
            reader.writeStream.option("checkpointLocation", str(tmp_path / "checkpoint"))
            .trigger(availableNow=True)
            .foreachBatch(lambda rows_of, _: rows.extend(row[0] for row in rows_of.select("transaction_id").collect()))
            .start()
        )
        query.awaitTermination()
        return rows

    assert len(seen()) == 10
    DeltaTable(uri).optimize.compact(post_commithook_properties=NO_HOOKS)
    changed = DeltaTable(uri).to_pyarrow_table(filters=ds.field("transaction_id") == "t3")
    place = changed.schema.get_field_index("erased_at_ms")
    changed = changed.set_column(place, changed.schema.field(place), pa.array([1], pa.int64()))
    replace(own, tables.DECISIONS, "transaction_id = 't3'", changed, ds.field("erased_at_ms") == 0)
    delete(own, tables.DECISIONS, "transaction_id = 't0'", ds.field("transaction_id") == "t0")
    write(chain, own, batch(spark, receipts, 1, 10, 3), 1)
    DeltaTable(uri).optimize.z_order(["transaction_id"])
    assert sorted(seen()) == ["t10", "t11", "t12"]
    # Spark reads the log with others' commits in it.
    assert spark.read.format("delta").load(uri).where(F.col("erased_at_ms") == 1).count() == 1
    assert spark.sql(f"describe history delta.`{uri}`").count() >= 6


def test_changes_of_lists_and_audit_records_are_read_as_avro_and_as_json(spark: SparkSession) -> None:
    change = {
        "list_id": "bad_ips",
        "entity_field": "ip",
        "action": "add",
        "entity_value": "10.0.0.1",
        "expires_at_ms": None,
        "reason": "seen in an attack",
        "who": "ann",
        "at_ms": 5,
    }
    entry = {
        "at_ms": 7,
        "who": "bob",
        "action": "promote",
        "subject": "champion",
        "before": None,
        "after": "2",
        "reason": "",
        "detail": "x" * DETAIL_BYTES_MAX,
    }
    avro = frame(SCHEMA_ID + 3, encode(AUDIT, entry))
    values = [
        (LIST_CHANGES, json.dumps(change).encode()),
        (LIST_CHANGES, json.dumps(change | {"action": "burn"}).encode()),
        (AUDIT, avro),
        (AUDIT, avro + b"x"),
    ]
    bronze = [(topic, 0, i, None, value, None, AT, AT, 0) for i, (topic, value) in enumerate(values)]
    rows = parse(spark.createDataFrame(bronze, DDL[tables.BRONZE]).coalesce(1), SCHEMAS).persist().orderBy("offset").collect()
    assert rows[0]["c"].asDict() == change
    assert rows[2]["a"].asDict() == entry
    assert [row["reason"] for row in rows] == [None, "malformed_json", None, "malformed_avro"]
    assert len({row["dedup_key"] for row in rows}) == 4
