"""Features from Redis: one step a batch that claims, observes and reads, and its decoding into the model's input.

How the step is done on one Redis or on a cluster is gateway/redis/backend.py's. Called by the scorer. Redis may be silent or dead:
then `observe` says None within the given time and the batch goes on without.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from gateway.contracts.features import ENTITIES, FEATURE_NAMES, FEATURES, LABELLED, speed_kmh
from gateway.contracts.layout import BASE_STEP, ENTITY_RECORD, PROGRESS_KEY, Progress, head_key, idempotency_key
from gateway.contracts.windows import NEVER, SETTLE_MS
from gateway.kernels.asking import ENTITY_COUNT, TEXT_COUNT, entity_records
from gateway.kernels.features import decode, working_space
from gateway.kernels.request import request_features
from gateway.redis.backend import Call, Found, Kept, backend_of, nothing_found
from gateway.redis.cluster import ClusterLink
from gateway.redis.link import RedisLink, RedisReplyError, RedisUnavailableError
from gateway.scoring.job import Job
from gateway.scoring.requests import Requests, hashes_of

log = logging.getLogger(__name__)

# The Spark job may have counted a record that arrived up to this much before its newest one.
TILES_AHEAD_MARGIN_MS = 1000
# Of refused entities so many are remembered, to be looked at when they come again.
SUSPECTS_MAX = 1000
# How Redis begins its refusal of a write at its memory limit.
FULL = "OOM"
# Where a feature is an entity's speed: the entity, the column.
SPEEDS = [
    (i, column) for i, e in enumerate(ENTITIES) for column, f in enumerate(FEATURES) if (f.entity, f.aggregate) == (e.name, "speed")
]
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
    # How long Redis was waited for.
    round_trip_s: float = 0.0


@dataclass(slots=True)
class _Plan:
    """What Redis is asked, and what is needed to read its reply: columns of `gateway.kernels.asking.entity_records`."""

    call: Call
    dims: npt.NDArray[np.uint16]
    country: npt.NDArray[np.int64]
    base_us: int


class Store:
    """`now_ms` is the wall clock. `claim_ttl_ms` is the idempotency window."""

    def __init__(
        self,
        link: RedisLink | ClusterLink,
        claim_ttl_ms: int,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._redis = backend_of(link)
        self.claim_ttl_ms = claim_ttl_ms
        self._now_ms = now_ms
        self._space = working_space()
        self._hashed = np.empty(TEXT_COUNT, np.uint16)
        self._progress: Progress | None = None
        # Once asked, each reply brings it along.
        self._knows_progress = False
        self._unanswered_since_ms: int | None = None
        # Checks of entities of which a value was refused: their heads are looked at before the next event, and begun anew if need be.
        self._suspects: set[int] = set()
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

    async def observe(self, batch: Sequence[Job], requests: Requests, timeout_s: float, update: bool = True) -> Observation | None:
        """One step for `batch`. None when Redis can't be used within `timeout_s` seconds.

        With `update` each transaction is claimed and appended to its entities; without, nothing is changed (what-if reads).
        """
        return await self._observe(batch, requests, timeout_s, update)

    async def observe_decided(self, batch: Sequence[Job], requests: Requests, timeout_s: float) -> Observation | None:
        """The same of what was decided without Redis, afterwards. Its own answer, if that is stored already, settles nothing."""
        return await self._observe(batch, requests, timeout_s, update=True, answered=True)

    async def _observe(
        self, batch: Sequence[Job], requests: Requests, timeout_s: float, update: bool, answered: bool = False
    ) -> Observation | None:
        deadline_s = time.monotonic() + timeout_s
        try:
            if not self._knows_progress:
                self._note_progress(await self._redis.progress(deadline_s))
            plan = self._plan(batch, requests, update, answered)
            found = await self._redis.observe(plan.call, deadline_s)
        except RedisUnavailableError:
            return None
        except RedisReplyError as exc:
            log.warning("redis: the observe script failed: %s", exc)
            if update and str(exc).startswith(FULL):
                return await self._look_only(batch, requests, deadline_s - time.monotonic())
            return None
        self._note_progress(found.progress)
        return self._decode(plan, found, update)

    async def _look_only(self, batch: Sequence[Job], requests: Requests, timeout_s: float) -> Observation | None:
        """What Redis knows when it is at its memory limit and takes no writes: nothing is claimed or observed, all of it is stale."""
        self.refused_writes += len(batch)
        found = await self.observe(batch, requests, timeout_s, update=False) if timeout_s > 0 else None
        if found is not None:
            found.stale[:] = True
            found.seq[:] = -1
            found.written = False
        return found

    def record(self, records: Sequence[tuple[Job, bytes]], commands: bytes | None = None) -> None:
        """Store idempotency records, claim and answer, for the idempotency window. Written at once, not waited for.

        `commands` are the same as gateway.scoring.answers writes them. A later `observe` on this connection comes after it.
        """
        try:
            if commands is None or not self._redis.write(commands, len(records), self._count_failed):
                kept = [Kept(idempotency_key(job.transaction_id), record, self.claim_ttl_ms) for job, record in records]
                self._redis.record(kept, self._count_failed)
        except RedisUnavailableError:
            self._count_failed(len(records))

    async def settle(self, records: Sequence[tuple[Job, bytes]], timeout_s: float) -> list[bytes | None]:
        """Store the same where no answer is yet, and tell which answers are there: those stand. None when Redis doesn't know."""
        kept = [Kept(idempotency_key(job.transaction_id), record, self.claim_ttl_ms) for job, record in records]
        try:
            return await self._redis.settle(kept, time.monotonic() + timeout_s)
        except (RedisUnavailableError, RedisReplyError) as exc:
            log.warning("redis: %d late answers may have been given elsewhere as well: %s", len(kept), exc)
            self._count_failed(len(kept))
            return [None] * len(kept)

    def _count_failed(self, records: int) -> None:
        self.failed_records += records

    def _plan(self, batch: Sequence[Job], requests: Requests, update: bool, answered: bool = False) -> _Plan:
        rows = len(batch)
        now_ms = self._now_ms()
        # A head that is born now numbers its events from here: later than any that the entity had before.
        base_us = now_ms * 1000 // BASE_STEP * BASE_STEP
        # The Spark job has counted what arrived later: where the early list can't tell, it has counted this one too.
        counted = np.zeros(rows, np.uint8)
        arrived_ms = np.fromiter((job.arrived_ms for job in batch), np.int64, rows)
        # What arrived or was made so long ago may have been observed before, and its claim expired.
        look = np.minimum(arrived_ms, requests.t_ms) < now_ms - self.claim_ttl_ms // 2
        if self._progress is not None:
            counted[arrived_ms < self._progress.arrived_through_ms - TILES_AHEAD_MARGIN_MS] = 1
        records = np.zeros(rows * ENTITY_COUNT, ENTITY_RECORD)
        dims = np.empty((rows * ENTITY_COUNT, 3), np.uint16)
        country = np.empty(rows, np.int64)
        entity_records(
            requests.buf,
            requests.starts,
            requests.lengths,
            requests.numbers,
            requests.places,
            hashes_of(requests),
            counted,
            look.astype(np.uint8),
            base_us,
            now_ms // 1000 % 65_536,
            records,
            dims,
            country,
            self._hashed,
        )
        if self._suspects:
            records["look"] |= np.isin(records["check"], np.fromiter(self._suspects, np.uint32))
        claims = b"".join([job.held_claim for job in batch])
        return _Plan(Call(batch, requests, claims, records, update, self.claim_ttl_ms, answered), dims, country, base_us)

    def _suspect(self, checks: npt.NDArray[np.uint32], refused: npt.NDArray[np.bool_], looked: npt.NDArray[np.bool_]) -> None:
        """Remember the entities whose values were refused, and forget those that were `looked` at and are sound again."""
        self.refused_values += int(refused.sum())
        if self._suspects:
            self._suspects.difference_update(checks[looked & ~refused].tolist())
        room = SUSPECTS_MAX - len(self._suspects)
        self._suspects.update(checks[refused][:room].tolist())

    def _renew(self, batch: Sequence[Job], entities: npt.NDArray[np.bool_]) -> None:
        """Heads live on with each batch of tiles. That one which is near its end must not take a payment with it that no tile holds yet."""
        keys = [
            head_key(ENTITIES[e].name, getattr(batch[row].transaction, ENTITIES[e].field))
            for row, e in np.argwhere(entities).tolist()
        ]
        if keys:
            with contextlib.suppress(RedisUnavailableError):
                self._redis.renew(keys)

    def _note_progress(self, value: bytes | None) -> None:
        self._knows_progress = True
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

    def rehearse(self, batch: Sequence[Job], requests: Requests) -> Observation:
        """The whole way of a batch of which Redis holds nothing, without Redis: so that all of it is compiled and loaded."""
        plan = self._plan(batch, requests, update=True)
        self._redis.pack(plan.call)
        return self._decode(plan, nothing_found(plan.call), update=False)

    def _decode(self, plan: _Plan, found: Found, update: bool) -> Observation:
        call, progress, now_ms = plan.call, self._progress, self._now_ms()
        requests, rows = call.requests, len(call.batch)
        matrix = request_only_matrix(requests)
        last = np.empty((rows * ENTITY_COUNT, 3))
        last[:, 0] = NEVER
        seq = np.full((rows, ENTITY_COUNT), -1, np.int64)
        label_changes = np.full((rows, len(LABELLED)), -1, np.int64)
        stale = np.zeros(rows, bool)
        refused = np.zeros(rows * ENTITY_COUNT, bool)
        decode(
            found.values.buf,
            found.values.starts,
            found.values.sizes,
            np.ascontiguousarray(call.records["transaction"]),
            found.settled,
            requests.lengths,
            requests.numbers,
            call.records["check"],
            plan.dims,
            plan.country,
            plan.base_us,
            matrix,
            last,
            seq,
            label_changes,
            stale,
            refused,
            *self._space,
        )
        looked = np.repeat(~found.settled, ENTITY_COUNT) if update else np.zeros(rows * ENTITY_COUNT, bool)
        self._suspect(call.records["check"], refused, looked)
        if update:
            # The number of an older life, and no payment before this one within LAST_MS_MAX.
            self._renew(call.batch, (seq >= 0) & (seq < plan.base_us) & (last[:, 0].reshape(seq.shape) == NEVER))
        _fill_in_speeds(matrix, requests, last.reshape(rows, ENTITY_COUNT, 3))
        if self._behind(now_ms, update) or (progress is not None and progress.lost_at_ms):
            stale[:] = True
        return Observation(
            settled=[
                record if is_settled else None for record, is_settled in zip(found.before, found.settled.tolist(), strict=True)
            ],
            matrix=matrix,
            seq=seq,
            label_changes=label_changes,
            stale=stale,
            tiles_age_ms=None if progress is None else max(0, now_ms - progress.written_at_ms),
            round_trip_s=found.round_trip_s,
        )


def _fill_in_speeds(matrix: npt.NDArray[np.float32], requests: Requests, last: npt.NDArray[np.float64]) -> None:
    """The one aggregate that numpy computes: its sines are not those of the C library, and all engines must agree to the bit."""
    for entity, column in SPEEDS:
        last_ms, latitude, longitude = last[:, entity].T
        # Without both places it stays unknown.
        rows = np.flatnonzero((last_ms != NEVER) & ~np.isnan(latitude) & ~np.isnan(requests.places[:, 0]))
        if len(rows):
            lat, lon = requests.places[rows, 0], requests.places[rows, 1]
            matrix[rows, column] = speed_kmh(last_ms[rows], latitude[rows], longitude[rows], requests.t_ms[rows], lat, lon)


def request_only_matrix(requests: Requests) -> npt.NDArray[np.float32]:
    """The model's input when no entity is known, (batch, features) float32: the request's own features, the rest NaN."""
    matrix = np.full((len(requests), len(FEATURE_NAMES)), np.nan, np.float32)
    request_features(requests.numbers, requests.places, matrix)
    return matrix
