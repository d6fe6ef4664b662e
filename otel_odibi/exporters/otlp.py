"""OTLP: batches as lines of OTLP/JSON, each sent by one attempt, and what the answer means.

Clients and their configuration (`OTEL_EXPORTER_OTLP_*`) are those of the SDK's exporters; their retry loops, which
block and log, are not used: a spool sees to that. Source of what is tried again: OTLP specification, Failures.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, Protocol

import orjson
from opentelemetry import context
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk.metrics import Counter, Histogram, ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from otel_odibi import names
from otel_odibi.errors import MissingExtraError
from otel_odibi.exporters.otlpjson import dump, span_lines
from otel_odibi.forks import ForkGuard, after_fork
from otel_odibi.settings import LEVELS, Settings

SIGNALS: Final = {
    "traces": ("Trace", "trace_exporter.OTLPSpanExporter", "spans"),
    "metrics": ("Metrics", "metric_exporter.OTLPMetricExporter", "metrics"),
    "logs": ("Logs", "_log_exporter.OTLPLogExporter", "logs"),
}
"""The signals: their name in protobuf, the SDK's exporter, and what is lost when one is lost."""
_PROTO: Final = "opentelemetry.exporter.otlp.proto"
_DELTA: Final = dict.fromkeys((Counter, ObservableCounter, Histogram), AggregationTemporality.DELTA)
_SEVERITY: Final = dict(zip(LEVELS, map(SeverityNumber, (5, 9, 13, 17, 21)), strict=True))
_NOT_ATTRIBUTES: Final = frozenset(
    (
        "timestamp", "level", "message", "service", "trace_id", "span_id", "parent_span_id", "trace_flags",
        "time_unix_nano",
    )
)  # fmt: skip
# Of the SDK's exporters there is no attempt without their loop around it in public.
_PARTS: Final = ("_client.Export", "_headers", "_timeout")
_HTTP_PARTS: Final = ("_compress", "_transport.request", "_endpoint", "_headers", "_timeout")
_RETRIED: Final = ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS")
_SPANS, _LOG_QUEUE = 1_000, 65_536
# By itself gRPC would wait up to two minutes before it looks whether an endpoint is back.
_CHANNEL: Final = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1_000))


# --- sending ---------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What became of a batch. No reason: it was accepted. Else it was refused, for good or, with `retry`, for now.

    `lost` is how many of its `items` nobody will have, `wait` for how many seconds the endpoint wants to be left alone.
    """

    reason: str = ""
    retry: bool = False
    wait: float | None = None
    lost: int = 0
    items: int = 0


_grpc_in: Final = set[int]()
_preferred: Final = list[tuple[Any, Any]]()
"""Of exporters of metrics that there were: for a process that must not make one."""


class Sender:
    """Sends the batches of one signal. `endpoint` wins over settings and environment; a forked child connects anew,
    but for gRPC, which does not survive a fork: it is `cut_off` then, and another process has to send.

    Without `attempts` the SDK's exporter is built differently inside, and can only be used as it is.

    Raises `MissingExtraError` without the extra `otlp`.
    """

    def __init__(self, settings: Settings, signal: str, endpoint: str | None = None) -> None:
        self.signal, self._settings, self._endpoint = signal, settings, endpoint
        protocol = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL", "").strip() or settings.otlp_protocol
        self._http = protocol != "grpc"
        if not self._http:  # its core would tell standard error when a server stops, and hang in forks
            os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
            os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
        module, _, name = SIGNALS[signal][1].partition(".")
        try:
            package = import_module(f"{_PROTO}.{'http' if self._http else 'grpc'}")
            self._make = getattr(import_module(f"{package.__name__}.{module}"), name)
        except ImportError:
            raise MissingExtraError(f"OTLP over {protocol}", "otlp") from None
        self.exporter: Any = None
        if not self.cut_off:
            self.exporter = self._make(**self._options())
            self.attempts = _all(self.exporter, _PARTS) or _all(getattr(self.exporter, "_client", None), _HTTP_PARTS)
            if signal == "metrics":
                _preferred.append((self.exporter._preferred_temporality, self.exporter._preferred_aggregation))
        if self.attempts and not self._http:
            _grpc_in.add(os.getpid())
            self._calling = ForkGuard(self.close)  # a child is not to inherit a channel, nor a call under way
        after_fork(self._forked)

    attempts = True

    @property
    def cut_off(self) -> bool:
        """Whether this process must not call gRPC, as one that it was forked from did: there it may hang for ever."""
        return not self._http and bool(_grpc_in - {os.getpid()})

    def _forked(self) -> None:
        self._inherited, self.exporter = self.exporter, None  # kept, as its end may hang as well

    def _options(self) -> dict[str, Any]:
        """Return the exporter's arguments. Variables of one signal win over the general ones.

        Source: OpenTelemetry protocol exporter specification, Configuration Options.
        """
        prefix, settings = f"OTEL_EXPORTER_OTLP_{self.signal.upper()}", self._settings
        options: dict[str, Any] = {} if self._http else {"channel_options": _CHANNEL}
        if settings.otlp_headers and not os.environ.get(f"{prefix}_HEADERS"):
            options["headers"] = {
                key.lower(): value for key, value in settings.otlp_headers.items()
            }  # gRPC wants it so
        if base := self._endpoint or (not os.environ.get(f"{prefix}_ENDPOINT") and settings.otlp_endpoint):
            options["endpoint"] = base.rstrip("/") + (f"/v1/{self.signal}" if self._http else "")
        if self.signal == "metrics" and not os.environ.get(f"{prefix}_TEMPORALITY_PREFERENCE"):
            options["preferred_temporality"] = dict(_DELTA)  # as short processes start at 0
        return options

    def send(self, line: bytes) -> Answer:
        """Attempt it once, for as long as OTEL_EXPORTER_OTLP_TIMEOUT allows. Never raises."""
        try:
            request = from_line(self.signal, line)
        except Exception:  # noqa: BLE001 - torn or foreign
            return Answer("unreadable", lost=1, items=1)
        try:
            with nullcontext() if self._http else self._calling.lock:
                self.exporter = self.exporter or self._make(**self._options())
                answer = self._by_http(request) if self._http else self._by_grpc(request)
        except Exception as exc:  # noqa: BLE001 - a client that was closed meanwhile, for one
            return Answer(type(exc).__name__, retry=True)
        if answer.retry:
            return answer
        items = count_items(request)
        return answer._replace(items=items, lost=items if answer.reason else answer.lost)

    def close(self) -> None:
        """End the connection, and the attempt under way; another would connect anew."""
        exporter, self.exporter = self.exporter, None
        if exporter is not None:
            exporter.shutdown()

    def _by_http(self, request: Any) -> Answer:
        from opentelemetry.exporter.otlp.common.http import _extract_retry_after, _is_retryable

        client = self.exporter._client
        data, url = client._compress(request.SerializeToString()), client._endpoint
        result = client._transport.request("POST", url, headers=client._headers, data=data, timeout=client._timeout)
        if result.error is not None:  # what is no URL will not become one
            return Answer(type(result.error).__name__, retry=not isinstance(result.error, ValueError))
        if 200 <= result.status_code < 300:
            return _accepted(self.signal, result.content())
        retry = _is_retryable(result.status_code)
        return Answer(f"http_{result.status_code}", retry, _extract_retry_after(result) if retry else None)

    def _by_grpc(self, request: Any) -> Answer:
        refused, client = import_module("grpc").RpcError, self.exporter
        try:
            response = client._client.Export(request, metadata=client._headers, timeout=client._timeout)
        except refused as error:
            code, wait = error.code().name, _retry_info(error)
            retry = code in _RETRIED or (code == "RESOURCE_EXHAUSTED" and wait is not None)
            return Answer(f"grpc_{code.lower()}", retry, wait)
        return _accepted(self.signal, response.SerializeToString())


def _all(found: Any, parts: Sequence[str]) -> bool:
    try:
        return attrgetter(*parts)(found) is not None
    except AttributeError:
        return False


def _accepted(signal: str, response: bytes) -> Answer:
    try:
        return Answer(lost=_field(_messages(signal)[1].FromString(response).partial_success, 1))
    except Exception:  # noqa: BLE001 - an answer that cannot be read, such as a proxy's, rejects nothing
        return Answer()


def _retry_info(error: Any) -> float | None:
    info = import_module("google.rpc.error_details_pb2").RetryInfo()
    trailers = dict(error.trailing_metadata() or ())
    for detail in (
        import_module("google.rpc.status_pb2").Status.FromString(trailers.get("grpc-status-details-bin", b"")).details
    ):
        if detail.Unpack(info):
            return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None


# --- protobuf and JSON -----------------------------------------------------------------------------------------------


@cache
def _messages(signal: str) -> tuple[Any, Any]:
    """Return the classes of a signal's request and response."""
    name = SIGNALS[signal][0]
    module = import_module(f"opentelemetry.proto.collector.{name.lower()}.v1.{name.lower()}_service_pb2")
    return getattr(module, f"Export{name}ServiceRequest"), getattr(module, f"Export{name}ServiceResponse")


def to_line(request: Any) -> bytes:
    """Return a request as a line of OTLP/JSON."""
    to_dict = import_module("google.protobuf.json_format").MessageToDict
    return dump(_with_hex_ids(to_dict(request, use_integers_for_enums=True)))


def _with_hex_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_hex_ids(item) for item in value]
    if isinstance(value, dict):
        return {k: base64.b64decode(v).hex() if k.endswith("Id") else _with_hex_ids(v) for k, v in value.items()}
    return value


def from_line(signal: str, line: bytes) -> Any:
    """Return the request in a line; raises where there is none. (json_format takes four times as long.)"""
    kind = _messages(signal)[0]
    return kind(**_fields(kind.DESCRIPTOR, orjson.loads(line)))


def _fields(descriptor: Any, values: dict[str, Any]) -> dict[str, Any]:
    readers, out = _readers(descriptor), {}
    for key, value in values.items():
        if value is not None and (found := readers.get(key)):
            name, read = found
            if read is not None:
                value = [read(item) for item in value] if type(value) is list else read(value)
            out[name] = value
    return out


@cache
def _readers(descriptor: Any) -> dict[str, tuple[str, Callable[[Any], Any] | None]]:
    """Return, by its key in JSON, a field's name and what makes its value, None where JSON has that already."""
    return {field.json_name: (field.name, _reader(field)) for field in descriptor.fields}


def _reader(field: Any) -> Callable[[Any], Any] | None:
    if field.type == field.TYPE_MESSAGE:
        return partial(_fields, field.message_type)
    if field.type == field.TYPE_BYTES:
        return bytes.fromhex if field.name.endswith("_id") else base64.b64decode
    if field.type in (field.TYPE_STRING, field.TYPE_BOOL):
        return None
    return float if field.type == field.TYPE_DOUBLE else int


def _field(message: Any, number: int) -> Any:
    return getattr(message, message.DESCRIPTOR.fields_by_number[number].name)


def count_items(request: Any) -> int:
    """Return how many spans, data points or log records a request holds: the messages are numbered alike."""
    items = [i for resource in _field(request, 1) for scope in _field(resource, 2) for i in _field(scope, 2)]
    if not items or items[0].DESCRIPTOR.name != "Metric":
        return len(items)
    return sum(len(getattr(metric, metric.WhichOneof("data") or "sum").data_points) for metric in items)


# --- exporters -------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A line, how many items it holds, and the ids of spans. An empty line: they could not be encoded."""

    line: bytes
    items: int
    ids: Sequence[int] = ()


Put = Callable[[Batch], None]


class Outlets(Protocol):
    """What sees to the delivery of batches: a spool. `outlet` returns what takes them; it neither blocks nor raises."""

    on_drop: Callable[[str, str, int], None]

    def outlet(self, sender: Sender) -> Put: ...


def span_exporter(settings: Settings, spool: Outlets | None = None) -> SpanExporter:
    """Make the span exporter; without a spool the SDK's. Raises `MissingExtraError` without the extra `otlp`."""
    sender = Sender(settings, "traces")
    return OtlpSpanExporter(spool.outlet(sender)) if spool and sender.attempts else sender.exporter


def metric_exporter(settings: Settings, spool: Outlets | None = None) -> MetricExporter:
    """Make the metric exporter, of deltas unless the environment says else; otherwise as `span_exporter`."""
    sender = Sender(settings, "metrics")
    if spool and sender.attempts:
        return OtlpMetricExporter(*_preferred[-1], spool.outlet(sender))
    exporter: MetricExporter = sender.exporter
    return exporter


class OtlpSpanExporter(SpanExporter):
    """Hands spans over to be delivered."""

    hands_over = True  # nothing that `export` has begun is lost, whenever it ends

    def __init__(self, put: Put) -> None:
        self._put = put

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Hand the spans over."""
        ids = iter([span.context.span_id for span in spans])
        for start in range(0, len(spans), _SPANS):
            for line, count in span_lines(spans[start : start + _SPANS]):
                self._put(Batch(line, count, [next(ids) for _ in range(count)]))
        return SpanExportResult.SUCCESS


class OtlpMetricExporter(MetricExporter):
    """Hands metrics over to be delivered, with the temporality of the SDK's exporter."""

    def __init__(self, temporality: Any, aggregation: Any, put: Put) -> None:
        super().__init__(temporality, aggregation)
        self._put = put

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        """Hand the points over. Raises where they cannot be encoded."""
        from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics

        request = encode_metrics(metrics_data)
        if count := count_items(request):
            self._put(Batch(to_line(request), count))
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Do nothing: the points are handed over."""
        return True

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Do nothing: the points are handed over."""


def _put_logs(put: Put, batch: Sequence[Any]) -> None:
    from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs

    try:
        line = to_line(encode_logs(batch))
    except Exception:  # noqa: BLE001 - or the SDK would log a traceback
        line = b""
    put(Batch(line, len(batch)))


class OtlpLogs:
    """Sends log records by OTLP in batches. Thread-safe. Raises `MissingExtraError` without the extra `otlp`."""

    def __init__(self, settings: Settings, resource: Resource, spool: Outlets | None = None) -> None:
        sender = Sender(settings, "logs")
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

        exporter = sender.exporter
        if spool and sender.attempts:
            exporter = SimpleNamespace(export=partial(_put_logs, spool.outlet(sender)), shutdown=lambda: None)
        self._batches = BatchLogRecordProcessor(exporter, max_queue_size=_LOG_QUEUE)
        self._spool = spool
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
        if self._spool is not None and len(self._batches._batch_processor._queue) >= _LOG_QUEUE:
            self._spool.on_drop("logs", "queue_full", 1)  # the SDK would drop another, and not tell
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
        """Hand over what waits."""
        return self._batches.force_flush()

    def shutdown(self, timeout_millis: int) -> None:
        """Hand over what waits and stop, within this time: the provider's own shutdown would take up to 30 s."""
        self._batches._batch_processor.shutdown(timeout_millis)
