"""What gateways tell each other through Redis, once a second and off the hot path: what exploration has spent today.

Sightings of the guard go the same way (gateway/models/guard.py). `asker` makes the way, for one Redis and for a cluster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from gateway.contracts.redis_address import hash_slot
from gateway.metrics import Metrics
from gateway.models.explore import DAY_MS, LossCap
from gateway.models.model import ModelSlot
from gateway.redis.cluster import ClusterLink
from gateway.redis.link import RedisLink, RedisReplyError, RedisUnavailableError

TICK_S = 1.0
TIMEOUT_S = 0.5
# A day's count outlives its day by a little.
KEEP_S = 3 * 86_400
# How long the others' part is believed. Without it nothing is explored: the cap must hold for all together.
STALE_S = 10.0

Ask = Callable[[str, Sequence[Any], float], Awaitable[Any]]


def asker(link: RedisLink | ClusterLink) -> Ask:
    """Asks one command, which goes where its `key` is. Raises `RedisUnavailableError` or `RedisReplyError`."""

    async def ask(key: str, command: Sequence[Any], timeout_s: float) -> Any:
        if not link.ready:
            raise RedisUnavailableError("no connection")
        if isinstance(link, ClusterLink):
            [reply] = await link.call_all([(hash_slot(key), command)], timeout_s)
            return reply
        return await link.call(tuple(command), timeout_s)

    return ask


class SharedCap:
    """Adds what this gateway explored to what all did, and learns that. `now_ms` is the wall clock."""

    def __init__(
        self,
        cap: LossCap,
        slot: ModelSlot,
        ask: Ask,
        metrics: Metrics,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._cap = cap
        self._slot = slot
        self._ask = ask
        self._metrics = metrics
        self._now_ms = now_ms

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if self._slot.live.routing.explore_share > 0:
                await self.tick()
            await asyncio.sleep(TICK_S)

    async def tick(self) -> None:
        """One update. When Redis doesn't answer, what was spent is told next time."""
        day = self._now_ms() // DAY_MS
        self._cap.turn(day)
        key, sent = f"fraudgate:explored:{day}", self._cap.own_minor
        try:
            total = await self._ask(key, ("INCRBY", key, str(sent)), TIMEOUT_S)
            await self._ask(key, ("EXPIRE", key, str(KEEP_S)), TIMEOUT_S)
        except (RedisUnavailableError, RedisReplyError):
            return
        self._cap.shared(day, int(total), sent)
        self._metrics.explore_spent_minor.set(self._cap.spent_minor)
