"""Finds the one row that a batch fails for, so that its neighbours are decided. Used by the Kafka door.

A batch that fails is cut in two until the row stands alone: about 2 log2(n) more calls. Deciding the others again is harmless, since
claims and heads know a transaction by its id. What fails for everyone (a bug, a broken machine) must not empty the topic into
quarantine: no more than `ROWS_MAX` rows are given up within `WINDOW_S`, then the failure is the batch's.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from gateway.scoring.job import Job, Result

log = logging.getLogger(__name__)

ROWS_MAX = 8
WINDOW_S = 60.0
Decide = Callable[[Sequence[Job]], Awaitable[list[Result]]]


class PoisonFilter:
    """`clock_s` is a monotonic clock."""

    def __init__(self, decide: Decide, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._decide = decide
        self._clock_s = clock_s
        self._given_up_s: deque[float] = deque(maxlen=ROWS_MAX)

    async def decide(self, jobs: Sequence[Job]) -> list[Result | None]:
        """A result for each of `jobs`, None for a row that can't be decided. Raises what the scorer raised when too many can't."""
        try:
            return list(await self._decide(jobs))
        except Exception as exc:  # noqa: BLE001
            # Whatever one row may run into.
            if len(jobs) == 1:
                self._give_up(exc)
                return [None]
        half = len(jobs) // 2
        return [*await self.decide(jobs[:half]), *await self.decide(jobs[half:])]

    def _give_up(self, exc: Exception) -> None:
        now_s = self._clock_s()
        if len(self._given_up_s) == ROWS_MAX and now_s - self._given_up_s[0] < WINDOW_S:
            raise exc
        self._given_up_s.append(now_s)
        log.error("scorer: a transaction can't be decided and goes to quarantine", exc_info=exc)
