"""How the store's one step is done: by one script call and an MGET on one Redis, by two rounds of small calls on a cluster.

On a cluster a script may touch one hash slot only. So the transactions are claimed first, and then each entity of those that nothing
settles is observed by a call of its own. A crash between the two leaves a claim without an answer, which the redelivery from Kafka
or the caller's retry decides. Both backends give the same, and the store decodes it alike.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gateway.contracts.features import ENTITIES, LABELLED
from gateway.contracts.layout import (
    CLAIM_BYTES,
    EARLY_MAX,
    FINGERPRINT_BYTES,
    HEAD_TTL_MS,
    OBSERVE_ENTITY_LUA,
    OBSERVE_LUA,
    PROGRESS_KEY,
    SETTLE_LUA,
    head_key,
    idempotency_key,
    tiles_key,
)
from gateway.contracts.redis_address import hash_slot
from gateway.kernels.asking import ENTITY_COUNT, ENTITY_TEXT, ROW_BYTES_MAX, script_call, values_call
from gateway.kernels.intake import Int64s
from gateway.kernels.raw import Bytes
from gateway.kernels.resp import NO_REPLY, bulks_in, replies_end
from gateway.redis.cluster import ClusterLink, Keyed
from gateway.redis.link import Argument, RedisLink, RedisReplyError, RedisUnavailableError, parsed, replies_of
from gateway.scoring.job import Job
from gateway.scoring.requests import Requests, edges_of

PROGRESS_SLOT = hash_slot(PROGRESS_KEY)
_CAPACITIES = np.array([e.head_events_max for e in ENTITIES], "<u2").tobytes()
_MULTI, _EXEC = b"*1\r\n$5\r\nMULTI\r\n", b"*1\r\n$4\r\nEXEC\r\n"
# What stands before the replies of two commands between them.
_QUEUED = b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n"
_LABELLED_TEXT = [ENTITY_TEXT[i] for i in LABELLED]


@dataclass(slots=True)
class Call:
    """What Redis is asked for `batch`. `claims` is (rows * CLAIM_BYTES,), `records` (rows * ENTITY_COUNT,) ENTITY_RECORD.

    `answered`: all of it was decided without Redis and is observed afterwards, so that its own answers settle nothing.
    """

    batch: Sequence[Job]
    requests: Requests
    claims: bytes
    records: npt.NDArray[np.void]
    update: bool
    claim_ttl_ms: int
    answered: bool = False


@dataclass(slots=True)
class Values:
    """Where values lie in `buf`: `sizes` (n,) is below 1 for one that isn't there."""

    buf: Bytes
    starts: Int64s
    sizes: Int64s

    @classmethod
    def of(cls, values: Sequence[bytes]) -> Values:
        edges = edges_of(values)
        return cls(np.frombuffer(b"".join(values), np.uint8), edges[:-1], np.diff(edges))


@dataclass(slots=True)
class Found:
    """What was found: the progress record, each transaction's idempotency record, which of them settle theirs, and the values as
    `gateway.kernels.features.decode` wants them: tiles, frauds, heads with the batch in them.
    """

    progress: bytes | None
    before: list[bytes | None]
    settled: npt.NDArray[np.bool_]
    values: Values
    # From writing the commands until all replies were there.
    round_trip_s: float = 0.0


@dataclass(slots=True)
class Kept:
    """A record to be stored under its idempotency key, claim and answer behind it, and how long to keep it in milliseconds."""

    key: str
    record: bytes
    ttl_ms: int


class Backend(Protocol):
    """All raise `RedisUnavailableError`; what waits also `RedisReplyError`. `deadline_s` is time.monotonic()."""

    @property
    def ready(self) -> bool: ...

    async def progress(self, deadline_s: float) -> bytes | None:
        """The progress record of the Spark job."""

    async def observe(self, call: Call, deadline_s: float) -> Found:
        """One step for a batch: claim, append, read. Without `call.update` only the last."""

    def pack(self, call: Call) -> object:
        """The commands that `observe` sends first."""

    def record(self, answers: Sequence[Kept], failed: Callable[[int], None]) -> None:
        """Write answers at once. `failed` is told later how many could not be stored."""

    def write(self, commands: bytes, count: int, failed: Callable[[int], None]) -> bool:
        """The same of `count` commands as they go over the wire. False when they don't all go to one place: nothing was written then."""

    async def settle(self, answers: Sequence[Kept], deadline_s: float) -> list[bytes | None]:
        """Store each answer where none is yet; what is there already."""

    def renew(self, heads: Sequence[str]) -> None:
        """Let these keys live for another HEAD_TTL_MS; at once, and nobody is told when it fails."""


def backend_of(link: RedisLink | ClusterLink) -> Backend:
    return ClusterRedis(link) if isinstance(link, ClusterLink) else SingleRedis(link)


class SingleRedis:
    """One Redis: one script call for a batch."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._sha = _sha(OBSERVE_LUA).encode()
        link.greeting.append(("SCRIPT", "LOAD", OBSERVE_LUA))

    @property
    def ready(self) -> bool:
        return self._link.ready

    async def progress(self, deadline_s: float) -> bytes | None:
        value: bytes | None = await self._link.call(("GET", PROGRESS_KEY), deadline_s - time.monotonic())
        return value

    async def observe(self, call: Call, deadline_s: float) -> Found:
        packed = self.pack(call)
        sent_s = time.monotonic()
        raw = await self._both(call, packed, deadline_s)
        found = _read(call, raw)
        if found is None and _refusal(raw).startswith("NOSCRIPT"):
            await self._link.call(("SCRIPT", "LOAD", OBSERVE_LUA), deadline_s - time.monotonic())
            raw = await self._both(call, packed, deadline_s)
            found = _read(call, raw)
        if found is None:
            raise RedisReplyError(_refusal(raw))
        found.round_trip_s = time.monotonic() - sent_s
        for row, record in enumerate(found.before):
            if record is not None:
                found.settled[row] = settles(record, call.batch[row].held_claim, call.answered)
        return found

    async def _both(self, call: Call, packed: bytes, deadline_s: float) -> bytes:
        """The replies of the script and of MGET: one transaction, so that the Spark job moves nothing between heads and tiles.

        A read that changes nothing is the MGET alone, which Redis answers at its memory limit too.
        """
        sent = self._link.send([packed], replies=4 if call.update else 1, raw=True)
        [raw] = await replies_of([sent], deadline_s - time.monotonic())
        found: bytes = raw
        return found

    def pack(self, call: Call) -> bytes:
        """The commands as they go over the wire: written by kernels, for they have thousands of arguments."""
        requests = call.requests
        owners, asked = _asked(requests)
        mget = b"*%d\r\n$4\r\nMGET\r\n" % (1 + asked) + _bulk(PROGRESS_KEY.encode())
        out = np.empty(len(mget) + len(requests) * ROW_BYTES_MAX, np.uint8)
        size = values_call(requests.buf, requests.starts, requests.lengths, np.frombuffer(mget, np.uint8), out)
        values = out[:size].tobytes()
        return b"".join((_MULTI, self._script(call, owners), values, _EXEC)) if call.update else values

    def _script(self, call: Call, owners: int) -> bytes:
        requests = call.requests
        rows = len(requests)
        before = (
            b"*%d\r\n$7\r\nEVALSHA\r\n" % (3 + rows + owners + 5 + 2 * rows) + _bulk(self._sha) + _bulk(b"%d" % (rows + owners))
        )
        between = b"".join(
            [_bulk(b"%d" % n) for n in (call.claim_ttl_ms, HEAD_TTL_MS, EARLY_MAX)]
            + [_bulk(_CAPACITIES), _bulk(b"%d" % call.answered)]
        )
        out = np.empty(len(before) + len(between) + rows * ROW_BYTES_MAX, np.uint8)
        size = script_call(
            requests.buf,
            requests.starts,
            requests.lengths,
            np.frombuffer(call.claims, np.uint8),
            call.records.view(np.uint8),
            np.frombuffer(before, np.uint8),
            np.frombuffer(between, np.uint8),
            out,
        )
        return out[:size].tobytes()

    def record(self, answers: Sequence[Kept], failed: Callable[[int], None]) -> None:
        self.write(b"".join([_store_packed(answer) for answer in answers]), len(answers), failed)

    def write(self, commands: bytes, count: int, failed: Callable[[int], None]) -> bool:
        def done(future: asyncio.Future[list[Any]]) -> None:
            if future.cancelled() or future.exception() is not None:
                failed(count)
                return
            errors = sum(isinstance(reply, RedisReplyError) for reply in future.result())
            if errors:
                failed(errors)

        if count:
            self._link.send([commands], count).replies.add_done_callback(done)
        return True

    async def settle(self, answers: Sequence[Kept], deadline_s: float) -> list[bytes | None]:
        # Whole, not by its hash: it is seldom needed, and a Redis that has lost its scripts knows it too.
        command: list[Argument] = [
            "EVAL",
            SETTLE_LUA,
            len(answers),
            *[a.key for a in answers],
            answers[0].ttl_ms,
            *[a.record for a in answers],
        ]
        found: list[bytes | None] = await self._link.call(command, deadline_s - time.monotonic())
        return found

    def renew(self, heads: Sequence[str]) -> None:
        self._link.send([("PEXPIRE", head, HEAD_TTL_MS) for head in heads])


class ClusterRedis:
    """A Redis Cluster: one round trip that claims a batch, and one that observes it, entity by entity."""

    def __init__(self, link: ClusterLink) -> None:
        self._link = link
        self._sha = _sha(OBSERVE_ENTITY_LUA)
        link.greeting.append(("SCRIPT", "LOAD", OBSERVE_ENTITY_LUA))

    @property
    def ready(self) -> bool:
        return self._link.ready

    async def progress(self, deadline_s: float) -> bytes | None:
        [value] = await self._link.call_all([(PROGRESS_SLOT, ("GET", PROGRESS_KEY))], deadline_s - time.monotonic())
        held: bytes | None = value
        return held

    async def observe(self, call: Call, deadline_s: float) -> Found:
        if not self._link.ready:
            # Nothing is claimed that could then not be observed.
            raise RedisUnavailableError("a part of the cluster is out of reach")
        progress: Keyed = (PROGRESS_SLOT, ("GET", PROGRESS_KEY))
        rows = range(len(call.batch))
        sent_s = time.monotonic()
        if not call.update:
            # A what-if read claims nothing: one round is enough.
            replies = await self._link.call_all([progress, *self._observations(call, rows)], deadline_s - time.monotonic())
            return _found(call, replies[0], [None] * len(rows), replies[1:], time.monotonic() - sent_s)
        progress_now, *before = await self._link.call_all([progress, *self.pack(call)], deadline_s - time.monotonic())
        left = []
        for row, job in enumerate(call.batch):
            if before[row] is None or not settles(before[row], job.held_claim, call.answered):
                left.append(row)
            if before[row] is not None:
                # It may have been observed under that claim.
                call.records["look"][row * ENTITY_COUNT : (row + 1) * ENTITY_COUNT] = 1
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise RedisUnavailableError("no time left to observe")
        observed = await self._link.call_all(self._observations(call, left), left_s) if left else []
        return _found(call, progress_now, before, observed, time.monotonic() - sent_s)

    def pack(self, call: Call) -> list[Keyed]:
        """The commands that claim the transactions."""
        claims: list[Keyed] = []
        for job in call.batch:
            key = idempotency_key(job.transaction_id)
            claims.append((hash_slot(key), ("SET", key, job.held_claim, "NX", "GET", "PX", call.claim_ttl_ms)))
        return claims

    def _observations(self, call: Call, rows: Iterable[int]) -> list[Keyed]:
        """The commands that observe the entities of these transactions."""
        found: list[Keyed] = []
        for row in rows:
            t = call.batch[row].transaction
            for e, entity in enumerate(ENTITIES):
                entity_id = getattr(t, entity.field)
                if entity_id is None:
                    continue
                head = head_key(entity.name, entity_id)
                arguments = (
                    "1" if call.update else "0",
                    HEAD_TTL_MS,
                    EARLY_MAX,
                    entity.head_events_max,
                    call.records[row * ENTITY_COUNT + e].tobytes(),
                )
                # Both keys, so that Redis tells when they are on two sides of a slot's migration.
                tiles = tiles_key(entity.name, entity_id)
                found.append((hash_slot(head), ("EVALSHA", self._sha, "2", head, tiles, *arguments)))
        return found

    def record(self, answers: Sequence[Kept], failed: Callable[[int], None]) -> None:
        """When one can't be stored, all that were written with it count as failed."""

        def done(task: asyncio.Task[list[Any]]) -> None:
            if task.cancelled() or task.exception() is not None:
                failed(len(answers))

        commands: list[Keyed] = [(hash_slot(answer.key), _store(answer)) for answer in answers]
        if commands:
            self._link.send_all(commands).add_done_callback(done)

    def write(self, commands: bytes, count: int, failed: Callable[[int], None]) -> bool:
        return False

    async def settle(self, answers: Sequence[Kept], deadline_s: float) -> list[bytes | None]:
        commands: list[Keyed] = [
            (hash_slot(answer.key), ("EVAL", SETTLE_LUA, 1, answer.key, answer.ttl_ms, answer.record)) for answer in answers
        ]
        replies = await self._link.call_all(commands, deadline_s - time.monotonic())
        return [found for [found] in replies]

    def renew(self, heads: Sequence[str]) -> None:
        commands: list[Keyed] = [(hash_slot(head), ("PEXPIRE", head, HEAD_TTL_MS)) for head in heads]
        # An exception that nobody asks for would be logged.
        self._link.send_all(commands).add_done_callback(lambda task: task.cancelled() or task.exception())


def _asked(requests: Requests) -> tuple[int, int]:
    """How many entities a batch names, and how many values are asked for: theirs and the progress."""
    named = requests.lengths >= 0
    owners = int(named[:, ENTITY_TEXT].sum())
    return owners, 1 + 2 * owners + int(named[:, _LABELLED_TEXT].sum())


def _read(call: Call, raw: bytes) -> Found | None:
    """What one Redis replied; nothing is settled yet. None when it is an error, or has one in it."""
    rows, (_, asked) = len(call.batch), _asked(call.requests)
    buf = np.frombuffer(raw, np.uint8)
    starts, sizes = np.empty(rows + asked, np.int64), np.empty(rows + asked, np.int64)
    at = 0
    before: list[bytes | None] = [None] * rows
    if call.update:
        at = bulks_in(buf, len(_QUEUED), starts[:rows], sizes[:rows]) if raw.startswith(_QUEUED) else NO_REPLY
        if at == NO_REPLY:
            return None
        for row in np.flatnonzero(sizes[:rows] >= 0).tolist():
            before[row] = raw[starts[row] : starts[row] + sizes[row]]
    if bulks_in(buf, at, starts[rows:], sizes[rows:]) != len(raw):
        return None
    progress = raw[starts[rows] : starts[rows] + sizes[rows]] if sizes[rows] >= 0 else None
    return Found(progress, before, np.zeros(rows, bool), Values(buf, starts[rows + 1 :], sizes[rows + 1 :]))


def nothing_found(call: Call) -> Found:
    """What one Redis would reply that holds nothing, read as if it came from there."""
    rows, (_, asked) = len(call.batch), _asked(call.requests)
    nil = b"$-1\r\n"
    raw = _QUEUED + b"*%d\r\n%b*%d\r\n%b" % (rows, nil * rows, asked, nil * asked)
    assert replies_end(np.frombuffer(raw, np.uint8), 0, 4) == (len(raw), 0)
    found = _read(call, raw)
    assert found is not None, "the reply above is a whole one"
    return found


def _refusal(raw: bytes) -> str:
    """What Redis says in a reply that can't be read: its first error."""
    replies = parsed(raw)
    for reply in replies + (replies[-1] if replies and isinstance(replies[-1], list) else []):
        if isinstance(reply, Exception):
            return str(reply)
    return f"a reply of another shape, of {len(raw)} bytes"


def _found(call: Call, progress: bytes | None, before: list[bytes | None], observed: list[Any], round_trip_s: float) -> Found:
    """The replies of single calls, one for each entity of each transaction that nothing settles."""
    settled = np.array(
        [
            record is not None and settles(record, job.held_claim, call.answered)
            for record, job in zip(before, call.batch, strict=True)
        ]
    )
    named = call.requests.lengths[:, ENTITY_TEXT] >= 0
    heads, tiles, frauds = [], [], []
    replies = iter(observed)
    for row in range(len(settled)):
        for e in np.flatnonzero(named[row]).tolist():
            head, of_tiles, of_frauds = (b"", b"", b"") if settled[row] else next(replies)
            heads.append(head)
            tiles.append(of_tiles)
            if ENTITIES[e].labelled:
                frauds.append(of_frauds)
    return Found(progress, before, settled, Values.of(tiles + frauds + heads), round_trip_s)


def settles(before: bytes, claim: bytes, answered: bool = False) -> bool:
    """True when the record that stood there settles a transaction without a new decision: the same rule as in lua/observe.lua."""
    if before[:CLAIM_BYTES] != claim:
        return True
    return len(before) > CLAIM_BYTES and not answered and claim[FINGERPRINT_BYTES : FINGERPRINT_BYTES + 1] == b"h"


def _store(answer: Kept) -> tuple[Argument, ...]:
    return ("SET", answer.key, answer.record, "PX", answer.ttl_ms)


def _bulk(argument: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(argument), argument)


def _store_packed(answer: Kept) -> bytes:
    """The command of `_store` as it goes over the wire."""
    key, ttl_ms = answer.key.encode(), b"%d" % answer.ttl_ms
    return b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (
        *(len(key), key, len(answer.record), answer.record),
        *(len(ttl_ms), ttl_ms),
    )


def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
