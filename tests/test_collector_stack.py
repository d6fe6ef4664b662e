"""The real collector with the configurations that are shipped: what comes out of it is what went in."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from programs import CONFIGS, Collector, Sink, attributes, built, environment, free_ports, otelcol, otlp_sink, wait_for
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.stack

PIPELINE = """
import sys, time
import otel_odibi as oo

@oo.node(layer="ingest", engine="python")
def read(rows):
    oo.get_logger().info("reading", share=0.5)
    oo.current_node().output(rows=rows)

rounds, rows, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with oo.configure(service_name="loads"):
    for _ in range(rounds):
        with oo.pipeline("load"):
            read(rows)
        time.sleep(pause)
"""


def behind(sink: Sink) -> dict[str, str]:
    """Return the variables that put the sink in the place of Tempo and Loki."""
    return {"TEMPO_ENDPOINT": sink.http, "LOKI_ENDPOINT": sink.http, "OTELCOL_SPAN_METRICS_INTERVAL": "1s"}


def start(rounds: int, rows: int, env: dict[str, str], pause: float = 0) -> subprocess.Popen[bytes]:
    """Start a process that runs a pipeline of one node, a few times over."""
    command = [sys.executable, "-c", PIPELINE, str(rounds), str(rows), str(pause)]
    return subprocess.Popen(command, env=environment(env))


def run(rounds: int, rows: int, env: dict[str, str]) -> None:
    assert start(rounds, rows, env).wait(120) == 0


def demo(folder: Path, env: dict[str, str], *options: str) -> None:
    command = [Path(sys.executable).parent / "otel-odibi", "demo", "--fast", *options, folder]
    subprocess.run(command, env=environment(env), stdout=subprocess.DEVNULL, check=not options)


def lines(folder: Path, pattern: str) -> list[dict]:
    """Return the objects in JSON-lines files, packed or not."""
    files = sorted(folder.glob(f"{pattern}.jsonl")) + sorted(folder.glob(f"{pattern}.*.jsonl.gz"))
    texts = [gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in files]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def spans_of(folder: Path) -> list[tuple]:
    """Return what the pipeline's own file says of each span."""
    return sorted(
        (
            span["traceId"],
            span["spanId"],
            span.get("parentSpanId", ""),
            span["name"],
            int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"]),
            sorted((link["traceId"], link["spanId"]) for link in span.get("links", [])),
            sorted(pair["key"] for pair in span["attributes"]),
            span.get("status", {}).get("code", 0),
        )
        for request in lines(folder / "otlp", "*.traces")
        for resource in request["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    )


def spans_in(sink: Sink) -> list[tuple]:
    """Return the same of each span that arrived."""
    return sorted(
        (
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.name,
            span.end_time_unix_nano - span.start_time_unix_nano,
            sorted((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
            sorted(attributes(span)),
            span.status.code,
        )
        for span in sink.spans
    )


def logs_of(folder: Path) -> Counter:
    """Count the log lines in the pipeline's own files, by what identifies them."""
    return Counter(
        (each["message"], each["level"], each.get("trace_id", ""), each.get("span_id", ""), each["service"])
        for each in lines(folder / "logs", "*")
    )


def logs_in(sink: Sink) -> Counter:
    """Count the log records that arrived, likewise."""
    return Counter(
        (
            record.body.string_value,
            record.severity_text.lower(),
            record.trace_id.hex(),
            record.span_id.hex(),
            resource["service.name"],
        )
        for resource, record in sink.items("logs")
    )


def total(collector: Collector, name: str, **labels: str) -> float:
    """Return the sum of the samples with these labels on the collector's page."""
    found = collector.samples().get(name, [])
    return sum(sample.value for sample in found if labels.items() <= sample.labels.items())


# --- what is accepted ------------------------------------------------------------------------------------------------


def accepted(config: Path, **env: str) -> None:
    command = [built("otelcol"), "validate", "--config", config]
    done = subprocess.run(command, env=environment(env), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


SECURED = {"OTELCOL_TLS": "true", "OTELCOL_CERT": "c.pem", "OTELCOL_KEY": "k.pem", "OTELCOL_CLIENT_CA": "a.pem"}
SECURED |= {"GATEWAY_INSECURE": "false", "GATEWAY_CA": "a.pem", "TEMPO_HEADERS": "{authorization: Bearer secret}"}


@pytest.mark.parametrize("env", [{}, SECURED], ids=["defaults", "secured"])
@pytest.mark.parametrize("config", ["local", "agent", "gateway"])
def test_each_configuration_is_accepted(tmp_path, config, env):
    """With nothing set but where to store, and with TLS, client certificates and headers."""
    accepted(CONFIGS / f"{config}.yaml", OTELCOL_STORAGE=str(tmp_path), **env)


def test_the_gateway_with_tail_sampling_is_accepted(tmp_path):
    """As its comment shows it, once the comment signs are gone."""
    text = (CONFIGS / "gateway.yaml").read_text(encoding="utf-8")
    before, mark, rest = text.partition("  # tail_sampling:")
    option, _, after = rest.partition("\n\n")
    config = tmp_path / "sampling.yaml"
    option = (mark + option).replace("  # ", "  ") + "\n\n"
    config.write_text((before + option + after).replace("processors: []", "processors: [tail_sampling]"))
    accepted(config, OTELCOL_STORAGE=str(tmp_path))
    assert mark
    assert "processors: []" in text


# --- local.yaml ------------------------------------------------------------------------------------------------------


def test_all_that_the_demo_sends_comes_out_over_grpc_and_over_http(tmp_path):
    """Spans with parents and links, log records with their ids, and each counter and bucket summed up over three runs.

    The demo's own files say what went in; its `.prom` file goes on counting from run to run, as the collector is to.
    """
    with otlp_sink() as sink, otelcol("local.yaml", tmp_path, **behind(sink)) as col:
        for protocol, options in (("grpc", ()), ("http/protobuf", ()), ("grpc", ("--fail", "join_planes"))):
            demo(tmp_path, {**col.otlp(protocol), "OTEL_ODIBI_OTLP_LOGS": "true"}, *options)
        want = spans_of(tmp_path)
        wait_for(lambda: len(sink.spans) >= len(want), "spans")
        wait_for(lambda: logs_in(sink).total() >= logs_of(tmp_path).total(), "log records")
        assert spans_in(sink) == want
        assert logs_in(sink) == logs_of(tmp_path)
        assert len({span[0] for span in want}) == 3
        assert any(span[5] for span in want)
        page = {  # what is on it beside the `.prom` file's labels is Prometheus's own
            (sample.name, frozenset(sample.labels.items() - own_labels(sample))): sample.value
            for samples in col.samples().values()
            for sample in samples
        }
        checked = 0
        for family in text_string_to_metric_families((tmp_path / "prometheus/flights.prom").read_text()):
            for sample in family.samples if family.type in ("counter", "histogram") else ():
                assert math.isclose(page[sample.name, frozenset(sample.labels.items())], sample.value), sample
                checked += 1
        assert checked > 300
        traces = {span[0] for span in want}
        exemplars = [
            s.exemplar.labels["trace_id"] for s in col.samples()["odibi_node_duration_seconds_bucket"] if s.exemplar
        ]
        assert exemplars
        assert set(exemplars) <= traces
        wait_for(lambda: total(col, "traces_span_metrics_calls_total") == len(want), "metrics of spans")


def own_labels(sample) -> set[tuple[str, str]]:
    return {pair for pair in sample.labels.items() if pair[0] in ("job", "instance")}


def test_processes_that_overlap_add_up(tmp_path):
    """Four of one service, each exporting every 0.1 s: nothing is dropped for coming out of order."""
    with otelcol("local.yaml", tmp_path) as col:
        env = {**col.otlp("grpc"), "OTEL_METRIC_EXPORT_INTERVAL": "100", "OTEL_ODIBI_ENVIRONMENT": "test"}
        processes = [start(15, 10, env, pause=0.1) for _ in range(4)]
        assert [process.wait(120) for process in processes] == [0] * 4
        wait_for(lambda: total(col, "odibi_node_rows_total", direction="out") >= 600, "rows")
        (rows,) = col.samples()["odibi_node_rows_total"]
        assert rows.value == 600
        assert rows.labels["service"] == rows.labels["job"] == "loads"
        assert rows.labels["environment"] == "test"
        assert rows.labels["instance"]
        assert total(col, "odibi_node_duration_seconds_count") == 60


# --- agent.yaml and gateway.yaml -------------------------------------------------------------------------------------


def test_an_agent_reads_log_lines_and_spans_from_files_once(tmp_path):
    """Across its own restart too, and where files were rotated and packed while it was away."""
    env = {"OTEL_ODIBI_DIRECTORY": str(tmp_path), "OTEL_ODIBI_SPAN_FORMATS": "json"}
    run(5, 10, env)
    with otlp_sink() as sink:
        agent = {"GATEWAY_ENDPOINT": sink.grpc, "OTEL_ODIBI_DIRECTORY": str(tmp_path)}
        with otelcol("agent.yaml", tmp_path, **agent):
            wait_for(lambda: logs_in(sink) == logs_of(tmp_path), "log lines")
            wait_for(lambda: spans_in(sink) == spans_of(tmp_path), "spans")
        run(200, 10, {**env, "OTEL_ODIBI_LOG_MAX_BYTES": "100000"})
        assert list(tmp_path.glob("logs/*.jsonl.gz"))
        with otelcol("agent.yaml", tmp_path, **agent):
            wait_for(lambda: logs_in(sink).total() >= logs_of(tmp_path).total(), "log lines")
            wait_for(lambda: len(sink.spans) >= len(spans_of(tmp_path)), "spans")
            run(5, 10, env)
            wait_for(lambda: logs_in(sink).total() >= logs_of(tmp_path).total(), "log lines")
            wait_for(lambda: len(sink.spans) >= len(spans_of(tmp_path)), "spans")
        assert logs_in(sink) == logs_of(tmp_path)
        assert spans_in(sink) == spans_of(tmp_path)
        resource, record = next((r, each) for r, each in sink.items("logs") if each.body.string_value == "reading")
        assert attributes(record)["share"] == 0.5
        assert attributes(record).keys().isdisjoint({"trace_id", "span_id", "message", "service", "timestamp"})
        assert resource["host.name"]
        assert record.time_unix_nano % 1000 == 0


@pytest.mark.parametrize("config", ["agent.yaml", "gateway.yaml"])
def test_what_cannot_be_passed_on_waits_on_disk(tmp_path, config):
    """What stands behind is away, then the collector is stopped: what it took goes out after its next start."""
    inner, nobody = map(str, free_ports(2))
    peer = {"OTELCOL_INNER_PORT": inner, "GATEWAY_PEERS": f"[127.0.0.1:{inner}]"}
    away = {"GATEWAY_ENDPOINT": f"127.0.0.1:{nobody}", "TEMPO_ENDPOINT": f"http://127.0.0.1:{nobody}"}
    with otelcol(config, tmp_path, **peer, **away) as collector:
        run(10, 10, collector.otlp("grpc"))
        run(10, 10, collector.otlp("http/protobuf"))
    with otlp_sink() as sink, otelcol(config, tmp_path, GATEWAY_ENDPOINT=sink.grpc, **peer, **behind(sink)):
        wait_for(lambda: len(sink.spans) >= 40, "spans")
        assert len({span.span_id for span in sink.spans}) == len(sink.spans) == 40
        if config == "agent.yaml":
            wait_for(lambda: sum(row_counts(sink)) >= 200, "metrics")
            assert sum(row_counts(sink)) == 200


def row_counts(sink: Sink) -> list[int]:
    metrics = [metric for _, metric in sink.items("metrics") if metric.name == "odibi.node.rows"]
    return [int(point.as_double or point.as_int) for metric in metrics for point in metric.sum.data_points]


def test_from_agents_through_two_gateways(tmp_path):
    """Whole traces come out, each metric stream is added up at one gateway, and spans are counted at both."""
    inner = free_ports(2)
    common = {"GATEWAY_PEERS": f"[127.0.0.1:{inner[0]}, 127.0.0.1:{inner[1]}]"}
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with otlp_sink() as sink:
        common |= behind(sink)
        with (
            otelcol("gateway.yaml", folders[0], OTELCOL_INNER_PORT=str(inner[0]), **common) as one,
            otelcol("gateway.yaml", folders[1], OTELCOL_INNER_PORT=str(inner[1]), **common) as two,
            otelcol("agent.yaml", folders[0], OTELCOL_STORAGE=str(tmp_path / "a"), GATEWAY_ENDPOINT=one.grpc) as first,
            otelcol("agent.yaml", folders[1], OTELCOL_STORAGE=str(tmp_path / "b"), GATEWAY_ENDPOINT=two.grpc) as other,
        ):
            env = {"OTEL_ODIBI_OTLP_LOGS": "true"}
            for agent in (first, other, first):
                run(20, 10, {**env, **agent.otlp("grpc")})
            wait_for(lambda: len(sink.spans) >= 120, "spans")
            assert len({span.span_id for span in sink.spans}) == len(sink.spans) == 120
            assert set(Counter(span.trace_id for span in sink.spans).values()) == {2}
            wait_for(lambda: logs_in(sink).total() >= 60 * 5, "log records")
            rows = [lambda each=each: total(each, "odibi_node_rows_total") for each in (one, two)]
            wait_for(lambda: sum(each() for each in rows) >= 600, "rows")
            assert sorted(each() for each in rows) == [0, 600]
            calls = [lambda each=each: total(each, "traces_span_metrics_calls_total") for each in (one, two)]
            wait_for(lambda: sum(each() for each in calls) == 120, "metrics of spans")
            assert min(each() for each in calls) > 0


def test_a_gateway_takes_nothing_from_a_client_without_a_certificate(tmp_path):
    """With TLS and an authority for clients: an agent with a certificate gets through, one without does not."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    own = {"OTELCOL_TLS": "true", "OTELCOL_CERT": str(certificate), "OTELCOL_KEY": str(key)}
    own |= {"OTELCOL_CLIENT_CA": str(certificate)}
    trust = {"GATEWAY_INSECURE": "false", "GATEWAY_CA": str(certificate)}
    shown = {**trust, "GATEWAY_CERT": str(certificate), "GATEWAY_KEY": str(key)}
    inner = str(free_ports(1)[0])
    peers = {"GATEWAY_PEERS": f"[127.0.0.1:{inner}]", "OTELCOL_INNER_PORT": inner}
    with (
        otlp_sink() as sink,
        otelcol("gateway.yaml", tmp_path, **behind(sink), **own, **shown, **peers) as gateway,
    ):
        (tmp_path / "with").mkdir()
        (tmp_path / "without").mkdir()
        with (
            otelcol("agent.yaml", tmp_path / "without", GATEWAY_ENDPOINT=gateway.grpc, **trust) as without,
            otelcol("agent.yaml", tmp_path / "with", GATEWAY_ENDPOINT=gateway.grpc, **shown) as agent,
        ):
            run(1, 10, without.otlp("grpc"))
            wait_for(lambda: "certificate required" in without.log.read_text(), "a refusal")
            run(2, 10, agent.otlp("grpc"))
            wait_for(lambda: len(sink.spans) >= 4, "spans")
            assert len(sink.spans) == 4
