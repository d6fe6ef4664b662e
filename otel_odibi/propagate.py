"""Context that travels: a node's work handed to another thread or process stays in its trace, run and node.

Threads get a copy of the context, processes a parcel: a line of JSON with W3C headers, run and node, and one with the
settings, from which a process where nothing is configured configures itself.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import json
import os
import types
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

import orjson
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from otel_odibi import names
from otel_odibi.calls import Call, Node, Run, current, inherited, innermost
from otel_odibi.clean import clean_name, to_json
from otel_odibi.runtime import Inherited, Runtime, live
from otel_odibi.scope import PipelineScope

F = TypeVar("F", bound=Callable[..., Any])


class Carry:
    """Bind a function to the context of here and now: trace, run, node, baggage, and in threads every context variable.

    For threads, process pools (spawned or forked), `multiprocessing`, Dask, Spark: `pool.submit(carry(work), item)`,
    `pool.map(carry(work), items)`, `Process(target=carry(work))`. What it gives can be pickled where `fn` can. Each
    call runs in a copy of the context taken when `carry` was called, so one carried function may run in many threads
    at once, and what it changes in its context stays there. A worker process where nothing is configured configures
    itself from this one's settings. Coroutine functions need none (tasks take their context along) but may be carried
    to a loop in another thread. Raises nothing of its own; exceptions of `fn` pass untouched.
    """

    def __call__(self, fn: F) -> F:
        """Return `fn` bound to the context of here and now."""
        context = contextvars.copy_context()
        if inspect.iscoroutinefunction(fn):

            @functools.wraps(fn)
            async def carried_coroutine(*args: Any, **kwargs: Any) -> Any:
                return await _in_context(context.copy(), fn(*args, **kwargs))

            return carried_coroutine  # type: ignore[return-value]
        return Carried(fn, context)  # type: ignore[return-value]

    def environ(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment for a subprocess: `base` (by default `os.environ`), and the context of here and now.

        That is TRACEPARENT, TRACESTATE and BAGGAGE, with the run among the baggage, or what the global propagators
        write; a process where `configure()` is called begins its nodes and pipelines in there. Where nothing is
        current here, `base` stays as it is. Never raises.
        Source: OpenTelemetry specification, Environment Variables as Context Propagation Carriers.
        """
        variables = dict(os.environ if base is None else base)
        with suppress(Exception):
            from opentelemetry import baggage, propagate

            call, context = _here()
            if call is not None and call.run is not None and call.run.run_id:
                context = baggage.set_baggage(names.PIPELINE_NAME, call.run.name, context)
                context = baggage.set_baggage(names.PIPELINE_RUN_ID, call.run.run_id, context)
            if context:
                for field in propagate.get_global_textmap().fields:
                    variables.pop(_variable(field), None)
                variables.update({_variable(field): value for field, value in _headers(context).items()})
        return variables


carry: Final = Carry()


class Carried:
    """A function bound to a context, or in the process it was sent to, to a parcel."""

    __wrapped__: Callable[..., Any]

    def __init__(self, fn: Callable[..., Any], context: contextvars.Context | None, parcel: bytes = b"") -> None:
        functools.update_wrapper(self, fn)
        self._context, self._parcel = context, parcel

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self._context is not None:
            return self._context.copy().run(self.__wrapped__, *args, **kwargs)
        tokens = _enter(self._parcel)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            _leave(tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._context is not None and not self._parcel:
            self._parcel = self._context.copy().run(parcel)
        return Carried, (self.__wrapped__, None, self._parcel)

    def __repr__(self) -> str:
        return f"carry({self.__wrapped__!r})"


@types.coroutine
def _in_context(context: contextvars.Context, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run every step of `coroutine` in `context`, and leave the context of the task that awaits it alone."""
    step: Callable[[Any], Any] = coroutine.send
    sent: Any = None
    try:
        while True:
            waited = context.run(step, sent)
            try:
                step, sent = coroutine.send, (yield waited)
            except BaseException as exc:  # noqa: BLE001 - thrown in above: in here it would become a `__context__`
                step, sent = coroutine.throw, exc
    except StopIteration as stop:
        return stop.value
    finally:
        sent = None  # an exception and the frame it passed through would keep each other alive


_settings: tuple[Runtime | None, bytes] = (None, b"")
_last: tuple[Call | None, Context | None, Runtime | None, bytes] = (None, None, None, b"")


def for_workers(runtime: Runtime, settings: Mapping[str, Any]) -> None:
    """Send these settings along from now on, as long as `runtime` is live."""
    global _settings
    _settings = (runtime, json.dumps(settings).encode())  # which, unlike orjson, knows of paths that are no UTF-8


def parcel() -> bytes:
    """Return the context of here and now, to be sent to a worker that makes it current by `unpacked`.

    One line tells of trace, baggage, run and node, and is a parcel by itself; one of the settings that this process was
    configured with, without secrets. Never raises. Thread-safe.
    """
    global _last
    (call, context), rt = _here(), live()
    known = _last
    if known[0] is call and known[1] is context and known[2] is rt and known[3]:  # one context, a thousand tasks
        return known[3]
    of_run = of_node = None
    if call is not None and call.run is not None and call.run.run_id:
        ids = call.run.span.get_span_context()
        of_run = (call.run.name, call.run.run_id, f"{ids.trace_id:x}", f"{ids.span_id:x}", int(ids.trace_flags))
    if isinstance(call, Node):
        of_node = (call.name, call.layer, call.engine)
    settings = _settings[1] if rt is not None and rt is _settings[0] else b""
    packed = to_json((_headers(context), of_run, of_node)) + b"\n" + settings
    _last = (call, context, rt, packed)
    return packed


def _here() -> tuple[Call | None, Context]:
    call, context, rt = innermost(), None, live()
    if call is None and rt is not None and rt.inherited is not None:
        call, context = inherited(rt.inherited)
    return call, otel_context.get_current() if context is None else context


def _headers(context: Context) -> dict[str, str]:
    headers: dict[str, str] = {}
    with suppress(Exception):  # a propagator that is not installed, or somebody's own
        from opentelemetry import propagate

        propagate.inject(headers, context)
    return headers


_configure: Callable[[bytes], None] = lambda settings: None  # noqa: E731


def on_worker(configure: Callable[[bytes], None]) -> None:
    """Register what configures a worker from its parent's settings, unless it has been configured; it never raises."""
    global _configure
    _configure = configure


@contextmanager
def unpacked(parcel: bytes) -> Iterator[None]:
    """Make the context in a parcel current for a block, in place of whatever is current here.

    A process where nothing is configured is configured first. Nodes in the block are children of the span that was
    current where the parcel was made, and belong to its run: `current_pipeline()` tells its name and id, and its
    `skip` works, but counts and attributes of a run are not sent back. Never raises of its own. Thread-safe.
    """
    tokens = _enter(parcel)
    try:
        yield
    finally:
        _leave(tokens)


def _enter(parcel: bytes) -> tuple[Any, Any] | None:
    try:
        rt = live()
        if rt is None and (settings := parcel.partition(b"\n")[2]):
            _configure(settings)
            rt = live()
        call, context = _arrived(parcel, rt)
    except Exception:  # noqa: BLE001 - of another release: the work is done all the same
        return None
    return current.set(call), otel_context.attach(context)


def _leave(tokens: tuple[Any, Any] | None) -> None:
    if tokens is not None:
        otel_context.detach(tokens[1])
        with suppress(ValueError):  # left in another context than entered, as a callback may be
            current.reset(tokens[0])


@functools.lru_cache(maxsize=256)
def _arrived(parcel: bytes, rt: Runtime | None) -> Inherited:
    from opentelemetry import propagate

    headers, of_run, of_node = orjson.loads(parcel.partition(b"\n")[0])
    context = propagate.extract(headers, Context())
    run = None if of_run is None else _remote_run(*of_run, rt)
    if of_node is None:
        return run, context
    name, layer, engine = of_node
    return Node(name, layer, engine, None, run, rt, trace.get_current_span(context)), context


@functools.lru_cache(maxsize=256)
def _remote_run(name: str, run_id: str, trace_id: str, span_id: str, flags: int, rt: Runtime | None) -> Run:
    """Return the one handle that all of a run's work in this process shares, so that it knows its earlier nodes."""
    context = SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(flags))
    return Run(name, run_id, PipelineScope(name), rt, NonRecordingSpan(context))


def from_environment(environ: Mapping[str, str], rt: Runtime) -> Inherited | None:
    """Return the context that this process was started in, None where the environment tells of none. Never raises."""
    try:
        from opentelemetry import baggage, propagate

        found = {field: environ.get(_variable(field), "") for field in propagate.get_global_textmap().fields}
        context = propagate.extract({field: value for field, value in found.items() if value}, Context())
        name, run_id = (baggage.get_baggage(key, context) for key in (names.PIPELINE_NAME, names.PIPELINE_RUN_ID))
        for key in (names.PIPELINE_NAME, names.PIPELINE_RUN_ID) if name or run_id else ():
            context = baggage.remove_baggage(key, context)
    except Exception:  # noqa: BLE001 - whoever started this process may have written anything
        return None
    span, run = trace.get_current_span(context), None
    if name and run_id and span.get_span_context().is_valid:
        clean = clean_name(str(name))
        run = Run(clean, clean_name(str(run_id)), PipelineScope(clean), rt, span)
    return (run, context) if context else None


def _variable(field: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in field).upper()
