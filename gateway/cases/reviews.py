"""The queue of decisions that need a person: taken in once by transaction_id, claimed by one analyst at a time, decided once.

Everything here is one step of a transaction in the case service's database. A claim is a lease: it ends by itself, and who holds it may
take it anew. A verdict becomes a label and an audit record in the same transaction (gateway/cases/service.py).
"""

from __future__ import annotations

import base64
import binascii
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from gateway.cases.errors import ClaimedError, DecidedError, InvalidError, NotClaimedError, NotFoundError

State = Literal["open", "claimed", "decided"]
Order = Literal["amount", "risk", "age"]
Verdict = Literal["fraud", "legitimate"]
PAGE_MAX = 200
CURSOR_LENGTH_MAX = 300
NOTE_LENGTH_MAX = 2000
# Column and direction; what is equal goes by transaction_id.
ORDERS: dict[Order, tuple[str, bool]] = {
    "amount": ("amount_minor", True),
    "risk": ("risk_score", True),
    "age": ("decided_at_ms", False),
}
_SUMMARY = (
    "transaction_id, why, outcome, risk_score, amount_minor, currency, card_id, customer_id, merchant_id, event_time_ms, decided_at_ms, "
    "queued_at_ms, lease_who, lease_until_ms, verdict, note, verdict_who, verdict_at_ms"
)


@dataclass(frozen=True)
class Queued:
    """A decision to look at. `why` is the outcome or the lists that brought it here; `story` is JSON."""

    transaction_id: str
    why: str
    outcome: str
    risk_score: int
    amount_minor: int
    currency: str
    card_id: str
    customer_id: str
    merchant_id: str
    event_time_ms: int
    decided_at_ms: int
    story: bytes


@dataclass(frozen=True)
class Filter:
    """Which reviews to list; None: any."""

    state: State | None = "open"
    why: str | None = None
    card_id: str | None = None
    customer_id: str | None = None
    merchant_id: str | None = None
    amount_minor_least: int | None = None
    risk_score_least: int | None = None
    claimed_by: str | None = None


def add(connection: sqlite3.Connection, found: Sequence[Queued], now_ms: int) -> list[Queued]:
    """Those that weren't there yet."""
    added = []
    for q in found:
        cursor = connection.execute(
            "insert or ignore into reviews (transaction_id, why, outcome, risk_score, amount_minor, currency, card_id, customer_id, "
            "merchant_id, event_time_ms, decided_at_ms, queued_at_ms, story) values (?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                q.transaction_id,
                q.why,
                q.outcome,
                q.risk_score,
                q.amount_minor,
                q.currency,
                q.card_id,
                q.customer_id,
                q.merchant_id,
                q.event_time_ms,
                q.decided_at_ms,
                now_ms,
                q.story.decode(),
            ),
        )
        if cursor.rowcount:
            added.append(q)
    return added


def open_count(connection: sqlite3.Connection) -> int:
    [[count]] = connection.execute("select count(*) from reviews where verdict is null")
    return int(count)


def page(
    connection: sqlite3.Connection, wanted: Filter, order: Order, limit: int, cursor: str | None, now_ms: int
) -> tuple[list[dict[str, Any]], str | None]:
    """At most `limit` reviews and the cursor of the next ones, None at the end. Raises `InvalidError` for a cursor of another order."""
    column, falling = ORDERS[order]
    where, values = _conditions(wanted, now_ms)
    if cursor is not None:
        at, transaction_id = _read_cursor(cursor, order)
        where.append(f"({column} {'<' if falling else '>'} ? or ({column} = ? and transaction_id > ?))")
        values += [at, at, transaction_id]
    direction = "desc" if falling else "asc"
    # Of names in this module alone; values are bound.
    query = (
        f"select {_SUMMARY} from reviews where {' and '.join(where) or '1'} order by {column} {direction}, transaction_id limit ?"  # noqa: S608
    )
    rows = connection.execute(query, (*values, limit + 1)).fetchall()
    found = [_summary(row, now_ms) for row in rows[:limit]]
    more = len(rows) > limit
    return found, _write_cursor(order, rows[limit - 1][column], rows[limit - 1]["transaction_id"]) if more else None


def _conditions(wanted: Filter, now_ms: int) -> tuple[list[str], list[Any]]:
    where: list[str] = []
    values: list[Any] = []
    if wanted.state is not None:
        where.append("verdict is not null" if wanted.state == "decided" else "verdict is null")
        if wanted.state != "decided":
            where.append("lease_until_ms > ?" if wanted.state == "claimed" else "lease_until_ms <= ?")
            values.append(now_ms)
    for column in ("why", "card_id", "customer_id", "merchant_id"):
        value = getattr(wanted, column)
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    if wanted.claimed_by is not None:
        where.append("lease_who = ?")
        values.append(wanted.claimed_by)
    for column, least in (("amount_minor", wanted.amount_minor_least), ("risk_score", wanted.risk_score_least)):
        if least is not None:
            where.append(f"{column} >= ?")
            values.append(least)
    return where, values


def _write_cursor(order: Order, at: int, transaction_id: str) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode([order, at, transaction_id])).decode()


def _read_cursor(cursor: str, order: Order) -> tuple[int, str]:
    try:
        of, at, transaction_id = msgspec.json.decode(base64.urlsafe_b64decode(cursor), type=tuple[str, int, str])
    except (msgspec.DecodeError, binascii.Error, ValueError) as exc:
        raise InvalidError("cursor", "must be the next_cursor of an answer") from exc
    if of != order:
        raise InvalidError("cursor", "is of another order")
    return at, transaction_id


def _summary(row: sqlite3.Row, now_ms: int) -> dict[str, Any]:
    found = {name: row[name] for name in row.keys() if name not in ("story", "lease_who", "lease_until_ms")}  # noqa: SIM118
    held = row["verdict"] is None and row["lease_until_ms"] > now_ms
    state: State = "decided" if row["verdict"] is not None else "claimed" if held else "open"
    return found | {
        "state": state,
        "claimed_by": row["lease_who"] if held else None,
        "claimed_until_ms": row["lease_until_ms"] if held else None,
    }


def _row(connection: sqlite3.Connection, transaction_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute("select * from reviews where transaction_id = ?", (transaction_id,)).fetchone()
    if row is None:
        raise NotFoundError
    return row


def get(connection: sqlite3.Connection, transaction_id: str, now_ms: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A review and its story. Raises `NotFoundError`."""
    row = _row(connection, transaction_id)
    return _summary(row, now_ms), msgspec.json.decode(row["story"])


def claim(connection: sqlite3.Connection, transaction_id: str, who: str, until_ms: int, now_ms: int) -> dict[str, Any]:
    """Hold a review until then; who holds it already goes on. Raises `NotFoundError`, `DecidedError`, `ClaimedError`."""
    row = _row(connection, transaction_id)
    if row["verdict"] is not None:
        raise DecidedError
    if row["lease_until_ms"] > now_ms and row["lease_who"] != who:
        raise ClaimedError
    connection.execute(
        "update reviews set lease_who = ?, lease_until_ms = ? where transaction_id = ?", (who, until_ms, transaction_id)
    )
    return _summary(_row(connection, transaction_id), now_ms)


def release(connection: sqlite3.Connection, transaction_id: str, who: str, now_ms: int) -> dict[str, Any]:
    """Let go of a review. Raises `NotFoundError`, `DecidedError`, `NotClaimedError`."""
    row = _row(connection, transaction_id)
    if row["verdict"] is not None:
        raise DecidedError
    if row["lease_until_ms"] <= now_ms or row["lease_who"] != who:
        raise NotClaimedError
    connection.execute("update reviews set lease_who = null, lease_until_ms = 0 where transaction_id = ?", (transaction_id,))
    return _summary(_row(connection, transaction_id), now_ms)


def decide(
    connection: sqlite3.Connection, transaction_id: str, who: str, verdict: Verdict, note: str, now_ms: int
) -> tuple[dict[str, Any], bool]:
    """The decided review, and whether it was decided now: the same verdict by the same analyst again changes nothing.

    Raises `NotFoundError`, `DecidedError`, `NotClaimedError`.
    """
    row = _row(connection, transaction_id)
    if row["verdict"] is not None:
        if (row["verdict"], row["verdict_who"]) == (verdict, who):
            return _summary(row, now_ms), False
        raise DecidedError
    if row["lease_until_ms"] <= now_ms or row["lease_who"] != who:
        raise NotClaimedError
    connection.execute(
        "update reviews set verdict = ?, note = ?, verdict_who = ?, verdict_at_ms = ?, lease_who = null, lease_until_ms = 0 "
        "where transaction_id = ?",
        (verdict, note, who, now_ms, transaction_id),
    )
    return _summary(_row(connection, transaction_id), now_ms), True


def forget(connection: sqlite3.Connection, before_ms: int, most: int) -> int:
    """Remove at most `most` reviews that were decided before then. How many those were."""
    return connection.execute(
        "delete from reviews where transaction_id in "
        "(select transaction_id from reviews where verdict is not null and verdict_at_ms < ? limit ?)",
        (before_ms, most),
    ).rowcount
