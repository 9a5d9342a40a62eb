"""Stream 1: every record of the topics that the jobs read, as it came, once, into the Delta table `bronze`."""

from __future__ import annotations

import json
import time
from collections import defaultdict

from confluent_kafka.admin import AdminClient
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming.readwriter import DataStreamWriter

from feature_jobs import lake
from feature_jobs.metrics import Metrics
from feature_jobs.schemas import READ_TOPICS
from gateway.contracts import tables
from gateway.contracts.settings import Settings

QUERY = "bronze"
KAFKA_TIMEOUT_S = 10.0
# Spark's word for the first record that Kafka still holds.
EARLIEST = -2


def writer(spark: SparkSession, settings: Settings, metrics: Metrics) -> DataStreamWriter:
    """The stream, not started yet and without a trigger."""
    checkpoint = lake.checkpoint(spark, settings, QUERY)
    uri = tables.table_uri(settings.tables, tables.BRONZE)
    app_id = checkpoint.app_id(tables.BRONZE)
    records = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", settings.bootstrap)
        .option("subscribe", ",".join(READ_TOPICS))
        .option("startingOffsets", _starting_offsets(spark, settings, uri) if checkpoint.fresh else "earliest")
        # Records that expired before they were read are lost for good: that must stop the job, not pass unnoticed.
        .option("failOnDataLoss", "true")
        .option("maxOffsetsPerTrigger", settings.bronze_offsets_max)
        .option("includeHeaders", "true")
        .option("kafka.isolation.level", "read_committed")
        .load()
    )
    newest_ms = [_newest_ingested_ms(spark, uri)]

    def write(batch: DataFrame, batch_id: int) -> None:
        started = time.monotonic()
        # Never earlier than the batch before, even when the machine's clock was set back: the watermark of silver rests on it.
        newest_ms[0] = max(newest_ms[0], time.time_ns() // 1_000_000)
        rows = batch.select(
            "topic",
            "partition",
            "offset",
            "key",
            "value",
            "headers",
            F.col("timestamp").alias("kafka_timestamp"),
            F.timestamp_millis(lake.per_batch(newest_ms[0], "offset")).alias("ingested_at"),
            lake.per_batch(batch_id, "offset").alias("batch_id"),
        )
        lake.append(rows, uri, app_id, batch_id, QUERY)
        metrics.batch(QUERY, time.monotonic() - started)

    return records.writeStream.queryName(QUERY).option("checkpointLocation", checkpoint.uri).foreachBatch(write)


def _starting_offsets(spark: SparkSession, settings: Settings, uri: str) -> str:
    """For a new checkpoint beside an old table: go on behind what the table holds, so that nothing stands there twice."""
    held = spark.read.format("delta").load(uri).groupBy("topic", "partition").agg(F.max("offset").alias("offset")).collect()
    if not held:
        return "earliest"
    offsets: dict[str, dict[str, int]] = defaultdict(dict)
    for row in held:
        offsets[row["topic"]][str(row["partition"])] = row["offset"] + 1
    known = AdminClient({"bootstrap.servers": settings.bootstrap}).list_topics(timeout=KAFKA_TIMEOUT_S).topics
    return json.dumps({t: {str(p): offsets[t].get(str(p), EARLIEST) for p in known[t].partitions} for t in READ_TOPICS})


def _newest_ingested_ms(spark: SparkSession, uri: str) -> int:
    newest = spark.read.format("delta").load(uri).agg(F.unix_millis(F.max("ingested_at")).alias("ms")).collect()[0]["ms"]
    return 0 if newest is None else int(newest)
