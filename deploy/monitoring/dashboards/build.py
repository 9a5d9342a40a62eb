"""A board as Grafana's JSON, by the builders of Grafana's foundation SDK, which know what a panel may have."""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

from deploy.monitoring.dashboards.spec import GRID_WIDTH, Board, Kind, Panel, Query

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "fraudgate"
NOW_AND_BEFORE = ("now-1h", "now")
REFRESH = "10s"
ROW_HEIGHT = 1


def text_of(board: Board) -> str:
    """The file's text; the same for the same board."""
    return json.dumps(_board(board).build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _board(board: Board) -> dashboard.Dashboard:
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags([TAG])
        .refresh(REFRESH)
        .time(*NOW_AND_BEFORE)
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .link(
            dashboard.DashboardLink("Fraudgate")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .keep_time(True)
            .include_vars(True)
        )
    )
    if board.by_instance:
        made = made.with_variable(
            dashboard.QueryVariable("instance")
            .label("Gateway")
            .query("label_values(fraudgate_build_info, instance)")
            .datasource(DATASOURCE)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    ids, y = iter(range(1, 10_000)), 0
    for row in board.rows:
        made = made.with_row(dashboard.Row(row.title).id(next(ids)).grid_pos(models.GridPos(ROW_HEIGHT, GRID_WIDTH, 0, y)))
        y += ROW_HEIGHT
        x = height = 0
        for panel in row.panels:
            if x + panel.width > GRID_WIDTH:
                x, y, height = 0, y + height, 0
            made = made.with_panel(_panel(panel).id(next(ids)).grid_pos(models.GridPos(panel.height, panel.width, x, y)))
            x += panel.width
            height = max(height, panel.height)
        y += height
    return made


def _panel(panel: Panel) -> Any:
    makers = {
        Kind.LINES: _lines,
        Kind.STACK: _stack,
        Kind.NUMBER: _number,
        Kind.HEATMAP: _heatmap,
        Kind.TABLE: _table,
    }
    made = makers[panel.kind](panel).title(panel.title).description(panel.description).datasource(DATASOURCE).unit(panel.unit.value)
    for letter, query in zip("ABCDEFGHIJ", panel.queries, strict=False):
        made = made.with_target(_target(query, panel.kind).ref_id(letter))
    if panel.limits:
        steps = [
            models.Threshold(None, panel.below.value),
            *(models.Threshold(value, colour.value) for value, colour in panel.limits),
        ]
        made = made.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    if panel.least is not None:
        made = made.min(panel.least)
    if panel.most is not None:
        made = made.max(panel.most)
    return made if panel.decimals is None else made.decimals(panel.decimals)


def _target(query: Query, kind: Kind) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(query.expr).legend_format(query.legend or "__auto").datasource(DATASOURCE)
    if kind is Kind.TABLE:
        return made.instant().format(prometheus_models.PromQueryFormat.TABLE)
    return made.range().format(
        prometheus_models.PromQueryFormat.HEATMAP if kind is Kind.HEATMAP else prometheus_models.PromQueryFormat.TIME_SERIES
    )


def _lines(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(8)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI).sort(common_models.SortOrder.DESCENDING))
    )
    if panel.limits:
        made = made.thresholds_style(common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED))
    return made


def _stack(panel: Panel) -> timeseries.Panel:
    return _lines(panel).fill_opacity(40).stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL).group("A"))


def _number(panel: Panel) -> stat.Panel:
    return (
        stat.Panel()
        .graph_mode(common_models.BigValueGraphMode.AREA)
        .color_mode(common_models.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    )


def _heatmap(panel: Panel) -> heatmap.Panel:
    return (
        heatmap.Panel()
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().scheme("Oranges").steps(64))
        .y_axis(heatmap.YAxisConfig().unit(panel.unit.value))
        .show_legend()
    )


def _table(panel: Panel) -> table.Panel:
    return table.Panel().show_header(True)
