"""`fraudgate capacity`: what a population of cards takes in Redis and in Spark, and how long a rebuild lasts. Measured, not reckoned.

Starts a Redis and a Spark driver of its own in a directory of its own, and stops what it started.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import redis
from deltalake import write_deltalake
from pyspark.sql import SparkSession
from redis.exceptions import RedisError

from deploy import processes
from deploy.population import DAYS, Population, id_of, write
from deploy.toolchain import find_redis
from feature_jobs.rebuild import newest_batch, rebuild
from feature_jobs.restore import RestoreJob
from feature_jobs.session import build_session
from gateway.contracts import layout
from gateway.contracts.features import ENTITIES
from gateway.contracts.settings import Settings, load_settings

# About a payment a day or more.
ACTIVE_PAYMENTS = 30
STATE_ROWS = 200_000
SEED = 5
REDIS_READY_S = 20.0
SAMPLE_S = 0.5
KINDS = {"head": layout.head_key, "tiles": layout.tiles_key, "labels": layout.labels_key, "early": layout.early_key}


@dataclass
class Bytes:
    """What the entities of a kind take, bytes each, by MEMORY USAGE of all their keys."""

    entities: int
    mean: float
    p50: float
    p99: float
    head_mean: float
    tiles_mean: float


class PeakMemory:
    """Samples the resident memory of this process' descendants: Spark's JVM and its Python workers, MiB."""

    def __init__(self, but_pid: int) -> None:
        self._but_pid = but_pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.jvm_mb = self.workers_mb = self.worker_mb = 0.0
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        me = Path("/proc/self").resolve().name
        while not self._stop.wait(SAMPLE_S):
            found = [(_command(pid), _resident_mb(pid)) for pid in _descendants(me) if pid != str(self._but_pid)]
            workers = [mb for name, mb in found if name.startswith("python")]
            self.jvm_mb = max([self.jvm_mb, *(mb for name, mb in found if name == "java")])
            self.worker_mb = max([self.worker_mb, *workers])
            self.workers_mb = max(self.workers_mb, sum(workers))


def _descendants(pid: str) -> list[str]:
    found: list[str] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in children:
            found += [child, *_descendants(child)]
    return found


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _resident_mb(pid: str) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20
    except (OSError, IndexError):
        return 0.0


def capacity(argv: list[str]) -> int:
    """`fraudgate capacity`."""
    parser = argparse.ArgumentParser("fraudgate capacity", description="Measure memory and rebuild time of a population of cards.")
    parser.add_argument("--cards", type=int, default=1_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--payments-per-card", type=float, default=10.0, metavar="N", help="mean of a month (default: %(default)s)")
    parser.add_argument("--redis-memory-mb", type=int, default=8192, metavar="N", help="limit of its Redis (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=2000, metavar="N", help="entities asked of each kind (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if options.cards < 1000 or options.payments_per_card < 1 or options.sample < 1:
        parser.error("there must be 1,000 cards or more, with a payment each, and a sample")
    home = Path(tempfile.mkdtemp(prefix="fraudgate-capacity-"))
    try:
        found = _measure(home, options)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps(found, indent=2) if options.json else report(found))
    return 0


def _measure(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = dataclasses.replace(
        load_settings(),
        home=str(home),
        tables_uri="",
        checkpoints_uri="",
        redis_url=f"redis://127.0.0.1:{port}/0",
    )
    command = [str(find_redis()), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    command += ["--maxmemory", f"{options.redis_memory_mb}mb", "--maxmemory-policy", "noeviction", "--dir", str(home)]
    server = processes.spawn(command, {}, home, home / "redis.log")
    try:
        client = redis.Redis(port=port, socket_timeout=60)
        _wait_for(client)
        empty = int(client.info("memory")["used_memory"])
        now_ms = time.time_ns() // 1_000_000
        spark = build_session(settings)
        try:
            started = time.monotonic()
            _say(f"writing a month of {options.cards:,} cards")
            population = write(settings, options.cards, options.payments_per_card, now_ms, SEED)
            payments = int(population.payments.sum())
            _say(f"{payments:,} payments written in {time.monotonic() - started:.0f} s; rebuilding Redis")
            memory = PeakMemory(server.pid)
            started = time.monotonic()
            job = RestoreJob(settings.redis, 1, newest_batch(spark, settings), now_ms, 0, settings.redis_retry_s)
            done = rebuild(spark, settings, job)
            seconds = time.monotonic() - started
            memory.stop()
            _say(f"rebuilt in {seconds:.0f} s; measuring")
            state = _state(spark, settings)
        finally:
            spark.stop()
        info = client.info("memory")
        return {
            "cards": options.cards,
            "transactions": done.transactions,
            "entities": done.entities,
            "rebuild_seconds": round(seconds, 1),
            "transactions_a_second": round(done.transactions / seconds),
            "spark_jvm_peak_mb": round(memory.jvm_mb),
            "spark_workers_peak_mb": round(memory.workers_mb),
            "spark_worker_peak_mb": round(memory.worker_mb),
            "redis_used_mb": round((info["used_memory"] - empty) / 2**20),
            "redis_resident_mb": round(info["used_memory_rss"] / 2**20),
            "redis_bytes_an_entity": round((info["used_memory"] - empty) / max(1, done.entities)),
            "keys": int(client.dbsize()),
            "keys_with_expiry": int(client.info("keyspace").get("db0", {}).get("expires", 0)),
            "bytes": {name: dataclasses.asdict(of) for name, of in sampled(client, population, options.sample).items()},
            "state": state,
        }
    finally:
        processes.stop(server, 10)


def _wait_for(client: redis.Redis) -> None:
    deadline = time.monotonic() + REDIS_READY_S
    while True:
        try:
            client.ping()
        except RedisError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)  # sleeps: between two tries to reach a server that is starting
        else:
            return


def sampled(client: redis.Redis, population: Population, sample: int) -> dict[str, Bytes]:
    """Bytes of each kind of entity, and of the active cards, over a random sample of each."""
    rng = np.random.default_rng(SEED)
    active = np.flatnonzero(population.payments >= ACTIVE_PAYMENTS)
    found = {}
    for name, numbers in [(e.name, np.arange(population.ids[e.name])) for e in ENTITIES] + [("card", active)]:
        chosen = rng.permutation(numbers)[:sample]
        label = "active card" if numbers is active else name
        measured = _usage(client, name, chosen)
        if measured is not None:
            found[label] = measured
    return found


def _usage(client: redis.Redis, entity: str, numbers: npt.NDArray[np.int64]) -> Bytes | None:
    pipe = client.pipeline(transaction=False)
    for number in numbers.tolist():
        for key in KINDS.values():
            pipe.memory_usage(key(entity, id_of(entity, number)), samples=0)
    usage = np.array([n or 0 for n in pipe.execute()], np.int64).reshape(-1, len(KINDS))
    usage = usage[usage.sum(axis=1) > 0]
    if len(usage) == 0:
        return None
    total = usage.sum(axis=1)
    p50, p99 = np.percentile(total, [50, 99]).tolist()
    return Bytes(len(usage), round(float(total.mean()), 1), p50, p99, *(round(x, 1) for x in usage.mean(axis=0)[:2].tolist()))


def _state(spark: SparkSession, settings: Settings) -> dict[str, float]:
    """Bytes a remembered transaction_id in the state of the deduplication, by running the same operator over STATE_ROWS of them."""
    source, checkpoint = str(settings.home_path / "state-source"), settings.home_path / "state-checkpoint"
    at = pa.repeat(pa.scalar(time.time_ns() // 1000, pa.timestamp("us", "UTC")), STATE_ROWS)
    # Ids as random as real ones are, so that compression finds nothing in them that isn't there.
    words = np.random.default_rng(SEED).integers(0, 2**63, (STATE_ROWS, 2)).tolist()
    keys = pa.array([f"transactions/{a:016x}{b:016x}" for a, b in words])
    write_deltalake(source, pa.table({"dedup_key": keys, "ingested_at": at}))
    rows = spark.readStream.format("delta").load(source)
    unique = rows.withWatermark("ingested_at", f"{settings.dedup_window_s} seconds").dropDuplicatesWithinWatermark(["dedup_key"])
    query = (
        unique.writeStream.option("checkpointLocation", str(checkpoint))
        .foreachBatch(lambda batch, _id: batch.write.format("noop").mode("overwrite").save())
        .trigger(availableNow=True)
        .start()
    )
    query.awaitTermination()
    operators = [o for p in query.recentProgress for o in p["stateOperators"]]
    held = max(o["numRowsTotal"] for o in operators)
    on_disk = sum(f.stat().st_size for f in (checkpoint / "state").rglob("*") if f.is_file())
    return {
        "keys": held,
        "checkpoint_bytes_a_key": round(on_disk / held, 1),
        "memory_bytes_a_key": round(max(o["memoryUsedBytes"] for o in operators) / held, 1),
    }


def report(found: dict[str, Any]) -> str:
    """The figures as a page of text."""
    lines = [
        f"{found['cards']:,} cards, {found['transactions']:,} payments in {DAYS} days, {found['entities']:,} entities",
        f"rebuild      {found['rebuild_seconds']:,} s, {found['transactions_a_second']:,} transactions a second",
        f"Spark        JVM {found['spark_jvm_peak_mb']:,} MiB at most, Python workers {found['spark_workers_peak_mb']:,} MiB together",
        f"Redis        {found['redis_used_mb']:,} MiB used, {found['redis_bytes_an_entity']:,} bytes an entity all in all; "
        f"{found['keys']:,} keys, {found['keys_with_expiry']:,} of them expire",
        f"Spark state  {found['state']['checkpoint_bytes_a_key']} bytes on disk and {found['state']['memory_bytes_a_key']} in memory "
        f"for each remembered transaction_id (of {found['state']['keys']:,})",
        "",
        f"{'bytes each':<14}{'mean':>9}{'p50':>9}{'p99':>9}{'head':>9}{'tiles':>9}{'sample':>9}",
    ]
    for name, of in found["bytes"].items():
        figures = (of[key] for key in ("mean", "p50", "p99", "head_mean", "tiles_mean", "entities"))
        lines.append(f"{name:<14}" + "".join(f"{figure:>9,.0f}" for figure in figures))
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
