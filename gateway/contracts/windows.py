"""Window arithmetic: pure functions of time over tiles and recent events, shared by gateway, Spark job and offline engine.

Time is integer milliseconds since the epoch. A window of length w at time t covers [tail(t), t): the head is exact to the event,
the tail is rounded down to the window's tile ("sawtooth", as in Chronon). An event at exactly t counts when it was observed before.

Where each event of the past is read from depends on t alone:

    boundary(t) = the newest 5-minute edge at least SETTLE_MS before t
    events at or after boundary(t)        the entity's head: its recent events, one by one
    events before boundary(t)             tiles; an event that the Spark job has not added to its tile yet is still
                                          marked as untiled in the head and is counted from there

so the value is the same however far the Spark job has got, as long as the head could hold what Spark had not yet tiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.layout import HEAD_EVENT, TILE

Int64s = npt.NDArray[np.int64]

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS

SETTLE_MS = 60_000
TILE_RESOLUTIONS_MS = (5 * MINUTE_MS, HOUR_MS, DAY_MS)
BOUNDARY_MS = TILE_RESOLUTIONS_MS[0]
# Each coarser tile is a whole number of finer ones, so that finer tiles can fill the gap up to the boundary.
assert all(b % a == 0 for a, b in zip(TILE_RESOLUTIONS_MS, TILE_RESOLUTIONS_MS[1:], strict=False))


@dataclass(frozen=True)
class Window:
    """`tail_ms` is the resolution its tail is rounded down to; 0 keeps it exact, read from the head alone."""

    name: str
    length_ms: int
    tail_ms: int


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

# How long behind an entity's newest event its data is kept, so that events out of order by up to SLACK_MS still find it.
SLACK_MS = HOUR_MS
HEAD_RETENTION_MS = max(EXACT_WINDOW_MS_MAX, SETTLE_MS + BOUNDARY_MS) + SLACK_MS
TILE_RETENTION_MS: dict[int, int] = {
    5 * MINUTE_MS: 2 * HOUR_MS + SETTLE_MS + BOUNDARY_MS + SLACK_MS,
    HOUR_MS: 2 * DAY_MS + SETTLE_MS + BOUNDARY_MS + SLACK_MS,
    DAY_MS: 31 * DAY_MS + SLACK_MS,
}
assert set(TILE_RETENTION_MS) == set(TILE_RESOLUTIONS_MS)
# Data younger than this by the wall clock is kept whatever its event time: a reader may lag behind, or a replay run ahead.
RETENTION_REAL_S = 600

# The amount that enters a sum of squares, so that 92,000 largest payments fit in 64 bits.
SQUARED_AMOUNT_MINOR_MAX = 10_000_000
assert SQUARED_AMOUNT_MINOR_MAX**2 * 92_000 < 2**63

SKETCH_BITS = 64
# Linear counting (Whang et al. 1990) over 64 buckets, by the number of occupied ones, rounded; 64 occupied reads as 63.5.
SKETCH_ESTIMATE: npt.NDArray[np.float64] = np.round(
    -SKETCH_BITS * np.log((SKETCH_BITS - np.minimum(np.arange(SKETCH_BITS + 1), SKETCH_BITS - 0.5)) / SKETCH_BITS)
)


def boundary(t_ms: Int64s) -> Int64s:
    """The newest 5-minute edge at least SETTLE_MS before `t_ms`. Shape and unit as given."""
    settled = t_ms - SETTLE_MS
    return settled - settled % BOUNDARY_MS


def tail(t_ms: Int64s, window: Window) -> Int64s:
    """The first instant that `window` covers at `t_ms`."""
    start = t_ms - window.length_ms
    return start if window.tail_ms == 0 else start - start % window.tail_ms


@dataclass
class Aggregates:
    """What a batch of owners (one entity of one transaction each) had done, by window.

    Arrays are (len(WINDOWS), owners) but for `last_*`, which are (owners,). `largest` is -1 and `last_event_time_ms` is
    `NEVER` where there is nothing. `distinct_a` and `distinct_b` are bitmaps of SKETCH_BITS buckets.
    """

    count: Int64s
    total: Int64s
    squares: Int64s
    largest: Int64s
    distinct_a: npt.NDArray[np.uint64]
    distinct_b: npt.NDArray[np.uint64]
    last_event_time_ms: Int64s
    last_latitude: npt.NDArray[np.float64]
    last_longitude: npt.NDArray[np.float64]


NEVER = -(2**62)


def aggregate(
    t_ms: Int64s,
    seq: Int64s,
    capacity: Int64s,
    head: npt.NDArray[np.void],
    head_lengths: Int64s,
    tiles: npt.NDArray[np.void],
    tile_lengths: Int64s,
) -> Aggregates:
    """Aggregates of each owner at its time, from its head and tiles.

    `t_ms`, `seq` and `capacity` are (owners,): the transaction's event time, its place in the entity's order of observation, and
    how many events a head counts. `head` (dtype HEAD_EVENT) and `tiles` (dtype TILE) lie end to end in owner order,
    `head_lengths` and `tile_lengths` (owners,) of them each. Cost: a fixed number of numpy calls a batch.
    """
    owners = len(t_ms)
    edge = boundary(t_ms)
    owner = np.concatenate([np.repeat(np.arange(owners), head_lengths), np.repeat(np.arange(owners), tile_lengths)])
    heads = len(head)
    when = head["event_time_ms"]
    age = seq[owner[:heads]] - head["seq"].astype(np.int64)
    t_head = t_ms[owner[:heads]]
    # Observed before this transaction and not later by event time; `recent`: among as many as the definition lets a head count.
    seen = (age > 0) & (when <= t_head)
    recent = seen & (age <= capacity[owner[:heads]])
    # Before the boundary an event counts from its tile once the Spark job has put it there, and until then from the head, however
    # many came after it.
    loose = np.where(when >= edge[owner[:heads]], recent, seen & (head["tiled"] == 0))

    start = tiles["start_min"].astype(np.int64) * MINUTE_MS
    resolution = tiles["resolution_min"].astype(np.int64) * MINUTE_MS
    edge_tile = edge[owner[heads:]]
    settled = start + resolution <= edge_tile
    # A tile finer than the window's tail counts only in the gap that coarser tiles leave before the boundary.
    fills_hour = start >= edge_tile - edge_tile % HOUR_MS
    fills_day = start >= edge_tile - edge_tile % DAY_MS
    five, hour, day = (resolution == r for r in TILE_RESOLUTIONS_MS)
    usable = {
        TILE_RESOLUTIONS_MS[0]: settled & five,
        TILE_RESOLUTIONS_MS[1]: settled & (hour | (five & fills_hour)),
        TILE_RESOLUTIONS_MS[2]: settled & (day | (hour & fills_day) | (five & fills_hour)),
    }

    # Every window at once, (windows, records): the number of numpy calls is what a small batch costs.
    from_ms = np.stack([tail(t_ms, window) for window in WINDOWS])
    exact = np.array([window.tail_ms == 0 for window in WINDOWS])[:, None]
    from_head = np.where(exact, recent, loose) & (when >= from_ms[:, owner[:heads]])
    nothing = np.zeros(len(tiles), bool)
    from_tiles = np.stack([usable.get(window.tail_ms, nothing) for window in WINDOWS]) & (start >= from_ms[:, owner[heads:]])
    order = np.argsort(owner, kind="stable")
    chosen = np.concatenate([from_head, from_tiles], axis=1)[:, order]

    amount = head["amount_minor"].astype(np.int64)
    capped = np.minimum(amount, SQUARED_AMOUNT_MINOR_MAX)
    one, bits = np.uint64(1), np.uint64(SKETCH_BITS - 1)
    count = np.concatenate([np.ones(heads, np.int64), tiles["count"].astype(np.int64)])
    total = np.concatenate([amount, tiles["total"]])
    squares = np.concatenate([capped * capped, tiles["squares"]])
    largest = np.concatenate([amount, tiles["largest"].astype(np.int64)])
    seen_a = np.concatenate([one << (head["dim_a"].astype(np.uint64) & bits), tiles["distinct_a"]])
    seen_b = np.concatenate([one << (head["dim_b"].astype(np.uint64) & bits), tiles["distinct_b"]])

    lengths = head_lengths + tile_lengths
    has = lengths > 0
    starts = (np.cumsum(lengths) - lengths)[has]

    def reduced(ufunc: np.ufunc, values: npt.NDArray[Any], empty: Any) -> npt.NDArray[Any]:
        """`ufunc` over the chosen records of each owner, (windows, owners); `empty` where there is none. Exact in any order."""
        out = np.full((len(WINDOWS), owners), empty, values.dtype)
        if len(starts):
            out[:, has] = ufunc.reduceat(np.where(chosen, values[order], empty), starts, axis=1)
        return out

    zero = np.uint64(0)
    result = Aggregates(
        count=reduced(np.add, count, 0),
        total=reduced(np.add, total, 0),
        squares=reduced(np.add, squares, 0),
        largest=reduced(np.maximum, largest, -1),
        distinct_a=reduced(np.bitwise_or, seen_a, zero),
        distinct_b=reduced(np.bitwise_or, seen_b, zero),
        last_event_time_ms=np.full(owners, NEVER, np.int64),
        last_latitude=np.full(owners, np.nan),
        last_longitude=np.full(owners, np.nan),
    )
    if heads:
        # The newest event by (event time, order of observation), found by one sort within owners.
        newest = np.lexsort((head["seq"], np.where(recent, when, NEVER), owner[:heads]))
        last = newest[np.cumsum(head_lengths)[head_lengths > 0] - 1]
        valid = recent[last]
        index = np.flatnonzero(head_lengths > 0)[valid]
        last = last[valid]
        result.last_event_time_ms[index] = when[last]
        result.last_latitude[index] = head["latitude"][last]
        result.last_longitude[index] = head["longitude"][last]
    return result


def tiles_of(
    event_time_ms: Int64s,
    amount_minor: Int64s,
    dim_a: npt.NDArray[np.uint32],
    dim_b: npt.NDArray[np.uint32],
    owner: Int64s,
    updated_min: int,
) -> tuple[npt.NDArray[np.void], Int64s]:
    """The tiles (dtype TILE) that the given events add up to, at every resolution, and the owner of each.

    All inputs are (events,). The result is sorted by owner, resolution and start, each combination once.
    """
    n = len(event_time_ms)
    tiles = np.zeros(n * len(TILE_RESOLUTIONS_MS), TILE)
    one, bits = np.uint64(1), np.uint64(SKETCH_BITS - 1)
    capped = np.minimum(amount_minor, SQUARED_AMOUNT_MINOR_MAX)
    for i, resolution_ms in enumerate(TILE_RESOLUTIONS_MS):
        part = tiles[i * n : (i + 1) * n]
        part["start_min"] = (event_time_ms - event_time_ms % resolution_ms) // MINUTE_MS
        part["resolution_min"] = resolution_ms // MINUTE_MS
        part["count"] = 1
        part["largest"] = amount_minor
        part["total"] = amount_minor
        part["squares"] = capped * capped
        part["distinct_a"] = one << (dim_a.astype(np.uint64) & bits)
        part["distinct_b"] = one << (dim_b.astype(np.uint64) & bits)
    tiles["updated_min"] = updated_min % 65_536
    return merge_tiles(tiles, np.tile(owner, len(TILE_RESOLUTIONS_MS)))


def merge_tiles(tiles: npt.NDArray[np.void], owner: Int64s) -> tuple[npt.NDArray[np.void], Int64s]:
    """One tile for each (owner, resolution, start) of `tiles`, counts and sums added. Associative and commutative, in integers.

    Of `updated_min` the last one in input order stays, so newer tiles are given after older ones.
    """
    if len(tiles) == 0:
        return tiles, owner
    order = np.lexsort((tiles["start_min"], tiles["resolution_min"], owner))
    tiles, owner = tiles[order], owner[order]
    fresh = np.ones(len(tiles), bool)
    fresh[1:] = (
        (owner[1:] != owner[:-1])
        | (tiles["resolution_min"][1:] != tiles["resolution_min"][:-1])
        | (tiles["start_min"][1:] != tiles["start_min"][:-1])
    )
    starts = np.flatnonzero(fresh)
    merged = tiles[starts].copy()
    for name, ufunc in (
        ("count", np.add),
        ("total", np.add),
        ("squares", np.add),
        ("largest", np.maximum),
        ("distinct_a", np.bitwise_or),
        ("distinct_b", np.bitwise_or),
    ):
        merged[name] = ufunc.reduceat(tiles[name], starts)
    merged["updated_min"] = tiles["updated_min"][np.append(starts[1:], len(tiles)) - 1]
    return merged, owner[starts]


def keep_tiles(tiles: npt.NDArray[np.void], owner: Int64s, now_min: int) -> npt.NDArray[np.bool_]:
    """Which tiles are still needed: those within their retention behind the owner's newest tile, or lately updated."""
    if len(tiles) == 0:
        return np.zeros(0, bool)
    end_ms = (tiles["start_min"].astype(np.int64) + tiles["resolution_min"]) * MINUTE_MS
    newest = np.full(int(owner.max()) + 1, NEVER, np.int64)
    # The finest tile bounds the newest event best.
    finest = tiles["resolution_min"] == TILE_RESOLUTIONS_MS[0] // MINUTE_MS
    np.maximum.at(newest, owner[finest], end_ms[finest])
    keep = ((now_min - tiles["updated_min"].astype(np.int64)) % 65_536) * 60 <= RETENTION_REAL_S
    for resolution_ms in TILE_RESOLUTIONS_MS:
        right = tiles["resolution_min"] == resolution_ms // MINUTE_MS
        keep |= right & (end_ms > newest[owner] - TILE_RETENTION_MS[resolution_ms])
    return keep


assert HEAD_EVENT.itemsize == TILE.itemsize
