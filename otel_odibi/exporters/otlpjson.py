"""Spans in OTLP/JSON: hexadecimal ids, 64-bit integers as text, enumerations as numbers, keys in lowerCamelCase.

Source: OTLP specification, JSON Protobuf Encoding. The messages are those of the OTLP exporters of the SDK, field for
field, and the trace state of links besides.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import orjson
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Link, SpanContext

from otel_odibi.clean import MAX_DEPTH, plain_text, to_json

MAX_LINE: Final = 4 * 2**20
"""Size above which a line is split, in bytes: OTLP receivers take 4 MiB by default. One span is never split."""

_2_63: Final = 2**63
_HAS_REMOTE, _IS_REMOTE = 0x100, 0x200
_NOT_FINITE: Final = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_OPTIONS: Final = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY


def encode_spans(spans: Iterable[ReadableSpan]) -> dict[str, Any]:
    """Return one ExportTraceServiceRequest, spans grouped by resource and scope, as JSON has it."""
    groups: dict[int, tuple[ReadableSpan, dict[int, list[ReadableSpan]]]] = {}
    for span in spans:
        _, scopes = groups.setdefault(id(span.resource), (span, {}))
        scopes.setdefault(id(span.instrumentation_scope), []).append(span)
    return {"resourceSpans": [_resource_spans(first.resource, scopes) for first, scopes in groups.values()]}


def span_lines(spans: Sequence[ReadableSpan]) -> Iterator[tuple[bytes, int]]:
    """Yield lines of about 4 MiB at most, and how many spans each holds; an empty line for an unreadable span."""
    try:
        line = dump(encode_spans(spans))
    except Exception:  # noqa: BLE001 - spans come from anywhere
        line = b""
    if len(spans) > 1 and not 0 < len(line) <= MAX_LINE:
        half = len(spans) // 2
        yield from span_lines(spans[:half])
        yield from span_lines(spans[half:])
    else:
        yield line, len(spans)


def _resource_spans(resource: Resource, scopes: Mapping[int, list[ReadableSpan]]) -> dict[str, Any]:
    return {
        "resource": {"attributes": attributes_of(resource.attributes)},
        "scopeSpans": [_scope_spans(spans) for spans in scopes.values()],
        "schemaUrl": resource.schema_url,
    }


def _scope_spans(spans: list[ReadableSpan]) -> dict[str, Any]:
    scope = spans[0].instrumentation_scope
    encoded = [_span(span) for span in spans]
    if scope is None:
        return {"scope": {}, "spans": encoded}
    named = {"name": scope.name, "version": scope.version or "", "attributes": attributes_of(scope.attributes)}
    return {"scope": named, "spans": encoded, "schemaUrl": scope.schema_url or ""}


def _span(span: ReadableSpan) -> dict[str, Any]:
    context, parent, status = span.context, span.parent, span.status
    out = {
        "traceId": f"{context.trace_id:032x}",
        "spanId": f"{context.span_id:016x}",
        "flags": _flags(parent),
        "name": span.name,
        "kind": span.kind.value + 1,  # OTLP has 0 for unspecified
        "startTimeUnixNano": str(span.start_time or 0),
        "endTimeUnixNano": str(span.end_time or 0),
        "attributes": attributes_of(span.attributes),
        "status": {"code": status.status_code.value, "message": status.description or ""},
    }
    if parent:
        out["parentSpanId"] = f"{parent.span_id:016x}"
    # What most spans have not is left out, as a reader takes the default then.
    optional = (
        ("traceState", _state(context)),
        ("events", [_event(event) for event in span.events]),
        ("links", [_link(link) for link in span.links]),
        ("droppedAttributesCount", span.dropped_attributes),
        ("droppedEventsCount", span.dropped_events),
        ("droppedLinksCount", span.dropped_links),
    )
    return {**out, **{key: value for key, value in optional if value}}


def _state(context: SpanContext) -> str:
    return context.trace_state.to_header() if context.trace_state else ""


def _flags(context: SpanContext | None) -> int:
    return _HAS_REMOTE | _IS_REMOTE if context and context.is_remote else _HAS_REMOTE


def _event(event: Event) -> dict[str, Any]:
    return {
        "timeUnixNano": str(event.timestamp),
        "name": event.name,
        "attributes": attributes_of(event.attributes),
        "droppedAttributesCount": event.dropped_attributes,
    }


def _link(link: Link) -> dict[str, Any]:
    return {
        "traceId": f"{link.context.trace_id:032x}",
        "spanId": f"{link.context.span_id:016x}",
        "traceState": _state(link.context),
        "flags": _flags(link.context),
        "attributes": attributes_of(link.attributes),
        "droppedAttributesCount": link.dropped_attributes,
    }


def attributes_of(attributes: Any, depth: int = 0) -> list[dict[str, Any]]:
    """Return attributes as a list of KeyValue."""
    # The SDK's attributes are slow to iterate and quick to copy.
    items = attributes.copy() if hasattr(attributes, "copy") else attributes or {}
    return [{"key": key, "value": _value(value, depth)} for key, value in items.items()]


def _value(value: Any, depth: int) -> dict[str, Any]:
    """Return an AnyValue. Integers beyond 64 bits, and what is nested deeper than 8, become text."""
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(int(value))} if -_2_63 <= value < _2_63 else {"stringValue": _digits(value)}
    if isinstance(value, float):
        return {"doubleValue": float(value) if math.isfinite(value) else _NOT_FINITE[str(float(value))]}
    if value is None:
        return {}
    if isinstance(value, bytes):
        return {"bytesValue": base64.b64encode(value).decode()}
    if depth < MAX_DEPTH and isinstance(value, Mapping):
        return {"kvlistValue": {"values": attributes_of(value, depth + 1)}}
    if depth < MAX_DEPTH and isinstance(value, Sequence):
        return {"arrayValue": {"values": [_value(item, depth + 1) for item in value]}}
    return {"stringValue": to_json(value).decode()}


def _digits(value: int) -> str:
    return int.__repr__(value) if value.bit_length() < 10_000 else hex(value)  # Python prints no longer ones


def dump(document: Any) -> bytes:
    """Return a document as a line. Lone surrogates, and whatever else JSON has not, are replaced."""
    try:
        return orjson.dumps(document, option=_OPTIONS)
    except TypeError:
        return orjson.dumps(_plain(document), option=_OPTIONS)


def _plain(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        return plain_text(str.__str__(value))
    if isinstance(value, float):
        return float(value)
    if value is None or isinstance(value, int):
        return value if value is None or -_2_63 <= value < _2_63 else _digits(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if depth < 100 and isinstance(value, Mapping):
        return {plain_text(str(key)): _plain(item, depth + 1) for key, item in value.items()}
    if depth < 100 and isinstance(value, Sequence):
        return [_plain(item, depth + 1) for item in value]
    return plain_text(str(value)) if depth < 100 else "…"
