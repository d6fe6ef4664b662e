"""What the store returns of runs: immutable views, built from rows of the span files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import orjson
import pyarrow as pa

from otel_odibi import names
from otel_odibi.exporters.columns import MAP, TEXT
from otel_odibi.facts import Failure
from otel_odibi.names import FAILURE, SUCCESS

T = TypeVar("T")


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


# --- rows -------------------------------------------------------------------------------------------------------------


def as_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return spans as rows. Times become integers, as there is no exact Python type for them."""
    event = pa.struct([("Timestamp", pa.int64()), ("Name", TEXT), ("Attributes", MAP)])
    casts = {"Timestamp": pa.int64(), "Events": pa.list_(event)}
    for number, name in enumerate(table.column_names):
        if name in casts:
            table = table.set_column(number, name, table[name].cast(casts[name]))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


class Span:
    """A row of the span files, read with care: its attributes are texts that anyone may have written."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = row
        self.attributes: dict[str, str] = dict(row["SpanAttributes"] or ())
        self.span_id: str = row["SpanId"]
        self.parent_id: str = row["ParentSpanId"] or ""
        self.start_ns: int = row["Timestamp"]
        self.duration_ns: int = row["Duration"] or 0

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
        """What went wrong; None if nothing did."""
        return failure_of(self.row, self.text(names.ERROR_TYPE))

    @property
    def outcome(self) -> str:
        """The outcome, or what the status says where a foreign writer has left none."""
        stated = self.text(names.NODE_OUTCOME) or self.text(names.PIPELINE_OUTCOME)
        return stated or (FAILURE if self.row["StatusCode"] == "Error" else SUCCESS)

    @property
    def is_attempt(self) -> bool:
        number = self.text(names.NODE_ATTEMPT)
        return bool(number) and self.row["SpanName"] == names.ATTEMPT_SPAN.format(number=number)


def failure_of(row: Mapping[str, Any], error_type: str | None) -> Failure | None:
    """Return what went wrong, as the last `exception` event and the status tell it; None if nothing did."""
    if row["StatusCode"] != "Error":
        return None
    events = [dict(event["Attributes"] or ()) for event in row["Events"] or () if event["Name"] == "exception"]
    event = events[-1] if events else {}
    message = event.get(names.EXCEPTION_MESSAGE) or row["StatusMessage"] or ""
    found = event.get(names.EXCEPTION_TYPE) or error_type or ""
    return Failure(found, message, event.get(names.EXCEPTION_STACKTRACE, ""))


def summary_of(row: Mapping[str, Any]) -> RunSummary:
    """Return the view of a row of runs."""
    return RunSummary(
        row["pipeline"] or "", row["run_id"], row["ServiceName"] or "", row["outcome"], row["TraceId"], row["SpanId"],
        row["Timestamp"], row["Duration"] or 0, failure_of(row, row["error_type"]),
    )  # fmt: skip


def nodes_of(run: RunSummary, spans: list[Span]) -> Iterator[NodeView]:
    """Yield the nodes beneath the run's span, depth first; spans of other libraries in between are passed through."""
    known = {span.span_id for span in spans}
    children: dict[str, list[Span]] = {}
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


def _node(span: Span, depth: int, inside: list[Span]) -> NodeView:
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


def _attempt(span: Span) -> AttemptView:
    number = span.value(names.NODE_ATTEMPT, int) or 1
    return AttemptView(number, span.outcome, span.start_ns, span.duration_ns, span.failure)
