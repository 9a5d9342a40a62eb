"""`fraudgate bench jobs`: how many transactions a second bronze, silver and Redis take on one core, and what each of them costs.

Starts a stack of its own (Kafka, Redis, registry) in a directory of its own and stops it. The streams run on one core, everything else
on the others. They first take WARM-UP transactions; then they are halted while Kafka is filled, and timed from the moment they
go on until silver and Redis hold every transaction: catch-up, with nothing left out. With a rate, transactions are sent at that rate
instead while the streams run. Takes two to five minutes. FRAUDGATE_ settings other than places and ports hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import redis

from deploy import processes
from deploy.ports import free_ports
from deploy.processes import ProcessRecord, children_of, command_line
from deploy.services import streams_run
from deploy.stack import Stack, StackError
from gateway.contracts import layout, tables
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings, load_settings, settings_env
from gateway.contracts.topics import LABELS, TRANSACTIONS
from loadtest.encoding import avro_encoder, json_encoder
from loadtest.events import LoadError
from loadtest.pace import Pace
from loadtest.run import Simulation, sequenced
from loadtest.senders.kafka import make_kafka_sender
from loadtest.simulator import SimulatorConfig

REPORT_FILE = Path("build/bench_jobs.json")
SERVICES = ("kafka", "redis", "registry")
PORTS = ("kafka_port", "kafka_controller_port", "redis_port", "registry_port", "mlflow_port", "gateway_port", "jobs_port")
EVENTS_MAX = 5_000_000
# A simulated card pays this often a day: what decides how many tiles an entity has.
PAYMENTS_PER_CARD_AND_DAY = 2
START_S_MAX = 180.0
LOOK_S = 0.25
# What the JVM's threads do, by the start of their names.
THREADS = {
    "Executor": "tasks",
    "stream": "planning and commits",
    "Thread-": "planning and commits",
    "C1": "compiler",
    "C2": "compiler",
    "VM Thread": "garbage collection",
    "Write": "Python's input",
    "stdout": "Python's input",
}
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchError(RuntimeError):
    """The measurement can't be made. The message says why."""


@dataclass(frozen=True)
class Plan:
    """`rate_per_s`: None for catch-up.

    `live`: as from payment services, with no gateway there to observe them first; else history, which no gateway observes.
    """

    warm_up: int
    events: int
    rate_per_s: float | None
    cards: int
    avro: bool
    live: bool
    seed: int
    core: int
    time_s_max: float


@dataclass(frozen=True)
class Usage:
    """CPU seconds since the start, and the most resident memory, by what the processes are."""

    cpu_s: dict[str, float]
    rss_mb_max: dict[str, float]
    jvm_threads_s: dict[str, float]


@dataclass(frozen=True)
class Result:
    """`behind_s`: from the last transaction's sending to its writing. CPU is microseconds a transaction.

    `cpu_us` and `rss_mb_max` are by jvm, workers, driver, redis, kafka; `jvm_threads_us` divides the JVM's.
    """

    events: int
    took_s: float
    behind_s: float
    transactions_per_s: float
    cpu_us: dict[str, float]
    jvm_threads_us: dict[str, float]
    rss_mb_max: dict[str, float]
    batches: int
    state_rows: int
    state_memory_mb: float
    state_disk_mb: float
    redis_memory_mb: float
    plan: Plan


class JobsUnderTest:
    """`fraudgate jobs --queries bronze,silver` bound to one core, with its JVM and Python workers."""

    def __init__(self, settings: Settings, core: int) -> None:
        self._settings = settings
        self.log_path = settings.home_path / "logs/jobs.log"
        argv = ["taskset", "-c", str(core), sys.executable, "-m", "deploy.cli", "jobs", "--queries", "bronze,silver"]
        env = {k: v for k, v in os.environ.items() if not k.startswith("FRAUDGATE_")} | settings_env(settings)
        self.record: ProcessRecord = processes.spawn(argv, env | {"PYTHONUNBUFFERED": "1"}, Path.cwd(), self.log_path)
        # Daemons of Spark's Python workers leave the process group: they are halted and set going by their pids.
        self._seen: dict[int, str] = {}

    def pids(self) -> dict[int, str]:
        """Each living process of ours: driver (Python), jvm, workers."""
        children = children_of()
        found, queue = {}, [self.record.pid]
        while queue:
            pid = queue.pop()
            queue += children.get(pid, [])
            line = command_line(pid)
            found[pid] = "workers" if "pyspark.daemon" in line else "jvm" if "java" in line.partition(" ")[0] else "driver"
        self._seen |= found
        return found

    def halt(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        for pid in self._seen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def wait(self, condition: Callable[[], bool], within_s: float, what: str) -> None:
        """Raises `BenchError` when the streams end before that, or it takes too long."""
        give_up = time.monotonic() + within_s
        while not condition():
            tail = processes.log_tail(self.log_path)
            if not processes.is_alive(self.record):
                raise BenchError(f"the streams ended before {what}:\n{tail}")
            if time.monotonic() > give_up:
                raise BenchError(f"not within {within_s:.0f} s: {what}\n{tail}")
            time.sleep(LOOK_S)

    def close(self) -> None:
        self.pids()
        self.go_on()
        processes.stop(self.record, 60)


class Rows:
    """Counts the rows of a table by the statistics in its log. Reads each log entry once."""

    def __init__(self, settings: Settings, table: str) -> None:
        self._log = Path(tables.table_uri(settings.tables, table)) / "_delta_log"
        self._next = 0
        self.rows = 0
        self.commits = 0

    def look(self) -> int:
        while (entry := self._log / f"{self._next:020d}.json").exists():
            added = 0
            for line in entry.read_text().splitlines():
                add = json.loads(line).get("add")
                if add is not None:
                    added += json.loads(add["stats"])["numRecords"]
            self.rows += added
            self.commits += added > 0
            self._next += 1
        return self.rows


def usage(jobs: JobsUnderTest, stack: Stack) -> Usage:
    """Of the jobs' processes by kind, and of Redis and Kafka. Ended Python workers are counted by their daemon."""
    kinds = jobs.pids() | {pid: name for name in ("redis", "kafka") if (pid := stack.pid(name)) is not None}
    cpu: dict[str, float] = dict.fromkeys(("jvm", "workers", "driver", "redis", "kafka"), 0.0)
    rss = dict(cpu)
    for pid, kind in kinds.items():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            columns = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            own, waited_for = sum(map(int, columns[11:13])), sum(map(int, columns[13:15]))
            cpu[kind] += (own + (waited_for if kind == "workers" else 0)) / _TICKS_PER_S
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            # Workers are forks that share most pages: the largest says more than the sum.
            rss[kind] = max(rss[kind], int(peak[1]) / 1024 if peak else 0.0)
    jvm = next((pid for pid, kind in kinds.items() if kind == "jvm"), None)
    return Usage(cpu, rss, {} if jvm is None else threads_s(jvm))


def threads_s(jvm: int) -> dict[str, float]:
    """CPU seconds of the JVM's threads by what they do. The kernel keeps 15 letters of a thread's name."""
    found: dict[str, float] = {}
    for task in Path(f"/proc/{jvm}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            head, _, tail = (task / "stat").read_text(errors="replace").rpartition(")")
            name, columns = head.partition("(")[2], tail.split()
            does = next((does for prefix, does in THREADS.items() if name.startswith(prefix)), "other")
            found[does] = found.get(does, 0.0) + sum(map(int, columns[11:13])) / _TICKS_PER_S
    return found


def bench_settings(home: Path) -> Settings:
    """The user's own settings but for where things run: nothing that exists is touched."""
    places = {"kafka_bootstrap": "", "redis_url": "", "registry_url": "", "mlflow_url": "", "tables_uri": "", "checkpoints_uri": ""}
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    return replace(load_settings(), home=str(home), host="127.0.0.1", spark_cores=1, **places, **ports)  # type: ignore[arg-type]


@contextlib.contextmanager
def bound_to(cores: set[int]) -> Iterator[None]:
    """This process, and what it starts meanwhile, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Bench:
    """One measurement in a directory of its own."""

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self.settings = settings
        self.plan = plan
        self.stack = Stack(settings, say)
        self._silver = Rows(settings, tables.SILVER)
        self._bronze = Rows(settings, tables.BRONZE)
        per_day = PAYMENTS_PER_CARD_AND_DAY * plan.cards
        self._config = SimulatorConfig(seed=plan.seed, cards=plan.cards, events_per_day=per_day)

    def send(self, count: int, skip: int, rate_per_s: float | None = None) -> None:
        """Put `count` payments on Kafka, as fast as it takes them or at a rate."""
        registry = SchemaRegistry(self.settings.registry, self.settings.schemas_path)
        encoders = {t: avro_encoder(t, registry) if self.plan.avro else json_encoder() for t in (TRANSACTIONS, LABELS)}
        sender = make_kafka_sender(self.settings.bootstrap, encoders, history=not self.plan.live)
        source = Simulation(self._config, count, skip)
        sender.run(sequenced(source, "kafka", ("kafka",), lambda _: None), Pace(rate_per_s))
        if sender.report.failed:
            raise BenchError(f"Kafka did not take {sender.report.failed} messages: {sender.report.first_failure}")

    def holds(self, rows: int) -> bool:
        """Silver and Redis hold so many transactions and nothing of a batch is left to do."""
        if self._silver.look() < rows:
            return False
        with redis.Redis.from_url(self.settings.redis) as client:
            held = client.get(layout.PROGRESS_KEY)
        if held is None:
            return False
        through: int = msgspec.msgpack.decode(held)[1]
        return through >= self._last_batch()

    def _last_batch(self) -> int:
        commits = Path(self.settings.checkpoints) / "silver/stream/offsets"
        return max((int(p.name) for p in commits.iterdir() if p.name.isdigit()), default=0)

    def run(self) -> Result:
        plan = self.plan
        self.stack.start(SERVICES)
        self.stack.create_topics_and_schemas()
        say(f"bench       {plan.warm_up:,} transactions to warm up with")
        self.send(plan.warm_up, 0)
        jobs = JobsUnderTest(self.settings, plan.core)
        try:
            return self._measure(jobs)
        finally:
            jobs.close()

    def _measure(self, jobs: JobsUnderTest) -> Result:
        plan = self.plan
        jobs.wait(lambda: streams_run(f"{self._metrics_url}"), START_S_MAX, "the streams run")
        jobs.wait(lambda: self.holds(plan.warm_up), START_S_MAX + plan.time_s_max, "the warm-up is in silver and Redis")
        say(f"bench       {plan.events:,} transactions to Kafka")
        if plan.rate_per_s is None:
            jobs.halt()
            self.send(plan.events, plan.warm_up)
        before, commits = usage(jobs, self.stack), self._silver.commits
        started = time.monotonic()
        if plan.rate_per_s is None:
            jobs.go_on()
        else:
            self.send(plan.events, plan.warm_up, plan.rate_per_s)
        sent_s = time.monotonic() - started
        total = plan.warm_up + plan.events
        jobs.wait(lambda: self.holds(total), plan.time_s_max, f"{total:,} transactions are in silver and Redis")
        took_s = time.monotonic() - started
        after = usage(jobs, self.stack)
        if self._silver.look() != total or self._bronze.look() != total:
            raise BenchError(f"of {total} transactions bronze holds {self._bronze.rows} and silver {self._silver.rows}")
        with redis.Redis.from_url(self.settings.redis) as client:
            redis_memory = client.info("memory")["used_memory"] / 2**20
        state = sum(f.stat().st_size for f in (Path(self.settings.checkpoints) / "silver/stream/state").rglob("*") if f.is_file())
        return Result(
            events=plan.events,
            took_s=took_s,
            behind_s=took_s - sent_s,
            transactions_per_s=plan.events / took_s,
            cpu_us={kind: (cpu_s - before.cpu_s[kind]) / plan.events * 1e6 for kind, cpu_s in after.cpu_s.items()},
            jvm_threads_us={
                does: (cpu_s - before.jvm_threads_s.get(does, 0.0)) / plan.events * 1e6
                for does, cpu_s in after.jvm_threads_s.items()
            },
            rss_mb_max=after.rss_mb_max,
            batches=self._silver.commits - commits,
            state_rows=int(self._metric("fraudgate_jobs_state_rows")),
            state_memory_mb=self._metric("fraudgate_jobs_state_memory_bytes") / 2**20,
            state_disk_mb=state / 2**20,
            redis_memory_mb=redis_memory,
            plan=plan,
        )

    @property
    def _metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.settings.jobs_port}/metrics"

    def _metric(self, name: str) -> float:
        with urllib.request.urlopen(self._metrics_url, timeout=5) as reply:  # noqa: S310
            lines = reply.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{") or line.startswith(f"{name} "))


def report_table(result: Result) -> str:
    rows = [
        ("transactions, after a warm-up of", f"{result.events:,} after {result.plan.warm_up:,}"),
        ("transactions a second", f"{result.transactions_per_s:,.0f}"),
        ("seconds behind at the end", f"{result.behind_s:.1f}"),
        ("batches of silver", f"{result.batches}"),
        *((f"CPU us a transaction, {kind}", f"{us:.1f}") for kind, us in result.cpu_us.items()),
        *((f"  of it in the JVM, {does}", f"{us:.1f}") for does, us in result.jvm_threads_us.items()),
        *((f"most resident memory MiB, {kind}", f"{mb:.0f}") for kind, mb in result.rss_mb_max.items()),
        ("ids in Spark's state", f"{result.state_rows:,}"),
        ("Spark's state in memory, MiB", f"{result.state_memory_mb:.1f}"),
        ("Spark's state on disk, MiB", f"{result.state_disk_mb:.1f}"),
        ("Redis memory, MiB", f"{result.redis_memory_mb:.0f}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value:>22}" for name, value in rows)


def bench(argv: list[str]) -> int:
    """`fraudgate bench NAME`: exit status 1 when it can't be measured."""
    parser = argparse.ArgumentParser("fraudgate bench", description="Measure a part of the platform on this machine.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    jobs = names.add_parser("jobs", help="transactions a second of the Spark streams on one core", description=__doc__)
    jobs.add_argument("--events", type=int, default=400_000, metavar="N", help="transactions to time (default %(default)s)")
    jobs.add_argument("--warm-up", type=int, default=100_000, metavar="N", help="transactions before (default %(default)s)")
    jobs.add_argument("--rate", type=float, metavar="N", help="send so many a second (default: all before the streams go on)")
    jobs.add_argument("--cards", type=int, default=100_000, metavar="N", help="cards of the simulation (default %(default)s)")
    jobs.add_argument("--format", choices=("avro", "json"), default="avro", help="of the records (default %(default)s)")
    jobs.add_argument("--live", action="store_true", help="as if a gateway were still to observe them (default: history)")
    jobs.add_argument("--seed", type=int, default=7, help="of the simulation (default %(default)s)")
    jobs.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="of the streams (default %(default)s)")
    jobs.add_argument("--minutes", type=float, default=10, help="give up after (default %(default)s)")
    jobs.add_argument("--json", type=Path, default=REPORT_FILE, metavar="FILE", help="the figures (default %(default)s)")
    jobs.add_argument(
        "--home", type=Path, metavar="DIR", help="an empty directory to run in, which stays (default: a temporary one)"
    )
    options = parser.parse_args(argv)
    for name in ("events", "warm_up"):
        if not 1_000 <= getattr(options, name) <= EVENTS_MAX:
            parser.error(f"--{name.replace('_', '-')} must lie in 1000..{EVENTS_MAX}")
    others = os.sched_getaffinity(0) - {options.core}
    if options.core not in os.sched_getaffinity(0) or not others:
        parser.error(f"core {options.core} and another one are needed; this process may use {sorted(os.sched_getaffinity(0))}")
    if options.home and options.home.exists() and any(options.home.iterdir()):
        parser.error(f"{options.home} is not empty")
    plan = Plan(
        warm_up=options.warm_up,
        events=options.events,
        rate_per_s=options.rate,
        cards=options.cards,
        avro=options.format == "avro",
        live=options.live,
        seed=options.seed,
        core=options.core,
        time_s_max=options.minutes * 60,
    )
    return measure(plan, others, options.json, options.home)


def measure(plan: Plan, others: set[int], report: Path, home: Path | None) -> int:
    place = home or Path(tempfile.mkdtemp(prefix="fraudgate-bench-"))
    place.mkdir(parents=True, exist_ok=True)
    run = None
    # Whoever ends it politely gets the same clean-up as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with bound_to(others):
            run = Bench(bench_settings(place), plan)
            result = run.run()
    except (BenchError, StackError, LoadError, ValueError) as exc:
        print(f"fraudgate bench: {exc}", file=sys.stderr)
        return 1
    finally:
        if run is not None:
            run.stack.stop()
        if home is None:
            shutil.rmtree(place, ignore_errors=True)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(result)), indent=2) + b"\n")
    print(f"\n{report_table(result)}\nthe same as JSON: {report}")
    return 0


def say(line: str) -> None:
    print(line, flush=True)
