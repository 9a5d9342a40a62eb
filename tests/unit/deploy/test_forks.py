"""Forks of a program that is watched give way to others, and the watcher goes when the program does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deploy import forks
from tests.helpers import wait_until

WITHIN_S = 10.0
# A program whose fork waits until it gives way, then tells the program by its exit status that it is idle.
FORKS = f"""
import os, time
print(os.getpid(), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), flush=True)
child = os.fork()
if not child:
    give_up = time.monotonic() + {WITHIN_S}
    while os.sched_getscheduler(0) != os.SCHED_IDLE and time.monotonic() < give_up:
        time.sleep(0.01)  # sleeps: in the child
    os._exit(os.sched_getscheduler(0) == os.SCHED_IDLE)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), flush=True)
"""


def test_a_fork_gives_way_and_the_program_stays_as_it_was_and_leaves_nothing_behind() -> None:
    argv = [sys.executable, "-I", forks.__file__, sys.executable, "-c", FORKS]
    program = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, _ = program.communicate(timeout=2 * WITHIN_S)
    finally:
        program.kill()
    (pid, *before), (fork_was_idle, *after) = (map(int, line.split()) for line in out.splitlines())
    assert program.returncode == 0
    assert pid == program.pid, "whoever started it knows its id"
    assert fork_was_idle
    assert before == after == [os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)]
    wait_until(lambda: not group_lives(program.pid), WITHIN_S, "the watcher has ended")


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel lets only root out of SCHED_IDLE")
def test_a_fork_that_takes_long_is_only_nice_in_the_end() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            forks.give_way(child.pid, idle=True)
            assert os.sched_getscheduler(child.pid) == os.SCHED_IDLE
            forks.give_way(child.pid, idle=False)
            assert os.sched_getscheduler(child.pid) == os.SCHED_OTHER
            assert os.getpriority(os.PRIO_PROCESS, child.pid) >= forks.NICENESS
        finally:
            child.kill()


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_called_without_a_program_it_says_how() -> None:
    ended = subprocess.run([sys.executable, "-I", forks.__file__], capture_output=True, text=True, timeout=WITHIN_S)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage:")
