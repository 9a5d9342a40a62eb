"""The case service's one file: SQLite in WAL mode, one thread that does everything in it, one transaction a call.

The standard library's sqlite3 and no other library: there is one writer, every statement stands in this package, and what matters is
that a verdict, its label and its audit record are one transaction, which an ORM would only hide. synchronous=FULL: what was answered is
on the disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 10.0
# One statement each. Times are milliseconds since the epoch.
SCHEMA = (
    """create table reviews (
        transaction_id text primary key, why text not null, outcome text not null, risk_score integer not null,
        amount_minor integer not null, currency text not null, card_id text not null, customer_id text not null,
        merchant_id text not null, event_time_ms integer not null, decided_at_ms integer not null, queued_at_ms integer not null,
        story text not null, lease_who text, lease_until_ms integer not null default 0,
        verdict text, note text, verdict_who text, verdict_at_ms integer
    ) without rowid""",
    "create index reviews_amount on reviews (amount_minor desc, transaction_id) where verdict is null",
    "create index reviews_risk on reviews (risk_score desc, transaction_id) where verdict is null",
    "create index reviews_age on reviews (decided_at_ms, transaction_id) where verdict is null",
    "create index reviews_decided on reviews (verdict_at_ms) where verdict is not null",
    """create table labels (
        seq integer primary key, transaction_id text not null, card_id text not null, is_fraud integer not null, source text not null,
        state text not null, reported_at_ms integer not null, amount_minor integer, effective_at_ms integer, who text not null,
        at_ms integer not null, digest blob not null unique
    )""",
    "create index labels_transaction on labels (transaction_id, seq)",
    "create index labels_age on labels (at_ms)",
    "create table outbox (seq integer primary key autoincrement, topic text not null, key blob, payload blob not null)",
    """create table list_entries (
        list_id text not null, entity_value text not null, expires_at_ms integer, reason text not null, who text not null,
        at_ms integer not null, primary key (list_id, entity_value)
    ) without rowid""",
    """create table deliveries (
        seq integer primary key, webhook text not null, message_id text not null, kind text not null, subject text not null,
        body blob not null, created_at_ms integer not null, attempts integer not null default 0, due_at_ms integer not null,
        state text not null, failure text not null default '', done_at_ms integer
    )""",
    "create index deliveries_due on deliveries (webhook, due_at_ms, seq) where state = 'waiting'",
    "create index deliveries_dead on deliveries (seq) where state = 'dead'",
    "create index deliveries_done on deliveries (done_at_ms) where state = 'delivered'",
    "create index deliveries_subject on deliveries (webhook, kind, subject, created_at_ms)",
    "create table progress (name text primary key, value integer not null) without rowid",
)


class Database:
    """One file. Calls are executed one after the other, each as one transaction that is undone when it raises."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cases-db")
        self._connection = self._pool.submit(_open, path).result()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` as one transaction, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._transact, work)

    def call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`run`, from a thread of ours."""
        return self._pool.submit(self._transact, work).result()

    def close(self) -> None:
        self._pool.submit(self._connection.close).result()
        self._pool.shutdown()

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection
        connection.execute("begin immediate")
        try:
            result = work(connection)
            connection.execute("commit")
        except BaseException:
            connection.execute("rollback")
            raise
        return result


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    path.chmod(0o600)
    connection.row_factory = sqlite3.Row
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    [[version]] = connection.execute("pragma user_version")
    if version == 0:
        connection.execute("begin immediate")
        for statement in SCHEMA:
            connection.execute(statement)
        connection.execute(f"pragma user_version = {SCHEMA_VERSION}")
        connection.execute("commit")
    elif version != SCHEMA_VERSION:
        connection.close()
        raise sqlite3.DatabaseError(f"{path} is of version {version}, this code knows {SCHEMA_VERSION}")
    return connection


def progress_of(connection: sqlite3.Connection, name: str) -> int:
    """A number that was noted, 0 without one."""
    row = connection.execute("select value from progress where name = ?", (name,)).fetchone()
    return 0 if row is None else int(row["value"])


def note_progress(connection: sqlite3.Connection, name: str, value: int) -> None:
    connection.execute("insert into progress values (?, ?) on conflict (name) do update set value = excluded.value", (name, value))
