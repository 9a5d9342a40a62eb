"""Every metric of the gateway, by name, in one place. Counted once a batch; dashboards and alerts name nothing else."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

# Dense where the promises are: 1..20 by one, then wider, up to 150 ms and beyond.
LATENCY_BOUNDS_MS: tuple[float, ...] = (
    0.5,
    *(float(n) for n in range(1, 21)),
    *(float(n) for n in range(25, 105, 5)),
    *(110.0, 120.0, 130.0, 140.0, 150.0, 200.0, 500.0, 1000.0, 5000.0),
)
STEP_BOUNDS_MS: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 40.0, 60.0, 100.0, 200.0, 500.0, 2000.0)
BATCH_BOUNDS: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


class BatchHistogram(Collector):
    """A histogram that takes a whole batch of observations at once, by the values of one label."""

    def __init__(self, name: str, doc: str, bounds: Sequence[float], label: str, registry: CollectorRegistry) -> None:
        self._name, self._doc, self._label = name, doc, label
        self._bounds = np.array(bounds)
        self._bounds_list = list(bounds)
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


class Metrics:
    """One set of metrics with its own registry: a process has one, a test as many as it likes."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.decisions = Counter(
            "fraudgate_decisions", "Transactions decided, by outcome and door", ["outcome", "door"], registry=registry
        )
        self.latency_ms = BatchHistogram(
            "fraudgate_decision_latency_ms",
            "From arrival at a door to the answer, milliseconds",
            LATENCY_BOUNDS_MS,
            "door",
            registry,
        )
        self.step_ms = BatchHistogram(
            "fraudgate_step_ms",
            "Time of a batch in each step: features, model, policy, publish (HTTP), commit (Kafka)",
            STEP_BOUNDS_MS,
            "step",
            registry,
        )
        self.batch_rows = BatchHistogram("fraudgate_batch_rows", "Transactions in a micro-batch", BATCH_BOUNDS, "door", registry)
        self.in_flight = Gauge("fraudgate_in_flight", "Transactions accepted over HTTP and not yet answered", registry=registry)
        self.hurried = Counter(
            "fraudgate_hurried", "Transactions decided without Redis because their deadline was too near", registry=registry
        )
        self.in_flight_limit = Gauge(
            "fraudgate_in_flight_limit", "Transactions that may be in flight over HTTP, as admission found it", registry=registry
        )
        self.pause_ms = BatchHistogram(
            "fraudgate_pause_ms",
            "How late the event loop came to what was due (loop), pauses of the garbage collector (gc), milliseconds",
            STEP_BOUNDS_MS,
            "of",
            registry,
        )
        self.loop_lag_max_ms = Gauge(
            "fraudgate_loop_lag_max_ms", "Latest the event loop came to what was due in the last second", registry=registry
        )
        self.connections_held = Gauge(
            "fraudgate_http_connections_held", "Connections not read for a moment because they were told 429", registry=registry
        )
        self.workers = Gauge("fraudgate_workers", "Gateway processes that serve", registry=registry)
        self.connections = Gauge("fraudgate_http_connections", "Open connections of the HTTP door", registry=registry)
        self.connections_refused = Counter(
            "fraudgate_http_connections_refused", "Connections that were one too many", registry=registry
        )
        self.connections_slow = Counter(
            "fraudgate_http_connections_slow",
            "Connections ended because a request took too long to arrive or an answer to be read",
            registry=registry,
        )
        self.refused = Counter("fraudgate_refused", "Inputs refused, by reason and door", ["reason", "door"], registry=registry)
        self.degraded = Counter("fraudgate_degraded", "Decisions made without something, by kind", ["kind"], registry=registry)
        self.duplicates = Counter(
            "fraudgate_duplicates", "Retries answered or skipped because they were decided before", ["door"], registry=registry
        )
        self.rule_hits = Counter("fraudgate_rule_hits", "Rules that fired", ["rule"], registry=registry)
        self.reasons = Counter(
            "fraudgate_reasons",
            "Scores to give reasons for: by the model, too late for that, or by a model that has no explanation",
            ["outcome"],
            registry=registry,
        )
        self.buffer = Gauge("fraudgate_publish_buffer_records", "Records waiting for Kafka to acknowledge them", registry=registry)
        self.published = Counter("fraudgate_published", "Records acknowledged by Kafka, by topic", ["topic"], registry=registry)
        self.publish_dropped = Counter(
            "fraudgate_publish_dropped", "Records dropped because the buffer was full", registry=registry
        )
        self.spooled = Counter("fraudgate_spooled", "Records written to the local log", registry=registry)
        self.spool_records = Gauge(
            "fraudgate_spool_records", "Records in the local log that Kafka hasn't acknowledged", registry=registry
        )
        self.spool_bytes = Gauge("fraudgate_spool_bytes", "Bytes of them", registry=registry)
        self.spool_age_s = Gauge("fraudgate_spool_age_seconds", "Age of the oldest of them", registry=registry)
        self.lag = Gauge(
            "fraudgate_consumer_lag_records", "Records of transactions not yet consumed", ["partition"], registry=registry
        )
        self.kafka_sessions = Counter(
            "fraudgate_kafka_sessions", "Times the Kafka door (re)joined its consumer group", registry=registry
        )
        self.redis_ready = Gauge("fraudgate_redis_ready", "1 while a probed connection to Redis stands", registry=registry)
        self.values_refused = Gauge(
            "fraudgate_packed_values_refused", "Packed values of an unknown version or another key, not used", registry=registry
        )
        self.writes_refused = Gauge(
            "fraudgate_redis_writes_refused",
            "Transactions that were not observed because Redis is at its memory limit",
            registry=registry,
        )
        self.records_failed = Gauge(
            "fraudgate_idempotency_records_failed", "Answers that could not be stored for retries", registry=registry
        )
        self.unobserved = Gauge(
            "fraudgate_unobserved", "Transactions decided without Redis that it has not been told of yet", registry=registry
        )
        self.unobserved_dropped = Counter(
            "fraudgate_unobserved_dropped", "Transactions that Redis will not be told of: too many were waiting", registry=registry
        )
        self.model_refused = Counter("fraudgate_model_refused", "Models that failed a check and don't serve", registry=registry)
        self.model_info = Gauge("fraudgate_model_info", "The model that serves", ["name", "version", "digest"], registry=registry)
        self.routed = Counter(
            "fraudgate_routed", "Decisions with a model's score, by the route that scored them", ["route"], registry=registry
        )
        self.challenger_share = Gauge(
            "fraudgate_challenger_share", "Part of the cards that the challenger gets, 0 to 1", registry=registry
        )
        self.challenger_failed = Counter(
            "fraudgate_challenger_failed", "Batches in which the challenger failed and the champion scored all", registry=registry
        )
        self.guard_out = Gauge("fraudgate_guard_out", "1 while the guard keeps the challenger out", registry=registry)
        self.guard_alarms = Counter(
            "fraudgate_guard_alarms", "Times this process took the challenger out, by test", ["test"], registry=registry
        )
        self.guard_evidence = Gauge(
            "fraudgate_guard_evidence",
            "Evidence against the challenger, by test: 1 and more is an alarm; on a logarithmic scale from 0",
            ["test"],
            registry=registry,
        )
        self.guard_pairs = Counter(
            "fraudgate_guard_pairs", "Payments that champion and challenger have both decided for the guard", registry=registry
        )
        self.slack_batches = Gauge(
            "fraudgate_slack_batches", "Decided batches waiting to be scored by shadow models and for the guard", registry=registry
        )
        self.slack_dropped = Counter(
            "fraudgate_slack_dropped", "Decisions given up there, the oldest, because too many were waiting", registry=registry
        )
        self.shadow_scored = Counter(
            "fraudgate_shadow_scored", "Decisions that a shadow model scored too, by its route", ["route"], registry=registry
        )
        self.shadow_failed = Counter(
            "fraudgate_shadow_failed", "Batches that a shadow model could not score, by its route", ["route"], registry=registry
        )
        self.shadow_unpublished = Counter(
            "fraudgate_shadow_unpublished", "Scores of shadow models that Kafka didn't take", registry=registry
        )
        self.explored = Counter("fraudgate_explored", "Payments approved although the policy would decline them", registry=registry)
        self.explored_minor = Counter("fraudgate_explored_minor", "Their amounts, minor units", registry=registry)
        self.explore_capped = Counter(
            "fraudgate_explore_capped", "Payments not explored because the day's loss cap had no room", registry=registry
        )
        self.explore_spent_minor = Gauge(
            "fraudgate_explore_spent_minor", "Of the day's loss cap spent by all gateways, as far as known", registry=registry
        )
        self.lists_version = Gauge(
            "fraudgate_lists_version",
            "Changes of lists that are in force, an offset of list_changes; -1 while no lists are known",
            registry=registry,
        )
        self.lists_entries = Gauge("fraudgate_lists_entries", "Entries of all lists, expired ones included", registry=registry)
        self.lists_lag = Gauge(
            "fraudgate_lists_lag_records", "Changes of lists not yet in force, as far as known", registry=registry
        )
        self.lists_missing = Gauge(
            "fraudgate_lists_missing", "Changes of lists that the topic no longer had when they were read", registry=registry
        )
        self.lists_trouble = Gauge(
            "fraudgate_lists_trouble",
            "1 while the lists may not be what they should be: changes are missing, or the topic is another",
            registry=registry,
        )
        self.lists_skipped = Counter(
            "fraudgate_lists_skipped",
            "Changes of lists not in force: malformed, or the lists are full",
            ["reason"],
            registry=registry,
        )
        self.list_hits = Counter("fraudgate_list_hits", "Decisions on an entity that stands on a list", ["list"], registry=registry)
        self.shadow_hits = Counter("fraudgate_shadow_hits", "Rules in shadow that would have fired", ["rule"], registry=registry)
        self.rule_errors = Counter("fraudgate_rule_errors", "Rules that could not be evaluated", ["rule"], registry=registry)
        self.policy_loads = Counter(
            "fraudgate_policy_loads", "Policies read after the start: taken into use, or refused", ["outcome"], registry=registry
        )
        self.build_info = Gauge(
            "fraudgate_build_info", "What runs", ["version", "feature_fingerprint", "policy_digest"], registry=registry
        )

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)
