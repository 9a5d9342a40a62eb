"""What counts as good in a soak, which faults come when, and which alerts are missed: planted cases with known results."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import numpy as np
import pytest

from deploy.soak import alerts
from deploy.soak.alerts import Firing, Told, Webhook
from deploy.soak.faults import FAULTS
from deploy.soak.history import Sent
from deploy.soak.plan import AFTERMATH_S, EVERY_S, FAMILIES, KINDS, Happened, Kind, Plan, PlanError, make_plan
from deploy.soak.verdict import judge
from gateway.contracts.reasons import Degraded
from loadtest.openloop.outcomes import ACKNOWLEDGED, FAILED, NOT_DUE, degraded_bits

RATE, WARM_UP_S, MEASURED_S = 100, 2, 20
FIRST = RATE * WARM_UP_S


def make_sent(seconds: int = WARM_UP_S + MEASURED_S) -> Sent:
    """Every payment accepted, those over HTTP after 5 ms."""
    count = RATE * seconds
    kafka = np.arange(count) % 10 == 9
    zeros = np.zeros(count, np.int64)
    return Sent(
        status=np.where(kafka, ACKNOWLEDGED, 200),
        attempts=zeros + 1,
        outcome=zeros,
        score=zeros,
        degraded=zeros.copy(),
        reasons=zeros,
        latency_us=zeros + 5_000,
        late_us=zeros + 200,
    )


def make_plan_of(measured_s: float = MEASURED_S) -> Plan:
    return Plan(1, RATE, WARM_UP_S, measured_s, ())


def test_everything_in_time_is_good() -> None:
    verdict = judge(make_sent(), make_plan_of(), [])
    assert verdict.complaints == []
    assert (verdict.whole.requests, verdict.whole.good) == (MEASURED_S * 90, MEASURED_S * 90)
    assert (verdict.good_seconds_share, verdict.longest_bad_run_s) == (1.0, 0)
    assert verdict.whole.p50_ms == 5.0
    assert verdict.late_p99_ms == pytest.approx(0.2)


def test_seconds_in_which_the_sender_stood_still_count_and_are_told() -> None:
    sent = make_sent()
    second = slice(FIRST + 5 * RATE, FIRST + 6 * RATE)
    sent.late_us[second], sent.latency_us[second] = 1_500_000, 1_600_000
    sent.latency_us[FIRST] = 150_000
    verdict = judge(sent, make_plan_of(), [])
    assert verdict.seconds.stood_still.nonzero()[0].tolist() == [5]
    assert verdict.whole.good == MEASURED_S * 90 - 91
    assert verdict.seconds.good_share_otherwise == pytest.approx(1 - 1 / ((MEASURED_S - 1) * 90))
    assert not judge(make_sent(), make_plan_of(), []).seconds.stood_still.any()


def test_a_wait_for_a_free_connection_is_not_the_senders_own() -> None:
    sent = make_sent()
    waited = np.flatnonzero(~sent.by_kafka)[FIRST : FIRST + 500]
    sent.late_us[waited], sent.latency_us[waited] = 3_000_000, 3_020_000
    verdict = judge(sent, make_plan_of(), [])
    assert not verdict.seconds.stood_still.any()
    assert verdict.late_p99_ms == pytest.approx(0.2)
    assert verdict.whole.late == 500


@pytest.mark.parametrize(("latency_us", "good"), [(100_000, True), (100_001, False)])
def test_an_answer_is_good_up_to_a_hundred_milliseconds(latency_us: int, good: bool) -> None:
    sent = make_sent()
    sent.latency_us[FIRST] = latency_us
    verdict = judge(sent, make_plan_of(), [])
    assert verdict.whole.good == MEASURED_S * 90 - (not good)
    assert verdict.whole.late == (not good)


def test_what_is_shed_or_fails_is_not_good_and_told_apart() -> None:
    sent = make_sent()
    sent.status[FIRST : FIRST + 3] = 429, 503, FAILED
    whole = judge(sent, make_plan_of(), []).whole
    assert (whole.requests - whole.good, whole.shed, whole.failed, whole.late) == (3, 2, 1, 0)


def test_the_warm_up_and_the_kafka_door_are_not_judged() -> None:
    sent = make_sent()
    sent.status[:FIRST] = FAILED
    sent.status[9::10] = FAILED
    assert judge(sent, make_plan_of(), []).complaints == []


def test_one_request_in_a_thousand_may_be_bad_and_no_more() -> None:
    sent, requests = make_sent(), MEASURED_S * 90
    spoilt = np.flatnonzero(sent.answered & (np.arange(sent.count) >= FIRST))
    sent.status[spoilt[: requests // 1000]] = FAILED
    assert judge(sent, make_plan_of(), []).complaints == []
    sent.status[spoilt[: requests // 1000 + 1]] = FAILED
    assert judge(sent, make_plan_of(), []).complaints == ["99.889 % of the requests were good, 99.9 % are promised"]


def test_bad_seconds_are_counted_and_their_longest_run() -> None:
    sent = make_sent()
    for second in (3, 4, 5, 9):
        sent.status[(WARM_UP_S + second) * RATE] = FAILED
    verdict = judge(sent, make_plan_of(), [])
    assert np.flatnonzero(~verdict.seconds.is_good).tolist() == [3, 4, 5, 9]
    assert (verdict.good_seconds_share, verdict.longest_bad_run_s) == (0.8, 3)
    assert "80.0 % of the seconds were good, 95 % are promised" in verdict.complaints


def test_a_long_bad_run_is_a_complaint() -> None:
    sent = make_sent()
    sent.latency_us[FIRST : FIRST + 11 * RATE] = 150_000
    assert "11 bad seconds in a row, at most 10 are promised" in judge(sent, make_plan_of(), []).complaints


def test_what_a_fault_cost_stands_in_its_window_and_the_rest_between_faults() -> None:
    sent = make_sent(WARM_UP_S + 120)
    sent.status[FIRST + 30 * RATE] = FAILED
    sent.status[FIRST + 110 * RATE] = FAILED
    fault = Happened("redis_kill", 25.0, 31.0, "")
    windows = {w.name: w for w in judge(sent, make_plan_of(120), [fault]).windows}
    assert (windows["redis_kill"].requests, windows["redis_kill"].failed) == ((6 + AFTERMATH_S) * 90, 1)
    assert windows["between faults"].failed == 1


def test_a_run_that_was_ended_early_is_judged_by_what_was_sent() -> None:
    sent = make_sent()
    sent.status[FIRST + 5 * RATE :] = NOT_DUE
    verdict = judge(sent, make_plan_of(), [])
    assert verdict.whole.requests == 5 * 90
    assert len(verdict.seconds.good) == 5


def test_nothing_measured_is_no_success() -> None:
    sent = make_sent()
    sent.status[:] = NOT_DUE
    assert "nothing was measured" in judge(sent, make_plan_of(), []).complaints


def test_degraded_answers_are_counted_by_kind() -> None:
    sent = make_sent()
    sent.degraded[FIRST : FIRST + 180] = degraded_bits([Degraded.REQUEST_ONLY])
    verdict = judge(sent, make_plan_of(), [])
    assert verdict.degraded == {Degraded.REQUEST_ONLY: pytest.approx(162 / 1800)}
    assert verdict.whole.degraded == pytest.approx(162 / 1800)


def test_the_seed_decides_which_fault_comes_when_and_every_family_comes() -> None:
    plan = make_plan(20, 5, 2000, 60)
    assert plan == make_plan(20, 5, 2000, 60) != make_plan(20, 6, 2000, 60)
    assert len(plan.faults) == 10
    assert {fault.kind.family for fault in plan.faults} == set(FAMILIES)
    assert all(b.at_s - a.at_s == pytest.approx(EVERY_S) for a, b in zip(plan.faults, plan.faults[1:], strict=False))
    last = plan.faults[-1]
    assert last.at_s + last.hold_s <= plan.measured_s


def test_clocks_are_wrong_for_the_sender_when_the_plan_says_so() -> None:
    plan = make_plan(2, 1, 200, 10, ["clock_skew"])
    [(begin_s, end_s)] = plan.skewed
    assert (begin_s, end_s) == (22.0, 22.0 + KINDS["clock_skew"].hold_s)
    assert make_plan(2, 1, 200, 10, ["poison"]).skewed == []


def test_a_hold_is_for_faults_that_have_an_end() -> None:
    plan = make_plan(10, 1, 200, 10, ["broker_kill", "model_swap"], 200, 160)
    assert [(f.kind.name, f.hold_s) for f in plan.faults] == [("broker_kill", 160), ("model_swap", 0), ("broker_kill", 160)]
    with pytest.raises(PlanError, match="--every must be at least 190"):
        make_plan(10, 1, 200, 10, ["broker_kill"], 180, 160)


@pytest.mark.parametrize(
    ("minutes", "rate", "warm_up_s", "only", "every_s", "named"),
    [
        (0, 200, 10, [], EVERY_S, "--minutes"),
        (2, 0, 10, [], EVERY_S, "--rate"),
        (2, 30_000, 10, [], EVERY_S, "--rate"),
        (2, 200, 601, [], EVERY_S, "--warm-up"),
        (2, 200, 10, ["flood"], EVERY_S, "flood"),
        (2, 200, 10, [], 20, "--every"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(
    minutes: float, rate: float, warm_up_s: float, only: list[str], every_s: float, named: str
) -> None:
    with pytest.raises(PlanError, match=named):
        make_plan(minutes, 1, rate, warm_up_s, only, every_s)


def test_every_kind_of_fault_can_be_made() -> None:
    assert FAULTS.keys() == KINDS.keys()


def test_an_alert_that_should_have_fired_and_did_not_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS["redis_stop"]
    monkeypatch.setitem(KINDS, "redis_stop", Kind(kind.name, kind.family, 15, kind.what, ("RedisDown",), 10))
    fault, short = Happened("redis_stop", 100, 115, ""), Happened("redis_stop", 300, 305, "")
    fired, told = [Firing("RedisDown", "", 112, 140)], [Told("RedisDown", 5_120)]
    assert alerts.missing([fault], fired, told, 5_000) == []
    missed = ["RedisDown should have fired during redis_stop at 100 s and didn't"]
    assert alerts.missing([fault], [Firing("RedisDown", "", 172, 200)], told, 5_000) == missed
    assert alerts.missing([fault], [Firing("KafkaDown", "", 112, 140)], told, 5_000) == missed
    for elsewhen in ([], [Told("RedisDown", 5_050)], [Told("KafkaDown", 5_120)]):
        assert alerts.missing([fault], fired, elsewhen, 5_000) == ["RedisDown fired during redis_stop at 100 s and nobody was told"]
    assert alerts.missing([short], [], [], 5_000) == []


def test_the_webhook_notes_what_fires_and_refuses_what_it_cannot_read() -> None:
    webhook = Webhook()
    webhook.start()
    try:
        sent = [
            {"status": "firing", "labels": {"alertname": "RedisDown"}},
            {"status": "resolved", "labels": {"alertname": "KafkaDown"}},
        ]
        for body, status in ((json.dumps({"alerts": sent}), 200), ("no json", 400)):
            try:
                with urllib.request.urlopen(webhook.url, body.encode(), timeout=20) as reply:  # noqa: S310
                    assert reply.status == status
            except urllib.error.HTTPError as exc:
                assert exc.code == status
    finally:
        webhook.close()
    assert [t.name for t in webhook.told] == ["RedisDown"]


def test_samples_that_follow_each_other_are_one_firing() -> None:
    labels = {"alertname": "RedisDown", "alertstate": "firing", "__name__": "ALERTS", "severity": "page"}
    found = alerts.stretches(labels, [10, 15, 20, 60, 65])
    assert found == [Firing("RedisDown", "severity=page", 10, 20), Firing("RedisDown", "severity=page", 60, 65)]
