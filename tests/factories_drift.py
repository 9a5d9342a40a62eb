"""Payments of a made-up shop, feature by feature, for tests of drift: quiet ones with a daily rhythm, and shifted ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES
from gateway.contracts.reference import CLOCK_FEATURES, DAY_MS, HOUR_MS, clock_values

# Monday.
START_MS = 1_767_571_200_000
AMOUNT = FEATURE_INDEX["amount_minor"]


def make_times(rows: int, days: float, seed: int = 1, from_ms: int = START_MS) -> npt.NDArray[np.int64]:
    """Event times (rows,) over `days`, in order; three times as many at noon as at midnight."""
    rng = np.random.default_rng(seed)
    t = rng.uniform(0, days * DAY_MS, 3 * rows)
    kept = rng.random(len(t)) < 0.5 - 0.25 * np.cos(2 * np.pi * t / DAY_MS)
    out: npt.NDArray[np.int64] = np.sort(t[kept][:rows]).astype(np.int64) + from_ms
    return out


def make_quiet(event_time_ms: npt.NDArray[np.int64], seed: int = 1) -> npt.NDArray[np.float32]:
    """(rows, features): log-normal values, a tenth of them missing; amounts are larger in the evening; the clock's own are right."""
    rng = np.random.default_rng(seed)
    rows = len(event_time_ms)
    x = rng.lognormal(1.0, 1.0, (rows, len(FEATURE_NAMES))).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    hour = event_time_ms % DAY_MS / HOUR_MS
    x[:, AMOUNT] = np.round(rng.lognormal(8.0, 0.8, rows) * np.where(hour > 18, 2.0, 1.0))
    x[:, [FEATURE_INDEX[name] for name in CLOCK_FEATURES]] = clock_values(event_time_ms)
    return x


def make_frauds(rows: int, rate: float = 0.01, seed: int = 1) -> npt.NDArray[np.bool_]:
    out: npt.NDArray[np.bool_] = np.random.default_rng(seed + 1000).random(rows) < rate
    return out
