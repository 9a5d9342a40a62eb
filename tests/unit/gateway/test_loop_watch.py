import gc
import weakref

from gateway.loop_watch import COLLECT_ALL_S, REPORT_TICKS, LoopWatch
from gateway.metrics import Metrics


def test_a_loop_that_comes_late_is_told() -> None:
    metrics = Metrics()
    watch = LoopWatch(metrics, idle=lambda: False)
    for i in range(REPORT_TICKS):
        watch.note(0.025 if i == 3 else 0.0001)
    text = metrics.text().decode()
    assert 'fraudgate_pause_seconds_bucket{le="0.02",of="loop"} 99.0' in text
    assert 'fraudgate_pause_seconds_count{of="loop"} 100.0' in text
    assert "fraudgate_loop_lag_max_seconds 0.025" in text
    assert 0 < watch.lag_s < 0.001


def test_a_loop_that_is_busy_all_the_time_has_a_mean_lag_that_says_so() -> None:
    watch = LoopWatch(Metrics(), idle=lambda: False)
    for _ in range(20):
        watch.note(0.01)
    assert watch.lag_s > 0.009


def test_the_oldest_objects_are_collected_when_nothing_is_under_way() -> None:
    collected: list[str] = []
    now_s = 0.0
    busy = True
    watch = LoopWatch(Metrics(), idle=lambda: not busy, clock_s=lambda: now_s)

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            collected.append(phase)

    gc.callbacks.append(note)
    try:
        now_s = 100.0
        watch.note(0)
        assert collected == []
        busy = False
        watch.note(0)
        watch.note(0)
        assert len(collected) == 1
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


def test_what_outlives_a_collection_is_looked_at_again_only_after_half_an_hour() -> None:
    now_s = 0.0
    watch = LoopWatch(Metrics(), idle=lambda: True, clock_s=lambda: now_s)
    try:
        gc.collect()
        kept, gone = Ring(), weakref.WeakSet[Ring]()
        gone.add(kept)
        now_s = 100.0
        watch.note(0)
        del kept
        for now_s in (200.0, 300.0):  # noqa: B007
            watch.note(0)
        assert len(gone) == 1, "frozen"
        now_s = COLLECT_ALL_S + 200.0
        watch.note(0)
        assert not gone
    finally:
        gc.unfreeze()
