"""`fraudgate drift`: a day's report as text, JSON or one HTML file."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure

from gateway.contracts.decision import Outcome
from gateway.contracts.instants import instant_ms
from gateway.contracts.reference import DECISION, SCORE_BAND, SCORE_BANDS
from gateway.contracts.settings import load_settings
from model_export import pages
from model_export.drift_report import DriftReport, LabelDay, MeasureDrift, report
from model_export.errors import ModelExportError
from model_export.live import DAY_MS

RANKED_MAX = 15
PLOTTED_MAX = 12
ALARMS_MAX = 20
BLUE, GREY, RED = "#1f5fa8", "#b0b0b0", "#a40000"


def drift(argv: list[str]) -> int:
    """Exit status 0, whatever has drifted; 1 when there is nothing to report on."""
    parser = argparse.ArgumentParser(
        prog="fraudgate drift",
        description="How far a day's payments are from the champion's training rows: features, scores, decisions, label rate.",
    )
    parser.add_argument("--day", type=instant_ms, metavar="DATE", help="UTC day (default: the newest with receipts)")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots")
    options = parser.parse_args(argv)
    try:
        found = report(load_settings(), None if options.day is None else options.day // DAY_MS * DAY_MS)
        if options.html is not None:
            pages.write(options.html, as_html(found))
    except (ModelExportError, OSError) as exc:
        print(f"fraudgate drift: {exc}", file=sys.stderr)
        return 1
    print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() if options.json else as_text(found))
    return 0


def as_text(r: DriftReport) -> str:
    drifted = [m.measure for m in r.measures if m.alarm]
    lines = [
        *_head(r),
        "",
        f"{'measure':<30}{'rows':>9}{'PSI':>9}{'KS':>9}{'alarm from':>12}",
        *(f"{cells[0]:<30}{cells[1]:>9}{cells[2]:>9}{cells[3]:>9}{cells[4]:>12}" for cells in map(_cells, r.measures[:RANKED_MAX])),
        f"{len(drifted)} of {len(r.measures)} measures drifted" + (f": {', '.join(drifted)}" if drifted else ""),
        "",
        f"alarms of the stream: {len(r.alarms)}",
        *(f"  {_time(a.window_end_ms)}  {a.measure:<30} PSI {a.psi:.2f}" for a in r.alarms[:ALARMS_MAX]),
        "",
        f"{'event day':<12}{'payments':>9}{'frauds':>8}   {'label rate':<28}{'labels in':>10}{'expected':>10}",
        *(f"{c[0]:<12}{c[1]:>9}{c[2]:>8}   {c[3]:<28}{c[4]:>10}{c[5]:>10}  {c[6]}" for c in map(_label_cells, r.labels[-14:])),
        f"label rate of the training rows {r.reference_label_rate:.2%}",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _head(r: DriftReport) -> list[str]:
    return [
        f"day         {_day(r.day_ms)} (UTC), {r.receipts:,} receipts, {r.left_out:,} left out",
        f"compared    {r.model}: {r.reference_rows:,} training rows, {_day(r.reference_from_ms)} to {_day(r.reference_to_ms)}",
    ]


def _cells(m: MeasureDrift) -> list[str]:
    threshold = "-" if m.threshold is None else f"{m.threshold:.3f}"
    return [m.measure, f"{m.rows:,}", f"{m.psi:.3f}", f"{m.ks:.3f}", threshold, "drifted" if m.alarm else ""]


def _label_cells(d: LabelDay) -> list[str]:
    assert d.rate.value is not None
    interval = "" if d.rate.low is None or d.rate.high is None else f" ({d.rate.low:.2%} .. {d.rate.high:.2%})"
    known = "-" if d.known_share is None else f"{d.known_share:.0%}"
    expected = "-" if d.expected_rate is None else f"{d.expected_rate:.2%}"
    mark = "differs from training" if d.differs else "" if d.mature else "labels still come"
    return [_day(d.day_ms), f"{d.payments:,}", f"{d.frauds:,}", f"{d.rate.value:.2%}{interval}", known, expected, mark]


def as_html(r: DriftReport) -> str:
    alarmed = [m.alarm for m in r.measures]
    parts = [*map(pages.paragraph, _head(r))]
    parts += [pages.heading("Features, scores and decisions, by drift")]
    parts += [
        pages.figure(_histograms(r.measures[:PLOTTED_MAX]), "Training rows, as expected at these hours (grey), and the day (blue)")
    ]
    parts += [pages.table(["measure", "rows", "PSI", "KS", "alarm from", ""], [_cells(m) for m in r.measures], alarmed)]
    parts += [
        pages.heading("Over the day"),
        pages.figure(_hours(r), "Shares of outcomes other than approve, and the mean risk score, by hour"),
    ]
    parts += [pages.heading("Alarms of the stream")]
    rows = [[_time(a.window_end_ms), a.measure, f"{a.psi:.2f}"] for a in r.alarms]
    parts += [pages.table(["ten minutes to", "measure", "PSI"], rows) if rows else pages.paragraph("None.")]
    parts += [pages.heading("Labels")]
    if r.labels:
        parts += [
            pages.figure(_labels(r), "Label rate by event day with 95 % interval; hollow: labels still come; line: training rows")
        ]
        head = ["event day", "payments", "frauds", "label rate", "labels in", "expected", ""]
        parts += [pages.table(head, [_label_cells(d) for d in r.labels], [d.differs for d in r.labels])]
    else:
        parts += [pages.paragraph("No payments to have labels.")]
    return pages.page(f"Drift on {_day(r.day_ms)}", parts)


def _histograms(measures: list[MeasureDrift]) -> Figure:
    columns = 3
    figure = Figure(figsize=(11, 2.2 * max(1, -(-len(measures) // columns))), layout="constrained")
    axes = np.atleast_1d(figure.subplots(-(-max(len(measures), 1) // columns), columns)).reshape(-1)
    for place, ax in enumerate(axes):
        if place >= len(measures):
            ax.set_axis_off()
            continue
        m = measures[place]
        at = np.arange(len(m.expected))
        ax.bar(at - 0.2, m.expected, 0.4, color=GREY)
        ax.bar(at + 0.2, m.observed, 0.4, color=RED if m.alarm else BLUE)
        ax.set_title(f"{m.measure}  PSI {m.psi:.3f}", fontsize=8)
        ax.set_xticks(at, _bin_names(m), fontsize=5, rotation=60)
        ax.tick_params(axis="y", labelsize=6)
    return figure


def _bin_names(m: MeasureDrift) -> list[str]:
    """The upper end of each bin; "<" below all training rows, ">" above, "?" unknown."""
    if m.measure == DECISION:
        return [*(outcome.value for outcome in Outcome), "?"]
    if m.measure == SCORE_BAND:
        return [f"<{SCORE_BANDS[0]}", *(f"{band}+" for band in SCORE_BANDS), "?"]
    return ["<", *(f"{edge:.3g}" for edge in m.edges[1:]), ">", "?"]


def _hours(r: DriftReport) -> Figure:
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    rates, scores = figure.subplots(1, 2)
    at = [h.hour for h in r.hours if h.receipts]
    for outcome in Outcome:
        if outcome is not Outcome.APPROVE:
            rates.plot(at, [h.outcomes[outcome.value] for h in r.hours if h.receipts], label=outcome.value, marker=".")
    rates.legend(fontsize=7, loc="upper right")
    rates.set_ylabel("share")
    scored = [(h.hour, h.mean_score) for h in r.hours if h.mean_score is not None]
    scores.plot([h for h, _ in scored], [s for _, s in scored], marker=".", color=BLUE)
    scores.set_ylabel("mean risk score")
    for axes in (rates, scores):
        axes.set_xlabel("hour, UTC")
        axes.set_xlim(-0.5, 23.5)
        axes.set_ylim(bottom=0)
    return figure


def _labels(r: DriftReport) -> Figure:
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    for place, d in enumerate(r.labels):
        colour = RED if d.differs else BLUE
        if d.rate.low is not None and d.rate.high is not None:
            axes.plot([place, place], [d.rate.low, d.rate.high], color=colour, linewidth=1)
        axes.plot(place, d.rate.value or 0.0, "o", color=colour, markersize=4, fillstyle="full" if d.mature else "none")
        if d.expected_rate is not None and not d.mature:
            axes.plot(place, d.expected_rate, "_", color=GREY)
    axes.axhline(r.reference_label_rate, color=GREY, linestyle=":")
    axes.set_xticks(range(len(r.labels)), [_day(d.day_ms)[5:] for d in r.labels], fontsize=6, rotation=60)
    axes.set_ylim(bottom=0)
    return figure


def _day(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d")


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%H:%M")
