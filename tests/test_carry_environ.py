"""`carry.environ()`: a subprocess begins in the trace and run of the process that started it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState
from test_carry_processes import environment, lines_in, spans_in

import otel_odibi as oo
from otel_odibi import propagate, runtime
from otel_odibi.calls import Run
from otel_odibi.testing import Capture, capture

TRACE, SPAN = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
STARTED_IN = {
    "TRACEPARENT": f"00-{TRACE:032x}-{SPAN:016x}-01",
    "TRACESTATE": "vendor=value",
    "BAGGAGE": "tenant=a%20b,odibi.pipeline.name=daily,odibi.pipeline.run.id=run-9",
}


@contextmanager
def started_in(captured: Capture, environ: dict[str, str]) -> Iterator[None]:
    """Let the captured telemetry find this in the environment, as `configure()` does."""
    live = captured.telemetry.runtime
    live.inherited = propagate.from_environment(environ, live)
    yield


# --- what the parent writes ------------------------------------------------------------------------------------------


def test_trace_state_baggage_and_run(odibi_capture: Capture) -> None:
    """The variables are what the OpenTelemetry specification names; the run is part of the baggage."""
    parent = SpanContext(TRACE, SPAN, True, TraceFlags(1), TraceState([("vendor", "value")]))
    context = baggage.set_baggage("tenant", "a b", trace.set_span_in_context(NonRecordingSpan(parent)))
    token = otel_context.attach(context)
    with oo.pipeline("naïve & co") as run, oo.node("n") as n:
        environ = oo.carry.environ({"PATH": "/bin"})
    otel_context.detach(token)
    flags, span = n.span.get_span_context().trace_flags, n.span.get_span_context().span_id
    assert environ == {
        "PATH": "/bin",
        "TRACEPARENT": f"00-{TRACE:032x}-{span:016x}-{flags:02x}",
        "TRACESTATE": "vendor=value",
        "BAGGAGE": f"tenant=a+b,odibi.pipeline.name=na%C3%AFve+%26+co,odibi.pipeline.run.id={run.run_id}",
    }
    assert baggage.get_all() == {}


def test_the_environment_is_that_of_the_process(odibi_capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default it is a copy of `os.environ`, which itself stays as it is; what is stale in it is taken out."""
    monkeypatch.setenv("ODIBI_TEST", "here")
    monkeypatch.setenv("TRACESTATE", "stale=1")
    with oo.node("n"):
        environ = oo.carry.environ()
    assert (environ["ODIBI_TEST"], "TRACESTATE" in environ, "TRACEPARENT" in environ) == ("here", False, True)
    assert (os.environ["TRACESTATE"], "TRACEPARENT" in os.environ) == ("stale=1", False)


def test_nothing_to_tell() -> None:
    """Outside everything, and without telemetry, the base is given back."""
    assert oo.carry.environ({"TRACEPARENT": "as it was"}) == {"TRACEPARENT": "as it was"}
    with oo.pipeline("p"):
        assert oo.carry.environ({}) == {}


# --- what the child makes of it --------------------------------------------------------------------------------------


def test_nodes_begin_where_the_process_began(odibi_capture: Capture) -> None:
    """In every thread, and with the baggage that came along, less what only tells of the run."""
    seen = []

    @oo.node
    def work() -> None:
        seen.append((dict(baggage.get_all()), oo.current_pipeline().run_id))

    with started_in(odibi_capture, STARTED_IN):
        work()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [({"tenant": "a b"}, "run-9")] * 2
    for span in odibi_capture.spans:
        assert span.parent is not None
        assert (span.parent.trace_id, span.parent.span_id) == (TRACE, SPAN)
        assert span.context.trace_state.to_header() == "vendor=value"
        assert span.attributes["odibi.pipeline.name"] == "daily"
    assert {line["run_id"] for line in odibi_capture.logs} == {"run-9"}
    assert baggage.get_all() == {}


def test_a_pipeline_is_a_run_of_its_own_in_the_same_trace(odibi_capture: Capture) -> None:
    """As any pipeline inside another."""
    with started_in(odibi_capture, STARTED_IN), oo.pipeline("inner") as run, oo.node("n"):
        pass
    span, node = odibi_capture.pipeline("inner"), odibi_capture.node("n")
    assert span.parent is not None
    assert (span.parent.span_id, node.parent) == (SPAN, span.context)
    assert run.run_id == "run-1"
    assert node.attributes["odibi.pipeline.run.id"] == "run-1"


def test_what_is_current_goes_before_what_was_inherited(odibi_capture: Capture) -> None:
    """A span of the program's own, and its own baggage, are nearer."""
    own = trace.set_span_in_context(NonRecordingSpan(SpanContext(5, 6, False, TraceFlags(1))))
    with started_in(odibi_capture, STARTED_IN):
        token = otel_context.attach(own)
        with oo.node("in_own_span"):
            pass
        otel_context.detach(token)
        token = otel_context.attach(baggage.set_baggage("tenant", "own", Context()))
        with oo.node("with_own_baggage"):
            assert baggage.get_all() == {"tenant": "own"}
        otel_context.detach(token)
    assert odibi_capture.node("in_own_span").context.trace_id == 5
    assert "odibi.pipeline.name" not in odibi_capture.node("in_own_span").attributes
    assert odibi_capture.node("with_own_baggage").context.trace_id == TRACE


def test_a_context_without_a_run(odibi_capture: Capture) -> None:
    """Whoever starts a process need not know of pipelines."""
    with started_in(odibi_capture, {"TRACEPARENT": STARTED_IN["TRACEPARENT"]}), oo.node("n"):
        assert not oo.current_pipeline()
    assert odibi_capture.node("n").context.trace_id == TRACE


def test_what_was_inherited_goes_on_to_workers_and_subprocesses(odibi_capture: Capture) -> None:
    """A task or subprocess started where nothing is current begins where this process began."""
    with started_in(odibi_capture, STARTED_IN):
        environ, sent = oo.carry.environ({}), propagate.parcel()
    assert environ["TRACEPARENT"] == STARTED_IN["TRACEPARENT"]
    assert environ["BAGGAGE"].endswith("odibi.pipeline.name=daily,odibi.pipeline.run.id=run-9")
    with propagate.unpacked(sent):
        assert oo.current_pipeline().run_id == "run-9"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"TRACEPARENT": ""},
        {"TRACEPARENT": "00-0-0-01"},
        {"TRACEPARENT": f"00-{'0' * 32}-{'0' * 16}-01"},
        {"TRACESTATE": "a=b"},
        {"BAGGAGE": "odibi.pipeline.name=p,odibi.pipeline.run.id=r"},
        {"TRACEPARENT": STARTED_IN["TRACEPARENT"].upper().replace("AF", "xx")},
    ],
)
def test_invalid_values_are_ignored(environ: dict[str, str], odibi_capture: Capture) -> None:
    """A run without a trace to belong to is none either."""
    with started_in(odibi_capture, environ), oo.node("n"):
        assert not oo.current_pipeline()
    assert odibi_capture.node("n").parent is None


@given(st.lists(st.text() | st.sampled_from(sorted(STARTED_IN.values())), min_size=3, max_size=3))
def test_no_environment_raises(values: list[str]) -> None:
    """Whoever starts a process may write anything."""
    with capture() as captured:
        live = captured.telemetry.runtime
        found = propagate.from_environment(dict(zip(STARTED_IN, values, strict=True)), live)
    assert found is None or found[0] is None or isinstance(found[0], Run)


def test_configure_reads_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of the environment since are not looked at; `inherit_context=False` leaves it unread."""
    for name, value in STARTED_IN.items():
        monkeypatch.setenv(name, value)
    with oo.configure(set_global=False):
        for name in STARTED_IN:
            monkeypatch.delenv(name)
        with oo.node("n") as n:
            assert n.trace_id == f"{TRACE:032x}"
    monkeypatch.setenv("TRACEPARENT", STARTED_IN["TRACEPARENT"])
    with oo.configure(set_global=False, inherit_context=False), oo.node("n") as n:
        assert n.trace_id != f"{TRACE:032x}"
    assert runtime.live() is None


def test_a_subprocess(tmp_path: Path) -> None:
    """One trace from a program to what it starts, and a child's nodes belong to its run."""
    child = """
import sys
import otel_odibi as oo
oo.configure(service_name="child", directory=sys.argv[1])
with oo.node("in_child"), oo.pipeline("nested"), oo.node("deep"):
    oo.get_logger().info("hello")
"""
    directory = tmp_path / "telemetry"
    base = environment({"PYTHONPATH": f"{Path(oo.__file__).parent.parent}"})
    telemetry = oo.configure(service_name="etl", directory=directory, set_global=False)
    with telemetry, oo.pipeline("p") as run, oo.node("starts"):
        subprocess.run([sys.executable, "-c", child, directory], env=oo.carry.environ(base), check=True, timeout=60)
    spans = {span.name: span for span in spans_in(directory)}
    assert {name: span.parent for name, span in spans.items()} == {
        "pipeline p": "", "node starts": "pipeline p", "node in_child": "node starts",
        "pipeline nested": "node in_child", "node deep": "pipeline nested",
    }  # fmt: skip
    assert {span.trace_id for span in spans.values()} == {run.trace_id}
    assert spans["node in_child"].run == run.run_id != spans["node deep"].run
    [line] = [line for line in lines_in(directory) if line.get("message") == "hello"]
    assert (line["trace_id"], line["run_id"]) == (run.trace_id, spans["node deep"].run)
