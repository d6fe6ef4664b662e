"""Spans and metric points as Arrow tables, in the columns of the OpenTelemetry Collector's ClickHouse exporter.

Names, order and text values are those of its tables otel_traces and otel_metrics_gauge, _sum, _histogram and
_exponential_histogram, so that the files can be inserted there as they are. Times are nanoseconds throughout; `Min` and
`Max` are null where they are not known. Importing this module imports pyarrow: do so on first use.
"""

from __future__ import annotations

import base64
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanKind, StatusCode, TraceState

from otel_odibi.clean import plain_text, to_json
from otel_odibi.names import SERVICE_NAME

TEXT: Final = pa.string()
TIME: Final = pa.timestamp("ns", tz="UTC")
MAP: Final = pa.map_(pa.string(), pa.string())
FLOAT: Final = pa.float64()

_RANGES: Final = {
    TIME: (0, 2**63 - 1), pa.uint64(): (0, 2**64 - 1), pa.uint32(): (0, 2**32 - 1), pa.int32(): (-(2**31), 2**31 - 1),
}  # fmt: skip
# What no dictionary helps with. Of a million spans with 12 attributes and one link these encodings take 51 bytes each
# where the defaults take 68; a higher level of zstd makes numbers in hexadecimal no smaller.
_DELTA: Final = "DELTA_BINARY_PACKED"
_LENGTHS: Final = "DELTA_LENGTH_BYTE_ARRAY"
_ENCODINGS: Final = {
    "Timestamp": _DELTA,
    "Duration": _DELTA,
    "TraceId": _LENGTHS,
    "SpanId": _LENGTHS,
    "ParentSpanId": _LENGTHS,
    "SpanAttributes.key_value.value": _LENGTHS,
    "Links.list.element.TraceId": _LENGTHS,
    "Links.list.element.SpanId": _LENGTHS,
}
_KINDS: Final = {kind: kind.name.capitalize() for kind in SpanKind}
_CODES: Final = {code: code.name.capitalize() for code in StatusCode}


class Column(NamedTuple):
    """One column: `read` takes the rows (ended spans, or metric points) and returns a value for each.

    With `of`, what `read` returns are objects of which few are distinct, and `of(object)` is the value. With
    `children`, each value is a sequence of objects, which become a list of structs.
    """

    name: str
    type: pa.DataType | None
    read: Callable[[Sequence[Any]], Sequence[Any]]
    of: Callable[[Any], Any] | None = None
    children: tuple[Column, ...] = ()


# --- values ----------------------------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """Return an attribute value as text: true, false, shortest numbers, base64 of bytes, JSON of lists and maps.

    None is the empty text. Never raises for what OpenTelemetry allows as a value, at any size or depth.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return int.__repr__(value) if value.bit_length() < 10_000 else hex(value)  # Python prints no longer ones
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return to_json(value).decode()


def _each(path: str) -> Callable[[Sequence[Any]], list[Any]]:
    get = attrgetter(path)
    return lambda rows: list(map(get, rows))


def _ids(path: str, digits: int) -> Callable[[Sequence[Any]], list[str]]:
    """Read identifiers as lower-case hexadecimal; the empty text where there is none."""
    get, form = attrgetter(path), f"%0{digits}x"
    return lambda rows: [form % value if value else "" for value in map(get, rows)]


def _parents(spans: Sequence[Any]) -> list[str]:
    return [f"{parent.span_id:016x}" if parent else "" for parent in map(attrgetter("parent"), spans)]


def _durations(spans: Sequence[Any]) -> list[int]:
    return [(span.end_time or 0) - span.start_time for span in spans]


def _state(state: TraceState | None) -> str:
    return state.to_header() if state else ""


def _service(resource: Resource) -> str:
    return text(resource.attributes.get(SERVICE_NAME))


def _or(value: Any) -> Callable[[Any], Any]:
    return lambda found: value if found is None else found


# --- Arrow arrays ----------------------------------------------------------------------------------------------------


def _texts(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values, TEXT)
    except (UnicodeEncodeError, pa.ArrowException):
        return pa.array([plain_text(text(value)) for value in values], TEXT)


def _integers(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return an array of integers (or times); those that the type cannot hold become the nearest it can."""
    try:
        return pa.array(values, kind)
    except (OverflowError, pa.ArrowException):
        low, high = _RANGES[kind]
        return pa.array([min(max(value, low), high) for value in values], kind)


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(list(itertools.accumulate(lengths, initial=0)), pa.int32())


def _maps(attributes: Sequence[Mapping[str, Any] | None]) -> pa.MapArray:
    """Return maps of texts, from one flat list of keys and one of values: an object a row would cost far more."""
    keys: list[str] = []
    values: list[str] = []
    lengths: list[int] = []
    for mapping in attributes:
        try:
            items = mapping.copy()  # type: ignore[union-attr]  # the SDK's attributes are slow to iterate, quick to copy
        except AttributeError:
            items = mapping or {}
        keys.extend(items)
        values.extend([value if type(value) is str else text(value) for value in items.values()])
        lengths.append(len(items))
    return pa.MapArray.from_arrays(_offsets(lengths), _texts(keys), _texts(values))


def _distinct(objects: Sequence[Any], of: Callable[[Any], Any], kind: pa.DataType) -> pa.Array:
    """Return a column in which one object stands for many rows: each is converted once, then taken by its index."""
    found = {id(item): item for item in objects}
    values = _array([of(item) for item in found.values()], kind)
    if len(found) == 1:
        return values.take(pa.repeat(0, len(objects)))
    index = {key: number for number, key in enumerate(found)}
    return values.take(pa.array([index[id(item)] for item in objects], pa.int64()))


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if kind == TEXT:
        return _texts(values)
    if kind == MAP:
        return _maps(values)
    if kind in _RANGES:
        return _integers(values, kind)
    if kind == FLOAT:
        return pa.array([None if value is None else float(value) for value in values], FLOAT)
    return pa.array(values, kind)


def _build(column: Column, rows: Sequence[Any]) -> pa.Array:
    values = column.read(rows)
    if column.children:
        flat = [item for items in values for item in items]
        fields = [pa.field(child.name, _type(child)) for child in column.children]
        structs = pa.StructArray.from_arrays([_build(child, flat) for child in column.children], fields=fields)
        return pa.ListArray.from_arrays(_offsets(map(len, values)), structs)
    if column.of is not None:
        return _distinct(values, column.of, column.type)
    return _array(values, column.type)


def _type(column: Column) -> pa.DataType:
    if column.children:
        return pa.list_(pa.struct([(child.name, _type(child)) for child in column.children]))
    return column.type


def to_batch(folder: str, rows: Sequence[Any]) -> pa.RecordBatch:
    """Return rows of one dataset as a record batch. Raises whatever a row that cannot be read raises."""
    return pa.RecordBatch.from_arrays([_build(column, rows) for column in TABLES[folder]], schema=SCHEMAS[folder])


def to_parquet(batches: Sequence[pa.RecordBatch]) -> pa.Buffer:
    """Return record batches of one table as one Parquet file."""
    table = pa.Table.from_batches(batches)
    paths = _leaves(table.schema)
    encodings = {path: _ENCODINGS[path] for path in paths if path in _ENCODINGS}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=1,
        use_dictionary=[path for path in paths if path not in encodings],
        column_encoding=encodings,
        write_statistics=[path for path in paths if "." not in path],  # of nested columns they prune nothing
        store_schema=False,  # the Parquet types say it all
    )
    return sink.getvalue()


@functools.cache
def _leaves(schema: pa.Schema) -> list[str]:
    """Return the paths of the Parquet columns, as `Links.list.element.SpanId`."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    found = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [found.column(number).path for number in range(len(found.names))]


# --- the tables ------------------------------------------------------------------------------------------------------

_ATTRIBUTES: Final = attrgetter("attributes")

EVENT: Final = (
    Column("Timestamp", TIME, _each("timestamp")),
    Column("Name", TEXT, _each("name")),
    Column("Attributes", MAP, _each("attributes")),
)
LINK: Final = (
    Column("TraceId", TEXT, _ids("context.trace_id", 32)),
    Column("SpanId", TEXT, _ids("context.span_id", 16)),
    Column("TraceState", TEXT, _each("context.trace_state"), _state),
    Column("Attributes", MAP, _each("attributes")),
)
SPAN: Final = (
    Column("Timestamp", TIME, _each("start_time")),
    Column("TraceId", TEXT, _ids("context.trace_id", 32)),
    Column("SpanId", TEXT, _ids("context.span_id", 16)),
    Column("ParentSpanId", TEXT, _parents),
    Column("TraceState", TEXT, _each("context.trace_state"), _state),
    Column("SpanName", TEXT, _each("name")),
    Column("SpanKind", TEXT, _each("kind"), _KINDS.__getitem__),
    Column("ServiceName", TEXT, _each("resource"), _service),
    Column("ResourceAttributes", MAP, _each("resource"), _ATTRIBUTES),
    Column("ScopeName", TEXT, _each("instrumentation_scope"), lambda scope: scope.name if scope else ""),
    Column("ScopeVersion", TEXT, _each("instrumentation_scope"), lambda scope: (scope.version if scope else "") or ""),
    Column("SpanAttributes", MAP, _each("attributes")),
    Column("Duration", pa.uint64(), _durations),
    Column("StatusCode", TEXT, _each("status"), lambda status: _CODES[status.status_code]),
    Column("StatusMessage", TEXT, _each("status"), lambda status: status.description or ""),
    Column("Events", None, _each("events"), children=EVENT),
    Column("Links", None, _each("links"), children=LINK),
)

EXEMPLAR: Final = (
    Column("FilteredAttributes", MAP, _each("filtered_attributes")),
    Column("TimeUnix", TIME, _each("time_unix_nano")),
    Column("Value", FLOAT, _each("value")),
    Column("SpanId", TEXT, _ids("span_id", 16)),
    Column("TraceId", TEXT, _ids("trace_id", 32)),
)
_ORIGIN: Final = (
    Column("ResourceAttributes", MAP, _each("resource"), _ATTRIBUTES),
    Column("ResourceSchemaUrl", TEXT, _each("resource_url"), _or("")),
    Column("ScopeName", TEXT, _each("scope.name"), _or("")),
    Column("ScopeVersion", TEXT, _each("scope.version"), _or("")),
    Column("ScopeAttributes", MAP, _each("scope"), _ATTRIBUTES),
    Column("ScopeDroppedAttrCount", pa.uint32(), _each("scope"), lambda scope: getattr(scope.attributes, "dropped", 0)),
    Column("ScopeSchemaUrl", TEXT, _each("scope_url"), _or("")),
    Column("ServiceName", TEXT, _each("resource"), _service),
    Column("MetricName", TEXT, _each("metric.name"), text),
    Column("MetricDescription", TEXT, _each("metric.description"), _or("")),
    Column("MetricUnit", TEXT, _each("metric.unit"), _or("")),
    Column("Attributes", MAP, _each("point.attributes")),
    Column("StartTimeUnix", TIME, _each("point.start_time_unix_nano"), _or(0)),
    Column("TimeUnix", TIME, _each("point.time_unix_nano")),
)
_VALUE: Final = Column("Value", FLOAT, _each("point.value"))
_COUNT: Final = Column("Count", pa.uint64(), _each("point.count"))
_SUM: Final = Column("Sum", FLOAT, _each("point.sum"))
_FLAGS: Final = Column("Flags", pa.uint32(), lambda rows: [getattr(row.point, "flags", 0) for row in rows])
_EXEMPLARS: Final = Column("Exemplars", None, _each("point.exemplars"), children=EXEMPLAR)
_MIN: Final = Column("Min", FLOAT, _each("point.min"))
_MAX: Final = Column("Max", FLOAT, _each("point.max"))
_TEMPORALITY: Final = Column("AggregationTemporality", pa.int32(), _each("metric.data.aggregation_temporality"), int)

GAUGE: Final = (*_ORIGIN, _VALUE, _FLAGS, _EXEMPLARS)
SUM: Final = (*GAUGE, _TEMPORALITY, Column("IsMonotonic", pa.bool_(), _each("metric.data.is_monotonic")))
HISTOGRAM: Final = (
    *_ORIGIN, _COUNT, _SUM,
    Column("BucketCounts", pa.list_(pa.uint64()), _each("point.bucket_counts")),
    Column("ExplicitBounds", pa.list_(FLOAT), _each("point.explicit_bounds")),
    _EXEMPLARS, _FLAGS, _MIN, _MAX, _TEMPORALITY,
)  # fmt: skip
EXPONENTIAL_HISTOGRAM: Final = (
    *_ORIGIN, _COUNT, _SUM,
    Column("Scale", pa.int32(), _each("point.scale")),
    Column("ZeroCount", pa.uint64(), _each("point.zero_count")),
    Column("PositiveOffset", pa.int32(), _each("point.positive.offset")),
    Column("PositiveBucketCounts", pa.list_(pa.uint64()), _each("point.positive.bucket_counts")),
    Column("NegativeOffset", pa.int32(), _each("point.negative.offset")),
    Column("NegativeBucketCounts", pa.list_(pa.uint64()), _each("point.negative.bucket_counts")),
    _EXEMPLARS, _FLAGS, _MIN, _MAX, _TEMPORALITY,
)  # fmt: skip

TABLES: Final[dict[str, tuple[Column, ...]]] = {
    "spans": SPAN,
    "metrics/gauge": GAUGE,
    "metrics/sum": SUM,
    "metrics/histogram": HISTOGRAM,
    "metrics/exponential_histogram": EXPONENTIAL_HISTOGRAM,
}
"""The datasets by folder."""

SCHEMAS: Final = {
    folder: pa.schema([(column.name, _type(column)) for column in columns]) for folder, columns in TABLES.items()
}
