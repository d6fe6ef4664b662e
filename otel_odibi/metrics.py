"""Metrics of nodes and pipelines, aggregated from facts: a bounded set of series, exact totals, no cost per series.

`Aggregates` keeps them itself: a synchronous SDK instrument costs 5 us a call, and the SDK has no observable
histogram. `instruments` records the same facts through a host application's own meter instead.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any, Final

from otel_odibi import names
from otel_odibi.calls import current
from otel_odibi.facts import (
    MIB,
    CacheLookup,
    Distribution,
    Execution,
    Exemplar,
    Family,
    Measure,
    MetricType,
    NodeFinished,
    NodeRetried,
    NodeStarted,
    Number,
    RunFinished,
    RunStarted,
)
from otel_odibi.forks import after_fork
from otel_odibi.names import DURATION_BOUNDS, FAILURE, LOST, SKIPPED, SUCCESS, Instrument

TIMELESS: Final = (SKIPPED, LOST)
"""Outcomes that record no duration."""
_OVERFLOW: Final[Mapping[str, str | bool]] = {names.OVERFLOW_ATTRIBUTE: True}


# The instrument that takes a type's values, the factor to its unit, where `Aggregates` keeps it, its own attribute.
MEASURED: Final[dict[MetricType, tuple[Instrument, float, str, dict[str, str]]]] = {
    MetricType.NODE_DURATION: (names.NODE_DURATION, 1e-3, "durations", {}),
    MetricType.THROUGHPUT: (names.NODE_THROUGHPUT, 1, "throughput", {}),
    MetricType.CACHE_HIT: (names.NODE_CACHE_LOOKUPS, 1, "hits", {"result": "hit"}),
    MetricType.CACHE_MISS: (names.NODE_CACHE_LOOKUPS, 1, "misses", {"result": "miss"}),
    MetricType.RETRY_COUNT: (names.NODE_RETRIES, 1, "retries", {}),
    MetricType.MEMORY_USAGE: (names.NODE_MEMORY, MIB, "rss", {}),
}
_NO_SPAN: Final = NodeStarted("", "", "", "", "", 0, 0, 0, 0, 0)
OUTCOMES: Final[dict[bool | None, Any]] = {True: SUCCESS, False: FAILURE, None: ""}


def started_by_hand(fact: Execution | Measure) -> NodeStarted:
    """Return a start for a record: of the pipeline under way here, and of no span."""
    call = current.get()
    pipeline = "" if call is None or call.run is None else call.run.name
    engine = fact.engine if isinstance(fact, Execution) else dict(fact.labels).get("engine", "")
    return NodeStarted(pipeline, "", fact.node, "", engine, 0, 0, 0, 0, fact.time_unix_nano)


class Histogram:
    """Counts of durations in the buckets of `names.DURATION_BOUNDS`, in seconds. Not locked: its owner does that."""

    __slots__ = ("count", "counts", "exemplars", "max", "min", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(DURATION_BOUNDS) + 1)
        self.count = 0
        self.sum = 0.0
        self.min = float("inf")
        self.max = 0.0
        self.exemplars: dict[int, Exemplar] = {}

    def record(self, seconds: float, time_unix_nano: int, start: NodeStarted | RunStarted) -> None:
        """Count one duration; it becomes its bucket's exemplar where its span is sampled."""
        bucket = bisect_left(DURATION_BOUNDS, seconds)
        self.counts[bucket] += 1
        self.count += 1
        self.sum += seconds
        if seconds < self.min:
            self.min = seconds
        if seconds > self.max:
            self.max = seconds
        if start.trace_flags & 1:
            self.exemplars[bucket] = Exemplar(seconds, time_unix_nano, start.trace_id, start.span_id)

    def point(self, attributes: Mapping[str, str | bool]) -> Distribution:
        """Return the counts so far as a point with these attributes."""
        exemplars = tuple(self.exemplars.values())
        return Distribution(attributes, tuple(self.counts), self.sum, self.count, self.min, self.max, exemplars)


class _NodeSeries:
    """Everything counted for one node of one pipeline, layer and engine."""

    __slots__ = (
        "active",
        "attributes",
        "durations",
        "hits",
        "misses",
        "retries",
        "rows_in",
        "rows_out",
        "rss",
        "throughput",
    )

    def __init__(self, attributes: Mapping[str, str | bool]) -> None:
        self.attributes = attributes
        self.durations: dict[str, Histogram] = {}
        self.active = self.hits = self.misses = self.retries = 0
        self.rows_in: int | None = None
        self.rows_out: int | None = None
        self.throughput: float | None = None
        self.rss: int | None = None


class _PipelineSeries:
    __slots__ = ("active", "attributes", "durations", "last_success")

    def __init__(self, attributes: Mapping[str, str | bool]) -> None:
        self.attributes = attributes
        self.durations: dict[str, Histogram] = {}
        self.active = 0
        self.last_success: float | None = None


class Aggregates:
    """Listens to facts and keeps the totals of every instrument in `names.INSTRUMENTS`. Thread-safe; never raises.

    At most `limit` nodes, pipelines and edges are kept apart; what comes on top adds up in one series with the
    attribute `otel.metric.overflow`, and at the next collection `on_overflow` is told the instrument whose attributes
    are too many: not under the lock, as it may log, and a host's logging handler may do anything.
    Source: OpenTelemetry metrics SDK specification, Cardinality limits.
    """

    def __init__(
        self,
        limit: int = 2_000,
        *,
        clock: Callable[[], int] = time.time_ns,
        on_overflow: Callable[[str], None] = lambda name: None,
    ) -> None:
        # Reentrant: a signal handler, or a generator that garbage collection closes, may finish a node inside of it.
        self._lock = threading.RLock()
        self._limit = limit
        self._clock = clock
        self._on_overflow = on_overflow
        self.start_time_unix_nano = clock()
        self._nodes: dict[tuple[str, str, str, str], _NodeSeries] = {}
        self._pipelines: dict[str, _PipelineSeries] = {}
        self._edges: dict[tuple[str, str, str], Mapping[str, str | bool]] = {}
        self._dropped: dict[tuple[str, str], int] = {}
        self._turned_away: set[str] = set()
        self._extra_nodes = _NodeSeries(_OVERFLOW)
        self._extra_pipelines = _PipelineSeries(_OVERFLOW)

    def listeners(self) -> dict[type, Callable[[Any], None]]:
        """Return which of the methods wants which fact."""
        return {
            NodeStarted: self.node_started,
            NodeFinished: self.node_finished,
            NodeRetried: self.node_retried,
            CacheLookup: self.cache_looked_up,
            RunStarted: self.run_started,
            RunFinished: self.run_finished,
            Execution: self.executed,
            Measure: self.measured,
        }

    def after_fork(self) -> None:
        """Start anew in a forked child: its parent goes on counting what was before, and held the lock perhaps."""
        self.__init__(self._limit, clock=self._clock, on_overflow=self._on_overflow)  # type: ignore[misc]

    def node_started(self, fact: NodeStarted) -> None:
        """Count one more execution under way."""
        with self._lock:
            self._node(fact).active += 1

    def node_finished(self, fact: NodeFinished) -> None:
        """Count a finished execution: duration, rows, throughput, memory, edges."""
        start = fact.start
        with self._lock:
            series = self._node(start)
            series.active -= 1
            if fact.outcome not in TIMELESS:
                histogram = series.durations.get(fact.outcome)
                if histogram is None:
                    histogram = series.durations[fact.outcome] = Histogram()
                seconds = fact.duration_ns / 1e9
                histogram.record(seconds, fact.time_unix_nano, start)
                if fact.rows_out is not None and seconds > 0:
                    series.throughput = fact.rows_out / seconds
            if fact.rows_in is not None:
                series.rows_in = (series.rows_in or 0) + fact.rows_in
            if fact.rows_out is not None:
                series.rows_out = (series.rows_out or 0) + fact.rows_out
            if fact.rss is not None:
                series.rss = fact.rss
            for edge in fact.edges:
                self._edge(start.pipeline, edge.node, start.node)

    def node_retried(self, fact: NodeRetried) -> None:
        """Count a retry."""
        with self._lock:
            self._node(fact.start).retries += 1

    def cache_looked_up(self, fact: CacheLookup) -> None:
        """Count a cache hit or miss."""
        with self._lock:
            series = self._node(fact.start)
            if fact.hit:
                series.hits += 1
            else:
                series.misses += 1

    def run_started(self, fact: RunStarted) -> None:
        """Count one more run under way."""
        with self._lock:
            self._pipeline(fact.pipeline).active += 1

    def run_finished(self, fact: RunFinished) -> None:
        """Count a finished run and, where it succeeded, when."""
        start = fact.start
        with self._lock:
            series = self._pipeline(start.pipeline)
            series.active -= 1
            if fact.outcome not in TIMELESS:
                histogram = series.durations.setdefault(fact.outcome, Histogram())
                histogram.record(fact.duration_ns / 1e9, fact.time_unix_nano, start)
            if fact.outcome == SUCCESS:
                series.last_success = fact.time_unix_nano / 1e9

    def executed(self, fact: Execution) -> None:
        """Count an execution: duration, rows, throughput, cache lookup."""
        now, node, engine, ms, success, rows, cached, _ = fact
        call = current.get()
        run = None if call is None else call.run
        with self._lock:
            key = ("" if run is None else run.name, node, "", engine)
            series = self._nodes.get(key) or self._node(started_by_hand(fact))
            if ms is not None:
                outcome = OUTCOMES[success]
                histogram = series.durations.get(outcome)
                if histogram is None:
                    histogram = series.durations[outcome] = Histogram()
                histogram.record(ms / 1e3, now, _NO_SPAN)
            if rows is not None:
                series.rows_out = (series.rows_out or 0) + rows
                if ms:
                    series.throughput = rows / ms * 1e3
            if cached:
                series.hits += 1
            elif cached is not None:
                series.misses += 1

    def measured(self, fact: Measure) -> None:
        """Count or set a value, if an instrument takes its type. A duration so recorded has an empty outcome."""
        if fact.kind not in MEASURED:
            return
        instrument, factor, slot, _ = MEASURED[fact.kind]
        value, start = fact.value * factor, started_by_hand(fact)
        with self._lock:
            series = self._node(start)
            if instrument.kind == "histogram":
                series.durations.setdefault("", Histogram()).record(value, fact.time_unix_nano, start)
            else:
                setattr(series, slot, value + (getattr(series, slot) if instrument.kind == "counter" else 0))

    def drop(self, signal: str, reason: str, count: int = 1) -> None:
        """Count telemetry that was lost."""
        with self._lock:
            key = (signal, reason)
            self._dropped[key] = self._dropped.get(key, 0) + count

    def dropped(self) -> dict[tuple[str, str], int]:
        """Return what was lost so far, by signal and reason."""
        with self._lock:
            return dict(self._dropped)

    def uptime(self) -> float:
        """Return the seconds since this began to count."""
        return (self._clock() - self.start_time_unix_nano) / 1e9

    def collect(self) -> list[Family]:
        """Return every instrument that has points, cumulative since the start, in the order of the registry."""
        with self._lock:
            points = self._points()
            turned_away, self._turned_away = self._turned_away, set()
        for name in turned_away:
            self._on_overflow(name)
        return [Family(instrument, tuple(points[instrument])) for instrument in names.INSTRUMENTS if points[instrument]]

    def _node(self, fact: NodeStarted) -> _NodeSeries:
        key = (fact.pipeline, fact.node, fact.layer, fact.engine)
        series = self._nodes.get(key)
        if series is None:
            if len(self._nodes) >= self._limit:
                self._turned_away.add(names.NODE_DURATION.name)
                return self._extra_nodes
            attributes = known(pipeline=fact.pipeline, node=fact.node, layer=fact.layer, engine=fact.engine)
            series = self._nodes[key] = _NodeSeries(attributes)
        return series

    def _pipeline(self, name: str) -> _PipelineSeries:
        series = self._pipelines.get(name)
        if series is None:
            if len(self._pipelines) >= self._limit:
                self._turned_away.add(names.PIPELINE_DURATION.name)
                return self._extra_pipelines
            series = self._pipelines[name] = _PipelineSeries({"pipeline": name})
        return series

    def _edge(self, pipeline: str, source: str, target: str) -> None:
        key = (pipeline, source, target)
        if key in self._edges or source == target:
            return
        if len(self._edges) >= self._limit:
            self._turned_away.add(names.NODE_EDGE.name)
        else:
            self._edges[key] = known(pipeline=pipeline, source=source, target=target)

    def _points(self) -> dict[Instrument, list[Any]]:
        points: dict[Instrument, list[Any]] = {instrument: [] for instrument in names.INSTRUMENTS}
        by_node: dict[tuple[Any, ...], _NodeSeries] = {}
        for series in (*self._nodes.values(), self._extra_nodes):
            _add_node(points, series)
            key = (series.attributes.get("pipeline"), series.attributes.get("node"))
            by_node[key] = _merged(by_node[key], series) if key in by_node else series
        for series in by_node.values():
            _add_node_totals(points, series)
        for pipeline in (*self._pipelines.values(), self._extra_pipelines):
            _add_pipeline(points, pipeline)
        points[names.NODE_EDGE] = [Number(attributes, 1) for attributes in self._edges.values()]
        points[names.PROCESS_UPTIME] = [Number({}, self.uptime())]
        points[names.TELEMETRY_DROPPED] = [
            Number({"signal": signal, "reason": reason}, count) for (signal, reason), count in self._dropped.items()
        ]
        return points


def _add_node(points: dict[Instrument, list[Any]], series: _NodeSeries) -> None:
    attributes = series.attributes
    for outcome, histogram in series.durations.items():
        points[names.NODE_DURATION].append(histogram.point({**attributes, "outcome": outcome}))
    for direction, rows in (("in", series.rows_in), ("out", series.rows_out)):
        if rows is not None:
            points[names.NODE_ROWS].append(Number({**attributes, "direction": direction}, rows))
    if series.throughput is not None:
        points[names.NODE_THROUGHPUT].append(Number(attributes, series.throughput))


def _add_node_totals(points: dict[Instrument, list[Any]], series: _NodeSeries) -> None:
    """Add the instruments that know neither layer nor engine."""
    attributes = {key: value for key, value in series.attributes.items() if key not in ("layer", "engine")}
    for result, count in (("hit", series.hits), ("miss", series.misses)):
        if count:
            points[names.NODE_CACHE_LOOKUPS].append(Number({**attributes, "result": result}, count))
    if series.retries:
        points[names.NODE_RETRIES].append(Number(attributes, series.retries))
    if series.rss is not None:
        points[names.NODE_MEMORY].append(Number(attributes, series.rss))
    if series.attributes is not _OVERFLOW or series.active:
        points[names.NODE_ACTIVE].append(Number(attributes, series.active))


def _merged(a: _NodeSeries, b: _NodeSeries) -> _NodeSeries:
    both = _NodeSeries(a.attributes)
    both.active, both.hits, both.misses = a.active + b.active, a.hits + b.hits, a.misses + b.misses
    both.retries = a.retries + b.retries
    both.rss = a.rss if b.rss is None else b.rss if a.rss is None else max(a.rss, b.rss)
    return both


def _add_pipeline(points: dict[Instrument, list[Any]], series: _PipelineSeries) -> None:
    for outcome, histogram in series.durations.items():
        points[names.PIPELINE_DURATION].append(histogram.point({**series.attributes, "outcome": outcome}))
    if series.last_success is not None:
        points[names.PIPELINE_LAST_SUCCESS].append(Number(series.attributes, series.last_success))
    if series.attributes is not _OVERFLOW or series.active:
        points[names.PIPELINE_ACTIVE].append(Number(series.attributes, series.active))


def known(**attributes: str) -> dict[str, str | bool]:
    """Return the attributes that have a value: a node outside any pipeline has no pipeline, not an empty one."""
    return {key: value for key, value in attributes.items() if value}


@functools.cache
def rss_reader() -> RssReader:
    """Return the process's one `RssReader`, which holds one file open."""
    return RssReader()


class RssReader:
    """Reads this process's resident memory, in bytes: one `pread` on Linux (1.4 us), psutil elsewhere (10 us).

    Within a millisecond it is not read again. Returns None where it cannot be read; never raises. Follows a fork.
    """

    def __init__(self) -> None:
        self._page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        self._open()
        after_fork(self._reopen)  # an open /proc/self names the process that opened it

    def _open(self) -> None:
        self._until, self._last = 0.0, 0
        try:
            self._file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, AttributeError):
            import psutil

            self._file = -1
            self._process = psutil.Process()

    def _reopen(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._open()

    def __call__(self) -> int | None:
        now = time.monotonic()
        if now < self._until:
            return self._last
        try:
            if self._file >= 0:
                self._last = int(os.pread(self._file, 64, 0).split(None, 2)[1]) * self._page
            else:
                self._last = int(self._process.memory_info().rss)
        except Exception:  # noqa: BLE001 - psutil has errors of its own
            return None
        self._until = now + 0.001
        return self._last
