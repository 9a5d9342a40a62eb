"""The Delta tables as Spark sees them: their columns, their creation, and appends that happen once.

Every append carries (txnAppId, txnVersion) = (id of the checkpoint and table, batch id): Delta skips a version it has seen, so a
replayed batch changes nothing. The batch id also stands in the commit's userMetadata and in each row, so that freshness can be measured.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass

from delta.tables import DeltaTable
from py4j.java_gateway import JavaObject
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from gateway.contracts import tables
from gateway.contracts.settings import Settings

TRANSACTION_DDL = (
    "transaction_id string, event_time_ms bigint, card_id string, customer_id string, merchant_id string, amount_minor bigint, "
    "currency string, channel string, mcc string, country string, device_id string, ip string, card_bin string, "
    "card_country string, latitude double, longitude double"
)
SOURCE_DDL = "partition int, offset bigint, kafka_timestamp timestamp, batch_id bigint"
RECEIPT_DDL = (
    "transaction_id string, door string, source_partition int, source_offset bigint, received_at_ms bigint, decided_at_ms bigint, "
    "decision string, risk_score int, probability double, reasons array<string>, rule_hits array<string>, degraded array<string>, "
    "model_name string, model_version string, model_digest string, route string, feature_fingerprint string, "
    "features array<float>, observed_seq array<bigint>, label_changes array<bigint>, tiles_age_ms bigint, policy_digest string, "
    "code_version string, "
    "admit_us bigint, features_us bigint, model_us bigint, policy_us bigint, "
    "routed_by string, policy_decision string, propensity double, "
    "list_hits array<string>, shadow_hits array<string>, rule_errors array<string>, lists_version bigint"
)
# Of a receipt's transaction only what a decline is counted for: gold's entities, and for bursts the card's BIN.
RECEIPT_ENTITIES_DDL = (
    "event_time_ms bigint, card_id string, customer_id string, merchant_id string, device_id string, ip string, card_bin string"
)
# The receipt as it came, its hashes (gateway.contracts.chain), and since when it is without the customer's data (fraudgate erase).
CHAIN_DDL = "payload binary, schema_id int, content_sha256 binary, chain_sha256 binary, erased_at_ms bigint"
LABEL_DDL = (
    "transaction_id string, card_id string, is_fraud boolean, source string, state string, reported_at_ms bigint, "
    "amount_minor bigint, effective_at_ms bigint"
)
# contracts.lists.ListChange and contracts.audit.AuditRecord.
LIST_CHANGE_DDL = (
    "list_id string, entity_field string, action string, entity_value string, expires_at_ms bigint, "
    "reason string, who string, at_ms bigint"
)
AUDIT_DDL = "at_ms bigint, who string, action string, subject string, before string, after string, reason string, detail string"

DDL: dict[str, str] = {
    tables.BRONZE: (
        "topic string, partition int, offset bigint, key binary, value binary, headers array<struct<key: string, value: binary>>, "
        "kafka_timestamp timestamp, ingested_at timestamp, batch_id bigint"
    ),
    tables.SILVER: f"{TRANSACTION_DDL}, scored_by string, {SOURCE_DDL}",
    tables.QUARANTINE: f"reason string, field string, topic string, value binary, {SOURCE_DDL}",
    tables.DECISIONS: f"{RECEIPT_DDL}, {RECEIPT_ENTITIES_DDL}, {CHAIN_DDL}, {SOURCE_DDL}",
    tables.LABELS: f"{LABEL_DDL}, {SOURCE_DDL}",
    tables.LIST_CHANGES: f"{LIST_CHANGE_DDL}, {SOURCE_DDL}",
    tables.AUDIT: f"{AUDIT_DDL}, {SOURCE_DDL}",
    tables.LABEL_CHANGES: (
        "transaction_id string, event_time_ms bigint, customer_id string, merchant_id string, is_fraud boolean, source string, "
        "state string, reported_at_ms bigint, change int, place bigint, partition int, offset bigint, kafka_timestamp timestamp, "
        "applied_at_ms bigint, batch_id bigint, effective_at_ms bigint"
    ),
    tables.GOLD_ENTITY_HOUR: (
        "entity string, entity_id string, hour timestamp, transactions bigint, amount_minor bigint, declined bigint, "
        "largest_minor bigint, updated_at timestamp"
    ),
    tables.GOLD_DECISIONS: (
        f"{TRANSACTION_DDL}, scored_by string, decision string, risk_score int, probability double, model_name string, "
        "model_version string, decided_at_ms bigint, route string, policy_decision string, propensity double, is_fraud boolean, "
        "label_source string, label_state string, reported_at_ms bigint, kafka_timestamp timestamp, batch_id bigint, "
        "label_effective_at_ms bigint"
    ),
}
PARTITIONED_BY: dict[str, tuple[str, ...]] = {tables.BRONZE: ("topic",)}
PROPERTIES: dict[str, str] = {
    # A commit every few seconds: a checkpoint of the log each 10 of them would cost more than it saves a reader.
    "delta.checkpointInterval": "100",
}


def retention(settings: Settings) -> dict[str, str]:
    """Properties that keep every version readable for as long as is promised; fraudgate maintain removes what is older."""
    kept = f"interval {settings.time_travel_days} days"
    return {"delta.logRetentionDuration": kept, "delta.deletedFileRetentionDuration": kept}


# Columns whose least and greatest value each file's entry in the log keeps: those that a reader selects by.
STATISTICS: dict[str, str] = {
    tables.BRONZE: "offset,kafka_timestamp,ingested_at,batch_id",
    tables.SILVER: "transaction_id,event_time_ms,kafka_timestamp,batch_id",
    tables.QUARANTINE: "reason,kafka_timestamp,batch_id",
    tables.DECISIONS: "transaction_id,event_time_ms,kafka_timestamp,batch_id",
    tables.LABELS: "transaction_id,reported_at_ms,kafka_timestamp,batch_id",
    tables.LIST_CHANGES: "list_id,offset,kafka_timestamp,batch_id",
    # Of what can be long, subject and detail, nothing.
    tables.AUDIT: "at_ms,action,offset,kafka_timestamp,batch_id",
    tables.LABEL_CHANGES: "transaction_id,event_time_ms,kafka_timestamp,applied_at_ms,batch_id",
    tables.GOLD_ENTITY_HOUR: "entity,hour",
    tables.GOLD_DECISIONS: "transaction_id,event_time_ms,kafka_timestamp,batch_id",
}
assert STATISTICS.keys() == DDL.keys()


@dataclass(frozen=True)
class Checkpoint:
    """Where a stream keeps its offsets, and the random number that was drawn when the place was created.

    `fresh` is True when it was created just now: the stream starts from the beginning of its source.
    """

    uri: str
    epoch: int
    fresh: bool

    def app_id(self, table: str) -> str:
        return f"fraudgate-{self.epoch:08x}-{table}"


def create_tables(spark: SparkSession, settings: Settings) -> None:
    """Each table that isn't there yet, empty. One of an earlier version gets the columns that it lacks."""
    for name, ddl in DDL.items():
        uri = tables.table_uri(settings.tables, name)
        if DeltaTable.isDeltaTable(spark, uri):
            held = set(spark.read.format("delta").load(uri).columns)
            wanted = StructType.fromDDL(ddl)
            assert isinstance(wanted, StructType)
            lacking = [f for f in wanted.fields if f.name not in held]
            if lacking:
                added = ", ".join(f"{f.name} {f.dataType.simpleString()}" for f in lacking)
                spark.sql(f"alter table delta.`{uri}` add columns ({added})")
            given = DeltaTable.forPath(spark, uri).detail().select("properties").collect()[0]["properties"]
            changed = ", ".join(f"'{key}' = '{value}'" for key, value in retention(settings).items() if given.get(key) != value)
            if changed:
                spark.sql(f"alter table delta.`{uri}` set tblproperties ({changed})")
            continue
        builder = DeltaTable.createIfNotExists(spark).location(uri).addColumns(StructType.fromDDL(ddl))
        if name in PARTITIONED_BY:
            builder = builder.partitionedBy(*PARTITIONED_BY[name])
        for key, value in (PROPERTIES | retention(settings) | {"delta.dataSkippingStatsColumns": STATISTICS[name]}).items():
            builder = builder.property(key, value)
        builder.execute()


def append(
    rows: DataFrame, uri: str, app_id: str, batch_id: int, query: str, heads: dict[str, tuple[int, str]] | None = None
) -> None:
    """Append `rows` to the table once, however often this batch is replayed. One file a partition of the table.

    `heads` is noted with the commit (feature_jobs.chain).

    One task writes: a micro-batch is small, and each further file costs every reader.
    """
    (
        rows.coalesce(1)
        .write.format("delta")
        .mode("append")
        .option("txnAppId", app_id)
        .option("txnVersion", batch_id)
        .option("userMetadata", commit_note(query, batch_id, heads))
        .save(uri)
    )


def per_batch(value: int, beside: str) -> Column:
    """A number that differs from batch to batch, as a bigint column of rows that have a column `beside`.

    A plain literal would be written into the generated code, so that each batch compiles its own: a second of CPU. Texts are passed
    by reference, and leaning on a column keeps the optimiser from folding the cast.
    """
    nothing = F.substring(F.col(beside).cast("string"), 1, 0)
    return F.concat(F.lit(str(value)), nothing).cast("bigint")


def commit_note(query: str, batch_id: int, heads: dict[str, tuple[int, str]] | None = None) -> str:
    return json.dumps({"query": query, "batch_id": batch_id} | ({} if heads is None else {"heads": heads}))


def checkpoint(spark: SparkSession, settings: Settings, query: str) -> Checkpoint:
    """The query's checkpoint, created when it isn't there. Works on every file system that Hadoop knows."""
    uri = f"{settings.checkpoints.rstrip('/')}/{query}/stream"
    path, fs = _file_system(spark, f"{uri}/offsets/0")
    fresh = not fs.exists(path) and not fs.exists(path.getParent())
    epoch = None if fresh else load_epoch(spark, settings, query)
    if epoch is None:
        epoch = secrets.randbits(32) or 1
        save_epoch(spark, settings, query, epoch)
    return Checkpoint(uri, epoch, fresh)


def load_epoch(spark: SparkSession, settings: Settings, query: str) -> int | None:
    path, fs = _file_system(spark, f"{settings.checkpoints.rstrip('/')}/{query}/epoch")
    if not fs.exists(path):
        return None
    stream = fs.open(path)
    try:
        return int(stream.readInt()) & 0xFFFFFFFF
    finally:
        stream.close()


def save_epoch(spark: SparkSession, settings: Settings, query: str, epoch: int) -> None:
    path, fs = _file_system(spark, f"{settings.checkpoints.rstrip('/')}/{query}/epoch")
    stream = fs.create(path, True)
    try:
        stream.writeInt(epoch - (1 << 32) if epoch >= 1 << 31 else epoch)
    finally:
        stream.close()


def _file_system(spark: SparkSession, uri: str) -> tuple[JavaObject, JavaObject]:
    jvm = spark.sparkContext._jvm
    assert jvm is not None
    path = jvm.org.apache.hadoop.fs.Path(uri)
    return path, path.getFileSystem(spark.sparkContext._jsc.hadoopConfiguration())
