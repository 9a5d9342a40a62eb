"""Stream 2: bronze becomes typed, valid, deduplicated rows; refusals go to `quarantine`; new transactions are added to the tiles.

Inside a batch: tables first, then Redis, then the progress record. Each step alone is idempotent, so a kill between any two of them
and the replay of the batch lose nothing and count nothing twice. Tiles never hold what silver doesn't.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import msgspec
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming.readwriter import DataStreamWriter

from feature_jobs import lake, redis_client
from feature_jobs.chain import Chain, content_column
from feature_jobs.metrics import Metrics
from feature_jobs.parse import AUDIT_FIELDS, LABEL_FIELDS, LIST_CHANGE_FIELDS, parse, receipt_columns
from feature_jobs.rebuild import RECEIPTS_WITHIN_MS, next_epoch, rebuild, rebuild_late
from feature_jobs.restore import RestoreJob
from feature_jobs.schemas import SchemaBook
from feature_jobs.tiles import RedisUnavailableError, TileJob, patient, write_tiles
from gateway.contracts import layout, tables
from gateway.contracts.reasons import Refusal
from gateway.contracts.settings import Settings
from gateway.contracts.topics import AUDIT, DECISIONS, LABELS, LIST_CHANGES, TRANSACTIONS
from gateway.contracts.transaction import FIELDS

QUERY = "silver"
# Where the epoch of the tiles is kept when it isn't the checkpoint's own any more.
TILES = f"{QUERY}/tiles"
# Tables of records that are kept as they are: topic, struct of the parser and its fields.
KEPT = (
    (tables.LABELS, LABELS, "l", LABEL_FIELDS),
    (tables.LIST_CHANGES, LIST_CHANGES, "c", LIST_CHANGE_FIELDS),
    (tables.AUDIT, AUDIT, "a", AUDIT_FIELDS),
)
# Redis restarts that one batch bears before it is replayed.
ATTEMPTS_MAX = 5

log = logging.getLogger(__name__)


class SchemasChangedError(RuntimeError):
    """A schema id came that the query's plan doesn't know and the registry does: start the query anew with the grown book."""


class CheckpointLostError(RuntimeError):
    """Silver has rows and its checkpoint is gone: reading bronze again would append everything a second time."""


@dataclass
class Silver:
    """The state of the stream between its batches. `idle_progress` is refreshed by the supervisor while nothing comes."""

    spark: SparkSession
    settings: Settings
    schemas: SchemaBook
    metrics: Metrics

    def __post_init__(self) -> None:
        self.checkpoint = lake.checkpoint(self.spark, self.settings, QUERY)
        held = None if self.checkpoint.fresh else lake.load_epoch(self.spark, self.settings, TILES)
        self.epoch = held or self.checkpoint.epoch
        self.progress: layout.Progress | None = None
        self.chain = Chain(self.spark, self._uri(tables.DECISIONS))

    def writer(self) -> DataStreamWriter:
        """The stream, not started yet and without a trigger. Raises `CheckpointLostError`."""
        silver_uri = self._uri(tables.SILVER)
        if self.checkpoint.fresh and not self.spark.read.format("delta").load(silver_uri).isEmpty():
            raise CheckpointLostError(
                f"{silver_uri} has rows and {self.checkpoint.uri} is gone: remove the tables made from bronze too"
            )
        bronze = (
            self.spark.readStream.format("delta")
            .option("maxBytesPerTrigger", f"{self.settings.silver_batch_mb_max}m")
            .option("maxFilesPerTrigger", 100_000)
            # Commits that change rows are those of fraudgate maintain and erase: they bring nothing new.
            .option("skipChangeCommits", "true")
            .load(self._uri(tables.BRONZE))
        )
        rows = parse(bronze, self.schemas.by_topic)
        # The watermark follows the time a record was read from Kafka, which never goes back. A producer with a wrong clock can set a
        # Kafka timestamp far ahead: a watermark on that would drop everyone else's records as late.
        unique = rows.withWatermark("ingested_at", f"{self.settings.dedup_window_s} seconds").dropDuplicatesWithinWatermark(
            ["dedup_key"]
        )
        return unique.writeStream.queryName(QUERY).option("checkpointLocation", self.checkpoint.uri).foreachBatch(self.write)

    def write(self, batch: DataFrame, batch_id: int) -> None:
        started = time.monotonic()
        now_ms = time.time_ns() // 1_000_000
        batch.persist()
        try:
            self._write(batch, batch_id, now_ms)
        finally:
            batch.unpersist()
        self.metrics.batch(QUERY, time.monotonic() - started)

    def _write(self, batch: DataFrame, batch_id: int, now_ms: int) -> None:
        counted = (
            batch.groupBy("topic", "reason")
            .agg(
                F.count("*").alias("rows"),
                F.unix_millis(F.max("kafka_timestamp")).alias("newest_ms"),
                F.unix_millis(F.min("kafka_timestamp")).alias("oldest_ms"),
                F.unix_millis(F.max("ingested_at")).alias("ingested_ms"),
            )
            .collect()
        )
        counts = {(row["topic"], row["reason"]): row["rows"] for row in counted}
        if any(reason == Refusal.UNKNOWN_SCHEMA_ID for _, reason in counts) and self.schemas.refresh():
            raise SchemasChangedError
        valid = batch.where("reason is null")
        stamp = lake.per_batch(batch_id, "offset").alias("batch_id")
        source = ("partition", "offset", "kafka_timestamp", stamp)
        transactions = valid.where(F.col("topic") == TRANSACTIONS).select(*(f"t.{name}" for name in FIELDS), "scored_by", *source)
        refused = sum(n for (_, reason), n in counts.items() if reason is not None)
        new = counts.get((TRANSACTIONS, None), 0)
        outputs = (
            (tables.SILVER, new, transactions),
            (tables.QUARANTINE, refused, batch.where("reason is not null").select("reason", "field", "topic", "value", *source)),
            *(
                (
                    table,
                    counts.get((topic, None), 0),
                    valid.where(F.col("topic") == topic).select(*(f"{struct}.{name}" for name in fields), *source),
                )
                for table, topic, struct, fields in KEPT
            ),
        )
        for table, rows, frame in outputs:
            if rows:
                lake.append(frame, self._uri(table), self.checkpoint.app_id(table), batch_id, QUERY)
                self.metrics.rows.labels(table).inc(rows)
        receipts = counts.get((DECISIONS, None), 0)
        if receipts:
            self._write_decisions(valid.where(F.col("topic") == DECISIONS), batch_id, stamp)
            self.metrics.rows.labels(tables.DECISIONS).inc(receipts)
        newest_ms = max((row["newest_ms"] for row in counted if row["topic"] == TRANSACTIONS), default=0)
        ingested_ms = max((row["ingested_ms"] for row in counted), default=0)
        self._write_tiles(transactions if new else None, batch_id, now_ms, newest_ms, ingested_ms)
        for (_, reason), n in counts.items():
            if reason is not None:
                self.metrics.quarantined.labels(reason).inc(n)
        if counted:
            oldest_ms = min(row["oldest_ms"] for row in counted)
            self.metrics.freshness_seconds.labels(QUERY).set(time.time() - oldest_ms / 1000)
            self.metrics.freshness_seconds.labels("bronze").set((max(row["ingested_ms"] for row in counted) - oldest_ms) / 1000)

    def _write_decisions(self, receipts: DataFrame, batch_id: int, stamp: Column) -> None:
        """Append the batch's receipts with their hashes, unless the table holds them."""
        rows = receipts.select(*receipt_columns(), "payload", "schema_id", "partition", "offset", "kafka_timestamp", stamp)
        linked = self.chain.link(rows.withColumn("content_sha256", content_column()), batch_id)
        if linked is not None:
            app_id = self.checkpoint.app_id(tables.DECISIONS)
            lake.append(linked.rows, self._uri(tables.DECISIONS), app_id, batch_id, QUERY, linked.heads)
            self.chain.written()

    def _uri(self, table: str) -> str:
        return tables.table_uri(self.settings.tables, table)

    def _tile_job(self, batch_id: int, now_ms: int) -> TileJob:
        return TileJob(self.settings.redis, self.epoch, batch_id, now_ms, self.settings.redis_retry_s)

    def _restore_job(self, batch_id: int, now_ms: int, lost_at_ms: int) -> RestoreJob:
        return RestoreJob(self.settings.redis, self.epoch, batch_id, now_ms, lost_at_ms, self.settings.redis_retry_s)

    def _write_tiles(
        self, transactions: DataFrame | None, batch_id: int, now_ms: int, newest_ms: int, ingested_ms: int = 0
    ) -> None:
        """Add the batch to the tiles and say so, on a Redis that holds every batch before this one and stays up meanwhile.

        `ingested_ms` is when bronze read the batch's newest record. A Redis that restarts may have lost its latest writes, so what was
        written to it in this batch is written again; fences keep what survived. Raises `RedisUnavailableError`.
        """
        for _ in range(ATTEMPTS_MAX):
            run = self._verified_run(batch_id, now_ms)
            if transactions is not None:
                written, _ = write_tiles(transactions, self._tile_job(batch_id, now_ms), self.settings.spark_cores)
                self.metrics.entities.inc(written)
            whole = self._heads_made_whole(batch_id, now_ms, ingested_ms)
            if self._run_id() == run:
                self._write_progress(batch_id, newest_ms, whole)
                return
        raise RedisUnavailableError(f"Redis restarted {ATTEMPTS_MAX} times during one batch")

    def _verified_run(self, batch_id: int, now_ms: int) -> str:
        """The run id of a Redis that holds every batch before this one; it is rebuilt from Delta if it doesn't.

        It may have been emptied, or have come back from a snapshot older than our last batch.
        """
        run = self._run_id()
        held = self._get_progress()
        if held is not None and held.epoch == self.epoch and held.batch_id >= batch_id - 1:
            self.progress = held
        elif batch_id > 0:
            self.rebuild(batch_id - 1, now_ms)
        return run

    def _write_progress(self, batch_id: int, newest_ms: int, whole: bool = False) -> None:
        """`whole`: what was lost with Redis' heads is in them again."""
        before = self.progress if self.progress and self.progress.epoch == self.epoch else layout.Progress(self.epoch, -1, 0, 0)
        progress = layout.Progress(
            epoch=self.epoch,
            batch_id=batch_id,
            written_at_ms=time.time_ns() // 1_000_000,
            arrived_through_ms=max(before.arrived_through_ms, newest_ms),
            lost_at_ms=0 if whole else before.lost_at_ms,
            rebuilt_batch_id=-1 if whole else before.rebuilt_batch_id,
        )
        self._set_progress(progress)
        self.progress = progress

    def refresh_progress(self) -> None:
        """Say that the tiles are as new as can be, while nothing comes. Called by the supervisor when the stream has caught up.

        Says nothing when Redis is down or holds other progress than ours: the next batch looks into it.
        """
        try:
            held = self._get_progress(retry_s=0)
            # None of ours yet: a start after a stop, with nothing new to read.
            ours = self.progress or held
            if held is not None and ours is not None and (held.epoch, held.batch_id) == (self.epoch, ours.batch_id):
                self._set_progress(msgspec.structs.replace(held, written_at_ms=time.time_ns() // 1_000_000), retry_s=0)
        except RedisUnavailableError:
            log.warning("Redis doesn't answer")

    def _client(self) -> redis_client.Client:
        return redis_client.connect(self.settings.redis)

    def _run_id(self) -> str:
        def ask() -> str:
            with self._client() as client:
                return redis_client.run_id(client)

        return patient(ask, self.settings.redis_retry_s)

    def _get_progress(self, retry_s: float | None = None) -> layout.Progress | None:
        def get() -> layout.Progress | None:
            with self._client() as client:
                return redis_client.get_progress(client)

        return patient(get, self.settings.redis_retry_s if retry_s is None else retry_s)

    def _set_progress(self, progress: layout.Progress, retry_s: float | None = None) -> None:
        def put() -> None:
            with self._client() as client:
                redis_client.set_progress(client, progress)

        patient(put, self.settings.redis_retry_s if retry_s is None else retry_s)

    def rebuild(self, through_batch_id: int, now_ms: int) -> None:
        """Write every entity anew from Delta, as of the end of a batch. Under a new epoch, so that no old tile is built upon.

        Features are stale from here on, until `_heads_made_whole`. Raises `RedisUnavailableError`.
        """
        run = self._run_id()
        self.epoch = next_epoch(self.spark, self.settings, TILES, self.epoch)
        lost_at_ms = time.time_ns() // 1_000_000
        # Belongs to no batch: should this be interrupted, Redis still doesn't hold what it must.
        self.progress = layout.Progress(self.epoch, -1, lost_at_ms, 0, lost_at_ms, rebuilt_batch_id=through_batch_id)
        self._set_progress(self.progress)
        log.warning("Redis doesn't hold the tiles of batch %d: rebuilding it from Delta", through_batch_id)
        done = rebuild(self.spark, self.settings, self._restore_job(through_batch_id, now_ms, lost_at_ms))
        if self._run_id() != run:
            raise RedisUnavailableError("Redis restarted during the rebuild, and may have lost part of it")
        log.warning("Redis holds %d entities of %d transactions again", done.entities, done.transactions)
        self._write_progress(through_batch_id, done.newest_ms)
        self.metrics.rebuilds.inc()

    def _heads_made_whole(self, batch_id: int, now_ms: int, ingested_ms: int) -> bool:
        """After a loss, once every receipt from before it is here: put what the rebuild could not know yet into the heads too."""
        lost = self.progress
        if lost is None or lost.lost_at_ms == 0 or ingested_ms < lost.lost_at_ms + RECEIPTS_WITHIN_MS:
            return False
        job = self._restore_job(batch_id, now_ms, lost.lost_at_ms)
        done = rebuild_late(self.spark, self.settings, job, lost.rebuilt_batch_id)
        log.warning("Redis is whole again: late receipts of %d entities were restored", done.entities)
        return True
