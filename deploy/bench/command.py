"""`fraudgate bench gateway | spark | all`: the gateway and its peers on this machine, in one run; `bench jobs` is deploy.bench.jobs,
`bench policy` deploy.bench.rules.

Flat out first, each service in turn on a core of its own and everything else on the other: CPU a request of the HTTP door and of its
peers, CPU an event of the Kafka door. Then at constant rates with everything sharing the cores: the latency curve of both doors, at last
with the Spark jobs running. Starts stacks of its own in a directory of its own. docs/benchmarks.md says what each figure means.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from deploy.bench import jobs as bench_jobs
from deploy.bench import rules as bench_rules
from deploy.bench.figures import Figure, as_json, draw, number, ratio, table, worse
from deploy.bench.jobs import BenchError, Rows
from deploy.bench.load import Timing, backlog, closed_loop, crowd, open_http, open_kafka, result_of
from deploy.bench.stage import Stage, answers, remove, say
from deploy.stack import StackError
from gateway.contracts import tables
from loadtest.events import LoadError
from loadtest.openloop.payments import People
from loadtest.peers.requests import fill, mlflow_body

REPORT_FILE = Path("build/bench.json")
CURVE_FILE = Path("build/latency.svg")
PARTS = ("http", "peers", "kafka", "curve", "spark")
GATEWAY_PARTS = ("http", "peers", "kafka", "curve")
RUN = "bench"
# Hashes for so many cards are enough for a peer to have different ones to fetch, and are quickly written.
PEER_PEOPLE = People(10_000, 2_000)
PEER_REDIS_DB = 1
MLFLOW = "mlflow_serve"
# The highest rate that something is promised at; what lies above is measured while the door keeps up.
PROMISED_PER_S = 10_000
# A broker whose compiler takes less of a core than this is warm.
COMPILING_SHARE_MAX = 0.05
# Waits for a gateway to come to rest between two runs.
REST_S = 90.0


@dataclass(frozen=True)
class Plan:
    """Sizes of one run. `flat_out` and `steady` are the windows of the two kinds of measurement."""

    people: People
    payments_per_card: float
    # Looks of so many seconds, so many of them at most.
    warm_up_s: float
    warm_ups_max: int
    connections: tuple[int, ...]
    flat_out: Timing
    steady: Timing
    with_spark: Timing
    http_rates: tuple[float, ...]
    kafka_rates: tuple[float, ...]
    backlog_s: float
    backlog_max: int
    spark_history: int
    time_s_max: float


FULL = Plan(
    people=People(),
    payments_per_card=2.0,
    warm_up_s=15.0,
    warm_ups_max=8,
    connections=(64, 128),
    flat_out=Timing(3.0, 4.0, 3),
    steady=Timing(4.0, 6.0, 3),
    with_spark=Timing(10.0, 10.0, 3),
    http_rates=(1_000, 2_500, 5_000, 7_500, 10_000, 12_500),
    kafka_rates=(2_500, 5_000, 10_000),
    backlog_s=10.0,
    backlog_max=300_000,
    spark_history=150_000,
    time_s_max=25 * 60,
)
QUICK = Plan(
    people=People(5_000, 1_000),
    payments_per_card=2.0,
    warm_up_s=5.0,
    warm_ups_max=1,
    connections=(64,),
    flat_out=Timing(1.0, 2.0, 1),
    steady=Timing(1.0, 3.0, 1),
    with_spark=Timing(2.0, 4.0, 1),
    http_rates=(1_000, 5_000, 10_000),
    kafka_rates=(10_000,),
    backlog_s=3.0,
    backlog_max=60_000,
    spark_history=20_000,
    time_s_max=12 * 60,
)


class Bench:
    """One run of the chosen parts. A part that can't be measured is told and left out; `figures` holds the others."""

    def __init__(self, home: Path, plan: Plan, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.plan = plan
        self._home = home
        self._clock_s = clock_s
        self._give_up_s = clock_s() + plan.time_s_max
        self.figures: dict[str, Figure] = {}
        self.failures: list[str] = []
        self.trees = 0
        self._stage: Stage | None = None

    def run(self, parts: set[str]) -> None:
        if parts & set(GATEWAY_PARTS):
            stage = self._stage = Stage(self._home / "gateway")
            try:
                self._measure(stage, parts)
            finally:
                stage.close()
        if "spark" in parts:
            stage = self._stage = Stage(self._home / "spark")
            try:
                self._try("the Kafka door with Spark", lambda: self._with_spark(stage))
            finally:
                stage.close()

    def _measure(self, stage: Stage, parts: set[str]) -> None:
        plan = self.plan
        stage.start()
        self.trees = stage.trees
        stage.fill(plan.people.cards, plan.payments_per_card, plan.people.merchants)
        if parts & {"http", "kafka", "curve"}:
            self._try("the warm-up", lambda: self._warm_up(stage))
        if parts & {"http", "peers"}:
            self._try("the HTTP door flat out", lambda: self._http(stage))
        if "kafka" in parts:
            self._try("the Kafka door flat out", lambda: self._kafka(stage))
        if "peers" in parts:
            stage.stack.stop(["gateway"])
            self._peers(stage)
        if "curve" in parts:
            stage.share()
            for rate in plan.http_rates:
                if rate > PROMISED_PER_S and not self._reached("http", plan.http_rates):
                    continue
                self._try(f"HTTP at {rate:,.0f} a second", lambda rate=rate: self._open_http(stage, rate))  # type: ignore[misc]
            for rate in plan.kafka_rates:
                self._try(f"Kafka at {rate:,.0f} a second", lambda rate=rate: self._open_kafka(stage, rate))  # type: ignore[misc]

    def _reached(self, door: str, rates: tuple[float, ...]) -> bool:
        """Whether the door kept up with every rate so far."""
        found = [self.figures[key] for rate in rates if (key := f"{door}.p99_ms.{rate:.0f}") in self.figures]
        return bool(found) and all(f.reached_rate for f in found)

    def _rested(self, stage: Stage) -> None:
        """Raises `BenchError` while the gateway still works on what an earlier run left: the next would measure that."""
        if not stage.wait_idle(REST_S):
            raise BenchError(f"{REST_S:.0f} s after the run before, the gateway was still busy with it")

    def _try(self, what: str, measure: Callable[[], None]) -> None:
        if self._clock_s() > self._give_up_s:
            self.failures.append(f"{what}: not measured, the time was over")
            say(f"bench       {self.failures[-1]}")
            return
        say(f"bench       {what}")
        try:
            measure()
        except (BenchError, StackError) as exc:
            self.failures.append(f"{what}: {exc}")
            say(f"bench       not measured: {exc}")

    def _flat_out(self, name: str, connections: int, figure: Figure) -> None:
        self.figures[f"{name}.cpu_us.{connections}"] = figure
        rate = figure.achieved_per_s or 0.0
        say(f"            {name}, {connections} connections: {rate:,.0f} a second, {figure.value:.1f} us of CPU each")

    def _warm_up(self, stage: Stage) -> None:
        """Load that isn't measured: for its first minute or so a broker's JVM compiles more than it serves, on the core of the others."""
        stage.gateway_alone()
        url, n = f"{stage.settings.gateway}/score", max(self.plan.connections)
        for look in range(1, self.plan.warm_ups_max + 1):
            before_s = stage.broker_compiling_s()
            closed_loop(stage, stage.meter, url, n, Timing(0.0, self.plan.warm_up_s, 1), people=self.plan.people)
            share = (stage.broker_compiling_s() - before_s) / self.plan.warm_up_s
            if share < COMPILING_SHARE_MAX or look == self.plan.warm_ups_max:
                say(f"            after {look * self.plan.warm_up_s:.0f} s the broker's compiler takes {share:.1%} of a core")
                return

    def _http(self, stage: Stage) -> None:
        stage.gateway_alone()
        for n in self.plan.connections:
            url = f"{stage.settings.gateway}/score"
            self._flat_out("http", n, closed_loop(stage, stage.meter, url, n, self.plan.flat_out, people=self.plan.people))
        self.figures["http.cpu_us"] = worse(self._by_connections("http"))

    def _kafka(self, stage: Stage) -> None:
        plan = self.plan
        self._rested(stage)
        first = self.figures.get("http.cpu_us")
        a_second = 2 * (first.achieved_per_s or 0.0) if first is not None else 5_000.0
        count = int(min(plan.backlog_max, max(20_000, a_second * plan.backlog_s)))
        figure = self.figures["kafka.cpu_us"] = backlog(stage, count, run=f"{RUN}-drain", people=plan.people, time_s_max=REST_S)
        say(f"            Kafka door: {figure.achieved_per_s or 0.0:,.0f} a second, {figure.value:.1f} us of CPU each")

    def _peers(self, stage: Stage) -> None:
        redis_url = stage.settings.redis.removesuffix("/0") + f"/{PEER_REDIS_DB}"
        body = stage.settings.home_path / "mlflow-request.json"
        body.write_bytes(mlflow_body())
        self._try("peer: an empty uvicorn handler", lambda: self._peer(stage, "empty_uvicorn", "/score"))
        self._try("peer: an empty FastAPI endpoint", lambda: self._peer(stage, "empty_fastapi", "/score"))

        def service() -> None:
            fill(redis_url, PEER_PEOPLE)
            self._peer(stage, "fastapi_service", "/score", redis_url, stage.model_path)

        self._try("peer: the usual FastAPI service", service)
        place = stage.settings.home_path / "mlflow-model"
        self._try(
            "peer: mlflow models serve", lambda: self._peer(stage, MLFLOW, "/invocations", stage.model_path, place, body=body)
        )
        http = self._by_connections("http")
        for name in ("empty_uvicorn", "empty_fastapi", "fastapi_service", MLFLOW):
            peer = self._by_connections(name)
            if name == "empty_uvicorn":
                self.figures["ratio.http_to_empty_uvicorn"] = ratio(http, peer, worst="most")
            else:
                self.figures[f"ratio.{name}_to_http"] = ratio(peer, http, worst="least")

    def _peer(self, stage: Stage, name: str, path: str, *arguments: object, body: Path | None = None) -> None:
        # An empty handler answers anything; the others have a page of their own.
        alive = {"empty_fastapi": "/openapi.json", "fastapi_service": "/openapi.json", MLFLOW: "/ping"}.get(name, "/")
        with stage.peer_alone(name, *arguments, healthy=answers(alive)) as port:
            for n in self.plan.connections:
                url = f"http://127.0.0.1:{port}{path}"
                meter = stage.peer_meter()
                self._flat_out(name, n, closed_loop(stage, meter, url, n, self.plan.flat_out, people=PEER_PEOPLE, body=body))

    def _by_connections(self, name: str) -> Mapping[int, Figure]:
        keys = {n: f"{name}.cpu_us.{n}" for n in self.plan.connections}
        return {n: self.figures[key] for n, key in keys.items() if key in self.figures}

    def _open_http(self, stage: Stage, rate: float) -> None:
        self._rested(stage)
        url, n = f"{stage.settings.gateway}/score", max(self.plan.connections)
        self._at_a_rate(open_http(stage, url, rate, self.plan.steady, people=self.plan.people, connections=n))

    def _open_kafka(self, stage: Stage, rate: float) -> None:
        self._rested(stage)
        run = f"{RUN}-{rate:.0f}"
        self._at_a_rate(open_kafka(stage, "kafka", rate, self.plan.steady, run=run, people=self.plan.people))

    def _at_a_rate(self, found: dict[str, Figure]) -> None:
        self.figures |= found
        p50, p99, p999 = (number(f.value) for f in found.values())
        answered = next(iter(found.values())).achieved_per_s or 0.0
        say(f"            {answered:,.0f} a second answered; p50 {p50}, p99 {p99}, p99.9 {p999} ms")

    def _with_spark(self, stage: Stage) -> None:
        """The same at 10,000 a second while the streams work, in a stack of their own: there they have nothing else to catch up with."""
        plan = self.plan
        stage.start()
        self.trees = stage.trees
        history = ["--run", f"{RUN}-history", "--count", plan.spark_history, "--history", *crowd(plan.people)]
        into = stage.generator("kafka_in", *history, time_s_max=60)
        try:
            result_of(into)
        finally:
            into.close()
        stage.stack.start(["jobs"])
        silver = Rows(stage.settings, tables.SILVER)
        give_up = self._clock_s() + REST_S * 2
        while silver.look() < plan.spark_history:
            if stage.stack.pid("jobs") is None or self._clock_s() > give_up:
                raise BenchError(f"of {plan.spark_history:,} payments of history the streams took {silver.rows:,}")
            time.sleep(0.5)  # sleeps: between two looks at the table
        stage.share()
        found = open_kafka(stage, "kafka_with_spark", PROMISED_PER_S, plan.with_spark, run=f"{RUN}-spark", people=plan.people)
        sent = int(plan.with_spark.total_s * PROMISED_PER_S)
        behind = max(0, plan.spark_history + sent - silver.look())
        for figure in found.values():
            figure.notes["spark_behind_transactions"] = float(behind)
        self._at_a_rate(found)
        say(f"            when the last decision was read, silver lacked {behind:,} of the {sent:,} transactions")


def bench(argv: list[str]) -> int:
    """`fraudgate bench NAME`: exit status 1 when something can't be measured."""
    if argv[:1] == ["jobs"]:
        return bench_jobs.bench(argv)
    if argv[:1] == ["policy"]:
        return bench_rules.bench(argv[1:])
    parser = argparse.ArgumentParser(
        "fraudgate bench",
        description="Measure a part of the platform on this machine. `jobs` and `policy` have options of their own: bench jobs --help.",
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    names.add_parser("jobs", help="transactions a second of the Spark streams on one core")
    names.add_parser("policy", help="what a decision of the policy costs, by rules and batch")
    for name, parts, text in (
        ("all", PARTS, "everything below, in one run: what make bench does"),
        ("gateway", GATEWAY_PARTS, "both doors of the gateway and its peers"),
        ("spark", ("spark",), "the Kafka door at 10,000 a second with the Spark jobs running"),
    ):
        sub = names.add_parser(name, help=text, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("--quick", action="store_true", help="short windows, few cards: to see that it works")
        sub.add_argument(
            "--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=f"only these of {', '.join(parts)}"
        )
        sub.add_argument("--json", type=Path, default=REPORT_FILE, metavar="FILE", help="the figures (default %(default)s)")
        sub.add_argument("--svg", type=Path, default=CURVE_FILE, metavar="FILE", help="the latency curve (default %(default)s)")
        sub.add_argument(
            "--home", type=Path, metavar="DIR", help="an empty directory to run in, which stays (default: a temporary one)"
        )
    options = parser.parse_args(argv)
    if options.home and options.home.exists() and any(options.home.iterdir()):
        parser.error(f"{options.home} is not empty")
    return measure(QUICK if options.quick else FULL, set(options.parts), options.json, options.svg, options.home)


def measure(plan: Plan, parts: set[str], report: Path, svg: Path, home: Path | None) -> int:
    place = home or Path(tempfile.mkdtemp(prefix="fraudgate-bench-"))
    # Whoever ends it politely gets the same clean-up as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begin = time.monotonic()
    run = Bench(place, plan)
    try:
        run.run(parts)
    except (BenchError, StackError, LoadError, ValueError) as exc:
        print(f"fraudgate bench: {exc}", file=sys.stderr)
        return 1
    finally:
        if home is None:
            remove(place)
    about = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": version("fraudgate"),
        "took_s": round(time.monotonic() - begin, 1),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "trees": run.trees,
        "plan": asdict(plan),
        "not_measured": run.failures,
    }
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_bytes(as_json(run.figures, about))
    print(f"\n{table(run.figures)}\n")
    print(f"{about['took_s']:.0f} s; the same as JSON: {report}")
    if "curve" in parts:
        draw(run.figures, svg, f"{about['cores']} cores shared by everything, {about['at']}")
        print(f"the latency curve: {svg}")
    for failure in run.failures:
        print(f"not measured: {failure}", file=sys.stderr)
    return 1 if run.failures else 0
