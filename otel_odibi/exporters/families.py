"""Prometheus families as values: how they are merged, bounded and written. `translate` makes them of OpenTelemetry's.

prometheus_client's own `Metric` is a list of lines; to add up processes or to change the bounds of a histogram, series
have to be values first.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from operator import add, attrgetter
from typing import Any, Final, Literal, NamedTuple

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import floatToGoString

from otel_odibi import names

Labels = tuple[tuple[str, str], ...]
Kind = Literal["counter", "updown", "gauge", "peak", "histogram", "exponential"]
"""How values of a family go together. A `peak` is a gauge of which the greatest value ever counts: a timestamp."""
Lose = Callable[[str, str, int], None]
"""Takes the reason why something was left out, what it was, and how many."""
Families = dict[str, "Family"]

UNITED_LIMIT: Final = 640
"""Most bounds that a histogram gets by being added to others with other bounds."""

_log: Final = logging.getLogger(names.SCOPE)
_TYPES: Final[Mapping[str, str]] = {"counter": "counter", "histogram": "histogram", "exponential": "histogram"}
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


class Measured(NamedTuple):
    """One measurement kept beside a series, with labels that tell of it; `time` is Unix time in seconds or None."""

    value: float
    labels: Labels
    time: float | None


class Series(NamedTuple):
    """One series: its value, when counting began (Unix time, ns), and some of the measurements behind it."""

    value: float | Buckets
    start: int = 0
    exemplars: tuple[Measured, ...] = ()


class Family:
    """A Prometheus family; a counter's name comes without `_total`. Series are keyed by sorted labels, none empty.

    The values of a histogram, exponential or not, are `Buckets`, those of every other kind numbers.
    """

    __slots__ = ("help", "kind", "name", "series", "unit")

    def __init__(self, name: str, kind: Kind, text: str, unit: str, series: dict[Labels, Series] | None = None) -> None:
        self.name = name
        self.kind: Kind = kind
        self.help = text
        self.unit = unit
        self.series = {} if series is None else series

    @property
    def type(self) -> str:
        """The type that Prometheus knows: counter, gauge or histogram."""
        return _TYPES.get(self.kind, "gauge")

    def metric(self, extra: Labels = ()) -> Metric:
        """Return what prometheus_client's writers take, `extra` labels added to each series; series in sorted order."""
        metric = Metric(self.name, self.help, self.type, self.unit if self.name.endswith(f"_{self.unit}") else "")
        for labels in sorted(self.series):
            metric.samples += self._samples({**dict(extra), **dict(labels)}, self.series[labels])
        return metric

    def _samples(self, labels: dict[str, str], series: Series) -> Iterator[Sample]:
        if isinstance(series.value, Buckets):
            yield from _bucket_samples(self.name, labels, series.value, series.exemplars)
        elif self.kind == "counter":
            latest = max(series.exemplars, key=lambda e: e.time or 0.0, default=None)
            yield Sample(f"{self.name}_total", labels, series.value, None, latest and _exemplar(latest))
        else:
            yield Sample(self.name, labels, series.value)


def _bucket_samples(name: str, labels: dict[str, str], value: Buckets, found: Iterable[Measured]) -> Iterator[Sample]:
    # Of each bucket the greatest exemplar, as the compatibility specification wants.
    exemplars = {bisect_left(value.bounds, e.value): e for e in sorted(found, key=attrgetter("value"))}
    for index, (bound, count) in enumerate(zip(value.bounds, value.counts, strict=True)):
        exemplar = _exemplar(exemplars[index]) if index in exemplars else None
        yield Sample(f"{name}_bucket", {**labels, "le": _le(bound)}, count, None, exemplar)
    # OpenMetrics has no sum that is NaN, negative or of negative values, and then no count either: +Inf holds that.
    if value.bounds[0] >= 0 and value.sum >= 0:
        yield Sample(f"{name}_count", labels, value.counts[-1])
        yield Sample(f"{name}_sum", labels, value.sum)


@lru_cache(maxsize=4096)
def _le(bound: float) -> str:
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


def _exemplar(measured: Measured) -> Exemplar:
    return Exemplar(dict(measured.labels), measured.value, measured.time)


# --- merging ---------------------------------------------------------------------------------------------------------


def _both(a: Series, b: Series, value: float | Buckets) -> Series:
    return Series(value, min(a.start, b.start), a.exemplars + b.exemplars)


def _added(a: Series, b: Series) -> Series:
    """Add up; of histograms the bounds of the first stay."""
    if isinstance(a.value, Buckets) and isinstance(b.value, Buckets):
        return _both(a, b, _sum_at(a.value.bounds, a.value, b.value))
    return _both(a, b, a.value + b.value)  # type: ignore[operator, arg-type]  # two numbers: they are of one family


def _united(a: Series, b: Series) -> Series:
    """Add up histograms at the bounds of both, while those are not too many: each has bounds where it has values."""
    if isinstance(a.value, Buckets) and isinstance(b.value, Buckets):
        bounds = tuple(sorted({*a.value.bounds, *b.value.bounds}))
        return _both(a, b, _sum_at(bounds if len(bounds) <= UNITED_LIMIT else a.value.bounds, a.value, b.value))
    return a


def _sum_at(bounds: tuple[float, ...], a: Buckets, b: Buckets) -> Buckets:
    return Buckets(bounds, tuple(map(add, a.at(bounds).counts, b.at(bounds).counts)), a.sum + b.sum)


def _greater(a: Series, b: Series) -> Series:
    return a if b.value != b.value or a.value >= b.value else b  # type: ignore[operator]  # numbers; NaN is the least


def _first(a: Series, b: Series) -> Series:
    return a


def _last(a: Series, b: Series) -> Series:
    return b


Rule = Mapping[str, Callable[[Series, Series], Series]]
_SUMS: Final = {"counter": _added, "histogram": _added, "exponential": _united}
WITHIN: Final[Rule] = {**_SUMS, "updown": _added, "gauge": _last, "peak": _last}
"""Series of one process that became one when their labels were sanitised."""
ACROSS: Final[Rule] = {**_SUMS, "updown": _added, "gauge": _greater, "peak": _greater}
"""Series of processes that run at the same time."""
AFTER: Final[Rule] = {**_SUMS, "updown": _first, "gauge": _first, "peak": _greater}
"""A series as it is now, and as it was left before."""


def merge(sources: Iterable[Iterable[Family]], rule: Rule, lose: Lose, limit: int | None = None) -> Families:
    """Return the families of all sources as one valid set; the sources stay as they are.

    Of families with one name the first gives kind, help and unit. A family of another type, or whose sample names
    another has, goes to `lose`, and so do series that come when `limit` of them are there already.
    """
    merged: Families = {}
    taken: dict[str, str] = {}
    over, room = 0, math.inf if limit is None else limit
    for family in (family for source in sources for family in source):
        into = _claim(merged, taken, family)
        if into is None:
            lose("name_conflict", family.name, len(family.series))
            continue
        if into.help != family.help:
            lose("help_conflict", family.name, 0)
        for labels, series in family.series.items():
            if labels in into.series:
                into.series[labels] = rule[into.kind](into.series[labels], series)
            elif room > 0:
                room -= 1
                into.series[labels] = series
            else:
                over += 1
    if over:
        lose("series_limit", f"more than {limit} series", over)
    return merged


def _claim(merged: Families, taken: dict[str, str], family: Family) -> Family | None:
    """Return the family to merge into; None where one of its sample names belongs to another."""
    wanted = [family.name + suffix for suffix in _SUFFIXES[family.type]]
    owner = f"{family.type} {family.name}"
    if any(taken.get(name, owner) != owner for name in wanted):
        return None
    taken.update(dict.fromkeys(wanted, owner))
    return merged.setdefault(family.name, Family(family.name, family.kind, family.help, family.unit))


# --- what both outputs use -------------------------------------------------------------------------------------------


class Losses:
    """Counts what was left out and warns about it, each thing once. Bounded; never raises; safe from any thread."""

    def __init__(self, on_drop: Callable[[str, int], None] | None = None) -> None:
        self._on_drop = on_drop
        self._told: set[tuple[str, str]] = set()

    def __call__(self, reason: str, what: str, count: int) -> None:
        """Count and warn, unless this reason was given for this thing before."""
        if (reason, what) not in self._told and len(self._told) < 1_000:
            self._told.add((reason, what))
            with suppress(Exception):  # a host's logging handler may raise
                _log.warning("Prometheus metrics: %s (%s)", reason.replace("_", " "), what)
            self.count(reason, count)

    def count(self, reason: str, count: int) -> None:
        """Count, with no warning of its own."""
        if self._on_drop is not None and count:
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


def follow_forks(method: Callable[[], None]) -> None:
    """Call a bound method in every forked child, as long as its object lives."""
    if hasattr(os, "register_at_fork"):
        reference = weakref.WeakMethod(method)

        def in_child() -> None:
            found = reference()
            if found is not None:
                found()

        os.register_at_fork(after_in_child=in_child)
