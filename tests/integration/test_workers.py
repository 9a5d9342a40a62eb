"""Several workers behind one socket, replaced while requests come: nobody notices."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.stack import Stack
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import encode_json
from loadtest.offered import FAILED, NOT_SENT, Offered, offer, quantile
from tests.helpers import RunningCommand, running_command
from tests.integration.gateway_helpers import Decisions, gateway_of_its_own, make_transaction, name, post, produce, ready_without
from tests.unit.gateway.factories import write_model

pytestmark = pytest.mark.integration
READY_WITHIN_S = 60
WORKERS = 2
CONNECTIONS = 400


@pytest.fixture
def own(stack: Stack, settings: Settings, tmp_path: Path) -> Settings:
    assert stack.pid("kafka")
    write_model(tmp_path / "models")
    return gateway_of_its_own(settings, tmp_path, "workers")


@pytest.fixture
def gateway(own: Settings, tmp_path: Path) -> Iterator[RunningCommand]:
    with running_command(own, "serve", "--workers", str(WORKERS), log_path=tmp_path / "gateway.log") as command:
        command.wait_until(lambda: command.log().count("serves (pid") == WORKERS, READY_WITHIN_S, "the workers serve")
        # Whichever worker answers.
        command.wait_until(
            lambda: all(ready_without(own, "redis", "model", "kafka") for _ in range(12)), READY_WITHIN_S, "all workers are ready"
        )
        yield command
        assert command.stop(40), "the gateway didn't leave on SIGTERM"


def metrics(settings: Settings) -> dict[str, float]:
    with urllib.request.urlopen(f"{settings.gateway}/metrics", timeout=10) as reply:  # noqa: S310
        lines = reply.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line and not line.startswith("#")}


def worker_pids(command: RunningCommand) -> set[int]:
    """The processes that serve: children of the supervisor."""
    return {int(pid) for pid in Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()}


def load(settings: Settings, rate: float, duration_s: float, prefix: str) -> Offered:
    def request_of(i: int) -> tuple[str, bytes]:
        t = make_transaction(
            f"{prefix}-{i}", card_id=f"card-{prefix}-{i % 5000}", customer_id=f"of-{i % 5000}", merchant_id=f"m-{i % 300}"
        )
        return t.transaction_id, encode_json(t)

    return asyncio.run(offer(settings.host, settings.gateway_port, lambda _: rate, duration_s, request_of, CONNECTIONS))


def test_workers_are_one_gateway_with_one_page_of_metrics(own: Settings, gateway: RunningCommand) -> None:
    tail = Decisions(own)
    offered = load(own, 200, 3, name("sum"))
    assert set(offered.statuses()) == {200}
    by_kafka = [make_transaction(name("k")) for _ in range(20)]
    produce(own, [(t.card_id, encode_json(t)) for t in by_kafka])
    tail.of(t.transaction_id for t in by_kafka)
    tail.close()
    found = metrics(own)
    assert found["fraudgate_workers"] == WORKERS
    assert found['fraudgate_decision_latency_seconds_count{door="http"}'] == len(offered.samples)
    decided = sum(n for line, n in found.items() if line.startswith("fraudgate_decisions_total") and 'door="http"' in line)
    assert decided == len(offered.samples)
    # A worker that dies at once is started anew, and what was counted stays counted.
    victim = min(worker_pids(gateway))
    os.kill(victim, signal.SIGKILL)
    gateway.wait_until(lambda: len(worker_pids(gateway) - {victim}) == WORKERS, READY_WITHIN_S, "another worker is there")
    gateway.wait_until(lambda: gateway.log().count("serves (pid") == WORKERS + 1, READY_WITHIN_S, "it serves")
    after = metrics(own)
    assert after["fraudgate_workers"] == WORKERS
    assert after['fraudgate_decision_latency_seconds_count{door="http"}'] == len(offered.samples)
    assert post(own, make_transaction(name("again")))[0] == 200


def swap_while_serving(own: Settings, gateway: RunningCommand, rate: float, swaps: int, swap_s: float) -> tuple[Offered, Offered]:
    """(load without, load with `swaps` replacements of all workers)."""
    before = load(own, rate, swap_s / 3, name("before"))
    done = gateway.log().count("replaced 2 workers")
    end: list[float] = []

    async def both() -> Offered:
        prefix = name("swap")

        def request_of(i: int) -> tuple[str, bytes]:
            t = make_transaction(
                f"{prefix}-{i}", card_id=f"card-{prefix}-{i % 5000}", customer_id=f"of-{i % 5000}", merchant_id="m"
            )
            return t.transaction_id, encode_json(t)

        async def swap() -> None:
            for n in range(1, swaps + 1):
                gateway.send_signal(signal.SIGHUP)
                async with asyncio.timeout(120):
                    while gateway.log().count("replaced 2 workers") < done + n:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)  # sleeps: polls the log of another process
            end.append(time.monotonic())

        offering = asyncio.create_task(offer(own.host, own.gateway_port, lambda _: rate, swaps * swap_s, request_of, CONNECTIONS))
        await swap()
        return await offering

    return before, asyncio.run(both())


def test_workers_are_replaced_under_load_and_no_request_fails(own: Settings, gateway: RunningCommand) -> None:
    first = worker_pids(gateway)
    before, during = swap_while_serving(own, gateway, rate=150, swaps=1, swap_s=15)
    assert worker_pids(gateway).isdisjoint(first)
    assert (before.statuses()[200], during.statuses()) == (len(before.samples), {200: len(during.samples)})
    assert during.mixed_up == 0
    assert metrics(own)['fraudgate_decision_latency_seconds_count{door="http"}'] == len(before.samples) + len(during.samples)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_replacements_under_half_load_fail_none_of_200000_requests(own: Settings, gateway: RunningCommand) -> None:
    rate = float(os.environ.get("SWAP_RATE", "1000"))
    before, during = swap_while_serving(own, gateway, rate=rate, swaps=10, swap_s=max(20.0, 200_000 / rate / 10))
    latencies, usual = during.answered(), before.answered()
    print(f"{len(during.samples)} requests, {during.statuses()}, sender late by {during.late_ms:.0f} ms")
    for q in (0.5, 0.99, 0.999):
        print(f"p{q * 100:g}: {quantile(usual, q) * 1000:.1f} ms before, {quantile(latencies, q) * 1000:.1f} ms during")
    assert during.statuses()[FAILED] == during.statuses()[NOT_SENT] == during.mixed_up == 0
    assert set(during.statuses()) == {200}
    assert len(during.samples) >= 200_000
