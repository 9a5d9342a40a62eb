import math
import random

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gateway.console.samples import Reading, Samples, Window, grown, increase, quantile, read_text, samples_of, samples_of_families
from gateway.metrics import Metrics
from gateway.worker_metrics import families_of
from tests.unit.gateway.console.factories import decide, own_of

LATENCY = "fraudgate_decision_latency_seconds"


def counted(value: float, **labels: str) -> Samples:
    return Samples({"n_total": {tuple(labels.items()): value}})


def test_text_and_registry_say_the_same() -> None:
    registry = CollectorRegistry()
    Counter("decided", "d", ["by"], registry=registry).labels('a "quoted" \\ one\nmore').inc(3)
    Gauge("waits", "w", registry=registry).set(2.5)
    histogram = Histogram("took", "t", ["step"], registry=registry, buckets=(1, 2))
    histogram.labels("x").observe(1.5)
    from_text, direct = read_text(generate_latest(registry)), samples_of(registry.collect())
    for found in (from_text, direct):
        assert found.total("waits") == 2.5
        assert found.total("decided_total") == 3
        assert found.buckets("took", step="x") == {1: 0, 2: 1, math.inf: 1}
        assert "decided_created" not in found
    assert direct.by("decided_total", "by") == {'a "quoted" \\ one\nmore': 3}


def test_what_is_not_wanted_is_not_read_and_what_is_no_metric_is_refused() -> None:
    assert "b" not in read_text(b"a 1\nb 2\n", lambda line: line.startswith("a"))
    with pytest.raises(ValueError, match="no sample"):
        read_text(b"<html>\n")


def test_sums_are_over_what_has_the_labels_and_none_where_nothing_does() -> None:
    found = Samples({"n": {(("a", "1"), ("b", "x")): 1.0, (("a", "1"), ("b", "y")): 2.0, (("a", "2"), ("b", "x")): 4.0}})
    assert (found.total("n"), found.total("n", a="1"), found.total("n", a="3"), found.total("m")) == (7, 3, None, None)
    assert found.by("n", "b", a="1") == {"x": 1, "y": 2}


def test_a_rate_is_over_the_window_and_unknown_before_there_are_two_readings() -> None:
    window = Window(10)
    window.add(Reading(100, counted(50)))
    assert window.rate("n_total") is None
    for s in range(1, 31):
        window.add(Reading(100 + s, counted(50 + (5 * s if s <= 20 else 100))))
    assert window.seconds == 10
    assert window.rate("n_total") == 0
    window.add(Reading(131, counted(180)))
    assert window.rate("n_total") == 3


def test_a_counter_that_began_anew_counts_from_nothing() -> None:
    assert (increase(100, 130), increase(100, 7), increase(None, 5), increase(5, None)) == (30, 7, 5, 0)
    assert grown({1.0: 10, math.inf: 12}, {1.0: 1, math.inf: 2}) == {1.0: 1, math.inf: 2}
    assert grown({1.0: 10, math.inf: 12}, {1.0: 11, math.inf: 15}) == {1.0: 1, math.inf: 3}


def test_percentiles_are_those_of_what_came_within_the_window() -> None:
    metrics, window = Metrics(), Window(10)
    decide(metrics, 1000, ms=400.0)
    window.add(Reading(0, own_of(metrics)))
    rng = random.Random(1)
    values = [rng.uniform(0.001, 0.05) for _ in range(5000)]
    metrics.latency_s.observe("http", values)
    window.add(Reading(5, own_of(metrics)))
    values.sort()
    for share, found in zip((0.5, 0.99, 0.999), window.quantiles(LATENCY, (0.5, 0.99, 0.999), door="http"), strict=True):
        assert found is not None
        # A bucket is 5 ms wide there.
        assert abs(found - values[int(share * len(values))]) < 0.005
    assert window.quantiles(LATENCY, (0.5,), door="kafka") == [None]


def test_a_percentile_beyond_all_bounds_is_the_last_bound() -> None:
    assert quantile({1.0: 0, 2.0: 1, math.inf: 10}, 0.99) == 2.0
    assert quantile({1.0: 4, 2.0: 4, math.inf: 4}, 0.5) == 0.5
    assert quantile({1.0: 0, math.inf: 0}, 0.5) is None
    assert quantile({}, 0.5) is None


def test_the_sum_over_workers_reads_like_one_process() -> None:
    metrics = Metrics()
    decide(metrics, 7)
    metrics.in_flight.set(3)
    names = ("fraudgate_decisions_total", f"{LATENCY}_bucket", "fraudgate_in_flight")
    found = samples_of_families(families_of(metrics.registry.collect()), names)
    assert found.total("fraudgate_decisions_total", outcome="approve") == 7
    assert found.total("fraudgate_in_flight") == 3
    assert found.buckets(LATENCY, door="http")[0.005] == 7
    assert "fraudgate_workers" not in found
