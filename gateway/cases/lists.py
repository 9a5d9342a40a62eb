"""Who stands on which list, for people; and the changes that they ask for, acknowledged by Kafka before they are answered.

The view in the database follows the topic `list_changes` (gateway/cases/intake.py). Gateways read the topic themselves.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from gateway.cases.errors import InvalidError, KafkaUnavailableError
from gateway.cases.outbox import producer_options
from gateway.cases.schemas import Schemas
from gateway.contracts.lists import LIST_ENTRIES_MAX, LISTS_MAX, ListAction, ListChange
from gateway.contracts.registry import RegistryUnavailableError
from gateway.contracts.topics import LIST_CHANGES
from gateway.contracts.transaction import (
    BIN_PATTERN,
    CHANNELS,
    COUNTRY_PATTERN,
    CURRENCIES,
    ID_FIELDS,
    ID_PATTERN,
    MCC_PATTERN,
    TEXT_FIELDS,
    holds_card_number,
)
from gateway.contracts.wire import frame
from gateway.kafka.avro import encode

ACKNOWLEDGE_S = 5.0
_PATTERNS = {
    **dict.fromkeys(ID_FIELDS, ID_PATTERN),
    "mcc": MCC_PATTERN,
    "country": COUNTRY_PATTERN,
    "card_country": COUNTRY_PATTERN,
    "card_bin": BIN_PATTERN,
    "currency": f"^(?:{'|'.join(sorted(CURRENCIES))})$",
    "channel": f"^(?:{'|'.join(CHANNELS)})$",
}
assert set(_PATTERNS) == set(TEXT_FIELDS)
_matches = {name: re.compile(pattern[1:-1]).fullmatch for name, pattern in _PATTERNS.items()}


def check_entity(field: str, value: str) -> None:
    """Raises `InvalidError` unless a transaction could have `value` in `field`, and for a card number."""
    if holds_card_number(value):
        raise InvalidError("entity_value", "holds a raw card number; lists hold tokens", "card_number")
    if _matches[field](value) is None:
        raise InvalidError("entity_value", f"is no {field} that a transaction could have", "bad_format")


def apply(connection: sqlite3.Connection, changes: Sequence[ListChange]) -> None:
    """The view after `changes`, in their order."""
    for change in changes:
        key = change.list_id, change.entity_value
        if change.action is ListAction.REMOVE:
            connection.execute("delete from list_entries where list_id = ? and entity_value = ?", key)
        else:
            connection.execute(
                "insert or replace into list_entries values (?,?,?,?,?,?)",
                (*key, change.expires_at_ms, change.reason, change.who, change.at_ms),
            )


def counts(connection: sqlite3.Connection) -> dict[str, int]:
    """How many entries each list has, expired ones included."""
    rows = connection.execute("select list_id, count(*) n from list_entries group by list_id")
    return {row["list_id"]: row["n"] for row in rows}


def entry(connection: sqlite3.Connection, list_id: str, value: str) -> dict[str, Any] | None:
    row = connection.execute(
        "select entity_value, expires_at_ms, reason, who, at_ms from list_entries where list_id = ? and entity_value = ?",
        (list_id, value),
    ).fetchone()
    return None if row is None else dict(row)


def page(connection: sqlite3.Connection, list_id: str, limit: int, after: str | None) -> tuple[list[dict[str, Any]], str | None]:
    """At most `limit` entries behind the value `after`, by value, and the value to go on behind."""
    rows = connection.execute(
        "select entity_value, expires_at_ms, reason, who, at_ms from list_entries where list_id = ? and entity_value > ? "
        "order by entity_value limit ?",
        (list_id, after or "", limit + 1),
    ).fetchall()
    return [dict(row) for row in rows[:limit]], rows[limit - 1]["entity_value"] if len(rows) > limit else None


def has_room(connection: sqlite3.Connection, list_id: str, value: str) -> bool:
    """Whether gateways would take in this entry: it stands there, or there is room for one more."""
    if entry(connection, list_id, value) is not None:
        return True
    held = counts(connection)
    return sum(held.values()) < LIST_ENTRIES_MAX and (list_id in held or len(held) < LISTS_MAX)


class ListPublisher:
    """Sends changes to Kafka, one at a time, and waits. Called in threads."""

    def __init__(self, schemas: Schemas, bootstrap: str) -> None:
        self._schemas = schemas
        self._options = producer_options(bootstrap)
        self._producer: Producer | None = None
        self._lock = threading.Lock()

    def send(self, change: ListChange) -> int:
        """The version that the lists have with this change. Raises `KafkaUnavailableError`."""
        fields = {name: getattr(change, name) for name in change.__struct_fields__} | {"action": change.action.value}
        done: list[tuple[KafkaError | None, int | None]] = []

        def note(error: KafkaError | None, message: Message) -> None:
            done.append((error, message.offset()))

        with self._lock:
            try:
                value = frame(self._schemas.id_of(LIST_CHANGES), encode(LIST_CHANGES, fields))
                producer = self._producer = self._producer or Producer(self._options)
                producer.produce(LIST_CHANGES, value, change.list_id.encode(), 0, on_delivery=note)
                producer.flush(ACKNOWLEDGE_S)
            except (RegistryUnavailableError, KafkaException, BufferError) as exc:
                raise KafkaUnavailableError from exc
            if not done:
                # What may still arrive is the caller's own change, which says the same when it is asked for again.
                producer.purge()
            if not done or done[0][0] is not None or done[0][1] is None:
                # An idempotent one may be of no more use.
                self._producer = None
                raise KafkaUnavailableError
        return done[0][1] + 1
