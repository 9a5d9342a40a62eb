"""How the store's one step is done: by one script call on one Redis, by two rounds of small calls on a cluster.

On a cluster a script may touch one hash slot only. So the transactions are claimed first, and then each entity of those that nothing
settles is observed by a call of its own. A crash between the two leaves a claim without an answer, which the redelivery from Kafka
or the caller's retry decides. Both backends give the reply of lua/observe.lua, and the store decodes it alike.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.contracts.layout import FINGERPRINT_BYTES, OBSERVE_ENTITY_LUA, OBSERVE_LUA, POSITION, PROGRESS_KEY
from gateway.contracts.redis_address import hash_slot
from gateway.redis_cluster import ClusterLink, Keyed
from gateway.redis_link import Argument, RedisLink, RedisReplyError, RedisUnavailableError

CLAIM_BYTES = FINGERPRINT_BYTES + POSITION.size
PROGRESS_SLOT = hash_slot(PROGRESS_KEY)


@dataclass(slots=True)
class Call:
    """KEYS and ARGV of lua/observe.lua."""

    keys: list[str]
    values: list[Argument]


@dataclass(slots=True)
class Answered:
    """An answer to be stored: the idempotency key, the claim and the answer behind it, and how long to keep it in milliseconds."""

    key: str
    record: bytes
    ttl_ms: int


class Backend(Protocol):
    """All raise `RedisUnavailableError`; what waits also `RedisReplyError`. `deadline_s` is time.monotonic()."""

    @property
    def ready(self) -> bool: ...

    async def progress(self, deadline_s: float) -> bytes | None:
        """The progress record of the Spark job."""

    async def observe(self, call: Call, deadline_s: float) -> list[Any]:
        """The reply of lua/observe.lua."""

    def record(self, answers: Sequence[Answered], failed: Callable[[int], None]) -> None:
        """Write answers at once. `failed` is told later how many could not be stored."""


def backend_of(link: RedisLink | ClusterLink) -> Backend:
    return ClusterRedis(link) if isinstance(link, ClusterLink) else SingleRedis(link)


class SingleRedis:
    """One Redis: one script call for a batch."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._sha = _sha(OBSERVE_LUA)
        link.greeting.append(("SCRIPT", "LOAD", OBSERVE_LUA))

    @property
    def ready(self) -> bool:
        return self._link.ready

    async def progress(self, deadline_s: float) -> bytes | None:
        value: bytes | None = await self._link.call(("GET", PROGRESS_KEY), deadline_s - time.monotonic())
        return value

    async def observe(self, call: Call, deadline_s: float) -> list[Any]:
        arguments = [len(call.keys), *call.keys, *call.values]
        reply: list[Any]
        try:
            reply = await self._link.call(("EVALSHA", self._sha, *arguments), deadline_s - time.monotonic())
        except RedisReplyError as exc:
            if not str(exc).startswith("NOSCRIPT"):
                raise
            reply = await self._link.call(("EVAL", OBSERVE_LUA, *arguments), deadline_s - time.monotonic())
        return reply

    def record(self, answers: Sequence[Answered], failed: Callable[[int], None]) -> None:
        def done(future: asyncio.Future[Any]) -> None:
            if future.cancelled() or future.exception() is not None:
                failed(1)

        for future in self._link.send_all([_store(answer) for answer in answers]):
            future.add_done_callback(done)


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

    async def observe(self, call: Call, deadline_s: float) -> list[Any]:
        if not self._link.ready:
            # Nothing is claimed that could then not be observed.
            raise RedisUnavailableError("a part of the cluster is out of reach")
        claims, observations = self._split(call)
        progress: list[Keyed] = [(PROGRESS_SLOT, ("GET", PROGRESS_KEY))]
        if call.values[0] != "1":
            # A what-if read claims nothing: one round is enough.
            every = [command for of_row in observations for command in of_row]
            replies = await self._link.call_all(progress + every, deadline_s - time.monotonic())
            return _joined(replies[0], [None] * len(claims), observations, replies[1:])
        replies = await self._link.call_all(progress + claims, deadline_s - time.monotonic())
        before = replies[1:]
        for row, (_, command) in enumerate(claims):
            claim = command[2]
            assert isinstance(claim, bytes)
            if before[row] is not None and settles(before[row], claim):
                observations[row] = []
        every = [command for of_row in observations for command in of_row]
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise RedisUnavailableError("no time left to observe")
        observed = await self._link.call_all(every, left_s) if every else []
        return _joined(replies[0], before, observations, observed)

    def _split(self, call: Call) -> tuple[list[Keyed], list[list[Keyed]]]:
        """By transaction: the command that claims it, and those that observe its entities."""
        keys, values = call.keys, call.values
        update, claim_ttl_ms, head_ttl_ms, early_max = values[:4]
        claims: list[Keyed] = []
        observations: list[list[Keyed]] = []
        k, a = 1, 4
        while k < len(keys):
            claims.append((hash_slot(keys[k]), ("SET", keys[k], values[a], "NX", "GET", "PX", claim_ttl_ms)))
            entities = values[a + 1]
            assert isinstance(entities, int)
            k, a = k + 1, a + 2
            of_row: list[Keyed] = []
            for _ in range(entities):
                head = keys[k]
                arguments = (update, head_ttl_ms, *values[a : a + 3], early_max)
                of_row.append((hash_slot(head), ("EVALSHA", self._sha, "2", head, keys[k + 1], *arguments)))
                k, a = k + 2, a + 3
            observations.append(of_row)
        return claims, observations

    def record(self, answers: Sequence[Answered], failed: Callable[[int], None]) -> None:
        """When one can't be stored, all that were written with it count as failed."""

        def done(task: asyncio.Task[list[Any]]) -> None:
            if task.cancelled() or task.exception() is not None:
                failed(len(answers))

        commands: list[Keyed] = [(hash_slot(answer.key), _store(answer)) for answer in answers]
        if commands:
            self._link.send_all(commands).add_done_callback(done)


def _joined(progress: Any, before: list[Any], observations: list[list[Keyed]], observed: list[Any]) -> list[Any]:
    """The replies of single calls as lua/observe.lua would give them for the batch."""
    reply: list[Any] = [progress]
    at = 0
    for row, of_row in enumerate(observations):
        reply.append(before[row])
        for values in observed[at : at + len(of_row)]:
            reply += values
        at += len(of_row)
    return reply


def settles(before: bytes, claim: bytes) -> bool:
    """True when the record that stood there settles a transaction without a new decision: the same rule as in lua/observe.lua."""
    return before[:CLAIM_BYTES] != claim or (len(before) > CLAIM_BYTES and claim[FINGERPRINT_BYTES : FINGERPRINT_BYTES + 1] == b"h")


def _store(answer: Answered) -> tuple[Argument, ...]:
    return ("SET", answer.key, answer.record, "PX", answer.ttl_ms)


def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
