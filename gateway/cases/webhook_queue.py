"""Messages for webhooks in the case service's database: queued once, tried until they are taken or given up, dead letters after that.

Queued in the transaction that notes what was read from Kafka, so a restart goes on where it was. The queue of a webhook is bounded: what no
longer fits goes to the dead letters at once, from where a person may send it again.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.cases.errors import NotFoundError
from gateway.cases.metrics import CaseMetrics
from gateway.cases.webhook_file import Webhook

log = logging.getLogger(__name__)

# Dead letters of all webhooks together; the oldest make room.
DEAD_MAX = 100_000
FAILURE_LENGTH_MAX = 200
QUEUE_FULL = "the webhook's queue was full"
NOT_DEFINED = "the webhook is no longer defined"


@dataclass(frozen=True)
class Told:
    """A message to be. `subject` is what it is about: of two with the same webhook, kind and subject within the window one is sent."""

    webhook: str
    kind: str
    subject: str
    at_ms: int
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Delivery:
    """A message that waits. `attempts` were made before."""

    seq: int
    message_id: str
    body: bytes
    created_at_ms: int
    attempts: int


class WebhookQueue:
    """`webhooks` are exchanged as a whole when the operator's file changes. Methods that take a connection are steps of its transaction."""

    def __init__(
        self, webhooks: Mapping[str, Webhook], metrics: CaseMetrics, *, queue_max: int, dedup_window_ms: int, age_max_ms: int
    ) -> None:
        self.webhooks = webhooks
        self._metrics = metrics
        self._queue_max = queue_max
        self._dedup_window_ms = dedup_window_ms
        self._age_max_ms = age_max_ms
        self._unknown: set[str] = set()

    def told_of_alert(self, alert: Mapping[str, Any]) -> list[Told]:
        """The messages that an alert of the topic makes, other than of a decision. It is about its transaction, or all that it says."""
        kind = alert["kind"]
        about = [alert["card_id"], alert["merchant_id"], *alert["reasons"], alert["detail"]]
        subject = alert["transaction_id"] or hashlib.sha256(msgspec.json.encode(about)).hexdigest()
        return [
            Told(webhook.name, kind, subject, alert["decided_at_ms"], dict(alert))
            for webhook in self.webhooks.values()
            if kind in webhook.kinds
        ]

    def add(self, connection: sqlite3.Connection, told: Sequence[Told], now_ms: int) -> int:
        """How many were queued: not those for webhooks that nobody defined, that are too old, or that were told already."""
        added = 0
        for t in told:
            if t.webhook not in self.webhooks:
                if t.webhook not in self._unknown and len(self._unknown) < 1000:
                    self._unknown.add(t.webhook)
                    log.warning("webhooks: the policy names %s, which isn't in the file of webhooks", t.webhook)
                continue
            if now_ms - t.at_ms > self._age_max_ms:
                self._metrics.webhook_old.labels(t.webhook).inc()
                continue
            if self._known(connection, t, now_ms):
                self._metrics.webhook_duplicate.labels(t.webhook).inc()
                continue
            full = self.waiting(connection, t.webhook) >= self._queue_max
            connection.execute(
                "insert into deliveries (webhook, message_id, kind, subject, body, created_at_ms, due_at_ms, state, failure, done_at_ms) "
                "values (?,?,?,?,?,?,?,?,?,?)",
                (
                    *(t.webhook, message_id(t), t.kind, t.subject, body_of(t), now_ms, now_ms),
                    *(("dead", QUEUE_FULL, now_ms) if full else ("waiting", "", None)),
                ),
            )
            (self._metrics.webhook_overflow if full else self._metrics.webhook_queued).labels(t.webhook).inc()
            if full:
                _bound_dead(connection)
            added += not full
        return added

    def _known(self, connection: sqlite3.Connection, t: Told, now_ms: int) -> bool:
        query = "select 1 from deliveries where webhook = ? and kind = ? and subject = ? and created_at_ms > ?"
        values = t.webhook, t.kind, t.subject, now_ms - self._dedup_window_ms
        return connection.execute(query, values).fetchone() is not None

    def waiting(self, connection: sqlite3.Connection, webhook: str) -> int:
        query = "select count(*) from deliveries where webhook = ? and state = 'waiting'"
        [[count]] = connection.execute(query, (webhook,))
        return int(count)

    def give_up(self, connection: sqlite3.Connection, now_ms: int) -> int:
        """What waits longer than it may for a webhook that the file no longer defines is a dead letter. How many those are."""
        known = list(self.webhooks)
        gone = connection.execute(
            "update deliveries set state = 'dead', failure = ?, done_at_ms = ? where state = 'waiting' and created_at_ms < ? "  # noqa: S608
            f"and webhook not in ({','.join('?' * len(known))})",
            (NOT_DEFINED, now_ms, now_ms - self._age_max_ms, *known),
        ).rowcount
        if gone:
            _bound_dead(connection)
        return gone

    def due(self, connection: sqlite3.Connection, webhook: str, now_ms: int, most: int) -> tuple[list[Delivery], int | None]:
        """At most `most` that are due, the longest waiting first; and when the next one is due, None without one."""
        rows = connection.execute(
            "select seq, message_id, body, created_at_ms, attempts from deliveries where webhook = ? and state = 'waiting' "
            "and due_at_ms <= ? order by due_at_ms, seq limit ?",
            (webhook, now_ms, most),
        ).fetchall()
        [[next_ms]] = connection.execute(
            "select min(due_at_ms) from deliveries where webhook = ? and state = 'waiting'", (webhook,)
        )
        return [Delivery(**dict(row)) for row in rows], next_ms

    def delivered(self, connection: sqlite3.Connection, seq: int, now_ms: int) -> None:
        query = "update deliveries set state = 'delivered', attempts = attempts + 1, failure = '', done_at_ms = ? where seq = ?"
        connection.execute(query, (now_ms, seq))

    def failed(self, connection: sqlite3.Connection, seq: int, failure: str, due_at_ms: int | None, now_ms: int) -> None:
        """An attempt failed; the next is due then, or, with None, it was the last."""
        failure = failure[:FAILURE_LENGTH_MAX]
        if due_at_ms is not None:
            query = "update deliveries set attempts = attempts + 1, failure = ?, due_at_ms = ? where seq = ?"
            connection.execute(query, (failure, due_at_ms, seq))
            return
        query = "update deliveries set state = 'dead', attempts = attempts + 1, failure = ?, done_at_ms = ? where seq = ?"
        connection.execute(query, (failure, now_ms, seq))
        _bound_dead(connection)


def message_id(t: Told) -> str:
    """The same for the same event however often it is read or sent: receivers tell repetitions by it."""
    return "msg_" + hashlib.sha256(f"{t.webhook}|{t.kind}|{t.subject}|{t.at_ms}".encode()).hexdigest()[:32]


def body_of(t: Told) -> bytes:
    """Standard Webhooks' payload: type, timestamp, data."""
    at = dt.datetime.fromtimestamp(t.at_ms / 1000, dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return msgspec.json.encode({"type": f"fraudgate.{t.kind}", "timestamp": at, "data": t.data})


def dead_page(
    connection: sqlite3.Connection, limit: int, after: int, webhook: str | None
) -> tuple[list[dict[str, Any]], int | None]:
    """Dead letters, the oldest first, behind the number `after`; and the number to go on behind."""
    rows = connection.execute(
        "select seq id, webhook, message_id, kind, subject, body, created_at_ms, attempts, failure, done_at_ms dead_at_ms from deliveries "
        "where state = 'dead' and seq > ? and (? is null or webhook = ?) order by seq limit ?",
        (after, webhook, webhook, limit + 1),
    ).fetchall()
    found = [dict(row) | {"body": msgspec.json.decode(row["body"])} for row in rows[:limit]]
    return found, rows[limit - 1]["id"] if len(rows) > limit else None


def retry(connection: sqlite3.Connection, seq: int, now_ms: int) -> str:
    """Queue a dead letter anew, with all its attempts, under its own id. Its webhook. Raises `NotFoundError`."""
    webhook = _dead(connection, seq)
    query = (
        "update deliveries set state = 'waiting', attempts = 0, due_at_ms = ?, created_at_ms = ?, done_at_ms = null where seq = ?"
    )
    connection.execute(query, (now_ms, now_ms, seq))
    return webhook


def discard(connection: sqlite3.Connection, seq: int) -> str:
    """Remove a dead letter. Its webhook. Raises `NotFoundError`."""
    webhook = _dead(connection, seq)
    connection.execute("delete from deliveries where seq = ?", (seq,))
    return webhook


def forget(connection: sqlite3.Connection, before_ms: int, most: int) -> int:
    """Remove at most `most` that were delivered before then."""
    return connection.execute(
        "delete from deliveries where seq in (select seq from deliveries where state = 'delivered' and done_at_ms < ? limit ?)",
        (before_ms, most),
    ).rowcount


def _dead(connection: sqlite3.Connection, seq: int) -> str:
    row = connection.execute("select webhook from deliveries where seq = ? and state = 'dead'", (seq,)).fetchone()
    if row is None:
        raise NotFoundError
    return str(row["webhook"])


def _bound_dead(connection: sqlite3.Connection) -> None:
    [[count]] = connection.execute("select count(*) from deliveries where state = 'dead'")
    if count > DEAD_MAX:
        log.error("webhooks: more than %d dead letters: the oldest are removed", DEAD_MAX)
        connection.execute(
            "delete from deliveries where seq in (select seq from deliveries where state = 'dead' order by seq limit ?)",
            (count - DEAD_MAX,),
        )
