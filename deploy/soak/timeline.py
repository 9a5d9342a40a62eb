"""The picture of a soak: good share, p99 and faults over time, as PNG and SVG. Called by `deploy.soak.run` when all is over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from deploy.soak.alerts import Firing
from deploy.soak.plan import Happened
from deploy.soak.verdict import GOOD_MS, GOOD_SECOND, Verdict

# Wider than this a picture is no picture.
INCHES_MAX = 24.0
LATENCY_MS_LEAST = 1.0


def draw(verdict: Verdict, happened: Sequence[Happened], firings: Sequence[Firing], title: str, files: Sequence[Path]) -> None:
    seconds = verdict.seconds
    at_min = np.arange(len(seconds.good)) / 60
    figure = Figure(figsize=(min(INCHES_MAX, max(9.0, 2.0 + at_min[-1] * 0.8 if len(at_min) else 9.0)), 6.0), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    figure.suptitle(title, fontsize=10)
    upper.step(at_min, 100 * seconds.good_share, where="post", color="#1b6e3c", linewidth=1)
    bad = ~seconds.is_good
    upper.plot(at_min[bad], 100 * seconds.good_share[bad], "o", color="#b3261e", markersize=3)
    upper.axhline(100 * GOOD_SECOND, color="#777777", linewidth=0.7, linestyle=":")
    upper.set_ylabel("good, % of a second's requests")
    upper.set_ylim(top=100.5)
    middle.step(at_min, np.maximum(seconds.p99_ms, LATENCY_MS_LEAST), where="post", color="#22427c", linewidth=1)
    middle.axhline(GOOD_MS, color="#777777", linewidth=0.7, linestyle=":")
    middle.set_yscale("log")
    middle.set_ylabel("p99 of a second, ms")
    for axes in (upper, middle):
        for fault in happened:
            axes.axvspan(fault.begin_s / 60, max(fault.end_s, fault.begin_s + 1) / 60, color="#f2b8a0", alpha=0.6, linewidth=0)
    for fault in happened:
        upper.annotate(
            fault.kind, (fault.begin_s / 60, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, va="bottom"
        )
    for row, name in enumerate(sorted({f.name for f in firings})):
        for firing in (f for f in firings if f.name == name):
            lower.plot([firing.begin_s / 60, firing.end_s / 60], [row, row], color="#b3261e", linewidth=4, solid_capstyle="butt")
        lower.annotate(name, (1.005, row), xycoords=("axes fraction", "data"), fontsize=7, va="center")
    lower.set_yticks([])
    lower.set_ylabel("alerts")
    lower.set_xlabel("minutes")
    for file in files:
        figure.savefig(file, dpi=110)
