"""Every kind of function, ended in every way: outcome, status, error, duration, log lines, metrics, and the user's own
exception, untouched."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import inspect
import os
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import StatusCode

import otel_odibi as oo
from otel_odibi import calls
from otel_odibi.testing import Capture

Body = Callable[[], Any]


def drive(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never waits, without an event loop in between."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


# --- every kind, every ending ----------------------------------------------------------------------------------------


def as_function(body: Body) -> Any:
    @oo.node("n")
    def fn() -> Any:
        return body()

    return fn()


def as_block(body: Body) -> Any:
    with oo.node("n"):
        return body()


def as_coroutine(body: Body) -> Any:
    @oo.node("n")
    async def fn() -> Any:
        return body()

    return drive(fn())


def as_async_block(body: Body) -> Any:
    async def main() -> Any:
        async with oo.node("n"):
            return body()

    return drive(main())


def as_function_with_coroutine(body: Body) -> Any:
    async def later() -> Any:
        return body()

    @oo.node("n")
    def fn() -> Coroutine[Any, Any, Any]:
        return later()

    return drive(fn())


def as_generator(body: Body) -> Any:
    @oo.node("n")
    def fn() -> Generator[int, None, Any]:
        yield 1
        return body()

    generator = fn()
    next(generator)
    try:
        next(generator)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it goes on")


def as_async_generator(body: Body) -> Any:
    result: list[Any] = []

    @oo.node("n")
    async def fn() -> AsyncIterator[int]:
        yield 1
        result.append(body())

    async def main() -> Any:
        async for _ in fn():
            pass
        return result[0]

    return drive(main())


def as_partial(body: Body) -> Any:
    return oo.node("n")(functools.partial(lambda b: b(), body))()


def as_callable_object(body: Body) -> Any:
    class Work:
        async def __call__(self) -> Any:
            return body()

    return drive(oo.node("n")(Work())())


KINDS: list[Callable[[Body], Any]] = [
    as_function, as_block, as_coroutine, as_async_block, as_function_with_coroutine, as_generator, as_async_generator,
    as_partial, as_callable_object,
]  # fmt: skip


class Ending(NamedTuple):
    """How a body ends, and what that must be recorded as."""

    exc: BaseException | None
    outcome: str
    error_type: str | None = None
    status: StatusCode = StatusCode.UNSET
    log: tuple[str, str, str] = ("node_complete", "info", "success")


FAILED = ("node_failed", "error", "failed")
CANCELLED = ("node_complete", "info", "cancelled")
ENDINGS = [
    Ending(None, "success"),
    Ending(ValueError("bad"), "failure", "ValueError", StatusCode.ERROR, FAILED),
    Ending(SystemExit(0), "success"),
    Ending(SystemExit(None), "success"),
    Ending(SystemExit(3), "failure", "SystemExit", StatusCode.ERROR, FAILED),
    Ending(SystemExit("why"), "failure", "SystemExit", StatusCode.ERROR, FAILED),
    Ending(KeyboardInterrupt(), "cancelled", "KeyboardInterrupt", StatusCode.UNSET, CANCELLED),
    Ending(asyncio.CancelledError(), "cancelled", "asyncio.exceptions.CancelledError", StatusCode.UNSET, CANCELLED),
]


def check(captured: Capture, ending: Ending, seconds: float = 2.0) -> None:
    """Compare all that was recorded of the node `n` with what its ending asks for."""
    span = captured.node("n")
    assert span.attributes["odibi.node.outcome"] == ending.outcome
    assert span.attributes.get("error.type") == ending.error_type
    assert span.status.status_code is ending.status
    assert span.end_time - span.start_time == round(seconds * 1e9)
    check_exception_event(captured, ending)
    line = captured.logs[-1]
    assert (line["event_type"], line["level"], line["status"]) == ending.log
    assert (line["duration_ms"], line.get("error_type")) == (seconds * 1_000, ending.error_type)
    points = [p for p in captured.metrics if p.name == "odibi.node.duration"]
    assert [(p.attributes, p.count, p.value) for p in points] == [
        ({"node": "n", "outcome": ending.outcome}, 1, seconds)
    ]
    assert captured.metric("odibi.node.active", node="n") == 0
    assert captured.metric("odibi.node.memory.rss", node="n") == 100 * 2**20
    assert calls.current.get() is None
    assert trace.get_current_span() is trace.INVALID_SPAN


def check_exception_event(captured: Capture, ending: Ending) -> None:
    span = captured.node("n")
    if ending.outcome != "failure":
        assert span.events == ()
        return
    (event,) = span.events
    assert event.name == "exception"
    assert event.timestamp == span.end_time
    assert event.attributes["exception.type"] == ending.error_type
    assert event.attributes["exception.message"] == span.status.description == str(ending.exc)
    assert "in body" in event.attributes["exception.stacktrace"]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: repr(ending.exc))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__[3:])
def test_every_kind_of_node_and_every_ending(
    odibi_capture: Capture, kind: Callable[[Body], Any], ending: Ending
) -> None:
    """The record is right, and the user gets the result or the very exception, with its cause, context, traceback."""
    cause, context, exc = KeyError("cause"), OSError("context"), ending.exc

    def body() -> str:
        assert oo.current_node().name == "n"
        odibi_capture.clock.advance(2)
        try:
            raise context
        except OSError:
            if exc is not None:
                raise exc from cause
        return "result"

    if exc is None:
        assert kind(body) == "result"
    else:
        with pytest.raises(type(exc)) as raised:
            kind(body)
        assert raised.value is exc
        assert (exc.__cause__, exc.__context__, exc.__suppress_context__) == (cause, context, True)
        assert raised.traceback[-1].name == "body"
    check(odibi_capture, ending)


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: repr(ending.exc))
def test_every_ending_of_a_pipeline(odibi_capture: Capture, ending: Ending) -> None:
    """A run has the same outcomes as a node; only a success sets the time of the last success."""
    with contextlib.suppress(BaseException), oo.pipeline("p"):
        odibi_capture.clock.advance(1.5)
        if ending.exc is not None:
            raise ending.exc
    span = odibi_capture.pipeline("p")
    assert span.attributes["odibi.pipeline.outcome"] == ending.outcome
    assert (span.attributes.get("error.type"), span.status.status_code) == (ending.error_type, ending.status)
    assert [event.name for event in span.events] == ["exception"] * (ending.outcome == "failure")
    line = odibi_capture.logs[-1]
    assert (line["event_type"], line["status"], line["duration_ms"]) == ("pipeline_complete", ending.log[2], 1_500.0)
    (point,) = [p for p in odibi_capture.metrics if p.name == "odibi.pipeline.duration"]
    assert (point.attributes, point.count, point.value) == ({"pipeline": "p", "outcome": ending.outcome}, 1, 1.5)
    assert odibi_capture.metric("odibi.pipeline.active", pipeline="p") == 0
    succeeded = odibi_capture.metric("odibi.pipeline.last_success.timestamp", pipeline="p")
    assert succeeded == (span.end_time / 1e9 if ending.outcome == "success" else 0)


def test_the_message_and_the_stack_are_redacted(odibi_capture: Capture) -> None:
    """Exceptions quote connection strings; neither span nor log line repeats the secret."""

    @oo.node
    def connect() -> None:
        raise ConnectionError("postgresql://me:hunter2@db failed")

    with pytest.raises(ConnectionError, match="hunter2"):
        connect()
    assert "hunter2" not in odibi_capture.node("connect").to_json()
    assert "hunter2" not in str(odibi_capture.logs)
    assert odibi_capture.logs[-1]["error"] == "postgresql://me:[redacted]@db failed"


class Mute(Exception):
    """An exception that cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Odd(SystemExit):
    """An exit whose code compares like an array does."""

    class Code:
        def __eq__(self, other: object) -> bool:
            raise ValueError("the truth value is ambiguous")

        __hash__ = object.__hash__


@pytest.mark.parametrize("exc", [Mute(), Odd(Odd.Code())], ids=["no str", "odd code"])
def test_exceptions_with_raising_methods(odibi_capture: Capture, exc: BaseException) -> None:
    """What an exception's own methods raise concerns nobody."""

    @oo.node
    def fail() -> None:
        raise exc

    with pytest.raises(type(exc)) as raised:
        fail()
    assert raised.value is exc
    assert odibi_capture.node("fail").attributes["odibi.node.outcome"] == "failure"
    assert odibi_capture.metric("odibi.telemetry.dropped") == 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__[3:])
def test_an_exception_is_not_kept_alive(odibi_capture: Capture, kind: Callable[[Body], Any]) -> None:
    """It goes when the user lets go of it, with all the frames it passed through, and not at a later collection."""

    class Passing(Exception): ...

    def body() -> None:
        raise Passing

    gc.collect()
    gc.disable()
    try:
        try:
            kind(body)
        except Passing as exc:
            watch = weakref.ref(exc)
        assert watch() is None
    finally:
        gc.enable()


def test_an_exception_thrown_into_a_generator_is_not_kept_alive(odibi_capture: Capture) -> None:
    """Nor is one that came from outside."""

    class Passing(Exception): ...

    generator = counting([])
    next(generator)
    gc.collect()
    gc.disable()
    try:
        try:
            generator.throw(Passing())
        except Passing as exc:
            watch = weakref.ref(exc)
        assert watch() is None
    finally:
        gc.enable()


# --- what a decorated function still is ------------------------------------------------------------------------------


def test_the_kind_of_a_function_is_kept() -> None:
    """Frameworks ask what kind of function they were given, and what arguments it takes."""

    async def coroutine(x: int) -> int:
        return x

    def generator(x: int) -> Iterator[int]:
        yield x

    async def async_generator(x: int) -> AsyncIterator[int]:
        yield x

    assert inspect.iscoroutinefunction(oo.node(coroutine))
    assert inspect.isgeneratorfunction(oo.node(generator))
    assert inspect.isasyncgenfunction(oo.node(async_generator))
    for fn in (coroutine, generator, async_generator):
        assert inspect.signature(oo.node(fn)) == inspect.signature(fn)
        assert oo.node(fn).__wrapped__ is fn  # type: ignore[attr-defined]


@pytest.mark.parametrize("live", [True, False])
def test_wrong_arguments(live: bool, request: pytest.FixtureRequest) -> None:
    """The user's TypeError comes through, and no node stays open behind it."""
    captured = request.getfixturevalue("odibi_capture") if live else None

    def generator(x: int) -> Iterator[int]:
        yield x

    async def async_generator(x: int) -> AsyncIterator[int]:
        yield x

    async def coroutine(x: int) -> None: ...

    with pytest.raises(TypeError, match="missing 1 required"):
        oo.node(lambda x: x)()
    with pytest.raises(TypeError, match="missing 1 required"):
        list(oo.node(generator)())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required"):
        drive(oo.node(async_generator)().__anext__())  # type: ignore[call-arg, arg-type]
    with pytest.raises(TypeError, match="missing 1 required"):
        drive(oo.node(coroutine)())  # type: ignore[call-arg]
    assert calls.current.get() is None
    if captured is not None:
        assert [span.attributes["odibi.node.outcome"] for span in captured.spans] == ["failure"] * 4
        assert captured.metric("odibi.node.active") == 0


# --- generators ------------------------------------------------------------------------------------------------------


@oo.node("n")
def counting(log: list[Any]) -> Generator[int, Any, str]:
    """Yield 1, 2, 3; write down what is sent and thrown in, and that it was closed."""
    try:
        for number in (1, 2, 3):
            try:
                log.append((yield number))
            except LookupError as exc:  # noqa: PERF203
                log.append(exc)
    finally:
        log.append("closed")
    return "done"


def test_a_generator_is_timed_from_its_first_item_to_its_end(odibi_capture: Capture) -> None:
    """Its span begins with the first item asked for, and covers what its consumer does in between."""
    generator = counting([])
    odibi_capture.clock.advance(10)
    assert odibi_capture.logs == []
    for _ in generator:
        odibi_capture.clock.advance(1)
    check(odibi_capture, ENDINGS[0], 3.0)
    assert odibi_capture.node("n").attributes["odibi.node.rows.out"] == 3


@pytest.mark.parametrize("live", [True, False])
def test_a_generator_s_protocol(live: bool, request: pytest.FixtureRequest) -> None:
    """`send`, `throw` and the return value work as without the decorator, recorded or not."""
    captured = request.getfixturevalue("odibi_capture") if live else None
    log: list[Any] = []
    generator = counting(log)
    thrown = KeyError("thrown")
    assert generator.send(None) == 1
    assert generator.send("sent") == 2
    assert generator.throw(thrown) == 3
    with pytest.raises(StopIteration) as stopped:
        next(generator)
    assert (stopped.value.value, log) == ("done", ["sent", thrown, None, "closed"])
    assert thrown.__context__ is None
    if captured is not None:
        assert captured.node("n").attributes["odibi.node.outcome"] == "success"


def test_the_value_of_yield_from() -> None:
    """A decorated generator may be delegated to."""
    results: list[str] = []

    def outer() -> Iterator[int]:
        results.append((yield from counting([])))

    assert list(outer()) == [1, 2, 3]
    assert results == ["done"]


def test_an_exception_thrown_into_a_generator(odibi_capture: Capture) -> None:
    """One that it does not handle fails the node, and comes out as it went in."""
    generator = counting([])
    next(generator)
    odibi_capture.clock.advance(2)
    thrown = ValueError("bad")
    with pytest.raises(ValueError, match="bad") as raised:
        generator.throw(thrown)
    assert raised.value is thrown
    assert (thrown.__context__, thrown.__cause__) == (None, None)
    span = odibi_capture.node("n")
    assert (span.attributes["odibi.node.outcome"], span.status.status_code) == ("failure", StatusCode.ERROR)


def test_an_exception_raised_after_one_thrown_in_was_handled(odibi_capture: Capture) -> None:
    """The decorator adds no `__context__` that the plain generator would not have."""

    def strict() -> Generator[int, None, None]:
        with contextlib.suppress(LookupError):
            yield 1
        raise ValueError("later")

    for fn in (strict, oo.node(strict)):
        generator = fn()
        next(generator)
        with pytest.raises(ValueError, match="later") as raised:
            generator.throw(KeyError())
        assert raised.value.__context__ is None


def test_stop_iteration_inside_a_generator(odibi_capture: Capture) -> None:
    """It becomes a RuntimeError, as in any generator (PEP 479), and so a failure."""

    @oo.node("n")
    def wrong() -> Iterator[int]:
        yield next(iter(()))

    with pytest.raises(RuntimeError, match="StopIteration"):
        next(wrong())
    assert odibi_capture.node("n").attributes["odibi.node.outcome"] == "failure"


CLOSED = Ending(GeneratorExit(), "cancelled", "GeneratorExit", StatusCode.UNSET, CANCELLED)


def test_a_generator_closed_early(odibi_capture: Capture) -> None:
    """Closing runs the generator's own clean-up, and the node is cancelled."""
    log: list[Any] = []
    generator = counting(log)
    next(generator)
    odibi_capture.clock.advance(2)
    generator.close()
    assert log == ["closed"]
    check(odibi_capture, CLOSED)
    assert odibi_capture.node("n").attributes["odibi.node.rows.out"] == 1


def test_a_generator_abandoned(odibi_capture: Capture) -> None:
    """So is one that its consumer forgets, when it is collected: wherever that is, it disturbs nothing there."""
    generator = counting([])
    next(generator)
    odibi_capture.clock.advance(2)
    with oo.node("elsewhere") as elsewhere:
        del generator
        gc.collect()
        assert oo.current_node() is elsewhere
        assert trace.get_current_span() is elsewhere.span
    odibi_capture.logs.pop()
    assert odibi_capture.node("n").attributes["odibi.node.outcome"] == "cancelled"
    assert odibi_capture.node("n").attributes["error.type"] == "GeneratorExit"
    assert calls.current.get() is None


def test_a_generator_collected_in_a_cycle(odibi_capture: Capture) -> None:
    """A garbage collection may come at any moment and in any thread; the node ends, nothing else notices."""

    class Cycle:
        def __init__(self) -> None:
            self.itself = self
            self.generator = counting(log)
            next(self.generator)

    log: list[Any] = []
    Cycle()
    odibi_capture.clock.advance(2)
    with oo.pipeline("p") as run, run._lock:
        gc.collect()
        assert calls.current.get() is run
    assert log == ["closed"]
    assert odibi_capture.node("n").attributes["odibi.node.outcome"] == "cancelled"
    assert odibi_capture.node("n").end_time - odibi_capture.node("n").start_time == 2 * 10**9
    assert odibi_capture.metric("odibi.node.active") == 0


def test_a_generator_whose_clean_up_fails_in_a_collection(
    odibi_capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python reports what a finaliser raises and goes on; the node ends once.

    It is a failure, or cancelled where the collection came to the user's own generator first.
    """
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reported.append(report.exc_value))

    @oo.node("n")
    def fragile() -> Iterator[int]:
        try:
            yield 1
        finally:
            raise ValueError("no clean end")

    cycle: list[Any] = [fragile()]
    cycle.append(cycle)
    next(cycle[0])
    del cycle
    gc.collect()
    assert [type(exc) for exc in reported] == [ValueError]
    (span,) = odibi_capture.spans
    assert span.attributes["error.type"] in ("ValueError", "GeneratorExit")
    assert odibi_capture.metric("odibi.node.active") == 0


def test_nodes_inside_a_collection(odibi_capture: Capture) -> None:
    """A finaliser may run nodes and generators of its own."""
    seen: list[list[int]] = []

    class Finalised:
        def __del__(self) -> None:
            seen.append(list(counting([])))

    cycle: list[Any] = [Finalised()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert seen == [[1, 2, 3]]
    assert odibi_capture.node("n").attributes["odibi.node.outcome"] == "success"


STORM = """
import gc, random, sys
import otel_odibi as oo

random.seed(int(sys.argv[1]))
oo.configure(service_name="s", directory="t", span_formats="none", metric_formats="none")

class Cycle: ...

@oo.node
def chunks():
    with oo.node("chunk"):
        yield 1

def forget():
    cycle = Cycle()
    cycle.itself, cycle.generator = cycle, chunks()
    next(cycle.generator)

with oo.pipeline("p") as run:
    for number in range(3_000):
        gc.set_threshold(random.randint(1, 150))
        forget()
        with oo.node(f"node {number % 50}", depends_on=["a", "b"]) as n:
            n.cache(hit=True)
gc.collect()
"""


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5))
def test_a_storm_of_collections(seed: int, tmp_path: Path) -> None:
    """Collections at all moments end abandoned generators: no crash, no deadlock, every node ended once."""
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-c", STORM, str(seed)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=True,
        timeout=120,
    )
    done = (tmp_path / "t/logs/s.jsonl").read_text().count('"event_type":"node_complete"')
    assert done == 3 * 3_000


def test_a_generator_never_begun(odibi_capture: Capture) -> None:
    """It has not run, so there is nothing to tell."""
    generator = counting([])
    del generator
    assert odibi_capture.spans == odibi_capture.logs == []


def test_a_generator_that_returns_when_closed(odibi_capture: Capture) -> None:
    """It is cancelled too; from Python 3.13 on `close()` hands its value over."""

    def patient() -> Generator[int, None, str]:
        try:
            yield 1
        except GeneratorExit:
            odibi_capture.clock.advance(2)
        return "value"

    plain, node = patient(), oo.node("n")(patient)()
    next(plain)
    expected = plain.close()  # type: ignore[func-returns-value]
    odibi_capture.clock.advance(-2)
    next(node)
    assert node.close() == expected  # type: ignore[func-returns-value]
    check(odibi_capture, CLOSED)


def test_a_generator_that_will_not_close(odibi_capture: Capture) -> None:
    """Python's own RuntimeError says so, as without the decorator."""

    @oo.node("n")
    def stubborn() -> Iterator[int]:
        for number in range(2):
            try:
                yield number
            except GeneratorExit:  # noqa: PERF203
                yield 99

    generator = stubborn()
    next(generator)
    with pytest.raises(RuntimeError, match="generator ignored GeneratorExit"):
        generator.close()  # type: ignore[attr-defined]
    assert list(generator) == [1]
    assert odibi_capture.node("n").attributes["odibi.node.outcome"] == "success"


def test_the_consumer_s_context_while_a_generator_waits(odibi_capture: Capture) -> None:
    """Between items the consumer's node, span and variables are current; inside, the generator's."""
    inside: list[str] = []
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")

    @oo.node
    def produce() -> Iterator[int]:
        for number in range(2):
            inside.append(f"{oo.current_node().name} {variable.get()}")
            yield number

    with oo.pipeline("p") as run:
        generator = produce()
        with oo.node("first") as first:
            variable.set("first")
            next(generator)
            assert oo.current_node() is first
            assert trace.get_current_span() is first.span
        with oo.node("second") as second:
            variable.set("second")
            next(generator)
            assert oo.current_node() is second
            assert list(generator) == []
            assert trace.get_current_span() is second.span
        assert calls.current.get() is run
    assert inside == ["produce first", "produce second"]
    assert odibi_capture.node("produce").parent == odibi_capture.node("first").context


def test_spans_opened_inside_a_generator_across_a_yield(odibi_capture: Capture) -> None:
    """A span or node that is open while the generator waits is current again when it goes on, not outside."""
    tracer = odibi_capture.telemetry.tracer_provider.get_tracer("other")

    @oo.node
    def produce() -> Iterator[int]:
        with oo.node("inner") as inner, tracer.start_as_current_span("theirs") as theirs:
            yield 1
            assert oo.current_node() is inner
            assert trace.get_current_span() is theirs
            with oo.node("innermost"):
                yield 2
            yield 3

    for _ in produce():
        assert calls.current.get() is None
        assert otel_context.get_current() == {}
        with oo.node("consumer"):
            pass
    spans = {span.name: span for span in odibi_capture.spans}
    assert spans["node innermost"].parent == spans["theirs"].context
    assert spans["theirs"].parent == spans["node inner"].context
    assert spans["node inner"].parent == spans["node produce"].context
    assert spans["node consumer"].parent is None


def test_generators_interleaved(odibi_capture: Capture) -> None:
    """Each has a span of its own, and neither is the other's parent."""
    with oo.pipeline("p"):
        assert list(zip(counting([]), counting([]), strict=True)) == [(1, 1), (2, 2), (3, 3)]
    first, second, run = odibi_capture.spans
    assert first.parent == second.parent == run.context


def test_a_generator_that_moves_from_thread_to_thread(odibi_capture: Capture) -> None:
    """Its node moves along; no thread keeps it as current."""
    generator = counting([])
    left_over: list[Any] = []

    def step() -> None:
        next(generator, None)
        left_over.append(calls.current.get())

    for _ in range(4):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert left_over == [None] * 4
    check(odibi_capture, ENDINGS[0], 0.0)


def test_tables_from_a_generator_are_counted_by_their_rows(odibi_capture: Capture) -> None:
    """Chunks of a table add up, and each is linked to where it goes."""
    import pyarrow as pa

    @oo.node
    def chunks() -> Iterator[pa.Table]:
        for size in (2, 3):
            yield pa.table({"a": list(range(size))})

    @oo.node
    def use(chunk: pa.Table) -> None: ...

    for chunk in chunks():
        use(chunk)
    span = odibi_capture.node("chunks")
    assert (span.attributes["odibi.node.rows.out"], span.attributes["odibi.node.bytes.out"]) == (5, 40)
    assert span.attributes["odibi.node.columns"] == ("a",)
    assert [link.context.span_id for link in odibi_capture.node("use").links] == [span.context.span_id]


# --- coroutines ------------------------------------------------------------------------------------------------------


def test_a_cancelled_task(odibi_capture: Capture) -> None:
    """Cancellation comes through; the node is cancelled at the moment it was."""

    @oo.node("n")
    async def wait() -> None:
        odibi_capture.clock.advance(2)
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(main())
    check(odibi_capture, ENDINGS[7])


def test_a_timeout_inside_a_node_is_a_failure(odibi_capture: Capture) -> None:
    """What the user sees is a TimeoutError, so that is what is recorded."""

    @oo.node("n")
    async def wait() -> None:
        await asyncio.wait_for(asyncio.Event().wait(), 0)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(wait())
    assert odibi_capture.node("n").attributes["odibi.node.outcome"] == "failure"


def test_a_function_that_returns_a_coroutine_is_timed_to_its_end(odibi_capture: Capture) -> None:
    """It runs under the node, and its caller is not inside the node meanwhile."""
    inside: list[str] = []

    async def work() -> list[int]:
        await asyncio.sleep(0)
        inside.append(oo.current_node().name)
        odibi_capture.clock.advance(2)
        return [1, 2]

    @oo.node("n")
    def start() -> Coroutine[Any, Any, list[int]]:
        return work()

    async def main() -> list[int]:
        coroutine = start()
        assert not oo.current_node()
        return await asyncio.create_task(coroutine)

    assert asyncio.run(main()) == [1, 2]
    assert inside == ["n"]
    check(odibi_capture, ENDINGS[0])
    assert odibi_capture.node("n").attributes["odibi.node.rows.out"] == 2


def test_a_coroutine_that_nobody_runs_to_its_end(odibi_capture: Capture) -> None:
    """A task cancelled before its first step never enters the coroutine; the node that began ends as cancelled."""

    async def work() -> None: ...

    @oo.node("n")
    def start() -> Coroutine[Any, Any, None]:
        return work()

    async def main() -> None:
        task = asyncio.create_task(start())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    gc.collect()
    check(odibi_capture, CLOSED, 0.0)


def test_a_coroutine_that_nobody_awaits(odibi_capture: Capture) -> None:
    """Python warns of it by its own name, and the node ends as cancelled."""

    async def forgotten() -> None: ...

    @oo.node("n")
    def start() -> Coroutine[Any, Any, None]:
        return forgotten()

    with pytest.warns(RuntimeWarning, match="forgotten' was never awaited"):
        start()
    check(odibi_capture, CLOSED, 0.0)


def test_many_tasks_at_once(odibi_capture: Capture) -> None:
    """Each task has its node, and each node the pipeline as its parent."""

    @oo.node
    async def work(number: int) -> int:
        await asyncio.sleep(0)
        with oo.node(f"inner {number}"):
            await asyncio.sleep(0)
        return number

    async def main() -> list[int]:
        async with oo.pipeline("p"):
            return await asyncio.gather(*map(work, range(8)))

    assert asyncio.run(main()) == list(range(8))
    spans = odibi_capture.spans
    outer = {span.context.span_id for span in spans if span.name == "node work"}
    assert len(outer) == 8
    assert {span.parent.span_id for span in spans if span.name.startswith("node inner")} == outer


# --- async generators ------------------------------------------------------------------------------------------------


@oo.node("n")
async def counting_async(log: list[Any]) -> Any:
    """As `counting`, with a wait before each item and during clean-up."""
    try:
        for number in (1, 2, 3):
            await asyncio.sleep(0)
            try:
                log.append((yield number))
            except LookupError as exc:
                log.append(exc)
    finally:
        await asyncio.sleep(0)
        log.append("closed")


@pytest.mark.parametrize("live", [True, False])
def test_an_async_generator_s_protocol(live: bool, request: pytest.FixtureRequest) -> None:
    """`asend` and `athrow` work as without the decorator, recorded or not."""
    captured = request.getfixturevalue("odibi_capture") if live else None
    log: list[Any] = []
    thrown = KeyError("thrown")

    async def main() -> None:
        generator = counting_async(log)
        assert await generator.asend(None) == 1
        assert await generator.asend("sent") == 2
        assert await generator.athrow(thrown) == 3
        with pytest.raises(StopAsyncIteration):
            await generator.__anext__()

    asyncio.run(main())
    assert log == ["sent", thrown, None, "closed"]
    assert thrown.__context__ is None
    if captured is not None:
        check(captured, ENDINGS[0], 0.0)
        assert captured.node("n").attributes["odibi.node.rows.out"] == 3


def test_an_exception_thrown_into_an_async_generator(odibi_capture: Capture) -> None:
    """One that it does not handle comes out as it went in."""
    thrown = ValueError("bad")

    async def main() -> None:
        generator = counting_async([])
        await generator.__anext__()
        with pytest.raises(ValueError, match="bad") as raised:
            await generator.athrow(thrown)
        assert raised.value is thrown

    asyncio.run(main())
    assert (thrown.__context__, thrown.__cause__) == (None, None)
    assert odibi_capture.node("n").attributes["odibi.node.outcome"] == "failure"


def test_an_exception_thrown_into_an_async_generator_is_not_kept_alive(odibi_capture: Capture) -> None:
    """It goes when the user lets go of it."""

    class Passing(Exception): ...

    async def main() -> weakref.ref[Passing]:
        generator = counting_async([])
        await generator.__anext__()
        try:
            await generator.athrow(Passing())
        except Passing as exc:
            return weakref.ref(exc)
        raise AssertionError("it was handled")

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(main())() is None
    finally:
        gc.enable()


def test_an_exception_raised_after_one_thrown_into_an_async_generator(odibi_capture: Capture) -> None:
    """No `__context__` is added here either."""

    async def strict() -> Any:
        with contextlib.suppress(LookupError):
            yield 1
        raise ValueError("later")

    async def main() -> None:
        for fn in (strict, oo.node(strict)):
            generator = fn()
            await generator.__anext__()
            with pytest.raises(ValueError, match="later") as raised:
                await generator.athrow(KeyError())
            assert raised.value.__context__ is None

    asyncio.run(main())


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("how", ["aclose", "forgotten", "forgotten at exit", "held at exit"])
def test_an_async_generator_closed_early(live: bool, how: str, request: pytest.FixtureRequest) -> None:
    """By hand, by the loop when it is forgotten, or at the loop's end: cleaned up as without the decorator.

    Older Pythons' loops never clean up what is forgotten right before their end; that is recorded all the same.
    """
    captured = request.getfixturevalue("odibi_capture") if live else None
    complaints: list[Any] = []
    held: list[Any] = []

    async def main(fn: Callable[[list[Any]], Any], log: list[Any]) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        generator = fn(log)
        await generator.__anext__()
        assert not oo.current_node()
        if how == "aclose":
            await generator.aclose()
        elif how == "held at exit":
            held.append(generator)
        else:
            del generator
            gc.collect()
            for _ in range(5 if how == "forgotten" else 0):
                await asyncio.sleep(0)

    logs: list[list[Any]] = [[], []]
    for fn, log in zip((counting_async, counting_async.__wrapped__), logs, strict=True):
        asyncio.run(main(fn, log))
        gc.collect()
    assert complaints == []
    assert logs[0] == logs[1]
    assert logs[0] == ["closed"] or how == "forgotten at exit"
    if captured is not None:
        error_type = captured.node("n").attributes["error.type"]
        by_loop = how == "forgotten at exit" and error_type != "GeneratorExit"  # newer Pythons cancel the clean-up
        check(captured, ENDINGS[7] if by_loop else CLOSED, 0.0)


def test_a_task_cancelled_inside_an_async_generator(odibi_capture: Capture) -> None:
    """In the middle of making an item, cancellation cancels the node; clean-up runs."""
    log: list[str] = []

    @oo.node("n")
    async def slow() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            log.append("closed")

    async def consume() -> None:
        async for _ in slow():
            odibi_capture.clock.advance(2)

    async def main() -> None:
        task = asyncio.create_task(consume())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert log == ["closed"]
    check(odibi_capture, ENDINGS[7])


def test_the_consumer_s_context_while_an_async_generator_waits(odibi_capture: Capture) -> None:
    """Between items the consumer's node is current, inside the generator's, also with other tasks in between."""

    @oo.node
    async def produce(name: str) -> AsyncIterator[str]:
        with oo.node(f"inner {name}") as inner:
            for _ in range(2):
                await asyncio.sleep(0)
                assert oo.current_node() is inner
                yield name

    async def consume(name: str) -> None:
        async with oo.node(f"consumer {name}") as consumer:
            async for item in produce(name):
                assert item == name
                assert oo.current_node() is consumer
                assert trace.get_current_span() is consumer.span
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(consume("a"), consume("b"))

    asyncio.run(main())
    for name in ("a", "b"):
        produce_span = odibi_capture.node(f"inner {name}").parent
        (span,) = [span for span in odibi_capture.spans if span.context == produce_span]
        assert span.parent == odibi_capture.node(f"consumer {name}").context


def test_unrecorded_async_generators_leave_every_task_s_context_alone() -> None:
    """Without telemetry the decorator changes nothing, whatever tasks do in turn."""

    @oo.node
    async def produce() -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(0)
            yield number

    key = otel_context.create_key("tenant")

    async def consume(tenant: str) -> None:
        token = otel_context.attach(otel_context.set_value(key, tenant))
        async for _ in produce():
            assert otel_context.get_value(key) == tenant
            await asyncio.sleep(0)
            assert otel_context.get_value(key) == tenant
        otel_context.detach(token)

    async def main() -> None:
        await asyncio.gather(*(consume(tenant) for tenant in "abc"))

    asyncio.run(main())


def test_an_async_generator_without_an_event_loop(odibi_capture: Capture) -> None:
    """Driven by hand, as other loops do, it works the same."""

    @oo.node("n")
    async def produce() -> AsyncIterator[int]:
        yield 1
        await pause()
        yield 2

    @types.coroutine
    def pause() -> Generator[str, None, None]:
        yield "waiting"

    generator = produce()
    step = generator.__anext__()
    with pytest.raises(StopIteration):
        step.send(None)  # type: ignore[attr-defined]
    step = generator.__anext__()
    assert step.send(None) == "waiting"  # type: ignore[attr-defined]
    with pytest.raises(StopIteration) as item:
        step.send(None)  # type: ignore[attr-defined]
    assert item.value.value == 2
    with pytest.raises(StopAsyncIteration):
        drive(generator.__anext__())  # type: ignore[arg-type]
    check(odibi_capture, ENDINGS[0], 0.0)
