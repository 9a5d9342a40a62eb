"""When which fault happens in a soak: decided by the seed before it begins, and told in the report.

Each slot of EVERY_S seconds has one fault, near its beginning, so that what it cost is over when the slot is. Every family of faults comes
once before one comes twice; which of a family's faults it is, is drawn. Nothing here starts or stops anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EVERY_S = 120.0
MINUTES_MAX = 24 * 60
RATE_MAX = 20_000.0
HOLD_S_MAX = 3600.0
# A fault begins when this part of its slot is over.
BEGINS_AT = 0.1
# How long after the end of a fault what happens is put down to it.
AFTERMATH_S = 30.0


@dataclass(frozen=True)
class Kind:
    """A kind of fault: `hold_s` from its beginning to its end, which is 0 for what happens at once.

    `alerts` are those that must fire when it lasts longer than `alert_after_s`.
    """

    name: str
    family: str
    hold_s: float
    what: str
    alerts: tuple[str, ...] = ()
    alert_after_s: float = 0.0


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("gateway_kill", "gateway", 0, "kill -9 to one of the two workers; the supervisor starts another"),
        Kind("gateway_stop", "gateway", 15, "SIGSTOP to one of the two workers, then SIGCONT"),
        Kind("redis_stop", "redis", 15, "SIGSTOP to Redis, then SIGCONT", ("RedisNotReady",), 75),
        Kind("redis_kill", "redis", 5, "kill -9 to Redis, started again from its append-only file", ("RedisNotReady",), 75),
        Kind("redis_slow", "redis", 20, "Redis stopped for 60 of every 80 ms"),
        Kind("broker_kill", "broker", 10, "kill -9 to the Kafka broker, then started again", ("KafkaDoorOut",), 150),
        Kind("jobs_kill", "spark", 10, "kill -9 to the Spark driver with its streams, then started again", ("JobsDown",), 150),
        Kind("disk_full", "disk", 15, "no write to a file succeeds for the workers: their local log of receipts can't grow"),
        Kind("jobs_disk_full", "disk", 15, "no write to a file succeeds for Spark: tables, checkpoints and shuffles can't grow"),
        Kind("clock_skew", "clocks", 30, "every fifth payment carries a time from two hours back to five minutes ahead"),
        Kind("poison", "poison", 20, "25 messages and bodies a second that nobody can read or that mean harm, at both doors"),
        Kind("model_swap", "model", 0, "another model becomes champion"),
        Kind("deploy", "deploy", 0, "every worker is replaced by a new one (fraudgate reload)"),
    )
}
FAMILIES = tuple(dict.fromkeys(kind.family for kind in KINDS.values()))


class PlanError(ValueError):
    """A plan that can't be. The message says why."""


@dataclass(frozen=True)
class Fault:
    """`kind` begins `at_s` seconds into the measured time and is held for `hold_s`."""

    kind: Kind
    at_s: float
    hold_s: float


@dataclass(frozen=True)
class Happened:
    """A fault as it was, in seconds of the measured time. `note` says to whom; `error` why it could not be made, or not be ended."""

    kind: str
    begin_s: float
    end_s: float
    note: str
    error: str = ""

    @property
    def window(self) -> tuple[float, float]:
        """Seconds whose requests are put down to it."""
        return self.begin_s, self.end_s + AFTERMATH_S


@dataclass(frozen=True)
class Plan:
    """`warm_up_s` of the same load go before the `measured_s` that count; history is checked over both."""

    seed: int
    rate_per_s: float
    warm_up_s: float
    measured_s: float
    faults: tuple[Fault, ...]

    @property
    def total_s(self) -> float:
        return self.warm_up_s + self.measured_s

    @property
    def skewed(self) -> list[tuple[float, float]]:
        """(from, to) seconds of the whole load in which clocks are wrong."""
        spans = [(f.at_s + self.warm_up_s, f.hold_s) for f in self.faults if f.kind.name == "clock_skew"]
        return [(at_s, at_s + hold_s) for at_s, hold_s in spans]


def make_plan(
    minutes: float,
    seed: int,
    rate_per_s: float,
    warm_up_s: float,
    only: Sequence[str] = (),
    every_s: float = EVERY_S,
    hold_s: float | None = None,
) -> Plan:
    """`only`: these kinds, in this order, again and again. `hold_s`: how long those are held that have an end. Raises `PlanError`."""
    if not 0 < minutes <= MINUTES_MAX:
        raise PlanError(f"--minutes must be above 0 and at most {MINUTES_MAX}")
    if not 1 <= rate_per_s <= RATE_MAX:
        raise PlanError(f"--rate must be in 1..{RATE_MAX:.0f}")
    if not 0 <= warm_up_s <= 600:
        raise PlanError("--warm-up must be in 0..600")
    unknown = [name for name in only if name not in KINDS]
    if unknown:
        raise PlanError(f"there is no fault {', '.join(unknown)}: there are {', '.join(KINDS)}")
    if hold_s is not None and not 0 < hold_s <= HOLD_S_MAX:
        raise PlanError(f"--hold must be above 0 and at most {HOLD_S_MAX:.0f}")
    longest_s = (max(kind.hold_s for kind in KINDS.values()) if hold_s is None else hold_s) + AFTERMATH_S
    if every_s < longest_s:
        raise PlanError(f"--every must be at least {longest_s:.0f}: a fault and its aftermath take that long")
    measured_s = minutes * 60
    slots = max(1, int(measured_s // every_s))
    at_s = [min(every_s, measured_s) * (slot + BEGINS_AT) for slot in range(slots)]
    names = [only[slot % len(only)] for slot in range(slots)] if only else drawn(seed, slots)
    faults = tuple(Fault(KINDS[name], at, held(KINDS[name], hold_s)) for name, at in zip(names, at_s, strict=True))
    return Plan(seed, rate_per_s, warm_up_s, measured_s, faults)


def held(kind: Kind, hold_s: float | None) -> float:
    return kind.hold_s if hold_s is None or not kind.hold_s else hold_s


def drawn(seed: int, slots: int) -> list[str]:
    """Kinds for so many slots: every family once, in an order of the seed, then again."""
    rng = np.random.default_rng(seed)
    found: list[str] = []
    while len(found) < slots:
        for family in rng.permutation(len(FAMILIES)).tolist():
            members = [k.name for k in KINDS.values() if k.family == FAMILIES[family]]
            found.append(members[int(rng.integers(len(members)))])
    return found[:slots]
