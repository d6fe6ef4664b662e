"""The `.prom` file, for the textfile collector of node_exporter: one a service, for all its processes.

Batch processes start their counters at 0, so the file goes on from what it held::

    <target>/prometheus/<service>.prom         what node_exporter reads
    <target>/prometheus/.<service>.state.json  the same by kind, and what each live process has under way
    <target>/prometheus/.<service>.lock        held while the two are written

An export adds what was counted since the last one, so a killed process loses no more than that. Gauges and up-down
counters are kept by process and go when it does: of an up-down counter 0 stays then, of a gauge its last value.
To start from 0, delete both files. Every series has the label `service`, which it needs here: node_exporter puts all
files of a directory together, and fails the scrape where two of them have a series in common.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData

from otel_odibi import names
from otel_odibi.clean import plain_text
from otel_odibi.errors import SettingError
from otel_odibi.exporters.families import Buckets, Families, Family, Kind, Labels, Losses, Series, expose
from otel_odibi.exporters.segments import NO_LOCKS, acquire, release, safe_name
from otel_odibi.exporters.textstate import Part, State, load
from otel_odibi.exporters.translate import translate
from otel_odibi.forks import after_fork

LOCK_SECONDS: Final = 5.0
"""Longest wait for the other processes of the service."""

_Key = tuple[Kind, str, Labels]
_KEPT_BY_PROCESS: Final = ("gauge", "updown")


class TextfileMetricExporter(MetricExporter):
    """Writes `<target>/prometheus/<service>.prom`, whole, at each export. Thread-safe; fork-safe; never raises later.

    `target` is OTEL_ODIBI_DIRECTORY by default, else `telemetry`; `service` is that of the first resource exported.
    Over the processes of a service gauges show their maximum, timestamps for ever, all else is added up. Of more than
    `limit` series those are dropped that no process has reported lately. When the bounds of a histogram change, the
    new ones win: counts go on where a bound was there before, else from the next lower one. `on_drop(reason, count)`
    is told what was dropped, and of failed writes, which lose nothing as long as a later one succeeds. A forked child
    adds what it counts itself: series with a later start time in full, others less what its parent was last given.
    Raises `SettingError` where `target` cannot be a directory.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | None = None,
        *,
        service: str | None = None,
        on_drop: Callable[[str, int], None] | None = None,
        limit: int = 10_000,
    ) -> None:
        super().__init__()  # temporality: the SDK's default, cumulative for every instrument
        self._directory = _directory(target) / "prometheus"
        self._service = service
        self._limit = limit
        self._lose = Losses(on_drop)
        self._closed = False
        self._given: dict[_Key, Series] = {}
        self._before: dict[_Key, Series] | None = None
        self._others: dict[_Key, Series] = {}
        self._seen = State()
        self._forked()
        after_fork(self._forked)

    def _forked(self) -> None:
        self._lock = threading.Lock()
        self._inherited = self._given
        self._counted = self._given  # what the file holds of the values given, or a parent answers for
        self._unwritten: MetricsData | None = None
        self._part = uuid.uuid4().hex

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Write the file anew, with what has come since the last export. Waits for other processes at most 5 s."""
        with self._lock:
            written = not self._closed and self._write(metrics_data, timeout_millis)
            self._unwritten = None if written else metrics_data
            return MetricExportResult.SUCCESS if written else MetricExportResult.FAILURE

    def among(self, own: Families) -> Families:
        """Return what this process shows with what others of the service have added since the first call of this.

        Gauges are those of the file. Counts never go down, as long as those of `own` do not; where the file cannot be
        read, others have added nothing. Needs the `service`.
        """
        with self._lock:
            stem = safe_name(plain_text(self._service or ""))
            try:
                self._seen = load(self._directory / f".{stem}.state.json", self._directory / f"{stem}.prom", self._lose)
            except OSError as exc:
                self._lose.warn("read_failed", str(exc))
            state = self._seen
            if self._before is None:
                self._before = {_key(f, labels): s for f in state.base.values() for labels, s in f.series.items()}
            state.update((), self._part, self._limit, self._lose)
            for family in state.base.values():
                if family.kind not in _KEPT_BY_PROCESS:
                    family.series = {labels: s for labels in family.series if (s := self._of_others(family, labels))}
            state.parts[self._part] = Part("", 0, 0.0, 0.0, own)
            return state.shown(self._limit, self._lose)

    def _of_others(self, family: Family, labels: Labels) -> Series | None:
        """Return what there is less what there was and what this process counted: as before but for a true increase."""
        key, left = _key(family, labels), family.series[labels].value
        least = 0.0 if isinstance(left, Buckets) else abs(left) * 1e-9  # differences of floats are rounded
        known: Any
        for known in (self._before or {}).get(key), self._counted.get(key):
            if known is not None:
                left = left.joined(known.value, _difference) if isinstance(left, Buckets) else left - known.value
        if _count(left) - (_count(self._others[key].value) if key in self._others else 0.0) > least:
            self._others[key] = Series(left)
        return self._others.get(key)

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Do nothing: an export is complete when it returns."""
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Tell the file that this process has ended. Idempotent; never raises; later exports fail."""
        with self._lock:
            left, goes = self._unwritten, self._given and not self._closed
            if goes and (left is None or self._write(left, timeout_millis)):
                self._write(MetricsData([]), timeout_millis)
            self._closed = True

    def _write(self, data: MetricsData, timeout_millis: float) -> bool:
        try:
            self._service = service = plain_text(self._service or _service_of(data))
            given = translate(data, service, lose=self._lose)
            self._remember({_key(f, labels): series for f in given.values() for labels, series in f.series.items()})
            self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            lock = self._directory / f".{safe_name(service)}.lock"
            with _locked(lock, min(timeout_millis / 1000, LOCK_SECONDS)):
                self._add(given, safe_name(service))
        except Exception as exc:  # noqa: BLE001 - a full disk, a directory taken away: the next export tries again
            self._lose.warn("write_failed", f"{type(exc).__name__}: {exc}"[:500])
            self._lose.count("write_failed", 1)
            return False
        return True

    def _remember(self, given: dict[_Key, Series]) -> None:
        """Keep what was given before, too: an observable counter may be silent for an export. Bounded by `limit`."""
        silent = [(key, series) for key, series in self._given.items() if key not in given]
        self._given = {**dict(silent[-self._limit :]), **given}

    def _add(self, given: Families, stem: str) -> None:
        """Add what was given to both files; nothing given is nothing under way. Raises OSError."""
        file, state_file = self._directory / f"{stem}.prom", self._directory / f".{stem}.state.json"
        state = load(state_file, file, self._lose)
        fresh = [_since(family, self._counted) for family in given.values() if family.kind not in _KEPT_BY_PROCESS]
        own = {n: _since(family, self._inherited) for n, family in given.items() if family.kind in _KEPT_BY_PROCESS}
        state.update(fresh, self._part, self._limit, self._lose)
        if own:
            state.parts[self._part] = Part.of_this_process(own)
        _replace(state_file, state.to_json())
        self._counted = self._given  # now, as a failure below must not make the next export add it again
        shown = state.shown(self._limit, self._lose)
        _replace(file, expose([family.metric() for _, family in sorted(shown.items())]))


def _directory(target: str | os.PathLike[str] | None) -> Path:
    name = "directory" if target is not None else "OTEL_ODIBI_DIRECTORY"
    given = os.fspath(target) if target is not None else os.environ.get(name, "").strip() or "telemetry"
    path = Path(given).expanduser()
    if "://" in given or (path.exists() and not path.is_dir()):
        raise SettingError(name, given, "not a local directory", "give the path of one; a .prom file goes nowhere else")
    return path


def _service_of(data: MetricsData) -> str:
    found = (resource.resource.attributes.get(names.SERVICE_NAME) for resource in data.resource_metrics)
    return str(next(filter(None, found), "odibi"))


def _key(family: Family, labels: Labels) -> _Key:
    return family.kind, family.name, labels


def _since(family: Family, before: Mapping[_Key, Series]) -> Family:
    """Return a family less what was there before."""
    left = {labels: _less(family.kind, now, before.get(_key(family, labels))) for labels, now in family.series.items()}
    return replace(family, series=left)


def _less(kind: Kind, now: Series, then: Series | None) -> Series:
    """Return what was counted in between; all of it where counting began anew. Source: metrics data model, Resets."""
    if then is None or then.start != now.start or kind == "gauge":
        return now
    if isinstance(now.value, Buckets) and isinstance(then.value, Buckets):
        fresh = now.value.joined(then.value, _difference)
        return now if min(fresh.counts) < 0 else Series(fresh)
    left = _difference(now.value, then.value)  # type: ignore[arg-type]  # two numbers: a family is of one kind
    return now if left < 0 and kind == "counter" else Series(left)


def _count(value: float | Buckets) -> float:
    return value.counts[-1] if isinstance(value, Buckets) else value


def _difference(now: float, then: float) -> float:
    return 0.0 if now == then else now - then  # infinity less infinity is no number


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole: other programs see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.chmod(0o644)  # whatever the umask: node_exporter is another user
    os.replace(temporary, path)


@contextmanager
def _locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock of a service's files. Raises TimeoutError after `seconds`, OSError where the file cannot be had."""
    deadline = time.monotonic() + seconds
    held: int | None = None
    try:
        while (held := acquire(path, os.O_RDWR | os.O_CREAT)) is None:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"another process holds {path.name}")
            time.sleep(0.01)
    except OSError as exc:
        if exc.errno not in NO_LOCKS:  # on a filesystem without locks a service should have one process at a time
            raise
    try:
        yield
    finally:
        if held is not None:
            release(held)
