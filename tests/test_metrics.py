"""Metrics: exact totals of every instrument, a bounded number of series, and the same through a host's own meter."""

from __future__ import annotations

import gc
import os
import threading
import tracemalloc
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

import otel_odibi as oo
from otel_odibi import metrics, names
from otel_odibi.exporters.points import Producer
from otel_odibi.facts import CacheLookup, Edge, NodeFinished, NodeRetried, NodeStarted, RunFinished, RunStarted
from otel_odibi.instruments import ApiInstruments
from otel_odibi.metrics import Aggregates, RssReader
from otel_odibi.names import DURATION_BOUNDS, INSTRUMENTS
from otel_odibi.testing import FakeClock, capture

SECOND = 1_000_000_000
OVERFLOW = {"otel.metric.overflow": True}


def started(node="read", pipeline="daily", layer="", engine="", *, trace_id=1, span_id=2, flags=1):
    """Make the fact that a node began."""
    return NodeStarted(pipeline, "run", node, layer, engine, trace_id, span_id, 0, flags, 0)


def finished(start=None, seconds=1.0, outcome="success", **options):
    """Make the fact that a node ended."""
    return NodeFinished(start or started(), 5, round(seconds * SECOND), outcome, **options)


def run_started(pipeline="daily"):
    """Make the fact that a run began."""
    return RunStarted(pipeline, "run", 1, 2, 0, 1, 0)


def run_finished(pipeline="daily", seconds=1.0, outcome="success"):
    """Make the fact that a run ended."""
    return RunFinished(run_started(pipeline), 7 * SECOND, round(seconds * SECOND), outcome, 0, 0)


def told(listener, *facts):
    """Tell a listener what happened, and return it."""
    listeners = listener.listeners()
    for fact in facts:
        listeners[type(fact)](fact)
    return listener


def points(aggregates, instrument):
    """Return the points of one instrument, by their attributes."""
    families = {family.instrument: family.points for family in aggregates.collect()}
    return {tuple(sorted(point.attributes.items())): point for point in families.get(instrument, ())}


def numbers(aggregates, instrument):
    """Return the values of one counter or gauge, by the values of its attributes."""
    return {tuple(value for _, value in key): point.value for key, point in points(aggregates, instrument).items()}


# --- every instrument ------------------------------------------------------------------------------------------------


def test_a_run_feeds_every_instrument(odibi_capture):
    """Through scopes, as a pipeline does: each instrument has its point, with its declared attributes."""
    clock = odibi_capture.clock
    with oo.pipeline("daily"):
        with oo.node("read", layer="raw", engine="pandas") as n:
            n.cache(hit=True)
            n.output(rows=10)
            clock.advance(2)
        with oo.node("join", layer="raw", engine="pandas", depends_on="read") as n:
            n.input(rows=10)
            for attempt in (1, 2):
                with n.attempt():
                    assert attempt
            n.output(rows=4)
            clock.advance(0.5)
    odibi_capture.telemetry.troubles.dropped("spans", "queue_full", 3)

    series = {(p.name, *p.attributes.values()): p.value for p in odibi_capture.metrics}
    assert series == {
        ("odibi.node.duration", "daily", "read", "raw", "pandas", "success"): 2.0,
        ("odibi.node.duration", "daily", "join", "raw", "pandas", "success"): 0.5,
        ("odibi.node.rows", "daily", "read", "raw", "pandas", "out"): 10,
        ("odibi.node.rows", "daily", "join", "raw", "pandas", "in"): 10,
        ("odibi.node.rows", "daily", "join", "raw", "pandas", "out"): 4,
        ("odibi.node.throughput", "daily", "read", "raw", "pandas"): 5.0,
        ("odibi.node.throughput", "daily", "join", "raw", "pandas"): 8.0,
        ("odibi.node.cache.lookups", "daily", "read", "hit"): 1,
        ("odibi.node.retries", "daily", "join"): 1,
        ("odibi.node.memory.rss", "daily", "read"): 100 * 2**20,
        ("odibi.node.memory.rss", "daily", "join"): 100 * 2**20,
        ("odibi.node.active", "daily", "read"): 0,
        ("odibi.node.active", "daily", "join"): 0,
        ("odibi.node.edge", "daily", "read", "join"): 1,
        ("odibi.pipeline.duration", "daily", "success"): 2.5,
        ("odibi.pipeline.active", "daily"): 0,
        ("odibi.pipeline.last_success.timestamp", "daily"): 1_767_225_602.5,
        ("odibi.process.uptime",): 2.5,
        ("odibi.telemetry.dropped", "spans", "queue_full"): 3,
    }
    declared = {i.name: i.attributes for i in INSTRUMENTS}
    assert {p.name for p in odibi_capture.metrics} == set(declared)
    assert all(tuple(p.attributes) == declared[p.name] for p in odibi_capture.metrics)


def test_instruments_come_in_the_order_of_the_registry_and_only_with_points():
    """A process that ran nothing has its uptime alone."""
    clock = FakeClock()
    aggregates = Aggregates(clock=clock.time_ns)
    clock.advance(3)
    assert [(f.instrument, f.points[0].value) for f in aggregates.collect()] == [(names.PROCESS_UPTIME, 3.0)]
    told(aggregates, run_started(), run_finished(), started(), finished(rows_out=1, edges=(Edge("a", 0, 0),)))
    order = [INSTRUMENTS.index(family.instrument) for family in aggregates.collect()]
    assert order == sorted(order)


def test_executions_under_way_are_counted_up_and_down():
    """Nodes and runs."""
    aggregates = told(Aggregates(), run_started(), started(), started(), finished())
    assert numbers(aggregates, names.NODE_ACTIVE) == {("read", "daily"): 1}
    assert numbers(aggregates, names.PIPELINE_ACTIVE) == {("daily",): 1}
    told(aggregates, finished(outcome="failure"), run_finished(outcome="cancelled"))
    assert numbers(aggregates, names.NODE_ACTIVE) == {("read", "daily"): 0}
    assert numbers(aggregates, names.PIPELINE_ACTIVE) == {("daily",): 0}


@pytest.mark.parametrize("outcome", ["skipped", "lost"])
def test_what_did_not_run_to_an_end_records_no_duration(outcome):
    """Nor throughput; it is no longer under way all the same."""
    aggregates = told(
        Aggregates(), run_started(), started(), finished(outcome=outcome, rows_out=5), run_finished(outcome=outcome)
    )
    assert not points(aggregates, names.NODE_DURATION)
    assert not points(aggregates, names.PIPELINE_DURATION)
    assert not points(aggregates, names.NODE_THROUGHPUT)
    assert not points(aggregates, names.PIPELINE_LAST_SUCCESS)
    assert numbers(aggregates, names.NODE_ACTIVE) == {("read", "daily"): 0}


@pytest.mark.parametrize("outcome", ["success", "failure", "cancelled"])
def test_every_other_outcome_has_a_histogram_of_its_own(outcome):
    """And only a success moves the time of the last success."""
    aggregates = told(Aggregates(), finished(outcome=outcome), run_finished(outcome=outcome))
    assert [dict(key)["outcome"] for key in points(aggregates, names.NODE_DURATION)] == [outcome]
    assert [dict(key)["outcome"] for key in points(aggregates, names.PIPELINE_DURATION)] == [outcome]
    assert bool(points(aggregates, names.PIPELINE_LAST_SUCCESS)) is (outcome == "success")


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_a_histogram_counts_each_duration_in_its_bucket(seconds):
    """A bound belongs to the bucket below it; sum, count, least and greatest are exact."""
    aggregates = told(Aggregates(), *(finished(seconds=value) for value in seconds))
    (point,) = points(aggregates, names.NODE_DURATION).values()
    exact = [round(value * SECOND) / 1e9 for value in seconds]
    upper = (*DURATION_BOUNDS, float("inf"))
    lower = (-1.0, *DURATION_BOUNDS)
    assert list(point.counts) == [sum(lo < s <= hi for s in exact) for lo, hi in zip(lower, upper, strict=True)]
    assert (point.count, point.min, point.max) == (len(exact), min(exact), max(exact))
    assert point.sum == pytest.approx(sum(exact))


def test_a_bound_is_in_the_bucket_below():
    """As the data model has it: bounds are inclusive."""
    aggregates = told(Aggregates(), *(finished(seconds=bound) for bound in DURATION_BOUNDS))
    (point,) = points(aggregates, names.NODE_DURATION).values()
    assert point.counts == (*(1 for _ in DURATION_BOUNDS), 0)


def test_attributes_without_a_value_are_left_out():
    """A node outside any pipeline has no pipeline, rather than an empty one."""
    outside = started("read", pipeline="")
    aggregates = told(Aggregates(), outside, finished(outside, edges=(Edge("a", 0, 0),)))
    assert numbers(aggregates, names.NODE_ACTIVE) == {("read",): 0}
    assert list(points(aggregates, names.NODE_EDGE)) == [(("source", "a"), ("target", "read"))]


def test_nodes_of_one_name_in_two_layers_are_one_where_the_layer_is_no_attribute():
    """Counts add up; of the memory the greater counts."""
    raw, gold = started(layer="raw"), started(layer="gold")
    aggregates = told(
        Aggregates(), raw, gold, finished(raw, rss=5, rows_in=1), finished(gold, rss=3, rows_in=2),
        CacheLookup(raw, True, None, 0), CacheLookup(gold, True, None, 0), CacheLookup(gold, False, None, 0),
        NodeRetried(raw, 2, 0), NodeRetried(gold, 2, 0),
    )  # fmt: skip
    assert numbers(aggregates, names.NODE_CACHE_LOOKUPS) == {("read", "daily", "hit"): 2, ("read", "daily", "miss"): 1}
    assert numbers(aggregates, names.NODE_RETRIES) == {("read", "daily"): 2}
    assert numbers(aggregates, names.NODE_MEMORY) == {("read", "daily"): 5}
    assert len(points(aggregates, names.NODE_ROWS)) == 2


def test_an_edge_is_always_one_and_never_from_a_node_to_itself():
    """However often it is seen."""
    edges = (Edge("a", 1, 2), Edge("a", 1, 3), Edge("read", 1, 2))
    aggregates = told(Aggregates(), finished(edges=edges), finished(edges=edges))
    assert numbers(aggregates, names.NODE_EDGE) == {("daily", "a", "read"): 1}


# --- exemplars -------------------------------------------------------------------------------------------------------


def test_each_bucket_keeps_the_last_sampled_span_as_its_exemplar():
    """So that Grafana can jump from a slow bucket to a trace."""
    aggregates = told(
        Aggregates(),
        finished(started(span_id=3), 0.02), finished(started(span_id=4), 0.021), finished(started(span_id=5), 7),
        finished(started(span_id=6, flags=0), 7),
    )  # fmt: skip
    (point,) = points(aggregates, names.NODE_DURATION).values()
    assert [(e.value, e.trace_id, e.span_id) for e in point.exemplars] == [(0.021, 1, 4), (7.0, 1, 5)]
    assert point.exemplars[0].time_unix_nano == 5


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_beyond_the_limit_everything_adds_up_in_one_overflow_series():
    """The totals stay right, and the one who is told is told which metric, outside the lock."""
    overflown = []

    def on_overflow(name):
        worker = threading.Thread(target=aggregates.dropped)  # would wait for ever, were the lock held
        worker.start()
        worker.join()
        overflown.append(name)

    aggregates = Aggregates(3, on_overflow=on_overflow)
    for i in range(10):
        start = started(f"n{i}", f"p{i}")
        told(aggregates, run_started(f"p{i}"), start)
        told(aggregates, finished(start, rows_in=2, edges=(Edge("a", 0, 0),)), run_finished(f"p{i}"))
    durations = points(aggregates, names.NODE_DURATION)
    assert len(durations) == 4
    assert durations[tuple(sorted({**OVERFLOW, "outcome": "success"}.items()))].count == 7
    assert sum(numbers(aggregates, names.NODE_ROWS).values()) == 20
    assert len(points(aggregates, names.NODE_EDGE)) == 3
    assert len(points(aggregates, names.PIPELINE_DURATION)) == 4
    assert sum(point.count for point in points(aggregates, names.PIPELINE_DURATION).values()) == 10
    assert sorted(overflown) == ["odibi.node.duration", "odibi.node.edge", "odibi.pipeline.duration"]
    told(aggregates, started("n1", "p1"))
    aggregates.collect()
    assert len(overflown) == 3


def test_memory_does_not_grow_with_executions():
    """After 50,000 of them there is not a byte more for each than after the first thousand."""
    aggregates = Aggregates()

    def execute(times):
        for i in range(times):
            start = started(f"n{i % 7}", trace_id=i)
            told(aggregates, run_started(), start, CacheLookup(start, True, None, 0), NodeRetried(start, 2, 0))
            told(aggregates, finished(start, seconds=i % 30, rows_in=1, rows_out=2, edges=(Edge("a", 0, 0),)))
            told(aggregates, run_finished())

    execute(1_000)
    tracemalloc.start()
    try:
        execute(1_000)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        execute(9_000)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    execute(40_000)
    assert grown < 9_000
    assert (len(aggregates._nodes), len(aggregates._pipelines), len(aggregates._edges)) == (7, 1, 7)
    (runs,) = points(aggregates, names.PIPELINE_DURATION).values()
    assert runs.count == 51_000


def test_a_telemetry_does_not_grow_with_executions():
    """Scopes, lineage, logs, metrics and span queue together."""

    @oo.node
    def work(rows):
        return [*rows, 1]

    with capture(span_queue=1) as captured, oo.pipeline("p"):
        captured.telemetry.log_writer._outputs = ()
        captured.telemetry.metrics._recent = deque(maxlen=100)  # full after the warm-up

        def execute(times):
            for _ in range(times):
                work([1, 2])

        execute(1_000)
        captured.telemetry.flush()
        tracemalloc.start()
        try:
            execute(500)
            captured.telemetry.flush()
            captured.telemetry.metrics.settle()
            captured._exporter.clear()
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            execute(2_000)
            captured.telemetry.flush()
            captured.telemetry.metrics.settle()
            captured._exporter.clear()
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    assert grown < 2_000 * 8


# --- threads ---------------------------------------------------------------------------------------------------------


def test_totals_are_exact_under_sixteen_threads():
    """Nothing is lost between them, whatever is collected meanwhile."""
    aggregates, barrier = Aggregates(), threading.Barrier(16)

    def work(number):
        barrier.wait()
        start = started(f"n{number % 3}")
        for i in range(500):
            told(aggregates, run_started(), start, CacheLookup(start, i % 2 == 0, None, 0), NodeRetried(start, 2, 0))
            told(aggregates, finished(start, seconds=1, rows_in=2, rows_out=3), run_finished())
            aggregates.drop("spans", "queue_full")
            if i % 100 == 0:
                aggregates.collect()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    total = 16 * 500
    assert sum(point.count for point in points(aggregates, names.NODE_DURATION).values()) == total
    assert sum(point.sum for point in points(aggregates, names.NODE_DURATION).values()) == total
    rows = numbers(aggregates, names.NODE_ROWS)
    assert sum(value for key, value in rows.items() if "in" in key) == 2 * total
    assert sum(value for key, value in rows.items() if "out" in key) == 3 * total
    assert sum(numbers(aggregates, names.NODE_RETRIES).values()) == total
    assert sum(numbers(aggregates, names.NODE_CACHE_LOOKUPS).values()) == total
    assert set(numbers(aggregates, names.NODE_ACTIVE).values()) == {0}
    assert numbers(aggregates, names.PIPELINE_ACTIVE) == {("daily",): 0}
    assert aggregates.dropped() == {("spans", "queue_full"): total}


def test_a_node_may_end_while_another_is_being_counted():
    """In the same thread: garbage collection may close a generator node, a signal handler may run a node."""
    aggregates = Aggregates()

    def interrupting():
        told(aggregates, started("inner"), finished(started("inner")))
        yield Edge("a", 0, 0)

    told(aggregates, started(), finished(edges=interrupting()))
    assert numbers(aggregates, names.NODE_ACTIVE) == {("inner", "daily"): 0, ("read", "daily"): 0}


def test_a_forked_child_counts_from_zero():
    """Its parent goes on counting what was before; the lock may have been held by a thread that is not in the child."""
    clock = FakeClock()
    aggregates = told(Aggregates(clock=clock.time_ns), started(), finished(rows_out=1))
    aggregates.drop("logs", "disk_full")
    clock.advance(10)
    aggregates._lock.acquire()
    aggregates.after_fork()
    assert [family.instrument for family in aggregates.collect()] == [names.PROCESS_UPTIME]
    assert aggregates.uptime() == 0
    assert aggregates.dropped() == {}


# --- through a host's meter ------------------------------------------------------------------------------------------

nodes = st.sampled_from([started("a", ""), started("b", "p", "raw"), started("c", "p", "raw", "pandas")])
amounts = st.none() | st.integers(0, 1_000_000)
outcomes = st.sampled_from(["success", "failure", "cancelled", "skipped", "lost"])
durations = st.floats(0, 100_000)
edges = st.lists(st.builds(Edge, st.sampled_from("abc"), st.just(1), st.just(2)), max_size=2).map(tuple)


@st.composite
def executions(draw):
    """Draw what happens in one execution of a node, or one run; it may not end."""
    if draw(st.booleans()):
        pipeline = draw(st.sampled_from("pq"))
        happened = [run_started(pipeline), run_finished(pipeline, draw(durations), draw(outcomes))]
    else:
        node = draw(nodes)
        sizes = {"rows_in": draw(amounts), "rows_out": draw(amounts), "rss": draw(amounts), "edges": draw(edges)}
        happened = [
            node,
            *(CacheLookup(node, hit, None, 5) for hit in draw(st.lists(st.booleans(), max_size=2))),
            *(NodeRetried(node, number, 5) for number in range(2, draw(st.integers(2, 4)))),
            finished(node, draw(durations), draw(outcomes), **sizes),
        ]
    return happened[: draw(st.integers(1, len(happened)))]


def compared(data):
    """Return the points of an OpenTelemetry reader by metric and attributes, without times."""
    found = {}
    for metric in (m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics):
        kind = type(metric.data).__name__, getattr(metric.data, "is_monotonic", None)
        for point in metric.data.data_points:
            total = getattr(point, "sum", None)
            found[(metric.name, *sorted(point.attributes.items()))] = (
                metric.unit, metric.description, kind, getattr(point, "value", None), total and float(f"{total:.9g}"),
                tuple(getattr(point, "bucket_counts", ())), tuple(getattr(point, "explicit_bounds", ())),
            )  # fmt: skip
    return found


@settings(deadline=None)
@given(st.lists(executions(), max_size=10))
def test_a_hosts_meter_gets_the_same_as_our_own_totals(happened):
    """Same names, units, kinds, attributes, values and buckets, whatever happened."""
    clock = FakeClock()
    aggregates, reader = Aggregates(clock=clock.time_ns), InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    instruments = ApiInstruments(provider.get_meter("host"), aggregates)
    aggregates.drop("logs", "disk_full", 2)
    clock.advance(1)
    for execution in happened:
        told(aggregates, *execution)
        told(instruments, *execution)
    own = compared(Producer(aggregates.collect, Resource({}), lambda: 0).merge(None))
    hosts = compared(reader.get_metrics_data())
    provider.shutdown()
    assert hosts.pop(("odibi.process.uptime",))[3] == 1.0  # which the producer leaves to the SDK
    assert hosts == own


# --- memory of the process -------------------------------------------------------------------------------------------


def test_resident_memory_is_what_psutil_says():
    """To within the pages that reading takes."""
    assert RssReader()() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


def test_psutil_is_asked_where_there_is_no_proc(monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.setattr(metrics.os, "open", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    reader = RssReader()
    monkeypatch.undo()
    assert reader() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


def test_memory_that_cannot_be_read_is_none():
    """The file may have been closed behind our back."""
    reader = RssReader()
    os.close(reader._file)
    assert reader() is None
    reader._file = -1
    del reader._page
    assert reader() is None
