"""Every metric of every process, once: its name, kind, help, labels with what they may hold, buckets, and who exports it.

The gateway, the case service, the feature jobs and `fraudgate parity --live` make theirs from it, docs/metrics.md is written from it, and
alerts and dashboards may name nothing else (tests/test_repository_rules.py). A new metric is a line here and an annotation in the class
of its exporter. It needs no library of metrics, and costs nothing at run time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from gateway.contracts import tables, topics
from gateway.contracts.decision import Door, Outcome, Route
from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.label import SOURCES, STATES
from gateway.contracts.lists import LISTS_MAX, ListAction
from gateway.contracts.reasons import Degraded, Refusal


class Kind(StrEnum):
    """What Prometheus knows it as."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Exporter(StrEnum):
    """Which process serves it at /metrics."""

    GATEWAY = "gateway"
    CASES = "cases"
    JOBS = "jobs"
    PARITY = "parity"


class Over(StrEnum):
    """How the values of one gauge come together where a gateway has several workers. Counters and histograms add up."""

    SUM = "sum"
    LEAST = "least"
    MOST = "most"


@dataclass(frozen=True)
class Label:
    """`values` are all that there may be. Where they aren't known beforehand, there are at most `most` at a time, `which` says of what."""

    name: str
    values: tuple[str, ...] = ()
    which: str = ""
    most: int = 0

    @property
    def bound(self) -> int:
        return len(self.values) or self.most


@dataclass(frozen=True)
class Metric:
    """`attribute` is what the code calls it. `name` is what Prometheus stores; a histogram's series add _bucket, _sum and _count."""

    attribute: str
    name: str
    kind: Kind
    doc: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    over: Over = Over.SUM

    @property
    def label_names(self) -> list[str]:
        return [label.name for label in self.labels]

    @property
    def bound(self) -> int:
        """The most series that one process exports of it, buckets not counted."""
        bound = 1
        for label in self.labels:
            bound *= label.bound
        return bound

    @property
    def seeds(self) -> Iterator[tuple[str, ...]]:
        """The label values that a counter shows as 0 from the start, so that its first count is seen as an increase."""
        if self.kind is Kind.COUNTER and self.labels and all(label.values for label in self.labels) and self.bound <= SEEDED_MAX:
            yield from itertools.product(*[label.values for label in self.labels])

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which Prometheus stores its samples."""
        return tuple(self.name + s for s in ("_bucket", "_sum", "_count")) if self.kind is Kind.HISTOGRAM else (self.name,)


SEEDED_MAX = 128

# An answer within this is a good one. Through Kafka nobody waits at a till: a decision is good when it is committed within a second.
GOOD_WITHIN_S = {Door.HTTP: 0.1, Door.KAFKA: 1.0}
# How old a table's newest rows may be when they are written, by the stream that writes it (docs/pipeline.md).
FRESH_WITHIN_S = {"bronze": 5.0, "silver": 12.0, "gold": 45.0}

# Dense where the promises are: 1..20 ms by one, to 100 by five, to 150 by ten.
LATENCY_BUCKETS_S: tuple[float, ...] = (
    0.0005,
    *(n / 1000 for n in range(1, 21)),
    *(n / 1000 for n in range(25, 105, 5)),
    *(0.11, 0.12, 0.13, 0.14, 0.15, 0.2, 0.5, 1.0, 5.0),
)
STEP_BUCKETS_S = (0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.008, 0.012, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.5, 2.0)
BATCH_ROWS_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
JOB_BATCH_BUCKETS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0)
assert set(GOOD_WITHIN_S.values()) <= set(LATENCY_BUCKETS_S), "the promise is a bucket, or it can't be read from the histogram"

DOOR = Label("door", tuple(Door))
OUTCOME = Label("outcome", tuple(Outcome))
QUALITY = Label("quality", ("good", "bad"))
STEP = Label("step", ("features", "model", "policy", "reasons", "publish", "commit"))
PAUSE_OF = Label("of", ("loop", "gc"))
# What the gateway and the case service refuse a request for (gateway/errors.py), and what is none of a caller's doing.
REASON = Label("reason", (), "reasons of refusals (docs/api.md)", 64)
KIND = Label("kind", tuple(Degraded))
RULE = Label("rule", (), "rules of the policy", 1000)
LIST = Label("list", (), "lists of the policy", LISTS_MAX)
TRACED = Label("outcome", ("sent", "failed", "dropped", "over_limit"))
EXPLAINED = Label("outcome", ("model", "late", "unexplained"))
TOPIC = Label("topic", tuple(topics.TOPICS))
PARTITION = Label("partition", (), "partitions of transactions", 1024)
NODE = Label("node", (), "nodes of the Redis Cluster, host:port", 64)
NAME = Label("name", (), "the model's name", 1)
VERSION = Label("version", (), "its version", 1)
DIGEST = Label("digest", (), "its digest", 1)
BUILD = (
    Label("version", (), "the code's version", 1),
    Label("feature_fingerprint", (), "the features' fingerprint", 1),
    Label("policy_digest", (), "the policy's digest", 1),
)
ROUTE = Label("route", tuple(Route))
SHADOW_ROUTE = Label("route", (), "shadow models", 8)
GUARD_TEST = Label("test", ("declines", "scores", "merchant"))
SKIPPED = Label("reason", ("malformed", "full"))
LOADED = Label("outcome", ("used", "refused"))
WHY = Label("why", (), "why a person is to look", 8)
VERDICT = Label("verdict", (), "verdicts of an analyst", 8)
SOURCE, STATE = Label("source", SOURCES), Label("state", STATES)
ACTION = Label("action", tuple(ListAction))
WEBHOOK = Label("webhook", (), "webhooks of the file", 20)
TABLE = Label("table", tables.TABLES)
QUERY = Label("query", ("bronze", "silver", "gold", "labels", "drift", "bursts"))
REFUSAL = Label("reason", tuple(Refusal))
MEASURE = Label("measure", (), "features, and the score, its band and the decision", 128)
ENTITY = Label("entity", ("merchant_id", "device_id", "card_bin"))
FEATURE = Label("feature", tuple(FEATURE_NAMES))


def _counter(attribute: str, name: str, doc: str, *labels: Label) -> Metric:
    return Metric(attribute, name, Kind.COUNTER, doc, labels)


def _gauge(attribute: str, name: str, doc: str, *labels: Label, over: Over = Over.SUM) -> Metric:
    return Metric(attribute, name, Kind.GAUGE, doc, labels, over=over)


def _histogram(attribute: str, name: str, doc: str, label: Label, buckets: tuple[float, ...]) -> Metric:
    return Metric(attribute, name, Kind.HISTOGRAM, doc, (label,), buckets)


_c, _g, _h = _counter, _gauge, _histogram
_most, _least = Over.MOST, Over.LEAST

GATEWAY: tuple[Metric, ...] = (
    # What the service level is made of.
    _c(
        "sli_decisions",
        "fraudgate_sli_decisions_total",
        "Decisions that were asked for, good: in time; bad: late, shed, failed",
        DOOR,
        QUALITY,
    ),
    _c("decisions", "fraudgate_decisions_total", "Transactions decided, by outcome and door", OUTCOME, DOOR),
    _h(
        "latency_s",
        "fraudgate_decision_latency_seconds",
        "From arrival at a door to the answer; through Kafka, from the producer's timestamp to the commit",
        DOOR,
        LATENCY_BUCKETS_S,
    ),
    _h("step_s", "fraudgate_step_seconds", "Time of a batch in each step: publish is HTTP's, commit Kafka's", STEP, STEP_BUCKETS_S),
    _h("batch_rows", "fraudgate_batch_rows", "Transactions in a micro-batch", DOOR, BATCH_ROWS_BUCKETS),
    _c("degraded", "fraudgate_degraded_total", "Decisions made without something, by kind", KIND),
    _c("refused", "fraudgate_refused_total", "Inputs refused, by reason and door", REASON, DOOR),
    _c("duplicates", "fraudgate_duplicates_total", "Retries answered or skipped because they were decided before", DOOR),
    _c("hurried", "fraudgate_hurried_total", "Transactions decided without Redis because their deadline was too near"),
    # The HTTP door and its process.
    _g("workers", "fraudgate_workers", "Gateway processes that serve"),
    _g("in_flight", "fraudgate_in_flight", "Transactions accepted over HTTP and not yet answered"),
    _g("in_flight_limit", "fraudgate_in_flight_limit", "Transactions that may be in flight over HTTP, as admission found it"),
    _h(
        "pause_s",
        "fraudgate_pause_seconds",
        "How late the event loop came to what was due (loop), pauses of the garbage collector (gc)",
        PAUSE_OF,
        STEP_BUCKETS_S,
    ),
    _g(
        "loop_lag_max_s",
        "fraudgate_loop_lag_max_seconds",
        "Latest the event loop came to what was due in the last second",
        over=_most,
    ),
    _g("connections", "fraudgate_http_connections", "Open connections of the HTTP door"),
    _g("connections_held", "fraudgate_http_connections_held", "Connections not read for a moment because they were told 429"),
    _c("connections_refused", "fraudgate_http_connections_refused_total", "Connections that were one too many"),
    _c(
        "connections_slow",
        "fraudgate_http_connections_slow_total",
        "Connections ended because a request took too long to arrive or an answer to be read",
    ),
    # Kafka.
    _g(
        "kafka_connected",
        "fraudgate_kafka_connected",
        "1 while the Kafka door has its partitions, or takes no part in the group",
        over=_least,
    ),
    _g("lag", "fraudgate_consumer_lag_records", "Records of transactions not yet consumed", PARTITION),
    _g(
        "standstill_s",
        "fraudgate_consumer_standstill_seconds",
        "How long the committed offset of a partition that has more has stood still, the longest",
        over=_most,
    ),
    _c("consumed", "fraudgate_consumed_total", "Records of transactions whose offsets were committed"),
    _c("kafka_sessions", "fraudgate_kafka_sessions_total", "Times the Kafka door (re)joined its consumer group"),
    _g("buffer", "fraudgate_publish_buffer_records", "Records waiting for Kafka to acknowledge them"),
    _c("published", "fraudgate_published_total", "Records acknowledged by Kafka, by topic", TOPIC),
    _c("publish_dropped", "fraudgate_publish_dropped_total", "Records dropped because the buffer was full: receipts that are lost"),
    _c("spooled", "fraudgate_spooled_total", "Records written to the local log"),
    _g("spool_records", "fraudgate_spool_records", "Records in the local log that Kafka hasn't acknowledged"),
    _g("spool_bytes", "fraudgate_spool_bytes", "Bytes of them"),
    _g("spool_age_s", "fraudgate_spool_age_seconds", "Age of the oldest of them", over=_most),
    # Redis.
    _g("redis_ready", "fraudgate_redis_ready", "1 while a probed connection to Redis stands", over=_least),
    _h(
        "redis_round_trip_s",
        "fraudgate_redis_round_trip_seconds",
        "From writing a batch's commands to Redis until all its replies are read",
        DOOR,
        STEP_BUCKETS_S,
    ),
    _c("redis_timeouts", "fraudgate_redis_timeouts_total", "Batches that Redis did not answer in time, or not at all", DOOR),
    _c("redis_connects", "fraudgate_redis_connects_total", "Connections to Redis that were made, the first ones included"),
    _g("redis_memory", "fraudgate_redis_memory_used_bytes", "Memory that Redis uses", NODE, over=_most),
    _g(
        "redis_memory_limit",
        "fraudgate_redis_memory_limit_bytes",
        "Memory at which Redis refuses writes; 0: no limit",
        NODE,
        over=_most,
    ),
    _g("redis_clients", "fraudgate_redis_clients", "Connections that Redis serves", NODE, over=_most),
    _c("values_refused", "fraudgate_packed_values_refused_total", "Packed values of an unknown version or another key, not used"),
    _c(
        "writes_refused",
        "fraudgate_redis_writes_refused_total",
        "Transactions that were not observed because Redis is at its memory limit",
    ),
    _c("records_failed", "fraudgate_idempotency_records_failed_total", "Answers that could not be stored for retries"),
    _g("unobserved", "fraudgate_unobserved", "Transactions decided without Redis that it has not been told of yet"),
    _c(
        "unobserved_dropped",
        "fraudgate_unobserved_dropped_total",
        "Transactions that Redis will not be told of: too many were waiting",
    ),
    # Models.
    _g("model_info", "fraudgate_model_info", "The model that serves", NAME, VERSION, DIGEST, over=_most),
    _g("model_serving", "fraudgate_model_serving", "1 while a model scores", over=_least),
    _c("model_refused", "fraudgate_model_refused_total", "Models that failed a check and don't serve"),
    _c("routed", "fraudgate_routed_total", "Decisions with a model's score, by the route that scored them", ROUTE),
    _g("challenger_share", "fraudgate_challenger_share", "Part of the cards that the challenger gets, 0 to 1", over=_most),
    _c(
        "challenger_failed",
        "fraudgate_challenger_failed_total",
        "Batches in which the challenger failed and the champion scored all",
    ),
    _g("guard_out", "fraudgate_guard_out", "1 while the guard keeps the challenger out", over=_most),
    _c("guard_alarms", "fraudgate_guard_alarms_total", "Times this process took the challenger out, by test", GUARD_TEST),
    _g(
        "guard_evidence",
        "fraudgate_guard_evidence",
        "Evidence against the challenger, by test: 1 and more is an alarm; on a logarithmic scale from 0",
        GUARD_TEST,
        over=_most,
    ),
    _c("guard_pairs", "fraudgate_guard_pairs_total", "Payments that champion and challenger have both decided for the guard"),
    _c(
        "reasons",
        "fraudgate_reasons_total",
        "Scores to give reasons for: by the model, too late for that, or by a model that has no explanation",
        EXPLAINED,
    ),
    _g("slack_batches", "fraudgate_slack_batches", "Decided batches waiting to be scored by shadow models and for the guard"),
    _c("slack_dropped", "fraudgate_slack_dropped_total", "Decisions given up there, the oldest, because too many were waiting"),
    _c("shadow_scored", "fraudgate_shadow_scored_total", "Decisions that a shadow model scored too, by its route", SHADOW_ROUTE),
    _c("shadow_failed", "fraudgate_shadow_failed_total", "Batches that a shadow model could not score, by its route", SHADOW_ROUTE),
    _c("shadow_unpublished", "fraudgate_shadow_unpublished_total", "Scores of shadow models that Kafka didn't take"),
    _c("explored", "fraudgate_explored_total", "Payments approved although the policy would decline them"),
    _c("explored_minor", "fraudgate_explored_minor_total", "Their amounts, minor units"),
    _c("explore_capped", "fraudgate_explore_capped_total", "Payments not explored because the day's loss cap had no room"),
    _g(
        "explore_spent_minor",
        "fraudgate_explore_spent_minor",
        "Of the day's loss cap spent by all gateways, as far as known",
        over=_most,
    ),
    # Traces.
    _c(
        "traces",
        "fraudgate_traces_total",
        "Traced decisions: sent to the collector, failed there, dropped as too many waited, or over the limit of a second",
        TRACED,
    ),
    _g("traces_waiting", "fraudgate_traces_waiting", "Traced decisions waiting for the collector"),
    # Policy and lists.
    _g("build_info", "fraudgate_build_info", "What this gateway runs", *BUILD, over=_most),
    _c("policy_loads", "fraudgate_policy_loads_total", "Policies read after the start: taken into use, or refused", LOADED),
    _g("policy_refused", "fraudgate_policy_refused", "1 while the policy on disk is refused and an earlier one serves", over=_most),
    _c("rule_hits", "fraudgate_rule_hits_total", "Rules that fired", RULE),
    _c("shadow_hits", "fraudgate_shadow_hits_total", "Rules in shadow that would have fired", RULE),
    _c("rule_errors", "fraudgate_rule_errors_total", "Rules that could not be evaluated", RULE),
    _c("list_hits", "fraudgate_list_hits_total", "Decisions on an entity that stands on a list", LIST),
    _g(
        "lists_version",
        "fraudgate_lists_version",
        "Changes of lists that are in force, an offset of list_changes; -1 while no lists are known",
        over=_least,
    ),
    _g("lists_entries", "fraudgate_lists_entries", "Entries of all lists, expired ones included", over=_most),
    _g("lists_lag", "fraudgate_lists_lag_records", "Changes of lists not yet in force, as far as known", over=_most),
    _g("lists_missing", "fraudgate_lists_missing", "Changes of lists that the topic no longer had when they were read", over=_most),
    _g(
        "lists_trouble",
        "fraudgate_lists_trouble",
        "1 while the lists may not be what they should be: changes are missing, or the topic is another",
        over=_most,
    ),
    _c(
        "lists_skipped", "fraudgate_lists_skipped_total", "Changes of lists not in force: malformed, or the lists are full", SKIPPED
    ),
    # The console.
    _g("console_viewers", "fraudgate_console_viewers", "Browsers that watch the console"),
    _c("console_refused", "fraudgate_console_refused_total", "Browsers that were one too many for the console"),
    _c("console_dropped", "fraudgate_console_dropped_total", "Browsers that were told no more because they didn't read"),
)

CASES: tuple[Metric, ...] = (
    _c("queued", "fraudgate_cases_reviews_queued_total", "Decisions that were queued for a person", WHY),
    _g("open", "fraudgate_cases_reviews_open", "Reviews without a verdict"),
    _c("verdicts", "fraudgate_cases_verdicts_total", "Reviews that were decided", VERDICT),
    _c("labels", "fraudgate_cases_labels_total", "Labels that went to the outbox", SOURCE, STATE),
    _c("list_changes", "fraudgate_cases_list_changes_total", "Changes of lists that Kafka acknowledged", ACTION),
    _c("refused", "fraudgate_cases_refused_total", "Requests that were answered by a problem", REASON),
    _g("outbox", "fraudgate_cases_outbox_records", "Labels and audit records that wait for Kafka"),
    _c("outbox_delivered", "fraudgate_cases_outbox_delivered_total", "Records of the outbox that Kafka acknowledged"),
    _c("read", "fraudgate_cases_read_total", "Records that were read from Kafka", TOPIC),
    _c("unreadable", "fraudgate_cases_unreadable_total", "Records that can't be read and were left out", TOPIC),
    _g("paused", "fraudgate_cases_intake_paused", "1 while as many reviews are open as may be, and none is taken in"),
    _g("connected", "fraudgate_cases_kafka_connected", "1 while the case service has its partitions"),
    _c("webhook_queued", "fraudgate_webhook_queued_total", "Messages to deliver", WEBHOOK),
    _c("webhook_duplicate", "fraudgate_webhook_duplicate_total", "Messages that were told already", WEBHOOK),
    _c("webhook_old", "fraudgate_webhook_old_total", "Messages that were too old to send when they were read", WEBHOOK),
    _c(
        "webhook_overflow",
        "fraudgate_webhook_overflow_total",
        "Messages that went straight to the dead letters, the queue being full",
        WEBHOOK,
    ),
    _c("webhook_delivered", "fraudgate_webhook_delivered_total", "Messages that were taken", WEBHOOK),
    _c("webhook_failed", "fraudgate_webhook_failed_total", "Attempts that failed", WEBHOOK),
    _c("webhook_dead", "fraudgate_webhook_dead_total", "Messages given up after their last attempt", WEBHOOK),
    _g("webhook_queue", "fraudgate_webhook_queue", "Messages that wait for delivery", WEBHOOK),
)

JOBS: tuple[Metric, ...] = (
    _g("up", "fraudgate_jobs_up", "1 while the query runs", QUERY),
    _c("restarts", "fraudgate_jobs_restarts_total", "Failures of a query that the supervisor restarted", QUERY),
    _c("rows", "fraudgate_jobs_rows_total", "Rows written, by table", TABLE),
    _h("batch_seconds", "fraudgate_jobs_batch_seconds", "Time of one micro-batch", QUERY, JOB_BATCH_BUCKETS_S),
    _g(
        "batch_at",
        "fraudgate_jobs_batch_timestamp_seconds",
        "When the query's last micro-batch ended, seconds since the epoch",
        QUERY,
    ),
    _g(
        "freshness_seconds",
        "fraudgate_jobs_freshness_seconds",
        "Age of the oldest Kafka record of the last batch when the batch was written",
        QUERY,
    ),
    _g("lag", "fraudgate_jobs_kafka_lag_records", "Records in Kafka that bronze doesn't hold yet, at its last batch"),
    _c("quarantined", "fraudgate_jobs_quarantined_total", "Records refused, by reason", REFUSAL),
    _c("duplicates", "fraudgate_jobs_duplicates_total", "Records dropped because their transaction_id was seen"),
    _c("late", "fraudgate_jobs_late_total", "Records dropped behind the watermark: never expected"),
    _c("entities", "fraudgate_jobs_tiles_written_total", "Entities whose tiles were written to Redis"),
    _c("rebuilds", "fraudgate_jobs_tiles_rebuilt_total", "Times that tiles were rebuilt from silver"),
    _c("label_values", "fraudgate_jobs_labels_written_total", "Entities whose frauds were written to Redis"),
    _c("label_rebuilds", "fraudgate_jobs_labels_rebuilt_total", "Times that frauds were rebuilt from the label changes"),
    _c("labels_unmatched", "fraudgate_jobs_labels_unmatched_total", "Labels whose payment was not there when they came"),
    _g("labels_waiting", "fraudgate_jobs_labels_waiting", "Labels that are tried again with each batch"),
    _g("state_rows", "fraudgate_jobs_state_rows", "Ids that a query remembers to drop repetitions", QUERY),
    _g("state_memory", "fraudgate_jobs_state_memory_bytes", "Memory of the store that holds them", QUERY),
    _g("drift_psi", "fraudgate_jobs_drift_psi", "PSI against the training rows in the newest window", MEASURE),
    _g("drift_ks", "fraudgate_jobs_drift_ks", "KS statistic against the training rows in the newest window", MEASURE),
    _g("drift_alarm", "fraudgate_jobs_drift_alarm", "1 while the measure is an alarm", MEASURE),
    _c("drift_alarms", "fraudgate_jobs_drift_alarms_total", "Alarms that began", MEASURE),
    _c("drift_windows", "fraudgate_jobs_drift_windows_total", "Windows that were compared"),
    _c("drift_late", "fraudgate_jobs_drift_late_total", "Receipts too late for their windows"),
    _g(
        "drift_stream_time",
        "fraudgate_jobs_drift_stream_timestamp_seconds",
        "Event time that drift has come to, seconds since the epoch",
    ),
    _g("drift_reference", "fraudgate_jobs_drift_reference", "1 while the champion has training rows to compare with"),
    _c("bursts", "fraudgate_jobs_bursts_total", "Bursts of declines that began, by entity", ENTITY),
    _g("bursts_active", "fraudgate_jobs_bursts_active", "Bursts of declines that go on"),
    _g("burst_entities", "fraudgate_jobs_burst_entities", "Merchants, devices and BINs whose declines are remembered"),
    _c("burst_evicted", "fraudgate_jobs_burst_evicted_total", "Of those, forgotten to make room: their bursts may be missed"),
)

PARITY: tuple[Metric, ...] = (
    _c("compared", "fraudgate_parity_compared_total", "Values (receipts times features) of sampled receipts that were compared"),
    _c("different", "fraudgate_parity_different_total", "Values of sampled receipts that differed, by feature", FEATURE),
    _c("missing", "fraudgate_parity_missing_total", "Values of sampled receipts that no receipt held"),
    _c("stale", "fraudgate_parity_stale_receipts_total", "Sampled receipts that were flagged stale"),
    _g("checked", "fraudgate_parity_checked_timestamp_seconds", "When the last sample was compared, seconds since the epoch"),
)

CATALOGUE: dict[Exporter, tuple[Metric, ...]] = {
    Exporter.GATEWAY: GATEWAY,
    Exporter.CASES: CASES,
    Exporter.JOBS: JOBS,
    Exporter.PARITY: PARITY,
}
BY_NAME: dict[str, Metric] = {metric.name: metric for metrics in CATALOGUE.values() for metric in metrics}
assert len(BY_NAME) == sum(map(len, CATALOGUE.values())), "two metrics have one name"
# What may stand in a query.
SERIES: dict[str, Metric] = {series: metric for metric in BY_NAME.values() for series in metric.series}
