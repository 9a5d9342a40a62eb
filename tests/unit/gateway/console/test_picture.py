from pathlib import Path
from typing import Any

import pytest

from gateway.console import picture
from gateway.console.picture import State
from gateway.console.samples import Reading
from gateway.console.sources import read_alertmanager, read_jobs
from gateway.console.verdict import Level, Trouble, Verdicts, seconds
from gateway.metrics import Metrics
from tests.unit.gateway.console.factories import CASES, JOBS, STATUS, decide, make_state, own_of

NOW_S = 500.0


def after_ten_seconds(tmp_path: Path, *, ms: float = 5.0, count: int = 12_400, made_without: int = 0, **status: Any) -> State:
    """Ten seconds of decisions, with everything else well."""
    metrics, state = Metrics(), make_state(tmp_path)
    decide(metrics, 100)
    state.window.add(Reading(NOW_S - 10, own_of(metrics)))
    decide(metrics, count, ms)
    if made_without:
        metrics.degraded.labels("stale_features").inc(made_without)
    state.window.add(Reading(NOW_S, own_of(metrics)))
    state.status = STATUS | status
    state.jobs.note(JOBS, "", NOW_S)
    state.cases.note(CASES, "", NOW_S)
    return state


def shown(state: State, now_s: float = NOW_S) -> dict[str, Any]:
    return picture.frame(state, now_s, int(now_s * 1000))


def test_when_all_is_well_one_sentence_says_how_much_and_how_fast(tmp_path: Path) -> None:
    frame = shown(after_ten_seconds(tmp_path))
    assert frame["verdict"]["level"] == "well"
    assert frame["verdict"]["text"] == "Well: 1,240 decisions/s, p99 5 ms, all fresh"
    assert set(frame["parts"].values()) == {"well"}
    assert [(t["name"], t["state"], t["rows"]) for t in frame["tables"]] == [
        ("bronze", "fresh", 1000),
        ("silver", "fresh", 990),
        ("gold", "fresh", 970),
    ]


def test_without_payments_it_is_well_and_says_that_there_are_none(tmp_path: Path) -> None:
    frame = shown(after_ten_seconds(tmp_path, count=0))
    assert frame["verdict"]["text"] == "Well: no payments at the moment; all parts answer"
    assert frame["degraded_share"] is None
    assert frame["latency"]["ms"] == [None, None, None]


@pytest.mark.parametrize(
    ("changes", "level", "part", "says"),
    [
        ({"degraded": ["redis"]}, "degraded", "features", "Redis doesn't answer"),
        ({"degraded": ["kafka"]}, "degraded", "kafka", "Kafka can't be reached"),
        ({"degraded": ["model"], "model": None}, "degraded", "model", "rules alone decide"),
        ({"degraded": ["lists"]}, "watch", "model", "the lists may not be"),
        ({"ready": False}, "down", "serve", "takes no payments"),
        ({"policy_refused": "line 3"}, "watch", "model", "a new policy was refused"),
        ({"model_refused": "checksum"}, "watch", "model", "a new model was refused"),
    ],
)
def test_what_the_gateway_misses_is_said_and_drawn_where_it_is(
    tmp_path: Path, changes: dict[str, Any], level: str, part: str, says: str
) -> None:
    frame = shown(after_ten_seconds(tmp_path, **changes))
    assert frame["verdict"]["level"] == level
    assert says in frame["verdict"]["text"]
    assert frame["parts"][part] == level


def test_the_gravest_comes_first_with_its_age_and_the_others_are_counted(tmp_path: Path) -> None:
    state = after_ten_seconds(tmp_path, degraded=["redis"], policy_refused="x")
    shown(state)
    frame = shown(state, NOW_S + 12)
    assert frame["verdict"]["text"] == "Degraded: Redis doesn't answer, decisions without history for 12 s; 1 more below"
    assert [(t["code"], t["level"], t["for_s"]) for t in frame["verdict"]["troubles"]] == [
        ("redis", "degraded", 12),
        ("policy_refused", "watch", 12),
    ]


def test_slow_answers_are_degraded_from_the_promise_on(tmp_path: Path) -> None:
    assert shown(after_ten_seconds(tmp_path, ms=95.0))["verdict"]["level"] == "well"
    frame = shown(after_ten_seconds(tmp_path, ms=180.0))
    assert frame["verdict"]["level"] == "degraded"
    assert "where 100 are promised" in frame["verdict"]["text"]


def test_a_share_of_degraded_decisions_is_told_beyond_one_in_a_hundred(tmp_path: Path) -> None:
    assert shown(after_ten_seconds(tmp_path, count=1000, made_without=9))["verdict"]["level"] == "well"
    frame = shown(after_ten_seconds(tmp_path, count=1000, made_without=140))
    assert frame["verdict"]["text"] == "Degraded: 14% of decisions lack something (stale features)"


def test_silent_jobs_leave_what_they_said_with_its_age(tmp_path: Path) -> None:
    state = after_ten_seconds(tmp_path)
    state.jobs.note(None, "nobody listens", NOW_S + 2)
    assert shown(state, NOW_S + 2)["verdict"]["level"] == "well", "one poll that failed is no trouble yet"
    frame = shown(state, NOW_S + 30)
    assert frame["verdict"]["level"] == "watch"
    assert "feature jobs don't answer" in frame["verdict"]["text"]
    assert frame["jobs"]["age_s"] == 30
    assert frame["tables"][0]["rows"] == 1000
    assert frame["parts"]["store"] == "watch"


def test_jobs_never_heard_of_are_told_at_once(tmp_path: Path) -> None:
    state = after_ten_seconds(tmp_path)
    state.jobs.value, state.jobs.got_s = None, None
    state.jobs.note(None, "nobody listens", NOW_S)
    frame = shown(state)
    assert frame["verdict"]["level"] == "watch"
    assert {t["state"] for t in frame["tables"]} == {"unknown"}
    assert frame["drift"]["reference"] is None


def test_a_table_is_late_by_what_it_says_and_still_by_what_it_no_longer_says(tmp_path: Path) -> None:
    state = after_ten_seconds(tmp_path)
    state.jobs.note(JOBS.replace(b'query="gold"} 30.0', b'query="gold"} 99.0'), "", NOW_S)
    frame = shown(state)
    assert "gold is 99 s old where 45 s are promised" in frame["verdict"]["text"]
    state.jobs.note(JOBS, "", NOW_S)
    for s in (0.0, 16.0):
        state.tables.note(read_jobs(JOBS), NOW_S + s)
    # Payments have come for a minute, and bronze hasn't been written to for 16 s, three times what it promises.
    state.flowing_s = 60.0
    assert [t["state"] for t in shown(state, NOW_S + 16)["tables"]] == ["still", "fresh", "fresh"]
    state.flowing_s = 2.0
    assert [t["state"] for t in shown(state, NOW_S + 16)["tables"]] == ["fresh", "fresh", "fresh"]
    written = read_jobs(JOBS.replace(b'table="bronze"} 1000.0', b'table="bronze"} 1100.0'))
    state.tables.note(written, NOW_S + 17)
    state.flowing_s = 60.0
    frame = shown(state, NOW_S + 18)
    assert (frame["tables"][0]["state"], frame["tables"][0]["written_s"]) == ("fresh", 1.0)


def test_a_stream_that_stands_still_and_a_drift_alarm_are_told(tmp_path: Path) -> None:
    state = after_ten_seconds(tmp_path)
    state.jobs.note(JOBS.replace(b'up{query="silver"} 1.0', b'up{query="silver"} 0.0'), "", NOW_S)
    assert "streams stand still: silver" in shown(state)["verdict"]["text"]
    state.jobs.note(JOBS.replace(b'alarm{measure="score"} 0.0', b'alarm{measure="score"} 1.0'), "", NOW_S)
    frame = shown(state)
    assert "payments drift: score" in frame["verdict"]["text"]
    assert [m["name"] for m in frame["drift"]["measures"]] == ["score", "amount_minor"]


def test_alarms_that_fire_are_shown_and_those_that_are_silenced_are_not(tmp_path: Path) -> None:
    state = after_ten_seconds(tmp_path)
    body = (
        b'[{"labels":{"alertname":"Slow","severity":"page"},"annotations":{"summary":"p99"},"startsAt":"2026-11-26T21:00:00Z",'
        b'"status":{"state":"active","silencedBy":[]}},'
        b'{"labels":{"alertname":"Old"},"annotations":{},"startsAt":"","status":{"state":"suppressed"}}]'
    )
    source = state.cases
    state.alertmanager = type(source)("Alertmanager", "http://127.0.0.1:9", read_alertmanager)
    state.alertmanager.note(body, "", NOW_S)
    frame = shown(state)
    assert [alarm["name"] for alarm in frame["alarms"]["firing"]] == ["Slow"]
    assert "alarms are firing: Slow" in frame["verdict"]["text"]


def test_an_answer_that_can_not_be_read_is_no_answer(tmp_path: Path) -> None:
    state = after_ten_seconds(tmp_path)
    state.jobs.note(b"<html>", "", NOW_S + 1)
    assert "can't be read" in (state.jobs.trouble or "")
    assert state.jobs.got_s == NOW_S


def test_a_trouble_that_comes_back_begins_anew() -> None:
    verdicts, trouble = Verdicts(), Trouble(Level.WATCH, "a", "kafka", "it")
    verdicts.told([trouble], 0, "fine")
    assert verdicts.told([trouble], 100, "fine")["text"] == "Watch: it for 100 s"
    assert verdicts.told([], 101, "fine") == {"level": "well", "text": "Well: fine", "troubles": []}
    assert verdicts.told([trouble], 102, "fine")["text"] == "Watch: it"


def test_ages_are_said_in_the_unit_that_fits() -> None:
    assert [seconds(s) for s in (0.4, 119, 120, 7200, 200_000)] == ["0 s", "119 s", "2 min", "2 h", "2 d"]
