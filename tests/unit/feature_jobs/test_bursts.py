"""Bursts of declines: one alert a burst, none for what is slow, the same ones when it is read again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from feature_jobs import alert_topic
from feature_jobs.alert_topic import Alert, AlertsUnavailableError, AlertTopic
from feature_jobs.burst_stream import Bursts
from feature_jobs.bursts import BEGUN, BIN, DEVICE, ENDED, MERCHANT, Burst, Decline, Windows
from feature_jobs.metrics import Metrics
from gateway.contracts import tables
from gateway.contracts.settings import Settings
from gateway.kafka.avro import encode_alert

WINDOW_MS = 60_000
THRESHOLD = 6


def make_windows(entities_max: int = 1_000, **thresholds: int) -> Windows:
    return Windows(thresholds or {MERCHANT: THRESHOLD}, WINDOW_MS, entities_max)


def decline(ms: int, merchant: str = "m", **others: str) -> Decline:
    return Decline(f"t{ms}-{merchant}", ms, ms + 5, {MERCHANT: merchant} | others)


def told(bursts: list[Burst]) -> list[tuple[str, str, int]]:
    return [(b.state, b.entity_value, b.at_ms) for b in bursts]


def test_declines_at_the_threshold_within_the_window_are_one_burst_however_many_follow() -> None:
    windows = make_windows()
    found = windows.add([decline(1_000 * i) for i in range(60)], 0)
    assert told(found) == [(BEGUN, "m", 5_000)]
    assert (found[0].began_ms, found[0].declines, found[0].transaction_id) == (0, THRESHOLD, "t5000-m")
    assert windows.active == 1


def test_one_less_than_the_threshold_or_a_window_later_is_none() -> None:
    step = WINDOW_MS // (THRESHOLD - 1)
    assert make_windows().add([decline(1_000 * i) for i in range(THRESHOLD - 1)], 0) == []
    # The first has just left the window when the last comes.
    assert make_windows().add([decline(step * i) for i in range(100)], 0) == []
    assert told(make_windows().add([decline((step - 1) * i) for i in range(THRESHOLD)], 0)) == [(BEGUN, "m", (step - 1) * 5)]


def test_a_burst_that_wavers_around_the_threshold_is_one_and_the_next_one_after_a_quiet_while_is_another() -> None:
    windows = make_windows()
    wavering = [decline(ms) for ms in range(0, 600_000, WINDOW_MS // 4)]
    first = windows.add([decline(i) for i in range(THRESHOLD)] + wavering, 0)
    assert told(first) == [(BEGUN, "m", THRESHOLD - 1)]
    # Fewer than half of it within a window: over.
    slow = windows.add([decline(700_000), decline(800_000)], 1)
    assert told(slow) == [(ENDED, "m", THRESHOLD - 1)]
    again = windows.add([decline(900_000 + i) for i in range(THRESHOLD)], 2)
    assert told(again) == [(BEGUN, "m", 900_005)]
    assert again[0].id != first[0].id
    assert first[0].id == slow[0].id


def test_each_entity_has_windows_and_a_threshold_of_its_own() -> None:
    windows = make_windows(**{MERCHANT: 100, DEVICE: 3, BIN: 5})
    declines = [decline(i, f"m{i}", **{DEVICE: "d", BIN: "411111"}) for i in range(6)]
    assert [(b.entity, b.entity_value, b.declines) for b in windows.add(declines, 0)] == [(DEVICE, "d", 3), (BIN, "411111", 5)]
    assert make_windows(**{MERCHANT: 0, DEVICE: 3}).add([decline(i) for i in range(50)], 0) == []


def test_declines_in_disorder_count_by_when_they_happened_and_a_skewed_clock_moves_nobody_else() -> None:
    shuffled = [decline(1_000 * i) for i in range(THRESHOLD)]
    random.Random(1).shuffle(shuffled)
    [found] = make_windows().add(shuffled, 0)
    assert found.began_ms == 0
    windows = make_windows()
    ahead = [decline(10_000_000, "ahead")]
    assert told(windows.add([*shuffled[:3], *ahead, *shuffled[3:]], 0)) == [(BEGUN, "m", shuffled[-1].event_time_ms)]


def test_what_is_quiet_is_forgotten_with_the_end_of_its_burst() -> None:
    windows = make_windows()
    windows.add([decline(i) for i in range(THRESHOLD)] + [decline(0, "other")], 0)
    assert windows.forget(WINDOW_MS) == []
    assert len(windows) == 2
    assert told(windows.forget(2 * WINDOW_MS + THRESHOLD)) == [(ENDED, "m", THRESHOLD - 1)]
    assert len(windows) == 0


def test_of_more_entities_than_allowed_the_quietest_go_and_those_in_a_burst_last() -> None:
    windows = make_windows(entities_max=100)
    windows.add([decline(i) for i in range(THRESHOLD)], 0)
    windows.add([decline(1_000 + i, f"m{i}") for i in range(99)], 0)
    assert windows.forget(0) == []
    assert (len(windows), windows.evicted) == (100, 0)
    windows.add([decline(2_000, "one more")], 0)
    assert windows.forget(0) == []
    assert (len(windows), windows.evicted, windows.active) == (95, 6, 1)


def test_no_entity_holds_more_declines_than_make_a_burst() -> None:
    windows = make_windows()
    windows.add([decline(i) for i in range(1_000)], 3)
    assert [len(e.declines) for e in windows._entities.values()] == [THRESHOLD]
    assert windows.replay_from == 3


# The stream: over a table of decisions, with a topic that remembers.


class Topic(AlertTopic):
    def __init__(self) -> None:
        self.sent: list[tuple[str, Alert]] = []
        self.fails = False

    def publish(self, alerts: Any) -> None:
        if self.fails:
            raise AlertsUnavailableError("Kafka is down")
        self.sent += alerts


@pytest.fixture
def local(tmp_path: Path) -> Settings:
    return Settings(
        home=str(tmp_path), burst_window_s=60, burst_declines_merchant=THRESHOLD, burst_declines_device=0, burst_declines_bin=0
    )


def commit(settings: Settings, *rows: tuple[int, str, str]) -> None:
    """(event time, merchant, decision) each."""
    columns = {
        "transaction_id": pa.array([f"t{ms}-{m}" for ms, m, _ in rows]),
        "event_time_ms": pa.array([ms for ms, *_ in rows], pa.int64()),
        "decided_at_ms": pa.array([ms + 5 for ms, *_ in rows], pa.int64()),
        "decision": pa.array([d for *_, d in rows]),
        "merchant_id": pa.array([m for _, m, _ in rows]),
        "device_id": pa.array([None] * len(rows), pa.string()),
    }
    write_deltalake(tables.table_uri(settings.tables, tables.DECISIONS), pa.table(columns), mode="append")


def attack(first_ms: int, count: int, merchant: str = "m") -> list[tuple[int, str, str]]:
    return [(first_ms + i, merchant, "decline") for i in range(count)]


def stream(settings: Settings, topic: Topic) -> Bursts:
    return Bursts(settings, Metrics(), topic)


def rows(settings: Settings) -> list[tuple[str, str]]:
    held = DeltaTable(tables.table_uri(settings.tables, tables.BURSTS)).to_pyarrow_table().sort_by("decisions_version")
    return list(zip(held["state"].to_pylist(), held["entity_value"].to_pylist(), strict=True))


def test_a_burst_over_several_commits_is_one_alert_that_says_what_it_is_about(local: Settings) -> None:
    topic = Topic()
    bursts = stream(local, topic)
    assert bursts.follow() == 0, "there is no table yet"
    commit(local, *attack(0, 3), *[(i, "m", "approve") for i in range(50)])
    commit(local, *attack(10, 2))
    assert bursts.follow() == 2
    assert topic.sent == []
    commit(local, *attack(20, 40))
    assert bursts.follow() == 1
    [(key, alert)] = topic.sent
    detail = json.loads(alert.detail)
    assert (key, alert.kind, alert.merchant_id, alert.transaction_id, alert.reasons) == ("m", "burst", "m", "", ("BURST_MERCHANT",))
    assert {name: detail[name] for name in ("entity", "value", "declines", "window_s", "began_ms", "transaction_id")} == {
        "entity": "merchant_id",
        "value": "m",
        "declines": THRESHOLD,
        "window_s": 60,
        "began_ms": 0,
        "transaction_id": "t20-m",
    }
    assert rows(local) == [(BEGUN, "m")]


def test_a_restart_in_a_burst_goes_on_in_it_and_tells_of_its_end_alone(local: Settings) -> None:
    topic = Topic()
    commit(local, *attack(0, THRESHOLD))
    stream(local, topic).follow()
    commit(local, *attack(1_000, 3))
    restarted = stream(local, topic)
    restarted.follow()
    commit(local, *attack(20_000, THRESHOLD))
    stream(local, topic).follow()
    assert len(topic.sent) == 1
    commit(local, (500_000, "else", "approve"))
    stream(local, topic).follow()
    assert len(topic.sent) == 1
    assert rows(local) == [(BEGUN, "m"), (ENDED, "m")]


def test_declines_before_a_restart_count_with_those_after_it(local: Settings) -> None:
    """What the table says is read again holds the windows of all entities, not only of those that were told of."""
    topic = Topic()
    commit(local, *attack(0, 4, "slow"))
    commit(local, *attack(0, THRESHOLD))
    stream(local, topic).follow()
    commit(local, *attack(1_000, 2, "slow"))
    stream(local, topic).follow()
    assert [key for key, _ in topic.sent] == ["m", "slow"]


def test_what_was_published_and_not_written_down_is_published_again_under_the_same_id(
    local: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = Topic()
    commit(local, *attack(0, 2))
    commit(local, *attack(10, 20))
    bursts = stream(local, topic)

    def killed(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(Bursts, "_write", killed)
        bursts.follow()
    bursts.follow()
    stream(local, topic).follow()
    assert len(topic.sent) == 2
    assert topic.sent[0] == topic.sent[1]
    assert rows(local) == [(BEGUN, "m")]


def test_with_kafka_down_nothing_is_written_down_and_the_alert_comes_later(local: Settings) -> None:
    topic = Topic()
    topic.fails = True
    commit(local, *attack(0, THRESHOLD))
    bursts = stream(local, topic)
    with pytest.raises(AlertsUnavailableError):
        bursts.follow()
    assert not DeltaTable.is_deltatable(tables.table_uri(local.tables, tables.BURSTS))
    topic.fails = False
    assert bursts.follow() == 1
    assert len(topic.sent) == 1


def test_a_commit_of_others_to_the_table_of_bursts_is_passed_over(local: Settings) -> None:
    topic = Topic()
    commit(local, *attack(0, THRESHOLD))
    stream(local, topic).follow()
    DeltaTable(tables.table_uri(local.tables, tables.BURSTS)).vacuum(
        dry_run=False, retention_hours=0, enforce_retention_duration=False
    )
    stream(local, topic).follow()
    assert len(topic.sent) == 1


def test_alerts_are_encoded_as_the_gateway_does() -> None:
    alert = Alert(
        merchant_id="händler",
        decision="decline",
        risk_score=-5,
        reasons=("A", "B" * 200),
        decided_at_ms=1_767_571_200_000,
        kind="burst",
        detail="{}",
    )
    fields = {name: getattr(alert, name) for name in Alert.__struct_fields__}
    for one in (fields, fields | {"reasons": (), "risk_score": 2**31 - 1}):
        assert alert_topic.encode(Alert(**one)) == encode_alert(one | {"reasons": list(one["reasons"])})
