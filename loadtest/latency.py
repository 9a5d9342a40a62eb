"""Latencies in the form in which every report gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Milliseconds from the intended time of sending; NaN where nothing was measured."""

    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float


def latency_of(seconds: Sequence[float]) -> Latency:
    if len(seconds) == 0:
        return Latency(math.nan, math.nan, math.nan, math.nan)
    p50, p99, p999, most = (float(v) * 1000.0 for v in np.quantile(np.asarray(seconds, np.float64), [0.5, 0.99, 0.999, 1.0]))
    return Latency(p50, p99, p999, most)
