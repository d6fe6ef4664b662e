"""Values added up in bounded space: count, total, extremes, last, quantiles within 1 %; and what these say together."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import ceil, exp, inf, log
from operator import attrgetter
from typing import Any, Final, NamedTuple

from otel_odibi import names
from otel_odibi.facts import MIB, Execution, Labels, MetricType

OVERFLOW: Final = names.OVERFLOW_ATTRIBUTE
"""The name under which adds up what is too many to be kept apart."""

# Quantiles: counts in buckets of logarithmic width, as in DDSketch (Masson et al., VLDB 2019). There are no more than
# 2,304 of them, from a nanosecond to 30 years.
_ACCURACY: Final = 0.009
_GAMMA: Final = (1 + _ACCURACY) / (1 - _ACCURACY)
_SCALE: Final = 1 / log(_GAMMA)
_LEAST, _MOST = 1e-6, 1e12  # ms
_OFFSET: Final = 1 - log(_LEAST) * _SCALE
_HIGHEST: Final = int(log(_MOST) * _SCALE + _OFFSET)


class Tally:
    """Adds values up, and with `quantiles` counts them in buckets. Not locked: its owner does that."""

    __slots__ = ("buckets", "count", "last", "max", "min", "sum", "time")

    def __init__(self, *, quantiles: bool = False) -> None:
        self.buckets: dict[int, int] | None = {} if quantiles else None
        self.count = self.time = 0
        self.sum = self.last = 0.0
        self.min, self.max = inf, -inf

    def add(self, value: float, time_unix_nano: int) -> None:
        """Add a finite value."""
        self.count += 1
        self.sum += value
        self.last = value
        self.time = time_unix_nano
        if value < self.min:
            self.min = value
        if value > self.max:
            self.max = value
        buckets = self.buckets
        if buckets is not None:
            bucket = int(log(value) * _SCALE + _OFFSET) if _LEAST < value < _MOST else _HIGHEST if value > 1 else 0
            buckets[bucket] = buckets.get(bucket, 0) + 1


def quantiles(tallies: Sequence[Tally], wanted: Iterable[float]) -> list[float]:
    """Return quantiles (0 to 1) of the values of all tallies, interpolated between neighbours; 0 where there are none.

    Each is within 1 % of the exact one, for values from 1e-6 to 1e12.
    """
    merged = Counter[int]()
    for tally in tallies:
        merged.update(tally.buckets or {})
    buckets = sorted(merged)
    reached = list(accumulate(merged[bucket] for bucket in buckets))
    if not reached:
        return [0.0 for _ in wanted]
    low, high = min(tally.min for tally in tallies), max(tally.max for tally in tallies)

    def at(rank: int) -> float:
        bucket = buckets[bisect_right(reached, rank)]
        middle = exp((bucket - _OFFSET) / _SCALE) * 2 * _GAMMA / (1 + _GAMMA) if bucket else 0.0
        return min(max(middle, low), high)

    places = [quantile * (reached[-1] - 1) for quantile in wanted]
    return [at(int(place)) + (at(ceil(place)) - at(int(place))) * (place % 1) for place in places]


class NodeTallies(NamedTuple):
    """The tallies of a node on one engine."""

    name: str
    engine: str
    durations: Tally
    throughput: Tally
    memory: Tally
    successes: Tally
    failures: Tally
    errors: Tally
    hits: Tally
    misses: Tally

    def add(self, fact: Execution) -> None:
        """Count an execution."""
        now, _, _, ms, success, rows, cached, rss = fact
        if ms is not None:
            self.durations.add(ms, now)
            if rows is not None and (ms or not rows):
                self.throughput.add(rows / ms * 1e3 if ms else 0.0, now)
        if success:
            self.successes.add(1.0, now)
        elif success is not None:
            self.failures.add(1.0, now)
            self.errors.add(1.0, now)
        if cached is not None:
            (self.hits if cached else self.misses).add(1.0, now)
        if rss is not None:
            self.memory.add(rss / MIB, now)


_OF_NODE: Final = (  # type of each of a node's tallies, and whether it counts
    (MetricType.NODE_DURATION, False), (MetricType.THROUGHPUT, False), (MetricType.MEMORY_USAGE, False),
    (MetricType.SUCCESS_COUNT, True), (MetricType.FAILURE_COUNT, True), (MetricType.ERROR_COUNT, True),
    (MetricType.CACHE_HIT, True), (MetricType.CACHE_MISS, True),
)  # fmt: skip


class Series(NamedTuple):
    """All values of one type, name and labels. What is `counted` adds up to `sum`, else `last` is what there is now."""

    kind: MetricType
    name: str
    labels: Labels
    counted: bool
    times: int
    sum: float
    min: float
    max: float
    last: float
    time_unix_nano: int


class Snapshot(list[Series]):
    """Everything counted at one moment, or a part of that, and what follows from it."""

    def of(self, *kinds: MetricType) -> dict[str, float]:
        """Return count, sum, min, max and avg of all values of these types; zeros where there are none."""
        found = [series for series in self if series.kind in kinds]
        count, total = sum(series.times for series in found), sum(series.sum for series in found)
        low, high = (
            min((series.min for series in found), default=0.0),
            max((series.max for series in found), default=0.0),
        )
        return {"count": count, "sum": total, "min": low, "max": high, "avg": total / count if count else 0.0}

    def durations(self) -> dict[str, float]:
        """Return avg_duration_ms, min_duration_ms and max_duration_ms."""
        found = self.of(MetricType.NODE_DURATION)
        return {f"{key}_duration_ms": found[key] for key in ("avg", "min", "max")}

    def by_name(self) -> list[Snapshot]:
        """Return the part of each name, sorted."""
        parts: dict[str, Snapshot] = defaultdict(Snapshot)
        for series in self:
            parts[series.name].append(series)
        return [parts[name] for name in sorted(parts)]

    def counters(self) -> dict[str, float]:
        """Return totals by `type:name`; looking up what is not there gives 0."""
        totals: dict[str, float] = defaultdict(float)
        for series in self:
            if series.counted:
                totals[f"{series.kind.value}:{series.name}"] += series.sum
        return totals

    def gauges(self) -> dict[str, float]:
        """Return last values by `type:name`."""
        found = sorted((series for series in self if not series.counted), key=attrgetter("time_unix_nano"))
        return {f"{series.kind.value}:{series.name}": series.last for series in found}

    def hit_rate(self) -> float:
        """Return cache hits per 100 lookups, 0 without any."""
        hits, misses = self.of(MetricType.CACHE_HIT)["sum"], self.of(MetricType.CACHE_MISS)["sum"]
        return 100 * hits / (hits + misses) if hits + misses else 0.0

    def failed(self) -> float:
        """Return how many executions failed; an error that is counted without a failure is one of them."""
        return max(self.of(MetricType.FAILURE_COUNT)["sum"], self.of(MetricType.ERROR_COUNT)["sum"])

    def executions(self) -> float:
        """Return how many executions there were: as many as have an outcome, or a duration if those are more."""
        return max(self.of(MetricType.SUCCESS_COUNT)["sum"] + self.failed(), self.of(MetricType.NODE_DURATION)["count"])

    def error_rate(self) -> float:
        """Return failed executions per 100, 0 without any."""
        return 100 * self.failed() / self.executions() if self.executions() else 0.0


class Tallies:
    """All tallies, by type, name and labels: at most `limit` nodes, and `limit` of a type. Not locked.

    Further ones add up under the name `OVERFLOW`; `is_full` tells that there are some.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._of_type: dict[tuple[MetricType, bool], dict[tuple[str, Labels], Tally]] = {}
        self.nodes: dict[tuple[Any, ...], NodeTallies] = {}
        self.is_full = False

    def node(self, name: str, engine: str) -> NodeTallies:
        """Return the tallies of a node, which become those of `OVERFLOW` where there are too many."""
        if (name, engine) not in self.nodes:
            if len(self.nodes) >= self._limit:
                name, engine = OVERFLOW, ""
            labels = labels_of(engine)
            tallies = (self.tally(kind, counted, name, labels) for kind, counted in _OF_NODE)
            self.nodes.setdefault((name, engine), NodeTallies(name, engine, *tallies))
        return self.nodes[name, engine]

    def tally(self, kind: MetricType, counted: bool, name: str, labels: Labels) -> Tally:
        """Return one tally."""
        tallies = self._of_type.setdefault((kind, counted), {})
        key = (name, labels)
        if key not in tallies and len(tallies) >= self._limit:
            self.is_full, key = True, (OVERFLOW, ())
        if key not in tallies:
            tallies[key] = Tally(quantiles=kind is MetricType.NODE_DURATION)
        return tallies[key]

    def snapshot(self, only: str | None = None) -> Snapshot:
        """Return what there is now, of all names or of one."""
        return Snapshot(
            Series(kind, name, labels, counted, t.count, t.sum, t.min, t.max, t.last, t.time)
            for (kind, counted), tallies in self._of_type.items()
            for (name, labels), t in tallies.items()
            if t.count and (only is None or only == name)
        )

    def quantiles(self, name: str, wanted: Iterable[float]) -> list[float]:
        """Return quantiles of all durations of this name."""
        timed = self._of_type.get((MetricType.NODE_DURATION, False), {})
        return quantiles([tally for key, tally in timed.items() if key[0] == name and tally.count], wanted)


def labels_of(engine: str) -> Labels:
    """Return the labels of a node that runs on an engine."""
    return (("engine", engine),) if engine else ()
