"""Metrics of the feature jobs and of `fraudgate parity --live` as objects, made from the catalogue `gateway.contracts.metrics`."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from gateway.contracts import metrics as catalogue
from gateway.contracts.metrics import Kind

# Nobody asks when a counter was made, and it would double the series.
disable_created_metrics()  # type: ignore[no-untyped-call]


def make(spec: catalogue.Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    """The metric that the catalogue describes."""
    if spec.kind is Kind.HISTOGRAM:
        return Histogram(spec.name, spec.doc, spec.label_names, registry=registry, buckets=spec.buckets)
    if spec.kind is Kind.GAUGE:
        return Gauge(spec.name, spec.doc, spec.label_names, registry=registry)
    counter = Counter(spec.name, spec.doc, spec.label_names, registry=registry)
    for values in spec.seeds:
        counter.labels(*values)
    return counter


class Instruments:
    """A process's metrics as attributes. `registry` is what its metrics port serves."""

    def __init__(self, specs: Iterable[catalogue.Metric]) -> None:
        self.registry = CollectorRegistry()
        for spec in specs:
            setattr(self, spec.attribute, make(spec, self.registry))


class Metrics(Instruments):
    """The feature jobs'. Each attribute is a line of `catalogue.JOBS`."""

    up: Gauge
    restarts: Counter
    rows: Counter
    batch_seconds: Histogram
    batch_at: Gauge
    freshness_seconds: Gauge
    lag: Gauge
    quarantined: Counter
    duplicates: Counter
    late: Counter
    entities: Counter
    rebuilds: Counter
    label_values: Counter
    label_rebuilds: Counter
    labels_unmatched: Counter
    labels_waiting: Gauge
    state_rows: Gauge
    state_memory: Gauge
    drift_psi: Gauge
    drift_ks: Gauge
    drift_alarm: Gauge
    drift_alarms: Counter
    drift_windows: Counter
    drift_late: Counter
    drift_stream_time: Gauge
    drift_reference: Gauge
    bursts: Counter
    bursts_active: Gauge
    burst_entities: Gauge
    burst_evicted: Counter

    def __init__(self) -> None:
        super().__init__(catalogue.JOBS)

    def batch(self, query: str, seconds: float) -> None:
        """A micro-batch of `query` has ended."""
        self.batch_seconds.labels(query).observe(seconds)
        self.batch_at.labels(query).set(time.time())


class ParityMetrics(Instruments):
    """Those of `fraudgate parity --live`. Each attribute is a line of `catalogue.PARITY`."""

    compared: Counter
    different: Counter
    missing: Counter
    stale: Counter
    checked: Gauge

    def __init__(self) -> None:
        super().__init__(catalogue.PARITY)
