"""Ways to record one node, each set up once in a process of its own. A contender gives a call and a flush.

The rivals: the bare call, a bare SDK span, the same signals written by hand with SDK, structlog and psutil, logfire's
decorator, and a logger that opens its file for every line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

ATTRIBUTES = {
    "odibi.pipeline.name": "bench",
    "odibi.node.name": "work",
    "odibi.node.layer": "transform",
    "odibi.node.engine": "pandas",
}


class Contender(NamedTuple):
    """`call` records one node; `flush` gets out what it left waiting; `around` runs a loop of calls inside a run."""

    call: Callable[[], object]
    flush: Callable[[], object]
    around: Callable[[Callable[[], None]], None] = lambda loop: loop()


class Discard(SpanExporter):
    """An exporter that costs nothing: what is left is the SDK itself."""

    def export(self, spans):
        return SpanExportResult.SUCCESS


def work(x):
    """The node's own work: nothing, so that all that is measured is telemetry."""
    return x


def bare_call(directory: Path) -> Contender:
    return Contender(lambda: work(1), lambda: None)


def sdk_span(directory: Path) -> Contender:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Discard(), max_queue_size=100_000, max_export_batch_size=10_000))
    tracer = provider.get_tracer("bench")

    def call():
        with tracer.start_as_current_span("node work", attributes=ATTRIBUTES):
            return work(1)

    def around(loop):
        with tracer.start_as_current_span("pipeline bench"):
            loop()

    return Contender(call, provider.force_flush, around)


def otel_odibi_all(directory: Path) -> Contender:
    """Everything on: span, Parquet, both log lines, every metric, RSS, `.prom`."""
    return _otel_odibi(directory=directory)


def otel_odibi_no_files(directory: Path) -> Contender:
    """Spans and metrics in memory, no files."""
    return _otel_odibi()


def _otel_odibi(**settings) -> Contender:
    import otel_odibi as oo

    telemetry = oo.configure(service_name="bench", set_global=False, **settings)
    node = oo.node(layer="transform", engine="pandas")(work)

    def around(loop):
        with oo.pipeline("bench"):
            loop()

    return Contender(lambda: node(1), lambda: telemetry.flush(60), around)


def otel_odibi_unconfigured(directory: Path) -> Contender:
    import otel_odibi as oo

    node = oo.node(layer="transform", engine="pandas")(work)
    return Contender(lambda: node(1), lambda: None)


def by_hand(directory: Path) -> Contender:
    """The same signals as a careful engineer writes them: SDK span and instruments, structlog lines, psutil."""
    import psutil
    import structlog
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Discard(), max_queue_size=100_000, max_export_batch_size=10_000))
    tracer = provider.get_tracer("bench")
    meter = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False).get_meter("bench")
    duration, rows = meter.create_histogram("duration", "s"), meter.create_counter("rows")
    active, memory = meter.create_up_down_counter("active"), meter.create_gauge("rss", "By")
    process = psutil.Process()
    file = (directory / "hand.jsonl").open("ab", buffering=0)
    log = structlog.wrap_logger(
        structlog.BytesLogger(file),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=lambda event, **_: json.dumps(event).encode()),
        ],
    )
    labels = {"pipeline": "bench", "node": "work"}

    def call():
        with tracer.start_as_current_span("node work", attributes=ATTRIBUTES) as span:
            context = span.get_span_context()
            ids = {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
            log.info("node started", event_type="node_start", node_name="work", **ids)
            active.add(1, labels)
            began = time.perf_counter()
            result = work(1)
            seconds = time.perf_counter() - began
            rss = process.memory_info().rss
            span.set_attributes({"odibi.node.outcome": "success", "odibi.node.memory.rss": rss})
            active.add(-1, labels)
            duration.record(seconds, {**labels, "outcome": "success"})
            rows.add(1, labels)
            memory.set(rss, labels)
            log.info("node completed", event_type="node_complete", node_name="work", duration_ms=seconds * 1e3, **ids)
            return result

    def around(loop):
        with tracer.start_as_current_span("pipeline bench"):
            loop()

    return Contender(call, provider.force_flush, around)


def logfire_instrument(directory: Path) -> Contender:
    """logfire's decorator: a span alone."""
    import logfire

    logfire.configure(send_to_logfire=False, console=False, inspect_arguments=False, metrics=False)
    decorated = logfire.instrument("node work", extract_args=False)(work)
    return Contender(lambda: decorated(1), logfire.force_flush)


def file_per_line(directory: Path) -> Contender:
    """Two log lines a node by a logger that opens its file for each, and nothing else."""
    path = directory / "lines.jsonl"

    def line(event):
        with path.open("a") as file:
            record = {"timestamp": time.time(), "event_type": event, "node_name": "work", "layer": "transform"}
            file.write(json.dumps(record) + "\n")

    def call():
        line("node_start")
        result = work(1)
        line("node_complete")
        return result

    return Contender(call, lambda: None)


CONTENDERS = {
    "bare call": bare_call,
    "otel_odibi, unconfigured": otel_odibi_unconfigured,
    "SDK span, 4 attributes": sdk_span,
    "otel_odibi, everything on": otel_odibi_all,
    "otel_odibi, no files": otel_odibi_no_files,
    "the same by hand": by_hand,
    "logfire.instrument, span only": logfire_instrument,
    "file-per-line logger, 2 lines": file_per_line,
}
