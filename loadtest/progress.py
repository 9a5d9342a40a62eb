"""Progress on standard error: a bar on a terminal, else a plain line every few seconds. Usable from several threads."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm

LINE_EVERY_S = 5.0


class Progress:
    """Counts `what` up to `total` (None: unknown)."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total = what, total
        self._lock = threading.Lock()
        self._done = 0
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(total=total, desc=what, unit=" tx", unit_scale=True) if sys.stderr.isatty() else None

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.update(count)
            elif time.monotonic() - self._last_line >= LINE_EVERY_S:
                self._line()

    def close(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            else:
                self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        rate = self._done / max(self._last_line - self._started, 1e-9)
        of = "" if self._total is None else f" of {self._total}"
        print(f"{self._what}: {self._done}{of}, {rate:.0f} a second", file=sys.stderr, flush=True)
