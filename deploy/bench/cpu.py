"""CPU of processes with all their threads and children, from /proc, and which cores they run on. Used by `fraudgate bench`.

The kernel counts in ticks of 10 ms: over a window of seconds that is well under a percent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.processes import children_of

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def tree_of(root: int) -> list[int]:
    """`root` and its living descendants."""
    children = children_of()
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += children.get(pid, [])
    return found


def cpu_s(root: int) -> float:
    """CPU seconds of a process and its descendants, those that ended and were waited for among them. 0 when it is gone."""
    ticks = 0
    for pid in tree_of(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            columns = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            ticks += sum(map(int, columns[11:15]))
    return ticks / _TICKS_PER_S


def compiling_s(jvm: int) -> float:
    """CPU seconds of a JVM's compilers. 0 when it is gone."""
    ticks = 0
    with contextlib.suppress(FileNotFoundError):
        for task in Path(f"/proc/{jvm}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                name, _, columns = (task / "stat").read_text(errors="replace").rpartition(")")
                if "Compiler" in name:
                    ticks += sum(map(int, columns.split()[11:13]))
    return ticks / _TICKS_PER_S


def pin(root: int, cores: set[int]) -> None:
    """Every thread of a process and its descendants on these cores. What they start later inherits it."""
    for pid in tree_of(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(task.name), cores)


class Meter:
    """Samples the CPU of named processes. `pid_of` gives a name's process id, None while it doesn't run."""

    def __init__(self, pid_of: Mapping[str, Callable[[], int | None]]) -> None:
        self._pid_of = dict(pid_of)

    def sample(self) -> dict[str, float]:
        """CPU seconds so far by name, of those that run."""
        pids = {name: pid for name, find in self._pid_of.items() if (pid := find()) is not None}
        return {name: cpu_s(pid) for name, pid in pids.items()}


def per_event_us(before: Mapping[str, float], after: Mapping[str, float], events: int) -> dict[str, float]:
    """Microseconds of CPU an event by name, for what ran at both ends. Empty when there were no events."""
    if events <= 0:
        return {}
    return {name: (after[name] - before[name]) / events * 1e6 for name in after if name in before}
