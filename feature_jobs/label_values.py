"""Frauds by hour of payment to Redis: an entity's value is made anew from all its rows of `label_changes`, so the table is the only truth.

Spark adds up the rows by entity and day; then a value an entity is packed and written in one atomic step, fenced by (epoch, batch id): a
replay of the batch changes nothing. A batch's few entities are written by the driver, a rebuild's many by Python workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from redis.exceptions import NoScriptError

from feature_jobs.label_changes import LABELLED_ENTITIES
from feature_jobs.redis_client import PIPELINE_COMMANDS_MAX, Client, connect, pipelined
from feature_jobs.tiles import patient
from gateway.contracts import layout
from gateway.contracts.features import ENTITY_INDEX
from gateway.contracts.windows import HOUR_MS, LABELLED_RETENTION_MS

LABELS_SHA = hashlib.sha1(layout.LABELS_LUA.encode(), usedforsecurity=False).hexdigest()
OUTPUT_DDL = "written bigint, unchanged bigint"

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ValueJob:
    """What a worker needs to know of the batch."""

    redis_url: str
    epoch: int
    batch_id: int
    retry_s: int


@dataclass(frozen=True)
class Hours:
    """Sums of some entities' label changes by day, sorted by (owner, day); `owner` indexes `tags` ("merchant:x"), (rows,) each."""

    tags: list[str]
    owner: Int64s
    hour: Int64s
    frauds: Int64s
    changes: Int64s


def write_values(changes: DataFrame, job: ValueJob, partitions: int) -> int:
    """Write every entity anew from `changes`, all rows of label_changes up to the job's batch; entities written.

    In Python workers, one call a partition; `partitions` bounds a worker's memory.
    """
    # One shuffle serves both: the sums by (tag, hour), and all hours of an entity in one partition.
    hours = _sums(explode_entities(changes).repartition(partitions, "tag"))
    return sum(r["written"] for r in hours.mapInArrow(write_partition(job), OUTPUT_DDL).collect())


def write_some_values(changes: DataFrame, job: ValueJob, tags: DataFrame) -> int:
    """Like `write_values`, of the entities in `tags` (one column, tag) only: those of one batch, few enough for the driver itself."""
    hours = _sums(explode_entities(changes).join(F.broadcast(tags), "tag", "left_semi"))
    return write_hours(hours.toArrow().to_batches(), job)[0]


def explode_entities(changes: DataFrame) -> DataFrame:
    """One row for each labelled entity of a row with a change: tag, hour, change."""
    entities = F.array(*(F.concat(F.lit(f"{e.name}:"), F.col(e.field)) for e in LABELLED_ENTITIES))
    return changes.where("change <> 0").select(
        F.explode(F.array_compact(entities)).alias("tag"), F.expr(f"event_time_ms div {HOUR_MS}").alias("hour"), "change"
    )


def _sums(rows: DataFrame) -> DataFrame:
    return rows.groupBy("tag", "hour").agg(F.sum("change").alias("frauds"), F.count("*").alias("changes"))


def write_partition(job: ValueJob) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """The worker's side: all hours of an entity are in one partition."""

    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        written, unchanged = write_hours(list(batches), job)
        yield pa.RecordBatch.from_pydict({"written": pa.array([written]), "unchanged": pa.array([unchanged])})

    return write


def write_hours(batches: list[pa.RecordBatch], job: ValueJob) -> tuple[int, int]:
    """(entities written, entities that had this batch or a later one already). Raises `RedisUnavailableError`."""
    hours = read_hours(batches)
    calls = [
        ("EVALSHA", LABELS_SHA, 1, layout.labels_key(*tag.split(":", 1)), value, layout.TILES_TTL_MS)
        for tag, value in zip(hours.tags, values_of(hours, job.epoch, job.batch_id), strict=True)
    ]
    written = 0
    if calls:
        with patient(lambda: connect(job.redis_url), job.retry_s) as client:
            for first in range(0, len(calls), PIPELINE_COMMANDS_MAX):
                written += _run_patiently(client, calls[first : first + PIPELINE_COMMANDS_MAX], job.retry_s)
    return written, len(calls) - written


def read_hours(batches: list[pa.RecordBatch]) -> Hours:
    batches = [b for b in batches if b.num_rows]
    if not batches:
        none = np.zeros(0, np.int64)
        return Hours([], none, none, none, none)
    table = pa.Table.from_batches(batches).combine_chunks()
    tags = table["tag"].combine_chunks().dictionary_encode()
    owner = tags.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    hour, frauds, changes = (table[name].to_numpy().astype(np.int64) for name in ("hour", "frauds", "changes"))
    order = np.lexsort((hour, owner))
    return Hours(tags.dictionary.to_pylist(), owner[order], hour[order], frauds[order], changes[order])


def values_of(hours: Hours, epoch: int, batch_id: int) -> list[bytes]:
    """The packed value of each of `hours.tags`.

    Left out are hours without frauds and hours that are older than LABELLED_RETENTION_MS behind the entity's newest hour. That one stays in
    any case: so the value follows from the rows alone, not from the order in which hours were dropped.
    """
    edges = np.searchsorted(hours.owner, np.arange(len(hours.tags) + 1))
    newest = np.repeat(hours.hour[edges[1:] - 1], np.diff(edges))
    kept = ((newest - hours.hour) * HOUR_MS <= LABELLED_RETENTION_MS) & ((hours.frauds != 0) | (hours.hour == newest))
    changes = np.add.reduceat(hours.changes, edges[:-1]).tolist()
    records = np.zeros(len(hours.hour), layout.FRAUD_HOUR)
    records["hour"] = hours.hour
    records["frauds"] = np.clip(hours.frauds, 0, layout.COUNT_MAX)
    values = []
    for i, tag in enumerate(hours.tags):
        entity, entity_id = tag.split(":", 1)
        mine = slice(edges[i], edges[i + 1])
        check = layout.key_check(entity, entity_id)
        values.append(layout.pack_frauds(ENTITY_INDEX[entity], check, batch_id, epoch, changes[i], records[mine][kept[mine]]))
    return values


def _run_patiently(client: Client, calls: Sequence[tuple[object, ...]], retry_s: int) -> int:
    """The sum of the replies, again while Redis is down or starting: what the first try wrote, its fence protects."""

    def run() -> int:
        try:
            return int(sum(pipelined(client, calls)))
        except NoScriptError:
            client.script_load(layout.LABELS_LUA)
            return int(sum(pipelined(client, calls)))

    return patient(run, retry_s)
