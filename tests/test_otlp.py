"""OTLP: spans, metrics and logs as a collector receives them, over gRPC and over HTTP."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading

import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from opentelemetry.trace import Status, StatusCode
from otlp_endpoint import PROTOCOLS, Endpoint, items
from secret_samples import SECRETS, leaked

import otel_odibi as oo
from otel_odibi import names
from otel_odibi.errors import MissingExtraError

DELTA = AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
CUMULATIVE = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE


class Sink(Endpoint):
    """What a collector received, by name."""

    endpoint = property(lambda self: self.url)
    spans = property(lambda self: {span.name: span for span in self.accepted["traces"]})
    logs = property(lambda self: self.accepted["logs"])

    @property
    def metrics(self):
        """Metrics by name, one dictionary for each request."""
        return [{metric.name: metric for metric in items("metrics", r)} for r in self.requests["metrics"]]


@contextlib.contextmanager
def sink_of(protocol):
    """Serve OTLP on a free port of this machine."""
    sink = Sink(protocol)
    sink.start()
    try:
        yield sink
    finally:
        sink.stop()


http_sink, grpc_sink = (functools.partial(sink_of, protocol) for protocol in ("http/protobuf", "grpc"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No variable of the machine's, and no pyproject.toml."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=PROTOCOLS)
def protocol(request):
    """Each of the two protocols."""
    return request.param


@pytest.fixture
def sink(protocol):
    """A collector that speaks the protocol."""
    with sink_of(protocol) as made:
        yield made


def configured(protocol="grpc", **settings):
    """Configure telemetry without files and without globals."""
    defaults = {"span_formats": "none", "metric_formats": "none", "otlp_protocol": protocol, "exit_timeout": 10}
    return oo.configure(set_global=False, **{**defaults, **settings})


def run_pipeline():
    """Run two nodes, the second of which fails."""
    with contextlib.suppress(ValueError), oo.pipeline("daily"):
        with oo.node("read", layer="raw") as n:
            n.output(rows=3)
        with oo.node("join", depends_on="read"):
            oo.get_logger().warning("late", share=0.2)
            raise ValueError("bad row")


def attributes_of(thing):
    """Return attributes as plain values."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value") or "string_value") for a in thing.attributes}


# --- signals ---------------------------------------------------------------------------------------------------------


def test_spans_arrive_as_they_were_made(sink, protocol):
    """Names, tree, links, attributes, status, events; the resource names service and environment."""
    with configured(protocol, service_name="flights", environment="test", otlp_endpoint=sink.endpoint):
        run_pipeline()
    spans = sink.spans
    assert set(spans) == {"pipeline daily", "node read", "node join"}
    run, read, join = (spans[name] for name in ("pipeline daily", "node read", "node join"))
    assert (run.parent_span_id, read.parent_span_id, join.parent_span_id) == (b"", run.span_id, run.span_id)
    assert [link.span_id for link in join.links] == [read.span_id]
    assert attributes_of(read)[names.NODE_ROWS_OUT] == 3
    assert (join.status.message, join.status.code) == ("bad row", 2)
    assert attributes_of(join.events[0])[names.EXCEPTION_TYPE] == "ValueError"
    resource = attributes_of(sink.requests["traces"][0].resource_spans[0].resource)
    assert resource["service.name"] == "flights"
    assert resource["deployment.environment.name"] == "test"
    assert resource["service.instance.id"]


def test_metrics_arrive_as_deltas(sink, protocol):
    """A short process starts counting at 0, so each export tells what was added; the collector adds them up."""
    with configured(protocol, otlp_endpoint=sink.endpoint) as telemetry:
        run_pipeline()
        assert telemetry.flush()
        run_pipeline()
        run_pipeline()
    first, second = sink.metrics
    for metrics, runs in ((first, 1), (second, 2)):
        duration, rows = metrics["odibi.node.duration"].histogram, metrics["odibi.node.rows"].sum
        assert duration.aggregation_temporality == rows.aggregation_temporality == DELTA
        assert rows.is_monotonic
        assert [point.as_double or point.as_int for point in rows.data_points] == [3 * runs]
        assert {attributes_of(p)["outcome"]: p.count for p in duration.data_points} == {
            "success": runs,
            "failure": runs,
        }
        assert all(len(p.bucket_counts) == len(p.explicit_bounds) + 1 for p in duration.data_points)
        assert metrics["odibi.node.active"].sum.aggregation_temporality == CUMULATIVE
        assert metrics["odibi.process.uptime"].gauge.data_points
    ends, begins = (
        {attributes_of(p)["node"]: getattr(p, time) for p in m["odibi.node.duration"].histogram.data_points}
        for m, time in ((first, "time_unix_nano"), (second, "start_time_unix_nano"))
    )
    assert ends == begins
    exemplars = [
        e for m in (first, second) for p in m["odibi.node.duration"].histogram.data_points for e in p.exemplars
    ]
    assert exemplars
    assert all((len(e.span_id), len(e.trace_id)) == (8, 16) for e in exemplars)


def test_metrics_are_cumulative_where_the_environment_says_so(sink, protocol, monkeypatch):
    """As for any OpenTelemetry program."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "cumulative")
    with configured(protocol, otlp_endpoint=sink.endpoint) as telemetry:
        run_pipeline()
        telemetry.flush()
        run_pipeline()
    *_, last = sink.metrics
    rows = last["odibi.node.rows"].sum
    assert rows.aggregation_temporality == CUMULATIVE
    assert [point.as_double or point.as_int for point in rows.data_points] == [6]


def test_logs_arrive_where_no_log_file_is_written(sink, protocol):
    """Message as body, event type as event name, the rest as attributes; in the span they were written in."""
    with configured(protocol, otlp_endpoint=sink.endpoint):
        run_pipeline()
    assert [(r.event_name, r.severity_text, r.body.string_value) for r in sink.logs] == [
        ("pipeline_start", "INFO", "pipeline daily started"),
        ("node_start", "INFO", "node read started"),
        ("node_complete", "INFO", "node read completed"),
        ("node_start", "INFO", "node join started"),
        ("log", "WARNING", "late"),
        ("node_failed", "ERROR", "node join failed: ValueError: bad row"),
        ("pipeline_complete", "ERROR", "pipeline daily failed: ValueError: bad row"),
    ]
    spans, late = sink.spans, sink.logs[4]
    assert (late.trace_id, late.span_id) == (spans["node join"].trace_id, spans["node join"].span_id)
    assert attributes_of(late)["share"] == 0.2
    assert attributes_of(late)["node_name"] == "join"
    assert sink.logs[2].span_id == spans["node read"].span_id
    assert late.severity_number == 13


@pytest.mark.parametrize(("setting", "sent"), [(None, False), (True, True), (False, False)])
def test_logs_are_not_sent_where_a_file_is_written_unless_asked_for(tmp_path, setting, sent):
    """A collector that reads the files would have them twice."""
    with http_sink() as sink:
        with configured("http/protobuf", otlp_endpoint=sink.endpoint, directory=tmp_path, otlp_logs=setting):
            run_pipeline()
        assert bool(sink.logs) is sent
        assert (tmp_path / "logs" / "odibi.jsonl").read_text().count("\n") == 7
        assert sink.spans


def test_no_logs_are_sent_where_they_are_turned_off():
    """Even without a log file."""
    with http_sink() as sink:
        with configured("http/protobuf", otlp_endpoint=sink.endpoint, otlp_logs=False):
            run_pipeline()
        assert not sink.logs
        assert sink.metrics


def test_what_sends_telemetry_does_not_log_more_of_it():
    """A library that logs its requests would otherwise make a log record for each that is sent."""
    with http_sink() as sink:
        with configured("http/protobuf", otlp_endpoint=sink.endpoint, capture_logging=True):
            logging.getLogger("host").warning("sent")
            with suppress_instrumentation():
                logging.getLogger("urllib3").warning("POST /v1/logs")
        assert [record.body.string_value for record in sink.logs] == ["sent"]


# --- variables of OpenTelemetry --------------------------------------------------------------------------------------


def test_headers_are_sent_with_every_signal(sink, protocol):
    """Whatever their case: gRPC would refuse capital letters."""
    headers = {"Authorization": "Bearer abc", "x-scope-orgid": "7"}
    with configured(protocol, otlp_endpoint=sink.endpoint, otlp_headers=headers):
        run_pipeline()
    for received in sink.headers.values():
        assert received
        assert all(h["authorization"] == "Bearer abc" and h["x-scope-orgid"] == "7" for h in received)


def test_headers_of_one_signal_win_over_the_general_ones(sink, protocol, monkeypatch):
    """As the specification has it."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=general")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-key=traces")
    with configured(protocol, otlp_endpoint=sink.endpoint):
        run_pipeline()
    assert {h["x-key"] for h in sink.headers["traces"]} == {"traces"}
    assert {h["x-key"] for h in sink.headers["metrics"]} == {"general"}


def test_an_endpoint_of_one_signal_alone_turns_on_that_signal(sink, protocol, monkeypatch):
    """Nothing else is sent."""
    path = "/v1/traces" if protocol != "grpc" else ""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", sink.endpoint + path)
    with configured(protocol):
        run_pipeline()
    assert len(sink.spans) == 3
    assert (sink.metrics, sink.logs) == ([], [])


def test_the_standard_variables_are_enough(sink, protocol, monkeypatch):
    """A program that knows nothing of OTLP is sent to a collector by its environment."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from-environment")
    with oo.configure(set_global=False, exit_timeout=10):
        run_pipeline()
    assert len(sink.spans) == 3
    assert sink.metrics
    assert len(sink.logs) == 7
    assert attributes_of(sink.requests["logs"][0].resource_logs[0].resource)["service.name"] == "from-environment"


@pytest.mark.parametrize("signal", ["traces", "metrics", "logs"])
def test_a_signal_can_be_turned_off(monkeypatch, signal):
    """By OTEL_TRACES_EXPORTER=none and the like."""
    monkeypatch.setenv(f"OTEL_{signal.upper()}_EXPORTER", "none")
    with http_sink() as sink:
        with configured("http/protobuf", otlp_endpoint=sink.endpoint):
            run_pipeline()
        assert {name for name, requests in sink.requests.items() if not requests} == {signal}


def test_each_signal_may_have_its_own_protocol(monkeypatch):
    """Traces over gRPC, the rest over HTTP."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    with grpc_sink() as by_grpc, http_sink() as by_http:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", by_grpc.endpoint)
        with configured("http/protobuf", otlp_endpoint=by_http.endpoint):
            run_pipeline()
        assert len(by_grpc.spans) == 3
        assert by_http.metrics
        assert not by_http.spans


# --- trouble ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_the_extra_the_error_says_what_to_install(monkeypatch, tmp_path, protocol):
    """And no file and no thread is left behind."""
    package = {"grpc": "grpc", "http/protobuf": "http"}[protocol]
    monkeypatch.setitem(sys.modules, f"opentelemetry.exporter.otlp.proto.{package}", None)
    monkeypatch.delattr(f"opentelemetry.exporter.otlp.proto.{package}", raising=False)
    before = threading.active_count()
    with pytest.raises(MissingExtraError, match=r"pip install 'otel-odibi\[otlp\]'"):
        configured(protocol, otlp_endpoint="http://127.0.0.1:1", directory=tmp_path)
    assert threading.active_count() == before


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_with_the_collector_away_the_pipeline_runs_and_the_loss_is_counted(protocol, caplog, monkeypatch):
    """The exit takes no longer than it may."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.05")
    with configured(protocol, otlp_endpoint="http://127.0.0.1:1", exit_timeout=0.01) as telemetry:
        run_pipeline()
    for queue in telemetry.queues:
        queue._thread.join()
    assert sum(count for (signal, _), count in telemetry.aggregates.dropped().items() if signal == "spans") == 3
    ours = [record.getMessage() for record in caplog.records if record.name == "otel_odibi"]
    assert [message for message in ours if "telemetry lost: spans" in message]


def test_what_a_process_could_not_send_the_next_one_sends(sink, protocol, tmp_path, caplog):
    """Every signal, whole; with one warning, and without a word from the exporters."""
    settings = {"otlp_endpoint": sink.endpoint, "directory": tmp_path, "otlp_logs": True}
    sink.stop()
    with configured(protocol, **settings) as telemetry:
        run_pipeline()
        assert not telemetry.flush()
    assert telemetry.aggregates.dropped() == {}
    assert [record.name for record in caplog.records] == ["otel_odibi"]
    assert len(list((tmp_path / "spool").iterdir())) == 3
    sink.start()
    with configured(protocol, **settings) as telemetry:
        assert telemetry.flush()
    assert list((tmp_path / "spool").iterdir()) == []
    assert set(sink.spans) == {"pipeline daily", "node read", "node join"}
    assert sink.metrics[0]["odibi.node.rows"].sum.data_points[0].as_int == 3
    assert sink.logs[4].body.string_value == "late"
    assert sink.logs[4].span_id == sink.spans["node join"].span_id


def test_no_secret_leaves_by_any_way(tmp_path):
    """Through names, attributes, events, status, logs, exceptions, and OpenTelemetry's own API on the current span."""
    with http_sink() as sink:
        settings = {"otlp_endpoint": sink.endpoint, "directory": tmp_path, "otlp_logs": True}
        telemetry = configured("http/protobuf", **settings)
        for text, _ in SECRETS.values():
            put_everywhere(text)
        families = repr(telemetry.aggregates.collect())
        telemetry.shutdown()
    requests = [request.SerializeToString() for signal in sink.requests.values() for request in signal]
    files = [path.read_bytes() for path in tmp_path.rglob("*.jsonl")]
    everything = b"\n".join([*requests, *files, families.encode()]).decode("latin-1")
    assert len(sink.spans) > 100
    assert {shape for shape, (_, secrets) in SECRETS.items() if leaked(secrets, everything)} == set()


def put_everywhere(text):
    """Put a text in every place that a pipeline can."""
    log = oo.get_logger(bound=text)
    with contextlib.suppress(ValueError), oo.pipeline(f"p {text}", attributes={"a": text}) as run:
        run.set(note=text)
        run.skip(text, text)
        with oo.node(text, layer=text, engine=text, depends_on=text, attributes={text: text}) as n:
            n.set(note=text, nested={"a": [text]})
            n.event(text, note=text)
            n.cache(hit=True, key=text)
            log.info(text, note=text)
            span = trace.get_current_span()
            span.set_attribute("raw", text)
            span.set_attribute(text, [text, text])
            span.set_attribute(names.NODE_LAYER, text)
            span.add_event(text, {"raw": text, text: 1})
            span.record_exception(ValueError(text), {"raw": text})
            span.add_link(span.get_span_context(), {"raw": text})
            span.set_status(Status(StatusCode.ERROR, text))
            span.update_name(f"renamed {text}")
        with oo.node("fails") as n, n.attempt():
            raise ValueError(text)
