"""Stream 4: labels become frauds by hour of payment, for each customer and merchant, in Redis.

Inside a batch: the table `label_changes` first, then Redis, then the progress record. The table is the only truth: values in Redis are
made from its rows, so a kill between any two steps is repaired by the replay, and a Redis that lost data is filled anew. A label whose
payment isn't in silver yet waits, and is tried again with the next batches.
"""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from dataclasses import dataclass

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming.readwriter import DataStreamWriter

from feature_jobs import lake
from feature_jobs.label_changes import KNOWN_COLUMNS, LABEL_SCHEMA, PAYMENT_COLUMNS, changes_of, places, tags_of
from feature_jobs.label_values import ValueJob, write_some_values, write_values
from feature_jobs.metrics import Metrics
from feature_jobs.redis_client import connect, run_id
from feature_jobs.silver import ATTEMPTS_MAX, CheckpointLostError
from feature_jobs.tiles import RedisUnavailableError, patient
from gateway.contracts import layout, tables
from gateway.contracts.layout import LabelsProgress
from gateway.contracts.settings import Settings
from gateway.contracts.windows import DAY_MS

QUERY = "labels"
# Where the epoch of the values is kept when it isn't the checkpoint's own any more.
VALUES = f"{QUERY}/values"
# What one batch reads of `labels`: about a hundred thousand, which the driver holds.
BATCH_BYTES_MAX = "2m"
# Most labels that wait for their payment; the newest stay.
WAITING_MAX = 50_000
# Label changes that one Python worker holds at a time when values are rebuilt, at most: by entity and day they are fewer.
REBUILD_ROWS_PER_PARTITION = 500_000
NO_BATCH = -1

log = logging.getLogger(__name__)


@dataclass
class Labels:
    """The state of the stream between its batches. `restore` is called by the supervisor, from another thread."""

    spark: SparkSession
    settings: Settings
    metrics: Metrics

    def __post_init__(self) -> None:
        self.checkpoint = lake.checkpoint(self.spark, self.settings, QUERY)
        held = None if self.checkpoint.fresh else lake.load_epoch(self.spark, self.settings, VALUES)
        self.epoch = held or self.checkpoint.epoch
        # The newest batch that was begun, as far as is known, and the newest that is known to be in Redis too.
        self.newest_batch_id = _newest_batch_id(_label_changes(self.spark, self.settings))
        self.written_batch_id = self.newest_batch_id - 1
        # LABEL_SCHEMA; None until the first batch has looked for them.
        self.waiting: pa.Table | None = None
        self._lock = threading.Lock()

    def writer(self) -> DataStreamWriter:
        """The stream, not started yet and without a trigger. Raises `CheckpointLostError`."""
        if self.checkpoint.fresh and self.newest_batch_id != NO_BATCH:
            raise CheckpointLostError(
                f"{self._uri(tables.LABEL_CHANGES)} has rows and {self.checkpoint.uri} is gone: remove that table too"
            )
        reader = self.spark.readStream.format("delta").option("maxBytesPerTrigger", BATCH_BYTES_MAX)
        # Commits that change rows are those of fraudgate maintain and erase: they bring nothing new.
        stream = reader.option("skipChangeCommits", "true").load(self._uri(tables.LABELS))
        return stream.writeStream.queryName(QUERY).option("checkpointLocation", self.checkpoint.uri).foreachBatch(self.write)

    def write(self, batch: DataFrame, batch_id: int) -> None:
        started = time.monotonic()
        with self._lock:
            self._write(batch, batch_id)
        self.metrics.batch(QUERY, time.monotonic() - started)

    def _write(self, batch: DataFrame, batch_id: int) -> None:
        came = batch.select(*LABEL_SCHEMA.names, "batch_id").toArrow()
        rows = self._applied_before(batch_id) if batch_id <= self.newest_batch_id else None
        if rows is None and came.num_rows:
            rows = self._apply(came, batch_id)
        self.newest_batch_id = max(self.newest_batch_id, batch_id)
        self._write_values([] if rows is None else tags_of(rows), batch_id)
        self.written_batch_id = max(self.written_batch_id, batch_id)
        if came.num_rows:
            oldest: dt.datetime = pc.min(came["kafka_timestamp"]).as_py()
            self.metrics.freshness_seconds.labels(QUERY).set(time.time() - oldest.timestamp())

    def _applied_before(self, batch_id: int) -> pa.Table | None:
        """The rows of a batch whose first try came as far as the table, else None: a replay must not work them out once more."""
        rows = _label_changes(self.spark, self.settings).where(F.col("batch_id") == batch_id).toArrow()
        return rows if rows.num_rows else None

    def _apply(self, came: pa.Table, batch_id: int) -> pa.Table:
        """Append what the batch's labels, and those that wait, change. The appended rows."""
        new = came.select(LABEL_SCHEMA.names).cast(LABEL_SCHEMA)
        waiting = self._find_waiting(came) if self.waiting is None else self.waiting
        labels = pa.concat_tables([new, waiting])
        rows, unmatched = changes_of(labels, *self._lookup(labels))
        if rows.num_rows:
            now_ms = time.time_ns() // 1_000_000
            frame = self.spark.createDataFrame(rows).select(
                "*", lake.per_batch(now_ms, "place").alias("applied_at_ms"), lake.per_batch(batch_id, "place").alias("batch_id")
            )
            app_id = self.checkpoint.app_id(tables.LABEL_CHANGES)
            lake.append(frame, self._uri(tables.LABEL_CHANGES), app_id, batch_id, QUERY)
            self.metrics.rows.labels(tables.LABEL_CHANGES).inc(rows.num_rows)
        self.metrics.labels_unmatched.inc(len(places(unmatched) & places(new)))
        since = pa.scalar(self._retried_since(), pa.timestamp("us", "UTC"))
        recent = unmatched.filter(pc.greater_equal(unmatched["kafka_timestamp"], since))
        self.waiting = recent.sort_by([("kafka_timestamp", "descending")]).slice(0, WAITING_MAX)
        self.metrics.labels_waiting.set(self.waiting.num_rows)
        return rows

    def _lookup(self, labels: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Payments of the labels in silver, and what label_changes knows of them."""
        ids = F.broadcast(self.spark.createDataFrame(pa.table({"transaction_id": pc.unique(labels["transaction_id"])})))
        # Whole days: a number that differs from batch to batch makes each batch compile its own code.
        first_ms = (pc.min(labels["reported_at_ms"]).as_py() // DAY_MS - self.settings.labels_payment_days) * DAY_MS
        silver = self._read(tables.SILVER).where(F.col("event_time_ms") >= first_ms)
        known = _label_changes(self.spark, self.settings)
        return (
            silver.select(*PAYMENT_COLUMNS).join(ids, "transaction_id", "left_semi").toArrow(),
            known.select(*KNOWN_COLUMNS).join(ids, "transaction_id", "left_semi").toArrow(),
        )

    def _find_waiting(self, came: pa.Table) -> pa.Table:
        """Labels of earlier batches that no batch could match, as after a restart. Of what is still to come, none."""
        since = F.lit(self._retried_since())
        earlier = self._read(tables.LABELS).where(
            (F.col("kafka_timestamp") >= since) & (F.col("batch_id") < pc.min(came["batch_id"]).as_py())
        )
        applied = _label_changes(self.spark, self.settings).where(F.col("kafka_timestamp") >= since)
        found = (
            earlier.select(*LABEL_SCHEMA.names)
            .join(applied.select("partition", "offset"), ["partition", "offset"], "left_anti")
            .select(*LABEL_SCHEMA.names)
            .orderBy(F.desc("kafka_timestamp"))
            .limit(WAITING_MAX)
        )
        return found.toArrow().cast(LABEL_SCHEMA)

    def _retried_since(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) - dt.timedelta(days=self.settings.labels_retry_days)

    def _write_values(self, tags: list[str], batch_id: int) -> None:
        """Write the entities `tags` and say so, on a Redis that holds every batch before this one and stays up meanwhile.

        As in silver: a Redis that restarts may have lost its latest writes. Raises `RedisUnavailableError`.
        """
        for _ in range(ATTEMPTS_MAX):
            run = self._run_id()
            held = _get_progress(self.settings)
            if batch_id > 0 and not self._fits(held, batch_id - 1):
                self._rebuild(batch_id - 1)
            if tags:
                changes = _label_changes(self.spark, self.settings)
                until_now = changes.where(F.col("batch_id") <= lake.per_batch(batch_id, "batch_id"))
                job = ValueJob(self.settings.redis, self.epoch, batch_id, self.settings.redis_retry_s)
                frame = self.spark.createDataFrame(pa.table({"tag": tags}))
                self.metrics.label_values.inc(write_some_values(until_now, job, frame))
            if self._run_id() == run:
                if not self._fits(held, batch_id):
                    _set_progress(self.settings, LabelsProgress(self.epoch, batch_id))
                return
        raise RedisUnavailableError(f"Redis restarted {ATTEMPTS_MAX} times during one batch")

    def _fits(self, held: LabelsProgress | None, batch_id: int) -> bool:
        return held is not None and held.epoch == self.epoch and held.batch_id >= batch_id

    def restore(self) -> None:
        """Fill a Redis that lost its data while no labels come. Called by the supervisor; a batch that is running does it itself.

        Does nothing while Redis is down. Takes as long as the rebuild.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self.newest_batch_id != NO_BATCH:
                held = _get_progress(self.settings, retry_s=0)
                if not self._fits(held, max(0, self.written_batch_id)):
                    self._rebuild(self.newest_batch_id)
        except (RedisUnavailableError, PySparkException) as exc:
            log.warning("frauds could not be restored in Redis, the next look tries again: %s", exc)
        finally:
            self._lock.release()

    def _rebuild(self, through_batch_id: int) -> None:
        """Under a new epoch, so that values of a Redis that came back from an old snapshot don't pass for newer ones."""
        self.epoch = self.epoch % 0xFFFFFFFF + 1
        lake.save_epoch(self.spark, self.settings, VALUES, self.epoch)
        log.warning("Redis doesn't hold the frauds of batch %d: rebuilding them from the label changes", through_batch_id)
        self.metrics.label_values.inc(rebuild_labels(self.spark, self.settings, self.epoch, through_batch_id))
        self.metrics.label_rebuilds.inc()

    def _run_id(self) -> str:
        def ask() -> str:
            with connect(self.settings.redis) as client:
                return run_id(client)

        return patient(ask, self.settings.redis_retry_s)

    def _uri(self, table: str) -> str:
        return tables.table_uri(self.settings.tables, table)

    def _read(self, table: str) -> DataFrame:
        return self.spark.read.format("delta").load(self._uri(table))


def rebuild_labels(
    spark: SparkSession, settings: Settings, epoch: int, through_batch_id: int, max_batch_time: dt.datetime | None = None
) -> int:
    """Write the frauds of every entity anew from label_changes, as of the end of a batch; the progress record last. Entities written.

    With `max_batch_time` only batches that were applied by then count. The epoch must be a new one: what is there of the same epoch and
    batch stays as it is. Entities without a row are left alone: as of an earlier time, begin with an empty Redis. Running streams
    rebuild once more unless the epoch is saved as theirs (`lake.save_epoch`, VALUES).
    """
    changes = _label_changes(spark, settings).where(F.col("batch_id") <= through_batch_id)
    through = through_batch_id
    if max_batch_time is not None:
        changes = changes.where(F.col("applied_at_ms") <= int(max_batch_time.timestamp() * 1000))
        through = _newest_batch_id(changes)
    rows = changes.count()
    job = ValueJob(settings.redis, epoch, through, settings.redis_retry_s)
    written = 0
    if rows:
        written = write_values(changes, job, max(1, rows // REBUILD_ROWS_PER_PARTITION))
    _set_progress(settings, LabelsProgress(epoch, through))
    return written


def rebuild_by_hand(spark: SparkSession, settings: Settings, as_of_ms: int | None) -> int:
    """What `fraudgate rebuild` does for label features, as of now or of a time; no jobs may run. Entities written."""
    held = lake.load_epoch(spark, settings, VALUES) or lake.load_epoch(spark, settings, QUERY) or 0
    epoch = held % 0xFFFFFFFF + 1
    lake.save_epoch(spark, settings, VALUES, epoch)
    as_of = None if as_of_ms is None else dt.datetime.fromtimestamp(as_of_ms / 1000, dt.UTC)
    return rebuild_labels(spark, settings, epoch, _newest_batch_id(_label_changes(spark, settings)), as_of)


def _label_changes(spark: SparkSession, settings: Settings) -> DataFrame:
    return spark.read.format("delta").load(tables.table_uri(settings.tables, tables.LABEL_CHANGES))


def _newest_batch_id(changes: DataFrame) -> int:
    newest = changes.agg(F.max("batch_id").alias("newest")).collect()[0]["newest"]
    return NO_BATCH if newest is None else int(newest)


def _get_progress(settings: Settings, retry_s: float | None = None) -> LabelsProgress | None:
    def get() -> LabelsProgress | None:
        with connect(settings.redis) as client:
            held = client.get(layout.LABELS_PROGRESS_KEY)
        return None if held is None else msgspec.msgpack.decode(held, type=LabelsProgress)

    return patient(get, settings.redis_retry_s if retry_s is None else retry_s)


def _set_progress(settings: Settings, progress: LabelsProgress) -> None:
    def put() -> None:
        with connect(settings.redis) as client:
            client.set(layout.LABELS_PROGRESS_KEY, msgspec.msgpack.encode(progress))

    patient(put, settings.redis_retry_s)
