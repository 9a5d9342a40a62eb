"""What a feature's value is, from what was counted: the leaves of gateway/kernels/features.py, which calls them."""

from __future__ import annotations

import numpy as np

from gateway.contracts.features import COMPARED_AGGREGATES
from gateway.contracts.windows import DAY_MS, LABEL_DAYS, NEVER, WINDOWS
from gateway.kernels.compiled import compiled
from gateway.kernels.intake import Int64s

_LAST = len(WINDOWS) - 1
# Aggregates that set an amount, or a window, beside what was usual; `compared` knows them by their place here.
COMPARED_CODES = ("ratio_before", "peak", "surge")
assert COMPARED_AGGREGATES == set(COMPARED_CODES)
_C_BEFORE, _C_PEAK = range(2)


@compiled
def divided(a: float, b: float) -> float:
    return np.nan if b == 0 else a / b


@compiled
def compared(code: int, w: int, amount: float, counts: Int64s) -> float:
    """An amount, or what a window says, beside what was usual."""
    total, n = counts[_LAST, 1], counts[_LAST, 0]
    if code == _C_BEFORE:
        return divided(amount, divided(np.float64(total - counts[w, 1]), np.float64(n - counts[w, 0])))
    usual = divided(np.float64(total), np.float64(n))
    if code == _C_PEAK:
        return divided(np.nan if counts[w, 3] < 0 else np.float64(counts[w, 3]), usual)
    return divided(divided(np.float64(counts[w, 1]), np.float64(counts[w, 0])), usual)


@compiled
def fraud_run(by_day: Int64s, label_from: int) -> tuple[int, int, int, int]:
    """The frauds since the last whole day with a genuine payment, the midnights of their first day and of that day, and the payments of
    whole days after the last fraud, of which there is one. The last of `by_day` is the day in which the delay ends."""
    newest = LABEL_DAYS - 1
    after, last = 0, newest
    while last > 0 and by_day[1, last] == 0:
        after += by_day[0, last] if last < newest else 0
        last -= 1
    run, run_from = 0, NEVER
    for i in range(newest, -1, -1):
        paid, frauds = by_day[0, i], by_day[1, i]
        if i < newest and paid > frauds:
            return run, run_from, label_from + i * DAY_MS, after
        if frauds > 0:
            run += frauds
            run_from = label_from + i * DAY_MS
    return run, run_from, NEVER, after


@compiled
def ones(bits: np.uint64) -> int:
    """How many bits are set (Kernighan's way: sketches are sparse)."""
    count = 0
    while bits != np.uint64(0):
        bits &= bits - np.uint64(1)
        count += 1
    return count
