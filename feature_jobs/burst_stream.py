"""The stream of bursts: declines as they arrive in the Delta table `decisions` become one alert a burst on the topic `alerts`.

Runs in the driver of `fraudgate jobs` beside the Spark streams and starts none of its own, as drift does: it follows the commits of
`decisions` (feature_jobs/tail.py) and reads six columns of each. A commit of 4,000 receipts takes some 10 ms.

An alert is published first and then written down, with how far `decisions` had been read, in the table `bursts`. A restart goes on where
that table stops; what was published and not written down is published again under the same id, by which whoever reads the topic tells.
"""

from __future__ import annotations

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import TableNotFoundError

from feature_jobs.alert_topic import Alert, AlertTopic
from feature_jobs.bursts import BEGUN, BIN, DEVICE, ENTITIES, MERCHANT, Burst, Decline, Windows
from feature_jobs.metrics import Metrics
from feature_jobs.tail import Tail
from feature_jobs.training_set import local
from gateway.contracts import tables
from gateway.contracts.decision import Outcome
from gateway.contracts.settings import Settings

QUERY = "bursts"
KIND = "burst"
APP_ID = "fraudgate-bursts"
COLUMNS = ["transaction_id", "event_time_ms", "decided_at_ms", "decision", *ENTITIES]
# What one look reads at most, so that the supervisor gets its turn.
COMMITS_A_LOOK = 50
# Where there is no `bursts` table yet, or it is far behind: how far back in `decisions` to begin.
BACKLOG_COMMITS_MAX = 1_000
# Commits of `bursts` that are looked through for the note of the newest that this stream made: others compact the table.
NOTES_MAX = 50
# Time has come to what this share of a commit's receipts has come to: one sender's clock must not end everybody's bursts.
CLOCK_QUANTILE = 0.99
READ_NOTE, REPLAY_NOTE, CLOCK_NOTE = "fraudgate.decisions_version", "fraudgate.replay_from", "fraudgate.clock_ms"

SCHEMA = pa.schema(
    [
        ("burst_id", pa.string()),
        ("state", pa.string()),
        ("entity", pa.string()),
        ("entity_value", pa.string()),
        ("began_ms", pa.int64()),
        ("at_ms", pa.int64()),
        ("decided_at_ms", pa.int64()),
        ("declines", pa.int64()),
        ("transaction_id", pa.string()),
        ("window_ms", pa.int64()),
        ("decisions_version", pa.int64()),
    ]
)

log = logging.getLogger(__name__)


class Bursts:
    """Follows `decisions`, publishes alerts, writes `bursts` and the metrics. `follow` is called by the supervisor, by one thread."""

    def __init__(self, settings: Settings, metrics: Metrics, topic: AlertTopic | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._topic = AlertTopic(settings) if topic is None else topic
        self._window_ms = settings.burst_window_s * 1000
        self._uri = local(tables.table_uri(settings.tables, tables.BURSTS))
        self._tail = Tail(local(tables.table_uri(settings.tables, tables.DECISIONS)))
        self._version: int | None = None
        self._windows = self._empty()
        self._clock_ms = 0

    def _empty(self) -> Windows:
        s = self._settings
        thresholds = {MERCHANT: s.burst_declines_merchant, DEVICE: s.burst_declines_device, BIN: s.burst_declines_bin}
        return Windows(thresholds, self._window_ms, s.burst_entities_max)

    def follow(self, commits_max: int = COMMITS_A_LOOK) -> int:
        """Reads commits that have come since, at most `commits_max`; returns how many.

        Raises what feature_jobs.tail.READ_ERRORS names, `AlertsUnavailableError` and `RegistryUnavailableError`; what was not written down
        then is read again by the next call.
        """
        try:
            return self._follow(commits_max)
        except BaseException:
            # What this has in memory may be ahead of what is written down.
            self._version = None
            raise

    def _follow(self, commits_max: int) -> int:
        if self._version is None:
            self._resume()
        if self._version is None:
            return 0
        read = 0
        while read < commits_max:
            receipts = self._tail.added(self._version + 1, COLUMNS)
            if receipts is None:
                break
            self._take(receipts, self._version + 1)
            self._version += 1
            read += 1
        return read

    def _resume(self) -> None:
        """Where the table `bursts` stopped, or a while before the newest receipts."""
        self._windows, self._clock_ms = self._empty(), 0
        newest = self._tail.newest()
        if newest is None:
            return
        earliest = max(0, newest - BACKLOG_COMMITS_MAX)
        told, replay_from, active = earliest - 1, earliest, list[Burst]()
        note = self._note()
        if note is not None and int(note[READ_NOTE]) <= newest:
            told, replay_from, self._clock_ms = int(note[READ_NOTE]), max(int(note[REPLAY_NOTE]), earliest), int(note[CLOCK_NOTE])
            active = self._active()
        elif note is not None:
            log.warning("bursts: the table decisions was made anew; beginning with it")
        first = max(replay_from, earliest)
        # Declines of bursts that were told already only fill the windows.
        for version in range(first, told + 1):
            receipts = self._tail.added(version, COLUMNS)
            if receipts is not None and receipts.num_rows:
                self._windows.fill(declines_of(receipts), version)
        self._windows.restore(active)
        start = max(told, earliest - 1)
        if start < newest and self._tail.added(start + 1, []) is None:
            log.warning("bursts: commits %d to %d of decisions were cleaned up before they were read", start + 1, newest - 1)
            start = newest - 1
        self._version = start

    def _note(self) -> dict[str, str] | None:
        """What the newest commit of this stream to `bursts` says, None without one."""
        try:
            history = DeltaTable(self._uri).history(NOTES_MAX)
        except TableNotFoundError:
            return None
        return next((commit for commit in history if READ_NOTE in commit), None)

    def _active(self) -> list[Burst]:
        """Bursts that have begun and not ended."""
        rows = DeltaTable(self._uri).to_pyarrow_table(columns=SCHEMA.names).sort_by("decisions_version").to_pylist()
        names = ("state", "entity", "entity_value", "began_ms", "at_ms", "decided_at_ms", "declines", "transaction_id")
        found: dict[str, Burst] = {}
        for row in rows:
            if row["state"] == BEGUN:
                found[row["burst_id"]] = Burst(**{name: row[name] for name in names})
            else:
                found.pop(row["burst_id"], None)
        return list(found.values())

    def _take(self, receipts: pa.Table, version: int) -> None:
        if not receipts.num_rows:
            return
        changed = self._windows.add(declines_of(receipts), version)
        self._clock_ms = max(self._clock_ms, int(np.quantile(receipts["event_time_ms"].to_numpy(), CLOCK_QUANTILE)))
        evicted = self._windows.evicted
        changed += self._windows.forget(self._clock_ms)
        begun = [burst for burst in changed if burst.state == BEGUN]
        if begun:
            self._topic.publish([(burst.entity_value, self._alert(burst)) for burst in begun])
        if changed:
            self._write(changed, version)
        m = self._metrics
        for burst in begun:
            m.bursts.labels(burst.entity).inc()
            log.warning("bursts: %d declines at one %s within %d s", burst.declines, burst.entity, self._window_ms // 1000)
        m.burst_entities.set(len(self._windows))
        m.bursts_active.set(self._windows.active)
        m.burst_evicted.inc(self._windows.evicted - evicted)

    def _alert(self, burst: Burst) -> Alert:
        """About no single payment: `detail` says what it is about, as JSON that is the same whenever it is made again."""
        detail = {
            "id": burst.id,
            "entity": burst.entity,
            "value": burst.entity_value,
            "declines": burst.declines,
            "window_s": self._window_ms // 1000,
            "began_ms": burst.began_ms,
            "at_ms": burst.at_ms,
            "transaction_id": burst.transaction_id,
        }
        merchant = burst.entity_value if burst.entity == MERCHANT else ""
        reasons = (f"BURST_{burst.entity.removesuffix('_id').upper()}",)
        return Alert(
            merchant_id=merchant,
            decision=Outcome.DECLINE.value,
            reasons=reasons,
            decided_at_ms=burst.decided_at_ms,
            kind=KIND,
            detail=json.dumps(detail),
        )

    def _write(self, changed: list[Burst], version: int) -> None:
        replay_from = self._windows.replay_from
        note = {
            READ_NOTE: str(version),
            REPLAY_NOTE: str(version + 1 if replay_from is None else replay_from),
            CLOCK_NOTE: str(self._clock_ms),
        }
        rows = [
            {name: getattr(burst, name) for name in SCHEMA.names if hasattr(burst, name)}
            | {"burst_id": burst.id, "window_ms": self._window_ms, "decisions_version": version}
            for burst in changed
        ]
        said = CommitProperties(custom_metadata=note, app_transactions=[Transaction(APP_ID, version)])
        write_deltalake(self._uri, pa.Table.from_pylist(rows, SCHEMA), mode="append", commit_properties=said)
        self._metrics.rows.labels(tables.BURSTS).inc(len(rows))


def declines_of(receipts: pa.Table) -> list[Decline]:
    """In the order of event time, then of transaction_id."""
    declined = receipts.filter(pc.equal(receipts["decision"], Outcome.DECLINE.value))
    found = [
        Decline(
            transaction_id=row["transaction_id"],
            event_time_ms=row["event_time_ms"],
            decided_at_ms=row["decided_at_ms"],
            entities={name: value for name in ENTITIES if (value := row.get(name)) is not None},
        )
        for row in declined.to_pylist()
    ]
    return sorted(found, key=lambda d: (d.event_time_ms, d.transaction_id))
