"""The lean span against the SDK's own: whatever is done to both, the same is exported."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, Tracer, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)

import otel_odibi as oo
from otel_odibi.clean import DEFAULT
from otel_odibi.delivery import clean_span
from otel_odibi.spans import LeanSpan, LeanTracer, RandomIds
from otel_odibi.testing import START, IncrementalIds

Act = Callable[[trace.Span], object]
RESOURCE = Resource({"service.name": "spans"})
OTHER = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(1))


class Side:
    """One tracer with its processors, and what it exported: the SDK's, or ours in its place."""

    def __init__(self, lean: bool, ids: type[IdGenerator] = IncrementalIds, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        options = {"id_generator": ids(), "meter_provider": NoOpMeterProvider(), **options}
        self.provider = TracerProvider(resource=RESOURCE, shutdown_on_exit=False, **options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        tracer = self.provider.get_tracer("otel_odibi", "1.0", "https://schema", {"scope": "attribute"})
        assert isinstance(tracer, Tracer)
        self.tracer: trace.Tracer = LeanTracer(tracer) if lean else tracer

    def exported(self) -> list[dict[str, Any]]:
        return [everything(span) for span in self.exporter.get_finished_spans()]


def everything(span: ReadableSpan) -> dict[str, Any]:
    """Return all that an exporter can ask of a span."""
    return {
        "json": span.to_json(),
        "context": span.context,
        "remote": span.context.is_remote,
        "flags": span.context.trace_flags,
        "state": dict(span.context.trace_state),
        "parent": span.parent,
        "kind": span.kind,
        "times": (span.start_time, span.end_time),
        "status": (span.status.status_code, span.status.description),
        "attributes": dict(span.attributes or {}),
        "events": [(e.name, e.timestamp, dict(e.attributes or {}), e.dropped_attributes) for e in span.events],
        "links": [(link.context, dict(link.attributes or {}), link.dropped_attributes) for link in span.links],
        "dropped": (span.dropped_attributes, span.dropped_events, span.dropped_links),
        "scope": span.instrumentation_scope,
        "resource": span.resource,
    }


def both(work: Callable[[trace.Tracer], object], *, lean: bool = True, **options: Any) -> list[dict[str, Any]]:
    """Do the same with the SDK's tracer and with ours, and return what both have exported."""
    ours, theirs = Side(True, **options), Side(False, **options)
    made: list[object] = []
    for side in (ours, theirs):
        work(side.tracer)
        made.append(side.exported())
    assert made[0] == made[1]
    if lean:
        assert {type(span) for span in ours.exporter.get_finished_spans()} == {LeanSpan}
    return made[0]  # type: ignore[return-value]


def one_span(*acts: Act, **options: Any) -> dict[str, Any]:
    """Do the acts to one span of both kinds, end it, and return what was exported."""

    def work(tracer: trace.Tracer) -> None:
        span = tracer.start_span("node n", attributes={"a": 1, "b": "x"}, start_time=START)
        for act in acts:
            act(span)
        span.end(START + 5)

    (exported,) = both(work, **options)
    return exported


# --- every method ----------------------------------------------------------------------------------------------------


def test_attributes() -> None:
    """Scalars and lists of scalars, set one by one and together; a second value replaces the first."""
    exported = one_span(
        lambda span: span.set_attribute("text", "x"),
        lambda span: span.set_attributes({"int": 5, "float": 0.5, "bool": True, "a": "replaced"}),
        lambda span: span.set_attribute("tuple", ("a", "b")),
        lambda span: span.set_attributes({"list": [1, 2], "flags": [True, False], "empty": []}),
        lambda span: span.set_attribute("", "no key"),
        lambda span: span.set_attributes({"": "no key"}),
    )
    assert exported["attributes"]["list"] == (1, 2)
    assert exported["dropped"] == (2, 0, 0)


def test_events() -> None:
    """With attributes and without, with a time of their own; `exception` events of `record_exception`."""
    error = ValueError("bad")
    exported = one_span(
        lambda span: span.add_event("bare", timestamp=START + 1),
        lambda span: span.add_event("full", {"a": 1, "list": ["x"]}, START + 2),
        lambda span: span.record_exception(error, timestamp=START + 3),
        lambda span: span.record_exception(error, {"a": 1, "exception.message": "other"}, START + 4, escaped=True),
    )
    assert [event[0] for event in exported["events"]] == ["bare", "full", "exception", "exception"]
    assert exported["events"][3][2]["exception.message"] == "other"


def test_the_time_of_an_event_is_now_unless_given() -> None:
    """Both take the system clock then."""
    side = Side(True)
    span = side.tracer.start_span("n")
    span.add_event("now")
    span.end()
    (done,) = side.exporter.get_finished_spans()
    assert done.start_time <= done.events[0].timestamp <= done.end_time


def test_links() -> None:
    """Given at the start and later; one that leads nowhere is left out, unless it says something."""
    nowhere = trace.INVALID_SPAN_CONTEXT

    def work(tracer: trace.Tracer) -> None:
        links = [Link(OTHER), Link(OTHER, {"a": [1]}), Link(nowhere), Link(nowhere, {"why": "x"})]
        span = tracer.start_span("n", links=links, start_time=START)
        span.add_link(OTHER, {"later": True})
        span.add_link(nowhere)
        span.end(START)

    (exported,) = both(work)
    assert [attributes for _, attributes, _ in exported["links"]] == [{}, {"a": (1,)}, {"why": "x"}, {"later": True}]


@pytest.mark.parametrize(
    "acts",
    [
        [Status(StatusCode.ERROR, "bad")],
        [StatusCode.OK, Status(StatusCode.ERROR, "too late")],
        [Status(StatusCode.ERROR, "bad"), StatusCode.OK],
        [Status(StatusCode.ERROR, "bad"), StatusCode.UNSET, Status(StatusCode.UNSET)],
        [Status(StatusCode.ERROR, "bad"), Status(StatusCode.ERROR, "worse")],
        [Status(StatusCode.OK, "why a description")],
        ["no status at all"],
    ],
    ids=str,
)
def test_status(acts: list[Any]) -> None:
    """OK is final, UNSET is ignored, and what is no status is no status."""
    one_span(*(lambda span, status=status: span.set_status(status) for status in acts))


def test_status_with_a_description_beside_it() -> None:
    """A description goes with a code, not with a whole status."""
    assert one_span(lambda span: span.set_status(StatusCode.ERROR, "bad"))["status"] == (StatusCode.ERROR, "bad")
    one_span(lambda span: span.set_status(Status(StatusCode.ERROR, "bad"), "ignored"))


def test_name_and_kind() -> None:
    """A span may be renamed, and may be of another kind."""

    def work(tracer: trace.Tracer) -> None:
        span = tracer.start_span("before", kind=SpanKind.CONSUMER, start_time=START)
        span.update_name("after")
        span.end(START)

    assert both(work)[0]["kind"] is SpanKind.CONSUMER


def test_nothing_changes_after_the_end() -> None:
    """Whatever is done then is ignored."""
    error = ValueError("late")
    acts: list[Act] = [
        lambda span: span.end(START + 1),
        lambda span: span.set_attribute("late", 1),
        lambda span: span.set_attributes({"late": 1, "list": [1]}),
        lambda span: span.add_event("late"),
        lambda span: span.add_link(OTHER),
        lambda span: span.record_exception(error),
        lambda span: span.set_status(StatusCode.ERROR, "late"),
        lambda span: span.update_name("late"),
    ]
    assert one_span(*acts)["times"] == (START, START + 1)


def test_identity_and_recording() -> None:
    """A span knows itself before and after its end."""
    for side in (Side(True), Side(False)):
        span = side.tracer.start_span("n")
        assert span.get_span_context() == SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(1))
        assert span.is_recording()
        span.end()
        assert not span.is_recording()


@pytest.mark.parametrize("use", ["with", "use_span", "start_as_current_span"])
@pytest.mark.parametrize("exc", [None, ValueError("bad"), KeyboardInterrupt()], ids=repr)
def test_as_a_context_manager(use: str, exc: BaseException | None) -> None:
    """What is raised in the block is recorded as the SDK does, and passes."""

    def work(tracer: trace.Tracer) -> None:
        if use == "start_as_current_span":
            block: Any = tracer.start_as_current_span("n", start_time=START)
        else:
            span = tracer.start_span("n", start_time=START)
            block = span if use == "with" else trace.use_span(span, end_on_exit=True)
        with contextlib.suppress(BaseException), block:
            if exc is not None:
                raise exc

    sides = Side(True), Side(False)
    for side in sides:
        work(side.tracer)
    timeless = [
        [
            (s["status"], [(name, e["exception.type"], e["exception.escaped"]) for name, _, e, _ in s["events"]])
            for s in side.exported()
        ]
        for side in sides
    ]
    assert timeless[0] == timeless[1]


# --- limits ----------------------------------------------------------------------------------------------------------


def test_limits() -> None:
    """The oldest makes room for the newest, and is counted: attributes, events, links, and what these hold."""
    limits = SpanLimits(max_span_attributes=3, max_events=2, max_links=2, max_event_attributes=1, max_link_attributes=1)

    def work(tracer: trace.Tracer) -> None:
        many = {"a": 1, "b": 2, "c": 3, "d": 4}
        links = [Link(OTHER, {"number": number}) for number in range(3)]
        span = tracer.start_span("n", attributes=many, links=links, start_time=START)
        span.set_attributes({"c": "again", "e": 5})
        span.set_attribute("f", 6)
        span.set_attribute("c", "newest")
        span.set_attribute("g", 7)
        for number in range(3):
            span.add_event(f"event {number}", {"a": 1, "b": 2}, START)
            span.add_link(OTHER, {"a": 1, "b": 2})
        span.end(START)

    (exported,) = both(work, span_limits=limits)
    assert exported["attributes"] == {"f": 6, "c": "newest", "g": 7}
    assert exported["dropped"] == (4, 1, 4)


@pytest.mark.parametrize("limit", [0, 1, SpanLimits.UNSET])
def test_limits_at_their_ends(limit: int) -> None:
    """Nothing at all, one thing, and no limit."""
    limits = SpanLimits(max_span_attributes=limit, max_events=limit, max_links=limit, max_event_attributes=limit)

    def work(tracer: trace.Tracer) -> None:
        span = tracer.start_span("n", attributes={"a": 1, "b": 2}, links=[Link(OTHER), Link(OTHER)], start_time=START)
        span.set_attribute("c", 3)
        span.set_attributes({"a": 4, "d": 5})
        span.add_event("e", {"x": 1, "y": 2}, START)
        span.add_event("f", None, START)
        span.add_link(OTHER)
        span.end(START)

    both(work, span_limits=limits)


@pytest.mark.parametrize("limits", [{"max_attribute_length": 2}, {"max_span_attribute_length": 2}], ids=str)
def test_limits_of_length_are_left_to_the_sdk(limits: dict[str, int]) -> None:
    """Texts are cut by the SDK's own span then."""

    def work(tracer: trace.Tracer) -> None:
        span = tracer.start_span("n", attributes={"a": "long"}, start_time=START)
        span.add_event("e", {"b": "long"}, START)
        span.end(START)

    (exported,) = both(work, lean=False, span_limits=SpanLimits(**limits))
    assert exported["attributes"] == {"a": "lo"}


# --- anything, in any order ------------------------------------------------------------------------------------------

keys = st.sampled_from(["a", "b", "c", "d", "e", ""])
words = st.text("abcdef", max_size=5)
scalars = st.one_of(words, st.integers(-(2**63), 2**63 - 1), st.booleans(), st.floats(allow_nan=False))
values = st.one_of(scalars, *(st.lists(of, max_size=3) for of in (words, st.integers(-9, 9), st.booleans())))
mappings = st.dictionaries(keys, values, max_size=4)
contexts = st.sampled_from([OTHER, trace.INVALID_SPAN_CONTEXT])
codes = st.sampled_from(StatusCode)
steps = st.one_of(
    st.tuples(st.just("set_attribute"), keys, values),
    st.tuples(st.just("set_attributes"), mappings),
    st.tuples(st.just("add_event"), words, mappings, st.just(START)),
    st.tuples(st.just("add_link"), contexts, mappings),
    st.tuples(st.just("update_name"), words),
    st.tuples(st.just("set_status"), codes, words),
    st.tuples(st.just("end"), st.just(START + 1)),
)


@given(st.lists(steps, max_size=12), st.integers(1, 3) | st.none())
def test_any_acts_in_any_order(acts: list[tuple[Any, ...]], limit: int | None) -> None:
    """The same is exported, to the last attribute and count."""
    limits = None if limit is None else SpanLimits(*[limit] * 3, *[limit] * 3)
    one_span(*(lambda span, act=act: getattr(span, act[0])(*act[1:]) for act in acts), span_limits=limits)


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.text(min_size=1, max_size=10), anything)
def test_any_value_is_the_same_once_cleaned(key: str, value: Any) -> None:
    """What OpenTelemetry cannot hold portably is made plain at once, not on its way out; no value raises."""
    cleaned = []
    for side in (Side(True), Side(False)):
        span = side.tracer.start_span("n", start_time=START)
        span.set_attribute(key, value)
        span.end(START)
        (done,) = side.exporter.get_finished_spans()
        (safe,) = clean_span(done, DEFAULT).attributes.values()
        cleaned.append(list(safe) if isinstance(safe, tuple) else safe)
    assert repr(cleaned[0]) == repr(cleaned[1])


def test_secrets_in_what_is_not_plain_text_are_redacted_at_once() -> None:
    """A list or a map may be held by a host's exporter, which cleans nothing."""
    side = Side(True)
    span = side.tracer.start_span("n")
    span.set_attribute("headers", {"authorization": "Bearer abc", "n": 1})
    span.set_attribute("passwords", ["hunter2"])
    span.record_exception(ValueError("postgresql://me:hunter2@db"))
    span.end()
    (done,) = side.exporter.get_finished_spans()
    assert "hunter2" not in done.to_json()
    assert "abc" not in done.to_json()


# --- parents, flags, samplers ----------------------------------------------------------------------------------------


class Ids(IncrementalIds):
    """Ids that count, and say that they are random."""

    def is_trace_id_random(self) -> bool:
        return True


def parented(remote: bool, flags: int, state: TraceState | None = None) -> otel_context.Context:
    parent = SpanContext(5, 6, is_remote=remote, trace_flags=TraceFlags(flags), trace_state=state)
    return trace.set_span_in_context(NonRecordingSpan(parent), otel_context.Context())


@pytest.mark.parametrize("ids", [IncrementalIds, Ids])
@pytest.mark.parametrize("flags", [0, 1, 2, 3, 0xFF, 0xFE])
@pytest.mark.parametrize("remote", [True, False])
def test_a_parent_s_flags(remote: bool, flags: int, ids: type[IdGenerator]) -> None:
    """A sampled parent's child is sampled, an unsampled one's is not, remote or local; randomness is inherited."""

    def work(tracer: trace.Tracer) -> None:
        span = tracer.start_span("n", parented(remote, flags), start_time=START)
        assert span.is_recording() is bool(flags & 1)
        assert span.get_span_context().trace_flags == flags & 3
        assert span.get_span_context().trace_id == 5
        tracer.start_span("child", trace.set_span_in_context(span), start_time=START).end(START)
        span.end(START)

    exported = both(work, lean=bool(flags & 1), ids=ids)
    assert len(exported) == (2 if flags & 1 else 0)


def test_a_parent_s_tracestate() -> None:
    """It is handed on to the child."""
    state = TraceState([("vendor", "x"), ("other", "y")])

    def work(tracer: trace.Tracer) -> None:
        tracer.start_span("n", parented(True, 1, state), start_time=START).end(START)

    assert both(work)[0]["state"] == {"vendor": "x", "other": "y"}


def test_roots_and_children() -> None:
    """A root has a new trace id and no parent; the flags tell whether the ids are random."""

    def work(tracer: trace.Tracer) -> None:
        root = tracer.start_span("root", otel_context.Context(), start_time=START)
        tracer.start_span("child", trace.set_span_in_context(root), start_time=START).end(START)
        invalid = trace.set_span_in_context(trace.INVALID_SPAN, otel_context.Context())
        tracer.start_span("another root", invalid, start_time=START).end(START)
        root.end(START)

    for ids in (IncrementalIds, Ids):
        child, another, root = both(work, ids=ids)
        assert (child["parent"], another["parent"], root["parent"]) == (root["context"], None, None)
        assert root["flags"] == (3 if ids is Ids else 1)


def test_random_ids() -> None:
    """The SDK's own generator is used as it is."""
    side = Side(True, RandomIdGenerator)
    context = side.tracer.start_span("n").get_span_context()
    assert context.is_valid
    assert context.trace_flags == 3


@pytest.mark.parametrize(
    "sampler",
    [ALWAYS_ON, ALWAYS_OFF, ParentBased(ALWAYS_OFF), TraceIdRatioBased(0.5), ParentBased(TraceIdRatioBased(0.0))],
    ids=str,
)
def test_other_samplers_decide_as_ever(sampler: Sampler) -> None:
    """The SDK's tracer asks them; not one id more or fewer is used up."""

    def work(tracer: trace.Tracer) -> None:
        for context in (otel_context.Context(), parented(True, 1), parented(True, 0)):
            tracer.start_span("n", context, attributes={"a": [1]}, start_time=START).end(START)
        assert tracer.start_span("last", otel_context.Context()).get_span_context().trace_id == 2

    both(work, lean=False, sampler=sampler)


def test_a_tracer_turned_off_by_the_host() -> None:
    """Its spans record nothing, from then on."""
    side = Side(True)
    provider = side.provider
    off = type(side.tracer.sdk._tracer_config)(is_enabled=False)  # type: ignore[attr-defined]
    provider._set_tracer_configurator(tracer_configurator=lambda scope: off)
    span = side.tracer.start_span("n")
    assert not span.is_recording()
    span.end()
    assert side.exported() == []


def test_the_sdk_s_metrics_of_itself_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a host has turned them on, the SDK makes the spans."""
    monkeypatch.setenv("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "true")
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    side = Side(True, meter_provider=meters)
    side.tracer.start_span("n").end()
    data = reader.get_metrics_data()
    assert data is not None
    names = {m.name for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics}
    assert "otel.sdk.span.started" in names
    meters.shutdown()


# --- processors ------------------------------------------------------------------------------------------------------


class Watcher(SpanProcessor):
    """Writes down what it is told, and adds to the span, as processors do."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_start(self, span: Span, parent_context: otel_context.Context | None = None) -> None:
        tenant = baggage.get_baggage("tenant", parent_context)
        self.told.append(("start", span.name, span.start_time, span.is_recording(), dict(span.attributes or {})))
        span.set_attribute("tenant", str(tenant))
        span.update_name(f"{span.name} of {tenant}")

    def _on_ending(self, span: Span) -> None:
        self.told.append(("ending", span.name, span.end_time, span.is_recording()))
        span.set_attribute("too", "late")

    def on_end(self, span: ReadableSpan) -> None:
        self.told.append(("end", span.name, span.end_time, dict(span.attributes or {}), span.parent))


def test_processors_are_told_the_same_at_the_same_time() -> None:
    """At the start with the parent's context, and may change the span then; at the end they see it whole."""
    told = []
    for side in (Side(True), Side(False)):
        watcher = Watcher()
        side.provider.add_span_processor(watcher)
        parent = baggage.set_baggage("tenant", "a", parented(True, 1))
        span = side.tracer.start_span("n", parent, attributes={"x": 1}, start_time=START)
        span.end(START + 1)
        span.end(START + 2)
        told.append((watcher.told, side.exported()))
    assert told[0] == told[1]
    assert [entry[0] for entry in told[0][0]] == ["start", "ending", "end"]


def test_a_processor_that_raises_at_the_end_leaves_the_span_ended() -> None:
    """As the SDK's span is; it is the scopes that keep what is raised from the user."""

    class Raising(SpanProcessor):
        def _on_ending(self, span: Span) -> None:
            raise RuntimeError("no end")

    for side in (Side(True), Side(False)):
        side.provider.add_span_processor(Raising())
        span = side.tracer.start_span("n")
        with pytest.raises(RuntimeError, match="no end"):
            span.end()
        assert not span.is_recording()


def test_a_resource_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans carry the resource of when they began, as a fork changes it."""
    side = Side(True)
    side.provider._update_resource(Resource({"process.pid": 1}))
    side.tracer.start_span("n").end()
    assert side.exporter.get_finished_spans()[0].resource.attributes["process.pid"] == 1


# --- ids -------------------------------------------------------------------------------------------------------------


def test_a_program_that_seeds_random_neither_repeats_ids_nor_sees_its_sequence_changed():
    """As data science does, to have the same numbers in every run."""
    ids, drawn = [], []
    for _ in range(2):
        random.seed(42)
        with oo.configure(set_global=False), oo.pipeline("p") as run, oo.node("n") as node:
            ids += [run.trace_id, node.span.get_span_context().span_id]
            drawn.append(random.random())
    random.seed(42)
    assert drawn == [random.random()] * 2
    assert len(set(ids)) == 4


def test_a_forked_child_has_ids_of_its_own():
    """Not those that its parent is about to use."""
    ids = RandomIds()
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, str(ids.generate_trace_id()).encode())
        os._exit(0)
    os.wait()
    assert int(os.read(read, 100)) != ids.generate_trace_id() > 0
    os.close(read)
    os.close(write)


def test_an_id_is_never_zero(monkeypatch):
    """Zero means that there is none."""
    ids = RandomIds()
    drawn = iter((0, 7, 0, 9))
    monkeypatch.setattr(ids, "_bits", lambda bits: next(drawn))
    assert (ids.generate_span_id(), ids.generate_trace_id()) == (7, 9)
