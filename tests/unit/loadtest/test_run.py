"""Pace, doors, sequence, ledger, and the commands without servers."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from deploy.ports import free_ports
from gateway.contracts.instants import instant_ms
from gateway.contracts.label import Label
from gateway.contracts.settings import ENV_PREFIX
from gateway.contracts.transaction import decode_json
from loadtest.commands import replay, simulate
from loadtest.events import LoadError
from loadtest.ledger import Ledger
from loadtest.pace import Pace, Punctuality
from loadtest.run import Load, Simulation, door_of, sequenced
from loadtest.simulator import SimulatorConfig

CONFIG = SimulatorConfig(cards=300)
BOTH = ("http", "kafka")


@pytest.fixture
def no_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings that point at ports nobody listens on."""
    names = ("KAFKA_PORT", "REGISTRY_PORT", "GATEWAY_PORT")
    for name, port in zip(names, free_ports(len(names)), strict=True):
        monkeypatch.setenv(ENV_PREFIX + name, str(port))
    monkeypatch.setenv(ENV_PREFIX + "HOME", str(tmp_path / "home"))


def test_a_rate_spaces_payments_evenly_and_a_speed_follows_event_time() -> None:
    assert [Pace(rate_per_s=4).due_s(i, 999) for i in (0, 1, 8)] == [0.0, 0.25, 2.0]
    assert [Pace(speed=10).due_s(5, ms) for ms in (0, 1_000, 60_000)] == [0.0, 0.1, 6.0]
    assert Pace().due_s(5, 1_000) is None
    with pytest.raises(ValueError, match="above 0"):
        Pace(rate_per_s=0)


def test_a_sender_behind_its_schedule_says_so() -> None:
    punctuality = Punctuality()
    for behind_s in (0.0, 0.05, 0.2, 1.5):
        punctuality.note(behind_s)
    assert (punctuality.late, punctuality.behind_max_s) == (2, 1.5)


def test_two_doors_share_the_payments_by_card_and_lose_none() -> None:
    heard: list[int] = []
    parts = {door: list(sequenced(Simulation(CONFIG, 500), door, BOTH, heard.append)) for door in BOTH}
    assert sorted(n for part in parts.values() for n, _, _ in part) == list(range(500))
    for door, part in parts.items():
        assert {door_of(e.transaction.card_id, BOTH) for _, _, e in part} == {door}
        assert len(part) > 100
    assert len(heard) == 1_000


def test_a_stretch_behind_others_is_what_the_whole_holds_there() -> None:
    whole = list(Simulation(CONFIG, 300).events())
    assert list(Simulation(CONFIG, 100, skip=200).events()) == whole[200:]


def test_simulated_time_may_not_run_away_from_the_clock() -> None:
    start_s = CONFIG.start_ms / 1000
    list(sequenced(Simulation(CONFIG, 10), "kafka", ("kafka",), lambda _: None, lambda: start_s))
    with pytest.raises(LoadError, match="24 hours ahead"):
        list(sequenced(Simulation(CONFIG, 10), "kafka", ("kafka",), lambda _: None, lambda: start_s - 25 * 3600))


def test_history_can_not_be_accounted_for() -> None:
    with pytest.raises(AssertionError):
        Load(source=lambda: Simulation(CONFIG, 1), total=1, history=True, account=True)


def test_a_ledger_finds_each_payment_with_its_values() -> None:
    ledger = Ledger()
    for i in range(3):
        assert ledger.add(f"t{i}", i == 1, "kafka", 10.0 + i, 10.5 + i) == i
    row = ledger.rows["t1"]
    assert (ledger.is_fraud[row], ledger.intended_s[row], ledger.sent_s[row]) == (1, 11.0, 11.5)
    assert len(ledger) == 3


def test_dates_are_utc_unless_they_say_otherwise() -> None:
    assert instant_ms("2018-08-08") == 1_533_686_400_000
    assert instant_ms("2018-08-08T02:00:00+02:00") == 1_533_686_400_000


def test_a_file_holds_the_same_bytes_for_the_same_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        assert simulate(["--seed", "3", "--cards", "300", "--events", "2000", "--to", str(path), "--labels", "all"]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    lines = paths[0].read_bytes().splitlines()
    assert len(lines) == 2_000
    for line in lines:
        decode_json(line, json.loads(line)["event_time_ms"])
    labels = (tmp_path / "a.labels.jsonl").read_bytes().splitlines()
    assert labels == (tmp_path / "b.labels.jsonl").read_bytes().splitlines()
    assert any(msgspec.json.decode(line, type=Label).is_fraud for line in labels)
    assert "2000 transactions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--to", "moon"], "--to is kafka"),
        (["--history", "--wait"], "no decisions to wait for"),
        (["--history", "--to", "http"], "--history goes to kafka"),
        (["--to", "x.jsonl", "--wait"], "decides nothing"),
        (["--rate", "0"], "no number above 0"),
        (["--rate", "5", "--speed", "5"], "not allowed with"),
        (["--pattern", "magic"], "there is no pattern"),
        (["--cards", "1"], "cards must lie in"),
        (["--start", "yesterday"], "nor a date"),
    ],
)
def test_a_wrong_call_of_simulate_is_explained(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        simulate(argv)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


def test_kafka_out_of_reach_is_said_with_the_settings_to_look_at(no_servers: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(["--events", "1"]) == 1
    err = capsys.readouterr().err
    assert "FRAUDGATE_KAFKA_PORT" in err
    assert "fraudgate up" in err


def test_a_gateway_out_of_reach_is_said_with_the_settings_to_look_at(no_servers: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(["--events", "1", "--to", "http"]) == 1
    err = capsys.readouterr().err
    assert "FRAUDGATE_GATEWAY_PORT" in err
    assert "fraudgate serve" in err


def test_a_file_that_is_no_data_set_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay([str(tmp_path / "missing.parquet")]) == 1
    assert "can't be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        replay([str(tmp_path / "x.parquet"), "--from", "2018-08-10", "--to", "2018-08-08"])
    assert "--from must lie before --to" in capsys.readouterr().err


def test_help_says_that_the_end_of_a_range_is_exclusive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        replay(["--help"])
    assert "exclusive" in capsys.readouterr().out
