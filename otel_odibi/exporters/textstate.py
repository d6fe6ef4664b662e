"""What the `.prom` file of a service goes on from: the counts of all its processes, and who has what under way.

Counters and histograms are one sum for all processes, which each adds to: a killed process loses nothing it has
written. Gauges and up-down counters are kept by process, as they go when it does.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

import psutil
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from otel_odibi import names
from otel_odibi.exporters.families import FIRST, Buckets, Families, Family, Kind, Labels, Lose, Series, greater, merge

STALE_SECONDS: Final = 300
"""Age at which the part of a process on another machine or in another container, which cannot be looked at, is over."""

_UPDOWN: Final = {i.prometheus for i in names.INSTRUMENTS if i.kind == "updowncounter"}


class Part(NamedTuple):
    """What one process has under way, as it wrote it last. Times are Unix times, s.

    A pid is used again, but with another start.
    """

    host: str
    pid: int
    started: float
    updated: float
    families: Families

    @classmethod
    def of_this_process(cls, families: Families) -> Part:
        """Return the part of this process, as of now."""
        started = 0.0
        with suppress(psutil.Error):
            started = psutil.Process().create_time()
        return cls(_host(), os.getpid(), started, time.time(), families)

    def is_live(self) -> bool:
        """Tell whether its process runs, or may do so: one that is killed and not yet waited for does not."""
        if self.host != _host():
            return time.time() - self.updated < STALE_SECONDS
        try:
            process = psutil.Process(self.pid)
            # The clock may have been set a little meanwhile, and the start is counted from it.
            return bool(abs(process.create_time() - self.started) < 2 and process.status() != psutil.STATUS_ZOMBIE)
        except (psutil.NoSuchProcess, ValueError):
            return False
        except psutil.Error:  # there, and not ours to look at
            return True


def _host() -> str:
    """Return what names this host: containers share the name of one at times, but never its space of pids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


@dataclass(slots=True)
class State:
    """What a service's processes have counted, with the last gauges of those that ended (`base`), and the live ones."""

    base: Families = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)

    def update(self, fresh: Sequence[Family], own: str, limit: int, lose: Lose) -> None:
        """Add fresh counts, and take over from the parts that ended and from `own`, which is about to be replaced."""
        over = [key for key, part in self.parts.items() if key == own or not part.is_live()]
        ended = merge(chain.from_iterable(self.parts.pop(key).families.values() for key in over), greater, lose)
        for family in fresh:
            if family.kind == "histogram" and family.name in self.base:
                _rebound(self.base[family.name], family)
        self.base = merge([*fresh, *ended.values(), *self.base.values()], FIRST, lose, limit)
        for family in self.base.values():
            if family.kind == "updown":  # what a process had under way is not any more
                family.series = dict.fromkeys(family.series, Series(0.0))

    def shown(self, limit: int, lose: Lose) -> Families:
        """Return what the file is to show."""
        newest_first = reversed(self.parts.values())
        live = merge(chain.from_iterable(part.families.values() for part in newest_first), greater, lose)
        return merge([*live.values(), *self.base.values()], FIRST, lose, limit)

    def to_json(self) -> bytes:
        """Return it as JSON, with NaN and Infinity as Python writes them."""
        parts = {key: {**part._asdict(), "families": _packed(part.families)} for key, part in self.parts.items()}
        return json.dumps({"base": _packed(self.base), "parts": parts}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> State:
        """Read it back. Raises any exception where it is damaged."""
        found = json.loads(text)
        return cls(_unpacked(found["base"]), {key: _part(**part) for key, part in found["parts"].items()})


def _rebound(old: Family, new: Family) -> None:
    """Give a family's series the bounds of the new ones, where those agree: what is added up must have the same."""
    bounds = {series.value.bounds for series in new.series.values() if isinstance(series.value, Buckets)}
    for labels, series in old.series.items():
        if len(bounds) == 1 and isinstance(series.value, Buckets):
            old.series[labels] = Series(series.value.at(*bounds))


def _packed(families: Families) -> dict[str, Any]:
    return {
        f.name: [f.kind, f.help, f.unit, [[labels, series.value] for labels, series in f.series.items()]]
        for f in families.values()
    }


def _part(host: Any, pid: Any, started: Any, updated: Any, families: Any) -> Part:
    return Part(str(host), int(pid), float(started), float(updated), _unpacked(families))


def _unpacked(packed: dict[str, Any]) -> Families:
    families: Families = {}
    for name, (kind, text, unit, found) in packed.items():
        if kind not in get_args(Kind):
            raise ValueError(f"kind {kind}")
        family = families[name] = Family(name, kind, str(text), str(unit))
        for labels, value in found:
            value = _buckets(*value) if family.type == "histogram" else float(value)
            family.series[tuple((str(key), str(text)) for key, text in labels)] = Series(value)
    return families


def _buckets(bounds: Any, counts: Any, total: Any) -> Buckets:
    value = Buckets(tuple(map(float, bounds)), tuple(map(float, counts)), float(total))
    ascending = all(a < b for a, b in pairwise(value.bounds))
    if len(value.bounds) != len(value.counts) or value.bounds[-1] != math.inf or not ascending:
        raise ValueError("bounds")
    return value


def load(state_file: Path, file: Path, lose: Lose) -> State:
    """Return the state; where it is missing or damaged, what can be read of the `.prom` file is the base of a new one.

    Raises OSError where there is something that cannot be read: better no new file than one that forgets.
    """
    with suppress(FileNotFoundError):
        text = state_file.read_bytes()
        try:
            return State.from_json(text)
        except Exception:  # noqa: BLE001 - something else may be at any place
            lose("state_damaged", state_file.name, 1)
    with suppress(FileNotFoundError):
        return State(_read(file, lose))
    return State()


def _read(file: Path, lose: Lose) -> Families:
    """Return the families of a `.prom` file. Raises OSError."""
    text = file.read_bytes().decode(errors="replace")
    with suppress(Exception):  # the parser lets more escape than ValueError
        return _parsed(text)
    lose("prom_file_damaged", file.name, 1)
    with suppress(Exception):
        return _parsed("\n".join(filter(_is_sound, text.split("\n"))))
    return {}


def _is_sound(line: str) -> bool:
    with suppress(Exception):
        return bool(list(text_string_to_metric_families(line)))
    return False


def _parsed(text: str) -> Families:
    found: Families = {}
    for metric in text_string_to_metric_families(text):
        if metric.type == "histogram":
            found[metric.name] = _histogram(metric)
        elif metric.type in ("counter", "gauge"):
            kind: Any = "updown" if metric.name in _UPDOWN else metric.type
            series = {_labels(sample): Series(float(sample.value)) for sample in metric.samples}
            found[metric.name] = Family(metric.name, kind, metric.documentation, "", series)
    return found


def _histogram(metric: Metric) -> Family:
    reached: dict[Labels, dict[float, float]] = {}
    sums: dict[Labels, float] = {}
    for sample in metric.samples:
        labels = _labels(sample)
        if sample.name == f"{metric.name}_sum":
            sums[labels] = float(sample.value)
        with suppress(KeyError, ValueError):
            bound = float(sample.labels["le"])
            reached.setdefault(labels, {math.inf: 0.0})[bound] = float(sample.value)
    family = Family(metric.name, "histogram", metric.documentation, "")
    for labels, counts in reached.items():
        bounds, totals = zip(*sorted(counts.items()), strict=True)
        family.series[labels] = Series(Buckets(bounds, (*totals[:-1], max(totals)), sums.get(labels, math.nan)))
    return family


def _labels(sample: Sample) -> Labels:
    return tuple(sorted((key, text) for key, text in sample.labels.items() if key != "le"))
