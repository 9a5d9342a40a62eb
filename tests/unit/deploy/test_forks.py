"""Forks of a program that is watched give way to others, and the watcher goes when the program does."""

from __future__ import annotations

import os
import subprocess
import sys

from deploy import forks
from tests.helpers import wait_until

WITHIN_S = 10.0
# Whoever runs the tests may be nice already.
NICENESS = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 7)
# A program whose fork waits until it is nice, and tells the program by its exit status.
FORKS = f"""
import os, time
print(os.getpid(), os.getpriority(os.PRIO_PROCESS, 0), flush=True)
child = os.fork()
if not child:
    give_up = time.monotonic() + {WITHIN_S}
    while os.getpriority(os.PRIO_PROCESS, 0) != {NICENESS} and time.monotonic() < give_up:
        time.sleep(0.01)  # sleeps: in the child
    os._exit(os.getpriority(os.PRIO_PROCESS, 0))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.getpriority(os.PRIO_PROCESS, 0), flush=True)
"""


def test_a_fork_becomes_nice_and_the_program_stays_as_it_was_and_leaves_nothing_behind() -> None:
    argv = [sys.executable, "-I", forks.__file__, str(NICENESS), sys.executable, "-c", FORKS]
    program = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, _ = program.communicate(timeout=2 * WITHIN_S)
    finally:
        program.kill()
    (pid, before), (of_fork, after) = (map(int, line.split()) for line in out.splitlines())
    assert program.returncode == 0
    assert pid == program.pid, "whoever started it knows its id"
    assert of_fork == NICENESS
    assert before == after == os.getpriority(os.PRIO_PROCESS, 0)
    wait_until(lambda: not group_lives(program.pid), WITHIN_S, "the watcher has ended")


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_called_without_a_program_it_says_how() -> None:
    ended = subprocess.run([sys.executable, "-I", forks.__file__, "7"], capture_output=True, text=True, timeout=WITHIN_S)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage:")
