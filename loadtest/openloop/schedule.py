"""The arithmetic of a load at a constant rate: when each request is due, what a window saw, and when a run doesn't count.

Latency is from the time a request was due to the time its answer was read, so a request that had to wait for a connection waited.
How late the generator itself was is kept apart: a run in which that is more than a little is void. No clock is read here.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

import numpy as np

# A generator that is later than this for one request in a hundred measured itself, unless that is nothing beside the latency it saw:
# where a service is far beyond its limit and answers take seconds, everyone waits for a core.
BEHIND_P99_MS_MAX = 5.0
BEHIND_SHARE_MAX = 0.05
# With fewer answers than this of those offered in a window, the rate was not reached.
REACHED_SHARE = 0.98


@dataclass(frozen=True)
class Schedule:
    """`count` requests, `rate_per_s` a second: request i is due at `start_s` + i / rate. Seconds of any one clock."""

    rate_per_s: float
    start_s: float
    count: int

    def __post_init__(self) -> None:
        if self.rate_per_s <= 0 or self.count < 1:
            raise ValueError("a schedule has a rate above 0 and a request or more")

    def due_s(self, i: int) -> float:
        return self.start_s + i / self.rate_per_s

    def due_by(self, now_s: float) -> int:
        """How many requests are due at or before `now_s`."""
        since = now_s - self.start_s
        return 0 if since < 0 else min(self.count, int(since * self.rate_per_s) + 1)


@dataclass(frozen=True)
class Windows:
    """`warm_up_s` that doesn't count, then `count` windows of `seconds` each. A request belongs to the window it is due in."""

    warm_up_s: float
    seconds: float
    count: int

    @property
    def total_s(self) -> float:
        return self.warm_up_s + self.count * self.seconds

    def edges_s(self) -> list[float]:
        """Seconds after the start at which windows begin and the last ends: `count` + 1 of them."""
        return [self.warm_up_s + k * self.seconds for k in range(self.count + 1)]

    def requests(self, k: int, schedule: Schedule) -> tuple[int, int]:
        """The first request due in window `k` and the first behind it."""
        begin, end = self.edges_s()[k : k + 2]
        rate = schedule.rate_per_s
        return min(schedule.count, math.ceil(begin * rate - 1e-9)), min(schedule.count, math.ceil(end * rate - 1e-9))


@dataclass(frozen=True)
class Window:
    """Milliseconds. `censored` requests had no answer when the run ended: their latency is what they had waited by then, at least.

    `achieved_per_s` is how many answers came while it lasted, to whichever requests. `behind_*` is how late the generator was, at most.
    """

    offered_per_s: float
    achieved_per_s: float
    seconds: float
    requests: int
    censored: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    behind_p99_ms: float
    behind_max_ms: float

    @property
    def void(self) -> bool:
        return is_void(self.behind_p99_ms, self.p99_ms)

    @property
    def reached_rate(self) -> bool:
        return self.censored == 0 and self.achieved_per_s >= REACHED_SHARE * self.offered_per_s


def is_void(behind_p99_ms: float, p99_ms: float) -> bool:
    """Written so that NaN, a run that measured nothing, is void too."""
    return not (behind_p99_ms <= BEHIND_P99_MS_MAX or behind_p99_ms <= BEHIND_SHARE_MAX * p99_ms)


@dataclass
class Record:
    """What happened to each request, by number: seconds of latency and of the generator's own delay; below 0: nothing yet."""

    count: int
    latency_s: array[float] = field(init=False)
    behind_s: array[float] = field(init=False)

    def __post_init__(self) -> None:
        self.latency_s = array("d", [-1.0]) * self.count
        self.behind_s = array("d", [-1.0]) * self.count

    def window(self, k: int, windows: Windows, schedule: Schedule, end_s: float) -> Window:
        """What window `k` came to in a run that ended at `end_s`."""
        first, stop = windows.requests(k, schedule)
        all_due = schedule.start_s + np.arange(self.count) / schedule.rate_per_s
        all_latency = np.array(self.latency_s, np.float64)
        answered_s = (all_due + all_latency)[all_latency >= 0]
        begin_s, over_s = (schedule.start_s + s for s in windows.edges_s()[k : k + 2])
        answered = int(np.count_nonzero((answered_s >= begin_s) & (answered_s < over_s)))
        latency, behind = all_latency[first:stop], np.array(self.behind_s[first:stop], np.float64)
        censored = latency < 0
        latency = np.where(censored, end_s - all_due[first:stop], latency)
        # What was never sent waited for a connection to the end: the generator is not to blame.
        behind = np.where(behind < 0, 0.0, behind)
        quantiles = [math.nan] * 4 if len(latency) == 0 else np.quantile(latency, [0.5, 0.99, 0.999, 1.0]).tolist()
        late = [math.nan] * 2 if len(behind) == 0 else np.quantile(behind, [0.99, 1.0]).tolist()
        return Window(
            schedule.rate_per_s,
            answered / windows.seconds,
            windows.seconds,
            stop - first,
            int(censored.sum()),
            *(1000.0 * q for q in quantiles),
            *(1000.0 * q for q in late),
        )
