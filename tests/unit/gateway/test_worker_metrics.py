import asyncio
import os
from pathlib import Path

import pytest

from gateway.metrics import Metrics
from gateway.worker_metrics import DEPARTED, LARGEST, SMALLEST, WorkerMetrics, fold_departed

pytestmark = pytest.mark.anyio


def values(text: bytes) -> dict[str, float]:
    lines = [line for line in text.decode().splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def worker(directory: Path, name: str, decided: int, in_flight: int = 0, redis: int = 1) -> WorkerMetrics:
    metrics = Metrics()
    metrics.decisions.labels("approve", "http").inc(decided)
    metrics.latency_s.observe("http", [0.003] * decided)
    metrics.in_flight.set(in_flight)
    metrics.redis_ready.set(redis)
    metrics.workers.set(1)
    return WorkerMetrics(metrics.registry, directory, name)


DECIDED = 'fraudgate_decisions_total{door="http",outcome="approve"}'
BUCKET = 'fraudgate_decision_latency_seconds_bucket{door="http",le="0.003"}'


async def test_whichever_worker_is_asked_answers_for_all(tmp_path: Path) -> None:
    a, b = worker(tmp_path, "0-1", 5, in_flight=2), worker(tmp_path, "1-2", 7, in_flight=3, redis=0)
    await a.start()
    await b.start()
    for asked in (a, b):
        found = values(await asked.text())
        assert (found[DECIDED], found[BUCKET], found["fraudgate_in_flight"], found["fraudgate_workers"]) == (12, 12, 5, 2)
        assert found["fraudgate_redis_ready"] == 0
    await a.stop()
    await b.stop()


async def test_what_an_ended_worker_counted_stays_counted_once(tmp_path: Path) -> None:
    a, b = worker(tmp_path, "0-1", 5), worker(tmp_path, "1-2", 7, in_flight=3)
    await a.start()
    await b.start()
    await b.stop()
    for _ in range(2):
        found = values(await a.text())
        assert (found[DECIDED], found["fraudgate_in_flight"], found["fraudgate_workers"]) == (12, 0, 1)
        fold_departed(tmp_path, "1-2")
    assert set(os.listdir(tmp_path)) == {"0-1.sock", "0-1.last", DEPARTED}
    await a.stop()


async def test_a_worker_that_was_killed_loses_what_it_counted_since_it_was_last_asked_and_no_more(tmp_path: Path) -> None:
    a, b = worker(tmp_path, "0-1", 5), worker(tmp_path, "1-2", 7)
    await a.start()
    await b.start()
    # Whoever answers is counted too.
    assert values(await b.text())[DECIDED] == 12
    # Its socket is still there, and nobody listens.
    assert b._server is not None
    b._server.close()
    await asyncio.sleep(0)
    assert values(await a.text())[DECIDED] == 12
    fold_departed(tmp_path, "1-2")
    assert values(await a.text())[DECIDED] == 12
    await a.stop()


def test_the_gauges_that_do_not_add_up_are_the_gateways() -> None:
    names = {metric.name for metric in Metrics().registry.collect()}
    assert names >= SMALLEST | LARGEST
