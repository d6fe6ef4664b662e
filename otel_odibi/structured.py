"""`StructuredLogger`: the Phase 8 logger on this package's JSON-lines files, written by hand and read back."""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import os
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from typing_extensions import Self

from otel_odibi import names
from otel_odibi.clean import DEFAULT, clean_name, describe, error_type
from otel_odibi.errors import SettingError
from otel_odibi.exporters.jsonl import JsonlSink, files
from otel_odibi.exporters.lines import Record, matching, newest, time_of
from otel_odibi.facts import MIB
from otel_odibi.logs import LEVELS, LogWriter
from otel_odibi.metrics import rss_reader

Error = str | BaseException
Map = Mapping[str, Any] | None
Text = str | None
_warn_once: Final = functools.lru_cache(maxsize=1_000)(logging.getLogger(names.SCOPE).warning)


class LogLevel(str, enum.Enum):
    """How much a line matters. A member equals its value, which is what lines hold."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class StructuredLogger:
    """Writes what happens to nodes and pipelines as JSON lines, and reads them back.

    The file `<log_dir>/<name>_<time>_<id>.jsonl`, at `log_file`, is this logger's own; characters that a file name
    cannot have are percent-encoded. At `max_file_size_mb` (MiB) it becomes a numbered segment, which is compressed in
    the background. Lines hold `user`, the logger's name as `logger`, the process's memory, and the span, run and node
    under way; secrets are redacted, and values that JSON does not know become some that it does.

    A line can be read back when the call returns. Methods are safe from any thread and in forked processes, and never
    raise: lines that cannot be written are counted by reason in `dropped`, and warned about. Raises SettingError where
    the file cannot be made, and for a size that is none.
    """

    def __init__(
        self, name: str, log_dir: str | Path = "logs", max_file_size_mb: float = 100, user: Text = None
    ) -> None:
        stem = f"{name}_{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}_{uuid.uuid4().hex[:8]}"
        dropped = Counter[str]()
        lose = functools.partial(_lose, dropped, stem)  # not a method: the sink must not keep its logger alive
        sink = JsonlSink(Path(log_dir), stem, max_bytes=_bytes(max_file_size_mb), on_drop=lose)
        if not sink.path.is_file():
            raise SettingError("log_dir", str(log_dir), "no file can be made there", "give a directory to write to")
        outputs = (lambda record, line: sink.write(line) and None,)
        writer = LogWriter(str(name), outputs, level="debug", cleaner=DEFAULT, on_error=lose)
        self._adopt(writer, sink, stem, user, dropped)
        weakref.finalize(self, sink.close, 0.5)  # nobody closes it: Phase 8 had the file open only while it wrote

    @classmethod
    def over(cls, writer: LogWriter, sink: JsonlSink | None, stem: str, user: Text = None) -> Self:
        """Make a logger that shares a telemetry's log file: its writer, and its sink, made with the name `stem`.

        Without a sink nothing is read back, and `log_file` is the null device.
        """
        logger = cls.__new__(cls)
        logger._adopt(writer, sink, stem, user, Counter())
        return logger

    def _adopt(self, writer: LogWriter, sink: JsonlSink | None, stem: str, user: Text, dropped: Counter[str]) -> None:
        self.name, self.user, self.dropped = writer.service, user, dropped
        self._writer, self._sink, self._stem = writer, sink, stem
        self._rss = rss_reader()

    @property
    def log_file(self) -> Path:
        """The file that lines are appended to now."""
        return Path(os.devnull) if self._sink is None else self._sink.path

    # --- writing -----------------------------------------------------------------------------------------------------

    def log(self, level: LogLevel | str, event_type: str, message: str, **fields: Any) -> None:
        """Write a line of any type with any fields; one named like what the line has anyway gets an underscore."""
        if LEVELS[_level(level)] >= self._writer.level:
            self._write(_level(level), clean_name(event_type), describe(message), **fields)

    def log_node_start(self, node_name: str, layer: str, engine: str = "pandas", metadata: Map = None) -> None:
        """Write `node_start`, status running."""
        fields = {"node_name": node_name, "layer": layer, "engine": engine, "status": "running"}
        self._write("info", names.NODE_START, f"node {clean_name(node_name)} started", metadata=metadata, **fields)

    def log_node_complete(
        self, node_name: str, duration_ms: float, rows: int | None = None, cache_hit: bool = False, metadata: Map = None
    ) -> None:
        """Write `node_complete`, status success."""
        fields = {"node_name": node_name, "status": "success", "duration_ms": duration_ms}
        fields |= {"row_count": rows, "cache_hit": cache_hit, "metadata": metadata}
        self._write("info", names.NODE_COMPLETE, f"node {clean_name(node_name)} completed", **fields)

    def log_node_failed(
        self, node_name: str, error: Error, duration_ms: float | None = None, layer: Text = None, metadata: Map = None
    ) -> None:
        """Write `node_failed`, level error, status failed."""
        fields = {"node_name": node_name, "layer": layer, "status": "failed", "duration_ms": duration_ms}
        fields |= _told(error)
        message = f"node {clean_name(node_name)} failed: {fields['error']}"
        self._write("error", names.NODE_FAILED, message, metadata=metadata, **fields)

    def log_error(self, component: str, error: Error, layer: Text = None, metadata: Map = None) -> None:
        """Write `error`, level error; `component` stands where a node's name does."""
        fields = {"node_name": component, "layer": layer, **_told(error)}
        message = f"error in {clean_name(component)}: {fields['error']}"
        self._write("error", names.ERROR, message, metadata=metadata, **fields)

    def log_cache_hit(self, node_name: str, cache_key: object, metadata: Map = None) -> None:
        """Write `cache_hit`."""
        detail = {"cache_key": describe(cache_key)}
        message = f"cache hit for node {clean_name(node_name)}"
        self._write("info", names.CACHE_HIT, message, detail, node_name=node_name, cache_hit=True, metadata=metadata)

    def log_cache_miss(self, node_name: str, cache_key: object, metadata: Map = None) -> None:
        """Write `cache_miss`, at level debug, which is written whatever the level."""
        detail = {"cache_key": describe(cache_key)}
        message = f"cache miss for node {clean_name(node_name)}"
        self._write("debug", names.CACHE_MISS, message, detail, node_name=node_name, cache_hit=False, metadata=metadata)

    def log_pipeline_start(self, pipeline_name: str, metadata: Map = None) -> None:
        """Write `pipeline_start`, status running."""
        detail = {"pipeline_name": clean_name(pipeline_name)}
        message = f"pipeline {detail['pipeline_name']} started"
        self._write("info", names.PIPELINE_START, message, detail, status="running", metadata=metadata)

    def log_pipeline_complete(
        self, pipeline_name: str, duration_ms: float, success_count: int, failed_count: int, metadata: Map = None
    ) -> None:
        """Write `pipeline_complete`, status success; where nodes failed partial_failure, level warning."""
        name, failed = clean_name(pipeline_name), DEFAULT.value(failed_count)
        detail = {"pipeline_name": name, "success_count": success_count, "failed_count": failed}
        level, status = ("warning", "partial_failure") if failed else ("info", "success")
        fields = {"status": status, "duration_ms": duration_ms, "metadata": metadata}
        self._write(level, names.PIPELINE_COMPLETE, f"pipeline {name} completed", detail, **fields)

    def log_checkpoint_created(self, checkpoint_id: object, nodes_completed: int, metadata: Map = None) -> None:
        """Write `checkpoint_created`."""
        detail = {"checkpoint_id": clean_name(checkpoint_id), "nodes_completed": nodes_completed}
        message = f"checkpoint {detail['checkpoint_id']} created"
        self._write("info", names.CHECKPOINT_CREATED, message, detail, metadata=metadata)

    def _write(self, level: str, event_type: str, message: str, detail: Map = None, /, **fields: Any) -> None:
        """Write a line. `detail` goes where Phase 8 had it, into the metadata, and to the top, where facts have it."""
        if detail is not None:
            given = DEFAULT.value(fields["metadata"])
            fields["metadata"] = {**(given if isinstance(given, dict) else {}), **detail}
            fields.update((key, value) for key, value in detail.items() if key != "pipeline_name")
        if "node_name" in fields:
            fields["node_name"] = clean_name(fields["node_name"])
        rss = self._rss()
        own = {"memory_mb": None if rss is None else round(rss / MIB, 2), "user": self.user, "logger": self.name}
        known = {key: value for key, value in {**own, **fields}.items() if value is not None}
        self._writer.event(level, event_type, message, known, (detail or {}).get("pipeline_name", ""))

    # --- reading -----------------------------------------------------------------------------------------------------

    def query_logs(
        self, event_type: Text = None, node_name: Text = None, level: Text = None, limit: int = 100
    ) -> list[Record]:
        """Return the newest `limit` lines that match, the oldest of them first, from the file and all its segments."""
        wanted = {"event_type": event_type, "node_name": None if node_name is None else clean_name(node_name)}
        wanted["level"] = None if level is None else _level(level)
        return newest(self._files(), wanted, limit)

    def get_summary(self) -> dict[str, Any]:
        """Return what there is in the file and all its segments: counts, MiB on disk, the last 10 errors."""
        levels, event_types, size = Counter[str](), Counter[str](), 0
        for path in self._files():
            with contextlib.suppress(OSError):
                size += path.stat().st_size
            for record in matching(path, {}):
                levels[record.get("level", "unknown")] += 1
                event_types[record.get("event_type", "unknown")] += 1
        errors = [error for level in ("error", "critical") for error in self.query_logs(level=level, limit=10)]
        keys = ("timestamp", "node_name", "error")
        return {
            "log_file": str(self.log_file),
            "total_entries": levels.total(),
            "by_level": dict(levels),
            "by_event_type": dict(event_types),
            "errors": [{key: error.get(key) for key in keys} for error in sorted(errors, key=time_of)[-10:]],
            "file_size_mb": size / MIB,
        }

    def _files(self) -> list[Path]:
        return [] if self._sink is None else files(self._sink.path.parent, self._stem)


def _told(error: object) -> dict[str, str]:
    if isinstance(error, BaseException):
        return {"error": describe(error) or error_type(error), "error_type": error_type(error)}
    return {"error": describe(error)}


def _level(level: object) -> str:
    text = describe(getattr(level, "value", level)).lower()
    return text if text in LEVELS else "info"


def _lose(dropped: Counter[str], stem: str, reason: str, what: int | BaseException) -> None:
    """Count a line that the sink has dropped, or that an exception has kept from it."""
    reason = type(what).__name__ if isinstance(what, BaseException) else reason
    dropped[reason] += 1
    with contextlib.suppress(Exception):  # a host's logging handler may raise
        _warn_once("lines of the log %s could not be written: %s", stem, reason)


def _bytes(mib: object) -> int:
    if not isinstance(mib, (int, float)) or not 0 < mib < 2**40:
        raise SettingError("max_file_size_mb", mib, "not a size", "give a number of MiB above 0")
    return max(1, int(mib * MIB))
