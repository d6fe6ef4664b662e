"""OpenTelemetry for data pipelines: decorate node functions, get traces, metrics and logs, with no server needed.

    import otel_odibi as oo

    oo.configure(service_name="flights", directory="telemetry")

    @oo.node(layer="ingest", engine="pandas")
    def read_flights(path): ...

    with oo.pipeline("flights"):
        flights = read_flights("flights.csv")

Importing does no work: the SDK, structlog and pyarrow are loaded when `configure()` needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from otel_odibi import propagate as _propagate
from otel_odibi import runtime as _runtime
from otel_odibi.calls import Attempt, Node, Run, current_node, current_pipeline
from otel_odibi.errors import MissingExtraError, OdibiTelemetryError, SettingError, StoreError
from otel_odibi.propagate import carry
from otel_odibi.scope import node, pipeline

if TYPE_CHECKING:
    from otel_odibi.events import AutomationHook, EventPriority
    from otel_odibi.executors import install_carry
    from otel_odibi.export import MetricsExporter
    from otel_odibi.hooks import EventBus
    from otel_odibi.logs import get_logger
    from otel_odibi.manager import MetricsManager, MetricType
    from otel_odibi.process import configure
    from otel_odibi.settings import Settings
    from otel_odibi.structured import LogLevel, StructuredLogger
    from otel_odibi.telemetry import Telemetry

__version__ = "0.1.0"

__all__ = [
    "Attempt",
    "AutomationHook",
    "EventBus",
    "EventPriority",
    "LogLevel",
    "MetricType",
    "MetricsExporter",
    "MetricsManager",
    "MissingExtraError",
    "Node",
    "OdibiTelemetryError",
    "Run",
    "SettingError",
    "Settings",
    "StoreError",
    "StructuredLogger",
    "Telemetry",
    "__version__",
    "carry",
    "configure",
    "current_node",
    "current_pipeline",
    "get_logger",
    "install_carry",
    "node",
    "pipeline",
]

_LAZY = {
    "AutomationHook": "events",
    "EventBus": "hooks",
    "EventPriority": "events",
    "LogLevel": "structured",
    "MetricType": "manager",
    "MetricsExporter": "export",
    "MetricsManager": "manager",
    "Settings": "settings",
    "StructuredLogger": "structured",
    "Telemetry": "telemetry",
    "configure": "process",
    "get_logger": "logs",
    "install_carry": "executors",
}


def __getattr__(name: str) -> Any:
    """Load what is heavy on first use (PEP 562)."""
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _host_runtime() -> _runtime.Runtime | None:
    from otel_odibi.process import host_runtime

    return host_runtime()


def _configure_worker(settings: bytes) -> None:
    from otel_odibi.process import configure_worker

    configure_worker(settings)


_runtime.on_host(_host_runtime)
_propagate.on_worker(_configure_worker)
