"""`python -I forks.py PROGRAM ...`: the program in this process's place, and beside it a watcher that makes its forks give way.

For Redis, which writes its append-only file anew in a fork: that takes a core for seconds from those who pay then. A fork gets what nobody
else wants (SCHED_IDLE) for PATIENCE_S, then as little as NICENESS leaves it, so that it comes to an end on a machine that is never idle.
To be nice alone is not enough: a core with something nice on it is no idle core, and the others crowd on the next; where the kernel
groups processes by session, it counts among Redis' own processes only. The watcher is of the program's process group, costs a look every
LOOK_S, and ends when the program does. Where the kernel has no pidfd or doesn't list children, there is none.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time

LOOK_S = 0.05
PATIENCE_S = 60.0
NICENESS = 10


def main(argv: list[str]) -> int:
    """Doesn't return when the program can be started. Exit status 2: it was called wrongly. Raises OSError when it can't be started."""
    if not argv:
        print("usage: forks.py PROGRAM [ARGUMENT ...]", file=sys.stderr)
        return 2
    program = os.getpid()
    if os.path.exists(children_path(program)) and hasattr(os, "pidfd_open"):
        # Twice, so that the watcher is nobody's child that the program would have to wait for.
        between = os.fork()
        if not between:
            if not os.fork():
                watch(program)
            os._exit(0)
        os.waitpid(between, 0)
    os.execv(argv[0], argv)  # noqa: S606


def watch(program: int, patience_s: float = PATIENCE_S) -> None:
    """Until the program has ended."""
    # By child, when it was first seen.
    seen_s: dict[int, float] = {}
    try:
        ending = select.poll()
        ending.register(os.pidfd_open(program), select.POLLIN)
        while not ending.poll(LOOK_S * 1000):
            with open(children_path(program)) as file:
                children = [int(child) for child in file.read().split()]
            now_s = time.monotonic()
            seen_s = {child: seen_s.get(child, now_s) for child in children}
            for child, since_s in seen_s.items():
                # It may be gone by now, or not be ours to hurry.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    give_way(child, idle=now_s - since_s < patience_s)
    except OSError:
        # The program has gone, or nobody lets us look: what it forks goes before others, that is all.
        return


def give_way(child: int, *, idle: bool) -> None:
    """Raises ProcessLookupError, and PermissionError where the kernel lets nobody but root out of SCHED_IDLE again."""
    policy = os.SCHED_IDLE if idle else os.SCHED_OTHER
    if os.getpriority(os.PRIO_PROCESS, child) < NICENESS:
        os.setpriority(os.PRIO_PROCESS, child, NICENESS)
    if os.sched_getscheduler(child) != policy:
        os.sched_setscheduler(child, policy, os.sched_param(0))


def children_path(pid: int) -> str:
    return f"/proc/{pid}/task/{pid}/children"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
