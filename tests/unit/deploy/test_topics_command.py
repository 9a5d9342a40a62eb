"""`fraudgate topics` on a cluster that comes up late, or has other schemas."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError, KafkaException

from deploy import topics_command
from deploy.topics_command import RETRY_S, prepare
from gateway.contracts.registry import IncompatibleSchemaError, RegistryUnavailableError
from gateway.contracts.settings import Settings
from gateway.contracts.topics import TOPICS


class Clock:
    now_s = 0.0

    def read(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Kafka that is up, with none of the topics, and a registry that fails once."""
    made: list[str] = []

    def create(_: Settings) -> list[str]:
        made.append("topics")
        return sorted(TOPICS) if made == ["topics"] else []

    def register(_: Settings) -> dict[str, int]:
        made.append("schemas")
        if made.count("schemas") == 1:
            raise RegistryUnavailableError("PUT /config: refused")
        return dict.fromkeys(TOPICS, 7)

    monkeypatch.setattr(topics_command, "create_topics", create)
    monkeypatch.setattr(topics_command, "register_schemas", register)
    monkeypatch.setattr(topics_command, "partitions", lambda _: dict.fromkeys(TOPICS, 12))
    return made


def test_a_registry_that_comes_up_late_is_waited_for(calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    assert prepare(Settings(), 60, clock.read, clock.pause) == 0
    assert clock.now_s == RETRY_S
    assert calls == ["topics", "schemas"] * 2
    assert "12 partitions, there already; schema 7" in capsys.readouterr().out


def test_who_does_not_wait_is_told_at_once(calls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    assert prepare(Settings(), 0, clock.read, clock.pause) == 1
    assert clock.now_s == 0
    assert capsys.readouterr().err == "fraudgate topics: PUT /config: refused\n"


@pytest.mark.parametrize("waits", [KafkaException(KafkaError(KafkaError._TRANSPORT)), RegistryUnavailableError("down")])
def test_waiting_ends_in_time(waits: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Settings) -> list[str]:
        raise waits

    monkeypatch.setattr(topics_command, "create_topics", fail)
    clock = Clock()
    assert prepare(Settings(), 21, clock.read, clock.pause) == 1
    assert clock.now_s == 4 * RETRY_S


def test_a_schema_that_readers_could_not_read_is_not_tried_again(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Settings) -> dict[str, int]:
        raise IncompatibleSchemaError("/subjects/decisions-value/versions")

    monkeypatch.setattr(topics_command, "register_schemas", refuse)
    clock = Clock()
    assert prepare(Settings(), 600, clock.read, clock.pause) == 1
    assert clock.now_s == 0
