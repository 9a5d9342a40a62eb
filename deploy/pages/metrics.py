"""Writes docs/metrics.md from the catalogue of metrics: python -m deploy.pages.metrics (make docs)."""

from __future__ import annotations

from pathlib import Path

from gateway.contracts.metrics import CATALOGUE, GOOD_WITHIN_S, Exporter, Kind, Label, Metric, Over

PAGE_PATH = Path(__file__).resolve().parents[2] / "docs/metrics.md"
HEADER = """\
# Metrics

Every process serves its metrics at `/metrics` on its own port, in Prometheus' text format. Names begin with `fraudgate_`, times are
seconds, sizes are bytes, counters end in `_total`. A counter whose labels have known values shows each of them as 0 from the start.
A gateway of several workers answers with all of them together: counters and histograms add up, and of a gauge the column *over workers*
says what is told. [monitoring.md](monitoring.md) has the service levels and the alerts that are made of them.

This page is generated (`make docs`) from `gateway/contracts/metrics.py`, which the processes make theirs from.
"""
SECTIONS = {
    Exporter.GATEWAY: ("Gateway", "`fraudgate serve`, port `FRAUDGATE_GATEWAY_PORT`."),
    Exporter.CASES: ("Case service", "`fraudgate cases`, port `FRAUDGATE_CASES_PORT`."),
    Exporter.JOBS: ("Feature jobs", "`fraudgate jobs`, port `FRAUDGATE_JOBS_PORT`."),
    Exporter.PARITY: ("Parity", "`fraudgate parity --live`, port `FRAUDGATE_PARITY_PORT`."),
}
SERVICE_LEVEL = "A decision is good when it is told within " + " and ".join(
    f"{within_s * 1000:g} ms ({door})" for door, within_s in GOOD_WITHIN_S.items()
)
VALUES_SHOWN_MAX = 8


def page() -> str:
    """The whole page."""
    parts = [HEADER]
    for exporter, metrics in CATALOGUE.items():
        title, where = SECTIONS[exporter]
        parts.append(f"\n## {title}\n\n{where}")
        if exporter is Exporter.GATEWAY:
            parts.append(f" {SERVICE_LEVEL}; shed requests and failures are bad, what a caller got wrong is neither.")
        workers = exporter is Exporter.GATEWAY
        columns = ["metric", "kind", *(["over workers"] if workers else []), "labels", "what it is"]
        parts.append("\n\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns) + "\n")
        parts += [_row(metric, workers) for metric in metrics]
    return "".join(parts)


def _row(metric: Metric, workers: bool) -> str:
    over = {Over.SUM: "sum", Over.LEAST: "least", Over.MOST: "most"}[metric.over] if metric.kind is Kind.GAUGE else "sum"
    cells = [f"`{metric.name}`", metric.kind.value, *([over] if workers else [])]
    cells += ["; ".join(_label(label) for label in metric.labels), _doc(metric)]
    return "| " + " | ".join(cells) + " |\n"


def _label(label: Label) -> str:
    if not label.values:
        return f"`{label.name}`: {label.which}, at most {label.most:,}"
    if len(label.values) > VALUES_SHOWN_MAX:
        return f"`{label.name}`: {len(label.values)} known ones, `{label.values[0]}` to `{label.values[-1]}`"
    return f"`{label.name}`: {', '.join(label.values)}"


def _doc(metric: Metric) -> str:
    text = metric.doc.replace("|", "/")
    if not metric.buckets:
        return text
    return f"{text} ({len(metric.buckets)} buckets, {metric.buckets[0]:g} to {metric.buckets[-1]:g})"


if __name__ == "__main__":
    PAGE_PATH.write_text(page())
    print(f"{PAGE_PATH} written")
