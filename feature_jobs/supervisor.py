"""One driver process, four queries, drift and bursts: starts them, restarts what fails, stops them gracefully, reports progress."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql.streaming.query import StreamingQuery
from pyspark.sql.streaming.readwriter import DataStreamWriter

from feature_jobs import bronze, burst_stream, drift, gold, labels, lake, silver
from feature_jobs.alert_topic import AlertsUnavailableError
from feature_jobs.burst_stream import Bursts
from feature_jobs.drift import COMMITS_A_LOOK, Drift
from feature_jobs.labels import Labels
from feature_jobs.metrics import Metrics
from feature_jobs.probes import Health
from feature_jobs.schemas import SchemaBook, schema_book
from feature_jobs.silver import CheckpointLostError, SchemasChangedError, Silver
from feature_jobs.tail import READ_ERRORS
from gateway.contracts.registry import RegistryUnavailableError
from gateway.contracts.settings import Settings

log = logging.getLogger(__name__)

# Drift and bursts are no Spark queries: they follow the table that silver writes.
QUERIES = (bronze.QUERY, silver.QUERY, gold.QUERY, labels.QUERY, drift.QUERY, burst_stream.QUERY)
LOOK_S = 0.25
BACKOFF_S_MIN = 1.0
BACKOFF_S_MAX = 30.0
# Failures in a row, without a completed batch between them, after which the process ends, so that its own supervisor starts it anew.
FAILURES_MAX = 20
# How long a stop waits for running batches. An interrupted batch is replayed at the next start.
DRAIN_S_MAX = 20.0
PROGRESS_REFRESH_S = 2.0
RESTORE_S = 5.0
# How often followers look when they have caught up, by name.
FOLLOW_S = {drift.QUERY: 5.0, burst_stream.QUERY: 1.0}
FOLLOW_ERRORS = (*READ_ERRORS, AlertsUnavailableError, RegistryUnavailableError)
assert COMMITS_A_LOOK == burst_stream.COMMITS_A_LOOK


class GaveUpError(RuntimeError):
    """A query failed `FAILURES_MAX` times in a row."""


@dataclass
class Runner:
    """One query and what became of it. `make` gives the writer anew for each start."""

    name: str
    make: Callable[[], DataStreamWriter]
    trigger_ms: int
    query: StreamingQuery | None = None
    failures: int = 0
    retry_at: float = 0.0
    reported: str = ""
    batch_seen: int = -1


@dataclass
class Follower:
    """What follows a table without Spark; `follow` reads what has come, at most COMMITS_A_LOOK commits, and returns how many."""

    name: str
    follow: Callable[[], int]
    at: float = 0.0


class Supervisor:
    """`run` returns when `stop` is set; `run_once` when everything that is there now has been processed."""

    def __init__(self, spark: SparkSession, settings: Settings, metrics: Metrics, queries: tuple[str, ...], health: Health) -> None:
        self._spark = spark
        self._settings = settings
        self._metrics = metrics
        self._health = health
        self._schemas: SchemaBook | None = None
        self._silver: Silver | None = None
        self._labels: Labels | None = None
        self._refreshed_at = 0.0
        self._restored_at = 0.0
        follow: dict[str, Callable[[], int]] = {
            drift.QUERY: Drift(settings, metrics).follow,
            burst_stream.QUERY: Bursts(settings, metrics).follow,
        }
        self._followers = [Follower(name, follow[name]) for name in QUERIES if name in queries and name in follow]
        self.stop = threading.Event()
        makers = {
            bronze.QUERY: self._make_bronze,
            silver.QUERY: self._make_silver,
            gold.QUERY: self._make_gold,
            labels.QUERY: self._make_labels,
        }
        triggers = {
            bronze.QUERY: settings.bronze_trigger_ms,
            silver.QUERY: settings.silver_trigger_ms,
            gold.QUERY: settings.gold_trigger_ms,
            labels.QUERY: settings.labels_trigger_ms,
        }
        self._runners = [Runner(name, makers[name], triggers[name]) for name in QUERIES if name in queries and name in makers]
        lake.create_tables(spark, settings)

    def _make_bronze(self) -> DataStreamWriter:
        return bronze.writer(self._spark, self._settings, self._metrics)

    def _make_silver(self) -> DataStreamWriter:
        if self._schemas is None:
            self._schemas = schema_book(self._settings)
        self._silver = Silver(self._spark, self._settings, self._schemas, self._metrics)
        return self._silver.writer()

    def _make_gold(self) -> DataStreamWriter:
        return gold.Gold(self._spark, self._settings, self._metrics).writer()

    def _make_labels(self) -> DataStreamWriter:
        self._labels = Labels(self._spark, self._settings, self._metrics)
        return self._labels.writer()

    def run(self) -> None:
        """Until `stop` is set. Raises `GaveUpError`, and `CheckpointLostError`, which no restart repairs."""
        try:
            while not self.stop.wait(LOOK_S):
                for runner in self._runners:
                    self._look_after(runner)
                self._refresh_progress()
                self._restore_labels()
                self._follow()
                self._health.beat({r.name: r.query is not None and r.query.isActive for r in self._runners})
        finally:
            self._drain()

    def run_once(self) -> None:
        """Each query in turn, through everything that was there when it started. Raises as `run` does."""
        for runner in self._runners:
            while not self.stop.is_set():
                if time.monotonic() < runner.retry_at:
                    self.stop.wait(LOOK_S)
                    continue
                self._start(runner, once=True)
                query = runner.query
                if query is None:
                    continue
                try:
                    query.awaitTermination()
                except PySparkException as exc:
                    self._failed(runner, exc)
                    continue
                self._note_progress(runner)
                break
        self._follow_through()

    def _look_after(self, runner: Runner) -> None:
        query = runner.query
        if query is None:
            if time.monotonic() >= runner.retry_at:
                self._start(runner)
            return
        self._note_progress(runner)
        if query.isActive:
            return
        self._failed(runner, query.exception() or RuntimeError("the query ended by itself"))

    def _start(self, runner: Runner, once: bool = False) -> None:
        # Streams inherit the pool of the thread that starts them.
        self._spark.sparkContext.setLocalProperty("spark.scheduler.pool", runner.name)
        try:
            writer = runner.make()
            trigger = (
                writer.trigger(availableNow=True) if once else writer.trigger(processingTime=f"{runner.trigger_ms} milliseconds")
            )
            runner.query = trigger.start()
        except (PySparkException, RegistryUnavailableError) as exc:
            self._failed(runner, exc)
            return
        self._metrics.up.labels(runner.name).set(1)

    def _failed(self, runner: Runner, exc: Exception) -> None:
        """Plan the next start. The error is logged in full when it is new, in a word when it is the same again."""
        runner.query = None
        self._metrics.up.labels(runner.name).set(0)
        text = str(exc)
        if SchemasChangedError.__name__ in text:
            log.info("%s: the registry has a new schema; starting again with it", runner.name)
            return
        if isinstance(exc, CheckpointLostError):
            raise exc
        runner.failures += 1
        self._metrics.restarts.labels(runner.name).inc()
        if runner.failures >= FAILURES_MAX:
            raise GaveUpError(f"{runner.name} failed {runner.failures} times in a row: {text}")
        wait_s = min(BACKOFF_S_MAX, BACKOFF_S_MIN * 2 ** (runner.failures - 1))
        runner.retry_at = time.monotonic() + wait_s
        if text == runner.reported:
            log.warning("%s failed the same way again; next try in %.0f s", runner.name, wait_s)
        else:
            log.error("%s failed, next try in %.0f s: %s", runner.name, wait_s, text)
            runner.reported = text

    def _note_progress(self, runner: Runner) -> None:
        """Metrics from Spark's own account of the newest batch."""
        assert runner.query is not None
        progress: Any = runner.query.lastProgress
        if progress is None or progress["batchId"] == runner.batch_seen or not progress["numInputRows"]:
            return
        runner.batch_seen = progress["batchId"]
        runner.failures, runner.reported = 0, ""
        if runner.name == bronze.QUERY:
            self._metrics.rows.labels("bronze").inc(progress["numInputRows"])
            behind = progress["sources"][0]["metrics"].get("maxOffsetsBehindLatest")
            if behind is not None:
                self._metrics.lag.set(float(behind))
        for operator in progress["stateOperators"]:
            self._metrics.state_rows.labels(runner.name).set(operator["numRowsTotal"])
            self._metrics.state_memory.labels(runner.name).set(operator["memoryUsedBytes"])
            self._metrics.duplicates.inc(operator["customMetrics"].get("numDroppedDuplicateRows", 0))
            late = operator["numRowsDroppedByWatermark"]
            if late:
                self._metrics.late.inc(late)
                log.error("%s dropped %d records behind its watermark: the clock of this machine was set back", runner.name, late)

    def _refresh_progress(self) -> None:
        """While nothing comes, the tiles don't grow old: say so to the gateway."""
        now = time.monotonic()
        if self._silver is None or now - self._refreshed_at < PROGRESS_REFRESH_S:
            return
        query = next(r.query for r in self._runners if r.name == silver.QUERY)
        if query is None or not query.isActive:
            return
        status: Any = query.status
        if not status["isDataAvailable"] and not status["isTriggerActive"]:
            self._refreshed_at = now
            self._silver.refresh_progress()

    def _restore_labels(self) -> None:
        """While no labels come, a Redis that was emptied gets their values back."""
        now = time.monotonic()
        if self._labels is not None and now - self._restored_at >= RESTORE_S:
            self._restored_at = now
            self._labels.restore()

    def _follow(self) -> None:
        """Receipts that have come since the last look. What can't be read or written now is tried again: nothing else waits for it."""
        for follower in self._followers:
            now = time.monotonic()
            if now < follower.at:
                continue
            try:
                read = follower.follow()
            except FOLLOW_ERRORS as exc:
                self._metrics.restarts.labels(follower.name).inc()
                self._metrics.up.labels(follower.name).set(0)
                follower.at = now + BACKOFF_S_MAX
                log.warning("%s: next try in %.0f s: %s", follower.name, BACKOFF_S_MAX, exc)
                continue
            self._metrics.up.labels(follower.name).set(1)
            # A backlog is read without pauses, a part at a time.
            follower.at = now if read == COMMITS_A_LOOK else now + FOLLOW_S[follower.name]

    def _follow_through(self) -> None:
        """All receipts that are there. What can't be read or written now is made up for by the next start."""
        for follower in self._followers:
            try:
                while not self.stop.is_set() and follower.follow():
                    pass
            except FOLLOW_ERRORS as exc:
                self._metrics.restarts.labels(follower.name).inc()
                log.error("%s: the receipts that are left wait for the next start: %s", follower.name, exc)  # noqa: TRY400

    def _drain(self) -> None:
        """Let running batches end, within `DRAIN_S_MAX`, then stop the queries."""
        give_up = time.monotonic() + DRAIN_S_MAX
        for runner in self._runners:
            query = runner.query
            if query is None:
                continue
            try:
                while query.isActive and query.status["isTriggerActive"] and time.monotonic() < give_up:
                    time.sleep(0.05)
                query.stop()
            except (PySparkException, Py4JError) as exc:
                log.warning("%s did not stop cleanly, its last batch will be replayed: %s", runner.name, exc)
