"""What the console shows, made of what is known right now: one dictionary a frame. Pure; the gatherer calls it once a second.

Times are seconds and milliseconds as their names say, rates are a second over the gatherer's window, null is what isn't known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.console.alerts import AlertFollower
from gateway.console.samples import Samples, Window
from gateway.console.sources import Source
from gateway.console.tables import Tables
from gateway.console.tap import Tap
from gateway.console.verdict import Level, Trouble, Verdicts, number, seconds
from gateway.contracts.decision import Door, Outcome
from gateway.contracts.metrics import GOOD_WITHIN_S, SERIES

DECISIONS = "fraudgate_decisions_total"
LATENCY, STEP = "fraudgate_decision_latency_seconds", "fraudgate_step_seconds"
# From the histograms' unit to milliseconds.
TO_MS = 1000.0
DEGRADED, REFUSED = "fraudgate_degraded_total", "fraudgate_refused_total"
IN_FLIGHT, IN_FLIGHT_LIMIT = "fraudgate_in_flight", "fraudgate_in_flight_limit"
LAG, WORKERS = "fraudgate_consumer_lag_records", "fraudgate_workers"
UNOBSERVED = "fraudgate_unobserved"
WAITING, SPOOLED, SPOOL_AGE = "fraudgate_publish_buffer_records", "fraudgate_spool_records", "fraudgate_spool_age_seconds"
PUBLISHED, DROPPED = "fraudgate_published_total", "fraudgate_publish_dropped_total"
ROUTED = "fraudgate_routed_total"
GUARD_OUT, GUARD_EVIDENCE, GUARD_PAIRS = "fraudgate_guard_out", "fraudgate_guard_evidence", "fraudgate_guard_pairs_total"
OWN_NAMES = (
    *(DECISIONS, f"{LATENCY}_bucket", f"{STEP}_bucket", DEGRADED, REFUSED, IN_FLIGHT, IN_FLIGHT_LIMIT, LAG, WORKERS, UNOBSERVED),
    *(WAITING, SPOOLED, SPOOL_AGE, PUBLISHED, DROPPED, ROUTED, GUARD_OUT, GUARD_EVIDENCE, GUARD_PAIRS),
)
assert set(OWN_NAMES) <= set(SERIES), "the console reads what nobody exports"
DRIFT_PSI, DRIFT_KS, DRIFT_ALARM = "fraudgate_jobs_drift_psi", "fraudgate_jobs_drift_ks", "fraudgate_jobs_drift_alarm"
DRIFT_SHOWN = 6

P99_PROMISED_MS = GOOD_WITHIN_S[Door.HTTP] * 1000
# Of the window's decisions without all their features, of which it is no longer noise.
DEGRADED_SHARE_MAX = 0.01
# Consuming is late when what waits would take so long at the present rate, and is no less than a few batches.
LAG_S_MAX, LAG_RECORDS_LEAST = 5.0, 200
SPOOL_AGE_S_MAX = 5.0
# A source is old when so many of its polls have brought nothing.
OLD_S = 6.0
QUANTILES = (0.5, 0.99, 0.999)


@dataclass
class State:
    """All that a frame is made of. `status` and `routing` are the gateway's own accounts, as /readyz and /routing give them."""

    window: Window
    status: Mapping[str, Any]
    routing: Mapping[str, Any]
    jobs: Source
    cases: Source
    alertmanager: Source | None
    alerts: AlertFollower
    tables: Tables
    tap: Tap
    verdicts: Verdicts
    kafka_wanted: bool
    flowing_s: float = 0.0


def point(window: Window, at_ms: int) -> list[float | None]:
    """One place of the charts: time, decisions a second, p50, p99 and p99.9 in ms, degraded a second, refused a second."""
    quantiles = latency(window)
    rates = [window.rate(name) or 0.0 for name in (DECISIONS, DEGRADED, REFUSED)]
    return [at_ms, _rounded(rates[0]), *quantiles["ms"], _rounded(rates[1]), _rounded(rates[2])]


def latency(window: Window) -> dict[str, Any]:
    """Of the HTTP door; of Kafka's where HTTP decided nothing within the window."""
    for door in ("http", "kafka"):
        found = window.quantiles(LATENCY, QUANTILES, door=door)
        if found[0] is not None:
            return {"door": door, "ms": [None if q is None else _rounded(q * TO_MS) for q in found]}
    return {"door": None, "ms": [None, None, None]}


def frame(state: State, now_s: float, at_ms: int) -> dict[str, Any]:
    """Everything but alerts and single decisions, which the gatherer adds when there are new ones."""
    window, own = state.window, state.window.newest
    rates = window.rates(DECISIONS, "outcome")
    rate = window.rate(DECISIONS) or 0.0
    jobs: Samples | None = state.jobs.value
    tables = state.tables.shown(jobs, now_s, flowing_s=state.flowing_s)
    found = latency(window)
    degraded = {kind: _rounded(r) for kind, r in window.rates(DEGRADED, "kind").items() if r > 0}
    seen: dict[str, Any] = {
        "at_ms": at_ms,
        "window_s": _rounded(window.seconds),
        "rate": _rounded(rate),
        "doors": {door: _rounded(r) for door, r in window.rates(DECISIONS, "door").items()},
        "latency": found,
        "steps_ms": {
            s: _ms(window.quantiles(STEP, (0.99,), step=s)[0]) for s in ("features", "model", "policy", "publish", "commit")
        },
        "in_flight": own.total(IN_FLIGHT) or 0,
        "in_flight_limit": own.total(IN_FLIGHT_LIMIT),
        "outcomes": [
            {"name": o.value, "rate": _rounded(rates.get(o.value, 0.0)), "total": own.total(DECISIONS, outcome=o.value) or 0}
            for o in Outcome
        ],
        "degraded": degraded,
        "degraded_share": _share(window.rate(DEGRADED) or 0.0, rate),
        "refused": {reason: _rounded(r) for reason, r in window.rates(REFUSED, "reason").items() if r > 0},
        "kafka": {
            "wanted": state.kafka_wanted,
            "connected": "kafka" not in state.status["degraded"],
            "lag": own.total(LAG),
            "published": _rounded(window.rate(PUBLISHED) or 0.0),
            "waiting": own.total(WAITING) or 0,
            "spooled": own.total(SPOOLED) or 0,
            "spool_age_s": _rounded(own.total(SPOOL_AGE) or 0.0),
        },
        "redis": {"ready": "redis" not in state.status["degraded"], "unobserved": own.total(UNOBSERVED) or 0},
        "workers": own.total(WORKERS) or 1,
        "tables": tables,
        "jobs": _jobs(state.jobs, jobs, now_s),
        "routes": _routes(state, own),
        "drift": _drift(jobs),
        "cases": _cases(state.cases, now_s),
        "alarms": _alarms(state.alertmanager, now_s),
        "sources": [_source(s, now_s) for s in (state.jobs, state.cases, state.alertmanager) if s is not None],
        "alert_topic": {
            "heard_s": None if state.alerts.heard_s is None else _rounded(now_s - state.alerts.heard_s),
            "trouble": state.alerts.trouble,
        },
        "in_use": {name: state.status[name] for name in ("model", "policy", "lists", "feature_fingerprint", "code_version")},
        "sampled": {"seen": state.tap.seen, "kept": state.tap.kept},
    }
    troubles = [*_own_troubles(state, seen), *_other_troubles(state, seen, now_s)]
    seen["verdict"] = state.verdicts.told(troubles, now_s, _well(seen))
    seen["parts"] = _parts(seen, troubles)
    return seen


def _well(seen: Mapping[str, Any]) -> str:
    if not seen["rate"]:
        return "no payments at the moment; all parts answer"
    p99 = seen["latency"]["ms"][1]
    fresh = "all fresh" if all(t["state"] == "fresh" for t in seen["tables"]) else "nothing late"
    return f"{number(seen['rate'])} decisions/s, p99 {'unknown' if p99 is None else f'{number(p99)} ms'}, {fresh}"


def _own_troubles(state: State, seen: Mapping[str, Any]) -> list[Trouble]:
    """What the gateway knows of itself, and of what it needs to decide."""
    status, missing = state.status, set(state.status["degraded"])
    found = []

    def add(level: Level, code: str, part: str, text: str) -> None:
        found.append(Trouble(level, code, part, text))

    if not status["ready"]:
        add(Level.DOWN, "not_ready", "serve", "this gateway takes no payments")
    if "redis" in missing:
        add(Level.DEGRADED, "redis", "features", "Redis doesn't answer, decisions without history")
    if "model" in missing:
        add(Level.DEGRADED, "model", "model", "there is no model, rules alone decide")
    if state.kafka_wanted and "kafka" in missing:
        waits = seen["kafka"]["waiting"] + seen["kafka"]["spooled"]
        held = f", {number(waits)} records wait here" if waits else ""
        add(Level.DEGRADED, "kafka", "kafka", f"Kafka can't be reached{held}")
    elif seen["kafka"]["spool_age_s"] > SPOOL_AGE_S_MAX:
        add(Level.WATCH, "spool", "store", f"receipts wait for Kafka, the oldest {seconds(seen['kafka']['spool_age_s'])}")
    share = seen["degraded_share"]
    if share is not None and share > DEGRADED_SHARE_MAX and not missing & {"redis", "model"}:
        kinds = " and ".join(kind.replace("_", " ") for kind in sorted(seen["degraded"], key=lambda k: -seen["degraded"][k])[:2])
        add(Level.DEGRADED, "degraded", "features", f"{share:.0%} of decisions lack something ({kinds})")
    p99 = seen["latency"]["ms"][1]
    if seen["latency"]["door"] == "http" and p99 is not None and p99 > P99_PROMISED_MS:
        add(Level.DEGRADED, "slow", "serve", f"answers are slow, p99 {number(p99)} ms where {number(P99_PROMISED_MS)} are promised")
    refused = seen["refused"].get("overloaded", 0.0)
    if refused:
        add(Level.DEGRADED, "overloaded", "serve", f"too much comes in, {number(refused)}/s are told to try again")
    lag, kafka_rate = seen["kafka"]["lag"] or 0, seen["doors"].get("kafka", 0.0)
    if lag > max(LAG_RECORDS_LEAST, LAG_S_MAX * kafka_rate):
        add(Level.WATCH, "lag", "kafka", f"{number(lag)} records wait in Kafka")
    for name, what in (("policy_refused", "a new policy was refused"), ("model_refused", "a new model was refused")):
        if status[name]:
            add(Level.WATCH, name, "model", f"{what}, the one before stays")
    if "lists" in missing:
        add(Level.WATCH, "lists", "model", "the lists may not be what they should be")
    if seen["routes"]["guard_out"]:
        add(Level.WATCH, "guard", "model", "the guard has taken the challenger out")
    return found


def _other_troubles(state: State, seen: Mapping[str, Any], now_s: float) -> list[Trouble]:
    """What other processes say, or don't."""
    found = []
    if state.jobs.trouble is not None:
        age_s = state.jobs.age_s(now_s)
        if age_s is None or age_s > OLD_S:
            found.append(Trouble(Level.WATCH, "jobs", "store", "the feature jobs don't answer, features and tables age"))
    else:
        stopped = [name for name, up in seen["jobs"]["queries"].items() if not up]
        if stopped:
            found.append(Trouble(Level.WATCH, "queries", "store", f"streams stand still: {', '.join(sorted(stopped))}"))
        for table in seen["tables"]:
            if table["state"] == "late" and seen["rate"]:
                text = f"{table['name']} is {seconds(table['fresh_s'])} old where {seconds(table['promised_s'])} are promised"
                found.append(Trouble(Level.WATCH, f"late_{table['name']}", "store", text))
            elif table["state"] == "still":
                found.append(
                    Trouble(Level.WATCH, f"still_{table['name']}", "store", f"nothing is written to {table['name']} any more")
                )
        if seen["drift"]["alarms"]:
            found.append(Trouble(Level.WATCH, "drift", "model", f"payments drift: {', '.join(seen['drift']['alarms'][:3])}"))
    age_s = state.cases.age_s(now_s)
    if state.cases.trouble is not None and (age_s is None or age_s > OLD_S):
        found.append(Trouble(Level.WATCH, "cases", "serve", "the case service doesn't answer, reviews wait"))
    if seen["alarms"] is not None and seen["alarms"]["firing"]:
        names = ", ".join(dict.fromkeys(alarm["name"] for alarm in seen["alarms"]["firing"][:3]))
        found.append(Trouble(Level.WATCH, "alarms", "serve", f"alarms are firing: {names}"))
    return found


def _parts(seen: Mapping[str, Any], troubles: Sequence[Trouble]) -> dict[str, str]:
    """The level of each node of the picture."""
    parts = dict.fromkeys(("kafka", "features", "model", "store", "serve"), Level.WELL)
    for trouble in troubles:
        parts[trouble.part] = max(parts[trouble.part], trouble.level)
    shown = {name: level.name.lower() for name, level in parts.items()}
    if not seen["kafka"]["wanted"]:
        shown["kafka"] = "off"
    return shown


def _jobs(source: Source, jobs: Samples | None, now_s: float) -> dict[str, Any]:
    queries = {} if jobs is None else jobs.by("fraudgate_jobs_up", "query")
    return {
        **_source(source, now_s),
        "queries": {name: up == 1 for name, up in queries.items()},
        "lag": None if jobs is None else jobs.total("fraudgate_jobs_kafka_lag_records"),
        "quarantined": None if jobs is None else jobs.total("fraudgate_jobs_quarantined_total"),
    }


def _routes(state: State, own: Samples) -> dict[str, Any]:
    routing, window = state.routing, state.window
    rates, totals = window.rates(ROUTED, "route"), own.by(ROUTED, "route")
    routes = []
    for route in ("champion", "challenger"):
        model = routing[route]
        scores = state.tap.scores.get(route)
        routes.append(
            {
                "route": route,
                "model": model,
                "rate": _rounded(rates.get(route, 0.0)),
                "total": totals.get(route, 0),
                "scored": 0 if scores is None else scores.count,
                "bins": [] if scores is None else list(scores.bins),
            }
        )
    return {
        "routes": routes,
        "share": routing["challenger_share"],
        "routed_by": routing["routed_by"],
        "shadows": list(routing["shadows"]),
        "guard_out": bool(own.total(GUARD_OUT)),
        "guard_pairs": own.total(GUARD_PAIRS) or 0,
        "guard_evidence": {test: _rounded(value) for test, value in own.by(GUARD_EVIDENCE, "test").items()},
    }


def _drift(jobs: Samples | None) -> dict[str, Any]:
    """The measures furthest from the training rows. `reference`: whether there is something to compare with; null: not known."""
    if jobs is None:
        return {"reference": None, "measures": [], "alarms": [], "windows": None}
    psi, ks = jobs.by(DRIFT_PSI, "measure"), jobs.by(DRIFT_KS, "measure")
    alarms = {name for name, on in jobs.by(DRIFT_ALARM, "measure").items() if on}
    furthest = sorted(psi, key=lambda name: (name not in alarms, -psi[name]))[:DRIFT_SHOWN]
    return {
        "reference": bool(jobs.total("fraudgate_jobs_drift_reference")),
        "measures": [
            {"name": n, "psi": _rounded(psi[n], 3), "ks": _rounded(ks[n], 3) if n in ks else None, "alarm": n in alarms}
            for n in furthest
        ],
        "alarms": sorted(alarms),
        "windows": jobs.total("fraudgate_jobs_drift_windows_total"),
    }


def _cases(source: Source, now_s: float) -> dict[str, Any]:
    samples: Samples | None = source.value
    names = {
        "open": "fraudgate_cases_reviews_open",
        "outbox": "fraudgate_cases_outbox_records",
        "connected": "fraudgate_cases_kafka_connected",
        "paused": "fraudgate_cases_intake_paused",
    }
    return _source(source, now_s) | {key: None if samples is None else samples.total(name) for key, name in names.items()}


def _alarms(source: Source | None, now_s: float) -> dict[str, Any] | None:
    """None where no Alertmanager is known."""
    return None if source is None else {**_source(source, now_s), "firing": source.value or []}


def _source(source: Source, now_s: float) -> dict[str, Any]:
    age_s = source.age_s(now_s)
    return {"name": source.name, "age_s": None if age_s is None else _rounded(age_s), "trouble": source.trouble}


def _share(part: float, whole: float) -> float | None:
    return None if whole <= 0 else round(min(1.0, part / whole), 4)


def _ms(value: float | None) -> float | None:
    return None if value is None else _rounded(value * TO_MS)


def _rounded(value: float, digits: int = 2) -> float:
    return round(value, digits) if math.isfinite(value) else 0.0
