"""The report of a soak: for people a table, for machines build/soak.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from deploy.soak.run import Outcome
from deploy.soak.verdict import GOOD_MS, LATE_P99_MS_MOST, SUCCESS_LEAST, Window

SHOWN_MAX = 100


def table(outcome: Outcome) -> str:
    verdict, history, features = outcome.verdict, outcome.history, outcome.features
    head = (
        "window",
        "from s",
        "to s",
        "requests",
        "good %",
        "late",
        "shed",
        "failed",
        "sent again",
        "p50 ms",
        "p99 ms",
        "p99.9 ms",
    )
    rows: list[tuple[str, ...]] = [(*head, "degraded %")]
    rows += [window_row(w) for w in (*verdict.windows, verdict.whole)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows]
    lines.append("")
    facts = [
        (
            "good requests",
            f"{percent(verdict.whole.good_share, 3)} (answered 200 within {GOOD_MS:.0f} ms; promised {percent(SUCCESS_LEAST, 1)})",
        ),
        ("good seconds", f"{percent(verdict.good_seconds_share, 2)} of {len(verdict.seconds.good):,}"),
        ("longest bad run", f"{verdict.longest_bad_run_s} s"),
        ("degraded answers", ", ".join(f"{k} {percent(v, 2)}" for k, v in verdict.degraded.items()) or "none"),
        (
            "history",
            f"{history.accepted:,} accepted, {history.decided:,} decided, {history.unanswered_decided:,} decided without an answer",
        ),
        ("decided anew", f"{history.decided_anew:,} sent twice by their callers while Redis was out of reach (docs/api.md)"),
        ("violations", ", ".join(f"{k} {n:,}" for k, n in history.counts.items() if n) or "none"),
        ("tables", ", ".join(f"{k} {len(v):,}" for k, v in outcome.tables.items() if v) or "every accepted payment once in each"),
        ("features", f"{features.values:,} values of {features.compared:,} receipts compared, {features.different:,} different"),
        (
            "not compared",
            f"{features.without:,} without features, {features.stale:,} stale, {features.unverifiable:,} of unknown order",
        ),
        ("poison", f"{outcome.poison:,} messages; bodies answered {statuses(outcome.bodies)}"),
        ("alerts", outcome.alerts_note or alerts_text(outcome)),
        (
            "sender",
            f"late by {verdict.late_p99_ms:.1f} ms at p99, {outcome.sender_cpu_s:.0f} s of CPU, {outcome.retried:,} sent again,"
            f" {outcome.unretried:,} not: over the budget",
        ),
    ]
    if outcome.peaks:
        facts.append(("its connections", peaks_text(outcome.peaks)))
    width = max(len(name) for name, _ in facts)
    lines += [f"{name:<{width}}  {text}" for name, text in facts]
    seconds = verdict.seconds
    if seconds.stood_still.any():
        worst, most_ms = int(seconds.late_ms.argmax()), seconds.late_ms.max()
        lines.append(
            f"the sender stood still itself in {int(seconds.stood_still.sum())} seconds, at second {worst} for {most_ms / 1000:.1f} s;"
            f" of the requests of the others {percent(seconds.good_share_otherwise, 3)} were good"
        )
    if not verdict.late_p99_ms <= LATE_P99_MS_MOST:
        lines.append("the sender itself was late: the latencies are partly its own")
    return "\n".join(lines)


def window_row(w: Window) -> tuple[str, ...]:
    counts = (w.late, w.shed, w.failed, w.retried)
    times = (w.p50_ms, w.p99_ms, w.p999_ms)
    span = (f"{w.begin_s:.0f}", f"{w.end_s:.0f}", f"{w.requests:,}", f"{100 * w.good_share:.3f}")
    return (w.name, *span, *(f"{n:,}" for n in counts), *(f"{t:.1f}" for t in times), f"{100 * w.degraded:.2f}")


def percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f} %"


def statuses(bodies: dict[int, int]) -> str:
    return ", ".join(f"{status}: {n}" for status, n in sorted(bodies.items())) or "none sent"


def alerts_text(outcome: Outcome) -> str:
    names = sorted({f.name for f in outcome.firings})
    fired = ", ".join(f"{n} ({sum(f.name == n for f in outcome.firings)})" for n in names) or "none fired"
    return f"{fired}; {len(outcome.told)} messages to the webhook"


def peaks_text(peaks: Sequence[tuple[int, int]]) -> str:
    """`peaks` by second: connections, and payments that waited for one."""
    connections, waiting = (list(column) for column in zip(*peaks, strict=True))
    most = max(connections)
    text = f"{most:,} at once at most, in second {connections.index(most):,}"
    if not max(waiting):
        return f"{text}; no payment waited for one"
    seconds = sum(w > 0 for w in waiting)
    return f"{text}; payments waited for one in {seconds:,} seconds, {max(waiting):,} in second {waiting.index(max(waiting)):,}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Units are in the names; times count from the beginning of the measured time. Long lists are cut at SHOWN_MAX, counts are not."""
    verdict, plan = outcome.verdict, outcome.plan
    found: dict[str, Any] = {
        "passed": not outcome.complaints,
        "complaints": outcome.complaints,
        "plan": {
            "seed": plan.seed,
            "rate_per_s": plan.rate_per_s,
            "warm_up_s": plan.warm_up_s,
            "measured_s": plan.measured_s,
            "faults": [{"kind": f.kind.name, "at_s": f.at_s, "hold_s": f.hold_s} for f in plan.faults],
        },
        "run": outcome.run,
        "sent": outcome.sent,
        "happened": [dataclasses.asdict(h) for h in outcome.happened],
        "success_ratio": verdict.whole.good_share,
        "good_seconds_share": verdict.good_seconds_share,
        "longest_bad_run_s": verdict.longest_bad_run_s,
        "degraded_share": verdict.degraded,
        "whole": window_json(verdict.whole),
        "windows": [window_json(w) for w in verdict.windows],
        "seconds": {
            "requests": verdict.seconds.requests.tolist(),
            "good": verdict.seconds.good.tolist(),
            "p99_ms": verdict.seconds.p99_ms.tolist(),
        },
        "history": {
            "accepted": outcome.history.accepted,
            "decided": outcome.history.decided,
            "decided_without_an_answer": outcome.history.unanswered_decided,
            "decided_anew": outcome.history.decided_anew,
            "counts": outcome.history.counts,
            "payments": {name: found[:SHOWN_MAX] for name, found in outcome.history.wrong.items() if found},
        },
        "tables": {name: {"count": len(found), "payments": found[:SHOWN_MAX]} for name, found in outcome.tables.items()},
        "features": dataclasses.asdict(outcome.features),
        "poison": {"messages": outcome.poison, "bodies": outcome.bodies},
        "alerts": {"note": outcome.alerts_note, "fired": [dataclasses.asdict(f) for f in outcome.firings], "told": outcome.told},
        "sender": {
            "late_p99_ms": verdict.late_p99_ms,
            "stood_still_s": verdict.seconds.stood_still.nonzero()[0].tolist(),
            "good_share_otherwise": verdict.seconds.good_share_otherwise,
            "cpu_s": outcome.sender_cpu_s,
            "sent_again": outcome.retried,
            "over_the_budget": outcome.unretried,
            "connections_max": [connections for connections, _ in outcome.peaks],
            "waiting_max": [waiting for _, waiting in outcome.peaks],
        },
        "took_s": outcome.took_s,
    }
    cleaned: dict[str, Any] = without_nan(found)
    return cleaned


def window_json(w: Window) -> dict[str, Any]:
    return dataclasses.asdict(w) | {"good_share": w.good_share}


def without_nan(value: Any) -> Any:
    """JSON has no NaN: unknown is null."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return value
