"""The dashboards: `python -m grafana.build` writes `grafana/dashboards/*.json`.

Metric names and meanings come from `otel_odibi.names`; how PromQL deals with short runs is told in `grafana.promql`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.builders import dashboard, nodegraph
from grafana_foundation_sdk.builders import logs as log_panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from grafana import panels as ui
from grafana import promql as q
from otel_odibi import names as n

FOLDER: Final = Path(__file__).parent / "dashboards"
WIDE, TALL, HALF, THIRD, SMALL = (24, 9), (24, 14), (12, 8), (8, 8), (4, 5)

RUNS: Final = q.select(n.PIPELINE_DURATION, "_count")
FAILED_RUNS: Final = q.select(n.PIPELINE_DURATION, "_count", outcome=n.FAILURE)
NODES: Final = q.select(n.NODE_DURATION, "_count")
FAILED_NODES: Final = q.select(n.NODE_DURATION, "_count", outcome=n.FAILURE)
LOOKUPS: Final = q.select(n.NODE_CACHE_LOOKUPS)
HITS: Final = q.select(n.NODE_CACHE_LOOKUPS, result="hit")

PLAIN: Final = ((None, "text"),)
BAD: Final = ((None, "green"), (1.0, "red"))  # one is too many
GOOD: Final = ((None, "red"), (0.5, "orange"), (0.9, "green"))  # shares
LATE: Final = ((None, "green"), (86_400.0, "orange"), (172_800.0, "red"))  # a day, two days

NODE: Final = ("pipeline", "node")
OF_NODE: Final = "{{pipeline}} {{node}}"


# --- parts of more than one dashboard --------------------------------------------------------------------------------
def durations(title: str, instrument: n.Instrument) -> list[Any]:
    """Quantiles and a heatmap of a histogram, both with exemplars."""
    buckets = q.select(instrument, "_bucket")
    p50, p95, p99 = (q.quantile(at, q.rate(buckets)) for at in (0.5, 0.95, 0.99))
    first = ui.series(q.with_spans(p50, instrument), "p50", exemplars=True)
    counts = q.with_spans(q.added(f"increase({buckets}[{q.RATE}])", "le"), instrument)
    cells = ui.series(counts, "{{le}}", exemplars=True).format(PromQueryFormat.HEATMAP)
    text = "p50, p95 and p99. A dot is an exemplar: one execution, with a link to its trace."
    spread = "How many took how long, over time; dots are exemplars with a link to the trace."
    return [
        ui.panel(ui.lines(), title, text, instrument, "s", HALF, first, ui.series(p95, "p95"), ui.series(p99, "p99")),
        ui.panel(ui.heat_map(), f"{title}, heatmap", spread, instrument, "s", HALF, cells),
    ]


def flow(by: str) -> list[Any]:
    out = ui.series(q.added(q.rate(q.select(n.NODE_ROWS, direction="out")), by), f"{{{{{by}}}}}")
    text = f"Rows that came out of nodes a second, by {by}."
    looked = ui.series(f"60 * {q.added(q.rate(LOOKUPS), 'result')}", "{{result}}")
    asked = "Cache lookups a minute, by result."
    return [
        ui.panel(ui.lines(), "Data throughput", text, n.NODE_ROWS, "cps", HALF, out),
        ui.panel(ui.lines(stacked=True), "Cache hits vs misses", asked, n.NODE_CACHE_LOOKUPS, "cpm", HALF, looked),
    ]


def count(title: str, text: str, instrument: n.Instrument, counted: str, steps: tuple[Any, ...] = BAD) -> Any:
    query = ui.value(f"{q.added(counted)} or vector(0)", title)
    return ui.panel(ui.number(*steps).decimals(0), title, text, instrument, "short", SMALL, query)


def share(made: Any, title: str, text: str, instrument: n.Instrument, expression: str, none: str) -> Any:
    return ui.panel(made.no_value(none), title, text, instrument, "percentunit", SMALL, ui.value(expression, title))


# --- overview --------------------------------------------------------------------------------------------------------
def overview() -> dashboard.Dashboard:
    text = "All pipelines: do they run, succeed, keep their pace, and is telemetry whole?"
    pace = [*runs_and_errors(), *durations("Run duration", n.PIPELINE_DURATION), *flow("pipeline")]
    found = {"In the time range": totals(), "Now": now(), "Over time": pace, "By pipeline": [pipelines()]}
    return board("odibi-overview", "Odibi overview", text, found)


def totals() -> list[Any]:
    done = q.ratio(q.grown(q.select(n.PIPELINE_DURATION, "_count", outcome=n.SUCCESS)), q.grown(RUNS))
    hits = q.ratio(q.grown(HITS), q.grown(LOOKUPS))
    hit = "Share of cache lookups that were hits."
    return [
        count("Runs", "Runs that ended, with any outcome.", n.PIPELINE_DURATION, q.grown(RUNS), PLAIN),
        share(ui.number(*GOOD), "Run success rate", "Runs that succeeded.", n.PIPELINE_DURATION, done, "no runs"),
        count("Failed runs", "Runs that ended with a failure.", n.PIPELINE_DURATION, q.grown(FAILED_RUNS)),
        count("Error count", "Node executions that failed.", n.NODE_DURATION, q.grown(FAILED_NODES)),
        share(ui.dial(*GOOD), "Cache hit rate", hit, n.NODE_CACHE_LOOKUPS, hits, "no lookups"),
        count("Retries", "Attempts after the first.", n.NODE_RETRIES, q.grown(q.select(n.NODE_RETRIES)), PLAIN),
    ]


def now() -> list[Any]:
    fresh = ui.value(f"time() - {q.greatest(q.last(q.select(n.PIPELINE_LAST_SUCCESS)), 'pipeline')}", "{{pipeline}}")
    uptime = ui.value(q.greatest(q.last(q.select(n.PROCESS_UPTIME)), "service", "instance"), "{{service}} {{instance}}")
    lost = f"{q.added(q.grown(q.select(n.TELEMETRY_DROPPED)), 'signal', 'reason')} or on() vector(0)"
    dropped = ui.value(lost, "{{signal}} {{reason}}")
    ago = "How long ago each pipeline last succeeded."
    up = "How long each process has been reporting; of one that has ended, how long it did."
    which = "Telemetry lost in the time range, by signal and reason."
    return [
        ui.to_runs(
            ui.panel(ui.number(*LATE), "Time since last success", ago, n.PIPELINE_LAST_SUCCESS, "s", THIRD, fresh)
        ),
        count("Active runs", "Runs under way.", n.PIPELINE_ACTIVE, q.select(n.PIPELINE_ACTIVE), PLAIN),
        count("Active nodes", "Nodes under way.", n.NODE_ACTIVE, q.select(n.NODE_ACTIVE), PLAIN),
        ui.panel(ui.number(*PLAIN), "System uptime", up, n.PROCESS_UPTIME, "s", SMALL, uptime),
        ui.panel(ui.number(*BAD).decimals(0), "Telemetry dropped", which, n.TELEMETRY_DROPPED, "short", SMALL, dropped),
    ]


def runs_and_errors() -> list[Any]:
    runs = ui.series(f"60 * {q.added(q.rate(RUNS), 'pipeline', 'outcome')}", "{{pipeline}} {{outcome}}")
    errors = ui.series(f"60 * {q.added(q.rate(FAILED_NODES), *NODE)} or on() vector(0)", OF_NODE)
    text = "Runs that ended, a minute. A pipeline's first run shows in the totals, not here: a rate takes two values."
    failed = "Node executions that failed, a minute."
    return [
        ui.to_runs(ui.panel(ui.columns(), "Pipeline execution rate", text, n.PIPELINE_DURATION, "opm", HALF, runs)),
        ui.to_runs(ui.panel(ui.columns(), "Errors", failed, n.NODE_DURATION, "opm", HALF, errors)),
    ]


def pipelines() -> Any:
    by = ("service", "pipeline")
    made = ui.grid(
        *by, ("Runs", "short"), ("Failed", "short"), ("Mean duration", "s"), ("p95", "s"),
        ("Last success", "dateTimeFromNow"),
    )  # fmt: skip
    runs = q.added(q.grown(RUNS), *by)
    queries = [
        ui.rows(runs), ui.rows(f"{q.added(q.grown(FAILED_RUNS), *by)} or {runs} * 0"),
        ui.rows(q.mean(n.PIPELINE_DURATION, *by)),
        ui.rows(q.quantile(0.95, q.grown(q.select(n.PIPELINE_DURATION, "_bucket")), *by)),
        ui.rows(f"1000 * {q.greatest(q.last(q.select(n.PIPELINE_LAST_SUCCESS)), *by)}"),
    ]  # fmt: skip
    ui.link_field(made, "pipeline", "Runs of ${__value.raw}", "var-pipeline=${__value.raw}")
    text = "Each pipeline in the time range; a click leads to its runs."
    return ui.panel(made, "Pipelines", text, n.PIPELINE_DURATION, "short", WIDE, *queries)


# --- node performance ------------------------------------------------------------------------------------------------
def node_performance() -> dashboard.Dashboard:
    text = "The nodes of the chosen pipelines: which are slow, fail, retry, miss their cache or take memory?"
    time = [*slowest(), *durations("Node execution duration", n.NODE_DURATION)]
    found = {"Time": time, "Outcome": outcomes(), "Data": [*flow("node"), *resources()]}
    return board("odibi-node-performance", "Odibi node performance", text, found)


def ranking(title: str, text: str, instrument: n.Instrument, unit: str, expression: str) -> Any:
    return ui.to_runs(
        ui.panel(ui.bars(), title, text, instrument, unit, HALF, ui.value(f"sort_desc({expression})", OF_NODE))
    )


def by_node(title: str, text: str, instrument: n.Instrument, unit: str, expression: str, size: Any = HALF) -> Any:
    return ui.to_runs(ui.panel(ui.lines(), title, text, instrument, unit, size, ui.series(expression, OF_NODE)))


def slowest() -> list[Any]:
    took = f"topk(10, {q.mean(n.NODE_DURATION, *NODE)})"
    spent = f"topk(10, {q.added(q.grown(q.select(n.NODE_DURATION, '_sum')), *NODE)})"
    text = "The ten nodes whose executions took longest, by their mean in the time range."
    seconds, ran = (q.added(q.rate(q.select(n.NODE_DURATION, suffix)), *NODE) for suffix in ("_sum", "_count"))
    climbs = "Mean of the executions of each node: a line that climbs is a regression."
    in_all = "The ten nodes that took most time in all: what to speed up first."
    return [
        ranking("Top 10 slowest nodes", text, n.NODE_DURATION, "s", took),
        ranking("Top 10 by time spent", in_all, n.NODE_DURATION, "s", spent),
        by_node("Mean duration by node", climbs, n.NODE_DURATION, "s", f"{seconds} / ({ran} > 0)", WIDE),
    ]


def outcomes() -> list[Any]:
    ended = ui.series(f"60 * {q.added(q.rate(NODES), 'outcome')}", "{{outcome}}")
    text = "Node executions that ended, a minute, by outcome."
    failing = "Share of each node's executions that failed, in the time range."
    failed = q.ratio(q.grown(FAILED_NODES), q.grown(NODES), *NODE)
    again = f"60 * {q.added(q.rate(q.select(n.NODE_RETRIES)), *NODE)} or on() vector(0)"
    return [
        ui.panel(ui.lines(stacked=True), "Node success/failure rates", text, n.NODE_DURATION, "opm", HALF, ended),
        ranking("Failure rate by node", failing, n.NODE_DURATION, "percentunit", failed),
        by_node("Retries", "Retries a minute, by node.", n.NODE_RETRIES, "opm", again),
        by_node(
            "Active nodes", "Under way, over time.", n.NODE_ACTIVE, "short", q.added(q.select(n.NODE_ACTIVE), *NODE)
        ),
    ]


def resources() -> list[Any]:
    speed, memory = (q.greatest(q.select(instrument), *NODE) for instrument in (n.NODE_THROUGHPUT, n.NODE_MEMORY))
    hits = q.ratio(q.grown(HITS), q.grown(LOOKUPS), *NODE)
    text = "How many rows a second each node gave while it ran."
    grows = "By node: a line that climbs from run to run is a leak."
    hit = "Share of each node's lookups that were hits, in the time range."
    return [
        by_node("Speed while running", text, n.NODE_THROUGHPUT, "cps", speed),
        by_node("Memory usage", grows, n.NODE_MEMORY, "bytes", memory),
        ranking("Cache hit rate by node", hit, n.NODE_CACHE_LOOKUPS, "percentunit", hits),
    ]


# --- run explorer ----------------------------------------------------------------------------------------------------
def run_explorer() -> dashboard.Dashboard:
    text = "Pick a run in the first table: its trace and logs appear below, and its pipeline's DAG and figures."
    found = {"Runs": [*searches(), *one_run()], "Pipeline": [dag(), nodes()]}
    made = board("odibi-run-explorer", "Odibi run explorer", text, found)
    trace_id = dashboard.TextBoxVariable("trace_id").label("Trace id").default_value("")
    return made.with_variable(trace_id.description("The run to show: a click in the tables sets it."))


def spans(kind: str, *conditions: str) -> str:
    """A TraceQL search for spans of the chosen services and pipelines. An attribute that is absent matches no `.*`."""
    environment = f"resource.{n.DEPLOYMENT_ENVIRONMENT_NAME}"
    where = [
        f'name =~ "{kind.format(name=".*")}"', f'resource.{n.SERVICE_NAME} =~ "$service"',
        f'span.{n.PIPELINE_NAME} =~ "$pipeline"', *conditions,
        f'(({environment} = nil && "$environment" = ".*") || {environment} =~ "$environment")',
    ]  # fmt: skip
    return f"{{ {' && '.join(where)} }}"


def search(title: str, text: str, found: str, *columns: str) -> Any:
    """The latest spans that Tempo finds; a click on one chooses its trace, whose id each row has in a hidden field."""
    query = ui.traces(f"{found} | select({', '.join(columns)}) with (most_recent = true)", limit=50)
    made = ui.grid().transformations([])
    for field in ("spanID", "name"):
        ui.link_field(
            made, field, "Show this run", "${pipeline:queryparam}&var-trace_id=${__data.fields.traceIdHidden}"
        )
    return ui.panel(made, title, text, None, "ns", HALF, query)


def searches() -> list[Any]:
    text = "The latest runs of the chosen pipelines, from their spans. A click on a run's name shows it below."
    failed = "The latest nodes that failed, and why. A click on a node's name shows its run below."
    facts = (f"span.{name}" for name in (n.PIPELINE_NAME, n.PIPELINE_RUN_ID, n.PIPELINE_OUTCOME))
    wrong = spans(n.NODE_SPAN, "status = error")
    return [
        search("Recent runs", text, spans(n.PIPELINE_SPAN), *facts),
        search("Failed nodes", failed, wrong, f"span.{n.NODE_NAME}", "statusMessage"),
    ]


def one_run() -> list[Any]:
    """The trace, and the logs by its id, which every line carries."""
    made = log_panel.Panel().show_time(True).enable_log_details(True).sort_order(common.LogsSortOrder.ASCENDING)
    text = "The chosen run as a waterfall. A span leads to its log lines; its links lead to the nodes it read from."
    said = "Every log line of the chosen run, oldest first: the package's own and those of your code."
    query = ui.logs('{service_name=~"$service"} | trace_id = "$trace_id"')
    return [
        ui.panel(dashboard.Panel().type("traces"), "Trace", text, None, "ns", TALL, ui.traces("$trace_id")),
        ui.panel(made.wrap_log_message(True), "Logs of the run", said, None, "short", TALL, query),
    ]


def dag() -> Any:
    """Two frames: nodes that have an id, edges that have source and target as well. A node that an edge names must
    be there, also if it did not run in the time range, or the panel fails: such nodes come from the edges."""
    edges = f"max by (source, target) ({q.last(q.select(n.NODE_EDGE))})"
    ran = f'label_replace({q.mean(n.NODE_DURATION, "node")}, "id", "$1", "node", "(.+)")'
    ends = [f'label_replace({edges} * 0, "id", "$1", "{end}", "(.+)")' for end in ("source", "target")]
    known = " or ".join([f"sum by (id) ({ran})", *(f"max by (id) ({end})" for end in ends)])
    titled = f'label_replace({known}, "title", "$1", "id", "(.+)")'
    joined = f'label_join({edges}, "id", " -> ", "source", "target")'
    made = nodegraph.Panel().override_by_name("mainstat", [model.DynamicConfigValue("unit", "s")])
    hidden, renamed = {"Time": True, "Value #edges": True}, {"Value #nodes": "mainstat"}
    arranged = {"excludeByName": hidden, "indexByName": {}, "renameByName": renamed}
    made.with_transformation(model.DataTransformerConfig("organize", options=arranged))
    text = "Which node reads from which, and the mean duration of each in the time range."
    return ui.panel(made, "DAG", text, n.NODE_EDGE, "s", TALL, ui.rows(titled, "nodes"), ui.rows(joined, "edges"))


def nodes() -> Any:
    made = ui.grid(
        *NODE, ("Executions", "short"), ("Failed", "short"), ("Mean duration", "s"), ("Rows in", "short"),
        ("Rows out", "short"), ("Retries", "short"), ("Memory", "bytes"),
    )  # fmt: skip
    ran = q.added(q.grown(NODES), *NODE)
    queries = [
        ui.rows(ran), ui.rows(f"{q.added(q.grown(FAILED_NODES), *NODE)} or {ran} * 0"),
        ui.rows(q.mean(n.NODE_DURATION, *NODE)),
        *(ui.rows(q.added(q.grown(q.select(n.NODE_ROWS, direction=way)), *NODE)) for way in ("in", "out")),
        ui.rows(f"{q.added(q.grown(q.select(n.NODE_RETRIES)), *NODE)} or {ran} * 0"),
        ui.rows(q.greatest(q.last(q.select(n.NODE_MEMORY)), *NODE)),
    ]  # fmt: skip
    text = "What each node did in the time range: executions, rows, retries, memory."
    return ui.panel(made, "Nodes", text, n.NODE_ROWS, "short", TALL, *queries)


# --- documents -------------------------------------------------------------------------------------------------------
def board(uid: str, title: str, text: str, found: dict[str, list[Any]]) -> dashboard.Dashboard:
    """A dashboard with what all of them have: variables, annotations, links to one another. Not editable by hand."""
    made = dashboard.Dashboard(title).uid(uid).description(text).tags(["odibi"]).timezone("browser").readonly()
    made.time("now-6h", "now").refresh("30s").tooltip(model.DashboardCursorSync.CROSSHAIR)
    made.variables([*ui.sources(), *ui.filters()])
    made.annotation(ui.mark("Successful runs", "green", "{{pipeline}} succeeded", value_is_time=True))
    made.annotation(ui.mark("Failed runs", "red", "{{pipeline}} failed"))
    link = dashboard.DashboardLink("Odibi").type(model.DashboardLinkType.DASHBOARDS).tags(["odibi"])
    made.link(link.include_vars(True).keep_time(True))
    for heading, panels in found.items():
        made.with_row(dashboard.Row(heading))
        for each in panels:
            made.with_panel(each)
    return made


# Queries of the annotations, by their name.
MARKS: Final = {
    "Successful runs": f"1000 * {q.greatest(q.select(n.PIPELINE_LAST_SUCCESS), 'service', 'pipeline')}",
    "Failed runs": f"{q.added(q.grown(FAILED_RUNS, q.RATE), 'service', 'pipeline')} > 0",
}
DASHBOARDS: Final[dict[str, Callable[[], dashboard.Dashboard]]] = {
    "odibi_overview_dashboard.json": overview,
    "odibi_node_performance_dashboard.json": node_performance,
    "odibi_run_explorer_dashboard.json": run_explorer,
}


def documents() -> dict[str, str]:
    """Return the JSON of each dashboard by its file name. Panel ids and queries of annotations, the SDK has none for;
    without a placement, links and annotations are where one sees them."""
    found = {}
    for name, build in DASHBOARDS.items():
        document = json.loads(json.dumps(build().build(), cls=JSONEncoder))
        for position, each in enumerate(document["panels"], 1):
            each["id"] = position
        for each in document["annotations"]["list"]:
            each["target"] = {"expr": MARKS[each["name"]], "refId": "Anno", "interval": "60s"}
        for each in document["annotations"]["list"] + document["links"]:
            del each["placement"]
        found[name] = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    return found


if __name__ == "__main__":
    for file_name, text in documents().items():
        (FOLDER / file_name).write_text(text, encoding="utf-8")
