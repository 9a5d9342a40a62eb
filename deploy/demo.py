"""`fraudgate demo`: from an empty directory to a table of results, on real components, in under three minutes.

A month of history goes through Kafka and Spark into the tables and Redis; a model is trained on it, registered and pulled; then a
live stream goes through both doors, among it messages that can't be read and payments sent twice. At the end every payment is
accounted for, and the table says how it went. The same figures go to build/demo.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from deploy.freshness import Freshness, freshness_of, table_freshness
from deploy.stack import Stack, StackError
from feature_jobs.redis_client import connect
from gateway.contracts import tables
from gateway.contracts.label import Label
from gateway.contracts.layout import PROGRESS_KEY, Progress
from gateway.contracts.settings import Settings, load_settings, settings_env
from loadtest.accounting import Accounting, quantiles, table
from loadtest.events import Event, LoadError
from loadtest.latency import Latency
from loadtest.pace import Pace
from loadtest.run import LABELS_DUE, Load, RunReport, Simulation, door_of, run_load
from loadtest.simulator import SimulatorConfig

MARKER = "made-by-demo"
REPORT_FILE = Path("build/demo.json")
DOORS = ("http", "kafka")
# Every so many payments of the Kafka door can't be read, and every so many are sent twice, this much later.
BAD_EVERY = 250
TWICE_EVERY = 100
TWICE_AFTER_S = 2.0
# Of the names in the accounting's table.
NAME_WIDTH = 44
PROMISED_S = {"bronze": 5, "silver": 12, "gold": 45}
SILVER_WITHIN_S = 300.0
LABELS_WITHIN_S = 120.0
GOLD_WITHIN_S = 300.0


class DemoError(RuntimeError):
    """A step of the demo failed. The message says which and why."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the demo: payments of history and live, the live rate of both doors together, the seed of the simulation."""

    history: int
    live: int
    rate_per_s: float
    seed: int

    @property
    def config(self) -> SimulatorConfig:
        # About thirty days of history, so that the longest windows are full when the live stream begins.
        return SimulatorConfig(seed=self.seed, cards=4_000, events_per_day=max(100, self.history // 30))


class BadRows:
    """A source in which some payments of the Kafka door carry a currency that doesn't exist: they belong into quarantine."""

    def __init__(self, source: Simulation) -> None:
        self._source = source

    def events(self) -> Iterator[Event]:
        for n, event in enumerate(self._source.events()):
            if n % BAD_EVERY == 0 and door_of(event.transaction.card_id, DOORS) == "kafka":
                yield event._replace(transaction=msgspec.structs.replace(event.transaction, currency="XXX"), is_fraud=False)
            else:
                yield event

    def labels_due(self, now_ms: int) -> list[Label]:
        return self._source.labels_due(now_ms)

    def labels_remaining(self) -> list[Label]:
        return self._source.labels_remaining()


class SentTwice:
    """Every TWICE_EVERYth payment of a source, to be sent once more."""

    def __init__(self, source: BadRows) -> None:
        self._source = source

    def events(self) -> Iterator[Event]:
        for n, event in enumerate(self._source.events()):
            if n % TWICE_EVERY == 1:
                yield event

    def labels_due(self, now_ms: int) -> list[Label]:
        return []

    def labels_remaining(self) -> list[Label]:
        return []


@dataclass
class RedisWatch:
    """Follows the progress record of the feature jobs: which Kafka timestamp was in Redis when. Ends with `stop`."""

    settings: Settings
    seen: list[Progress] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with connect(self.settings.redis) as client:
            while not self._ended.wait(0.1):
                value = client.get(PROGRESS_KEY)
                if isinstance(value, bytes):
                    progress = msgspec.msgpack.decode(value, type=Progress)
                    if not self.seen or progress.arrived_through_ms != self.seen[-1].arrived_through_ms:
                        self.seen.append(progress)

    def stop(self) -> None:
        self._ended.set()

    def freshness(self, arrived_ms: list[int]) -> Freshness:
        """Of records that Kafka took at `arrived_ms`: until the first progress that covers them."""
        through = np.array([p.arrived_through_ms for p in self.seen])
        written = np.array([p.written_at_ms for p in self.seen])
        arrived = np.array(arrived_ms)
        index = np.searchsorted(through, arrived)
        covered = index < len(through)
        return freshness_of((written[index[covered]] - arrived[covered]) / 1000.0)


class Demo:
    """One run. `run` goes through the steps in order; whatever happens, `close` ends what was started."""

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self.settings, self.plan = settings, plan
        self.stack = Stack(settings, say=lambda line: print(f"      {line}", flush=True))
        self._started = time.monotonic()
        self._step = 0

    def step(self, text: str) -> None:
        self._step += 1
        print(f"[{self._step}/8] {text}  ({time.monotonic() - self._started:.0f} s)", flush=True)

    def run(self) -> dict[str, Any]:
        plan = self.plan
        self.step("starting Kafka, Redis and the schema registry")
        self.stack.start(["kafka", "redis", "registry"])
        self.stack.create_topics_and_schemas()
        self.step(f"sending {plan.history:,} payments of the past thirty days and the labels known by now")
        history = partial(Simulation, plan.config, plan.history)
        sent = run_load(
            Load(source=history, total=plan.history, history=True, labels=LABELS_DUE, account=False), self.settings
        ).kafka
        assert sent is not None, "history goes through Kafka"
        self.step("starting MLflow and the Spark streams: Kafka to bronze, silver, Redis and gold")
        self.stack.start(["mlflow", "jobs"])
        self.wait_for_rows(tables.SILVER, plan.history, SILVER_WITHIN_S)
        self.wait_for_rows(tables.LABELS, sent.labels, LABELS_WITHIN_S)
        self.step("training on them: training set, XGBoost, ONNX, checks, MLflow registry")
        self.command("train")
        self.command("pull")
        self.step("starting the gateway")
        self.stack.start(["gateway"])
        self.step(f"scoring {plan.live:,} live payments at {plan.rate_per_s:.0f} a second through both doors")
        since_ms = time.time_ns() // 1_000_000
        watch = RedisWatch(self.settings)
        watching = threading.Thread(target=watch.run, name="redis-watch", daemon=True)
        watching.start()
        report = self.live()
        self.step("waiting until the gold table holds every decision")
        assert report.accounting is not None
        self.wait_for_gold(since_ms, report.accounting.decided)
        watch.stop()
        watching.join()
        self.step("measuring")
        return self.measure(report, report.accounting, since_ms, watch)

    def live(self) -> RunReport:
        """Both doors at the planned rate, and beside it the payments that are sent twice."""
        plan = self.plan
        source = partial(live_source, plan)
        again = Load(
            source=lambda: SentTwice(live_source(plan)),
            total=None,
            pace=Pace(rate_per_s=plan.rate_per_s / TWICE_EVERY),
            account=False,
        )
        failures: list[LoadError] = []

        def send_again() -> None:
            try:
                run_load(again, self.settings, show_progress=False)
            except LoadError as exc:
                failures.append(exc)

        timer = threading.Timer(TWICE_AFTER_S, send_again)
        timer.start()
        try:
            load = Load(source=source, total=plan.live, doors=DOORS, pace=Pace(rate_per_s=plan.rate_per_s), labels=LABELS_DUE)
            report = run_load(load, self.settings)
        finally:
            timer.join()
        if failures:
            raise failures[0]
        return report

    def command(self, *arguments: str) -> None:
        """A `fraudgate` command in a process of its own, so that its memory is gone afterwards."""
        argv = [sys.executable, "-m", "deploy.cli", *arguments]
        process = subprocess.run(
            argv,
            env=os.environ | settings_env(self.settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        for line in process.stdout.splitlines():
            print(f"      {line}", flush=True)
        if process.returncode:
            raise DemoError(f"fraudgate {' '.join(arguments)} ended with exit status {process.returncode}")

    def wait_for_rows(self, name: str, rows: int, within_s: float) -> None:
        self.wait(lambda: table_rows(self.settings, name), rows, within_s, f"rows in {name}")

    def wait_for_gold(self, since_ms: int, decided: int) -> None:
        self.wait(lambda: decided_rows(self.settings, since_ms), decided, GOLD_WITHIN_S, f"decisions in {tables.GOLD_DECISIONS}")

    def wait(self, count: Callable[[], int], wanted: int, within_s: float, what: str) -> None:
        deadline = time.monotonic() + within_s
        shown = time.monotonic()
        while (have := count()) < wanted:
            if self.stack.pid("jobs") is None:
                raise DemoError(f"the feature jobs ended; {self.stack.log_path('jobs')} says why")
            if time.monotonic() > deadline:
                raise DemoError(f"after {within_s:.0f} s there are {have:,} {what}, {wanted:,} were expected")
            if time.monotonic() - shown >= 5:
                shown = time.monotonic()
                print(f"      {have:,} of {wanted:,} {what}", flush=True)
            time.sleep(0.5)
        print(f"      {have:,} {what}", flush=True)

    def measure(self, report: RunReport, accounting: Accounting, since_ms: int, watch: RedisWatch) -> dict[str, Any]:
        tables_path = Path(self.settings.tables)
        fresh = {
            "bronze": table_freshness(tables_path / tables.BRONZE, since_ms),
            "silver": table_freshness(tables_path / tables.SILVER, since_ms),
            "gold": table_freshness(tables_path / tables.GOLD_DECISIONS, since_ms, key="transaction_id"),
            "redis": watch.freshness(arrivals_ms(self.settings, since_ms)),
        }
        print(f"\n{table(accounting)}")
        if report.http is not None:
            # What a caller waits for. The receipts above come to Kafka later, together.
            line("http answer p50 / p99 / p99.9 / max, ms", quantiles(report.http.latency))
        for name, f in fresh.items():
            promise = f", promised {PROMISED_S[name]} s" if name in PROMISED_S else ""
            line(f"freshness of {name}, p50 / max, s", f"{f.p50_s:.1f} / {f.max_s:.1f} over {f.rows:,} rows{promise}")
        return report_of(accounting, fresh, None if report.http is None else report.http.latency)

    def close(self) -> None:
        print("stopping everything", flush=True)
        self.stack.stop()


def live_source(plan: Plan) -> BadRows:
    return BadRows(Simulation(plan.config, plan.live, plan.history))


def table_rows(settings: Settings, name: str) -> int:
    """Rows of a table, 0 while it doesn't exist."""
    try:
        return int(DeltaTable(tables.table_uri(settings.tables, name)).count())
    except TableNotFoundError:
        return 0


def decided_rows(settings: Settings, since_ms: int) -> int:
    """Rows of the gold table with a decision of a record that Kafka took at `since_ms` or later."""
    try:
        gold = DeltaTable(tables.table_uri(settings.tables, tables.GOLD_DECISIONS))
    except TableNotFoundError:
        return 0
    columns = gold.to_pyarrow_table(columns=["decision", "kafka_timestamp"])
    arrived_ms = columns["kafka_timestamp"].cast("timestamp[ms]").cast("int64").to_numpy(zero_copy_only=False)
    return int((columns["decision"].is_valid().to_numpy(zero_copy_only=False) & (arrived_ms >= since_ms)).sum())


def arrivals_ms(settings: Settings, since_ms: int) -> list[int]:
    """When Kafka took each valid transaction since `since_ms`."""
    silver = DeltaTable(tables.table_uri(settings.tables, tables.SILVER)).to_pyarrow_table(columns=["kafka_timestamp"])
    arrived = silver["kafka_timestamp"].cast("timestamp[ms]").cast("int64").to_pylist()
    return [ms for ms in arrived if ms >= since_ms]


def line(name: str, text: str) -> None:
    """One more line of the table that the accounting prints."""
    print(f"{name:<{NAME_WIDTH}}  {text}")


def in_ms(latency: Latency) -> dict[str, float]:
    return {"p50_ms": latency.p50_ms, "p99_ms": latency.p99_ms, "max_ms": latency.max_ms}


def report_of(accounting: Accounting, fresh: dict[str, Freshness], answer: Latency | None) -> dict[str, Any]:
    """The figures of build/demo.json, units in the names. `answer` is what callers waited for; those by door are until the receipt."""
    quality = accounting.quality
    return {
        "events_in": accounting.events_in,
        "decided": accounting.decided,
        "quarantined": accounting.quarantined,
        "unaccounted": len(accounting.unaccounted),
        "duplicates": len(accounting.duplicates),
        "decisions": accounting.outcomes,
        "degraded": accounting.degraded,
        **{door: in_ms(latency) for door, latency in accounting.latency.items()},
        **({} if answer is None else {"http_answer": in_ms(answer)}),
        "freshness_s": {name: {"p50": f.p50_s, "max": f.max_s, "rows": f.rows} for name, f in fresh.items()},
        "model": {
            "average_precision": quality.average_precision,
            "precision_flagged": quality.precision_flagged,
            "recall_flagged": quality.recall_flagged,
            "precision_declined": quality.precision_declined,
            "recall_declined": quality.recall_declined,
            "frauds": quality.frauds,
        },
    }


def empty_home(settings: Settings) -> Settings:
    """Settings with a home that holds the demo's marker alone: the given one if it is empty or a demo's, else one inside it."""
    home = settings.home_path
    marker = home / MARKER
    if home.exists() and any(home.iterdir()) and not marker.exists():
        print(f"{home} holds something that no demo made: this one runs in {home / 'demo'}", flush=True)
        return empty_home(replace(settings, home=str(home / "demo")))
    if any(entry.state == "running" for entry in Stack(settings).status()):
        raise DemoError(f"something still runs in {home}: fraudgate down stops it")
    if marker.exists():
        print(f"removing what an earlier demo left in {home}", flush=True)
        shutil.rmtree(home)
    home.mkdir(parents=True)
    marker.touch()
    return settings


def demo(argv: list[str]) -> int:
    """Exit status 0 when every payment was accounted for exactly once."""
    parser = argparse.ArgumentParser(
        prog="fraudgate demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--history", type=int, default=30_000, metavar="N", help="payments of the past (default 30000)")
    parser.add_argument("--live", type=int, default=20_000, metavar="N", help="live payments (default 20000)")
    parser.add_argument("--rate", type=float, default=400, metavar="N", help="live payments a second (default 400)")
    parser.add_argument("--seed", type=int, default=7, help="of the simulation (default 7)")
    parser.add_argument("--json", type=Path, default=REPORT_FILE, metavar="FILE", help=f"the figures (default {REPORT_FILE})")
    parser.add_argument("--keep", action="store_true", help="leave everything running at the end")
    args = parser.parse_args(argv)
    demo_run, finished = None, False
    try:
        settings = empty_home(load_settings())
        demo_run = Demo(settings, Plan(args.history, args.live, args.rate, args.seed))
        report = demo_run.run()
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        print(f"the same as JSON: {args.json}")
        finished = True
    except (DemoError, StackError, LoadError) as exc:
        print(f"fraudgate demo: {exc}", file=sys.stderr)
        return 1
    finally:
        if demo_run is not None and not (args.keep and finished):
            demo_run.close()
    print(f"to go on from here: FRAUDGATE_HOME={settings.home} fraudgate {'status' if args.keep else 'up --all'}")
    return 0 if report["unaccounted"] == report["duplicates"] == 0 else 1
