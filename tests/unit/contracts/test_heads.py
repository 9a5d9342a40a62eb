"""Heads from receipts: places, lives, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gateway.contracts.heads import Heads, Observed, heads_of, kept_events
from gateway.contracts.layout import HEAD_COMPACT_ABOVE, HEAD_EVENT, HEAD_GUARD_S, HEAD_KEPT_MIN
from gateway.contracts.windows import HEAD_RETENTION_MS

NOW_MS = 1_795_000_000_000
BORN = NOW_MS * 1000


def make_observed(places: Sequence[int], owners: Sequence[int] | None = None, times_ms: Sequence[int] | None = None) -> Observed:
    n = len(places)
    records = np.zeros(n, HEAD_EVENT)
    records["transaction"] = np.arange(n) + 1
    records["event_time_ms"] = NOW_MS if times_ms is None else times_ms
    records["tiled"] = 1
    owner = np.zeros(n, np.int64) if owners is None else np.array(owners, np.int64)
    return Observed(owner, np.array(places, np.int64), np.full(n, NOW_MS), records)


def heads(observed: Observed, end: Sequence[int] = (0,), capacity: int = 64) -> Heads:
    return heads_of(observed, np.array(end, np.int64), np.full(len(end), capacity))


def absolute(found: Heads) -> list[int]:
    places: list[int] = (found.base[found.owner] + found.records["seq"]).tolist()
    return places


def test_one_life_keeps_its_places_and_its_holes() -> None:
    found = heads(make_observed([BORN + 4, BORN, BORN + 1]))
    assert absolute(found) == [BORN, BORN + 1, BORN + 4]
    assert (found.base + found.next_seq).tolist() == [BORN + 5]
    assert found.records["transaction"].tolist() == [2, 3, 1]


def test_between_two_lives_there_is_one_step() -> None:
    found = heads(make_observed([BORN, BORN + 1, BORN + 10_000_000]))
    assert absolute(found) == [BORN + 9_999_998, BORN + 9_999_999, BORN + 10_000_000]
    assert found.records["seq"].tolist() == [0, 1, 2]


def test_a_newborn_head_keeps_its_places_and_pushes_its_base_back() -> None:
    newborn = BORN + 10_000_000
    found = heads(make_observed([BORN, BORN + 1, newborn, newborn + 1]), end=[newborn + 2])
    assert absolute(found)[2:] == [newborn, newborn + 1]
    assert (found.base.tolist(), found.next_seq.tolist()) == ([newborn - 2], [4])


def test_a_head_that_goes_on_later_counts_the_leap_as_one() -> None:
    found = heads(make_observed([BORN, BORN + 1]), end=[BORN + 10_000_000])
    assert found.records["seq"].tolist() == [0, 1]
    assert (found.base + found.next_seq).tolist() == [BORN + 10_000_000]
    assert found.next_seq.tolist() == [2]


def test_an_event_given_twice_counts_once_and_owners_stay_apart() -> None:
    observed = make_observed([BORN, BORN, BORN + 1, BORN + 7], owners=[0, 0, 0, 2])
    observed.records["transaction"] = [1, 1, 2, 9]
    found = heads(observed, end=[0, 0, 0])
    assert found.next_seq.tolist() == [2, 0, 1]
    assert found.owner.tolist() == [0, 0, 2]


def test_no_more_stay_than_a_head_can_hold_and_ranks_still_count_all() -> None:
    found = heads(make_observed(range(BORN, BORN + 100)), capacity=8)
    assert len(found.records) == 10
    assert found.records["seq"].tolist() == list(range(90, 100))
    assert found.next_seq.tolist() == [100]


def test_what_is_kept_is_untiled_late_within_the_retention_or_of_the_few_before() -> None:
    n = 20
    times = np.array([NOW_MS - 2 * HEAD_RETENTION_MS + i for i in range(n - 1)] + [NOW_MS], np.int64)
    observed = np.full(n, NOW_MS - 1000 * (HEAD_GUARD_S + 1))
    observed[-1] = NOW_MS
    tiled = np.ones(n, bool)
    tiled[3] = False
    kept = kept_events(np.zeros(n, np.int64), times, observed, tiled, np.array([0, n]))
    assert np.flatnonzero(kept).tolist() == [3, *range(n - 1 - HEAD_KEPT_MIN, n)]
    few = slice(0, HEAD_COMPACT_ABOVE)
    all_of_them = kept_events(
        np.zeros(HEAD_COMPACT_ABOVE, np.int64), times[few], observed[few], tiled[few], np.array([0, HEAD_COMPACT_ABOVE])
    )
    assert all_of_them.all()


def test_no_events_make_no_heads() -> None:
    found = heads(make_observed([]), end=[5, 0])
    assert found.next_seq.tolist() == [0, 0]
    assert len(found.records) == 0
