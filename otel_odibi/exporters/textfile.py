"""The `.prom` file, for the textfile collector of node_exporter: one a service, for all its processes.

Batch processes start their counters at 0, so the file goes on from what it held::

    <target>/prometheus/<service>.prom         what node_exporter reads
    <target>/prometheus/.<service>.state.json  the same by kind, and what each live process has under way
    <target>/prometheus/.<service>.lock        held while the two are written

An export adds what was counted since the last one, so a killed process loses no more than that. Gauges and up-down
counters are kept by process and go when it does: of an up-down counter 0 stays then, of a gauge its last value.
To start from 0, delete both files. Every series gets the label `service`: node_exporter puts all files of a directory
together, and fails the scrape where two of them have a series in common.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData

from otel_odibi import names
from otel_odibi.clean import plain_text
from otel_odibi.errors import SettingError
from otel_odibi.exporters.families import (
    WITHIN,
    Buckets,
    Families,
    Family,
    Kind,
    Losses,
    Series,
    expose,
    follow_forks,
    merge,
)
from otel_odibi.exporters.segments import NO_LOCKS, acquire, release, safe_name
from otel_odibi.exporters.textstate import SERVICE, Part, Process, load
from otel_odibi.exporters.translate import translate

LOCK_SECONDS: Final = 5.0
"""Longest wait for the other processes of the service."""

_KEPT_BY_PROCESS: Final = ("gauge", "updown")


class TextfileMetricExporter(MetricExporter):
    """Writes `<target>/prometheus/<service>.prom`, whole, at each export. Thread-safe; fork-safe; never raises later.

    `target` is OTEL_ODIBI_DIRECTORY by default, else `telemetry`; `service` is that of the first resource exported.
    Over the processes of a service counters, histograms and up-down counters are added up, of gauges the maximum is
    taken; a timestamp keeps its maximum for ever. Of more than `limit` series those are dropped that no process has
    reported lately. When the bounds of a histogram change, the new ones win: counts go on where a bound was there
    before, else from the next lower one. `on_drop(reason, count)` is told what was dropped, and of failed writes,
    which lose nothing as long as a later one succeeds. Raises `SettingError` where `target` cannot be a directory.

    A forked child adds what it counts itself: series that were counted anew after the fork (a later start time) in
    full, others less what this exporter was last given before the fork.
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
        self._lock = threading.Lock()
        self._closed = False
        self._given: Families = {}
        self._added: Families = {}  # what the file holds of the values given, or a parent answers for
        self._inherited: Families = {}
        self._process = Process.current()
        self._part = uuid.uuid4().hex
        follow_forks(self._forked)

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Write the file anew, with what has come since the last export. Waits for other processes at most 5 s."""
        with self._lock:
            if self._closed:
                return MetricExportResult.FAILURE
            try:
                if self._service is None:
                    self._service = _service_of(metrics_data)
                self._given = translate(metrics_data, self._ignore_help)
                self._write(self._given, min(timeout_millis / 1000, LOCK_SECONDS))
            except Exception as exc:  # noqa: BLE001 - a full disk, a directory taken away: the next export tries again
                self._failed(exc)
                return MetricExportResult.FAILURE
            return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Do nothing: an export is complete when it returns."""
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Tell the file that this process has ended. Idempotent; never raises; later exports fail."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if not self._given:
                return
            try:
                self._write(None, min(timeout_millis / 1000, LOCK_SECONDS))
            except Exception as exc:  # noqa: BLE001 - the part is taken for ended when the process is gone
                self._failed(exc)

    def _failed(self, exc: Exception) -> None:
        self._lose("write_failed", f"{type(exc).__name__}: {exc}"[:500], 0)
        self._lose.count("write_failed", 1)

    def _forked(self) -> None:
        self._lock = threading.Lock()
        self._added = self._inherited = self._given
        self._process = Process.current()
        self._part = uuid.uuid4().hex

    def _ignore_help(self, reason: str, what: str, count: int) -> None:
        if reason != "help_conflict":  # a text that changed between two releases is no conflict
            self._lose(reason, what, count)

    def _write(self, given: Families | None, seconds: float) -> None:
        """Add what was given, or end this process's part where that is None, and write both files."""
        service = plain_text(self._service or "")
        stem = safe_name(service)
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        file, state_file = self._directory / f"{stem}.prom", self._directory / f".{stem}.state.json"
        with _locked(self._directory / f".{stem}.lock", seconds):
            state = load(state_file, file, service, self._lose)
            fresh = [] if given is None else _since(given, self._added, kept=False)
            state.update(fresh, self._part, self._limit, self._ignore_help)
            if given is not None:
                own = _since(given, self._inherited, kept=True)
                part = merge([own], WITHIN, self._ignore_help, self._limit)
                state.parts[self._part] = Part(self._process, time.time(), part)
            _replace(state_file, state.to_json())
            if given is not None:
                self._added = given  # now, as a failure below must not make the next export add it again
            shown = state.shown(self._limit, self._ignore_help)
            labels = ((SERVICE, service),)
            _replace(file, expose([family.metric(labels) for _, family in sorted(shown.items())]))


def _directory(target: str | os.PathLike[str] | None) -> Path:
    name = "directory" if target is not None else "OTEL_ODIBI_DIRECTORY"
    given = target if target is not None else os.environ.get("OTEL_ODIBI_DIRECTORY", "").strip() or "telemetry"
    if "://" in str(given):
        raise SettingError(name, str(given), "not local", "give a local directory: a .prom file cannot be elsewhere")
    path = Path(given).expanduser()
    if path.exists() and not path.is_dir():
        raise SettingError(name, str(given), "not a directory", "give the path of a directory")
    return path


def _service_of(data: MetricsData) -> str:
    found = (resource.resource.attributes.get(names.SERVICE_NAME) for resource in data.resource_metrics)
    return next((str(name) for name in found if name), "odibi")


def _since(given: Families, before: Families, kept: bool) -> list[Family]:
    """Return what is kept by process, or all else, less what `before` has of it."""
    fresh = []
    for family in given.values():
        if (family.kind in _KEPT_BY_PROCESS) is kept:
            known = before[family.name].series if family.name in before else {}
            series = {labels: _less(family.kind, now, known.get(labels)) for labels, now in family.series.items()}
            fresh.append(Family(family.name, family.kind, family.help, family.unit, series))
    return fresh


def _less(kind: Kind, now: Series, then: Series | None) -> Series:
    """Return what was counted in between; all of it where counting began anew. Source: metrics data model, Resets."""
    if then is None or then.start != now.start or kind in ("gauge", "peak"):
        return now
    if isinstance(now.value, Buckets) and isinstance(then.value, Buckets):
        before = then.value.at(now.value.bounds)
        counts = tuple(map(_difference, now.value.counts, before.counts))
        total = Buckets(now.value.bounds, counts, _difference(now.value.sum, before.sum))
        return now if min(counts) < 0 else Series(total)
    fresh = _difference(now.value, then.value)  # type: ignore[arg-type]  # two numbers: a family is of one kind
    return now if fresh < 0 and kind == "counter" else Series(fresh)


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
