"""Windowed sums to Redis: each micro-batch's new transactions are added to the tiles of their entities.

`explode_entities` runs in the JVM; `merge_into_redis` in Python workers, one call a partition, vectorised over its entities. Every
entity's write is one atomic step (contracts.layout.MERGE_LUA), fenced by (epoch, batch id): a replay of the batch, by this driver or
by a zombie of it, finds the batch's id in the entity's header and changes nothing.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from redis.exceptions import BusyLoadingError, NoScriptError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from feature_jobs.redis_wire import Bulk, Command, connected
from gateway.contracts import layout, tiles
from gateway.contracts.features import ENTITIES, ENTITY_INDEX
from gateway.contracts.windows import HEAD_RETENTION_MS

# Entities merged at once, and how many such groups are under way: bounds a worker's memory at about 50 MB of tiles. With several
# under way, Redis works on one while the worker adds up another.
OWNERS_MAX = 2048
GROUPS_MAX = 3
# Of the events that one batch adds to one entity, only the newest that a head or the early list can hold need to be looked for.
HASHES_MAX = layout.EARLY_MAX
assert HASHES_MAX >= 2 * max(e.head_events_max for e in ENTITIES)
MERGE_SHA = hashlib.sha1(layout.MERGE_LUA.encode(), usedforsecurity=False).hexdigest()
PAIRS = np.array([e.pairs for e in ENTITIES])
ENTITY_LABELLED = np.array([e.labelled for e in ENTITIES])
BACKOFF_S_MAX = 2.0

DIMS = ("dim_a", "dim_b", "dim_c")
OUTPUT_DDL = "written bigint, unchanged bigint"

# The script is loaded with each connection, so that one that isn't there any more asks for a new connection.
_RETRIED = (RedisConnectionError, RedisTimeoutError, BusyLoadingError, NoScriptError)

# Yields commands and is sent their replies, twice; returns how many entities it wrote.
Steps = Generator[list[Command], list[Any], int]


class RedisUnavailableError(RuntimeError):
    """Redis did not answer within the setting `redis_retry_s`; the batch fails and is replayed."""


@dataclass(frozen=True)
class TileJob:
    """What a worker needs to know of the batch. `now_ms` is the wall clock when the batch began."""

    redis_url: str
    epoch: int
    batch_id: int
    now_ms: int
    retry_s: int


@dataclass
class Events:
    """Events of a partition, one row each; `owner` indexes `tags` ("card:abc")."""

    tags: list[str]
    owner: npt.NDArray[np.int64]
    transaction: npt.NDArray[np.uint64]
    event_time_ms: npt.NDArray[np.int64]
    amount_minor: npt.NDArray[np.int64]
    dims: tuple[npt.NDArray[np.uint32], ...]
    from_kafka: npt.NDArray[np.bool_]


def explode_entities(transactions: DataFrame) -> DataFrame:
    """One row for each entity that a transaction names: tag, txn (8 bytes), event_time_ms, amount_minor, DIMS, from_kafka."""
    # Hashed once in a projection of its own: several entities have the same dimension.
    dims = sorted({dim for e in ENTITIES for dim in e.dims})
    transactions = transactions.select("*", *(F.crc32(F.coalesce(F.col(dim), F.lit(""))).alias(f"crc_{dim}") for dim in dims))
    named = F.array(
        *(
            F.when(
                F.col(e.field).isNotNull(),
                F.struct(
                    F.concat(F.lit(f"{e.name}:"), F.col(e.field)).alias("tag"),
                    *(F.col(f"crc_{dim}").alias(name) for name, dim in zip(DIMS, e.dims, strict=True)),
                ),
            )
            for e in ENTITIES
        )
    )
    txn = F.substring(F.unhex(F.md5("transaction_id")), 1, 8)
    # What came through the HTTP door was observed before it was published; history never is.
    from_kafka = F.col("scored_by").isNull().alias("from_kafka")
    rows = transactions.select(
        txn.alias("txn"), "event_time_ms", "amount_minor", from_kafka, F.explode(F.array_compact(named)).alias("e")
    )
    return rows.select("e.tag", "txn", "event_time_ms", "amount_minor", *(f"e.{name}" for name in DIMS), "from_kafka")


def write_tiles(transactions: DataFrame, job: TileJob, partitions: int) -> tuple[int, int]:
    """Add `transactions` to the tiles in Redis. (entities written, entities that had this batch already).

    `partitions` bounds the memory of a worker, which holds one partition at a time. Raises what Spark makes of `RedisUnavailableError`.
    """
    events = explode_entities(transactions).repartition(partitions, "tag")
    results = events.mapInArrow(merge_into_redis(job), OUTPUT_DDL).collect()
    return sum(r["written"] for r in results), sum(r["unchanged"] for r in results)


def merge_into_redis(job: TileJob) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """The worker's side: all events of an entity are in one partition, so each entity is written once a batch."""

    def merge(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        events = _read(list(batches))
        written = _merge_patiently(job, events)
        unchanged = len(events.tags) - written
        yield pa.RecordBatch.from_pydict(
            {"written": pa.array([written], pa.int64()), "unchanged": pa.array([unchanged], pa.int64())}
        )

    return merge


def _read(batches: list[pa.RecordBatch]) -> Events:
    if not batches or not sum(b.num_rows for b in batches):
        empty = np.zeros(0, np.int64)
        no_dims = (empty.astype(np.uint32),) * len(DIMS)
        return Events([], empty, empty.astype(np.uint64), empty, empty, no_dims, empty.astype(bool))
    table = pa.Table.from_batches(batches).combine_chunks()
    tags = table["tag"].combine_chunks().dictionary_encode()
    owner = tags.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    # By owner and time, so that each owner's events are one slice with the newest last.
    event_time_ms = table["event_time_ms"].to_numpy()
    order = np.lexsort((event_time_ms, owner))
    return Events(
        tags=tags.dictionary.to_pylist(),
        owner=owner[order],
        transaction=_hashes(table["txn"].combine_chunks())[order],
        event_time_ms=event_time_ms[order],
        amount_minor=table["amount_minor"].to_numpy()[order],
        dims=tuple(table[name].to_numpy().astype(np.uint32)[order] for name in DIMS),
        from_kafka=table["from_kafka"].to_numpy(zero_copy_only=False)[order],
    )


def _hashes(column: Any) -> npt.NDArray[np.uint64]:
    """The numbers in a binary column of 8 bytes each, without an object a row."""
    fixed = column.cast(pa.binary(8))
    return np.frombuffer(fixed.buffers()[1], "<u8", count=len(fixed), offset=8 * fixed.offset)


def _part(events: Events, first: int, end: int) -> Events:
    """The events of the owners first..end, renumbered from 0."""
    a, b = np.searchsorted(events.owner, [first, end])
    return Events(
        tags=events.tags[first:end],
        owner=events.owner[a:b] - first,
        transaction=events.transaction[a:b],
        event_time_ms=events.event_time_ms[a:b],
        amount_minor=events.amount_minor[a:b],
        dims=tuple(dim[a:b] for dim in events.dims),
        from_kafka=events.from_kafka[a:b],
    )


T = TypeVar("T")


def patient(call: Callable[[], T], retry_s: float) -> T:
    """What `call` gives, tried again with growing waits while Redis is down or starting. Raises `RedisUnavailableError`.

    `call` must be idempotent.
    """
    give_up = time.monotonic() + retry_s
    wait_s = 0.05
    while True:
        try:
            return call()
        except _RETRIED as exc:
            if time.monotonic() > give_up:
                raise RedisUnavailableError(f"Redis did not answer for {retry_s} s") from exc
            time.sleep(wait_s * (0.5 + random.random() / 2))  # noqa: S311
            wait_s = min(BACKOFF_S_MAX, wait_s * 2)


def _merge_patiently(job: TileJob, events: Events) -> int:
    """All groups of entities, again while Redis is down or starting: what an earlier try wrote, its fence protects. Entities written."""
    left = deque(range(0, len(events.tags), OWNERS_MAX))
    written = 0

    def steps(first: int) -> Steps:
        return merge_steps(job, _part(events, first, min(first + OWNERS_MAX, len(events.tags))))

    def attempt() -> None:
        nonlocal written
        groups = len(left)
        try:
            with connected(job.redis_url) as wire:
                wire.load_script(layout.MERGE_LUA)
                for done in in_turns(wire, (steps(first) for first in tuple(left))):
                    left.popleft()
                    written += done
        except _RETRIED:
            # As long as it gets on, patience begins anew.
            if len(left) == groups:
                raise

    while left:
        patient(attempt, job.retry_s)
    return written


def in_turns(wire: Bulk, groups: Iterable[Steps]) -> Iterator[int]:
    """What each of `groups` returns, in their order, with up to `GROUPS_MAX` of them under way on one connection."""
    waiting = iter(groups)
    # In the order of their replies.
    asked: deque[tuple[Steps, int]] = deque()

    def send(group: Steps, commands: list[Command]) -> None:
        wire.send(commands)
        asked.append((group, len(commands)))

    def start() -> None:
        group = next(waiting, None)
        if group is not None:
            send(group, next(group))

    for _ in range(GROUPS_MAX):
        start()
    while asked:
        group, replies = asked.popleft()
        try:
            send(group, group.send(wire.read(replies)))
        except StopIteration as end:
            start()
            yield end.value


def merge_events(wire: Bulk, job: TileJob, events: Events) -> int:
    """One group alone. Entities written, those that had this batch before left out."""
    return sum(in_turns(wire, [merge_steps(job, events)]))


def merge_steps(job: TileJob, events: Events) -> Steps:
    """Read the owners' tiles, add the events, write them back. Entities written, those that had this batch before left out."""
    names = [tag.split(":", 1) for tag in events.tags]
    head_keys = [layout.head_key(*name) for name in names]
    tiles_keys = [layout.tiles_key(*name) for name in names]
    values = yield [("GET", key) for key in tiles_keys]
    entity_index = [ENTITY_INDEX[entity] for entity, _ in names]
    check = [layout.key_check(*name) for name in names]
    # Raises for a value of another layout or key: that must not be built upon.
    held = layout.unpack_tiles(values, entity_index, check)
    # Of an earlier life of the checkpoint: this one has read, or will read, everything from the start.
    foreign = held.headers["epoch"] != job.epoch
    done = ~foreign & (held.headers["batch_id"] >= job.batch_id) & (held.headers["version"] != 0)
    if foreign.any():
        held = layout.unpack_tiles([None if f else v for f, v in zip(foreign, values, strict=True)], entity_index, check)
    of_entity = np.array(entity_index)
    added = tiles.add_events(
        held,
        tiles.Events(events.owner, events.event_time_ms, events.amount_minor, events.dims),
        PAIRS[of_entity],
        ENTITY_LABELLED[of_entity],
        job.now_ms // 60_000,
    )
    for name, column in (("entity", of_entity), ("check", check), ("batch_id", job.batch_id), ("epoch", job.epoch)):
        added.headers[name] = column
    packed = layout.pack_tiles(added)

    event_edges = np.searchsorted(events.owner, np.arange(len(names) + 1)).tolist()
    limits = [
        str(limit).encode()
        for limit in (layout.TILES_TTL_MS, layout.HEAD_COMPACT_ABOVE, layout.HEAD_KEPT_MIN, layout.HEAD_GUARD_S, HEAD_RETENTION_MS)
        + (layout.EARLY_TTL_MS, layout.EARLY_MAX, layout.HEAD_TTL_MS)
    ]
    hashes = hashes_of(events)
    calls = []
    for i in np.flatnonzero(~done).tolist():
        entity, entity_id = names[i]
        first, end = event_edges[i], event_edges[i + 1]
        calls.append(
            ("EVALSHA", MERGE_SHA, b"3", head_keys[i], tiles_keys[i], layout.early_key(entity, entity_id), packed[i])
            + (*hashes(max(first, end - HASHES_MAX), end), end - first, *limits)
        )
    return sum((yield calls))


def hashes_of(events: Events) -> Callable[[int, int], tuple[bytes, bytes]]:
    """Gives the transactions' hashes of a slice of `events`: those that a gateway observes from Kafka, and the others.

    Nearly always they are all of one kind, and a slice of one text.
    """
    whole = events.transaction.tobytes()
    width = events.transaction.itemsize
    before = np.concatenate([[0], np.cumsum(events.from_kafka)]).tolist()

    def hashes(first: int, end: int) -> tuple[bytes, bytes]:
        from_kafka = before[end] - before[first]
        if from_kafka == 0:
            return b"", whole[width * first : width * end]
        if from_kafka == end - first:
            return whole[width * first : width * end], b""
        part, chosen = events.transaction[first:end], events.from_kafka[first:end]
        return part[chosen].tobytes(), part[~chosen].tobytes()

    return hashes
