"""What a decision's features cost on a Redis Cluster and on one Redis, by turns in one run: python -m tests.cluster_cost

CPU of this process (the gateway's side: claim, observe, read, decode) and of all Redis servers, microseconds a transaction, and the
time of one batch, milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import redis

from deploy.ports import free_ports
from deploy.toolchain import find_redis
from gateway.redis.cluster import link_to
from gateway.redis.store import Store
from gateway.scoring.job import requests_of
from tests.helpers import HOST, until, wait_until
from tests.redis_nodes import running_cluster
from tests.unit.gateway.factories import make_job, make_transaction

BATCH_ROWS = (1, 16, 64, 256)
ROUNDS = 5
TRANSACTIONS_A_ROUND = 2048
CARDS = 5000
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


def cpu_s(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_A_SECOND


async def round_of(store: Store, rows: int, run: str) -> tuple[float, float]:
    """Seconds of CPU of this process in all batches, and the median's time."""
    took, cpu = [], 0.0
    for first in range(0, TRANSACTIONS_A_ROUND, rows):
        batch = [
            make_job(
                make_transaction(
                    f"{run}-{i}",
                    card_id=f"c{i * 7919 % CARDS}",
                    customer_id=f"k{i * 7919 % CARDS}",
                    merchant_id=f"m{i % 300}",
                    device_id=f"d{i * 7919 % CARDS}",
                    ip=f"i{i % 1000}",
                )
            )
            for i in range(first, first + rows)
        ]
        request = requests_of(batch)
        began, began_cpu = time.perf_counter(), time.process_time()
        assert await store.observe(batch, request, 10.0) is not None
        cpu += time.process_time() - began_cpu
        took.append(time.perf_counter() - began)
        store.record([(job, b"x" * 150) for job in batch])
    return cpu, statistics.median(took)


async def measure(urls: dict[str, tuple[str, list[int]]]) -> None:
    links = {name: link_to(url, 5.0) for name, (url, _) in urls.items()}
    stores = {name: Store(link, 600_000) for name, link in links.items()}
    for link in links.values():
        link.start()
    await until(lambda: all(link.ready for link in links.values()), 20)
    for rows in BATCH_ROWS:
        used: dict[str, list[tuple[float, float, float]]] = {name: [] for name in urls}
        for _ in range(ROUNDS):
            for name, (_, pids) in urls.items():
                servers = cpu_s(pids)
                own, took = await round_of(stores[name], rows, secrets.token_hex(4))
                used[name].append((own, cpu_s(pids) - servers, took))
        for name, rounds in used.items():
            gateway, server, batch = (statistics.median(column) for column in zip(*rounds, strict=True))
            per_row = 1e6 / TRANSACTIONS_A_ROUND
            print(
                f"{rows:4} rows  {name:8} gateway {gateway * per_row:6.1f} us  redis {server * per_row:6.1f} us  {batch * 1e3:7.2f} ms"
            )
    for link in links.values():
        await link.stop()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, running_cluster(Path(folder)) as cluster:
        port = free_ports(1)[0]
        command = [str(find_redis()), "--port", str(port), "--bind", HOST, "--save", "", "--dir", folder]
        single = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            with redis.Redis(host=HOST, port=port) as client:
                wait_until(lambda: _answers(client), 10, "redis-server starts")
            urls = {
                "single": (f"redis://{HOST}:{port}/0", [single.pid]),
                "cluster": (cluster.url, [node.process.pid for node in cluster.nodes]),
            }
            asyncio.run(measure(urls))
        finally:
            single.terminate()
            single.wait(10)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


if __name__ == "__main__":
    main()
