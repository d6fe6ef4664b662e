"""What the `.prom` file of a service goes on from: the counts of all its processes, and who has what under way.

Counters and histograms are one sum for all processes, which each adds to: a killed process loses nothing it has
written. Gauges and up-down counters are kept by process, as they go when it does.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

import orjson
import psutil
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from otel_odibi import names
from otel_odibi.exporters.families import ACROSS, AFTER, Buckets, Families, Family, Kind, Labels, Lose, Series, merge

STALE_SECONDS: Final = 300
"""Age at which the part of a process on another machine or in another container, which cannot be looked at, is over."""
SERVICE: Final = "service"
"""Label that every series of a `.prom` file gets."""

_VERSION: Final = 1
_BY_PROMETHEUS_NAME: Final = {i.prometheus.removesuffix("_total"): i for i in names.INSTRUMENTS}


def load(state_file: Path, file: Path, service: str, lose: Lose) -> State:
    """Return the state; where it is missing or damaged, what can be read of the `.prom` file is the base of a new one.

    Raises OSError where there is something that cannot be read: better no new file than one that forgets.
    """
    try:
        return State.from_json(state_file.read_bytes())
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, KeyError, AttributeError):
        lose("state_damaged", state_file.name, 1)
    try:
        text = file.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return State({}, {})
    base: Families = {}
    try:
        for metric in text_string_to_metric_families(text):
            if metric.type in ("counter", "gauge", "histogram"):
                base[metric.name] = _parsed(metric, service)
    except Exception:  # noqa: BLE001 - the parser lets more escape than ValueError
        lose("prom_file_damaged", file.name, 1)
    return State(base, {})


def _parsed(metric: Metric, service: str) -> Family:
    """Return a family read from a `.prom` file, without the label `service`. Raises ValueError, KeyError."""
    own = _BY_PROMETHEUS_NAME.get(metric.name)
    kind: Any = "peak" if metric.name.endswith("_timestamp_seconds") else metric.type
    if own is not None and own.kind == "updowncounter":
        kind = "updown"
    family = Family(metric.name, kind, metric.documentation, "")
    reached: dict[Labels, dict[float, float]] = {}
    sums: dict[Labels, float] = {}
    for sample in metric.samples:
        pairs = ((key, text) for key, text in sample.labels.items() if (key, text) != (SERVICE, service))
        labels = tuple(sorted(pair for pair in pairs if pair[0] != "le" or metric.type != "histogram"))
        if sample.name == f"{metric.name}_bucket":
            reached.setdefault(labels, {})[float(sample.labels["le"])] = float(sample.value)
        elif sample.name == f"{metric.name}_sum":
            sums[labels] = float(sample.value)
        elif metric.type != "histogram":
            family.series[labels] = Series(float(sample.value))
    for labels, counts in reached.items():
        counts.setdefault(math.inf, max(counts.values()))
        bounds, totals = zip(*sorted(counts.items()), strict=True)
        family.series[labels] = Series(Buckets(bounds, totals, sums.get(labels, math.nan)))
    return family


class Process(NamedTuple):
    """A process for good: a pid is used again, with another start (Unix time, s)."""

    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Process:
        """Return this process. Never raises."""
        try:
            started = psutil.Process().create_time()
        except psutil.Error:
            started = 0.0
        return cls(_host(), os.getpid(), started)

    def runs(self) -> bool:
        """Tell whether it runs still; one that is killed and not yet waited for does not."""
        try:
            process = psutil.Process(self.pid)
            # The clock may have been set a little meanwhile, and the start is counted from it.
            return bool(abs(process.create_time() - self.started) < 2 and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:  # there, and not ours to look at
            return True


def _host() -> str:
    """Return what names this host: containers share the name of one at times, but never its space of pids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


class Part(NamedTuple):
    """The gauges and up-down counters of one process, as it wrote them last (Unix time, s)."""

    process: Process
    updated: float
    families: Families

    def is_live(self, here: str) -> bool:
        """Tell whether the process runs, or may do so where it cannot be looked at from `here`."""
        return self.process.runs() if self.process.host == here else time.time() - self.updated < STALE_SECONDS


class State:
    """What a service's processes have counted, with the last gauges of those that ended (`base`), and the live ones."""

    def __init__(self, base: Families, parts: dict[str, Part]) -> None:
        self.base = base
        self.parts = parts

    def update(self, fresh: Sequence[Family], own: str, limit: int, lose: Lose) -> None:
        """Add fresh counts, and take over from the parts that ended and from `own`, which is about to be replaced."""
        here = _host()
        over = [key for key, part in self.parts.items() if key == own or not part.is_live(here)]
        ended = merge([self.parts.pop(key).families.values() for key in over], ACROSS, lose)
        for family in fresh:
            if family.kind == "histogram" and family.name in self.base:
                _rebound(self.base[family.name], family)
        self.base = merge([fresh, ended.values(), self.base.values()], AFTER, lose, limit)
        for family in self.base.values():
            if family.kind == "updown":  # what a process had under way is not any more
                family.series = dict.fromkeys(family.series, Series(0.0))

    def shown(self, limit: int, lose: Lose) -> Families:
        """Return what the file is to show."""
        newest = sorted(self.parts.values(), key=lambda part: -part.updated)
        live = merge([part.families.values() for part in newest], ACROSS, lose)
        return merge([live.values(), self.base.values()], AFTER, lose, limit)

    def to_json(self) -> bytes:
        """Return it as JSON; numbers that JSON has not are texts."""
        parts = {
            key: {**part.process._asdict(), "updated": part.updated, "families": _packed(part.families)}
            for key, part in self.parts.items()
        }
        return orjson.dumps({"version": _VERSION, "base": _packed(self.base), "parts": parts})

    @classmethod
    def from_json(cls, text: bytes) -> State:
        """Read it back. Raises ValueError, TypeError, KeyError or AttributeError where it is damaged."""
        found = orjson.loads(text)
        if found["version"] != _VERSION:
            raise ValueError(f"version {found['version']}")
        parts = {
            key: Part(
                Process(str(part["host"]), int(part["pid"]), float(part["started"])),
                float(part["updated"]),
                _unpacked(part["families"]),
            )
            for key, part in found["parts"].items()
        }
        return cls(_unpacked(found["base"]), parts)


def _rebound(old: Family, new: Family) -> None:
    """Give a family's series the bounds of the new ones, where those agree: what is added up must have the same."""
    bounds = {series.value.bounds for series in new.series.values() if isinstance(series.value, Buckets)}
    if len(bounds) == 1:
        (only,) = bounds
        for labels, series in old.series.items():
            if isinstance(series.value, Buckets):
                old.series[labels] = Series(series.value.at(only))


def _packed(families: Families) -> dict[str, Any]:
    return {
        f.name: [f.kind, f.help, f.unit, [[labels, _plain(series.value)] for labels, series in f.series.items()]]
        for f in families.values()
    }


def _plain(value: float | Buckets) -> Any:
    if isinstance(value, Buckets):
        return [value.bounds[:-1], value.counts, _plain(value.sum)]
    return value if math.isfinite(value) else str(value)


def _unpacked(packed: dict[str, Any]) -> Families:
    families: Families = {}
    for name, (kind, text, unit, series) in packed.items():
        if kind not in get_args(Kind):
            raise ValueError(f"kind {kind}")
        histogram = kind in ("histogram", "exponential")
        read = ((tuple((str(k), str(v)) for k, v in labels), _value(value, histogram)) for labels, value in series)
        families[name] = Family(name, kind, str(text), str(unit), {labels: Series(value) for labels, value in read})
    return families


def _value(packed: Any, histogram: bool) -> float | Buckets:
    if not histogram:
        return float(packed)
    bounds, counts, total = packed
    value = Buckets((*map(float, bounds), math.inf), tuple(map(float, counts)), float(total))
    if len(value.bounds) != len(value.counts) or any(a >= b for a, b in pairwise(value.bounds)):
        raise ValueError("bounds")
    return value
