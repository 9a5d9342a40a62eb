"""Redis from Delta: every entity's tiles and head as of a batch, by silver when Redis lost data, and by `fraudgate rebuild`.

Input are `silver_transactions` and, for the order of observation, the receipts in `decisions`. A transaction without a receipt counts
in the tiles only, as it did in streaming. docs/pipeline.md says what happens around it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import msgspec
from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from feature_jobs import lake, redis_client
from feature_jobs.restore import NO_RECEIPT, NOT_OBSERVED, OUTPUT_DDL, RestoreJob, restore_into_redis
from feature_jobs.tiles import DIMS, patient
from gateway.contracts import layout, tables
from gateway.contracts.features import ENTITIES, ENTITY_INDEX
from gateway.contracts.settings import Settings

# Transactions that one Python worker holds at a time: five events each, 80 bytes an event.
ROWS_PER_PARTITION = 100_000
# Bronze reads in order: when a record was read this long after a moment, so were the receipts decided until then.
RECEIPTS_WITHIN_MS = 5_000
# The tables whose rows tell how far silver has got.
FROM_BRONZE = (tables.SILVER, tables.QUARANTINE, tables.DECISIONS, tables.LABELS, tables.LIST_CHANGES, tables.AUDIT)
PER_EVENT = ("event_time_ms", "amount_minor", "from_kafka", "arrived_ms", "decided_ms", "latitude", "longitude")


class NothingToRebuildError(RuntimeError):
    """Silver has no rows, or none as of the given time."""


class RedisInUseError(RuntimeError):
    """What is to be restored as of a time would mix with what Redis holds."""


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild wrote. `newest_ms` is the newest Kafka timestamp among its transactions, 0: none."""

    transactions: int
    entities: int
    left_out: int
    newest_ms: int


def rebuild(spark: SparkSession, settings: Settings, job: RestoreJob) -> Rebuilt:
    """Write what every entity held after batch `job.batch_id`. The job's epoch must be a new one, so that no old tile is built upon."""
    return _restore(_history(spark, settings, job.batch_id), spark, settings, job)


def rebuild_late(spark: SparkSession, settings: Settings, job: RestoreJob, after_batch_id: int) -> Rebuilt:
    """Write anew, as of batch `job.batch_id`, the entities of receipts that were decided until `job.lost_at_ms` and came late.

    Late: in batch `after_batch_id` or behind it, so that an earlier rebuild did not know them. Same epoch as that rebuild.
    """
    late = (
        spark.read.format("delta")
        .load(tables.table_uri(settings.tables, tables.DECISIONS))
        .where((F.col("batch_id") >= after_batch_id) & (F.col("batch_id") <= job.batch_id))
        .where(F.col("decided_at_ms") <= job.lost_at_ms)
    )
    named = F.array(*(F.concat(F.lit(f"{e.name}:"), F.col(e.field)) for e in ENTITIES))
    tags = late.select(F.explode(F.array_compact(named)).alias("tag")).distinct()
    history = _history(spark, settings, job.batch_id).join(tags, "tag", "left_semi")
    return _restore(history, spark, settings, job)


def _restore(history: DataFrame, spark: SparkSession, settings: Settings, job: RestoreJob) -> Rebuilt:
    transactions, newest_ms = _extent(spark, settings, job.batch_id)
    events = history.repartition(partitions(transactions), "tag")
    results = events.mapInArrow(restore_into_redis(job), OUTPUT_DDL).collect()
    return Rebuilt(transactions, sum(r["written"] for r in results), sum(r["left_out"] for r in results), newest_ms)


def partitions(transactions: int) -> int:
    return max(1, transactions // ROWS_PER_PARTITION)


def _extent(spark: SparkSession, settings: Settings, through_batch_id: int) -> tuple[int, int]:
    """(transactions, newest Kafka timestamp in ms or 0) of silver through a batch."""
    row = (
        _table(spark, settings, tables.SILVER, through_batch_id)
        .agg(F.count("*").alias("rows"), F.unix_millis(F.max("kafka_timestamp")).alias("newest_ms"))
        .collect()[0]
    )
    return row["rows"], row["newest_ms"] or 0


def _table(spark: SparkSession, settings: Settings, name: str, through_batch_id: int) -> DataFrame:
    rows = spark.read.format("delta").load(tables.table_uri(settings.tables, name))
    return rows.where(F.col("batch_id") <= through_batch_id)


def _history(spark: SparkSession, settings: Settings, through_batch_id: int) -> DataFrame:
    """One row for each entity that a transaction names: tag, txn (8 bytes), PER_EVENT, DIMS and seq (feature_jobs.restore.History)."""
    silver = _table(spark, settings, tables.SILVER, through_batch_id)
    decisions = _table(spark, settings, tables.DECISIONS, through_batch_id)
    # A transaction that came again behind the deduplication window has two receipts: the newer one stands, for both.
    receipt = F.struct("batch_id", "decided_at_ms", "observed_seq").alias("receipt")
    count = partitions(_extent(spark, settings, through_batch_id)[0])
    receipts = (
        decisions.select("transaction_id", receipt)
        .repartition(count, "transaction_id")
        .groupBy("transaction_id")
        .agg(F.max("receipt").alias("receipt"))
    )
    joined = silver.repartition(count, "transaction_id").join(receipts, "transaction_id", "left")
    rows = joined.select(
        F.substring(F.unhex(F.md5("transaction_id")), 1, 8).alias("txn"),
        "event_time_ms",
        "amount_minor",
        # What came through the HTTP door was observed before it was published; history never is.
        F.col("scored_by").isNull().alias("from_kafka"),
        F.unix_millis("kafka_timestamp").alias("arrived_ms"),
        F.coalesce("receipt.decided_at_ms", F.lit(0)).cast("bigint").alias("decided_ms"),
        _place("latitude"),
        _place("longitude"),
        F.explode(F.array_compact(F.array(*(_entity(i) for i in range(len(ENTITIES)))))).alias("e"),
    )
    return rows.select("e.tag", "txn", *PER_EVENT, *(f"e.{name}" for name in DIMS), "e.seq")


def _place(name: str) -> Column:
    return F.coalesce(F.col(name), F.lit(float("nan"))).cast("float").alias(name)


def _entity(index: int) -> Column:
    """What a transaction is to one of its entities; null where it names none."""
    entity = ENTITIES[index]
    assert ENTITY_INDEX[entity.name] == index
    seq = (
        F.when(F.col("receipt").isNull(), F.lit(NO_RECEIPT))
        .otherwise(F.coalesce(F.get("receipt.observed_seq", F.lit(index)), F.lit(NOT_OBSERVED)))
        .cast("bigint")
    )
    return F.when(
        F.col(entity.field).isNotNull(),
        F.struct(
            F.concat(F.lit(f"{entity.name}:"), F.col(entity.field)).alias("tag"),
            *(F.crc32(F.coalesce(F.col(d), F.lit(""))).alias(name) for name, d in zip(DIMS, entity.dims, strict=True)),
            seq.alias("seq"),
        ),
    )


def newest_batch(spark: SparkSession, settings: Settings, as_of_ms: int | None = None) -> int:
    """The last batch of silver, or the last one that was committed by `as_of_ms`, wall clock. Raises `NothingToRebuildError`."""
    newest = -1
    for name in FROM_BRONZE:
        uri = tables.table_uri(settings.tables, name)
        if not DeltaTable.isDeltaTable(spark, uri):
            continue
        if as_of_ms is None:
            row = spark.read.format("delta").load(uri).agg(F.coalesce(F.max("batch_id"), F.lit(-1)).alias("id")).collect()[0]
            newest = max(newest, row["id"])
            continue
        history = DeltaTable.forPath(spark, uri).history().where(F.unix_millis("timestamp") <= as_of_ms)
        notes = [
            json.loads(row["userMetadata"]) for row in history.where("userMetadata is not null").select("userMetadata").collect()
        ]
        newest = max(newest, *(note["batch_id"] for note in notes if "batch_id" in note), -1)
    if newest < 0:
        raise NothingToRebuildError(
            "silver has no rows" if as_of_ms is None else f"the logs of the tables know no batch committed by {as_of_ms}"
        )
    return newest


def next_epoch(spark: SparkSession, settings: Settings, query: str, held: int) -> int:
    """The epoch after `held`, saved as the one of `query`: what was written under an older one isn't built upon any more."""
    epoch = held % 0xFFFFFFFF + 1
    lake.save_epoch(spark, settings, query, epoch)
    return epoch


def by_hand(spark: SparkSession, settings: Settings, query: str, held_epoch: int, as_of_ms: int | None) -> tuple[Rebuilt, int]:
    """What `fraudgate rebuild` does; the batch up to which it wrote. Under the epoch of `query` after `held_epoch`; no jobs may run.

    As of now: as after a loss, that is, answers are stale until the jobs have read every older receipt. As of a time: just what
    silver had written then. Raises `NothingToRebuildError`, `RedisInUseError`, and what Spark makes of a worker's error.
    """
    now_ms = time.time_ns() // 1_000_000
    if as_of_ms is not None and patient(lambda: _holds_features(settings), settings.redis_retry_s):
        raise RedisInUseError("Redis holds features already, and the past goes into an empty one only: empty it first")
    batch_id = newest_batch(spark, settings, as_of_ms)
    lost_at_ms = 0 if as_of_ms is not None else now_ms
    epoch = next_epoch(spark, settings, query, held_epoch)
    job = RestoreJob(settings.redis, epoch, batch_id, as_of_ms or now_ms, lost_at_ms, settings.redis_retry_s)
    started = layout.Progress(epoch, -1, now_ms, 0, lost_at_ms=now_ms, rebuilt_batch_id=batch_id)
    put_progress(settings, started)
    done = rebuild(spark, settings, job)
    written_at_ms = time.time_ns() // 1_000_000
    finished = {"batch_id": batch_id, "written_at_ms": written_at_ms, "arrived_through_ms": done.newest_ms}
    put_progress(settings, msgspec.structs.replace(started, lost_at_ms=lost_at_ms, **finished))
    return done, batch_id


def _holds_features(settings: Settings) -> bool:
    with redis_client.connect(settings.redis) as client:
        return next(iter(client.scan_iter(match=f"{layout.PREFIX}:{{*", count=10_000)), None) is not None


def put_progress(settings: Settings, progress: layout.Progress) -> None:
    """Raises `feature_jobs.tiles.RedisUnavailableError`."""

    def put() -> None:
        with redis_client.connect(settings.redis) as client:
            redis_client.set_progress(client, progress)

    patient(put, settings.redis_retry_s)
