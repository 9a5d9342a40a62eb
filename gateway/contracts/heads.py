"""Heads from receipts: pure functions from observed events to the heads that observing them left. Used by the rebuild.

The place of an event in its entity's order of observation is what its receipt recorded (`observed_seq`). Within one life of a head
places are a count; a head that was lost and born anew begins far behind, at the wall clock in microseconds. Here such leaps become
single steps, so that the difference of two places is again how many events were observed from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.contracts.layout import HEAD_COMPACT_ABOVE, HEAD_EVENT, HEAD_GUARD_S, HEAD_KEPT_MIN, LIFE_GAP
from gateway.contracts.windows import HEAD_RETENTION_MS, Int64s


@dataclass
class Observed:
    """Observed events of some owners, (events,) each; `owner` numbers the owners from 0.

    `place` is absolute, `observed_ms` wall clock. `records` are HEAD_EVENT, whose `seq` is not looked at.
    """

    owner: Int64s
    place: Int64s
    observed_ms: Int64s
    records: npt.NDArray[np.void]

    def take(self, chosen: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Observed:
        return Observed(self.owner[chosen], self.place[chosen], self.observed_ms[chosen], self.records[chosen])


@dataclass
class Heads:
    """`base` and `next_seq` are (owners,), 0 for an owner without an event; `records` HEAD_EVENT, by owner and order of observation."""

    base: Int64s
    next_seq: Int64s
    records: npt.NDArray[np.void]
    owner: Int64s


def heads_of(events: Observed, end: Int64s, capacity: Int64s) -> Heads:
    """The heads of `len(end)` owners that observed `events`, each event once or several times alike.

    `end` is the place that the owner's next event must get, `capacity` how many events its head counts.
    """
    owners = len(end)
    events = events.take(np.lexsort((events.place, events.owner)))
    if len(events.owner) == 0:
        none = np.zeros(owners, np.int64)
        return Heads(none, none, np.zeros(0, HEAD_EVENT), none[:0])
    transaction = events.records["transaction"]
    again = np.zeros(len(events.owner), bool)
    again[1:] = (
        (events.owner[1:] == events.owner[:-1]) & (events.place[1:] == events.place[:-1]) & (transaction[1:] == transaction[:-1])
    )
    events = events.take(~again)
    owner = events.owner
    edges = np.searchsorted(owner, np.arange(owners + 1))
    has = np.diff(edges) > 0
    last = edges[1:][has] - 1
    end = end.copy()
    end[has] = np.maximum(end[has], events.place[last] + 1)
    place = _joined(owner, events.place, end, edges)
    base, next_seq = np.zeros((2, owners), np.int64)
    base[has] = place[edges[:-1][has]]
    next_seq[has] = end[has] - base[has]
    kept = kept_events(owner, events.records["event_time_ms"], events.observed_ms, events.records["tiled"] == 1, edges)
    # What a head can hold, the newest of them; what no tile holds goes last.
    from_end = np.cumsum(kept[::-1])[::-1]
    behind = np.append(from_end, 0)[edges[owner + 1]]
    kept &= (from_end - behind <= (capacity + capacity // 4)[owner]) | (events.records["tiled"] == 0)
    records = events.records[kept].copy()
    records["seq"] = (place - base[owner])[kept]
    return Heads(base, next_seq, records, owner[kept])


def _joined(owner: Int64s, place: Int64s, end: Int64s, edges: npt.NDArray[np.int64]) -> Int64s:
    """The places, ascending by owner, with each leap between two lives made a single step, counted down from the owner's `end`.

    The last one is right before `end`: the next event gets the place behind the last one.
    """
    last = np.ones(len(owner), bool)
    last[:-1] = owner[1:] != owner[:-1]
    step = np.where(last, end[owner], np.append(place[1:], 0)) - place
    step = np.where(last | (step > LIFE_GAP), 1, np.maximum(step, 1))
    so_far = np.cumsum(step)
    return end[owner] - (so_far[edges[owner + 1] - 1] - so_far + step)


def kept_events(
    owner: Int64s, event_time_ms: Int64s, observed_ms: Int64s, tiled: npt.NDArray[np.bool_], edges: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which events of a head a reader may still need: the rule of lua/merge.lua. Events are by owner and order of observation.

    Untiled, lately observed, within the retention behind the owner's newest, or among the few before it. `edges` (owners + 1,) are
    where each owner's events begin.
    """
    few = np.diff(edges) <= HEAD_COMPACT_ABOVE
    by_time = np.lexsort((event_time_ms, owner))
    sorted_ms = event_time_ms[by_time]
    newest_ms = sorted_ms[edges[owner + 1] - 1]
    before = event_time_ms < newest_ms - HEAD_RETENTION_MS
    older = np.bincount(owner[before], minlength=len(edges) - 1)
    # The time of the oldest of the few, where there are events before the retention; else everything is within it.
    index = np.minimum(edges[:-1] + np.maximum(0, older - HEAD_KEPT_MIN), len(owner) - 1)
    from_ms = np.where(older > 0, sorted_ms[index], np.iinfo(np.int64).min)
    lately = observed_ms[edges[owner + 1] - 1] // 1000 - observed_ms // 1000 <= HEAD_GUARD_S
    kept: npt.NDArray[np.bool_] = few[owner] | ~tiled | lately | (event_time_ms >= from_ms[owner])
    return kept
