"""One measurement each: a load generator runs, and at the edge of each of its windows everyone's CPU is looked at.

Called by `deploy.bench.command`, on a `deploy.bench.stage.Stage` that runs. Each returns figures; none takes longer than it says.
"""

from __future__ import annotations

import contextlib
import math
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.bench.cpu import Meter, cpu_s, per_event_us
from deploy.bench.figures import QUANTILES, Figure, spread
from deploy.bench.jobs import BenchError
from deploy.bench.stage import Generator, Stage, say
from loadtest.openloop.payments import People
from loadtest.openloop.schedule import is_void

# What a generator may take beyond its windows: making its requests, and waiting for the last answers.
SPARE_S = 60.0
DRAIN_S = 20.0
METRICS_TIMEOUT_S = 5.0
# Of the requests at a rate, so many may be refused or fail before the rate counts as not reached.
REFUSED_SHARE_MAX = 0.001
DOORS = ("gateway", "service")


@dataclass(frozen=True)
class Timing:
    """`windows` of `seconds` each behind a warm-up."""

    warm_up_s: float
    seconds: float
    windows: int

    @property
    def total_s(self) -> float:
        return self.warm_up_s + self.windows * self.seconds

    def arguments(self) -> list[object]:
        return ["--warm-up", self.warm_up_s, "--seconds", self.seconds, "--windows", self.windows]


@dataclass
class Samples:
    """What was seen at each edge: events done by then, CPU seconds by process, when."""

    done: list[int] = field(default_factory=list)
    cpu: list[dict[str, float]] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)

    def add(self, done: int, cpu: dict[str, float]) -> None:
        self.done.append(done)
        self.cpu.append(cpu)
        self.at_s.append(time.monotonic())

    def costs(self) -> list[dict[str, float]]:
        """CPU an event by process, window by window."""
        return [per_event_us(self.cpu[k], self.cpu[k + 1], self.done[k + 1] - self.done[k]) for k in range(len(self.done) - 1)]

    def rates(self) -> list[float]:
        return [(self.done[k + 1] - self.done[k]) / (self.at_s[k + 1] - self.at_s[k]) for k in range(len(self.done) - 1)]

    def overall(self) -> dict[str, float]:
        return per_event_us(self.cpu[0], self.cpu[-1], self.done[-1] - self.done[0]) if len(self.done) > 1 else {}


def follow(generator: Generator, meter: Meter, others: Sequence[Generator] = ()) -> tuple[dict[str, Any], Samples]:
    """Read a generator to its end. Its own CPU and that of `others` counts as `generator`."""
    samples = Samples()
    for line in generator.lines():
        if "edge" in line:
            own = sum(cpu_s(g.pid) for g in (generator, *others))
            samples.add(line["done"], meter.sample() | {"generator": own})
        elif "result" in line:
            return line["result"], samples
    raise AssertionError("lines() ends with a result or raises")


def result_of(generator: Generator) -> dict[str, Any]:
    found: dict[str, Any] = list(generator.lines())[-1]["result"]
    return found


def crowd(people: People) -> list[object]:
    return ["--cards", people.cards, "--merchants", people.merchants]


class Lacks:
    """Of the gateway's decisions since this was made, the share that went without features, model or both, and the share of declines.

    The former are quicker to make, the latter take longer: a figure with many of either is another figure. `stale_features` is left out:
    without the Spark jobs it stands in each, and costs nothing less.
    """

    def __init__(self, stage: Stage) -> None:
        self._url = f"{stage.settings.gateway}/metrics"
        self._before = self._counts()

    def share(self) -> dict[str, float]:
        """Empty when the gateway doesn't tell."""
        before, after = self._before, self._counts()
        if not after:
            return {}
        if any(after[name] < before.get(name, 0.0) for name in after):
            # Started anew meanwhile: it counts from 0.
            before = {}
        names = ("decided", "lacking", "declined", "explained")
        decided, lacking, declined, explained = (after[name] - before.get(name, 0.0) for name in names)
        if not decided:
            return {"degraded_share": 0.0, "declined_share": 0.0, "explained_share": 0.0}
        # A decision may lack two things and be counted for both.
        return {
            "degraded_share": min(1.0, lacking / decided),
            "declined_share": declined / decided,
            "explained_share": explained / decided,
        }

    def _counts(self) -> dict[str, float]:
        try:
            with urllib.request.urlopen(self._url, timeout=METRICS_TIMEOUT_S) as reply:  # noqa: S310
                text = reply.read().decode()
        except OSError:
            return {}
        return decided_and_lacking(text)


def decided_and_lacking(metrics: str) -> dict[str, float]:
    """From the gateway's metrics."""
    found = {"decided": 0.0, "lacking": 0.0, "declined": 0.0, "explained": 0.0}
    for line in metrics.splitlines():
        value = line.rpartition(" ")[2]
        if line.startswith("fraudgate_decisions_total{"):
            found["decided"] += float(value)
            if 'outcome="decline"' in line:
                found["declined"] += float(value)
        elif line.startswith('fraudgate_reasons_total{outcome="model"}'):
            found["explained"] += float(value)
        elif line.startswith("fraudgate_degraded_total{") and "stale_features" not in line:
            found["lacking"] += float(value)
    return found


def cost_figure(samples: Samples, seconds: float, connections: int | None = None, notes: dict[str, float] | None = None) -> Figure:
    """The gateway's or peer's CPU an event."""
    costs = [next((c[name] for name in DOORS if name in c), math.nan) for c in samples.costs()]
    value, low, high = spread([c for c in costs if not math.isnan(c)])
    return Figure(
        value=value,
        unit="us",
        low=low,
        high=high,
        windows=len(costs),
        duration_s=seconds,
        achieved_per_s=spread(samples.rates())[0],
        connections=connections,
        cpu_us=samples.overall(),
        notes=notes or {},
    )


def closed_loop(
    stage: Stage, meter: Meter, url: str, connections: int, timing: Timing, *, people: People, body: Path | None = None
) -> Figure:
    """CPU a request and requests a second with every connection always busy. Takes `timing` and some seconds."""
    arguments: list[object] = [url, "--connections", connections, *timing.arguments(), *crowd(people)]
    if body is not None:
        arguments += ["--body", body]
    lacks = Lacks(stage)
    with contextlib.closing(stage.generator("http", *arguments, time_s_max=timing.total_s + SPARE_S)) as generator:
        result, samples = follow(generator, meter)
    answered = result["statuses"].get("200", 0)
    refused = sum(result["statuses"].values()) - answered + result["failed"]
    if refused:
        say(f"            {refused:,} requests were refused or not answered: the CPU they took counts, they don't")
    if not answered:
        raise BenchError(f"no request to {url} was answered with 200")
    notes = {"refused": float(refused)} | (lacks.share() if meter is stage.meter else {})
    return cost_figure(samples, timing.windows * timing.seconds, connections, notes)


def latency_figures(
    door: str, rate: float, windows: list[dict[str, Any]], samples: Samples, notes: dict[str, float]
) -> dict[str, Figure]:
    """p50, p99 and p99.9 of an open-loop run, over the windows that count; over all when all are void, and then so marked."""
    counting = [w for w in windows if not is_void(w["behind_p99_ms"], w["p99_ms"])]
    void = not counting
    used = counting or windows
    found = {}
    for quantile in QUANTILES:
        value, low, high = spread([w[quantile] for w in used])
        found[f"{door}.{quantile}.{rate:.0f}"] = Figure(
            value=value,
            unit="ms",
            low=low,
            high=high,
            windows=len(used),
            duration_s=sum(w["seconds"] for w in used),
            rate_per_s=rate,
            achieved_per_s=spread([w["achieved_per_s"] for w in used])[0],
            cpu_us=samples.overall(),
            void=void,
            reached_rate=all(w["reached_rate"] for w in used) and notes.get("refused_share", 0.0) <= REFUSED_SHARE_MAX,
            notes=notes
            | {
                "void_windows": len(windows) - len(counting),
                "censored": sum(w["censored"] for w in used),
                "behind_p99_ms": max(w["behind_p99_ms"] for w in used),
                "behind_max_ms": max(w["behind_max_ms"] for w in used),
            },
        )
    return found


def open_http(stage: Stage, url: str, rate: float, timing: Timing, *, people: People, connections: int) -> dict[str, Figure]:
    """Latency at a constant rate. A run whose windows are all void is made once more."""
    figures: dict[str, Figure] = {}
    for _ in range(2):
        lacks = Lacks(stage)
        arguments = [
            url,
            "--rate",
            rate,
            "--connections",
            connections,
            *timing.arguments(),
            *crowd(people),
        ]
        with contextlib.closing(stage.generator("http", *arguments, time_s_max=timing.total_s + SPARE_S)) as generator:
            result, samples = follow(generator, stage.meter)
        refused = sum(n for status, n in result["statuses"].items() if status != "200") + result["failed"]
        notes = {"connections": float(connections), "refused_share": refused / max(1, result["sent"])} | lacks.share()
        figures = latency_figures("http", rate, result["windows"], samples, notes)
        if not next(iter(figures.values())).void:
            break
        say("            void: the load generator fell behind its schedule")
    return figures


def open_kafka(stage: Stage, door: str, rate: float, timing: Timing, *, run: str, people: People) -> dict[str, Figure]:
    """Kafka in to Kafka out at a constant rate, by an independent reader. A run in which the producer was void is made once more."""
    figures: dict[str, Figure] = {}
    for attempt in "ab":
        lacks = Lacks(stage)
        count = int(timing.total_s * rate)
        common = ["--run", f"{run}{attempt}", "--rate", rate, *timing.arguments()]
        most = timing.total_s + DRAIN_S + SPARE_S
        with contextlib.ExitStack() as held:
            out = held.enter_context(
                contextlib.closing(stage.generator("kafka_out", *common, "--count", count, "--within-s", DRAIN_S, time_s_max=most))
            )
            if "ready" not in next(out.lines()):
                raise BenchError("the reader of decisions did not get ready")
            sending = [*common, *crowd(people)]
            into = held.enter_context(contextlib.closing(stage.generator("kafka_in", *sending, time_s_max=most)))
            out.send(next(into.lines()))
            with ThreadPoolExecutor(1) as pool:
                sent = pool.submit(result_of, into)
                result, samples = follow(out, stage.meter, [into])
                sender = sent.result()
        late = {key: sender[key] for key in ("behind_p99_ms", "behind_max_ms")}
        notes = {key: float(result[key]) for key in ("missing", "duplicates")} | {"not_taken_by_kafka": float(sender["failed"])}
        notes |= lacks.share()
        figures = latency_figures(door, rate, [w | late for w in result["windows"]], samples, notes)
        if not next(iter(figures.values())).void:
            break
        say("            void: the producer fell behind its schedule")
        stage.wait_idle(DRAIN_S)
    return figures


def backlog(stage: Stage, count: int, *, run: str, people: People, time_s_max: float) -> Figure:
    """CPU a decision and decisions a second while the gateway, on its own core, works off what waits on Kafka."""
    stage.stack.stop(["gateway"])
    lacks = Lacks(stage)
    sending = ["--run", run, "--count", count, *crowd(people)]
    with contextlib.ExitStack() as held:
        into = held.enter_context(contextlib.closing(stage.generator("kafka_in", *sending, time_s_max=SPARE_S)))
        if result_of(into)["failed"]:
            raise BenchError("Kafka did not take the backlog")
        reading = ["--run", run, "--count", count, "--within-s", time_s_max]
        most = time_s_max + SPARE_S
        out = held.enter_context(contextlib.closing(stage.generator("kafka_out", *reading, time_s_max=most)))
        if "ready" not in next(out.lines()):
            raise BenchError("the reader of decisions did not get ready")
        with ThreadPoolExecutor(1) as pool:
            reading_on = pool.submit(follow, out, stage.meter)
            stage.gateway_alone()
            result, samples = reading_on.result()
    if not result["timed"]:
        raise BenchError(
            f"of {count:,} payments on Kafka {result['decided']:,} were decided within {time_s_max:.0f} s: too few to time"
        )
    figure = cost_figure(samples, result["seconds"], notes=lacks.share())
    if not result["complete"]:
        say(f"            only {result['decided']:,} of {count:,} were decided in time")
    return figure
