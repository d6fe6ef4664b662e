"""What serves any OpenTelemetry program by name, with nothing of this package in its code: exporters, integrations."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from otel_odibi import integrations

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


FLOW = """
    import sys
    import opentelemetry.trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

    opentelemetry.trace.set_tracer_provider(provider := TracerProvider())
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=lambda span: span.name + "\\n")))

    from hamilton import driver

    def rows() -> list:
        return [1, 2, 3]

    driver.Builder().with_modules(sys.modules["__main__"]).build().execute(["rows"])
    print("kedro.framework.project" in sys.modules)
"""


def test_opentelemetry_instrument_finds_the_integrations(tmp_path: Path) -> None:
    """The command of OpenTelemetry enables what is installed; Kedro is not set up where it is not used."""
    pytest.importorskip("hamilton")
    (tmp_path / "flow.py").write_text(textwrap.dedent(FLOW))
    command = [Path(sys.executable).parent / "opentelemetry-instrument", sys.executable, "flow.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["node rows", "pipeline flow", "False"], done.stderr


def test_integrations_are_named_as_what_they_instrument() -> None:
    """Each can be loaded where its engine is installed."""
    assert list(integrations.known()) == ["dask", "hamilton", "kedro", "odibi", "odibi_core"]
    assert set(integrations.known()) <= {point.name for point in entry_points(group="opentelemetry_instrumentor")}
