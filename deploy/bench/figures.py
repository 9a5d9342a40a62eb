"""The figures of `fraudgate bench`: what each is, what it should be, and the table, JSON and curve they end in. Measures nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import msgspec

matplotlib.use("svg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import NullFormatter  # noqa: E402

# Of decisions without features or model, from which on the table tells.
DEGRADED_SHARE_SHOWN = 0.01
QUANTILES = {"p50_ms": "p50", "p99_ms": "p99", "p999_ms": "p99.9"}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """`value` is the median over `windows` windows, `low` and `high` their range. `cpu_us` is by process, an event.

    `rate_per_s` is what was offered, None where the load was as fast as answers came; `achieved_per_s` what was answered. `void`: the
    load generator fell behind its own schedule, so the value says nothing. `reached_rate`: answers kept up with what was offered.
    """

    value: float
    unit: str
    low: float
    high: float
    windows: int
    duration_s: float
    rate_per_s: float | None = None
    achieved_per_s: float | None = None
    connections: int | None = None
    cpu_us: dict[str, float] = field(default_factory=dict)
    void: bool = False
    reached_rate: bool = True
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What a figure should be. `reach` is the promise, `aim` what would be better still; None: there is none beyond."""

    key: str
    label: str
    reach: float
    aim: float | None = None
    more_is_better: bool = False

    def verdict(self, figure: Figure | None) -> str:
        if figure is None:
            return "not measured"
        if figure.void:
            return "void"
        if math.isnan(figure.value):
            return "not measured"
        if not figure.reached_rate:
            return "no: below the rate"
        if self.aim is not None and self._meets(figure.value, self.aim):
            return "yes, the aim"
        return "yes" if self._meets(figure.value, self.reach) else "no"

    def _meets(self, value: float, wanted: float) -> bool:
        return value >= wanted if self.more_is_better else value <= wanted


TARGETS: tuple[Target, ...] = (
    Target("http.cpu_us", "HTTP door, gateway CPU a decision, us", 90, 65),
    Target("kafka.cpu_us", "Kafka door, gateway CPU a decision, us", 45, 30),
    Target("ratio.http_to_empty_uvicorn", "HTTP door / empty uvicorn handler", 2.7, 2.0),
    Target("ratio.fastapi_service_to_http", "usual FastAPI service / HTTP door", 6, 8, more_is_better=True),
    Target("ratio.mlflow_serve_to_http", "mlflow models serve / HTTP door", 20, 40, more_is_better=True),
    Target("http.p99_ms.5000", "HTTP at 5,000 a second, p99, ms", 15),
    Target("http.p999_ms.5000", "HTTP at 5,000 a second, p99.9, ms", 40),
    Target("http.p99_ms.10000", "HTTP at 10,000 a second, p99, ms", 100),
    Target("kafka.p99_ms.10000", "Kafka at 10,000 a second, p99, ms", 50),
    Target("kafka_with_spark.p99_ms.10000", "Kafka at 10,000 with Spark, p99, ms", 100),
)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most; NaN of none."""
    if not values:
        return math.nan, math.nan, math.nan
    return statistics.median(values), min(values), max(values)


def ratio(over: Mapping[int, Figure], under: Mapping[int, Figure], *, worst: str) -> Figure:
    """The CPU of one service over another's, at the number of connections where it is `worst`: "most" or "least"."""
    found = {n: over[n].value / under[n].value for n in over.keys() & under.keys()}
    if not found:
        return Figure(value=math.nan, unit="x", low=math.nan, high=math.nan, windows=0, duration_s=0.0)
    chosen = (max if worst == "most" else min)(found, key=lambda n: found[n])
    return Figure(
        value=found[chosen],
        unit="x",
        low=over[chosen].low / under[chosen].high,
        high=over[chosen].high / under[chosen].low,
        windows=min(over[chosen].windows, under[chosen].windows),
        duration_s=over[chosen].duration_s + under[chosen].duration_s,
        connections=chosen,
    )


def worse(of: Mapping[int, Figure]) -> Figure:
    """Of the same figure at several numbers of connections, the larger."""
    return max(of.values(), key=lambda f: f.value)


def number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(figures: Mapping[str, Figure]) -> str:
    """The table of targets, then everything else that was measured."""
    lines = [f"{'':<40}{'measured':>10}{'range':>20}{'reach':>8}{'aim':>7}  reached"]
    for target in TARGETS:
        figure = figures.get(target.key)
        measured = "-" if figure is None else number(figure.value)
        between = "" if figure is None or figure.windows < 2 else f"{number(figure.low)} .. {number(figure.high)}"
        aim = "" if target.aim is None else f"{target.aim:g}"
        lacking = 0.0 if figure is None else figure.notes.get("degraded_share", 0.0)
        but = f", {lacking:.0%} of them degraded" if lacking > DEGRADED_SHARE_SHOWN else ""
        lines.append(f"{target.label:<40}{measured:>10}{between:>20}{target.reach:>8g}{aim:>7}  {target.verdict(figure)}{but}")
    lines += ["", f"{'flat out, on a core of its own':<40}{'a second':>10}{'CPU us':>10}   other CPU, us an event"]
    for key, figure in figures.items():
        if figure.rate_per_s is None and figure.unit == "us" and figure.achieved_per_s is not None:
            others = ", ".join(f"{name} {us:.1f}" for name, us in figure.cpu_us.items() if name not in ("gateway", "service"))
            lines.append(f"{key:<40}{figure.achieved_per_s:>10,.0f}{figure.value:>10.1f}   {others}")
    lines += ["", f"{'at a rate, all sharing the cores':<40}{'answered':>10}{'p50':>9}{'p99':>9}{'p99.9':>9}   CPU, us an event"]
    for key, figure in figures.items():
        if ".p99_ms." in key:
            others = ", ".join(f"{name} {us:.1f}" for name, us in figure.cpu_us.items())
            p50, p999 = (figures[key.replace(".p99_ms.", f".{q}.")].value for q in ("p50_ms", "p999_ms"))
            unanswered = figure.notes.get("censored", 0)
            mark = ("  VOID" if figure.void else "") + (f"  {unanswered:,.0f} without an answer" if unanswered else "")
            times = f"{number(p50):>9}{number(figure.value):>9}{number(p999):>9}"
            lines.append(f"{key.replace('.p99_ms.', ' '):<40}{figure.achieved_per_s or 0:>10,.0f}{times}   {others}{mark}")
    return "\n".join(lines)


def as_json(figures: Mapping[str, Figure], run: Mapping[str, Any]) -> bytes:
    """One object: each figure under its key, and under `run` what it was measured on. NaN becomes null."""
    found: dict[str, Any] = {key: asdict(figure) for key, figure in figures.items()}
    for target in TARGETS:
        if target.key in found:
            wanted = {"reach": target.reach, "aim": target.aim, "reached": target.verdict(figures[target.key])}
            found[target.key] |= wanted
    return msgspec.json.format(msgspec.json.encode(found | {"run": dict(run)}), indent=2) + b"\n"


def curve(figures: Mapping[str, Figure], door: str) -> dict[str, list[tuple[float, float]]]:
    """p50, p99 and p99.9 of a door as (rate, milliseconds) in order of rate, without what is void."""
    found: dict[str, list[tuple[float, float]]] = {}
    for quantile, label in QUANTILES.items():
        prefix = f"{door}.{quantile}."
        points = [(float(key.removeprefix(prefix)), f.value) for key, f in figures.items() if key.startswith(prefix) and not f.void]
        found[label] = sorted((rate, value) for rate, value in points if not math.isnan(value))
    return found


def draw(figures: Mapping[str, Figure], path: Path, subtitle: str) -> None:
    """The latency curve of both doors as an SVG whose text is text, the same bytes for the same figures."""
    doors = [
        (door, title) for door, title in (("http", "HTTP door"), ("kafka", "Kafka in to Kafka out")) if curve(figures, door)["p99"]
    ]
    with plt.rc_context({"svg.hashsalt": "fraudgate", "svg.fonttype": "none", "font.size": 10}):
        drawing, axes = plt.subplots(1, max(1, len(doors)), figsize=(5.2 * max(1, len(doors)), 4.2), sharey=True, squeeze=False)
        for axis, (door, title) in zip(axes[0], doors, strict=False):
            for (label, points), style in zip(curve(figures, door).items(), ("o-", "s-", "^-"), strict=True):
                axis.plot([rate for rate, _ in points], [ms for _, ms in points], style, label=label)
            promised = [(float(t.key.rpartition(".")[2]), t.reach) for t in TARGETS if t.key.startswith(f"{door}.p99_ms.")]
            axis.plot([rate for rate, _ in promised], [ms for _, ms in promised], "kx", label="p99 promised")
            axis.set_yscale("log")
            # Whole decades, so that there are always ticks with numbers.
            least, most = axis.get_ylim()
            axis.set_ylim(10 ** math.floor(math.log10(least)), 10 ** math.ceil(math.log10(most)))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_title(title)
            axis.set_xlabel("offered, events a second")
            axis.set_xlim(left=0)
            axis.xaxis.set_major_formatter(lambda rate, _: f"{rate:,.0f}")
            axis.yaxis.set_major_formatter(lambda ms, _: f"{ms:,.10g}")
            axis.grid(visible=True, which="both", alpha=0.25)
            axis.legend()
        axes[0][0].set_ylabel("latency from the intended send, ms")
        drawing.suptitle(subtitle, fontsize=9)
        drawing.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, format="svg", metadata={"Date": None})
        plt.close(drawing)
