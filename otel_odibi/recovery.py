"""Brings back what processes that died had not delivered: from their log lines and their state files.

Each step is on disk before the next and passes over what it finds done, so that the next recovery makes good what one
that dies leaves: closing lines for what was under way, spans in Parquet (those not there yet), spans for the OTLP
endpoint (those not noted as delivered); then the state file goes, whose lock keeps two recoveries apart.
"""

from __future__ import annotations

import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags

from otel_odibi import names
from otel_odibi.clean import DEFAULT, message_of
from otel_odibi.errors import StoreError
from otel_odibi.exporters.jsonl import JsonlSink, files, read_lines
from otel_odibi.exporters.lines import ATTRIBUTES
from otel_odibi.exporters.parquet import ParquetSpanExporter
from otel_odibi.exporters.segments import acquire, release
from otel_odibi.forks import arrow
from otel_odibi.liveness import append_ids, lives_elsewhere, read_state
from otel_odibi.logs import timestamp
from otel_odibi.names import LOST, NODE_COMPLETE, NODE_FAILED, NODE_START, PIPELINE_COMPLETE, PIPELINE_START

Line = dict[str, Any]
Spool = Callable[[list[ReadableSpan]], object]
_SLACK: Final = 3600 * 10**9  # by which clocks may differ
_OLD: Final = 3600 * 10**9  # far longer than it takes to write a file
_BATCH: Final = 10_000
_SENT: Final = 512  # spans spooled, then noted as delivered: what a crash in between sends twice
_START_OF: Final = {NODE_COMPLETE: NODE_START, NODE_FAILED: NODE_START, PIPELINE_COMPLETE: PIPELINE_START}
_OUTCOMES: Final = {"failed": names.FAILURE, "partial_failure": names.SUCCESS}
_SCOPE: Final = InstrumentationScope(names.SCOPE)  # one for all, as exporters group spans by it
_ODD: Final = (ValueError, TypeError, KeyError, AttributeError, OverflowError)  # of a line that is torn, or not ours


class Recovered(NamedTuple):
    """What a recovery did: the closing log lines of lost runs and nodes, the spans written, files it could not use."""

    runs: tuple[Line, ...]
    nodes: tuple[Line, ...]
    spans: int
    files: tuple[str, ...]


def recover(
    directory: str | os.PathLike[str], *, parquet: str | Path | None = None,
    spool: Spool | None = None, clock: Callable[[], int] = time.time_ns,
) -> Recovered:  # fmt: skip
    """Close what processes that are gone had under way; write, and spool, their spans that got nowhere.

    `parquet` is where spans are, if not in `directory`; `spool` takes those of processes that had an OTLP endpoint, and
    raises or returns False if it cannot. A process is gone if its state file is not locked and it was on this host, or
    silent for a minute. What fails is named and left for the next. Raises StoreError where there is no such directory.
    """
    where = Path(directory)
    if not where.is_dir():
        raise StoreError(f"there is no telemetry directory {str(where)!r}; name another")
    recovered: list[_Dead] = []
    bad: list[str] = []
    for state in filter(None, map(read_state, sorted((where / "state").glob("*.json")))):
        fd = None
        try:
            if not lives_elsewhere(state["path"], clock):
                with suppress(FileNotFoundError):  # another recovery was quicker
                    fd = acquire(state["path"], os.O_RDWR)
            if fd is not None:
                dead = _Dead(state, where, parquet or where, spool)
                dead.recover()
                recovered.append(dead)
        except Exception as exc:  # noqa: BLE001 - files may hold anything
            bad.append(DEFAULT.text(f"{state['path']}: {type(exc).__name__}: {message_of(exc)}", 500))
        finally:
            if fd is not None:
                release(fd)
    _sweep(where, clock() - _OLD)
    lost = [line for dead in recovered for line in dead.lost.values()]
    runs, nodes = (tuple(e for e in lost if e["event_type"] == kind) for kind in (PIPELINE_COMPLETE, NODE_FAILED))
    return Recovered(runs, nodes, sum(len(dead.written) for dead in recovered), tuple(bad))


def _sweep(directory: Path, before: int) -> None:
    """Delete what was half written, under names that readers pass over, when its process died."""
    for pattern in ("spans/*/.*.parquet.*", "metrics/*/*/.*.parquet.*"):
        for path in directory.glob(pattern):
            with suppress(OSError):
                if path.stat().st_mtime_ns < before:
                    path.unlink()


class _Dead:
    """A dead process. Memory is bounded by what it had under way, and a batch. Methods raise what keeps them."""

    def __init__(self, state: Line, directory: Path, parquet: str | Path, spool: Spool | None) -> None:
        self._path, self._process, self._service = state["path"], state["process"], state["service"]
        self._logs, self._heard = directory / "logs", state["heartbeat_unix_nano"]
        self._since = state["started_unix_nano"] - _SLACK
        resource = state.get("resource")
        self._resource = Resource(resource if isinstance(resource, dict) else {names.SERVICE_NAME: self._service})
        self._spool = spool if state.get("otlp", True) else None
        self._acked = self._path.with_suffix(".acked")
        ids = self._acked.read_bytes() if self._acked.exists() else b""
        self._delivered = array("Q", ids[: len(ids) // 8 * 8])
        self._open: dict[str, Line] = {}
        self._counts: Counter[Any] = Counter()
        self._batch: list[tuple[Line, Line]] = []
        self._ids_in_parquet, self._exporter = _ids_in(parquet, self._since), ParquetSpanExporter(parquet, seconds=3600)
        self.written: set[int] = set()
        self.lost: dict[str, Line] = {}

    def recover(self) -> None:
        self._scan()
        if self._open:
            self._scan(starts=False)  # ends in a file that was read before that with the start
            self._close()
        self._flush()
        for path in (self._path, self._acked):  # in this order: spans noted as delivered are not to be sent again
            path.unlink(missing_ok=True)

    def _scan(self, *, starts: bool = True) -> None:
        """Read the service's log files that are recent enough; also those that get another name meanwhile."""
        seen: set[Path] = set()
        while paths := [path for path in files(self._logs, self._service) if path not in seen]:
            for path in paths:
                seen.add(path)
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime_ns < self._since:
                        continue
                for line in read_lines(path):
                    with suppress(*_ODD):
                        self._line(orjson.loads(line), starts)
                    if len(self._batch) >= _BATCH:
                        self._flush()

    def _line(self, record: Line, starts: bool) -> None:
        span_id, kind, now = record["span_id"], record["event_type"], record["time_unix_nano"]
        if type(now) is not int or not 0 <= now < 2**63:
            return
        if starts and record.get("process") == self._process and kind in (NODE_START, PIPELINE_START):
            _context(record, span_id)
            self._open[span_id] = record
        if (start := self._open.get(span_id)) is not None:
            self._heard = max(self._heard, now)
            if _START_OF.get(kind) == start["event_type"] and "logger" not in record:  # as lines written by hand have
                self._ended(start, record)

    def _ended(self, start: Line, end: Line) -> None:
        self._counts[start.get("run_id"), start["event_type"], end["status"]] += 1
        del self._open[start["span_id"]]
        if end["status"] == LOST:
            self.lost[end["span_id"]] = end
        if start["trace_flags"] & 1:
            self._batch.append((start, end))

    def _close(self) -> None:
        with closing(JsonlSink(self._logs, self._service, max_bytes=2**62, retention_bytes=2**62)) as sink:
            for start in sorted(self._open.values(), key=lambda line: line["time_unix_nano"], reverse=True):
                with suppress(*_ODD):
                    end = self._closing(start)
                    if not sink.write(orjson.dumps(end, option=orjson.OPT_APPEND_NEWLINE)):
                        raise OSError("the log cannot be written")
                    self._ended(start, end)

    def _closing(self, start: Line) -> Line:
        node, at = start["event_type"] == NODE_START, max(self._heard, start["time_unix_nano"])
        what = f"node {start['node_name']}" if node else f"pipeline {start['pipeline']}"
        end = {
            **start, "timestamp": timestamp(at), "level": "error", "message": f"{what} was lost: its process is gone",
            "event_type": NODE_FAILED if node else PIPELINE_COMPLETE, "status": LOST, "error": "its process is gone",
            "duration_ms": (at - start["time_unix_nano"]) / 1e6, "time_unix_nano": at,
        }  # fmt: skip
        for key, status in () if node else (("success_count", "success"), ("failed_count", "failed")):
            end[key] = self._counts[start.get("run_id"), NODE_START, status]
        return end

    def _flush(self) -> None:
        batch, self._batch = {int(start["span_id"], 16): (start, end) for start, end in self._batch}, []
        stored = self.written | self._ids_in_parquet(batch)
        sent = set(batch if self._spool is None else filter(batch.__contains__, self._delivered))
        spans: dict[int, ReadableSpan] = {}
        for number, lines in batch.items():
            if number not in stored or number not in sent:
                with suppress(*_ODD):
                    spans[number] = _span(self._resource, *lines)
        self._exporter.export([span for number, span in spans.items() if number not in stored])
        if not self._exporter.force_flush():
            raise OSError("spans cannot be written")
        self.written |= spans.keys() - stored
        left = [number for number in spans if number not in sent]
        while self._spool is not None and (part := left[:_SENT]):
            if self._spool([spans[number] for number in part]) is False:
                raise OSError("spans cannot be spooled")
            append_ids(self._path, part)
            self._delivered.extend(part)
            del left[:_SENT]


def _ids_in(where: str | Path, since: int) -> Callable[[Mapping[int, tuple[Line, Line]]], set[int]]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    from pyarrow.fs import FileSystem

    uri, dataset = str(where) if "://" in str(where) else Path(where).absolute().as_uri(), None
    filesystem, base = FileSystem.from_uri(uri)
    with suppress(FileNotFoundError):
        dataset = ds.dataset(f"{base}/spans", format="parquet", filesystem=filesystem, partitioning="hive")

    def found(batch: Mapping[int, tuple[Line, Line]]) -> set[int]:
        if dataset is None or not dataset.files or not batch:
            return set()
        times = [start["time_unix_nano"] for start, _ in batch.values()]
        first, last = (pa.scalar(of(times), pa.timestamp("ns", "UTC")) for of in (min, max))
        began, ids = pc.field("Timestamp"), [f"{number:016x}" for number in batch]
        day = time.strftime("%Y-%m-%d", time.gmtime(max(0, since) // 10**9))
        near = (pc.field("date") >= day) & (began >= first) & (began <= last)  # so that few files are looked into
        with arrow.lock:
            table = dataset.to_table(["SpanId"], filter=near & pc.field("SpanId").isin(ids))
            return {int(text, 16) for text in table["SpanId"].to_pylist()}

    return found


def _context(of: Line, span_id: str) -> SpanContext:
    context = SpanContext(int(of["trace_id"], 16), int(span_id, 16), False, TraceFlags(of["trace_flags"]))
    if not context.is_valid:
        raise ValueError("no span")
    return context


def _span(resource: Resource, start: Line, end: Line) -> ReadableSpan:
    of_node, told, status = start["event_type"] == NODE_START, {**start, **end}, end["status"]
    attributes = {key: told[field] for key, field in ATTRIBUTES.items() if told.get(field) is not None}
    attributes[names.NODE_OUTCOME if of_node else names.PIPELINE_OUTCOME] = _OUTCOMES.get(status, status)
    if "memory_mb" in told:
        attributes[names.NODE_MEMORY_RSS] = round(told["memory_mb"] * 2**20)
    if edges := told.get("links", ()):
        attributes[names.NODE_DEPENDS_ON] = list(dict.fromkeys(edge["node"] for edge in edges))
    given = {**start.get("metadata", {}), **end.get("metadata", {})}
    attributes |= {key: DEFAULT.attribute(key, value) for key, value in given.items()}
    error, failed, parent = str(told.get("error", "")), status in ("failed", LOST), told.get("parent_span_id")
    raised = {names.EXCEPTION_TYPE: told.get("error_type"), names.EXCEPTION_MESSAGE: error}
    return ReadableSpan(
        name=f"node {start['node_name']}" if of_node else f"pipeline {start['pipeline']}",
        context=_context(start, start["span_id"]),
        parent=_context(start, parent) if parent else None,
        resource=resource,
        attributes=attributes,
        events=[Event("exception", raised, told["time_unix_nano"])] if failed and "error_type" in told else [],
        links=[Link(_context({**start, **edge}, edge["span_id"])) for edge in edges if "span_id" in edge],
        status=Status(StatusCode.ERROR, error) if failed else Status(StatusCode.UNSET),
        start_time=start["time_unix_nano"],
        end_time=told["time_unix_nano"],
        instrumentation_scope=_SCOPE,
    )
