"""A real collector that is away for a while in the middle of a run: afterwards nothing is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from programs import Sink, environment, otelcol, otlp_sink, wait_for

pytestmark = pytest.mark.stack
AWAY_SECONDS = 60 * float(os.environ.get("ODIBI_TEST_SCALE", "0.1"))

PIPELINE = """
import sys, threading
import otel_odibi as oo

stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
runs = 0
with oo.configure(service_name="outage", directory=sys.argv[1], otlp_logs=True, metric_interval=0.5, exit_timeout=30):
    while not stop.wait(0.01):
        with oo.pipeline("outage"), oo.node("step") as node:
            node.output(rows=3)
        runs += 1
print(runs)
"""


def points(sink: Sink, metric: str) -> float:
    """Return the sum of all deltas of a counter, or of a histogram's counts."""
    found = [each for _, each in sink.items("metrics") if each.name == metric]
    sums = [point.as_int or point.as_double for each in found for point in each.sum.data_points]
    return sum(sums) + sum(point.count for each in found for point in each.histogram.data_points)


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_nothing_is_missing_after_the_collector_was_away(protocol: str, tmp_path: Path) -> None:
    """A minute at full scale: spans, points and log records that its endpoint got are those that were made."""
    with otlp_sink() as sink:
        variables = {"GATEWAY_ENDPOINT": sink.grpc, "OTEL_ODIBI_DIRECTORY": str(tmp_path / "nothing")}
        with otelcol("agent.yaml", tmp_path, **variables) as before:
            command = [sys.executable, "-c", PIPELINE, str(tmp_path / "telemetry")]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=environment(before.otlp(protocol)), stdin=pipe, stdout=pipe)
            wait_for(lambda: sink.spans and sink.items("logs") and sink.items("metrics"), "the first of each signal")
        ports = [address.rpartition(":")[2] for address in (before.grpc, before.http)]
        time.sleep(AWAY_SECONDS)
        assert list((tmp_path / "telemetry" / "spool").glob("*.traces.jsonl"))
        same = {"OTELCOL_GRPC_PORT": ports[0], "OTELCOL_HTTP_PORT": ports[1]}
        with otelcol("agent.yaml", tmp_path, **variables, **same):
            there = len(sink.spans)
            wait_for(lambda: len(sink.spans) > there, "a span after the outage")
            runs = int(process.communicate(b"", timeout=120)[0])
            wait_for(lambda: len(sink.spans) >= 2 * runs and len(sink.items("logs")) >= 4 * runs, "the rest")
            wait_for(lambda: points(sink, "odibi.node.rows") >= 3 * runs, "the rest of the points")
        assert process.returncode == 0
        assert Counter(span.name for span in sink.spans) == {"pipeline outage": runs, "node step": runs}
        assert len({span.span_id for span in sink.spans}) == 2 * runs
        assert len(sink.items("logs")) == 4 * runs
        assert points(sink, "odibi.node.rows") == 3 * runs
        assert points(sink, "odibi.node.duration") == points(sink, "odibi.pipeline.duration") == runs
    assert not list((tmp_path / "telemetry" / "spool").iterdir())


def test_the_collector_reads_what_waits(tmp_path: Path) -> None:
    """Its otlpjsonfile receiver takes the files of the spool as they are, where no process is to send them."""
    closed = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    program = f"""if True:
        import otel_odibi as oo
        with oo.configure(service_name="outage", directory={str(tmp_path)!r}):
            for _ in range(10):
                with oo.pipeline("outage"), oo.node("step"):
                    pass
    """
    subprocess.run([sys.executable, "-c", program], env=environment(closed), check=True, capture_output=True)
    (tmp_path / "read" / "otlp").mkdir(parents=True)
    for path in (tmp_path / "spool").glob("*.jsonl"):
        path.rename(tmp_path / "read" / "otlp" / path.name)
    with otlp_sink() as sink:
        variables = {"GATEWAY_ENDPOINT": sink.grpc, "OTEL_ODIBI_DIRECTORY": str(tmp_path / "read")}
        with otelcol("agent.yaml", tmp_path, **variables):
            wait_for(lambda: len(sink.spans) >= 20, "the spans")
    assert Counter(span.name for span in sink.spans) == {"pipeline outage": 10, "node step": 10}
