"""`pipeline()` and `node()`: each one object that serves as decorator and as context manager.

A scope opens a span through the OpenTelemetry *API*, makes it current, and emits facts to listeners; it writes nothing
itself. Sync, async, generator and async generator functions are told apart once, at decoration; every call has fresh
state, so recursion and threads are safe. An exception of the user's function always propagates untouched; an exception
of this package never does.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Generic, TypeVar, cast, overload

from opentelemetry import trace
from opentelemetry.trace import Link, Span

from otel_odibi import names
from otel_odibi.calls import Call, Node, Run, current, inherited, innermost, inputs_of, span_context
from otel_odibi.clean import DEFAULT, Cleaner, clean_name
from otel_odibi.facts import Edge, NodeStarted, RunStarted
from otel_odibi.runtime import Runtime, live
from otel_odibi.wrap import wrap

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=Call)
_NOTHING: Final[dict[str, object]] = {}


class Scope(Generic[C]):
    """Decorator and context manager around `_start`, which opens a call. One scope may be in use many times at once."""

    __slots__ = ("_attributes", "_open", "name")

    def __init__(self, name: str, attributes: Mapping[str, Any] | None) -> None:
        self.name = clean_name(name) if name else ""
        self._attributes = {
            clean_name(key): _attribute(DEFAULT, key, value) for key, value in (attributes or {}).items()
        }
        self._open: list[C] = []

    def _start(self, rt: Runtime, args: Sequence[object], kwargs: Mapping[str, object]) -> C:
        raise NotImplementedError

    def _idle(self, outer: Call | None) -> C:
        """Make a call that records nothing, so that code inside sees the pipeline around it."""
        raise NotImplementedError

    def _named(self, name: str, function: str) -> Scope[C]:
        """Make the scope that records the executions of a decorated function."""
        raise NotImplementedError

    def _inputs_of_block(self) -> Sequence[object]:
        return ()

    def begin(self, args: Sequence[object], kwargs: Mapping[str, object]) -> C | None:
        """Open a call with these inputs, which is current until its `finish`. None where nothing is recorded."""
        rt = live()
        if rt is None:
            return None
        try:
            return self._start(rt, args, kwargs)
        except Exception as exc:  # noqa: BLE001 - telemetry never harms
            rt.on_error("start", exc)
            return None

    def __enter__(self) -> C:
        call = self.begin(self._inputs_of_block(), _NOTHING)
        if call is None:
            outer = innermost()
            call = self._idle(outer)
            call.enter(outer)
        self._open.append(call)
        return call

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        here = current.get()
        if here is not None and here.scope is not self:
            here = None
        call = self._take(here)
        if call is not None:
            call.finish(exc)
        if here is not None and here is not call:
            here.leave()

    def _take(self, here: Call | None) -> C | None:
        """Take from the open calls the one that ends: the current one, where it is one of them, else the newest."""
        try:
            if here in self._open:  # nearly always; not where another, left in another context, was taken for it
                self._open.remove(here)
                return here
            return self._open.pop()  # left in another context than entered: by a fixture, a callback
        except (ValueError, IndexError):  # another thread was faster
            return None

    async def __aenter__(self) -> C:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, tb)

    def __call__(self, fn: F) -> F:
        """Decorate a function: sync, async, a generator or async generator function, a static or class method."""
        target: Any = fn
        if isinstance(target, (staticmethod, classmethod)):
            return cast(F, type(target)(self(target.__func__)))
        if not callable(target) or isinstance(target, type):
            raise TypeError(f"node and pipeline decorate functions, not {target!r}")
        return cast(F, wrap(fn, self._named(*_names_of(fn)).begin))


def _names_of(fn: Callable[..., Any]) -> tuple[str, str]:
    """Return a function's short name, and the value of `code.function.name`: module and qualified name."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    owner: Any = fn if hasattr(fn, "__qualname__") else type(fn)
    module = getattr(owner, "__module__", None)  # methods of built-in types have none
    return owner.__name__, clean_name(f"{module}.{owner.__qualname__}" if module else owner.__qualname__)


def _attribute(cleaner: Cleaner, key: str, value: object) -> Any:
    clean = cleaner.attribute(key, value)
    return tuple(clean) if isinstance(clean, list) else clean


def _values(inputs: Any) -> tuple[object, ...]:
    """Return the inputs given, or what was given in their place as the one input."""
    if type(inputs) is tuple:
        return inputs
    try:
        return () if inputs is None else tuple(inputs)
    except Exception:  # noqa: BLE001 - telemetry never harms
        return (inputs,)


def _parent_of(span: Span) -> int:
    """Return the id of the parent span, 0 for none: the SDK's spans tell, the API has no way to ask."""
    parent = getattr(span, "parent", None)
    return 0 if parent is None else parent.span_id


class NodeScope(Scope[Node]):
    """What `node(...)` returns; see there."""

    __slots__ = ("_depends_on", "_inputs", "_label", "_span_name", "engine", "layer")

    def __init__(
        self,
        name: str = "",
        *,
        layer: str = "",
        engine: str = "",
        inputs: Iterable[object] = (),
        depends_on: Iterable[str] = (),
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, attributes)
        self.layer = clean_name(layer) if layer else ""
        self.engine = clean_name(engine) if engine else ""
        self._inputs = _values(inputs)
        declared = (depends_on,) if isinstance(depends_on, str) else _values(depends_on)
        self._depends_on = tuple(dict.fromkeys(map(clean_name, declared))) if declared else ()
        self._label = self.name or "node"
        self._span_name = names.NODE_SPAN.format(name=self._label)
        own = ((names.NODE_NAME, self._label), (names.NODE_LAYER, self.layer), (names.NODE_ENGINE, self.engine))
        self._attributes.update((key, value) for key, value in own if value)

    def _named(self, name: str, function: str) -> NodeScope:
        return NodeScope(
            self.name or name,
            layer=self.layer,
            engine=self.engine,
            depends_on=self._depends_on,
            attributes={**self._attributes, names.CODE_FUNCTION_NAME: function},
        )

    def _idle(self, outer: Call | None) -> Node:
        run = None if outer is None else outer.run
        return Node(self._label, self.layer, self.engine, self, run, None, trace.INVALID_SPAN)

    def _inputs_of_block(self) -> Sequence[object]:
        return self._inputs

    def _start(self, rt: Runtime, args: Sequence[object], kwargs: Mapping[str, object]) -> Node:
        outer, context = innermost(), None
        if outer is None and rt.inherited is not None:
            outer, context = inherited(rt.inherited)
        run = None if outer is None else outer.run
        rows_in, edges = inputs_of(rt, args, kwargs) if args or kwargs else (None, ())
        if self._depends_on:
            edges = self._with_declared(run, edges)
        thread = threading.current_thread()
        attributes = {**self._attributes, names.THREAD_ID: thread.ident, names.THREAD_NAME: thread.name}
        if run is not None:
            attributes.update(run.node_attributes)
        links = [Link(span_context(edge)) for edge in edges if edge.span_id] if edges else None
        began, now = rt.tick(), rt.clock()
        span = rt.tracer.start_span(self._span_name, context, attributes=attributes, links=links, start_time=now)
        ids = span.get_span_context()
        started = NodeStarted(
            "" if run is None else run.name, "" if run is None else run.run_id, self._label, self.layer, self.engine,
            ids.trace_id, ids.span_id, _parent_of(span), ids.trace_flags, now, rows_in, edges,
        )  # fmt: skip
        node = Node(self._label, self.layer, self.engine, self, run, rt, span)
        node.begin(started, began, outer, context)
        return node

    def _with_declared(self, run: Run | None, edges: tuple[Edge, ...]) -> tuple[Edge, ...]:
        """Add the nodes named in `depends_on`, each with the span of its last execution in this run, if any."""
        known = {edge.node for edge in edges}
        missing = [node for node in self._depends_on if node not in known]
        return (*edges, *(Edge(node, 0, 0) if run is None else run.last(node) for node in missing))


class PipelineScope(Scope[Run]):
    """What `pipeline(...)` returns; see there."""

    __slots__ = ()

    def __init__(self, name: str = "", *, attributes: Mapping[str, Any] | None = None) -> None:
        super().__init__(name, attributes)

    def _named(self, name: str, function: str) -> PipelineScope:
        return PipelineScope(self.name or name, attributes={**self._attributes, names.CODE_FUNCTION_NAME: function})

    def _idle(self, outer: Call | None) -> Run:
        call = Run(self.name or "pipeline", "", self, None, trace.INVALID_SPAN)
        call.run = None if outer is None else outer.run
        return call

    def _start(self, rt: Runtime, args: Sequence[object], kwargs: Mapping[str, object]) -> Run:
        outer, context = innermost(), None
        if outer is None and rt.inherited is not None:
            outer, context = inherited(rt.inherited)
        run_id, name = rt.new_run_id(), self.name or "pipeline"
        given = {key: _attribute(rt.cleaner, key, value) for key, value in self._attributes.items()}
        began, now = rt.tick(), rt.clock()
        span = rt.tracer.start_span(
            names.PIPELINE_SPAN.format(name=name),
            context,
            attributes={**given, names.PIPELINE_NAME: name, names.PIPELINE_RUN_ID: run_id},
            start_time=now,
        )
        ids = span.get_span_context()
        started = RunStarted(
            name, run_id, ids.trace_id, ids.span_id, _parent_of(span), ids.trace_flags, now, given or None
        )
        run = Run(name, run_id, self, rt, span)
        run.begin(started, began, outer, context)
        return run

    def skip(self, node: str, reason: str, layer: str, engine: str) -> None:
        """Open and close a node of the current run as skipped."""
        with NodeScope(node, layer=layer, engine=engine) as call:
            call.skip(reason)


@overload
def node(name: F) -> F: ...
@overload
def node(
    name: str = "",
    *,
    layer: str = "",
    engine: str = "",
    inputs: Iterable[object] = (),
    depends_on: Iterable[str] = (),
    attributes: Mapping[str, Any] | None = None,
) -> NodeScope: ...
def node(name: Any = "", **options: Any) -> Any:
    """Record a node of a DAG: decorate its function, or open it around a block.

    As decorator (`@node`, `@node(layer="ingest")`) the name is the function's `__name__` unless given; arguments and
    result are measured and tracked. As context manager (`with node("join", inputs=[a, b]) as n`, also `async with`) it
    gives a `Node`. `layer` and `engine` are free text; `depends_on` names nodes whose values cannot be tracked;
    `attributes` go on every span.

    Exceptions of the user's code pass untouched; nothing of ours raises, save TypeError at decoration of what is no
    function. One scope may be used from many threads and tasks at once, and recursively. Without `configure()` and
    without a host's providers a call costs under a microsecond.
    """
    if callable(name) or isinstance(name, classmethod):
        return NodeScope(**options)(name)
    return NodeScope(name, **options)


@overload
def pipeline(name: F) -> F: ...
@overload
def pipeline(name: str = "", *, attributes: Mapping[str, Any] | None = None) -> PipelineScope: ...
def pipeline(name: Any = "", **options: Any) -> Any:
    """Record a run of a pipeline: one trace, one run id. Decorator and context manager like `node`; gives a `Run`.

    A pipeline inside another shares its trace, is a child of the current span, and has its own run id. Raises nothing
    but what the user's code raises.
    """
    if callable(name) or isinstance(name, classmethod):
        return PipelineScope(**options)(name)
    return PipelineScope(name, **options)
