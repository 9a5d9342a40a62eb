"""`fraudgate chaos NAME`: a fault on the gateway that runs, and what it cost. Figures of such runs stand in docs/reliability.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import uvloop

from deploy.chaos_shadows import shadow_complaints, shadow_turns, shadows_table
from deploy.payments import payments
from gateway.contracts.settings import Settings, load_settings
from loadtest.offered import FAILED, NOT_SENT, Offered, offer, quantile
from loadtest.openloop.payments import run_name

CAPACITY_S = 8.0
CALM_S = 5.0
RECOVERY_S = 10.0
# How long after the end of an overload its effects may last, and how much of the capacity it may cost.
RECOVERED_WITHIN_S = 5.0
GOODPUT_LEAST = 0.9
ACCEPTED_P99_MS_MOST = 100.0
CAPACITY_CONNECTIONS = 64
CONNECTIONS = 400


@dataclass(frozen=True)
class Phase:
    """Rates are a second, times milliseconds. `shed` were answered 429 or 503, `not_sent` found no free connection."""

    name: str
    offered: float
    goodput: float
    accepted_p50_ms: float
    accepted_p99_ms: float
    shed: float
    not_sent: float
    failed: int
    sender_late_ms: float


def phase_of(name: str, run: Offered, from_s: float, to_s: float) -> Phase:
    within = [s for s in run.samples if from_s <= s.at_s < to_s]
    accepted = run.answered(from_s, to_s)
    span_s = to_s - from_s
    shed = sum(s.status in (429, 503) for s in within)
    not_sent = sum(s.status == NOT_SENT for s in within)
    return Phase(
        name=name,
        offered=round(len(within) / span_s),
        goodput=round(len(accepted) / span_s),
        accepted_p50_ms=round(quantile(accepted, 0.5) * 1000, 1),
        accepted_p99_ms=round(quantile(accepted, 0.99) * 1000, 1),
        shed=round(shed / span_s),
        not_sent=round(not_sent / span_s),
        failed=sum(s.status == FAILED for s in within),
        sender_late_ms=round(run.late_ms, 1),
    )


async def overload(settings: Settings, times: float, seconds: float) -> list[Phase]:
    """The capacity with CAPACITY_CONNECTIONS callers that wait for their answers; then half of it, `times` of it, half of it."""

    def run(rate: Callable[[float], float], duration_s: float, connections: int) -> asyncio.Task[Offered]:
        of = payments(run_name("chaos-"))
        return asyncio.create_task(offer(settings.host, settings.gateway_port, rate, duration_s, of, connections))

    full = await run(lambda _: 20_000.0, CAPACITY_S, CAPACITY_CONNECTIONS)
    capacity = phase_of("capacity", full, CAPACITY_S / 2, CAPACITY_S)
    begin_s, end_s = CALM_S, CALM_S + seconds

    def rate(at_s: float) -> float:
        return capacity.goodput * (times if begin_s <= at_s < end_s else 0.5)

    over = await run(rate, end_s + RECOVERY_S, CONNECTIONS)
    return [
        capacity,
        phase_of("before", over, 0, begin_s),
        phase_of(f"{times:g}x", over, begin_s, end_s),
        phase_of("recovering", over, end_s, end_s + RECOVERED_WITHIN_S),
        phase_of("recovered", over, end_s + RECOVERED_WITHIN_S, end_s + RECOVERY_S),
    ]


def overload_complaints(phases: Sequence[Phase]) -> list[str]:
    """What was promised and not kept."""
    capacity, before, during, _, after = phases
    found = []
    if during.goodput < GOODPUT_LEAST * capacity.goodput:
        found.append(f"goodput {during.goodput:g} of {capacity.goodput:g} a second")
    if during.accepted_p99_ms > ACCEPTED_P99_MS_MOST:
        found.append(f"p99 of what was accepted {during.accepted_p99_ms} ms")
    if after.shed or after.accepted_p99_ms > max(ACCEPTED_P99_MS_MOST, before.accepted_p99_ms):
        found.append("not recovered in time")
    if any(phase.failed for phase in phases):
        found.append("connections ended without an answer")
    return found


def table(phases: Sequence[Phase]) -> str:
    rows: list[tuple[str, ...]] = [("phase", "offered/s", "decided/s", "p50 ms", "p99 ms", "shed/s", "not sent/s", "failed")]
    rows += [
        (
            p.name,
            *(f"{n:g}" for n in (p.offered, p.goodput, p.accepted_p50_ms, p.accepted_p99_ms, p.shed, p.not_sent, p.failed)),
        )
        for p in phases
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def chaos(argv: list[str]) -> int:
    """`fraudgate chaos overload`. Exit status 1 when a promise wasn't kept."""
    parser = argparse.ArgumentParser(prog="fraudgate chaos", description="A fault on the gateway that runs here, and what it cost.")
    parser.add_argument(
        "name",
        choices=["overload", "shadows"],
        help="overload: some times as many transactions as it can decide; shadows: three shadow models, by turns with none",
    )
    parser.add_argument("--rate", type=float, default=1000.0, help="shadows: payments a second (default 1000)")
    parser.add_argument("--rounds", type=int, default=10, help="shadows: turns with and without (default 10)")
    parser.add_argument("--times", type=float, default=2.0, help="how many times its capacity is offered (default 2)")
    parser.add_argument("--seconds", type=float, default=15.0, help="for how long (default 15)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    if arguments.name == "shadows":
        return _shadows(arguments.rate, arguments.seconds, arguments.rounds, as_json=arguments.json)
    phases = uvloop.run(overload(load_settings(), arguments.times, arguments.seconds))
    complaints = overload_complaints(phases)
    if arguments.json:
        print(json.dumps({"phases": [asdict(p) for p in phases], "complaints": complaints}, indent=2))
    else:
        print(table(phases))
        late_ms = max(p.sender_late_ms for p in phases)
        print(f"the sender was up to {late_ms:.0f} ms late")
        for complaint in complaints:
            print(f"fraudgate chaos: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


def _shadows(rate: float, seconds: float, rounds: int, *, as_json: bool) -> int:
    try:
        turns = uvloop.run(shadow_turns(load_settings(), rate, seconds, rounds))
    except (OSError, TimeoutError) as exc:
        print(f"fraudgate chaos: {exc}; start a gateway with a model first: fraudgate serve", file=sys.stderr)
        return 1
    complaints = shadow_complaints(turns)
    print(json.dumps({"turns": [asdict(t) for t in turns], "complaints": complaints}) if as_json else shadows_table(turns))
    for complaint in complaints:
        print(f"fraudgate chaos: {complaint}", file=sys.stderr)
    return 1 if complaints else 0
