"""How many transactions may be in flight: a limit that finds itself.

Additive increase, multiplicative decrease on latency (Chiu and Jain 1989; `AIMDLimit` in Netflix' concurrency-limits): while
decisions come in time and the limit is used, it grows; when one comes late and the event loop is what is busy, it shrinks, by as much as
it was late (what is in flight is the rate times the latency: Little's law). A decision
that is late because Redis or Kafka is slow shrinks nothing: their waits have budgets of their own, and fewer transactions in flight would
not make them faster. Called once a batch.
"""

from __future__ import annotations

import math

# Fewer would cost more in fixed costs a batch than they save in waiting.
LIMIT_LEAST = 64
# Lateness counts once every batch of so long a time was late (as in CoDel, RFC 8289): a single stall leaves nothing behind.
INTERVAL_S = 0.1
BACKOFF_MOST = 0.25
BACKOFF_LEAST = 0.9
# Half of the time to answer in is for waiting and deciding; the other half for what comes behind: Kafka, sockets, the caller's own CPU.
TARGET_SHARE = 0.5
# The loop is busy when it comes this late to what is due. An idle one is some 0.1 ms late.
BUSY_LAG_S = 0.002
assert 0 < BACKOFF_MOST < BACKOFF_LEAST < 1


class AdaptiveLimit:
    """`limit` is in transactions, from LIMIT_LEAST to `limit_max`; it begins there, and the first late batch brings it down."""

    def __init__(self, limit_max: int, budget_s: float) -> None:
        self._limit_max = float(limit_max)
        self._least = float(min(LIMIT_LEAST, limit_max))
        self.target_s = budget_s * TARGET_SHARE
        self._size = self._limit_max
        self._settles_s = 0.0
        self._late_since_s: float | None = None
        self.limit = limit_max

    def note(self, now_s: float, latency_s: float, in_flight: int, loop_lag_s: float) -> None:
        """A batch was decided at `now_s` (monotonic), the middle one of it `latency_s` after its arrival, with `in_flight` under way."""
        if latency_s > self.target_s:
            if self._late_since_s is None:
                self._late_since_s = now_s
            if loop_lag_s > BUSY_LAG_S and now_s >= max(self._settles_s, self._late_since_s + INTERVAL_S):
                # What was never used tells nothing: go down from what is under way.
                backoff = max(BACKOFF_MOST, min(BACKOFF_LEAST, self.target_s / latency_s))
                self._size = max(self._least, min(self._size, in_flight) * backoff)
                # What is in flight now was admitted under the old limit: its latency is no news.
                self._settles_s = now_s + latency_s
        else:
            self._late_since_s = None
            if in_flight * 2 >= self._size:
                self._size = min(self._limit_max, self._size + math.sqrt(self._size) / 4)
        self.limit = int(self._size)
