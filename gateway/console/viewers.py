"""Who watches: one gatherer's frames to a bounded number of streams of server-sent events.

A frame is encoded once for all. A viewer that doesn't read has FRAMES_WAITING_MAX frames waiting at most and is dropped with the next; its
connection is ended by gateway/http/connections.py when it hasn't been read for the setting `request_timeout_ms`. A stream is of limited
length too, so that a proxy that drains an old gateway isn't held by a screen: the page reconnects by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.metrics import Metrics

FRAMES_WAITING_MAX = 8
END = b""


class Viewer:
    """One stream. `frames` ends with END."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[bytes] = asyncio.Queue(FRAMES_WAITING_MAX)
        self.dropped = False

    def end(self) -> None:
        """Nothing more comes; what waits is not worth sending."""
        while not self.frames.empty():
            self.frames.get_nowait()
        self.frames.put_nowait(END)


class Viewers:
    """`changed` is called when somebody came or left."""

    def __init__(self, viewers_max: int, metrics: Metrics, changed: Callable[[], None] = lambda: None) -> None:
        self._viewers_max = viewers_max
        self._metrics = metrics
        self._changed = changed
        self._viewers: set[Viewer] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._viewers)

    def join(self) -> Viewer | None:
        """None when there are as many as may be, or the gateway leaves."""
        if self._closed or len(self._viewers) >= self._viewers_max:
            self._metrics.console_refused.inc()
            return None
        viewer = Viewer()
        self._viewers.add(viewer)
        self._note()
        return viewer

    def leave(self, viewer: Viewer) -> None:
        if viewer in self._viewers:
            self._viewers.remove(viewer)
            self._note()

    def send(self, frame: bytes) -> None:
        """To all; who has too many waiting is dropped."""
        for viewer in list(self._viewers):
            try:
                viewer.frames.put_nowait(frame)
            except asyncio.QueueFull:
                viewer.dropped = True
                viewer.end()
                self._metrics.console_dropped.inc()
                self.leave(viewer)

    def close(self) -> None:
        """Every stream ends, and none begins."""
        self._closed = True
        for viewer in list(self._viewers):
            viewer.end()
            self.leave(viewer)

    def _note(self) -> None:
        self._metrics.console_viewers.set(len(self._viewers))
        self._changed()
