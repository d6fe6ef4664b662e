"""`configure()`: assembles the SDK from settings, owns every global, flushes and shuts down."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from opentelemetry import metrics as metrics_api
from opentelemetry import trace as trace_api
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    MetricExporter,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import Resource, ServiceInstanceIdResourceDetector
from opentelemetry.sdk.trace import ReadableSpan, Tracer, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from typing_extensions import Self

from otel_odibi import logs, names, runtime
from otel_odibi.clean import Cleaner
from otel_odibi.delivery import SpanQueue
from otel_odibi.exporters.jsonl import JsonlSink
from otel_odibi.exporters.points import CUMULATIVE, Producer, WithProducer
from otel_odibi.facts import Fact, Family
from otel_odibi.forks import after_fork
from otel_odibi.instruments import ApiInstruments
from otel_odibi.liveness import Liveness, lives_elsewhere
from otel_odibi.logs import LogWriter
from otel_odibi.manager import MetricsManager
from otel_odibi.metrics import Aggregates, rss_reader
from otel_odibi.runtime import FACTS, Runtime
from otel_odibi.settings import Settings
from otel_odibi.spans import LeanTracer, RandomIds
from otel_odibi.structured import StructuredLogger
from otel_odibi.troubles import Troubles

if TYPE_CHECKING:
    from otel_odibi.exporters.otlp import OtlpLogs
    from otel_odibi.hooks import Declared, EventBus
    from otel_odibi.spool import Spool


class Telemetry:
    """Everything that `configure()` started: made by it, not by hand. A context manager that shuts down on exit.

    Attributes: `settings`; `tracer_provider` and `meter_provider` (OpenTelemetry providers); `aggregates` (the totals
    behind the metrics); `prometheus_url` (of the endpoint, or None); `metrics` (a `MetricsManager` that knows what
    nodes did); `logger` (a `StructuredLogger` on the log file); `events` (an `EventBus` that tells of runs and nodes,
    with the hooks that `[tool.otel-odibi.alerts]` declares). Methods are thread-safe.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        tracer_provider: trace_api.TracerProvider | None = None,
        meter_provider: metrics_api.MeterProvider | None = None,
        span_exporters: tuple[SpanExporter, ...] = (),
        metric_readers: tuple[MetricReader, ...] = (),
        log_outputs: tuple[logs.Output, ...] = (),
        clock: Callable[[], int] = time.time_ns,
        environ: Mapping[str, str] = os.environ,
        alerts: Mapping[str, Any] | None = None,
        runtime_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = settings
        self.cleaner = Cleaner(settings.redact_keys, settings.redact_patterns)
        self.prometheus_url: str | None = None
        self.queues: list[SpanQueue] = []
        self._sinks: list[JsonlSink] = []
        self._files: list[Callable[[int], bool]] = []
        self._among: Callable[[Any], Any] = lambda own: own
        self._events: EventBus | None = None
        self._otlp_logs: OtlpLogs | None = None
        self._spool: Spool | None = None
        self._background: threading.Thread | None = None
        self._handler: logging.Handler | None = None
        self._lock = threading.RLock()
        self._closed = False
        self._clock = clock
        self._environ = environ
        self.aggregates = Aggregates(
            settings.cardinality_limit, clock=clock, on_overflow=lambda name: self.troubles.overflow(name)
        )
        self.troubles = Troubles(self.aggregates.drop)
        self.metrics = MetricsManager()
        self.resource = _resource(settings, self.cleaner)
        after_fork(self._forked)  # first, as the others tell of its resource
        declared = self._declared(alerts or {})
        self.liveness = self._living()
        try:
            self.tracer_provider = self._tracing(tracer_provider, span_exporters)
            self.log_writer = self._logging(log_outputs)
            self.meter_provider = self._metering(metric_readers)
        except BaseException:  # a port that is taken, an extra that is missing: leave no file and no thread behind
            self._close_files(time.monotonic())
            raise
        self.logger = StructuredLogger.over(self.log_writer, next(iter(self._sinks), None), settings.service_name)
        self.runtime = Runtime(
            self._tracer(),
            self._listeners(meter_provider),
            on_error=self.troubles.error,
            cleaner=self.cleaner,
            clock=clock,
            measure=settings.measure,
            **{"read_rss": rss_reader(), **(runtime_options or {})},
        )
        after_fork(self.aggregates.after_fork)
        for event, hook, options in declared:
            self.events.register_hook(event, hook, **options)

    @property
    def directory(self) -> Path | None:
        """The telemetry directory, or None."""
        return self.settings.directory

    # --- assembly ----------------------------------------------------------------------------------------------------

    def _living(self) -> Liveness | None:
        if self.directory is None or not self.settings.enabled:
            return None
        return Liveness(
            self.directory, self.settings.service_name, self.resource.attributes,
            rss=rss_reader(), otlp=wants_otlp(self.settings, "TRACES", self._environ), on_process=self._named,
            clock=self._clock,
        )  # fmt: skip

    def _named(self, process: str) -> None:
        """Have the log tell of this process by its new name, as after a fork."""
        if hasattr(self, "log_writer"):
            self.log_writer.process = process

    def _tracing(
        self, host: trace_api.TracerProvider | None, extra: tuple[SpanExporter, ...]
    ) -> trace_api.TracerProvider:
        provider = host or enabled(
            TracerProvider(
                resource=self.resource,
                id_generator=RandomIds(),
                shutdown_on_exit=False,
                meter_provider=metrics_api.NoOpMeterProvider(),
            )
        )
        files = self._span_files()
        for exporter in (*files, *self._otlp("TRACES"), *extra):
            queue = SpanQueue(
                exporter,
                cleaner=self.cleaner,
                interval=self.settings.span_interval,
                limit=self.settings.span_queue,
                on_drop=self.troubles.on_drop("spans"),
            )
            self.queues.append(queue)
            self._files += [queue.force_flush] if exporter in files else []
            self.attach(queue, provider)
        return provider

    def _tracer(self) -> trace_api.Tracer:
        tracer = self.tracer_provider.get_tracer(names.SCOPE)
        try:
            return LeanTracer(tracer) if isinstance(tracer, Tracer) else tracer
        except AttributeError:  # an SDK that is built differently inside: its own spans are slower, and as right
            return tracer

    def attach(self, queue: SpanQueue, provider: trace_api.TracerProvider) -> None:
        """Let a provider's spans go to `queue` too, where the provider can do that."""
        if isinstance(provider, TracerProvider):
            provider.add_span_processor(queue)
        else:
            self.troubles.warn(
                "host", "provider", "the host's tracer provider takes no exporters: spans go to it alone"
            )

    def _span_files(self) -> list[SpanExporter]:
        s, on_drop = self.settings, self.troubles.on_drop("spans")
        exporters: list[SpanExporter] = []
        target = s.parquet_uri or s.directory
        if "parquet" in s.span_formats and target is not None:
            from otel_odibi.exporters.parquet import ParquetSpanExporter

            exporters.append(
                ParquetSpanExporter(target, rows=s.parquet_rows, seconds=s.parquet_seconds, on_drop=on_drop)
            )
        if "json" in s.span_formats and s.directory is not None:
            from otel_odibi.exporters.json import JsonSpanExporter

            exporters.append(JsonSpanExporter(s.directory, service=s.service_name, on_drop=on_drop))
        return exporters

    def _otlp(self, signal: str) -> list[Any]:
        if not wants_otlp(self.settings, signal, self._environ):
            return []
        from otel_odibi.exporters import otlp

        make = {"TRACES": otlp.span_exporter, "METRICS": otlp.metric_exporter}[signal]
        return [make(self.settings, self._outlets())]

    def _outlets(self) -> Spool:
        if self._spool is None:
            from otel_odibi.spool import Spool

            liveness = self.liveness
            self._spool = Spool(
                self.directory,
                lambda: "" if liveness is None else liveness.path.stem,
                limit=self.settings.spool_bytes,
                on_drop=self.troubles.dropped,
                on_trouble=lambda text: self.troubles.warn("otlp", "endpoint", text),
                acked=(lambda ids: None) if liveness is None else liveness.acked,
                is_alive=lambda stem: liveness is not None and lives_elsewhere(liveness.path.with_stem(stem)),
            )
        return self._spool

    def _metering(self, extra: tuple[MetricReader, ...]) -> MeterProvider:
        on_drop = self.troubles.on_drop("metrics")
        interval = self.settings.metric_interval * 1000
        # What may fail comes before there are threads.
        files, otlp, endpoint = self._metric_files(), self._otlp("METRICS"), self._endpoint()
        readers: list[MetricReader] = [
            PeriodicExportingMetricReader(WithProducer(exporter, self.producer, on_drop), interval, 10_000)
            for exporter in (*files, *otlp)
        ]
        self._files += [reader.force_flush for reader in readers[: len(files)]]
        provider = enabled(MeterProvider([*readers, *extra, *endpoint], self.resource, shutdown_on_exit=False))
        uptime = names.PROCESS_UPTIME  # the SDK's own: a reader of a provider without instruments exports nothing
        provider.get_meter(names.SCOPE).create_observable_gauge(
            uptime.name, [lambda options: [Observation(self.aggregates.uptime())]], uptime.unit, uptime.description
        )
        return provider

    def _metric_files(self) -> list[MetricExporter]:
        s, on_drop = self.settings, self.troubles.on_drop("metrics")
        exporters: list[MetricExporter] = []
        target = s.parquet_uri or s.directory
        if "parquet" in s.metric_formats and target is not None:
            from otel_odibi.exporters.parquet import ParquetMetricExporter

            exporters.append(
                ParquetMetricExporter(target, rows=s.parquet_rows, seconds=s.parquet_seconds, on_drop=on_drop)
            )
        if "json" in s.metric_formats and s.directory is not None:
            from otel_odibi.exporters.json import JsonMetricExporter

            exporters.append(JsonMetricExporter(s.directory, service=s.service_name, on_drop=on_drop))
        if "textfile" in s.metric_formats and s.directory is not None:
            from otel_odibi.exporters.textfile import TextfileMetricExporter

            textfile = TextfileMetricExporter(s.directory, service=s.service_name, on_drop=on_drop)
            exporters.insert(0, textfile)  # it is quick, where the end has to be
            self._among = textfile.among
        return exporters

    def producer(self, temporality: AggregationTemporality = CUMULATIVE) -> Producer:
        """Make what adds this telemetry's own metrics to those of one metric reader."""
        aggregates = self.aggregates
        return Producer(self._collect, self.resource, lambda: aggregates.start_time_unix_nano, temporality, self._clock)

    def _collect(self) -> list[Family]:
        self.metrics.settle()  # here, on a reader's thread, so that no node has to
        return self.aggregates.collect()

    def _endpoint(self) -> list[MetricReader]:
        s = self.settings
        if s.prometheus_port is None:
            return []
        from otel_odibi.exporters.prometheus import PrometheusReader

        producer = self.producer()

        class Endpoint(PrometheusReader):
            def _receive_metrics(self, metrics_data: MetricsData, *args: Any, **kwargs: Any) -> None:
                super()._receive_metrics(producer.merge(metrics_data), *args, **kwargs)

        self._among({})  # what others count from now on
        on_drop = self.troubles.on_drop("metrics")
        reader = Endpoint(s.prometheus_host, s.prometheus_port, on_drop=on_drop, among=self._among)
        self.prometheus_url = reader.url
        return [reader]

    def _logging(self, extra: tuple[logs.Output, ...]) -> LogWriter:
        s = self.settings
        outputs: list[logs.Output] = []
        if s.logs and s.directory is not None:
            sink = JsonlSink(
                s.directory / "logs",
                s.service_name,
                max_bytes=s.log_max_bytes,
                retention_bytes=s.log_retention_bytes,
                on_drop=self.troubles.on_drop("logs"),
                fsync=s.durability == "fsync",
            )
            self._sinks.append(sink)
            outputs.append(lambda record, line: sink.write(line))
        if wants_otlp(s, "LOGS", self._environ) and (s.otlp_logs if s.otlp_logs is not None else not outputs):
            from otel_odibi.exporters import otlp

            self._otlp_logs = otlp.OtlpLogs(s, self.resource, self._outlets())
            outputs.append(self._otlp_logs.output)
        return LogWriter(
            s.service_name,
            (*outputs, *extra),
            level=s.log_level,
            cleaner=self.cleaner,
            clock=self._clock,
            on_error=self.troubles.error,
            process="" if self.liveness is None else self.liveness.process,
        )

    def _listeners(self, host_meters: metrics_api.MeterProvider | None) -> dict[type, list[runtime.Listener]]:
        sources: list[Any] = [] if self.liveness is None else [self.liveness]  # first: it may name this process anew
        sources += [self.log_writer] if self.log_writer.writes else []
        sources += [self.aggregates, self.metrics]
        if host_meters is not None:
            sources.append(ApiInstruments(host_meters.get_meter(names.SCOPE), self.aggregates))
        found = [source.listeners() for source in sources]
        return {fact: [listeners[fact] for listeners in found if fact in listeners] for fact in FACTS}

    # --- events ------------------------------------------------------------------------------------------------------

    @property
    def events(self) -> EventBus:
        """The bus on which runs and nodes are told of. It hears of them from the first registered hook on."""
        with self._lock:
            if self._events is None:
                from otel_odibi.hooks import EventBus

                self._events = EventBus(
                    on_error=self.troubles.error,
                    on_drop=self.troubles.on_drop("events"),
                    on_first_hook=self._feed,
                    state_dir=None if self.directory is None else self.directory / "alerts",
                    cleaner=self.cleaner,
                )
            return self._events

    def _feed(self) -> None:
        from otel_odibi.emitted import FactEvents

        fed = FactEvents(self.events, metrics_manager=self.metrics, flush=self.flush_files)
        for kind, listener in fed.listeners().items():
            self.subscribe(kind, listener)

    def _declared(self, alerts: Mapping[str, Any]) -> list[Declared]:
        if not alerts:
            return []
        from otel_odibi.hooks import declared

        return declared(alerts, self.events, self._environ)

    def flush_files(self) -> bool:
        """Complete the files of spans and metrics; True where that was done within `exit_timeout`. Never raises."""
        deadline = time.monotonic() + self.settings.exit_timeout
        return _within(lambda: self._flushed([partial(flush, _left_ms(deadline)) for flush in self._files]), deadline)

    # --- recovery ----------------------------------------------------------------------------------------------------

    def in_background(self, work: Callable[[], None]) -> None:
        """Do this on a thread of its own; `shutdown` waits for its end, as long as it may."""
        thread = threading.Thread(target=work, name="otel-odibi-recovery", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread to be had: then the next process does it
            thread.start()
            self._background = thread

    def keep(self, spans: Sequence[ReadableSpan]) -> bool:
        """Put spans of a process that is gone where those wait that go to an OTLP endpoint; False where that fails."""
        from otel_odibi.spool import keep

        return self.directory is not None and self.liveness is not None and keep(
            self.directory, self.liveness.path.stem, spans
        )  # fmt: skip

    # --- life --------------------------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Make this the telemetry that scopes and loggers use, until it is shut down or another takes its place."""
        runtime.activate(self.runtime)
        logs.activate(self.log_writer)
        if self.settings.capture_logging and self._handler is None:
            self._handler = logs.LoggingHandler()
            logging.getLogger().addHandler(self._handler)

    def _forked(self) -> None:
        """Give a forked child a name of its own, and in the SDK's metrics locks that no thread of its parent holds."""
        self._lock = threading.RLock()
        self.resource = self.resource.merge(ServiceInstanceIdResourceDetector().detect())  # as the SDK's providers do
        if self.liveness is not None:
            self.liveness.resource[names.SERVICE_INSTANCE_ID] = str(self.resource.attributes[names.SERVICE_INSTANCE_ID])
        meters = self.meter_provider
        consumer, readers = meters._measurement_consumer, () if self._closed else meters._metric_readers
        instruments = consumer._async_instruments
        consumer.__init__(meters._sdk_config, meters._metric_readers)  # type: ignore[misc]  # others' counts: from 0
        consumer._async_instruments = instruments
        for reader in readers:  # the SDK starts their threads after this
            vars(reader).update(_export_lock=threading.Lock(), _shutdown_event=threading.Event())

    def subscribe(self, kind: type[Fact], listener: runtime.Listener) -> None:
        """Let `listener` be called with every fact of this kind, after the log line and the metrics.

        It runs in the thread of the node, between its function and its return, so it must be quick; what it raises is
        counted and warned about, and goes no further.
        """
        with self._lock:
            listeners = self.runtime.listeners
            listeners[kind] = (*listeners[kind], listener)

    def flush(self, timeout: float = 10.0) -> bool:
        """Write and send all that was recorded so far; True where that was done within `timeout` seconds.

        Never raises. What takes longer goes on in the background.
        """
        if self._closed:
            return True
        deadline = time.monotonic() + timeout
        done = [queue.force_flush(_left_ms(deadline)) for queue in self.queues]
        others: list[Callable[[], bool]] = [self.meter_provider.force_flush]
        others += [] if self._otlp_logs is None else [self._otlp_logs.flush]
        others += [] if self._spool is None else [partial(self._spool.flush, timeout)]
        return _within(lambda: self._flushed(others), deadline) and all(done)

    def _flushed(self, flushes: list[Callable[[], bool]]) -> bool:
        done = True
        for flush in flushes:
            try:
                done = flush() and done
            except Exception as exc:  # noqa: BLE001, PERF203 - the SDK raises what its readers raised
                self.troubles.error("flush", exc)
                done = False
        return done

    def shutdown(self, timeout: float | None = None) -> None:
        """Flush, close every file and thread, give globals back; scopes go on without recording. Idempotent.

        Takes at most `timeout` seconds, `exit_timeout` by default. Local files come first, so that a collector that
        hangs costs its own data alone; what did not get out is counted and warned about. Never raises.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline = time.monotonic() + (self.settings.exit_timeout if timeout is None else timeout)
        if runtime.configured() is self.runtime:
            runtime.activate(None)
            logs.activate(None)
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
        for queue in self.queues:
            queue.stop()
        try:
            self.meter_provider.shutdown(_left_ms(deadline))
        except Exception as exc:  # noqa: BLE001 - the SDK raises what its readers raised
            self.troubles.error("shutdown", exc)
        for queue in self.queues:
            queue.shutdown(_left_ms(deadline))
        if self._events is not None:  # last, as hooks have run on meanwhile: one that hangs costs no data
            self._events.shutdown(_left_ms(deadline) / 1000)
        if self._background is not None:
            self._background.join(_left_ms(deadline) / 1000)
        self._close_files(deadline)

    def _close_files(self, deadline: float) -> None:
        for sink in self._sinks:
            sink.close(_left_ms(deadline) / 1000)
        if self._otlp_logs is not None:
            self._otlp_logs.shutdown(_left_ms(deadline))
        # It puts on disk what the others have handed over. What was lost all the same is for a recovery to bring back.
        kept = self._spool is None or self._spool.shutdown(_left_ms(deadline) / 1000)
        if self.liveness is not None:
            self.liveness.close(kept and not any(signal == "spans" for signal, _ in self.aggregates.dropped()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.shutdown()


def _left_ms(deadline: float) -> int:
    return max(0, int((deadline - time.monotonic()) * 1000))


def _within(work: Callable[[], bool], deadline: float) -> bool:
    """Do the work in a thread of its own, as it may hang; return its result, False where it is not done in time."""
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(work()), name="otel-odibi-flush", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no thread to be had
        return work()
    thread.join(_left_ms(deadline) / 1000)
    return bool(results) and results[0]


P = TypeVar("P", TracerProvider, MeterProvider)


def enabled(provider: P) -> P:
    """Return the provider, working whatever OTEL_SDK_DISABLED says: the settings have looked at that already."""
    provider._disabled = False
    return provider


def _resource(settings: Settings, cleaner: Cleaner) -> Resource:
    attributes: dict[str, Any] = {**settings.resource, names.SERVICE_NAME: settings.service_name}
    if settings.environment:
        attributes[names.DEPLOYMENT_ENVIRONMENT_NAME] = settings.environment
    attributes.setdefault(names.SERVICE_INSTANCE_ID, str(uuid.uuid4()))
    attributes = {key: cleaner.attribute(key, value) for key, value in attributes.items()}
    return Resource.create(attributes)


def wants_otlp(settings: Settings, signal: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a signal (TRACES, METRICS, LOGS) goes out by OTLP: an endpoint is set, and it is not turned off."""
    if not settings.enabled or environ.get(f"OTEL_{signal}_EXPORTER", "").strip().lower() == "none":
        return False
    return bool(settings.otlp_endpoint or environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "").strip())
