"""odibi under instrumentation: one trace a run, attempts, rows, phases, stories, alerts and outcomes, and no harm done.

odibi has pins of its own, and so an environment of its own: `make test-odibi`.
"""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("odibi", reason="odibi pins other versions than the rest of the tests: make test-odibi")

import odibi.cli.main  # so that `untouched` looks at all of it
import pandas as pd
from odibi.config import AlertConfig, PipelineConfig, RetryConfig
from odibi.pipeline import Pipeline, PipelineManager, PipelineResults
from odibi.registry import FunctionRegistry, transform
from odibi.utils import alerting, telemetry
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import otel_odibi as oo
from otel_odibi.integrations import odibi as integration
from otel_odibi.integrations.odibi import OdibiInstrumentor
from otel_odibi.testing import Capture, DagNode, capture, untouched

pytestmark = pytest.mark.filterwarnings("default")  # odibi's own are its business
SERIAL_AND_PARALLEL = pytest.mark.parametrize("parallel", [False, True], ids=["serial", "parallel"])
PARENT = "pipeline shop"
TRIES: dict[str, Iterator[int]] = {}


@pytest.fixture(autouse=True)
def instrumented(tmp_path, monkeypatch) -> Iterator[None]:
    """Instrument odibi for the test, in a directory of its own, with the transforms `make` and `fail`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FunctionRegistry, "_functions", dict(FunctionRegistry._functions))
    monkeypatch.setattr(FunctionRegistry, "_signatures", dict(FunctionRegistry._signatures))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # odibi waits a second and more before it tries again

    @transform
    def make(context, current=None, rows: int = 1, failures: int = 0, name: str = ""):
        oo.get_logger().info("making", rows=rows)
        if next(TRIES.setdefault(name, itertools.count())) < failures:
            raise KeyError("customer")
        return pd.DataFrame({"x": range(rows)})

    logging.disable(logging.CRITICAL)
    OdibiInstrumentor().instrument()
    yield
    OdibiInstrumentor().uninstrument()
    logging.disable(logging.NOTSET)


def step(name: str, *depends_on: str, **params: object) -> dict[str, object]:
    function = {"function": "make", "params": {**params, "name": name}}
    return {"name": name, "depends_on": list(depends_on), "transform": {"steps": [function]}}


SHOP = [
    step("orders", rows=3),
    step("totals", "orders", rows=2),
    step("rates", "orders", rows=2, failures=1),
    step("join", "totals", "rates", failures=9),
    step("publish", "join"),
]
"""Five nodes: two side by side, one of them fails once, one fails for good, and one is skipped for that."""


def shop(nodes: list[dict[str, object]] = SHOP, attempts: int = 2, **options: object) -> Pipeline:
    TRIES.clear()
    options = {"generate_story": False, **options}
    retry = RetryConfig(enabled=attempts > 1, max_attempts=attempts, backoff="constant")
    return Pipeline(PipelineConfig(pipeline="shop", layer="silver", nodes=nodes), retry_config=retry, **options)


def six() -> Pipeline:
    return shop([step(f"node_{number}", rows=number, failures=number // 5) for number in range(6)], attempts=1)


def native_spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Have odibi's own tracer record, as it does in a program that sets a global provider."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", provider.get_tracer("odibi"))
    return exporter


def test_six_nodes_in_parallel_are_one_trace_where_they_were_six(monkeypatch) -> None:
    """odibi's own spans, six roots without a status, become nodes of one run, and are not there twice."""
    OdibiInstrumentor().uninstrument()
    native = native_spans(monkeypatch)
    six().run(parallel=True)
    alone = native.get_finished_spans()
    assert len({span.context.trace_id for span in alone}) == len(alone) == 6
    assert {span.status.status_code.name for span in alone} == {"UNSET"}

    native.clear()
    OdibiInstrumentor().instrument()
    with capture() as captured:
        assert six().run(parallel=True).failed == ["node_5"]
        spans = captured.spans
    assert len({span.context.trace_id for span in spans}) == 1
    assert Counter(span.name.split()[0] for span in spans) == {"pipeline": 1, "node": 6, "attempt": 1}
    assert not native.get_finished_spans()
    failed = captured.node("node_5")
    assert (failed.status.status_code.name, failed.attributes["error.type"]) == ("ERROR", "KeyError")


@SERIAL_AND_PARALLEL
def test_a_run_is_one_trace_whatever_threads_its_nodes_run_in(parallel: bool, odibi_capture: Capture) -> None:
    """Parallel branches, a retried node, a failing one, and one that is skipped for that."""
    results = shop().run(parallel=parallel, on_error="fail_later")
    assert (results.failed, results.skipped) == (["join"], ["publish"])
    assert odibi_capture.dag() == {
        "orders": DagNode("success", rows=3, parent=PARENT),
        "totals": DagNode("success", rows=2, after=("orders",), parent=PARENT),
        "rates": DagNode("success", rows=2, attempts=2, after=("orders",), parent=PARENT),
        "join": DagNode("failure", attempts=2, after=("rates", "totals"), parent=PARENT),
        "publish": DagNode("skipped", after=("join",), parent=PARENT),
    }
    assert len({span.context.trace_id for span in odibi_capture.spans}) == 1
    assert odibi_capture.node("publish").attributes["odibi.node.skip.reason"] == "dependency_failed"


def test_a_failure_that_is_returned_is_a_failure_all_the_same(odibi_capture: Capture) -> None:
    """Pipeline, node and each attempt have the exception of the node's own code, not odibi's around it."""
    shop().run()
    for name in ("pipeline shop", "node join", "attempt 1", "attempt 2"):
        span = odibi_capture.span(name)
        assert (span.status.status_code.name, span.attributes["error.type"]) == ("ERROR", "KeyError")
    assert odibi_capture.metric("odibi.pipeline.duration", outcome="failure") == 0
    assert [point.count for point in odibi_capture.metrics if point.name == "odibi.pipeline.duration"] == [1]


def test_a_node_tells_where_it_belongs_and_what_it_took_and_gave(odibi_capture: Capture) -> None:
    """Layer and engine come from the configuration, rows from its tables; odibi's own attributes stay."""
    shop(SHOP[:2]).run()
    found = odibi_capture.node("totals").attributes
    assert {key: found[key] for key in ("odibi.node.layer", "odibi.node.engine", "node.engine")} == {
        "odibi.node.layer": "silver", "odibi.node.engine": "pandas", "node.engine": "PandasEngine",
    }  # fmt: skip
    assert (found["odibi.node.rows.in"], found["odibi.node.rows.out"]) == (3, 2)
    assert found["odibi.node.columns"] == ("x",)


@SERIAL_AND_PARALLEL
def test_what_a_node_logs_leads_to_its_span(parallel: bool, odibi_capture: Capture) -> None:
    """Lines of a transform carry pipeline, node, layer and trace id, in a pool's threads too."""
    shop(SHOP[:2]).run(parallel=parallel)
    lines = [record for record in odibi_capture.logs if record["message"] == "making"]
    assert [(line["pipeline"], line["node_name"], line["layer"]) for line in lines] == [
        ("shop", "orders", "silver"), ("shop", "totals", "silver"),
    ]  # fmt: skip
    assert int(lines[1]["trace_id"], 16) == odibi_capture.node("totals").context.trace_id


def test_phases_of_an_attempt_are_an_event(odibi_capture: Capture) -> None:
    """With the milliseconds of each phase that took any; one event an attempt."""
    shop(SHOP[:3]).run()
    events = [event for event in odibi_capture.node("rates").events if event.name == "phase_timings"]
    assert [event.attributes["attempt"] for event in events] == [1, 2]
    assert events[1].attributes["transform_ms"] > 0


def test_nodes_that_a_failure_kept_from_running_are_skipped(odibi_capture: Capture) -> None:
    """With `fail_fast` odibi itself says nothing of them."""
    results = shop([step("first", failures=9), step("other"), step("last", "first")]).run(on_error="fail_fast")
    assert results.skipped == []
    assert {name: node.outcome for name, node in odibi_capture.dag().items()} == {
        "first": "failure", "other": "skipped", "last": "skipped",
    }  # fmt: skip
    assert odibi_capture.node("last").attributes["odibi.node.skip.reason"] == "not reached"


def test_nodes_that_are_switched_off_are_skipped_and_those_not_chosen_are_not_there(odibi_capture: Capture) -> None:
    """A run of chosen nodes is no run of the others."""
    nodes = [SHOP[0], {**step("off"), "enabled": False}, step("other")]
    shop(nodes).run(node="orders")
    assert {name: node.outcome for name, node in odibi_capture.dag().items()} == {
        "orders": "success", "off": "skipped",
    }  # fmt: skip
    assert odibi_capture.node("off").attributes["odibi.node.skip.reason"] == "disabled"


def test_nodes_of_a_dry_run_are_skipped(odibi_capture: Capture) -> None:
    """Nothing was executed, so nothing took any time, or gave any rows."""
    shop(SHOP[:2]).run(dry_run=True)
    assert odibi_capture.dag()["totals"] == DagNode("skipped", after=("orders",), parent=PARENT)
    assert not [point for point in odibi_capture.metrics if point.name == "odibi.node.duration"]


def test_a_node_that_could_not_even_be_made_is_a_failure(odibi_capture: Capture, monkeypatch) -> None:
    """There is no execution to tell of it, only the result."""

    def no_node(**options: object) -> None:
        raise PermissionError("no state store")

    monkeypatch.setattr("odibi.pipeline.Node", no_node)
    shop(SHOP[:1]).run()
    assert odibi_capture.dag() == {"orders": DagNode("failure", parent=PARENT)}
    assert odibi_capture.node("orders").attributes["error.type"] == "PermissionError"


def test_a_run_that_raises_ends_as_a_failure(odibi_capture: Capture) -> None:
    """The exception is odibi's own, and untouched."""
    with pytest.raises(ValueError, match="no_such"):
        shop().run(node="no_such")
    assert odibi_capture.pipeline("shop").attributes["error.type"] == "ValueError"


def test_story_and_alerts_are_events_of_the_pipeline(odibi_capture: Capture) -> None:
    """An alert tells its kind, its channel and whether it went out, and keeps its address to itself."""
    alerting.get_throttler().reset()
    refused = AlertConfig(type="slack", url="http://127.0.0.1:9/secret", on_events=["on_start", "on_failure"])
    results = shop(generate_story=True, alerts=[refused]).run()
    events = odibi_capture.pipeline("shop").events
    assert [dict(event.attributes) for event in events if event.name == "story"] == [{"path": results.story_path}]
    assert [dict(event.attributes) for event in events if event.name == "alert"] == [
        {"event_type": "on_start", "channel": "slack", "sent": False},
        {"event_type": "on_failure", "channel": "slack", "sent": False},
    ]


def write_project(directory: Path) -> Path:
    """Write a project of two pipelines, the second of which reads what the first has written."""
    (directory / "data").mkdir()
    (directory / "data" / "orders.csv").write_text("customer,amount\nann,3\nbob,4\nann,5\n", encoding="utf-8")
    local = {"connection": "local", "format": "csv"}
    sql = "SELECT customer, SUM(amount) AS total FROM orders GROUP BY customer"
    project = {
        "project": "shops",
        "connections": {"local": {"type": "local", "base_path": "data"}},
        "story": {"connection": "local", "path": "stories"},
        "system": {"connection": "local", "path": "system", "async_derived_updates": False},
        "logging": {"level": "ERROR"},
        "pipelines": [
            {"pipeline": "bronze", "layer": "bronze", "nodes": [
                {"name": "orders", "read": {**local, "path": "orders.csv"}},
                {"name": "totals", "depends_on": ["orders"], "transform": {"steps": [{"sql": sql}]},
                 "write": {**local, "path": "totals.csv", "mode": "overwrite"}},
            ]},
            {"pipeline": "gold", "layer": "gold", "nodes": [
                {"name": "report", "read": {**local, "path": "totals.csv"}},
            ]},
        ],
    }  # fmt: skip
    path = directory / "shops.yaml"
    path.write_text(json.dumps(project), encoding="utf-8")  # which YAML is a superset of
    return path


def test_a_run_of_several_pipelines_is_one_trace(odibi_capture: Capture, tmp_path, capsys) -> None:
    """Named as the project; a run of one alone has no other span around it."""
    project = str(write_project(tmp_path))
    PipelineManager.from_yaml(project).run()
    parents = {name: node.parent for name, node in odibi_capture.dag().items()}
    assert parents == {"orders": "pipeline bronze", "totals": "pipeline bronze", "report": "pipeline gold"}
    assert odibi_capture.node("orders").attributes["odibi.node.rows.in"] == 3
    assert len({span.context.trace_id for span in odibi_capture.spans}) == 1
    assert odibi_capture.pipeline("bronze").parent.span_id == odibi_capture.pipeline("shops").context.span_id
    PipelineManager.from_yaml(project).run("gold")
    assert odibi_capture.pipeline("gold").parent is None


@pytest.mark.parametrize("command", [["otel-odibi"], ["opentelemetry-instrument", "otel-odibi"]], ids=len)
def test_odibis_command_needs_no_code(command: list[str], tmp_path) -> None:
    """`otel-odibi run` finds the integration; so does `opentelemetry-instrument`, and it is switched on but once."""
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        [*(str(scripts / name) for name in command), "run", "-m", "odibi", "run", str(write_project(tmp_path))],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "instrumented" not in done.stdout + done.stderr  # neither twice, nor a word of engines that are not there
    lines = [json.loads(line) for line in Path("telemetry/logs/odibi.jsonl").read_text(encoding="utf-8").splitlines()]
    finished = {line["node_name"]: line["row_count"] for line in lines if line["event_type"] == "node_complete"}
    assert finished == {"orders": 3, "totals": 2, "report": 2}
    assert len({line["trace_id"] for line in lines}) == 1
    text = Path("telemetry/prometheus/odibi.prom").read_text(encoding="utf-8")
    durations = [line for line in text.splitlines() if line.startswith("odibi_node_duration_seconds_count")]
    assert len(durations) == 3  # ours alone: odibi's own histogram has the same name in Prometheus


def outcome_of(results: PipelineResults) -> dict[str, object]:
    """Return what odibi's own code tells of a run, without times and paths."""
    lists = {"completed": sorted(results.completed), "failed": results.failed, "skipped": results.skipped}
    rows = {name: result.rows_processed for name, result in results.node_results.items()}
    return lists | rows | {name: str(result.error) for name, result in results.node_results.items()}


@pytest.mark.parametrize(
    "broken", ["node", "pipeline", "_error_of", "_first_error", "_left_out", "_measure", "_phases"]
)
@SERIAL_AND_PARALLEL
def test_what_fails_in_the_integration_fails_nothing_else(broken: str, parallel: bool, monkeypatch) -> None:
    """The results are those of odibi alone, whatever of its objects could not be read."""
    OdibiInstrumentor().uninstrument()
    alone = outcome_of(shop().run(parallel=parallel))
    OdibiInstrumentor().instrument()

    def fail(*args: object, **kwargs: object) -> None:
        raise AttributeError("of another shape")

    monkeypatch.setattr(integration, broken, fail)
    with capture():
        assert outcome_of(shop().run(parallel=parallel)) == alone


def test_values_of_strange_shapes_do_no_harm(odibi_capture: Capture) -> None:
    """A result without what the integration looks for is returned as it is."""
    flow = shop(SHOP[:1])
    flow.config.__dict__["pipeline"] = object()  # a name that is no text
    flow.engine.name = None
    results = flow.run()
    assert results.completed == ["orders"]
    assert odibi_capture.dag()["orders"].rows == 3


def test_without_telemetry_it_runs_as_ever(monkeypatch) -> None:
    """Nothing is configured here: results are the same, and odibi's own spans are recorded as ever."""
    OdibiInstrumentor().uninstrument()
    alone = outcome_of(shop().run())
    native = native_spans(monkeypatch)
    OdibiInstrumentor().instrument()
    assert outcome_of(shop().run()) == alone
    assert {span.name for span in native.get_finished_spans()} == {"node_execution"}


def test_uninstrument_puts_everything_back() -> None:
    """Every attribute of every module and class of the engine is the one it was."""
    OdibiInstrumentor().uninstrument()
    with untouched("odibi"):
        OdibiInstrumentor().instrument()
        assert hasattr(odibi.pipeline.send_alert, "__wrapped__")
        OdibiInstrumentor().uninstrument()
    OdibiInstrumentor().instrument()
