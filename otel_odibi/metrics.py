"""Metrics of nodes and pipelines, aggregated from facts: a bounded set of series, exact totals, no cost per series.

`Aggregates` keeps them itself: a synchronous SDK instrument costs 5 us a call, and the SDK has no observable
histogram. `ApiInstruments` records the same facts through a host application's own meter instead.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any, Final

from opentelemetry.metrics import Meter, Observation

from otel_odibi import names
from otel_odibi.facts import (
    CacheLookup,
    Distribution,
    Exemplar,
    Family,
    NodeFinished,
    NodeRetried,
    NodeStarted,
    Number,
    RunFinished,
    RunStarted,
)
from otel_odibi.forks import after_fork
from otel_odibi.names import DURATION_BOUNDS, LOST, SKIPPED, SUCCESS, Instrument

TIMELESS: Final = (SKIPPED, LOST)
"""Outcomes that record no duration."""
_OVERFLOW: Final[Mapping[str, str | bool]] = {names.OVERFLOW_ATTRIBUTE: True}


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
            attributes = _known(pipeline=fact.pipeline, node=fact.node, layer=fact.layer, engine=fact.engine)
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
            self._edges[key] = _known(pipeline=pipeline, source=source, target=target)

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


class ApiInstruments:
    """Listens to facts and records them through a meter of the OpenTelemetry API: a host application's own.

    The same instruments, attributes and bucket bounds as `Aggregates`; the host's SDK limits and exports them.
    """

    def __init__(self, meter: Meter, own: Aggregates) -> None:
        make = {
            "counter": meter.create_counter,
            "updowncounter": meter.create_up_down_counter,
            "gauge": meter.create_gauge,
        }
        self._of: dict[Instrument, Any] = {}
        for instrument in names.INSTRUMENTS:
            text = {"name": instrument.name, "unit": instrument.unit, "description": instrument.description}
            if instrument is names.PROCESS_UPTIME:
                meter.create_observable_gauge(callbacks=[lambda options: [Observation(own.uptime())]], **text)
            elif instrument is names.TELEMETRY_DROPPED:
                meter.create_observable_counter(callbacks=[lambda options: _losses(own)], **text)
            elif instrument.kind == "histogram":
                bounds = list(DURATION_BOUNDS)
                self._of[instrument] = meter.create_histogram(explicit_bucket_boundaries_advisory=bounds, **text)
            else:
                self._of[instrument] = make[instrument.kind](**text)

    def listeners(self) -> dict[type, Callable[[Any], None]]:
        """Return which of the methods wants which fact."""
        return {
            NodeStarted: lambda fact: self._of[names.NODE_ACTIVE].add(1, _node_key(fact)),
            NodeFinished: self.node_finished,
            NodeRetried: lambda fact: self._of[names.NODE_RETRIES].add(1, _node_key(fact.start)),
            CacheLookup: self.cache_looked_up,
            RunStarted: lambda fact: self._of[names.PIPELINE_ACTIVE].add(1, {"pipeline": fact.pipeline}),
            RunFinished: self.run_finished,
        }

    def node_finished(self, fact: NodeFinished) -> None:
        """Record a finished execution: duration, rows, throughput, memory, edges."""
        start, of = fact.start, self._of
        key = _node_key(start)
        attributes = {**key, **_known(layer=start.layer, engine=start.engine)}
        of[names.NODE_ACTIVE].add(-1, key)
        if fact.outcome not in TIMELESS:
            seconds = fact.duration_ns / 1e9
            of[names.NODE_DURATION].record(seconds, {**attributes, "outcome": fact.outcome})
            if fact.rows_out is not None and seconds > 0:
                of[names.NODE_THROUGHPUT].set(fact.rows_out / seconds, attributes)
        for direction, rows in (("in", fact.rows_in), ("out", fact.rows_out)):
            if rows is not None:
                of[names.NODE_ROWS].add(rows, {**attributes, "direction": direction})
        if fact.rss is not None:
            of[names.NODE_MEMORY].set(fact.rss, key)
        for edge in fact.edges:
            if edge.node != start.node:
                edge_key = _known(pipeline=start.pipeline, source=edge.node, target=start.node)
                of[names.NODE_EDGE].set(1, edge_key)

    def cache_looked_up(self, fact: CacheLookup) -> None:
        """Record a cache hit or miss."""
        result = "hit" if fact.hit else "miss"
        self._of[names.NODE_CACHE_LOOKUPS].add(1, {**_node_key(fact.start), "result": result})

    def run_finished(self, fact: RunFinished) -> None:
        """Record a finished run and, where it succeeded, when."""
        key = {"pipeline": fact.start.pipeline}
        self._of[names.PIPELINE_ACTIVE].add(-1, key)
        if fact.outcome not in TIMELESS:
            self._of[names.PIPELINE_DURATION].record(fact.duration_ns / 1e9, {**key, "outcome": fact.outcome})
        if fact.outcome == SUCCESS:
            self._of[names.PIPELINE_LAST_SUCCESS].set(fact.time_unix_nano / 1e9, key)


def _losses(own: Aggregates) -> list[Observation]:
    lost = own.dropped().items()
    return [Observation(count, {"signal": signal, "reason": reason}) for (signal, reason), count in lost]


def _node_key(fact: NodeStarted) -> dict[str, str | bool]:
    return _known(pipeline=fact.pipeline, node=fact.node)


def _known(**attributes: str) -> dict[str, str | bool]:
    """Return the attributes that have a value: a node outside any pipeline has no pipeline, not an empty one."""
    return {key: value for key, value in attributes.items() if value}


@functools.cache
def rss_reader() -> RssReader:
    """Return the process's one `RssReader`, which holds one file open."""
    return RssReader()


class RssReader:
    """Reads this process's resident memory, in bytes: one `pread` on Linux (1.4 us), psutil elsewhere (10 us).

    Returns None where it cannot be read; never raises. Follows a fork.
    """

    def __init__(self) -> None:
        self._page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        self._open()
        after_fork(self._reopen)  # an open /proc/self names the process that opened it

    def _open(self) -> None:
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
        try:
            if self._file >= 0:
                return int(os.pread(self._file, 64, 0).split()[1]) * self._page
            return int(self._process.memory_info().rss)
        except Exception:  # noqa: BLE001 - psutil has errors of its own
            return None
