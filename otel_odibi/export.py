"""`MetricsExporter`: what a `MetricsManager` has counted, as Prometheus text, JSON, data frame, Parquet, report."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import orjson

from otel_odibi.exporters import families
from otel_odibi.exporters.files import make_directory, replace_file
from otel_odibi.facts import MetricType
from otel_odibi.logs import timestamp
from otel_odibi.tally import Series, Snapshot

_TOTALS: Final = {
    MetricType.CACHE_HIT: "odibi_cache_hits",
    MetricType.CACHE_MISS: "odibi_cache_misses",
    MetricType.ERROR_COUNT: "odibi_errors",
}


class MetricsExporter:
    """Exports what a `MetricsManager` has: all totals, and the latest single records. Safe from any thread.

    Saving makes folders and whole files, and raises OSError where it fails.
    """

    def __init__(self, metrics_manager: Any) -> None:
        self.metrics_manager = metrics_manager

    def export_prometheus(self, include_help: bool = True) -> str:
        """Return the text format 0.0.4, without HELP and TYPE lines where `include_help` is false.

        By node and labels it has odibi_node_duration_ms, odibi_throughput_rows_per_sec and further types' last values,
        odibi_success_count_total, _failure_count_total, _retry_count_total; of all nodes together
        odibi_cache_hits_total, _cache_misses_total, _errors_total, _cache_hit_rate (percent), _uptime_seconds.
        """
        text = families.expose([family.metric() for family in self._families()]).decode()
        if include_help:
            return text
        return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))

    def _families(self) -> Iterator[families.Family]:
        found: Snapshot = self.metrics_manager.snapshot()
        for kind in MetricType:
            of_kind = [series for series in found if series.kind is kind]
            if kind in _TOTALS:
                total = sum(series.sum for series in of_kind)
                yield _single(_TOTALS[kind], "counter", f"Total of {kind.value}, of all nodes.", total)
            else:
                yield _family(kind, of_kind)
        yield _single("odibi_metrics", "counter", "Values recorded.", sum(series.times for series in found))
        yield _single("odibi_cache_hit_rate", "gauge", "Cache hits per 100 lookups.", found.hit_rate())
        yield _single("odibi_uptime_seconds", "gauge", "Time since counting began.", self.metrics_manager.uptime())

    def export_json(self, pretty: bool = True) -> str:
        """Return export_time, summary, aggregations by type, the records by_node, counters and gauges, as JSON."""
        manager = self.metrics_manager
        summary, found = manager.get_summary(), manager.snapshot()
        by_node: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for r in manager.metrics:
            value = {"type": r.metric_type, "value": r.value, "timestamp": r.timestamp, "labels": r.labels}
            by_node[r.name].append(value)
        rates = {"cache_hit_rate": found.hit_rate(), "error_rate": found.error_rate()}
        rates["avg_throughput"] = found.of(MetricType.THROUGHPUT)["avg"]
        document = {
            "export_time": timestamp(time.time_ns()),
            "summary": {key: summary[key] for key in ("total_metrics", "uptime_seconds")} | rates,
            **{key: summary[key] for key in ("aggregations", "counters", "gauges")},
            "by_node": [{"node_name": name, "metrics": values} for name, values in by_node.items()],
        }
        return as_json(document, pretty)

    def export_dataframe(self) -> Any:
        """Return a pandas DataFrame, a row a record: metric_type, name, value, timestamp (UTC), a column a label."""
        import pandas as pd

        records = self.metrics_manager.metrics
        frame = pd.DataFrame({name: [getattr(r, name) for r in records] for name in ("metric_type", "name", "value")})
        frame["timestamp"] = pd.to_datetime([r.timestamp for r in records], unit="s", utc=True)
        for key in sorted({key for record in records for key in record.labels}):
            frame[f"label_{key}"] = [record.labels.get(key) for record in records]
        return frame

    def save_prometheus(self, path: str | os.PathLike[str]) -> None:
        """Write `export_prometheus()`, mode 0644 for node_exporter, which is another user."""
        save(path, self.export_prometheus().encode(), 0o644)

    def save_json(self, path: str | os.PathLike[str], pretty: bool = True) -> None:
        """Write `export_json()`."""
        save(path, self.export_json(pretty).encode())

    def save_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write a row for each record, always in the same columns: all labels are in the map `labels`."""
        import pyarrow as pa

        from otel_odibi.exporters.columns import FLOAT, MAP, TEXT, TIME
        from otel_odibi.exporters.tables import to_parquet

        records = self.metrics_manager.metrics
        columns = {
            "metric_type": pa.array([r.metric_type for r in records], TEXT),
            "name": pa.array([r.name for r in records], TEXT),
            "value": pa.array([r.value for r in records], FLOAT),
            "timestamp": pa.array([round(r.timestamp * 1e9) for r in records], TIME),
            "label_engine": pa.array([r.labels.get("engine") for r in records], TEXT),
            "labels": pa.array([list(r.labels.items()) for r in records], MAP),
        }
        save(path, to_parquet([pa.RecordBatch.from_pydict(columns)]))

    def get_node_summary(self, node_name: str) -> dict[str, Any]:
        """Return a node's total_executions, durations in ms and avg_throughput; {} if it is not known."""
        found = self.metrics_manager.snapshot(node_name)
        return _summary(found) if found else {}

    def generate_report(self) -> str:
        """Return a text for people: rates, then a line a node."""
        found: Snapshot = self.metrics_manager.snapshot()
        lines = ["=" * 70, "ODIBI CORE Metrics Report", "=" * 70, f"Generated: {timestamp(time.time_ns())}"]
        lines += [f"Uptime: {self.metrics_manager.uptime():.2f} s", f"Total Metrics: {sum(s.times for s in found)}", ""]
        lines += [f"Cache Hit Rate: {found.hit_rate():.1f}%", f"Error Rate: {found.error_rate():.1f}%"]
        lines += [f"Avg Throughput: {found.of(MetricType.THROUGHPUT)['avg']:.2f} rows/sec", ""]
        for node in map(_summary, found.by_name()):
            durations = f"Avg: {node['avg_duration_ms']:>10.2f} ms  Executions: {node['total_executions']:>6}"
            lines.append(f"{' '.join(node['node_name'].split()):<30} {durations}")
        return "\n".join([*lines, "=" * 70])


def _summary(found: Snapshot) -> dict[str, Any]:
    return {
        "node_name": found[0].name,
        "total_executions": int(found.executions()),
        **found.durations(),
        "avg_throughput": found.of(MetricType.THROUGHPUT)["avg"],
    }


def _family(kind: MetricType, found: list[Series]) -> families.Family:
    """Return a type's family by node. Of series whose labels come out alike a counter has the sum, a gauge the last."""
    from otel_odibi.exporters.translate import _labels

    is_total = kind.value.endswith("_count")
    values: dict[families.Labels, float] = defaultdict(float)
    for series in sorted(found, key=attrgetter("time_unix_nano")):
        labels = _labels({**dict(series.labels), "node": series.name})
        value = series.sum if is_total or series.counted else series.last
        values[labels] = value + (values[labels] if is_total else 0)
    text = f"{'Total' if is_total else 'Last'} {kind.value} of a node."
    samples = {labels: families.Series(value) for labels, value in values.items()}
    return families.Family(f"odibi_{kind.value}", "counter" if is_total else "gauge", text, "", samples)


def _single(name: str, kind: families.Kind, text: str, value: float) -> families.Family:
    return families.Family(name, kind, text, "", {(): families.Series(value)})


def as_json(document: Any, pretty: bool = True) -> str:
    """Return JSON text, indented where it shall be pretty."""
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 if pretty else 0).decode()


def save(path: str | os.PathLike[str], data: Any, mode: int = 0o640) -> None:
    """Write a file whole, and the folders above it. Raises OSError."""
    make_directory(Path(path).parent)
    replace_file(Path(path), data, mode)
