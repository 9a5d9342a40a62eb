"""What a backtest found, as text, as JSON and as one HTML page with plots. Texts show money in units, a hundred minor units each."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from deploy.history.backtest import CURRENT, CUSTOMERS_MAX, NEW, OUTCOMES, Backtest, Side, Tally
from deploy.history.backtest_rows import Known
from model_export import pages

NAMES = [outcome.value for outcome in OUTCOMES]
PAIRS_SHOWN = 10
CHANGES_SHOWN = 12
RULES_DRAWN = 20
SELECTION = (
    "Payments that were declined then have no chargeback, whatever they were: without an analyst's word they count as unseen, and whoever"
    " loosens a rule learns here what it does among the payments that went through, not what comes back with the others; exploration tells"
    " that (docs/models.md). Features are those of then: what a policy would have stopped earlier still stands in the history of its card."
)
PUBLIC = "All labels of the public data are known: no policy had a hand in which payments went through."
HEAD = (
    *("", "state", "asks for", "hits", "frauds", "fraud amount", "good", "customers", "unknown", "alone", "saved", "lost"),
    *("by score too", "by others too", "errors"),
)


@dataclasses.dataclass(frozen=True)
class Report:
    """`left_out` counts receipts by why they could not be replayed. `public`: not receipts, but a data set."""

    found: Backtest
    left_out: dict[str, int]
    labels_as_of: str
    public: bool

    @property
    def note(self) -> str:
        return PUBLIC if self.public else SELECTION


def as_json(r: Report) -> str:
    b = r.found
    out = {
        "payments": b.payments,
        "known": _by_known(b.known),
        "labels_as_of": r.labels_as_of,
        "left_out": r.left_out,
        "costs": dataclasses.asdict(b.costs),
        "saved_minor": float(b.saved_minor.sum()),
        "lost_minor": float(b.lost_minor.sum()),
        "changed": b.changed,
        "changes": [_change(b, before, after) for before, after in _changes(b)],
        CURRENT: _side(b.current),
        NEW: _side(b.new),
        "days": {str(np.datetime64(day, "D")): dataclasses.asdict(b.days[day]) for day in sorted(b.days)},
        "note": r.note,
    }
    return json.dumps(out, indent=2)


def _by_known(counts: Iterable[Any]) -> dict[str, int]:
    return {known.name.lower(): int(n) for known, n in zip(Known, counts, strict=True)}


def _changes(b: Backtest) -> list[tuple[int, int]]:
    """Kinds of changed decisions, the most frequent first."""
    counts = b.changes.sum(axis=2)
    kinds = [(i, j) for i in range(len(OUTCOMES)) for j in range(len(OUTCOMES)) if i != j and counts[i, j]]
    return sorted(kinds, key=lambda kind: -counts[kind])


def _change(b: Backtest, before: int, after: int) -> dict[str, Any]:
    return {
        "from": NAMES[before],
        "to": NAMES[after],
        "payments": int(b.changes[before, after].sum()),
        "known": _by_known(b.changes[before, after]),
        "saved_minor": float(b.saved_minor[before, after]),
        "lost_minor": float(b.lost_minor[before, after]),
        "examples": b.examples[before, after].ids,
    }


def _side(side: Side) -> dict[str, Any]:
    return {
        "name": side.policy.name,
        "digest": side.policy.digest,
        "cost_minor": side.cost_minor,
        "outcomes": {name: _by_known(side.outcomes[i]) for i, name in enumerate(NAMES)},
        "amount_minor": {name: _by_known(side.amount_minor[i]) for i, name in enumerate(NAMES)},
        "as_logged": side.as_logged,
        "logged": side.logged,
        "rules": [_tally(tally) for tally in side.tallies.values()],
        "overlaps": [{"rules": list(pair), "hits": n} for pair, n in side.pairs.most_common()],
    }


def _tally(t: Tally) -> dict[str, Any]:
    return {
        "id": t.id,
        "kind": t.kind,
        "state": t.state,
        "owner": t.owner,
        "text": t.text,
        "outcome": NAMES[t.severity],
        "hits": int(t.hits.sum()),
        "by_known": _by_known(t.hits),
        "alone": _by_known(t.alone),
        "fraud_minor": t.fraud_minor,
        "good_customers": len(t.customers),
        "saved_minor": t.saved_minor,
        "lost_minor": t.lost_minor,
        "overlap_score": t.by_score,
        "overlap_others": t.by_others,
        "errors": t.errors,
        "examples": {"fraud": t.frauds.ids, "genuine": t.genuine.ids},
    }


def as_text(r: Report) -> str:
    b = r.found
    days = [str(np.datetime64(day, "D")) for day in sorted(b.days)]
    left = "; ".join(f"{n:,} left out: {why}" for why, n in r.left_out.items() if n)
    known = {k: int(b.known[k]) for k in Known}
    lines = [
        f"history     {b.payments:,} payments of {days[0]} to {days[-1]}" + (f"; {left}" if left else ""),
        f"labels      as of {r.labels_as_of}: {known[Known.FRAUD]:,} frauds, {known[Known.GENUINE]:,} genuine,"
        f" {known[Known.YOUNG]:,} too young to tell, {known[Known.UNSEEN]:,} declined then and never seen",
        *(_side_line(name, side) for name, side in ((CURRENT, b.current), (NEW, b.new))),
        f"money       the new policy saves {_units(b.saved_minor.sum())} and loses {_units(b.lost_minor.sum())}:"
        f" {_signed(b.current.cost_minor - b.new.cost_minor)} in all, over payments of which it is known what they were",
        f"decisions   {b.changed:,} of {b.payments:,} differ ({b.changed / max(1, b.payments):.3%})",
        "",
        *_grid(
            ["current, then new", *NAMES], [[NAMES[i], *(f"{n:,}" for n in row)] for i, row in enumerate(b.changes.sum(axis=2))]
        ),
    ]
    if b.changed:
        lines += ["", *_grid(["changed", "payments", "frauds", "good", "unknown", "saved", "lost", "for example"], _change_rows(b))]
    for name, side in ((CURRENT, b.current), (NEW, b.new)):
        lines += ["", *_tally_lines(f"{name}: {side.policy.name}", side)]
    pairs = b.new.pairs.most_common(PAIRS_SHOWN)
    if pairs:
        lines += ["", *_grid(["new: met the same payments", "hits"], [[" + ".join(pair), f"{n:,}"] for pair, n in pairs])]
    return "\n".join([*lines, "", r.note])


def _tally_lines(title: str, side: Side) -> list[str]:
    """A line for each rule and list that met anything, and the names of the others."""
    met = [t for t in side.tallies.values() if t.hits.sum() or t.errors]
    others = [t.id for t in side.tallies.values() if not (t.hits.sum() or t.errors)]
    lines = _grid([title, *HEAD[1:]], [_cells(t) for t in met])
    return [*lines, f"without a hit: {', '.join(others)}"] if others else lines


def _side_line(name: str, side: Side) -> str:
    declined, reviewed = (int(side.outcomes[NAMES.index(o)].sum()) for o in ("decline", "review"))
    line = f"{name:<11} {side.policy.name} {side.policy.digest[:12]}: cost {_units(side.cost_minor)}"
    line += f", declines {declined:,}, reviews {reviewed:,}"
    return line + (f"; decides {side.as_logged / side.logged:.2%} as the receipts say" if side.logged else "")


def _change_rows(b: Backtest) -> list[list[str]]:
    rows = []
    for before, after in _changes(b)[:CHANGES_SHOWN]:
        n = b.changes[before, after]
        unknown = int(n[Known.YOUNG] + n[Known.UNSEEN])
        rows.append(
            [
                *(
                    f"{NAMES[before]} -> {NAMES[after]}",
                    f"{n.sum():,}",
                    f"{n[Known.FRAUD]:,}",
                    f"{n[Known.GENUINE]:,}",
                    f"{unknown:,}",
                ),
                *(_units(b.saved_minor[before, after]), _units(b.lost_minor[before, after])),
                ", ".join(b.examples[before, after].ids),
            ]
        )
    return rows


def _cells(t: Tally) -> list[str]:
    customers = f"{len(t.customers):,}" + ("+" if len(t.customers) >= CUSTOMERS_MAX else "")
    return [
        *(t.id, t.state if t.kind == "rule" else t.kind, NAMES[t.severity], f"{t.hits.sum():,}", f"{t.hits[Known.FRAUD]:,}"),
        *(_units(t.fraud_minor), f"{t.hits[Known.GENUINE]:,}", customers, f"{t.hits[Known.YOUNG] + t.hits[Known.UNSEEN]:,}"),
        *(
            f"{t.alone.sum():,}",
            _units(t.saved_minor),
            _units(t.lost_minor),
            f"{t.by_score:,}",
            f"{t.by_others:,}",
            f"{t.errors:,}",
        ),
    ]


def _units(minor: float) -> str:
    return f"{minor / 100:,.2f}"


def _signed(minor: float) -> str:
    return f"{_units(abs(minor))} {'less' if minor >= 0 else 'more'} cost"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns: the first and what comes last as text to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in (head, *rows)
    ]


def as_html(r: Report) -> str:
    b = r.found
    parts = [
        f"<pre>{html.escape(chr(10).join(as_text(r).split(chr(10))[:6]))}</pre>",
        pages.paragraph(r.note),
        pages.heading("Decisions that change"),
        pages.figure(_matrix(b), "Payments by what the current policy (rows) and the new one (columns) come to"),
        pages.table(["changed", "payments", "frauds", "good", "unknown", "saved", "lost", "for example"], _change_rows(b)),
        pages.heading("Money"),
        pages.figure(_daily(b), "Cost a day, and declines a day"),
        pages.figure(_rule_money(b.new), "Saved and lost by each rule and list of the new policy, against the policy without it"),
    ]
    for name, side in ((NEW, b.new), (CURRENT, b.current)):
        parts += [
            pages.heading(f"Rules and lists: {name}, {side.policy.name}"),
            pages.table(HEAD, [_cells(t) for t in side.tallies.values()]),
        ]
        examples = [[t.id, ", ".join(t.frauds.ids), ", ".join(t.genuine.ids)] for t in side.tallies.values() if t.hits.sum()]
        parts.append(pages.table(["for example", "frauds", "good customers' payments"], examples))
        pairs = [[" + ".join(pair), f"{n:,}"] for pair, n in side.pairs.most_common(PAIRS_SHOWN)]
        parts.append(pages.table(["met the same payments", "hits"], pairs))
    parts += [pages.heading("Cost model"), pages.paragraph(str(b.costs))]
    return pages.page(f"Backtest: {b.new.policy.name} against {b.current.policy.name}", parts)


def _matrix(b: Backtest) -> Figure:
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    counts = b.changes.sum(axis=2)
    axes.imshow(np.log10(counts + 1), cmap="Blues")
    for i in range(len(NAMES)):
        for j in range(len(NAMES)):
            dark = counts[i, j] > 0 and np.log10(counts[i, j] + 1) > 0.6 * np.log10(counts.max() + 1)
            axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
    axes.set_xticks(range(len(NAMES)), NAMES)
    axes.set_yticks(range(len(NAMES)), NAMES)
    axes.set_xlabel("new")
    axes.set_ylabel("current")
    return figure


def _daily(b: Backtest) -> Figure:
    figure = Figure(figsize=(9, 3), layout="constrained")
    cost, declined = figure.subplots(1, 2)
    days = sorted(b.days)
    at = np.array(days, "datetime64[D]")
    for name, colour in ((CURRENT, "#b0b0b0"), (NEW, "#1f5fa8")):
        cost.plot(at, [b.days[d].cost_minor[name] / 100 for d in days], color=colour, marker=".", label=name)
        declined.plot(at, [b.days[d].declined[name] for d in days], color=colour, marker=".", label=name)
    for axes, title in ((cost, "cost, units"), (declined, "declined")):
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.tick_params(axis="x", labelrotation=60, labelsize=7)
        axes.legend(loc="lower right", fontsize=8)
    return figure


def _rule_money(side: Side) -> Figure:
    tallies = sorted(side.tallies.values(), key=lambda t: -(t.saved_minor + t.lost_minor))[:RULES_DRAWN][::-1]
    figure = Figure(figsize=(8, 1 + 0.3 * len(tallies)), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(tallies))
    axes.barh(place, [t.saved_minor / 100 for t in tallies], color="#1f5fa8", label="saved")
    axes.barh(place, [-t.lost_minor / 100 for t in tallies], color="#c0504d", label="lost")
    axes.set_yticks(place, [f"{t.id}{' (shadow)' if t.state == 'shadow' else ''}" for t in tallies])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("units")
    if tallies:
        axes.legend(loc="lower right", fontsize=8)
    return figure
