"""The span queue: spans get out in order and clean, the pipeline never waits, and what is lost is counted."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags
from secret_samples import PLAIN, SECRETS, leaked

from otel_odibi import delivery, names
from otel_odibi.clean import DEFAULT, Cleaner
from otel_odibi.delivery import SpanQueue, clean_span

BOUND = 60.0
"""Seconds that no test needs; a wait of this length means a hang."""


class Exporter(SpanExporter):
    """Keeps the names of spans; hangs in `export` while its gate is closed."""

    def __init__(self, result=SpanExportResult.SUCCESS):
        self.result, self.names, self.calls, self.instrumented = result, [], [], []
        self.gate, self.busy = threading.Event(), threading.Event()
        self.gate.set()

    def export(self, spans):
        self.busy.set()
        assert self.gate.wait(BOUND)
        self.instrumented.append(is_instrumentation_enabled())
        if isinstance(self.result, Exception):
            raise self.result
        self.names += [span.name for span in spans]
        return self.result

    def force_flush(self, timeout_millis=30_000):
        self.calls.append("force_flush")
        return True

    def shutdown(self):
        self.calls.append("shutdown")


class Setting:
    """A queue with its exporter, a tracer whose spans it takes, and what was dropped, by reason."""

    def __init__(self, *, limit=1_000, interval=BOUND, result=SpanExportResult.SUCCESS, sampler=None):
        self.exporter, self.drops = Exporter(result), Counter()
        self.queue = SpanQueue(
            self.exporter,
            cleaner=DEFAULT,
            interval=interval,
            limit=limit,
            on_drop=lambda reason, count: self.drops.update({reason: count}),
        )
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        provider.add_span_processor(self.queue)
        self.tracer = provider.get_tracer("test")

    def end(self, *span_names):
        """End spans of these names."""
        for name in span_names:
            self.tracer.start_span(str(name)).end()

    def close_gate(self):
        """Let the exporter hang with one span."""
        self.exporter.gate.clear()
        self.end("stuck")
        self.queue._wake.set()
        assert self.exporter.busy.wait(BOUND)


@pytest.fixture
def setting():
    """A queue whose exporter answers, let go at the end."""
    made = Setting()
    yield made
    made.exporter.gate.set()
    made.queue.shutdown()


# --- the way of a span -----------------------------------------------------------------------------------------------


def test_spans_get_out_in_order_when_flushed(setting):
    """Flushing hands over what waits, and flushes the exporter."""
    setting.end(*range(100))
    assert setting.queue.force_flush()
    assert setting.exporter.names == [str(number) for number in range(100)]
    assert setting.exporter.calls == ["force_flush"]
    assert not setting.drops


def test_an_eighth_of_the_queue_wakes_the_exporter():
    """Before the interval is over, so that the queue does not fill up."""
    setting = Setting(limit=80)
    setting.end(*range(10))
    assert setting.exporter.busy.wait(BOUND)
    setting.queue.shutdown()
    assert len(setting.exporter.names) == 10


def test_spans_get_out_by_themselves_after_the_interval():
    """Without any flush."""
    setting = Setting(interval=0.001)
    setting.end("one")
    assert setting.exporter.busy.wait(BOUND)
    setting.queue.shutdown()
    assert setting.exporter.names == ["one"]


def test_every_span_of_many_threads_gets_out_once(setting):
    """Whatever the order between them."""

    def work(number):
        setting.end(*(f"{number}-{i}" for i in range(100)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert setting.queue.force_flush()
    assert sorted(setting.exporter.names) == sorted(f"{n}-{i}" for n in range(8) for i in range(100))


def test_the_exporters_own_requests_are_not_traced(setting):
    """An instrumented HTTP client would make spans of sending spans."""
    setting.end("one")
    setting.queue.force_flush()
    assert setting.exporter.instrumented == [False]
    assert is_instrumentation_enabled()


def test_unsampled_spans_are_let_go():
    """As of any exporter."""
    setting = Setting(sampler=ALWAYS_OFF)
    span = ReadableSpan("unsampled", SpanContext(1, 2, False, TraceFlags(0)))
    setting.queue.on_end(span)
    assert setting.queue.force_flush()
    setting.queue.shutdown()
    assert setting.exporter.names == []


def test_without_spans_there_is_no_thread(setting):
    """The exporter is shut down all the same."""
    assert setting.queue._thread is None
    assert setting.queue.force_flush()
    setting.queue.shutdown()
    assert setting.exporter.calls == ["shutdown"]


def test_a_dropped_queue_is_forgotten():
    """What was registered for forks does not keep it alive."""
    setting = Setting()
    reference = weakref.ref(setting.queue)
    setting.queue.shutdown()
    del setting
    gc.collect()
    assert reference() is None


# --- a hanging exporter ----------------------------------------------------------------------------------------------


def test_a_full_queue_counts_what_it_turns_away():
    """The pipeline does not wait for a hanging exporter, and what waits is bounded."""
    setting = Setting(limit=5)
    setting.close_gate()
    setting.end(*range(12))
    assert setting.drops == {"queue_full": 7}
    setting.exporter.gate.set()
    setting.queue.shutdown()
    assert setting.exporter.names == ["stuck", *map(str, range(5))]


def test_flushing_a_hanging_exporter_ends_in_time(setting):
    """And says that it was not done."""
    setting.close_gate()
    assert setting.queue.force_flush(timeout_millis=1) is False
    setting.exporter.gate.set()
    assert setting.queue.force_flush()


def test_shutdown_with_a_hanging_exporter_ends_in_time_and_counts():
    """What it is about to export, and what waits."""
    setting = Setting()
    setting.close_gate()
    setting.end(1, 2)
    setting.queue.shutdown(timeout_millis=1)
    assert setting.drops == {"exit_timeout": 3}
    setting.exporter.gate.set()


def test_shutdown_gets_everything_out():
    """And lets go of what comes after."""
    setting = Setting()
    setting.end(*range(3))
    setting.queue.shutdown()
    setting.end("late")
    setting.queue.shutdown()
    assert setting.exporter.names == ["0", "1", "2"]
    assert setting.exporter.calls == ["shutdown"]
    assert not setting.drops


def test_a_flush_under_way_is_done_when_the_queue_shuts_down():
    """Nobody waits for a thread that is gone."""
    setting = Setting()
    setting.close_gate()
    setting.queue.stop()
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(setting.queue.force_flush, BOUND * 1000)
        while not setting.queue._flushes:
            pass
        setting.exporter.gate.set()
        assert flushed.result(BOUND) is True
    setting.queue.shutdown()


@pytest.mark.parametrize("result", [SpanExportResult.FAILURE, OSError("away"), None], ids=repr)
def test_failed_exports_are_counted_and_the_next_is_tried(result):
    """Whether the exporter says so or raises."""
    setting = Setting(result=result)
    setting.end(1, 2)
    setting.queue.force_flush()
    assert setting.drops == {"export_failed": 2}
    setting.exporter.result = SpanExportResult.SUCCESS
    setting.exporter.names.clear()
    setting.end(3)
    setting.queue.shutdown()
    assert setting.exporter.names == ["3"]


def test_a_span_that_cannot_be_cleaned_does_not_end_the_thread(setting, monkeypatch):
    """It is counted with its batch."""
    broken = ReadableSpan("broken", SpanContext(1, 2, False, TraceFlags(1)))
    monkeypatch.setattr(broken, "_attributes", 5)
    setting.queue.on_end(broken)
    setting.queue.force_flush()
    assert setting.drops == {"export_failed": 1}
    setting.end("next")
    setting.queue.force_flush()
    assert setting.exporter.names == ["next"]


def test_where_no_thread_is_to_be_had_spans_wait_for_the_end(setting, monkeypatch):
    """At the interpreter's exit, or at a limit of the machine: nothing is raised, and nothing lost."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(delivery.threading.Thread, "start", refuse)
    setting.end(1, 2)
    assert setting.queue.force_flush() is False
    setting.queue.shutdown()
    assert setting.exporter.names == ["1", "2"]
    assert setting.exporter.calls == ["shutdown"]


def test_a_forked_child_starts_with_an_empty_queue(setting):
    """The parent still has what waited; its thread and its locks are not in the child."""
    setting.close_gate()
    setting.end(1)
    stuck, setting.queue._lock = setting.queue._thread, None
    setting.queue._reset()
    setting.end("child")
    assert setting.queue._thread is not stuck
    setting.exporter.gate.set()
    assert setting.queue.force_flush()
    assert "child" in setting.exporter.names


# --- cleaning --------------------------------------------------------------------------------------------------------


def finished_span(text, key="b"):
    """Return a span of the SDK with a text, and a name of attributes, in every place that a program can put one."""
    provider = TracerProvider(shutdown_on_exit=False)
    link = Link(SpanContext(1, 2, False), {"a": text, key: 1})
    span = provider.get_tracer("a library").start_span(
        text, links=[link], attributes={names.NODE_LAYER: "raw", "list": [text]}
    )
    span.set_attributes({"a": text, key: "x", names.NODE_NAME: text, names.EXCEPTION_MESSAGE: text, "n": 5, "t": True})
    span.add_event(text, {"a": text, key: 1})
    span.record_exception(ValueError(text))
    span.set_status(Status(StatusCode.ERROR, text))
    span.end()
    return span


def test_no_secret_gets_out_wherever_it_was_put():
    """In a span's name, attributes (our own too), their names, events, links, exceptions and status."""
    for shape, (text, secrets) in SECRETS.items():
        cleaned = clean_span(finished_span(text, key=text), DEFAULT)
        links = [dict(link.attributes) for link in cleaned.links]
        assert not leaked(secrets, cleaned.to_json() + repr(links)), shape


@pytest.mark.parametrize("text", PLAIN)
def test_a_clean_span_is_not_even_copied(text):
    """Plain data is left alone."""
    span = finished_span(text)
    assert clean_span(span, DEFAULT) is span


def test_the_rest_of_a_cleaned_span_stays_as_it_was():
    """Ids, times, kind, parent, resource, scope, and the attributes without secrets, in order."""
    url, _ = SECRETS["url"]
    span = finished_span(url, key=url)
    cleaned = clean_span(span, DEFAULT)
    assert cleaned is not span
    for part in ("context", "parent", "kind", "start_time", "end_time", "resource", "instrumentation_scope"):
        assert getattr(cleaned, part) == getattr(span, part)
    assert (cleaned.attributes[names.NODE_LAYER], cleaned.attributes["n"], cleaned.attributes["t"]) == ("raw", 5, True)
    assert [DEFAULT.text(key) for key in span.attributes] == list(cleaned.attributes)
    assert [event.timestamp for event in cleaned.events] == [event.timestamp for event in span.events]
    assert [link.context for link in cleaned.links] == [link.context for link in span.links]
    assert cleaned.status.status_code is StatusCode.ERROR


def test_secret_names_and_own_patterns_hide_values():
    """Numbers too."""
    span = finished_span("order C-1234")
    span._attributes = {"pin": 1234, "customer": "Ann", "rows": 5, "ratio": 0.5}
    cleaned = clean_span(span, Cleaner(keys=["customer"], patterns=[r"C-\d+"]))
    assert cleaned.attributes == {"pin": "[redacted]", "customer": "[redacted]", "rows": 5, "ratio": 0.5}
    assert cleaned.status.description == "order [redacted]"


@pytest.mark.parametrize("name", [5, None, b"x", "\ud800", "x" * 5_000], ids=repr)
def test_a_span_of_any_name_gets_out(name):
    """The API lets any object be a name."""
    span = TracerProvider(shutdown_on_exit=False).get_tracer("a library").start_span(name)
    span.end()
    cleaned = clean_span(span, DEFAULT)
    assert cleaned.name.encode()
    assert len(cleaned.name) < 1_100


def test_an_api_span_without_attributes_is_clean():
    """Nothing to look at."""
    span = ReadableSpan("plain", trace.INVALID_SPAN_CONTEXT)
    assert clean_span(span, DEFAULT) is span
