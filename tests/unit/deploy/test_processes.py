"""Processes that outlive their starter. These start `sleep` and shells, no servers."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import processes
from deploy.processes import ProcessRecord
from tests.helpers import HOST, wait_until


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[ProcessRecord]]:
    """Records put here are killed at the end."""
    records: list[ProcessRecord] = []
    yield records
    for record in records:
        processes.kill(record)


def spawn(tmp_path: Path, script: str, niceness: int = 0) -> ProcessRecord:
    return processes.spawn(["/bin/sh", "-c", script], dict(os.environ), tmp_path, tmp_path / "log", niceness)


def test_a_process_is_found_again_by_its_record(tmp_path: Path, started: list[ProcessRecord]) -> None:
    record = spawn(tmp_path, "exec sleep 60")
    started.append(record)
    path = tmp_path / "record.json"
    processes.write_record(path, record)
    found = processes.read_record(path)
    assert found == record
    assert processes.is_alive(found)
    wait_until(lambda: processes.memory_mb(record) > 0, 5, "it has memory (none for a moment while the kernel loads it)")
    assert 0 <= processes.uptime_s(found) < 60


def test_a_recycled_pid_is_never_touched(tmp_path: Path, started: list[ProcessRecord]) -> None:
    record = spawn(tmp_path, "exec sleep 60")
    started.append(record)
    for other in (
        dataclasses.replace(record, start_ticks=record.start_ticks - 1),
        dataclasses.replace(record, boot_id="another boot"),
    ):
        assert not processes.is_alive(other)
        assert processes.members(other) == []
        assert processes.stop(other, within_s=0.1)
        processes.kill(other)
    assert processes.is_alive(record)


def test_stop_ends_children_too(tmp_path: Path) -> None:
    record = spawn(tmp_path, "sleep 60 & sleep 60 & wait")
    wait_until(lambda: len(processes.members(record)) == 3, 5, "both children run")
    assert processes.stop(record, within_s=5)
    assert processes.members(record) == []


def test_children_of_a_dead_leader_are_found_and_ended(tmp_path: Path) -> None:
    record = spawn(tmp_path, "sleep 60 & wait")
    wait_until(lambda: len(processes.members(record)) == 2, 5, "the child runs")
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: not processes.is_alive(record), 5, "the leader is dead")
    assert len(processes.members(record)) == 1
    processes.stop(record, within_s=5)
    assert processes.members(record) == []


def test_what_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    record = spawn(tmp_path, "trap '' TERM; echo deaf; while true; do sleep 60; done")
    wait_until(lambda: "deaf" in processes.log_tail(tmp_path / "log"), 5, "the trap is set")
    assert not processes.stop(record, within_s=0.2)
    assert processes.members(record) == []


def test_niceness_is_applied(tmp_path: Path, started: list[ProcessRecord]) -> None:
    record = spawn(tmp_path, "exec sleep 60", niceness=5)
    started.append(record)
    here = os.getpriority(os.PRIO_PROCESS, 0)
    wait_until(lambda: os.getpriority(os.PRIO_PROCESS, record.pid) == here + 5, 5, "nice has set it")


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel doesn't group processes by session")
def test_the_session_is_as_nice_as_its_process_or_niceness_means_nothing(tmp_path: Path, started: list[ProcessRecord]) -> None:
    record = spawn(tmp_path, "exec sleep 60", niceness=5)
    started.append(record)
    assert Path(f"/proc/{record.pid}/autogroup").read_text().split()[-2:] == ["nice", "5"]


def test_an_unreadable_record_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert processes.read_record(path) is None
    for text in ("", "{", "[]", '{"pid": 1}'):
        path.write_text(text)
        assert processes.read_record(path) is None


def test_the_listener_of_a_port_is_named() -> None:
    with socket.socket() as server:
        server.bind((HOST, 0))
        port = server.getsockname()[1]
        server.listen()
        owner = processes.listener_of(port)
        assert owner is not None
        assert owner[0] == os.getpid()
    assert processes.listener_of(port) is None


def test_log_tail_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert processes.log_tail(path) == ""
    path.write_text("".join(f"line {i}\n" for i in range(10_000)))
    assert processes.log_tail(path, 2) == "line 9998\nline 9999"
    path.write_text("x" * 100_000)
    assert len(processes.log_tail(path)) == 16_384
