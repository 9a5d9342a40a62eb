"""The rebuild's side in the workers: from all events of an entity to its tiles, head and early list in Redis.

`restore_into_redis` is called once a partition; `restore_events` is the whole of it for some entities, vectorised over them. The
gateway may go on scoring meanwhile: an entity's values are written only if its head is still the one that was read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from redis.exceptions import NoScriptError

from feature_jobs.redis_client import Client, connect, pipelined
from feature_jobs.tiles import DIMS, ENTITY_LABELLED, HASHES_MAX, PAIRS, patient
from gateway.contracts import layout, tiles
from gateway.contracts.features import ENTITIES, ENTITY_INDEX
from gateway.contracts.heads import Heads, Observed, heads_of
from gateway.contracts.windows import DAY_MS, LABELLED_RETENTION_MS, MINUTE_MS, RETENTION_REAL_MIN, Int64s

# Entities, and events unless one entity has more, that are restored at once: 200 bytes of tiles an event.
OWNERS_MAX = 4096
EVENTS_MAX = 200_000
# Tries for a head that changes between its reading and its writing, which takes milliseconds.
ATTEMPTS_MAX = 50
# Younger than this, a transaction may still be on its way to the gateway.
IN_FLIGHT_S = 3600
# Values of `seq`: no receipt, or a receipt that says that Redis was not asked.
NO_RECEIPT, NOT_OBSERVED = -2, -1
CAPACITY = np.array([e.head_events_max for e in ENTITIES], np.int64)
FLAGS = [layout.FLAG_LABELLED if e.labelled else 0 for e in ENTITIES]
RESTORE_SHA = hashlib.sha1(layout.RESTORE_LUA.encode(), usedforsecurity=False).hexdigest()
OUTPUT_DDL = "written bigint, left_out bigint"
# Columns that come from the JVM as they are.
PLAIN = ("event_time_ms", "amount_minor", "from_kafka", "arrived_ms", "seq", "decided_ms", "latitude", "longitude")


class HeadBusyError(RuntimeError):
    """A head changed each time between its reading and its writing."""


@dataclass(frozen=True)
class RestoreJob:
    """`now_ms` is the time as of which all is restored. `lost_at_ms`: when Redis was found to have lost data, 0: it is all known.

    After a loss a head goes on with new places, for others may have been given that no receipt has told yet.
    """

    redis_url: str
    epoch: int
    batch_id: int
    now_ms: int
    lost_at_ms: int
    retry_s: int


@dataclass
class History:
    """All events of some entities, one row each, by owner; `owner` indexes `tags` ("card:abc").

    `seq` is the place in the order of observation, NO_RECEIPT or NOT_OBSERVED. `arrived_ms` is Kafka's timestamp, `decided_ms` the
    receipt's (0: none).
    """

    tags: list[str]
    owner: Int64s
    transaction: npt.NDArray[np.uint64]
    event_time_ms: Int64s
    amount_minor: Int64s
    dim_a: npt.NDArray[np.uint32]
    dim_b: npt.NDArray[np.uint32]
    dim_c: npt.NDArray[np.uint32]
    from_kafka: npt.NDArray[np.bool_]
    arrived_ms: Int64s
    seq: Int64s
    decided_ms: Int64s
    latitude: npt.NDArray[np.float32]
    longitude: npt.NDArray[np.float32]

    def of(self, owners: Int64s) -> History:
        """The part of these owners (ascending), renumbered from 0."""
        number = np.full(len(self.tags), -1, np.int64)
        number[owners] = np.arange(len(owners))
        chosen = number[self.owner] >= 0
        columns = {f.name: getattr(self, f.name)[chosen] for f in fields(self) if f.name not in ("tags", "owner")}
        return History(tags=[self.tags[i] for i in owners.tolist()], owner=number[self.owner][chosen], **columns)


def restore_into_redis(job: RestoreJob) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """The worker's side: all events of an entity are in one partition."""

    def restore(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        history = read_history(list(batches))
        written = 0
        if history.tags:
            with patient(lambda: connect(job.redis_url), job.retry_s) as client:
                for owners in chunks(np.bincount(history.owner, minlength=len(history.tags))):
                    written += _patiently(client, job, history.of(owners))
        left_out = len(history.tags) - written
        yield pa.RecordBatch.from_pydict({"written": pa.array([written], pa.int64()), "left_out": pa.array([left_out], pa.int64())})

    return restore


def read_history(batches: list[pa.RecordBatch]) -> History:
    table = pa.Table.from_batches(batches).combine_chunks() if batches else None
    if table is None or table.num_rows == 0:
        empty = np.zeros(0, np.int64)
        return History([], *([empty] * (len(fields(History)) - 1)))  # type: ignore[arg-type]
    tags = table["tag"].combine_chunks().dictionary_encode()
    owner = tags.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    order = np.argsort(owner, kind="stable")

    columns: dict[str, Any] = {name: table[name].to_numpy()[order] for name in PLAIN}
    return History(
        tags=tags.dictionary.to_pylist(),
        owner=owner[order],
        transaction=np.frombuffer(b"".join(table["txn"].to_pylist()), "<u8")[order],
        **columns,
        **{name: table[name].to_numpy()[order].astype(np.uint32) for name in DIMS},
    )


def chunks(counts: Int64s) -> Iterator[Int64s]:
    """Runs of owners with at most OWNERS_MAX of them and EVENTS_MAX events together, or a single owner."""
    first, total = 0, np.cumsum(counts)
    while first < len(counts):
        before = int(total[first - 1]) if first else 0
        end = int(np.searchsorted(total, before + EVENTS_MAX, side="right"))
        end = min(max(end, first + 1), first + OWNERS_MAX)
        yield np.arange(first, end)
        first = end


def _patiently(client: Client, job: RestoreJob, history: History) -> int:
    """`restore_events`, again while Redis is down or starting. Entities written."""

    def restore() -> int:
        try:
            return restore_events(client, job, history)
        except NoScriptError:
            client.script_load(layout.RESTORE_LUA)
            return restore_events(client, job, history)

    return patient(restore, job.retry_s)


def restore_events(client: Client, job: RestoreJob, history: History) -> int:
    """Write what the entities hold as of the job's time. Entities written: not those whose values would have expired by now.

    Raises `HeadBusyError`.
    """
    newest_ms = np.zeros(len(history.tags), np.int64)
    np.maximum.at(newest_ms, history.owner, history.arrived_ms)
    pending = np.flatnonzero(newest_ms + layout.TILES_TTL_MS > job.now_ms)
    written = 0
    for _ in range(ATTEMPTS_MAX):
        if len(pending) == 0:
            return written
        replies = np.array(_restore(client, job, history.of(pending), newest_ms[pending]), np.int64)
        written += int((replies == 1).sum())
        pending = pending[replies == -1]
    if len(pending):
        raise HeadBusyError(f"{len(pending)} heads changed {ATTEMPTS_MAX} times between reading and writing")
    return written


def _restore(client: Client, job: RestoreJob, history: History, newest_ms: Int64s) -> list[int]:
    """One try. The script's reply for each entity."""
    names = [tag.split(":", 1) for tag in history.tags]
    entity = np.array([ENTITY_INDEX[name] for name, _ in names], np.int64)
    checks = [layout.key_check(*name) for name in names]
    head_keys = [layout.head_key(*name) for name in names]
    read: list[bytes] = [value or b"" for value in pipelined(client, [("GET", key) for key in head_keys])]
    existing, end = existing_events(read, entity, checks, job.now_ms)
    heads, early = restored_heads(job, history, existing, end, CAPACITY[entity])
    values = restored_tiles(job, history, entity)
    early_hashes = [early.get(i, b"") for i in range(len(names))]
    for field, column in (("entity", entity), ("check", checks), ("batch_id", job.batch_id), ("epoch", job.epoch)):
        values.headers[field] = column
    values.headers["early"] = [len(hashes) // 8 for hashes in early_hashes]
    packed = layout.pack_tiles(values)
    edges = (np.searchsorted(heads.owner, np.arange(len(names) + 1)) * layout.HEAD_EVENT_BYTES).tolist()
    records, base, next_seq = heads.records.tobytes(), heads.base.tolist(), heads.next_seq.tolist()
    lost = _still_lost(read, end, history, existing)
    ttl_ms = np.maximum(1, newest_ms + layout.TILES_TTL_MS - job.now_ms).tolist()
    calls: list[tuple[object, ...]] = []
    for i, (name, entity_id) in enumerate(names):
        head = b""
        if next_seq[i]:
            e = int(entity[i])
            head = layout.HEAD_HEADER.pack(layout.LAYOUT_VERSION, e, FLAGS[e], checks[i], base[i], 0, lost[i])
            if early_hashes[i]:
                head += layout.EARLY_MARK.pack(len(early_hashes[i]) // 8)
            head += records[edges[i] : edges[i + 1]]
        calls.append(
            ("EVALSHA", RESTORE_SHA, 3, head_keys[i], layout.tiles_key(name, entity_id), layout.early_key(name, entity_id))
            + (packed[i], read[i], head, early_hashes[i], ttl_ms[i])
            # A head that is there was observed lately.
            + (layout.HEAD_TTL_MS if read[i] else ttl_ms[i], layout.EARLY_TTL_MS)
        )
    return pipelined(client, calls)


def existing_events(values: list[bytes], entity: Int64s, checks: list[int], now_ms: int) -> tuple[Observed, Int64s]:
    """The events that heads in Redis hold, and the place each head gives next, 0 where there is no head."""
    end = np.zeros(len(values), np.int64)
    held, owners, bases = [], [], []
    for i, value in enumerate(values):
        if not value:
            continue
        events = layout.head_events(value, int(entity[i]), checks[i])
        base = layout.HEAD_HEADER.unpack_from(value)[4]
        end[i] = base + int(events["seq"][-1]) + 1
        held.append(events)
        owners.append(np.full(len(events), i))
        bases.append(base + events["seq"].astype(np.int64))
    if not held:
        none = np.zeros(0, np.int64)
        return Observed(none, none, none, np.zeros(0, layout.HEAD_EVENT)), end
    records = np.concatenate(held)
    now_s = now_ms // 1000
    observed_s = now_s - (now_s - records["observed_s"].astype(np.int64)) % 65_536
    return Observed(np.concatenate(owners), np.concatenate(bases), observed_s * 1000, records), end


def _keys(owner: Int64s, transaction: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One number for an owner's transaction, as unlikely to meet another as the hashes are."""
    mixed: npt.NDArray[np.uint64] = transaction ^ (owner.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return mixed


def _is_among(keys: npt.NDArray[np.uint64], of: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """np.isin, which sorts both sides even when one is empty: mostly no head is there."""
    among: npt.NDArray[np.bool_] = np.isin(keys, of) if len(of) else np.zeros(len(keys), bool)
    return among


def restored_heads(
    job: RestoreJob, history: History, existing: Observed, end: Int64s, capacity: Int64s
) -> tuple[Heads, dict[int, bytes]]:
    """The heads, with what is in Redis already; and the hashes of the early lists by owner.

    What a receipt tells comes first in the order of observation, then what is only in Redis: later receipts will tell the same places.
    """
    known = history.seq >= 0
    mine = _keys(history.owner, history.transaction)
    held = _keys(existing.owner, existing.records["transaction"])
    # An event is read from the head that has it, at the place that its receipt tells.
    place = existing.place.copy()
    if len(held) and known.any():
        by_key = np.argsort(mine[known], kind="stable")
        sorted_keys = mine[known][by_key]
        at = np.minimum(np.searchsorted(sorted_keys, held), len(sorted_keys) - 1)
        told = sorted_keys[at] == held
        place[told] = history.seq[known][by_key][at[told]]
    records = existing.records.copy()
    records["tiled"] = np.isin(held, mine)
    from_delta = known & ~_is_among(mine, held)
    joined = Observed(
        owner=np.concatenate([history.owner[from_delta], existing.owner]),
        place=np.concatenate([history.seq[from_delta], place]),
        observed_ms=np.concatenate([history.decided_ms[from_delta], existing.observed_ms]),
        records=np.concatenate([_records(history, from_delta), records]),
    )
    # A head that is lost and not born anew yet: the gateway may have given places that no receipt has told. Its new life begins on a step.
    born_us = -(-job.lost_at_ms * 1000 // layout.BASE_STEP) * layout.BASE_STEP
    end = np.where(end == 0, born_us, end)
    early: dict[int, bytes] = {}
    on_its_way = (
        history.from_kafka
        & (history.seq == NO_RECEIPT)
        & (history.arrived_ms >= job.now_ms - IN_FLIGHT_S * 1000)
        & ~_is_among(mine, held)
    )
    if on_its_way.any():
        index = np.flatnonzero(on_its_way)
        index = index[np.lexsort((history.event_time_ms[index], history.owner[index]))]
        owners, starts = np.unique(history.owner[index], return_index=True)
        for owner, hashes in zip(owners.tolist(), np.split(history.transaction[index], starts[1:]), strict=True):
            early[owner] = hashes[-HASHES_MAX:].tobytes()
    return heads_of(joined, end, capacity), early


def _records(history: History, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.void]:
    records = np.zeros(int(chosen.sum()), layout.HEAD_EVENT)
    for name in ("transaction", "event_time_ms", "amount_minor", "latitude", "longitude"):
        records[name] = getattr(history, name)[chosen]
    for name in DIMS:
        records[name] = getattr(history, name)[chosen] & 0xFFFF
    records["observed_s"] = history.decided_ms[chosen] // 1000 % 65_536
    records["tiled"] = 1
    return records


def _still_lost(read: list[bytes], end: Int64s, history: History, existing: Observed) -> list[int]:
    """Events that each head evicted before they were tiled, without those that are in the restored tiles."""
    lost = [layout.HEAD_HEADER.unpack_from(value)[6] if value else 0 for value in read]
    if not any(lost):
        return lost
    held = _keys(existing.owner, existing.records["transaction"])
    base = np.array([layout.HEAD_HEADER.unpack_from(value)[4] if value else 0 for value in read], np.int64)
    evicted = (
        (history.seq >= base[history.owner]) & (end[history.owner] > 0) & ~np.isin(_keys(history.owner, history.transaction), held)
    )
    found = np.bincount(history.owner[evicted], minlength=len(read)).tolist()
    return [max(0, n - tiled) for n, tiled in zip(lost, found, strict=True)]


def restored_tiles(job: RestoreJob, history: History, entity: Int64s) -> layout.TileValues:
    """The tiles of all events within retention, which counts from the newest event that arrived RETENTION_REAL_MIN ago or earlier."""
    owners = len(history.tags)
    minute = history.event_time_ms // MINUTE_MS
    settled = history.arrived_ms <= job.now_ms - RETENTION_REAL_MIN * MINUTE_MS
    settled_min, newest_min = np.zeros((2, owners), np.int64)
    np.maximum.at(settled_min, history.owner[settled], minute[settled])
    np.maximum.at(newest_min, history.owner, minute)
    headers = np.zeros(owners, layout.TILES_HEADER_FIELDS)
    # The horizon advances to it with the first events that are added.
    headers["marked_min"] = settled_min
    none = np.zeros(0, np.int64)
    values = layout.TileValues(headers, np.zeros(0, layout.TILE), none, np.zeros(0, np.uint32), none)
    needed = history.event_time_ms + 2 * DAY_MS > settled_min[history.owner] * MINUTE_MS - LABELLED_RETENTION_MS
    index = np.flatnonzero(needed)
    for first in range(0, len(index), EVENTS_MAX):
        part = index[first : first + EVENTS_MAX]
        events = tiles.Events(
            history.owner[part],
            history.event_time_ms[part],
            history.amount_minor[part],
            tuple(getattr(history, name)[part] for name in DIMS),
        )
        values = tiles.add_events(values, events, PAIRS[entity], ENTITY_LABELLED[entity], job.now_ms // MINUTE_MS)
    for name, column in (("newest_min", newest_min), ("settled_min", settled_min), ("marked_min", newest_min)):
        values.headers[name] = column
    values.headers["marked_at_min"] = job.now_ms // MINUTE_MS
    return values
