"""Shared by all tests: the fixture `odibi_capture`, and a watch over OpenTelemetry's globals."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
from opentelemetry import metrics, trace

from otel_odibi import calls, pytest_plugin, runtime

# Continuous integration is a busy machine: how long an example takes there says nothing.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("unhurried")


def pytest_configure(config: pytest.Config) -> None:
    """Bring the package's own pytest plugin along where the package is not installed, only on the path."""
    if not config.pluginmanager.is_registered(pytest_plugin):
        config.pluginmanager.register(pytest_plugin, pytest_plugin.__name__)


@pytest.fixture(autouse=True)
def untouched_globals() -> Iterator[None]:
    """Fail the test that sets a global provider, leaves telemetry turned on, or leaves a node or span current."""
    before = trace._TRACER_PROVIDER, metrics._internal._METER_PROVIDER, runtime.configured()
    yield
    assert before == (trace._TRACER_PROVIDER, metrics._internal._METER_PROVIDER, runtime.configured())
    assert calls.current.get() is None
    assert trace.get_current_span() is trace.INVALID_SPAN
