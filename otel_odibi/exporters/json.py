"""Spans as OTLP/JSON lines, and metrics as one JSON document for dashboards.

::

    <target>/otlp/<service>.traces.jsonl     a line is an ExportTraceServiceRequest: what the collector's otlpjsonfile
                                             receiver reads, and what an OTLP/HTTP endpoint takes as application/json
    <target>/json/<service>.metrics.json     the metrics as they were at the last export; the file is replaced whole

The metrics document::

    {"export_time": "2025-11-23T10:15:30.123456Z",
     "resource": {"service.name": "flights", ...},
     "metrics": [{"name": "odibi.node.duration", "description": "...", "unit": "s", "type": "histogram",
                  "temporality": "cumulative",
                  "points": [{"attributes": {...}, "start_time": "...", "time": "...", "count": 3, "sum": 1.5,
                              "min": 0.1, "max": 1.0, "bounds": [0.5], "buckets": [1, 2], "exemplars": [...]}]}]}

`type` is gauge, sum (with `monotonic`), histogram or exponential_histogram. A gauge's or sum's point has `value`; a
histogram's `buckets` has one count more than there are `bounds`; an exponential one has `scale`, `zero_count`,
`positive` and `negative` ({"offset", "buckets"}). `exemplars` is there where there are any. NaN and infinities, which
JSON has not, are null. Several processes of one service that share a directory replace each other's document.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from opentelemetry.sdk.metrics.export import (
    ExponentialHistogram,
    Gauge,
    Histogram,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_odibi.errors import SettingError
from otel_odibi.exporters.files import OnDrop, Target, make_directory, reason_of, replace_file
from otel_odibi.exporters.jsonl import JsonlSink, safe_name
from otel_odibi.exporters.otlpjson import dump, encode_spans, span_lines
from otel_odibi.forks import after_fork
from otel_odibi.names import SERVICE_NAME

__all__ = ["JsonMetricExporter", "JsonSpanExporter", "encode_spans", "span_lines"]

_SPANS: Final = 1_000
_TYPES: Final[Mapping[type, str]] = {
    Gauge: "gauge", Sum: "sum", Histogram: "histogram", ExponentialHistogram: "exponential_histogram",
}  # fmt: skip


class JsonSpanExporter(SpanExporter):
    """Writes spans to `<target>/otlp/<service>.traces.jsonl`, a line a batch, which is on disk when `export` returns.

    `target` is a local directory, by default that of OTEL_ODIBI_DIRECTORY, then `telemetry`; `service` is by default
    that of the first span's resource. The file is rotated at `max_bytes`, segments are kept up to `retention_bytes`;
    `on_drop(reason, count)` hears of every span that could not be written.

    Thread-safe; safe for several processes on one directory, and across fork. Raises `SettingError` for arguments that
    cannot work, nothing later.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | None = None,
        *,
        service: str | None = None,
        max_bytes: int = 100 * 2**20,
        retention_bytes: int = 2 * 2**30,
        on_drop: OnDrop | None = None,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("retention_bytes", retention_bytes)):
            if value < 1:
                raise SettingError(name, value, "not a size", "give a number of bytes above 0")
        self._directory, self._service = _local(target) / "otlp", service
        self._max_bytes, self._retention_bytes = max_bytes, retention_bytes
        self._on_drop = on_drop
        self._sink: JsonlSink | None = None
        self._reason, self._closed = "io_error", False
        self.forked()
        after_fork(self.forked)

    def forked(self) -> None:
        """Take a new lock: a thread that the child does not have may hold the old one."""
        self._lock = threading.RLock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write ended spans. FAILURE only for losses that no `on_drop` heard of, so that none is counted twice."""
        with self._lock:
            if self._closed or not spans:
                return SpanExportResult.FAILURE if spans else SpanExportResult.SUCCESS
            sink = self._sink = self._sink or self._open(spans[0])
            lost = 0
            for start in range(0, len(spans), _SPANS):
                for line, count in span_lines(spans[start : start + _SPANS]):
                    if not line or not sink.write(line):
                        lost += count
                        _tell(self._on_drop, self._reason if line else "unreadable", count)
            return SpanExportResult.FAILURE if lost and self._on_drop is None else SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Do nothing: what `export` took is written."""
        return True

    def shutdown(self) -> None:
        """Let go of the file and take no more."""
        with self._lock:
            self._closed = True
            if self._sink is not None:
                self._sink.close()

    def _open(self, span: ReadableSpan) -> JsonlSink:
        return JsonlSink(
            self._directory,
            f"{self._service or _service(span.resource)}.traces",
            max_bytes=self._max_bytes,
            retention_bytes=self._retention_bytes,
            on_drop=self._note,
        )

    def _note(self, reason: str, lines: int) -> None:
        self._reason = reason


# --- metrics ---------------------------------------------------------------------------------------------------------


class JsonMetricExporter(MetricExporter):
    """Writes the metrics, cumulative, to `<target>/json/<service>.metrics.json`, mode 0640, anew at each export.

    `target` and `service` are as for `JsonSpanExporter`; `on_drop(reason, count)` hears how many points a document held
    that could not be written. Thread-safe. Raises `SettingError` for a target that is not local, nothing later.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | None = None,
        *,
        service: str | None = None,
        on_drop: OnDrop | None = None,
    ) -> None:
        super().__init__()  # without a preference the SDK's readers collect cumulative points
        self._directory, self._service, self._on_drop = _local(target) / "json", service, on_drop

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Replace the document. FAILURE only where that failed and no `on_drop` heard of it."""
        try:
            resources = metrics_data.resource_metrics
            if resources:
                name = safe_name(self._service or _service(resources[0].resource))
                make_directory(self._directory)
                replace_file(self._directory / f"{name}.metrics.json", dump(_document(metrics_data)))
        except Exception as exc:  # noqa: BLE001 - a full disk, a value that cannot be read
            _tell(self._on_drop, reason_of(exc), _count(metrics_data))
            return MetricExportResult.FAILURE if self._on_drop is None else MetricExportResult.SUCCESS
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Do nothing: what `export` took is written."""
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Do nothing: the last document stays."""


def _document(data: MetricsData) -> dict[str, Any]:
    """Return the document described above. The resource is the first: an SDK provider has but one."""
    return {
        "export_time": _time(time.time_ns()),
        "resource": dict(data.resource_metrics[0].resource.attributes),
        "metrics": [_metric(metric) for metric in _metrics(data)],
    }


def _metrics(data: MetricsData) -> Iterator[Metric]:
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            yield from scope.metrics


def _count(data: MetricsData) -> int:
    return sum(len(metric.data.data_points) for metric in _metrics(data))


def _metric(metric: Metric) -> dict[str, Any]:
    out: dict[str, Any] = {
        "name": metric.name,
        "description": metric.description or "",
        "unit": metric.unit or "",
        "type": _TYPES[type(metric.data)],
    }
    if not isinstance(metric.data, Gauge):
        out["temporality"] = metric.data.aggregation_temporality.name.lower()
    if isinstance(metric.data, Sum):
        out["monotonic"] = metric.data.is_monotonic
    return {**out, "points": [_point(point) for point in metric.data.data_points]}


def _point(point: Any) -> dict[str, Any]:
    out: dict[str, Any] = {
        "attributes": dict(point.attributes or {}),
        "start_time": _time(point.start_time_unix_nano),
        "time": _time(point.time_unix_nano),
    }
    for name in ("value", "count", "sum", "min", "max", "scale", "zero_count"):
        if hasattr(point, name):
            out[name] = getattr(point, name)
    if hasattr(point, "explicit_bounds"):
        out |= {"bounds": list(point.explicit_bounds), "buckets": list(point.bucket_counts)}
    for side in ("positive", "negative"):
        if (found := getattr(point, side, None)) is not None:
            out[side] = {"offset": found.offset, "buckets": list(found.bucket_counts)}
    if point.exemplars:
        out["exemplars"] = [_exemplar(exemplar) for exemplar in point.exemplars]
    return out


def _exemplar(exemplar: Any) -> dict[str, Any]:
    return {
        "value": exemplar.value,
        "time": _time(exemplar.time_unix_nano),
        "trace_id": f"{exemplar.trace_id:032x}" if exemplar.trace_id else "",
        "span_id": f"{exemplar.span_id:016x}" if exemplar.span_id else "",
        "attributes": dict(exemplar.filtered_attributes or {}),
    }


def _time(nanoseconds: int | None) -> str | None:
    if nanoseconds is None:
        return None
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06d}Z"


# --- both ------------------------------------------------------------------------------------------------------------


def _local(target: str | os.PathLike[str] | None) -> Path:
    where = os.environ.get("OTEL_ODIBI_DIRECTORY") or "telemetry" if target is None else target
    directory = Target(where).directory
    if directory is None:
        raise SettingError("target", where, "not local", "give a directory; only Parquet can go elsewhere")
    return directory


def _service(resource: Resource) -> str:
    return str(resource.attributes.get(SERVICE_NAME) or "odibi")


def _tell(on_drop: OnDrop | None, reason: str, count: int) -> None:
    if on_drop is not None:
        with contextlib.suppress(Exception):
            on_drop(reason, count)
