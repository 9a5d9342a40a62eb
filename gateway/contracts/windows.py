"""Window arithmetic: pure functions of time over tiles and recent events, shared by gateway, Spark job and offline engine.

Time is integer milliseconds since the epoch. A window of length w at time t covers [tail(t), t): the head is exact to the event,
the tail is rounded down to the window's tile ("sawtooth", as in Chronon). An event at exactly t counts when it was observed before.

Where each event of the past is read from depends on t alone:

    boundary(t) = the newest 5-minute edge at least SETTLE_MS before t
    events at or after boundary(t)        the entity's head: its recent events, one by one
    events before boundary(t)             tiles; an event that the Spark job has not added to its tile yet is still
                                          marked as untiled in the head and is counted from there

so the value is the same however far the Spark job has got, as long as the head could hold what Spark had not yet tiled.

Label windows end LABEL_DELAY_MS before t: labels take days to come, and a newer payment without one is not known to be genuine. Their
older end is a midnight. Frauds count up to the hour in which the delay ends, payments up to the end of that day: how many there were is
known at once, and days are what is held of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.layout import DAY_MIN, DAY_TILE, FINE_TILE, FRAUD_HOUR, HEAD_EVENT, HEAD_TTL_MS, HOUR_MIN

Int64s = npt.NDArray[np.int64]

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

SETTLE_MS = 60_000
TILE_RESOLUTIONS_MS = (5 * MINUTE_MS, HOUR_MS, DAY_MS)
assert TILE_RESOLUTIONS_MS[1:] == (HOUR_MIN * MINUTE_MS, DAY_MIN * MINUTE_MS)
BOUNDARY_MS = TILE_RESOLUTIONS_MS[0]
# Each coarser tile is a whole number of finer ones, so that finer tiles can fill the gap up to the boundary.
assert all(b % a == 0 for a, b in zip(TILE_RESOLUTIONS_MS, TILE_RESOLUTIONS_MS[1:], strict=False))


@dataclass(frozen=True)
class Window:
    """Covers [t - delay - length, t - delay), the older end rounded down to `tail_ms`; for the newer one see `fraud_end`, `payments_end`.

    `tail_ms` 0 keeps the window exact; online that is read from the head alone.
    """

    name: str
    length_ms: int
    tail_ms: int
    delay_ms: int = 0


WINDOWS: tuple[Window, ...] = (
    Window("5m", 5 * MINUTE_MS, 0),
    Window("1h", HOUR_MS, 5 * MINUTE_MS),
    Window("24h", DAY_MS, HOUR_MS),
    Window("7d", 7 * DAY_MS, DAY_MS),
    Window("30d", 30 * DAY_MS, DAY_MS),
)
WINDOW_INDEX: dict[str, int] = {w.name: i for i, w in enumerate(WINDOWS)}
EXACT_WINDOW_MS_MAX = max(w.length_ms for w in WINDOWS if w.tail_ms == 0)
assert all(w.tail_ms in (0, *TILE_RESOLUTIONS_MS) and w.tail_ms <= w.length_ms for w in WINDOWS)
# Windows whose tail is a whole day have no sketches: tiles of a day hold none.
SKETCHED_WINDOWS = frozenset(w.name for w in WINDOWS if w.tail_ms < DAY_MS)
# Over which a card's merchants and devices are remembered.
PAIR_WINDOW = WINDOWS[WINDOW_INDEX["30d"]]

# An entity's last event is known for so long: less than its head lives in Redis.
LAST_MS_MAX = 31 * DAY_MS
assert LAST_MS_MAX < HEAD_TTL_MS

LABEL_DELAY_MS = 7 * DAY_MS
LABEL_WINDOWS: tuple[Window, ...] = (
    Window("1d", DAY_MS, DAY_MS, LABEL_DELAY_MS),
    Window("3d", 3 * DAY_MS, DAY_MS, LABEL_DELAY_MS),
    Window("7d", 7 * DAY_MS, DAY_MS, LABEL_DELAY_MS),
    Window("14d", 14 * DAY_MS, DAY_MS, LABEL_DELAY_MS),
    Window("30d", 30 * DAY_MS, DAY_MS, LABEL_DELAY_MS),
)
LABEL_WINDOW_INDEX: dict[str, int] = {w.name: i for i, w in enumerate(LABEL_WINDOWS)}
assert all(w.tail_ms == DAY_MS and w.delay_ms == LABEL_DELAY_MS and w.length_ms % DAY_MS == 0 for w in LABEL_WINDOWS)
assert all(a.length_ms < b.length_ms for a, b in zip(LABEL_WINDOWS, LABEL_WINDOWS[1:], strict=False)), (
    "the last one holds all others"
)
assert LABEL_DELAY_MS % DAY_MS == 0
# The days that the longest label window touches: the last is the one in which the delay ends, the others are whole.
LABEL_DAYS = LABEL_WINDOWS[-1].length_ms // DAY_MS + 1
# The day in which the delay ends is over and in its tile.
assert LABEL_DELAY_MS >= DAY_MS + SETTLE_MS + BOUNDARY_MS

# How long behind an entity's newest event its data is kept, so that events out of order by up to SLACK_MS still find it.
SLACK_MS = HOUR_MS
HEAD_RETENTION_MS = max(EXACT_WINDOW_MS_MAX, SETTLE_MS + BOUNDARY_MS) + SLACK_MS
TILE_RETENTION_MS: dict[int, int] = {
    5 * MINUTE_MS: 2 * HOUR_MS + SETTLE_MS + BOUNDARY_MS + SLACK_MS,
    HOUR_MS: 2 * DAY_MS + SETTLE_MS + BOUNDARY_MS + SLACK_MS,
    DAY_MS: 31 * DAY_MS + SLACK_MS,
}
LABELLED_RETENTION_MS = LABEL_DELAY_MS + TILE_RETENTION_MS[DAY_MS]
assert set(TILE_RETENTION_MS) == set(TILE_RESOLUTIONS_MS)
SEEN_RETENTION_MS = TILE_RETENTION_MS[DAY_MS]
# What came within so much wall-clock time is kept whatever its event time: a reader may lag behind, or a replay run ahead.
RETENTION_REAL_MIN = 10

# The amount that enters a sum of squares, so that 92,000 largest payments fit in 64 bits.
SQUARED_AMOUNT_MINOR_MAX = 10_000_000
assert SQUARED_AMOUNT_MINOR_MAX**2 * 92_000 < 2**63

SKETCH_BITS = 64
# Linear counting (Whang et al. 1990) over 64 buckets, by the number of occupied ones, rounded; 64 occupied reads as 63.5.
SKETCH_ESTIMATE: npt.NDArray[np.float64] = np.round(
    -SKETCH_BITS * np.log((SKETCH_BITS - np.minimum(np.arange(SKETCH_BITS + 1), SKETCH_BITS - 0.5)) / SKETCH_BITS)
)

# What a card was seen with: 5-minute step modulo 65,536 (227 days), then which dimension (1 bit: a or c) and 15 bits of its hash.
SEEN_STEP_MS = BOUNDARY_MS
SEEN_STEPS = 65_536
SEEN_HASH_MASK = 0x7FFF
SEEN_DIM_C = 0x8000
# Nothing is held longer behind an entity's newest event, however fast a replay runs: few enough steps that none is taken for a later.
SPAN_MS_MAX = 150 * DAY_MS
SEEN_MAX = 65_535
assert SEEN_RETENTION_MS < LABELLED_RETENTION_MS < SPAN_MS_MAX < SEEN_STEPS * SEEN_STEP_MS - SEEN_RETENTION_MS


def boundary(t_ms: Int64s) -> Int64s:
    """The newest 5-minute edge at least SETTLE_MS before `t_ms`. Shape and unit as given."""
    settled = t_ms - SETTLE_MS
    return settled - settled % BOUNDARY_MS


def tail(t_ms: Int64s, window: Window) -> Int64s:
    """The first instant that `window` covers at `t_ms`."""
    start = t_ms - window.delay_ms - window.length_ms
    return start if window.tail_ms == 0 else start - start % window.tail_ms


def fraud_end(t_ms: Int64s, window: Window) -> Int64s:
    """The instant before which frauds count in a label window at `t_ms`: the hour in which the delay ends; exact without a tail."""
    stop = t_ms - window.delay_ms
    return stop if window.tail_ms == 0 else stop - stop % HOUR_MS


def payments_end(t_ms: Int64s, window: Window) -> Int64s:
    """The instant before which payments count in a label window at `t_ms`: the end of the tile in which the delay ends."""
    stop = t_ms - window.delay_ms
    return stop if window.tail_ms == 0 else stop - stop % window.tail_ms + window.tail_ms


@dataclass
class Aggregates:
    """What a batch of owners (one entity of one transaction each) had done, by window.

    Arrays are (len(WINDOWS), owners), `label_*` (len(LABEL_WINDOWS), owners), `last_*` and `new_*` (owners,). `largest` is -1 and
    `last_event_time_ms` is `NEVER` where there is nothing. `distinct_*` are bitmaps of SKETCH_BITS buckets. `new_*` is True where
    the transaction's own value of a dimension was not seen in PAIR_WINDOW; it holds for entities that remember pairs. `first_fraud_ms` and
    `last_fraud_ms` (owners,) are the first and the last hour with a fraud in the longest label window, `NEVER` without;
    `payments_since_fraud` (owners,) the window's payments since the day of the first.

    `fraud_run` (owners,) counts that window's frauds since its last whole day with a payment that is not known to be fraud; whole days are
    those before the one in which the delay ends. `genuine_day_ms` is that day's midnight, `run_day_ms` the midnight of the first day with
    a fraud after it, both `NEVER` where there is none or no fraud at all. `payments_after_fraud` (owners,) counts the payments of the
    whole days after the last one with a fraud.
    """

    count: Int64s
    total: Int64s
    squares: Int64s
    largest: Int64s
    distinct_a: npt.NDArray[np.uint64]
    distinct_b: npt.NDArray[np.uint64]
    distinct_c: npt.NDArray[np.uint64]
    last_event_time_ms: Int64s
    last_latitude: npt.NDArray[np.float64]
    last_longitude: npt.NDArray[np.float64]
    last_dim_b: npt.NDArray[np.float64]
    new_a: npt.NDArray[np.bool_]
    new_c: npt.NDArray[np.bool_]
    label_count: Int64s
    label_frauds: Int64s
    first_fraud_ms: Int64s
    last_fraud_ms: Int64s
    payments_since_fraud: Int64s
    fraud_run: Int64s
    run_day_ms: Int64s
    genuine_day_ms: Int64s
    payments_after_fraud: Int64s


NEVER = -(2**62)


@dataclass
class Held:
    """What is held of each owner: records of all owners end to end in owner order, and how many of each, (owners,).

    `head` is HEAD_EVENT, `fine` FINE_TILE (an owner's 5 minutes, then its hours), `day` DAY_TILE, `seen` uint32, `frauds` FRAUD_HOUR.
    """

    head: npt.NDArray[np.void]
    heads: Int64s
    fine: npt.NDArray[np.void]
    fives: Int64s
    hours: Int64s
    day: npt.NDArray[np.void]
    days: Int64s
    seen: npt.NDArray[np.uint32]
    seens: Int64s
    frauds: npt.NDArray[np.void]
    fraud_hours: Int64s


def nothing_held(owners: int) -> Held:
    none = np.zeros(owners, np.int64)
    return Held(
        *(np.zeros(0, HEAD_EVENT), none, np.zeros(0, FINE_TILE), none, none, np.zeros(0, DAY_TILE), none),
        *(np.zeros(0, np.uint32), none, np.zeros(0, FRAUD_HOUR), none),
    )


@dataclass
class Asked:
    """What the features of each owner are asked for, (owners,) each.

    `seq` is the transaction's place in the entity's order of observation, behind the head's base; `capacity` how many events a head
    counts; `dim_a` and `dim_c` the transaction's own dim_hash's.
    """

    t_ms: Int64s
    seq: Int64s
    capacity: Int64s
    dim_a: npt.NDArray[np.uint16]
    dim_c: npt.NDArray[np.uint16]


_FROM_DAY, _FROM_HOUR, _FROM_FIVE = (np.array([[w.tail_ms == r] for w in WINDOWS]) for r in reversed(TILE_RESOLUTIONS_MS))
_EXACT = np.array([[w.tail_ms == 0] for w in WINDOWS])


def aggregate(asked: Asked, held: Held) -> Aggregates:
    """Aggregates of each owner at its time, from its head and tiles. Cost: a fixed number of numpy calls a batch."""
    t_ms = asked.t_ms
    owners = len(t_ms)
    edge = boundary(t_ms)
    ids = np.arange(owners)
    head, fine, day = held.head, held.fine, held.day
    of_head = np.repeat(ids, held.heads)
    of_fine = np.repeat(ids, held.fives + held.hours)
    of_day = np.repeat(ids, held.days)
    when = head["event_time_ms"]
    age = asked.seq[of_head] - head["seq"].astype(np.int64)
    # Observed before this transaction and not later by event time; `recent`: among as many as the definition lets a head count.
    seen = (age > 0) & (when <= t_ms[of_head])
    recent = seen & (age <= asked.capacity[of_head])
    # Before the boundary an event counts from its tile once the Spark job has put it there, and until then from the head, however
    # many came after it.
    untiled = seen & (head["tiled"] == 0)
    loose = np.where(when >= edge[of_head], recent, untiled)

    # Every window at once, (windows, records): the number of numpy calls is what a small batch costs.
    from_ms = np.stack([tail(t_ms, window) for window in WINDOWS])
    from_head = np.where(_EXACT, recent, loose) & (when >= from_ms[:, of_head])
    # A tile finer than the window's tail counts only in the gap that coarser tiles leave before the boundary.
    is_hour = np.repeat(np.tile([False, True], owners), np.stack([held.fives, held.hours], axis=1).reshape(-1))
    start = fine["start_min"].astype(np.int64) * MINUTE_MS
    edge_fine = edge[of_fine]
    settled = start + np.where(is_hour, HOUR_MS, BOUNDARY_MS) <= edge_fine
    fills_hour = ~is_hour & (start >= edge_fine - edge_fine % HOUR_MS)
    fills_day = is_hour & (start >= edge_fine - edge_fine % DAY_MS)
    from_fine = ((_FROM_FIVE & ~is_hour) | (_FROM_HOUR & (is_hour | fills_hour)) | (_FROM_DAY & (fills_day | fills_hour))) & (
        settled & (start >= from_ms[:, of_fine])
    )
    start_day = day["day"].astype(np.int64) * DAY_MS
    from_day = _FROM_DAY & ((start_day + DAY_MS <= edge[of_day]) & (start_day >= from_ms[:, of_day]))
    order = np.argsort(np.concatenate([of_head, of_fine, of_day]), kind="stable")
    chosen = np.concatenate([from_head, from_fine, from_day], axis=1)[:, order]
    lengths = held.heads + held.fives + held.hours + held.days
    has = lengths > 0
    starts = (np.cumsum(lengths) - lengths)[has]

    def reduced(ufunc: np.ufunc, values: Sequence[npt.NDArray[Any]], empty: Any) -> npt.NDArray[Any]:
        """`ufunc` over the chosen records of each owner, (windows, owners); `empty` where there is none. Exact in any order."""
        joined = np.concatenate(values)
        out = np.full((len(WINDOWS), owners), empty, joined.dtype)
        if len(starts):
            out[:, has] = ufunc.reduceat(np.where(chosen, joined[order], empty), starts, axis=1)
        return out

    amount = head["amount_minor"].astype(np.int64)
    capped = np.minimum(amount, SQUARED_AMOUNT_MINOR_MAX)
    one, zero, bits = np.uint64(1), np.uint64(0), np.uint64(SKETCH_BITS - 1)
    no_sketch = np.zeros(len(day), np.uint64)

    def sketch(dim: str, bitmap: str) -> npt.NDArray[Any]:
        return reduced(np.bitwise_or, (one << (head[dim].astype(np.uint64) & bits), fine[bitmap], no_sketch), zero)

    day_count = day["count"].astype(np.int64)
    result = Aggregates(
        count=reduced(np.add, (np.ones(len(head), np.int64), fine["count"].astype(np.int64), day_count), 0),
        total=reduced(np.add, (amount, fine["total"], day["total"]), 0),
        squares=reduced(np.add, (capped * capped, fine["squares"], day["squares"]), 0),
        largest=reduced(np.maximum, (amount, fine["largest"].astype(np.int64), day["largest"].astype(np.int64)), -1),
        distinct_a=sketch("dim_a", "distinct_a"),
        distinct_b=sketch("dim_b", "distinct_b"),
        distinct_c=sketch("dim_c", "distinct_c"),
        last_event_time_ms=np.full(owners, NEVER, np.int64),
        last_latitude=np.full(owners, np.nan),
        last_longitude=np.full(owners, np.nan),
        last_dim_b=np.full(owners, np.nan),
        new_a=np.ones(owners, bool),
        new_c=np.ones(owners, bool),
        label_count=np.zeros((len(LABEL_WINDOWS), owners), np.int64),
        label_frauds=np.zeros((len(LABEL_WINDOWS), owners), np.int64),
        first_fraud_ms=np.full(owners, NEVER, np.int64),
        last_fraud_ms=np.full(owners, NEVER, np.int64),
        payments_since_fraud=np.zeros(owners, np.int64),
        fraud_run=np.zeros(owners, np.int64),
        run_day_ms=np.full(owners, NEVER, np.int64),
        genuine_day_ms=np.full(owners, NEVER, np.int64),
        payments_after_fraud=np.zeros(owners, np.int64),
    )
    in_pairs = from_head[WINDOW_INDEX[PAIR_WINDOW.name]]
    # By the bits that tiles keep, so that it doesn't matter which of the two holds an event.
    mask = np.uint16(SEEN_HASH_MASK)
    result.new_a[of_head[in_pairs & ((head["dim_a"] & mask) == (asked.dim_a & mask)[of_head])]] = False
    result.new_c[of_head[in_pairs & ((head["dim_c"] & mask) == (asked.dim_c & mask)[of_head])]] = False
    if len(held.seen):
        _seen_before(result, asked, held, edge)
    _labels(result, t_ms, held, of_head[untiled], when[untiled], of_day, day_count)
    if len(head):
        # The newest event by (event time, order of observation), found by one sort within owners.
        newest = np.lexsort((head["seq"], np.where(recent, when, NEVER), of_head))
        last = newest[np.cumsum(held.heads)[held.heads > 0] - 1]
        valid = recent[last] & (when[last] >= (t_ms - LAST_MS_MAX)[of_head[last]])
        index = np.flatnonzero(held.heads > 0)[valid]
        last = last[valid]
        result.last_event_time_ms[index] = when[last]
        result.last_latitude[index] = head["latitude"][last]
        result.last_longitude[index] = head["longitude"][last]
        result.last_dim_b[index] = head["dim_b"][last]
    return result


def _seen_before(result: Aggregates, asked: Asked, held: Held, edge: Int64s) -> None:
    """Clear `new_a` and `new_c` where the tiles' part of the pair window holds the transaction's own value."""
    owner = np.repeat(np.arange(len(edge)), held.seens)
    t_ms = asked.t_ms[owner]
    step = held.seen >> np.uint32(16)
    # How many steps before the transaction's own; one after it looks as if it were long ago.
    back = (t_ms // SEEN_STEP_MS - step.astype(np.int64)) % SEEN_STEPS
    start = (t_ms // SEEN_STEP_MS - back) * SEEN_STEP_MS
    inside = (start + SEEN_STEP_MS <= edge[owner]) & (start >= tail(asked.t_ms, PAIR_WINDOW)[owner])
    value = held.seen & np.uint32(0xFFFF)
    own_a = asked.dim_a.astype(np.uint32) & np.uint32(SEEN_HASH_MASK)
    own_c = asked.dim_c.astype(np.uint32) & np.uint32(SEEN_HASH_MASK) | np.uint32(SEEN_DIM_C)
    result.new_a[owner[inside & (value == own_a[owner])]] = False
    result.new_c[owner[inside & (value == own_c[owner])]] = False


def _labels(
    result: Aggregates, t_ms: Int64s, held: Held, of_untiled: Int64s, untiled_ms: Int64s, of_day: Int64s, day_count: Int64s
) -> None:
    """Fill in `label_count` (payments) and `label_frauds` of the label windows, and what is said of the first and the last fraud."""
    owners = len(t_ms)
    of_frauds = np.repeat(np.arange(owners), held.fraud_hours)
    day_ms, fraud_ms = held.day["day"].astype(np.int64) * DAY_MS, held.frauds["hour"].astype(np.int64) * HOUR_MS
    frauds = held.frauds["frauds"].astype(np.int64)
    longest = LABEL_WINDOWS[-1]
    before = day_ms < payments_end(t_ms, longest)[of_day]
    # Only when the Spark job has been down for longer than the delay.
    forgotten = untiled_ms < payments_end(t_ms, longest)[of_untiled]
    fraud_before = (fraud_ms < fraud_end(t_ms, longest)[of_frauds]) & (frauds > 0)

    def payments(start: Int64s) -> Int64s:
        inside = before & (day_ms >= start[of_day])
        found: Int64s = np.bincount(of_day[inside], day_count[inside], owners).astype(np.int64)
        if forgotten.any():
            found += np.bincount(of_untiled[forgotten & (untiled_ms >= start[of_untiled])], minlength=owners)
        return found

    for i, window in enumerate(LABEL_WINDOWS):
        start = tail(t_ms, window)
        result.label_count[i] = payments(start)
        if len(frauds):
            labelled = fraud_before & (fraud_ms >= start[of_frauds])
            result.label_frauds[i] = np.bincount(of_frauds[labelled], frauds[labelled], owners)
    if not len(frauds):
        return
    labelled = fraud_before & (fraud_ms >= tail(t_ms, longest)[of_frauds])
    first = np.full(owners, -NEVER, np.int64)
    np.minimum.at(first, of_frauds[labelled], fraud_ms[labelled])
    np.maximum.at(result.last_fraud_ms, of_frauds[labelled], fraud_ms[labelled])
    result.first_fraud_ms[:] = np.where(first == -NEVER, NEVER, first)
    result.payments_since_fraud[:] = np.where(first == -NEVER, 0, payments(first - first % DAY_MS))

    from_ms = tail(t_ms, longest)

    def by_day(of: Int64s, at_ms: Int64s, what: Int64s, chosen: npt.NDArray[np.bool_]) -> Int64s:
        """(owners, LABEL_DAYS) sums of `what`."""
        of, at_ms, what = of[chosen], at_ms[chosen], what[chosen]
        found = np.bincount(of * LABEL_DAYS + (at_ms - from_ms[of]) // DAY_MS, what, owners * LABEL_DAYS)
        return found.astype(np.int64).reshape(owners, LABEL_DAYS)

    paid = by_day(of_day, day_ms, day_count, before & (day_ms >= from_ms[of_day]))
    if forgotten.any():
        inside = forgotten & (untiled_ms >= from_ms[of_untiled])
        paid += by_day(of_untiled, untiled_ms, np.ones(len(of_untiled), np.int64), inside)
    _fraud_runs(result, from_ms, paid, by_day(of_frauds, fraud_ms, frauds, labelled))


def _fraud_runs(result: Aggregates, from_ms: Int64s, paid: Int64s, frauds: Int64s) -> None:
    """Fill in what is said of the newest run of frauds from (owners, LABEL_DAYS) payments and frauds a day, the first from `from_ms`."""
    day = np.arange(LABEL_DAYS)
    genuine = np.max(np.where(paid > frauds, day, -1)[:, :-1], axis=1)
    last = np.max(np.where(frauds > 0, day, -1), axis=1)
    run = frauds * (day > genuine[:, None])
    result.fraud_run[:] = run.sum(axis=1)
    runs = result.fraud_run > 0
    result.run_day_ms[:] = np.where(runs, from_ms + np.argmax(run > 0, axis=1) * DAY_MS, NEVER)
    known = (last >= 0) & (genuine >= 0)
    result.genuine_day_ms[:] = np.where(known, from_ms + genuine * DAY_MS, NEVER)
    result.payments_after_fraud[:] = np.where(last >= 0, (paid * (day > last[:, None]))[:, :-1].sum(axis=1), 0)
