import time
from pathlib import Path
from typing import Any, cast

from confluent_kafka import Message

from deploy.ports import free_ports
from gateway.cases.schemas import Schemas, UnreadableError
from gateway.console.alerts import JOIN_S, KEPT_DECLINES, KEPT_OTHERS, AlertFollower
from gateway.contracts.registry import SchemaRegistry
from tests.helpers import wait_until


class Record:
    """A message of the topic, its fields not encoded."""

    def __init__(self, offset: int, kind: str, at_ms: int, error: object = None) -> None:
        self._offset, self._error = offset, error
        self.fields: dict[str, Any] | None = {
            "transaction_id": f"t-{offset}" if kind == "decision" else "",
            "card_id": "card-1",
            "merchant_id": "shop-1",
            "decision": "decline",
            "risk_score": 900,
            "reasons": ["CARD_VELOCITY"],
            "decided_at_ms": at_ms,
            "kind": kind,
            "detail": "" if kind == "decision" else "something",
        }

    def error(self) -> object:
        return self._error

    def value(self) -> Any:
        return self.fields

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self._offset


class PlainSchemas:
    def read(self, _: str, value: Any) -> dict[str, Any]:
        if value is None:
            raise UnreadableError("no value")
        return cast(dict[str, Any], value)


def follower() -> AlertFollower:
    return AlertFollower("127.0.0.1:9", cast(Schemas, PlainSchemas()))


def take(alerts: AlertFollower, *records: Record) -> None:
    found: list[Message] = list(records)
    alerts.take(found)


def test_a_storm_of_declines_leaves_the_alert_of_the_guard_on_the_screen() -> None:
    alerts = follower()
    take(alerts, Record(0, "guard", 1000))
    take(alerts, *[Record(i, "decision", 1000 + i) for i in range(1, 500)])
    shown = alerts.newest()
    assert len(shown) == KEPT_DECLINES + 1
    assert shown[0]["transaction_id"] == "t-499"
    assert shown[-1]["kind"] == "guard"
    assert "card_id" not in shown[0], "what isn't shown isn't sent"
    take(alerts, *[Record(i, "burst", 5000 + i) for i in range(500, 700)])
    assert len(alerts.newest()) == KEPT_DECLINES + KEPT_OTHERS


def test_what_can_not_be_read_is_left_out_and_counted() -> None:
    alerts = follower()
    broken, failed = Record(1, "burst", 1), Record(2, "burst", 1, error="broken")
    broken.fields = None
    take(alerts, broken, failed, Record(3, "burst", 1))
    assert [alert["id"] for alert in alerts.newest()] == ["0-3"]
    assert (alerts.skipped, alerts.version) == (1, 1)


def test_without_kafka_it_says_so_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    [port] = free_ports(1)
    alerts = AlertFollower(f"127.0.0.1:{port}", Schemas(SchemaRegistry(f"http://127.0.0.1:{port}", tmp_path)))
    alerts.start()
    wait_until(lambda: alerts.trouble == "Kafka doesn't answer", 30, "it says that Kafka doesn't answer")
    assert alerts.newest() == []
    began_s = time.monotonic()
    alerts.close()
    assert time.monotonic() - began_s < JOIN_S + 5
    alerts.start()
    alerts.close()
