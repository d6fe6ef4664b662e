"""Spans and log lines as OTLP/JSON, which collectors and OTLP endpoints read, and tables as CSV."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final

import orjson
import pyarrow as pa
import pyarrow.csv

from otel_odibi import names
from otel_odibi.exporters.otlpjson import attributes_of, dump
from otel_odibi.store.facts import FACTS, WORD
from otel_odibi.store.lines import Record
from otel_odibi.store.views import as_rows

_BATCH: Final = 500
_KINDS: Final = {"Internal": 1, "Server": 2, "Client": 3, "Producer": 4, "Consumer": 5}
_CODES: Final = {"Ok": 1, "Error": 2}
_SEVERITIES: Final = {"debug": 5, "info": 9, "warning": 13, "error": 17, "critical": 21}
_TYPED: Final = {key for key, kind in FACTS.values() if kind != WORD} | {
    names.NODE_COLUMNS, names.NODE_DEPENDS_ON, names.THREAD_ID,
}  # fmt: skip
"""Attributes that are texts in Parquet, and were something else."""
_NOT_ATTRIBUTES: Final = (
    "timestamp",
    "time_unix_nano",
    "level",
    "message",
    "trace_id",
    "span_id",
    "trace_flags",
    "service",
)


def write_spans(spans: pa.Table, out: BinaryIO) -> None:
    """Write spans, all columns of them, as export requests, one a line."""
    for batch in filter(len, spans.to_batches(_BATCH)):
        groups = itertools.groupby(as_rows(pa.Table.from_batches([batch])), _origin)
        out.write(
            dump({"resourceSpans": [_resource_spans(*origin, list(map(_span, rows))) for origin, rows in groups]})
        )


def _origin(row: Mapping[str, Any]) -> tuple[Any, str, str]:
    return row["ResourceAttributes"] or [], row["ScopeName"] or "", row["ScopeVersion"] or ""


def _resource_spans(resource: Any, scope: str, version: str, spans: list[dict[str, Any]]) -> dict[str, Any]:
    scope_spans = {"scope": {"name": scope, "version": version}, "spans": spans}
    return {"resource": {"attributes": _attributes(resource)}, "scopeSpans": [scope_spans]}


def _span(row: Mapping[str, Any]) -> dict[str, Any]:
    start = row["Timestamp"]
    more = {
        "parentSpanId": row["ParentSpanId"],
        "traceState": row["TraceState"],
        "events": [
            {"timeUnixNano": str(e["Timestamp"]), "name": e["Name"], "attributes": _attributes(e["Attributes"])}
            for e in row["Events"] or ()
        ],
        "links": [
            {"traceId": link["TraceId"], "spanId": link["SpanId"], "attributes": _attributes(link["Attributes"])}
            for link in row["Links"] or ()
        ],
    }
    return {
        "traceId": row["TraceId"], "spanId": row["SpanId"], "flags": 0x100, "name": row["SpanName"],
        "kind": _KINDS.get(row["SpanKind"], 0), "startTimeUnixNano": str(start),
        "endTimeUnixNano": str(start + (row["Duration"] or 0)),
        "attributes": _attributes(row["SpanAttributes"]),
        "status": {"code": _CODES.get(row["StatusCode"], 0), "message": row["StatusMessage"] or ""},
        **{key: value for key, value in more.items() if value},
    }  # fmt: skip


def _attributes(pairs: Any) -> list[dict[str, Any]]:
    return attributes_of({key: _typed(key, value) for key, value in pairs or ()})


def _typed(key: str, value: str) -> Any:
    try:
        return orjson.loads(value) if key in _TYPED else value
    except ValueError:
        return value


def write_logs(records: Iterator[Record], out: BinaryIO) -> None:
    """Write log lines as export requests, one a line."""
    while batch := list(itertools.islice(records, _BATCH)):
        groups = itertools.groupby(batch, lambda record: str(record.get("service", "")))
        out.write(
            dump({"resourceLogs": [_resource_logs(service, list(map(_log, found))) for service, found in groups]})
        )


def _resource_logs(service: str, logs: list[dict[str, Any]]) -> dict[str, Any]:
    resource = {"attributes": attributes_of({names.SERVICE_NAME: service})}
    return {"resource": resource, "scopeLogs": [{"scope": {"name": names.SCOPE}, "logRecords": logs}]}


def _log(record: Record) -> dict[str, Any]:
    level = str(record.get("level", ""))
    found = {
        "timeUnixNano": str(nanoseconds(record)), "severityNumber": _SEVERITIES.get(level, 0),
        "severityText": level.upper(), "body": {"stringValue": str(record.get("message", ""))},
        "eventName": record.get("event_type"), "traceId": record.get("trace_id"), "spanId": record.get("span_id"),
        "flags": record.get("trace_flags"),
        "attributes": attributes_of({key: value for key, value in record.items() if key not in _NOT_ATTRIBUTES}),
    }  # fmt: skip
    return {key: value for key, value in found.items() if value}


def nanoseconds(record: Record) -> int:
    """Return the time of a log line in Unix nanoseconds, 0 where it has none."""
    told = record.get("time_unix_nano")
    if isinstance(told, int):
        return told
    try:
        return int(pa.scalar(str(record.get("timestamp"))).cast(pa.timestamp("ns", "UTC")).value)
    except pa.ArrowException:
        return 0


def write_csv(table: pa.Table, out: BinaryIO) -> None:
    """Write a table with a header; maps and lists become JSON."""
    for number, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            kind = _without_times(field.type)
            texts = [orjson.dumps(_json(value, kind)).decode() for value in table[number].cast(kind).to_pylist()]
            table = table.set_column(number, field.name, pa.array(texts, pa.string()))
    pyarrow.csv.write_csv(table, out)


def _without_times(kind: pa.DataType) -> pa.DataType:
    """Return a type with texts in place of times, as there is no exact Python type for these."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_times(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_times(kind.value_type)))
    return pa.string() if pa.types.is_timestamp(kind) else kind


def _json(value: Any, kind: pa.DataType) -> Any:
    if pa.types.is_map(kind) and value is not None:
        return dict(value)
    if pa.types.is_list(kind) and value is not None:
        return [_json(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind) and value is not None:
        return {field.name: _json(value[field.name], field.type) for field in kind}
    return value
