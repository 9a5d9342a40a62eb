"""What somebody is told of. Each alert has a page docs/runbooks/NAME.md, a test that it fires and that it doesn't just under its limit.

`deploy.monitoring.rules` writes rules.yml from this. A page is for what customers feel now or what is being lost; the rest is a ticket.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.monitoring.slo import FAST, PAGE, SLOS, SLOW, TICKET, Slo


@dataclass(frozen=True)
class Alert:
    """`after` is how long `expr` must hold. `summary` may name labels of what `expr` finds, as Prometheus' templates do."""

    name: str
    severity: str
    component: str
    expr: str
    after: str
    summary: str
    slo: str = ""


def _rises(metric: str, window: str) -> str:
    """True when a counter with labels that aren't known beforehand has risen: its first count is no increase to Prometheus."""
    return f"increase({metric}[{window}]) > 0 or ({metric} > 0 unless {metric} offset {window})"


def _burn(slo: Slo, title: str, fast: str, slow: str) -> tuple[Alert, Alert]:
    left = "{{ $value | humanizePercentage }}"
    return (
        Alert(
            f"{title}BurnFast",
            slo.fast_severity,
            slo.component,
            slo.burns(FAST),
            "1m",
            f"{fast} ({left} of {{{{ $labels.{slo.by} }}}} are bad)",
            slo.name,
        ),
        Alert(
            f"{title}BurnSlow",
            TICKET,
            slo.component,
            slo.burns(SLOW),
            "15m",
            f"{slow} ({left} of {{{{ $labels.{slo.by} }}}} are bad)",
            slo.name,
        ),
    )


_DECISIONS, _LATENCY, _FRESHNESS = SLOS
_DECIDED = "sum(rate(fraudgate_decisions_total[5m]))"
_LAG = "fraudgate:consumer_lag_records:sum"
_JOBS_LAG = "fraudgate_jobs_kafka_lag_records"

ALERTS: tuple[Alert, ...] = (
    # What callers feel.
    Alert("GatewayDown", PAGE, "gateway", 'sum(up{job="gateway"}) == 0 or absent(up{job="gateway"})', "1m", "No gateway answers"),
    *_burn(
        _DECISIONS, "Decisions", "Payments get no answer in time, many of them", "More payments than promised get no answer in time"
    ),
    *_burn(_LATENCY, "Latency", "Answers are much slower than promised", "More answers than promised are slow"),
    Alert(
        "TrafficGone",
        TICKET,
        "gateway",
        f"{_DECIDED} == 0 and sum(rate(fraudgate_decisions_total[1h] offset 10m)) > 1",
        "5m",
        "No payments have come for five minutes, and an hour ago there were some",
    ),
    Alert(
        "DecisionsDegraded",
        PAGE,
        "decisions",
        f'sum(rate(fraudgate_degraded_total{{kind!="stale_features"}}[5m])) / {_DECIDED} > 0.05',
        "5m",
        "{{ $value | humanizePercentage }} of decisions are made without features or without a model",
    ),
    Alert(
        "FeaturesStale",
        TICKET,
        "decisions",
        f'sum(rate(fraudgate_degraded_total{{kind="stale_features"}}[5m])) / {_DECIDED} > 0.2',
        "10m",
        "{{ $value | humanizePercentage }} of decisions see features that may be short or ahead",
    ),
    # Kafka.
    Alert(
        "KafkaDoorOut",
        PAGE,
        "kafka",
        "fraudgate_kafka_connected == 0",
        "2m",
        "{{ $labels.instance }} has no partitions of transactions",
    ),
    Alert(
        "KafkaLagGrows",
        PAGE,
        "kafka",
        f"{_LAG} > 10000 and deriv({_LAG}[10m]) >= 0",
        "5m",
        "{{ $value | humanize }} payments wait in Kafka, and they don't get fewer",
    ),
    Alert(
        "KafkaStandsStill",
        PAGE,
        "kafka",
        "max_over_time(fraudgate_consumer_standstill_seconds[10m]) > 90"
        f" or ({_LAG} > 100 and on () sum(rate(fraudgate_consumed_total[5m])) == 0)",
        "1m",
        "A partition of transactions with payments in it is not consumed",
    ),
    Alert(
        "SpoolGrows",
        PAGE,
        "kafka",
        "fraudgate_spool_age_seconds > 60 and deriv(fraudgate_spool_records[5m]) > 0",
        "2m",
        "{{ $labels.instance }} can't deliver receipts to Kafka, the oldest for {{ $value | humanizeDuration }}",
    ),
    Alert(
        "ReceiptsDropped",
        PAGE,
        "kafka",
        "increase(fraudgate_publish_dropped_total[15m]) > 0",
        "0m",
        "{{ $labels.instance }} has lost {{ $value | humanize }} records: its buffer and its local log were full",
    ),
    Alert(
        "TransactionsQuarantined",
        TICKET,
        "kafka",
        'sum(rate(fraudgate_refused_total{door="kafka"}[10m])) / sum(rate(fraudgate_consumed_total[10m])) > 0.05',
        "10m",
        "{{ $value | humanizePercentage }} of what comes through Kafka can't be read",
    ),
    # Redis.
    Alert("RedisNotReady", PAGE, "redis", "fraudgate_redis_ready == 0", "1m", "{{ $labels.instance }} decides without Redis"),
    Alert(
        "RedisSlow",
        TICKET,
        "redis",
        "sum(rate(fraudgate_redis_timeouts_total[5m])) / sum(rate(fraudgate_batch_rows_count[5m])) > 0.01",
        "10m",
        "{{ $value | humanizePercentage }} of batches get no answer from Redis in time",
    ),
    Alert(
        "RedisMemoryHigh",
        TICKET,
        "redis",
        "fraudgate_redis_memory_used_bytes / (fraudgate_redis_memory_limit_bytes > 0) > 0.85",
        "10m",
        "Redis {{ $labels.node }} uses {{ $value | humanizePercentage }} of its memory; at 100 % it refuses writes",
    ),
    Alert(
        "RedisRefusesWrites",
        PAGE,
        "redis",
        "increase(fraudgate_redis_writes_refused_total[5m]) > 0",
        "1m",
        "Redis is full: payments are not observed, velocity features are blind",
    ),
    Alert(
        "PaymentsUnobserved",
        TICKET,
        "redis",
        "increase(fraudgate_unobserved_dropped_total[15m]) > 0",
        "0m",
        "Redis will not be told of {{ $value | humanize }} payments that were decided without it",
    ),
    # Feature jobs.
    Alert("JobsDown", PAGE, "jobs", 'sum(up{job="jobs"}) == 0 or absent(up{job="jobs"})', "2m", "The feature jobs don't answer"),
    Alert("StreamDown", TICKET, "jobs", "fraudgate_jobs_up == 0", "3m", "The stream {{ $labels.query }} doesn't run"),
    Alert(
        "StreamStandsStill",
        PAGE,
        "jobs",
        f'time() - fraudgate_jobs_batch_timestamp_seconds{{query=~"bronze|silver"}} > 120 and on () {_DECIDED} > 0',
        "1m",
        "The stream {{ $labels.query }} has ended no batch for {{ $value | humanizeDuration }}, and payments come",
    ),
    Alert(
        "JobsLagGrows",
        TICKET,
        "jobs",
        f"{_JOBS_LAG} > 100000 and deriv({_JOBS_LAG}[15m]) >= 0",
        "10m",
        "{{ $value | humanize }} records wait for bronze, and they don't get fewer",
    ),
    *_burn(_FRESHNESS, "Freshness", "Tables are much older than promised", "Tables are older than promised too often"),
    # Models.
    Alert("NoModel", PAGE, "models", "fraudgate_model_serving == 0", "5m", "{{ $labels.instance }} decides by rules alone"),
    Alert(
        "ModelRefused",
        TICKET,
        "models",
        "increase(fraudgate_model_refused_total[15m]) > 0",
        "0m",
        "A model failed a check and doesn't serve",
    ),
    Alert("ChallengerTakenOut", TICKET, "models", "fraudgate_guard_out == 1", "0m", "The guard keeps the challenger out"),
    Alert(
        "DriftAlarm",
        TICKET,
        "models",
        "max by (measure) (fraudgate_jobs_drift_alarm) == 1",
        "5m",
        "{{ $labels.measure }} is not as in the training rows",
    ),
    Alert(
        "ParityDifferent",
        TICKET,
        "models",
        "sum by (feature) (increase(fraudgate_parity_different_total[1h])) > 0",
        "0m",
        "{{ $labels.feature }} as logged differs from what the tables say",
    ),
    # Policy and lists.
    Alert(
        "PolicyRefused",
        TICKET,
        "policy",
        "fraudgate_policy_refused == 1",
        "1m",
        "The policy on disk is refused, an earlier one serves",
    ),
    Alert(
        "RuleErrors",
        TICKET,
        "policy",
        _rises("fraudgate_rule_errors_total", "15m"),
        "0m",
        "The rule {{ $labels.rule }} can't be evaluated",
    ),
    Alert(
        "ListsTrouble",
        PAGE,
        "policy",
        "fraudgate_lists_trouble == 1 or fraudgate_lists_version < 0",
        "2m",
        "{{ $labels.instance }}: block lists may not be what they should be",
    ),
    # Cases.
    Alert(
        "CasesDown",
        TICKET,
        "cases",
        'sum(up{job="cases"}) == 0 or absent(up{job="cases"})',
        "5m",
        "The case service doesn't answer",
    ),
    Alert(
        "CasesOutboxStuck",
        TICKET,
        "cases",
        "fraudgate_cases_outbox_records > 0 and increase(fraudgate_cases_outbox_delivered_total[10m]) == 0",
        "10m",
        "{{ $value | humanize }} labels and audit records don't reach Kafka",
    ),
    Alert(
        "CasesIntakePaused",
        TICKET,
        "cases",
        "fraudgate_cases_intake_paused == 1",
        "10m",
        "The review queue is full, and none is taken in",
    ),
    Alert(
        "WebhookDeadLetters",
        TICKET,
        "cases",
        f"{_rises('fraudgate_webhook_dead_total', '1h')} or {_rises('fraudgate_webhook_overflow_total', '1h')}",
        "0m",
        "Messages to the webhook {{ $labels.webhook }} were given up",
    ),
)
BY_NAME: dict[str, Alert] = {alert.name: alert for alert in ALERTS}
assert len(BY_NAME) == len(ALERTS)
