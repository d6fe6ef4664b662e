"""Phase 8: its usage examples, with their imports changed and nothing else, and its faults in logs and metrics."""

from __future__ import annotations

import json
import re
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

import otel_odibi as oo
from otel_odibi import LogLevel, MetricsExporter, MetricsManager, MetricType, StructuredLogger
from otel_odibi.testing import Capture

STRUCTURED_LOGGING = """
from odibi_core.observability import StructuredLogger

logger = StructuredLogger("my_pipeline", log_dir="logs")

logger.log_node_start("read_data", "ingest", engine="pandas")
logger.log_node_complete("read_data", duration_ms=125.5, rows=1000)

# Query logs
errors = logger.query_logs(level=LogLevel.ERROR)
"""

METRICS_EXPORT = """
from odibi_core.metrics import MetricsManager
from odibi_core.observability import MetricsExporter

metrics = MetricsManager()
# ... run pipeline, record metrics ...

exporter = MetricsExporter(metrics)

# Export to different formats
exporter.save_json("metrics/run_001.json")
exporter.save_prometheus("metrics/run_001.prom")
exporter.save_parquet("metrics/run_001.parquet")

# Print human-readable report
print(exporter.generate_report())
"""

EVENT_HOOKS = """
from odibi_core.observability import EventBus, EventPriority

bus = EventBus()

# Register built-in hooks
bus.register_hook("pipeline_complete", bus.create_summary_hook())
bus.register_hook("pipeline_complete", bus.create_metrics_export_hook("metrics/"))
bus.register_hook("pipeline_complete", bus.create_alert_hook(threshold_failed=3))

# Custom hook
def custom_notification(event_data):
    print(f"Pipeline {event_data['pipeline_name']} completed!")

bus.register_hook("pipeline_complete", custom_notification, priority=EventPriority.HIGH)

# Emit event
bus.emit("pipeline_complete", {
    "pipeline_name": "energy_efficiency",
    "success_count": 10,
    "failed_count": 0,
    "duration_ms": 5000.0,
    "metrics_manager": metrics
})
"""


def run(example: str, session: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run an example with its imports from here; the first uses `LogLevel` without importing it."""
    session = {"LogLevel": LogLevel} if session is None else session
    body = re.sub(r"^from odibi_core\.\w+ import", "from otel_odibi import", example, flags=re.MULTILINE)
    assert "odibi_core" not in body
    exec(compile(body, "example", "exec"), session)
    return session


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_structured_logging(tmp_path: Path) -> None:
    """Two lines in the file, and no errors among them."""
    session = run(STRUCTURED_LOGGING)
    assert session["errors"] == []
    (path,) = (tmp_path / "logs").glob("my_pipeline_*.jsonl")
    start, complete = (json.loads(line) for line in path.read_text().splitlines())
    assert (start["node_name"], start["layer"], start["status"]) == ("read_data", "ingest", "running")
    assert (complete["duration_ms"], complete["row_count"], complete["status"]) == (125.5, 1000, "success")


def test_metrics_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three files and a report; where the example says so, something is recorded."""
    recording = "metrics.record_node_execution('read_data', 125.5, True, rows=1000)"
    run(METRICS_EXPORT)
    run(METRICS_EXPORT.replace("# ... run pipeline, record metrics ...", recording))
    assert json.loads((tmp_path / "metrics" / "run_001.json").read_text())["by_node"][0]["node_name"] == "read_data"
    assert list(text_string_to_metric_families((tmp_path / "metrics" / "run_001.prom").read_text()))
    assert pq.read_table(tmp_path / "metrics" / "run_001.parquet").num_rows == 4
    assert "read_data" in capsys.readouterr().out


def test_event_hooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary is printed, the metrics are exported, no alert is raised, the custom hook runs first."""
    session = run(EVENT_HOOKS, {"metrics": MetricsManager()})
    session["bus"].shutdown()
    printed = capsys.readouterr().out
    assert printed.startswith("Pipeline energy_efficiency completed!\n")
    assert "energy_efficiency" in printed.partition("\n")[2]
    assert {path.suffix for path in (tmp_path / "metrics").glob("metrics_*")} == {".json", ".prom"}
    assert "alert" not in printed.lower()


# --- faults of the logger --------------------------------------------------------------------------------------------


@pytest.fixture
def logger(tmp_path: Path) -> StructuredLogger:
    return StructuredLogger("flights", log_dir=tmp_path)


def events(logger: StructuredLogger) -> list[str]:
    return [json.loads(line)["event_type"] for line in logger.log_file.read_text().splitlines()]


def test_threads_with_large_records_corrupt_no_line(tmp_path: Path) -> None:
    """Four threads, 200 records of 20 kB each, with rotation under way: all 800 are there, once. It was 353 of 800."""
    logger = StructuredLogger("busy", log_dir=tmp_path, max_file_size_mb=1)
    text = "x" * 20_000

    def work(thread: int) -> None:
        for number in range(200):
            logger.log("info", "work", text, key=f"{thread}-{number}")

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = logger.query_logs(limit=10_000)
    assert {line["key"] for line in found} == {f"{thread}-{number}" for thread in range(4) for number in range(200)}
    assert len(found) == 800
    assert all(len(line["message"]) == 20_000 for line in found)


def test_a_datetime_in_metadata_neither_raises_nor_tears_the_line(logger: StructuredLogger) -> None:
    """The next record is a line of its own."""
    logger.log_node_start("read", "ingest", metadata={"since": datetime.now(timezone.utc)})
    logger.log_node_complete("read", 1.0)
    assert events(logger) == ["node_start", "node_complete"]


def test_unknown_fields_integer_keys_and_slashes_do_not_raise(tmp_path: Path) -> None:
    """They are written."""
    logger = StructuredLogger("team/flights", log_dir=tmp_path)
    logger.log(LogLevel.INFO, "x", "y", no_such_field=1)
    logger.log_cache_hit("join", 12345)
    assert events(logger) == ["x", "cache_hit"]


def test_nan_is_valid_json(logger: StructuredLogger) -> None:
    """It is null."""
    logger.log_node_complete("read", float("nan"))
    assert "NaN" not in logger.log_file.read_text()
    assert logger.query_logs()[0]["duration_ms"] is None


def test_rotating_twice_in_a_second_keeps_both_files(tmp_path: Path) -> None:
    """And queries and summary know rotated segments; `limit` keeps the newest, errors are the last ten."""
    logger = StructuredLogger("flights", log_dir=tmp_path, max_file_size_mb=0.001)
    for number in range(30):
        logger.log_error("read", f"error {number} {'x' * 200}")
    assert [line["error"].split()[1] for line in logger.query_logs(limit=2)] == ["28", "29"]
    summary = logger.get_summary()
    assert summary["total_entries"] == 30
    assert [error["error"].split()[1] for error in summary["errors"]] == [str(number) for number in range(20, 30)]


def test_loggers_started_together_do_not_share_a_file(tmp_path: Path) -> None:
    """Not even under one name."""
    assert StructuredLogger("a", tmp_path).log_file != StructuredLogger("a", tmp_path).log_file


def test_timestamps_know_their_zone(logger: StructuredLogger) -> None:
    """UTC."""
    logger.log_node_start("read", "ingest")
    assert logger.query_logs()[0]["timestamp"].endswith("Z")


def test_secrets_do_not_pass_through(logger: StructuredLogger) -> None:
    """In metadata or in errors."""
    logger.log_node_failed("read", "password=hunter2", metadata={"token": "hunter2"})
    assert "hunter2" not in logger.log_file.read_text()


# --- faults of the metrics -------------------------------------------------------------------------------------------


@pytest.fixture
def metrics() -> MetricsManager:
    return MetricsManager()


def samples(metrics: MetricsManager) -> dict[str, float]:
    """Return the samples without labels, after the official parser has taken the text."""
    text = MetricsExporter(metrics).export_prometheus()
    assert text.endswith("\n")
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert len({(sample.name, *sorted(sample.labels.items())) for sample in found}) == len(found)
    return {sample.name: sample.value for sample in found if not sample.labels}


def test_executions_are_not_kept_for_ever(metrics: MetricsManager) -> None:
    """Their totals are."""
    for _ in range(12_000):
        metrics.record_node_execution("read", 1.0, True)
    assert len(metrics.metrics) == 30_000
    assert metrics.get_summary()["total_metrics"] == 36_000


def test_the_official_parser_takes_the_text(metrics: MetricsManager) -> None:
    """No series twice, labels escaped, a newline at the end, no family both counter and gauge."""
    for _ in range(2):
        metrics.record_node_execution('quote " slash \\ line \n', 1.0, True)
        metrics.increment(MetricType.RETRY_COUNT, "read")
        metrics.record(MetricType.RETRY_COUNT, "read", 1)
    assert samples(metrics)["odibi_cache_misses_total"] == 2


def test_four_failures_are_four_errors(metrics: MetricsManager) -> None:
    """And an error rate of 100 %. It was 10 errors, and 1000 %."""
    for _ in range(4):
        metrics.record_node_execution("read", 1.0, False)
    assert samples(metrics)["odibi_errors_total"] == 4
    assert metrics.get_error_rate() == 100.0


def test_an_increment_by_five_exports_five(metrics: MetricsManager) -> None:
    """It was 1."""
    metrics.increment(MetricType.CACHE_HIT, "join", 5)
    assert samples(metrics)["odibi_cache_hits_total"] == 5
    assert samples(metrics)["odibi_cache_hit_rate"] == 100


def test_zero_rows_give_a_throughput(metrics: MetricsManager) -> None:
    """Of zero."""
    metrics.record_node_execution("read", 10.0, True, rows=0)
    assert [r.value for r in metrics.get_metrics_by_type(MetricType.THROUGHPUT)] == [0.0]


def test_uncacheable_nodes_miss_no_cache(odibi_capture: Capture, metrics: MetricsManager) -> None:
    """Decorated ones, that is: by hand, `cached=False` counts as a miss, as it always did."""
    for fact, listener in metrics.listeners().items():
        odibi_capture.telemetry.subscribe(fact, listener)
    with oo.node("read"):
        pass
    assert "cache_miss:read" not in metrics.counters
    metrics.record_node_execution("read", 1.0, True)
    assert metrics.counters["cache_miss:read"] == 1


def test_files_appear_whole(metrics: MetricsManager, tmp_path: Path) -> None:
    """Whoever watches the folder sees the old file or the new one, never half of one."""
    path = tmp_path / "m.prom"
    MetricsExporter(metrics).save_prometheus(path)
    with path.open() as old:
        metrics.record_node_execution("read", 1.0, True)
        MetricsExporter(metrics).save_prometheus(path)
        assert "read" not in old.read()
    assert "read" in path.read_text()


def test_parquet_columns_do_not_vary_with_the_labels(tmp_path: Path) -> None:
    """All labels are in one map."""
    for number in range(2):
        metrics = MetricsManager()
        metrics.record(MetricType.DATA_SIZE, "n", 1.0, {f"label{number}": "x"})
        MetricsExporter(metrics).save_parquet(tmp_path / f"{number}.parquet")
    assert pq.read_schema(tmp_path / "0.parquet") == pq.read_schema(tmp_path / "1.parquet")
