"""One at a time: maintenance and erasure change the same tables."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".upkeep.lock"


class UpkeepRunningError(RuntimeError):
    """Another maintenance or erasure works on the same tables."""


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """The kernel lets go of the lock when its process ends, however it ends. Raises `UpkeepRunningError`."""
    home.mkdir(parents=True, exist_ok=True)
    fd = os.open(home / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise UpkeepRunningError(f"another fraudgate maintain or erase is at work in {home}") from exc
        yield
    finally:
        os.close(fd)
