"""The gateway's metrics as objects: made from `gateway.contracts.metrics`, which says what each is. Counted once a batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.contracts import metrics as catalogue
from gateway.contracts.decision import Door
from gateway.contracts.metrics import GOOD_WITHIN_S, Kind

# Nobody asks when a counter was made, and it would double the series.
disable_created_metrics()  # type: ignore[no-untyped-call]


class BatchHistogram(Collector):
    """A histogram that takes a whole batch of observations at once, by the values of one label."""

    def __init__(self, spec: catalogue.Metric, registry: CollectorRegistry) -> None:
        self._name, self._doc, self._label = spec.name, spec.doc, spec.labels[0].name
        self._bounds = np.array(spec.buckets)
        self._bounds_list = list(spec.buckets)
        self._counts: dict[str, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
        self._sums: dict[str, float] = {}
        registry.register(self)

    def observe(self, label: str, values: Sequence[float]) -> None:
        """Count each of `values`."""
        counts = self._counts.get(label)
        if counts is None:
            counts = self._counts[label] = np.zeros(len(self._bounds) + 1, np.int64)
            self._sums[label] = 0.0
        if len(values) == 1:
            # What is true of a whole batch: numpy would take 8 us for it.
            counts[bisect_left(self._bounds_list, values[0])] += 1
            self._sums[label] += values[0]
            return
        counts += np.bincount(np.searchsorted(self._bounds, values, side="left"), minlength=len(counts))
        self._sums[label] += float(sum(values))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._doc, labels=[self._label])
        for label, counts in self._counts.items():
            cumulative = np.cumsum(counts).tolist()
            bounds = [*(str(b) for b in self._bounds.tolist()), "+Inf"]
            family.add_metric([label], list(zip(bounds, cumulative, strict=True)), self._sums[label])
        yield family

    def describe(self) -> Iterator[Metric]:
        yield HistogramMetricFamily(self._name, self._doc, labels=[self._label])


def make(spec: catalogue.Metric, registry: CollectorRegistry) -> Counter | Gauge | BatchHistogram:
    """The metric that the catalogue describes."""
    if spec.kind is Kind.HISTOGRAM:
        return BatchHistogram(spec, registry)
    if spec.kind is Kind.GAUGE:
        return Gauge(spec.name, spec.doc, spec.label_names, registry=registry)
    counter = Counter(spec.name, spec.doc, spec.label_names, registry=registry)
    for values in spec.seeds:
        counter.labels(*values)
    return counter


class Instruments:
    """A process's metrics as attributes, in a registry of their own: a process has one set, a test as many as it likes."""

    def __init__(self, specs: Iterable[catalogue.Metric]) -> None:
        self.registry = CollectorRegistry()
        for spec in specs:
            setattr(self, spec.attribute, make(spec, self.registry))

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)


class ServiceLevel:
    """Counts good and bad decisions of one door (`GOOD_WITHIN_S`), a batch at a time."""

    def __init__(self, counter: Counter, door: Door) -> None:
        self._within_s = GOOD_WITHIN_S[door]
        self._good, self._bad = counter.labels(door, "good"), counter.labels(door, "bad")

    def answered(self, latencies_s: Sequence[float]) -> None:
        """So many were decided, in this time each. At least one."""
        asked, within_s = len(latencies_s), self._within_s
        good = asked if max(latencies_s) <= within_s else sum([latency_s <= within_s for latency_s in latencies_s])
        if good:
            self._good.inc(good)
        if good != asked:
            self._bad.inc(asked - good)

    def failed(self, asked: int) -> None:
        """So many were not decided: shed, or the gateway's own failure. What a caller got wrong counts as neither."""
        self._bad.inc(asked)


class Metrics(Instruments):
    """The gateway's. Each attribute is a line of `catalogue.GATEWAY`."""

    sli_decisions: Counter
    decisions: Counter
    latency_s: BatchHistogram
    step_s: BatchHistogram
    batch_rows: BatchHistogram
    degraded: Counter
    refused: Counter
    duplicates: Counter
    hurried: Counter
    workers: Gauge
    in_flight: Gauge
    in_flight_limit: Gauge
    pause_s: BatchHistogram
    loop_lag_max_s: Gauge
    connections: Gauge
    connections_held: Gauge
    connections_refused: Counter
    connections_slow: Counter
    kafka_connected: Gauge
    lag: Gauge
    standstill_s: Gauge
    consumed: Counter
    kafka_sessions: Counter
    buffer: Gauge
    published: Counter
    publish_dropped: Counter
    spooled: Counter
    spool_records: Gauge
    spool_bytes: Gauge
    spool_age_s: Gauge
    redis_ready: Gauge
    redis_round_trip_s: BatchHistogram
    redis_timeouts: Counter
    redis_connects: Counter
    redis_memory: Gauge
    redis_memory_limit: Gauge
    redis_clients: Gauge
    values_refused: Counter
    writes_refused: Counter
    records_failed: Counter
    unobserved: Gauge
    unobserved_dropped: Counter
    model_info: Gauge
    model_serving: Gauge
    model_refused: Counter
    routed: Counter
    challenger_share: Gauge
    challenger_failed: Counter
    guard_out: Gauge
    guard_alarms: Counter
    guard_evidence: Gauge
    guard_pairs: Counter
    reasons: Counter
    slack_batches: Gauge
    slack_dropped: Counter
    shadow_scored: Counter
    shadow_failed: Counter
    shadow_unpublished: Counter
    explored: Counter
    explored_minor: Counter
    explore_capped: Counter
    explore_spent_minor: Gauge
    traces: Counter
    traces_waiting: Gauge
    build_info: Gauge
    policy_loads: Counter
    policy_refused: Gauge
    rule_hits: Counter
    shadow_hits: Counter
    rule_errors: Counter
    list_hits: Counter
    lists_version: Gauge
    lists_entries: Gauge
    lists_lag: Gauge
    lists_missing: Gauge
    lists_trouble: Gauge
    lists_skipped: Counter
    console_viewers: Gauge
    console_refused: Counter
    console_dropped: Counter

    def __init__(self) -> None:
        super().__init__(catalogue.GATEWAY)
        self.http_level = ServiceLevel(self.sli_decisions, Door.HTTP)
        self.kafka_level = ServiceLevel(self.sli_decisions, Door.KAFKA)
