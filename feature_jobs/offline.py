"""The offline engine: every feature of every transaction of the past, as if each had been observed in order of event time.

Same semantics as `contracts.windows.aggregate`, other means: the transactions of one entity lie next to each other in time, so a
window is a range of places; sums are differences of running sums, maxima and sketches come from sparse tables. Used by the training
set, the backfill and the parity check. About 5 microseconds a row and entity; memory is bounded by CHUNK_ROWS, but for the columns
and the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.features import (
    AGGREGATES,
    ENTITIES,
    FEATURES,
    FRAUD_RUN_AGGREGATES,
    LABEL_AGGREGATES,
    REQUEST_FEATURES,
    Entity,
    Feature,
    Floats,
    RequestColumns,
)
from gateway.contracts.windows import (
    DAY_MS,
    HOUR_MS,
    LABEL_WINDOWS,
    LAST_MS_MAX,
    NEVER,
    PAIR_WINDOW,
    SEEN_HASH_MASK,
    SKETCH_BITS,
    SQUARED_AMOUNT_MINOR_MAX,
    WINDOWS,
    Aggregates,
    Window,
    boundary,
    fraud_end,
    payments_end,
    tail,
)

Int64s = npt.NDArray[np.int64]

CHUNK_ROWS = 200_000
_OF_FIRST_FRAUD = FRAUD_RUN_AGGREGATES | {"since_first_fraud", "since_last_fraud", "rate_since_fraud"}


@dataclass(frozen=True)
class EntityColumns:
    """One entity of each transaction, (rows,): `code` numbers its ids from 0 (-1: not named), `dim_*` are dim_hash's.

    `seq` orders what has the same event time; without it, the order of the rows does.
    """

    code: Int64s
    dim_a: npt.NDArray[np.uint16]
    dim_b: npt.NDArray[np.uint16]
    dim_c: npt.NDArray[np.uint16]
    seq: Int64s | None = None


@dataclass(frozen=True)
class LabelChanges:
    """What labels changed, (changes,) each: the row of the payment, +1 for fraud and -1 for fraud taken back, and since when.

    A row counts the changes whose `known` is not greater than its own `as_of`, (rows,), which must not fall along an entity's rows.
    By default `known` is the time at which the label was reported and `as_of` the row's event time.
    """

    row: Int64s
    change: Int64s
    known: Int64s
    as_of: Int64s | None = None


@dataclass(frozen=True)
class History:
    """Transactions sorted by (event_time_ms, transaction_id), (rows,) each; `entities` and `labels` by the definition's entities."""

    request: RequestColumns
    entities: tuple[EntityColumns, ...]
    labels: tuple[LabelChanges | None, ...] = ()


@dataclass(frozen=True)
class Definition:
    """What to compute, in the language of contracts.features: by default the features that the model sees."""

    features: tuple[Feature, ...] = FEATURES
    entities: tuple[Entity, ...] = ENTITIES
    windows: tuple[Window, ...] = WINDOWS
    label_windows: tuple[Window, ...] = LABEL_WINDOWS
    aggregates: tuple[tuple[str, Callable[[Aggregates, int | slice, RequestColumns], Floats]], ...] = tuple(AGGREGATES.items())

    def window_index(self, feature: Feature) -> int:
        windows = self.label_windows if feature.aggregate in LABEL_AGGREGATES else self.windows
        return next((i for i, w in enumerate(windows) if w.name == feature.window), 0)


PRODUCT = Definition()


def offline_features(history: History, definition: Definition = PRODUCT, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """The feature matrix, (rows, len(definition.features)), in the order of `history`; in single precision, as the model sees it."""
    rows = len(history.request.t_ms)
    aggregates = dict(definition.aggregates)
    out = np.full((rows, len(definition.features)), np.nan, dtype)
    for i, f in enumerate(definition.features):
        if f.entity is None:
            out[:, i] = REQUEST_FEATURES[f.aggregate](history.request)
    labels = history.labels or (None,) * len(definition.entities)
    for entity, columns, changes in zip(definition.entities, history.entities, labels, strict=True):
        mine = [(i, f) for i, f in enumerate(definition.features) if f.entity == entity.name]
        for place in _chunks(columns, history.request.t_ms):
            request = take(history.request, place)
            found = _Chunk(definition, entity, columns, changes, request, place).aggregates()
            for i, f in mine:
                out[place, i] = aggregates[f.aggregate](found, definition.window_index(f), request)
    return out


def _chunks(columns: EntityColumns, t_ms: Int64s) -> Iterator[Int64s]:
    """Rows that name the entity, those of one id together and in order, about CHUNK_ROWS at a time."""
    code = columns.code
    order = np.argsort(code, kind="stable") if columns.seq is None else np.lexsort((columns.seq, t_ms, code))
    order = order[code[order] >= 0]
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    first = 0
    while first < len(order):
        later = starts[starts >= first + CHUNK_ROWS]
        stop = int(later[0]) if len(later) else len(order)
        yield order[first:stop]
        first = stop


def take(r: RequestColumns, place: Int64s) -> RequestColumns:
    """The rows at `place`."""
    return RequestColumns(*(getattr(r, f.name)[place] for f in fields(RequestColumns)))


class _Chunk:
    """The rows of some ids of one entity, sorted by id and time. `rank` numbers the ids, `here` the rows."""

    def __init__(
        self,
        definition: Definition,
        entity: Entity,
        columns: EntityColumns,
        changes: LabelChanges | None,
        request: RequestColumns,
        place: Int64s,
    ) -> None:
        self.definition, self.entity, self.columns, self.changes = definition, entity, columns, changes
        self.request, self.place, self.t_ms = request, place, request.t_ms
        n = len(place)
        code = columns.code[place]
        self.here = np.arange(n)
        starts = np.flatnonzero(np.diff(code, prepend=code[0] - 1))
        self.rank = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, n)))
        # The first row of each row's id.
        self.group = starts[self.rank]
        self.base = int(self.t_ms.min())
        # Any time of a window, but for one older than all, lies between 0 and span behind base.
        self.span = int(self.t_ms.max()) - self.base + 2
        self.keys = self.rank * self.span + (self.t_ms - self.base)
        self.edge = self.place_of(boundary(self.t_ms))
        # The first of the newest that a head counts.
        self.oldest = np.maximum(self.group, self.here - entity.head_events_max)

    def place_of(self, time_ms: Int64s) -> Int64s:
        """The first place of the row's id with an event at or after `time_ms`, no later than the row's own."""
        found = np.searchsorted(self.keys, self.rank * self.span + np.maximum(time_ms - self.base, 0), side="left")
        out: Int64s = np.minimum(found, self.here)
        return out

    def places_of(self, rows: Int64s, time_ms: Int64s) -> Int64s:
        """`place_of` for some rows, `time_ms` (rows,)."""
        found = np.searchsorted(self.keys, self.rank[rows] * self.span + np.maximum(time_ms - self.base, 0), side="left")
        out: Int64s = np.minimum(found, rows)
        return out

    def aggregates(self) -> Aggregates:
        windows, n = self.definition.windows, len(self.here)
        amount = self.request.amount_minor
        capped = np.minimum(amount, SQUARED_AMOUNT_MINOR_MAX)
        totals = [_running(amount), _running(capped * capped)]
        one, bits = np.uint64(1), np.uint64(SKETCH_BITS - 1)
        largest = _SparseTable(amount, np.maximum, -1)
        dims = [d[self.place] for d in (self.columns.dim_a, self.columns.dim_b, self.columns.dim_c)]
        sketches = [_SparseTable(one << (d.astype(np.uint64) & bits), np.bitwise_or, 0) for d in dims]
        shape = (len(windows), n)
        result = Aggregates(
            count=np.zeros(shape, np.int64),
            total=np.zeros(shape, np.int64),
            squares=np.zeros(shape, np.int64),
            largest=np.full(shape, -1, np.int64),
            distinct_a=np.zeros(shape, np.uint64),
            distinct_b=np.zeros(shape, np.uint64),
            distinct_c=np.zeros(shape, np.uint64),
            last_event_time_ms=np.full(n, NEVER, np.int64),
            last_latitude=np.full(n, np.nan),
            last_longitude=np.full(n, np.nan),
            last_dim_b=np.full(n, np.nan),
            new_a=self._new(dims[0]) if self.entity.pairs else np.ones(n, bool),
            new_c=self._new(dims[2]) if self.entity.pairs else np.ones(n, bool),
            label_count=np.zeros((len(self.definition.label_windows), n), np.int64),
            label_frauds=np.zeros((len(self.definition.label_windows), n), np.int64),
            first_fraud_ms=np.full(n, NEVER, np.int64),
            last_fraud_ms=np.full(n, NEVER, np.int64),
            payments_since_fraud=np.zeros(n, np.int64),
            fraud_run=np.zeros(n, np.int64),
            run_day_ms=np.full(n, NEVER, np.int64),
            genuine_day_ms=np.full(n, NEVER, np.int64),
            payments_after_fraud=np.zeros(n, np.int64),
        )
        for i, window in enumerate(windows):
            for a, b in self._ranges(window):
                result.count[i] += b - a
                result.total[i] += totals[0][b] - totals[0][a]
                result.squares[i] += totals[1][b] - totals[1][a]
                result.largest[i] = np.maximum(result.largest[i], largest.over(a, b))
                for bitmaps, sketch in zip((result.distinct_a, result.distinct_b, result.distinct_c), sketches, strict=True):
                    bitmaps[i] |= sketch.over(a, b)
        has = self.here > self.group
        has[has] = self.t_ms[self.here[has] - 1] >= self.t_ms[has] - LAST_MS_MAX
        before = self.here[has] - 1
        result.last_event_time_ms[has] = self.t_ms[before]
        # A head holds single precision.
        result.last_latitude[has] = self.request.latitude[before].astype(np.float32)
        result.last_longitude[has] = self.request.longitude[before].astype(np.float32)
        result.last_dim_b[has] = dims[1][before]
        if self.entity.labelled:
            self._labels(result)
        return result

    def _ranges(self, window: Window) -> tuple[tuple[Int64s, Int64s], tuple[Int64s, Int64s]]:
        """Places [first, end) of each row's window: before the boundary, and at or after it among the newest that a head counts."""
        first = self.place_of(tail(self.t_ms, window))
        if window.tail_ms == 0:
            return (self.here, self.here), (np.maximum(first, self.oldest), self.here)
        turn = np.maximum(self.edge, first)
        return (first, turn), (np.maximum(turn, self.oldest), self.here)

    def _new(self, dim: npt.NDArray[np.uint16]) -> npt.NDArray[np.bool_]:
        """True where the row's own value of `dim` doesn't stand in its pair window."""
        n = len(self.here)
        own = (self.rank * (SEEN_HASH_MASK + 1) + (dim.astype(np.int64) & SEEN_HASH_MASK)) * (n + 1)
        places = np.sort(own + self.here)

        def newest_before(limit: Int64s) -> Int64s:
            """The last place before `limit` with the row's value, -1 where there is none."""
            at = np.searchsorted(places, own + limit) - 1
            return np.where((at >= 0) & (places[at] >= own), places[at] - own, -1)

        (first, turn), (newest, _) = self._ranges(PAIR_WINDOW)
        seen: npt.NDArray[np.bool_] = (newest_before(turn) >= first) | (newest_before(self.here) >= newest)
        return ~seen

    def _labels(self, result: Aggregates) -> None:
        """Fill in the label windows. A change counts for the rows of one range of places: from when it is known and its payment has
        come into the window, until that has left it."""
        changes = self._own_changes()
        counted: tuple[Int64s, Int64s, Int64s, Int64s] | None = None
        for i, window in enumerate(self.definition.label_windows):
            first, stop = self.place_of(tail(self.t_ms, window)), self.place_of(fraud_end(self.t_ms, window))
            result.label_count[i] = self.place_of(payments_end(self.t_ms, window)) - first
            if changes is None:
                continue
            payment, change, known = changes
            # The places whose range [first, stop) holds the payment are a range themselves, since both rise with the place.
            rank, n = self.rank[payment], len(self.here)
            from_stop = np.searchsorted(self.rank * (n + 1) + stop, rank * (n + 1) + payment, side="right")
            to_first = np.searchsorted(self.rank * (n + 1) + first, rank * (n + 1) + payment, side="right")
            difference = np.zeros(n + 1, np.int64)
            begin = np.maximum(from_stop, known)
            counts = begin < to_first
            counted = payment[counts], change[counts], begin[counts], to_first[counts]
            np.add.at(difference, counted[2], counted[1])
            np.add.at(difference, counted[3], -counted[1])
            result.label_frauds[i] = np.cumsum(difference[:-1])
        if counted is not None and changes is not None and any(f.aggregate in _OF_FIRST_FRAUD for f in self.definition.features):
            self._first_and_last_fraud(result, *counted)
            if any(f.aggregate in FRAUD_RUN_AGGREGATES for f in self.definition.features):
                self._fraud_runs(result, changes)

    def _first_and_last_fraud(self, result: Aggregates, payment: Int64s, change: Int64s, begin: Int64s, end: Int64s) -> None:
        """Of the last of the label windows, from the changes that count in it: each for the rows [begin, end)."""
        hour = self.t_ms[payment] // HOUR_MS * HOUR_MS
        # The changes of a payment in the order in which they became known, payments in order of time within an id.
        order = np.lexsort((begin, payment))
        spans: list[tuple[int, int, int]] = []
        open_since: dict[int, int] = {}
        for i in order.tolist():
            p = int(payment[i])
            if change[i] > 0:
                open_since[p] = int(begin[i])
                spans.append((int(hour[i]), int(begin[i]), int(end[i])))
            elif p in open_since:
                at_ms, since, _ = spans.pop()
                del open_since[p]
                if since < begin[i]:
                    spans.append((at_ms, since, int(begin[i])))
        for at_ms, since, until in spans:
            result.last_fraud_ms[since:until] = at_ms
        for at_ms, since, until in reversed(spans):
            result.first_fraud_ms[since:until] = at_ms
        known = result.first_fraud_ms != NEVER
        first_day = np.where(known, result.first_fraud_ms // DAY_MS * DAY_MS, self.t_ms)
        longest = self.definition.label_windows[-1]
        since_first = self.place_of(payments_end(self.t_ms, longest)) - self.place_of(first_day)
        result.payments_since_fraud[:] = np.where(known, since_first, 0)

    def _fraud_runs(self, result: Aggregates, changes: tuple[Int64s, Int64s, Int64s]) -> None:
        """Day by day back from the one in which the delay ends, for the rows that know of a fraud; most meet a genuine payment soon."""
        longest = self.definition.label_windows[-1]
        rows = np.flatnonzero(result.first_fraud_ms != NEVER)
        day_ms = self.t_ms[rows] - longest.delay_ms
        day_ms -= day_ms % DAY_MS
        last_ms = result.last_fraud_ms[rows]
        after = self.places_of(rows, day_ms) - self.places_of(rows, last_ms - last_ms % DAY_MS + DAY_MS)
        result.payments_after_fraud[rows] = np.maximum(after, 0)
        stop = self.places_of(rows, fraud_end(self.t_ms[rows], longest))
        whole = False
        for _ in range(longest.length_ms // DAY_MS + 1):
            if not len(rows):
                return
            first = self.places_of(rows, day_ms)
            frauds = self._frauds_of(rows, first, stop, changes)
            met = whole & (stop - first > frauds)
            result.genuine_day_ms[rows[met]] = day_ms[met]
            found = ~met & (frauds > 0)
            result.run_day_ms[rows[found]] = day_ms[found]
            result.fraud_run[rows[found]] += frauds[found]
            rows, stop, day_ms, whole = rows[~met], first[~met], day_ms[~met] - DAY_MS, True

    def _frauds_of(self, rows: Int64s, first: Int64s, stop: Int64s, changes: tuple[Int64s, Int64s, Int64s]) -> Int64s:
        """For each of `rows`, which rise, the frauds it knows of among the payments at places [first, stop) of its id."""
        payment, change, known = changes
        rank, n = self.rank[rows], len(self.here)
        at = self.rank[payment] * (n + 1) + payment
        begin = np.maximum(np.searchsorted(rank * (n + 1) + stop, at, side="right"), np.searchsorted(rows, known))
        end = np.searchsorted(rank * (n + 1) + first, at, side="right")
        counts = begin < end
        difference = np.zeros(len(rows) + 1, np.int64)
        np.add.at(difference, begin[counts], change[counts])
        np.add.at(difference, end[counts], -change[counts])
        out: Int64s = np.cumsum(difference[:-1])
        return out

    def _own_changes(self) -> tuple[Int64s, Int64s, Int64s] | None:
        """Of each change to a payment of this chunk: the payment's place, the change, and the first place of its id that knows it."""
        if self.changes is None or not len(self.changes.row):
            return None
        rows = len(self.columns.code)
        where = np.full(rows, -1, np.int64)
        where[self.place] = self.here
        mine = np.flatnonzero(where[self.changes.row] >= 0)
        payment = where[self.changes.row[mine]]
        as_of = self.t_ms if self.changes.as_of is None else self.changes.as_of[self.place]
        known = self.changes.known[mine]
        least = min(int(as_of.min()), int(known.min(initial=0)))
        span = max(int(as_of.max()), int(known.max(initial=0))) - least + 2
        first = np.searchsorted(self.rank * span + (as_of - least), self.rank[payment] * span + (known - least), side="left")
        return payment, self.changes.change[mine], first


def _running(values: Int64s) -> Int64s:
    """Sums of the first 0, 1, 2 ... values."""
    out = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=out[1:])
    return out


class _SparseTable:
    """Range queries of an idempotent operation: level k holds the operation over runs of 2**k values."""

    def __init__(self, values: npt.NDArray, ufunc: np.ufunc, empty: int) -> None:  # type: ignore[type-arg]
        self._ufunc, self._empty = ufunc, empty
        self._levels = [values]
        while 2 ** len(self._levels) <= len(values):
            last, half = self._levels[-1], 2 ** (len(self._levels) - 1)
            self._levels.append(ufunc(last[:-half], last[half:]))

    def over(self, first: Int64s, end: Int64s) -> npt.NDArray:  # type: ignore[type-arg]
        """The operation over values[first:end], `empty` where that is nothing."""
        length = end - first
        out = np.full(len(first), self._empty, self._levels[0].dtype)
        level = np.frexp(length)[1] - 1
        for k in np.unique(level[length > 0]):
            at = np.flatnonzero((level == k) & (length > 0))
            values = self._levels[k]
            out[at] = self._ufunc(values[first[at]], values[end[at] - 2**k])
        return out
