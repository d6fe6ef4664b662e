"""Takes finished spans off the pipeline's hands: a bounded queue, one thread, secrets redacted, losses counted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import Event, ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import Link, Status

from otel_odibi import names
from otel_odibi.clean import Cleaner, clean_name
from otel_odibi.forks import after_fork

OnDrop = Callable[[str, int], None]
_OWN_ATTRIBUTES = frozenset(
    value for key, value in vars(names).items() if key.isupper() and isinstance(value, str) and "." in value
) - {names.EXCEPTION_MESSAGE, names.EXCEPTION_STACKTRACE}
"""Attributes this package sets itself, clean already."""


class SpanQueue(SpanProcessor):
    """Queues finished spans and hands them, cleaned, to one exporter on a thread of its own.

    `on_end` never blocks and never raises; beyond `limit` waiting spans the newest is dropped and counted through
    `on_drop(reason, count)`. The thread starts with the first span and is a daemon; a forked child starts with an
    empty queue, as the parent still has what waited. Every wait is bounded by its argument.
    """

    def __init__(
        self, exporter: SpanExporter, *, cleaner: Cleaner, interval: float, limit: int, on_drop: OnDrop
    ) -> None:
        self._exporter = exporter
        self._tick = getattr(exporter, "tick", None)  # an exporter that collects writes what has waited long enough
        self._cleaner = cleaner
        self._interval = interval
        self._limit = limit
        self._wake_at = max(1, limit // 8)
        self._on_drop = on_drop
        self._stopping = False
        self._reset()
        after_fork(self._reset)

    def _reset(self) -> None:
        self._queue: deque[ReadableSpan] = deque()
        self._lock = threading.RLock()  # a collection while it is held may end a span
        self._wake = threading.Event()
        self._flushes: deque[threading.Event] = deque()
        self._thread: threading.Thread | None = None
        self._exporting = 0

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Do nothing."""

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a sampled span. After `stop()` spans are let go."""
        if self._stopping or not span.context.trace_flags & 1:
            return
        if len(self._queue) >= self._limit:
            self._on_drop("queue_full", 1)
            return
        self._queue.append(span)
        if self._thread is None:
            with suppress(
                RuntimeError
            ):  # no thread to be had just now: the span waits for the next one, or for the end
                self._start()
        if len(self._queue) >= self._wake_at:
            self._wake.set()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Export what waits and flush the exporter; True where that was done in time."""
        if self._queue and self._thread is None:
            with suppress(RuntimeError):
                self._start()
        if self._thread is None or not self._thread.is_alive():
            return not self._queue
        done = threading.Event()
        self._flushes.append(done)
        self._wake.set()
        return done.wait(timeout_millis / 1000)

    def stop(self) -> None:
        """Begin to shut down without waiting: take no more spans, export what waits, shut the exporter down."""
        self._stopping = True
        self._wake.set()

    def shutdown(self, timeout_millis: int = 30_000) -> None:
        """Stop, and wait for that; spans that have not got out within the time are dropped and counted.

        Where no thread was ever started, for want of spans or of threads, the exporter is called in this one.
        """
        self.stop()
        thread = self._thread
        if thread is None:
            self._finish()
            return
        thread.join(timeout_millis / 1000)
        left = len(self._queue) + (0 if getattr(self._exporter, "hands_over", False) else self._exporting)
        if left:
            self._on_drop("exit_timeout", left)
            self._queue.clear()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="otel-odibi-spans", daemon=True)
                thread.start()
                self._thread = thread

    def _work(self) -> None:
        with suppress_instrumentation():
            while not self._stopping:
                self._wake.wait(self._interval)
                self._wake.clear()
                flushes = [self._flushes.popleft() for _ in range(len(self._flushes))]
                self._export()
                if flushes:
                    self._guarded(self._exporter.force_flush)
                elif self._tick is not None:
                    self._guarded(self._tick)
                for done in flushes:
                    done.set()
            self._finish()

    def _finish(self) -> None:
        self._export()
        self._guarded(self._exporter.shutdown)
        while self._flushes:
            self._flushes.popleft().set()

    def _export(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._wake_at))]
            self._exporting = len(batch)
            result = self._guarded(self._send, batch)
            self._exporting = 0
            if result is not SpanExportResult.SUCCESS:
                self._on_drop("export_failed", len(batch))

    def _send(self, batch: list[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export([clean_span(span, self._cleaner) for span in batch])

    def _guarded(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception:  # noqa: BLE001 - an exporter may raise anything
            return None


def clean_span(span: ReadableSpan, cleaner: Cleaner) -> ReadableSpan:
    """Return `span` with secrets redacted and long texts cut: itself where there is nothing to do, else a copy."""
    before = (span.attributes, span.events, span.links)
    attributes = clean_attributes(before[0], cleaner)
    events = tuple(_clean_event(event, cleaner) for event in before[1]) if before[1] else before[1]
    links = tuple(_clean_link(link, cleaner) for link in before[2]) if before[2] else before[2]
    own = span.instrumentation_scope is not None and span.instrumentation_scope.name == names.SCOPE
    name = span.name if own else clean_name(span.name)
    status = span.status if not span.status.description else _clean_status(span.status, cleaner)
    same = attributes is before[0] and _same(events, before[1]) and _same(links, before[2])
    if same and name == span.name and status is span.status:
        return span
    return ReadableSpan(
        name=name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=attributes,
        events=events,
        links=links,
        kind=span.kind,
        status=status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def clean_attributes(attributes: Any, cleaner: Cleaner) -> Any:
    """Return the attributes, names and values cleaned: the same object where nothing had to be changed."""
    if not attributes:
        return attributes
    out: dict[str, Any] = {}
    changed = False
    for key, value in attributes.items():
        kind = type(value)
        if kind is float or kind is bool or (key in _OWN_ATTRIBUTES and kind is not str):
            out[key] = value
            continue
        # Our own are clean, unless someone has set them on the current span: short texts, and most known already.
        name = key if key in _OWN_ATTRIBUTES else clean_name(key)
        safe = clean_name(value) if name is key and key in _OWN_ATTRIBUTES else cleaner.attribute(name, value)
        if name == key and (safe == list(value) if kind is tuple and type(safe) is list else safe == value):
            out[key] = value
        else:
            out[name] = safe
            changed = True
    return out if changed else attributes


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return all(x is y for x, y in zip(a, b, strict=True))


def _clean_status(status: Status, cleaner: Cleaner) -> Status:
    safe = cleaner.text(status.description or "")
    return status if safe == status.description else Status(status.status_code, safe)


def _clean_event(event: Event, cleaner: Cleaner) -> Event:
    attributes: Mapping[str, Any] | None = clean_attributes(event.attributes, cleaner)
    name = clean_name(event.name)
    return event if attributes is event.attributes and name == event.name else Event(name, attributes, event.timestamp)


def _clean_link(link: Link, cleaner: Cleaner) -> Link:
    attributes = clean_attributes(link.attributes, cleaner)
    return link if attributes is link.attributes else Link(link.context, attributes)
