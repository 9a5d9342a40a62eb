"""Transactions that were decided without Redis, and are observed as soon as it answers again, so that no window misses them.

Filled by the scorers, emptied by one task of the gateway. What Redis had observed after all, its reply came too late, keeps its place.
Bounded in number: beyond that the oldest are given up and counted; the Spark job still adds them to the tiles.
"""

from __future__ import annotations

import asyncio
from collections import deque

from gateway.metrics import Metrics
from gateway.redis.store import Store
from gateway.scoring.job import Job, requests_of

JOBS_MAX = 50_000
BATCH_ROWS_MAX = 64
OBSERVE_BUDGET_S = 1.0
RETRY_S = 0.25


class Unobserved:
    """`store` has a connection of its own: nobody's decision waits for this."""

    def __init__(self, store: Store, metrics: Metrics, jobs_max: int = JOBS_MAX, retry_s: float = RETRY_S) -> None:
        self._store = store
        self._metrics = metrics
        self._retry_s = retry_s
        self._jobs: deque[tuple[Job, bytes]] = deque(maxlen=jobs_max)
        self._some = asyncio.Event()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job, record: bytes) -> None:
        """Remember a decided job and its idempotency record."""
        if len(self._jobs) == self._jobs.maxlen:
            self._metrics.unobserved_dropped.inc()
        self._jobs.append((job, record))
        self._metrics.unobserved.set(len(self._jobs))
        self._some.set()

    async def run(self) -> None:
        """Observe what is there, oldest first, until cancelled."""
        while True:
            await self._some.wait()
            if not self._store.ready or not await self._observe_some():
                await asyncio.sleep(self._retry_s)
                continue
            self._metrics.unobserved.set(len(self._jobs))
            if not self._jobs:
                self._some.clear()

    async def _observe_some(self) -> bool:
        """True when the oldest few were observed, and their answers stored for retries."""
        some = [self._jobs[i] for i in range(min(BATCH_ROWS_MAX, len(self._jobs)))]
        batch = [job for job, _ in some]
        found = await self._store.observe_decided(batch, requests_of(batch), OBSERVE_BUDGET_S)
        if found is None or not found.written:
            return False
        self._store.record([pair for pair, settled in zip(some, found.settled, strict=True) if settled is None])
        for pair in some:
            # The deque may have dropped its oldest meanwhile.
            if self._jobs and self._jobs[0] is pair:
                self._jobs.popleft()
        return True
