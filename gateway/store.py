"""Features from Redis: one step a batch that claims, observes and reads, and its decoding into the model's input.

How the step is done on one Redis or on a cluster is gateway/redis_backend.py's. Called by the scorer. Redis may be silent or dead:
then `observe` says None within the given time and the batch goes on without.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.features import ENTITIES, LABELLED, RequestColumns, feature_matrix
from gateway.contracts.layout import (
    BASE_STEP,
    DAY_TILE,
    DAY_TILE_BYTES,
    EARLY_MAX,
    FINE_TILE,
    FINE_TILE_BYTES,
    FLAG_LABELLED,
    FRAUD_DAY,
    HEAD_EVENT,
    HEAD_EVENT_BYTES,
    HEAD_EVENT_PACK,
    HEAD_HEADER,
    HEAD_TTL_MS,
    LABELS_HEADER,
    LAYOUT_VERSION,
    PROGRESS_KEY,
    TILES_HEADER,
    Progress,
    dim_hash,
    head_key,
    idempotency_key,
    key_check,
    tiles_bytes,
    tiles_key,
    txn_hash,
)
from gateway.contracts.transaction import Transaction
from gateway.contracts.windows import SETTLE_MS, Asked, Held, aggregate, nothing_held
from gateway.job import Job
from gateway.redis_backend import Answered, Call, backend_of, settles
from gateway.redis_cluster import ClusterLink
from gateway.redis_link import Argument, RedisLink, RedisReplyError, RedisUnavailableError

log = logging.getLogger(__name__)

# The Spark job may have counted a record that arrived up to this much before its newest one.
TILES_AHEAD_MARGIN_MS = 1000
# How Redis begins its refusal of a write at its memory limit.
FULL = "OOM"
ENTITY_COUNT = len(ENTITIES)
NONE = bytes(4)
# version, entity, flags and key check begin every value; the flags are a head's own
HEADER_TELLS_BYTES = 8
FLAGS = [FLAG_LABELLED if e.labelled else 0 for e in ENTITIES]
CAPACITY = np.array([e.head_events_max for e in ENTITIES], np.int64)
CAPACITY_TEXT = [str(e.head_events_max) for e in ENTITIES]
_progress_decoder = msgspec.msgpack.Decoder(Progress)


@dataclass(slots=True)
class Observation:
    """What Redis knew about a batch, by row.

    `settled[i]` is the idempotency record that settles row i (None: decide it). The arrays cover all rows, a settled one with no
    entity known: `matrix` float32 (batch, features), `seq` int64 (batch, entities), -1 where not observed, `stale` bool (batch,),
    `label_changes` int64 (batch, labelled entities): how many had been applied to each, -1 where not observed.
    """

    settled: list[bytes | None]
    matrix: npt.NDArray[np.float32]
    seq: npt.NDArray[np.int64]
    label_changes: npt.NDArray[np.int64]
    stale: npt.NDArray[np.bool_]
    tiles_age_ms: int | None
    # False when Redis could only be looked at: nothing was claimed or observed.
    written: bool = True


@dataclass(slots=True)
class _Plan:
    """What Redis is asked, and what is needed to read its reply."""

    call: Call
    headers: list[list[bytes | None]]
    dim_a: npt.NDArray[np.uint16]
    dim_c: npt.NDArray[np.uint16]
    base_us: int


def _dims(t: Transaction) -> list[tuple[str | None, int, int, int]]:
    """(id, dim_hash of dim_a, dim_b, dim_c) of each entity, in the order of ENTITIES, spelled out since it runs for each transaction."""
    card, merchant, device, ip = dim_hash(t.card_id), dim_hash(t.merchant_id), dim_hash(t.device_id), dim_hash(t.ip)
    return [
        (t.card_id, merchant, dim_hash(t.country), device),
        (t.customer_id, device, card, merchant),
        (t.merchant_id, card, dim_hash(t.card_bin), device),
        (t.device_id, card, ip, merchant),
        (t.ip, card, device, merchant),
    ]


assert [(e.field, *e.dims) for e in ENTITIES] == [
    ("card_id", "merchant_id", "country", "device_id"),
    ("customer_id", "device_id", "card_id", "merchant_id"),
    ("merchant_id", "card_id", "card_bin", "device_id"),
    ("device_id", "card_id", "ip", "merchant_id"),
    ("ip", "card_id", "device_id", "merchant_id"),
], "_dims spells the entities out"


class Store:
    """`now_ms` is the wall clock. `claim_ttl_ms` is the idempotency window."""

    def __init__(
        self,
        link: RedisLink | ClusterLink,
        claim_ttl_ms: int,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._redis = backend_of(link)
        self._claim_ttl_ms = claim_ttl_ms
        self._now_ms = now_ms
        self._progress: Progress | None = None
        self._unanswered_since_ms: int | None = None
        self.refused_values = 0
        self.failed_records = 0
        self.refused_writes = 0

    @property
    def ready(self) -> bool:
        return self._redis.ready

    @property
    def progress(self) -> Progress | None:
        """How far the Spark job had got at the last call."""
        return self._progress

    async def observe(
        self, batch: Sequence[Job], request: RequestColumns, timeout_s: float, update: bool = True
    ) -> Observation | None:
        """One step for `batch`. None when Redis can't be used within `timeout_s` seconds.

        With `update` each transaction is claimed and appended to its entities; without, nothing is changed (what-if reads).
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            if self._progress is None:
                self._note_progress(await self._redis.progress(deadline_s))
            plan = self._plan(batch, update)
            reply = await self._redis.observe(plan.call, deadline_s)
        except RedisUnavailableError:
            return None
        except RedisReplyError as exc:
            log.warning("redis: the observe script failed: %s", exc)
            if update and str(exc).startswith(FULL):
                return await self._look_only(batch, request, deadline_s - time.monotonic())
            return None
        return self._decode(batch, request, plan, reply, update)

    async def _look_only(self, batch: Sequence[Job], request: RequestColumns, timeout_s: float) -> Observation | None:
        """What Redis knows when it is at its memory limit and takes no writes: nothing is claimed or observed, all of it is stale."""
        self.refused_writes += len(batch)
        found = await self.observe(batch, request, timeout_s, update=False) if timeout_s > 0 else None
        if found is not None:
            found.stale[:] = True
            found.seq[:] = -1
            found.written = False
        return found

    def record(self, answers: Sequence[tuple[Job, bytes]]) -> None:
        """Store each answer beside its claim for the idempotency window. Written at once, not waited for.

        A later `observe` on this connection comes after it.
        """
        records = [
            Answered(idempotency_key(job.transaction.transaction_id), job.claim + answer, self._claim_ttl_ms)
            for job, answer in answers
        ]
        try:
            self._redis.record(records, self._count_failed)
        except RedisUnavailableError:
            self._count_failed(len(records))

    def _count_failed(self, records: int) -> None:
        self.failed_records += records

    def _plan(self, batch: Sequence[Job], update: bool) -> _Plan:
        now_ms = self._now_ms()
        observed_s = now_ms // 1000 % 65_536
        # A head that is born now numbers its events from here: later than any that the entity had before.
        base_us = now_ms * 1000 // BASE_STEP * BASE_STEP
        dim_a, dim_c = np.zeros((2, len(batch) * ENTITY_COUNT), np.uint16)
        through_ms = None if self._progress is None else self._progress.arrived_through_ms
        keys: list[str] = [PROGRESS_KEY]
        values: list[Argument] = ["1" if update else "0", self._claim_ttl_ms, HEAD_TTL_MS, EARLY_MAX]
        headers: list[list[bytes | None]] = []
        for row, job in enumerate(batch):
            t = job.transaction
            keys.append(idempotency_key(t.transaction_id))
            at = len(values)
            values += (job.claim, 0)
            hashed = txn_hash(t.transaction_id)
            latitude = np.nan if t.latitude is None else t.latitude
            longitude = np.nan if t.longitude is None else t.longitude
            # The Spark job has counted what arrived later: where the early list can't tell, it has counted this one too.
            counted = through_ms is not None and job.arrived_ms < through_ms - TILES_AHEAD_MARGIN_MS
            of_row: list[bytes | None] = []
            for e, (entity_id, a, b, c) in enumerate(_dims(t)):
                if entity_id is None:
                    of_row.append(None)
                    continue
                name = ENTITIES[e].name
                owner = row * ENTITY_COUNT + e
                dim_a[owner], dim_c[owner] = a, c
                header = HEAD_HEADER.pack(LAYOUT_VERSION, e, FLAGS[e], key_check(name, entity_id), base_us, 0, 0)
                keys += (head_key(name, entity_id), tiles_key(name, entity_id))
                event = HEAD_EVENT_PACK.pack(
                    hashed, t.event_time_ms, t.amount_minor, 0, observed_s, 0, counted, latitude, longitude, a, b, c
                )
                values += (CAPACITY_TEXT[e], header, event)
                of_row.append(header[:HEADER_TELLS_BYTES])
            values[at + 1] = sum(header is not None for header in of_row)
            headers.append(of_row)
        return _Plan(Call(keys, values), headers, dim_a, dim_c, base_us)

    def _note_progress(self, value: bytes | None) -> None:
        if value is None:
            self._progress = None
            return
        try:
            progress = _progress_decoder.decode(value)
        except msgspec.DecodeError:
            log.warning("redis: %s holds no progress", PROGRESS_KEY)
            self._progress = None
            return
        if progress != self._progress:
            self._progress = progress
            self._unanswered_since_ms = None

    def _behind(self, now_ms: int, update: bool) -> bool:
        """True when the Spark job has left transactions of ours uncounted for longer than SETTLE_MS."""
        if self._progress is None:
            return True
        if update and self._unanswered_since_ms is None:
            self._unanswered_since_ms = now_ms
        since_ms = self._progress.written_at_ms if self._unanswered_since_ms is None else self._unanswered_since_ms
        return now_ms - max(since_ms, self._progress.written_at_ms) > SETTLE_MS

    def _decode(self, batch: Sequence[Job], request: RequestColumns, plan: _Plan, reply: list[Any], update: bool) -> Observation:
        self._note_progress(reply[0])
        now_ms = self._now_ms()
        rows = len(batch)
        stale = np.full(rows, self._behind(now_ms, update))
        progress = self._progress
        if progress is not None and progress.lost_at_ms:
            stale[:] = True
        settled: list[bytes | None] = []
        values = _Values(rows * ENTITY_COUNT)
        at = 1
        for row, (job, of_row) in enumerate(zip(batch, plan.headers, strict=True)):
            before = reply[at]
            at += 1
            if before is not None and settles(before, job.claim):
                settled.append(before)
                continue
            settled.append(None)
            for e, header in enumerate(of_row):
                if header is None:
                    continue
                head, tiles, frauds, seq = reply[at : at + 4]
                at += 4
                owner = row * ENTITY_COUNT + e
                values.seq[owner] = seq
                if not _sound(head, tiles, frauds, header):
                    self.refused_values += 1
                    stale[row] = True
                    continue
                values.add(owner, head, tiles, frauds)
                # Events are missing that were never tiled, or counted that nobody has observed yet.
                if (head and head[20:24] != NONE) or (tiles and tiles[20:24] != NONE):
                    stale[row] = True
        assert at == len(reply)
        asked = Asked(
            t_ms=np.repeat(request.t_ms, ENTITY_COUNT),
            seq=values.seq,
            capacity=np.tile(CAPACITY, rows),
            dim_a=plan.dim_a,
            dim_c=plan.dim_c,
        )
        shape = (rows, ENTITY_COUNT)
        matrix = feature_matrix(request, aggregate(asked, values.held()), values.known.reshape(shape))
        base = np.where(values.base > 0, values.base, plan.base_us)
        return Observation(
            settled=settled,
            matrix=matrix,
            seq=np.where(values.seq < 0, -1, base + values.seq).reshape(shape),
            label_changes=values.label_changes.reshape(shape)[:, LABELLED],
            stale=stale,
            tiles_age_ms=None if progress is None else max(0, now_ms - progress.written_at_ms),
        )


class _Values:
    """The values of a batch's owners, cut into their records. Owners are added in ascending order."""

    def __init__(self, owners: int) -> None:
        self.known = np.zeros(owners, bool)
        self.seq = np.full(owners, -1, np.int64)
        self.base = np.zeros(owners, np.int64)
        self.label_changes = np.full(owners, -1, np.int64)
        # head, 5 minutes, hours, days, seen, days of frauds
        self._lengths = np.zeros((6, owners), np.int64)
        self._heads: list[bytes] = []
        self._fine: list[bytes] = []
        self._days: list[bytes] = []
        self._seen: list[bytes] = []
        self._frauds: list[bytes] = []

    def add(self, owner: int, head: bytes, tiles: bytes, frauds: bytes) -> None:
        self.known[owner] = True
        lengths = self._lengths
        if head:
            self.base[owner] = HEAD_HEADER.unpack_from(head)[4]
            self._heads.append(head[HEAD_HEADER.size :])
            lengths[0, owner] = (len(head) - HEAD_HEADER.size) // HEAD_EVENT_BYTES
        if tiles:
            *_, fives, hours, days, seen = TILES_HEADER.unpack_from(tiles)
            lengths[1:5, owner] = fives, hours, days, seen
            day_at = TILES_HEADER.size + FINE_TILE_BYTES * (fives + hours)
            seen_at = day_at + DAY_TILE_BYTES * days
            self._fine.append(tiles[TILES_HEADER.size : day_at])
            self._days.append(tiles[day_at:seen_at])
            self._seen.append(tiles[seen_at:])
        changes = 0
        if frauds:
            changes = LABELS_HEADER.unpack_from(frauds)[6]
            self._frauds.append(frauds[LABELS_HEADER.size :])
            lengths[5, owner] = (len(frauds) - LABELS_HEADER.size) // FRAUD_DAY.itemsize
        self.label_changes[owner] = changes

    def held(self) -> Held:
        heads, fives, hours, days, seen, frauds = self._lengths
        return Held(
            head=np.frombuffer(b"".join(self._heads), HEAD_EVENT),
            heads=heads,
            fine=np.frombuffer(b"".join(self._fine), FINE_TILE),
            fives=fives,
            hours=hours,
            day=np.frombuffer(b"".join(self._days), DAY_TILE),
            days=days,
            seen=np.frombuffer(b"".join(self._seen), "<u4"),
            seens=seen,
            frauds=np.frombuffer(b"".join(self._frauds), FRAUD_DAY),
            fraud_days=frauds,
        )


def request_only_matrix(request: RequestColumns) -> npt.NDArray[np.float32]:
    """The model's input when no entity is known, (batch, features) float32: the request's own features, the rest NaN."""
    rows = len(request.t_ms)
    owners = rows * ENTITY_COUNT
    none, no_dim = np.zeros(owners, np.int64), np.zeros(owners, np.uint16)
    asked = Asked(np.repeat(request.t_ms, ENTITY_COUNT), none, none, no_dim, no_dim)
    return feature_matrix(request, aggregate(asked, nothing_held(owners)), np.zeros((rows, ENTITY_COUNT), bool))


def _sound(head: bytes, tiles: bytes, frauds: bytes, header: bytes) -> bool:
    """True when each value is empty, or one of this layout, entity and key with whole records."""
    if head and not (
        len(head) >= HEAD_HEADER.size and (len(head) - HEAD_HEADER.size) % HEAD_EVENT_BYTES == 0 and head[:8] == header
    ):
        return False
    if tiles:
        if len(tiles) < TILES_HEADER.size or not _same_key(tiles, header):
            return False
        if len(tiles) != tiles_bytes(*TILES_HEADER.unpack_from(tiles)[-4:]):
            return False
    if frauds:
        whole = (len(frauds) - LABELS_HEADER.size) % FRAUD_DAY.itemsize == 0
        return len(frauds) >= LABELS_HEADER.size and whole and _same_key(frauds, header)
    return True


def _same_key(value: bytes, header: bytes) -> bool:
    """Version, entity and key check are those of a head's header, whose flags no other value has."""
    return value[:2] == header[:2] and value[4:8] == header[4:8]
