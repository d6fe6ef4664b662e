"""Spans and metrics as Parquet files, one dataset a table, laid out by date.

::

    <target>/spans/date=2025-11-23/20251123T101530.123456789Z-5f2c9d0a1b3e4f60.parquet
    <target>/metrics/{gauge,sum,histogram,exponential_histogram}/date=2025-11-23/....parquet

`date` is the UTC date of the row's time; names are unique over processes and hosts, and sort by the time of writing.
A file is written when enough rows wait or the oldest has waited long enough, so not with every export. The columns are
those of the OpenTelemetry Collector's ClickHouse exporter: see `SPAN_SCHEMA`, `GAUGE_SCHEMA`, `SUM_SCHEMA`,
`HISTOGRAM_SCHEMA` and `EXPONENTIAL_HISTOGRAM_SCHEMA` here (pyarrow schemas). pyarrow is imported on first use.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, NamedTuple

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
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from otel_odibi.errors import SettingError
from otel_odibi.exporters.files import OnDrop, Outbox, Target
from otel_odibi.forks import after_fork, arrow

# Rows are turned into Arrow by the thousand: less costs more a row, more holds the interpreter too long at a time.
_BATCH: Final = 1_000
_MAX_BYTES: Final = 256 * 2**20
_DAY: Final = 86_400 * 10**9
_LATEST: Final = 2**63 - 1
_FOLDERS: Final[Mapping[type, str]] = {
    Gauge: "metrics/gauge",
    Sum: "metrics/sum",
    Histogram: "metrics/histogram",
    ExponentialHistogram: "metrics/exponential_histogram",
}


def __getattr__(name: str) -> Any:
    """Return a schema by its name, such as `SPAN_SCHEMA`."""
    table, _, end = name.rpartition("_")
    folder = "spans" if table == "SPAN" else f"metrics/{table.lower()}"
    if end != "SCHEMA" or folder not in ("spans", *_FOLDERS.values()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from otel_odibi.exporters.tables import SCHEMAS

    return SCHEMAS[folder]


class Point(NamedTuple):
    """One metric data point with all it belongs to: a row of a metric table."""

    resource: Resource
    resource_url: str
    scope: InstrumentationScope
    scope_url: str
    metric: Metric
    point: Any


class _Roller:
    """Collects rows of several tables and writes them as files when there are enough or they are old enough.

    At most 4 x `rows` are held while the target cannot be written; then the oldest are dropped. Safe from any thread,
    from code that interrupts it, and across fork: a child starts empty. Never raises after construction.
    """

    def __init__(self, target: str | Path | None, rows: int, seconds: float, on_drop: OnDrop | None) -> None:
        if not (isinstance(rows, int) and rows >= 1):
            raise SettingError("rows", rows, "not a number of rows", "give 1 or more")
        if not (isinstance(seconds, (int, float)) and seconds > 0):
            raise SettingError("seconds", seconds, "not a time", "give a number of seconds above 0")
        self._rows, self._seconds, self._on_drop = rows, seconds, on_drop
        self._outbox = Outbox(Target(_default_target() if target is None else target), 3 * rows, self._drop)
        self._closed = False
        self._lost = 0
        self.forked()
        after_fork(self.forked)

    def forked(self) -> None:
        """Start empty: what was here is the parent's."""
        # Reentrant: a span that ends in a signal handler or a finaliser must not wait for the export it interrupted.
        self._lock = threading.RLock()
        self._waiting: dict[str, list[Any]] = {}
        self._batches: dict[tuple[str, int], list[Any]] = {}
        self._count, self._bytes, self._oldest = 0, 0, math.inf
        self._outbox.clear()
        self._outbox.target.forget()

    def add(self, folder: str, rows: Sequence[Any]) -> bool:
        """Take rows of one table. False where some were lost, these or older ones, and no `on_drop` heard of it."""
        with self._lock:
            if self._closed:
                return False
            lost, start = self._lost, 0
            while start < len(rows):
                end = start + max(1, min(_BATCH, self._rows - self._count))
                self._take(folder, rows[start:end])
                start = end
            return self._on_drop is not None or self._lost == lost

    def tick(self) -> None:
        """Write what has waited long enough, though nothing new comes."""
        with self._lock:
            if time.monotonic() - self._oldest >= self._seconds:
                self._roll()
                self._outbox.send()

    def flush(self) -> bool:
        """Write everything now; True where that was done. What could not be written stays for the next try."""
        with self._lock:
            self._roll()
            return self._outbox.send(now=True)

    def close(self) -> None:
        """Write everything now; count what cannot be written as lost."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.flush()
                self._outbox.give_up()

    # --- all under the lock ------------------------------------------------------------------------------------------

    def _take(self, folder: str, rows: Sequence[Any]) -> None:
        waiting = self._waiting.setdefault(folder, [])
        waiting.extend(rows)
        self._count += len(rows)
        now = time.monotonic()
        self._oldest = min(self._oldest, now)
        if len(waiting) >= _BATCH:
            self._convert(folder)
        if self._count >= self._rows or now - self._oldest >= self._seconds or self._bytes >= _MAX_BYTES:
            self._roll()
            self._outbox.send()

    def _convert(self, folder: str) -> None:
        """Turn the rows of a table that wait into Arrow, which takes less memory and nothing from the collector."""
        rows = self._waiting.pop(folder, [])
        days: dict[int, list[Any]] = {}
        for row in rows:
            days.setdefault(_day(folder, row), []).append(row)
        for day, part in days.items():
            batches = self._readable(folder, part)
            self._batches.setdefault((folder, day), []).extend(batches)
            self._bytes += sum(batch.nbytes for batch in batches)

    def _readable(self, folder: str, rows: list[Any]) -> list[Any]:
        """Return the rows as record batches; halve until those that cannot be read are alone, and drop them."""
        try:
            from otel_odibi.exporters.tables import to_batch

            with arrow.lock:
                return [to_batch(folder, rows)]
        except ImportError:
            self._drop("no_pyarrow", len(rows))
            return []
        except Exception:  # noqa: BLE001 - spans come from anywhere
            if len(rows) == 1:
                self._drop("unreadable", 1)
                return []
        half = len(rows) // 2
        return [*self._readable(folder, rows[:half]), *self._readable(folder, rows[half:])]

    def _roll(self) -> None:
        """Turn everything collected into files for the outbox."""
        for folder in list(self._waiting):
            self._convert(folder)
        found, self._batches = self._batches, {}
        self._count, self._bytes, self._oldest = 0, 0, math.inf
        for (folder, day), batches in found.items():
            rows = sum(batch.num_rows for batch in batches)
            try:
                from otel_odibi.exporters.tables import to_parquet

                if rows:
                    with arrow.lock:
                        file = to_parquet(batches)
                    self._outbox.put(_file_name(folder, day), file, rows)
            except Exception:  # noqa: BLE001 - out of memory, as far as is known
                self._drop("unwritable", rows)

    def _drop(self, reason: str, rows: int) -> None:
        self._lost += rows
        if self._on_drop is not None:
            with contextlib.suppress(Exception):
                self._on_drop(reason, rows)


def _default_target() -> str:
    return os.environ.get("OTEL_ODIBI_PARQUET_URI") or os.environ.get("OTEL_ODIBI_DIRECTORY") or "telemetry"


_POINT_TIME: Final = attrgetter("point.time_unix_nano")
_TIMES: Final = {"spans": attrgetter("start_time"), **dict.fromkeys(_FOLDERS.values(), _POINT_TIME)}


def _day(folder: str, row: Any) -> int:
    """Return the row's UTC day since 1970; any day for a row without a time, which is unreadable anyway."""
    try:
        nanoseconds: int = _TIMES[folder](row)
        return min(max(nanoseconds, -_LATEST), _LATEST) // _DAY
    except (AttributeError, TypeError):
        return 0


def _file_name(folder: str, day: int) -> str:
    now = time.time_ns()
    date = time.strftime("%Y-%m-%d", time.gmtime(day * 86_400))
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now // 10**9))
    return f"{folder}/date={date}/{stamp}.{now % 10**9:09d}Z-{uuid.uuid4().hex[:16]}.parquet"


class ParquetSpanExporter(SpanExporter):
    """Writes spans to `<target>/spans`.

    `target` is a directory or a pyarrow filesystem URI; by default that of OTEL_ODIBI_PARQUET_URI, then of
    OTEL_ODIBI_DIRECTORY, then `telemetry`. A file is written at `rows` rows or 256 MiB, or at an export when the oldest
    row is `seconds` old, or when told to flush. Rows that cannot be written are kept, 4 x `rows` at most;
    `on_drop(reason, count)` hears of every one that is lost.

    Thread-safe; a forked child starts empty. Raises `SettingError` for arguments that cannot work, nothing later.
    """

    def __init__(
        self,
        target: str | Path | None = None,
        *,
        rows: int = 50_000,
        seconds: float = 60.0,
        on_drop: OnDrop | None = None,
    ) -> None:
        self._roller = _Roller(target, rows, seconds, on_drop)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Take ended spans. FAILURE only for losses that no `on_drop` heard of, so that none is counted twice."""
        return SpanExportResult.SUCCESS if self._roller.add("spans", spans) else SpanExportResult.FAILURE

    def tick(self) -> None:
        """Write the rows that are `seconds` old by now; for a caller that has nothing to export."""
        self._roller.tick()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Write everything now; True where that was done."""
        return self._roller.flush()

    def shutdown(self) -> None:
        """Write everything now and take no more."""
        self._roller.close()


class ParquetMetricExporter(MetricExporter):
    """Writes metric points, cumulative ones, to `<target>/metrics`, a dataset for each kind.

    Arguments and guarantees are those of `ParquetSpanExporter`; `rows` counts points of all kinds together.
    """

    def __init__(
        self,
        target: str | Path | None = None,
        *,
        rows: int = 50_000,
        seconds: float = 60.0,
        on_drop: OnDrop | None = None,
    ) -> None:
        super().__init__()  # without a preference the SDK's readers collect cumulative points
        self._roller = _Roller(target, rows, seconds, on_drop)

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Take a collection of metrics. FAILURE only for losses that no `on_drop` heard of."""
        taken = [self._roller.add(folder, points) for folder, points in _points(metrics_data).items()]
        return MetricExportResult.SUCCESS if all(taken) else MetricExportResult.FAILURE

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Write everything now; True where that was done."""
        return self._roller.flush()

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Write everything now and take no more."""
        self._roller.close()


def _points(data: MetricsData) -> dict[str, list[Point]]:
    """Return the points by the folder of their kind; the SDK has no other kinds."""
    found: dict[str, list[Point]] = {}
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                origin = (resource.resource, resource.schema_url, scope.scope, scope.schema_url, metric)
                if (folder := _FOLDERS.get(type(metric.data))) is not None:
                    rows = found.setdefault(folder, [])
                    rows.extend(Point(*origin, point) for point in metric.data.data_points)
    return found
