"""What a program records by hand, and how it joins OpenTelemetry's instruments.

A `MetricsManager` hands every record to the runtime in force, as scopes do with facts. So the totals belong to the
telemetry, not to the manager: they stay when that is reset or gone, and a manager needs no wiring. `connect()` puts the
two classes here, which take such records in, where the runtime finds them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from otel_odibi import names
from otel_odibi.calls import current
from otel_odibi.facts import CacheLookup, NodeFinished, NodeStarted
from otel_odibi.metrics import Aggregates, ApiInstruments, Histogram
from otel_odibi.names import FAILURE, SUCCESS, Instrument
from otel_odibi.runtime import Runtime, live

MIB: Final = 1_048_576
Labels = tuple[tuple[str, str], ...]


class MetricType(str, enum.Enum):
    """What a value of a `MetricsManager` measures. A member equals its value, the name in exports."""

    NODE_DURATION = "node_duration_ms"
    THROUGHPUT = "throughput_rows_per_sec"
    CACHE_HIT = "cache_hit"
    CACHE_MISS = "cache_miss"
    ERROR_COUNT = "error_count"
    RETRY_COUNT = "retry_count"
    CHECKPOINT_SIZE = "checkpoint_size_bytes"
    DATA_SIZE = "data_size_bytes"
    WORKER_UTILIZATION = "worker_utilization_pct"
    MEMORY_USAGE = "memory_usage_mb"
    SUCCESS_COUNT = "success_count"
    FAILURE_COUNT = "failure_count"


@dataclass(frozen=True, slots=True)
class MetricRecord:
    """One value as it was recorded: the value of its type, a node's name, Unix time in seconds."""

    metric_type: str
    name: str
    value: float
    timestamp: float
    labels: dict[str, str]


class Execution(NamedTuple):
    """An execution of a node. None where not known; `success` also where it was cancelled; `rss` is in bytes."""

    time_unix_nano: int
    node: str
    engine: str
    duration_ms: float | None
    success: bool | None
    rows: int | None
    cached: bool | None
    rss: int | None = None

    def records(self) -> Iterator[MetricRecord]:
        """Yield the values that it stands for."""
        failed = 1.0 if self.success is False else None
        ms, rows = self.duration_ms, self.rows
        throughput = None if rows is None or ms is None else rows / ms * 1e3 if ms else None if rows else 0.0
        for kind, value in (
            (MetricType.NODE_DURATION, self.duration_ms),
            (MetricType.SUCCESS_COUNT, 1.0 if self.success else None),
            (MetricType.FAILURE_COUNT, failed),
            (MetricType.ERROR_COUNT, failed),
            (MetricType.CACHE_HIT, 1.0 if self.cached else None),
            (MetricType.CACHE_MISS, 1.0 if self.cached is False else None),
            (MetricType.THROUGHPUT, throughput),
            (MetricType.MEMORY_USAGE, None if self.rss is None else self.rss / MIB),
        ):
            if value is not None:
                labels = {"engine": self.engine} if self.engine else {}
                yield MetricRecord(kind.value, self.node, value, self.time_unix_nano / 1e9, labels)


class Measure(NamedTuple):
    """A value of one type: what is `counted` adds to a total, else it is the value there is now."""

    time_unix_nano: int
    kind: MetricType
    node: str
    labels: Labels
    value: float
    counted: bool

    def records(self) -> Iterator[MetricRecord]:
        """Yield it as a record."""
        yield MetricRecord(self.kind.value, self.node, self.value, self.time_unix_nano / 1e9, dict(self.labels))


# The instrument that takes a type's values, the factor to its unit, where `Aggregates` keeps it, its own attribute.
_MEASURED: Final[dict[MetricType, tuple[Instrument, float, str, dict[str, str]]]] = {
    MetricType.NODE_DURATION: (names.NODE_DURATION, 1e-3, "durations", {}),
    MetricType.THROUGHPUT: (names.NODE_THROUGHPUT, 1, "throughput", {}),
    MetricType.CACHE_HIT: (names.NODE_CACHE_LOOKUPS, 1, "hits", {"result": "hit"}),
    MetricType.CACHE_MISS: (names.NODE_CACHE_LOOKUPS, 1, "misses", {"result": "miss"}),
    MetricType.RETRY_COUNT: (names.NODE_RETRIES, 1, "retries", {}),
    MetricType.MEMORY_USAGE: (names.NODE_MEMORY, MIB, "rss", {}),
}
_NO_SPAN: Final = NodeStarted("", "", "", "", "", 0, 0, 0, 0, 0)
_OUTCOMES: Final[dict[bool | None, Any]] = {True: SUCCESS, False: FAILURE, None: ""}


def hand_over(fact: Execution | Measure) -> None:
    """Hand a record to the telemetry in force, if there is one that takes it. Listeners' errors go no further."""
    rt: Any = live()  # whose listeners are those of facts, and after `connect` of these records
    if rt is not None:
        for listen in rt.listeners.get(type(fact), ()):  # not `emit`: its call costs as much as its loop
            try:
                listen(fact)
            except Exception as exc:  # noqa: BLE001, PERF203 - as in `emit`
                rt.on_error("listener", exc)


def connect(rt: Runtime, *sources: HandAggregates | HandInstruments) -> None:
    """Let `sources` hear of what is recorded by hand while `rt` is in force."""
    listeners: dict[Any, Any] = rt.listeners
    listeners[Execution] = tuple(source.executed for source in sources)
    listeners[Measure] = tuple(source.measured for source in sources)


def _started(fact: Execution | Measure) -> NodeStarted:
    """Return a start for a record: of the pipeline under way here, and of no span."""
    call = current.get()
    pipeline = "" if call is None or call.run is None else call.run.name
    engine = fact.engine if isinstance(fact, Execution) else dict(fact.labels).get("engine", "")
    return NodeStarted(pipeline, "", fact.node, "", engine, 0, 0, 0, 0, fact.time_unix_nano)


class HandAggregates(Aggregates):
    """`Aggregates` that records made by hand join; they belong to the pipeline they are made in. Thread-safe."""

    def executed(self, fact: Execution) -> None:
        """Count an execution: duration, rows, throughput, cache lookup."""
        now, node, engine, ms, success, rows, cached, _ = fact
        call = current.get()
        run = None if call is None else call.run
        with self._lock:
            key = ("" if run is None else run.name, node, "", engine)
            series = self._nodes.get(key) or self._node(_started(fact))
            if ms is not None:
                outcome = _OUTCOMES[success]
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
        if fact.kind not in _MEASURED:
            return
        instrument, factor, slot, _ = _MEASURED[fact.kind]
        value, start = fact.value * factor, _started(fact)
        with self._lock:
            series = self._node(start)
            if instrument.kind == "histogram":
                series.durations.setdefault("", Histogram()).record(value, fact.time_unix_nano, start)
            else:
                setattr(series, slot, value + (getattr(series, slot) if instrument.kind == "counter" else 0))


class HandInstruments(ApiInstruments):
    """`ApiInstruments` that records made by hand join. Thread-safe."""

    def executed(self, fact: Execution) -> None:
        """Record an execution as if it were a decorated node's."""
        start, (time, _, _, ms, success, rows, cached, rss) = _started(fact), fact
        listeners = self.listeners()
        listeners[NodeStarted](start)
        outcome: Any = names.SKIPPED if ms is None else _OUTCOMES[success]  # which records no duration
        listeners[NodeFinished](NodeFinished(start, time, round((ms or 0) * 1e6), outcome, rows_out=rows, rss=rss))
        if cached is not None:
            listeners[CacheLookup](CacheLookup(start, bool(cached), None, time))

    def measured(self, fact: Measure) -> None:
        """Record a value with the instrument that takes its type, if there is one."""
        if fact.kind not in _MEASURED:
            return
        instrument, factor, _, attributes = _MEASURED[fact.kind]
        start = _started(fact)
        known = {"pipeline": start.pipeline, "node": start.node, "engine": start.engine, **attributes}
        attributes = {key: value for key, value in known.items() if value and key in (*instrument.attributes, "result")}
        verb = {"counter": "add", "histogram": "record", "gauge": "set"}[instrument.kind]
        getattr(self._of[instrument], verb)(fact.value * factor, attributes)
