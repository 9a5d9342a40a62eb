"""`fraudgate maintain`: retention, order and size of files, vacuum, of all Delta tables; once, or every so many hours."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence

from deltalake.exceptions import DeltaError

from deploy.history.alone import UpkeepRunningError, alone
from deploy.history.lake import NoTableError
from deploy.history.upkeep import UpkeepError, maintain_once, told
from deploy.repeating import HOUR_S, repeat
from gateway.contracts.settings import Settings, load_settings

# Below everything that somebody waits for.
NICENESS = 15


def maintain(argv: Sequence[str]) -> int:
    """Exit status 1 when a round of --once failed."""
    parser = argparse.ArgumentParser(
        prog="fraudgate maintain",
        description="Deletes what is past its time, sorts and compacts the Delta tables, and removes files that no promised version needs.",
    )
    parser.add_argument("--once", action="store_true", help="one round (default: go on, every FRAUDGATE_MAINTAIN_HOURS)")
    options = parser.parse_args(argv)
    settings = load_settings()
    os.nice(NICENESS)
    if options.once:
        return _round(settings)
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    return repeat(lambda: _round(settings), settings.maintain_hours * HOUR_S, stop)


def _round(settings: Settings) -> int:
    try:
        with alone(settings.home_path):
            print(told(maintain_once(settings)), flush=True)
    except (UpkeepError, UpkeepRunningError, NoTableError, DeltaError, OSError) as exc:
        print(f"fraudgate maintain: {exc}", file=sys.stderr, flush=True)
        return 1
    return 0
