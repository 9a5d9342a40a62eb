"""The parity check: every feature of logged receipts, recomputed from the tables and compared bit by bit.

Reads silver, decisions and label changes with delta-rs and needs no Spark. A receipt says in which order each entity's payments were
observed (`observed_seq`) and how many label changes had been applied (`label_changes`), so the recomputation knows exactly what the
gateway could know. Rows whose past was observed in order of event time, nearly all, come from the offline engine; the others from
the gateway's own arithmetic (contracts.windows.aggregate) over raw events instead of heads and tiles. About 100,000 rows in 5 s.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.offline import EntityColumns, History, LabelChanges, offline_features
from feature_jobs.recount import Recount
from feature_jobs.training_set import history_of, read_table
from gateway.contracts import tables
from gateway.contracts.features import ENTITIES, FEATURE_NAMES, FEATURES, FINGERPRINT, LABELLED
from gateway.contracts.layout import BASE_STEP, LIFE_GAP
from gateway.contracts.reasons import Degraded
from gateway.contracts.settings import Settings
from gateway.contracts.topics import SCORED_NEVER
from gateway.contracts.transaction import FIELDS
from gateway.contracts.windows import BOUNDARY_MS, EXACT_WINDOW_MS_MAX, SETTLE_MS, Int64s, boundary

# What one row may need of the past: the label windows and their delay, with room to spare.
PAST_MS = 46 * 86_400_000
HISTORY_SETTLED_MS = 120_000
# Two receipts received closer than this may have been observed in either order.
OVERLAP_MS = 2_000
DIFFERENCES_SHOWN_MAX = 20


class NoReceiptsError(RuntimeError):
    """There is nothing to compare. The message says what is missing."""


@dataclass(frozen=True)
class Difference:
    transaction_id: str
    feature: str
    logged: float
    recomputed: float

    def to_json(self) -> dict[str, object]:
        """Unknown is null: JSON has no NaN."""
        logged, recomputed = (None if math.isnan(v) else v for v in (self.logged, self.recomputed))
        return {"transaction_id": self.transaction_id, "feature": self.feature, "logged": logged, "recomputed": recomputed}


@dataclass
class Report:
    """Counts of values (receipts times features), by feature and in all; of rows where the name says so.

    `missing` values stand in no receipt: the gateway decided without them. `stale` rows said of themselves that their features
    might be short; `late` rows were observed more than the settle delay behind their entity's newest, and are compared as observed.
    `unverifiable` rows follow an event whose receipt isn't in the table.
    """

    receipts: int
    rows: int
    equal: dict[str, int]
    different: dict[str, int]
    missing_rows: int
    stale_rows: int
    late_rows: int
    unverifiable_rows: int
    recounted: int
    examples: list[Difference] = field(default_factory=list)

    @property
    def compared(self) -> int:
        return self.rows * len(FEATURES)

    @property
    def different_values(self) -> int:
        return sum(self.different.values())

    def to_json(self) -> dict[str, object]:
        return {
            "compared": self.compared,
            "equal": sum(self.equal.values()),
            "different": self.different_values,
            "missing": self.missing_rows * len(FEATURES),
            "receipts": self.receipts,
            "rows": self.rows,
            "missing_rows": self.missing_rows,
            "stale_rows": self.stale_rows,
            "late_rows": self.late_rows,
            "unverifiable_rows": self.unverifiable_rows,
            "features": {
                name: {
                    "compared": self.rows,
                    "equal": self.equal[name],
                    "different": self.different[name],
                    "missing": self.missing_rows,
                }
                for name in FEATURE_NAMES
            },
            "examples": [d.to_json() for d in self.examples],
        }


@dataclass(frozen=True)
class Logged:
    """Receipts beside their payments, by row of silver: -1, NaN or False where a payment has no receipt."""

    silver: pa.Table
    has_receipt: npt.NDArray[np.bool_]
    features: npt.NDArray[np.float32]
    seq: Int64s
    label_changes: Int64s
    stale: npt.NDArray[np.bool_]
    received_ms: Int64s
    # No receipt was left out for its age.
    complete: bool


def check_parity(
    settings: Settings,
    *,
    from_ms: int | None = None,
    to_ms: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    cards: str | None = None,
) -> Report:
    """Compare the receipts of payments with event times in [from_ms, to_ms), or `sample` of them drawn at random.

    `cards`: only payments of cards whose ids begin so are looked at. Whoever says so knows that none of their other entities (customers,
    merchants, devices, addresses) is met by any other card. Raises `NoReceiptsError`.
    """
    logged = _load(settings, from_ms, to_ms, cards)
    t_ms = logged.silver["event_time_ms"].to_numpy()
    wanted = logged.has_receipt.copy()
    if from_ms is not None:
        wanted &= t_ms >= from_ms
    if to_ms is not None:
        wanted &= t_ms < to_ms
    if not wanted.any():
        raise NoReceiptsError("there is no receipt of this time whose payment is in silver")
    receipts = int(wanted.sum())
    if sample is not None and sample < receipts:
        chosen = np.random.default_rng(seed).choice(np.flatnonzero(wanted), sample, replace=False)
        wanted = np.zeros(len(wanted), bool)
        wanted[chosen] = True
    return _compare(logged, _label_changes(settings, logged.silver), wanted)


def _load(settings: Settings, from_ms: int | None, to_ms: int | None, cards: str | None = None) -> Logged:
    mine = None if cards is None else pc.starts_with(pc.field("card_id"), pattern=cards)
    silver = read_table(settings, tables.SILVER, [*FIELDS, "scored_by", "kafka_timestamp"], mine)
    if cards is not None and silver is not None:
        mine = pc.field("transaction_id").isin(silver["transaction_id"].combine_chunks())
    receipts = read_table(
        settings,
        tables.DECISIONS,
        ["transaction_id", "feature_fingerprint", "features", "observed_seq", "label_changes", "degraded", "received_at_ms"],
        mine,
    )
    if silver is None or receipts is None or not receipts.num_rows:
        raise NoReceiptsError("there are no receipts: let fraudgate jobs write some that the gateway decided")
    known = pc.greater_equal(silver["event_time_ms"], -(2**62) if from_ms is None else from_ms - PAST_MS)
    silver = silver.filter(pc.and_(known, pc.less(silver["event_time_ms"], 2**62 if to_ms is None else to_ms + PAST_MS)))
    silver = silver.sort_by([("event_time_ms", "ascending"), ("transaction_id", "ascending")])
    # What was erased on request has no features.
    whole = pc.is_valid(receipts["features"])
    receipts = receipts.filter(pc.and_(whole, pc.equal(receipts["feature_fingerprint"], FINGERPRINT)))
    if not receipts.num_rows:
        raise NoReceiptsError(f"no receipt has the features of this version ({FINGERPRINT})")
    row = pc.fill_null(pc.index_in(receipts["transaction_id"], silver["transaction_id"].combine_chunks()), -1).to_numpy()
    found = row >= 0
    row = row[found]
    n = silver.num_rows

    def spread(values: npt.NDArray[np.generic], empty: object) -> npt.NDArray[np.generic]:
        out = np.full((n, *values.shape[1:]), empty, values.dtype)
        out[row] = values[found]
        return out

    def lists(name: str, width: int) -> npt.NDArray[np.generic]:
        column = receipts[name].combine_chunks()
        if not pc.all(pc.equal(pc.fill_null(pc.list_value_length(column), -1), width)).as_py():
            raise NoReceiptsError(f"a receipt has not {width} {name}: the table decisions is damaged")
        out: npt.NDArray[np.generic] = column.flatten().to_numpy().reshape(-1, width)
        return out

    marks = pc.binary_join(receipts["degraded"].combine_chunks(), " ")
    stale = pc.match_substring(marks, Degraded.STALE_FEATURES.value).to_numpy(zero_copy_only=False)
    return Logged(
        silver=silver,
        has_receipt=spread(np.ones(len(found), bool), False).astype(bool),
        features=spread(lists("features", len(FEATURES)), np.nan).astype(np.float32),
        seq=spread(lists("observed_seq", len(ENTITIES)), -1).astype(np.int64),
        label_changes=spread(lists("label_changes", len(LABELLED)), -1).astype(np.int64),
        stale=spread(stale, False).astype(bool),
        received_ms=spread(receipts["received_at_ms"].to_numpy(), 0).astype(np.int64),
        complete=from_ms is None,
    )


def _label_changes(settings: Settings, silver: pa.Table) -> tuple[Int64s, Int64s]:
    """Rows of `silver` whose label changed something, and the changes, in the order in which they were applied."""
    changes = read_table(settings, tables.LABEL_CHANGES, ["transaction_id", "change", "batch_id", "place"])
    none = np.zeros(0, np.int64)
    if changes is None or not changes.num_rows:
        return none, none
    changes = changes.filter(pc.not_equal(changes["change"], 0)).sort_by([("batch_id", "ascending"), ("place", "ascending")])
    row = pc.fill_null(pc.index_in(changes["transaction_id"], silver["transaction_id"].combine_chunks()), -1).to_numpy()
    known = row >= 0
    return row[known].astype(np.int64), changes["change"].to_numpy()[known].astype(np.int64)


def _compare(logged: Logged, changes: tuple[Int64s, Int64s], wanted: npt.NDArray[np.bool_]) -> Report:
    history = history_of(logged.silver)
    t_ms = history.request.t_ms
    arrived_ms = logged.silver["kafka_timestamp"].cast(pa.timestamp("ms")).to_numpy().astype("datetime64[ms]").astype(np.int64)
    rows = len(t_ms)
    scored_by = pc.fill_null(pc.equal(logged.silver["scored_by"], SCORED_NEVER.decode()), False)
    history_rows = scored_by.to_numpy(zero_copy_only=False) & ~logged.has_receipt
    unverifiable, late = np.zeros(rows, bool), np.zeros(rows, bool)
    applied = {i: logged.label_changes[:, k] for k, i in enumerate(LABELLED)}
    entities: list[EntityColumns] = []
    labels: list[LabelChanges | None] = []
    dirty: list[npt.NDArray[np.bool_]] = []
    for i, (entity, columns) in enumerate(zip(ENTITIES, history.entities, strict=True)):
        capacity = entity.head_events_max
        order = _Order(
            columns.code, t_ms, logged.seq[:, i], history_rows, arrived_ms, logged.received_ms, logged.complete, capacity
        )
        unverifiable |= order.unverifiable
        late |= order.late
        entities.append(replace(columns, code=order.code, seq=order.rank))
        mine, disordered = None, order.dirty()
        if i in applied:
            mine, unsteady = _applied(order, applied[i], *changes)
            disordered |= unsteady
        labels.append(mine)
        dirty.append(disordered)
    everything = History(history.request, tuple(entities), tuple(labels))
    recomputed = offline_features(everything)
    missing = wanted & (logged.seq.max(axis=1) < 0)
    stale = wanted & ~missing & logged.stale
    unsure = wanted & ~missing & ~stale & unverifiable
    compared = wanted & ~missing & ~stale & ~unsure
    recounted, nobody = 0, np.zeros(rows, np.int64)
    for i, entity in enumerate(ENTITIES):
        again = np.flatnonzero(compared & dirty[i])
        if len(again):
            own = [k for k, f in enumerate(FEATURES) if f.entity == entity.name]
            recomputed[again[:, None], own] = Recount(everything, i, applied.get(i, nobody)).features(again)[:, own]
            recounted += len(again)
    at = np.flatnonzero(compared)
    logged_values, found = logged.features[at], recomputed[at]
    # The same bits, or both unknown.
    same = (logged_values.view(np.uint32) == found.view(np.uint32)) | (logged_values == found)
    same |= np.isnan(logged_values) & np.isnan(found)
    ids = logged.silver["transaction_id"]
    examples = [
        Difference(ids[int(at[r])].as_py(), FEATURE_NAMES[k], float(logged_values[r, k]), float(found[r, k]))
        for r, k in np.argwhere(~same)[:DIFFERENCES_SHOWN_MAX].tolist()
    ]
    equal = same.sum(axis=0).tolist()
    return Report(
        receipts=int(wanted.sum()),
        rows=len(at),
        equal=dict(zip(FEATURE_NAMES, equal, strict=True)),
        different=dict(zip(FEATURE_NAMES, (len(at) - np.array(equal)).tolist(), strict=True)),
        missing_rows=int(missing.sum()),
        stale_rows=int(stale.sum()),
        late_rows=int((late & compared).sum()),
        unverifiable_rows=int(unsure.sum()),
        recounted=recounted,
        examples=examples,
    )


class _Order:
    """In which order the payments of one entity's ids were observed. All arrays are (rows,).

    `rank` numbers the observed ones of an id from 0; payments that no gateway observed (history) come before all, with negative
    numbers: they count from tiles only. `code` is -1 for a payment that is neither observed nor history: nobody counts it yet.
    `head_events_max` is how many of the last observed a head counts.
    """

    def __init__(
        self,
        code: Int64s,
        t_ms: Int64s,
        seq: Int64s,
        history: npt.NDArray[np.bool_],
        arrived_ms: Int64s,
        received_ms: Int64s,
        complete: bool,
        head_events_max: int,
    ) -> None:
        self._complete = complete
        self._head_events_max = head_events_max
        rows = len(code)
        seq, unsure = _with_late_observations(code, seq, received_ms, complete, head_events_max)
        observed = (code >= 0) & (seq >= 0)
        self.history = (code >= 0) & history
        self.code = np.where(observed | self.history, code, -1)
        self.t_ms = t_ms
        self.rank = np.full(rows, -1, np.int64)
        self.unverifiable = unsure
        self.late = np.zeros(rows, bool)
        in_order = np.lexsort((seq, code))
        in_order = in_order[observed[in_order]]
        self.in_order = in_order
        if len(in_order):
            self._number(code[in_order], seq[in_order])
        self._place_history(arrived_ms, received_ms)

    def _number(self, code: Int64s, seq: Int64s) -> None:
        in_order, n = self.in_order, len(self.in_order)
        first = np.ones(n, bool)
        first[1:] = code[1:] != code[:-1]
        starts = np.flatnonzero(first)
        group = starts[np.cumsum(first) - 1]
        self.rank[in_order] = np.arange(n) - group
        step = np.diff(seq, prepend=seq[0])
        born = first | (step > LIFE_GAP)
        gap = np.where(born, self._complete & (seq % BASE_STEP != 0), step != 1)
        # Everything behind a gap of the same id rests on an event that nobody can see.
        self.unverifiable[in_order] |= np.maximum.accumulate(np.where(gap, np.arange(n), -1)) >= group
        newest = _running_max(self.t_ms[in_order], starts)
        self.late[in_order] = newest - self.t_ms[in_order] > SETTLE_MS

    def _place_history(self, arrived_ms: Int64s, received_ms: Int64s) -> None:
        """Number history before everything observed; what was decided while it may still have been on its way can't be verified."""
        old = np.flatnonzero(self.history)
        if not len(old):
            return
        old = old[np.lexsort((self.t_ms[old], self.code[old]))]
        code = self.code[old]
        last = np.append(np.flatnonzero(np.diff(code)), len(old) - 1)
        end = last[np.searchsorted(last, np.arange(len(old)))]
        self.rank[old] = np.arange(len(old)) - end - 1
        newest_arrival = np.full(int(self.code.max()) + 1, -(2**62), np.int64)
        np.maximum.at(newest_arrival, code, arrived_ms[old])
        seen = self.in_order
        self.unverifiable[seen] |= newest_arrival[self.code[seen]] > received_ms[seen] - HISTORY_SETTLED_MS

    def dirty(self) -> npt.NDArray[np.bool_]:
        """Rows whose past in order of event time isn't their past in order of observation, or holds history where heads count."""
        head_events_max = self._head_events_max
        out = np.zeros(len(self.code), bool)
        order = np.lexsort((self.rank, self.t_ms, self.code))
        order = order[self.code[order] >= 0]
        if not len(order):
            return out
        code, rank, t_ms = self.code[order], self.rank[order], self.t_ms[order]
        starts = np.flatnonzero(np.diff(code, prepend=-1))
        group = starts[np.cumsum(np.isin(np.arange(len(order)), starts)) - 1]
        place = np.arange(len(order)) - group
        # The lowest number of an id is that of its first history, or 0.
        least = np.minimum.reduceat(rank, starts)[np.searchsorted(starts, group)]
        highest = _running_max(rank, starts)
        disordered = (place != rank - least) | (highest != rank)
        here = np.arange(len(order))
        turn = np.minimum(boundary(t_ms), t_ms - EXACT_WINDOW_MS_MAX)
        # Where heads reach their bound, the newest observed needn't be the newest in time.
        nth = np.maximum(group, here - head_events_max)
        bound = (place >= head_events_max) & (t_ms[nth] >= turn)
        bound &= np.maximum.accumulate(np.where(disordered, here, -1)) >= nth
        before = np.maximum(here - 1, group)
        bound |= rank[before] < rank - head_events_max
        # One that came with a time ahead of the clock is among the newest in time, within what only heads count, and has left the head.
        bound |= _least_within(np.maximum(nth, _first_from(t_ms, turn, starts)), here, rank) < rank - head_events_max
        last_history = np.maximum.accumulate(np.where(rank < 0, here, -1))
        near = (last_history >= group) & (rank >= 0) & ((t_ms[last_history] >= turn) | (last_history == here - 1))
        out[order] = disordered | bound | near
        return out


def _with_late_observations(
    code: Int64s, seq: Int64s, received_ms: Int64s, complete: bool, head_events_max: int
) -> tuple[Int64s, npt.NDArray[np.bool_]]:
    """`seq` with the places of payments that were decided without Redis and observed afterwards, and which rows can't be told.

    Their receipts couldn't say where. What is missing between the places of an id must be theirs. Which place is whose doesn't matter
    to a row before which none of them, or every one received so far, has been observed, and whose head holds all or none of those that
    may have each other's: side by side, or the later had been received when the earlier was observed, for each process observes
    its own. The others can't be verified.
    """
    unsure = np.zeros(len(code), bool)
    unplaced = np.flatnonzero((code >= 0) & (seq < 0) & (received_ms > 0))
    if not len(unplaced):
        return seq, unsure
    waiting: dict[int, list[int]] = defaultdict(list)
    for row in unplaced[np.argsort(received_ms[unplaced], kind="stable")].tolist():
        waiting[int(code[row])].append(row)
    filled = seq.copy()
    order = np.flatnonzero((code >= 0) & (seq >= 0) & np.isin(code, list(waiting)))
    order = order[np.lexsort((seq[order], code[order]))]
    last, places, arrivals = -1, 0, np.zeros(0, np.int64)
    # First and last place of those of the id that may have each other's, and when the last of them had been observed.
    together: list[tuple[int, int]] = []
    passed_ms = 0
    for row in order.tolist():
        mine = waiting[int(code[row])]
        same = last >= 0 and code[last] == code[row]
        if not same:
            places, arrivals, together = 0, received_ms[mine], []
        joined = same and seq[row] - seq[last] <= LIFE_GAP
        # The first place of a life; unknown where older receipts weren't read.
        born = int(seq[row]) - int(seq[row]) % BASE_STEP if complete else int(seq[row])
        begin = int(seq[last]) + 1 if joined else born
        if not joined:
            # A head is born here. What waited before was observed last in an older life, or stood in the tiles when it was restored.
            older = int(np.searchsorted(arrivals, begin // 1000 - OVERLAP_MS))
            for place in range(begin - older + places, begin):
                filled[mine[places]] = place
                places += 1
        end = min(int(seq[row]), begin + len(mine) - places)
        for place in range(begin, end):
            payment = mine[places]
            if together and (place > begin or received_ms[payment] <= passed_ms + OVERLAP_MS):
                together[-1] = (together[-1][0], place)
            else:
                together.append((place, place))
            filled[payment] = place
            places += 1
        if end > begin:
            passed_ms = int(received_ms[row])
        so_far = int(np.searchsorted(arrivals, received_ms[row] + OVERLAP_MS, side="right"))
        oldest = int(seq[row]) - head_events_max
        unsure[row] = places not in (0, so_far) or any(first < oldest <= final for first, final in together)
        last = row
    return filled, unsure


def _first_from(values: Int64s, least: Int64s, starts: Int64s) -> Int64s:
    """For each row the first one of its run whose value is at least the row's `least`; `values` rise within each run."""
    low = min(int(values.min()), int(least.min()))
    span = max(int(values.max()), int(least.max())) - low + 1
    run = np.cumsum(np.isin(np.arange(len(values)), starts)) - 1
    found: Int64s = np.searchsorted(values - low + run * span, least - low + run * span)
    return found


def _least_within(first: Int64s, end: Int64s, values: Int64s) -> Int64s:
    """The least of values[first:end] for each pair; where that is empty, a number that none is above."""
    out = np.full(len(first), np.iinfo(np.int64).max)
    length = end - first
    level, least = 0, values
    while True:
        # `least` is over 2 ** level values from each on; two such stretches cover any that is up to twice as long.
        chosen = (length >= 1 << level) & (length < 2 << level)
        out[chosen] = np.minimum(least[first[chosen]], least[end[chosen] - (1 << level)])
        if (2 << level) > len(values):
            return out
        least = np.minimum(least[: -(1 << level)], least[1 << level :])
        level += 1


def _running_max(values: Int64s, starts: Int64s) -> Int64s:
    """The largest so far within each run that begins at one of `starts`."""
    least, span = int(values.min()), int(values.max()) - int(values.min()) + 1
    run = np.cumsum(np.isin(np.arange(len(values)), starts)) - 1
    out: Int64s = np.maximum.accumulate(values - least + run * span) - run * span + least
    return out


def _applied(order: _Order, applied: Int64s, payments: Int64s, changes: Int64s) -> tuple[LabelChanges, npt.NDArray[np.bool_]]:
    """Label changes numbered by id as they were applied; a row counts the first `applied` of its id.

    Also rows whose count is lower than that of a row before them in time, which the offline engine can't follow.
    """
    code = order.code
    known = payments[code[payments] >= 0]
    change = changes[code[payments] >= 0]
    by_id = np.argsort(code[known], kind="stable")
    number = np.empty(len(known), np.int64)
    if len(known):
        sorted_code = code[known][by_id]
        starts = np.flatnonzero(np.diff(sorted_code, prepend=-1))
        number[by_id] = np.arange(len(known)) - starts[np.cumsum(np.isin(np.arange(len(known)), starts)) - 1]
    as_of = applied - 1
    unsteady = np.zeros(len(code), bool)
    in_time = np.lexsort((order.rank, order.t_ms, code))
    in_time = in_time[code[in_time] >= 0]
    if len(in_time):
        starts = np.flatnonzero(np.diff(code[in_time], prepend=-1))
        highest = _running_max(as_of[in_time], starts)
        unsteady[in_time] = highest != as_of[in_time]
        as_of = as_of.copy()
        as_of[in_time] = highest
    return LabelChanges(known, change, number, as_of), unsteady


assert BOUNDARY_MS >= EXACT_WINDOW_MS_MAX
