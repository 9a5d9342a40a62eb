"""Something done again every so many hours, until it is told to stop. For commands that a machine without a scheduler keeps running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

HOUR_S = 3600


def repeat(once: Callable[[], int], every_s: float, stop: threading.Event, clock_s: Callable[[], float] = time.monotonic) -> int:
    """Calls `once` at once and then every `every_s` seconds, counted from the beginning of each call, until `stop` is set.

    Returns 0: what an attempt came to was told when it was made.
    """
    while not stop.is_set():
        began = clock_s()
        once()
        stop.wait(max(0.0, every_s - (clock_s() - began)))
    return 0
