"""`node` and `pipeline`: names, nesting, edges, reuse of one scope, and what a broken part of telemetry must not do."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from opentelemetry import trace

import otel_odibi as oo
from otel_odibi import calls, facts, lineage, runtime
from otel_odibi.testing import Capture, capture


class Table(list[int]):
    """A list that can be weakly referenced, so that who made it can be remembered."""


def names_of(captured: Capture) -> list[str]:
    return [span.name for span in captured.spans]


def lines(captured: Capture, event_type: str) -> list[dict[str, Any]]:
    return [line for line in captured.logs if line["event_type"] == event_type]


# --- the ways to use a scope -----------------------------------------------------------------------------------------


def test_a_bare_decorator_names_the_node_after_the_function(odibi_capture: Capture) -> None:
    """`@node` alone is enough."""

    @oo.node
    def read() -> int:
        """Read."""
        return 7

    assert read() == 7
    assert (read.__name__, read.__doc__) == ("read", "Read.")
    span = odibi_capture.node("read")
    assert span.attributes["odibi.node.name"] == "read"
    assert span.attributes["code.function.name"] == f"{__name__}.{read.__qualname__}"
    assert "odibi.node.layer" not in span.attributes


def test_options_of_a_decorator(odibi_capture: Capture) -> None:
    """Name, layer, engine and attributes go on the span; layer and engine also into log line and metrics."""

    @oo.node("read flights", layer="ingest", engine="pandas", attributes={"team": "data", "tags": ["a", "b"]})
    def read() -> None: ...

    read()
    span = odibi_capture.node("read flights")
    assert span.kind is trace.SpanKind.INTERNAL
    assert span.instrumentation_scope.name == "otel_odibi"
    wanted = {"odibi.node.layer": "ingest", "odibi.node.engine": "pandas", "team": "data", "tags": ("a", "b")}
    assert wanted.items() <= span.attributes.items()
    (line,) = lines(odibi_capture, "node_complete")
    assert (line["node_name"], line["layer"], line["engine"]) == ("read flights", "ingest", "pandas")
    (point,) = [p for p in odibi_capture.metrics if p.name == "odibi.node.duration"]
    assert point.attributes == {"node": "read flights", "layer": "ingest", "engine": "pandas", "outcome": "success"}


def test_blocks_sync_and_async(odibi_capture: Capture) -> None:
    """The same object opens a block, with `with` and with `async with`."""

    async def main() -> None:
        async with oo.pipeline("p") as run, oo.node("later", layer="l") as n:
            assert (run.name, n.name, n.layer, n.run) == ("p", "later", "l", run)
            assert (oo.current_pipeline(), oo.current_node()) == (run, n)

    with oo.node("now") as n:
        assert n
        assert n.trace_id == f"{n.span.get_span_context().trace_id:032x}"
    asyncio.run(main())
    assert names_of(odibi_capture) == ["node now", "node later", "pipeline p"]


def test_a_decorated_pipeline_is_a_run(odibi_capture: Capture) -> None:
    """`@pipeline` names the run after the function; each call has a run id of its own."""

    @oo.pipeline
    def nightly() -> str:
        return oo.current_pipeline().run_id

    assert [nightly(), nightly()] == ["run-1", "run-2"]
    first, second = odibi_capture.spans
    assert first.name == second.name == "pipeline nightly"
    assert first.context.trace_id != second.context.trace_id
    assert first.attributes["odibi.pipeline.run.id"] == "run-1"
    assert first.attributes["code.function.name"].endswith("nightly")


def test_scopes_without_a_name(odibi_capture: Capture) -> None:
    """A block that nobody named still has one."""
    with oo.pipeline(), oo.node(layer="l"):
        pass
    assert names_of(odibi_capture) == ["node node", "pipeline pipeline"]
    assert odibi_capture.node("node").attributes["odibi.node.name"] == "node"


def test_names_that_no_file_can_hold(odibi_capture: Capture) -> None:
    """A lone surrogate is replaced and a long name cut; a name that is no text is described."""
    for name in ("\ud800", "x" * 2_000, 5):
        with oo.node(name):  # type: ignore[call-overload]
            pass
    surrogate, long, number = (span.attributes["odibi.node.name"] for span in odibi_capture.spans)
    assert (surrogate, number) == ("\ufffd", "5")
    assert long.startswith("x" * 1_024 + "…[cut 976")


def test_methods_static_methods_class_methods(odibi_capture: Capture) -> None:
    """All kinds of methods, with the decorator on either side of `@staticmethod` and `@classmethod`."""

    class Job:
        @oo.node
        def plain(self, x: int) -> tuple[object, int]:
            return self, x

        @oo.node
        @staticmethod
        def outer_static(x: int) -> int:
            return x

        @staticmethod
        @oo.node
        def inner_static(x: int) -> int:
            return x

        @oo.node(layer="l")
        @classmethod
        def outer_class(cls, x: int) -> tuple[object, int]:
            return cls, x

        @oo.node
        @classmethod
        def bare_class(cls, x: int) -> tuple[object, int]:
            return cls, x

        @classmethod
        @oo.node
        def inner_class(cls, x: int) -> tuple[object, int]:
            return cls, x

        @property
        @oo.node
        def size(self) -> int:
            return 3

    job = Job()
    assert job.plain(1) == (job, 1)
    assert (job.outer_static(2), Job.inner_static(3)) == (2, 3)
    assert (job.outer_class(4), Job.bare_class(5), job.inner_class(6)) == ((Job, 4), (Job, 5), (Job, 6))
    assert job.size == 3
    seen = ["plain", "outer_static", "inner_static", "outer_class", "bare_class", "inner_class", "size"]
    assert names_of(odibi_capture) == [f"node {name}" for name in seen]


class Doubler:
    """A callable object."""

    def __call__(self, x: int) -> int:
        return 2 * x


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (functools.partial(max, 3), "max"),
        (Doubler(), "Doubler"),
        (str.upper, "upper"),
        (Doubler().__call__, "__call__"),
    ],
)
def test_what_else_can_be_called(odibi_capture: Capture, fn: Callable[..., Any], name: str) -> None:
    """Partials, callable objects, bound methods and built-ins are named after what they call."""
    argument: Any = "a" if name == "upper" else 5
    assert oo.node(fn)(argument) == fn(argument)
    assert odibi_capture.node(name).attributes["code.function.name"].endswith(name)


@pytest.mark.parametrize("target", [Doubler, 5, None, property(lambda self: 1)])
def test_what_is_no_function_is_refused_at_decoration(target: Any) -> None:
    """A class or a value is a mistake that shows at once, not in the pipeline."""
    with pytest.raises(TypeError, match="decorate functions"):
        oo.node(layer="l")(target)


def test_arguments_for_telemetry_alone_never_fail_a_pipeline(odibi_capture: Capture) -> None:
    """`inputs` and `depends_on` take one value in place of several, and None."""
    with oo.node("a", inputs=5, depends_on=None), oo.node("b", inputs=None, depends_on="a"):  # type: ignore[arg-type]
        pass
    assert odibi_capture.node("b").attributes["odibi.node.depends_on"] == ("a",)


# --- nesting ---------------------------------------------------------------------------------------------------------


def test_recursion_has_a_span_for_each_call(odibi_capture: Capture) -> None:
    """Every call has fresh state: each level is the child of the one around it."""

    @oo.node
    def factorial(n: int) -> int:
        return 1 if n == 0 else n * factorial(n - 1)

    assert factorial(3) == 6
    spans = odibi_capture.spans
    assert len(spans) == 4
    assert [span.parent and span.parent.span_id for span in spans] == [
        *(outer.context.span_id for outer in spans[1:]),
        None,
    ]


def test_recursion_without_end(odibi_capture: Capture) -> None:
    """A RecursionError reaches the user, and nothing stays current behind it."""

    @oo.node
    def deeper() -> None:
        deeper()

    limit = sys.getrecursionlimit()
    with oo.node("outer") as outer:
        sys.setrecursionlimit(len(inspect.stack()) + 100)  # few levels: each formats the whole stack
        with pytest.raises(RecursionError):
            deeper()
        sys.setrecursionlimit(limit)
        assert oo.current_node() is outer
        assert trace.get_current_span() is outer.span
    assert calls.current.get() is None
    assert odibi_capture.node("deeper").attributes["error.type"] == "RecursionError"


def test_a_block_inside_itself(odibi_capture: Capture) -> None:
    """One scope object, entered twice, closes the inner block first."""
    scope = oo.node("again")
    with scope as outer:
        odibi_capture.clock.advance(1)
        with scope as inner:
            assert inner is not outer
            assert oo.current_node() is inner
        assert oo.current_node() is outer
    inner_span, outer_span = odibi_capture.spans
    assert inner_span.parent == outer_span.context
    assert (outer_span.end_time - outer_span.start_time, inner_span.end_time - inner_span.start_time) == (10**9, 0)


def test_a_pipeline_inside_another(odibi_capture: Capture) -> None:
    """It shares the trace, is a child of the current span, has its own run id, and counts its own nodes."""
    with oo.pipeline("outer") as outer, oo.node("step") as step:
        with oo.pipeline("inner") as inner, oo.node("work") as work:
            assert work.run is inner
        assert oo.current_pipeline() is outer
        assert step.run is outer
    inner_span, step_span = odibi_capture.pipeline("inner"), odibi_capture.node("step")
    assert inner_span.parent == step_span.context
    assert len({span.context.trace_id for span in odibi_capture.spans}) == 1
    assert (outer.run_id, inner.run_id) == ("run-1", "run-2")
    assert odibi_capture.node("work").attributes["odibi.pipeline.run.id"] == "run-2"
    assert [line["success_count"] for line in lines(odibi_capture, "pipeline_complete")] == [1, 1]


def test_a_node_outside_any_pipeline(odibi_capture: Capture) -> None:
    """It is recorded without pipeline and run id."""
    with oo.node("alone"):
        assert not oo.current_pipeline()
    assert not any("pipeline" in key for key in odibi_capture.node("alone").attributes)
    assert all("run_id" not in line and "pipeline" not in line for line in odibi_capture.logs)


def test_spans_of_other_libraries_in_between(odibi_capture: Capture) -> None:
    """A node is the child of whatever span is current, and is the parent of what others open inside."""
    tracer = odibi_capture.telemetry.tracer_provider.get_tracer("other")
    with oo.pipeline("p"), tracer.start_as_current_span("theirs"), oo.node("mine"):
        tracer.start_span("inside").end()
    theirs, mine = odibi_capture.span("theirs"), odibi_capture.node("mine")
    assert theirs.parent == odibi_capture.pipeline("p").context
    assert mine.parent == theirs.context
    assert odibi_capture.span("inside").parent == mine.context


def test_start_and_end_lines_know_the_parent(odibi_capture: Capture) -> None:
    """Both lines of a node carry its span, its parent span, its pipeline and run."""
    with oo.pipeline("p"), oo.node("n"):
        odibi_capture.clock.advance(0.25)
    start, end = (line for line in odibi_capture.logs if line.get("node_name") == "n")
    parent = f"{odibi_capture.pipeline('p').context.span_id:016x}"
    for line in (start, end):
        assert (line["pipeline"], line["run_id"], line["parent_span_id"]) == ("p", "run-1", parent)
        assert line["span_id"] == f"{odibi_capture.node('n').context.span_id:016x}"
    assert (start["event_type"], start["status"], end["status"], end["duration_ms"]) == (
        "node_start", "running", "success", 250.0,
    )  # fmt: skip


def test_a_run_with_failed_nodes_inside(odibi_capture: Capture) -> None:
    """A run that copes with a failed node is a success in the metrics and a partial failure in the log."""
    with oo.pipeline("p"):
        with pytest.raises(ValueError, match="bad"), oo.node("broken"):
            raise ValueError("bad")
        with oo.node("fine"):
            pass
    (line,) = lines(odibi_capture, "pipeline_complete")
    assert (line["status"], line["success_count"], line["failed_count"]) == ("partial_failure", 1, 1)
    assert odibi_capture.pipeline("p").attributes["odibi.pipeline.outcome"] == "success"
    assert [p.attributes["outcome"] for p in odibi_capture.metrics if p.name == "odibi.pipeline.duration"] == [
        "success"
    ]
    assert odibi_capture.metric("odibi.pipeline.last_success.timestamp", pipeline="p") > 0


def test_attributes_of_a_pipeline(odibi_capture: Capture) -> None:
    """They go on the span and, as metadata, on the start line, with secrets redacted."""
    with oo.pipeline("p", attributes={"day": "2026-01-01", "api_key": "123"}):
        pass
    (line,) = lines(odibi_capture, "pipeline_start")
    assert line["metadata"] == {"day": "2026-01-01", "api_key": "[redacted]"}
    assert odibi_capture.pipeline("p").attributes["api_key"] == "[redacted]"


def test_secrets_of_one_s_own_in_attributes() -> None:
    """Keys and patterns from the settings count for attributes given at decoration, too."""
    with (
        capture(redact_keys=["patient"]) as captured,
        oo.pipeline("p", attributes={"patient": "Ann"}),
        oo.node("n", attributes={"patient": "Ann"}),
    ):
        pass
    assert "Ann" not in str(captured.logs)
    assert [span.attributes["patient"] for span in captured.spans] == ["[redacted]"] * 2


# --- edges -----------------------------------------------------------------------------------------------------------


def test_edges_from_values(odibi_capture: Capture) -> None:
    """Who produced an argument is found by the argument itself: a link, an attribute, a log field, a metric."""

    @oo.node
    def left() -> Table:
        return Table([1, 2])

    @oo.node
    def right() -> Table:
        return Table([3])

    @oo.node
    def join(a: Table, *, b: Table) -> Table:
        return Table(a + b)

    with oo.pipeline("p"):
        join(left(), b=right())
    span = odibi_capture.node("join")
    wanted = [odibi_capture.node("left").context, odibi_capture.node("right").context]
    assert [(link.context.trace_id, link.context.span_id) for link in span.links] == [
        (context.trace_id, context.span_id) for context in wanted
    ]
    assert span.attributes["odibi.node.depends_on"] == ("left", "right")
    assert (span.attributes["odibi.node.rows.in"], span.attributes["odibi.node.rows.out"]) == (3, 3)
    start, end = (line for line in odibi_capture.logs if line.get("node_name") == "join")
    assert [link["node"] for link in start["links"]] == [link["node"] for link in end["links"]] == ["left", "right"]
    edges = {(p.attributes["source"], p.attributes["target"]) for p in odibi_capture.metrics if "edge" in p.name}
    assert edges == {("left", "join"), ("right", "join")}


def test_inputs_of_a_block(odibi_capture: Capture) -> None:
    """A block has no arguments: `inputs` names them."""

    @oo.node
    def read() -> Table:
        return Table([1, 2, 3])

    with oo.node("use", inputs=[read(), [4]]):
        pass
    span = odibi_capture.node("use")
    assert [link.context.span_id for link in span.links] == [odibi_capture.node("read").context.span_id]
    assert span.attributes["odibi.node.rows.in"] == 4


def test_depends_on_links_to_the_last_execution_in_this_run(odibi_capture: Capture) -> None:
    """A declared edge has a link where the node ran in this run, and is an edge without one where it did not."""
    with oo.pipeline("p"):
        for _ in range(2):
            with oo.node("read"):
                pass
        with oo.node("use", depends_on=["read", "elsewhere", "read"]):
            pass
    _, second, use, _ = odibi_capture.spans
    assert [link.context.span_id for link in use.links] == [second.context.span_id]
    assert use.attributes["odibi.node.depends_on"] == ("read", "elsewhere")
    (line,) = [line for line in lines(odibi_capture, "node_start") if line["node_name"] == "use"]
    assert [(link["node"], "span_id" in link) for link in line["links"]] == [("read", True), ("elsewhere", False)]


def test_depends_on_as_text_and_outside_a_run(odibi_capture: Capture) -> None:
    """One name need not be in a list; outside a run there is nothing to link to."""

    @oo.node(depends_on="read")
    def use() -> None: ...

    use()
    span = odibi_capture.node("use")
    assert (span.attributes["odibi.node.depends_on"], span.links) == (("read",), ())


def test_a_declared_edge_that_the_value_also_tells_is_one_edge(odibi_capture: Capture) -> None:
    """The value knows better than the name."""
    with oo.pipeline("p"):
        with oo.node("read") as read:
            table = Table([1])
            read.output(table)
        with oo.node("use", inputs=[table], depends_on=["read"]):
            pass
    assert len(odibi_capture.node("use").links) == 1


def test_measuring_can_be_turned_off() -> None:
    """With `measure=False` no value is looked at; what is declared still counts."""
    with capture(measure=False) as captured:

        @oo.node
        def read(rows: list[int]) -> list[int]:
            oo.current_node().input(rows)
            return rows

        read([1, 2])
        with oo.node("stated", depends_on=["read"]) as n:
            n.output([1], rows=5)
    assert not any("rows" in key for key in captured.node("read").attributes)
    assert captured.node("stated").attributes["odibi.node.rows.out"] == 5


# --- one scope, many users -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["decorator", "block"])
def test_sixteen_threads_share_one_scope(odibi_capture: Capture, style: str) -> None:
    """Every execution is recorded once, under its own thread's span."""
    scope = oo.node("shared")
    started = threading.Barrier(16)

    def block(outer: Any) -> None:
        with scope as n:
            assert n.span.parent == outer

    function = oo.node("shared")(lambda outer: None)

    def work(number: int) -> None:
        started.wait()
        for _ in range(20):
            with oo.pipeline(f"p{number}") as run:
                (block if style == "block" else function)(run.span.get_span_context())
                assert oo.current_pipeline() is run

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    spans = [span for span in odibi_capture.spans if span.name == "node shared"]
    parents = {span.context.span_id for span in odibi_capture.spans if span.name.startswith("pipeline")}
    assert len(spans) == 320
    assert {span.parent.span_id for span in spans} == parents
    assert odibi_capture.metric("odibi.node.active", node="shared") == 0
    assert scope._open == []


def test_many_tasks_share_one_scope(odibi_capture: Capture) -> None:
    """Tasks that are inside the same scope at once each close their own block."""
    scope = oo.node("shared")

    async def work(turns: int) -> None:
        async with scope as n:
            for _ in range(turns):
                await asyncio.sleep(0)
                assert oo.current_node() is n

    async def main() -> None:
        async with oo.pipeline("p"):
            await asyncio.gather(*(work(turns) for turns in (5, 1, 3)))

    asyncio.run(main())
    assert len([span for span in odibi_capture.spans if span.name == "node shared"]) == 3
    assert {span.parent.span_id for span in odibi_capture.spans if span.parent} == {
        odibi_capture.pipeline("p").context.span_id
    }


def test_a_block_left_in_another_context_than_entered(odibi_capture: Capture) -> None:
    """As a fixture of an async test framework does: the block ends, and nothing is logged or raised."""
    scope = oo.node("fixture")
    contextvars.copy_context().run(scope.__enter__)
    odibi_capture.clock.advance(3)
    assert contextvars.copy_context().run(scope.__exit__, None, None, None) is None
    assert calls.current.get() is None
    span = odibi_capture.node("fixture")
    assert span.end_time - span.start_time == 3 * 10**9


def test_what_runs_after_a_block_was_left_in_another_context(odibi_capture: Capture) -> None:
    """The context it was entered in is as before: what comes next there is no part of what has ended."""
    runs, nodes = oo.pipeline("fixture"), oo.node("fixture")
    for _ in range(2):
        runs.__enter__()
        nodes.__enter__()
        contextvars.Context().run(nodes.__exit__, None, None, None)
        contextvars.Context().run(runs.__exit__, None, None, None)
    assert not oo.current_node()
    with oo.node("next"):
        pass
    assert odibi_capture.node("next").parent is None
    assert "odibi.pipeline.name" not in odibi_capture.node("next").attributes
    assert calls.current.get() is None
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_a_block_left_in_a_thread_while_others_are_inside(odibi_capture: Capture) -> None:
    """Where it cannot be told which block ends, every block still ends once, and nothing is raised."""
    scope = oo.node("shared")
    with scope:
        contextvars.copy_context().run(contextvars.Context().run, scope.__enter__)
        contextvars.Context().run(scope.__exit__, None, None, None)
        contextvars.Context().run(scope.__enter__)
        contextvars.Context().run(scope.__exit__, None, None, None)
        contextvars.Context().run(scope.__exit__, None, None, None)
    scope.__exit__(None, None, None)
    assert len(odibi_capture.spans) == 3
    assert odibi_capture.metric("odibi.node.active", node="shared") == 0


def test_blocks_left_in_the_wrong_order(odibi_capture: Capture) -> None:
    """Each ends as the one it is, and nothing stays current."""
    a, b = oo.node("a"), oo.node("b")
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    b.__exit__(None, None, None)
    assert names_of(odibi_capture) == ["node a", "node b"]
    assert calls.current.get() is None
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_a_block_in_an_undecorated_generator_that_ends_late(odibi_capture: Capture) -> None:
    """It leaves alone what has become current since."""

    def chunks() -> Iterator[int]:
        with oo.node("chunks"):
            yield 1
            yield 2

    with oo.pipeline("first"):
        waiting = chunks()
        next(waiting)
    assert calls.current.get() is None
    with oo.pipeline("second") as second, oo.node("step") as step:
        del waiting
        assert oo.current_node() is step
        assert trace.get_current_span() is step.span
        assert oo.current_pipeline() is second
    assert calls.current.get() is None
    assert odibi_capture.node("chunks").attributes["odibi.node.outcome"] == "cancelled"


# --- off, on, broken -------------------------------------------------------------------------------------------------


def test_functions_decorated_before_are_live_after() -> None:
    """Telemetry may be turned on, off and on again; a function decorated at import follows."""

    @oo.node
    def read() -> int:
        return 1

    assert read() == 1
    for _ in range(2):
        with capture() as captured:
            read()
        assert names_of(captured) == ["node read"]
    assert read() == 1
    assert len(captured.spans) == 1


def test_a_block_entered_before_telemetry_is_turned_on() -> None:
    """It ends as it began, unrecorded, and ends nobody else's block."""
    scope = oo.node("early")
    with scope as early, capture() as captured:
        assert not early
        with scope as live:
            assert live
        with oo.node("inside"):
            pass
    assert names_of(captured) == ["node early", "node inside"]
    assert calls.current.get() is None


def test_turned_off_scopes_are_silent() -> None:
    """`enabled=false` turns scopes off altogether: same results, no record."""
    runtime.activate(None, disabled=True)
    try:
        assert oo.node(lambda: 5)() == 5
        with oo.pipeline("p") as run, oo.node("n") as n:
            assert not run
            assert not n
        assert runtime.live() is None
    finally:
        runtime.activate(None)


class Broken:
    """A tracer that cannot make spans."""

    def start_span(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no spans today")


def run_all_kinds() -> list[Any]:
    """Use a node in every way there is, and return what the user gets."""

    @oo.node
    def function(x: Any) -> Any:
        return x

    @oo.node
    async def coroutine(x: Any) -> Any:
        return x

    @oo.node
    def generator(x: Any) -> Any:
        yield x

    @oo.node
    async def async_generator(x: Any) -> Any:
        yield x

    async def main() -> list[Any]:
        return [await coroutine(3), *[item async for item in async_generator(4)]]

    with oo.pipeline("p") as run, oo.node("block", inputs=[[1]], depends_on="a") as n:
        n.output([1])
        n.input([2])
        n.cache(hit=True)
        n.set(a=1)
        n.event("e")
        with n.attempt():
            pass
        run.skip("skipped")
        return [function(1), *generator(2), *asyncio.run(main())]


def test_a_tracer_that_raises(odibi_capture: Capture) -> None:
    """The pipeline runs as if there were no telemetry, and the trouble is counted."""
    rt = odibi_capture.telemetry.runtime
    rt.tracer = Broken()  # type: ignore[assignment]
    assert run_all_kinds() == [1, 2, 3, 4]
    assert odibi_capture.metric("odibi.telemetry.dropped", reason="start") == 6
    assert calls.current.get() is None


def test_a_node_that_could_not_be_started_leaves_the_rest_alone(odibi_capture: Capture) -> None:
    """Its block stands for nothing, inside a pipeline that goes on."""
    rt = odibi_capture.telemetry.runtime
    working, scope = rt.tracer, oo.node("n")
    with oo.pipeline("p") as run, scope as outer:
        rt.tracer = Broken()  # type: ignore[assignment]
        with scope as inner:
            rt.tracer = working
            assert outer
            assert not inner
            assert oo.current_pipeline() is run
            with oo.node("child") as child:
                assert child.run is run
        assert oo.current_node() is outer
    assert names_of(odibi_capture) == ["node child", "node n", "pipeline p"]


@pytest.mark.parametrize(("name", "reason"), [("inputs", "inputs"), ("measure", "measure"), ("track", "measure")])
def test_lineage_that_raises(odibi_capture: Capture, monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    """The nodes are recorded all the same, without what lineage would have told."""

    def broken(*args: Any) -> Any:
        raise RuntimeError("cannot tell")

    monkeypatch.setattr(lineage, name, broken)
    assert run_all_kinds() == [1, 2, 3, 4]
    assert odibi_capture.metric("odibi.telemetry.dropped", reason=reason) > 0
    done = {span.name: span.attributes.get("odibi.node.outcome") for span in odibi_capture.spans}
    kinds = ["function", "generator", "coroutine", "async_generator", "block"]
    assert [done[f"node {kind}"] for kind in kinds] == ["success"] * 5
    assert odibi_capture.metric("odibi.node.active") == 0


@pytest.mark.parametrize("kind", runtime.FACTS, ids=lambda kind: kind.__name__)
def test_a_listener_that_raises(odibi_capture: Capture, kind: type[facts.Fact]) -> None:
    """Neither the user nor the listeners after it notice; it is counted."""
    heard: list[facts.Fact] = []

    def broken(fact: facts.Fact) -> None:
        raise RuntimeError("not listening")

    odibi_capture.telemetry.subscribe(kind, broken)
    odibi_capture.telemetry.subscribe(kind, heard.append)
    assert run_all_kinds() == [1, 2, 3, 4]
    with oo.node("retried") as n:
        for _ in range(2):
            with n.attempt():
                pass
    oo.MetricsManager().record_node_execution("by hand", 1.0, True)
    oo.MetricsManager().increment(oo.MetricType.RETRY_COUNT, "by hand")
    assert {type(fact) for fact in heard} == {kind}
    assert odibi_capture.metric("odibi.telemetry.dropped", reason="listener") == len(heard) > 0


def test_a_span_processor_that_raises() -> None:
    """The SDK would let it reach the user; here it ends in the count of inner errors."""
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    class Raising(SpanProcessor):
        def on_end(self, span: Any) -> None:
            raise RuntimeError("no end")

    with capture() as captured:
        provider = captured.telemetry.tracer_provider
        assert isinstance(provider, TracerProvider)
        provider.add_span_processor(Raising())
        assert run_all_kinds() == [1, 2, 3, 4]
    assert captured.metric("odibi.telemetry.dropped", reason="finish") == 7
    assert captured.metric("odibi.node.active") == 0
    assert calls.current.get() is None


def test_listeners_run_while_the_span_is_current(odibi_capture: Capture) -> None:
    """So that what they log or measure is correlated; and they may open nodes of their own."""
    seen: list[tuple[int, str]] = []

    def listen(fact: facts.NodeFinished) -> None:
        if fact.start.node == "n":
            with oo.node("inside"):
                pass
            seen.append((trace.get_current_span().get_span_context().span_id, oo.current_node().name))

    odibi_capture.telemetry.subscribe(facts.NodeFinished, listen)
    with oo.node("n") as n:
        pass
    assert seen == [(n.span.get_span_context().span_id, "n")]
    assert odibi_capture.node("inside").parent == odibi_capture.node("n").context
