"""What a configured `Telemetry` shows of decorated nodes by its `.logger`, `.metrics` and `.events`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import otel_odibi as oo
from otel_odibi.errors import SettingError
from otel_odibi.facts import NodeFinished
from otel_odibi.testing import Capture, capture


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No variable of the machine's, and no pyproject.toml."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@oo.node(layer="ingest", engine="pandas")
def read(rows=3):
    """Return some rows, from a cache where there are none to count."""
    oo.current_node().cache(hit=rows == 0, key="k")
    return list(range(rows))


@oo.node(layer="transform", engine="pandas")
def join(rows):
    """Fail."""
    raise ValueError("no planes, password=hunter2hunter2")


def run_pipeline() -> str:
    """Run two nodes, of which one fails; return the trace id."""
    with pytest.raises(ValueError, match="no planes"), oo.pipeline("flights") as run:
        join(read())
    return run.trace_id


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_know_what_decorated_nodes_did(odibi_capture: Capture) -> None:
    """As if it had been recorded by hand, and without a call."""
    run_pipeline()
    with oo.node("publish") as node:
        for _ in range(2):
            with node.attempt():
                pass
    metrics = odibi_capture.telemetry.metrics
    assert metrics.counters == {
        "success_count:read": 1, "success_count:publish": 1, "failure_count:join": 1, "error_count:join": 1,
        "cache_miss:read": 1, "retry_count:publish": 1,
    }  # fmt: skip
    assert metrics.get_node_stats("join")["failure_count"] == 1
    assert metrics.gauges["memory_usage_mb:read"] == 100
    assert round(metrics.get_error_rate(), 1) == 33.3
    assert [record.metric_type for record in metrics.get_metrics_by_name("join")] == [
        "node_duration_ms", "failure_count", "error_count", "memory_usage_mb",
    ]  # fmt: skip
    assert 'node="read"' in oo.MetricsExporter(metrics).export_prometheus()


def test_a_reset_forgets_what_was_waiting_to_be_counted(odibi_capture: Capture) -> None:
    """Executions are counted when somebody looks; those before a reset never."""
    run_pipeline()
    odibi_capture.telemetry.metrics.reset()
    assert odibi_capture.telemetry.metrics.get_node_stats("read") == {}


def test_all_executions_of_many_threads_are_counted(odibi_capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though they wait, and are counted by whichever thread comes at the bound."""
    monkeypatch.setattr("otel_odibi.manager.UNSETTLED", 7)
    metrics = odibi_capture.telemetry.metrics

    def work() -> None:
        for _ in range(300):
            with oo.node("n"):
                pass
            assert len(metrics._unsettled) <= 7 + 4

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.get_node_stats("n")["executions"] == 1200


# --- logger ----------------------------------------------------------------------------------------------------------


def test_the_logger_reads_what_nodes_wrote_and_writes_beside_it(tmp_path: Path) -> None:
    """On `logs/<service>.jsonl`, with the ids of the span under way."""
    with oo.configure(service_name="flights", directory=tmp_path / "t", set_global=False) as telemetry:
        trace_id = run_pipeline()
        telemetry.logger.log_checkpoint_created("c1", 2)
        assert telemetry.logger.log_file == tmp_path / "t" / "logs" / "flights.jsonl"
        (failed,) = telemetry.logger.query_logs(event_type="node_failed")
        assert (failed["node_name"], failed["trace_id"]) == ("join", trace_id)
        assert "hunter2" not in failed["error"]
        summary = telemetry.logger.get_summary()
        assert summary["by_event_type"]["checkpoint_created"] == summary["by_event_type"]["pipeline_start"] == 1


def test_a_logger_without_a_directory_reads_nothing() -> None:
    """And does no harm."""
    with capture() as captured:
        captured.telemetry.logger.log_node_start("read", "ingest")
        assert captured.telemetry.logger.query_logs() == []
        assert captured.logs[-1]["node_name"] == "read"


# --- events ----------------------------------------------------------------------------------------------------------


def test_hooks_hear_of_decorated_nodes(odibi_capture: Capture) -> None:
    """From the moment the first is registered; before that nobody listens."""
    telemetry, seen = odibi_capture.telemetry, []
    before = telemetry.runtime.listeners[NodeFinished]
    bus = telemetry.events
    assert telemetry.runtime.listeners[NodeFinished] == before
    bus.register_hook("node_failed", seen.append)
    bus.register_hook("pipeline_failed", seen.append)
    trace_id = run_pipeline()
    assert [event["_event_name"] for event in seen] == ["node_failed", "pipeline_failed"]
    assert {event["trace_id"] for event in seen} == {trace_id}
    assert seen[1]["metrics_manager"] is telemetry.metrics
    assert bus is telemetry.events


def test_hooks_find_complete_files(tmp_path: Path) -> None:
    """The run's own span and its metrics are in Parquet when `pipeline_complete` is emitted."""
    found = {}
    with oo.configure(service_name="flights", directory=tmp_path / "t", set_global=False) as telemetry:

        def look(event):
            spans = pq.read_table(tmp_path / "t" / "spans").to_pydict()
            found.update(zip(spans["SpanName"], spans["TraceId"], strict=True))
            found["metrics"] = pq.read_table(tmp_path / "t" / "metrics" / "histogram").num_rows
            found["lines"] = len(telemetry.logger.query_logs(event_type="pipeline_complete"))

        telemetry.events.register_hook("pipeline_complete", look)
        trace_id = run_pipeline()
    assert found["pipeline flights"] == found["node join"] == trace_id
    assert found["metrics"]
    assert found["lines"] == 1


def test_a_file_that_cannot_be_completed_is_not_waited_for(tmp_path: Path) -> None:
    """Longer than `exit_timeout`; what raises is counted."""
    hangs = threading.Event()
    with capture(exit_timeout=0.05) as captured:
        captured.telemetry._files = [lambda ms: 1 / 0 > 0, lambda ms: hangs.wait(60)]
        assert not captured.telemetry.flush_files()
        hangs.set()
        assert captured.metric("odibi.telemetry.dropped", signal="internal", reason="flush") == 1


def test_shutdown_waits_for_hooks(tmp_path: Path) -> None:
    """After all else is done; what hangs is abandoned and counted."""
    running, release = threading.Event(), threading.Event()

    def hang(event):
        running.set()
        release.wait(60)

    telemetry = oo.configure(service_name="flights", directory=tmp_path / "t", set_global=False)
    telemetry.events.register_hook("pipeline_complete", hang, async_execution=True)
    run_pipeline()
    running.wait(60)
    telemetry.shutdown(timeout=0.2)
    release.set()
    assert telemetry.events.abandoned == 1
    assert pq.read_table(tmp_path / "t" / "spans").num_rows == 3


# --- declared in pyproject.toml --------------------------------------------------------------------------------------


def test_operations_need_no_code(tmp_path: Path) -> None:
    """An alert, a stock hook and a function of the user's, all declared; the program knows nothing of them."""
    (tmp_path / "mine.py").write_text("def told(event):\n    print('told of', event['pipeline_name'])\n")
    (tmp_path / "pyproject.toml").write_text("""
[tool.otel-odibi]
service_name = "flights"
directory = "telemetry"
[tool.otel-odibi.alerts.nightly]
quiet_seconds = 3600
[tool.otel-odibi.alerts.numbers]
hook = "metrics_export"
export_dir = "metrics"
formats = ["json"]
[tool.otel-odibi.alerts.mine]
hook = "mine:told"
on = "pipeline_failed"
""")
    program = "import sys, otel_odibi as oo\noo.configure()\n" + (
        "with oo.pipeline('flights') as run:\n    print('trace', run.trace_id)\n    oo.node('join')(lambda: 1 / 0)()\n"
    )
    environ = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{Path(oo.__file__).parents[1]}:."}
    runs = [
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True)
        for _ in range(2)
    ]
    first, second = (run.stdout for run in runs)
    trace_id = first.split()[1]
    assert "ALERT flights: 1 node failed\nfailed: join\nZeroDivisionError: division by zero" in first
    assert f"trace {trace_id}" in first
    assert "ALERT" not in second
    assert all("told of flights" in run.stdout and "ZeroDivisionError" in run.stderr for run in runs)
    documents = [json.loads(path.read_text()) for path in (tmp_path / "metrics").iterdir()]
    assert [document["by_node"][0]["node_name"] for document in documents] == ["join", "join"]


def test_a_declaration_that_cannot_work_stops_configure(tmp_path: Path) -> None:
    """With its place, the value and the remedy; nothing is left behind."""
    (tmp_path / "pyproject.toml").write_text("[tool.otel-odibi.alerts.nightly]\ncondition = 'moon'\n")
    before = threading.active_count()
    with pytest.raises(SettingError, match=r"alerts.nightly\] condition='moon': unknown; choose from failed_nodes"):
        oo.configure(service_name="flights", directory="t", set_global=False)
    assert threading.active_count() == before
    (tmp_path / "pyproject.toml").write_text("[tool.otel-odibi]\nalerts = 3\n")
    with pytest.raises(SettingError, match="not a table"):
        oo.configure(set_global=False)
    oo.configure(set_global=False, enabled=False).shutdown()
