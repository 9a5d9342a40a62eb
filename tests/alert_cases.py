"""For each alert: metrics under which it fires, and others just under its limit, under which it doesn't; as promtool notes series."""

from __future__ import annotations

from dataclasses import dataclass, field

Series = dict[str, str]


@dataclass(frozen=True)
class Case:
    """The metrics, a value each `interval`, and when to look."""

    at: str
    series: Series
    interval: str = "1m"


@dataclass(frozen=True)
class Cases:
    fires: list[Case]
    silent: list[Case] = field(default_factory=list)


def counter(*phases: tuple[float, int]) -> str:
    """A counter that rises by so much a step, for so many steps, phase by phase."""
    found, value = [], 0.0
    for step, steps in phases:
        found.append(f"{value:.6g}+{step:.6g}x{steps - 1}")
        value += step * steps
    return " ".join(found)


def cycle(late: int, of: int, fresh: float, stale: float, steps: int, before: int = 0) -> str:
    """`before` fresh values, then `late` stale ones in every `of`."""
    values = [fresh] * before + [stale if i % of < late else fresh for i in range(steps)]
    return " ".join(f"{v:g}" for v in values)


def decided(bad: float, steps: int, before: int = 0, asked: float = 1000) -> Series:
    """`before` steps without a bad decision, then `bad` of `asked` in each step."""
    name = 'fraudgate_sli_decisions_total{door="http",quality='
    return {
        name + '"good"}': counter(*([(asked, before)] if before else []), (asked - bad, steps)),
        name + '"bad"}': counter(*([(0, before)] if before else []), (bad, steps)),
    }


def answered(slow: float, steps: int, before: int = 0) -> Series:
    """The same of answers that are slower than 100 ms, of a thousand."""
    name = "fraudgate_decision_latency_seconds_"
    return {
        name + 'count{door="http"}': counter((1000, before + steps)),
        name + 'bucket{door="http",le="0.1"}': counter(*([(1000, before)] if before else []), (1000 - slow, steps)),
    }


def aged(late: int, of: int, steps: int, before: int = 0, query: str = "bronze", limit: float = 5) -> Series:
    return {f'fraudgate_jobs_freshness_seconds{{query="{query}"}}': cycle(late, of, limit, limit + 1, steps, before)}


HTTP, WORKING = '{door="http"}', {'fraudgate_decisions_total{door="http",outcome="approve"}': "0+1000x100"}
DAY = 288  # steps of five minutes


def degraded(kind: str, share: float) -> Series:
    return {**WORKING, f'fraudgate_degraded_total{{kind="{kind}"}}': f"0+{share * 1000:g}x100"}


def target(job: str) -> Cases:
    up = f'up{{job="{job}",instance='
    return Cases(
        fires=[Case("20m", {up + '"a"}': "0x30"}), Case("20m", {"unrelated": "1x30"})],
        silent=[Case("20m", {up + '"a"}': "0x30", up + '"b"}': "1x30"})],
    )


def rises(series: str) -> Cases:
    """Of a counter that shows 0 from the start."""
    return Cases(fires=[Case("6m", {series: "0 0 0 0 1x20"})], silent=[Case("6m", {series: "3x20"})])


CASES: dict[str, Cases] = {
    "GatewayDown": target("gateway"),
    "JobsDown": target("jobs"),
    "CasesDown": target("cases"),
    "DecisionsBurnFast": Cases(
        fires=[Case("362m", decided(15, 62, 300)), Case("365m", decided(6.1, 370))],
        silent=[
            Case("362m", decided(14, 62, 300)),
            Case("365m", decided(5.9, 370)),
            # All of them are bad, and it is nine an hour.
            Case("65m", decided(0.15, 70, asked=0.15)),
        ],
    ),
    "DecisionsBurnSlow": Cases(
        fires=[Case("4d", decided(3.2, DAY + 2, 3 * DAY), "5m"), Case("74h", decided(1.1, 900), "5m")],
        silent=[Case("4d", decided(2.9, DAY + 2, 3 * DAY), "5m"), Case("74h", decided(0.9, 900), "5m")],
    ),
    "LatencyBurnFast": Cases(
        fires=[Case("362m", answered(150, 62, 300)), Case("365m", answered(61, 370))],
        silent=[Case("362m", answered(140, 62, 300)), Case("365m", answered(59, 370))],
    ),
    "LatencyBurnSlow": Cases(
        fires=[Case("4d", answered(32, DAY + 2, 3 * DAY), "5m"), Case("74h", answered(11, 900), "5m")],
        silent=[Case("4d", answered(29, DAY + 2, 3 * DAY), "5m"), Case("74h", answered(9, 900), "5m")],
    ),
    "FreshnessBurnFast": Cases(
        fires=[
            Case("362m", aged(17, 20, 250, 1200), "15s"),
            Case("365m", aged(10, 30, 370)),
            Case("365m", aged(10, 30, 370, query="silver", limit=12)),
            Case("365m", aged(10, 30, 370, query="gold", limit=45)),
        ],
        silent=[Case("362m", aged(14, 20, 250, 1200), "15s"), Case("365m", aged(8, 30, 370))],
    ),
    "FreshnessBurnSlow": Cases(
        fires=[Case("4d", aged(4, 24, DAY + 2, 3 * DAY), "5m"), Case("74h", aged(4, 72, 900), "5m")],
        silent=[Case("4d", aged(2, 24, DAY + 2, 3 * DAY), "5m"), Case("74h", aged(2, 72, 900), "5m")],
    ),
    "TrafficGone": Cases(
        fires=[Case("90m", {"fraudgate_decisions_total": counter((120, 70), (0, 30))})],
        silent=[
            Case("90m", {"fraudgate_decisions_total": counter((70, 70), (0, 30))}),
            Case("90m", {"fraudgate_decisions_total": counter((120, 70), (1, 30))}),
        ],
    ),
    "DecisionsDegraded": Cases(
        fires=[Case("20m", degraded("request_only", 0.051)), Case("20m", degraded("rules_only", 0.051))],
        silent=[Case("20m", degraded("request_only", 0.049)), Case("20m", degraded("stale_features", 0.9))],
    ),
    "FeaturesStale": Cases([Case("20m", degraded("stale_features", 0.21))], [Case("20m", degraded("stale_features", 0.19))]),
    "KafkaDoorOut": Cases(
        [Case("5m", {"fraudgate_kafka_connected": "1 0x10"})],
        [Case("5m", {"fraudgate_kafka_connected": "1 1 1 0 0 1x10"}), Case("4m", {"fraudgate_kafka_connected": "1 1 1 0 0 1x10"})],
    ),
    "KafkaLagGrows": Cases(
        [Case("20m", {'fraudgate_consumer_lag_records{partition="0"}': "10001x30"})],
        [
            Case("20m", {'fraudgate_consumer_lag_records{partition="0"}': "10000x30"}),
            Case("20m", {'fraudgate_consumer_lag_records{partition="0"}': "1000000-100x30"}),
        ],
    ),
    "KafkaStandsStill": Cases(
        [
            Case("5m", {"fraudgate_consumer_standstill_seconds": "91x20"}),
            Case("15m", {"fraudgate_consumer_lag_records": "101x30", "fraudgate_consumed_total": "7x30"}),
        ],
        [
            Case("5m", {"fraudgate_consumer_standstill_seconds": "90x20"}),
            Case("15m", {"fraudgate_consumer_lag_records": "100x30", "fraudgate_consumed_total": "7x30"}),
            Case("15m", {"fraudgate_consumer_lag_records": "101x30", "fraudgate_consumed_total": "0+1x30"}),
        ],
    ),
    "SpoolGrows": Cases(
        [Case("15m", {"fraudgate_spool_age_seconds": "61x20", "fraudgate_spool_records": "0+1x20"})],
        [
            Case("15m", {"fraudgate_spool_age_seconds": "60x20", "fraudgate_spool_records": "0+1x20"}),
            Case("15m", {"fraudgate_spool_age_seconds": "61x20", "fraudgate_spool_records": "1000-1x20"}),
        ],
    ),
    "ReceiptsDropped": rises("fraudgate_publish_dropped_total"),
    "TransactionsQuarantined": Cases(
        [Case("25m", {'fraudgate_refused_total{door="kafka",reason="x"}': "0+51x30", "fraudgate_consumed_total": "0+1000x30"})],
        [
            Case("25m", {'fraudgate_refused_total{door="kafka",reason="x"}': "0+49x30", "fraudgate_consumed_total": "0+1000x30"}),
            Case("25m", {'fraudgate_refused_total{door="http",reason="x"}': "0+900x30", "fraudgate_consumed_total": "0+1000x30"}),
        ],
    ),
    "RedisNotReady": Cases(
        [Case("5m", {"fraudgate_redis_ready": "1 0x10"})],
        [Case("3m", {"fraudgate_redis_ready": "1 1 1 0 1x10"}), Case("5m", {"fraudgate_redis_ready": "1x10"})],
    ),
    "RedisSlow": Cases(
        [Case("20m", {f"fraudgate_redis_timeouts_total{HTTP}": "0+11x30", f"fraudgate_batch_rows_count{HTTP}": "0+1000x30"})],
        [Case("20m", {f"fraudgate_redis_timeouts_total{HTTP}": "0+9x30", f"fraudgate_batch_rows_count{HTTP}": "0+1000x30"})],
    ),
    "RedisMemoryHigh": Cases(
        [
            Case(
                "15m",
                {'fraudgate_redis_memory_used_bytes{node="a"}': "86x20", 'fraudgate_redis_memory_limit_bytes{node="a"}': "100x20"},
            )
        ],
        [
            Case(
                "15m", {'fraudgate_redis_memory_used_bytes{node="a"}': f"{n}x20", 'fraudgate_redis_memory_limit_bytes{node="a"}': m}
            )
            for n, m in ((85, "100x20"), (86, "0x20"))
        ],
    ),
    "RedisRefusesWrites": Cases(
        [Case("6m", {"fraudgate_redis_writes_refused_total": "0 0 0 1x20"})],
        [Case("6m", {"fraudgate_redis_writes_refused_total": "3x20"})],
    ),
    "PaymentsUnobserved": rises("fraudgate_unobserved_dropped_total"),
    "StreamDown": Cases(
        [Case("5m", {'fraudgate_jobs_up{query="gold"}': "1 0x10"})],
        [Case("4m", {'fraudgate_jobs_up{query="gold"}': "1 1 0 0 0 1x9"})],
    ),
    "StreamStandsStill": Cases(
        [
            Case("8m", {**WORKING, f'fraudgate_jobs_batch_timestamp_seconds{{query="{query}"}}': "0x20"})
            for query in ("bronze", "silver")
        ],
        [
            Case("15m", {**WORKING, 'fraudgate_jobs_batch_timestamp_seconds{query="silver"}': "-120+60x20"}),
            Case("8m", {"fraudgate_decisions_total": "9x20", 'fraudgate_jobs_batch_timestamp_seconds{query="silver"}': "0x20"}),
        ],
    ),
    "JobsLagGrows": Cases(
        [Case("30m", {"fraudgate_jobs_kafka_lag_records": "100001x40"})],
        [
            Case("30m", {"fraudgate_jobs_kafka_lag_records": "100000x40"}),
            Case("30m", {"fraudgate_jobs_kafka_lag_records": "900000-10x40"}),
        ],
    ),
    "NoModel": Cases(
        [Case("7m", {"fraudgate_model_serving": "1 0x20"})], [Case("7m", {"fraudgate_model_serving": "1 1 0 0 0 0 0 1x20"})]
    ),
    "ModelRefused": rises("fraudgate_model_refused_total"),
    "ChallengerTakenOut": Cases([Case("5m", {"fraudgate_guard_out": "0 1x10"})], [Case("5m", {"fraudgate_guard_out": "0x10"})]),
    "DriftAlarm": Cases(
        [Case("7m", {'fraudgate_jobs_drift_alarm{measure="a"}': "0 1x20", 'fraudgate_jobs_drift_alarm{measure="b"}': "0x20"})],
        [Case("6m", {'fraudgate_jobs_drift_alarm{measure="a"}': "0 0 1 1 1 1 1 0x20"})],
    ),
    "ParityDifferent": rises('fraudgate_parity_different_total{feature="a"}'),
    "PolicyRefused": Cases(
        [Case("5m", {"fraudgate_policy_refused": "0 1x10"})], [Case("3m", {"fraudgate_policy_refused": "0 0 0 1 0x10"})]
    ),
    "RuleErrors": Cases(
        [
            Case("8m", {'fraudgate_rule_errors_total{rule="a"}': "_x5 1x20"}),
            Case("40m", {'fraudgate_rule_errors_total{rule="a"}': "5x34 6x9"}),
        ],
        [Case("40m", {'fraudgate_rule_errors_total{rule="a"}': "5x50"})],
    ),
    "ListsTrouble": Cases(
        [Case("5m", {"fraudgate_lists_trouble": "0 1x10"}), Case("5m", {"fraudgate_lists_version": "0 -1x10"})],
        [
            Case("5m", {"fraudgate_lists_trouble": "0x10", "fraudgate_lists_version": "0x10"}),
            Case("4m", {"fraudgate_lists_trouble": "0 0 1 1 0x9"}),
        ],
    ),
    "CasesOutboxStuck": Cases(
        [Case("25m", {"fraudgate_cases_outbox_records": "1x30", "fraudgate_cases_outbox_delivered_total": "9x30"})],
        [
            Case("25m", {"fraudgate_cases_outbox_records": "1x30", "fraudgate_cases_outbox_delivered_total": "0+1x30"}),
            Case("25m", {"fraudgate_cases_outbox_records": "0x30", "fraudgate_cases_outbox_delivered_total": "9x30"}),
        ],
    ),
    "CasesIntakePaused": Cases(
        [Case("12m", {"fraudgate_cases_intake_paused": "0 1x20"})],
        [Case("12m", {"fraudgate_cases_intake_paused": "0 0 0 1x8 0x9"})],
    ),
    "WebhookDeadLetters": Cases(
        [
            Case("8m", {'fraudgate_webhook_dead_total{webhook="a"}': "_x5 1x20"}),
            Case("8m", {'fraudgate_webhook_overflow_total{webhook="a"}': "_x5 1x20"}),
        ],
        [
            Case(
                "130m",
                {'fraudgate_webhook_dead_total{webhook="a"}': "5x140", 'fraudgate_webhook_overflow_total{webhook="a"}': "5x140"},
            )
        ],
    ),
}
