"""configure(): what it starts and where that goes, that it ends in time, and that it never harms the program."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import urllib.request

import pytest
from odd_values import Unreadable
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import otel_odibi as oo
from otel_odibi import logs, names, runtime
from otel_odibi.errors import SettingError
from otel_odibi.exporters.jsonl import files, read_lines
from otel_odibi.facts import NodeFinished
from otel_odibi.settings import Settings
from otel_odibi.telemetry import Telemetry
from otel_odibi.testing import capture
from otel_odibi.troubles import Troubles

BOUND = 60.0
"""Seconds that no test needs; a wait of this length means a hang."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No variable of the machine's, and no pyproject.toml."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@oo.node(layer="raw")
def read(rows=3):
    """Return some rows: decorated before anything is configured."""
    return list(range(rows))


def run_pipeline():
    """Run one node in one pipeline, with a line of the user's."""
    with oo.pipeline("daily"):
        read()
        oo.get_logger().info("late flights", share=0.2)


def configured(**settings):
    """Configure telemetry without files and without globals."""
    return oo.configure(**{"set_global": False, "span_formats": "none", "metric_formats": "none", **settings})


def files_in(directory):
    """Return the files below a directory, hidden ones and what differs from run to run in their names left out."""
    paths = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")]
    kinds = {(path.relative_to(directory).parts[0], path.name, path.suffix) for path in paths}
    return sorted({f"logs/{name}" if folder == "logs" else f"{folder}/*{suffix}" for folder, name, suffix in kinds})


def program(text, **environ):
    """Run a program in a process of its own, where it may set globals; return what it printed, parsed where JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=BOUND,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}, **environ},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done.stdout + done.stderr


class Gate:
    """Something that hangs until it is opened."""

    def __init__(self):
        self.open, self.busy = threading.Event(), threading.Event()

    def hang(self):
        self.busy.set()
        self.open.wait(BOUND)


class HangingSpans(Gate, SpanExporter):
    """A span exporter that hangs."""

    def export(self, spans):
        self.hang()
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis=30_000):
        return True

    def shutdown(self):
        pass


class HangingMetrics(MetricExporter):
    """A metric exporter that hangs."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def export(self, metrics_data, timeout_millis=10_000, **kwargs):
        self.gate.hang()
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis=10_000):
        return True

    def shutdown(self, timeout_millis=30_000, **kwargs):
        pass


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_directory_alone_is_enough(tmp_path):
    """Logs, spans and metrics in Parquet and the `.prom` file: no endpoint, nothing sent."""
    with oo.configure(directory=tmp_path / "new" / "telemetry", set_global=False) as telemetry:
        run_pipeline()
        assert telemetry.prometheus_url is None
        assert telemetry.directory == tmp_path / "new" / "telemetry"
    assert files_in(telemetry.directory) == [
        "logs/odibi.jsonl",
        "metrics/*.parquet",
        "prometheus/*.prom",
        "spans/*.parquet",
    ]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"span_formats": "json"}, ["logs/odibi.jsonl", "otlp/*.jsonl"]),
        ({"span_formats": "parquet", "logs": False}, ["spans/*.parquet"]),
        ({"metric_formats": "textfile"}, ["logs/odibi.jsonl", "prometheus/*.prom"]),
        ({"metric_formats": "parquet", "logs": False}, ["metrics/*.parquet"]),
        ({"service_name": "a b/c"}, ["logs/a%20b%2Fc.jsonl"]),
        ({"logs": False}, []),
        ({"enabled": False, "span_formats": "parquet"}, []),
    ],
    ids=str,
)
def test_any_subset_of_formats(tmp_path, settings, found):
    """One, several, or none."""
    with configured(directory=tmp_path, **settings):
        run_pipeline()
    assert [path for path in files_in(tmp_path) if not path.startswith("work")] == found


def test_without_a_directory_nothing_is_written(tmp_path):
    """Spans, metrics and logs go where OTLP or a scrape takes them, or nowhere."""
    with oo.configure(set_global=False) as telemetry:
        run_pipeline()
    assert telemetry.directory is None
    assert files_in(tmp_path) == []


def test_the_log_file_has_every_line_at_once(tmp_path):
    """Not only after a flush: what a process wrote before it was killed is there."""
    with configured(directory=tmp_path), oo.pipeline("daily"):
        read()
        lines = (tmp_path / "logs" / "odibi.jsonl").read_bytes().splitlines()
        assert [json.loads(line)["event_type"] for line in lines] == [
            "pipeline_start",
            "node_start",
            "node_complete",
        ]


def test_the_endpoint_takes_a_free_port():
    """Port 0: the address is told."""
    with configured(prometheus_port=0) as telemetry:
        run_pipeline()
        assert telemetry.prometheus_url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(telemetry.prometheus_url, timeout=BOUND) as response:
            page = response.read().decode()
    assert "odibi_node_rows_total{" in page
    assert "odibi_process_uptime_seconds" in page


def test_the_resource_names_the_service():
    """With the environment, an id of this instance, and further attributes, secrets redacted."""
    settings = {"service_name": "flights", "environment": "test", "resource": {"team": "data", "db": "x://u:hunter2@h"}}
    with configured(**settings) as telemetry:
        attributes = telemetry.resource.attributes
    assert (attributes["service.name"], attributes["deployment.environment.name"]) == ("flights", "test")
    assert (attributes["team"], attributes["db"]) == ("data", "x://u:[redacted]@h")
    assert attributes["service.instance.id"]
    with configured(resource={"service.instance.id": "i-1"}) as telemetry:
        assert telemetry.resource.attributes["service.instance.id"] == "i-1"


# --- wrong settings --------------------------------------------------------------------------------------------------


def test_a_wrong_setting_fails_and_changes_nothing():
    """Telemetry that was configured before goes on."""
    with configured() as telemetry:
        with pytest.raises(SettingError, match="log_level='loud'"):
            configured(log_level="loud")
        with pytest.raises(SettingError, match="no such setting"):
            configured(servicename="x")
        assert runtime.configured() is telemetry.runtime


@pytest.mark.parametrize("where", ["/proc/nowhere/telemetry", "\0", "x" * 300 + "/" + "y" * 4000])
def test_a_directory_that_cannot_be_made_fails(where):
    """With the reason and the remedy."""
    with pytest.raises(SettingError, match=r"setting directory=.*; give"):
        configured(directory=where)


def test_a_taken_port_fails_and_leaves_nothing_behind(tmp_path):
    """No file stays locked, and no thread runs; the next try works."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        before = threading.active_count()
        with pytest.raises(SettingError, match="prometheus_port"):
            configured(directory=tmp_path, prometheus_port=taken.getsockname()[1], metric_formats="textfile")
        assert threading.active_count() == before
    with configured(directory=tmp_path):
        run_pipeline()
    assert [path for path in files_in(tmp_path) if "logs" in path] == ["logs/odibi.jsonl"]


# --- life ------------------------------------------------------------------------------------------------------------


def test_shutdown_turns_scopes_and_loggers_off_and_may_be_called_again(tmp_path):
    """They go on without recording."""
    telemetry = configured(directory=tmp_path)
    run_pipeline()
    telemetry.shutdown()
    telemetry.shutdown()
    run_pipeline()
    assert read(2) == [0, 1]
    assert telemetry.flush() is True
    assert (runtime.configured(), logs.active()) == (None, None)
    assert (tmp_path / "logs" / "odibi.jsonl").read_bytes().count(b"\n") == 5


def test_a_second_configure_takes_the_place_of_the_first(tmp_path):
    """Which is shut down; its own shutdown later does not touch the second."""
    first = configured(directory=tmp_path / "a")
    run_pipeline()
    second = configured(directory=tmp_path / "b")
    run_pipeline()
    first.shutdown()
    run_pipeline()
    second.shutdown()
    counts = [(tmp_path / name / "logs" / "odibi.jsonl").read_bytes().count(b"\n") for name in "ab"]
    assert counts == [5, 10]


def test_threads_are_gone_after_shutdown(tmp_path):
    """All those that were started."""
    before = threading.active_count()
    with oo.configure(directory=tmp_path, set_global=False, prometheus_port=0, span_formats="parquet,json"):
        run_pipeline()
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_flush_brings_everything_out(tmp_path):
    """To where readers find it."""
    with configured(directory=tmp_path, span_formats="parquet", metric_formats="textfile") as telemetry:
        run_pipeline()
        assert telemetry.flush() is True
        assert "odibi_node_rows_total" in (tmp_path / "prometheus" / "odibi.prom").read_text()


def made(**options):
    """Make a telemetry by hand, with exporters of the test's, and let scopes use it."""
    telemetry = Telemetry(Settings.resolve({"exit_timeout": 0.01, **options.pop("settings", {})}, {}, {}), **options)
    telemetry.activate()
    return telemetry


def test_shutdown_with_a_hanging_span_exporter_ends_in_time_and_counts(caplog):
    """A warning tells what was lost."""
    exporter = HangingSpans()
    telemetry = made(span_exporters=(exporter,))
    run_pipeline()
    telemetry.shutdown()
    assert telemetry.aggregates.dropped() == {("spans", "exit_timeout"): 2}
    assert "telemetry lost: spans, reason exit_timeout" in caplog.text
    exporter.open.set()


def test_a_hanging_span_exporter_does_not_hold_up_the_others():
    """Each has a queue and a thread of its own."""
    hanging, other = HangingSpans(), InMemorySpanExporter()
    telemetry = made(span_exporters=(hanging, other))
    run_pipeline()
    assert telemetry.queues[1].force_flush(BOUND * 1000)
    telemetry.shutdown()
    assert len(other.get_finished_spans()) == 2
    hanging.open.set()


def test_flush_and_shutdown_with_a_hanging_metric_exporter_end_in_time():
    """What hangs goes on in the background."""
    exporter = HangingMetrics()
    telemetry = made(metric_readers=(PeriodicExportingMetricReader(exporter, 3_600_000),))
    run_pipeline()
    assert telemetry.flush(timeout=0.01) is False
    assert exporter.gate.busy.wait(BOUND)
    telemetry.shutdown()
    exporter.gate.open.set()


def test_a_full_queue_is_counted():
    """The pipeline does not wait."""
    exporter = HangingSpans()
    telemetry = made(span_exporters=(exporter,), settings={"span_queue": 1})
    read()
    assert exporter.busy.wait(BOUND)
    for _ in range(5):
        read()
    assert telemetry.aggregates.dropped() == {("spans", "queue_full"): 4}
    exporter.open.set()
    telemetry.shutdown(BOUND)


# --- trouble ---------------------------------------------------------------------------------------------------------


class TroubleAt:
    """Troubles with a clock that moves when told, and what they counted."""

    def __init__(self):
        self.now, self.counted = 0.0, []
        self.troubles = Troubles(lambda *drop: self.counted.append(drop), tick=lambda: self.now)


def test_each_cause_is_warned_about_once_a_minute(caplog):
    """And counted each time."""
    at = TroubleAt()
    for at.now in (0.0, 1.0, 59.9, 60.0, 61.0):
        at.troubles.dropped("spans", "queue_full", 2)
        at.troubles.dropped("logs", "disk_full")
        at.troubles.error("listener", ValueError("x"))
        at.troubles.error("listener", TypeError("x"))
        at.troubles.overflow("odibi.node.duration")
    assert len(at.counted) == 20
    assert at.counted[:3] == [("spans", "queue_full", 2), ("logs", "disk_full", 1), ("internal", "listener", 1)]
    assert len(caplog.records) == 2 * 5
    assert {record.name for record in caplog.records} == {"otel_odibi"}
    assert "raise cardinality_limit" in caplog.text


def test_a_warning_shows_no_secret_and_never_raises(caplog, monkeypatch):
    """Whatever the exception, and whatever the host's logging does."""
    at = TroubleAt()
    at.troubles.error("finish", ValueError("no login at https://u:hunter2@h"))
    at.troubles.error("finish", Unreadable())
    assert "hunter2" not in caplog.text
    assert "https://u:[redacted]@h" in caplog.text
    monkeypatch.setattr(logging.Logger, "handle", lambda *_: 1 // 0)
    at.troubles.error("other", ValueError())


def test_warnings_remembered_are_bounded():
    """A cause that is new each time does not fill the memory."""
    at = TroubleAt()
    for number in range(3_000):
        at.troubles.warn("cause", str(number), "x")
    assert len(at.troubles._warned) <= 1_001


def test_listeners_hear_of_every_fact_and_may_raise(caplog):
    """After the log line; what they raise is counted and goes no further."""
    with capture() as captured:
        heard = []
        captured.telemetry.subscribe(NodeFinished, lambda fact: 1 // 0)
        captured.telemetry.subscribe(NodeFinished, lambda fact: heard.append((fact.outcome, len(captured.logs))))
        assert read() == [0, 1, 2]
    assert heard == [("success", 2)]
    assert captured.metric("odibi.telemetry.dropped", signal="internal", reason="listener") == 1
    assert "error inside telemetry, in listener: ZeroDivisionError" in caplog.text


def test_too_many_nodes_are_warned_about(caplog):
    """Once, when the metrics are collected."""
    with capture(cardinality_limit=2) as captured:
        for number in range(5):
            with oo.node(f"n{number}"):
                pass
        assert captured.metrics
    assert "metric odibi.node.duration has reached the cardinality limit" in caplog.text


def test_the_logging_handler_comes_and_goes():
    """With capture_logging alone, and once however often telemetry is activated."""
    before = list(logging.getLogger().handlers)
    with configured(capture_logging=True) as telemetry:
        telemetry.activate()
        (added,) = [handler for handler in logging.getLogger().handlers if handler not in before]
        assert isinstance(added, logs.LoggingHandler)
    assert logging.getLogger().handlers == before
    with configured():
        assert logging.getLogger().handlers == before


@pytest.mark.parametrize("settings", [{"enabled": False}, {"environ": {"OTEL_SDK_DISABLED": "true"}}], ids=str)
def test_disabled_telemetry_does_nothing(tmp_path, monkeypatch, settings):
    """No file, no directory, no endpoint; scopes hand the call through."""
    for name, value in settings.pop("environ", {}).items():
        monkeypatch.setenv(name, value)
    try:
        with configured(directory=tmp_path / "none", prometheus_port=0, capture_logging=True, **settings) as telemetry:
            with oo.pipeline("p") as run:
                assert not run
            run_pipeline()
            assert telemetry.prometheus_url is None
            assert telemetry.flush()
        assert not (tmp_path / "none").exists()
    finally:
        runtime.activate(None)


def test_enabled_by_name_wins_over_otel_sdk_disabled(monkeypatch):
    """Spans and metrics of the SDK are then recorded too."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    exporter = InMemorySpanExporter()
    telemetry = made(span_exporters=(exporter,), settings={"enabled": True})
    read()
    telemetry.shutdown(BOUND)
    assert [span.name for span in exporter.get_finished_spans()] == ["node read"]


# --- a host's own providers ------------------------------------------------------------------------------------------


def test_a_hosts_providers_are_used_and_get_everything(tmp_path):
    """Spans go to its exporters and ours, metrics to its readers and ours."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracing, metering = TracerProvider(shutdown_on_exit=False), MeterProvider([reader], shutdown_on_exit=False)
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    providers = {"tracer_provider": tracing, "meter_provider": metering}
    with configured(directory=tmp_path, span_formats="json", metric_formats="textfile", **providers) as telemetry:
        assert telemetry.tracer_provider is tracing
        with tracing.get_tracer("host").start_as_current_span("of the host"):
            run_pipeline()
        found = {m.name for r in reader.get_metrics_data().resource_metrics for s in r.scope_metrics for m in s.metrics}
    assert {span.name for span in exporter.get_finished_spans()} == {"node read", "pipeline daily", "of the host"}
    assert {"odibi.node.duration", "odibi.pipeline.duration", "odibi.process.uptime"} <= found
    assert b"of the host" in b"".join(path.read_bytes() for path in (tmp_path / "otlp").iterdir())
    assert "odibi_node_duration_seconds_bucket" in (tmp_path / "prometheus" / "odibi.prom").read_text()
    metering.shutdown()


def test_a_hosts_provider_that_takes_no_exporters_is_warned_about(tmp_path, caplog):
    """It may be another vendor's; its spans go to it alone."""
    with configured(directory=tmp_path, span_formats="json", tracer_provider=trace.NoOpTracerProvider()):
        assert read() == [0, 1, 2]
    assert "the host's tracer provider takes no exporters" in caplog.text
    assert (tmp_path / "logs" / "odibi.jsonl").read_bytes().count(b"\n") == 2


def test_a_hosts_sampler_is_obeyed():
    """Unsampled nodes still have log lines and metrics; but no exemplars, as there would be no trace to find."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    telemetry = made(tracer_provider=provider, span_exporters=(exporter,))
    read()
    families = {family.instrument: family.points for family in telemetry.aggregates.collect()}
    telemetry.shutdown()
    assert not exporter.get_finished_spans()
    assert families[names.NODE_DURATION][0].count == 1
    assert families[names.NODE_DURATION][0].exemplars == ()


# --- in a process of its own -----------------------------------------------------------------------------------------

PREPARED = """
    import json, os, sys, threading
    import otel_odibi as oo
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    quiet = dict(span_formats="none", metric_formats="none")

    @oo.node
    def read():
        return [1, 2, 3]

    def lines(directory):
        return [json.loads(line) for line in open(directory + "/logs/odibi.jsonl")]

    def spans(directory):
        return [span["name"] for line in open(directory + "/otlp/odibi.traces.jsonl") for resource
                in json.loads(line)["resourceSpans"] for scope in resource["scopeSpans"] for span in scope["spans"]]
"""


def test_providers_become_global_and_take_other_libraries_spans(tmp_path):
    """Also after a second configure(), as OpenTelemetry ignores a second provider."""
    assert program(
        PREPARED
        + f"""
    os.chdir({str(tmp_path)!r})
    early = trace.get_tracer("library")
    first = oo.configure(directory="a", span_formats="json", metric_formats="none")
    same = trace.get_tracer_provider() is first.tracer_provider and metrics.get_meter_provider() is first.meter_provider
    early.start_span("one").end(); read()
    second = oo.configure(directory="b", span_formats="json", metric_formats="none")
    early.start_span("two").end(); read()
    second.shutdown()
    early.start_span("three").end(); read()
    print(json.dumps([same, spans("a"), spans("b"), len(lines("a")), len(lines("b"))]))
    """,
    ) == [True, ["one", "node read"], ["two", "node read"], 2, 2]


def test_set_global_false_leaves_the_globals_alone():
    """For applications that assemble OpenTelemetry themselves."""
    assert program(
        PREPARED
        + """
    with oo.configure(set_global=False, **quiet):
        pass
    print(json.dumps([type(trace.get_tracer_provider()).__name__, trace._TRACER_PROVIDER is None]))
    """
    ) == ["ProxyTracerProvider", True]


def test_global_providers_of_the_host_are_used_and_not_replaced():
    """With configure() and without."""
    assert program(
        PREPARED
        + """
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracing, metering = TracerProvider(), MeterProvider([reader])
    tracing.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(tracing); metrics.set_meter_provider(metering)

    def durations():
        data = reader.get_metrics_data()
        return sum(p.count for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics
                   if m.name == "odibi.node.duration" for p in m.data.data_points)

    seen = []
    read(); seen.append([len(exporter.get_finished_spans()), durations()])
    with oo.configure(**quiet) as telemetry:
        read()
        seen.append(telemetry.tracer_provider is trace.get_tracer_provider() is tracing)
        seen.append(metrics.get_meter_provider() is metering)
    read(); seen.append([len(exporter.get_finished_spans()), durations()])
    print(json.dumps(seen))
    """
    ) == [[1, 1], True, True, [3, 3]]


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise SystemExit", "threading.Thread(target=read).start()"])
def test_what_was_recorded_is_written_when_the_process_ends(tmp_path, end):
    """Without flush or shutdown."""
    program(
        PREPARED
        + f"""
    oo.configure(directory={str(tmp_path)!r}, span_formats="json", metric_formats="textfile")
    with oo.pipeline("daily"):
        read()
    {end}
    """
    )
    assert (tmp_path / "otlp" / "odibi.traces.jsonl").read_text().count('"node read"') >= 1
    assert "odibi_pipeline_duration_seconds" in (tmp_path / "prometheus" / "odibi.prom").read_text()


@pytest.mark.skipif(os.name != "posix", reason="the platform has no SIGTERM")
@pytest.mark.parametrize("within", ["time.sleep(60)", "threading.Event().wait(60)", "while True: pass"])
def test_what_was_recorded_is_written_when_the_process_is_terminated(tmp_path, within):
    """By SIGTERM, with which it ends all the same."""
    code = f"""if True:
    import os, signal, threading, time
    import otel_odibi as oo
    with oo.pipeline("daily"):
        oo.configure(directory={str(tmp_path)!r}, span_formats="json", metric_formats="textfile")
        with oo.node("read"): pass
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        {within}
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "otlp" / "odibi.traces.jsonl").read_text().count('"node read"') == 1
    assert "odibi_node_duration_seconds" in (tmp_path / "prometheus" / "odibi.prom").read_text()


@pytest.mark.skipif(os.name != "posix", reason="the platform has no SIGTERM")
def test_a_program_keeps_its_own_way_to_be_terminated():
    """A handler that is there is left alone."""
    assert (
        program(
            PREPARED
            + """
    import os, signal
    signal.signal(signal.SIGTERM, lambda number, frame: print("my own way"))
    oo.configure(**quiet)
    os.kill(os.getpid(), signal.SIGTERM)
    """
        ).strip()
        == "my own way"
    )


def test_a_process_ends_though_an_exporter_hangs():
    """Within exit_timeout, whatever the exporter waits for."""
    output = program(
        PREPARED
        + """
    from opentelemetry.sdk.trace.export import SpanExporter
    class Hanging(SpanExporter):
        def export(self, spans): threading.Event().wait()
        def force_flush(self, timeout_millis=30_000): threading.Event().wait()
    from otel_odibi.delivery import SpanQueue
    telemetry = oo.configure(exit_timeout=0.05, **quiet)
    drop = telemetry.troubles.on_drop("spans")
    queue = SpanQueue(Hanging(), cleaner=telemetry.cleaner, interval=60, limit=10, on_drop=drop)
    telemetry.queues.append(queue)
    telemetry.attach(queue, telemetry.tracer_provider)
    read()
    print("done")
    """
    )
    assert output.startswith("done")
    assert "telemetry lost: spans, reason exit_timeout" in output


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_child_counts_from_zero_and_does_not_hang(tmp_path):
    """Even while other threads of the parent are at work; parent and child write what is theirs, once."""
    counts = program(
        PREPARED
        + f"""
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, which is what happens here
    directory = {str(tmp_path)!r}
    telemetry = oo.configure(directory=directory, span_formats="json", metric_formats="textfile", exit_timeout=30)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            with oo.node("busy"): pass

    def runs():
        points = [p for f in telemetry.aggregates.collect() if f.instrument.kind == "histogram" for p in f.points]
        return [point.count for point in points if point.attributes.get("node") == "read"]

    threads = [threading.Thread(target=busy) for _ in range(4)]
    for thread in threads: thread.start()
    read(); read()
    pids = []
    for number in range(5):
        pid = os.fork()
        if pid == 0:
            before = runs()
            with oo.pipeline(f"child {{number}}"):
                read()
            telemetry.flush()
            with open(f"{{directory}}/{{number}}.json", "w") as out:
                json.dump([before, runs()], out)
            telemetry.shutdown()
            os._exit(0)
        pids.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    stop.set()
    for thread in threads: thread.join()
    read()
    children = [json.load(open(f"{{directory}}/{{number}}.json")) for number in range(5)]
    print(json.dumps([codes, children, runs()]))
    telemetry.shutdown()
    """
    )
    assert counts == [[0] * 5, [[[], [1]]] * 5, [3]]
    lines = [json.loads(line) for path in files(tmp_path / "logs") for line in read_lines(path)]
    assert sum(line["event_type"] == "node_complete" and line["node_name"] == "read" for line in lines) == 8
    spans = b"".join(line for path in files(tmp_path / "otlp") for line in read_lines(path))
    assert spans.count(b'"node read"') == 8
    assert [spans.count(b'"pipeline child %d"' % number) for number in range(5)] == [1] * 5
