"""Spans and metric points as Parquet, in the columns of the OpenTelemetry Collector's ClickHouse exporter.

Names, order and text values are those of its tables otel_traces and otel_metrics_gauge, _sum, _histogram and
_exponential_histogram, so that the files can be inserted there as they are. Times are nanoseconds throughout; `Min` and
`Max` are null where they are not known. Importing this module imports pyarrow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanKind, StatusCode, TraceState

from otel_odibi.exporters.columns import FLOAT, MAP, TEXT, TIME, WHOLE, Column, build, text, type_of
from otel_odibi.names import SERVICE_NAME

# What no dictionary helps with. Bytes a span over 100,000 of them, 20 a trace, with 12 attributes and one link, where
# five attributes are random numbers, change by a thousandth, or never change: 50.6, 43.5, 32.0; where everything has
# pyarrow's defaults and zstd: 65.7, 55.4, 41.5. Level 6 makes attributes smaller, but hexadecimal larger.
_DELTA: Final = "DELTA_BINARY_PACKED"
_LENGTHS: Final = "DELTA_LENGTH_BYTE_ARRAY"
_VALUES: Final = "SpanAttributes.key_value.value"
GROUP: Final = 17_000
"""Rows of a row group: a reader that needs little memory takes one at a time."""
_MAX_WORDS: Final = 8 * 2**20  # bytes; far above it a dictionary is no gain
_ENCODINGS: Final = {
    "Timestamp": _DELTA,
    "Duration": _DELTA,
    "TraceId": _LENGTHS,
    "SpanId": _LENGTHS,
    "ParentSpanId": _LENGTHS,
    _VALUES: _LENGTHS,
    "Links.list.element.TraceId": _LENGTHS,
    "Links.list.element.SpanId": _LENGTHS,
}
_KINDS: Final = {kind: kind.name.capitalize() for kind in SpanKind}
_CODES: Final = {code: code.name.capitalize() for code in StatusCode}


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
    folder: pa.schema([(column.name, type_of(column)) for column in columns]) for folder, columns in TABLES.items()
}


def to_batch(folder: str, rows: Sequence[Any]) -> pa.RecordBatch:
    """Return rows of one dataset as a record batch. Raises whatever a row that cannot be read raises."""
    return pa.RecordBatch.from_arrays([build(column, rows) for column in TABLES[folder]], schema=SCHEMAS[folder])


def to_parquet(batches: Sequence[pa.RecordBatch]) -> pa.Buffer:
    """Return record batches of one table as one Parquet file."""
    table, sink = pa.Table.from_batches(batches), pa.BufferOutputStream()
    with writer(sink, table.schema, few_values(table)) as file:
        file.write_table(table, GROUP)
    return sink.getvalue()


def writer(sink: Any, schema: pa.Schema, few: bool) -> pq.ParquetWriter:
    """Return a writer of one Parquet file; `few`: of each table that it gets `few_values` is true."""
    paths = _leaves(schema)
    encodings = {path: _ENCODINGS[path] for path in paths if path in _ENCODINGS and not (few and path == _VALUES)}
    made = pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        compression_level={path: 6 if path == _VALUES else 1 for path in paths},
        use_dictionary=[path for path in paths if path not in encodings],
        column_encoding=encodings,
        write_statistics=[path for path in paths if "." not in path],  # of nested columns they prune nothing
        dictionary_pagesize_limit=2 * _MAX_WORDS,
        store_schema=False,  # the Parquet types say it all
    )
    if few and hasattr(made, "add_key_value_metadata"):  # since pyarrow 16
        made.add_key_value_metadata(dict([WHOLE]))
    return made


def few_values(table: pa.Table) -> bool:
    """Tell whether attribute values of spans repeat so often that a dictionary is smaller, and far quicker to read."""
    if "SpanAttributes" not in table.column_names:
        return False
    values = pa.chunked_array([chunk.items for chunk in table["SpanAttributes"].chunks], TEXT)
    words = values.unique()
    return bool(len(words) * 4 <= len(values) and words.nbytes < _MAX_WORDS)


@functools.cache
def _leaves(schema: pa.Schema) -> list[str]:
    """Return the paths of the Parquet columns, as `Links.list.element.SpanId`."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    found = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [found.column(number).path for number in range(len(found.names))]
