"""Parquet spans and metrics: what is read back is what was recorded, and nothing is lost without being counted."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as dataset
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from otel_odibi.errors import SettingError
from otel_odibi.exporters import files, parquet
from otel_odibi.exporters.files import Target
from otel_odibi.exporters.parquet import ParquetMetricExporter, ParquetSpanExporter

OK, FAILED = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
NOON = 1_763_899_200_123_456_789
"""2025-11-23T12:00:00.123456789Z"""


class Losses:
    """An `on_drop` that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def __call__(self, reason: str, count: int) -> None:
        self.told.append((reason, count))

    @property
    def count(self) -> int:
        return sum(count for _, count in self.told)


def recorded(make, **provider) -> list[ReadableSpan]:
    """The spans that `make(tracer)` records, in the order they ended."""
    memory = InMemorySpanExporter()
    tracing = TracerProvider(shutdown_on_exit=False, **provider)
    tracing.add_span_processor(SimpleSpanProcessor(memory))
    make(tracing.get_tracer("otel_odibi", "1.2"))
    return list(memory.get_finished_spans())


def some_spans(count: int, start: int = NOON) -> list[ReadableSpan]:
    """Spans named 0, 1, 2, ..."""

    def make(tracer) -> None:
        for number in range(count):
            tracer.start_span(str(number), start_time=start + number).end(start + number + 5)

    return recorded(make)


def one_span(**attributes) -> list[ReadableSpan]:
    """A span with these attributes."""
    return recorded(lambda tracer: tracer.start_span("s", attributes=attributes).end())


def paths(root: Path) -> list[Path]:
    """Every file below a directory, hidden ones too."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def plain(value: pa.Scalar):
    """An Arrow value in Python: maps as dictionaries, times as nanoseconds."""
    if not value.is_valid:
        return None
    if isinstance(value, pa.TimestampScalar):
        return value.value
    if isinstance(value, pa.MapScalar):
        items = value.as_py()
        assert len(dict(items)) == len(items)
        return dict(items)
    if isinstance(value, pa.StructScalar):
        return {field.name: plain(value[field.name]) for field in value.type}
    return [plain(item) for item in value] if isinstance(value, pa.ListScalar) else value.as_py()


def rows(root: Path, folder: str = "spans") -> list[dict]:
    """Every row of a dataset, in the order of the files."""
    table = dataset.dataset(root / folder, format="parquet").to_table()
    columns = [[plain(value) for value in column] for column in table.columns]
    return [dict(zip(table.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def names(root: Path) -> list[str]:
    return [row["SpanName"] for row in rows(root)]


def pipeline(tracer) -> None:
    """A run of three nodes: a tree with links, events, every status, a remote parent and a trace state."""
    remote = SpanContext(5, 6, True, TraceFlags(1), TraceState([("vendor", "a b")]))
    root = tracer.start_span(
        "pipeline p", trace.set_span_in_context(trace.NonRecordingSpan(remote)), SpanKind.SERVER, start_time=NOON
    )
    inside = trace.set_span_in_context(root)
    read = tracer.start_span("node read", inside, start_time=NOON + 1, attributes={"odibi.node.rows.out": 30})
    read.set_status(StatusCode.OK)
    read.end(NOON + 1_000_000_001)
    join = tracer.start_span(
        "node join", inside, start_time=NOON + 2, links=[Link(read.get_span_context(), {"edge": 1}), Link(remote)]
    )
    join.add_event("retry", {"attempt": 2}, NOON + 7)
    join.add_event("exception", {"exception.message": "no\nsuch"}, NOON + 9)
    join.set_status(Status(StatusCode.ERROR, "no such key"))
    join.end(NOON + 11)
    root.end(NOON + 2_000_000_000)


# --- what is read back -----------------------------------------------------------------------------------------------


def expected(span: ReadableSpan) -> dict:
    """The row of a span, but for its resource and scope."""
    return {
        "Timestamp": span.start_time,
        "TraceId": trace.format_trace_id(span.context.trace_id),
        "SpanId": trace.format_span_id(span.context.span_id),
        "ParentSpanId": trace.format_span_id(span.parent.span_id) if span.parent else "",
        "TraceState": span.context.trace_state.to_header(),
        "SpanName": span.name,
        "SpanKind": span.kind.name.capitalize(),
        "SpanAttributes": {key: str(value) for key, value in span.attributes.items()},
        "Duration": span.end_time - span.start_time,
        "StatusCode": span.status.status_code.name.capitalize(),
        "StatusMessage": span.status.description or "",
    }


def test_spans_read_back_equal_to_those_in_memory(tmp_path):
    """Tree, ids, names, statuses, attributes and times are those of an in-memory exporter, to the nanosecond."""
    spans = recorded(pipeline, resource=Resource({"service.name": "flights", "answer": 42}))
    exporter = ParquetSpanExporter(tmp_path)
    assert exporter.export(spans) is OK
    exporter.shutdown()
    found = rows(tmp_path)
    assert [{key: row[key] for key in expected(spans[0])} for row in found] == [expected(span) for span in spans]
    assert {row["ServiceName"] for row in found} == {"flights"}
    assert found[0]["ResourceAttributes"] == {"service.name": "flights", "answer": "42"}
    assert {(row["ScopeName"], row["ScopeVersion"]) for row in found} == {("otel_odibi", "1.2")}
    assert [row["StatusCode"] for row in found] == ["Ok", "Error", "Unset"]


def test_links_and_events_read_back(tmp_path):
    """Links keep ids, trace state and attributes; events keep name, attributes and nanoseconds."""
    spans = recorded(pipeline)
    exporter = ParquetSpanExporter(tmp_path)
    exporter.export(spans)
    exporter.shutdown()
    read, join, _ = rows(tmp_path)
    ids = {"TraceId": read["TraceId"], "SpanId": read["SpanId"]}
    assert join["Links"] == [
        {**ids, "TraceState": "vendor=a b", "Attributes": {"edge": "1"}},
        {"TraceId": f"{5:032x}", "SpanId": f"{6:016x}", "TraceState": "vendor=a b", "Attributes": {}},
    ]
    assert join["Events"] == [
        {"Timestamp": NOON + 7, "Name": "retry", "Attributes": {"attempt": "2"}},
        {"Timestamp": NOON + 9, "Name": "exception", "Attributes": {"exception.message": "no\nsuch"}},
    ]
    assert read["Links"] == read["Events"] == []


def test_duckdb_reads_the_same(tmp_path):
    """DuckDB finds every span with its date, map, links and times (as microseconds, which is what older ones keep)."""
    spans = recorded(pipeline)
    exporter = ParquetSpanExporter(tmp_path)
    exporter.export(spans)
    exporter.shutdown()
    found = duckdb.sql(
        f"""select SpanName, epoch_ns(Timestamp) // 1000, Duration,
        map_extract(SpanAttributes, 'odibi.node.rows.out')[1], len(Links), Links[1].SpanId, cast(date as varchar)
        from read_parquet('{tmp_path}/spans/*/*.parquet', hive_partitioning=1) order by Duration"""
    ).fetchall()
    noon, read = NOON // 1000, expected(spans[0])["SpanId"]
    assert found == [
        ("node join", noon, 9, None, 2, read, "2025-11-23"),
        ("node read", noon, 1_000_000_000, "30", 0, None, "2025-11-23"),
        ("pipeline p", noon, 2_000_000_000, None, 0, None, "2025-11-23"),
    ]


def test_columns_are_those_of_the_clickhouse_exporter(tmp_path):
    """Names and order of otel_traces; the file has the types of the published schema."""
    exporter = ParquetSpanExporter(tmp_path)
    exporter.export(some_spans(1))
    exporter.shutdown()
    assert parquet.SPAN_SCHEMA.names == [
        "Timestamp", "TraceId", "SpanId", "ParentSpanId", "TraceState", "SpanName", "SpanKind", "ServiceName",
        "ResourceAttributes", "ScopeName", "ScopeVersion", "SpanAttributes", "Duration", "StatusCode", "StatusMessage",
        "Events", "Links",
    ]  # fmt: skip
    assert pq.read_schema(paths(tmp_path)[0]) == parquet.SPAN_SCHEMA
    assert parquet.SPAN_SCHEMA.field("Timestamp").type == pa.timestamp("ns", "UTC")
    assert parquet.SPAN_SCHEMA.field("Duration").type == pa.uint64()
    with pytest.raises(AttributeError):
        parquet.SUMMARY_SCHEMA  # noqa: B018


def test_importing_the_exporter_does_not_import_pyarrow():
    """pyarrow takes a third of a second to import, so it waits for the first span."""
    code = "import sys, otel_odibi.exporters.parquet; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"), (False, "false"), (3, "3"), (-0.1, "-0.1"), (1e300, "1e+300"), (2.0, "2.0"),
        (2**70, str(2**70)),
        (math.nan, "nan"), (math.inf, "inf"), (None, ""), ("text", "text"), ("", ""), (b"\x00\xff", "AP8="),
        ([1, 2.5], "[1,2.5]"), (["a", "é"], '["a","é"]'), ([], "[]"), ({"a": [True, None]}, '{"a":[true,null]}'),
        ("\ud800x", "\ufffdx"), ("\0", "\0"),
    ],
)  # fmt: skip
def test_attribute_values_as_text(tmp_path, value, text):
    """Booleans in lower case, shortest numbers, JSON for lists and maps, base64 for bytes, nothing for None."""
    exporter = ParquetSpanExporter(tmp_path)
    exporter.export(one_span(key=value))
    exporter.shutdown()
    assert rows(tmp_path)[0]["SpanAttributes"] == {"key": text}


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary()
    | st.integers(10**4000, 10**4001) | st.text(st.characters(categories=["Cs"]))
)  # fmt: skip
keys = st.text(st.characters(), min_size=1)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(), anything, max_size=6))
def test_any_attributes_make_a_valid_row(tmp_path_factory, attributes):
    """Whatever the attributes of one span, its row is there with every key, and so is that of its neighbour."""
    root = tmp_path_factory.mktemp("any")
    losses = Losses()
    exporter = ParquetSpanExporter(root, on_drop=losses)
    plain = ReadableSpan("s", SpanContext(1, 2, False), start_time=NOON, end_time=NOON + 1, attributes=attributes)
    exporter.export([plain, *some_spans(1)])
    exporter.shutdown()
    row, _ = rows(root)
    assert len(row["SpanAttributes"]) == len(attributes)
    assert None not in row["SpanAttributes"].values()
    assert losses.told == []


def test_times_out_of_range_are_clamped(tmp_path):
    """A time no Parquet timestamp can hold, and a span that ends before it starts, still make rows."""
    context = SpanContext(1, 2, False)
    exporter = ParquetSpanExporter(tmp_path)
    exporter.export([ReadableSpan("late", context, start_time=2**70, end_time=2**70)])
    exporter.export([ReadableSpan("short", context, start_time=NOON, end_time=NOON - 5)])
    exporter.export([ReadableSpan("early", context, start_time=-1, end_time=4)])
    exporter.shutdown()
    assert [(row["SpanName"], row["Timestamp"], row["Duration"]) for row in rows(tmp_path)] == [
        ("early", -1, 5),
        ("short", NOON, 0),
        ("late", 2**63 - 1, 0),
    ]
    assert [path.parent.name for path in paths(tmp_path)] == ["date=1969-12-31", "date=2025-11-23", "date=2262-04-11"]


def test_several_resources_in_one_batch(tmp_path):
    """Each row has its own resource, although resources are converted once each."""
    spans = [s for name in "abab" for s in recorded(pipeline, resource=Resource({"service.name": name}))[:1]]
    exporter = ParquetSpanExporter(tmp_path)
    exporter.export(spans)
    exporter.shutdown()
    assert [row["ServiceName"] for row in rows(tmp_path)] == list("abab")
    assert [row["ResourceAttributes"]["service.name"] for row in rows(tmp_path)] == list("abab")


# --- when files are written ------------------------------------------------------------------------------------------


def test_exports_do_not_write_until_there_are_enough_rows(tmp_path):
    """Nine rows wait, the tenth makes a file of ten, and shutdown writes the rest."""
    exporter = ParquetSpanExporter(tmp_path, rows=10)
    exporter.export(some_spans(9))
    assert paths(tmp_path) == []
    exporter.export(some_spans(25))
    assert [pq.read_metadata(path).num_rows for path in paths(tmp_path)] == [10, 10, 10]
    exporter.shutdown()
    assert len(names(tmp_path)) == 34


def test_old_rows_are_written_by_a_later_export(tmp_path, monkeypatch):
    """A row that has waited `seconds` goes out with the next export."""
    clock = [100.0]
    monkeypatch.setattr(parquet.time, "monotonic", lambda: clock[0])
    exporter = ParquetSpanExporter(tmp_path, seconds=60)
    exporter.export(some_spans(1))
    clock[0] += 59
    exporter.export(some_spans(1))
    assert paths(tmp_path) == []
    clock[0] += 1
    exporter.export(some_spans(1))
    assert len(names(tmp_path)) == 3


def test_force_flush_writes_what_waits(tmp_path):
    """force_flush writes everything and says so; with nothing waiting it writes no file."""
    exporter = ParquetSpanExporter(tmp_path)
    exporter.export(some_spans(2))
    assert exporter.force_flush()
    assert exporter.force_flush()
    assert len(paths(tmp_path)) == 1


def test_rows_are_laid_out_by_utc_date(tmp_path):
    """A batch over midnight makes two files, each under the date of its rows."""
    midnight = int(datetime(2025, 11, 24, tzinfo=timezone.utc).timestamp()) * 10**9
    exporter = ParquetSpanExporter(tmp_path)
    exporter.export(some_spans(4, midnight - 2))
    exporter.shutdown()
    assert [path.parent.name for path in paths(tmp_path)] == ["date=2025-11-23", "date=2025-11-24"]
    assert [pq.read_table(path)["SpanName"].to_pylist() for path in paths(tmp_path)] == [["0", "1"], ["2", "3"]]


def test_file_names_sort_by_time_and_never_repeat(tmp_path):
    """Files sort as they were written, also those of another exporter; none is hidden, all are group-readable."""
    first, second = ParquetSpanExporter(tmp_path, rows=1), ParquetSpanExporter(tmp_path, rows=1)
    for number in range(20):
        (first, second)[number % 2].export(some_spans(number + 1)[-1:])
    found = paths(tmp_path)
    assert [pq.read_table(path)["SpanName"][0].as_py() for path in found] == [str(number) for number in range(20)]
    assert {path.stat().st_mode & 0o777 for path in found} == {0o640 & ~_umask()}


def test_threads_share_an_exporter(tmp_path):
    """Eight threads, 50 exports each: every span is there once."""
    exporter = ParquetSpanExporter(tmp_path, rows=300)
    batches = [some_spans(10) for _ in range(8)]

    def work(batch) -> None:
        for _ in range(50):
            exporter.export(batch)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    exporter.shutdown()
    ids = [row["SpanId"] for row in rows(tmp_path)]
    assert len(ids) == 4000
    assert {ids.count(found) for found in set(ids)} == {50}


def test_a_forked_child_starts_empty(tmp_path):
    """What waited at the fork is written by the parent alone; the child writes its own, in its own files."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_parquet import ParquetSpanExporter, some_spans
exporter = ParquetSpanExporter({str(tmp_path)!r})
exporter.export(some_spans(3))
exporter._roller._lock.acquire()  # as if another thread were exporting
if os.fork() == 0:
    exporter.export(some_spans(1))
    exporter.shutdown()
    os._exit(0)
assert os.wait()[1] == 0
exporter._roller._lock.release()
exporter.shutdown()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    assert sorted(pq.read_metadata(path).num_rows for path in paths(tmp_path)) == [1, 3]


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_rows_wait_while_the_target_cannot_be_written(tmp_path, caplog):
    """With a file in the directory's place, exports go on; when it is gone, every row is written. One warning."""
    (tmp_path / "spans").write_text("in the way")
    losses = Losses()
    exporter = ParquetSpanExporter(tmp_path, rows=10, on_drop=losses)
    for _ in range(3):
        assert exporter.export(some_spans(10)) is OK
        assert not exporter.force_flush()
    (tmp_path / "spans").unlink()
    assert exporter.force_flush()
    exporter.shutdown()
    assert len(names(tmp_path)) == 30
    assert losses.told == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_the_oldest_rows_are_dropped_and_counted(tmp_path):
    """No more than 4 x rows are held; what is dropped is the oldest, and the count is exact."""
    (tmp_path / "spans").write_text("in the way")
    losses = Losses()
    exporter = ParquetSpanExporter(tmp_path, rows=10, on_drop=losses)
    exporter.export(some_spans(75))
    assert losses.count == 40
    (tmp_path / "spans").unlink()
    exporter.shutdown()
    assert names(tmp_path) == [str(number) for number in range(40, 75)]
    assert {reason for reason, _ in losses.told} == {"io_error"}


def test_without_on_drop_the_result_tells_of_losses(tmp_path):
    """FAILURE where nobody else is told; so that a loss is counted once."""
    (tmp_path / "spans").write_text("in the way")
    exporter = ParquetSpanExporter(tmp_path, rows=10)
    assert exporter.export(some_spans(30)) is OK
    assert exporter.export(some_spans(10)) is FAILED


def test_shutdown_counts_what_it_could_not_write(tmp_path):
    """Rows left at the end are lost, and counted; later exports fail, and a second shutdown does nothing."""
    (tmp_path / "spans").write_text("in the way")
    losses = Losses()
    exporter = ParquetSpanExporter(tmp_path, rows=10, on_drop=losses)
    exporter.export(some_spans(15))
    exporter.shutdown()
    exporter.shutdown()
    assert losses.count == 15
    assert exporter.export(some_spans(1)) is FAILED


def test_a_full_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    """An error half-way removes the temporary file; the reason is told."""

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    losses = Losses()
    exporter = ParquetSpanExporter(tmp_path, on_drop=losses)
    exporter.export(some_spans(2))
    monkeypatch.setattr(files.os, "fsync", full)
    exporter.shutdown()
    assert paths(tmp_path) == []
    assert losses.told == [("disk_full", 2)]


def test_an_unreadable_span_takes_no_other_with_it(tmp_path):
    """Of 1,500 spans three make no row; the others do."""
    losses = Losses()
    spans = some_spans(1500)
    broken = ReadableSpan("broken", SpanContext(1, 2, False), start_time=NOON, end_time="soon")
    for place in (0, 700, 1499):
        spans[place] = broken
    exporter = ParquetSpanExporter(tmp_path, on_drop=losses)
    exporter.export(spans)
    exporter.shutdown()
    assert losses.told == [("unreadable", 1)] * 3
    assert names(tmp_path) == [str(number) for number in range(1500) if number not in (0, 700, 1499)]


def test_a_raising_on_drop_is_ignored(tmp_path):
    """Nothing raises into the caller, not even a bad callback."""
    exporter = ParquetSpanExporter(tmp_path, on_drop=lambda reason, count: 1 / 0)
    assert exporter.export([ReadableSpan("no context")]) is OK
    exporter.shutdown()


def test_an_export_within_an_export(tmp_path):
    """As a finaliser or a signal handler may cause: no deadlock, no row lost."""
    exporter = ParquetSpanExporter(tmp_path, on_drop=lambda reason, count: exporter.export(some_spans(1)))
    exporter.export([ReadableSpan("no context"), *some_spans(3)])
    exporter.force_flush()
    exporter.shutdown()
    assert sorted(names(tmp_path)) == ["0", "0", "1", "2"]


@pytest.mark.parametrize(
    "options",
    [{"rows": 0}, {"rows": "10"}, {"rows": -1}, {"seconds": 0}, {"seconds": math.nan}, {"target": ""}, {"target": 3}],
)
def test_arguments_that_cannot_work(tmp_path, options):
    """The error names the argument and the remedy."""
    with pytest.raises(SettingError, match="give"):
        ParquetSpanExporter(**{"target": tmp_path, **options})


def test_a_uri_that_cannot_work_is_warned_about_without_its_secrets(caplog):
    """A remote target is first used on writing; neither key, secret nor query reaches the warning."""
    exporter = ParquetSpanExporter("nosuch://key:s3cret@bucket/path?token=t0ken")
    exporter.export(some_spans(1))
    assert not exporter.force_flush()
    (record,) = caplog.records
    assert "nosuch://bucket/path" in record.getMessage()
    assert "s3cret" not in record.getMessage()
    assert "t0ken" not in record.getMessage()


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        ("s3://k:s@b/p?x=1", "s3://b/p"), ("abfs://c@account.dfs.core.windows.net/p", "abfs://account.dfs.core.windows.net/p"),
        ("file:///a/b%20c", "/a/b c"), ("/a/b", "/a/b"), (Path("/a"), "/a"),
    ],
)  # fmt: skip
def test_a_target_can_be_printed(target, shown):
    """Credentials and query of a URI are left out; file:// is a directory."""
    assert str(Target(target)) == shown


def test_targets_from_the_environment(tmp_path, monkeypatch):
    """Without arguments, as OTEL_TRACES_EXPORTER makes them: the Parquet URI, else the directory, else `telemetry`."""
    monkeypatch.chdir(tmp_path)
    for variable, value, folder in (
        (None, None, "telemetry"),
        ("OTEL_ODIBI_DIRECTORY", "elsewhere", "elsewhere"),
        ("OTEL_ODIBI_PARQUET_URI", f"file://{tmp_path}/uri", "uri"),
    ):
        if variable:
            monkeypatch.setenv(variable, value)
        exporter = ParquetSpanExporter()
        exporter.export(some_spans(1))
        exporter.shutdown()
        assert names(tmp_path / folder) == ["0"]


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def metrics(tmp_path) -> Path:
    """The files of a provider with one instrument of each kind, recorded inside a span."""
    exporter = ParquetMetricExporter(tmp_path)
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)
    exponential = View(instrument_name="sizes", aggregation=ExponentialBucketHistogramAggregation())
    provider = MeterProvider(
        [reader], Resource({"service.name": "flights"}), views=[exponential], shutdown_on_exit=False
    )
    meter = provider.get_meter("otel_odibi", "1.2", "https://schema", {"team": "data"})
    span = trace.NonRecordingSpan(SpanContext(0xABC, 0xDEF, False, TraceFlags(1)))
    context = trace.set_span_in_context(span)
    meter.create_counter("rows", "{row}", "Rows.").add(7, {"node": "read", "ok": True}, context)
    meter.create_up_down_counter("active").add(-1.5)
    meter.create_gauge("rss", "By").set(5)
    histogram = meter.create_histogram("duration", "s", explicit_bucket_boundaries_advisory=[1.0, 2.0])
    histogram.record(0.5, {"node": "read"}, context)
    histogram.record(9, {"node": "read"})
    meter.create_histogram("sizes").record(4)
    provider.force_flush()
    provider.shutdown()
    return tmp_path


def test_sums_and_gauges_read_back(metrics):
    """A counter's and a gauge's point, with origin, times, temporality (2: cumulative) and exemplar."""
    found = {row["MetricName"]: row for row in rows(metrics, "metrics/sum")}
    assert {name: (row["Value"], row["IsMonotonic"]) for name, row in found.items()} == {
        "rows": (7.0, True),
        "active": (-1.5, False),
    }
    row = found["rows"]
    assert (row["MetricUnit"], row["MetricDescription"], row["AggregationTemporality"]) == ("{row}", "Rows.", 2)
    assert row["Attributes"] == {"node": "read", "ok": "true"}
    assert (row["ServiceName"], row["ScopeName"], row["ScopeVersion"]) == ("flights", "otel_odibi", "1.2")
    assert (row["ScopeSchemaUrl"], row["ScopeAttributes"]) == ("https://schema", {"team": "data"})
    assert row["StartTimeUnix"] <= row["TimeUnix"]
    exemplar = row["Exemplars"][0]
    assert (exemplar["Value"], exemplar["TraceId"], exemplar["SpanId"]) == (7.0, f"{0xABC:032x}", f"{0xDEF:016x}")
    (gauge, *_) = rows(metrics, "metrics/gauge")
    assert (gauge["MetricName"], gauge["Value"], gauge["MetricUnit"]) == ("rss", 5.0, "By")


def test_histograms_read_back(metrics):
    """Counts, sum, bounds, minimum and maximum; an exemplar without a span has empty ids."""
    (row, *_) = rows(metrics, "metrics/histogram")
    assert (row["Count"], row["Sum"], row["Min"], row["Max"]) == (2, 9.5, 0.5, 9.0)
    assert (row["ExplicitBounds"], row["BucketCounts"]) == ([1.0, 2.0], [1, 0, 1])
    (other, *_) = rows(metrics, "metrics/exponential_histogram")
    assert (other["MetricName"], other["Count"], other["ZeroCount"]) == ("sizes", 1, 0)
    assert (other["PositiveBucketCounts"], other["NegativeBucketCounts"]) == ([1], [0])


@pytest.mark.parametrize("kind", ["gauge", "sum", "histogram", "exponential_histogram"])
def test_one_schema_for_each_kind_of_metric(metrics, kind):
    """Every file of a dataset has the published schema, whatever the points hold."""
    schema = getattr(parquet, f"{kind.upper()}_SCHEMA")
    assert all(pq.read_schema(path) == schema for path in paths(metrics / "metrics" / kind))
    assert schema.field("TimeUnix").type == pa.timestamp("ns", "UTC")


def test_metric_exporter_after_shutdown(tmp_path):
    """It takes no more, and tells."""
    exporter = ParquetMetricExporter(tmp_path)
    exporter.shutdown()
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    results = []
    exporter.export, taken = lambda *args, **kwargs: results.append(taken(*args, **kwargs)), exporter.export
    provider.get_meter("m").create_counter("c").add(1)
    provider.force_flush()
    assert results == [MetricExportResult.FAILURE]


# --- an object store -------------------------------------------------------------------------------------------------


@pytest.mark.stack
def test_spans_go_to_s3(monkeypatch):
    """One object a file; what S3 refuses waits until the bucket is there. Credentials come from the environment."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    query = f"endpoint_override=http://{host}:{port}&scheme=http&region=us-east-1"
    try:
        exporter = ParquetSpanExporter(f"s3://bucket/prefix?{query}", rows=10)
        exporter.export(some_spans(5))
        assert not exporter.force_flush()
        filesystem, _ = pa.fs.FileSystem.from_uri(f"s3://bucket/?{query}&allow_bucket_creation=true")
        filesystem.create_dir("bucket")
        exporter.export(some_spans(5))
        assert exporter.force_flush()
        exporter.shutdown()
        found = filesystem.get_file_info(pa.fs.FileSelector("bucket/prefix", recursive=True))
        assert sum(info.is_file for info in found) == 2
        table = dataset.dataset("bucket/prefix/spans", filesystem=filesystem, partitioning="hive").to_table()
        assert sorted(table["SpanName"].to_pylist()) == sorted("01234" * 2)
    finally:
        server.stop()


def test_rows_of_json_attributes_are_valid_json(tmp_path):
    """Lists and maps in attributes parse back."""
    exporter = ParquetSpanExporter(tmp_path)
    exporter.export(one_span(columns=["a", 'b"', "\ud800"]))
    exporter.shutdown()
    assert json.loads(rows(tmp_path)[0]["SpanAttributes"]["columns"]) == ["a", 'b"', "\ufffd"]


def test_directories_are_private(tmp_path):
    """Directories made for the files are 0750."""
    exporter = ParquetSpanExporter(tmp_path / "new")
    exporter.export(some_spans(1))
    exporter.shutdown()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*") if path.is_dir()} == {
        0o750 & ~_umask()
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_rows_that_are_old_enough_are_written_though_nothing_new_comes(tmp_path, monkeypatch) -> None:
    """A program that falls idle leaves no spans in memory: the queue's thread ticks the exporter."""
    now = [0.0]
    monkeypatch.setattr("otel_odibi.exporters.parquet.time.monotonic", lambda: now[0])
    exporter = ParquetSpanExporter(tmp_path, seconds=60.0)
    exporter.export([ReadableSpan("s", SpanContext(1, 2, False), start_time=1, end_time=2)])
    exporter.tick()
    assert not list(tmp_path.rglob("*.parquet"))
    now[0] = 61.0
    exporter.tick()
    assert len(list(tmp_path.rglob("*.parquet"))) == 1
    exporter.shutdown()
