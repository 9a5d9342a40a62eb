"""The local stack: starts, watches and stops the services as plain processes on loopback.

Everything of a service lies under the home directory: data/NAME, logs/NAME.log and run/NAME.json (which process it is). Used by
`fraudgate up | down | status | restart` and by the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from deploy import processes
from deploy.processes import ProcessRecord
from deploy.services import Service, ServiceFilesError, data_path, local_services
from deploy.toolchain import ToolMissingError
from deploy.topics import create_topics, partitions, register_schemas, wanted_partitions
from gateway.contracts.settings import Settings
from gateway.contracts.topics import TOPICS

Say = Callable[[str], None]

PORT_RELEASE_S = 10.0


class StackError(RuntimeError):
    """The stack can't be brought to the state asked for. The message says what to do about it."""


@dataclass(frozen=True)
class ServiceStatus:
    """`state` is running or stopped; `health` is ok, failing, died (it was started and is gone) or - (stopped)."""

    name: str
    state: str
    pid: int | None
    port: int
    health: str
    memory_mb: float
    uptime_s: float

    @property
    def well(self) -> bool:
        return self.health in ("ok", "-")


def _can_bind(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _silent(_: str) -> None:
    """For callers that show no progress."""


class Stack:
    """The services of one home directory. `say` is called with each line of progress, from several threads."""

    def __init__(self, settings: Settings, say: Say = _silent) -> None:
        self.settings = settings
        self.services = local_services(settings)
        self._say = say

    @property
    def core_names(self) -> list[str]:
        """What `fraudgate up` starts."""
        return [s.name for s in self.services.values() if s.core]

    def up(self, *, everything: bool = False) -> None:
        """Start the core services, create topics and schemas; with `everything` also what reads and scores, and what watches it."""
        self.start(self.core_names)
        self.create_topics_and_schemas()
        if everything:
            rest = [s for s in self.services.values() if not s.core and s.wanted]
            for service in rest:
                if service.missing is not None:
                    self._say(f"{service.name:<11} left out: {service.missing}")
            self.start([s.name for s in rest if s.missing is None])

    def create_topics_and_schemas(self) -> None:
        created = create_topics(self.settings)
        for name, count in partitions(self.settings).items():
            wanted = wanted_partitions(self.settings, TOPICS[name])
            if count != wanted:
                self._say(f"topics      {name} has {count} partitions, the setting says {wanted}: left as it is")
        self._say(f"topics      {'created ' + ', '.join(created) if created else 'all there'}")
        ids = register_schemas(self.settings)
        self._say("schemas     registered, BACKWARD: " + ", ".join(f"{topic} {i}" for topic, i in ids.items()))

    def start(self, names: Iterable[str]) -> None:
        """Start those of the services that don't run, at the same time, and wait until each is healthy.

        Raises `StackError` with the first failure, after every other start has ended; what did start stays up.
        """
        chosen = [self._service(name) for name in names]
        abandoned = threading.Event()
        with self._lock():
            pool = ThreadPoolExecutor(max_workers=max(1, len(chosen)))
            try:
                starts = [pool.submit(self._start, service, abandoned) for service in chosen]
                wait(starts)
            finally:
                # On Ctrl-C nothing is started any more; without it all starts have ended.
                abandoned.set()
                pool.shutdown()
        failures = [str(exc) for exc in (start.exception() for start in starts) if isinstance(exc, StackError)]
        for start in starts:
            exc = start.exception()
            if exc is not None and not isinstance(exc, StackError):
                raise exc
        if failures:
            raise StackError("\n".join(failures))

    def stop(self, names: Iterable[str] | None = None) -> list[str]:
        """Stop the services, the last started first: all, or those named. Returns the names of those that ran."""
        wanted = set(self.services if names is None else [self._service(name).name for name in names])
        stopped = []
        with self._lock():
            for service in reversed([self._service(name) for name in self.services if name in wanted]):
                record = self.record(service.name)
                if record is None:
                    continue
                if processes.members(record):
                    begin = time.monotonic()
                    gentle = processes.stop(record, service.stop_within_s)
                    how = "stopped" if gentle else f"killed, it did not end within {service.stop_within_s:.0f} s of SIGTERM:"
                    self._say(f"{service.name:<11} {how} after {time.monotonic() - begin:.1f} s")
                    stopped.append(service.name)
                self._record_path(service.name).unlink(missing_ok=True)
        return stopped

    def restart(self, name: str) -> None:
        self.stop([name])
        self.start([name])

    def kill(self, name: str) -> None:
        """SIGKILL to the service and its children, as a crash would be. Its record stays, so that `status` tells it died."""
        record = self.record(name)
        if record is None or not processes.members(record):
            raise StackError(f"{name} does not run")
        processes.kill(record)

    def pid(self, name: str) -> int | None:
        """The process id of a running service, else None."""
        record = self.record(name)
        return record.pid if record is not None and processes.is_alive(record) else None

    def record(self, name: str) -> ProcessRecord | None:
        """The process that was last started for the service, running or not; None when none was, or it was stopped."""
        return processes.read_record(self._record_path(self._service(name).name))

    def log_path(self, name: str) -> Path:
        return self.settings.home_path / "logs" / f"{name}.log"

    def wait_healthy(self, name: str, abandoned: threading.Event | None = None) -> None:
        """Returns when the running service answers its health check. Raises `StackError` if it dies or takes too long.

        Set `abandoned` from another thread to give up the wait.
        """
        service = self._service(name)
        record = self.record(name)
        if record is None:
            raise StackError(f"{name} does not run")
        deadline = time.monotonic() + service.ready_within_s
        while not service.healthy():
            tail = f"the end of {self.log_path(name)}:\n{processes.log_tail(self.log_path(name))}"
            if not processes.is_alive(record):
                raise StackError(f"{name} died at its start; {tail}")
            if abandoned is not None and abandoned.is_set():
                raise StackError(f"{name} was left starting")
            if time.monotonic() > deadline:
                raise StackError(f"{name} is not ready after {service.ready_within_s:.0f} s; {tail}")
            time.sleep(processes.POLL_S)
        # A healthy answer may come from somebody else on that port while ours is dying of it.
        if not processes.is_alive(record):
            raise StackError(f"{name} died, and something else answers on port {service.port}")

    def status(self) -> list[ServiceStatus]:
        """One entry a service, asked at the same time; without those that nobody wants and nobody started."""
        shown = [s for s in self.services.values() if s.wanted or self.record(s.name) is not None]
        with ThreadPoolExecutor(max_workers=len(shown)) as pool:
            return list(pool.map(self._status, shown))

    def _status(self, service: Service) -> ServiceStatus:
        record = self.record(service.name)
        if record is None:
            return ServiceStatus(service.name, "stopped", None, service.port, "-", 0.0, 0.0)
        if not processes.is_alive(record):
            return ServiceStatus(service.name, "stopped", None, service.port, "died", 0.0, 0.0)
        health = "ok" if service.healthy() else "failing"
        memory, uptime = processes.memory_mb(record), processes.uptime_s(record)
        return ServiceStatus(service.name, "running", record.pid, service.port, health, memory, uptime)

    def _start(self, service: Service, abandoned: threading.Event) -> None:
        name, begin = service.name, time.monotonic()
        record = self.record(name)
        if record is not None and processes.is_alive(record):
            already = service.healthy()
            self.wait_healthy(name, abandoned)
            self._say(f"{name:<11} {'already running' if already else 'was starting, ready now'}, pid {record.pid}")
            return
        if record is not None and processes.members(record):
            self._say(f"{name:<11} its main process died; ending what it left behind")
            processes.kill(record)
        self._check_ports(service)
        self._say(f"{name:<11} starting on port {service.port}")
        data, log = data_path(self.settings, name), self.log_path(name)
        for folder in (data, log.parent, self._record_path(name).parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            service.prepare()
            argv, env = service.command()
            if abandoned.is_set():
                raise StackError(f"{name} was not started")
            # Our own programs may be given relative paths by the settings: they run where the caller stands.
            record = processes.spawn(argv, env, data if service.core else Path.cwd(), log, service.niceness)
        except (ServiceFilesError, ToolMissingError, OSError) as exc:
            raise StackError(f"{name} could not be started: {exc}") from exc
        processes.write_record(self._record_path(name), record)
        self.wait_healthy(name, abandoned)
        self._say(f"{name:<11} ready after {time.monotonic() - begin:.1f} s, pid {record.pid}")

    def _check_ports(self, service: Service) -> None:
        """Raises `StackError` for a port that another process listens on. Sockets that a killed one left are given time to close."""
        give_up = time.monotonic() + PORT_RELEASE_S
        for setting, port in service.ports.items():
            while not _can_bind(self.settings.host, port):
                owner = processes.listener_of(port)
                if owner is None and time.monotonic() < give_up:
                    time.sleep(processes.POLL_S)
                    continue
                by = "" if owner is None else f" by process {owner[0]} ({owner[1][:80]})"
                raise StackError(f"{service.name} could not be started: port {port} is taken{by}; set {setting} to a free port")

    def _service(self, name: str) -> Service:
        if name not in self.services:
            raise StackError(f"there is no service {name!r} here; there are {', '.join(self.services)}")
        return self.services[name]

    def _record_path(self, name: str) -> Path:
        return self.settings.home_path / "run" / f"{name}.json"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Held while services are started or stopped, so that two commands don't start one service twice."""
        path = self.settings.home_path / "run/lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise StackError(
                    f"another fraudgate command is starting or stopping services of {self.settings.home_path}"
                ) from exc
            yield
