"""What a soak came to: how many of its requests were good, second by second and fault by fault, and whether that is enough.

Pure arithmetic over what the sender saw. Good: answered 200 within GOOD_MS of when it was due, with one retry at most. What was shed
(429, 503) is not good, nor what never got a free connection. Only requests over HTTP are judged: nobody waits at the Kafka door.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.soak.history import Mask, Sent
from deploy.soak.plan import Happened, Plan
from loadtest.openloop.outcomes import degraded_names

GOOD_MS = 100.0
# A second is good when this share of its requests is.
GOOD_SECOND = 0.999
SUCCESS_LEAST = 0.999
GOOD_SECONDS_LEAST = 0.95
BAD_RUN_S_MOST = 10
# A sender that is later than this for one request in a hundred measured itself.
LATE_P99_MS_MOST = 10.0


@dataclass(frozen=True)
class Window:
    """Requests due in a part of the measured time. Times in milliseconds; `degraded` is the share of the answers that had to do without."""

    name: str
    begin_s: float
    end_s: float
    requests: int
    good: int
    retried: int
    shed: int
    failed: int
    late: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    degraded: float

    @property
    def good_share(self) -> float:
        return self.good / self.requests if self.requests else math.nan


@dataclass(frozen=True)
class Seconds:
    """By second of the measured time, all (seconds,)."""

    requests: npt.NDArray[np.int64]
    good: npt.NDArray[np.int64]
    p99_ms: npt.NDArray[np.float64]
    # How late the sender itself was, at its worst: as told by the payments for Kafka, which wait for nothing. Others wait for a connection.
    late_ms: npt.NDArray[np.float64]

    @property
    def stood_still(self) -> Mask:
        """Those in which the sender, which goes before everybody, was held up for longer than an answer may take: the machine was, then."""
        found: Mask = self.late_ms > GOOD_MS
        return found

    @property
    def good_share_otherwise(self) -> float:
        """Of the requests in the other seconds."""
        otherwise = ~self.stood_still
        requests = int(self.requests[otherwise].sum())
        return int(self.good[otherwise].sum()) / requests if requests else math.nan

    @property
    def good_share(self) -> npt.NDArray[np.float64]:
        return self.good / np.maximum(self.requests, 1)

    @property
    def is_good(self) -> Mask:
        found: Mask = self.good >= GOOD_SECOND * self.requests
        return found

    @property
    def longest_bad_run_s(self) -> int:
        longest = run = 0
        for good in self.is_good.tolist():
            run = 0 if good else run + 1
            longest = max(longest, run)
        return longest


@dataclass(frozen=True)
class Verdict:
    """`degraded` is by kind, a share of the answers. `complaints` is empty when everything promised was kept."""

    whole: Window
    windows: list[Window]
    seconds: Seconds
    degraded: dict[str, float]
    good_seconds_share: float
    longest_bad_run_s: int
    late_p99_ms: float
    complaints: list[str]


def judge(sent: Sent, plan: Plan, happened: Sequence[Happened]) -> Verdict:
    """`plan` says which of the sent payments count, `happened` which faults they met."""
    at_s = np.arange(sent.count) / plan.rate_per_s - plan.warm_up_s
    counts = ~sent.by_kafka & sent.due & (at_s >= 0)
    # A run may have been ended early.
    measured_s = min(plan.measured_s, int(sent.due.sum()) / plan.rate_per_s - plan.warm_up_s) if counts.any() else 0.0
    windows = []
    calm = counts.copy()
    for fault in happened:
        begin_s, end_s = fault.window
        inside = counts & (at_s >= begin_s) & (at_s < end_s)
        calm &= ~inside
        windows.append(window(fault.kind, begin_s, min(end_s, measured_s), sent, inside))
    windows.append(window("between faults", 0.0, measured_s, sent, calm))
    whole = window("whole", 0.0, measured_s, sent, counts)
    seconds = by_second(sent, counts, at_s, int(measured_s + 1e-6))
    answered = counts & sent.answered
    told = max(1, int(answered.sum()))
    degraded = {
        name: float((sent.degraded[answered] & (1 << place) > 0).sum()) / told
        for place, name in enumerate(degraded_names(0xFF))
        if (sent.degraded[answered] & (1 << place)).any()
    }
    good_seconds = float(seconds.is_good.mean()) if len(seconds.good) else 0.0
    late = sent.late_us[sent.by_kafka & sent.due & (at_s >= 0)]
    late_p99_ms = float(np.quantile(late, 0.99)) / 1000 if len(late) else math.nan
    complaints = []
    if not whole.requests:
        complaints.append("nothing was measured")
    elif whole.good_share < SUCCESS_LEAST:
        complaints.append(f"{100 * whole.good_share:.3f} % of the requests were good, {100 * SUCCESS_LEAST:g} % are promised")
    if good_seconds < GOOD_SECONDS_LEAST:
        complaints.append(f"{100 * good_seconds:.1f} % of the seconds were good, {100 * GOOD_SECONDS_LEAST:g} % are promised")
    if seconds.longest_bad_run_s > BAD_RUN_S_MOST:
        complaints.append(f"{seconds.longest_bad_run_s} bad seconds in a row, at most {BAD_RUN_S_MOST} are promised")
    return Verdict(whole, windows, seconds, degraded, good_seconds, seconds.longest_bad_run_s, late_p99_ms, complaints)


def is_good(sent: Sent) -> Mask:
    found: Mask = sent.answered & (sent.latency_us <= GOOD_MS * 1000)
    return found


def window(name: str, begin_s: float, end_s: float, sent: Sent, inside: Mask) -> Window:
    status, answered = sent.status[inside], inside & sent.answered
    latency_ms = sent.latency_us[answered] / 1000
    p50, p99, p999 = np.quantile(latency_ms, [0.5, 0.99, 0.999]).tolist() if len(latency_ms) else [math.nan] * 3
    good = int((inside & is_good(sent)).sum())
    shed = int(np.isin(status, (429, 503)).sum())
    told = int(answered.sum())
    return Window(
        name=name,
        begin_s=begin_s,
        end_s=end_s,
        requests=int(inside.sum()),
        good=good,
        retried=int((sent.attempts[inside] > 1).sum()),
        shed=shed,
        failed=int(inside.sum()) - told - shed,
        late=told - good,
        p50_ms=p50,
        p99_ms=p99,
        p999_ms=p999,
        degraded=float((sent.degraded[answered] > 0).mean()) if told else math.nan,
    )


def by_second(sent: Sent, counts: Mask, at_s: npt.NDArray[np.float64], seconds: int) -> Seconds:
    """What has no answer counts with the time after which it was given up."""
    where = np.flatnonzero(counts & (at_s < seconds))
    second = at_s[where].astype(np.int64)
    good = is_good(sent)[where]
    latency_ms = np.maximum(sent.latency_us[where], 0) / 1000
    p99, late_ms = np.full(seconds, math.nan), np.zeros(seconds)
    handed_over = np.flatnonzero(sent.by_kafka & sent.due & (at_s >= 0) & (at_s < seconds))
    np.maximum.at(late_ms, at_s[handed_over].astype(np.int64), sent.late_us[handed_over] / 1000)
    edges = np.searchsorted(second, np.arange(seconds + 1))
    for k in range(seconds):
        if edges[k + 1] > edges[k]:
            p99[k] = np.quantile(latency_ms[edges[k] : edges[k + 1]], 0.99)
    return Seconds(np.bincount(second, minlength=seconds), np.bincount(second, good, seconds).astype(np.int64), p99, late_ms)
