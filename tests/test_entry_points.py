"""The exporters serve any OpenTelemetry program by name, with nothing of this package in its code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from opentelemetry.sdk._configuration import _OTelSDKConfigurator  # what opentelemetry-distro calls
_OTelSDKConfigurator().configure()
from opentelemetry import metrics, trace
with trace.get_tracer("theirs").start_as_current_span("hello"):
    metrics.get_meter("theirs").create_counter("greetings").add(1)
"""


def test_exporters_are_found_under_their_entry_points(tmp_path: Path) -> None:
    """OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER name them; OTEL_ODIBI_DIRECTORY says where they write."""
    variables = {
        "OTEL_TRACES_EXPORTER": "odibi_parquet,odibi_json",
        "OTEL_METRICS_EXPORTER": "odibi_parquet,odibi_json,odibi_textfile,odibi_prometheus",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_EXPORTER_PROMETHEUS_PORT": "0",
        "OTEL_SERVICE_NAME": "theirs",
        "OTEL_ODIBI_DIRECTORY": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = {"/".join(path.relative_to(tmp_path).parts[:2]) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"otlp/theirs.traces.jsonl", "json/theirs.metrics.json", "prometheus/theirs.prom", "metrics/sum"} <= found
    assert list(tmp_path.glob("spans/date=*/*.parquet"))
    assert 'greetings_total{otel_scope_name="theirs"' in (tmp_path / "prometheus" / "theirs.prom").read_text()
