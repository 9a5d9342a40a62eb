"""What a gateway says of itself, and whether a new version does well enough to keep the traffic. Used by `deploy.rollout.swap`.

Failures are counted by the proxy, which sees what the gateway can't tell: connections refused, answers that broke off. Latency is the
gateway's own histogram of the HTTP door, as the difference of two looks at /metrics.
"""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from deploy.rollout.proxy import ServerStat

ASK_TIMEOUT_S = 5.0
# Fewer failures than this are no ratio, fewer answers no quantile.
FAILURES_LEAST = 5
ANSWERS_LEAST = 200
# The promise. A new version that keeps it is never sent back for its latency, however quick the old one was.
P99_PROMISED_S = 0.100
# How much slower than the old version a new one may be beyond the promise.
P99_FACTOR = 2.0
# Versions before the unit in the name was the second had milliseconds; either may be deployed.
_BUCKET = re.compile(
    r'^fraudgate_decision_latency_(seconds|ms)_bucket\{(?=[^}]*door="http")[^}]*le="([^"]+)"[^}]*\} (\S+)', re.MULTILINE
)


@dataclass(frozen=True)
class Readiness:
    """What /readyz says. `consuming` is None for a version that doesn't know how to hand over the transactions topic."""

    ready: bool
    degraded: frozenset[str]
    consuming: bool | None


@dataclass(frozen=True)
class Bounds:
    """`failed_share_max` of requests may fail, and 99 of 100 decisions may take `p99_s_max`."""

    failed_share_max: float
    p99_s_max: float


# Answers by upper bound in seconds, cumulative.
Histogram = Mapping[float, float]


def readiness(url: str) -> Readiness | None:
    """None when nobody answers there in our way."""
    try:
        body = json.loads(_get(url + "/readyz"))
        return Readiness(bool(body["ready"]), frozenset(body["degraded"]), body.get("consuming"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def latency(url: str) -> Histogram:
    """Empty when the gateway doesn't tell."""
    try:
        return histogram(_get(url + "/metrics").decode(errors="replace"))
    except (OSError, ValueError):
        return {}


def histogram(text: str) -> Histogram:
    """The HTTP door's latencies out of a page of metrics."""
    found = {}
    for unit, bound, count in _BUCKET.findall(text):
        found[float(bound) / (1 if unit == "seconds" else 1000)] = float(count)
    return found


def since(before: Histogram, now: Histogram) -> Histogram:
    return {bound: count - before.get(bound, 0.0) for bound, count in now.items()}


def p99_s(answers: Histogram) -> float | None:
    """The upper bound of the bucket that the 99th of 100 answers lies in; None for too few answers to tell."""
    total = max(answers.values(), default=0.0)
    if total < ANSWERS_LEAST:
        return None
    return min(bound for bound, count in answers.items() if count >= 0.99 * total)


def p99_bound_s(old: float | None) -> float:
    """What a new version may take where the old one took `old`."""
    return P99_PROMISED_S if old is None or math.isinf(old) else max(P99_PROMISED_S, P99_FACTOR * old)


def complaint(before: ServerStat, now: ServerStat, answers: Histogram, bounds: Bounds) -> str | None:
    """Why a version may not keep the traffic, by what the proxy counted between two looks and how long its answers took."""
    if not now.up:
        return f"the proxy finds it {now.status}"
    requests = now.requests - before.requests
    failures = now.failed - before.failed + now.repeated - before.repeated
    if failures >= FAILURES_LEAST and failures > bounds.failed_share_max * requests:
        return f"{failures} of {requests} requests failed, more than {bounds.failed_share_max:.2%}"
    p99 = p99_s(answers)
    if p99 is not None and p99 > bounds.p99_s_max:
        return f"its p99 is {p99 * 1000:.0f} ms, more than {bounds.p99_s_max * 1000:.0f} ms"
    return None


def _get(url: str) -> bytes:
    """The body, whatever the status: a gateway that isn't ready says why with a 503."""
    try:
        with urllib.request.urlopen(url, timeout=ASK_TIMEOUT_S) as reply:  # noqa: S310
            body: bytes = reply.read()
    except urllib.error.HTTPError as exc:
        with exc:
            body = exc.read()
    return body
