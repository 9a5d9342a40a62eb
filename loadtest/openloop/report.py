"""What a generator tells whoever started it: one line of JSON a step, on its standard output.

`{"edge": k, "done": n}` at the start of window k and at the end of the last, while it goes on, so that the reader can look at
everyone's CPU at that moment; then `{"result": {...}}`. The reader is `deploy.bench.load`.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import msgspec


def tell(**line: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def cpu_s() -> float:
    """CPU seconds of this process so far, all its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
