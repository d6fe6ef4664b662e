"""Reads a telemetry directory: the runs in it and their nodes, from the files alone.

    store.open("telemetry").run("last").nodes

Spans come from the Parquet files, whoever wrote them; files of other kinds and names that start with a dot are passed
over. Identifiers are lower-case hexadecimal, times Unix nanoseconds, durations nanoseconds, sizes bytes. All that is
returned is immutable; a `Store` holds nothing but its path, so what is written later is seen by the next call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from otel_odibi import names
from otel_odibi.errors import StoreError
from otel_odibi.exporters.jsonl import files, read_lines
from otel_odibi.facts import Failure
from otel_odibi.names import FAILURE, SUCCESS

if TYPE_CHECKING:
    import pyarrow.dataset as ds

LAST: Final = "last"
"""In place of a run id: the run that ended last, so never one inside another."""

_COLUMNS: Final = (
    "Timestamp", "TraceId", "SpanId", "ParentSpanId", "SpanName", "ServiceName", "SpanAttributes", "Duration",
    "StatusCode", "StatusMessage", "Events", "Links",
)  # fmt: skip
_OF_PIPELINE: Final = names.PIPELINE_SPAN.format(name="")


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


class Files(NamedTuple):
    """The files of one kind. `path`, relative to the directory, has a `*` where it stands for several.

    `records` counts lines, rows or series, as `unit` says; None where the files are no list of anything.
    """

    signal: str
    path: str
    files: int
    bytes: int
    records: int | None
    unit: str


def open(directory: str | os.PathLike[str]) -> Store:  # noqa: A001 - meant to be read as store.open
    """Return the store of a telemetry directory. Raises StoreError if there is no such directory."""
    path = Path(directory)
    if not path.is_dir():
        remedy = f"run a pipeline after configure(directory={str(path)!r}), or name another"
        raise StoreError(f"there is no telemetry directory {str(path)!r}; {remedy}")
    return Store(path)


class Store:
    """A telemetry directory, open for reading; made by `open()`. Thread-safe: it keeps no state."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def runs(self) -> tuple[RunSummary, ...]:
        """Return the finished runs, the one that ended last first. Raises StoreError where a file cannot be read."""
        import pyarrow.compute as pc

        of_runs = (pc.field("ScopeName") == names.SCOPE) & pc.starts_with(pc.field("SpanName"), _OF_PIPELINE)
        found = [_summary(span) for span in self._spans(of_runs) if span.text(names.PIPELINE_RUN_ID)]
        return tuple(sorted(found, key=lambda run: (run.start_ns + run.duration_ns, -run.start_ns), reverse=True))

    def run(self, run_id: str = LAST) -> RunView:
        """Return one run: by its id, by the beginning of its id, or the "last" that ended.

        Raises StoreError where there is no such run, or several, and where a file cannot be read.
        """
        import pyarrow.compute as pc

        run = self._find(run_id)
        return RunView(run, tuple(_nodes(run, self._spans(pc.field("TraceId") == run.trace_id))))

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
        import pyarrow as pa
        import pyarrow.dataset as ds

        paths = [str(path) for path in _visible(self.directory, "spans/date=*/*.parquet")]
        if not paths:
            return []
        try:
            table = ds.dataset(paths, format="parquet").to_table(columns=list(_COLUMNS), filter=condition)
            rows = table.cast(pa.schema(map(_in_plain_numbers, table.schema))).to_pylist()
        except (pa.ArrowException, OSError) as exc:
            where = str(self.directory / "spans")
            raise StoreError(f"cannot read the spans in {where!r}: {exc}; move the bad file away") from None
        distinct = {row["SpanId"]: _Span(row) for row in rows}
        return sorted(distinct.values(), key=lambda span: (span.start_ns, span.span_id))

    def files(self) -> tuple[Files, ...]:
        """Return what files there are, by kind, with their sizes. What cannot be read counts as empty."""
        kinds = [("logs", files(self.directory / "logs"), "lines")]
        kinds += [(signal, _visible(self.directory, pattern), unit) for signal, pattern, unit in _KINDS]
        return tuple(_described(self.directory, *kind) for kind in kinds if kind[1])


# --- spans -----------------------------------------------------------------------------------------------------------


def _in_plain_numbers(field: Any) -> Any:
    """Return a column's field with integers for timestamps, which have no exact Python type."""
    import pyarrow as pa

    kind = field.type
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        kind = pa.list_(pa.struct([_in_plain_numbers(child) for child in kind.value_type]))
    return field.with_type(pa.int64() if pa.types.is_timestamp(kind) else kind)


class _Span:
    """A row of the span files, read with care: its attributes are texts that anyone may have written."""

    __slots__ = ("_attributes", "_row", "duration_ns", "parent_id", "span_id", "start_ns")

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = row
        self._attributes: dict[str, str] = dict(row["SpanAttributes"] or ())
        self.span_id: str = row["SpanId"]
        self.parent_id: str = row["ParentSpanId"]
        self.start_ns: int = row["Timestamp"]
        self.duration_ns: int = row["Duration"]

    def __getitem__(self, column: str) -> Any:
        return self._row[column]

    def text(self, key: str) -> str:
        """Return the attribute, the empty text if it is not there."""
        return self._attributes.get(key, "")

    def number(self, key: str) -> int | None:
        """Return the attribute as a whole number, None if it is none."""
        try:
            return int(self._attributes[key])
        except (KeyError, ValueError):
            return None

    def flag(self, key: str) -> bool | None:
        """Return the attribute as a boolean, None if it is none."""
        return {"true": True, "false": False}.get(self.text(key))

    def texts(self, key: str) -> tuple[str, ...]:
        """Return the attribute, a JSON list, as texts; empty if it is none."""
        try:
            found = orjson.loads(self.text(key) or b"[]")
        except ValueError:
            return ()
        return tuple(map(str, found)) if isinstance(found, list) else ()

    def failure(self) -> Failure | None:
        """Return what went wrong, as the last `exception` event and the status tell it; None if nothing did."""
        if self["StatusCode"] != "Error":
            return None
        events = [dict(event["Attributes"] or ()) for event in self["Events"] or () if event["Name"] == "exception"]
        event = events[-1] if events else {}
        return Failure(
            event.get(names.EXCEPTION_TYPE) or self.text(names.ERROR_TYPE),
            event.get(names.EXCEPTION_MESSAGE) or self["StatusMessage"],
            event.get(names.EXCEPTION_STACKTRACE, ""),
        )

    def outcome(self, key: str) -> str:
        """Return the outcome under `key`, or what the status says where a foreign writer has left none."""
        return self.text(key) or (FAILURE if self["StatusCode"] == "Error" else SUCCESS)


def _summary(span: _Span) -> RunSummary:
    return RunSummary(
        span.text(names.PIPELINE_NAME), span.text(names.PIPELINE_RUN_ID), span["ServiceName"],
        span.outcome(names.PIPELINE_OUTCOME), span["TraceId"], span.span_id, span.start_ns, span.duration_ns,
        span.failure(),
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
        if span.text(names.NODE_NAME) and not _is_attempt(span):
            yield _node(span, depth, tuple(_attempt(child) for child in inside if _is_attempt(child)))
            depth += 1
        elif span.text(names.PIPELINE_RUN_ID):
            yield _nested(_summary(span), span.parent_id, depth)
            depth += 1
        stack += [(child, depth) for child in reversed(inside)]


def _is_attempt(span: _Span) -> bool:
    number = span.number(names.NODE_ATTEMPT)
    return number is not None and span["SpanName"] == names.ATTEMPT_SPAN.format(number=number)


def _attempt(span: _Span) -> AttemptView:
    number = span.number(names.NODE_ATTEMPT) or 1
    return AttemptView(number, span.outcome(names.NODE_OUTCOME), span.start_ns, span.duration_ns, span.failure())


def _nested(run: RunSummary, parent_id: str, depth: int) -> NodeView:
    return NodeView(
        run.pipeline, run.outcome, run.span_id, parent_id, run.start_ns, run.duration_ns,
        depth=depth, run_id=run.run_id, failure=run.failure,
    )  # fmt: skip


def _node(span: _Span, depth: int, attempts: tuple[AttemptView, ...]) -> NodeView:
    return NodeView(
        name=span.text(names.NODE_NAME),
        outcome=span.outcome(names.NODE_OUTCOME),
        span_id=span.span_id,
        parent_span_id=span.parent_id,
        start_ns=span.start_ns,
        duration_ns=span.duration_ns,
        layer=span.text(names.NODE_LAYER),
        engine=span.text(names.NODE_ENGINE),
        depth=depth,
        rows_in=span.number(names.NODE_ROWS_IN),
        rows_out=span.number(names.NODE_ROWS_OUT),
        bytes_out=span.number(names.NODE_BYTES_OUT),
        rss=span.number(names.NODE_MEMORY_RSS),
        cache_hit=span.flag(names.NODE_CACHE_HIT),
        attempt=span.number(names.NODE_ATTEMPT) or 1,
        depends_on=span.texts(names.NODE_DEPENDS_ON),
        links=tuple(link["SpanId"] for link in span["Links"] or ()),
        skip_reason=span.text(names.NODE_SKIP_REASON),
        failure=span.failure(),
        attempts=attempts,
    )


# --- files -----------------------------------------------------------------------------------------------------------

_KINDS: Final = (
    ("spans", "spans/date=*/*.parquet", "spans"),
    ("spans, OTLP/JSON", "spans/*.jsonl*", "lines"),
    ("metrics", "metrics/*/date=*/*.parquet", "points"),
    ("metrics, JSON", "metrics/*.json", ""),
    ("Prometheus", "prometheus/*.prom", "series"),
)


def _visible(directory: Path, pattern: str) -> list[Path]:
    return sorted(path for path in directory.glob(pattern) if not path.name.startswith("."))


def _described(directory: Path, signal: str, paths: list[Path], unit: str) -> Files:
    shown = [path.relative_to(directory).as_posix() for path in paths]
    sizes, records = zip(*map(_measured, paths), strict=True)
    counted = sum(count for count in records if count is not None) if unit else None
    return Files(signal, _common(shown), len(paths), sum(sizes), counted, unit)


def _measured(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its number of records, zeros where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        size = path.stat().st_size
        if path.suffix == ".parquet":
            return size, pq.read_metadata(path).num_rows
        lines = read_lines(path)
        return size, sum(not line.startswith(b"#") for line in lines)
    except (OSError, pa.ArrowException):
        return 0, 0


def _common(paths: list[str]) -> str:
    """Return the one path, or what they have in common with a `*` for what differs, folder by folder."""
    columns = zip(*(path.split("/") for path in paths), strict=False)
    return "/".join(column[0] if len({*column}) == 1 else f"*{_suffix(column)}" for column in columns)


def _suffix(parts: tuple[str, ...]) -> str:
    suffixes = {Path(part).suffix for part in parts}
    return suffixes.pop() if len(suffixes) == 1 else ""
