"""Prometheus families as values: how they are merged, bounded and written. `translate` makes them of OpenTelemetry's.

prometheus_client's own `Metric` is a list of lines; to add up processes or to change the bounds of a histogram, series
have to be values first.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from operator import add, itemgetter
from typing import Any, Final, Literal, NamedTuple

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import floatToGoString

from otel_odibi import names

Labels = tuple[tuple[str, str], ...]
Kind = Literal["counter", "updown", "gauge", "histogram", "exponential"]
Lose = Callable[[str, str, int], None]
"""Takes the reason why something was left out, what it was, and how many."""
Families = dict[str, "Family"]

UNITED_LIMIT: Final = 640
"""Most bounds that an exponential histogram gets by being added to others with other bounds."""

_log: Final = logging.getLogger(names.SCOPE)
_TYPES: Final[Mapping[Kind, str]] = {"counter": "counter", "histogram": "histogram", "exponential": "histogram"}
_SUFFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "counter": ("", "_total", "_created"),
    "histogram": ("", "_bucket", "_count", "_sum", "_created"),
    "gauge": ("",),
}


class Buckets(NamedTuple):
    """A histogram: upper bounds, ascending, the last infinity; the count of values up to each; the sum, perhaps NaN."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    sum: float

    def at(self, bounds: tuple[float, ...]) -> Buckets:
        """Return it at other bounds: exact where a bound is shared, else with the values counted at a later one."""
        if bounds == self.bounds:
            return self
        places = (bisect_right(self.bounds, bound) for bound in bounds)
        return Buckets(bounds, tuple(self.counts[place - 1] if place else 0.0 for place in places), self.sum)

    def joined(self, other: Buckets, how: Callable[[float, float], float]) -> Buckets:
        """Return this and another as one, at the bounds of this one."""
        counts = tuple(map(how, self.counts, other.at(self.bounds).counts))
        return Buckets(self.bounds, counts, how(self.sum, other.sum))


class Series(NamedTuple):
    """One series: its value, when counting began (Unix time, ns), and some of the measurements behind it."""

    value: float | Buckets
    start: int = 0
    exemplars: tuple[Exemplar, ...] = ()


Choose = Callable[[tuple[Series, Series]], Series]
"""Tells which of two gauges counts."""
FIRST: Final[Choose] = itemgetter(0)
LAST: Final[Choose] = itemgetter(1)


def greater(pair: tuple[Series, Series]) -> Series:
    """Return the one with the greater number; NaN is the least."""
    return max(pair, key=lambda series: (series.value == series.value, series.value))


def _added(a: Series, b: Series, unite: bool) -> Series:
    """Add up, histograms at the bounds of the first, or where they unite, at those of both while they are not many."""
    value: Any
    if isinstance(a.value, Buckets) and isinstance(b.value, Buckets):
        bounds = tuple(sorted({*a.value.bounds, *b.value.bounds})) if unite else ()
        value = (a.value.at(bounds) if 0 < len(bounds) <= UNITED_LIMIT else a.value).joined(b.value, add)
    else:
        value = a.value + b.value  # type: ignore[operator]  # two numbers: they are of one family
    return Series(value, min(a.start, b.start), a.exemplars + b.exemplars)


@dataclass(slots=True)
class Family:
    """A Prometheus family; a counter's name comes without `_total`. Series are keyed by sorted labels, none empty.

    The values of a histogram, exponential or not, are `Buckets`, those of every other kind numbers.
    """

    name: str
    kind: Kind
    help: str
    unit: str
    series: dict[Labels, Series] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """The type that Prometheus knows: counter, gauge or histogram."""
        return _TYPES.get(self.kind, "gauge")

    def add(self, labels: Labels, series: Series, gauges: Choose) -> None:
        """Add a series to the one with these labels; of gauges one is chosen, of timestamps the greater whatever."""
        known = self.series.get(labels)
        if known is not None:
            if self.kind != "gauge":
                series = _added(known, series, self.kind == "exponential")
            else:
                series = (greater if self.name.endswith("_timestamp_seconds") else gauges)((known, series))
        self.series[labels] = series

    def metric(self) -> Metric:
        """Return what prometheus_client's writers take; series in sorted order."""
        metric = Metric(self.name, self.help, self.type, self.unit if self.name.endswith(f"_{self.unit}") else "")
        for labels in sorted(self.series):
            metric.samples += self._samples(dict(labels), self.series[labels])
        return metric

    def _samples(self, labels: dict[str, str], series: Series) -> Iterator[Sample]:
        if isinstance(series.value, Buckets):
            yield from _bucket_samples(self.name, labels, series.value, series.exemplars)
        elif self.kind == "counter":
            latest = max(series.exemplars, key=lambda exemplar: exemplar.timestamp or 0.0, default=None)
            yield Sample(f"{self.name}_total", labels, series.value, None, latest)
        else:
            yield Sample(self.name, labels, series.value)


def _bucket_samples(name: str, labels: dict[str, str], value: Buckets, found: Iterable[Exemplar]) -> Iterator[Sample]:
    # Of each bucket the greatest exemplar, as the compatibility specification wants.
    exemplars = {bisect_left(value.bounds, e.value): e for e in sorted(found, key=lambda e: e.value)}
    for index, (bound, count) in enumerate(zip(value.bounds, value.counts, strict=True)):
        yield Sample(f"{name}_bucket", {**labels, "le": _le(bound)}, count, None, exemplars.get(index))
    # OpenMetrics has no sum that is NaN, negative or of negative values, and then no count either: +Inf holds that.
    if value.bounds[0] >= 0 and value.sum >= 0:
        yield Sample(f"{name}_count", labels, value.counts[-1])
        yield Sample(f"{name}_sum", labels, value.sum)


@lru_cache(maxsize=4096)
def _le(bound: float) -> str:
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


def merge(found: Iterable[Family], gauges: Choose, lose: Lose, limit: float = math.inf) -> Families:
    """Return families as one valid set; those given stay as they are.

    Of families with one name the first gives kind, help and unit. A family of another type, or whose sample names
    another has, goes to `lose`, and so do series that come when `limit` of them are there already.
    """
    merged: Families = {}
    taken: dict[str, str] = {}
    room = limit
    for family in found:
        into = _claim(merged, taken, family)
        if into is None:
            lose("name_conflict", family.name, len(family.series))
            continue
        for labels, series in family.series.items():
            if labels not in into.series:
                room -= 1
                if room < 0:
                    continue
            into.add(labels, series, gauges)
    if room < 0:
        lose("series_limit", f"more than {limit} series", int(-room))
    return merged


def _claim(merged: Families, taken: dict[str, str], family: Family) -> Family | None:
    """Return the family to merge into; None where one of its sample names belongs to another."""
    wanted = [family.name + suffix for suffix in _SUFFIXES[family.type]]
    owner = f"{family.type} {family.name}"
    if any(taken.get(name, owner) != owner for name in wanted):
        return None
    taken.update(dict.fromkeys(wanted, owner))
    return merged.setdefault(family.name, Family(family.name, family.kind, family.help, family.unit))


class Losses:
    """Counts what was left out and warns about it, each thing once. Bounded; never raises; safe from any thread."""

    def __init__(self, on_drop: Callable[[str, int], None] | None = None) -> None:
        self._on_drop = on_drop
        self._told: set[tuple[str, str]] = set()

    def __call__(self, reason: str, what: str, count: int) -> None:
        """Count and warn, unless this reason was given for this thing before."""
        if self.warn(reason, what):
            self.count(reason, count)

    def warn(self, reason: str, what: str) -> bool:
        """Warn; return False where that was done before."""
        if (reason, what) in self._told or len(self._told) >= 1_000:
            return False
        self._told.add((reason, what))
        with suppress(Exception):  # a host's logging handler may raise
            _log.warning("Prometheus metrics: %s (%s)", reason.replace("_", " "), what)
        return True

    def count(self, reason: str, count: int) -> None:
        """Count alone."""
        if self._on_drop is not None:
            with suppress(Exception):
                self._on_drop(reason, count)


class Source:
    """All that prometheus_client's writers and its WSGI app want of a registry."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect


def expose(families: Iterable[Metric], *, openmetrics: bool = False) -> bytes:
    """Return families in the Prometheus text format 0.0.4, which has no exemplars, or as OpenMetrics. Thread-safe."""
    write: Callable[[Any], bytes] = generate_openmetrics if openmetrics else generate_latest
    return write(Source(lambda: families))
