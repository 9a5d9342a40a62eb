"""`fraudgate compare`: the comparison as text, JSON or one HTML file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import msgspec
from matplotlib.figure import Figure

from gateway.contracts.decision import Route
from gateway.contracts.instants import instant_ms
from gateway.contracts.model_meta import is_route
from gateway.contracts.settings import load_settings
from model_export import pages
from model_export.compare import LEVELS, MATURE_DAYS, OUTCOMES, Comparison, Side, compare
from model_export.errors import ModelExportError
from model_export.offpolicy import Interval
from model_export.verdict import OPEN, Costs

Row = tuple[str, Callable[[Side, str], Interval], Callable[[float], str]]


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _units(value: float) -> str:
    return f"{value / 100:,.0f}"


ROWS: tuple[Row, ...] = (
    ("precision", lambda side, level: side.worth[level].precision, _percent),
    ("recall", lambda side, level: side.worth[level].recall, _percent),
    ("  precision, labels as they are", lambda side, level: side.naive[level].precision, _percent),
    ("  recall, labels as they are", lambda side, level: side.naive[level].recall, _percent),
    ("frauds stopped", lambda side, level: side.worth[level].frauds_caught, _count),
    ("frauds let through", lambda side, level: side.worth[level].frauds_missed, _count),
    ("good payments stopped", lambda side, level: side.worth[level].good_flagged, _count),
    ("fraud stopped, units", lambda side, level: side.worth[level].fraud_stopped_minor, _units),
    ("fraud let through, units", lambda side, level: side.worth[level].fraud_through_minor, _units),
    ("good payments stopped, units", lambda side, level: side.worth[level].good_stopped_minor, _units),
)


def compare_command(argv: list[str]) -> int:
    """Exit status 0; 1 when there is nothing to compare."""
    parser = argparse.ArgumentParser(
        prog="fraudgate compare",
        description="Champion against another model on live receipts and matured labels. What declined payments never tell is made up for"
        " by exploration's logged chances (docs/models.md, Comparing).",
    )
    parser.add_argument("--from", dest="from_ms", type=instant_ms, metavar="MS|DATE", help="first event time (default: all)")
    parser.add_argument("--to", dest="to_ms", type=instant_ms, metavar="MS|DATE", help="end, not in it (default: all)")
    parser.add_argument(
        "--as-of", dest="as_of_ms", type=instant_ms, metavar="MS|DATE", help="only labels known by then (default: all)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--challenger", metavar="ALIAS", help=f"the other model's alias (default: {Route.CHALLENGER.value})")
    which.add_argument("--shadow", metavar="ALIAS", help="the same, for a shadow: its alias, which begins with shadow")
    parser.add_argument(
        "--mature-days",
        type=int,
        default=MATURE_DAYS,
        metavar="N",
        help="how old a payment must be for its label (default: %(default)s)",
    )
    defaults = Costs()
    for field in dataclasses.fields(Costs):
        name, value = field.name, getattr(defaults, field.name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=value, metavar="X", help=f"cost model (default: {value:g})"
        )
    parser.add_argument("--json", action="store_true", help="print the whole comparison as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots")
    options = parser.parse_args(argv)
    alias = options.challenger or options.shadow or Route.CHALLENGER.value
    if not is_route(alias) or alias == Route.CHAMPION.value:
        parser.error(f"{alias!r} is no alias of a model beside the champion: challenger, or a name that begins with shadow")
    if options.mature_days < 0:
        parser.error("--mature-days can't be negative")
    costs = Costs(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Costs)})
    if (complaint := costs.complaint()) is not None:
        parser.error(complaint)
    try:
        found = compare(
            load_settings(),
            from_ms=options.from_ms,
            to_ms=options.to_ms,
            alias=alias,
            costs=costs,
            mature_days=options.mature_days,
            as_of_ms=options.as_of_ms,
        )
        if options.html is not None:
            pages.write(options.html, as_html(found))
    except (ModelExportError, OSError) as exc:
        print(f"fraudgate compare: {exc}", file=sys.stderr)
        return 1
    print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() if options.json else as_text(found))
    return 0


def as_text(c: Comparison) -> str:
    shift, v = c.shift, c.verdict
    lines = [
        f"champion    {c.champion}",
        f"{c.alias:<11} {c.challenger}",
        f"receipts    {c.receipts:,} of {_day(c.from_ms)} to {_day(c.to_ms)}, {c.left_out:,} left out (degraded, or of other features)",
        f"matured     {c.matured:,} by {_day(c.as_of_ms)}, {c.frauds_labelled:,} known frauds, {c.explored:,} seen by exploration alone",
        "",
        f"scores      PSI {shift.psi:.3f}, KS {shift.ks:.3f}; mean {shift.mean_champion:.1f} and {shift.mean_challenger:.1f} of 1000;"
        f" {shift.recomputed:,} logged scores computed again, the largest difference {shift.largest_difference:g}",
    ]
    lines += [f"answered    {arm.route:<12}{arm.receipts:>9,}   declined {cell(arm.declined, _percent)}" for arm in c.arms]
    lines += ["", f"decisions   {c.decisions_differ:,} of {c.receipts:,} differ ({c.decisions_differ / c.receipts:.2%})", ""]
    lines.append(f"{'champion, then ' + c.alias:<24}" + "".join(f"{name:>11}" for name in OUTCOMES))
    lines += [f"  {name:<22}" + "".join(f"{n:>11,}" for n in row) for name, row in zip(OUTCOMES, c.differing, strict=True)]
    for level in LEVELS:
        lines += ["", f"{'at ' + level:<34}{'champion':>32}{c.alias:>32}"]
        for name, get, write in ROWS:
            lines.append(
                f"  {name:<32}" + "".join(f"{cell(get(s, level), write):>32}" for s in (c.champion_side, c.challenger_side))
            )
        one, other = c.champion_side.worth[level], c.challenger_side.worth[level]
        lines.append(
            f"  {'flagged, out of reach':<32}{f'{one.flagged:,}, {one.unreachable:,}':>32}{f'{other.flagged:,}, {other.unreachable:,}':>32}"
        )
    lines += [
        "",
        f"{'cost of all outcomes, units':<34}"
        + "".join(f"{cell(s.cost_minor, _units):>32}" for s in (c.champion_side, c.challenger_side)),
    ]
    lines += ["", f"verdict     {verdict_text(c)}"]
    lines.append(
        f"            evidence {v.evidence_better:.3g} for better, {v.evidence_worse:.3g} for worse, decided at {v.needed:g};"
        f" {v.labels:,} labels, {v.differing:,} where the two differ"
    )
    return "\n".join(lines)


def verdict_text(c: Comparison) -> str:
    v = c.verdict
    if v.verdict != OPEN:
        return v.verdict
    if v.labels_needed is None:
        return f"{v.verdict}: the labels so far lean to neither side"
    return f"{v.verdict}, about {v.labels_needed:,} more labels needed at this pace"


def cell(interval: Interval, write: Callable[[float], str]) -> str:
    """12.3 % (10.1 % .. 14.2 %)."""
    if interval.value is None or interval.low is None or interval.high is None:
        return "-"
    return f"{write(interval.value)} ({write(interval.low)} .. {write(interval.high)})"


def as_html(c: Comparison) -> str:
    parts = [f"<pre>{escape(as_text(c))}</pre>", pages.heading(verdict_text(c))]
    names = ("champion", c.alias)
    for level in LEVELS:
        figure = Figure(figsize=(7, 2.2))
        for place, (what, axes) in enumerate(zip(("precision", "recall"), figure.subplots(1, 2), strict=True)):
            for y, side in enumerate((c.champion_side, c.challenger_side)):
                for source, shift, colour in ((side.worth, 0.12, "#1f5fa8"), (side.naive, -0.12, "#b0b0b0")):
                    found: Interval = getattr(source[level], what)
                    if found.value is None or found.low is None or found.high is None:
                        continue
                    axes.plot([found.low, found.high], [y + shift] * 2, color=colour, linewidth=2)
                    axes.plot(found.value, y + shift, "o", color=colour)
            axes.set_yticks([0, 1], names if place == 0 else ["", ""])
            axes.set_ylim(-0.5, 1.5)
            axes.set_xlim(0, 1)
            axes.set_title(what, fontsize=10)
        parts.append(
            pages.figure(figure, f"At {level}: 95 % intervals, blue corrected by exploration, grey from the labels as they are")
        )
    return pages.page(f"{c.champion} against {c.challenger}", parts)


def _day(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
