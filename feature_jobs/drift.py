"""The stream of drift: receipts as they arrive in the Delta table `decisions`, compared with the champion's training rows.

Runs in the driver of `fraudgate jobs` beside the Spark streams and starts none of its own: it follows the commits of `decisions` and
counts with numpy (4,000 receipts take 40 ms, a window of 20,000 rows 15 ms). Windows are ten minutes of event time and end
at each full minute. Each measure of each tenth window becomes a row of the table `drift`, and so does each alarm when it begins.

Once each: the state is a function of the commits read. A commit to `drift` says how far `decisions` had been read and from where it must be
read again to fill the open windows, so a restart goes on where the table stops, and a batch of Spark that is replayed, which commits
nothing, changes nothing.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import TableNotFoundError

from feature_jobs.metrics import Metrics
from feature_jobs.tail import READ_ERRORS, Tail
from feature_jobs.training_set import local
from gateway.contracts import tables
from gateway.contracts.decision import Route
from gateway.contracts.drift import STEP_MS, WINDOW_MS, WINDOW_ROWS_MIN, Expected, Rows, Window, expected_of, look
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.model_meta import REFERENCE_FILE, read_manifest
from gateway.contracts.reasons import Degraded
from gateway.contracts.reference import (
    CLOCK,
    DECISION,
    MEASURE_INDEX,
    MEASURES,
    OUTCOME_CODE,
    SCORE_MEASURES,
    Reference,
    ReferenceRefusedError,
    bins_of,
    clock_values,
    decode,
    hour_of,
    score_values,
)
from gateway.contracts.settings import Settings

QUERY = "drift"
APP_ID = "fraudgate-drift"
COLUMNS = [
    *("transaction_id", "event_time_ms", "card_id", "merchant_id", "device_id", "ip", "features", "feature_fingerprint"),
    *("risk_score", "probability", "decision", "policy_decision", "degraded", "model_digest"),
]
ID_COLUMNS = ("card_id", "merchant_id", "device_id", "ip")
# What one look reads at most, so that the supervisor gets its turn.
COMMITS_A_LOOK = 50
# Where there is no `drift` table yet: how far back in `decisions` to begin.
BACKLOG_COMMITS_MAX = 1_000
# Of more receipts in one minute these are taken, by a hash of their ids: 20,000 a window tell all there is to tell.
ROWS_A_MINUTE_MAX = 2_000
# Stream time is what this share of a commit's receipts has come to: one sender's clock must not close everybody's windows.
CLOCK_QUANTILE = 0.99
READ_NOTE, REPLAY_NOTE = "fraudgate.decisions_version", "fraudgate.replay_from"
END_NOTE, ALARMS_NOTE = "fraudgate.windows_through_ms", "fraudgate.alarms"

SCHEMA = pa.schema(
    [
        ("window_end_ms", pa.int64()),
        ("window_ms", pa.int64()),
        ("measure", pa.string()),
        ("rows", pa.int64()),
        ("psi", pa.float64()),
        ("ks", pa.float64()),
        ("threshold", pa.float64()),
        ("alarm", pa.bool_()),
        ("model_version", pa.string()),
        ("decisions_version", pa.int64()),
    ]
)
WHOLE = {Degraded.STALE_FEATURES.value}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Champion:
    """The model that scores, and what it was trained on."""

    version: str
    digest: str
    reference: Reference


def load_champion(settings: Settings) -> Champion | None:
    """The champion of the local model directory; None where there is none, or it has no reference of these features."""
    try:
        entry = read_manifest(settings.models_path).routes.get(Route.CHAMPION.value)
        if entry is None or REFERENCE_FILE not in entry.files:
            return None
        reference = decode((settings.models_path / entry.directory / REFERENCE_FILE).read_bytes())
    except (OSError, msgspec.DecodeError, ReferenceRefusedError) as exc:
        if not isinstance(exc, FileNotFoundError):
            log.warning("drift: the champion's reference can't be used: %s", exc)
        return None
    return Champion(entry.version, entry.files["model.onnx"], reference)


@dataclass
class Minute:
    """Receipts of one minute, at most ROWS_A_MINUTE_MAX, and from which version on the first came."""

    first_version: int
    parts: list[tuple[Rows, npt.NDArray[np.int64]]] = field(default_factory=list)

    def add(self, rows: Rows, sample: npt.NDArray[np.int64]) -> None:
        """`sample` orders the rows by chance."""
        self.parts.append((rows, sample))
        if sum(len(part) for part, _ in self.parts) > ROWS_A_MINUTE_MAX:
            joined, order = join([part for part, _ in self.parts]), np.concatenate([s for _, s in self.parts])
            kept = np.argsort(order, kind="stable")[:ROWS_A_MINUTE_MAX]
            self.parts = [(joined.take(kept), order[kept])]


@dataclass(frozen=True)
class Seen:
    """A window that ended at `end_ms`; `begun` (measures,): alarms that the window before didn't have."""

    end_ms: int
    window: Window
    begun: npt.NDArray[np.bool_]


class Windows:
    """Windows over receipts in the order of commits. Knows nothing of tables. Holds at most eleven minutes of rows, but for those that one
    commit brings."""

    def __init__(self, champion: Champion, ended_ms: int = 0, alarms: tuple[str, ...] = ()) -> None:
        """`ended_ms`: windows through then were looked at before; `alarms`: the measures that were alarms in the last of them."""
        self.champion = champion
        self.ended_ms = ended_ms
        self.late = 0
        self._clock_ms = 0
        self._expected: Expected = expected_of(champion.reference)
        self._minutes: dict[int, Minute] = {}
        self._alarms = np.isin(MEASURES, alarms)

    @property
    def replay_from(self) -> int | None:
        """The oldest commit of which rows are in windows that are still to come; None without any."""
        return min((m.first_version for m in self._minutes.values()), default=None)

    @property
    def clock_ms(self) -> int:
        return self._clock_ms

    @property
    def alarms(self) -> tuple[str, ...]:
        """The measures that are alarms in the newest window."""
        return tuple(MEASURES[i] for i in np.flatnonzero(self._alarms))

    def add(self, receipts: pa.Table, version: int) -> Iterator[Seen]:
        """Counts receipts and yields the windows that have ended with them, in order."""
        t_ms = receipts["event_time_ms"].to_numpy().astype(np.int64)
        known = pc.equal(receipts["feature_fingerprint"], FINGERPRINT).to_numpy(zero_copy_only=False)
        open_from = self.ended_ms - WINDOW_MS + STEP_MS
        self.late += int((t_ms < open_from).sum())
        chosen = known & (t_ms >= open_from)
        if chosen.any():
            receipts, t_ms = receipts.filter(pa.array(chosen)), t_ms[chosen]
            rows = binned(self.champion, receipts)
            minute = t_ms // STEP_MS
            sample = codes(receipts["transaction_id"])
            for at in np.unique(minute).tolist():
                mine = minute == at
                self._minutes.setdefault(at * STEP_MS, Minute(version)).add(rows.take(mine), sample[mine])
            self._clock_ms = max(self._clock_ms, int(np.quantile(t_ms, CLOCK_QUANTILE)))
        yield from self._ended()

    def _ended(self) -> Iterator[Seen]:
        last_ms = self._clock_ms // STEP_MS * STEP_MS
        ends = {m + k for m in self._minutes for k in range(STEP_MS, WINDOW_MS + STEP_MS, STEP_MS)}
        for end_ms in sorted(e for e in ends if self.ended_ms < e <= last_ms):
            inside = [p for m, minute in self._minutes.items() if end_ms - WINDOW_MS <= m < end_ms for p, _ in minute.parts]
            rows = join(inside)
            self.ended_ms = end_ms
            if len(rows) < WINDOW_ROWS_MIN:
                continue
            window = look(self._expected, rows)
            begun = window.alarm & ~self._alarms
            self._alarms = window.alarm
            yield Seen(end_ms, window, begun)
        self.ended_ms = max(self.ended_ms, last_ms)
        self._minutes = {m: minute for m, minute in self._minutes.items() if m > self.ended_ms - WINDOW_MS}


def join(parts: list[Rows]) -> Rows:
    return Rows(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("bins", "clock", "hour", "ids")))


def codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A number for each text that depends on nothing else, -1 for null. Each distinct text is hashed once."""
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    values = encoded.dictionary.to_pylist()
    hashed = np.fromiter((zlib.crc32(v.encode()) for v in values), np.int64, len(values))
    places = pc.fill_null(encoded.indices, len(values)).to_numpy(zero_copy_only=False)
    out: npt.NDArray[np.int64] = np.append(hashed, -1)[places]
    return out


def values_of(receipts: pa.Table, digest: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(values, says): the value of each measure of each receipt (rows, measures), and whether it says something.

    Features don't where the answer had to do without some of them; score and outcome don't where another model scored, or none.
    """
    rows, width = receipts.num_rows, len(FEATURE_NAMES)
    lists = receipts["features"].combine_chunks()
    right = pc.fill_null(pc.equal(pc.list_value_length(lists), width), False).to_numpy(zero_copy_only=False)
    values = np.full((rows, len(MEASURES)), np.nan)
    flat = lists.filter(pa.array(right)).flatten().to_numpy(zero_copy_only=False)
    values[right, :width] = flat.reshape(-1, width)
    degraded = receipts["degraded"].to_pylist()
    whole = np.fromiter((not d or WHOLE.issuperset(d) for d in degraded), bool, rows)
    ours = pc.fill_null(pc.equal(receipts["model_digest"], digest), False).to_numpy(zero_copy_only=False)
    scored = ours & pc.is_valid(receipts["probability"]).to_numpy(zero_copy_only=False)
    outcome = receipts["decision"].to_pylist()
    if "policy_decision" in receipts.column_names:
        # What exploration turned into another outcome is no change of the model's.
        outcome = [p or d for p, d in zip(receipts["policy_decision"].to_pylist(), outcome, strict=True)]
    score = np.where(scored, receipts["risk_score"].to_numpy(zero_copy_only=False).astype(np.float64), np.nan)
    code = np.fromiter((OUTCOME_CODE.get(o, np.nan) for o in outcome), np.float64, rows)
    values[:, -len(SCORE_MEASURES) :] = score_values(score, code)
    says = np.empty(values.shape, bool)
    says[:, :width] = (whole & right)[:, None]
    says[:, width:] = scored[:, None]
    return values, says


def binned(champion: Champion, receipts: pa.Table) -> Rows:
    reference = champion.reference
    values, says = values_of(receipts, champion.digest)
    if not reference.rows_of()[MEASURE_INDEX[DECISION]]:
        says[:, MEASURE_INDEX[DECISION]] = False
    bins = bins_of(reference.edges, reference.bins, values)
    bins[~says] = -1
    t_ms = receipts["event_time_ms"].to_numpy().astype(np.int64)
    clock = bins_of(reference.edges[CLOCK], reference.bins[CLOCK], clock_values(t_ms))
    ids = np.stack([codes(receipts[name]) for name in ID_COLUMNS], axis=1)
    return Rows(bins, clock, hour_of(t_ms).astype(np.int8), ids)


class Drift:
    """Follows `decisions`, writes `drift` and the metrics. `follow` is called by the supervisor, by one thread."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._uri = local(tables.table_uri(settings.tables, tables.DRIFT))
        self._tail = Tail(local(tables.table_uri(settings.tables, tables.DECISIONS)))
        self._version: int | None = None
        self._windows: Windows | None = None
        self._champion: Champion | None = None
        self._manifest: object = None
        # Windows through then are in the table.
        self._written_ms = 0

    def follow(self, commits_max: int = COMMITS_A_LOOK) -> int:
        """Reads commits that have come since, at most `commits_max`; returns how many. Raises what READ_ERRORS names; what was not written
        then is read again by the next call."""
        self._look_for_champion()
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

    def _look_for_champion(self) -> None:
        path = self._settings.models_path / "manifest.json"
        try:
            stat = path.stat()
            signature = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        except OSError:
            signature = None
        if signature == self._manifest and signature is not None:
            return
        self._manifest = signature
        champion = load_champion(self._settings)
        self._metrics.drift_reference.set(champion is not None)
        if champion is not None and (self._champion is None or champion.digest != self._champion.digest):
            log.info("drift: compares with the training rows of version %s", champion.version)
            # Rows binned for another model are of no use: its windows begin anew.
            self._windows = Windows(champion, self._windows.ended_ms if self._windows else self._written_ms)
        self._champion = champion

    def _resume(self) -> None:
        """Where the table `drift` stopped, or a while before the newest receipts."""
        newest = self._tail.newest()
        if newest is None:
            return
        start, alarms = max(0, newest - BACKLOG_COMMITS_MAX) - 1, ""
        try:
            note = DeltaTable(self._uri).history(1)[0]
            replay_from, ended_ms = int(note[REPLAY_NOTE]), int(note[END_NOTE])
            if int(note[READ_NOTE]) <= newest:
                start, self._written_ms, alarms = replay_from - 1, ended_ms, str(note[ALARMS_NOTE])
            else:
                log.warning("drift: the table decisions was made anew; beginning with it")
        except TableNotFoundError:
            pass
        if start < newest and self._tail.added(start + 1, []) is None:
            log.warning("drift: commits %d to %d of decisions were cleaned up before they were read", start + 1, newest - 1)
            start = newest - 1
        if self._champion is not None:
            self._windows = Windows(self._champion, self._written_ms, tuple(alarms.split(",")))
        self._version = start

    def _take(self, receipts: pa.Table, version: int) -> None:
        if self._windows is None or not receipts.num_rows:
            return
        late = self._windows.late
        seen = list(self._windows.add(receipts, version))
        self._metrics.drift_late.inc(self._windows.late - late)
        self._metrics.drift_stream_time.set(self._windows.clock_ms / 1000)
        rows = [row for s in seen for row in self._rows(s, version)]
        if rows:
            self._write(rows, version)
        for s in seen:
            self._export(s)

    def _rows(self, seen: Seen, version: int) -> list[dict[str, object]]:
        """Each measure where ten full minutes end, else the alarms that begin."""
        assert self._windows is not None
        w, whole = seen.window, seen.end_ms % WINDOW_MS == 0
        chosen = (w.rows > 0) if whole else seen.begun
        return [
            {
                "window_end_ms": seen.end_ms,
                "window_ms": WINDOW_MS,
                "measure": MEASURES[i],
                "rows": int(w.rows[i]),
                "psi": float(w.psi[i]),
                "ks": float(w.ks[i]),
                "threshold": float(w.threshold[i]) if np.isfinite(w.threshold[i]) else None,
                "alarm": bool(w.alarm[i]),
                "model_version": self._windows.champion.version,
                "decisions_version": version,
            }
            for i in np.flatnonzero(chosen).tolist()
        ]

    def _write(self, rows: list[dict[str, object]], version: int) -> None:
        assert self._windows is not None
        replay_from = self._windows.replay_from
        note = {
            READ_NOTE: str(version),
            REPLAY_NOTE: str(version + 1 if replay_from is None else replay_from),
            END_NOTE: str(self._windows.ended_ms),
            ALARMS_NOTE: ",".join(self._windows.alarms),
        }
        said = CommitProperties(custom_metadata=note, app_transactions=[Transaction(APP_ID, version)])
        try:
            write_deltalake(self._uri, pa.Table.from_pylist(rows, SCHEMA), mode="append", commit_properties=said)
        except READ_ERRORS:
            # Windows that were not written are looked at again, from the table's own word.
            self._version, self._windows = None, None
            self._manifest, self._champion = None, None
            raise
        self._written_ms = self._windows.ended_ms
        self._metrics.rows.labels(tables.DRIFT).inc(len(rows))

    def _export(self, seen: Seen) -> None:
        w, m = seen.window, self._metrics
        m.drift_windows.inc()
        for i in np.flatnonzero(w.rows > 0).tolist():
            m.drift_psi.labels(MEASURES[i]).set(w.psi[i])
            m.drift_ks.labels(MEASURES[i]).set(w.ks[i])
            m.drift_alarm.labels(MEASURES[i]).set(w.alarm[i])
            # Shown as 0 before its first, so that this is seen as an increase.
            m.drift_alarms.labels(MEASURES[i])
        for i in np.flatnonzero(seen.begun).tolist():
            m.drift_alarms.labels(MEASURES[i]).inc()
            log.warning("drift: %s has a PSI of %.2f in the ten minutes to %d", MEASURES[i], w.psi[i], seen.end_ms)
