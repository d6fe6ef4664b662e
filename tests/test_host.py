"""Telemetry inside a host application that has OpenTelemetry of its own: its providers are used and not replaced.

What sets OpenTelemetry's globals runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

import otel_odibi as oo
from otel_odibi import runtime
from otel_odibi.names import DURATION_BOUNDS

ROOT = Path(__file__).parent.parent

PRELUDE = """
    import json
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    import otel_odibi as oo

    @oo.node(layer="l")
    def work(rows):
        return rows

    def names(exporter):
        return [span.name for span in exporter.get_finished_spans()]

    def host():
        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        return provider, exporter
"""


def run(program: str, directory: Path, **environment: str) -> Any:
    """Run a program in a process of its own, warnings as errors, and return what it prints as JSON."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    code = textwrap.dedent(PRELUDE) + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=directory,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- without configure() ---------------------------------------------------------------------------------------------


def test_scopes_use_the_host_s_global_providers(tmp_path: Path) -> None:
    """From the moment the host sets them, with no `configure()`; a function decorated before is live then."""
    program = """
        work([1])
        provider, exporter = host()
        reader = InMemoryMetricReader()
        trace.set_tracer_provider(provider)
        work([1])
        metrics.set_meter_provider(MeterProvider([reader]))
        with trace.get_tracer("host").start_as_current_span("request"), oo.pipeline("p"):
            work([1, 2])
        points = {
            metric.name: [dict(point.attributes) for point in metric.data.data_points]
            for resource in reader.get_metrics_data().resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }
        spans = exporter.get_finished_spans()
        print(json.dumps({
            "names": names(exporter), "points": points,
            "parents": [span.parent and span.parent.span_id for span in spans],
            "ids": [span.context.span_id for span in spans],
            "kinds": sorted({type(span).__name__ for span in spans}),
            "outcome": spans[1].attributes["odibi.node.outcome"],
        }))
    """
    told = run(program, tmp_path)
    assert told["names"] == ["node work", "node work", "pipeline p", "request"]
    _, _, pipeline, request = told["ids"]
    assert told["parents"] == [None, pipeline, request, None]
    assert told["outcome"] == "success"
    (duration,) = told["points"]["odibi.node.duration"]
    assert duration == {"pipeline": "p", "node": "work", "layer": "l", "outcome": "success"}
    assert {"odibi.node.rows", "odibi.node.active", "odibi.pipeline.duration"} <= set(told["points"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["OTEL_PYTHON_TRACER_PROVIDER", "OTEL_PYTHON_METER_PROVIDER"])
def test_a_host_s_provider_that_cannot_be_loaded(tmp_path: Path, variable: str) -> None:
    """OpenTelemetry raises on it; the pipeline goes on without telemetry, and a warning says why."""
    program = """
        import logging
        heard = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        logging.getLogger("otel_odibi").addHandler(handler)
        results = [work(1), work(2)]
        with oo.pipeline("p") as run, oo.node("n") as n:
            pass
        print(json.dumps([results, bool(run), bool(n), heard]))
    """
    results, run_live, node_live, heard = run(program, tmp_path, **{variable: "no_such_provider"})
    assert (results, run_live, node_live) == ([1, 2], False, False)
    assert len(heard) == 1
    assert "cannot be used" in heard[0]


# --- configure() beside a host ---------------------------------------------------------------------------------------


def test_configure_leaves_a_host_s_globals_in_place(tmp_path: Path) -> None:
    """Its exporter gets the spans, ours too; after our shutdown the host's goes on, for other libraries and scopes."""
    program = """
        provider, exporter = host()
        trace.set_tracer_provider(provider)
        telemetry = oo.configure(service_name="s", directory="t", span_formats="none", metric_formats="none")
        with oo.pipeline("p"):
            work([1])
        trace.get_tracer("host").start_span("theirs").end()
        same = trace.get_tracer_provider() is provider is telemetry.tracer_provider
        telemetry.shutdown()
        work([1])
        trace.get_tracer("host").start_span("later").end()
        lines = [json.loads(line) for line in open("t/logs/s.jsonl")]
        ids = {f"{span.context.span_id:016x}" for span in exporter.get_finished_spans()[:2]}
        print(json.dumps({
            "same": same, "names": names(exporter), "events": [line["event_type"] for line in lines],
            "correlated": ids == {line["span_id"] for line in lines},
        }))
    """
    told = run(program, tmp_path)
    assert told["same"] is True
    assert told["names"] == ["node work", "pipeline p", "theirs", "node work", "later"]
    assert told["events"] == ["pipeline_start", "node_start", "node_complete", "pipeline_complete"]
    assert told["correlated"] is True


def test_configure_without_a_host_sets_the_globals_once(tmp_path: Path) -> None:
    """Other libraries' spans join the trace; after the shutdown scopes record nothing; a second configure() is live."""
    program = """
        from otel_odibi import runtime
        options = {"directory": "t", "span_formats": "json", "metric_formats": "none"}
        first = oo.configure(service_name="a", **options)
        ours = trace.get_tracer_provider() is first.tracer_provider
        with oo.pipeline("p") as run, trace.get_tracer("library").start_as_current_span("theirs") as theirs:
            joined = theirs.get_span_context().trace_id == run.span.get_span_context().trace_id
        first.shutdown()
        off = runtime.live() is None
        second = oo.configure(service_name="b", **options)
        with oo.pipeline("again") as run:
            live = bool(run)
            trace.get_tracer("library").start_span("theirs again").end()
        second.shutdown()
        print(json.dumps([ours, joined, off, live, runtime.live() is None]))
    """
    pytest.importorskip("otel_odibi.exporters.json")
    assert run(program, tmp_path) == [True, True, True, True, True]
    assert "theirs again" in (tmp_path / "t/otlp/b.traces.jsonl").read_text()


def test_turned_off_in_the_environment(tmp_path: Path) -> None:
    """`OTEL_ODIBI_ENABLED=false` silences scopes even in a host that has providers, and writes nothing."""
    program = """
        provider, exporter = host()
        trace.set_tracer_provider(provider)
        telemetry = oo.configure(service_name="s", directory="t")
        with oo.pipeline("p") as run:
            result = work([1])
        oo.get_logger().info("nowhere")
        telemetry.shutdown()
        print(json.dumps([result, bool(run), names(exporter)]))
    """
    assert run(program, tmp_path, OTEL_ODIBI_ENABLED="false") == [[1], False, []]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- providers handed over -------------------------------------------------------------------------------------------


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory and an environment without any settings; telemetry is off again afterwards."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(variable)
    yield tmp_path
    runtime.activate(None)


def host(**options: Any) -> tuple[TracerProvider, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    options = {"meter_provider": NoOpMeterProvider(), "shutdown_on_exit": False, **options}
    provider = TracerProvider(resource=Resource({"host": "yes"}), **options)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


@pytest.mark.parametrize("sampler", [None, ALWAYS_ON], ids=["default sampler", "another sampler"])
def test_providers_handed_over(at_home: Path, sampler: Any) -> None:
    """Spans and metrics go through them, with the host's resource, whoever makes the spans; they outlive us."""
    provider, exporter = host(sampler=sampler)
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    options: dict[str, Any] = {"set_global": False, "span_formats": "none", "metric_formats": "none"}
    with oo.configure(directory="t", tracer_provider=provider, meter_provider=meters, **options), oo.pipeline("p"):
        with pytest.raises(ValueError, match="bad"), oo.node("n", attributes={"tags": ["a"]}):
            raise ValueError("bad")
        with oo.node("m", depends_on="n"):
            pass
    data = reader.get_metrics_data()
    assert data is not None
    points = {m.name: m.data for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics}
    duration = points["odibi.node.duration"].data_points[0]
    assert tuple(duration.explicit_bounds) == DURATION_BOUNDS  # type: ignore[union-attr]
    assert duration.attributes == {"pipeline": "p", "node": "n", "outcome": "failure"}
    failed, linked, run = exporter.get_finished_spans()
    assert failed.resource.attributes == {"host": "yes"}
    assert failed.attributes["tags"] == ("a",)
    assert [event.name for event in failed.events] == ["exception"]
    assert [link.context.span_id for link in linked.links] == [failed.context.span_id]
    assert linked.parent == run.context
    provider.get_tracer("host").start_span("later").end()
    assert len(exporter.get_finished_spans()) == 4
    meters.shutdown()


def test_a_host_that_samples_nothing(at_home: Path) -> None:
    """Log lines and metrics are there all the same, and say that the trace is not sampled."""
    provider, exporter = host(sampler=ALWAYS_OFF)
    options: dict[str, Any] = {"set_global": False, "span_formats": "none", "metric_formats": "none"}
    with oo.configure(service_name="s", directory="t", tracer_provider=provider, **options) as telemetry:
        with oo.pipeline("p"), oo.node("n") as n:
            n.set(a=1)
            n.event("e")
        counted = {family.instrument.name for family in telemetry.aggregates.collect()}
    assert exporter.get_finished_spans() == ()
    lines = [json.loads(line) for line in (at_home / "t/logs/s.jsonl").read_text().splitlines()]
    assert [line["event_type"] for line in lines] == [
        "pipeline_start",
        "node_start",
        "node_complete",
        "pipeline_complete",
    ]
    assert {line["trace_flags"] & 1 for line in lines} == {0}
    assert len({line["trace_id"] for line in lines}) == 1
    assert "odibi.node.duration" in counted


class Minimal(trace.Tracer, trace.TracerProvider):
    """A provider of the OpenTelemetry API that is not the SDK's: its spans know next to nothing."""

    def __init__(self) -> None:
        self.started: list[tuple[str, Any]] = []

    def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
        return self

    def start_span(self, name: str, *args: Any, **kwargs: Any) -> trace.Span:
        self.started.append((name, kwargs.get("start_time")))
        return trace.NonRecordingSpan(trace.SpanContext(1, len(self.started), is_remote=False))

    def start_as_current_span(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def test_a_host_without_the_sdk(at_home: Path) -> None:
    """Scopes speak the OpenTelemetry API alone, so any provider will do."""
    provider = Minimal()
    options: dict[str, Any] = {"set_global": False, "span_formats": "none", "metric_formats": "none"}
    with (
        oo.configure(service_name="s", directory="t", tracer_provider=provider, **options),
        oo.pipeline("p") as run,
        oo.node("n") as n,
    ):
        assert run
        assert n
        assert n.trace_id == f"{1:032x}"
    assert [name for name, _ in provider.started] == ["pipeline p", "node n"]
    assert len((at_home / "t/logs/s.jsonl").read_text().splitlines()) == 4
