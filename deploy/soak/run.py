"""One soak from its stack to its findings: load in a process of its own, faults in a thread, and the check of everything afterwards.

Called by `deploy.soak.command`. Every wait is bounded; whatever happens, `close` ends what was started.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from confluent_kafka import KafkaException

from deploy.bench.stage import Generator
from deploy.soak import alerts
from deploy.soak import tables as checked
from deploy.soak.alerts import AlertsUnknownError, Firing
from deploy.soak.faults import FAULTS, Traces
from deploy.soak.history import History, Poison, Sent, check
from deploy.soak.plan import Fault, Happened, Plan
from deploy.soak.stage import SoakError, Stage, say
from deploy.soak.topics import read_quarantine, read_recorded
from deploy.soak.verdict import Verdict, judge
from deploy.stack import StackError
from gateway.contracts import tables
from gateway.contracts.registry import RegistryUnavailableError
from loadtest.openloop.outcomes import COLUMNS, load
from loadtest.openloop.payments import run_name

SPARE_S = 300.0
FAULT_ENDS_WITHIN_S = 240.0
RECORDED_WITHIN_S = 180.0
QUARANTINE_WITHIN_S = 60.0
# The streams may have lost minutes to a fault, and catch up faster than the load was.
TABLES_WITHIN_S = 1800.0
TOLD_EVERY_S = 10


@dataclass(frozen=True)
class Outcome:
    """Everything that is known at the end. `alerts_note`: why nothing is known of alerts, or ""; `told`: alerts that reached the webhook,
    with the second of the measured time; `unretried`: second attempts that the sender's budget had no room for; `peaks`: by second of the
    measured time, most connections of the sender at once and most payments that waited in it for one.
    """

    plan: Plan
    run: str
    sent: int
    happened: list[Happened]
    history: History
    tables: dict[str, list[str]]
    features: checked.Features
    verdict: Verdict
    firings: list[Firing]
    alerts_note: str
    told: list[tuple[str, float]]
    bodies: dict[int, int]
    poison: int
    retried: int
    unretried: int
    peaks: list[tuple[int, int]]
    sender_cpu_s: float
    took_s: float
    complaints: list[str]


class Faults(threading.Thread):
    """Makes the planned faults, each at its time after `start_s` (time.monotonic()), until `stage.ending`."""

    def __init__(self, stage: Stage, plan: Plan, start_s: float) -> None:
        super().__init__(name="faults", daemon=True)
        self._stage, self._plan, self._start_s = stage, plan, start_s
        self.traces = Traces(np.random.default_rng(plan.seed))
        self.happened: list[Happened] = []

    def run(self) -> None:
        for fault in self._plan.faults:
            if self._stage.ending.wait(max(0.0, self._start_s + fault.at_s - time.monotonic())):
                return
            self.happened.append(self._make(fault))

    def _make(self, fault: Fault) -> Happened:
        began_s, note, error = time.monotonic() - self._start_s, "", ""
        say(f"{began_s:6.0f} s    {fault.kind.name}: {fault.kind.what}")
        try:
            with FAULTS[fault.kind.name](self._stage, self.traces) as note:
                self._stage.ending.wait(fault.hold_s)
        except (SoakError, StackError, OSError, KafkaException, RegistryUnavailableError) as exc:
            error = str(exc)
            say(f"            {fault.kind.name} went wrong: {error}")
        ended_s = time.monotonic() - self._start_s
        if not error:
            say(
                f"{ended_s:6.0f} s    {fault.kind.name} is over ({note})"
                if note
                else f"{ended_s:6.0f} s    {fault.kind.name} is over"
            )
        return Happened(fault.kind.name, began_s, ended_s, note, error)


class Soak:
    """`run` once; `close` in any case."""

    def __init__(self, plan: Plan, home: Path) -> None:
        self._plan = plan
        self._home = home
        self._began_s = time.monotonic()
        self.run_name = run_name("soak")
        self.stage = Stage(home)
        self._generator: Generator | None = None
        self._faults: Faults | None = None
        self._peaks: list[tuple[int, int]] = []

    def run(self) -> Outcome:
        """Raises `SoakError`, `StackError`, `BenchError` and `TopicError` when it can't be run or checked."""
        plan, stage = self._plan, self.stage
        stage.check_disk(int(plan.rate_per_s * plan.total_s))
        stage.start()
        start, result = self._load()
        assert self._faults is not None
        self._faults.join(FAULT_ENDS_WITHIN_S)
        if self._faults.is_alive():
            raise SoakError(f"the last fault did not end within {FAULT_ENDS_WITHIN_S:.0f} s")
        sent = Sent(**{name: column.astype("int64") for name, column in load(self._answers).items() if name in COLUMNS})
        return self._check(sent, start, result)

    @property
    def _answers(self) -> Path:
        return self._home / "answers.npz"

    def _load(self) -> tuple[dict[str, float], dict[str, float]]:
        """The sender's run, with the faults beside it: its first line and its last."""
        plan, stage = self._plan, self.stage
        say(f"load        {plan.rate_per_s:g} a second for {plan.total_s:.0f} s, of which {plan.warm_up_s:.0f} to warm up")
        arguments = ["--run", self.run_name, "--rate", plan.rate_per_s, "--seconds", plan.total_s, "--seed", plan.seed]
        arguments += [text for begin_s, end_s in plan.skewed for text in ("--skew", f"{begin_s}:{end_s}")]
        arguments += ["--out", self._answers]
        log = self._home / "logs/load.log"
        self._generator = Generator("loadtest.openloop.steady", [str(a) for a in arguments], stage.env, log, plan.total_s + SPARE_S)
        lines = self._generator.lines()
        start = next(lines)
        self._faults = Faults(stage, plan, start["start_s"] + plan.warm_up_s)
        self._faults.start()
        answered = 0
        for line in lines:
            if "result" in line:
                return start, line["result"]
            if line["second"] > plan.warm_up_s:
                self._peaks.append((line["connections"], line["waiting"]))
            if line["second"] % TOLD_EVERY_S == 0:
                rate = (line["answered"] - answered) / TOLD_EVERY_S
                answered = line["answered"]
                at_s = line["second"] - plan.warm_up_s
                say(f"{at_s:6.0f} s    {line['sent']:,} sent, {rate:,.0f} answered a second, {line['retried']:,} sent again")
        raise AssertionError("lines() ends with a result or raises")

    def _check(self, sent: Sent, start: dict[str, float], result: dict[str, float]) -> Outcome:
        plan, stage, faults = self._plan, self.stage, self._faults
        assert faults is not None
        settings, traces = stage.settings, faults.traces
        stage.stack.start(["kafka", "redis", "registry", "gateway", "jobs", *stage.watchers])
        say(f"history     {int(sent.accepted.sum()):,} accepted: reading the topics")
        recorded = read_recorded(settings, self.run_name, sent.accepted, RECORDED_WITHIN_S)
        quarantined = read_quarantine(settings, set(traces.poison), QUARANTINE_WITHIN_S)
        history = check(sent, recorded, Poison(traces.poison, quarantined))
        say("tables      waiting for the streams")
        wanted = int((recorded.receipts > 0).sum())
        checked.wait_for_tables(settings, wanted, TABLES_WITHIN_S, lambda: stage.stack.pid("jobs") is not None)
        silver, decisions = (
            checked.rows_of(settings, name, self.run_name, sent.count) for name in (tables.SILVER, tables.DECISIONS)
        )
        wrong = checked.check_tables(sent.accepted, silver, decisions)
        say("features    recomputing those of one community in sixteen")
        features = checked.check_features(settings)
        firings, note = self._alerts(start)
        verdict = judge(sent, plan, faults.happened)
        complaints = [*verdict.complaints, *history.complaints(), *features.complaints()]
        complaints += [f"accepted payments {name}: {len(found):,}" for name, found in wrong.items() if found]
        complaints += [f"{fault.kind} at {fault.begin_s:.0f} s: {fault.error}" for fault in faults.happened if fault.error]
        complaints += [f"a body that means harm was answered {status}" for status in traces.bodies if not 400 <= status < 500]
        if not note:
            began_s = start["start_ms"] / 1000 + plan.warm_up_s
            complaints += alerts.missing(faults.happened, firings, stage.webhook.told, began_s)
        return Outcome(
            plan=plan,
            run=self.run_name,
            sent=int(result["sent"]),
            happened=faults.happened,
            history=history,
            tables=wrong,
            features=features,
            verdict=verdict,
            firings=firings,
            alerts_note=note,
            told=[(t.name, t.at_s - start["start_ms"] / 1000 - plan.warm_up_s) for t in stage.webhook.told],
            bodies=dict(traces.bodies),
            poison=len(traces.poison),
            retried=int(result["retried"]),
            unretried=int(result["unretried"]),
            peaks=self._peaks,
            sender_cpu_s=result["cpu_s"],
            took_s=time.monotonic() - self._began_s,
            complaints=complaints,
        )

    def _alerts(self, start: dict[str, float]) -> tuple[list[Firing], str]:
        """What fired, and why that isn't known."""
        url = getattr(self.stage.settings, "prometheus", "")
        if not self.stage.watchers or not url:
            return [], "this stack has no Prometheus"
        begin_s = start["start_ms"] / 1000 + self._plan.warm_up_s
        try:
            return alerts.firings(url, begin_s, time.time()), ""
        except AlertsUnknownError as exc:
            return [], str(exc)

    def close(self) -> None:
        """Ends everything, in an order in which nothing is left halted or started anew."""
        self.stage.ending.set()
        steps: list[Callable[[], object]] = []
        if self._generator is not None:
            steps.append(self._generator.close)
        if self._faults is not None and self._faults.is_alive():
            faults = self._faults
            steps.append(lambda: faults.join(FAULT_ENDS_WITHIN_S))
        with contextlib.ExitStack() as ending:
            for step in reversed([*steps, self.stage.close]):
                ending.callback(step)
