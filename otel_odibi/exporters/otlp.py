"""OTLP exporters of the OpenTelemetry project, made from settings; they follow `OTEL_EXPORTER_OTLP_*` themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk.metrics import Counter, Histogram, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExporter

from otel_odibi import names
from otel_odibi.errors import MissingExtraError
from otel_odibi.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import LoggerProvider

_DELTA: Final = {kind: AggregationTemporality.DELTA for kind in (Counter, ObservableCounter, Histogram)}
_SEVERITY: Final = {
    "debug": SeverityNumber.DEBUG,
    "info": SeverityNumber.INFO,
    "warning": SeverityNumber.WARN,
    "error": SeverityNumber.ERROR,
    "critical": SeverityNumber.FATAL,
}
_NOT_ATTRIBUTES: Final = frozenset(("timestamp", "level", "message", "service", "trace_id", "span_id", "parent_span_id", "trace_flags", "time_unix_nano"))


def _package(settings: Settings, signal: str) -> tuple[Any, bool]:
    """Return the package that speaks the signal's protocol, and whether that is HTTP."""
    protocol = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "").strip() or settings.otlp_protocol
    http = protocol != "grpc"
    try:
        if http:
            from opentelemetry.exporter.otlp.proto import http as package
        else:
            from opentelemetry.exporter.otlp.proto import grpc as package  # type: ignore[no-redef]
    except ImportError:
        raise MissingExtraError(f"OTLP over {protocol}", "otlp") from None
    return package, http


def _options(settings: Settings, signal: str, http: bool, path: str) -> dict[str, Any]:
    """Return the exporter's arguments. Variables of one signal win over the general endpoint, as in the specification."""
    options: dict[str, Any] = {}
    if settings.otlp_headers:
        options["headers"] = dict(settings.otlp_headers)
    if settings.otlp_endpoint and not os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"):
        options["endpoint"] = settings.otlp_endpoint + path if http else settings.otlp_endpoint
    return options


def span_exporter(settings: Settings) -> SpanExporter:
    """Make the OTLP span exporter. Raises `MissingExtraError` without the extra `otlp`."""
    _, http = _package(settings, "TRACES")
    if http:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    else:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # type: ignore[assignment]
    return OTLPSpanExporter(**_options(settings, "TRACES", http, "/v1/traces"))


def metric_exporter(settings: Settings) -> MetricExporter:
    """Make the OTLP metric exporter: deltas, as short processes start counting at 0, unless the environment says else."""
    _, http = _package(settings, "METRICS")
    if http:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    else:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter  # type: ignore[assignment]
    options = _options(settings, "METRICS", http, "/v1/metrics")
    if not os.environ.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"):
        options["preferred_temporality"] = dict(_DELTA)
    return OTLPMetricExporter(**options)


def logger_provider(settings: Settings, resource: Resource) -> LoggerProvider:
    """Make a logger provider that sends log records by OTLP in batches."""
    _, http = _package(settings, "LOGS")
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

    if http:
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    else:
        from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter  # type: ignore[assignment]
    provider = LoggerProvider(resource, shutdown_on_exit=False)
    provider.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter(**_options(settings, "LOGS", http, "/v1/logs"))))
    return provider


def log_output(provider: LoggerProvider) -> Callable[[dict[str, Any], bytes], None]:
    """Return a log output that emits each record through `provider`, in the context it is called in.

    The message is the body, the event type the event name, every other field an attribute.
    """
    logger = provider.get_logger(names.SCOPE)

    def output(record: dict[str, Any], line: bytes) -> None:
        level = record["level"]
        logger.emit(
            LogRecord(
                timestamp=record["time_unix_nano"],
                severity_text=level.upper(),
                severity_number=_SEVERITY.get(level, SeverityNumber.INFO),
                body=record["message"],
                event_name=record["event_type"],
                attributes={key: value for key, value in record.items() if key not in _NOT_ATTRIBUTES},
            )
        )

    return output
