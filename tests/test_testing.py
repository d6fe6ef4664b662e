"""The capture for users' tests: what it records, what it holds still, and that it leaves no trace behind."""

from __future__ import annotations

import contextlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry import metrics, trace

import otel_odibi as oo
from otel_odibi import logs, runtime
from otel_odibi.errors import SettingError
from otel_odibi.testing import START, Capture, FakeClock, IncrementalIds, MetricPoint, capture


@oo.node(layer="silver")
def join(left, right):
    """Put two lists together."""
    return left + right


def test_the_capture_gives_spans_logs_and_metrics():
    """As in the documentation."""
    with capture() as captured, oo.pipeline("daily"):
        join([1, 2], [3])
    assert captured.node("join").attributes["odibi.node.rows.out"] == 3
    assert captured.pipeline("daily").context == captured.node("join").parent
    assert [span.name for span in captured.spans] == ["node join", "pipeline daily"]
    assert [record["event_type"] for record in captured.logs] == [
        "pipeline_start", "node_start", "node_complete", "pipeline_complete",
    ]  # fmt: skip
    assert captured.metric("odibi.node.rows", direction="out") == 3
    assert captured.metric("odibi.node.rows", node="join") == 6
    assert captured.metric("odibi.node.rows", node="other") == 0


def test_ids_time_and_memory_are_known():
    """So that a test can compare whole records."""
    with capture() as captured, oo.pipeline("daily") as run:
        captured.clock.advance(90)
        with oo.node("n"):
            captured.clock.advance(0.25)
    assert (run.run_id, run.trace_id) == ("run-1", f"{1:032x}")
    span = captured.node("n")
    assert (span.context.trace_id, span.context.span_id, span.parent.span_id) == (1, 2, 1)
    assert (span.start_time, span.end_time) == (START + 90 * 10**9, START + 90_250_000_000)
    assert captured.logs[2] == {
        "timestamp": "2026-01-01T00:01:30.250000Z", "level": "info", "event_type": "node_complete",
        "message": "node n completed", "service": "odibi", "pipeline": "daily", "run_id": "run-1", "node_name": "n",
        "status": "success", "duration_ms": 250.0, "memory_mb": 100.0, "attempt": 1, "trace_id": f"{1:032x}",
        "span_id": f"{2:016x}", "parent_span_id": f"{1:016x}", "time_unix_nano": START + 90_250_000_000,
        "trace_flags": captured.logs[2]["trace_flags"],
    }  # fmt: skip


def test_metric_points_tell_counts_and_buckets_of_histograms():
    """Value is the sum; other kinds have neither."""
    with capture() as captured, oo.node("n"):
        captured.clock.advance(2)
    by_name = {point.name: point for point in captured.metrics}
    duration = by_name["odibi.node.duration"]
    assert (duration.value, duration.count, sum(duration.counts)) == (2.0, 1, 1)
    assert by_name["odibi.node.active"] == MetricPoint("odibi.node.active", {"node": "n"}, 0)


def test_a_missing_span_is_named_with_those_there_are():
    """The message is enough to see what happened instead."""
    with capture() as captured, oo.node("read"):
        pass
    with pytest.raises(LookupError, match=r"no finished span 'node raed'; there are \['node read'\]"):
        captured.node("raed")


def test_the_last_span_of_a_name_is_given():
    """Of several executions; `spans` has them all."""
    with capture() as captured:
        for rows in (1, 2):
            with oo.node("n") as n:
                n.output(rows=rows)
    assert captured.node("n").attributes["odibi.node.rows.out"] == 2
    assert len(captured.spans) == 2


def test_what_was_recorded_stays_after_the_block():
    """And the next capture starts anew."""
    with capture() as first:
        join([1], [2])
    with capture() as second:
        join([1], [2])
    assert first.spans[0].context == second.spans[0].context
    assert len(first.spans) == len(second.spans) == 1
    assert len(first.logs) == len(second.logs) == 2


def test_a_capture_within_another_takes_its_place_and_gives_it_back():
    """Whatever was configured before is in force again, also after an exception."""
    with capture() as outer:
        with contextlib.suppress(KeyError), capture() as inner:
            join([1], [2])
            raise KeyError
        assert not outer.spans
        assert inner.spans
        join([1], [2])
        oo.get_logger().info("outer")
    assert len(outer.spans) == 1
    assert outer.logs[-1]["message"] == "outer"
    assert (runtime.configured(), logs.active()) == (None, None)


def test_scopes_that_were_turned_off_are_off_again_afterwards():
    """As OTEL_SDK_DISABLED had them."""
    runtime.activate(None, disabled=True)
    try:
        with capture() as captured:
            join([1], [2])
        assert captured.spans
        assert runtime._disabled
    finally:
        runtime.activate(None)


def test_the_environment_is_not_looked_at(monkeypatch, tmp_path):
    """Tests give the same on every machine; nothing is sent or written from them."""
    for name, value in {
        "OTEL_SDK_DISABLED": "true",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_SERVICE_NAME": "x",
        "OTEL_ODIBI_DIRECTORY": str(tmp_path / "telemetry"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "pyproject.toml").write_text("[tool.otel-odibi]\nservice_name = 'y'\n")
    monkeypatch.chdir(tmp_path)
    with capture() as captured:
        join([1], [2])
    assert captured.node("join").context.is_valid
    assert captured.logs[0]["service"] == "odibi"
    assert len(captured.telemetry.queues) == 1
    assert not (tmp_path / "telemetry").exists()


def test_settings_are_those_of_configure(tmp_path):
    """Also the directory: files are written as well then. A wrong one is an error and leaves nothing behind."""
    with capture(service_name="flights", directory=tmp_path, span_formats="none", metric_formats="none") as captured:
        join([1], [2])
    assert captured.logs[0]["service"] == "flights"
    assert (tmp_path / "logs" / "flights.jsonl").read_bytes().count(b"\n") == 2
    with pytest.raises(SettingError), capture(log_level="loud"):
        pass
    assert runtime.configured() is None


def test_records_of_other_loggers_come_with_capture_logging():
    """The handler is gone afterwards."""
    before = list(logging.getLogger().handlers)
    with capture(capture_logging=True) as captured:
        logging.getLogger("host").warning("x")
    assert [record["message"] for record in captured.logs] == ["x"]
    assert logging.getLogger().handlers == before


def test_no_thread_and_no_global_is_left_behind():
    """A thousand tests may each have one."""
    before = threading.active_count(), trace._TRACER_PROVIDER, metrics._internal._METER_PROVIDER
    for _ in range(5):
        with capture():
            join([1], [2])
    assert (threading.active_count(), trace._TRACER_PROVIDER, metrics._internal._METER_PROVIDER) == before


def test_the_fixture_is_a_capture(odibi_capture):
    """It comes with the package's pytest plugin."""
    assert isinstance(odibi_capture, Capture)
    join([1], [2])
    assert odibi_capture.node("join")


def test_the_clock_moves_only_when_told():
    """By seconds."""
    clock = FakeClock(5)
    assert (clock.time_ns(), clock.time_ns()) == (5, 5)
    clock.advance(1.5)
    assert clock.time_ns() == 1_500_000_005


def test_ids_are_never_given_twice():
    """To any thread."""
    ids = IncrementalIds()
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda _: (ids.generate_trace_id(), ids.generate_span_id()), range(800)))
    assert sorted(trace_id for trace_id, _ in given) == sorted(span_id for _, span_id in given) == list(range(1, 801))
