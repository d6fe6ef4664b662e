"""Real programs for the tests, on free ports of this machine, each ready when yielded and stopped at the end."""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import grpc
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "collector-config"
REQUESTS: dict[str, Any] = {"traces": ExportTraceServiceRequest, "metrics": ExportMetricsServiceRequest}
REQUESTS["logs"] = ExportLogsServiceRequest


def wait_for(check: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Ask until the answer is true, and return it; an OSError is not an answer yet."""
    deadline, answer = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        with suppress(OSError):
            if answer := check():
                return answer
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s in vain for {what}; last answer: {answer!r}")


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on just now, all different."""
    with ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in listening]


def fetch(url: str, accept: str = "*/*") -> str:
    """Return what a GET of the URL gives; raises OSError where that is not 200."""
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=10) as reply:
        return reply.read().decode()


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment without what would configure telemetry, plus the variables given."""
    return {key: value for key, value in os.environ.items() if not key.startswith("OTEL")} | variables


@contextmanager
def running(command: list[Any], log: Path, env: Mapping[str, str], ready: Callable[[], Any]) -> Iterator[Any]:
    """Run a program, what it says going to `log`, from when it is ready until the end of the block."""
    with log.open("ab") as out:
        process = subprocess.Popen(list(map(str, command)), env=environment(env), stdout=out, stderr=out)
    try:
        wait_for(lambda: process.poll() is not None or ready(), f"{command[0]}, see {log}")
        assert process.poll() is None, f"{command[0]} ended:\n{log.read_text()[-3000:]}"
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


@functools.cache
def built(target: str) -> str:
    """Return the path of what `make otelcol` or `make jaeger` builds, building it where that was not done yet."""
    return subprocess.run(["make", "-s", target], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode().strip()


@dataclass
class Collector:
    """A collector that runs: host and port where it takes OTLP, where Prometheus scrapes it, what it says."""

    grpc: str
    http: str
    metrics_url: str
    log: Path
    process: Any = None

    def otlp(self, protocol: str) -> dict[str, str]:
        """Return the variables that point a pipeline at it, over `grpc` or `http/protobuf`."""
        address = self.grpc if protocol == "grpc" else self.http
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}

    def samples(self) -> dict[str, list[Sample]]:
        """Return what its Prometheus exporter shows, by the name of the sample."""
        found: dict[str, list[Sample]] = defaultdict(list)
        for family in text_string_to_metric_families(fetch(self.metrics_url, "application/openmetrics-text")):
            for sample in family.samples:
                found[sample.name].append(sample)
        return found


PORTS = ("GRPC", "HTTP", "PROMETHEUS", "HEALTH", "INNER", "SELF")


@contextmanager
def otelcol(config: str | Path, folder: Path, /, **variables: str) -> Iterator[Collector]:
    """Run the collector with `local.yaml`, `agent.yaml`, `gateway.yaml` or a file of the test's."""
    free = dict(zip((f"OTELCOL_{port}_PORT" for port in PORTS), map(str, free_ports(len(PORTS))), strict=True))
    env = free | {"OTELCOL_STORAGE": str(folder / "otelcol-storage")} | variables
    rpc, web, page, health = (f"127.0.0.1:{env[f'OTELCOL_{port}_PORT']}" for port in PORTS[:4])
    collector = Collector(rpc, web, f"http://{page}/metrics", folder / f"{Path(config).stem}.log")
    command = [built("otelcol"), "--config", CONFIGS / config]
    with running(command, collector.log, env, lambda: fetch(f"http://{health}")) as collector.process:
        yield collector


class Prometheus(NamedTuple):
    """A Prometheus that runs."""

    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the `data` that `/api/v1/PATH` gives."""
        return json.loads(fetch(f"{self.url}/api/v1/{path}?{urlencode(parameters)}"))["data"]

    def query(self, promql: str) -> list[Any]:
        """Return the series that an instant query gives."""
        return self.get("query", query=promql)["result"]


@contextmanager
def prometheus(config: str, folder: Path, *options: str) -> Iterator[Prometheus]:
    """Run Prometheus on a configuration (Debian: apt-get install prometheus), exemplars kept."""
    program = shutil.which("prometheus")
    assert program, "no prometheus: apt-get install prometheus"
    address = f"127.0.0.1:{free_ports(1)[0]}"
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'prometheus'}"]
    command += [f"--web.listen-address={address}", "--enable-feature=exemplar-storage", *options]
    with running(command, folder / "prometheus.log", {}, lambda: fetch(f"http://{address}/-/ready")):
        yield Prometheus(f"http://{address}")


class Sink:
    """Takes OTLP over gRPC and HTTP and keeps it."""

    def __init__(self) -> None:
        self.requests: dict[str, list[Any]] = {signal: [] for signal in REQUESTS}
        self.grpc = self.http = ""

    def items(self, signal: str) -> list[Any]:
        """Return pairs of resource attributes and span, log record or metric."""
        kind, item = {"traces": ("spans", "spans"), "logs": ("logs", "log_records")}.get(signal, (signal, signal))
        return [
            (attributes(resource.resource), each)
            for request in list(self.requests[signal])
            for resource in getattr(request, f"resource_{kind}")
            for scope in getattr(resource, f"scope_{kind}")
            for each in getattr(scope, item)
        ]

    @property
    def spans(self) -> list[Any]:
        return [span for _, span in self.items("traces")]


def attributes(holder: Any) -> dict[str, Any]:
    """Return the attributes of a resource, a span or a log record as plain values."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in holder.attributes}


@contextmanager
def otlp_sink(*, keep: bool = True) -> Iterator[Sink]:
    """Serve OTLP over gRPC and HTTP on two free ports; without `keep` what comes is not looked at."""
    sink = Sink()

    def take(signal: str, body: bytes) -> bytes:
        if keep:
            sink.requests[signal].append(REQUESTS[signal].FromString(body))
        return b""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            packed = keep and self.headers["Content-Encoding"] == "gzip"
            take(self.path.rpartition("/")[2], gzip.decompress(body) if packed else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    def service(signal: str) -> Any:
        method = grpc.unary_unary_rpc_method_handler(lambda body, context: take(signal, body))
        kind = "trace" if signal == "traces" else signal
        name = f"opentelemetry.proto.collector.{kind}.v1.{kind.capitalize()}Service"
        return grpc.method_handlers_generic_handler(name, {"Export": method})

    with ThreadPoolExecutor(3) as pool, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        services, options = [service(signal) for signal in REQUESTS], [("grpc.max_receive_message_length", -1)]
        server = grpc.server(pool, handlers=services, options=options)
        sink.grpc = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        sink.http = f"http://127.0.0.1:{web.server_port}"
        server.start()
        pool.submit(web.serve_forever, 0.05)
        try:
            yield sink
        finally:
            server.stop(None).wait()
            web.shutdown()
