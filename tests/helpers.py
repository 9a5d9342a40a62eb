"""What several tests need: waiting on a condition, free ports, and `fraudgate` commands that never outlive their test."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deploy import processes
from deploy.ports import free_ports
from deploy.processes import ProcessRecord
from gateway.contracts.settings import Settings, settings_env

POLL_S = 0.05
HOST = "127.0.0.1"


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Returns as soon as `condition()` is true. Fails with `what` after `timeout_s`. What `condition` raises is not caught."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(POLL_S)


async def until(condition: Callable[[], object], timeout_s: float) -> None:
    """`wait_until` on an event loop. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(POLL_S / 10)


def local_settings(home: Path, **overrides: Any) -> Settings:
    """Settings of a stack of its own: free ports and the given home. The cache of downloads is the usual one."""
    names = [f.name for f in dataclasses.fields(Settings) if f.name.endswith("_port")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    cache = os.environ.get("FRAUDGATE_CACHE_DIR")
    values: dict[str, Any] = {"home": str(home), **ports, **({"cache_dir": cache} if cache else {}), **overrides}
    return Settings(**values)


def command_env(settings: Settings, **extra: str) -> dict[str, str]:
    """The environment of a `fraudgate` command that is to have these settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FRAUDGATE_")}
    return inherited | settings_env(settings) | {"PYTHONUNBUFFERED": "1"} | extra


def run_command(
    settings: Settings, *arguments: str, timeout_s: float = 60, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`fraudgate ARGUMENTS` from start to end, both outputs captured. Its status is not checked."""
    argv = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(
        argv, env=command_env(settings), input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
    )


class RunningCommand:
    """A `fraudgate` command in the background, with its children."""

    def __init__(self, record: ProcessRecord, log_path: Path) -> None:
        self._record = record
        self.log_path = log_path

    @property
    def pid(self) -> int:
        return self._record.pid

    @property
    def alive(self) -> bool:
        return processes.is_alive(self._record)

    def log(self) -> str:
        """Everything it has written so far, both outputs."""
        return self.log_path.read_text(errors="replace")

    def send_signal(self, number: signal.Signals) -> None:
        """To the command alone, not to its children."""
        processes.send_signal(self._record, number, group=False)

    def kill(self) -> None:
        """SIGKILL to the command and its children; returns when they are gone."""
        processes.kill(self._record)

    def stop(self, within_s: float = 20) -> bool:
        """SIGTERM, and SIGKILL after `within_s`; True if SIGTERM was enough."""
        return processes.stop(self._record, within_s)

    def wait_until(self, condition: Callable[[], object], timeout_s: float, what: str) -> None:
        """Like `wait_until`, and fails at once, with the end of its log, when the command ends before that."""
        held = False

        def ended() -> bool:
            # What held once may not hold for the next of several workers: it isn't asked again.
            nonlocal held
            held = bool(condition())
            return held or not self.alive

        try:
            wait_until(ended, timeout_s, what)
            assert held, f"the command ended before: {what}"
        except AssertionError as exc:
            raise AssertionError(f"{exc}\nthe end of its log:\n{processes.log_tail(self.log_path, 40)}") from exc


@contextlib.contextmanager
def running_command(
    settings: Settings, *arguments: str, log_path: Path, env: dict[str, str] | None = None
) -> Iterator[RunningCommand]:
    """`fraudgate ARGUMENTS` in the background; on leaving, it and its children are ended whatever happened."""
    argv = [sys.executable, "-m", "deploy.cli", *arguments]
    command = RunningCommand(processes.spawn(argv, command_env(settings, **(env or {})), Path.cwd(), log_path), log_path)
    try:
        yield command
    finally:
        command.stop()
