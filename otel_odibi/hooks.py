"""The public event bus with its stock hooks, and the alerts that pyproject.toml declares."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import os
import pkgutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from otel_odibi.alerts import Alert
from otel_odibi.clean import DEFAULT, Cleaner
from otel_odibi.errors import SettingError
from otel_odibi.events import Bus, Callback, EventPriority
from otel_odibi.exporters.files import make_directory
from otel_odibi.exporters.jsonl import files
from otel_odibi.exporters.segments import parse, pattern
from otel_odibi.names import EVENTS, NODE_COMPLETE, NODE_FAILED, PIPELINE_COMPLETE, PIPELINE_FAILED

Event = Mapping[str, Any]

_WELL: Final = {PIPELINE_FAILED: PIPELINE_COMPLETE, NODE_FAILED: NODE_COMPLETE}
_FORMATS: Final = {"json": "json", "prometheus": "prom", "parquet": "parquet"}
_exports: Final = itertools.count(1)


class EventBus(Bus):
    """Calls hooks when events are emitted; see `Bus`. `state_dir` is where alerts remember across processes."""

    def __init__(
        self,
        max_workers: int = 4,
        execution_timeout: float = 30.0,
        *,
        state_dir: str | os.PathLike[str] | None = None,
        cleaner: Cleaner = DEFAULT,
        **options: Any,
    ) -> None:
        super().__init__(max_workers, execution_timeout, **options)
        self._state_dir, self._cleaner = state_dir, cleaner

    def create_summary_hook(self) -> Callback:
        """Return a hook that prints how a pipeline went: a table on a terminal where rich is installed, else text."""

        def summary(event: Event) -> None:
            _show(f"Pipeline {event.get('pipeline_name', 'unknown')}", _summary(event))

        return summary

    def create_metrics_export_hook(
        self, export_dir: str | os.PathLike[str], formats: list[str] | None = None
    ) -> Callback:
        """Return a hook that writes the event's `metrics_manager` to `metrics_<timestamp>.json`, `.prom`, `.parquet`.

        `formats` are json and prometheus by default; parquet is the third. Files appear whole, under names never used
        before. Raises `SettingError` for an unknown format; the hook raises OSError where it cannot write.
        """
        chosen = ["json", "prometheus"] if formats is None else list(formats)
        for unknown in set(chosen) - set(_FORMATS):
            raise SettingError("formats", unknown, "unknown", f"choose from {', '.join(_FORMATS)}")

        def metrics_export(event: Event) -> None:
            manager = event.get("metrics_manager")
            if manager is not None:
                make_directory(Path(export_dir).absolute())
                _export(manager, _unused_stem(Path(export_dir)), chosen)

        return metrics_export

    def create_log_rotation_hook(self, log_dir: str | os.PathLike[str], max_files: int = 10) -> Callback:
        """Return a hook that deletes the oldest rotated log segments of a directory until `max_files` are left.

        Only numbered segments of this package go: never a file being written, never another program's.
        """
        if not isinstance(max_files, int) or max_files < 0:
            raise SettingError("max_files", max_files, "not a number of files", "give a whole number from 0 up")

        def log_rotation(event: Event) -> None:
            segments = [path for path in files(Path(log_dir)) if not parse([path.name], pattern(".jsonl"))[0].is_active]
            segments.sort(key=_modified)
            for path in segments[: max(0, len(segments) - max_files)]:
                path.unlink(missing_ok=True)

        return log_rotation

    def create_cache_stats_hook(self) -> Callback:
        """Return a hook that prints what the event's `cache_manager` tells by `get_stats()`."""

        def cache_stats(event: Event) -> None:
            manager = event.get("cache_manager")
            if manager is not None:
                _show("Cache", _cache_rows(manager.get_stats()))

        return cache_stats

    def create_report_hook(
        self,
        directory: str | os.PathLike[str] | None = None,
        reports: str | os.PathLike[str] | None = None,
        keep: int = 50,
    ) -> Callback:
        """Return a hook that writes each run as one HTML file: `<pipeline>-<run id>.html` in the folder `reports`.

        What it tells is read from the telemetry `directory`: by default the bus's own, and `reports` a folder in it.
        The newest `keep` files stay. Raises `SettingError`; the hook raises OSError where it cannot write.
        """
        if directory is None and self._state_dir is not None:
            directory = Path(self._state_dir).parent
        create: Any = pkgutil.resolve_name("otel_odibi.report.hook:create")  # a floor above, loaded where it is wanted
        return create(directory, reports, keep)  # type: ignore[no-any-return]

    def create_alert_hook(self, threshold_failed: int = 1, **options: Any) -> Alert:
        """Return a hook that alerts once when nodes fail, or as its options say: they are explained at `Alert`."""
        return Alert(self, threshold_failed, **{"state_dir": self._state_dir, "cleaner": self._cleaner, **options})


Declared = tuple[str, Callback, dict[str, Any]]


def declared(table: Mapping[str, Any], bus: EventBus, environ: Mapping[str, str] = os.environ) -> list[Declared]:
    """Make what `[tool.otel-odibi.alerts]` declares: of each hook the event, itself, and options to register it with.

    ::

        [tool.otel-odibi.alerts.late]        # the name of the alert
        on = "pipeline_complete"             # an event of the core; pipeline_failed by default
        pipeline = "flights"                 # of this pipeline only
        condition = "duration_over"          # failed_nodes (default), duration_over, rows_under
        value = 900                          # nodes (1 by default), seconds, rows
        webhook_env = "SLACK_WEBHOOK_URL"    # the variable that holds the URL; `webhook` is the URL itself
        webhook_format = "slack"             # or json
        console = true
        quiet_seconds = 3600
        retries = 3
        timeout = 10.0
        recovery = true

        [tool.otel-odibi.alerts.late.email]
        host = "mail.example.com"
        port = 587
        starttls = true
        sender = "etl@example.com"
        recipients = ["ops@example.com"]
        username = "etl"
        password_env = "SMTP_PASSWORD"       # the variable that holds it; `password` is the password itself

        [tool.otel-odibi.alerts.numbers]     # any other hook
        hook = "metrics_export"              # summary, metrics_export, log_rotation, cache_stats, report, or
                                             # "module:function"
        on = "pipeline_complete"             # the default
        priority = "low"                     # critical, high, medium (default), low
        async_execution = true               # the default for report
        export_dir = "metrics"               # whatever `create_metrics_export_hook` takes
        formats = ["parquet"]

    An alert on a failure is registered for the matching success too, from which it learns of the recovery. A variable
    that is set but empty turns its channel off. Raises `SettingError` for whatever cannot work.
    """
    found: list[Declared] = []
    for name, options in table.items():
        where = f"[tool.otel-odibi.alerts.{name}]"
        if not isinstance(options, Mapping):
            raise SettingError(where, options, "not a table", f"write {where} above its settings")
        try:
            found += (_hook if "hook" in options else _alert)(name, dict(options), bus, environ)
        except SettingError as exc:
            problem = str(exc).removeprefix(f"setting {exc.name}={exc.value!r}: ").removesuffix(f"; {exc.remedy}")
            raise SettingError(f"{where} {exc.name}", exc.value, problem, exc.remedy) from None
    return found


_KEYS: Final = (
    "on", "pipeline", "condition", "value", "webhook", "webhook_env", "webhook_format", "email", "console",
    "quiet_seconds", "retries", "timeout", "recovery",
)  # fmt: skip
_STOCK: Final = ("summary", "metrics_export", "log_rotation", "cache_stats", "report")


def _event(name: object) -> str:
    if name not in EVENTS:
        raise SettingError("on", name, "not an event of the core", f"choose from {', '.join(EVENTS)}")
    return str(name)


def _alert(name: str, options: dict[str, Any], bus: EventBus, environ: Mapping[str, str]) -> list[Declared]:
    for unknown in options.keys() - set(_KEYS):
        raise SettingError(unknown, "[hidden]", "there is no such key", f"choose from {', '.join(_KEYS)}")
    given = {"on": PIPELINE_FAILED, **_with_secret(options, "webhook", environ)}
    event = _event(given["on"])
    if isinstance(given.get("email"), Mapping):
        given["email"] = _with_secret(given["email"], "password", environ)
        if given["email"].get("password") == "":
            given["email"] = None
    alert = bus.create_alert_hook(name=name, **given)
    return [(each, alert, {}) for each in (event, _WELL.get(event)) if each]


def _hook(name: str, options: dict[str, Any], bus: EventBus, environ: Mapping[str, str]) -> list[Declared]:
    kind, event = options.pop("hook"), _event(options.pop("on", PIPELINE_COMPLETE))
    priority = str(options.pop("priority", "medium")).upper()
    if priority not in EventPriority.__members__:
        known = ", ".join(EventPriority.__members__).lower()
        raise SettingError("priority", priority.lower(), "unknown", f"choose from {known}")
    how = {"name": name, "priority": EventPriority[priority]}
    how["async_execution"] = options.pop("async_execution", kind == "report") is True
    try:
        if kind in _STOCK:
            create = getattr(bus, f"create_{kind}_hook")
            inspect.signature(create).bind(**options)
            return [(event, create(**options), how)]
        hook = pkgutil.resolve_name(kind)
        inspect.signature(lambda: hook).bind(**options)
    except SettingError:
        raise
    except (TypeError, ValueError, ImportError, AttributeError) as exc:
        remedy = f"choose from {', '.join(_STOCK)}, or give module:function"
        raise SettingError("hook", kind, f"cannot be made ({exc})", remedy) from None
    return [(event, hook, how)]


def _with_secret(options: Mapping[str, Any], key: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the options with what the variable that `<key>_env` names holds under `key`."""
    found = dict(options)
    variable = found.pop(f"{key}_env", None)
    if variable is not None:
        if variable not in environ:
            raise SettingError(f"{key}_env", variable, "no such environment variable", "set it; empty turns this off")
        found[key] = environ[variable]
    return found


# --- what hooks show and write ---------------------------------------------------------------------------------------


def _show(title: str, rows: list[tuple[str, str]]) -> None:
    if sys.stdout is None:
        return
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, show_header=False, title_justify="left")
        for row in rows:
            table.add_row(*row)
        Console(file=sys.stdout, markup=False).print(table)
        return
    width = max((len(label) for label, _ in rows), default=0)
    sys.stdout.write("\n".join([title, *(f"  {label:<{width}}  {text}" for label, text in rows), ""]))


def _summary(event: Event) -> list[tuple[str, str]]:
    rows = [
        (label, str(event[key]))
        for label, key in (
            ("outcome", "outcome"), ("succeeded", "success_count"), ("failed", "failed_count"), ("error", "error"),
            ("run", "run_id"), ("trace", "trace_id"),
        )
        if event.get(key) is not None
    ]  # fmt: skip
    with contextlib.suppress(KeyError, TypeError, ValueError):
        rows.append(("duration", f"{float(event['duration_ms']) / 1000:.3f} s"))
    rate = event.get("cache_hit_rate")
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        rate = event["metrics_manager"].get_cache_hit_rate() if rate is None and "metrics_manager" in event else rate
        rows.append(("cache hit rate", f"{float(rate):.1f} %"))  # type: ignore[arg-type]
    return rows


def _cache_rows(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pick what there is, under the names that cache managers use."""

    def first(*keys: str) -> Any:
        return next((stats[key] for key in keys if stats.get(key) is not None), None)

    hits, misses = first("total_hits", "hits", "hit_count"), first("total_misses", "misses", "miss_count")
    rate = first("hit_rate", "cache_hit_rate")
    if hits is not None and misses is not None:
        rate = 100 * hits / (hits + misses) if hits + misses else 0.0
    elif rate is not None and rate <= 1:
        rate *= 100
    found = {
        "hits": hits,
        "misses": misses,
        "hit rate": None if rate is None else f"{rate:.1f} %",
        "entries": first("entry_count", "total_entries", "entries"),
        "size, MB": first("total_size_mb", "size_mb", "cache_size_mb"),
    }
    rows = [(label, value) for label, value in found.items() if value is not None]
    return [(label, f"{value:.2f}" if isinstance(value, float) else str(value)) for label, value in rows]


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _unused_stem(directory: Path) -> Path:
    now = time.time_ns() // 1000
    stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now // 1_000_000))}_{now % 1_000_000:06d}"
    return directory / f"metrics_{stamp}_{os.getpid()}_{next(_exports)}"


def _export(manager: Any, stem: Path, formats: list[str]) -> None:
    from otel_odibi.export import MetricsExporter

    for kind in formats:
        getattr(MetricsExporter(manager), f"save_{kind}")(stem.with_name(f"{stem.name}.{_FORMATS[kind]}"))
