"""The faults of a soak: each is a context that holds while it is open, and is over for what it touched when it closes.

`FAULTS` has one for each kind of `deploy.soak.plan`. They run in a thread of `deploy.soak.run`, against a `Stage` of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import numpy as np
from confluent_kafka import KafkaError, Message, Producer

from deploy.soak.plan import KINDS
from deploy.soak.stage import SoakError, Stage
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import client_headers
from gateway.contracts.topics import TRANSACTIONS
from loadtest.hostile import HostileCase, hostile_cases

SLOW_STOPPED_S, SLOW_RUNS_S = 0.06, 0.02
POISON_A_SECOND = 25
POISON_BYTES_MAX = 200_000
POISON_FLUSH_S = 60.0
BODY_TIMEOUT_S = 5.0
DEPLOY_S = 150.0
RELOAD_S = 20.0


@dataclass
class Traces:
    """What faults leave behind for the check: where poison was put, and how bodies that mean harm were answered."""

    rng: np.random.Generator
    poison: list[tuple[int, int]] = field(default_factory=list)
    bodies: Counter[int] = field(default_factory=Counter)
    undelivered: int = 0


Fault = Callable[[Stage, Traces], AbstractContextManager[str]]


@contextmanager
def gateway_kill(stage: Stage, traces: Traces) -> Iterator[str]:
    pid = a_worker(stage, traces)
    os.kill(pid, signal.SIGKILL)
    yield f"worker {pid}"


@contextmanager
def gateway_stop(stage: Stage, traces: Traces) -> Iterator[str]:
    pid = a_worker(stage, traces)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield f"worker {pid}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def a_worker(stage: Stage, traces: Traces) -> int:
    pids = stage.worker_pids()
    if not pids:
        raise SoakError("no worker serves")
    return pids[int(traces.rng.integers(len(pids)))]


@contextmanager
def redis_stop(stage: Stage, traces: Traces) -> Iterator[str]:
    stage.signal("redis", signal.SIGSTOP)
    try:
        yield ""
    finally:
        stage.signal("redis", signal.SIGCONT)


@contextmanager
def redis_slow(stage: Stage, traces: Traces) -> Iterator[str]:
    over = threading.Event()

    def halt_again_and_again() -> None:
        while not over.is_set():
            stage.signal("redis", signal.SIGSTOP)
            over.wait(SLOW_STOPPED_S)
            stage.signal("redis", signal.SIGCONT)
            over.wait(SLOW_RUNS_S)

    halting = threading.Thread(target=halt_again_and_again, name="redis-slow")
    halting.start()
    try:
        yield f"stopped for {SLOW_STOPPED_S * 1000:.0f} ms, runs for {SLOW_RUNS_S * 1000:.0f}"
    finally:
        over.set()
        halting.join()
        stage.signal("redis", signal.SIGCONT)


@contextmanager
def killed(stage: Stage, name: str) -> Iterator[str]:
    """A service that is killed at the beginning and started at the end, unless everything ends."""
    stage.stack.kill(name)
    try:
        yield ""
    finally:
        if not stage.ending.is_set():
            stage.stack.start([name])


def redis_kill(stage: Stage, traces: Traces) -> AbstractContextManager[str]:
    return killed(stage, "redis")


def broker_kill(stage: Stage, traces: Traces) -> AbstractContextManager[str]:
    return killed(stage, "kafka")


def jobs_kill(stage: Stage, traces: Traces) -> AbstractContextManager[str]:
    return killed(stage, "jobs")


@contextmanager
def nothing_grows(pids: list[int]) -> Iterator[str]:
    """No write to a file succeeds for these processes (EFBIG, as ENOSPC would be): a limit of the kernel's, for which nobody needs root."""
    before: dict[int, tuple[int, int]] = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            before[pid] = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[pid][1]))
    try:
        yield f"{len(before)} processes"
    finally:
        for pid, limits in before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def disk_full(stage: Stage, traces: Traces) -> AbstractContextManager[str]:
    return nothing_grows(stage.worker_pids())


def jobs_disk_full(stage: Stage, traces: Traces) -> AbstractContextManager[str]:
    return nothing_grows(stage.pids_of("jobs"))


@contextmanager
def clock_skew(stage: Stage, traces: Traces) -> Iterator[str]:
    """The sender does it, at the same time: it knows the plan."""
    yield "by the sender"


@contextmanager
def poison(stage: Stage, traces: Traces) -> Iterator[str]:
    settings = stage.settings
    schema_id = SchemaRegistry(settings.registry, settings.schemas_path).id_of(TRANSACTIONS)
    cases = [
        case
        for case in hostile_cases(time.time_ns() // 1_000_000, schema_id, prefix="poison")
        if case.refusal is not None and len(case.value) <= POISON_BYTES_MAX
    ]
    over = threading.Event()
    feeding = threading.Thread(target=feed, args=(stage, traces, cases, over), name="poison")
    feeding.start()
    try:
        yield f"{len(cases)} kinds"
    finally:
        over.set()
        feeding.join()


def feed(stage: Stage, traces: Traces, cases: list[HostileCase], over: threading.Event) -> None:
    """One message and one body at a time, at an even pace, until it is over."""

    def told(error: KafkaError | None, message: Message) -> None:
        partition, offset = message.partition(), message.offset()
        if error is not None or partition is None or offset is None:
            traces.undelivered += 1
        else:
            traces.poison.append((partition, offset))

    producer = Producer({"bootstrap.servers": stage.settings.bootstrap, "linger.ms": 5, "log_level": 0})
    for number, case in enumerate(itertools.cycle(cases)):
        if over.wait(1 / POISON_A_SECOND):
            break
        if number % 2 and case.kind == "json":
            traces.bodies[post(stage, case.value)] += 1
        else:
            producer.produce(TRANSACTIONS, case.value, f"poison-{number}", on_delivery=told)
        producer.poll(0)
    traces.undelivered += producer.flush(POISON_FLUSH_S)


def post(stage: Stage, body: bytes) -> int:
    """The status, 0 for no answer."""
    request = urllib.request.Request(  # noqa: S310
        f"{stage.settings.gateway}/score", body, {"Content-Type": "application/json"} | client_headers(stage.settings)
    )
    try:
        with urllib.request.urlopen(request, timeout=BODY_TIMEOUT_S) as reply:  # noqa: S310
            return int(reply.status)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code
    except OSError:
        return 0


@contextmanager
def model_swap(stage: Stage, traces: Traces) -> Iterator[str]:
    yield f"version {stage.swap_model()}"


@contextmanager
def deploy(stage: Stage, traces: Traces) -> Iterator[str]:
    before = set(stage.worker_pids())
    began_s = time.monotonic()
    stage.run("deploy.cli", "reload", timeout_s=RELOAD_S)
    stage.wait(lambda: not before & set(stage.worker_pids()) and stage.all_ready(), DEPLOY_S, "every worker is a new one")
    yield f"took {time.monotonic() - began_s:.0f} s"


FAULTS: dict[str, Fault] = {
    "gateway_kill": gateway_kill,
    "gateway_stop": gateway_stop,
    "redis_stop": redis_stop,
    "redis_kill": redis_kill,
    "redis_slow": redis_slow,
    "broker_kill": broker_kill,
    "jobs_kill": jobs_kill,
    "disk_full": disk_full,
    "jobs_disk_full": jobs_disk_full,
    "clock_skew": clock_skew,
    "poison": poison,
    "model_swap": model_swap,
    "deploy": deploy,
}
assert FAULTS.keys() == KINDS.keys()
