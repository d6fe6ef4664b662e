"""Adds the package's own aggregates to what an OpenTelemetry metric reader collected, as SDK points."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.sdk.metrics import Counter, Exemplar, Histogram
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from otel_odibi import names
from otel_odibi.facts import Distribution, Family, Number
from otel_odibi.names import DURATION_BOUNDS

DELTA = AggregationTemporality.DELTA
CUMULATIVE = AggregationTemporality.CUMULATIVE
_ADDITIVE = ("counter", "histogram")


class Producer:
    """Turns families into SDK metrics for one reader, cumulative or as the difference to what it saw before.

    Not thread-safe: an SDK reader never exports twice at once. Delta sums and histograms start where the last ended;
    gauges and up-down counters are always whole. Source: OpenTelemetry metrics data model, Temporality.
    """

    def __init__(
        self,
        collect: Callable[[], list[Family]],
        resource: Resource,
        started: Callable[[], int],
        temporality: AggregationTemporality = CUMULATIVE,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._collect = collect
        self._resource = resource
        self._scope = InstrumentationScope(names.SCOPE)
        self._started = started
        self._start = self._last_time = started()
        self._temporality = temporality
        self._clock = clock
        self._before: dict[Any, Any] = {}

    def merge(self, data: MetricsData | None) -> MetricsData:
        """Return `data` with every instrument of this package that has points."""
        now = self._clock()
        if self._started() != self._start:  # a forked child counts anew
            self._start = self._last_time = self._started()
            self._before.clear()
        families = (f for f in self._collect() if f.instrument is not names.PROCESS_UPTIME)  # the SDK has that itself
        metrics = [metric for family in families if (metric := self._metric(family, now)) is not None]
        self._last_time = now
        found = list(data.resource_metrics) if data is not None else []
        first = found[0] if found else sdk.ResourceMetrics(self._resource, [], "")
        # Into the scope of our name where there is one: the OTLP encoder keeps but one of two that are equal.
        same = [metric for scope in first.scope_metrics if scope.scope == self._scope for metric in scope.metrics]
        others = [scope for scope in first.scope_metrics if scope.scope != self._scope]
        own = sdk.ScopeMetrics(scope=self._scope, metrics=[*same, *metrics], schema_url="")
        return MetricsData([sdk.ResourceMetrics(first.resource, [*others, own], first.schema_url), *found[1:]])

    def _metric(self, family: Family, now: int) -> sdk.Metric | None:
        instrument = family.instrument
        delta = self._temporality is DELTA and instrument.kind in _ADDITIVE
        start = self._last_time if delta else self._start
        points: Sequence[Any] = family.points
        if delta:
            points = tuple(left for point in points if (left := self._difference(instrument.name, point)) is not None)
            if not points:
                return None
        data: sdk.Sum | sdk.Gauge | sdk.Histogram
        temporality = DELTA if delta else CUMULATIVE
        if instrument.kind == "histogram":
            data = sdk.Histogram([_histogram_point(point, start, now, delta) for point in points], temporality)
        else:
            numbers = [sdk.NumberDataPoint(dict(p.attributes), start, now, p.value) for p in points]
            is_counter = instrument.kind == "counter"
            data = sdk.Gauge(numbers) if instrument.kind == "gauge" else sdk.Sum(numbers, temporality, is_counter)
        return sdk.Metric(instrument.name, instrument.description, instrument.unit, data)

    def _difference(self, name: str, point: Number | Distribution) -> Number | Distribution | None:
        """Return what was added to this series since it was last asked for, None where nothing was."""
        key = (name, *point.attributes.items())
        before = self._before.get(key)
        self._before[key] = point
        if before is None:
            return point
        if isinstance(point, Number):
            return point._replace(value=point.value - before.value) if point.value != before.value else None
        if point.count == before.count:
            return None
        return point._replace(
            counts=tuple(now - then for now, then in zip(point.counts, before.counts, strict=True)),
            sum=point.sum - before.sum,
            count=point.count - before.count,
            exemplars=tuple(e for e in point.exemplars if e not in before.exemplars),
        )


def _histogram_point(point: Any, start: int, now: int, delta: bool) -> sdk.HistogramDataPoint:
    exemplars = [Exemplar({}, e.value, e.time_unix_nano, e.span_id, e.trace_id) for e in point.exemplars]
    return sdk.HistogramDataPoint(
        attributes=dict(point.attributes),
        start_time_unix_nano=start,
        time_unix_nano=now,
        count=point.count,
        sum=point.sum,
        bucket_counts=list(point.counts),
        explicit_bounds=list(DURATION_BOUNDS),
        min=None if delta else point.min,  # type: ignore[arg-type]  # of the interval alone it is not known; optional in OTLP
        max=None if delta else point.max,  # type: ignore[arg-type]
        exemplars=exemplars,
    )


class WithProducer(MetricExporter):
    """Hands metrics to another exporter after adding the package's own to them. Thread-safe as its exporter is.

    Points that the exporter failed to export are counted through `on_drop(reason, count)`; it never raises.
    """

    def __init__(
        self,
        exporter: MetricExporter,
        make_producer: Callable[[AggregationTemporality], Producer],
        on_drop: Callable[[str, int], None] = lambda reason, count: None,
    ) -> None:
        preferred = exporter._preferred_temporality or {}
        super().__init__(preferred, exporter._preferred_aggregation)
        self._exporter = exporter
        self._producer = make_producer(preferred.get(Histogram, preferred.get(Counter, CUMULATIVE)))
        self._on_drop = on_drop

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Export `metrics_data` and the package's own metrics."""
        merged = self._producer.merge(metrics_data)
        try:
            result = self._exporter.export(merged, timeout_millis=timeout_millis, **kwargs)
        except Exception:  # noqa: BLE001 - an exporter may raise anything
            result = MetricExportResult.FAILURE
        if result is not MetricExportResult.SUCCESS:
            self._on_drop("export_failed", _count(merged))
        return result

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Flush the exporter."""
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Shut the exporter down. The SDK's reader calls the argument `timeout`, so it is not handed on by name."""
        self._exporter.shutdown(kwargs.get("timeout", timeout_millis))


def _count(data: MetricsData) -> int:
    metrics = (
        metric for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics
    )
    return sum(len(metric.data.data_points) for metric in metrics)


__all__: Sequence[str] = ("Producer", "WithProducer")
