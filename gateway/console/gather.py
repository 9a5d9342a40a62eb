"""The console's one gatherer: reads what there is to know, makes a frame of it, and sends it to whoever watches.

While nobody watches it keeps the charts' past alone, a reading of the gateway's own counters every IDLE_S seconds; other processes are
asked, alerts followed and decisions sampled only while somebody does, and LINGER_S longer, so that a reload loses nothing. On the event
loop a frame costs about a millisecond (docs/console.md has what was measured).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from gateway.console import picture
from gateway.console.picture import OWN_NAMES, State
from gateway.console.samples import Reading, Samples
from gateway.console.sources import Source, poll_forever
from gateway.console.stories import FEATURE_NAMES, story_for_page
from gateway.console.viewers import Viewers

log = logging.getLogger(__name__)

# Workers ask each other, which costs each some milliseconds.
TICK_S, TICK_OF_WORKERS_S, IDLE_S = 1.0, 2.0, 5.0
LINGER_S = 30.0
WINDOW_S = 10.0
HISTORY_S, HISTORY_POINTS_MAX = 900.0, 900
STORIES_KEPT, STORIES_PER_FRAME_MAX = 40, 16
_encoder = msgspec.json.Encoder()

ReadOwn = Callable[[tuple[str, ...]], Awaitable[Samples]]


def event(name: str, data: Any) -> bytes:
    """One server-sent event. JSON has no line breaks of its own."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _encoder.encode(data))


class Gatherer:
    """`read_own` reads metrics of the gateway by name, all workers together; `status` and `routing` are its own accounts of itself.

    `texts` gives what each rule tells an analyst.
    """

    def __init__(
        self,
        state: State,
        viewers: Viewers,
        *,
        read_own: ReadOwn,
        accounts: Callable[[], tuple[Mapping[str, Any], Mapping[str, Any]]],
        texts: Callable[[], Mapping[str, str]],
        several: bool = False,
        clock_s: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._state = state
        self._viewers = viewers
        self._read_own = read_own
        self._accounts = accounts
        self._texts = texts
        self._tick_s = TICK_OF_WORKERS_S if several else TICK_S
        self._clock_s = clock_s
        self._now_ms = now_ms
        self._history: deque[list[float | None]] = deque(maxlen=HISTORY_POINTS_MAX)
        self._stories: deque[dict[str, Any]] = deque(maxlen=STORIES_KEPT)
        self._frame: dict[str, Any] | None = None
        self._frame_s = -LINGER_S
        self._watched_s = -LINGER_S
        self._flowing_from_s: float | None = None
        self._alerts_version = -1
        self._polling: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()

    @property
    def watched(self) -> bool:
        """Whether somebody watches, or did a moment ago."""
        return len(self._viewers) > 0 or self._clock_s() - self._watched_s < LINGER_S

    def wake(self) -> None:
        """Somebody came or left."""
        self._watched_s = self._clock_s()
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                began_s = self._clock_s()
                try:
                    await self.tick()
                except Exception:
                    # The screen must not cost the gateway anything, and a bug in it not the next frames.
                    log.exception("console: a frame could not be made")
                # A newcomer doesn't wait for the idle time to end.
                self._wake.clear()
                pause_s = began_s + (self._tick_s if self.watched else IDLE_S) - self._clock_s()
                waiting = asyncio.ensure_future(self._wake.wait())
                await asyncio.wait({waiting}, timeout=max(0.05, pause_s))
                waiting.cancel()
                if self._wake.is_set():
                    await asyncio.sleep(max(0.0, min(pause_s, began_s + self._tick_s - self._clock_s())))
        finally:
            self._rest()

    async def tick(self) -> None:
        """One reading, and one frame when somebody watches."""
        async with self._lock:
            if self.watched:
                self._look()
                await self._make_frame()
            else:
                self._rest()
                await self._read()

    async def hello(self) -> bytes:
        """What a newcomer is told first: the picture as it is, the charts' past, the newest alerts and decisions."""
        async with self._lock:
            if self._frame is None or self._clock_s() - self._frame_s > self._tick_s:
                self._look()
                await self._make_frame()
            assert self._frame is not None
            told = self._frame | {
                "features": FEATURE_NAMES,
                "history": list(self._history),
                "alerts": self._state.alerts.newest(),
                "stories": list(self._stories),
                "tick_s": self._tick_s,
            }
        return event("hello", told)

    async def _read(self) -> None:
        state, now_s = self._state, self._clock_s()
        state.window.add(Reading(now_s, await self._read_own(OWN_NAMES)))
        at_ms = self._now_ms()
        self._history.append(picture.point(state.window, at_ms))
        while self._history[0][0] < at_ms - HISTORY_S * 1000:  # type: ignore[operator]
            self._history.popleft()
        flows = (self._history[-1][1] or 0.0) > 0
        self._flowing_from_s = (self._flowing_from_s or now_s) if flows else None
        state.flowing_s = 0.0 if self._flowing_from_s is None else now_s - self._flowing_from_s

    async def _make_frame(self) -> None:
        state = self._state
        await self._read()
        state.status, state.routing = self._accounts()
        now_s = self._clock_s()
        if state.jobs.value is not None and state.jobs.trouble is None:
            state.tables.note(state.jobs.value, now_s)
        self._frame, self._frame_s = picture.frame(state, now_s, self._now_ms()), now_s
        texts = self._texts()
        stories = [story_for_page(receipt, texts) for receipt in state.tap.take()[-STORIES_PER_FRAME_MAX:]]
        self._stories.extend(stories)
        if len(self._viewers):
            told = self._frame | {"point": self._history[-1], "stories": stories}
            if state.alerts.version != self._alerts_version:
                self._alerts_version = state.alerts.version
                told["alerts"] = state.alerts.newest()
            self._viewers.send(event("frame", told))

    def _look(self) -> None:
        """Ask, follow and sample from now on."""
        state = self._state
        state.tap.watching = True
        state.alerts.start()
        if self._polling is None:
            sources: list[Source] = [s for s in (state.jobs, state.cases, state.alertmanager) if s is not None]
            self._polling = asyncio.create_task(poll_forever(sources))

    def _rest(self) -> None:
        """Nobody watches: leave the others alone."""
        state = self._state
        if state.tap.watching:
            state.tap.forget()
        state.alerts.stop()
        if self._polling is not None:
            self._polling.cancel()
            self._polling = None
