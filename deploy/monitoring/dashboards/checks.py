"""What is wrong with a dashboard's JSON, as sentences: its layout, its words, and whether its queries name what exists.

Read from the JSON alone, as Grafana would, so that a mistake of the generator is seen too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from deploy.monitoring.dashboards.spec import GRID_WIDTH
from gateway.contracts.metrics import SERIES, Kind

ROW = "row"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# What Prometheus gives every series, and what a histogram's buckets have.
GIVEN_LABELS = frozenset({"instance", "job"})
BUCKET_LABEL = "le"
# Words of a query that are no labels, with what Grafana puts in.
_NAME = re.compile(r"fraudgate_[a-z0-9_]+")
_SELECTOR = re.compile(r"(fraudgate_[a-z0-9_]+)(\{[^}]*\})?")
_MATCHER = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)\s*(?:=~|!~|!=|=)\s*"')
_MATCHED = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"([^"]*)"')
_BY = re.compile(r"\bby\s*\(([^)]*)\)")
_LEGEND = re.compile(r"\{\{\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*\}\}")
_VARIABLE = re.compile(r"\$\{?([a-zA-Z_][a-zA-Z0-9_]*)\}?")
# Grafana's own.
_BUILT_IN = frozenset({"__rate_interval", "__interval", "__range"})
TITLE_MAX, DESCRIPTION_MIN = 60, 5


def complaints_of(board: Mapping[str, Any]) -> list[str]:
    """All of them; none is what a board is to have."""
    panels = board.get("panels", [])
    return [
        *_whole(board, panels),
        *_layout(panels),
        *(f"{_name(p)}: {c}" for p in panels if p["type"] != ROW for c in _of_panel(p, _variables(board))),
    ]


def queries_of(board: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(panel's title, PromQL as Grafana sends it but for its variables) of each query."""
    return [(p["title"], target["expr"]) for p in board["panels"] for target in p.get("targets", [])]


def _variables(board: Mapping[str, Any]) -> set[str]:
    return {v["name"] for v in board.get("templating", {}).get("list", [])}


def _name(panel: Mapping[str, Any]) -> str:
    return f"panel {panel.get('id')} ({panel.get('title', '')!r})"


def _whole(board: Mapping[str, Any], panels: list[Any]) -> Iterator[str]:
    for key in ("uid", "title", "description", "tags"):
        if not board.get(key):
            yield f"the board has no {key}"
    if not re.fullmatch(r"[a-z0-9-]{1,40}", board.get("uid", "")):
        yield "the board's uid is more than small letters, digits and hyphens, or longer than Grafana takes"
    if not [v for v in board.get("templating", {}).get("list", []) if v["type"] == "datasource" and v.get("query") == "prometheus"]:
        yield "the board has no variable for its datasource"
    if not panels:
        yield "the board has no panels"
    for id_, n in Counter(p.get("id") for p in panels).items():
        if id_ is None or n > 1:
            yield f"{n} panels have the id {id_}"
    for title, n in Counter(p.get("title") for p in panels).items():
        if n > 1:
            yield f"{n} panels have the title {title!r}"


def _layout(panels: list[Any]) -> Iterator[str]:
    for panel in panels:
        at = panel["gridPos"]
        if at["w"] < 1 or at["h"] < 1 or at["x"] < 0 or at["y"] < 0 or at["x"] + at["w"] > GRID_WIDTH:
            yield f"{_name(panel)} is not on the grid"
    for a, b in combinations(panels, 2):
        p, q = a["gridPos"], b["gridPos"]
        if p["x"] < q["x"] + q["w"] and q["x"] < p["x"] + p["w"] and p["y"] < q["y"] + q["h"] and q["y"] < p["y"] + p["h"]:
            yield f"{_name(a)} lies over {_name(b)}"


def _of_panel(panel: Mapping[str, Any], variables: set[str]) -> Iterator[str]:
    if not 0 < len(panel.get("title", "")) <= TITLE_MAX:
        yield "it has no title, or a long one"
    if len(panel.get("description", "")) < DESCRIPTION_MIN:
        yield "it has no description"
    if panel.get("datasource") != DATASOURCE:
        yield "it doesn't use the board's datasource"
    if not panel.get("fieldConfig", {}).get("defaults", {}).get("unit"):
        yield "it has no unit"
    targets = panel.get("targets", [])
    if not targets:
        yield "it has no query"
    if len({target.get("refId") for target in targets}) != len(targets):
        yield "two of its queries have one letter"
    for target in targets:
        if target.get("datasource") != DATASOURCE:
            yield "a query doesn't use the board's datasource"
        yield from query_complaints(target["expr"], target.get("legendFormat", ""), variables)


def query_complaints(expr: str, legend: str = "", variables: set[str] | None = None) -> Iterator[str]:
    """What is wrong with one query: a metric or label that doesn't exist, a counter that isn't differentiated, an unknown variable."""
    names = set(_NAME.findall(expr))
    if not names:
        yield f"{expr} asks for no metric"
    unknown = names - SERIES.keys()
    for name in sorted(unknown):
        yield f"there is no metric {name}"
    if unknown:
        return
    known = set(GIVEN_LABELS)
    for name in names:
        known |= set(SERIES[name].label_names) | ({BUCKET_LABEL} if name.endswith("_bucket") else set())
    for name, selector in _SELECTOR.findall(expr):
        metric = SERIES[name]
        own = set(metric.label_names) | GIVEN_LABELS | ({BUCKET_LABEL} if name.endswith("_bucket") else set())
        for label in _MATCHER.findall(selector):
            if label not in own:
                yield f"{name} has no label {label}"
        values = {label.name: label.values for label in metric.labels}
        for label, value in _MATCHED.findall(selector):
            if values.get(label) and value not in values[label]:
                yield f"{name} has never {label} {value!r}"
        if metric.kind is Kind.HISTOGRAM and not re.search(rf"(?:rate|increase)\({name}\b", expr):
            yield f"{name} only grows: it needs a rate"
    kept = {label.strip() for labels in _BY.findall(expr) for label in labels.split(",") if label.strip()}
    for label in sorted(kept - known):
        yield f"none of its metrics has a label {label}"
    for label in sorted(set(_LEGEND.findall(legend)) - (kept or known)):
        yield f"its legend names the label {label}, which its series don't have"
    for variable in sorted(set(_VARIABLE.findall(expr)) - _BUILT_IN - (variables or set())):
        yield f"the board has no variable {variable}"


def plain(expr: str, interval: str = "1m") -> str:
    """The query as Prometheus gets it, with all instances picked and `interval` for Grafana's own."""
    return _VARIABLE.sub(lambda found: interval if found[1] in _BUILT_IN else ".*", expr)
