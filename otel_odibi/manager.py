"""`MetricsManager`: statistics of nodes, recorded by hand and by decorated nodes, exact for ever, bounded in size."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from otel_odibi import names
from otel_odibi.clean import DEFAULT, clean_name, describe
from otel_odibi.errors import SettingError
from otel_odibi.facts import MIB, CacheLookup, Execution, Measure, MetricType, NodeFinished, NodeRetried
from otel_odibi.forks import after_fork
from otel_odibi.logs import timestamp
from otel_odibi.metrics import TIMELESS
from otel_odibi.names import FAILURE, SUCCESS
from otel_odibi.runtime import live
from otel_odibi.tally import OVERFLOW, Snapshot, Tallies, labels_of

__all__ = ["MetricRecord", "MetricType", "MetricsManager"]

LIMIT: Final = 10_000
"""Most nodes, and most series of one type, that are kept apart; most executions and values behind `metrics`."""
_FULL: Final = f"more than {LIMIT} nodes, or series of a type; further ones add up as {OVERFLOW}"
UNSETTLED: Final = 4_096
"""Most executions of decorated nodes that wait to be counted."""
_SUCCEEDED: Final = {SUCCESS: True, FAILURE: False}
Tags = Mapping[str, Any] | None
_warn_once: Final = functools.lru_cache(maxsize=1_000)(logging.getLogger(names.SCOPE).warning)


@dataclass(frozen=True, slots=True)
class MetricRecord:
    """One value as it was recorded: the value of its type, a node's name, Unix time in seconds."""

    metric_type: str
    name: str
    value: float
    timestamp: float
    labels: dict[str, str]


class MetricsManager:
    """Counts what nodes do: durations, throughput, outcomes, lookups, memory. Thread-safe; recording never raises.

    Totals and quantiles are of everything since the start, `metrics` has the latest records. What is recorded by hand
    also reaches OpenTelemetry's instruments, for the pipeline it is recorded in. What decorated nodes do comes in by
    `listeners()`, and has reached them already. Values that are no finite numbers are left out, with a warning.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.reset()
        after_fork(self.forked)

    def forked(self) -> None:
        """Take a new lock: a thread that the child does not have may hold the old one."""
        self._lock = threading.RLock()

    def reset(self) -> None:
        """Forget everything here; OpenTelemetry's instruments, whose totals never fall, do not."""
        with self._lock:
            self._unsettled: deque[tuple[int, str, str, float, str, int | None, int | None]] = deque()
            self._tallies = Tallies(LIMIT)
            self._recent: deque[Execution | Measure] = deque(maxlen=LIMIT)
            self._began = time.monotonic()

    # --- recording ---------------------------------------------------------------------------------------------------

    def record(self, metric_type: MetricType, name: str, value: float, labels: Tags = None) -> None:
        """Record a value; the last one is the gauge's."""
        self._measure(metric_type, name, value, labels, False)

    set_gauge = record

    def increment(self, metric_type: MetricType, name: str, value: float = 1.0, labels: Tags = None) -> None:
        """Add to a counter; the record holds what was added. A negative value is left out, with a warning."""
        self._measure(metric_type, name, value, labels, True)

    def record_memory_usage(self, name: str, memory_mb: float) -> None:
        """Record memory in MiB."""
        self._measure(MetricType.MEMORY_USAGE, name, memory_mb, None, False)

    def record_node_execution(
        self,
        node_name: str,
        duration_ms: float,
        success: bool,
        engine: str = "pandas",
        rows: int | None = None,
        cached: bool = False,
    ) -> None:
        """Record an execution: duration, outcome, a cache hit or else a miss, and with `rows` the throughput.

        A duration below a nanosecond counts as 0, also a negative one; one that is no finite number, as not known.
        """
        try:
            ms, now = _number(duration_ms), time.time_ns()
            ms = 0.0 if ms is not None and ms < 1e-6 else ms
            fact = Execution(now, node_name, engine, ms, bool(success), _rows(rows), bool(cached), None)
            _hand_over(self._add(fact))
        except Exception as exc:  # noqa: BLE001 - telemetry never harms
            _left_out(exc)

    def listeners(self) -> dict[type, Callable[[Any], None]]:
        """Return which method wants which fact. What they count goes no further."""
        return {NodeFinished: self.node_finished, CacheLookup: self.counted, NodeRetried: self.counted}

    def node_finished(self, fact: NodeFinished) -> None:
        """Note an execution: it is counted when somebody looks, or when many wait.

        Skipped and lost ones are none; a cancelled one neither succeeded nor failed.
        """
        start, now, duration, outcome, _, _, rows, _, _, _, rss, _, _, _ = fact
        if outcome not in TIMELESS:
            # A plain tuple of scalars, as garbage collection stops looking at those.
            self._unsettled.append((now, start[2], start[4], duration / 1e6, outcome, rows, rss))
            if len(self._unsettled) >= UNSETTLED:
                self.settle()

    def settle(self) -> None:
        """Count the executions that wait."""
        waiting, settled = self._unsettled, _SUCCEEDED.get
        with self._lock:
            while waiting:
                now, node, engine, ms, outcome, rows, rss = waiting.popleft()
                self._add(Execution(now, node, engine, ms, settled(outcome), rows, None, rss))

    def counted(self, fact: CacheLookup | NodeRetried) -> None:
        """Count a cache lookup that a node declared, or a retry."""
        hit = fact.hit if isinstance(fact, CacheLookup) else None
        kind = MetricType.RETRY_COUNT if hit is None else MetricType.CACHE_HIT if hit else MetricType.CACHE_MISS
        self._keep(Measure(fact.time_unix_nano, kind, fact.start.node, labels_of(fact.start.engine), 1.0, True))

    def _measure(self, kind: Any, name: object, value: Any, tags: Tags, counted: bool) -> None:
        try:
            known, number = MetricType(kind), _number(value)
            if number is None or (counted and number < 0):
                raise ValueError(f"{value!r} for {known.value}")
            if known is MetricType.NODE_DURATION:
                number = max(0.0, number)
            cleaned = {clean_name(key): clean_name(DEFAULT.value(item, str(key))) for key, item in (tags or {}).items()}
            fact = Measure(time.time_ns(), known, clean_name(name), tuple(sorted(cleaned.items())), number, counted)
            self._keep(fact)
            _hand_over(fact)
        except Exception as exc:  # noqa: BLE001 - telemetry never harms
            _left_out(exc)

    def _add(self, fact: Execution) -> Execution:
        with self._lock:
            node = self._tallies.nodes.get(fact[1:3])
            if node is None:
                node = self._tallies.node(clean_name(fact.node), clean_name(fact.engine) if fact.engine else "")
                fact = fact._replace(node=node.name, engine=node.engine)
            node.add(fact)
            self._recent.append(fact)
        if node.name is OVERFLOW:
            _warn(_FULL)
        return fact

    def _keep(self, fact: Measure) -> None:
        with self._lock:
            self._tallies.tally(fact.kind, fact.counted, fact.node, fact.labels).add(fact.value, fact.time_unix_nano)
            self._recent.append(fact)
        if self._tallies.is_full:
            _warn(_FULL)

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> list[MetricRecord]:
        """The records of the last 10,000 executions and values, oldest first."""
        self.settle()
        with self._lock:
            recent = list(self._recent)
        return [record for fact in recent for record in _records(fact)]

    def snapshot(self, name: str | None = None) -> Snapshot:
        """Return everything counted so far, or of one node: a series for each type, name and labels."""
        self.settle()
        with self._lock:
            return self._tallies.snapshot(None if name is None else clean_name(name))

    @property
    def counters(self) -> dict[str, float]:
        """The totals of what was incremented, by `type:name`; looking up what is not there gives 0."""
        return self.snapshot().counters()

    @property
    def gauges(self) -> dict[str, float]:
        """The last of what was recorded, by `type:name`."""
        return self.snapshot().gauges()

    def uptime(self) -> float:
        """Return the seconds since counting began."""
        return time.monotonic() - self._began

    def get_metrics_by_type(self, metric_type: MetricType) -> list[MetricRecord]:
        """Return the recent records of a type."""
        return [record for record in self.metrics if record.metric_type == metric_type]

    def get_metrics_by_name(self, name: str) -> list[MetricRecord]:
        """Return the recent records of a node."""
        return [record for record in self.metrics if record.name == clean_name(name)]

    def get_summary(self) -> dict[str, Any]:
        """Return total_metrics, uptime_seconds, timestamp (UTC), counters, gauges, and aggregations by type."""
        found = self.snapshot()
        return {
            "total_metrics": sum(series.times for series in found),
            "uptime_seconds": self.uptime(),
            "timestamp": timestamp(time.time_ns()),
            "counters": dict(found.counters()),
            "gauges": found.gauges(),
            "aggregations": {kind.value: found.of(kind) for kind in dict.fromkeys(series.kind for series in found)},
        }

    def get_node_stats(self, node_name: str) -> dict[str, Any]:
        """Return a node's executions, durations in ms (quantiles within 1 %) and outcomes; {} if it is not known."""
        with self._lock:
            found = self.snapshot(node_name)
            p50, p95, p99 = self._tallies.quantiles(clean_name(node_name), (0.5, 0.95, 0.99))
        if not found:
            return {}
        stats = {"node_name": found[0].name, "executions": int(found.executions()), **found.durations()}
        stats |= {"p50_duration_ms": p50, "p95_duration_ms": p95, "p99_duration_ms": p99}
        stats["success_count"] = found.of(MetricType.SUCCESS_COUNT)["sum"]
        stats["failure_count"] = found.of(MetricType.FAILURE_COUNT)["sum"]
        return stats

    def get_cache_hit_rate(self) -> float:
        """Return cache hits per 100 lookups."""
        return self.snapshot().hit_rate()

    def get_error_rate(self) -> float:
        """Return failed executions per 100 executions. (Phase 8 divided running totals by the number of names.)"""
        return self.snapshot().error_rate()

    def get_avg_throughput(self) -> float:
        """Return the mean of all throughputs, in rows a second."""
        return self.snapshot().of(MetricType.THROUGHPUT)["avg"]

    def export_prometheus(self) -> str:
        """Return the text that `MetricsExporter.export_prometheus` does."""
        from otel_odibi.export import MetricsExporter  # which loads prometheus_client

        return MetricsExporter(self).export_prometheus()

    def export_json(self) -> str:
        """Return `get_summary()` as `summary`, and the recent records as `metrics`."""
        from otel_odibi.export import as_json

        return as_json({"summary": self.get_summary(), "metrics": [asdict(record) for record in self.metrics]})

    def save_to_file(self, path: str | os.PathLike[str], format: str = "json") -> None:  # noqa: A002 - as in Phase 8
        """Write `json` or `prometheus` to a file, which appears whole. Raises OSError; SettingError for a format."""
        from otel_odibi.export import save

        exports = {"json": self.export_json, "prometheus": self.export_prometheus}
        if format not in exports:
            raise SettingError("format", format, "not known", "give json or prometheus")
        save(path, exports[format]().encode())


def _records(fact: Execution | Measure) -> Iterator[MetricRecord]:
    """Yield the values that a fact stands for."""
    if isinstance(fact, Measure):
        yield MetricRecord(fact.kind.value, fact.node, fact.value, fact.time_unix_nano / 1e9, dict(fact.labels))
        return
    failed = 1.0 if fact.success is False else None
    ms, rows = fact.duration_ms, fact.rows
    throughput = None if rows is None or ms is None else rows / ms * 1e3 if ms else None if rows else 0.0
    for kind, value in (
        (MetricType.NODE_DURATION, ms),
        (MetricType.SUCCESS_COUNT, 1.0 if fact.success else None),
        (MetricType.FAILURE_COUNT, failed),
        (MetricType.ERROR_COUNT, failed),
        (MetricType.CACHE_HIT, 1.0 if fact.cached else None),
        (MetricType.CACHE_MISS, 1.0 if fact.cached is False else None),
        (MetricType.THROUGHPUT, throughput),
        (MetricType.MEMORY_USAGE, None if fact.rss is None else fact.rss / MIB),
    ):
        if value is not None:
            yield MetricRecord(kind.value, fact.node, value, fact.time_unix_nano / 1e9, dict(labels_of(fact.engine)))


def _hand_over(fact: Execution | Measure) -> None:
    """Hand a record to the telemetry in force, whose totals stay when a manager is reset or gone."""
    rt = live()
    if rt is not None:
        rt.emit(fact)


def _number(value: Any) -> float | None:
    """Return the value as a finite number, None where it is none."""
    try:
        number = value if type(value) is float else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if -math.inf < number < math.inf else None


def _rows(value: Any) -> int | None:
    number = value if value is None or type(value) is int else _number(value)
    return None if number is None or not 0 <= number < 2**63 else int(number)


def _left_out(exc: Exception) -> None:
    _warn(f"a value was left out: {DEFAULT.text(f'{type(exc).__name__}: {describe(exc)}', 200)}")


def _warn(problem: str) -> None:
    with contextlib.suppress(Exception):  # a host's logging handler may raise
        _warn_once("metrics manager: %s", problem)
