"""Alerts from the feature jobs to the topic `alerts`: Avro as the gateway writes it, acknowledged before anything goes on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import ALERTS, LIBRDKAFKA_PARTITIONER
from gateway.contracts.wire import frame

ACKNOWLEDGED_S_MAX = 10.0


class AlertsUnavailableError(RuntimeError):
    """Kafka didn't take the alerts; the same ones may be sent again."""


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of schemas/alert.avsc, in its order."""

    transaction_id: str = ""
    card_id: str = ""
    merchant_id: str = ""
    decision: str = ""
    risk_score: int = 0
    reasons: tuple[str, ...] = ()
    decided_at_ms: int
    kind: str
    detail: str


class AlertTopic:
    """Its producer is made with the first alert, and idempotent: what it sends again stands there once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: Producer | None = None
        self._schema_id: int | None = None

    def publish(self, alerts: Sequence[tuple[str, Alert]]) -> None:
        """(key, alert) each. Raises `AlertsUnavailableError` unless all were acknowledged, `RegistryUnavailableError` without a schema."""
        if self._schema_id is None:
            self._schema_id = SchemaRegistry(self._settings.registry, self._settings.schemas_path).id_of(ALERTS)
        failed: list[str] = []

        def delivered(error: KafkaError | None, _: Message) -> None:
            if error is not None:
                failed.append(error.str())

        try:
            if self._producer is None:
                self._producer = Producer(
                    {
                        "bootstrap.servers": self._settings.bootstrap,
                        "partitioner": LIBRDKAFKA_PARTITIONER,
                        "enable.idempotence": True,
                        "message.timeout.ms": int(ACKNOWLEDGED_S_MAX * 1000),
                        "log_level": 0,
                    }
                )
            for key, alert in alerts:
                self._producer.produce(ALERTS, frame(self._schema_id, encode(alert)), key, on_delivery=delivered)
            left = self._producer.flush(ACKNOWLEDGED_S_MAX)
        except (BufferError, KafkaException) as exc:
            raise AlertsUnavailableError(str(exc)) from exc
        if failed or left:
            # A new producer has none of the old one's messages waiting.
            self._producer = None
            raise AlertsUnavailableError(
                failed[0] if failed else f"{left} alerts were not acknowledged in {ACKNOWLEDGED_S_MAX:.0f} s"
            )


def encode(alert: Alert) -> bytes:
    """The Avro record, without the wire format's header."""
    parts: list[bytes] = []
    for name in Alert.__struct_fields__:
        value = getattr(alert, name)
        if isinstance(value, str):
            parts.append(_text(value))
        elif isinstance(value, int):
            parts.append(_long(value))
        else:
            parts += [_long(len(value)), *(_text(one) for one in value)] if value else []
            parts.append(_long(0))
    return b"".join(parts)


def _text(value: str) -> bytes:
    data = value.encode()
    return _long(len(data)) + data


def _long(value: int) -> bytes:
    """Zigzag, then seven bits a byte, the lowest first."""
    n = (value << 1) ^ (value >> 63)
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)
