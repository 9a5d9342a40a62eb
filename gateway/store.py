"""Features from Redis: one script call a batch that claims, observes and reads, and its decoding into the model's input.

Called by the scorer. Redis may be silent or dead: then `observe` says None within the given time and the batch goes on without.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.features import ENTITIES, RequestColumns, feature_matrix
from gateway.contracts.layout import (
    HEAD_EVENT,
    HEAD_EVENT_PACK,
    HEAD_HEADER,
    HEAD_TTL_MS,
    LAYOUT_VERSION,
    OBSERVE_LUA,
    PROGRESS_KEY,
    RECORD_BYTES,
    TILE,
    TILES_HEADER,
    Progress,
    dim_hash,
    head_key,
    idempotency_key,
    key_check,
    tiles_key,
    txn_hash,
)
from gateway.contracts.transaction import Transaction
from gateway.contracts.windows import SETTLE_MS, aggregate
from gateway.job import Job
from gateway.redis_link import RedisLink, RedisReplyError, RedisUnavailableError

log = logging.getLogger(__name__)

# The Spark job may have counted a record that arrived up to this much before its newest one.
TILES_AHEAD_MARGIN_MS = 1000
ENTITY_COUNT = len(ENTITIES)
HEADER_TELLS_BYTES = 8  # version, entity and key check: equal in head and tiles
CAPACITY = np.array([e.head_events_max for e in ENTITIES], np.int64)
CAPACITY_TEXT = [str(e.head_events_max) for e in ENTITIES]
_progress_decoder = msgspec.msgpack.Decoder(Progress)


@dataclass(slots=True)
class Observation:
    """What Redis knew about a batch, by row.

    `settled[i]` is the idempotency record that settles row i (None: decide it). The arrays cover all rows, a settled one with no
    entity known: `matrix` float32 (batch, features), `seq` int64 (batch, entities), -1 where not observed, `stale` bool (batch,).
    """

    settled: list[bytes | None]
    matrix: npt.NDArray[np.float32]
    seq: npt.NDArray[np.int64]
    stale: npt.NDArray[np.bool_]
    tiles_age_ms: int | None


@dataclass(slots=True)
class _Plan:
    """One script call and what is needed to read its reply."""

    arguments: list[bytes | str | int]
    headers: list[list[bytes | None]]


def _dims(t: Transaction) -> list[tuple[str | None, int, int]]:
    """(id, dim_a hash, dim_b hash) of each entity, in the order of ENTITIES, spelled out since it runs for each transaction."""
    card, merchant, device = dim_hash(t.card_id), dim_hash(t.merchant_id), dim_hash(t.device_id)
    return [
        (t.card_id, merchant, dim_hash(t.country)),
        (t.customer_id, device, card),
        (t.merchant_id, card, dim_hash(t.card_bin)),
        (t.device_id, card, dim_hash(t.ip)),
        (t.ip, card, device),
    ]


assert [(e.field, e.dim_a, e.dim_b) for e in ENTITIES] == [
    ("card_id", "merchant_id", "country"),
    ("customer_id", "device_id", "card_id"),
    ("merchant_id", "card_id", "card_bin"),
    ("device_id", "card_id", "ip"),
    ("ip", "card_id", "device_id"),
], "_dims spells the entities out"


class Store:
    """`now_ms` is the wall clock. `claim_ttl_ms` is the idempotency window."""

    def __init__(self, link: RedisLink, claim_ttl_ms: int, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self._link = link
        self._claim_ttl_ms = claim_ttl_ms
        self._now_ms = now_ms
        self._sha = hashlib.sha1(OBSERVE_LUA.encode(), usedforsecurity=False).hexdigest()
        link.greeting.append(("SCRIPT", "LOAD", OBSERVE_LUA))
        self._progress: Progress | None = None
        self._unanswered_since_ms: int | None = None
        self.refused_values = 0
        self.failed_records = 0

    @property
    def ready(self) -> bool:
        return self._link.ready

    @property
    def progress(self) -> Progress | None:
        """How far the Spark job had got at the last call."""
        return self._progress

    async def observe(
        self, batch: Sequence[Job], request: RequestColumns, timeout_s: float, update: bool = True
    ) -> Observation | None:
        """One round trip for `batch`. None when Redis can't be used within `timeout_s` seconds.

        With `update` each transaction is claimed and appended to its entities; without, nothing is changed (what-if reads).
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            if self._progress is None:
                self._note_progress(await self._link.call(("GET", PROGRESS_KEY), timeout_s))
            plan = self._plan(batch, update)
            try:
                reply = await self._link.call(("EVALSHA", self._sha, *plan.arguments), deadline_s - time.monotonic())
            except RedisReplyError as exc:
                if not str(exc).startswith("NOSCRIPT"):
                    raise
                reply = await self._link.call(("EVAL", OBSERVE_LUA, *plan.arguments), deadline_s - time.monotonic())
        except RedisUnavailableError:
            return None
        except RedisReplyError as exc:
            log.warning("redis: the observe script failed: %s", exc)
            return None
        return self._decode(batch, request, plan, reply, update)

    def record(self, answers: Sequence[tuple[Job, bytes]]) -> None:
        """Store each answer beside its claim for the idempotency window. Written at once, not waited for.

        A later `observe` on this connection comes after it.
        """
        commands = [
            ("SET", idempotency_key(job.transaction.transaction_id), job.claim + answer, "PX", self._claim_ttl_ms)
            for job, answer in answers
        ]
        try:
            futures = self._link.send_all(commands)
        except RedisUnavailableError:
            self.failed_records += len(answers)
            return
        for future in futures:
            future.add_done_callback(self._recorded)

    def _recorded(self, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None:
            self.failed_records += 1

    def _plan(self, batch: Sequence[Job], update: bool) -> _Plan:
        observed_s = self._now_ms() // 1000
        through_ms = None if self._progress is None else self._progress.arrived_through_ms
        keys: list[str] = [PROGRESS_KEY]
        values: list[bytes | str | int] = ["1" if update else "0", self._claim_ttl_ms, HEAD_TTL_MS]
        headers: list[list[bytes | None]] = []
        for job in batch:
            t = job.transaction
            keys.append(idempotency_key(t.transaction_id))
            at = len(values)
            values += (job.claim, 0)
            hashed = txn_hash(t.transaction_id)
            latitude = np.nan if t.latitude is None else t.latitude
            longitude = np.nan if t.longitude is None else t.longitude
            # What the Spark job has counted before it is observed here (after a restart) must not count from the head as well.
            tiled = through_ms is not None and job.arrived_ms < through_ms - TILES_AHEAD_MARGIN_MS
            of_row: list[bytes | None] = []
            for e, (entity_id, dim_a, dim_b) in enumerate(_dims(t)):
                if entity_id is None:
                    of_row.append(None)
                    continue
                name = ENTITIES[e].name
                header = HEAD_HEADER.pack(LAYOUT_VERSION, e, 0, key_check(name, entity_id), 0, 0)
                keys += (head_key(name, entity_id), tiles_key(name, entity_id))
                event = HEAD_EVENT_PACK.pack(
                    hashed, t.event_time_ms, t.amount_minor, 0, observed_s, dim_a, dim_b, latitude, longitude, tiled
                )
                values += (CAPACITY_TEXT[e], header, event)
                of_row.append(header[:HEADER_TELLS_BYTES])
            values[at + 1] = sum(header is not None for header in of_row)
            headers.append(of_row)
        return _Plan([len(keys), *keys, *values], headers)

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
        owners = rows * ENTITY_COUNT
        stale = np.full(rows, self._behind(now_ms, update))
        progress = self._progress
        if progress is not None:
            arrived = np.array([job.arrived_ms for job in batch], np.int64)
            stale |= arrived < progress.arrived_through_ms - TILES_AHEAD_MARGIN_MS
        settled: list[bytes | None] = []
        known = np.zeros(owners, bool)
        seq = np.full(owners, -1, np.int64)
        heads: list[memoryview] = []
        tiles: list[memoryview] = []
        head_bytes = np.zeros(owners, np.int64)
        tile_bytes = np.zeros(owners, np.int64)
        at = 1
        for row, (job, of_row) in enumerate(zip(batch, plan.headers, strict=True)):
            before = reply[at]
            at += 1
            if before is not None and settles(before, job):
                settled.append(before)
                continue
            settled.append(None)
            for e, header in enumerate(of_row):
                if header is None:
                    continue
                head, tile = reply[at], reply[at + 1]
                owner = row * ENTITY_COUNT + e
                seq[owner] = reply[at + 2]
                at += 3
                if not (_sound(head, header, HEAD_HEADER.size) and _sound(tile, header, TILES_HEADER.size)):
                    self.refused_values += 1
                    stale[row] = True
                    continue
                known[owner] = True
                if head:
                    if head[12:16] != b"\0\0\0\0":
                        stale[row] = True
                    heads.append(memoryview(head)[HEAD_HEADER.size :])
                    head_bytes[owner] = len(head) - HEAD_HEADER.size
                if tile:
                    tiles.append(memoryview(tile)[TILES_HEADER.size :])
                    tile_bytes[owner] = len(tile) - TILES_HEADER.size
        assert at == len(reply)
        aggregates = aggregate(
            t_ms=np.repeat(request.t_ms, ENTITY_COUNT),
            seq=seq,
            capacity=np.tile(CAPACITY, rows),
            head=np.frombuffer(b"".join(heads), HEAD_EVENT),
            head_lengths=head_bytes // RECORD_BYTES,
            tiles=np.frombuffer(b"".join(tiles), TILE),
            tile_lengths=tile_bytes // RECORD_BYTES,
        )
        matrix = feature_matrix(request, aggregates, known.reshape(rows, ENTITY_COUNT))
        return Observation(
            settled=settled,
            matrix=matrix,
            seq=seq.reshape(rows, ENTITY_COUNT),
            stale=stale,
            tiles_age_ms=None if progress is None else max(0, now_ms - progress.written_at_ms),
        )


def request_only_matrix(request: RequestColumns) -> npt.NDArray[np.float32]:
    """The model's input when no entity is known, (batch, features) float32: the request's own features, the rest NaN."""
    rows = len(request.t_ms)
    owners = rows * ENTITY_COUNT
    none = np.zeros(owners, np.int64)
    nothing = aggregate(
        t_ms=np.repeat(request.t_ms, ENTITY_COUNT),
        seq=none,
        capacity=none,
        head=np.zeros(0, HEAD_EVENT),
        head_lengths=none,
        tiles=np.zeros(0, TILE),
        tile_lengths=none,
    )
    return feature_matrix(request, nothing, np.zeros((rows, ENTITY_COUNT), bool))


def settles(before: bytes, job: Job) -> bool:
    """True when the record that stood there settles `job` without a new decision: the same rule as in lua/observe.lua."""
    claim = job.claim
    return before[: len(claim)] != claim or (len(before) > len(claim) and job.position[:1] == b"h")


def _sound(value: bytes, header: bytes, header_bytes: int) -> bool:
    """True for no value, or one of this layout, entity and key with whole records."""
    if not value:
        return True
    return len(value) >= header_bytes and (len(value) - header_bytes) % RECORD_BYTES == 0 and value[:HEADER_TELLS_BYTES] == header
