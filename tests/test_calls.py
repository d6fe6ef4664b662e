"""The handles that scopes give: what a node and a run can be told, and the handles that stand for nothing."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import StatusCode

import otel_odibi as oo
from otel_odibi.calls import MAX_REMEMBERED_NODES, NO_NODE, NO_RUN
from otel_odibi.facts import Edge
from otel_odibi.testing import Capture

SECOND = 10**9


def lines(captured: Capture, event_type: str) -> list[dict[str, Any]]:
    return [line for line in captured.logs if line["event_type"] == event_type]


def numbers(captured: Capture, metric: str) -> dict[str, float]:
    """Return a metric's values by their last attribute."""
    return {str(list(p.attributes.values())[-1]): p.value for p in captured.metrics if p.name == metric}


# --- output and input ------------------------------------------------------------------------------------------------


def test_the_result_of_a_function_is_measured(odibi_capture: Capture) -> None:
    """Rows, bytes and column names, on the span, the log line and in the metrics."""
    pa = pytest.importorskip("pyarrow")

    @oo.node(layer="l")
    def read() -> Any:
        odibi_capture.clock.advance(2)
        return pa.table({"a": [1, 2, 3], "b": [4, 5, 6]})

    read()
    attributes = odibi_capture.node("read").attributes
    assert (attributes["odibi.node.rows.out"], attributes["odibi.node.bytes.out"]) == (3, 48)
    assert attributes["odibi.node.columns"] == ("a", "b")
    (line,) = lines(odibi_capture, "node_complete")
    assert (line["row_count"], line["rows_out"], line["bytes_out"], line["columns"]) == (3, 3, 48, ["a", "b"])
    assert odibi_capture.metric("odibi.node.rows", node="read", direction="out") == 3
    assert odibi_capture.metric("odibi.node.throughput", node="read", layer="l") == 1.5


def test_what_a_node_depends_on_may_be_told(odibi_capture: Capture) -> None:
    """By the edge of another execution, or by name alone; what it knows already is told once."""
    with oo.node("first") as first, oo.node("n") as n:
        n.after([first.edge, Edge("far", 0, 0)])
        n.after([first.edge])
    span = odibi_capture.node("n")
    assert [link.context.span_id for link in span.links] == [odibi_capture.node("first").context.span_id]
    assert span.attributes["odibi.node.depends_on"] == ("first", "far")
    assert NO_NODE.edge is None


def test_outputs_of_a_block_add_up(odibi_capture: Capture) -> None:
    """Each output counts; what cannot be measured is stated, and overrides what can."""
    with oo.node("n") as n:
        n.output([1, 2])
        n.output(rows=10, bytes=80)
        n.output([1, 2, 3], rows=100)
    attributes = odibi_capture.node("n").attributes
    assert (attributes["odibi.node.rows.out"], attributes["odibi.node.bytes.out"]) == (112, 80)


def test_stated_numbers_may_come_from_numpy_or_a_database(odibi_capture: Capture) -> None:
    """A numpy integer is a number like any other; a cursor's row count of -1 means that it does not know."""
    numpy = pytest.importorskip("numpy")
    with oo.node("n") as n:
        n.input(rows=numpy.int64(2))
        n.input(rows=-1)
        n.output(rows=numpy.int64(3))
        n.output([1, 2], rows=-1)
    attributes = odibi_capture.node("n").attributes
    assert (attributes["odibi.node.rows.in"], attributes["odibi.node.rows.out"]) == (2, 5)
    assert type(attributes["odibi.node.rows.out"]) is int
    assert lines(odibi_capture, "node_complete")[0]["rows_out"] == 5


def test_an_output_stated_by_hand_is_not_counted_again_on_return(odibi_capture: Capture) -> None:
    """A function that has said what it made may return that same value, or a path to it."""

    @oo.node
    def make() -> list[int]:
        made = [1, 2, 3]
        oo.current_node().output(made)
        return made

    make()
    assert odibi_capture.node("make").attributes["odibi.node.rows.out"] == 3


def test_inputs_that_are_no_arguments(odibi_capture: Capture) -> None:
    """They add to the arguments' rows, and link to who made them."""

    class Table(list[int]):
        pass

    @oo.node
    def read() -> Table:
        return Table([1, 2, 3])

    @oo.node
    def use(rows: list[int]) -> None:
        table = read()
        oo.current_node().input(table)
        oo.current_node().input(table)
        oo.current_node().input(rows=10)

    with oo.pipeline("p"):
        use([1])
    span = odibi_capture.node("use")
    assert [link.context.span_id for link in span.links] == [odibi_capture.node("read").context.span_id]
    assert span.attributes["odibi.node.rows.in"] == 1 + 3 + 3 + 10
    assert span.attributes["odibi.node.depends_on"] == ("read",)
    assert numbers(odibi_capture, "odibi.node.edge") == {"use": 1}


# --- cache, skip -----------------------------------------------------------------------------------------------------


def test_cache_lookups(odibi_capture: Capture) -> None:
    """Hit and miss are log lines, metrics, and the span's last word; the key is in the log line alone."""
    with oo.node("n") as n:
        n.cache(hit=False, key="3fa9")
        n.cache(hit=True, key=("a", 1))
    assert odibi_capture.node("n").attributes["odibi.node.cache.hit"] is True
    (miss,), (hit,) = lines(odibi_capture, "cache_miss"), lines(odibi_capture, "cache_hit")
    assert (miss["cache_hit"], miss["cache_key"], hit["cache_hit"], hit["cache_key"]) == (
        False,
        "3fa9",
        True,
        "('a', 1)",
    )
    assert lines(odibi_capture, "node_complete")[0]["cache_hit"] is True
    assert numbers(odibi_capture, "odibi.node.cache.lookups") == {"hit": 1, "miss": 1}


def test_a_node_that_skips_itself(odibi_capture: Capture) -> None:
    """Its outcome is `skipped`, with the reason, redacted, and without a duration in the metrics."""
    with oo.pipeline("p"), oo.node("n") as n:
        odibi_capture.clock.advance(1)
        n.skip("nothing new at sftp://me:hunter2@host")
    attributes = odibi_capture.node("n").attributes
    assert attributes["odibi.node.outcome"] == "skipped"
    assert attributes["odibi.node.skip.reason"] == "nothing new at sftp://me:[redacted]@host"
    (line,) = lines(odibi_capture, "node_complete")
    assert (line["status"], line["message"]) == ("skipped", "node n was skipped")
    assert line["metadata"] == {"odibi.node.skip.reason": "nothing new at sftp://me:[redacted]@host"}
    assert not [p for p in odibi_capture.metrics if p.name == "odibi.node.duration"]
    (run,) = lines(odibi_capture, "pipeline_complete")
    assert (run["success_count"], run["failed_count"], run["status"]) == (0, 0, "success")


def test_a_node_that_skips_itself_and_then_fails(odibi_capture: Capture) -> None:
    """A failure is a failure."""
    with contextlib.suppress(ValueError), oo.node("n") as n:
        n.skip("nothing new")
        raise ValueError
    attributes = odibi_capture.node("n").attributes
    assert attributes["odibi.node.outcome"] == "failure"
    assert "odibi.node.skip.reason" not in attributes


def test_work_that_returns_its_failure(odibi_capture: Capture) -> None:
    """A run, a node, or an attempt ends as if what it was told of had been raised, whatever is raised besides."""
    bad = ValueError("bad")
    with oo.pipeline("p") as run:
        with oo.node("n") as n:
            for number in (1, 2):
                with n.attempt() as attempt:
                    attempt.fail(bad if number == 1 else None)
            n.skip("nothing new")
            n.fail(bad)
        with contextlib.suppress(LookupError), oo.node("wrapped") as wrapped:
            wrapped.fail(bad)
            raise LookupError("bad input")
        run.fail(bad)
    spans = [odibi_capture.span(name) for name in ("pipeline p", "node n", "node wrapped", "attempt 1")]
    assert [span.attributes["error.type"] for span in spans] == 4 * ["ValueError"]
    assert {span.status.status_code for span in spans} == {StatusCode.ERROR}
    assert odibi_capture.span("attempt 2").attributes["odibi.node.outcome"] == "success"
    assert [line["status"] for line in odibi_capture.logs[-1:]] == ["failed"]


def test_a_failure_that_is_taken_back_or_none(odibi_capture: Capture) -> None:
    """It ends as it would have; what is no exception is a mistake of the caller's, and counted."""
    with oo.node("n") as n:
        n.fail(ValueError("bad"))
        n.fail(None)
        n.fail("bad")  # type: ignore[arg-type]
    assert odibi_capture.node("n").attributes["odibi.node.outcome"] == "success"
    assert odibi_capture.metric("odibi.telemetry.dropped") == 1


def test_a_run_reports_a_node_that_was_not_run(odibi_capture: Capture) -> None:
    """`run.skip` makes the node's span and lines under the run, and nothing of it stays current."""
    with oo.pipeline("p") as run, oo.node("decide") as decide:
        run.skip("publish", "nothing new", layer="out", engine="pandas")
        assert oo.current_node() is decide
        assert trace.get_current_span() is decide.span
    span = odibi_capture.node("publish")
    assert span.parent == odibi_capture.pipeline("p").context
    wanted = {
        "odibi.node.outcome": "skipped", "odibi.node.skip.reason": "nothing new", "odibi.node.layer": "out",
        "odibi.node.engine": "pandas", "odibi.pipeline.run.id": "run-1",
    }  # fmt: skip
    assert wanted.items() <= span.attributes.items()
    assert [line["status"] for line in odibi_capture.logs if line.get("node_name") == "publish"] == [
        "running",
        "skipped",
    ]


def test_a_run_skips_from_another_thread(odibi_capture: Capture) -> None:
    """A run's handle may be handed to any thread."""
    with oo.pipeline("p") as run:
        thread = threading.Thread(target=run.skip, args=("publish",))
        thread.start()
        thread.join()
    assert odibi_capture.node("publish").parent == odibi_capture.pipeline("p").context


# --- attempts --------------------------------------------------------------------------------------------------------


def test_one_attempt_that_succeeds_leaves_no_span(odibi_capture: Capture) -> None:
    """Retry code around a node that needs no retry costs nothing and shows nothing."""
    with oo.node("n") as n, n.attempt() as attempt:
        assert attempt.number == 1
    (span,) = odibi_capture.spans
    assert span.attributes["odibi.node.attempt"] == 1
    assert numbers(odibi_capture, "odibi.node.retries") == {}
    assert [line["event_type"] for line in odibi_capture.logs] == ["node_start", "node_complete"]


def test_attempts_of_a_retried_node(odibi_capture: Capture) -> None:
    """From the first failure on, each attempt is a child span with its own times; the first one's comes afterwards."""
    failures = [ConnectionError("token=abc gone"), TimeoutError("slow"), None]
    with oo.pipeline("p"), oo.node("n") as n:
        odibi_capture.clock.advance(1)
        for failure in failures:
            with contextlib.suppress(OSError), n.attempt():
                odibi_capture.clock.advance(2)
                if failure is not None:
                    raise failure
            odibi_capture.clock.advance(4)
    first, second, third, node, _ = odibi_capture.spans
    assert [span.name for span in (first, second, third)] == ["attempt 1", "attempt 2", "attempt 3"]
    assert all(span.parent == node.context for span in (first, second, third))
    since = [
        ((s.start_time - node.start_time) // SECOND, (s.end_time - node.start_time) // SECOND)
        for s in (first, second, third)
    ]
    assert since == [(1, 3), (7, 9), (13, 15)]
    assert [span.attributes["odibi.node.outcome"] for span in (first, second, third)] == [
        "failure",
        "failure",
        "success",
    ]
    assert [span.attributes["odibi.node.attempt"] for span in (first, second, third, node)] == [1, 2, 3, 3]
    assert [span.status.status_code for span in (first, third)] == [StatusCode.ERROR, StatusCode.UNSET]
    assert first.attributes["error.type"] == "ConnectionError"
    assert [event.attributes["exception.message"] for event in first.events] == ["token=[redacted] gone"]
    assert node.attributes["odibi.node.outcome"] == "success"


def test_retries_are_counted_and_explained(odibi_capture: Capture) -> None:
    """Each attempt after the first is one retry in the metrics, and a warning that says why."""
    with oo.node("n") as n:
        for number in range(3):
            with contextlib.suppress(ValueError), n.attempt():
                if number < 2:
                    raise ValueError(f"bad {number}")
    assert odibi_capture.metric("odibi.node.retries", node="n") == 2
    warnings = [line for line in odibi_capture.logs if line["level"] == "warning"]
    assert [(line["attempt"], line["error"], line["error_type"]) for line in warnings] == [
        (2, "bad 0", "ValueError"),
        (3, "bad 1", "ValueError"),
    ]
    assert odibi_capture.logs[-1]["attempt"] == 3


def test_work_inside_an_attempt(odibi_capture: Capture) -> None:
    """Nodes inside a retry are children of its attempt, from the second attempt on."""
    with oo.node("n") as n:
        for number in range(2):
            with contextlib.suppress(ValueError), n.attempt(), oo.node(f"part {number}"):
                if number == 0:
                    raise ValueError
        assert trace.get_current_span() is n.span
    assert odibi_capture.node("part 0").parent == odibi_capture.node("n").context
    assert odibi_capture.node("part 1").parent == odibi_capture.span("attempt 2").context


def test_attempts_in_other_threads(odibi_capture: Capture) -> None:
    """A retry library may run them where it likes: their spans are the node's children."""

    def attempt(n: oo.Node) -> None:
        with contextlib.suppress(ValueError), n.attempt():
            raise ValueError

    with oo.node("n") as n:
        for _ in range(2):
            thread = threading.Thread(target=attempt, args=(n,))
            thread.start()
            thread.join()
    node_span = odibi_capture.node("n").context
    assert [odibi_capture.span(f"attempt {number}").parent for number in (1, 2)] == [node_span] * 2


def test_attempts_that_go_on_from_elsewhere(odibi_capture: Capture) -> None:
    """Earlier ones were made by another process: this one says which it is."""
    with oo.node("n") as n, n.attempt(3) as attempt:
        assert attempt.number == 3
    assert odibi_capture.span("attempt 3").parent == odibi_capture.node("n").context
    assert odibi_capture.node("n").attributes["odibi.node.attempt"] == 3


def test_a_cancelled_attempt(odibi_capture: Capture) -> None:
    """An interrupt is no failure, of an attempt either."""
    with contextlib.suppress(KeyboardInterrupt), oo.node("n") as n:
        with contextlib.suppress(ValueError), n.attempt():
            raise ValueError
        with n.attempt():
            raise KeyboardInterrupt
    span = odibi_capture.span("attempt 2")
    assert (span.attributes["odibi.node.outcome"], span.attributes["error.type"]) == ("cancelled", "KeyboardInterrupt")
    assert (span.status.status_code, span.events) == (StatusCode.UNSET, ())


def test_the_exception_of_an_attempt_is_the_user_s(odibi_capture: Capture) -> None:
    """It passes as it is."""
    exc = ValueError("bad")
    with oo.node("n") as n, pytest.raises(ValueError, match="bad") as raised, n.attempt():
        raise exc
    assert raised.value is exc
    assert (exc.__context__, exc.__cause__) == (None, None)


def test_an_attempt_that_telemetry_cannot_record(odibi_capture: Capture) -> None:
    """The attempt runs, and its exception passes."""

    class Broken:
        def start_span(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no spans today")

    with oo.node("n") as n:
        odibi_capture.telemetry.runtime.tracer = Broken()  # type: ignore[assignment]
        for _ in range(2):
            with pytest.raises(ValueError, match="bad"), n.attempt():
                raise ValueError("bad")
    assert odibi_capture.metric("odibi.telemetry.dropped", reason="attempt") == 3


# --- set, event ------------------------------------------------------------------------------------------------------


def test_attributes_and_events(odibi_capture: Capture) -> None:
    """They go on the span, and attributes into the closing line's metadata; secrets are redacted, odd values plain."""
    with oo.pipeline("p") as run, oo.node("n") as n:
        run.set(day="monday")
        n.set(share=0.5, password="hunter2", nothing=None)
        n.set(tags=["a", "b"], self="me")
        odibi_capture.clock.advance(1)
        n.event("half way", done=50, token="abc")
    span = odibi_capture.node("n")
    wanted = {"share": 0.5, "password": "[redacted]", "nothing": "null", "tags": ("a", "b"), "self": "me"}
    assert wanted.items() <= span.attributes.items()
    (event,) = span.events
    assert (event.name, dict(event.attributes)) == ("half way", {"done": 50, "token": "[redacted]"})
    assert event.timestamp == span.start_time + SECOND
    (line,) = lines(odibi_capture, "node_complete")
    assert line["metadata"] == {**wanted, "tags": ["a", "b"]}
    assert lines(odibi_capture, "pipeline_complete")[0]["metadata"] == {"day": "monday"}


def test_wrong_calls_of_handles_never_raise(odibi_capture: Capture) -> None:
    """They are counted as inner errors: a mistake in telemetry is no reason for a pipeline to fail."""
    with oo.node("n") as n:
        n.event()  # type: ignore[call-arg]
        n.output(1, 2, 3)  # type: ignore[misc]
        n.output(rows="many")  # type: ignore[arg-type]
        n.output(rows=1)
    assert odibi_capture.metric("odibi.telemetry.dropped", signal="internal") == 3
    assert odibi_capture.node("n").attributes["odibi.node.outcome"] == "success"


def test_handles_outlive_their_execution(odibi_capture: Capture) -> None:
    """What is told too late is lost, and harms nothing."""
    with oo.pipeline("p") as run, oo.node("n") as n:
        pass
    n.set(late=1)
    n.event("late")
    n.output([1])
    run.set(late=1)
    assert "late" not in odibi_capture.node("n").attributes
    assert odibi_capture.metric("odibi.telemetry.dropped") == 0


# --- current handles, and handles that stand for nothing -------------------------------------------------------------


def test_the_current_node_and_pipeline(odibi_capture: Capture) -> None:
    """The innermost of each, in this thread or task."""
    assert (oo.current_node(), oo.current_pipeline()) == (NO_NODE, NO_RUN)
    with oo.pipeline("p") as run:
        assert (oo.current_node(), oo.current_pipeline()) == (NO_NODE, run)
        with oo.node("n") as n:
            assert (oo.current_node(), oo.current_pipeline()) == (n, run)
            with oo.pipeline("inner") as inner:
                assert (oo.current_node(), oo.current_pipeline()) == (NO_NODE, inner)
    with oo.node("alone") as alone:
        assert (oo.current_node(), oo.current_pipeline()) == (alone, NO_RUN)


def tell_everything(run: oo.Run, node: oo.Node) -> None:
    """Call every method of both handles."""
    run.set(a=1)
    run.event("e", a=1)
    run.skip("n", "why", layer="l", engine="e")
    node.set(a=1)
    node.event("e", a=1)
    node.output([1], rows=1, bytes=1)
    node.input([1], rows=1)
    node.cache(hit=True, key="k")
    node.skip("why")
    with node.attempt() as attempt:
        assert attempt.number == 1


def test_handles_without_telemetry_do_nothing() -> None:
    """Without `configure()` every handle is falsy, and takes every call."""
    with oo.pipeline("p") as run, oo.node("n", layer="l", engine="e") as n:
        for one, other in ((run, n), (oo.current_pipeline(), oo.current_node())):
            assert not one
            assert not other
            assert (one.run_id, one.trace_id, other.trace_id) == ("", "0" * 32, "0" * 32)
        tell_everything(run, n)
        assert (run.name, n.name, n.layer, n.engine) == ("p", "n", "l", "e")
        assert trace.get_current_span() is trace.INVALID_SPAN
    assert oo.current_node() is NO_NODE
    assert not oo.current_pipeline()


def test_shared_handles_that_stand_for_nothing_keep_nothing() -> None:
    """One object serves all: nothing told to it comes back, in whatever thread."""
    before = [{slot: getattr(NO_NODE, slot) for slot in type(NO_NODE).__slots__ if hasattr(NO_NODE, slot)}]
    for _ in range(3):
        tell_everything(NO_RUN, NO_NODE)
    assert before == [{slot: getattr(NO_NODE, slot) for slot in type(NO_NODE).__slots__ if hasattr(NO_NODE, slot)}]


def test_attempts_are_numbered_without_telemetry() -> None:
    """A block's attempts count, so that code which looks at the number works the same when nothing is recorded."""
    numbers_seen: list[int] = []
    with oo.node("n") as n:
        for _ in range(3):
            with n.attempt() as attempt:
                numbers_seen.append(attempt.number)
    assert numbers_seen == [1, 2, 3]


def test_a_run_forgets_the_oldest_of_very_many_nodes(odibi_capture: Capture) -> None:
    """What `depends_on` can link to is bounded."""
    from otel_odibi.facts import Edge

    with oo.pipeline("p") as run:
        for number in range(MAX_REMEMBERED_NODES + 1):
            run.node_finished("success", Edge(f"node {number}", 1, number + 1))
        assert run.last("node 0") == Edge("node 0", 0, 0)
        assert run.last("node 1").span_id == 2
