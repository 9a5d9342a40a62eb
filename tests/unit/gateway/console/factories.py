"""Parts of a console without a gateway behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway.cases.schemas import Schemas
from gateway.console.alerts import AlertFollower
from gateway.console.gather import Gatherer
from gateway.console.picture import OWN_NAMES, State
from gateway.console.samples import Samples, Window, samples_of
from gateway.console.sources import Source, read_cases, read_jobs
from gateway.console.tables import Tables
from gateway.console.tap import Tap
from gateway.console.verdict import Verdicts
from gateway.console.viewers import Viewers
from gateway.contracts.registry import SchemaRegistry
from gateway.metrics import Metrics

JOBS = b"""\
fraudgate_jobs_rows_total{table="bronze"} 1000.0
fraudgate_jobs_rows_total{table="silver_transactions"} 990.0
fraudgate_jobs_rows_total{table="gold_decisions"} 970.0
fraudgate_jobs_freshness_seconds{query="bronze"} 3.0
fraudgate_jobs_freshness_seconds{query="silver"} 8.0
fraudgate_jobs_freshness_seconds{query="gold"} 30.0
fraudgate_jobs_up{query="bronze"} 1.0
fraudgate_jobs_up{query="silver"} 1.0
fraudgate_jobs_kafka_lag_records 12.0
fraudgate_jobs_drift_reference 1.0
fraudgate_jobs_drift_psi{measure="amount_minor"} 0.02
fraudgate_jobs_drift_psi{measure="score"} 0.4
fraudgate_jobs_drift_alarm{measure="amount_minor"} 0.0
fraudgate_jobs_drift_alarm{measure="score"} 0.0
"""
CASES = b"fraudgate_cases_reviews_open 3.0\nfraudgate_cases_kafka_connected 1.0\n"
STATUS: dict[str, Any] = {
    "ready": True,
    "degraded": [],
    "model": {"name": "fraudgate", "version": "7", "digest": "d" * 64},
    "model_refused": None,
    "policy": {"name": "default", "digest": "e" * 64},
    "policy_refused": None,
    "lists": {"version": 3, "digest": "", "entries": 2, "trouble": None},
    "feature_fingerprint": "f" * 16,
    "code_version": "0.1.0",
}
ROUTING: dict[str, Any] = {
    "champion": {"name": "fraudgate", "version": "7", "digest": "d"},
    "challenger": {"name": "fraudgate", "version": "8", "digest": "e"},
    "shadows": {},
    "routed_by": "share",
    "challenger_share": 0.1,
}


class Clock:
    """Seconds, moved by the test. As milliseconds it is the wall clock too."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def ms(self) -> int:
        return int(self.now_s * 1000)


def make_state(tmp_path: Path, **changes: Any) -> State:
    """A state of which nothing is known yet; nobody's Kafka and registry are at its addresses."""
    schemas = Schemas(SchemaRegistry("http://127.0.0.1:9", tmp_path))
    made = State(
        window=Window(10.0),
        status=STATUS,
        routing=ROUTING,
        jobs=Source("feature jobs", "http://127.0.0.1:9/metrics", read_jobs),
        cases=Source("case service", "http://127.0.0.1:9/metrics", read_cases),
        alertmanager=None,
        alerts=AlertFollower("127.0.0.1:9", schemas),
        tables=Tables(),
        tap=Tap(),
        verdicts=Verdicts(),
        kafka_wanted=True,
    )
    for field, value in changes.items():
        setattr(made, field, value)
    return made


def own_of(metrics: Metrics) -> Samples:
    return samples_of(metrics.registry.restricted_registry(OWN_NAMES).collect())


def decide(metrics: Metrics, count: int, ms: float = 5.0, outcome: str = "approve", door: str = "http") -> None:
    """As the gateway counts `count` decisions that took `ms` each."""
    metrics.decisions.labels(outcome, door).inc(count)
    metrics.latency_s.observe(door, [ms / 1000] * count)


def make_gatherer(
    state: State,
    metrics: Metrics,
    clock: Clock,
    viewers: Viewers | None = None,
    status: Callable[[], dict[str, Any]] = lambda: STATUS,
) -> Gatherer:
    async def read_own(names: tuple[str, ...]) -> Samples:
        return samples_of(metrics.registry.restricted_registry(names).collect())

    return Gatherer(
        state,
        Viewers(2, metrics) if viewers is None else viewers,
        read_own=read_own,
        accounts=lambda: (status(), ROUTING),
        texts=lambda: {"amount-limit": "too much"},
        clock_s=clock,
        now_ms=clock.ms,
    )
