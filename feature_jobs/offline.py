"""The offline engine: every feature of every transaction of the past, as if each had been observed in order of event time.

Same semantics as `contracts.windows.aggregate`, other means: the transactions of one entity lie next to each other in time, so a
window is a range of places; sums are differences of running sums, maxima and sketches come from sparse tables. Used by the training
set. About 5 microseconds a row and entity; memory is bounded by CHUNK_ROWS, but for the columns and the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.features import (
    AGGREGATES,
    ENTITIES,
    FEATURES,
    REQUEST_FEATURES,
    Entity,
    RequestColumns,
)
from gateway.contracts.windows import (
    NEVER,
    SKETCH_BITS,
    SQUARED_AMOUNT_MINOR_MAX,
    WINDOW_INDEX,
    WINDOWS,
    Aggregates,
    boundary,
    tail,
)

Int64s = npt.NDArray[np.int64]

CHUNK_ROWS = 200_000


@dataclass(frozen=True)
class EntityColumns:
    """One entity of each transaction, (rows,): `code` numbers its ids from 0 (-1: not named), `dim_a` and `dim_b` are dim_hash's."""

    code: Int64s
    dim_a: npt.NDArray[np.uint32]
    dim_b: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class History:
    """Transactions sorted by (event_time_ms, transaction_id), (rows,) each; `entities` by contracts.features.ENTITIES."""

    request: RequestColumns
    entities: tuple[EntityColumns, ...]


@dataclass(frozen=True)
class _Ranges:
    """Places [first, end) of each row's window: before the boundary, and at or after it among the newest a head counts."""

    tiled: tuple[Int64s, Int64s]
    head: tuple[Int64s, Int64s]


def offline_features(history: History) -> npt.NDArray[np.float32]:
    """The feature matrix, (rows, len(FEATURES)), in the order of `history`."""
    rows = len(history.request.t_ms)
    out = np.full((rows, len(FEATURES)), np.nan, np.float32)
    for i, f in enumerate(FEATURES):
        if f.entity is None:
            out[:, i] = REQUEST_FEATURES[f.aggregate](history.request)
    for entity, columns in zip(ENTITIES, history.entities, strict=True):
        mine = [(i, f) for i, f in enumerate(FEATURES) if f.entity == entity.name]
        for place in _chunks(columns.code):
            request = _take(history.request, place)
            aggregates = _aggregates(entity, columns, request, place)
            for i, f in mine:
                w = 0 if f.window is None else WINDOW_INDEX[f.window]
                out[place, i] = AGGREGATES[f.aggregate](aggregates, w, request)
    return out


def _chunks(code: Int64s) -> Iterator[Int64s]:
    """Rows that name the entity, those of one id together and in order, about CHUNK_ROWS at a time."""
    order = np.argsort(code, kind="stable")
    order = order[code[order] >= 0]
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    first = 0
    while first < len(order):
        later = starts[starts >= first + CHUNK_ROWS]
        end = int(later[0]) if len(later) else len(order)
        yield order[first:end]
        first = end


def _take(r: RequestColumns, place: Int64s) -> RequestColumns:
    return RequestColumns(
        t_ms=r.t_ms[place],
        amount_minor=r.amount_minor[place],
        channel=r.channel[place],
        mcc=r.mcc[place],
        cross_border=r.cross_border[place],
        latitude=r.latitude[place],
        longitude=r.longitude[place],
    )


def _aggregates(entity: Entity, columns: EntityColumns, request: RequestColumns, place: Int64s) -> Aggregates:
    """Aggregates of the rows of one chunk, which are sorted by id and time."""
    code, t_ms, amount = columns.code[place], request.t_ms, request.amount_minor
    n = len(place)
    here = np.arange(n)
    group = np.repeat(starts := np.flatnonzero(np.diff(code, prepend=-1)), np.diff(np.append(starts, n)))
    base = int(t_ms.min()) - 2 * max(w.length_ms for w in WINDOWS)
    span = int(t_ms.max()) - base + 1
    # One sorted key for id and time, so that one search finds the place of a time within an id.
    rank = np.searchsorted(starts, group)
    keys = rank * span + (t_ms - base)

    def place_of(time_ms: Int64s) -> Int64s:
        """The first place of the row's id with an event at or after `time_ms`, no later than the row's own."""
        found = np.searchsorted(keys, rank * span + np.maximum(time_ms - base, 0), side="left")
        return np.minimum(found, here)

    edge = place_of(boundary(t_ms))
    oldest = np.maximum(group, here - entity.head_events_max)
    capped = np.minimum(amount, SQUARED_AMOUNT_MINOR_MAX)
    totals = [_running(amount), _running(capped * capped)]
    one, bits = np.uint64(1), np.uint64(SKETCH_BITS - 1)
    largest = _SparseTable(amount, np.maximum, -1)
    sketches = [_SparseTable(one << (d[place].astype(np.uint64) & bits), np.bitwise_or, 0) for d in (columns.dim_a, columns.dim_b)]
    shape = (len(WINDOWS), n)
    result = Aggregates(
        count=np.zeros(shape, np.int64),
        total=np.zeros(shape, np.int64),
        squares=np.zeros(shape, np.int64),
        largest=np.full(shape, -1, np.int64),
        distinct_a=np.zeros(shape, np.uint64),
        distinct_b=np.zeros(shape, np.uint64),
        last_event_time_ms=np.full(n, NEVER, np.int64),
        last_latitude=np.full(n, np.nan),
        last_longitude=np.full(n, np.nan),
    )
    for i, window in enumerate(WINDOWS):
        first = place_of(tail(t_ms, window))
        if window.tail_ms == 0:
            ranges = _Ranges((here, here), (np.maximum(first, oldest), here))
        else:
            ranges = _Ranges((first, np.maximum(edge, first)), (np.maximum(np.maximum(edge, first), oldest), here))
        for a, b in (ranges.tiled, ranges.head):
            result.count[i] += b - a
            result.total[i] += totals[0][b] - totals[0][a]
            result.squares[i] += totals[1][b] - totals[1][a]
            result.largest[i] = np.maximum(result.largest[i], largest.over(a, b))
            result.distinct_a[i] |= sketches[0].over(a, b)
            result.distinct_b[i] |= sketches[1].over(a, b)
    has = here > group
    before = here[has] - 1
    result.last_event_time_ms[has] = t_ms[before]
    # A head holds single precision.
    result.last_latitude[has] = request.latitude[before].astype(np.float32)
    result.last_longitude[has] = request.longitude[before].astype(np.float32)
    return result


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
