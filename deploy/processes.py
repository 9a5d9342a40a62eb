"""A process that outlives the command which started it: how it is started, found again, measured and ended.

Used by `deploy.stack` for everything `fraudgate up` starts. A process is remembered in a record file by its pid, the time it
started (kernel ticks) and the boot it belongs to, so that a pid which the kernel has given to somebody else is never touched.
Each runs in a session of its own; its children (Spark's JVM, MLflow's worker) are in the same process group and end with it.
Needs Linux's /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

POLL_S = 0.05
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")

# Children of this interpreter, by pid: kept so that they can be reaped. A child nobody waits for stays as a zombie.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class ProcessRecord:
    """Names one process for good. `start_ticks` is field 22 of /proc/PID/stat: clock ticks between boot and its start."""

    pid: int
    start_ticks: int
    boot_id: str
    started_at_ms: int


@dataclass(frozen=True)
class _Stat:
    """What /proc/PID/stat tells. `state` is Z for a zombie; `resident_bytes` counts shared pages in full."""

    pid: int
    state: str
    group: int
    session: int
    start_ticks: int
    resident_bytes: int


def spawn(argv: list[str], env: dict[str, str], cwd: Path, log_path: Path, niceness: int = 0) -> ProcessRecord:
    """Start `argv` in its own session, both outputs appended to the log. Raises OSError when it can't be executed.

    Where the kernel groups processes by session (autogroup, as Debian's does), niceness counts only within a session: the session is made
    nice as well.
    """
    if niceness:
        argv = ["nice", "-n", str(niceness), *argv]
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    _children[child.pid] = child
    if niceness:
        with contextlib.suppress(OSError):
            (_PROC / str(child.pid) / "autogroup").write_text(str(niceness))
    stat = _stat(child.pid)
    assert stat is not None, "an unreaped child has an entry in /proc"
    return ProcessRecord(child.pid, stat.start_ticks, _boot_id(), time.time_ns() // 1_000_000)


def write_record(path: Path, record: ProcessRecord) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(record)))
    partial.replace(path)


def read_record(path: Path) -> ProcessRecord | None:
    """None when there is no record, or none that can be read (a record is replaced as a whole, so that is foreign text)."""
    try:
        return ProcessRecord(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def is_alive(record: ProcessRecord) -> bool:
    """True while the very process of the record runs. Reaps it if it is an ended child of ours."""
    stat = _stat(record.pid)
    if stat is not None and stat.state not in "ZX":
        return _is_same(record, stat)
    child = _children.pop(record.pid, None)
    if child is not None:
        child.wait()
    return False


def members(record: ProcessRecord) -> list[int]:
    """Living processes of the record's group, also when its leader is gone. Empty when the pid belongs to somebody else now."""
    if record.boot_id != _boot_id():
        return []
    leader = _stat(record.pid)
    if leader is not None and not _is_same(record, leader):
        return []
    found = []
    for pid in _pids():
        stat = _stat(pid)
        if (
            stat is not None
            and stat.group == record.pid == stat.session
            and stat.start_ticks >= record.start_ticks
            and stat.state not in "ZX"
        ):
            found.append(pid)
    return found


def send_signal(record: ProcessRecord, number: signal.Signals, *, group: bool) -> None:
    """To the leader, or to every member of its group. A process that ended meanwhile is no error."""
    targets = members(record) if group else [record.pid] if is_alive(record) else []
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def stop(record: ProcessRecord, within_s: float) -> bool:
    """End the leader and then what is left of its group: SIGTERM, wait up to `within_s`, SIGKILL. True if SIGTERM was enough."""
    send_signal(record, signal.SIGTERM, group=False)
    deadline = time.monotonic() + within_s
    gentle = _wait_gone(record, deadline, leader_only=True)
    send_signal(record, signal.SIGTERM, group=True)
    gentle = _wait_gone(record, max(deadline, time.monotonic() + 1.0), leader_only=False) and gentle
    if not gentle:
        kill(record)
    return gentle


def kill(record: ProcessRecord) -> None:
    """SIGKILL to the whole group; returns when it is gone. Raises TimeoutError for one that even that doesn't end in 10 s."""
    send_signal(record, signal.SIGKILL, group=True)
    if not _wait_gone(record, time.monotonic() + 10.0, leader_only=False):
        raise TimeoutError(f"process {record.pid} is still there 10 s after SIGKILL")


def _wait_gone(record: ProcessRecord, deadline: float, *, leader_only: bool) -> bool:
    while is_alive(record) or (not leader_only and members(record)):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def memory_mb(record: ProcessRecord) -> float:
    """Resident memory of the record's group, MiB. Pages shared between its processes are counted in each."""
    stats = [_stat(pid) for pid in members(record)]
    return sum(s.resident_bytes for s in stats if s is not None) / 2**20


def uptime_s(record: ProcessRecord) -> float:
    uptime = float((_PROC / "uptime").read_text().split()[0])
    return max(0.0, uptime - record.start_ticks / _TICKS_PER_S)


def listener_of(port: int) -> tuple[int, str] | None:
    """(pid, command line) of the process that listens on a TCP port; None if nobody does or it may not be seen (other user)."""
    inodes = set()
    for table in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in (_PROC / table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{columns[9]}]")
    if not inodes:
        return None
    for pid in _pids():
        # Another user's descriptors can't be listed, and a process may end while it is looked at.
        with contextlib.suppress(PermissionError, FileNotFoundError, ProcessLookupError):
            for fd in (_PROC / str(pid) / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if str(fd.readlink()) in inodes:
                        command = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        return pid, command.strip()
    return None


def log_tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log, at most 16 KiB of it."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def children_of() -> dict[int, list[int]]:
    """The living processes of this machine by their parent, as ids."""
    found: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                found.setdefault(parent, []).append(int(entry.name))
    return found


def command_line(pid: int) -> str:
    """What a process was started with, empty when it is gone."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _boot_id() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def _is_same(record: ProcessRecord, stat: _Stat) -> bool:
    return stat.start_ticks == record.start_ticks and record.boot_id == _boot_id()


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name stands in parentheses and may hold spaces and parentheses itself.
    columns = text.rpartition(")")[2].split()
    return _Stat(pid, columns[0], int(columns[2]), int(columns[3]), int(columns[19]), int(columns[21]) * _PAGE_BYTES)
