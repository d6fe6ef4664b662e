"""`MetricsManager`: exact totals in bounded space, sane rates, and what is recorded by hand in OpenTelemetry too."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import math
import os
import random
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import otel_odibi as oo
from otel_odibi import manager as module
from otel_odibi import names, tally
from otel_odibi.errors import SettingError
from otel_odibi.facts import Distribution, Execution, Number
from otel_odibi.instruments import ApiInstruments
from otel_odibi.manager import MetricsManager, MetricType
from otel_odibi.metrics import Aggregates
from otel_odibi.testing import Capture

SCALE = float(os.environ.get("ODIBI_TEST_SCALE", "0.1"))


@pytest.fixture
def metrics() -> MetricsManager:
    return MetricsManager()


# --- what is recorded ------------------------------------------------------------------------------------------------


def test_types_have_the_names_of_phase_8() -> None:
    """A member equals its value, so either will do."""
    assert {kind.name: kind.value for kind in MetricType} == {
        "NODE_DURATION": "node_duration_ms", "THROUGHPUT": "throughput_rows_per_sec", "CACHE_HIT": "cache_hit",
        "CACHE_MISS": "cache_miss", "ERROR_COUNT": "error_count", "RETRY_COUNT": "retry_count",
        "CHECKPOINT_SIZE": "checkpoint_size_bytes", "DATA_SIZE": "data_size_bytes",
        "WORKER_UTILIZATION": "worker_utilization_pct", "MEMORY_USAGE": "memory_usage_mb",
        "SUCCESS_COUNT": "success_count", "FAILURE_COUNT": "failure_count",
    }  # fmt: skip


def test_an_execution_is_several_records(metrics: MetricsManager) -> None:
    """Duration, outcome, cache lookup and throughput, each with the engine as a label."""
    metrics.record_node_execution("read", 125.5, True, engine="spark", rows=1000)
    found = {record.metric_type: record for record in metrics.metrics}
    assert {kind: record.value for kind, record in found.items()} == {
        "node_duration_ms": 125.5, "success_count": 1.0, "cache_miss": 1.0,
        "throughput_rows_per_sec": pytest.approx(7968.1, abs=0.1),
    }  # fmt: skip
    record = found["node_duration_ms"]
    assert (record.name, record.labels) == ("read", {"engine": "spark"})
    assert record.timestamp > 1e9
    assert set(dataclasses.asdict(record)) == {"metric_type", "name", "value", "timestamp", "labels"}


def test_a_failure_is_an_error_and_a_failure(metrics: MetricsManager) -> None:
    """And `cached` makes a hit of the miss."""
    metrics.record_node_execution("read", 10.0, False, cached=True)
    assert metrics.counters == {"failure_count:read": 1.0, "error_count:read": 1.0, "cache_hit:read": 1.0}
    assert metrics.counters["success_count:read"] == 0


def test_values_of_any_type_can_be_recorded(metrics: MetricsManager) -> None:
    """`record` and `set_gauge` keep the last, `increment` adds up."""
    metrics.record(MetricType.NODE_DURATION, "read", 1250.5, labels={"layer": "bronze"})
    metrics.set_gauge(MetricType.WORKER_UTILIZATION, "w1", 80)
    metrics.set_gauge(MetricType.WORKER_UTILIZATION, "w1", 60)
    metrics.record_memory_usage("read", 256.5)
    metrics.increment(MetricType.RETRY_COUNT, "read")
    metrics.increment(MetricType.RETRY_COUNT, "read", 2)
    assert metrics.gauges == {
        "node_duration_ms:read": 1250.5, "worker_utilization_pct:w1": 60.0, "memory_usage_mb:read": 256.5,
    }  # fmt: skip
    assert metrics.counters == {"retry_count:read": 3.0}
    assert [record.value for record in metrics.get_metrics_by_type(MetricType.RETRY_COUNT)] == [1.0, 2.0]
    assert [record.metric_type for record in metrics.get_metrics_by_name("read")] == [
        "node_duration_ms", "memory_usage_mb", "retry_count", "retry_count",
    ]  # fmt: skip
    assert metrics.metrics[0].labels == {"layer": "bronze"}


def test_a_gauge_of_several_labels_is_the_latest(metrics: MetricsManager) -> None:
    """Whatever the order in which the labels were first seen."""
    for engine, value in (("pandas", 1), ("spark", 2), ("pandas", 3)):
        metrics.record(MetricType.DATA_SIZE, "read", value, {"engine": engine})
    assert metrics.gauges == {"data_size_bytes:read": 3.0}


class Rude:
    def __float__(self) -> float:
        raise RuntimeError("no number of me")

    def __str__(self) -> str:
        raise RuntimeError("no text of me")


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.record("no_such_type", "n", 1.0),
        lambda m: m.record(MetricType.DATA_SIZE, "n", math.nan),
        lambda m: m.record(MetricType.DATA_SIZE, "n", Rude()),
        lambda m: m.record(MetricType.DATA_SIZE, "n", "many"),
        lambda m: m.increment(MetricType.RETRY_COUNT, "n", -1),
        lambda m: m.increment(MetricType.RETRY_COUNT, "n", math.inf),
        lambda m: m.record(MetricType.DATA_SIZE, "n", 1.0, labels=7),
        lambda m: m.record_node_execution(["no", "name"], 1.0, True),
    ],
)
def test_what_is_no_value_is_left_out(
    metrics: MetricsManager, call: Callable[[MetricsManager], None], caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning, and without raising."""
    module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="otel_odibi"):
        call(metrics)
        call(metrics)
    assert metrics.metrics == []
    assert len(caplog.records) == 1
    assert "left out" in caplog.text


def test_a_logging_handler_that_raises_does_no_harm(metrics: MetricsManager) -> None:
    """Here it is a host's, which hears of the warning."""

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("no")

    module._warn_once.cache_clear()
    handler = Broken()
    logging.getLogger("otel_odibi").addHandler(handler)
    try:
        metrics.record("no_such_type", "n", 1.0)  # type: ignore[arg-type]
    finally:
        logging.getLogger("otel_odibi").removeHandler(handler)
    assert metrics.metrics == []


def test_an_execution_counts_though_its_numbers_are_odd(metrics: MetricsManager) -> None:
    """A negative or tiny duration is 0, one that is no number is not known; so are odd rows; names become text."""
    for duration, rows in ((-5, 1), (1e-310, 9), (math.nan, 1), (None, 10**400), ("x", "y"), (math.inf, -1)):
        metrics.record_node_execution("n", duration, True, rows=rows)  # type: ignore[arg-type]
    metrics.record_node_execution(7, 10, 1, engine=None, rows=2.0)  # type: ignore[arg-type]
    assert metrics.get_node_stats("n")["executions"] == 6
    found = metrics.get_summary()["aggregations"]
    assert found["node_duration_ms"] == {
        "count": 3, "sum": 10.0, "min": 0.0, "max": 10.0, "avg": pytest.approx(10 / 3),
    }  # fmt: skip
    assert found["throughput_rows_per_sec"]["count"] == 1
    assert metrics.get_node_stats(7)["success_count"] == 1  # type: ignore[arg-type]
    assert metrics.gauges["throughput_rows_per_sec:7"] == 200.0


def test_names_and_labels_hold_no_secrets(metrics: MetricsManager) -> None:
    """They go to files and endpoints."""
    metrics.record_node_execution("load postgres://ann:hunter2@db/x", 1.0, True)
    metrics.record(MetricType.DATA_SIZE, "n", 1.0, labels={"password": "hunter2", "url": "http://a:hunter2@b"})
    assert "hunter2" not in metrics.export_json() + metrics.export_prometheus()
    assert metrics.get_node_stats("load postgres://ann:hunter2@db/x")["executions"] == 1


# --- sane numbers ----------------------------------------------------------------------------------------------------


def test_the_error_rate_is_of_executions(metrics: MetricsManager) -> None:
    """Four failures of five are 80 %, and four errors."""
    for _ in range(4):
        metrics.record_node_execution("bad", 1.0, False)
    metrics.record_node_execution("good", 1.0, True)
    assert metrics.get_error_rate() == 80.0
    assert metrics.counters["error_count:bad"] == 4


def test_errors_counted_by_hand_are_failed_executions(metrics: MetricsManager) -> None:
    """Of those whose durations were recorded; never more than all."""
    assert metrics.get_error_rate() == 0.0
    for _ in range(4):
        metrics.record(MetricType.NODE_DURATION, "read", 1.0)
    metrics.increment(MetricType.ERROR_COUNT, "read")
    assert metrics.get_error_rate() == 25.0
    metrics.increment(MetricType.ERROR_COUNT, "read", 9)
    assert metrics.get_error_rate() == 100.0


def test_the_hit_rate_adds_up_what_was_incremented(metrics: MetricsManager) -> None:
    """Five hits at once are five."""
    assert metrics.get_cache_hit_rate() == 0.0
    metrics.increment(MetricType.CACHE_HIT, "join", 5)
    metrics.increment(MetricType.CACHE_MISS, "join", 15)
    assert metrics.get_cache_hit_rate() == 25.0


def test_no_rows_are_a_throughput_of_zero(metrics: MetricsManager) -> None:
    """Unknown rows are none, and rows in no time are no number."""
    metrics.record_node_execution("empty", 10.0, True, rows=0)
    assert metrics.gauges["throughput_rows_per_sec:empty"] == 0.0
    metrics.record_node_execution("unknown", 10.0, True)
    metrics.record_node_execution("instant", 0.0, True, rows=5)
    metrics.record_node_execution("full", 10.0, True, rows=10)
    assert metrics.get_avg_throughput() == 500.0


def test_what_is_not_known_is_empty_or_zero(metrics: MetricsManager) -> None:
    """A manager that has seen nothing answers everything."""
    assert metrics.get_node_stats("nobody") == {}
    assert (metrics.get_avg_throughput(), metrics.metrics, metrics.counters, metrics.gauges) == (0.0, [], {}, {})
    assert metrics.get_summary()["total_metrics"] == 0
    metrics.increment(MetricType.RETRY_COUNT, "n")
    assert metrics.get_node_stats("n")["p99_duration_ms"] == metrics.get_node_stats("n")["executions"] == 0


def test_the_stats_of_a_node(metrics: MetricsManager) -> None:
    """On all engines together."""
    metrics.record_node_execution("read", 100.0, True, engine="pandas")
    metrics.record_node_execution("read", 200.0, True, engine="spark")
    metrics.record_node_execution("read", 150.0, False)
    metrics.record_node_execution("other", 9_999.0, False)
    stats = metrics.get_node_stats("read")
    assert stats == {
        "node_name": "read", "executions": 3, "avg_duration_ms": 150.0, "min_duration_ms": 100.0,
        "max_duration_ms": 200.0, "p50_duration_ms": pytest.approx(150, rel=0.01),
        "p95_duration_ms": pytest.approx(195, rel=0.01), "p99_duration_ms": pytest.approx(199, rel=0.01),
        "success_count": 2, "failure_count": 1,
    }  # fmt: skip


def test_durations_recorded_singly_are_executions(metrics: MetricsManager) -> None:
    """As they were in Phase 8."""
    for duration in (100.0, 200.0, 150.0):
        metrics.record(MetricType.NODE_DURATION, "read", duration)
    stats = metrics.get_node_stats("read")
    assert (stats["executions"], stats["avg_duration_ms"]) == (3, 150.0)


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=200))
def test_quantiles_are_within_one_percent(durations: list[float]) -> None:
    """Of what sorting all durations gives, from a nanosecond to 30 years."""
    metrics = MetricsManager()
    for duration in durations:
        metrics.record_node_execution("n", duration, True)
    stats = metrics.get_node_stats("n")
    ordered = sorted(durations)
    for percent in (50, 95, 99):
        place = percent / 100 * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        assert stats[f"p{percent}_duration_ms"] == pytest.approx(low + (high - low) * (place % 1), rel=0.01)


def test_quantiles_beyond_the_buckets_stay_between_the_extremes(metrics: MetricsManager) -> None:
    """Durations of 0 and of millions of years have no bucket of their own."""
    for duration in (0.0, 0.0, 1e300, 1e300):
        metrics.record_node_execution("n", duration, True)
    stats = metrics.get_node_stats("n")
    assert 0.0 <= stats["p50_duration_ms"] <= stats["p99_duration_ms"] <= 1e300
    assert len(metrics._tallies.nodes["n", "pandas"].durations.buckets or ()) == 2


# --- bounded, exact, safe --------------------------------------------------------------------------------------------


def run(metrics: MetricsManager, count: int, seed: int) -> tuple[float, int, int]:
    """Record so many executions of ten nodes; return the plain sum of durations, of failures, of rows."""
    draw = random.Random(seed)
    total, failures, hits = 0.0, 0, 0
    for number in range(count):
        duration, success, cached = draw.randrange(1, 10_000) / 8, draw.random() > 0.1, draw.random() < 0.3
        metrics.record_node_execution(f"n{number % 10}", duration, success, rows=number, cached=cached)
        total, failures, hits = total + duration, failures + (not success), hits + cached
    return total, failures, hits


@pytest.mark.parametrize("count", [20_000, pytest.param(round(1_000_000 * SCALE), marks=pytest.mark.faults)])
def test_totals_are_exact_and_memory_is_flat(metrics: MetricsManager, count: int) -> None:
    """After a warm-up that fills the recent records; the sums are those of plain addition."""
    warm = run(metrics, 20_000, seed=1)
    gc.collect()
    tracemalloc.start()
    plain = run(metrics, count, seed=2)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    found = metrics.get_summary()["aggregations"]
    durations = found["node_duration_ms"]
    # The records that replaced those of the warm-up were allocated while memory was traced: 10,000, not `count`.
    assert grown < 10_000 * 400
    assert (durations["count"], durations["sum"]) == (20_000 + count, warm[0] + plain[0])
    assert found["failure_count"]["sum"] == warm[1] + plain[1]
    assert found["cache_hit"]["sum"] == warm[2] + plain[2]
    assert sum(metrics.get_node_stats(f"n{n}")["executions"] for n in range(10)) == 20_000 + count
    assert metrics.get_error_rate() == pytest.approx(100 * (warm[1] + plain[1]) / (20_000 + count))
    assert len(metrics.metrics) <= 10_000 * 6


def test_names_beyond_the_limit_add_up_under_one(
    metrics: MetricsManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost, one warning is given, and what was there before stays apart."""
    module._warn_once.cache_clear()
    monkeypatch.setattr(module, "LIMIT", 10)
    metrics.reset()
    with caplog.at_level(logging.WARNING, logger="otel_odibi"):
        for number in range(50):
            metrics.record_node_execution(f"n{number}", 1.0, True, engine=f"e{number}")
            metrics.increment(MetricType.RETRY_COUNT, "n", labels={"run": number})
            metrics.record(MetricType.DATA_SIZE, f"n{number}", 1.0)
    assert len(caplog.records) == 1
    assert metrics.get_node_stats(tally.OVERFLOW)["executions"] == 40
    assert metrics.get_node_stats("n9")["executions"] == 1
    assert metrics.get_node_stats("n10") == {}
    assert metrics.get_summary()["aggregations"]["retry_count"]["sum"] == 50
    assert metrics.gauges[f"data_size_bytes:{tally.OVERFLOW}"] == 1.0
    assert len(metrics.snapshot()) < 100


def test_threads_lose_nothing(metrics: MetricsManager) -> None:
    """Eight record at once, while one reads."""

    def work() -> None:
        for number in range(2_000):
            metrics.record_node_execution("n", 1.0, number % 2 == 0, rows=1)
            metrics.increment(MetricType.RETRY_COUNT, "n")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.get_summary(), metrics.get_node_stats("n"), metrics.metrics
    for thread in threads:
        thread.join()
    assert metrics.get_node_stats("n")["executions"] == 16_000
    assert metrics.counters["retry_count:n"] == 16_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_lock(metrics: MetricsManager) -> None:
    """Another thread may hold it at the moment of the fork."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with metrics._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        metrics.record_node_execution("n", 1.0, True)
        os._exit(0 if metrics.get_node_stats("n")["executions"] == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    done.set()
    thread.join()


def test_reset_forgets_everything(metrics: MetricsManager) -> None:
    """And counts anew."""
    metrics.record_node_execution("n", 1.0, True)
    metrics.reset()
    assert (metrics.metrics, metrics.get_node_stats("n"), metrics.get_summary()["total_metrics"]) == ([], {}, 0)
    metrics.record_node_execution("n", 1.0, True)
    assert metrics.get_node_stats("n")["executions"] == 1


# --- exports ---------------------------------------------------------------------------------------------------------


def test_the_summary(metrics: MetricsManager) -> None:
    """Totals of everything, with a time that knows its zone."""
    metrics.record_node_execution("n", 5.0, True)
    metrics.record_node_execution("n", 15.0, True)
    summary = metrics.get_summary()
    assert summary["total_metrics"] == 6
    assert summary["uptime_seconds"] >= 0
    assert summary["timestamp"].endswith("Z")
    assert summary["counters"] == {"success_count:n": 2.0, "cache_miss:n": 2.0}
    assert summary["gauges"] == {"node_duration_ms:n": 15.0}
    assert summary["aggregations"]["node_duration_ms"] == {
        "count": 2, "sum": 20.0, "min": 5.0, "max": 15.0, "avg": 10.0,
    }  # fmt: skip


def test_saving_to_a_file(metrics: MetricsManager, tmp_path: Path) -> None:
    """JSON by default, Prometheus text when asked for; another format is an error that names it."""
    metrics.record_node_execution("n", 5.0, True)
    metrics.save_to_file(tmp_path / "new" / "metrics.json")
    metrics.save_to_file(str(tmp_path / "metrics.prom"), format="prometheus")
    saved = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert saved["summary"]["total_metrics"] == 3
    assert saved["metrics"][0]["name"] == "n"
    assert 'odibi_node_duration_ms{engine="pandas",node="n"} 5.0' in (tmp_path / "metrics.prom").read_text()
    with pytest.raises(SettingError, match="xml"):
        metrics.save_to_file(tmp_path / "x", format="xml")


# --- decorated nodes -------------------------------------------------------------------------------------------------


def listen(captured: Capture, metrics: MetricsManager) -> None:
    for fact, listener in metrics.listeners().items():
        captured.telemetry.subscribe(fact, listener)


def test_decorated_nodes_are_counted(odibi_capture: Capture, metrics: MetricsManager) -> None:
    """Executions with duration, rows, memory and outcome; retries."""
    listen(odibi_capture, metrics)

    @oo.node(engine="spark")
    def read() -> list[int]:
        odibi_capture.clock.advance(0.25)
        return [1, 2, 3]

    @oo.node
    def fail() -> None:
        raise ValueError("no")

    read()
    with pytest.raises(ValueError, match="no"):
        fail()
    with oo.node("flaky") as node:
        for _ in range(3):
            with node.attempt():
                pass
    assert metrics.gauges["node_duration_ms:read"] == 250.0
    assert metrics.gauges["throughput_rows_per_sec:read"] == 12.0
    assert metrics.gauges["memory_usage_mb:read"] == 100.0
    assert metrics.get_node_stats("read")["success_count"] == metrics.get_node_stats("fail")["failure_count"] == 1
    assert metrics.counters["retry_count:flaky"] == 2
    assert metrics.get_metrics_by_name("read")[0].labels == {"engine": "spark"}


def test_only_declared_lookups_are_hits_or_misses(odibi_capture: Capture, metrics: MetricsManager) -> None:
    """A node that says nothing of a cache has missed nothing."""
    listen(odibi_capture, metrics)
    with oo.node("plain"):
        pass
    with oo.node("cached") as node:
        node.cache(hit=True, key="k")
    with oo.node("uncached") as node:
        node.cache(hit=False, key="k")
    assert {key: n for key, n in metrics.counters.items() if key.startswith("cache")} == {
        "cache_hit:cached": 1.0, "cache_miss:uncached": 1.0,
    }  # fmt: skip
    assert metrics.get_cache_hit_rate() == 50.0


def test_skipped_nodes_are_no_executions(odibi_capture: Capture, metrics: MetricsManager) -> None:
    """A cancelled one is, but neither a success nor a failure."""
    listen(odibi_capture, metrics)
    with oo.node("skipped") as node:
        node.skip("nothing new")
    with pytest.raises(KeyboardInterrupt), oo.node("cancelled"):
        raise KeyboardInterrupt
    assert metrics.get_node_stats("skipped") == {}
    stats = metrics.get_node_stats("cancelled")
    assert (stats["executions"], stats["success_count"], stats["failure_count"]) == (1, 0, 0)
    assert metrics.get_error_rate() == 0.0


# --- OpenTelemetry ---------------------------------------------------------------------------------------------------


def points(aggregates: Aggregates) -> dict[str, list[tuple[dict[str, Any], float]]]:
    """Return attributes and values (of a histogram: counts) by instrument."""
    return {
        family.instrument.name: [
            (dict(point.attributes), point.value if isinstance(point, Number) else point.count)
            for point in family.points
        ]
        for family in aggregates.collect()
    }


def test_executions_by_hand_reach_the_instruments(odibi_capture: Capture) -> None:
    """Of the pipeline they are recorded in; managers need no wiring, and their end takes nothing back."""
    aggregates = odibi_capture.telemetry.aggregates
    MetricsManager().record_node_execution("read", 100.0, True, rows=50, cached=True)
    metrics = MetricsManager()
    with oo.pipeline("nightly"):
        metrics.record_node_execution("read", 30.0, False)
    metrics.reset()
    metrics.record_node_execution("read", 100.0, True, rows=50)
    found = points(aggregates)
    plain, nightly = {"node": "read", "engine": "pandas"}, {"pipeline": "nightly", "node": "read"}
    assert found[names.NODE_DURATION.name] == [
        ({**plain, "outcome": "success"}, 2),
        ({**nightly, "engine": "pandas", "outcome": "failure"}, 1),
    ]
    assert found[names.NODE_ROWS.name] == [({**plain, "direction": "out"}, 100)]
    assert found[names.NODE_THROUGHPUT.name] == [(plain, 500.0)]
    assert found[names.NODE_CACHE_LOOKUPS.name] == [
        ({"node": "read", "result": "hit"}, 1),
        ({"node": "read", "result": "miss"}, 1),
        ({**nightly, "result": "miss"}, 1),
    ]
    (duration,) = (family for family in aggregates.collect() if family.instrument is names.NODE_DURATION)
    point = duration.points[0]
    assert isinstance(point, Distribution)
    assert (point.sum, point.min, point.max) == (0.2, 0.1, 0.1)
    assert not point.exemplars


def test_values_by_hand_reach_the_instrument_of_their_type(odibi_capture: Capture) -> None:
    """In its unit; types that no instrument takes stay with the manager."""
    aggregates = odibi_capture.telemetry.aggregates
    metrics = MetricsManager()
    metrics.record(MetricType.NODE_DURATION, "n", 500.0, {"engine": "spark"})
    metrics.increment(MetricType.CACHE_HIT, "n", 5)
    metrics.increment(MetricType.CACHE_MISS, "n")
    metrics.increment(MetricType.RETRY_COUNT, "n", 2)
    metrics.record_memory_usage("n", 64)
    metrics.record(MetricType.THROUGHPUT, "n", 7.5)
    metrics.record(MetricType.DATA_SIZE, "other", 7.5)
    found = points(aggregates)
    assert found[names.NODE_DURATION.name] == [({"node": "n", "engine": "spark", "outcome": ""}, 1)]
    assert found[names.NODE_CACHE_LOOKUPS.name] == [
        ({"node": "n", "result": "hit"}, 5), ({"node": "n", "result": "miss"}, 1),
    ]  # fmt: skip
    assert found[names.NODE_RETRIES.name] == [({"node": "n"}, 2)]
    assert found[names.NODE_MEMORY.name] == [({"node": "n"}, 64 * 2**20)]
    assert found[names.NODE_THROUGHPUT.name] == [({"node": "n"}, 7.5)]
    assert "other" not in str(found)


def test_executions_by_hand_reach_a_hosts_meter(odibi_capture: Capture) -> None:
    """The same instruments, with the same attributes."""
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader], shutdown_on_exit=False).get_meter("test")
    for kind, listener in ApiInstruments(meter, Aggregates()).listeners().items():
        odibi_capture.telemetry.subscribe(kind, listener)
    metrics = MetricsManager()
    with oo.pipeline("nightly"):
        metrics.record_node_execution("read", 100.0, True, rows=50)
        metrics.record_node_execution("read", math.nan, True, cached=True)
        metrics.increment(MetricType.RETRY_COUNT, "read", 3)
        metrics.record(MetricType.NODE_DURATION, "read", 250.0)
        metrics.record_memory_usage("read", 2)
        metrics.record(MetricType.DATA_SIZE, "read", 2)
    data = reader.get_metrics_data()
    assert data is not None
    found = {
        metric.name: [
            (dict(point.attributes or {}), getattr(point, "value", getattr(point, "sum", None)))
            for point in metric.data.data_points
        ]
        for metric in data.resource_metrics[0].scope_metrics[0].metrics
    }
    node = {"pipeline": "nightly", "node": "read"}
    assert found[names.NODE_DURATION.name] == [
        ({**node, "engine": "pandas", "outcome": "success"}, 0.1), (node, 0.25),
    ]  # fmt: skip
    assert found[names.NODE_ROWS.name] == [({**node, "engine": "pandas", "direction": "out"}, 50)]
    assert found[names.NODE_RETRIES.name] == [(node, 3)]
    assert found[names.NODE_MEMORY.name] == [(node, 2 * 2**20)]
    assert found[names.NODE_CACHE_LOOKUPS.name] == [({**node, "result": "miss"}, 1), ({**node, "result": "hit"}, 1)]
    assert found[names.NODE_ACTIVE.name] == [(node, 0)]


def test_decorated_nodes_reach_the_instruments_once(odibi_capture: Capture, metrics: MetricsManager) -> None:
    """What a manager hears of them is not handed on."""
    listen(odibi_capture, metrics)
    with oo.node("read"):
        pass
    assert metrics.get_node_stats("read")["executions"] == 1
    assert odibi_capture.telemetry.metrics.get_node_stats("read")["executions"] == 1
    ((_, count),) = points(odibi_capture.telemetry.aggregates)[names.NODE_DURATION.name]
    assert count == 1


def test_a_listener_that_raises_stays_within_telemetry(odibi_capture: Capture, metrics: MetricsManager) -> None:
    """It is counted, and the manager goes on."""
    odibi_capture.telemetry.subscribe(Execution, lambda fact: float(Rude()))  # type: ignore[arg-type]
    metrics.record_node_execution("n", 1.0, True)
    assert metrics.get_node_stats("n")["executions"] == 1
    assert odibi_capture.metric(names.TELEMETRY_DROPPED.name, signal="internal") == 1
