"""Asks Redis itself how it is: memory used, its limit, connections; of each node of a cluster. Part of the gateway (gateway/app.py).

An INFO every few seconds over a connection that no decision waits for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from gateway.metrics import Metrics
from gateway.redis.cluster import ClusterLink
from gateway.redis.link import RedisLink, RedisReplyError, RedisUnavailableError

log = logging.getLogger(__name__)

LOOK_S = 5.0
ANSWER_S = 1.0
SECTIONS = ("memory", "clients")


class RedisWatch:
    """`links` are all of this process; `asked` is the one that INFO goes over."""

    def __init__(self, links: Sequence[RedisLink | ClusterLink], asked: RedisLink | ClusterLink, metrics: Metrics) -> None:
        self._links = links
        self._asked = asked
        self._metrics = metrics
        self._connects = 0
        metrics.redis_ready.set_function(lambda: all(link.ready for link in links))

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Ask each node once. One that doesn't answer keeps what it last said: `fraudgate_redis_ready` tells."""
        connects = sum(node.reconnects for link in self._links for node in _nodes(link))
        # A node that has left a cluster takes its count with it.
        self._metrics.redis_connects.inc(max(0, connects - self._connects))
        self._connects = connects
        for node in _nodes(self._asked):
            if not node.ready:
                continue
            try:
                told = fields_of([await node.call(("INFO", section), ANSWER_S) for section in SECTIONS])
            except (RedisUnavailableError, RedisReplyError) as exc:
                log.debug("redis: %s doesn't tell how it is: %s", node.address, exc)
                continue
            metrics, address = self._metrics, node.address
            metrics.redis_memory.labels(address).set(float(told.get("used_memory", "0")))
            metrics.redis_memory_limit.labels(address).set(float(told.get("maxmemory", "0")))
            metrics.redis_clients.labels(address).set(float(told.get("connected_clients", "0")))


def fields_of(answers: Sequence[bytes]) -> dict[str, str]:
    """The fields of INFO's answers."""
    lines = [line for answer in answers for line in answer.decode().splitlines() if not line.startswith("#")]
    return {name: value for name, colon, value in (line.partition(":") for line in lines) if colon}


def _nodes(link: RedisLink | ClusterLink) -> list[RedisLink]:
    return [link] if isinstance(link, RedisLink) else link.nodes
