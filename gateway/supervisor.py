"""`fraudgate serve --workers N`: one process a core behind one listening socket, replaced one by one on SIGHUP.

The supervisor holds the socket and its queue of connections, which therefore outlive any worker: nobody is refused while workers change.
It serves nothing itself. A worker is an interpreter of its own, so a new one runs the code that is installed when it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.contracts.settings import Settings
from gateway.worker_metrics import fold_departed

log = logging.getLogger(__name__)

PID_FILE = "gateway.pid"
LISTEN_BACKLOG = 2048
# A worker takes four seconds of CPU; one that is given up too early on a busy machine is started again and again.
READY_TIMEOUT_S = 120.0
# Longer than a worker takes at most: its connections, its chunk, its buffer.
LEAVE_TIMEOUT_S = 35.0
RESTART_FIRST_S = 0.5
RESTART_MAX_S = 10.0
# A worker that ran so long has not failed at start.
PROVEN_S = 30.0
POLICY_STATUS = 2
# While a worker starts, its imports included, it gives way to those that serve, if any do.
STARTING_NICENESS = 10
CAP_SYS_NICE = 23


@dataclass(eq=False)
class Worker:
    slot: int
    process: asyncio.subprocess.Process
    control: socket.socket
    started_s: float
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: bool = False

    @property
    def name(self) -> str:
        return f"{self.slot}-{self.process.pid}"


class Supervisor:
    """Runs until SIGTERM or SIGINT; `run` returns the exit status."""

    def __init__(self, settings: Settings, workers: int, *, kafka: bool) -> None:
        self._settings = settings
        self._slots = workers
        self._kafka = kafka
        self._workers: dict[int, Worker] = {}
        self._stopping = asyncio.Event()
        self._status = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._replacing = asyncio.Lock()
        self._metrics_dir = Path()

    async def run(self) -> int:
        listener = socket.create_server((self._settings.host, self._settings.gateway_port), backlog=LISTEN_BACKLOG)
        self._metrics_dir = Path(tempfile.mkdtemp(prefix="fraudgate-metrics-"))
        pid_path = self._settings.home_path / PID_FILE
        loop = asyncio.get_running_loop()
        try:
            pid_path.parent.mkdir(parents=True, exist_ok=True)
            pid_path.write_text(f"{os.getpid()}\n")
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stopping.set)
            loop.add_signal_handler(signal.SIGHUP, lambda: self._start(self._replace_all(listener)))
            await asyncio.gather(*[self._launch(slot, listener) for slot in range(self._slots)])
            await self._stopping.wait()
            await self._end(list(self._workers.values()))
        finally:
            listener.close()
            for task in self._tasks:
                task.cancel()
            pid_path.unlink(missing_ok=True)
            shutil.rmtree(self._metrics_dir, ignore_errors=True)
        return self._status

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _spawn(self, slot: int, listener: socket.socket) -> Worker:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        argv = [
            *(sys.executable, "-m", "gateway.worker", "--slot", str(slot)),
            *("--listen-fd", str(listener.fileno()), "--control-fd", str(theirs.fileno())),
            *("--metrics-dir", str(self._metrics_dir)),
            *([] if self._kafka else ["--no-kafka"]),
        ]
        process = await asyncio.create_subprocess_exec(*argv, pass_fds=(listener.fileno(), theirs.fileno()))
        theirs.close()
        if any(other.ready.is_set() and other.process.returncode is None for other in self._workers.values()):
            _nice(process.pid, STARTING_NICENESS)
        worker = Worker(slot, process, ours, time.monotonic())
        self._start(self._listen(worker))
        return worker

    async def _listen(self, worker: Worker) -> None:
        """What the worker says on its line, until it ends."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while said := await loop.sock_recv(worker.control, 256):
                if b"ready" in said:
                    _nice(worker.process.pid, 0)
                    worker.ready.set()
                if b"released" in said:
                    worker.released.set()
        await worker.process.wait()
        worker.released.set()
        worker.control.close()
        fold_departed(self._metrics_dir, worker.name)

    async def _ready(self, worker: Worker) -> bool:
        ready = asyncio.create_task(worker.ready.wait())
        ended = asyncio.create_task(worker.process.wait())
        await asyncio.wait({ready, ended}, timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        for task in (ready, ended):
            task.cancel()
        return worker.ready.is_set() and worker.process.returncode is None

    async def _launch(self, slot: int, listener: socket.socket) -> None:
        """A worker for an empty slot, which is watched from then on."""
        worker = self._workers[slot] = await self._spawn(slot, listener)
        if await self._ready(worker):
            self._consume(worker)
            log.info("supervisor: worker %d serves (pid %d)", slot, worker.process.pid)
        elif worker.process.returncode == POLICY_STATUS:
            self._status = POLICY_STATUS
            self._stopping.set()
            return
        self._start(self._watch(worker, listener, RESTART_FIRST_S))

    async def _watch(self, worker: Worker, listener: socket.socket, pause_s: float) -> None:
        """Start a worker that ended by itself anew."""
        if not worker.ready.is_set() and worker.process.returncode is None:
            worker.process.kill()
        status = await worker.process.wait()
        while not worker.leaving and not self._stopping.is_set() and self._workers.get(worker.slot) is worker:
            if time.monotonic() - worker.started_s > PROVEN_S:
                pause_s = RESTART_FIRST_S
            log.error("supervisor: worker %d ended (status %d), starting anew in %.1f s", worker.slot, status, pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()
                    return
            pause_s = min(pause_s * 2, RESTART_MAX_S)
            worker = self._workers[worker.slot] = await self._spawn(worker.slot, listener)
            if await self._ready(worker):
                self._consume(worker)
                log.info("supervisor: worker %d serves (pid %d)", worker.slot, worker.process.pid)
            else:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.kill()
            status = await worker.process.wait()

    async def _replace_all(self, listener: socket.socket) -> None:
        """One slot after the other: the new worker serves before the old one leaves. Stops at the first that doesn't come up."""
        async with self._replacing:
            log.info("supervisor: replacing %d workers", self._slots)
            for slot in range(self._slots):
                if self._stopping.is_set() or not await self._replace(slot, listener):
                    return
            log.info("supervisor: replaced %d workers", self._slots)

    async def _replace(self, slot: int, listener: socket.socket) -> bool:
        new = await self._spawn(slot, listener)
        if not await self._ready(new):
            log.error("supervisor: the new worker %d didn't come up (status %s), the old one stays", slot, new.process.returncode)
            new.leaving = True
            with contextlib.suppress(ProcessLookupError):
                new.process.kill()
            return False
        old, self._workers[slot] = self._workers[slot], new
        old.leaving = True
        with contextlib.suppress(ProcessLookupError):
            old.process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await old.released.wait()
        self._consume(new)
        self._start(self._watch(new, listener, RESTART_FIRST_S))
        await self._end([old])
        return True

    def _consume(self, worker: Worker) -> None:
        with contextlib.suppress(OSError):
            worker.control.send(b"consume\n")

    async def _end(self, workers: list[Worker]) -> None:
        """SIGTERM, and SIGKILL for who takes too long."""
        for worker in workers:
            worker.leaving = True
            if worker.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.terminate()
        leaving = [asyncio.create_task(worker.process.wait()) for worker in workers]
        if leaving:
            _, late = await asyncio.wait(leaving, timeout=LEAVE_TIMEOUT_S)
            if late:
                log.error("supervisor: %d workers didn't leave in time and are killed", len(late))
        for worker in workers:
            if worker.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.process.kill()
                await worker.process.wait()


def _nice(pid: int, niceness: int) -> None:
    """Only where it can be undone: with CAP_SYS_NICE."""
    lines = Path("/proc/self/status").read_text().splitlines()
    capabilities = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff")), 0)
    if capabilities >> CAP_SYS_NICE & 1:
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, pid, niceness)
