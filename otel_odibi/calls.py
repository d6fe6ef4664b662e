"""One execution of a node, one run of a pipeline: the state between start and end, and the handle users hold."""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanContext, Status, StatusCode, TraceFlags
from typing_extensions import Self

from otel_odibi import lineage, names
from otel_odibi.clean import clean_name, error_type
from otel_odibi.facts import CacheLookup, Edge, Failure, NodeFinished, NodeRetried, NodeStarted, RunFinished, RunStarted
from otel_odibi.names import CANCELLED, FAILURE, SKIPPED, SUCCESS, Outcome
from otel_odibi.runtime import Inherited, Runtime

MAX_REMEMBERED_NODES: Final = 10_000
"""Node names a run remembers for `depends_on`; the oldest are forgotten first."""

current: ContextVar[Call | None] = ContextVar("otel_odibi_current", default=None)
"""The innermost run or node under way in this thread or task."""

_collector = 0


def _note_collection(phase: str, info: dict[str, int]) -> None:
    global _collector
    _collector = threading.get_ident() if phase == "start" else 0


if sys.version_info < (3, 12):
    gc.callbacks.append(_note_collection)


def collecting() -> bool:
    """Tell whether a garbage collection runs this code, as it ends an abandoned generator or calls a `__del__`.

    Before Python 3.12 it may have interrupted a change of a context variable, and another change in there crashes
    (https://github.com/python/cpython/issues/148891): then nothing is made current.
    """
    return _collector != 0 and _collector == threading.get_ident()


P = ParamSpec("P")
C = TypeVar("C", bound="Call")


def harmless(method: Callable[Concatenate[C, P], None]) -> Callable[Concatenate[C, P], None]:
    """Make a method of a call do nothing where nothing is recorded, and report what it raises instead of raising."""

    @functools.wraps(method)
    def guarded(self: C, /, *args: P.args, **kwargs: P.kwargs) -> None:
        rt = self._rt
        if rt is None:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as exc:  # noqa: BLE001 - telemetry never harms
            rt.on_error(method.__name__, exc)

    return guarded


class Call:
    """What a run and a node share: a span made current, a start, an end. False where nothing is recorded."""

    __slots__ = (
        "_attributes",
        "_began",
        "_ended",
        "_error",
        "_outer",
        "_rt",
        "_saved",
        "_started",
        "_tokens",
        "name",
        "run",
        "scope",
        "span",
    )

    def __init__(self, name: str, scope: Any, run: Run | None, rt: Runtime | None, span: Span) -> None:
        self.name = name
        self.scope = scope
        self.run = run
        self.span = span
        self._rt = rt
        self._started: Any = None
        self._began = 0
        self._ended = False
        self._error: BaseException | None = None
        self._attributes: dict[str, Any] | None = None
        self._outer: Call | None = None
        self._tokens: tuple[Any, Any] | None = None
        self._saved: tuple[Any, Any] | None = None

    def __bool__(self) -> bool:
        return self._rt is not None

    @property
    def trace_id(self) -> str:
        """Trace id in lower-case hex; zeros where nothing is recorded."""
        return trace.format_trace_id(self.span.get_span_context().trace_id)

    @harmless
    def set(self, /, **attributes: Any) -> None:
        """Put attributes on the span and, as `metadata`, on the closing log line. Redacts secrets; never raises."""
        clean = self._clean(attributes)
        self._attributes = {**(self._attributes or {}), **clean}
        self.span.set_attributes(clean)

    @harmless
    def event(self, /, name: str, **attributes: Any) -> None:
        """Add an event to the span. Secrets are redacted. Never raises."""
        self.span.add_event(clean_name(name), self._clean(attributes), self._live.clock())

    @harmless
    def fail(self, error: BaseException | None) -> None:
        """End as if `error` was raised, whatever is: for work that returns its failures. None is none. Never raises."""
        if not isinstance(error, (BaseException, type(None))):
            raise TypeError(f"fail() takes an exception, not {error!r}; give it one")
        self._error = error

    @property
    def _live(self) -> Runtime:
        assert self._rt is not None  # noqa: S101 - for the type checker; callers have looked
        return self._rt

    def _clean(self, attributes: dict[str, Any]) -> dict[str, Any]:
        clean = self._live.cleaner.attribute
        return {clean_name(key): clean(key, value) for key, value in attributes.items()}

    def enter(self, outer: Call | None, context: Context | None = None) -> None:
        """Make this call current inside `outer`, and its span where there is one: in `context`, if not in this one."""
        if _collector and collecting():
            return
        self._outer = outer
        attached = None if self._rt is None else otel_context.attach(trace.set_span_in_context(self.span, context))
        self._tokens = (current.set(self), attached)

    def leave(self) -> None:
        """Give back what was current before, where that is possible."""
        tokens = self._tokens
        if tokens is None or (_collector and collecting()):
            return
        inner = current.get()
        while inner is not self:
            if inner is None:
                return  # ended after its caller had, as an abandoned generator may: what is current is another's
            inner = inner._outer
        try:
            current.reset(tokens[0])
        except ValueError:
            return  # ended in another context than it began in, where neither variable was set
        self._tokens = None
        if tokens[1] is not None:
            otel_context.detach(tokens[1])

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Make this call current for a block: in a pool's thread, a callback, wherever its engine runs its parts.

        The call goes on after the block. May be used by several threads at once. Never raises of its own.
        """
        tokens = current.set(self), otel_context.attach(trace.set_span_in_context(self.span))
        try:
            yield
        finally:
            otel_context.detach(tokens[1])
            with suppress(ValueError):  # left in another context than entered, as a callback may be
                current.reset(tokens[0])

    def suspend(self) -> None:
        """Give the caller its own context back while a generator waits, keeping what is current inside it."""
        if self._rt is not None and not collecting():
            self._saved = (current.get(), otel_context.get_current())
            self.leave()

    def resume(self) -> None:
        """Make current again what was current inside when it was suspended."""
        saved = self._saved
        if saved is not None and not collecting():
            self._saved = None
            self._tokens = (current.set(saved[0]), otel_context.attach(saved[1]))

    def abandon(self) -> None:
        """End the call if it is suspended, and nobody is left who could resume it."""
        if self._saved is not None:
            self.finish(GeneratorExit())

    def yielded(self, item: object) -> None:
        """Take note of an item of a generator."""

    def finish(self, exc: BaseException | None = None, result: object = None) -> None:
        """End the call: measure, tell the listeners, end the span, stop being current. Never raises."""
        rt, self._saved = self._rt, None
        try:
            if rt is not None:
                self._end(rt, exc if self._error is None else self._error, result)
        except Exception as error:  # noqa: BLE001 - telemetry never harms
            self._live.on_error("finish", error)
        finally:
            self._ended, self._error = True, None
            self.leave()

    def _end(self, rt: Runtime, exc: BaseException | None, result: object) -> None:
        raise NotImplementedError


def record_outcome(rt: Runtime, span: Span, exc: BaseException | None, outcome: Outcome, end: int) -> Failure | None:
    """Put how a call ended on its span: all of a failure, the type alone of what cancelled it.

    A failure is status, `error.type`, and an `exception` event with texts redacted.
    Source: OpenTelemetry semantic conventions, Recording errors, Exceptions.
    """
    if exc is None or outcome == SUCCESS:
        return None
    if outcome == CANCELLED:
        span.set_attribute(names.ERROR_TYPE, error_type(exc))
        return Failure(error_type(exc), "", "")
    failure = rt.cleaner.failure(exc)
    span.set_status(Status(StatusCode.ERROR, failure.message))
    span.set_attribute(names.ERROR_TYPE, failure.type)
    event = {
        names.EXCEPTION_TYPE: failure.type,
        names.EXCEPTION_MESSAGE: failure.message,
        names.EXCEPTION_STACKTRACE: failure.stacktrace,
    }
    span.add_event("exception", event, end)
    return failure


def outcome_of(exc: BaseException | None) -> Outcome:
    """Name how a call ended: an exit with code 0 is a success, a cancellation or an interrupt is `cancelled`."""
    if exc is None:
        return SUCCESS
    if isinstance(exc, Exception):
        return FAILURE
    if isinstance(exc, SystemExit):
        return SUCCESS if exc.code is None or (isinstance(exc.code, int) and exc.code == 0) else FAILURE
    if isinstance(exc, (GeneratorExit, KeyboardInterrupt)) or type(exc).__name__ in ("CancelledError", "Cancelled"):
        return CANCELLED  # by name: importing asyncio costs, and trio has its own
    return FAILURE


class Run(Call):
    """One run of a pipeline: what `with pipeline(...) as run` gives. Safe to use from several threads.

    Attributes: `name`, `run_id` (hex text), `span` (the OpenTelemetry span), `trace_id` (hex text).
    """

    __slots__ = ("_counts", "_last", "_lock", "node_attributes", "run_id")

    def __init__(self, name: str, run_id: str, scope: Any, rt: Runtime | None, span: Span) -> None:
        super().__init__(name, scope, self, rt, span)
        self.run_id = run_id
        self.node_attributes = {names.PIPELINE_NAME: name, names.PIPELINE_RUN_ID: run_id}
        self._lock = threading.RLock()  # a collection inside may end an abandoned generator of this very run
        self._counts = {SUCCESS: 0, FAILURE: 0}
        self._last: dict[str, Edge] = {}

    def begin(self, started: RunStarted, began: int, outer: Call | None, context: Context | None) -> None:
        """Become current and say so."""
        self._started, self._began = started, began
        self.enter(outer, context)
        self._live.emit(started)

    @harmless
    def skip(self, node: str, reason: str = "", *, layer: str = "", engine: str = "") -> None:
        """Report a node of this run that was not run: a span and a log line with outcome `skipped`. Never raises."""
        with self.inside():
            self.scope.skip(node, reason, layer, engine)

    def last(self, node: str) -> Edge:
        """Return the edge from a node's last execution in this run; one without a span where there was none."""
        return self._last.get(node) or Edge(node, 0, 0)

    def node_finished(self, outcome: Outcome, edge: Edge) -> None:
        """Count a node's execution and remember its span."""
        with self._lock:
            if outcome in self._counts:
                self._counts[outcome] += 1
            self._last.pop(edge.node, None)
            self._last[edge.node] = edge
            if len(self._last) > MAX_REMEMBERED_NODES:
                del self._last[next(iter(self._last))]

    def _end(self, rt: Runtime, exc: BaseException | None, result: object) -> None:
        started = self._started
        if started is None:
            return
        duration = rt.tick() - self._began
        end = started.time_unix_nano + duration
        outcome = outcome_of(exc)
        failure = record_outcome(rt, self.span, exc, outcome, end)
        self.span.set_attribute(names.PIPELINE_OUTCOME, outcome)
        success, failed = self._counts[SUCCESS], self._counts[FAILURE]
        self.span.end(end)  # before hooks hear of it, which want complete files; it is still current
        rt.emit(RunFinished(started, end, duration, outcome, success, failed, failure, self._attributes))


class Node(Call):
    """One execution of a node: what `with node(...) as n` and `current_node()` give. For use by that execution.

    Attributes: `name`, `layer`, `engine`, `run` (its `Run`, or None), `span`, `trace_id`.
    """

    __slots__ = (
        "_attempts", "_cache_hit", "_edge", "_edges", "_last_failure", "_rows_in", "_size", "_skipped", "engine",
        "layer",
    )  # fmt: skip

    def __init__(
        self, name: str, layer: str, engine: str, scope: Any, run: Run | None, rt: Runtime | None, span: Span
    ) -> None:
        super().__init__(name, scope, run, rt, span)
        self.layer = layer
        self.engine = engine
        self._rows_in: int | None = None
        self._edges: tuple[Edge, ...] = ()
        self._edge: Edge | None = None
        self._size = lineage.NOTHING
        self._cache_hit: bool | None = None
        self._attempts = 0
        self._last_failure: Failure | None = None
        self._skipped: str | None = None

    def begin(self, started: NodeStarted, began: int, outer: Call | None, context: Context | None) -> None:
        """Become current and say so: the start line is written before the user's code runs."""
        self._started, self._began = started, began
        self._rows_in, self._edges = started.rows_in, started.edges
        self._edge = Edge(self.name, started.trace_id, started.span_id)
        self.enter(outer, context)
        self._live.emit(started)

    @harmless
    def output(self, value: object = None, *, rows: int | None = None, bytes: int | None = None) -> None:  # noqa: A002
        """Measure a result: rows, bytes and column names, never the cells; and remember who produced it.

        `rows` and `bytes` state what cannot be measured. Several outputs add up. Never raises.
        """
        found = self._measure(self._live, value)
        stated = lineage.Size(_count(rows), _count(bytes), None)
        if stated != lineage.NOTHING:
            found = found._replace(
                rows=found.rows if stated.rows is None else stated.rows,
                bytes=found.bytes if stated.bytes is None else stated.bytes,
            )
        self._add(found)

    def _measure(self, rt: Runtime, value: object) -> lineage.Size:
        """Return how big a value is, and remember that this node made it."""
        if not rt.measure or self._edge is None:
            return lineage.NOTHING
        try:
            lineage.track(value, self._edge)
            return lineage.measure(value)
        except Exception as exc:  # noqa: BLE001 - telemetry never harms
            rt.on_error("measure", exc)
            return lineage.NOTHING

    def _add(self, size: lineage.Size) -> None:
        self._size = size if self._size == lineage.NOTHING else _total(self._size, size)

    @harmless
    def input(self, value: object = None, *, rows: int | None = None) -> None:
        """Count an input that is no argument: its rows, and an edge from the node that produced it. Never raises."""
        measured, edges = inputs_of(self._live, (value,), {})
        stated = _count(rows)
        self._rows_in = _sum(self._rows_in, measured if stated is None else stated)
        self.after(edges)

    @harmless
    def after(self, producers: Iterable[Edge]) -> None:
        """Depend on further executions of nodes, or on nodes by name where an edge has no span. Never raises."""
        new = [edge for edge in producers if edge not in self._edges]
        self._edges = (*self._edges, *new)
        for edge in new:
            if edge.span_id:
                self.span.add_link(span_context(edge))

    @property
    def edge(self) -> Edge | None:
        """What those who depend on this execution depend on; None where nothing is recorded."""
        return self._edge

    @harmless
    def cache(self, hit: bool, key: object = None) -> None:
        """Declare a cache lookup and its result. `key` goes to the log line. Never raises."""
        self._cache_hit = bool(hit)
        if self._started is not None:
            key_text = None if key is None else clean_name(key)
            self._live.emit(CacheLookup(self._started, self._cache_hit, key_text, self._live.clock()))

    @harmless
    def skip(self, reason: str = "") -> None:
        """Give this execution the outcome `skipped`, unless it raises. It then records no duration. Never raises."""
        self._skipped = reason

    def attempt(self, number: int = 0) -> Attempt:
        """Return a context manager around one attempt of a retried node. Works inside any retry library.

        A first attempt that succeeds leaves no span; once it fails, every attempt is a child span `attempt {n}`. They
        are counted here; `number` is for those of which earlier ones were made elsewhere.
        """
        return Attempt(self, number)

    @harmless
    def yielded(self, item: object) -> None:
        """Count an item of a generator: the rows of a table, else one row."""
        size = lineage.measure(item) if self._live.measure else lineage.NOTHING
        if size.rows is None or size.bytes is None:  # a record or a scalar, not a table
            self._add(_ONE_ROW)
        else:
            self._add(self._measure(self._live, item))

    def _end(self, rt: Runtime, exc: BaseException | None, result: object) -> None:
        started, edge = self._started, self._edge
        if started is None or edge is None:
            return
        duration = rt.tick() - self._began
        if result is not None:
            measured = self._measure(rt, result)
            if self._size is lineage.NOTHING:  # else `output` has told already, and it may have been of this very value
                self._size = measured
        end = started.time_unix_nano + duration
        outcome = outcome_of(exc)
        if self._skipped is not None and exc is None:
            outcome = SKIPPED
            if self._skipped:
                self.set(**{names.NODE_SKIP_REASON: self._skipped})
        failure = None if exc is None else record_outcome(rt, self.span, exc, outcome, end)
        rows, size, columns = self._size
        fact = NodeFinished(
            started, end, duration, outcome, self._attempts or 1, self._rows_in, rows, size, columns, self._cache_hit,
            rt.read_rss(), failure, self._edges, self._attributes,
        )  # fmt: skip
        self.span.set_attributes(_closing_attributes(fact))
        if self.run is not None:
            self.run.node_finished(outcome, edge)
        rt.emit(fact)
        self.span.end(end)


def _closing_attributes(fact: NodeFinished) -> dict[str, Any]:
    attributes: dict[str, Any] = {names.NODE_OUTCOME: fact.outcome, names.NODE_ATTEMPT: fact.attempt}
    if fact.rss is not None:
        attributes[names.NODE_MEMORY_RSS] = fact.rss
    if fact.rows_in is not None:
        attributes[names.NODE_ROWS_IN] = fact.rows_in
    if fact.rows_out is not None:
        attributes[names.NODE_ROWS_OUT] = fact.rows_out
    if fact.bytes_out is not None:
        attributes[names.NODE_BYTES_OUT] = fact.bytes_out
    if fact.columns is not None:
        attributes[names.NODE_COLUMNS] = fact.columns
    if fact.cache_hit is not None:
        attributes[names.NODE_CACHE_HIT] = fact.cache_hit
    if fact.edges:
        attributes[names.NODE_DEPENDS_ON] = tuple(dict.fromkeys(edge.node for edge in fact.edges))
    return attributes


_ONE_ROW: Final = lineage.Size(1, None, None)


def inputs_of(rt: Runtime, args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[int | None, tuple[Edge, ...]]:
    """Return the rows of a node's inputs and the edges from their producers; nothing where measuring is off."""
    if not rt.measure:
        return None, ()
    try:
        return lineage.inputs(args, kwargs)
    except Exception as exc:  # noqa: BLE001 - telemetry never harms
        rt.on_error("inputs", exc)
        return None, ()


def _total(a: lineage.Size, b: lineage.Size) -> lineage.Size:
    return lineage.Size(_sum(a.rows, b.rows), _sum(a.bytes, b.bytes), a.columns if a.columns == b.columns else None)


def _count(stated: int | None) -> int | None:
    """Return a stated number as an int, also one of numpy; None where it is negative: a cursor's -1 means unknown."""
    return None if stated is None or stated < 0 else int(stated)


def _sum(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else a + b


def span_context(edge: Edge) -> SpanContext:
    """Return the span context a link to this edge's producer points at."""
    return SpanContext(edge.trace_id, edge.span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


class Attempt:
    """One attempt of a node; made by `Node.attempt()`. `number` counts from 1. Exceptions pass untouched."""

    __slots__ = ("_began", "_error", "_node", "_span", "_start", "_token", "_told", "number")

    def __init__(self, node: Node, number: int = 0) -> None:
        self._node = node
        self._error: BaseException | None = None
        self._span: Span | None = None
        self._token: Any = None
        self._start = self._began = 0
        self._told = number
        self.number = 0

    def fail(self, error: BaseException | None) -> None:
        """End as if `error` was raised, as `Node.fail` does."""
        self._error = error

    def __enter__(self) -> Self:
        node = self._node
        if node is not NO_NODE:  # which all that is not recorded shares
            node._attempts = self._told or node._attempts + 1
        self.number = node._attempts
        if node._rt is not None:
            try:
                self._open(node._rt)
            except Exception as exc:  # noqa: BLE001 - telemetry never harms
                node._rt.on_error("attempt", exc)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        rt = self._node._rt
        if rt is not None:
            try:
                self._close(rt, exc if self._error is None else self._error)
            except Exception as error:  # noqa: BLE001
                rt.on_error("attempt", error)

    def _open(self, rt: Runtime) -> None:
        self._start, self._began = rt.clock(), rt.tick()
        if self.number > 1 and self._node._started is not None:
            rt.emit(NodeRetried(self._node._started, self.number, self._start, self._node._last_failure))
            self._span = self._start_span(rt)
            self._token = otel_context.attach(trace.set_span_in_context(self._span))

    def _start_span(self, rt: Runtime) -> Span:
        attributes: dict[str, str | int] = {names.NODE_NAME: self._node.name, names.NODE_ATTEMPT: self.number}
        span_name = names.ATTEMPT_SPAN.format(number=self.number)
        context = trace.set_span_in_context(self._node.span)  # also in a thread that knows nothing of the node
        return rt.tracer.start_span(span_name, context, attributes=attributes, start_time=self._start)

    def _close(self, rt: Runtime, exc: BaseException | None) -> None:
        if self._token is not None:
            otel_context.detach(self._token)
        end = self._start + rt.tick() - self._began
        outcome = outcome_of(exc)
        if self._span is None and outcome == FAILURE:
            self._span = self._start_span(rt)  # the first attempt gets its span only now that there may be a second
        if self._span is not None:
            self._span.set_attribute(names.NODE_OUTCOME, outcome)
            self._node._last_failure = record_outcome(rt, self._span, exc, outcome, end)
            self._span.end(end)


def _in_child() -> None:
    """Have what is under way where a process forks end in the parent alone: a child may leave the same blocks."""
    call = current.get()
    while call is not None:
        call._started = None
        if call.run is not None:  # another thread of the parent may hold it for ever
            call.run._lock = threading.RLock()
        call = call._outer


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


NO_RUN: Final = Run("", "", None, None, trace.INVALID_SPAN)
NO_NODE: Final = Node("", "", "", None, None, None, trace.INVALID_SPAN)
NO_NODE._attempts = 1


def innermost() -> Call | None:
    """Return the call under way here. One that ended in another context is left now that its own is seen again.

    In a copy of its context it stays, as work that was carried elsewhere belongs to it all the same.
    """
    call = current.get()
    while call is not None and call._ended:
        call.leave()
        outer = current.get()
        if outer is call:
            break
        call = outer
    return call


def inherited(around: Inherited) -> tuple[Call | None, Context | None]:
    """Return what work begins in where no call is under way: what the process was started in, unless a span is current.

    What is current here besides, such as baggage, goes before what was inherited.
    """
    here = otel_context.get_current()
    if trace.get_current_span(here).get_span_context().is_valid:
        return None, None
    return around[0], Context({**around[1], **here}) if here else around[1]


def current_node() -> Node:
    """Return the node that runs here, in this thread or task; a falsy one, whose methods do nothing, where none does.

    Never raises.
    """
    call = innermost()
    return call if isinstance(call, Node) else NO_NODE


def current_pipeline() -> Run:
    """Return the innermost run under way here; a falsy one, whose methods do nothing, where there is none.

    Never raises.
    """
    call = innermost()
    return NO_RUN if call is None or call.run is None else call.run
