"""`MetricsExporter`: Prometheus text that parsers accept, JSON, data frames, Parquet of fixed columns, the report."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from otel_odibi.export import MetricsExporter
from otel_odibi.exporters import files
from otel_odibi.manager import MetricsManager, MetricType


@pytest.fixture
def metrics() -> MetricsManager:
    return MetricsManager()


@pytest.fixture
def exporter(metrics: MetricsManager) -> MetricsExporter:
    return MetricsExporter(metrics)


def parsed(text: str) -> dict[str, Metric]:
    """Return the families of a text by name, after checking what the official parser lets pass."""
    families = list(text_string_to_metric_families(text))
    series = [(sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples]
    assert len(series) == len(set(series))
    assert len(families) == len({family.name for family in families})
    assert text.endswith("\n")
    return {family.name: family for family in families}


def value(text: str, name: str, **labels: str) -> float:
    found = [s.value for f in parsed(text).values() for s in f.samples if (s.name, s.labels) == (name, labels)]
    assert len(found) == 1, (name, labels, text)
    return float(found[0])


# --- Prometheus ------------------------------------------------------------------------------------------------------


def test_the_families_of_phase_8(metrics: MetricsManager, exporter: MetricsExporter) -> None:
    """Durations and throughput by node, totals and rates of all nodes."""
    metrics.record_node_execution("read", 125.5, True, engine="spark", rows=1000, cached=True)
    metrics.record_node_execution("join", 50.0, False)
    text = exporter.export_prometheus()
    assert value(text, "odibi_node_duration_ms", node="read", engine="spark") == 125.5
    assert value(text, "odibi_throughput_rows_per_sec", node="read", engine="spark") == pytest.approx(7968.1, abs=0.1)
    assert value(text, "odibi_cache_hits_total") == value(text, "odibi_cache_misses_total") == 1
    assert value(text, "odibi_cache_hit_rate") == 50.0
    assert value(text, "odibi_errors_total") == 1
    assert value(text, "odibi_uptime_seconds") >= 0
    assert value(text, "odibi_success_count_total", node="read", engine="spark") == 1
    assert {name: family.type for name, family in parsed(text).items() if name.startswith("odibi_cache")} == {
        "odibi_cache_hits": "counter", "odibi_cache_misses": "counter", "odibi_cache_hit_rate": "gauge",
    }  # fmt: skip


def test_an_empty_manager_exports_its_families(exporter: MetricsExporter) -> None:
    """So that a dashboard finds them from the start."""
    found = parsed(exporter.export_prometheus())
    assert {"odibi_node_duration_ms", "odibi_throughput_rows_per_sec", "odibi_errors"} <= found.keys()
    assert value(exporter.export_prometheus(), "odibi_cache_hits_total") == 0


def test_counters_count_what_was_counted(metrics: MetricsManager, exporter: MetricsExporter) -> None:
    """Five hits at once are five, four failures are four errors: running totals are not added up again."""
    metrics.increment(MetricType.CACHE_HIT, "join", 5)
    for _ in range(4):
        metrics.record_node_execution("bad", 1.0, False)
    text = exporter.export_prometheus()
    assert value(text, "odibi_cache_hits_total") == 5
    assert value(text, "odibi_errors_total") == 4
    assert value(text, "odibi_failure_count_total", node="bad", engine="pandas") == 4


def test_a_node_has_one_series_however_often_it_runs(metrics: MetricsManager, exporter: MetricsExporter) -> None:
    """With the last duration."""
    for duration in (1.0, 2.0, 3.0):
        metrics.record_node_execution("read", duration, True)
    assert value(exporter.export_prometheus(), "odibi_node_duration_ms", node="read", engine="pandas") == 3.0


def test_a_type_is_either_counter_or_gauge(metrics: MetricsManager, exporter: MetricsExporter) -> None:
    """However it was recorded."""
    metrics.record(MetricType.RETRY_COUNT, "n", 2)
    metrics.increment(MetricType.RETRY_COUNT, "n", 3)
    metrics.record(MetricType.DATA_SIZE, "a", 100)
    metrics.increment(MetricType.DATA_SIZE, "b", 7)
    metrics.increment(MetricType.DATA_SIZE, "b", 7)
    text = exporter.export_prometheus()
    assert value(text, "odibi_retry_count_total", node="n") == 5
    assert (value(text, "odibi_data_size_bytes", node="a"), value(text, "odibi_data_size_bytes", node="b")) == (100, 14)


def test_labels_that_come_out_alike_make_one_series(metrics: MetricsManager, exporter: MetricsExporter) -> None:
    """Prometheus allows fewer characters in a label's name; `node` is ours."""
    metrics.increment(MetricType.RETRY_COUNT, "n", 2, {"a b": "x"})
    metrics.increment(MetricType.RETRY_COUNT, "n", 3, {"a-b": "x"})
    metrics.record(MetricType.DATA_SIZE, "n", 1, {"a b": "x", "node": "other"})
    metrics.record(MetricType.DATA_SIZE, "n", 2, {"a-b": "x"})
    text = exporter.export_prometheus()
    assert value(text, "odibi_retry_count_total", node="n", a_b="x") == 5
    assert value(text, "odibi_data_size_bytes", node="n", a_b="x") == 2


def test_without_help_there_are_samples_alone(metrics: MetricsManager, exporter: MetricsExporter) -> None:
    """They are the same."""
    metrics.record_node_execution("read", 1.0, True)
    bare = exporter.export_prometheus(include_help=False)
    assert "#" not in bare
    assert bare.startswith('odibi_node_duration_ms{engine="pandas",node="read"} 1.0\n')


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(MetricType), st.text(), st.dictionaries(st.text(), st.text()), st.floats(), st.booleans()
        )
    )
)
def test_any_names_and_labels_make_a_valid_text(records: list[tuple[Any, str, dict[str, str], float, bool]]) -> None:
    """The official parser reads it: escaped labels, no series twice, one type a family, a newline at the end."""
    metrics = MetricsManager()
    for kind, name, labels, number, counted in records:
        (metrics.increment if counted else metrics.record)(kind, name, number, labels)
        metrics.record_node_execution(name, number, counted, rows=3)
    parsed(MetricsExporter(metrics).export_prometheus())


# --- JSON, data frame, Parquet ---------------------------------------------------------------------------------------


def test_the_json_document(metrics: MetricsManager, exporter: MetricsExporter) -> None:
    """Summary, aggregations, records by node, counters and gauges."""
    metrics.record_node_execution("read", 100.0, True, rows=1000)
    metrics.increment(MetricType.CACHE_HIT, "join")
    found = json.loads(exporter.export_json())
    assert found["export_time"].endswith("Z")
    assert found["summary"].keys() == {
        "total_metrics", "uptime_seconds", "cache_hit_rate", "error_rate", "avg_throughput",
    }  # fmt: skip
    assert (found["summary"]["total_metrics"], found["summary"]["cache_hit_rate"]) == (5, 50.0)
    assert (found["summary"]["error_rate"], found["summary"]["avg_throughput"]) == (0.0, 10_000.0)
    assert [node["node_name"] for node in found["by_node"]] == ["read", "join"]
    assert found["by_node"][0]["metrics"][0] == {
        "type": "node_duration_ms", "value": 100.0, "labels": {"engine": "pandas"},
        "timestamp": metrics.metrics[0].timestamp,
    }  # fmt: skip
    assert found["counters"]["cache_hit:join"] == 1.0
    assert found["gauges"]["node_duration_ms:read"] == 100.0
    assert found["aggregations"]["node_duration_ms"]["avg"] == 100.0
    assert "\n" not in exporter.export_json(pretty=False)


def test_the_data_frame(metrics: MetricsManager, exporter: MetricsExporter) -> None:
    """A row a record, a column a label, times that know their zone."""
    pytest.importorskip("pandas")
    metrics.record(MetricType.NODE_DURATION, "node1", 125.5, labels={"engine": "pandas", "layer": "bronze"})
    metrics.record(MetricType.NODE_DURATION, "node2", 200.0)
    frame = exporter.export_dataframe()
    assert list(frame.columns) == ["metric_type", "name", "value", "timestamp", "label_engine", "label_layer"]
    assert frame["name"].tolist() == ["node1", "node2"]
    assert frame["label_layer"].tolist()[0] == "bronze"
    assert str(frame["timestamp"].dt.tz) == "UTC"


def test_a_data_frame_of_nothing_has_its_columns(exporter: MetricsExporter) -> None:
    """So that what selects from it goes on working."""
    pytest.importorskip("pandas")
    assert list(exporter.export_dataframe().columns) == ["metric_type", "name", "value", "timestamp"]


def test_parquet_has_the_same_columns_whatever_the_labels(tmp_path: Path) -> None:
    """Files of many runs are one dataset."""
    schemas = []
    for number, labels in enumerate(({}, {"engine": "spark"}, {"team": "data", "run": 7})):
        metrics = MetricsManager()
        if number:
            metrics.record(MetricType.DATA_SIZE, "n", 1.5, labels)
        MetricsExporter(metrics).save_parquet(tmp_path / "runs" / f"{number}.parquet")
        schemas.append(pq.read_schema(tmp_path / "runs" / f"{number}.parquet"))
    assert schemas[0] == schemas[1] == schemas[2]
    table = pq.read_table(tmp_path / "runs")
    assert table.column_names == ["metric_type", "name", "value", "timestamp", "label_engine", "labels"]
    assert table["label_engine"].to_pylist() == ["spark", None]
    assert table["labels"].to_pylist() == [[("engine", "spark")], [("run", "7"), ("team", "data")]]


# --- files -----------------------------------------------------------------------------------------------------------


def test_saving_makes_folders_and_whole_files(
    metrics: MetricsManager, exporter: MetricsExporter, tmp_path: Path
) -> None:
    """Each format, to a path as text or object; node_exporter may read the .prom file."""
    metrics.record_node_execution("read", 1.0, True)
    folder = tmp_path / "a" / "b"
    exporter.save_prometheus(str(folder / "m.prom"))
    exporter.save_json(folder / "m.json", pretty=False)
    exporter.save_parquet(folder / "m.parquet")
    assert parsed((folder / "m.prom").read_text())
    assert json.loads((folder / "m.json").read_text())["summary"]
    assert pq.read_table(folder / "m.parquet").num_rows == 3
    assert sorted(path.name for path in folder.iterdir()) == ["m.json", "m.parquet", "m.prom"]
    if os.name == "posix":
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE((folder / "m.prom").stat().st_mode) == 0o644 & ~umask


def test_a_failed_save_leaves_the_old_file(
    metrics: MetricsManager, exporter: MetricsExporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was, with no temporary one beside it; the caller, who asked for it, hears of the failure."""
    path = tmp_path / "m.json"
    exporter.save_json(path)
    before = path.read_bytes()
    metrics.record_node_execution("read", 1.0, True)

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        exporter.save_json(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- for people ------------------------------------------------------------------------------------------------------


def test_the_summary_of_a_node(metrics: MetricsManager, exporter: MetricsExporter) -> None:
    """{} for one that is not known."""
    for duration in (100.0, 200.0, 150.0):
        metrics.record(MetricType.NODE_DURATION, "node1", duration)
    metrics.record(MetricType.THROUGHPUT, "node1", 5000.0)
    assert exporter.get_node_summary("node1") == {
        "node_name": "node1", "total_executions": 3, "avg_duration_ms": 150.0, "min_duration_ms": 100.0,
        "max_duration_ms": 200.0, "avg_throughput": 5000.0,
    }  # fmt: skip
    assert exporter.get_node_summary("node2") == {}


def test_the_report(metrics: MetricsManager, exporter: MetricsExporter) -> None:
    """A title, the rates, and a line a node."""
    metrics.record_node_execution("read", 125.5, True, cached=True)
    metrics.record_node_execution("two\nlines", 10.0, False)
    lines = exporter.generate_report().splitlines()
    assert "ODIBI CORE Metrics Report" in lines
    assert "Cache Hit Rate: 50.0%" in lines
    assert "Error Rate: 50.0%" in lines
    assert [line.split() for line in lines if "Executions" in line] == [
        ["read", "Avg:", "125.50", "ms", "Executions:", "1"],
        ["two", "lines", "Avg:", "10.00", "ms", "Executions:", "1"],
    ]
