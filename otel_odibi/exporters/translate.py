"""OpenTelemetry metrics as Prometheus families: names, labels, kinds and exemplars.

Names and labels follow the OpenTelemetry specification, "Prometheus and OpenMetrics Compatibility", called the spec
below; this package's own instruments have the names that `otel_odibi.names` gives them, and no scope labels. Every
series gets the labels of `ABOUT`, so that it can be told apart wherever it ends up, without a join with `target_info`.

Of the official exporter (opentelemetry-exporter-prometheus) only the mapping of names and units is used. Its collector
leaves exemplars out, fails the whole scrape on an exponential histogram, writes two lines for one series where labels
collide once sanitised, and queues what it was given, so that one family may be yielded several times.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any, Final

from opentelemetry.exporter.prometheus._mapping import map_unit, sanitize_attribute, sanitize_full_name
from opentelemetry.sdk.metrics import export as sdk
from prometheus_client.core import Metric
from prometheus_client.samples import Exemplar, Sample

from otel_odibi import names
from otel_odibi.clean import plain_text
from otel_odibi.exporters.families import LAST, Buckets, Families, Family, Kind, Labels, Lose, Losses, Series, merge

EXEMPLAR_LIMIT: Final = 128
"""Longest label set of an exemplar, in characters. Source: OpenMetrics 1.0, Exemplars."""
BUCKET_LIMIT: Final = 160
"""Most buckets of an exponential histogram that get bounds of their own; of more, neighbours are put together."""

ABOUT: Final = {"service": names.SERVICE_NAME, "environment": names.DEPLOYMENT_ENVIRONMENT_NAME}
"""Labels that every series gets, and the attributes of the resource they come from."""

_OWN: Final = {(i.name, i.kind.replace("updowncounter", "updown")): i for i in names.INSTRUMENTS}
_LOSSES: Final = Losses()


def families(
    data: sdk.MetricsData, *, lose: Lose = _LOSSES, among: Callable[[Families], Families] = lambda own: own
) -> list[Metric]:
    """Return `data`, cumulative metrics, as the families that prometheus_client's writers take. Never raises.

    The attributes of the resource come first, as the family `target`. What cannot be shown (delta temporality, a name
    that a metric of another type has) is left out and goes to `lose`: by default, one warning. `among` may add what
    other processes count.
    """
    found = among(translate(data, lose=lose))
    metrics = [family.metric() for family in found.values()]
    attributes = next((r.resource.attributes for r in data.resource_metrics if r.resource.attributes), None)
    if not attributes or found.keys() & {"target", "target_info"}:
        return metrics
    target = Metric("target", "Target metadata", "info")
    target.samples.append(Sample("target_info", dict(_labels(attributes)), 1.0))
    return [target, *metrics]


def translate(data: sdk.MetricsData, service: str | None = None, *, lose: Lose) -> Families:
    """Return what `data` holds as families. Never raises: what cannot be shown goes to `lose`.

    Of the resource they have the labels `ABOUT`, where `service` is what is given, unless a metric has such an
    attribute of its own.
    """
    return merge(_families(data, service, lose), LAST, lose)


def _families(data: sdk.MetricsData, service: str | None, lose: Lose) -> Iterator[Family]:
    for found in data.resource_metrics:
        known = {**found.resource.attributes, **({names.SERVICE_NAME: service} if service else {})}
        about = dict(_labels({label: known.get(key, "") for label, key in ABOUT.items()}))
        yield from chain.from_iterable(_of_scope(scope, about, lose) for scope in found.scope_metrics)


def _of_scope(found: sdk.ScopeMetrics, about: Mapping[str, str], lose: Lose) -> Iterator[Family]:
    for metric in found.metrics:
        try:
            family = _family(metric, found.scope, about, lose)
        except Exception:  # noqa: BLE001 - made by hand, it may hold anything; the others must come through
            lose("unreadable", str(metric.name), 1)
            continue
        if family.series:
            yield family


def _family(metric: sdk.Metric, scope: Any, about: Mapping[str, str], lose: Lose) -> Family:
    family, own = _named(metric, _kind(metric.data))
    if getattr(metric.data, "aggregation_temporality", None) is sdk.AggregationTemporality.DELTA:
        lose("delta_temporality", family.name, len(metric.data.data_points))
        return family
    library = {} if own else {"otel.scope.name": scope.name or "", "otel.scope.version": scope.version or ""}
    reserved = "le" if family.type == "histogram" else ""
    for point in metric.data.data_points:
        series = _series(family.kind, point)
        if family.kind == "counter" and not series.value >= 0:  # type: ignore[operator]  # a number; NaN neither
            lose("invalid_value", family.name, 1)
        else:
            labels = {**about, **dict(_labels({**library, **(point.attributes or {})}, reserved))}
            family.add(tuple(sorted(labels.items())), series, LAST)
    return family


def _kind(data: sdk.DataT) -> Kind:
    if isinstance(data, sdk.Gauge):
        return "gauge"
    if isinstance(data, sdk.Sum):
        return "counter" if data.is_monotonic else "updown"
    return "histogram" if isinstance(data, sdk.Histogram) else "exponential"


def _named(metric: sdk.Metric, kind: Kind) -> tuple[Family, bool]:
    """Return the empty family of a metric, and whether it is of this package. Source: the spec, Metric Metadata."""
    own = _OWN.get((metric.name, kind))
    unit = map_unit(metric.unit or "")
    name = own.prometheus if own else sanitize_full_name(metric.name) or "_"
    if kind == "counter":
        name = name.removesuffix("_total") or "_"
    if own is None and unit and not f"_{name}".endswith(f"_{unit}"):
        name = f"{name}_{unit}"
    return Family(name, kind, plain_text(metric.description or ""), unit), own is not None


def _series(kind: Kind, point: Any) -> Series:
    value: float | Buckets
    if kind == "histogram":
        value = _buckets(zip(point.explicit_bounds, point.bucket_counts, strict=False), point)
    elif kind == "exponential":
        value = _buckets(_exponential(point), point)
    else:
        value = _number(point.value)
    exemplars = filter(None, map(_exemplar, point.exemplars or ()))
    return Series(value, point.start_time_unix_nano or 0, tuple(exemplars))


def _buckets(counted: Iterable[tuple[float, int]], point: Any) -> Buckets:
    """Make a histogram of counts by upper bound; they may be in any order, and name a bound twice."""
    reached: dict[float, float] = {}
    total = 0.0
    for bound, count in sorted((bound + 0.0, count) for bound, count in counted if math.isfinite(bound)):  # no -0.0
        total += count
        reached[bound] = total
    reached[math.inf] = max(total, float(point.count))
    return Buckets(tuple(reached), tuple(reached.values()), math.nan if point.sum is None else _number(point.sum))


def _exponential(point: Any) -> Iterator[tuple[float, int]]:
    """Yield both bounds of each bucket that holds something, with its count at the upper; see `BUCKET_LIMIT`."""
    scale, filled = point.scale, Counter[tuple[int, int]]()
    for sign, side in ((1, point.positive), (-1, point.negative)):
        filled.update({(sign, side.offset + place): count for place, count in enumerate(side.bucket_counts) if count})
    while len(filled) > BUCKET_LIMIT:
        scale, halved = scale - 1, Counter[tuple[int, int]]()
        for (sign, index), count in filled.items():
            halved[sign, index >> 1] += count
        filled = halved
    for (sign, index), count in filled.items():
        lower, upper = sorted((sign * _power(index, scale), sign * _power(index + 1, scale)))
        yield lower, 0
        yield upper, count
    if point.zero_count:
        yield 0.0, point.zero_count


def _power(index: int, scale: int) -> float:
    """Return the lower bound of an exponential bucket. Source: metrics data model, Exponential Buckets."""
    try:
        return float(2.0 ** math.ldexp(index, -scale))
    except OverflowError:
        return math.inf if index > 0 else 0.0


def _number(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond 1.8e308
        return math.inf if value > 0 else -math.inf


def _exemplar(exemplar: Any) -> Exemplar | None:
    """Return an SDK exemplar for Prometheus, None where it tells nothing. Source: the spec, Exemplars."""
    value = _number(exemplar.value)
    ids = (("span_id", exemplar.span_id, 16), ("trace_id", exemplar.trace_id, 32))
    labels = {key: f"{number:0{width}x}" for key, number, width in ids if number}
    full = {**dict(_labels(exemplar.filtered_attributes or {})), **labels}
    if sum(len(key) + len(text) for key, text in full.items()) <= EXEMPLAR_LIMIT:
        labels = full
    if not labels or math.isnan(value):
        return None
    return Exemplar(labels, value, exemplar.time_unix_nano / 1e9 if exemplar.time_unix_nano else None)


def _labels(attributes: Mapping[str, Any], reserved: str = "") -> Labels:
    """Return attributes as labels: keys sanitised, values of keys that became one joined, in the order of the keys.

    Empty values are left out: to Prometheus they are the same as none. Source: the spec, Metric Attributes.
    """
    labels: dict[str, str] = {}
    for key in sorted(attributes):
        label = _label(key)
        if label == reserved:
            label = f"exported_{label}"
        value = attributes[key]
        text = plain_text(value if type(value) is str else json.dumps(value, default=str, ensure_ascii=False))
        labels[label] = f"{labels[label]};{text}" if label in labels else text
    return tuple(sorted(pair for pair in labels.items() if pair[1]))


@lru_cache(maxsize=4096)
def _label(key: str) -> str:
    return sanitize_attribute(key) or "_"
