"""Dashboards as they lie in the repository: current, drawable, and asking for what exists."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.monitoring.dashboards.checks import complaints_of, plain, queries_of, query_complaints
from deploy.monitoring.dashboards.commands import BOARDS, FOLDER, PAGE_PATH, dashboards, stale
from gateway.contracts.metrics import BY_NAME, SERIES
from tests.tools import needs_prometheus, run_tool

ROOT = Path(__file__).resolve().parents[3]
PROVISIONING = ROOT / "deploy" / "monitoring" / "grafana" / "provisioning"
FILES = sorted(FOLDER.glob("*.json"))
# Spelled apart, for the rule that every metric named anywhere exists.
NO_METRIC = "_".join(("fraudgate", "descisions", "total"))
# Metrics that no panel asks for.
NOT_SHOWN: frozenset[str] = frozenset()


def read(path: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(path.read_text())
    return board


@pytest.fixture
def good() -> dict[str, Any]:
    return copy.deepcopy(read(FOLDER / "fraudgate-overview.json"))


def test_what_lies_in_the_repository_is_what_the_code_makes() -> None:
    assert stale() == [], "run make docs"
    assert dashboards(["--check"]) == 0


def test_every_board_has_its_file_and_its_own_uid() -> None:
    assert [read(path)["uid"] for path in FILES] == sorted(board.uid for board in BOARDS)
    assert len({board.title for board in BOARDS}) == len(BOARDS) == len(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_wrong_with_a_board(path: Path) -> None:
    assert complaints_of(read(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_board_is_one_to_grafanas_own_model_of_it(path: Path) -> None:
    board = read(path)
    # Whatever the model doesn't know is lost on this way.
    again = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
    assert again == board


def test_every_metric_of_the_catalogue_is_on_a_board() -> None:
    asked = {SERIES[name].name for path in FILES for _, expr in queries_of(read(path)) for name in SERIES if name in expr}
    assert sorted(BY_NAME.keys() - asked - NOT_SHOWN) == [], "put it on a board of deploy/monitoring/dashboards, or name it here"


def panel(board: dict[str, Any], title: str) -> dict[str, Any]:
    [found] = [p for p in board["panels"] if p["title"] == title]
    return found  # type: ignore[no-any-return]


def change_panel(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda board: panel(board, "Decisions by door").update(changes)


def change_query(expr: str, legend: str = "") -> Callable[[dict[str, Any]], None]:
    def change(board: dict[str, Any]) -> None:
        [target] = panel(board, "Decisions by door")["targets"]
        target.update(expr=expr, legendFormat=legend)

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no uid": (lambda b: b.update(uid=""), "no uid"),
    "long uid": (lambda b: b.update(uid="x" * 41), "uid"),
    "no datasource variable": (lambda b: b["templating"].update(list=[]), "no variable for its datasource"),
    "one id twice": (lambda b: panel(b, "Decisions by door").update(id=panel(b, "Degraded")["id"]), "2 panels have the id"),
    "one title twice": (lambda b: panel(b, "Decisions by door").update(title="Degraded"), "2 panels have the title"),
    "overlap": (lambda b: panel(b, "Decisions by door").update(gridPos=panel(b, "Degraded")["gridPos"]), "lies over"),
    "off the grid": (lambda b: panel(b, "Degraded")["gridPos"].update(x=23), "is not on the grid"),
    "no title": (change_panel(title=""), "no title"),
    "no description": (change_panel(description=""), "no description"),
    "no unit": (change_panel(fieldConfig={"defaults": {}, "overrides": []}), "no unit"),
    "no query": (change_panel(targets=[]), "no query"),
    "another datasource": (change_panel(datasource={"type": "prometheus", "uid": "mine"}), "doesn't use the board's datasource"),
    "no metric": (change_query("vector(1)"), "asks for no metric"),
    "unknown metric": (change_query(f"rate({NO_METRIC}[1m])"), f"there is no metric {NO_METRIC}"),
    "unknown label": (change_query('rate(fraudgate_decisions_total{dor="http"}[1m])'), "has no label dor"),
    "unknown value": (change_query('rate(fraudgate_decisions_total{door="htp"}[1m])'), "has never door 'htp'"),
    "unknown grouping": (
        change_query("sum by (rule) (rate(fraudgate_decisions_total[1m]))"),
        "none of its metrics has a label rule",
    ),
    "unknown legend": (
        change_query("sum by (door) (rate(fraudgate_decisions_total[1m]))", "{{outcome}}"),
        "its legend names the label outcome",
    ),
    "unknown variable": (change_query("rate(fraudgate_decisions_total[$window])"), "no variable window"),
    "no rate": (change_query("sum by (le) (fraudgate_decision_latency_seconds_bucket)"), "needs a rate"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told(good: dict[str, Any], name: str) -> None:
    spoil, told = BAD[name]
    spoil(good)
    assert any(told in complaint for complaint in complaints_of(good)), complaints_of(good)


def test_what_is_said_of_a_query_is_told_of_its_panel(good: dict[str, Any]) -> None:
    change_query(f"rate({NO_METRIC}[1m])")(good)
    assert len(complaints_of(good)) == 1
    assert "'Decisions by door'" in complaints_of(good)[0]
    assert list(query_complaints("sum by (door) (rate(fraudgate_decisions_total[$__rate_interval]))", "{{door}}")) == []


@needs_prometheus
def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    queries = [(f"{path.stem}: {title}", plain(expr)) for path in FILES for title, expr in queries_of(read(path))]
    assert len(queries) > 150
    assert parsed(tmp_path, [expr for _, expr in queries]) == ""


@needs_prometheus
def test_a_query_that_is_none_is_seen(tmp_path: Path) -> None:
    assert "parse" in parsed(tmp_path, ["sum(rate(fraudgate_decisions_total[1m])"])
    assert "parse" in parsed(tmp_path, ["rate(fraudgate_decisions_total)"])


def parsed(folder: Path, queries: list[str]) -> str:
    """What promtool says against them, as the expressions of recording rules."""
    rules = [{"record": f"query:{i}", "expr": expr} for i, expr in enumerate(queries)]
    path = folder / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    ended = run_tool("promtool", "check", "rules", str(path))
    return "" if ended.returncode == 0 else ended.stdout + ended.stderr


def test_grafana_is_told_where_prometheus_and_the_dashboards_are() -> None:
    [source] = yaml.safe_load((PROVISIONING / "datasources" / "fraudgate.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "${PROMETHEUS_URL}")
    [provider] = yaml.safe_load((PROVISIONING / "dashboards" / "fraudgate.yaml").read_text())["providers"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "${DASHBOARDS}")
    text = PAGE_PATH.read_text()
    assert "PROMETHEUS_URL=" in text
    assert f"DASHBOARDS=$PWD/{FOLDER.relative_to(ROOT)}" in text
