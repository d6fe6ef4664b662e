"""Dashboards and alerts against a real Prometheus: needs prometheus and promtool (Debian: apt-get install prometheus),
docker-compose, and Go, which the collector is built with.

Processes that use the package run pipelines that hit and miss a cache, retry, fail and lose telemetry; Prometheus
scrapes, each second, the endpoint of one and the collector that another sends OTLP to. What Grafana would ask is
asked, variables substituted as Grafana does.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from programs import Prometheus, Sink, environment, otelcol, otlp_sink, prometheus, wait_for
from test_grafana import DASHBOARDS, ROOT, panels_of, queries_of

pytestmark = pytest.mark.stack

RULES = ROOT / "grafana" / "rules"

PIPELINES = """
import sys, threading, time
import pandas as pd
import otel_odibi as oo
from otel_odibi.exporters.json import JsonSpanExporter

export, disk = JsonSpanExporter.export, threading.Event()
disk.set()
JsonSpanExporter.export = lambda self, spans: disk.wait() and export(self, spans)
service, directory, mood = sys.argv[1:]
telemetry = oo.configure(service_name=service, environment="test", directory=directory, prometheus_port=0, logs=False,
                         span_formats="json", metric_formats="none", span_queue=1024, span_interval=0.1)
bad = threading.Event()

def again(pipeline, pause=0.1):
    def loop():
        for turn in range(1_000_000):
            try:
                with oo.pipeline(pipeline.__name__):
                    pipeline(turn)
            except ValueError:
                pass
            time.sleep(pause)
    threading.Thread(target=loop, daemon=True).start()

@oo.node(layer="ingest", engine="pandas")
def read(rows, hit=True):
    oo.current_node().cache(hit=hit, key="k")
    return pd.DataFrame({"row": range(rows)})

@oo.node(layer="transform", engine="pandas")
def clean(table, pause=0.0, fail=False):
    for number in (1, 2):
        try:
            with oo.current_node().attempt():
                if number == 1:
                    raise TimeoutError
        except TimeoutError:
            pass
    time.sleep(pause)
    if fail:
        raise ValueError("bad data")
    return table.head(-5)

def daily(turn): clean(read(50, hit=turn % 2 == 0), fail=turn % 3 == 2)
def steady(turn): clean(read(50))
def failing(turn): clean(read(50), fail=bad.is_set())
def slow(turn): clean(read(50), pause=1.2 if bad.is_set() else 0.0)
def shrinking(turn): read(10 if bad.is_set() else 50)
def missing(turn): read(50, hit=not bad.is_set())

@oo.node
def ready(): pass

def lose():
    disk.clear()
    with oo.pipeline("burst"):
        for _ in range(5_000):
            ready()
    disk.set()
    telemetry.flush()

if mood == "quiet":
    for _ in range(2):
        with oo.pipeline("quiet"):
            ready()
elif mood == "mixed":
    lose()
    again(daily)
else:
    for pipeline in (steady, failing, slow, shrinking, missing):
        again(pipeline)
print(telemetry.prometheus_url.split("/")[2], flush=True)
for line in sys.stdin:
    bad.set()
    lose()
"""


@contextmanager
def feeder(folder: Path, service: str, mood: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run pipelines until the block ends: `quiet` (two runs that succeed), `mixed`, or `steady` until told otherwise.
    Yields the process and the address of its endpoint."""
    command = [sys.executable, "-c", PIPELINES, service, str(folder), mood]
    pipe, env = subprocess.PIPE, environment(variables | {"PYTHONPATH": str(ROOT)})
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env, cwd=folder) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()


def scraping(jobs: dict[str, str], rules: Path | None = None) -> str:
    """Return a configuration of Prometheus: a scrape of each address a second, what it says of job and host kept."""
    scraped = [
        {"job_name": job, "honor_labels": True, "static_configs": [{"targets": [at]}]} for job, at in jobs.items()
    ]
    every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    return json.dumps({"global": every, "scrape_configs": scraped, "rule_files": [str(rules)] if rules else []})


def values(made: Prometheus, expression: str, *, instant: bool = True) -> list[float]:
    """Return all finite values that a panel with this query would show."""
    if instant:
        found = [series["value"] for series in made.query(expression)]
    else:
        now = time.time()
        data = made.get("query_range", query=expression, start=now - 10, end=now, step=1)
        found = [point for series in data["result"] for point in series["values"]]
    return [float(value) for _, value in found if math.isfinite(float(value))]


class Stack(NamedTuple):
    """What the tests of dashboards share."""

    prometheus: Prometheus
    folder: Path
    sink: Sink

    def trace_ids(self, service: str) -> set[str]:
        """Return the ids of all traces that a service wrote, or that came out of the collector."""
        if service == "orders":
            return {span.trace_id.hex() for span in self.sink.spans}
        return set(re.findall(r'"traceId":\s*"(\w+)"', "".join(p.read_text() for p in self.folder.glob("otlp/*"))))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two processes with everything going on, one scraped, one behind the collector, and one that did little."""
    names = ("flights", "orders", "quiet", "collector", "prometheus")
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    with ExitStack() as on:
        sink = on.enter_context(otlp_sink())
        behind = {"TEMPO_ENDPOINT": sink.http, "LOKI_ENDPOINT": sink.http, "OTELCOL_SPAN_METRICS_INTERVAL": "2s"}
        collector = on.enter_context(otelcol("local.yaml", folders["collector"], **behind))
        otlp = collector.otlp("grpc") | {"OTEL_METRIC_EXPORT_INTERVAL": "1000"}
        _, flights = on.enter_context(feeder(folders["flights"], "flights", "mixed"))
        _, quiet = on.enter_context(feeder(folders["quiet"], "quiet", "quiet"))
        on.enter_context(feeder(folders["orders"], "orders", "mixed", **otlp))
        jobs = {"odibi": flights, "idle": quiet, "otel-collector": collector.metrics_url.split("/")[2]}
        made = on.enter_context(prometheus(scraping(jobs), folders["prometheus"]))
        runs = "min_over_time(odibi_pipeline_duration_seconds_count[30s] offset 10s)"
        wait_for(lambda: len(values(made, runs)) >= 7, "series of runs of all three, ten seconds old")
        yield Stack(made, folders["flights"], sink)


ALL = {
    **dict.fromkeys(("environment", "service", "pipeline", "node"), ".*"), **dict.fromkeys(("job", "instance"), ".+"),
    "__range": "600s", "__rate_interval": "5s",
}  # fmt: skip
CHOSEN = {
    "all": ALL,
    "endpoint": ALL | {"environment": "(test|prod)", "service": "flights", "job": "odibi"},
    "collector": ALL | {"environment": "test", "service": "orders", "job": "orders"},
}


def substituted(expression: str, variables: dict[str, str]) -> str:
    """Return the query with its variables as Grafana puts them in; one that is not known stays and fails."""
    return re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), expression)


QUERIES = [
    pytest.param(query, id=f"{name.removesuffix('_dashboard.json')}: {query['title']} {query['refId']}")
    for name, dashboard in DASHBOARDS.items()
    for query in queries_of(dashboard, "prometheus")
]


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("query", QUERIES)
def test_every_query_of_every_panel_returns_data(stack: Stack, query: dict[str, Any], chosen: str) -> None:
    """And so does each selector in it, so that no `or vector(0)` covers a metric that is not there."""
    expression = substituted(query["expr"], CHOSEN[chosen])
    wait_for(lambda: values(stack.prometheus, expression, instant=query.get("instant", False)), expression)
    for selector in set(re.findall(r"odibi_\w+\{[^}]*\}", expression)):
        assert values(stack.prometheus, f"last_over_time({selector}[600s])"), selector


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_variable_has_values(stack: Stack, name: str) -> None:
    """`label_values(series, label)` is asked as Grafana's Prometheus data source asks it."""
    for variable in DASHBOARDS[name]["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()
            assert stack.prometheus.get(f"label/{label}/values", **{"match[]": substituted(series, ALL)})


@pytest.mark.parametrize("chosen", ["endpoint", "collector"])
def test_exemplars_lead_to_traces_that_exist(stack: Stack, chosen: str) -> None:
    """Of every query that asks for exemplars, in all dashboards."""
    asked = [q for each in DASHBOARDS.values() for q in queries_of(each, "prometheus") if q.get("exemplar")]
    assert len(asked) == 4
    for query in asked:
        expression = substituted(query["expr"], CHOSEN[chosen] | {"pipeline": "daily"})
        span = {"start": time.time() - 600, "end": time.time()}
        data = stack.prometheus.get("query_exemplars", query=expression, **span)
        recent = [e for series in data for e in series["exemplars"] if e["timestamp"] > span["end"] - 60]
        found = {exemplar["labels"]["trace_id"] for exemplar in recent}
        assert found, query["title"]
        service = CHOSEN[chosen]["service"]
        wait_for(lambda found=found, service=service: found <= stack.trace_ids(service), "spans of all exemplars")


def test_quiet_pipelines_show_zeros_and_their_first_runs(stack: Stack) -> None:
    """Two runs that ended before the first scrape are counted; what never happened is 0, not nothing and not NaN."""
    shown = {}
    for panel in panels_of(DASHBOARDS["odibi_overview_dashboard.json"]):
        if panel["type"] in ("stat", "gauge"):
            expression = substituted(panel["targets"][0]["expr"], ALL | {"service": "quiet"})
            shown[panel["title"]] = values(stack.prometheus, expression)
            assert shown[panel["title"]] or panel["fieldConfig"]["defaults"]["noValue"]
    fresh, uptime = shown.pop("Time since last success"), shown.pop("System uptime")
    assert [len(fresh), len(uptime)] == [1, 1]
    assert shown == {
        "Runs": [2], "Run success rate": [1], "Failed runs": [0], "Error count": [0], "Cache hit rate": [],
        "Retries": [0], "Active runs": [0], "Active nodes": [0], "Telemetry dropped": [0],
    }  # fmt: skip


def test_the_dag_names_no_node_that_is_missing(stack: Stack) -> None:
    """Grafana's node graph fails on an edge from or to a node that is not among its nodes."""
    (dag,) = (p for p in panels_of(DASHBOARDS["odibi_run_explorer_dashboard.json"]) if p["type"] == "nodeGraph")
    nodes, edges = (
        [series["metric"] for series in stack.prometheus.query(substituted(target["expr"], ALL))]
        for target in dag["targets"]
    )
    assert sorted(node["id"] for node in nodes) == ["clean", "read", "ready"]
    assert all(node["title"] == node["id"] for node in nodes)
    assert edges == [{"id": "read -> clean", "source": "read", "target": "clean"}]


SHORT = {"1m": "1s", "5m": "1s", "15m": "8s", "1h": "8s", "7d": "60s"}


def test_every_alert_fires_when_its_fault_is_injected(tmp_path: Path) -> None:
    """With windows of seconds instead of hours; each names the pipeline it is about, and none the one that is well."""
    text = (RULES / "odibi.rules.yaml").read_text().replace("> 93600", "> 10")
    rules, alerts = tmp_path / "rules.yaml", set(re.findall(r"alert: (\w+)", text))
    rules.write_text(re.sub(r"(\[|offset |for: |interval: )(\d+\w)", lambda found: found[1] + SHORT[found[2]], text))
    fired: dict[str, set[str]] = {}

    def note(made: Prometheus) -> set[str]:
        for alert in made.get("alerts")["alerts"]:
            if alert["state"] == "firing":
                fired.setdefault(alert["labels"]["alertname"], set()).add(alert["labels"].get("pipeline", ""))
        return set(fired)

    with (
        feeder(tmp_path, "flights", "steady") as (process, address),
        prometheus(scraping({"odibi": address}, rules), tmp_path) as made,
    ):
        usual = "pipeline_node:odibi_node_rows_out:mean1h offset 12s"
        wait_for(lambda: len(values(made, usual)) >= 8, "what is usual of each node")
        assert note(made) == set()
        assert process.stdin is not None
        process.stdin.write("now\n")
        process.stdin.flush()
        wait_for(lambda: note(made) == alerts - {"OdibiEndpointDown"}, "all alerts but that of the endpoint")
        process.kill()
        wait_for(lambda: note(made) == alerts, "all alerts")
    assert "failing" in fired.pop("OdibiPipelineStale")
    assert fired == {
        "OdibiRunFailed": {"failing"}, "OdibiNodeSlow": {"slow"}, "OdibiRowsDropped": {"shrinking"},
        "OdibiCacheHitRateLow": {"missing"}, "OdibiTelemetryDropped": {""}, "OdibiEndpointDown": {""},
    }  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ["promtool", "check", "rules", "grafana/rules/odibi.rules.yaml"],
        ["promtool", "test", "rules", "grafana/rules/odibi.rules.test.yaml"],
        ["docker-compose", "-f", "collector-config/compose.yaml", "config"],
    ],
    ids=["check", "test", "compose"],
)
def test_rules_their_cases_and_the_compose_file_are_valid(command: list[str]) -> None:
    """The cases run the rules with their real windows, over hours of made-up time."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
