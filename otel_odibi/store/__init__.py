"""Reads a telemetry directory: the runs in it and their nodes, from the files alone.

    store.open("telemetry").run("last").nodes

Spans come from the Parquet files, whoever wrote them; files of other kinds and names that start with a dot are passed
over. Identifiers are lower-case hexadecimal, times Unix nanoseconds, durations nanoseconds, sizes bytes. All that is
returned is immutable; a `Store` holds nothing but its path, so what is written later is seen by the next call.
Importing this module imports pyarrow.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from otel_odibi import names
from otel_odibi.errors import StoreError
from otel_odibi.exporters.jsonl import files, read_lines
from otel_odibi.exporters.segments import parse, pattern, safe_name
from otel_odibi.facts import Failure
from otel_odibi.liveness import read_state
from otel_odibi.names import FAILURE, SUCCESS

T = TypeVar("T")

LAST: Final = "last"
"""In place of a run id: the run that ended last, so never one inside another."""

# Timestamps become integers, as there is no exact Python type for them.
_EVENT: Final = {"Timestamp": pa.int64(), "Name": pa.string(), "Attributes": pa.map_(pa.string(), pa.string())}
_CASTS: Final = {"Timestamp": pa.int64(), "Events": pa.list_(pa.struct(list(_EVENT.items())))}
_PLAIN: Final = (
    "TraceId", "SpanId", "ParentSpanId", "SpanName", "ServiceName", "SpanAttributes", "Duration", "StatusCode",
    "StatusMessage", "Links",
)  # fmt: skip
_COLUMNS: Final = {name: pc.field(name) for name in _PLAIN} | {n: pc.field(n).cast(kind) for n, kind in _CASTS.items()}


class AttemptView(NamedTuple):
    """One attempt of a node that was tried more than once."""

    number: int
    outcome: str
    start_ns: int
    duration_ns: int
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class NodeView:
    """One execution of a node; or a pipeline run inside the run: it has a `run_id`, and no data facts.

    `depth` is 0 for a node of the run itself, 1 for one inside that, and so on. `depends_on` names the nodes whose
    results went in; `links` holds the span ids of those that are known. `attempts` is empty if the first succeeded.
    """

    name: str
    outcome: str
    span_id: str
    parent_span_id: str
    start_ns: int
    duration_ns: int
    layer: str = ""
    engine: str = ""
    depth: int = 0
    run_id: str = ""
    rows_in: int | None = None
    rows_out: int | None = None
    bytes_out: int | None = None
    rss: int | None = None
    cache_hit: bool | None = None
    attempt: int = 1
    depends_on: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    skip_reason: str = ""
    failure: Failure | None = None
    attempts: tuple[AttemptView, ...] = ()


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One finished run of a pipeline."""

    pipeline: str
    run_id: str
    service: str
    outcome: str
    trace_id: str
    span_id: str
    start_ns: int
    duration_ns: int
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class RunView:
    """One finished run and its nodes, in the order in which they began, each followed by those inside it."""

    run: RunSummary
    nodes: tuple[NodeView, ...]


class Active(NamedTuple):
    """A run, or where `node` is not empty a node, under way when its process was last heard of, at `heard_ns`."""

    service: str
    host: str
    pipeline: str
    run_id: str
    node: str
    trace_id: str
    span_id: str
    start_ns: int
    heard_ns: int
    rss: int | None


class Files(NamedTuple):
    """The files of one kind. `path`, relative to the directory, is a pattern where it stands for several.

    `records` counts what they hold, of which one is a `unit`; None where they are no list of anything.
    """

    signal: str
    path: str
    files: int
    bytes: int
    records: int | None
    unit: str


class Store:
    """A telemetry directory, open for reading. Thread-safe: it keeps no state.

    Raises StoreError if there is no such directory.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            where = repr(str(directory))
            remedy = f"run a pipeline after configure(directory={where}), or name another"
            raise StoreError(f"there is no telemetry directory {where}; {remedy}")

    def runs(self) -> tuple[RunSummary, ...]:
        """Return the finished runs, the one that ended last first. Raises StoreError where a file cannot be read."""
        of_runs = pc.starts_with(pc.field("SpanName"), names.PIPELINE_SPAN.format(name=""))
        spans = self._spans((pc.field("ScopeName") == names.SCOPE) & of_runs)
        found = [_summary(span) for span in spans if span.text(names.PIPELINE_RUN_ID)]
        return tuple(sorted(found, key=lambda run: (run.start_ns + run.duration_ns, -run.start_ns), reverse=True))

    def run(self, run_id: str = LAST) -> RunView:
        """Return one run: by its id, by the beginning of its id, or the "last" that ended.

        Raises StoreError where there is no such run, or several, and where a file cannot be read.
        """
        run = self._find(run_id)
        return RunView(run, tuple(_nodes(run, self._spans(pc.field("TraceId") == run.trace_id))))

    def active(self) -> tuple[Active, ...]:
        """Return what is under way, what began first first: as state files tell, every 5 seconds anew.

        Of services without any: as start lines without an end tell, in log files not rotated yet.
        """
        states = [state for state in map(read_state, self.directory.glob("state/*.json")) if state is not None]
        told = [(state, entry) for state in states for entry in state["active"]]
        told += _unended(self.directory / "logs", {safe_name(state["service"]) for state in states})
        found = [active for state, entry in told for active in _active(state, entry)]
        return tuple(sorted(found, key=lambda active: active.start_ns))

    def _find(self, run_id: str) -> RunSummary:
        runs = self.runs()
        if not runs:
            raise StoreError(f"no finished run in {str(self.directory)!r}; run a pipeline, or name another directory")
        if run_id == LAST:
            return runs[0]
        found = [run for run in runs if run.run_id == run_id] or [run for run in runs if run.run_id.startswith(run_id)]
        if len(found) == 1:
            return found[0]
        known = ", ".join(f"{run.run_id} ({run.pipeline})" for run in (found or runs)[:5])
        problem = "several runs begin" if found else "no run begins"
        raise StoreError(f"{problem} with {run_id!r}; choose from: last, {known}")

    def _spans(self, condition: ds.Expression) -> list[_Span]:
        """Read the spans that meet `condition`, each once, in the order in which they began."""
        paths = [str(path) for path in _visible(self.directory, "spans/date=*/*.parquet")]
        if not paths:
            return []
        try:
            rows = ds.dataset(paths, format="parquet").to_table(_COLUMNS, condition).to_pylist()
        except (pa.ArrowException, OSError) as exc:
            where = str(self.directory / "spans")
            raise StoreError(f"cannot read the spans in {where!r}: {exc}; move the bad file away") from None
        distinct = {row["SpanId"]: _Span(row) for row in rows}
        return sorted(distinct.values(), key=lambda span: (span.start_ns, span.span_id))

    def files(self) -> tuple[Files, ...]:
        """Return what files there are, by kind, with their sizes. What cannot be read counts as empty."""
        found = ((kind, _visible(self.directory, kind[1])) for kind in _KINDS)
        return tuple(_described(self.directory, *kind, paths) for kind, paths in found if paths)


open = Store  # noqa: A001 - meant to be read as store.open


# --- spans -----------------------------------------------------------------------------------------------------------


class _Span:
    """A row of the span files, read with care: its attributes are texts that anyone may have written."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self.attributes: dict[str, str] = dict(row["SpanAttributes"] or ())
        self.span_id: str = row["SpanId"]
        self.parent_id: str = row["ParentSpanId"]
        self.start_ns: int = row["Timestamp"]
        self.duration_ns: int = row["Duration"]

    def text(self, key: str) -> str:
        """Return the attribute, the empty text if it is not there."""
        return self.attributes.get(key, "")

    def value(self, key: str, kind: type[T]) -> T | None:
        """Return the attribute as a number, boolean or list; None if it is none."""
        try:
            found = orjson.loads(self.text(key))
        except ValueError:
            return None
        return found if type(found) is kind else None

    @property
    def failure(self) -> Failure | None:
        """What went wrong, as the last `exception` event and the status tell it; None if nothing did."""
        if self.row["StatusCode"] != "Error":
            return None
        events = [dict(event["Attributes"] or ()) for event in self.row["Events"] or () if event["Name"] == "exception"]
        event = events[-1] if events else {}
        return Failure(
            event.get(names.EXCEPTION_TYPE) or self.text(names.ERROR_TYPE),
            event.get(names.EXCEPTION_MESSAGE) or self.row["StatusMessage"],
            event.get(names.EXCEPTION_STACKTRACE, ""),
        )

    @property
    def outcome(self) -> str:
        """The outcome, or what the status says where a foreign writer has left none."""
        stated = self.text(names.NODE_OUTCOME) or self.text(names.PIPELINE_OUTCOME)
        return stated or (FAILURE if self.row["StatusCode"] == "Error" else SUCCESS)

    @property
    def is_attempt(self) -> bool:
        number = self.text(names.NODE_ATTEMPT)
        return bool(number) and self.row["SpanName"] == names.ATTEMPT_SPAN.format(number=number)


def _summary(span: _Span) -> RunSummary:
    return RunSummary(
        span.text(names.PIPELINE_NAME), span.text(names.PIPELINE_RUN_ID), span.row["ServiceName"], span.outcome,
        span.row["TraceId"], span.span_id, span.start_ns, span.duration_ns, span.failure,
    )  # fmt: skip


def _nodes(run: RunSummary, spans: list[_Span]) -> Iterator[NodeView]:
    """Yield the nodes beneath the run's span, depth first; spans of other libraries in between are passed through."""
    known = {span.span_id for span in spans}
    children: dict[str, list[_Span]] = {}
    for span in spans:
        lost_parent = span.parent_id not in known and span.text(names.PIPELINE_RUN_ID) == run.run_id
        children.setdefault(run.span_id if lost_parent else span.parent_id, []).append(span)
    stack = [(span, 0) for span in reversed(children.pop(run.span_id, [])) if span.span_id != run.span_id]
    while stack:
        span, depth = stack.pop()
        inside = children.pop(span.span_id, [])
        if not span.is_attempt and (span.text(names.NODE_NAME) or span.text(names.PIPELINE_NAME)):
            yield _node(span, depth, inside)
            depth += 1
        stack += [(child, depth) for child in reversed(inside)]


def _node(span: _Span, depth: int, inside: list[_Span]) -> NodeView:
    own_name = span.text(names.NODE_NAME)
    return NodeView(
        name=own_name or span.text(names.PIPELINE_NAME),
        outcome=span.outcome,
        span_id=span.span_id,
        parent_span_id=span.parent_id,
        start_ns=span.start_ns,
        duration_ns=span.duration_ns,
        layer=span.text(names.NODE_LAYER),
        engine=span.text(names.NODE_ENGINE),
        depth=depth,
        run_id="" if own_name else span.text(names.PIPELINE_RUN_ID),
        rows_in=span.value(names.NODE_ROWS_IN, int),
        rows_out=span.value(names.NODE_ROWS_OUT, int),
        bytes_out=span.value(names.NODE_BYTES_OUT, int),
        rss=span.value(names.NODE_MEMORY_RSS, int),
        cache_hit=span.value(names.NODE_CACHE_HIT, bool),
        attempt=span.value(names.NODE_ATTEMPT, int) or 1,
        depends_on=tuple(map(str, span.value(names.NODE_DEPENDS_ON, list) or ())),
        links=tuple(link["SpanId"] for link in span.row["Links"] or ()),
        skip_reason=span.text(names.NODE_SKIP_REASON),
        failure=span.failure,
        attempts=tuple(_attempt(child) for child in inside if child.is_attempt),
    )


def _attempt(span: _Span) -> AttemptView:
    number = span.value(names.NODE_ATTEMPT, int) or 1
    return AttemptView(number, span.outcome, span.start_ns, span.duration_ns, span.failure)


def _unended(logs: Path, told: set[str]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for found in parse((path.name for path in files(logs)), pattern(".jsonl")):
        begun, heard = dict[Any, dict[str, Any]](), {"heartbeat_unix_nano": 0}
        for line in read_lines(logs / found.entry) if found.is_active and found.name not in told else ():
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                record = orjson.loads(line)
                heard["heartbeat_unix_nano"] = record["time_unix_nano"]
                if record["event_type"].endswith("_start"):
                    begun[record["span_id"]] = record
                elif record["event_type"].startswith(("node_", "pipeline_")):
                    begun.pop(record["span_id"], None)
        yield from (({**record, **heard}, record) for record in begun.values())


def _active(state: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[Active]:
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # anyone may have written it
        texts = [str(entry.get(key, "")) for key in ("pipeline", "run_id", "node_name", "trace_id", "span_id")]
        where, rss = [str(state.get(key, "")) for key in ("service", "host")], state.get("rss")
        times = int(entry.get("time_unix_nano", 0)), int(state["heartbeat_unix_nano"])
        yield Active._make((*where, *texts, *times, rss if isinstance(rss, int) else None))


# --- files -----------------------------------------------------------------------------------------------------------

_KINDS: Final = (
    ("logs", "logs/*.jsonl*", "line"),
    ("spans", "spans/date=*/*.parquet", "span"),
    ("spans, OTLP/JSON", "otlp/*.traces.jsonl*", "line"),
    ("metrics", "metrics/*/date=*/*.parquet", "point"),
    ("metrics, JSON", "json/*.metrics.json", ""),
    ("metrics, Prometheus", "prometheus/*.prom", "sample"),
)


def _visible(directory: Path, pattern: str) -> list[Path]:
    return sorted(path for path in directory.glob(pattern) if not path.name.startswith("."))


def _described(directory: Path, signal: str, pattern: str, unit: str, paths: list[Path]) -> Files:
    sizes, records = zip(*map(_measured, paths), strict=True)
    named = len(paths) == 1 and paths[0].suffix != ".parquet"
    shown = paths[0].relative_to(directory).as_posix() if named else pattern
    return Files(signal, shown, len(paths), sum(sizes), sum(records) if unit else None, unit)


def _measured(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its number of records, zeros where it cannot be read."""
    try:
        size = path.stat().st_size
        if path.suffix == ".parquet":
            return size, pq.read_metadata(path).num_rows
        return size, sum(not line.startswith(b"#") for line in read_lines(path))
    except (OSError, pa.ArrowException):
        return 0, 0
