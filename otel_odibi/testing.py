"""Test your pipelines' telemetry: a capture of spans, log records and metric points, with a fake clock and known ids.

    from otel_odibi.testing import capture

    def test_join_reports_its_rows():
        with capture() as captured:
            join([1, 2], [3])
        assert captured.node("join").attributes["odibi.node.rows.out"] == 2

or, with pytest, the fixture `odibi_capture`, which the package brings along.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import DEFAULT_ON

from otel_odibi import logs, names, runtime
from otel_odibi.facts import Distribution, Number
from otel_odibi.settings import Settings
from otel_odibi.telemetry import Telemetry, enabled

START = 1_767_225_600_000_000_000
"""Where a `FakeClock` starts: 2026-01-01T00:00:00Z, in Unix nanoseconds."""


class FakeClock:
    """A clock that stands still until told to move. Thread-safe."""

    def __init__(self, start: int = START) -> None:
        self._now = start

    def time_ns(self) -> int:
        """Return the time, in Unix nanoseconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock on."""
        self._now += round(seconds * 1e9)


class IncrementalIds(IdGenerator):
    """Makes trace ids 1, 2, 3 ... and span ids 1, 2, 3 ... Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trace = self._span = 0

    def generate_trace_id(self) -> int:
        """Return the next trace id."""
        with self._lock:
            self._trace += 1
            return self._trace

    def generate_span_id(self) -> int:
        """Return the next span id."""
        with self._lock:
            self._span += 1
            return self._span


class DagNode(NamedTuple):
    """One execution of a node: what it depends on is told by its links, or by name where there is no span to link."""

    outcome: str
    rows: int | None = None
    attempts: int = 1
    after: tuple[str, ...] = ()
    parent: str = ""


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One series of a metric: `value` is its total or last value; of a histogram the sum, with `count` and `counts`."""

    name: str
    attributes: Mapping[str, Any]
    value: float
    count: int = 0
    counts: tuple[int, ...] = ()


class Capture:
    """What was recorded since `capture()` was entered. Reading waits for spans that are still on their way."""

    def __init__(self, telemetry: Telemetry, exporter: InMemorySpanExporter, clock: FakeClock) -> None:
        self.telemetry = telemetry
        self.clock = clock
        self.logs: list[dict[str, Any]] = []
        """Log records in order, as they would be read back from the log file."""
        self._exporter = exporter

    @property
    def spans(self) -> list[ReadableSpan]:
        """Finished spans, in the order they ended, cleaned as they would be exported."""
        self.telemetry.flush()
        return list(self._exporter.get_finished_spans())

    def span(self, name: str) -> ReadableSpan:
        """Return the last finished span of this name. Raises LookupError, naming those there are, if there is none."""
        spans = self.spans
        for span in reversed(spans):
            if span.name == name:
                return span
        raise LookupError(f"no finished span {name!r}; there are {[span.name for span in spans]}")

    def node(self, name: str) -> ReadableSpan:
        """Return the last finished span of this node."""
        return self.span(names.NODE_SPAN.format(name=name))

    def pipeline(self, name: str) -> ReadableSpan:
        """Return the last finished span of this pipeline."""
        return self.span(names.PIPELINE_SPAN.format(name=name))

    def dag(self) -> dict[str, DagNode]:
        """Return the nodes executed, by name (the last of several of one name), to be compared with a whole DAG.

            assert captured.dag()["join"] == DagNode("success", rows=3, after=("left", "right"), parent="pipeline etl")

        `after` is sorted; `parent` is the name of the parent span.
        """
        spans = self.spans
        by_id = {span.context.span_id: span for span in spans}
        return {
            str(span.attributes[names.NODE_NAME]): _dag_node(span, by_id)
            for span in spans
            if span.attributes and span.name == names.NODE_SPAN.format(name=span.attributes.get(names.NODE_NAME))
        }

    @property
    def metrics(self) -> list[MetricPoint]:
        """Every series of every metric of this package."""
        return [
            _metric_point(family.instrument.name, point)
            for family in self.telemetry.aggregates.collect()
            for point in family.points
        ]

    def metric(self, name: str, **attributes: Any) -> float:
        """Return the value of the series with these attributes (further ones are not looked at), 0 if there is none.

        Several such series add up.
        """
        wanted = attributes.items()
        return sum(p.value for p in self.metrics if p.name == name and wanted <= p.attributes.items())


def _dag_node(span: ReadableSpan, by_id: Mapping[int, ReadableSpan]) -> DagNode:
    found: Mapping[str, Any] = span.attributes or {}
    linked = [by_id[link.context.span_id] for link in span.links if link.context.span_id in by_id]
    after = {str((producer.attributes or {}).get(names.NODE_NAME)) for producer in linked}
    after.update(found.get(names.NODE_DEPENDS_ON, ()))
    parent = by_id.get(span.parent.span_id) if span.parent else None
    return DagNode(
        found[names.NODE_OUTCOME], found.get(names.NODE_ROWS_OUT), found[names.NODE_ATTEMPT], tuple(sorted(after)),
        "" if parent is None else parent.name,
    )  # fmt: skip


@contextmanager
def untouched(package: str) -> Iterator[None]:
    """Fail a test that leaves a loaded module or class of `package` with another attribute than it found.

        with untouched("acme"):
            AcmeInstrumentor().instrument()
            AcmeInstrumentor().uninstrument()

    Compares by identity, so that a wrapper left in place, or an equal copy, is told of by an AssertionError. Modules
    that are first imported inside the block are not looked at: import before what the instrumentor changes.
    """
    before = _attributes_of(package)
    yield
    now = _attributes_of(package)
    changed = [
        f"{owner}.{name}" for owner, found in before.items() for name in {*found, *now.get(owner, found)}
        if found.get(name) is not now.get(owner, found).get(name) and f"{owner}.{name}" not in sys.modules
    ]  # fmt: skip
    assert not changed, f"changed and not put back: {', '.join(sorted(changed))}"  # noqa: S101


def _attributes_of(package: str) -> dict[str, dict[str, Any]]:
    modules = {n: m for n, m in list(sys.modules.items()) if m is not None and f"{n}.".startswith(f"{package}.")}
    found = {name: {**vars(module), "__warningregistry__": None} for name, module in modules.items()}  # Python's own
    for name, module in modules.items():
        owned = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name]
        found.update({f"{name}.{owner.__qualname__}": dict(vars(owner)) for owner in owned})
    return found


def _metric_point(name: str, point: Number | Distribution) -> MetricPoint:
    if isinstance(point, Number):
        return MetricPoint(name, point.attributes, point.value)
    return MetricPoint(name, point.attributes, point.sum, point.count, point.counts)


@contextmanager
def capture(**settings: Any) -> Iterator[Capture]:
    """Record everything in memory for the time of the block, in place of whatever telemetry is configured.

    Takes settings as `configure()` does; environment and pyproject.toml are not looked at. Ids count from 1, run ids
    are `run-1`, `run-2` ..., the clock moves only by `captured.clock.advance(seconds)`, resident memory is 100 MiB. No
    global of OpenTelemetry is touched. One capture at a time in a process: it is process-wide, for all threads.
    """
    clock, exporter = FakeClock(), InMemorySpanExporter()
    run_ids = (f"run-{number}" for number in range(1, 1_000_000))
    captured: Capture
    telemetry = Telemetry(
        Settings.resolve(settings, {}, {}),
        tracer_provider=enabled(
            TracerProvider(sampler=DEFAULT_ON, id_generator=IncrementalIds(), shutdown_on_exit=False)
        ),
        span_exporters=(exporter,),
        log_outputs=(lambda record, line: captured.logs.append(json.loads(line)),),
        clock=clock.time_ns,
        environ={},
        runtime_options={"tick": clock.time_ns, "read_rss": lambda: 100 * 2**20, "new_run_id": lambda: next(run_ids)},
    )
    captured = Capture(telemetry, exporter, clock)
    before = runtime.configured(), runtime._disabled, logs.active()
    telemetry.activate()
    try:
        yield captured
    finally:
        telemetry.flush()
        telemetry.shutdown()
        runtime.activate(before[0], disabled=before[1])
        logs.activate(before[2])
