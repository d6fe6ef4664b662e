"""OTLP/JSON lines equal what the official OTLP exporter sends; the metrics document is whole and plain JSON."""

from __future__ import annotations

import base64
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans as official
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from test_parquet import NOON, Losses, anything, one_span, pipeline, recorded, some_spans

from otel_odibi.errors import SettingError
from otel_odibi.exporters.json import JsonMetricExporter, JsonSpanExporter, encode_spans, span_lines
from otel_odibi.exporters.otlpjson import MAX_LINE

OK, FAILED = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
FILE = "otlp/flights.traces.jsonl"


def exported(root: Path, spans, **options) -> list[bytes]:
    """The lines that an exporter writes for these spans."""
    exporter = JsonSpanExporter(root, service="flights", **options)
    assert exporter.export(spans) is OK
    exporter.shutdown()
    return (root / FILE).read_bytes().splitlines(keepends=True)


IDS = ("traceId", "spanId", "parentSpanId")


def as_base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()


def with_base64_ids(value):
    """OTLP has hexadecimal ids where protobuf's own JSON has base64."""
    if isinstance(value, dict):
        return {key: as_base64(item) if key in IDS else with_base64_ids(item) for key, item in value.items()}
    return [with_base64_ids(item) for item in value] if isinstance(value, list) else value


def parsed(line: bytes) -> ExportTraceServiceRequest:
    """The line as protobuf reads it, which refuses unknown keys and values of the wrong form."""
    message = ExportTraceServiceRequest()
    json_format.ParseDict(with_base64_ids(json.loads(line)), message)
    return message


def spans_in(line: bytes) -> list:
    """The spans of a line, of all resources and scopes."""
    return [span for group in parsed(line).resource_spans for scope in group.scope_spans for span in scope.spans]


def value_of(span: ReadableSpan):
    """The span's first attribute value, as it is written."""
    (resource,) = encode_spans([span])["resourceSpans"]
    return resource["scopeSpans"][0]["spans"][0]["attributes"][0]["value"]


# --- spans -----------------------------------------------------------------------------------------------------------


def everything(tracer) -> None:
    """A span of each kind and status, with every type of value, dropped items, and no scope version or parent."""
    values = {
        "text": "é\n\0", "true": True, "false": False, "int": -(2**63), "float": 0.1, "whole": 2.0, "none": None,
        "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "bytes": b"\x00\xff", "list": ["a", 1, None, [True]],
        "map": {"a": {"b": [1.5]}, "c": b"x"}, "empty": [], "nothing": {}, "": "dropped",
    }  # fmt: skip
    for kind in SpanKind:
        tracer.start_span(kind.name, kind=kind, attributes=values, start_time=NOON).end(NOON + 1)
    for code in StatusCode:
        span = tracer.start_span(code.name, links=[Link(SpanContext(n, n, n == 1), {"n": n}) for n in (1, 2, 3)])
        span.set_status(Status(code, "why" if code is StatusCode.ERROR else None))
        for number in range(4):
            span.add_event("e", {"number": number, "list": [number]}, NOON + number)
        span.end()


@pytest.mark.parametrize("make", [everything, pipeline])
def test_a_line_is_what_the_official_exporter_sends(tmp_path, make):
    """Parsed by protobuf, the line equals the OTLP message of the same spans, field for field."""
    resource = Resource({"service.name": "flights", "answer": 42}, "https://schema")
    spans = recorded(make, resource=resource, span_limits=SpanLimits(max_links=2, max_events=3, max_attributes=13))
    (line,) = exported(tmp_path, spans)
    ours, theirs = parsed(line), official(spans)
    for links in (span.links for span in ours.resource_spans[0].scope_spans[0].spans):
        for link in links:
            link.trace_state = ""  # which the official one leaves out
    assert ours == theirs


def test_ids_are_hexadecimal_and_integers_text(tmp_path):
    """The OTLP/JSON rules that differ from protobuf's own."""
    context = SpanContext(0xAB, 0xCD, False, TraceFlags(1), TraceState([("k", "v")]))
    span = ReadableSpan("s", context, links=[Link(context)], start_time=NOON, end_time=NOON + 1, kind=SpanKind.CLIENT)
    (line,) = exported(tmp_path, [span])
    found = json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    assert (found["traceId"], found["spanId"]) == (f"{0xAB:032x}", f"{0xCD:016x}")
    assert (found["startTimeUnixNano"], found["kind"], found["traceState"]) == (str(NOON), 3, "k=v")
    assert "parentSpanId" not in found
    assert found["links"][0]["traceState"] == "k=v"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (1, {"intValue": "1"}), (True, {"boolValue": True}), ("a", {"stringValue": "a"}), (None, {}),
        (1.5, {"doubleValue": 1.5}), (math.nan, {"doubleValue": "NaN"}), (-math.inf, {"doubleValue": "-Infinity"}),
        (b"\x00\xff", {"bytesValue": "AP8="}), (2**63, {"stringValue": str(2**63)}),
        pytest.param(10**5000, {"stringValue": hex(10**5000)}, id="huge"),
        ([1, "a"], {"arrayValue": {"values": [{"intValue": "1"}, {"stringValue": "a"}]}}),
        ({"k": [None]}, {"kvlistValue": {"values": [{"key": "k", "value": {"arrayValue": {"values": [{}]}}}]}}),
    ],
)  # fmt: skip
def test_attribute_values(value, written):
    """Each type has its own key; integers beyond 64 bits become text."""
    assert value_of(one_span(key=value)[0]) == written


def test_deeply_nested_values_become_text():
    """Receivers bound how deep they parse, so what is nested deeper than 8 is JSON in a text."""
    nested = "x"
    for _ in range(80):
        nested = [nested]
    value = value_of(one_span(key=nested)[0])
    for _ in range(8):
        (value,) = value["arrayValue"]["values"]
    assert json.loads(value["stringValue"]) == json.loads("[" * 72 + '"x"' + "]" * 72)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(st.characters()), anything, max_size=6), st.text(st.characters()))
def test_any_attributes_make_a_valid_line(attributes, name):
    """Whatever the attributes and the name, the line is valid OTLP/JSON and every key is there."""
    context = SpanContext(1, 2, False)
    span = ReadableSpan(name, context, start_time=NOON, end_time=NOON + 1, attributes=attributes)
    ((line, count),) = span_lines([span])
    assert count == 1
    assert line.count(b"\n") == 1
    (found,) = spans_in(line)
    assert len(found.attributes) == len(attributes)


def test_lone_surrogates_are_replaced(tmp_path):
    """In names, keys and values, at any depth; all else of the line stays."""
    spans = recorded(lambda tracer: tracer.start_span("\ud800", attributes={"a\udfff": ["b\ud800", 1.5, True]}).end())
    (line,) = exported(tmp_path, spans)
    (span,) = spans_in(line)
    assert span.name == "\ufffd"
    assert span.attributes[0].key == "a\ufffd"
    texts = span.attributes[0].value.array_value.values
    assert (texts[0].string_value, texts[1].double_value, texts[2].bool_value) == ("b\ufffd", 1.5, True)


def test_long_lines_are_split_between_spans(tmp_path):
    """Spans of 1 MB share lines of 4 MiB at most; one of 10 MB has a line of its own."""
    spans = [span for size in (1, 1, 1, 1, 1, 10, 1) for span in one_span(text="x" * size * 10**6)]
    lines = exported(tmp_path, spans)
    counts = [len(spans_in(line)) for line in lines]
    assert sum(counts) == 7
    assert all(len(line) <= MAX_LINE or count == 1 for line, count in zip(lines, counts, strict=True))
    assert max(map(len, lines)) > 10**7


def test_spans_are_grouped_by_resource_and_scope():
    """Two resources with two scopes each, exported in turn, make two groups of two."""
    spans = []
    for name in ("a", "b"):
        resource = Resource({"service.name": name})
        spans.append([recorded(pipeline, resource=resource)[0], *some_spans(1)])
    message = encode_spans([span for pair in zip(*spans, strict=True) for span in pair])
    names = [
        attribute["value"]["stringValue"]
        for group in message["resourceSpans"]
        for attribute in group["resource"]["attributes"]
        if attribute["key"] == "service.name"
    ]
    assert names[:2] == ["a", "b"]
    assert [len(group["scopeSpans"]) for group in message["resourceSpans"]] == [1, 1, 1, 1]


def test_a_span_without_a_scope():
    """A span made by hand has no scope, and still makes a valid line."""
    ((line, _),) = span_lines([ReadableSpan("s", SpanContext(1, 2, False), start_time=1, end_time=2)])
    assert spans_in(line)[0].name == "s"


def test_the_file_is_named_by_the_service_of_the_first_span(tmp_path, monkeypatch):
    """As OTEL_TRACES_EXPORTER makes it, without arguments; the name is made safe for a file."""
    monkeypatch.setenv("OTEL_ODIBI_DIRECTORY", str(tmp_path))
    exporter = JsonSpanExporter()
    exporter.export(recorded(pipeline, resource=Resource({"service.name": "a/b"})))
    assert exporter.force_flush()
    exporter.shutdown()
    assert [path.name for path in (tmp_path / "otlp").iterdir()] == ["a%2Fb.traces.jsonl"]


def test_lost_spans_are_counted(tmp_path):
    """A directory that cannot be made: on_drop hears how many spans, not how many lines; without it, FAILURE."""
    (tmp_path / "otlp").write_text("in the way")
    losses = Losses()
    exporter = JsonSpanExporter(tmp_path, service="flights", on_drop=losses)
    assert exporter.export(some_spans(5)) is OK
    assert losses.count == 5
    assert JsonSpanExporter(tmp_path, service="flights").export(some_spans(5)) is FAILED
    exporter.shutdown()
    assert exporter.export(some_spans(1)) is FAILED
    assert exporter.export([]) is OK


def test_an_unreadable_span_takes_no_other_with_it(tmp_path):
    """It alone is lost, and counted."""
    losses = Losses()
    lines = exported(tmp_path, [*some_spans(5), ReadableSpan("no context"), *some_spans(5)], on_drop=losses)
    assert sum(len(spans_in(line)) for line in lines) == 10
    assert losses.told == [("unreadable", 1)]


def test_a_raising_on_drop_is_ignored(tmp_path):
    """Nothing raises into the caller."""
    exporter = JsonSpanExporter(tmp_path, service="flights", on_drop=lambda reason, count: 1 / 0)
    assert exporter.export([ReadableSpan("no context")]) is OK
    exporter.shutdown()


def test_a_forked_child_writes_on(tmp_path):
    """Although another thread of the parent was writing at the fork."""
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_json_exporter import JsonSpanExporter, some_spans
exporter = JsonSpanExporter({str(tmp_path)!r}, service="flights")
exporter.export(some_spans(1))
exporter._lock.acquire()
if os.fork() == 0:
    exporter.export(some_spans(1))
    os._exit(0)
assert os.wait()[1] == 0
exporter._lock.release()
exporter.export(some_spans(1))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    lines = [line for path in (tmp_path / "otlp").iterdir() for line in path.read_bytes().splitlines()]
    assert len([parsed(line) for line in lines]) == 3


@pytest.mark.parametrize(
    "options", [{"target": "s3://bucket/path"}, {"target": 3}, {"max_bytes": 0}, {"retention_bytes": 0}]
)
def test_arguments_that_cannot_work(tmp_path, options):
    """The error names the argument and the remedy."""
    with pytest.raises(SettingError, match="give"):
        JsonSpanExporter(**{"target": tmp_path, **options})


# --- metrics ---------------------------------------------------------------------------------------------------------


class Meters:
    """A provider whose metrics go to `<directory>/json` on `export()`."""

    def __init__(self, directory: Path, **options) -> None:
        self.results: list[MetricExportResult] = []
        exporter = JsonMetricExporter(directory, **options)
        taken = exporter.export
        exporter.export = lambda *args, **kwargs: self.results.append(taken(*args, **kwargs))
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)
        view = View(instrument_name="sizes", aggregation=ExponentialBucketHistogramAggregation())
        resource = Resource({"service.name": "flights"})
        self.provider = MeterProvider([reader], resource, views=[view], shutdown_on_exit=False)
        self.meter = self.provider.get_meter("otel_odibi")
        self.file = directory / "json" / "flights.metrics.json"

    def export(self) -> dict:
        self.provider.force_flush()
        return json.loads(self.file.read_bytes())


def test_the_document_holds_every_kind_of_metric(tmp_path):
    """Gauge, sum, histogram, exponential histogram, with exemplars, in the documented form."""
    meters = Meters(tmp_path)
    span = trace.NonRecordingSpan(SpanContext(0xABC, 0xDEF, False, TraceFlags(1)))
    meters.meter.create_counter("rows", "{row}", "Rows.").add(7, {"node": "read"}, trace.set_span_in_context(span))
    meters.meter.create_gauge("rss", "By").set(1.5)
    histogram = meters.meter.create_histogram("duration", "s", explicit_bucket_boundaries_advisory=[1.0])
    histogram.record(0.5)
    histogram.record(9)
    meters.meter.create_histogram("sizes").record(4)
    document = meters.export()
    assert document["resource"]["service.name"] == "flights"
    found = {metric["name"]: metric for metric in document["metrics"]}
    rows = found["rows"]
    (point,) = rows.pop("points")
    assert rows == {
        "name": "rows", "description": "Rows.", "unit": "{row}",
        "type": "sum", "temporality": "cumulative", "monotonic": True,
    }  # fmt: skip
    assert (point["attributes"], point["value"]) == ({"node": "read"}, 7)
    assert point["start_time"] <= point["time"] <= document["export_time"]
    assert point["time"].endswith("Z")
    (exemplar,) = point["exemplars"]
    assert (exemplar["value"], exemplar["trace_id"], exemplar["span_id"]) == (7, f"{0xABC:032x}", f"{0xDEF:016x}")
    assert (found["rss"]["type"], found["rss"]["points"][0]["value"]) == ("gauge", 1.5)
    (point,) = found["duration"]["points"]
    assert (point["count"], point["sum"], point["min"], point["max"]) == (2, 9.5, 0.5, 9)
    assert (point["bounds"], point["buckets"]) == ([1.0], [1, 1])
    (point,) = found["sizes"]["points"]
    assert found["sizes"]["type"] == "exponential_histogram"
    assert (point["zero_count"], point["positive"]["buckets"]) == (0, [1])


def test_each_export_replaces_the_document(tmp_path):
    """The file is whole, private to the group, and the only one."""
    meters = Meters(tmp_path)
    counter = meters.meter.create_counter("rows")
    for total in (1, 2):
        counter.add(1)
        assert meters.export()["metrics"][0]["points"][0]["value"] == total
    assert [path.name for path in meters.file.parent.iterdir()] == ["flights.metrics.json"]
    assert meters.file.stat().st_mode & 0o777 == 0o640 & ~_umask()
    assert meters.results == [MetricExportResult.SUCCESS] * 2


@pytest.mark.parametrize(
    ("value", "written"),
    [(math.nan, None), (-math.inf, None), (2**70, str(2**70)), ("\ud800", "\ufffd"), (b"\xff", "/w==")],
)
def test_what_json_has_not(tmp_path, value, written):
    """NaN and infinity are null; integers beyond 64 bits, lone surrogates and bytes become text."""
    meters = Meters(tmp_path)
    meters.meter.create_gauge("odd").set(1, {"key": value, "\ud801": [value]})
    assert meters.export()["metrics"][0]["points"][0]["attributes"] == {"key": written, "\ufffd": [written]}


def test_a_failed_write_keeps_the_last_document(tmp_path, monkeypatch):
    """The number of points is told; the file stays as it was, and no temporary file is left."""
    losses = Losses()
    meters = Meters(tmp_path, on_drop=losses)
    counter = meters.meter.create_counter("rows")
    counter.add(1, {"node": "a"})
    counter.add(1, {"node": "b"})
    meters.export()
    monkeypatch.setattr(os, "replace", lambda source, target: 1 / 0)
    counter.add(1, {"node": "a"})
    assert {point["value"] for point in meters.export()["metrics"][0]["points"]} == {1}
    assert losses.told == [("io_error", 2)]
    assert len(list(meters.file.parent.iterdir())) == 1


def test_a_failed_write_without_on_drop(tmp_path):
    """FAILURE, and nothing is raised."""
    (tmp_path / "json").write_text("in the way")
    meters = Meters(tmp_path)
    meters.meter.create_counter("rows").add(1)
    meters.provider.force_flush()
    assert meters.results == [MetricExportResult.FAILURE]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
