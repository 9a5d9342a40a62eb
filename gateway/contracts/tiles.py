"""Writing tiles: pure functions from events and what an entity holds to what it holds next. Used by the Spark job and the rebuild.

`add_events` is the whole of it, vectorised over entities. The result depends on the events alone, not on how they were cut into
batches, but for what retention has dropped already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.layout import TILE, TileValues
from gateway.contracts.windows import (
    BOUNDARY_MS,
    DAY_MS,
    LABELLED_RETENTION_MS,
    MINUTE_MS,
    RETENTION_REAL_MIN,
    SEEN_DIM_C,
    SEEN_HASH_MASK,
    SEEN_MAX,
    SEEN_RETENTION_MS,
    SEEN_STEP_MS,
    SEEN_STEPS,
    SETTLE_MS,
    SKETCH_BITS,
    SLACK_MS,
    SPAN_MS_MAX,
    SQUARED_AMOUNT_MINOR_MAX,
    TILE_RESOLUTIONS_MS,
    TILE_RETENTION_MS,
    Int64s,
)

SPAN_MIN_MAX = SPAN_MS_MAX // MINUTE_MS


@dataclass
class Events:
    """Events of some owners, (events,) each; `owner` numbers the owners from 0. `dims` are dim_hash's of dim_a, dim_b, dim_c."""

    owner: Int64s
    event_time_ms: Int64s
    amount_minor: Int64s
    dims: Sequence[npt.NDArray[np.integer[Any]]]


def add_events(
    held: TileValues, events: Events, pairs: npt.NDArray[np.bool_], labelled: npt.NDArray[np.bool_], now_min: int
) -> TileValues:
    """What the owners hold once `events` are added, with the headers' horizons advanced.

    `pairs` and `labelled` are by owner: whether its entity remembers pairs, and has label windows. `now_min` is wall-clock time in
    minutes since the epoch. Batch id, epoch, entity and check of the headers are left as they are.
    """
    owners = len(held.headers)
    headers = held.headers.copy()
    old = Horizon(*(headers[name].astype(np.int64) for name in ("newest_min", "settled_min", "marked_min", "marked_at_min")))
    newest_min = np.zeros(owners, np.int64)
    np.maximum.at(newest_min, events.owner, events.event_time_ms // MINUTE_MS)
    horizon = old.advanced(newest_min, now_min)

    new, new_owner = tiles_of(events.event_time_ms, events.amount_minor, events.dims, events.owner)
    tiles, owner = merge_tiles(np.concatenate([held.tiles, new]), np.concatenate([held.owner, new_owner]))
    keep = keep_tiles(tiles, owner, horizon, labelled)

    # Steps of what was seen are told apart within SPAN_MS_MAX only: what is further behind goes before anything new is added.
    recent = (horizon.newest_min - old.newest_min <= SPAN_MIN_MAX)[held.seen_owner]
    remembered = pairs[events.owner]
    seen_a, seen_c = seen_of(events.event_time_ms[remembered], events.dims[0][remembered], events.dims[2][remembered])
    seen_new = events.owner[remembered]
    seen, seen_owner = merge_seen(
        np.concatenate([held.seen[recent], seen_a, seen_c]), np.concatenate([held.seen_owner[recent], seen_new, seen_new]), horizon
    )
    for name in ("newest_min", "settled_min", "marked_min", "marked_at_min"):
        headers[name] = getattr(horizon, name)
    return TileValues(headers, tiles[keep], owner[keep], seen, seen_owner)


def tiles_of(
    event_time_ms: Int64s,
    amount_minor: Int64s,
    dims: Sequence[npt.NDArray[np.integer[Any]]],
    owner: Int64s,
) -> tuple[npt.NDArray[np.void], Int64s]:
    """The tiles (dtype TILE) that the given events add up to, at every resolution, and the owner of each.

    All inputs are (events,), `dims` the dim_hash's of dim_a, dim_b and dim_c. The result is sorted by owner, resolution and start,
    each combination once.
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
        if resolution_ms < DAY_MS:
            for name, dim in zip(("distinct_a", "distinct_b", "distinct_c"), dims, strict=True):
                part[name] = one << (dim.astype(np.uint64) & bits)
    return merge_tiles(tiles, np.tile(owner, len(TILE_RESOLUTIONS_MS)))


def merge_tiles(tiles: npt.NDArray[np.void], owner: Int64s) -> tuple[npt.NDArray[np.void], Int64s]:
    """One tile for each (owner, resolution, start) of `tiles`, counts and sums added. Associative and commutative, in integers."""
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
        ("distinct_c", np.bitwise_or),
    ):
        merged[name] = ufunc.reduceat(tiles[name], starts)
    return merged, owner[starts]


def seen_of(
    event_time_ms: Int64s, dim_a: npt.NDArray[np.integer[Any]], dim_c: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.uint32]:
    """What each event was seen with, (2, events): its dim_a, then its dim_c."""
    step = (event_time_ms // SEEN_STEP_MS % SEEN_STEPS).astype(np.uint32) << np.uint32(16)
    mask = np.uint32(SEEN_HASH_MASK)
    return np.stack([step | (dim_a.astype(np.uint32) & mask), step | (dim_c.astype(np.uint32) & mask) | np.uint32(SEEN_DIM_C)])


def merge_seen(seen: npt.NDArray[np.uint32], owner: Int64s, horizon: Horizon) -> tuple[npt.NDArray[np.uint32], Int64s]:
    """Each (owner, value) once, sorted by it, without what has left the pair window behind the owner's settled event.

    Of what lies so far back that no reader's window ends before it, the newest step of a value answers for all older ones.
    """
    if len(seen) == 0:
        return seen, owner
    packed = np.unique(owner.astype(np.uint64) << np.uint64(32) | seen)
    owner, seen = (packed >> np.uint64(32)).astype(np.int64), (packed & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    newest_step = horizon.newest_min[owner] // (SEEN_STEP_MS // MINUTE_MS)
    back = (newest_step - (seen >> np.uint32(16)).astype(np.int64)) % SEEN_STEPS
    start_ms = (newest_step - back) * SEEN_STEP_MS
    keep = (start_ms + SEEN_STEP_MS > horizon.settled_min[owner] * MINUTE_MS - SEEN_RETENTION_MS) & (
        back * SEEN_STEP_MS <= SPAN_MS_MAX
    )
    open_ms = horizon.settled_min[owner] * MINUTE_MS - SETTLE_MS - BOUNDARY_MS - SLACK_MS
    past = np.flatnonzero(keep & (start_ms + SEEN_STEP_MS <= open_ms))
    if len(past):
        past = past[np.lexsort((back[past], seen[past] & np.uint32(0xFFFF), owner[past]))]
        value, whose = seen[past] & np.uint32(0xFFFF), owner[past]
        keep[past[1:][(value[1:] == value[:-1]) & (whose[1:] == whose[:-1])]] = False
    owner, seen = owner[keep], seen[keep]
    many = np.bincount(owner, minlength=1) > SEEN_MAX
    if many.any():
        fits = np.ones(len(seen), bool)
        for i in np.flatnonzero(many):
            mine = np.flatnonzero(owner == i)
            fits[mine[np.argsort(back[keep][mine], kind="stable")[SEEN_MAX:]]] = False
        owner, seen = owner[fits], seen[fits]
    return seen, owner


@dataclass
class Horizon:
    """How far event time had got for each owner, in minutes since the epoch, (owners,) each; 0: never.

    `newest_min` is the newest event's minute. `settled_min` is what it was at least RETENTION_REAL_MIN minutes of wall-clock time
    ago: retention counts from there, so that a reader who lags behind by less, or a replay that runs ahead, misses nothing.
    `marked_min` and `marked_at_min` (wall clock) are its next value, and since when.
    """

    newest_min: Int64s
    settled_min: Int64s
    marked_min: Int64s
    marked_at_min: Int64s

    def advanced(self, newest_min: Int64s, now_min: int) -> Horizon:
        """The horizon after events up to `newest_min` were written at `now_min`."""
        due = (now_min - self.marked_at_min >= RETENTION_REAL_MIN) | (self.newest_min == 0)
        newest = np.maximum(self.newest_min, newest_min)
        return Horizon(
            newest_min=newest,
            settled_min=np.where(due, self.marked_min, self.settled_min),
            marked_min=np.where(due, newest, self.marked_min),
            marked_at_min=np.where(due, now_min, self.marked_at_min),
        )


def keep_tiles(
    tiles: npt.NDArray[np.void], owner: Int64s, horizon: Horizon, labelled: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Which tiles are still needed: those within their retention behind the owner's settled event.

    `labelled` is by owner number: such owners keep their days for the label windows as well.
    """
    end_ms = (tiles["start_min"].astype(np.int64) + tiles["resolution_min"]) * MINUTE_MS
    settled_ms = horizon.settled_min[owner] * MINUTE_MS
    keep = np.zeros(len(tiles), bool)
    for resolution_ms in TILE_RESOLUTIONS_MS:
        right = tiles["resolution_min"] == resolution_ms // MINUTE_MS
        retention_ms = np.full(len(tiles), TILE_RETENTION_MS[resolution_ms])
        if resolution_ms == DAY_MS:
            retention_ms = np.where(labelled[owner], LABELLED_RETENTION_MS, retention_ms)
        keep |= right & (end_ms > settled_ms - retention_ms)
    keep &= end_ms > horizon.newest_min[owner] * MINUTE_MS - SPAN_MS_MAX
    return keep
