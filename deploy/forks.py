"""`python -I forks.py NICENESS PROGRAM ...`: the program in this process's place, and beside it a watcher that makes its forks give way.

For Redis, which writes its append-only file anew in a fork: that takes a core for seconds from those who pay then. Were Redis itself nice,
its forks would be nicer by nothing, so they are made so from outside. The watcher is of the program's process group, costs a look every
LOOK_S, and ends when the program does. Where the kernel has no pidfd or doesn't list children, there is none.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys

LOOK_S = 0.1


def main(argv: list[str]) -> int:
    """Doesn't return when the program can be started. Exit status 2: it was called wrongly. Raises OSError when it can't be started."""
    if len(argv) < 2 or not argv[0].isdigit():
        print("usage: forks.py NICENESS PROGRAM [ARGUMENT ...]", file=sys.stderr)
        return 2
    program = os.getpid()
    if os.path.exists(children_path(program)) and hasattr(os, "pidfd_open"):
        # Twice, so that the watcher is nobody's child that the program would have to wait for.
        between = os.fork()
        if not between:
            if not os.fork():
                watch(program, int(argv[0]))
            os._exit(0)
        os.waitpid(between, 0)
    os.execv(argv[1], argv[1:])  # noqa: S606


def watch(program: int, niceness: int) -> None:
    """Until the program has ended."""
    try:
        ending = select.poll()
        ending.register(os.pidfd_open(program), select.POLLIN)
        while not ending.poll(LOOK_S * 1000):
            with open(children_path(program)) as children:
                for child in map(int, children.read().split()):
                    # It may be gone by now.
                    with contextlib.suppress(ProcessLookupError):
                        if os.getpriority(os.PRIO_PROCESS, child) < niceness:
                            os.setpriority(os.PRIO_PROCESS, child, niceness)
    except OSError:
        # The program has gone, or nobody lets us look: what it forks goes before others, that is all.
        return


def children_path(pid: int) -> str:
    return f"/proc/{pid}/task/{pid}/children"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
