"""Parts that dashboards are made of: data sources, queries, panels, links, variables, annotations."""

from __future__ import annotations

from typing import Any, Final

from grafana_foundation_sdk.builders import bargauge, dashboard, gauge, heatmap, loki, prometheus, stat, table, tempo
from grafana_foundation_sdk.builders import common as options
from grafana_foundation_sdk.builders import timeseries as graph
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models.loki import LokiQueryDirection
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.tempo import SearchTableType

from grafana.promql import FILTERS
from otel_odibi import names
from otel_odibi.names import Instrument

PROMETHEUS: Final = common.DataSourceRef("prometheus", "${prometheus_datasource}")
TEMPO: Final = common.DataSourceRef("tempo", "${tempo_datasource}")
LOKI: Final = common.DataSourceRef("loki", "${loki_datasource}")

EXPLORER: Final = "/d/odibi-run-explorer/odibi-run-explorer"
KINDS: Final = ("prometheus", "tempo", "loki")
SAME: Final = "&".join(
    ["${__url_time_range}", *(f"${{{name}:queryparam}}" for name in (*(f"{k}_datasource" for k in KINDS), *FILTERS))]
)
"""Query of a link that takes the time range, the data sources and the filters along."""


# --- queries ---------------------------------------------------------------------------------------------------------
def series(expression: str, legend: str = "", *, exemplars: bool = False) -> prometheus.Dataquery:
    """Query a range: a line, or a row of a heatmap."""
    return (
        prometheus.Dataquery().expr(expression).legend_format(legend).range().exemplar(exemplars).datasource(PROMETHEUS)
    )


def value(expression: str, legend: str = "", ref: str = "") -> prometheus.Dataquery:
    """Query what is true at the end of the range, or of all of it: a number a series."""
    query = prometheus.Dataquery().expr(expression).legend_format(legend).instant().datasource(PROMETHEUS)
    return query.ref_id(ref) if ref else query


def rows(expression: str, ref: str = "") -> prometheus.Dataquery:
    """Query the same as a table, with a column for each label."""
    return value(expression, ref=ref).format(PromQueryFormat.TABLE)


def traces(query: str, *, limit: int = 20) -> tempo.Dataquery:
    """Query spans in TraceQL, one row a span; where the query is a trace id, that trace."""
    return (
        tempo.Dataquery().query_type("traceql").query(query).limit(limit).spss(1)
        .table_type(SearchTableType.SPANS).datasource(TEMPO)
    )  # fmt: skip


def logs(expression: str, *, lines: int = 1_000) -> loki.Dataquery:
    """Query log lines, oldest first."""
    query = loki.Dataquery().expr(expression).query_type("range").max_lines(lines)
    return query.direction(LokiQueryDirection.FORWARD).datasource(LOKI)


# --- panels ----------------------------------------------------------------------------------------------------------
def panel(made: Any, title: str, text: str, shown: Instrument | None, unit: str, size: Any, *queries: Any) -> Any:
    """Give a panel what every panel has; its description ends with the metric that is shown, and what that means.

    Queries without a name are called A, B, C: the SDK leaves it empty.
    """
    for position, query in enumerate(queries):
        query._internal.ref_id = query._internal.ref_id or chr(ord("A") + position)
    made.title(title).description(f"{text}\n\n`{shown.name}`: {shown.description}" if shown else text)
    made.datasource(queries[0]._internal.datasource).unit(unit).targets(list(queries))
    return made.span(size[0]).height(size[1])


def coloured(made: Any, *steps: tuple[float | None, str]) -> Any:
    """Show the last value of each series, coloured by these steps (from a value on, a colour)."""
    found = [model.Threshold(value=at, color=color) for at, color in steps]
    made.thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(found))
    made.color_scheme(dashboard.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
    return made.reduce_options(options.ReduceDataOptions().calcs(["lastNotNull"]).values(False))


def number(*steps: tuple[float | None, str]) -> stat.Panel:
    """Return a panel with one number a series."""
    return coloured(stat.Panel().graph_mode(common.BigValueGraphMode.NONE), *steps)


def dial(*steps: tuple[float | None, str]) -> gauge.Panel:
    """Return a gauge from 0 to 1."""
    return coloured(gauge.Panel().min(0).max(1), *steps)


def bars() -> bargauge.Panel:
    """Return a panel with one bar a series."""
    made = bargauge.Panel().orientation(common.VizOrientation.HORIZONTAL).min(0)
    return coloured(made.display_mode(common.BarGaugeDisplayMode.BASIC), (None, "blue"))


def lines(*, stacked: bool = False) -> graph.Panel:
    """Return a graph. Batch work leaves gaps, so lone points are drawn and lines cross gaps of up to an hour."""
    made = graph.Panel().span_nulls(3_600_000).show_points(common.VisibilityMode.AUTO).min(0)
    made.tooltip(options.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
    return made.stacking(options.StackingConfig().mode(common.StackingMode.NORMAL)) if stacked else made


def columns() -> graph.Panel:
    """Return a graph of stacked columns, for what happens now and then."""
    return lines(stacked=True).draw_style(common.GraphDrawStyle.BARS).fill_opacity(60).span_nulls(False)


def heat_map() -> heatmap.Panel:
    """Return a heatmap of a histogram's buckets, exemplars marked: a click on one leads to its trace."""
    colors = heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    made = heatmap.Panel().calculate(False).color(colors).y_axis(heatmap.YAxisConfig().unit("s"))
    return made.filter_values(heatmap.FilterValueRange().le(1e-9)).exemplars_color("rgba(255,0,255,0.7)")


def grid(*columns: str | tuple[str, str]) -> table.Panel:
    """Return a table: columns are labels, which join the queries, and (title, unit) of each query in turn."""
    made = table.Panel().decimals(1).with_transformation(model.DataTransformerConfig("merge", options={}))
    titled = [column for column in columns if not isinstance(column, str)]
    named = {f"Value #{chr(ord('A') + position)}": title for position, (title, _) in enumerate(titled)}
    order = {name: position for position, name in enumerate([c for c in columns if isinstance(c, str)] + [*named])}
    arranged = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": named}
    made.with_transformation(model.DataTransformerConfig("organize", options=arranged))
    for title, unit in titled:
        made.override_by_name(title, [model.DynamicConfigValue("unit", unit)])
    return made


# --- links -----------------------------------------------------------------------------------------------------------
def to_runs(made: Any, pipeline: str = "${__field.labels.pipeline}") -> Any:
    """Let a click on a series lead to the runs of its pipeline."""
    url = f"{EXPLORER}?{SAME}&var-pipeline={pipeline}"
    return made.data_links([dashboard.DashboardLink("Runs of ${__field.labels.pipeline}").url(url)])


def link_field(made: Any, field: str, title: str, query: str) -> Any:
    """Let a click on a table's cell lead to the run explorer."""
    link = {"title": title, "url": f"{EXPLORER}?{SAME}&{query}"}
    return made.override_by_name(field, [model.DynamicConfigValue("links", [link])])


# --- variables and annotations ---------------------------------------------------------------------------------------
def sources() -> list[dashboard.DatasourceVariable]:
    """Return the data-source pickers: Prometheus first, which is the one linters take for the dashboard's own."""
    return [
        dashboard.DatasourceVariable(f"{kind}_datasource").label(f"{kind.title()} data source").type(kind)
        for kind in KINDS
    ]


def filters() -> list[dashboard.QueryVariable]:
    """Return the filters. The environment may be unset, so All matches series without that label too."""
    found, above = [], ""
    for name in ("environment", "service", "pipeline", "node", "job", "instance"):
        metric = names.NODE_DURATION if name == "node" else names.PIPELINE_DURATION
        query = f"label_values({metric.prometheus}_count{{{above}}}, {name})"
        made = dashboard.QueryVariable(name).label(name.title()).datasource(PROMETHEUS).query(query).definition(query)
        made.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(model.VariableSort.ALPHABETICAL_ASC)
        made.multi(True).include_all(True).all_value(".+" if name in ("job", "instance") else ".*")
        found.append(made.current(model.VariableOption(text=["All"], value=["$__all"])))
        if name in ("environment", "service", "pipeline"):
            above += f'{", " if above else ""}{name}=~"${name}"'
    return found


def mark(name: str, color: str, title: str, *, value_is_time: bool = False) -> dashboard.AnnotationQuery:
    """Return an annotation of the graphs; its query is added to the finished document, the SDK has no field for it."""
    made = dashboard.AnnotationQuery().name(name).datasource(PROMETHEUS).enable(True).icon_color(color)
    return made.title_format(title).tag_keys("service,pipeline").use_value_for_time(value_is_time)
