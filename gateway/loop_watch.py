"""Watches the event loop: how late it comes to what is due, and what the garbage collector costs it.

Collections of the oldest generation are made in idle moments. What outlives one is frozen and not looked at again for COLLECT_ALL_S, like
what the start of the gateway built: what a collection costs depends on what came since the last, not on all there is.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

from gateway.metrics import Metrics

TICK_S = 0.01
# The weight of the newest tick in the mean lag.
LAG_WEIGHT = 0.2
# Ticks between two reports to the histogram.
REPORT_TICKS = 100
# The youngest generation is collected after so many more objects were made than dropped: about a batch's worth is alive at any time.
GC_THRESHOLDS = (20_000, 20, 100)
COLLECT_IDLE_S = 30.0
# What was frozen may have become garbage that only a collection finds: seldom, since most goes when nobody refers to it.
COLLECT_ALL_S = 1800.0
LOOP, GC = "loop", "gc"


class LoopWatch:
    """`idle` tells that nothing is under way. `clock_s` is monotonic."""

    def __init__(self, metrics: Metrics, idle: Callable[[], bool], clock_s: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._idle = idle
        self._clock_s = clock_s
        self._lags_s: list[float] = []
        self._gc_began_s = 0.0
        self._collected_s = self._all_collected_s = 0.0
        # Mean of the latest ticks, seconds.
        self.lag_s = 0.0

    async def run(self) -> None:
        """Runs until cancelled."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        gc.callbacks.append(self._note_gc)
        self._collected_s = self._all_collected_s = self._clock_s()
        try:
            while True:
                due_s = self._clock_s() + TICK_S
                await asyncio.sleep(TICK_S)
                self.note(self._clock_s() - due_s)
        finally:
            gc.callbacks.remove(self._note_gc)

    def note(self, lag_s: float) -> None:
        """One tick came `lag_s` late."""
        lag_s = max(0.0, lag_s)
        self.lag_s += LAG_WEIGHT * (lag_s - self.lag_s)
        self._lags_s.append(lag_s)
        if len(self._lags_s) >= REPORT_TICKS:
            self._metrics.pause_s.observe(LOOP, self._lags_s)
            self._metrics.loop_lag_max_s.set(max(self._lags_s))
            self._lags_s.clear()
        if self._idle() and self._clock_s() - self._collected_s > COLLECT_IDLE_S:
            self._collect()

    def _collect(self) -> None:
        self._collected_s = self._clock_s()
        if self._collected_s - self._all_collected_s > COLLECT_ALL_S:
            self._all_collected_s = self._collected_s
            gc.unfreeze()
        gc.collect()
        gc.freeze()

    def _note_gc(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._gc_began_s = self._clock_s()
        else:
            self._metrics.pause_s.observe(GC, [self._clock_s() - self._gc_began_s])
