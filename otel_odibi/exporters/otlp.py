"""OTLP exporters of the OpenTelemetry project, made from settings; they follow `OTEL_EXPORTER_OTLP_*` themselves."""

from __future__ import annotations

import os
from typing import Any, Final

from opentelemetry import context
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk.metrics import Counter, Histogram, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExporter

from otel_odibi import names
from otel_odibi.errors import MissingExtraError
from otel_odibi.settings import Settings

_DELTA: Final = dict.fromkeys((Counter, ObservableCounter, Histogram), AggregationTemporality.DELTA)
_SEVERITY: Final = {
    "debug": SeverityNumber.DEBUG,
    "info": SeverityNumber.INFO,
    "warning": SeverityNumber.WARN,
    "error": SeverityNumber.ERROR,
    "critical": SeverityNumber.FATAL,
}
_NOT_ATTRIBUTES: Final = frozenset(
    (
        "timestamp", "level", "message", "service", "trace_id", "span_id", "parent_span_id", "trace_flags",
        "time_unix_nano",
    )
)  # fmt: skip


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


def _options(settings: Settings, signal: str, http: bool) -> dict[str, Any]:
    """Return the exporter's arguments. Variables of one signal win over the general ones.

    Source: OpenTelemetry protocol exporter specification, Configuration Options.
    """
    prefix = f"OTEL_EXPORTER_OTLP_{signal}"
    options: dict[str, Any] = {}
    if settings.otlp_headers and not os.environ.get(f"{prefix}_HEADERS"):
        options["headers"] = {key.lower(): value for key, value in settings.otlp_headers.items()}  # gRPC wants it so
    if settings.otlp_endpoint and not os.environ.get(f"{prefix}_ENDPOINT"):
        path = f"/v1/{signal.lower()}" if http else ""
        options["endpoint"] = settings.otlp_endpoint + path
    return options


def span_exporter(settings: Settings) -> SpanExporter:
    """Make the OTLP span exporter. Raises `MissingExtraError` without the extra `otlp`."""
    _, http = _package(settings, "TRACES")
    if http:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    else:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # type: ignore[assignment]
    return OTLPSpanExporter(**_options(settings, "TRACES", http))


def metric_exporter(settings: Settings) -> MetricExporter:
    """Make the OTLP metric exporter: of deltas, as short processes start at 0, unless the environment says else."""
    _, http = _package(settings, "METRICS")
    if http:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    else:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter  # type: ignore[assignment]
    options = _options(settings, "METRICS", http)
    if not os.environ.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"):
        options["preferred_temporality"] = dict(_DELTA)
    return OTLPMetricExporter(**options)


class OtlpLogs:
    """Sends log records by OTLP in batches. Thread-safe. Raises `MissingExtraError` without the extra `otlp`."""

    def __init__(self, settings: Settings, resource: Resource) -> None:
        _, http = _package(settings, "LOGS")
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

        if http:
            from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        else:
            from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter  # type: ignore[assignment]
        self._batches = BatchLogRecordProcessor(OTLPLogExporter(**_options(settings, "LOGS", http)))
        provider = LoggerProvider(resource, shutdown_on_exit=False)
        provider._disabled = False  # the settings have looked at OTEL_SDK_DISABLED
        provider.add_log_record_processor(self._batches)
        self._logger = provider.get_logger(names.SCOPE)

    def output(self, record: dict[str, Any], line: bytes) -> None:
        """Send a record: the message is the body, the event type the event name too, every other field an attribute.

        Records of what sends telemetry are left out, as sending them would make more of them.
        """
        if context.get_value(context._SUPPRESS_INSTRUMENTATION_KEY):
            return
        level = record["level"]
        self._logger.emit(
            LogRecord(
                timestamp=record["time_unix_nano"],
                severity_text=level.upper(),
                severity_number=_SEVERITY.get(level, SeverityNumber.INFO),
                body=record["message"],
                event_name=record["event_type"],
                attributes={key: value for key, value in record.items() if key not in _NOT_ATTRIBUTES},
            )
        )

    def flush(self) -> bool:
        """Send what waits; takes as long as the exporter does."""
        return self._batches.force_flush()

    def shutdown(self, timeout_millis: int) -> None:
        """Send what waits and stop, within this time: the provider's own shutdown would take up to 30 s."""
        self._batches._batch_processor.shutdown(timeout_millis)
