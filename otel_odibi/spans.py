"""A span that costs a third of the SDK's: made by this package for its own nodes, exported like any other.

The SDK spends most of a span's 16 us on cleaning and copying attributes and on locks. The attributes of a node are
clean already and a span is written by one thread at a time, so a plain dict does. Everything that decides (sampler, id
generator, limits, processors, resource) is the SDK tracer's own; where that is not in its default shape, the SDK's
tracer makes the span.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from opentelemetry import trace as api
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Event, ReadableSpan, Tracer
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import DEFAULT_ON
from opentelemetry.sdk.util import BoundedList
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from otel_odibi.clean import DEFAULT, clean_name
from otel_odibi.forks import after_fork

_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_SAMPLED_RANDOM: Final = TraceFlags(TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID)
_CHILD_FLAGS: Final = (None, _SAMPLED, None, _SAMPLED_RANDOM)
"""A child's flags by the two of its parent's that OpenTelemetry knows; None where the parent is not sampled."""
_UNSET: Final = Status(StatusCode.UNSET)
_PLAIN: Final = frozenset((str, int, bool, float))
_NO_ATTRIBUTES: Final = BoundedAttributes()


class LeanSpan(ReadableSpan, api.Span):
    """A recording span of one tracer. After `end()` it no longer changes. Methods never raise on odd values.

    What does not fit the tracer's limits pushes out the oldest and is counted, as in the SDK's spans.
    """

    _attributes: Any
    _events: Any
    _links: Any

    def __init__(
        self,
        tracer: LeanTracer,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: Mapping[str, Any] | None,
        links: Sequence[Link] | None,
        start_time: int,
    ) -> None:
        # The fields that ReadableSpan's properties read; its own __init__ would set each a second time.
        self._name = name
        self._context: SpanContext = context
        self._parent = parent
        self._kind = kind
        self._attributes = dict(attributes) if attributes else {}
        self._links = ()
        self._events = ()
        self._start_time = start_time
        self._end_time: int | None = None
        self._status = _UNSET
        self._resource = tracer.sdk.resource
        self._instrumentation_info = None
        self._instrumentation_scope = tracer.scope
        self._tracer = tracer
        if len(self._attributes) > tracer.max_attributes:
            self._bound_attributes()
        if links:
            self._links = self._clean_links(links)
            if len(self._links) > tracer.max_links:
                self._links = BoundedList.from_seq(tracer.max_links, self._links)

    def get_span_context(self) -> SpanContext:
        """Return the span's identity."""
        return self._context

    def is_recording(self) -> bool:
        """Tell whether the span has not ended."""
        return self._end_time is None

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set several attributes; see `set_attribute`."""
        own = self._attributes
        roomy = self._end_time is None and len(own) + len(attributes) <= self._tracer.max_attributes
        for key, value in attributes.items():
            if roomy and type(value) in _PLAIN and type(key) is str and key and key not in own:
                own[key] = value  # nearly always: this saves a call for each
            else:
                self.set_attribute(key, value)
                own = self._attributes

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute, unless the span has ended."""
        if self._end_time is not None:
            return
        if type(value) not in _PLAIN:
            value = _clean_value(key, value)
        attributes = self._attributes
        if key in attributes:
            del attributes[key]  # so that it becomes the newest
        elif len(attributes) >= self._tracer.max_attributes or not key or type(key) is not str:
            attributes = self._bound_attributes()
        attributes[key] = value

    def _bound_attributes(self) -> BoundedAttributes:
        """Hold the attributes as the SDK does from now on, as one of them must go."""
        if type(self._attributes) is dict:
            limit = self._tracer.limits.max_span_attributes
            self._attributes = BoundedAttributes(limit, self._attributes, immutable=False)
        bounded: BoundedAttributes = self._attributes
        return bounded

    def add_event(self, name: str, attributes: Mapping[str, Any] | None = None, timestamp: int | None = None) -> None:
        """Add an event, unless the span has ended."""
        if self._end_time is not None:
            return
        if type(self._events) is tuple:  # the first one
            self._events = BoundedList(self._tracer.limits.max_events)
        bounded = _bounded(attributes, self._tracer.limits.max_event_attributes)
        self._events.append(Event(name, bounded, timestamp))

    def add_link(self, context: SpanContext, attributes: Mapping[str, Any] | None = None) -> None:
        """Add a link, unless the span has ended."""
        if self._end_time is not None:
            return
        if type(self._links) is not BoundedList:
            self._links = BoundedList.from_seq(self._tracer.limits.max_links, self._links)
        self._links.extend(self._clean_links((Link(context, attributes),)))

    def _clean_links(self, links: Sequence[Link]) -> list[Link]:
        """Return the links that lead somewhere, with their attributes cleaned."""
        limit = self._tracer.limits.max_link_attributes
        return [
            Link(link.context, _bounded(link.attributes, limit))
            for link in links
            if link.context.is_valid or link.attributes or link.context.trace_state
        ]

    def update_name(self, name: str) -> None:
        """Rename the span, unless it has ended."""
        if self._end_time is None:
            self._name = clean_name(name)

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Set the status. UNSET is ignored, and OK is final, as the OpenTelemetry specification, Set Status, has it."""
        new = Status(status, description) if isinstance(status, StatusCode) else status
        final = self._end_time is not None or self._status.status_code is StatusCode.OK
        if isinstance(new, Status) and new.status_code is not StatusCode.UNSET and not final:
            self._status = new

    def record_exception(
        self,
        exception: BaseException,
        attributes: Mapping[str, Any] | None = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Add an `exception` event, its texts redacted."""
        failure = DEFAULT.failure(exception)
        event = {
            "exception.type": failure.type,
            "exception.message": failure.message,
            "exception.stacktrace": failure.stacktrace,
            "exception.escaped": str(escaped),
        }
        self.add_event("exception", {**event, **(attributes or {})}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        """End the span and hand it to the processors."""
        if self._end_time is not None:
            return
        self._end_time = time.time_ns() if end_time is None else end_time
        processor = self._tracer.sdk.span_processor
        processor._on_ending(self)  # type: ignore[arg-type]
        processor.on_end(self)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Record what was raised, and end the span."""
        if exc is not None and self.is_recording():
            self.record_exception(exc, escaped=True)
            self.set_status(StatusCode.ERROR, DEFAULT.text(f"{type(exc).__name__}: {exc}"))
        self.end()


def _clean_value(key: str, value: Any) -> Any:
    if type(value) is tuple and {str}.issuperset(map(type, value)):
        return value
    clean = DEFAULT.attribute(key, value)
    return tuple(clean) if isinstance(clean, list) else clean


def _bounded(attributes: Mapping[str, Any] | None, limit: int | None) -> BoundedAttributes:
    if not attributes:
        return _NO_ATTRIBUTES
    clean = {key: value if type(value) in _PLAIN else _clean_value(key, value) for key, value in attributes.items()}
    return BoundedAttributes(limit, clean)


class RandomIds(RandomIdGenerator):
    """Random ids from a source of their own. Thread-safe; a forked child starts another.

    A program that seeds `random` to repeat itself shall not repeat the ids of its last run, nor shall telemetry take
    numbers from the sequence that it counts on: the SDK's generator does both.
    """

    def __init__(self) -> None:
        self._reset()
        after_fork(self._reset)

    def _reset(self) -> None:
        self._bits = random.Random().getrandbits  # noqa: S311 - seeded by the operating system; ids are no secrets

    def generate_span_id(self) -> int:
        """Return 64 random bits, not all zero."""
        return self._bits(64) or self.generate_span_id()

    def generate_trace_id(self) -> int:
        """Return 128 random bits, not all zero."""
        return self._bits(128) or self.generate_trace_id()


class LeanTracer(api.Tracer):
    """Starts `LeanSpan`s in place of an SDK tracer, with that tracer's ids, resource and processors. Thread-safe.

    Any sampler but the SDK's default (parent-based, on) is left to the SDK's tracer, and so are limits of length, the
    SDK's metrics of itself, and a tracer turned off.
    """

    def __init__(self, tracer: Tracer) -> None:
        self.sdk = tracer
        self.scope = tracer._instrumentation_scope
        self.limits = limits = tracer._span_limits
        self.max_attributes = sys.maxsize if limits.max_span_attributes is None else limits.max_span_attributes
        self.max_links = sys.maxsize if limits.max_links is None else limits.max_links
        self._ids = tracer.id_generator
        self._new_flags = _SAMPLED_RANDOM if tracer.id_generator.is_trace_id_random() else _SAMPLED
        self._lean = (
            tracer.sampler is DEFAULT_ON
            and limits.max_attribute_length is None
            and limits.max_span_attribute_length is None
            and type(tracer._tracer_metrics).__name__ == "NoOpTracerMetrics"
        )

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> api.Span:
        """Start a span; the attributes must be clean."""
        tracer = self.sdk
        parent: SpanContext | None = api.get_current_span(context).get_span_context()
        flags: TraceFlags | None = self._new_flags
        if parent is not None:
            if parent.is_valid:
                flags = _CHILD_FLAGS[parent.trace_flags & 3]
            else:
                parent = None
        usual = record_exception and set_status_on_exception and self._lean and tracer._is_enabled()
        if flags is None or not usual:
            return tracer.start_span(
                name, context, kind, attributes, links, start_time, record_exception, set_status_on_exception
            )
        if parent is None:
            trace_id, state = self._ids.generate_trace_id(), None
        else:
            trace_id, state = parent.trace_id, parent.trace_state
        identity = SpanContext(trace_id, self._ids.generate_span_id(), False, flags, state)
        began = time.time_ns() if start_time is None else start_time
        span = LeanSpan(self, name, identity, parent, kind, attributes, links, began)
        tracer.span_processor.on_start(span, parent_context=context)  # type: ignore[arg-type]
        return span

    def start_as_current_span(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Start a span and make it current for a block, as the SDK's tracer does."""
        return self.sdk.start_as_current_span(name, *args, **kwargs)
