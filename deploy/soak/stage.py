"""Where a soak runs: a stack of its own, in a directory and on ports of its own, with two workers, two models and the Spark streams.

Nothing that exists is touched, and everything that was started is stopped by `close`, whatever happened.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec

from deploy import processes
from deploy.bench.model import TREES, make_model
from deploy.bench.policy import write_policy
from deploy.ports import free_ports
from deploy.processes import children_of
from deploy.soak.alerts import Webhook
from deploy.stack import Stack, StackError
from gateway.contracts.model_meta import ModelEntry
from gateway.contracts.settings import ENV_PREFIX, Settings, load_settings, settings_env
from model_export.package import current_manifest, publish

WORKERS = 2
# What would lead to somebody else's, or to a place outside of the home.
PLACES = ("spool_dir", "model_dir", "api_keys_path", "client_key_path", "webhooks_path", "kafka_bootstrap")
WEBHOOKS = ("alert_page_url", "alert_ticket_url")
REDIS_MEMORY_MB = 4096
SPARK_OPTIMISE_CALLS = 50_000
# A micro-batch costs the gateway 2 ms of CPU beside its rows on cores that are full: fewer of them leave the streams what they need.
BATCH_INTERVAL_MS = 20
# Each Kafka transaction costs the broker milliseconds of CPU, and nobody waits at that door.
KAFKA_CHUNK_INTERVAL_MS = 100
# Two cores at their limit: with less between them Redis waits for a core for a tenth of a second after the broker's start.
JOBS_NICENESS, BROKER_NICENESS = 19, 15
OTHER_SEED = 12
READY_S = 120.0
PATIENCE = 3
# Asked so often in a row, every worker has answered once.
READY_ANSWERS = 16
WARM_S = 900.0
POLL_S = 0.1
PROBE_TIMEOUT_S = 2.0
# Kafka, Redis' log and the tables take so much of disk for a payment, and the stack so much to begin with.
BYTES_A_PAYMENT = 8_000
BYTES_TO_BEGIN = 2_000_000_000


class SoakError(RuntimeError):
    """The soak can't be run to its end. The message says why."""


def say(line: str) -> None:
    # In one piece: services start in several threads.
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def soak_settings(home: Path, webhook: str) -> Settings:
    """The user's own settings but for where things run, and that alerts are told to `webhook`."""
    names = [f.name for f in fields(Settings)]
    changed: dict[str, Any] = {
        name: "" for name in names if name in PLACES or (name.endswith(("_url", "_uri")) and name != "maven_url")
    }
    ports = [name for name in names if name.endswith("_port")]
    changed |= dict(zip(ports, free_ports(len(ports)), strict=True))
    changed |= {
        "policy_path": str(home / "policy"),
        "redis_memory_mb": REDIS_MEMORY_MB,
        "spark_optimise_calls": SPARK_OPTIMISE_CALLS,
        "batch_interval_ms": BATCH_INTERVAL_MS,
        "kafka_chunk_interval_ms": KAFKA_CHUNK_INTERVAL_MS,
        "jobs_niceness": JOBS_NICENESS,
        "broker_niceness": BROKER_NICENESS,
    }
    changed |= {name: webhook for name in names if name in WEBHOOKS}
    return replace(load_settings(), home=str(home), host="127.0.0.1", **changed)


class Stage:
    """`start` it, then let it be loaded; `close` in any case."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.webhook = Webhook()
        self.settings = soak_settings(home, self.webhook.url)
        write_policy(home / "policy")
        self.stack = Stack(self.settings, say)
        gateway = self.stack.services["gateway"]
        env = gateway.command()[1]
        argv = [sys.executable, "-m", "deploy.cli", "serve", "--workers", str(WORKERS)]
        self.stack.services["gateway"] = replace(gateway, command=lambda: (argv, env), stop_within_s=60)
        for name, service in self.stack.services.items():
            # A service may come up beside a full load.
            self.stack.services[name] = replace(service, ready_within_s=service.ready_within_s * PATIENCE)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)} | settings_env(self.settings)
        self.env["PYTHONUNBUFFERED"] = "1"
        # Set when the soak ends early: what is down then needn't come up again.
        self.ending = threading.Event()
        self._routes: list[dict[str, ModelEntry]] = []

    def check_disk(self, payments: int) -> None:
        """Raises `SoakError` when the disk is too small for so many payments."""
        wanted = BYTES_TO_BEGIN + payments * BYTES_A_PAYMENT
        free = shutil.disk_usage(self.settings.home_path).free
        if free < wanted:
            raise SoakError(
                f"{self.settings.home_path} has {free / 1e9:.0f} GB free, {payments:,} payments want {wanted / 1e9:.0f}: --home"
            )

    def start(self) -> None:
        """Raises `SoakError` or `StackError`."""
        self.webhook.start()
        # Compiled kernels, if an installation has none of this version: workers that compile would measure the compiler.
        self.run("gateway.warm", timeout_s=WARM_S)
        self.stack.start(["kafka", "redis", "registry"])
        self.stack.create_topics_and_schemas()
        models = self.settings.models_path
        for version, trees, seed in (("2", TREES * 3 // 4, OTHER_SEED), ("1", TREES, OTHER_SEED - 1)):
            _, grown = make_model(models, trees, version, seed)
            manifest = current_manifest(models)
            assert manifest is not None
            self._routes.append(dict(manifest.routes))
            say(f"model       version {version}, {grown} trees")
        # One after the other: at their start each takes all it can get.
        self.stack.start(["gateway", *self.watchers])
        self.stack.start(["jobs"])
        self.wait(self.all_ready, READY_S, "both workers ready with Redis, Kafka and model")

    @property
    def watchers(self) -> list[str]:
        """What watches: Prometheus and Alertmanager, where this stack has them."""
        services = self.stack.services
        wanted = ["alertmanager", "prometheus"]
        there = all(name in services and getattr(services[name], "missing", None) is None for name in wanted)
        return wanted if there else []

    def all_ready(self) -> bool:
        return len(self.worker_pids()) == WORKERS and all(self._ready() for _ in range(READY_ANSWERS))

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.settings.gateway}/readyz", timeout=PROBE_TIMEOUT_S) as reply:  # noqa: S310
                body: dict[str, Any] = msgspec.json.decode(reply.read())
        except (OSError, msgspec.DecodeError):
            return False
        return not {"redis", "kafka", "model"} & set(body.get("degraded", []))

    def wait(self, condition: Callable[[], bool], within_s: float, what: str) -> None:
        """Raises `SoakError` after `within_s`, or when the soak is to end."""
        give_up_s = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > give_up_s:
                raise SoakError(f"not within {within_s:.0f} s: {what}")
            if self.ending.wait(POLL_S):
                raise SoakError(f"ended while waiting: {what}")

    def worker_pids(self) -> list[int]:
        """The processes that serve, in the order of their start: children of the supervisor."""
        supervisor = self.stack.pid("gateway")
        if supervisor is None:
            return []
        try:
            return sorted(map(int, Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()))
        except OSError:
            return []

    def pids_of(self, name: str) -> list[int]:
        """A service's processes, children that left its group included."""
        first = self.stack.pid(name)
        children, found = children_of(), []
        queue = [] if first is None else [first]
        while queue:
            found.append(queue.pop())
            queue += children.get(found[-1], [])
        return found

    def signal(self, name: str, number: signal.Signals) -> None:
        """To the service and its children. Raises `StackError` when it doesn't run."""
        record = self.stack.record(name)
        if record is None or not processes.is_alive(record):
            raise StackError(f"{name} does not run")
        processes.send_signal(record, number, group=True)

    def run(self, module: str, *arguments: str, timeout_s: float) -> None:
        """A module of ours as a program. Raises `SoakError` when it fails or takes longer."""
        argv = [sys.executable, "-m", module, *arguments]
        try:
            done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as exc:
            raise SoakError(f"{module} {' '.join(arguments)} took more than {timeout_s:.0f} s") from exc
        if done.returncode:
            raise SoakError(f"{module} {' '.join(arguments)} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")

    def swap_model(self) -> str:
        """Make the other model champion. Its version."""
        now = current_manifest(self.settings.models_path)
        other: Mapping[str, ModelEntry] = next(r for r in self._routes if now is None or r != dict(now.routes))
        publish(self.settings.models_path, other)
        return next(iter(other.values())).version

    def close(self) -> None:
        """Everything that was started, and what was halted goes on first."""
        self.ending.set()
        for name in self.stack.services:
            for pid in self.pids_of(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        self.stack.stop()
        self.webhook.close()
