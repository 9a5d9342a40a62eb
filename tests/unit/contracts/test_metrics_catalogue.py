"""The catalogue of metrics keeps Prometheus' conventions, and each process exports what it says and nothing else."""

from __future__ import annotations

import typing
from dataclasses import replace
from itertools import pairwise

import pytest
from prometheus_client import CollectorRegistry

from feature_jobs.metrics import Metrics as JobMetrics
from feature_jobs.metrics import ParityMetrics
from gateway.cases.metrics import CaseMetrics
from gateway.contracts import metrics as catalogue
from gateway.contracts.metrics import BY_NAME, CATALOGUE, GATEWAY, LATENCY_BUCKETS_S, Exporter, Kind, Label, Metric
from gateway.metrics import BatchHistogram
from gateway.metrics import Metrics as GatewayMetrics

SERIES_MAX = 2_000
# A word that names a unit which isn't a base unit, or hides one.
UNITS_UNWANTED = frozenset({"ms", "us", "milliseconds", "micros", "minutes", "hours", "days", "kb", "mb", "kib", "mib", "percent"})
EXPORTERS: dict[Exporter, type[GatewayMetrics | CaseMetrics | JobMetrics | ParityMetrics]] = {
    Exporter.GATEWAY: GatewayMetrics,
    Exporter.CASES: CaseMetrics,
    Exporter.JOBS: JobMetrics,
    Exporter.PARITY: ParityMetrics,
}


def convention_complaints(metric: Metric) -> list[str]:
    """What of a metric isn't as Prometheus' guide to naming asks (https://prometheus.io/docs/practices/naming)."""
    name, words = metric.name, metric.name.split("_")
    complaints = []
    if words[0] != "fraudgate" or not name.replace("_", "").isalnum() or name != name.lower():
        complaints.append(f"{name}: the name")
    if UNITS_UNWANTED & set(words):
        complaints.append(f"{name}: the unit")
    if (metric.kind is Kind.COUNTER) != name.endswith("_total"):
        complaints.append(f"{name}: _total is for counters, and for each of them")
    if not metric.doc[:1].isupper() and not metric.doc[:1].isdigit():
        complaints.append(f"{name}: the help")
    if metric.doc.endswith(".") or len(metric.doc) < 10:
        complaints.append(f"{name}: the help")
    taken = ("le", "job", "instance", "quantile")
    complaints += [
        f"{name}: the label {label.name}"
        for label in metric.labels
        if not label.bound or not (label.values or label.which) or label.name in taken
    ]
    if metric.bound > SERIES_MAX:
        complaints.append(f"{name}: {metric.bound} series")
    if (metric.kind is Kind.HISTOGRAM) != bool(metric.buckets) or any(a >= b for a, b in pairwise(metric.buckets)):
        complaints.append(f"{name}: the buckets")
    if metric.kind is Kind.HISTOGRAM and not (name.endswith("_seconds") or name.endswith("_rows")):
        complaints.append(f"{name}: the unit")
    return complaints


def exported(registry: CollectorRegistry) -> dict[str, str]:
    """Kind by name, as Prometheus stores it."""
    families = list(registry.collect())
    return {f.name + ("_total" if f.type == "counter" else ""): f.type for f in families}


def test_every_metric_keeps_the_conventions() -> None:
    assert [c for metric in BY_NAME.values() for c in convention_complaints(metric)] == []


@pytest.mark.parametrize(
    "bad",
    [
        Metric("a", "fraudgate_step_ms", Kind.GAUGE, "Time of a step"),
        Metric("a", "requests_total", Kind.COUNTER, "Requests that came"),
        Metric("a", "fraudgate_requests", Kind.COUNTER, "Requests that came"),
        Metric("a", "fraudgate_requests_total", Kind.GAUGE, "Requests that came"),
        Metric("a", "fraudgate_requests_total", Kind.COUNTER, "requests that came"),
        Metric("a", "fraudgate_requests_total", Kind.COUNTER, "Requests that came", (Label("card"),)),
        Metric("a", "fraudgate_requests_total", Kind.COUNTER, "Requests that came", (Label("card", (), "cards", 1_000_000),)),
        Metric("a", "fraudgate_step_seconds", Kind.HISTOGRAM, "Time of a step", (Label("step", ("x",)),), (2.0, 1.0)),
        Metric("a", "fraudgate_step_seconds", Kind.HISTOGRAM, "Time of a step", (Label("step", ("x",)),)),
    ],
)
def test_a_metric_against_the_conventions_is_seen(bad: Metric) -> None:
    assert convention_complaints(bad)


@pytest.mark.parametrize("exporter", list(Exporter))
def test_a_process_exports_what_the_catalogue_says_and_nothing_else(exporter: Exporter) -> None:
    made = EXPORTERS[exporter]()
    assert exported(made.registry) == {metric.name: metric.kind.value for metric in CATALOGUE[exporter]}


@pytest.mark.parametrize("exporter", list(Exporter))
def test_the_attributes_of_a_process_are_the_catalogues_in_name_and_kind(exporter: Exporter) -> None:
    kinds = {Kind.COUNTER: "Counter", Kind.GAUGE: "Gauge"}
    hints = {name: kind.__name__ for name, kind in typing.get_type_hints(EXPORTERS[exporter]).items()}
    of_histogram = BatchHistogram.__name__ if exporter is Exporter.GATEWAY else "Histogram"
    assert hints == {m.attribute: kinds.get(m.kind, of_histogram) for m in CATALOGUE[exporter]}


def test_latencies_are_told_apart_to_ten_milliseconds_all_the_way_from_one_to_a_hundred_and_fifty() -> None:
    promised = [b for b in LATENCY_BUCKETS_S if 0.001 <= b <= 0.15]
    assert (promised[0], promised[-1]) == (0.001, 0.15)
    assert all(b - a <= 0.0101 for a, b in pairwise(promised))
    assert all(b - a <= 0.00101 for a, b in pairwise(promised) if b <= 0.02)


def test_a_counter_with_known_labels_begins_at_0_and_one_with_unknown_ones_has_none() -> None:
    registry = GatewayMetrics().registry
    for metric in GATEWAY:
        if metric.kind is not Kind.COUNTER:
            continue
        samples = [s for f in registry.collect() if f.name == metric.name.removesuffix("_total") for s in f.samples]
        known = all(label.values for label in metric.labels)
        assert len(samples) == (metric.bound if known else 0), metric.name


def test_a_counter_of_very_many_known_labels_does_not_begin_with_all_of_them() -> None:
    many = replace(catalogue.GATEWAY[0], labels=(Label("a", tuple(map(str, range(catalogue.SEEDED_MAX + 1)))),))
    assert list(many.seeds) == []
