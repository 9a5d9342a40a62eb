"""One at a time: maintenance and erasure change the same tables."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from deploy.locked import locked

LOCK_FILE = ".upkeep.lock"


class UpkeepRunningError(RuntimeError):
    """Another maintenance or erasure works on the same tables."""


def alone(home: Path) -> AbstractContextManager[None]:
    """Entering it raises `UpkeepRunningError` while another works in `home`."""
    return locked(home / LOCK_FILE, UpkeepRunningError(f"another fraudgate maintain or erase is at work in {home}"))
