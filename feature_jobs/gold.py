"""Stream 3: per entity and hour sums, and one row a transaction with its decision and the label that stands.

One query reads silver, decisions and labels, so that a batch holds what arrived of all three, in whatever order. The sums are appended,
a batch's beside those before: bringing the rows of an hour up to date would rewrite each time what the hour has grown to. `fraudgate
maintain` puts them together once the hour is over. The other table is written by MERGE. Both are fenced by (txnAppId, txnVersion), for
MERGE as session settings: a replayed batch adds nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from delta.exceptions import DeltaConcurrentModificationException
from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.streaming.readwriter import DataStreamWriter

from feature_jobs import lake
from feature_jobs.metrics import Metrics
from gateway.contracts import tables
from gateway.contracts.decision import Outcome
from gateway.contracts.features import ENTITIES
from gateway.contracts.label import SOURCES, STANDING, STATES
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import FIELDS

QUERY = "gold"
TXN_APP_ID = "spark.databricks.delta.write.txnAppId"
TXN_VERSION = "spark.databricks.delta.write.txnVersion"
USER_METADATA = "spark.databricks.delta.commitInfo.userMetadata"
# Bronze-sized bounds: what one batch reads of each of the three tables at most.
MAX_FILES = 1000
MERGE_ATTEMPTS = 5

log = logging.getLogger(__name__)

ENTITY_FIELDS = ("event_time_ms", *(e.field for e in ENTITIES))
DECISION_FIELDS = (
    "decision",
    "risk_score",
    "probability",
    "model_name",
    "model_version",
    "decided_at_ms",
    "route",
    "policy_decision",
    "propensity",
)
# Columns of gold_decisions by the columns of labels they come from.
LABEL_COLUMNS = {
    "is_fraud": "is_fraud",
    "label_source": "source",
    "label_state": "state",
    "reported_at_ms": "reported_at_ms",
    "label_effective_at_ms": "effective_at_ms",
}


@dataclass
class Gold:
    spark: SparkSession
    settings: Settings
    metrics: Metrics

    def __post_init__(self) -> None:
        self.checkpoint = lake.checkpoint(self.spark, self.settings, QUERY)

    def writer(self) -> DataStreamWriter:
        """The stream, not started yet and without a trigger."""
        sources = (
            self._stream(tables.SILVER, "t", (*FIELDS, "scored_by")),
            self._stream(tables.DECISIONS, "d", ("transaction_id", *ENTITY_FIELDS, *DECISION_FIELDS)),
            self._stream(tables.LABELS, "l", ("transaction_id", *LABEL_COLUMNS.values())),
        )
        rows = sources[0].unionByName(sources[1], allowMissingColumns=True).unionByName(sources[2], allowMissingColumns=True)
        return rows.writeStream.queryName(QUERY).option("checkpointLocation", self.checkpoint.uri).foreachBatch(self.write)

    def _stream(self, table: str, kind: str, columns: tuple[str, ...]) -> DataFrame:
        uri = tables.table_uri(self.settings.tables, table)
        reader = self.spark.readStream.format("delta").option("maxFilesPerTrigger", MAX_FILES)
        # Commits that change rows are those of fraudgate maintain and erase: they bring nothing new.
        stream = reader.option("skipChangeCommits", "true").load(uri)
        return stream.select(F.lit(kind).alias("kind"), "kafka_timestamp", F.struct(*columns).alias(kind))

    def write(self, batch: DataFrame, batch_id: int) -> None:
        started = time.monotonic()
        batch.persist()
        try:
            bounds = batch.agg(
                F.count("*").alias("rows"),
                F.count("t").alias("transactions"),
                F.count("l").alias("labels"),
                F.count_if(F.col("d.transaction_id").isNotNull() & F.col("d.event_time_ms").isNull()).alias("undated"),
                F.min(F.coalesce("t.event_time_ms", "d.event_time_ms")).alias("oldest_ms"),
                F.max(F.coalesce("t.event_time_ms", "d.event_time_ms")).alias("newest_ms"),
                F.unix_millis(F.min("kafka_timestamp")).alias("arrived_ms"),
            ).collect()[0]
            if not bounds["rows"]:
                return
            oldest_ms, newest_ms = bounds["oldest_ms"], bounds["newest_ms"]
            if oldest_ms is not None:
                self._append_entity_hours(batch, batch_id)
            if bounds["rows"] > bounds["labels"]:
                # Receipts without an event time, of an earlier version or of a person who was erased, are looked for everywhere.
                within = None if bounds["undated"] else _paid_between(oldest_ms, newest_ms)
                _whatever_else_commits(lambda: self._merge_decisions(batch, batch_id, within))
            if bounds["labels"]:
                _whatever_else_commits(lambda: self._merge_labels(batch, batch_id))
            self.metrics.rows.labels(tables.GOLD_DECISIONS).inc(bounds["transactions"])
            self.metrics.freshness_seconds.labels(QUERY).set(time.time() - bounds["arrived_ms"] / 1000)
        finally:
            batch.unpersist()
        self.metrics.batch(QUERY, time.monotonic() - started)

    def _append_entity_hours(self, batch: DataFrame, batch_id: int) -> None:
        """A row for each entity and hour that the batch has something of. What an hour comes to is the sum of its rows."""
        declined = F.lit(Outcome.DECLINE.value)
        events = (
            batch.where("kind = 't'")
            .select(
                *(F.col(f"t.{name}").alias(name) for name in ENTITY_FIELDS),
                F.lit(1).cast("bigint").alias("transactions"),
                F.col("t.amount_minor").alias("amount_minor"),
                F.lit(0).cast("bigint").alias("declined"),
                F.col("t.amount_minor").alias("largest_minor"),
            )
            .unionByName(
                batch.where((F.col("kind") == "d") & (F.col("d.decision") == declined)).select(
                    *(F.col(f"d.{name}").alias(name) for name in ENTITY_FIELDS),
                    F.lit(0).cast("bigint").alias("transactions"),
                    F.lit(0).cast("bigint").alias("amount_minor"),
                    F.lit(1).cast("bigint").alias("declined"),
                    F.lit(None).cast("bigint").alias("largest_minor"),
                )
            )
        )
        entity = F.explode(
            F.array(*(F.struct(F.lit(e.name).alias("entity"), F.col(e.field).alias("entity_id")) for e in ENTITIES))
        ).alias("e")
        hour = F.date_trunc("hour", F.timestamp_millis("event_time_ms")).alias("hour")
        sums = ("transactions", "amount_minor", "declined")
        parts = (
            events.select(entity, hour, *sums, "largest_minor")
            .where("e.entity_id is not null")
            .groupBy("e.entity", "e.entity_id", "hour")
            .agg(*(F.sum(name).alias(name) for name in sums), F.max("largest_minor").alias("largest_minor"))
            .withColumn("updated_at", F.current_timestamp())
        )
        name = tables.GOLD_ENTITY_HOUR
        lake.append(parts, tables.table_uri(self.settings.tables, name), self.checkpoint.app_id(name), batch_id, QUERY)

    def _merge_decisions(self, batch: DataFrame, batch_id: int, within: Column | None) -> None:
        """Transaction and decision each fill their own columns of the row, whichever comes first.

        `within` bounds the event times of the batch, so that only files of that time are read; None: they aren't known.
        """
        # Silver keeps a transaction_id apart from itself within its window only: a repetition after it may meet the first one here.
        one = ["transaction_id"]
        transactions = batch.where("kind = 't'").select("t.*", "kafka_timestamp").dropDuplicates(one)
        decisions = (
            batch.where("kind = 'd'")
            .select("d.transaction_id", F.col("d.event_time_ms").alias("paid_ms"), *(f"d.{name}" for name in DECISION_FIELDS))
            .dropDuplicates(one)
        )
        source = transactions.join(decisions, "transaction_id", "full")
        columns = (*(f for f in FIELDS if f != "transaction_id"), "scored_by", "kafka_timestamp", *DECISION_FIELDS)
        insert = {name: F.col(f"s.{name}") for name in ("transaction_id", *columns)}
        # A decision that comes first brings the time by which its transaction will look for the row.
        insert["event_time_ms"] = F.coalesce("s.event_time_ms", "s.paid_ms")
        update: dict[str, Column] = {name: F.coalesce(f"g.{name}", f"s.{name}") for name in columns}
        # The batch in which the transaction itself came, for freshness.
        stamp = F.when(F.col("s.event_time_ms").isNotNull(), lake.per_batch(batch_id, "s.event_time_ms"))
        insert["batch_id"] = stamp
        update["batch_id"] = F.coalesce(F.col("g.batch_id"), stamp)
        on = F.col("g.transaction_id") == F.col("s.transaction_id")
        on = on if within is None else on & within
        # Two merges, not one: that would put new rows into the files of those it updates, which the next one updates again, until each
        # batch rewrote the whole day.
        with self._fenced(batch.sparkSession, tables.GOLD_DECISIONS, batch_id, "late") as table:
            table.alias("g").merge(source.alias("s"), on).whenMatchedUpdate(set=update).execute()
        with self._fenced(batch.sparkSession, tables.GOLD_DECISIONS, batch_id) as table:
            table.alias("g").merge(source.alias("s"), on).whenNotMatchedInsert(values=insert).execute()

    def _merge_labels(self, batch: DataFrame, batch_id: int) -> None:
        """The strongest label stays. One that comes before its transaction waits in a row of its own, which has no event time yet."""
        strongest = Window.partitionBy("transaction_id").orderBy(F.desc("precedence"))
        source = (
            batch.where("kind = 'l'")
            .select("l.transaction_id", *(F.col(f"l.{source}").alias(name) for name, source in LABEL_COLUMNS.items()))
            .withColumn("precedence", label_precedence(""))
            .withColumn("place", F.row_number().over(strongest))
            .where("place = 1")
            .drop("place", "precedence")
        )
        stands = F.col("g.reported_at_ms").isNull() | (label_precedence("s.") > label_precedence("g."))
        values = {name: F.col(f"s.{name}") for name in LABEL_COLUMNS}
        with self._fenced(batch.sparkSession, tables.GOLD_DECISIONS, batch_id, "labels") as table:
            (
                table.alias("g")
                .merge(source.alias("s"), "g.transaction_id = s.transaction_id")
                .whenMatchedUpdate(condition=stands, set=values)
                .whenNotMatchedInsert(values={"transaction_id": F.col("s.transaction_id")} | values)
                .execute()
            )

    @contextmanager
    def _fenced(self, session: SparkSession, name: str, batch_id: int, part: str = "") -> Iterator[DeltaTable]:
        """The table to merge into, on the query's own session, with the fence and the commit's note set as session settings.

        What merges into one table more than once a batch names the `part`: each has a fence of its own.
        """
        chosen = {
            TXN_APP_ID: self.checkpoint.app_id(f"{name}-{part}" if part else name),
            TXN_VERSION: str(batch_id),
            USER_METADATA: lake.commit_note(QUERY, batch_id),
        }
        for key, value in chosen.items():
            session.conf.set(key, value)
        try:
            yield DeltaTable.forPath(session, tables.table_uri(self.settings.tables, name))
        finally:
            for key in chosen:
                session.conf.unset(key)


def _paid_between(oldest_ms: int, newest_ms: int) -> Column:
    """Rows of the batch's own time, and those that have only a label so far."""
    return F.col("g.event_time_ms").isNull() | F.col("g.event_time_ms").between(oldest_ms, newest_ms)


def label_precedence(prefix: str) -> Column:
    """contracts.label.precedence of the LABEL_COLUMNS behind `prefix`: structs compare as tuples do."""
    word = F.concat_ws("/", F.col(f"{prefix}label_source"), F.col(f"{prefix}label_state"))
    reported = F.col(f"{prefix}reported_at_ms")
    return F.struct(
        _place(word, {f"{source}/{state}": n for (source, state), n in STANDING.items()}).alias("standing"),
        F.coalesce(F.col(f"{prefix}label_effective_at_ms"), reported).alias("holds_ms"),
        reported.alias("reported_ms"),
        _place(F.col(f"{prefix}label_source"), {name: n for n, name in enumerate(SOURCES)}).alias("source"),
        _place(F.col(f"{prefix}label_state"), {name: n for n, name in enumerate(STATES)}).alias("state"),
        F.col(f"{prefix}is_fraud").alias("is_fraud"),
    )


def _place(column: Column, numbers: Mapping[str, int]) -> Column:
    """The number of a text, -1 for one that has none."""
    pairs = F.create_map(*(F.lit(x) for pair in numbers.items() for x in pair))
    return F.coalesce(F.try_element_at(pairs, column), F.lit(-1))


def _whatever_else_commits(merge: Callable[[], None]) -> None:
    """Merges again when files that it read were rewritten meanwhile (fraudgate maintain, erase). The fence keeps it from adding twice."""
    for attempt in range(MERGE_ATTEMPTS):
        try:
            merge()
        except DeltaConcurrentModificationException:
            if attempt == MERGE_ATTEMPTS - 1:
                raise
            log.warning("gold: files were rewritten during a merge; it is done again")
        else:
            return
