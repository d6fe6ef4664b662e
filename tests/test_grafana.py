"""Dashboards, rules and the compose files, as far as Python alone can check them.

The rules of Grafana's dashboard-linter (https://github.com/grafana/dashboard-linter, docs/rules) have tests of their
names here. What needs a real Prometheus is in test_dashboards_stack.py.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from otel_odibi import names

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "grafana" / "dashboards"
DASHBOARDS: dict[str, Any] = {path.name: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}
RULES: dict[str, Any] = yaml.safe_load((ROOT / "grafana/rules/odibi.rules.yaml").read_text())
COMPOSE = ROOT / "collector-config"

UNITS = {"short", "percentunit", "s", "ns", "bytes", "cps", "cpm", "opm", "dateTimeFromNow"}
"""Units we use, all of them in Grafana's list of value formats, where the linter looks them up."""

SELECTOR = re.compile(r"\b((?:odibi|traces)_\w+)(\{[^}]*\})?")
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum")}
METRICS = {i.prometheus + suffix for i in names.INSTRUMENTS for suffix in SUFFIXES.get(i.kind, ("",))}
SPANS = "traces_span_metrics_duration_seconds_bucket"
"""Of the collector's span_metrics connector, for its exemplars."""
COUNTERS = {i.prometheus for i in names.INSTRUMENTS if i.kind == "counter"}

each_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)


def panels_of(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that show something: all but the headings."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries_of(dashboard: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """Return all queries to a kind of data source, of panels and annotations, with the title of what they are for."""
    asked = [{"title": panel["title"]} | target for panel in panels_of(dashboard) for target in panel["targets"]]
    marks = dashboard["annotations"]["list"]
    asked += [{"title": mark["name"], "datasource": mark["datasource"]} | mark["target"] for mark in marks]
    return [query for query in asked if query["datasource"]["type"] == source]


def variables_of(dashboard: dict[str, Any], kind: str) -> dict[str, Any]:
    return {each["name"]: each for each in dashboard["templating"]["list"] if each["type"] == kind}


each_promql = pytest.mark.parametrize(
    "expr",
    [
        pytest.param(query["expr"], id=f"{name}: {query['title']} {query['refId']}")
        for name, dashboard in DASHBOARDS.items()
        for query in queries_of(dashboard, "prometheus")
    ],
)


# --- what is asked of the dashboards ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2:DeprecationWarning")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk needs Python 3.11")
def test_the_files_are_what_the_builder_writes(monkeypatch):
    """`python -m grafana.build` brings them in step."""
    monkeypatch.syspath_prepend(str(ROOT))
    from grafana import build

    assert build.documents() == {path.name: path.read_text("utf-8") for path in FOLDER.glob("*.json")}


PROMISED = {
    "odibi_overview_dashboard.json": {
        "Pipeline execution rate", "Cache hit rate", "Error count", "Data throughput", "Cache hits vs misses",
        "System uptime", "Time since last success", "Active runs", "Active nodes", "Retries", "Telemetry dropped",
        "Run duration", "Run duration, heatmap",
    },
    "odibi_node_performance_dashboard.json": {
        "Node execution duration", "Node execution duration, heatmap", "Data throughput", "Cache hits vs misses",
        "Node success/failure rates", "Memory usage", "Top 10 slowest nodes",
    },
    "odibi_run_explorer_dashboard.json": {"Recent runs", "Trace", "Logs of the run", "DAG", "Nodes"},
}  # fmt: skip


@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_panel_is_there(name):
    """Titles are unique within a dashboard, so are panel ids; each query has a name of its own in its panel."""
    panels = panels_of(DASHBOARDS[name])
    titles = [panel["title"] for panel in panels]
    assert PROMISED[name] <= set(titles)
    assert len(titles) == len(set(titles))
    assert len({panel["id"] for panel in DASHBOARDS[name]["panels"]}) == len(DASHBOARDS[name]["panels"])
    for panel in panels:
        refs = [target["refId"] for target in panel["targets"]]
        assert all(refs)
        assert len(refs) == len(set(refs))


@each_dashboard
def test_every_dashboard_can_be_filtered(dashboard):
    """By environment, which may be unset, service, pipeline, node, job and instance; data sources are chosen too."""
    assert list(variables_of(dashboard, "datasource")) == [f"{s}_datasource" for s in ("prometheus", "tempo", "loki")]
    filters = ["environment", "service", "pipeline", "node", "job", "instance"]
    assert list(variables_of(dashboard, "query")) == filters
    assert [mark["name"] for mark in dashboard["annotations"]["list"]] == ["Successful runs", "Failed runs"]


@each_dashboard
def test_links_lead_to_dashboards_that_exist(dashboard):
    """With variables that exist there."""
    known = {each["uid"]: {v["name"] for v in each["templating"]["list"]} for each in DASHBOARDS.values()}
    rules = [alert["annotations"]["dashboard"] for alert in alerts()]
    for url in re.findall(r'"url": "(/d/[^"]+)"', json.dumps(dashboard)) + rules:
        uid = re.split(r"[/?]", url)[2]
        assert set(re.findall(r"var-(\w+)=|\$\{(\w+):queryparam", url)) <= {
            pair for name in known[uid] for pair in ((name, ""), ("", name))
        }


@each_promql
def test_every_metric_is_one_of_ours(expr):
    """By the name that Prometheus sees; beside them, the durations that the collector makes of spans."""
    assert {name for name, _ in SELECTOR.findall(expr)} <= METRICS | {SPANS}


# --- the rules of dashboard-linter -----------------------------------------------------------------------------------


@each_dashboard
def test_template_rules_and_uneditable_dashboard(dashboard):
    """template-datasource-rule, template-job-rule, template-instance-rule, template-label-promql-rule,
    template-on-time-change-reload-rule, uneditable-dashboard: names, labels and kinds of variables."""
    for name, variable in variables_of(dashboard, "datasource").items():
        kind = variable["query"]
        assert (name, variable["label"]) == (f"{kind}_datasource", f"{kind.title()} data source")
    for name, variable in variables_of(dashboard, "query").items():
        assert (variable["datasource"]["uid"], variable["refresh"]) == ("${prometheus_datasource}", 2)
        (metric,) = re.fullmatch(r"label_values\((\w+)\{[^}]*\}, \w+\)", variable["query"]).groups()
        assert metric in METRICS
        assert (variable["label"], variable["multi"]) == (name.title(), True)
        assert variable["allValue"] == (".+" if name in ("job", "instance") else ".*")
    assert dashboard["editable"] is False


@each_dashboard
def test_panel_rules(dashboard):
    """panel-datasource-rule, panel-title-description-rule, panel-units-rule, panel-no-targets-rule: the linter asks
    that of some kinds of panels, we do of all."""
    pickers = {f"${{{name}}}" for name in variables_of(dashboard, "datasource")}
    for panel in panels_of(dashboard):
        assert {panel["datasource"]["uid"], *(t["datasource"]["uid"] for t in panel["targets"])} <= pickers
        assert panel["title"]
        assert len(panel["description"]) > 20
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["targets"]


@each_promql
def test_target_rules(expr):
    """target-job-rule, target-instance-rule: every selector has both matchers.

    target-rate-interval-rule: `rate()` is always over `$__rate_interval`. `increase()` may be over the whole range too,
    as the linter allows: a total of the range is what a job that runs once a day is asked for.

    target-counter-agg-rule: counters are only used through `rate` and `increase`; beside an `increase`, `min_over_time`
    and `offset` find the first value of a counter that is born in the range, which `increase` does not see.

    target-promql-rule: proven by a real Prometheus. It does not apply to tables that ask Tempo; `.lint` says so.
    """
    for found in SELECTOR.finditer(expr):
        assert {'job=~"$job"', 'instance=~"$instance"'} <= set(found[2].strip("{}").split(", "))
        before, after = expr[: found.start()], expr[found.end() :]
        if found[1] in COUNTERS and not re.search(r"(rate|increase)\($", before):
            assert before.endswith("min_over_time(") or after.startswith(" offset ")
            assert "increase(" in before
    assert set(re.findall(r"rate\([^\[]+\[([^\]]+)\]", expr)) <= {"$__rate_interval"}
    assert set(re.findall(r"\[([^\]]+)\]", expr)) <= {"$__rate_interval", "$__range"}


# --- Tempo and Loki: the fields that their data sources read ---------------------------------------------------------


@each_dashboard
def test_queries_to_tempo_and_loki_have_what_grafana_expects(dashboard):
    """Types and fields as in Grafana's schemas of both; attributes of spans are those that this package writes.
    target-logql-rule, target-logql-auto-rule: a selector first, no range."""
    written = {value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)}
    for query in queries_of(dashboard, "tempo"):
        assert (query["queryType"], query["tableType"]) == ("traceql", "spans")
        assert (type(query["limit"]), type(query["spss"])) == (int, int)
        assert set(re.findall(r"(?:span|resource)\.([\w.]+)", query["query"])) <= written
        assert re.fullmatch(r"\$trace_id|\{ .+ \} \| select\([\w., ]+\) with \(most_recent = true\)", query["query"])
    for query in queries_of(dashboard, "loki"):
        assert (query["queryType"], query["direction"], type(query["maxLines"])) == ("range", "forward", int)
        assert query["expr"] == '{service_name=~"$service"} | trace_id = "$trace_id"'


def test_the_run_explorer_goes_from_run_to_trace_to_logs():
    """A click on a run sets the trace id that the trace and the logs are asked by."""
    panels = {panel["title"]: panel for panel in panels_of(DASHBOARDS["odibi_run_explorer_dashboard.json"])}
    kinds = [panels[t]["type"] for t in ("Recent runs", "Trace", "Logs of the run", "DAG", "Nodes")]
    assert kinds == ["table", "traces", "logs", "nodeGraph", "table"]
    for title in ("Recent runs", "Failed nodes"):
        assert "var-trace_id=${__data.fields.traceIdHidden}" in json.dumps(panels[title]["fieldConfig"]["overrides"])
    assert panels["Trace"]["targets"][0]["query"] == "$trace_id"
    assert [target["refId"] for target in panels["DAG"]["targets"]] == ["nodes", "edges"]


# --- rules, provisioning, compose ------------------------------------------------------------------------------------


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]


def test_every_alert_says_how_grave_it_is_and_what_happened():
    """And has a case in the file that promtool runs; every metric is one of ours or recorded."""
    recorded = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
    cases = (ROOT / "grafana/rules/odibi.rules.test.yaml").read_text()
    assert len(alerts()) == 7
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {"summary", "description", "dashboard"} == set(rule["annotations"])
        assert f"alertname: {rule['alert']}\n        exp_alerts" in cases
    for rule in (rule for group in RULES["groups"] for rule in group["rules"]):
        for used in re.findall(r"(?<!:)\b(?:\w+:)?odibi_\w+(?::\w+)?", rule["expr"]):
            assert used in METRICS | recorded, used


def test_data_sources_are_linked_to_one_another():
    """Exemplar to trace, trace to logs and metrics, log line to trace; every one that is named exists."""
    text = (ROOT / "grafana/provisioning/datasources/odibi.yaml").read_text()
    found = {source["uid"]: source["jsonData"] for source in yaml.safe_load(text)["datasources"]}
    assert set(re.findall(r"datasourceUid: (\w+)", text)) <= set(found)
    assert [each["name"] for each in found["prometheus"]["exemplarTraceIdDestinations"]] == ["trace_id", "trace_id"]
    assert found["tempo"]["tracesToLogsV2"]["datasourceUid"] == "loki"
    assert found["tempo"]["tracesToMetrics"]["datasourceUid"] == "prometheus"
    assert {name for name, _ in SELECTOR.findall(text) if name.startswith("odibi_node")} <= METRICS
    assert found["loki"]["derivedFields"][0]["datasourceUid"] == "tempo"


def test_the_compose_file_pins_images_and_listens_on_loopback():
    """No password is in it, and every file that it mounts is there."""
    services = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    assert set(services) == {"collector", "tempo", "loki", "prometheus", "alertmanager", "grafana"}
    for service in services.values():
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for mount in (each for each in service.get("volumes", []) if each.startswith(".")):
            assert (COMPOSE / mount.split(":")[0]).exists(), mount
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "${ODIBI_GRAFANA_PASSWORD:-}"
    assert services["grafana"]["environment"]["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"].endswith(":-true}")
