"""Window arithmetic: edges, merging and retention, as pure functions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts import windows
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
    st.tuples(instants, st.integers(1, 10**9), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 3))
)


def tiles_of(some: list[Event]) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
    columns = [np.array([e[i] for e in some], np.int64) for i in range(5)]
    return windows.tiles_of(columns[0], columns[1], columns[2].astype(np.uint32), columns[3].astype(np.uint32), columns[4], 0)


@given(events, events)
def test_tiles_of_parts_merge_into_tiles_of_the_whole(left: list[Event], right: list[Event]) -> None:
    a, b, whole = tiles_of(left), tiles_of(right), tiles_of(left + right)
    merged = windows.merge_tiles(np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]))
    assert merged[0].tobytes() == whole[0].tobytes()
    assert merged[1].tolist() == whole[1].tolist()


@given(events)
def test_each_resolution_holds_each_event_once(some: list[Event]) -> None:
    tiles, _ = tiles_of(some)
    for resolution_ms in windows.TILE_RESOLUTIONS_MS:
        mine = tiles[tiles["resolution_min"] == resolution_ms // MINUTE_MS]
        assert int(mine["count"].sum()) == len(some)
        assert int(mine["total"].sum()) == sum(e[1] for e in some)
        assert all(int(s) * MINUTE_MS % resolution_ms == 0 for s in mine["start_min"])


def test_old_tiles_go_and_lately_updated_ones_stay() -> None:
    now = 1_000 * DAY_MS
    times = [now - age for age in (0, HOUR_MS, 5 * HOUR_MS, 3 * DAY_MS, 40 * DAY_MS)]
    tiles, owner = tiles_of([(t, 1, 0, 0, 0) for t in times])
    kept = tiles[windows.keep_tiles(tiles, owner, now_min=60)]
    by_resolution = {r: int(kept["count"][kept["resolution_min"] == r // MINUTE_MS].sum()) for r in windows.TILE_RESOLUTIONS_MS}
    assert by_resolution == {5 * MINUTE_MS: 2, HOUR_MS: 3, DAY_MS: 4}
    assert windows.keep_tiles(tiles, owner, now_min=windows.RETENTION_REAL_S // 60).all()


@pytest.mark.parametrize(("occupied", "estimate"), [(0, 0), (1, 1), (10, 11), (32, 44), (63, 266), (64, 311)])
def test_the_sketch_estimates_by_linear_counting(occupied: int, estimate: int) -> None:
    assert windows.SKETCH_ESTIMATE[occupied] == estimate
