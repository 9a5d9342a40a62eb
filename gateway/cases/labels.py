"""Labels as the case service knows them: checked, taken in once, and sent to the topic `labels` through the outbox."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from typing import Any

import msgspec

from gateway.cases.errors import InvalidError
from gateway.contracts.label import Label
from gateway.contracts.transaction import (
    AMOUNT_MINOR_MAX,
    AMOUNT_MINOR_MIN,
    EVENT_TIME_FUTURE_MS_MAX,
    EVENT_TIME_PAST_MS_MAX,
    ID_PATTERN,
    holds_card_number,
)

_id_match = re.compile(ID_PATTERN[1:-1]).fullmatch
_COLUMNS = "transaction_id, card_id, is_fraud, source, state, reported_at_ms, amount_minor, effective_at_ms"
# Of one transaction; more come from nobody.
LABELS_OF_ONE_MAX = 100


def check(label: Label, now_ms: int, place: str = "") -> None:
    """Raises `InvalidError` unless each value lies in its bounds. `place` stands before the field's name."""
    for name in ("transaction_id", "card_id"):
        check_id(getattr(label, name), place + name)
    if label.is_fraud and label.state in ("false_positive", "reversed"):
        raise InvalidError(f"{place}is_fraud", f"must be false for the state {label.state}")
    for name in ("reported_at_ms", "effective_at_ms"):
        at_ms = getattr(label, name)
        if at_ms is not None and not now_ms - EVENT_TIME_PAST_MS_MAX <= at_ms <= now_ms + EVENT_TIME_FUTURE_MS_MAX:
            raise InvalidError(place + name, "must be at most 20 years ago and 24 hours ahead")
    if label.amount_minor is not None and not AMOUNT_MINOR_MIN <= label.amount_minor <= AMOUNT_MINOR_MAX:
        raise InvalidError(f"{place}amount_minor", f"must lie in {AMOUNT_MINOR_MIN}..{AMOUNT_MINOR_MAX}")


def check_id(value: str, field: str) -> None:
    """Raises `InvalidError` for a card number and for what is no id."""
    if holds_card_number(value):
        raise InvalidError(field, "holds a raw card number; send a token instead", "card_number")
    if _id_match(value) is None:
        raise InvalidError(field, "must be 1 to 64 of A-Z a-z 0-9 . _ : -", "bad_format")


def check_text(value: str, field: str) -> None:
    """Raises `InvalidError` for a card number in what people write."""
    if holds_card_number(value):
        raise InvalidError(field, "holds a raw card number", "card_number")


def keep(connection: sqlite3.Connection, label: Label, who: str, now_ms: int) -> bool:
    """Write a label down. False when just this one is known already."""
    digest = hashlib.sha256(msgspec.json.encode(label)).digest()
    cursor = connection.execute(
        f"insert or ignore into labels ({_COLUMNS}, who, at_ms, digest) values (?,?,?,?,?,?,?,?,?,?,?)",  # noqa: S608
        (*msgspec.structs.astuple(label), who, now_ms, digest),
    )
    return bool(cursor.rowcount)


def of(connection: sqlite3.Connection, transaction_id: str) -> list[dict[str, Any]]:
    """The labels of a transaction, in the order in which they came here, with who brought them."""
    rows = connection.execute(
        f"select {_COLUMNS}, who, at_ms from labels where transaction_id = ? order by seq limit ?",  # noqa: S608
        (transaction_id, LABELS_OF_ONE_MAX),
    )
    return [dict(row) | {"is_fraud": bool(row["is_fraud"])} for row in rows]


def forget(connection: sqlite3.Connection, before_ms: int, most: int) -> int:
    """Remove at most `most` labels that came before then. How many those were."""
    query = "delete from labels where seq in (select seq from labels where at_ms < ? limit ?)"
    return connection.execute(query, (before_ms, most)).rowcount
