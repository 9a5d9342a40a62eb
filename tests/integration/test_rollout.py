"""The next version of the gateway takes over behind the local proxy: callers notice nothing, and a bad version goes back."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import processes
from deploy.ports import free_ports
from deploy.rollout.proxy import Proxy, socket_path
from deploy.rollout.state import BLUE, GREEN, ROOT, SERVICE_OF, port_of, read_state
from deploy.stack import Stack
from gateway.contracts.audit import read_audit
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import encode_json
from loadtest.offered import NOT_SENT, Offered, offer, quantile
from tests.helpers import run_command, running_command, wait_until
from tests.integration.gateway_helpers import (
    Decisions,
    gateway_of_its_own,
    make_transaction,
    name,
    post,
    produce,
    ready_without,
    request,
)
from tests.integration.kafka_faults import Flow, Receipts, assert_each_decided_once
from tests.tools import needs_haproxy
from tests.unit.gateway.factories import write_model

pytestmark = [pytest.mark.integration, needs_haproxy]
READY_WITHIN_S = 60
DEPLOY_WITHIN_S = 150
# More than wait at a time on a machine that is busy with other things.
CONNECTIONS = 500
# On a machine that does other things too, how long answers take is nobody's fault here.
PATIENT = ("--p99-ms", "9000")
BRIEF = ("--canary-s", "2", "--bake-s", "2", *PATIENT)


class CountedReceipts(Receipts):
    """Keeps the counts alone: 200,000 receipts are a lot of memory."""

    def count(self) -> Counter[str]:
        counts = super().count()
        self.messages.clear()
        self._counted = 0
        return counts


class Load:
    """Payments to `port` at `rate` a second until it is ended, at most for `longest_s`."""

    def __init__(self, settings: Settings, port: int, rate: float, longest_s: float) -> None:
        self.ids: list[str] = []
        self._prefix = name("load")
        self._ended = threading.Event()
        self._settings, self._port, self._rate, self._longest_s = settings, port, rate, longest_s
        self._offered: Offered | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _request(self, i: int) -> tuple[str, bytes]:
        card = f"{self._prefix}-{i % 5000}"
        t = make_transaction(f"{self._prefix}-{i}", card_id=f"card-{card}", customer_id=f"of-{card}", merchant_id=f"m-{i % 300}")
        self.ids.append(t.transaction_id)
        return t.transaction_id, encode_json(t)

    def _run(self) -> None:
        sending = offer(
            *(self._settings.host, self._port, lambda _: self._rate, self._longest_s, self._request, CONNECTIONS),
            enough=self._ended.is_set,
        )
        self._offered = asyncio.run(sending)

    def end(self) -> Offered:
        self._ended.set()
        self._thread.join()
        assert self._offered is not None
        return self._offered


@pytest.fixture(scope="module")
def here(stack: Stack, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of a gateway alone, which runs, and of whatever is deployed in its place. Kafka and the others are the session's."""
    assert stack.pid("kafka")
    folder = tmp_path_factory.mktemp("rollout")
    write_model(folder / "models")
    green, proxy = free_ports(2)
    own = dataclasses.replace(
        gateway_of_its_own(settings, folder, "rollout"),
        gateway_green_port=green,
        proxy_port=proxy,
        kafka_bootstrap=settings.bootstrap,
        redis_url=settings.redis,
        registry_url=settings.registry,
        mlflow_url=settings.mlflow,
    )
    running = Stack(own, say=lambda line: print(line, flush=True))
    try:
        running.start(["gateway"])
        yield running
    finally:
        running.stop()


def url_port(here: Stack) -> int:
    return here.settings.proxy_port


def active(here: Stack) -> str:
    state = read_state(here.settings.home_path)
    return BLUE if state is None else state.active


def deploy(here: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = run_command(here.settings, "deploy", *arguments, timeout_s=DEPLOY_WITHIN_S)
    print(done.stdout + done.stderr, flush=True)
    return done


def answers_through_the_proxy(here: Stack) -> bool:
    through = dataclasses.replace(here.settings, gateway_port=url_port(here))
    return ready_without(through, "redis", "model", "kafka")


def assert_none_failed(offered: Offered) -> None:
    latencies = offered.answered()
    print(
        f"\n{len(offered.samples)} requests, {dict(offered.statuses())}, sender late by {offered.late_ms:.0f} ms, "
        + ", ".join(f"p{q * 100:g} {quantile(latencies, q) * 1000:.1f} ms" for q in (0.5, 0.99, 0.999)),
        flush=True,
    )
    # What the sender had no connection for, on a machine busy with other things, nobody has failed.
    assert set(offered.statuses()) <= {200, NOT_SENT}
    assert offered.mixed_up == 0


def test_a_new_version_takes_over_under_load_and_no_request_fails(here: Stack, settings: Settings) -> None:
    own = here.settings
    if read_state(own.home_path) is None:
        here.start(["proxy"])
    before = active(here)
    tail = CountedReceipts(own)
    flow, load = Flow(own, 50), Load(own, url_port(here), 200, 120)
    try:
        done = deploy(here, *BRIEF, "--reason", "a test", "--settings", "KEEP_ALIVE_S=60")
    finally:
        offered, by_kafka = load.end(), flow.end()
    assert done.returncode == 0, done.stdout + done.stderr
    assert_none_failed(offered)
    assert offered.statuses()[200] > 1000
    assert active(here) != before
    assert here.pid(SERVICE_OF[before]) is None
    assert_each_decided_once(tail, set(load.ids) | by_kafka, "a deploy under load")
    tail.close()
    # It joins its consumer group again.
    wait_until(lambda: answers_through_the_proxy(here), READY_WITHIN_S, "the version that has the traffic is whole")
    entry = read_audit(own.models_path)[0][-1]
    assert (entry.action, entry.subject, entry.reason) == ("deploy", "gateway", "a test")
    assert entry.after is not None
    assert "FRAUDGATE_KEEP_ALIVE_S=60" in entry.after
    # Our own callers find it, wherever it runs.
    scored = run_command(own, "score", encode_json(make_transaction(name("by-proxy"))).decode())
    assert scored.returncode == 0, scored.stderr
    status = run_command(own, "deploy", "--status")
    assert status.returncode == 0, status.stdout
    assert f"{active(here):<10} active  pid {here.pid(SERVICE_OF[active(here)])}" in status.stdout


def test_a_gateway_leaves_the_consumer_group_and_joins_it_again_as_it_is_told(here: Stack) -> None:
    slot = active(here)
    record = here.record(SERVICE_OF[slot])
    assert record is not None
    place = dataclasses.replace(here.settings, gateway_port=port_of(here.settings, slot))

    def consumes() -> bool:
        _, body = request(place, "GET", "/readyz")
        return bool(body["consuming"])

    tail = Decisions(here.settings)
    assert consumes()
    processes.send_signal(record, signal.SIGUSR2, group=False)
    wait_until(lambda: not consumes(), READY_WITHIN_S, "it has left")
    waits = make_transaction(name("waits"))
    produce(here.settings, [(waits.card_id, encode_json(waits))])
    served = make_transaction(name("served"))
    assert post(place, served)[0] == 200
    assert set(tail.of([served.transaction_id])) == {served.transaction_id}
    assert waits.transaction_id not in {r.transaction_id for r in tail.receipts()}
    # However often and however quickly it is told.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR1):
        processes.send_signal(record, number, group=False)
    tail.of([waits.transaction_id])
    tail.close()
    wait_until(lambda: consumes() and ready_without(place, "kafka"), READY_WITHIN_S, "it is back in the group")


def broken_version(folder: Path, what: str) -> Path:
    """A checkout whose gateway has a bug: this one's, and `what` done to it before it serves."""
    (folder / "deploy").mkdir(parents=True)
    (folder / "deploy/__init__.py").touch()
    lines = [
        "import os, sys, time",
        # Where its compiled kernels are.
        f"sys.path.insert(0, {str(ROOT)!r})",
        "from gateway.http.batcher import Batcher",
        "from gateway.commands import serve",
        "from gateway.scoring.scorer import Scorer",
    ]
    (folder / "deploy/cli.py").write_text("\n".join([*lines, what, "sys.exit(serve(sys.argv[2:]))"]) + "\n")
    return folder


# What is done to the version, and what the command says of it.
BUGS = {
    "answers 500": (
        "async def decide(self, jobs, requests=None):\n    raise RuntimeError('a bug')\nScorer.decide = decide",
        "requests failed, more than 1.00%",
    ),
    "dies of its first request": (
        "def submit(self, *arguments, **options):\n    os._exit(7)\nBatcher.submit = submit",
        "died; the end of",
    ),
    "is slow": (
        "usual = Scorer.decide\nasync def decide(self, *arguments):\n    time.sleep(0.4)\n    return await usual(self, *arguments)\n"
        "Scorer.decide = decide",
        "its p99 is",
    ),
}


def assert_goes_back(here: Stack, said: str, *arguments: str) -> Offered:
    """The deploy ends with status 1 and `said`, and the version that ran has all traffic and the consumer group."""
    before, pid = active(here), here.pid(SERVICE_OF[active(here)])
    if here.pid("proxy") is None:
        here.start(["proxy"])
    load = Load(here.settings, url_port(here), 100, 120)
    try:
        done = deploy(here, *arguments)
    finally:
        offered = load.end()
    assert done.returncode == 1, done.stdout
    assert said in done.stderr
    assert "has all the traffic" in done.stderr
    assert (active(here), here.pid(SERVICE_OF[before])) == (before, pid)
    assert here.pid(SERVICE_OF[GREEN if before == BLUE else BLUE]) is None
    # It joins its consumer group again.
    wait_until(lambda: answers_through_the_proxy(here), READY_WITHIN_S, "the version that has the traffic is whole")
    assert read_state(here.settings.home_path).trial is None  # type: ignore[union-attr]
    entry = read_audit(here.settings.models_path)[0][-1]
    assert (entry.action, entry.before) == ("deploy_failed", entry.after)
    assert said in entry.reason
    return offered


def test_a_version_that_refuses_its_policy_changes_nothing(here: Stack, tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/policy.yaml").write_text("bands: nonsense\n")
    assert_none_failed(assert_goes_back(here, "the policy can't be used", "--policy", str(tmp_path / "policy"), *BRIEF))


def test_a_version_that_answers_500_goes_back_and_no_caller_notices(here: Stack, tmp_path: Path) -> None:
    bug, said = BUGS["answers 500"]
    version = broken_version(tmp_path / "version", bug)
    assert_none_failed(
        assert_goes_back(here, said, "--version-dir", str(version), "--python", sys.executable, "--canary-s", "8", *PATIENT)
    )


@pytest.mark.slow
def test_a_version_that_does_not_start_changes_nothing(here: Stack) -> None:
    assert_none_failed(assert_goes_back(here, "died at its start", "--python", "/bin/false", *BRIEF))


@pytest.mark.slow
def test_a_version_that_dies_of_its_first_request_goes_back(here: Stack, tmp_path: Path) -> None:
    bug, said = BUGS["dies of its first request"]
    version = broken_version(tmp_path / "version", bug)
    assert_none_failed(assert_goes_back(here, said, "--version-dir", str(version), "--python", sys.executable, *BRIEF))


@pytest.mark.slow
def test_a_version_that_is_slow_goes_back(here: Stack, tmp_path: Path) -> None:
    bug, said = BUGS["is slow"]
    version = broken_version(tmp_path / "version", bug)
    slow = (
        "--version-dir",
        str(version),
        "--python",
        sys.executable,
        "--canary-percent",
        "50",
        "--canary-s",
        "20",
        "--p99-ms",
        "300",
    )
    assert_none_failed(assert_goes_back(here, said, *slow))


@pytest.mark.slow
def test_a_deploy_that_is_killed_half_way_is_settled(here: Stack, tmp_path: Path) -> None:
    own, before = here.settings, active(here)
    if here.pid("proxy") is None:
        here.start(["proxy"])
    load = Load(own, url_port(here), 100, 120)
    try:
        with running_command(
            own, "deploy", "--canary-s", "1", "--bake-s", "600", *PATIENT, log_path=tmp_path / "deploy.log"
        ) as command:
            command.wait_until(
                lambda: "consumes the transactions topic" in command.log(), DEPLOY_WITHIN_S, "the new version consumes"
            )
            command.kill()
        status = run_command(own, "deploy", "--status")
        assert (status.returncode, "broke off" in status.stdout) == (1, True)
        settled = run_command(own, "deploy", "--settle")
        assert settled.returncode == 0, settled.stderr
    finally:
        offered = load.end()
    assert_none_failed(offered)
    assert active(here) == before
    assert run_command(own, "deploy", "--status").returncode == 0
    # It joins its consumer group again.
    wait_until(lambda: answers_through_the_proxy(here), READY_WITHIN_S, "the version that has the traffic is whole")


@pytest.mark.slow
def test_going_back_runs_the_version_before(here: Stack) -> None:
    assert deploy(here, *BRIEF, "--settings", "KEEP_ALIVE_S=61").returncode == 0
    assert deploy(here, *BRIEF, "--settings", "KEEP_ALIVE_S=62").returncode == 0
    load = Load(here.settings, url_port(here), 100, 120)
    try:
        assert deploy(here, "--rollback", *BRIEF).returncode == 0
    finally:
        offered = load.end()
    assert_none_failed(offered)
    state = read_state(here.settings.home_path)
    assert state is not None
    assert state.versions[state.active].settings["FRAUDGATE_KEEP_ALIVE_S"] == "61"


@pytest.mark.slow
def test_a_plain_restart_under_the_same_load_loses_requests(here: Stack) -> None:
    slot = active(here)
    port = port_of(here.settings, slot)
    load = Load(here.settings, port, 200, 120)
    try:
        here.restart(SERVICE_OF[slot])
    finally:
        offered = load.end()
    print(f"\n{len(offered.samples)} requests, {dict(offered.statuses())}", flush=True)
    assert len(offered.samples) - offered.statuses()[200] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_deploys_under_load_fail_none_of_200000_requests(here: Stack) -> None:
    own = here.settings
    rate, deploys = float(os.environ.get("DEPLOY_RATE", "1000")), 10
    if here.pid("proxy") is None:
        here.start(["proxy"])
    tail = CountedReceipts(own)
    flow, load = Flow(own, 100), Load(own, url_port(here), rate, 1500)
    began_s = time.monotonic()
    try:
        for _ in range(deploys):
            done = deploy(here, "--bake-s", "5", *PATIENT)
            assert done.returncode == 0, done.stderr
            tail.read_for(1)
        while len(load.ids) < 200_000 and time.monotonic() - began_s < 1200:
            tail.read_for(1)
    finally:
        offered, by_kafka = load.end(), flow.end()
    assert_none_failed(offered)
    assert offered.statuses() == {200: len(offered.samples)}
    assert len(offered.samples) >= 200_000
    assert_each_decided_once(tail, set(load.ids) | by_kafka, f"{deploys} deploys under load")
    tail.close()
    stats = Proxy(socket_path(own)).stats()
    print(f"repeated by the proxy: {sum(stat.repeated for stat in stats.values())}", flush=True)
