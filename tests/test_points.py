"""Our aggregates as points of the SDK: the same as the SDK's own instruments give, cumulative and as deltas."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider, UpDownCounter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
)
from opentelemetry.sdk.resources import Resource

from otel_odibi import names
from otel_odibi.exporters.points import CUMULATIVE, DELTA, Producer, WithProducer
from otel_odibi.facts import NodeFinished, NodeStarted
from otel_odibi.metrics import Aggregates
from otel_odibi.names import DURATION_BOUNDS
from otel_odibi.testing import FakeClock

ATTRIBUTES = {"pipeline": "p", "node": "n", "layer": "l", "engine": "e"}
NODE = NodeStarted("p", "run", "n", "l", "e", 1, 2, 0, 1, 0)


class Recorder(MetricExporter):
    """Keeps what it is given; may fail in two ways, and prefers deltas if told."""

    def __init__(self, temporality=None, result=MetricExportResult.SUCCESS):
        super().__init__(preferred_temporality=temporality)
        self.result, self.seen, self.calls = result, [], []

    def export(self, metrics_data, timeout_millis=10_000, **kwargs):
        self.seen.append(metrics_data)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def force_flush(self, timeout_millis=10_000):
        self.calls.append(("force_flush", timeout_millis))
        return True

    def shutdown(self, timeout_millis=30_000, **kwargs):
        self.calls.append(("shutdown", timeout_millis))


class Bench:
    """The same measurements for our aggregates and for instruments of the SDK."""

    def __init__(self, temporality):
        self.clock = FakeClock()
        self.aggregates = Aggregates(clock=self.clock.time_ns)
        aggregates = self.aggregates
        self.started = aggregates.start_time_unix_nano
        self.producer = Producer(
            aggregates.collect, Resource({}), lambda: aggregates.start_time_unix_nano, temporality, self.clock.time_ns
        )
        preferred = {Counter: temporality, Histogram: temporality, UpDownCounter: CUMULATIVE}
        self.reader = InMemoryMetricReader(preferred_temporality=preferred)
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)
        meter = self.provider.get_meter("sdk")
        duration, rows = names.NODE_DURATION, names.NODE_ROWS
        bounds = list(DURATION_BOUNDS)
        self.duration = meter.create_histogram(duration.name, "s", explicit_bucket_boundaries_advisory=bounds)
        self.rows = meter.create_counter(rows.name, rows.unit)
        self.active = meter.create_up_down_counter(names.NODE_ACTIVE.name, names.NODE_ACTIVE.unit)

    def measure(self, seconds, rows):
        """Record one execution in both."""
        nanoseconds = round(seconds * 1e9)
        self.aggregates.node_started(NODE)
        self.aggregates.node_finished(NodeFinished(NODE, 0, nanoseconds, "success", rows_out=rows))
        self.duration.record(nanoseconds / 1e9, {**ATTRIBUTES, "outcome": "success"})
        self.rows.add(rows, {**ATTRIBUTES, "direction": "out"})
        for change in (1, -1):
            self.active.add(change, {"pipeline": "p", "node": "n"})

    def collect(self):
        """Return the metrics of both by name: (ours, the SDK's)."""
        self.clock.advance(15)
        ours, sdks = metrics_in(self.producer.merge(None)), metrics_in(self.reader.get_metrics_data())
        return {name: ours[name] for name in ours if name in self.names}, sdks

    names = (names.NODE_DURATION.name, names.NODE_ROWS.name, names.NODE_ACTIVE.name)


def metrics_in(data):
    """Return the metrics of one collection by name."""
    found = data.resource_metrics if data is not None else ()
    return {m.name: m for resource in found for scope in resource.scope_metrics for m in scope.metrics}


def shape(metric):
    """Return all of a metric but its description and times."""
    data, points = metric.data, {}
    for p in metric.data.data_points:
        if hasattr(p, "bucket_counts"):
            value = p.count, pytest.approx(p.sum, abs=1e-9), tuple(p.bucket_counts), tuple(p.explicit_bounds)
        else:
            value = p.value
        points[tuple(sorted(p.attributes.items()))] = value
    return metric.unit, type(data), data.aggregation_temporality, getattr(data, "is_monotonic", None), points


executions = st.lists(st.tuples(st.floats(0, 100_000), st.integers(0, 1_000)), max_size=5)


@pytest.mark.parametrize("temporality", [CUMULATIVE, DELTA], ids=["cumulative", "delta"])
@settings(deadline=None)
@given(intervals=st.lists(executions, min_size=1, max_size=4))
def test_points_are_those_of_the_sdks_own_instruments(temporality, intervals):
    """Interval after interval, also where nothing happened in one: an SDK counter of deltas then has no point."""
    bench = Bench(temporality)
    for happened in intervals:
        for seconds, rows in happened:
            bench.measure(seconds, rows)
        ours, sdks = bench.collect()
        empty = {name for name, metric in sdks.items() if not metric.data.data_points}
        unchanged = {names.NODE_ROWS.name} if all(rows == 0 for _, rows in happened) and temporality is DELTA else set()
        assert ours.keys() - unchanged == sdks.keys() - empty - unchanged
        for name in ours.keys() - unchanged:
            assert shape(ours[name]) == shape(sdks[name])
    bench.provider.shutdown()


def test_cumulative_points_start_where_counting_started():
    """And end at the collection; their least and greatest value is known."""
    bench = Bench(CUMULATIVE)
    bench.measure(2, 1)
    bench.collect()
    bench.measure(1, 1)
    ours, _ = bench.collect()
    (point,) = ours[names.NODE_DURATION.name].data.data_points
    assert (point.start_time_unix_nano, point.time_unix_nano) == (bench.started, bench.clock.time_ns())
    assert (point.min, point.max) == (1.0, 2.0)


def test_deltas_start_where_the_last_ended():
    """Without a gap, also after intervals in which nothing happened; least and greatest are not known of one alone."""
    bench = Bench(DELTA)
    bench.measure(2, 1)
    before, _ = bench.collect()
    for _ in range(3):
        nothing, _ = bench.collect()
        assert set(nothing) == {names.NODE_ACTIVE.name}
    quiet_until = bench.clock.time_ns()
    bench.measure(1, 1)
    after, _ = bench.collect()
    (first,), (second,) = (m[names.NODE_DURATION.name].data.data_points for m in (before, after))
    assert (first.start_time_unix_nano, second.start_time_unix_nano) == (bench.started, quiet_until)
    assert (second.time_unix_nano, second.count, second.sum) == (bench.clock.time_ns(), 1, 1.0)
    assert (second.min, second.max) == (None, None)


def test_exemplars_carry_span_and_trace():
    """Each is sent once as part of a delta."""
    bench = Bench(DELTA)
    bench.measure(2, 1)
    ours, _ = bench.collect()
    (point,) = ours[names.NODE_DURATION.name].data.data_points
    assert [(e.value, e.trace_id, e.span_id) for e in point.exemplars] == [(2.0, 1, 2)]
    bench.measure(0.5, 1)
    ours, _ = bench.collect()
    (point,) = ours[names.NODE_DURATION.name].data.data_points
    assert [e.value for e in point.exemplars] == [0.5]


@pytest.mark.parametrize("temporality", [CUMULATIVE, DELTA], ids=["cumulative", "delta"])
def test_a_forked_child_starts_anew(temporality):
    """Even where it has counted more than its parent had at the fork."""
    bench = Bench(temporality)
    bench.measure(1, 1)
    bench.collect()
    bench.aggregates.after_fork()
    forked_at = bench.clock.time_ns()
    for _ in range(3):
        bench.measure(1, 1)
    ours, _ = bench.collect()
    (point,) = ours[names.NODE_DURATION.name].data.data_points
    assert (point.count, point.start_time_unix_nano) == (3, forked_at)


def test_what_the_reader_collected_is_kept():
    """Ours are added to the first resource's, in a scope of our name; the SDK has the uptime itself."""
    bench = Bench(CUMULATIVE)
    bench.measure(1, 1)
    data = bench.reader.get_metrics_data()
    merged = bench.producer.merge(data)
    assert merged.resource_metrics[0].resource is data.resource_metrics[0].resource
    scopes = merged.resource_metrics[0].scope_metrics
    assert [scope.scope.name for scope in scopes] == ["sdk", names.SCOPE]
    assert scopes[0] is data.resource_metrics[0].scope_metrics[0]
    assert names.PROCESS_UPTIME.name not in {metric.name for metric in scopes[1].metrics}
    assert [r.resource for r in bench.producer.merge(None).resource_metrics] == [Resource({})]


def test_what_the_reader_collected_in_our_scope_is_in_it_still():
    """Of two scopes of one name the OTLP encoder would keep the last alone."""
    bench = Bench(CUMULATIVE)
    bench.provider.get_meter(names.SCOPE).create_counter("mine").add(1)
    bench.measure(1, 1)
    merged = bench.producer.merge(bench.reader.get_metrics_data())
    scopes = merged.resource_metrics[0].scope_metrics
    assert [scope.scope.name for scope in scopes] == ["sdk", names.SCOPE]
    assert [metric.name for metric in scopes[1].metrics][:2] == ["mine", names.NODE_DURATION.name]


# --- the exporter around another -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temporality", [CUMULATIVE, DELTA], ids=["cumulative", "delta"])
def test_the_temporality_is_what_the_exporter_prefers(temporality):
    """Of its histograms."""
    asked = []

    def make_producer(wanted):
        asked.append(wanted)
        return Bench(wanted).producer

    WithProducer(Recorder({Histogram: temporality}), make_producer)
    WithProducer(Recorder(), make_producer)
    assert asked == [temporality, CUMULATIVE]


@pytest.mark.parametrize("result", [MetricExportResult.FAILURE, OSError("away"), None], ids=repr)
def test_points_that_were_not_exported_are_counted(result):
    """Whether the exporter says so or raises: nothing is raised into the reader."""
    bench, drops = Bench(CUMULATIVE), []
    exporter = WithProducer(Recorder(result=result), lambda _: bench.producer, lambda *drop: drops.append(drop))
    bench.measure(1, 1)
    assert exporter.export(bench.reader.get_metrics_data()) is not MetricExportResult.SUCCESS
    assert drops == [("export_failed", 3 + 4)]  # of the SDK, and ours with the throughput


def test_flush_and_shutdown_are_handed_on_with_their_time():
    """The SDK's reader calls the time of the latter `timeout`."""
    inner = Recorder({Counter: AggregationTemporality.CUMULATIVE})
    exporter = WithProducer(inner, lambda _: Bench(CUMULATIVE).producer)
    assert exporter.export(None) is MetricExportResult.SUCCESS
    assert exporter.force_flush(5)
    exporter.shutdown(timeout=7)
    exporter.shutdown(8)
    assert inner.calls == [("force_flush", 5), ("shutdown", 7), ("shutdown", 8)]
