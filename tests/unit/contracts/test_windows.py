"""Window arithmetic: edges, merging and retention, as pure functions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts import layout, tiles, windows
from gateway.contracts.windows import BOUNDARY_MS, DAY_MS, HOUR_MS, MINUTE_MS, SETTLE_MS, WINDOWS

instants = st.integers(0, 4_000_000_000_000)


def ints(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


@given(instants)
def test_the_boundary_is_the_newest_edge_that_has_settled(t_ms: int) -> None:
    edge = int(windows.boundary(ints(t_ms))[0])
    assert edge % BOUNDARY_MS == 0
    assert edge <= t_ms - SETTLE_MS < edge + BOUNDARY_MS


@given(instants, st.sampled_from(WINDOWS))
def test_a_windows_tail_is_rounded_down_by_less_than_its_tile(t_ms: int, window: windows.Window) -> None:
    start = int(windows.tail(ints(t_ms), window)[0])
    assert 0 <= (t_ms - window.length_ms) - start < max(window.tail_ms, 1)


Event = tuple[int, int, int, int, int]
events = st.lists(
    st.tuples(instants, st.integers(1, 10**9), st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(0, 3))
)


def tiles_of(some: list[Event]) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
    columns = [np.array([e[i] for e in some], np.int64) for i in range(5)]
    dims = [columns[2].astype(np.uint16), columns[3].astype(np.uint16), columns[2].astype(np.uint16)]
    return tiles.tiles_of(columns[0], columns[1], dims, columns[4])


@given(events, events)
def test_tiles_of_parts_merge_into_tiles_of_the_whole(left: list[Event], right: list[Event]) -> None:
    a, b, whole = tiles_of(left), tiles_of(right), tiles_of(left + right)
    merged = tiles.merge_tiles(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]))
    assert merged[0].tobytes() == whole[0].tobytes()
    assert merged[1].tolist() == whole[1].tolist()


@given(events)
def test_each_resolution_holds_each_event_once(some: list[Event]) -> None:
    made, _ = tiles_of(some)
    for resolution_ms in windows.TILE_RESOLUTIONS_MS:
        mine = made[made["resolution_min"] == resolution_ms // MINUTE_MS]
        assert int(mine["count"].sum()) == len(some)
        assert int(mine["total"].sum()) == sum(e[1] for e in some)
        assert all(int(s) * MINUTE_MS % resolution_ms == 0 for s in mine["start_min"])


def held_of_nobody(owners: int) -> layout.TileValues:
    return layout.unpack_tiles([None] * owners, [0] * owners, [0] * owners)


def add(held: layout.TileValues, times: list[int], now_min: int, labelled: bool = False) -> layout.TileValues:
    """One owner's events of amount 1, each with a partner of its own, are added at a minute of wall-clock time."""
    n = len(times)
    partners = np.arange(n, dtype=np.uint16)
    events = tiles.Events(np.zeros(n, np.int64), ints(*times), np.ones(n, np.int64), (partners, partners, partners))
    return tiles.add_events(held, events, np.array([True]), np.array([labelled]), now_min)


def counts(held: layout.TileValues) -> list[int]:
    """Events in the tiles, by resolution, from the finest."""
    return [int(held.tiles["count"][held.tiles["resolution_min"] == r // MINUTE_MS].sum()) for r in windows.TILE_RESOLUTIONS_MS]


NOW = 1_000 * DAY_MS + DAY_MS // 2
AGES = (0, HOUR_MS, 5 * HOUR_MS, 3 * DAY_MS, 36 * DAY_MS, 40 * DAY_MS)


def test_retention_counts_from_the_newest_event_of_ten_minutes_ago() -> None:
    held = add(held_of_nobody(1), [NOW - age for age in AGES], now_min=0)
    assert counts(held) == [6, 6, 6], "a first write drops nothing: a reader may lag behind"
    held = add(held, [NOW + 1], now_min=windows.RETENTION_REAL_MIN - 1)
    assert counts(held) == [7, 7, 7]
    held = add(held, [NOW + 2], now_min=windows.RETENTION_REAL_MIN)
    assert counts(held) == [4, 5, 6]
    assert len(held.seen) == 2 * 4, "one of each partner and dimension in each five minutes, within the pair window"


def test_of_what_was_seen_often_the_newest_of_the_past_stands_for_all_before() -> None:
    times = [NOW - hours * HOUR_MS for hours in range(20)]
    same = np.zeros(len(times), np.uint16)
    events = tiles.Events(np.zeros(len(times), np.int64), ints(*times), np.ones(len(times), np.int64), (same, same, same))
    held = tiles.add_events(held_of_nobody(1), events, np.array([True]), np.array([False]), 0)
    assert len(held.seen) == 2 * 20, "a reader may lag behind"
    held = add(held, [NOW + 1], now_min=windows.RETENTION_REAL_MIN)
    # Its own step, the one an hour before, which is within what a reader may still begin from, and one for all of the past.
    assert len(held.seen) == 2 * 3
    assert len(add(held, [NOW + 2], now_min=2 * windows.RETENTION_REAL_MIN).seen) == 2 * 3


def test_entities_with_labels_keep_their_days_for_the_label_windows() -> None:
    held = add(held_of_nobody(1), [NOW - age for age in AGES], now_min=0, labelled=True)
    assert counts(add(held, [NOW + 1], now_min=windows.RETENTION_REAL_MIN, labelled=True)) == [3, 4, 6]


def test_nothing_is_held_beyond_the_span_however_fast_a_replay_runs() -> None:
    held = add(held_of_nobody(1), [NOW - windows.SPAN_MS_MAX - DAY_MS, NOW], now_min=0)
    assert counts(held) == [1, 1, 1]
    # A year later the steps of what was seen have come round, and must not look like yesterday's.
    later = add(held, [NOW + 228 * DAY_MS], now_min=0)
    assert len(later.seen) == 2


@given(events)
def test_packed_values_are_read_back_as_they_were(some: list[Event]) -> None:
    columns = [np.array([e[i] for e in some], np.int64) for i in range(5)]
    dims = [columns[2].astype(np.uint16), columns[3].astype(np.uint16), columns[2].astype(np.uint16)]
    added = tiles.add_events(
        held_of_nobody(4), tiles.Events(columns[4], columns[0], columns[1], dims), np.ones(4, bool), np.zeros(4, bool), now_min=9
    )
    again = layout.unpack_tiles(list(layout.pack_tiles(added)), [0] * 4, [0] * 4)
    assert again.headers.tobytes() == added.headers.tobytes()
    assert again.tiles.tobytes() == added.tiles.tobytes()
    assert again.owner.tolist() == added.owner.tolist()
    assert again.seen.tolist() == added.seen.tolist()
    assert again.seen_owner.tolist() == added.seen_owner.tolist()


@pytest.mark.parametrize("spoilt", [b"", b"\x01" + b"\0" * 47, b"\x02\x03" + b"\0" * 46, b"\x02" + b"\0" * 48])
def test_a_value_of_another_layout_key_or_length_is_refused(spoilt: bytes) -> None:
    with pytest.raises(layout.UnknownLayoutError):
        layout.unpack_tiles([spoilt], [0], [0])


@pytest.mark.parametrize(("occupied", "estimate"), [(0, 0), (1, 1), (10, 11), (32, 44), (63, 266), (64, 311)])
def test_the_sketch_estimates_by_linear_counting(occupied: int, estimate: int) -> None:
    assert windows.SKETCH_ESTIMATE[occupied] == estimate
