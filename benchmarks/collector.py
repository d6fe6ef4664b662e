"""Spans a second through the collector's shipped configurations: `python -m benchmarks.collector`.

Requests like a pipeline's (20 spans a run, their attributes, a link each) are built once and sent over and over, as
fast as they are taken, to a sink that looks at nothing. The clock stops when the collector has sent the last one on.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from programs import built, fetch, free_ports, otelcol, otlp_sink, wait_for

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
RUNS, NODES, REQUESTS, SENDERS = 50, 20, 500, 4
SPANS, LINES = RUNS * NODES * REQUESTS, 300_000


def request() -> bytes:
    """Return an export request with the spans of some runs."""
    message = ExportTraceServiceRequest()
    resource = message.resource_spans.add()
    resource.resource.attributes.extend(pairs({"service.name": "bench", "host.name": "bench"}))
    spans = resource.scope_spans.add().spans
    now = time.time_ns()
    for _ in range(RUNS):
        trace, root = secrets.token_bytes(16), secrets.token_bytes(8)
        for number in range(NODES):
            span = spans.add(trace_id=trace, span_id=secrets.token_bytes(8) if number else root)
            span.name, span.kind = f"node step_{number}", 1
            span.start_time_unix_nano, span.end_time_unix_nano = now, now + 10**7 * (number + 1)
            span.attributes.extend(pairs(attributes(number)))
            if number:
                span.parent_span_id = root
                span.links.add(trace_id=trace, span_id=root)
    return message.SerializeToString()


def attributes(number: int) -> dict[str, Any]:
    """Return the attributes that a node's span has."""
    return {
        "odibi.pipeline.name": "bench", "odibi.pipeline.run.id": secrets.token_hex(16),
        "odibi.node.name": f"step_{number}", "odibi.node.layer": "transform", "odibi.node.engine": "pandas",
        "odibi.node.outcome": "success", "odibi.node.attempt": 1, "odibi.node.rows.in": 336776,
        "odibi.node.rows.out": 327346, "odibi.node.bytes.out": 49756592, "odibi.node.columns": 19,
        "odibi.node.memory.rss": 254803968, "code.function.name": f"bench.step_{number}", "thread.id": 140055656344448,
        "thread.name": "MainThread",
    }  # fmt: skip


def pairs(values: dict[str, Any]) -> list[KeyValue]:
    """Return attributes as OTLP has them."""
    return [
        KeyValue(key=key, value=AnyValue(int_value=value) if isinstance(value, int) else AnyValue(string_value=value))
        for key, value in values.items()
    ]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has taken (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_sent(port: str, what: str, exporter: str, count: int) -> None:
    """Wait until the collector says that this many spans or log_records have left it."""
    sent = re.compile(rf'otelcol_exporter_sent_{what}_?\w*{{exporter="{exporter}"[^}}]*}} (\S+)')
    page = f"http://127.0.0.1:{port}/metrics"
    wait_for(lambda: sum(map(float, sent.findall(fetch(page)))) >= count, f"the last of the {what}", 300)


def measure(config: str, port: str, exporter: str, requests: list[bytes]) -> tuple[float, float]:
    """Return spans, or without requests log lines from a file, a second, and a second of the collector's CPU time."""
    numbers = dict(zip(("GRPC", "INNER", "SELF"), map(str, free_ports(3)), strict=True))
    count, what = (SPANS, "spans") if requests else (LINES, "log_records")
    with tempfile.TemporaryDirectory() as folder, otlp_sink(keep=False) as sink:
        env = {f"OTELCOL_{name}_PORT": number for name, number in numbers.items()}
        env |= {"TEMPO_ENDPOINT": sink.http, "GATEWAY_ENDPOINT": sink.grpc, "OTELCOL_MEMORY_MIB": "2048"}
        env |= {"GATEWAY_PEERS": f"[127.0.0.1:{numbers['INNER']}]", "OTEL_ODIBI_DIRECTORY": folder}
        Path(folder, "logs").mkdir()
        Path(folder, "logs/bench.jsonl").write_bytes(b"".join(map(log_line, range(0 if requests else LINES))))
        began = time.perf_counter()
        with otelcol(config, Path(folder), **env) as collector, ThreadPoolExecutor(SENDERS) as pool:
            address = f"127.0.0.1:{numbers[port]}"
            sends = [grpc.insecure_channel(address).unary_unary(EXPORT) for _ in range(SENDERS)]
            sending = range(REQUESTS if requests else 0)
            list(pool.map(lambda i: sends[i % SENDERS](requests[i % len(requests)], timeout=60), sending))
            wait_until_sent(numbers["SELF"], what, exporter, count)
            took, cpu = time.perf_counter() - began, cpu_seconds(collector.process.pid)
    return count / took, count / cpu


def log_line(number: int) -> bytes:
    """Return a node's line of a log file."""
    fields = {"timestamp": "2026-01-01T00:00:00.000001Z", "level": "info", "message": f"node step_{number} finished"}
    fields |= {"event_type": "node_complete", "service": "bench", "status": "success", "duration_ms": 12.5}
    fields |= {"trace_id": secrets.token_hex(16), "span_id": secrets.token_hex(8), **attributes(number)}
    return json.dumps(fields).encode() + b"\n"


def main() -> None:
    """Measure and print."""
    built("otelcol")
    requests = [request() for _ in range(20)]
    print(f"{SPANS:,} spans, {len(requests[0]) / RUNS / NODES:.0f} bytes each, on {os.cpu_count()} cores")
    for what, config, port, exporter, sent in (
        ("agent.yaml, spans", "agent.yaml", "GRPC", "otlp_grpc", requests),
        ("agent.yaml, log lines", "agent.yaml", "GRPC", "otlp_grpc", []),
        ("gateway.yaml, balanced", "gateway.yaml", "GRPC", "otlp_http/tempo", requests),
        ("gateway.yaml, inner port", "gateway.yaml", "INNER", "otlp_http/tempo", requests),
    ):
        wall, cpu = measure(config, port, exporter, sent)
        print(f"{what:<26}{wall:>10,.0f} a second{cpu:>10,.0f} a CPU second of the collector", flush=True)


if __name__ == "__main__":
    main()
