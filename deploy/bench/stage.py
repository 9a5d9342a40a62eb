"""Where `fraudgate bench` measures: a stack, a model and warm features of its own, in a directory of its own; and running generators.

Nothing that exists is touched, and everything that was started is stopped by `close`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import msgspec

from deploy import processes
from deploy.bench.cpu import Meter, compiling_s, pin
from deploy.bench.jobs import BenchError, bench_settings, bound_to
from deploy.bench.model import make_model
from deploy.bench.policy import write_policy
from deploy.ports import free_ports
from deploy.processes import ProcessRecord
from deploy.services import http_ok
from deploy.stack import Stack
from gateway.contracts.settings import ENV_PREFIX, Settings, settings_env

SERVICES = ("kafka", "redis", "registry")
REDIS_MEMORY_MB = 4096
# Thousands of transactions a second want the optimising compiler (docs/settings.md).
SPARK_OPTIMISE_CALLS = 50_000
FILL_TIMEOUT_S = 420.0
PEER_READY_S = 60.0
IDLE_LOOK_S = 0.5
IDLE_SHARE = 0.15


def say(line: str) -> None:
    # In one piece: services start in several threads.
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Cores:
    """One core for what is measured, the others for everything else, when they are kept apart."""

    measured: set[int]
    others: set[int]

    @property
    def all(self) -> set[int]:
        return self.measured | self.others


def cores() -> Cores:
    """Raises `BenchError` on a machine with one core."""
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        raise BenchError("two cores are needed: one for what is measured and one for everything else")
    return Cores({max(mine)}, mine - {max(mine)})


class Generator:
    """A `loadtest.openloop` process: `lines` yields what it tells; `send` gives it a line. Killed when its time is over."""

    def __init__(self, module: str, arguments: Sequence[str], env: dict[str, str], log: Path, time_s_max: float) -> None:
        self._log = log
        self._file: IO[bytes] = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._file
        )
        self._killer = threading.Timer(time_s_max, self.process.kill)
        self._killer.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def lines(self) -> Iterator[dict[str, Any]]:
        """Ends with the line `result`. Raises `BenchError` when the process ends without one."""
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line: dict[str, Any] = msgspec.json.decode(raw)
            yield line
            if "result" in line:
                return
        raise BenchError(f"a load generator ended without a result:\n{processes.log_tail(self._log)}")

    def send(self, line: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(line) + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self._killer.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._file):
            if stream is not None:
                stream.close()


class Stage:
    """One stack with its model. `start` it, then measure; `close` in any case."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.settings: Settings = replace(
            bench_settings(home),
            redis_memory_mb=REDIS_MEMORY_MB,
            spark_optimise_calls=SPARK_OPTIMISE_CALLS,
            policy_path=str(home / "policy"),
        )
        write_policy(home / "policy")
        self.stack = Stack(self.settings, say)
        self.cores = cores()
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)} | settings_env(self.settings)
        self.env["PYTHONUNBUFFERED"] = "1"
        self.peer: ProcessRecord | None = None
        self.model_path = Path()
        self.trees = 0
        self.meter = Meter({name: lambda name=name: self.stack.pid(name) for name in ("gateway", "redis", "kafka", "jobs")})  # type: ignore[misc]

    def start(self) -> None:
        self.stack.start(SERVICES)
        self.stack.create_topics_and_schemas()
        self.model_path, self.trees = make_model(self.settings.models_path)
        say(f"model       XGBoost, {self.trees} trees, as ONNX")

    def fill(self, cards: int, payments_mean: float, merchants: int) -> None:
        """A month of history for each card, in Redis. Raises `BenchError` when that fails or takes too long."""
        begin = time.monotonic()
        log = self.settings.home_path / "logs/fill.log"
        with log.open("ab") as out:
            argv = [sys.executable, "-m", "deploy.bench.fill", str(cards), str(payments_mean), str(merchants)]
            try:
                done = subprocess.run(argv, env=self.env, stdout=subprocess.PIPE, stderr=out, timeout=FILL_TIMEOUT_S, check=False)
            except subprocess.TimeoutExpired as exc:
                raise BenchError(f"Redis was not filled within {FILL_TIMEOUT_S:.0f} s") from exc
        if done.returncode:
            raise BenchError(f"Redis could not be filled:\n{processes.log_tail(log)}")
        count = int(done.stdout.split()[-1])
        say(f"history     {count:,} payments of {cards:,} cards in Redis after {time.monotonic() - begin:.0f} s")

    def generator(self, module: str, *arguments: object, time_s_max: float) -> Generator:
        log = self.settings.home_path / "logs/load.log"
        return Generator(f"loadtest.openloop.{module}", [str(a) for a in arguments], self.env, log, time_s_max)

    def gateway_alone(self) -> None:
        """The gateway has a core to itself, started anew if it runs elsewhere."""
        self._keep_apart()
        with bound_to(self.cores.measured):
            self.stack.start(["gateway"])
        self._pin("gateway", self.cores.measured)

    def share(self) -> None:
        """Everything shares all cores. The gateway runs."""
        os.sched_setaffinity(0, self.cores.all)
        self.stack.start(["gateway"])
        for name in (*SERVICES, "gateway", "jobs"):
            self._pin(name, self.cores.all)

    def _keep_apart(self) -> None:
        os.sched_setaffinity(0, self.cores.others)
        for name in (*SERVICES, "jobs"):
            self._pin(name, self.cores.others)

    def _pin(self, name: str, wanted: set[int]) -> None:
        pid = self.stack.pid(name)
        if pid is not None:
            pin(pid, wanted)

    @contextmanager
    def peer_alone(self, name: str, *arguments: object, healthy: Callable[[int], bool]) -> Iterator[int]:
        """`loadtest.peers.NAME` on the measured core, everything else on the others; yields its port."""
        self._keep_apart()
        (port,) = free_ports(1)
        argv = [sys.executable, "-m", f"loadtest.peers.{name}", str(port), *map(str, arguments)]
        log = self.settings.home_path / f"logs/{name}.log"
        with bound_to(self.cores.measured):
            record = processes.spawn(argv, self.env, Path.cwd(), log)
        self.peer = record
        try:
            give_up = time.monotonic() + PEER_READY_S
            while not healthy(port):
                if not processes.is_alive(record) or time.monotonic() > give_up:
                    raise BenchError(f"{name} did not start:\n{processes.log_tail(log, 5)}")
                time.sleep(0.1)  # sleeps: between two tries to reach a server that is starting
            yield port
        finally:
            self.peer = None
            processes.stop(record, 10)

    def peer_meter(self) -> Meter:
        """What a peer's run costs: the peer itself is `service`."""
        return Meter({"service": lambda: None if self.peer is None else self.peer.pid, "redis": lambda: self.stack.pid("redis")})

    def broker_compiling_s(self) -> float:
        """CPU seconds that the broker's JVM has spent on compiling itself so far."""
        pid = self.stack.pid("kafka")
        return 0.0 if pid is None else compiling_s(pid)

    def wait_idle(self, within_s: float) -> bool:
        """Until gateway, Redis and Kafka have nothing left to do, so that a run doesn't pay for the one before. False: in vain."""
        give_up = time.monotonic() + within_s
        before, at = self.meter.sample(), time.monotonic()
        while time.monotonic() < give_up:
            time.sleep(IDLE_LOOK_S)  # sleeps: the time over which CPU is looked at
            now, now_at = self.meter.sample(), time.monotonic()
            busy = sum(s - before.get(name, s) for name, s in now.items() if name != "jobs") / (now_at - at)
            if busy < IDLE_SHARE:
                return True
            before, at = now, now_at
        return False

    def close(self) -> None:
        os.sched_setaffinity(0, self.cores.all)
        if self.peer is not None:
            processes.stop(self.peer, 10)
        self.stack.stop()


def answers(path: str) -> Callable[[int], bool]:
    """A check that GET `path` answers 200 on a port."""
    return lambda port: http_ok(f"http://127.0.0.1:{port}{path}")


def remove(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
