"""What a process has one of: `configure()` and the telemetry it made, OpenTelemetry's global providers, the end."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from opentelemetry import metrics as metrics_api
from opentelemetry import trace as trace_api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider

from otel_odibi import names, propagate, runtime
from otel_odibi.errors import SettingError
from otel_odibi.instruments import ApiInstruments
from otel_odibi.metrics import Aggregates, rss_reader
from otel_odibi.runtime import Runtime
from otel_odibi.settings import Settings, project_alerts
from otel_odibi.telemetry import Telemetry
from otel_odibi.troubles import Troubles

_lock = threading.RLock()
_current: Telemetry | None = None
_refused = False
_own_tracing: TracerProvider | None = None
_own_metering: MeterProvider | None = None


def configure(
    *,
    service_name: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    environment: str | None = None,
    tracer_provider: trace_api.TracerProvider | None = None,
    meter_provider: metrics_api.MeterProvider | None = None,
    set_global: bool = True,
    **settings: Any,
) -> Telemetry:
    """Turn telemetry on, and return it. Functions decorated before are live after.

    Takes every setting by name (see `Settings`); one that is not given comes from OTEL_ODIBI_*, OTEL_*, pyproject.toml
    or its default. With `directory` alone it writes logs, span and metric Parquet and the `.prom` file. Providers that
    the host application has set globally, or passes here, are used and not replaced; else ours become global unless
    `set_global` is false. A second call shuts the first telemetry down and takes its place. At exit it is shut down.

    Raises `SettingError`, naming the setting, the value and the remedy, and `MissingExtraError` where OTLP is asked
    for and not installed. Thread-safe.
    """
    given = {"service_name": service_name, "directory": directory, "environment": environment, **settings}
    return _begin(Settings.load(given), tracer_provider, meter_provider, set_global)


def _begin(
    loaded: Settings,
    tracer_provider: trace_api.TracerProvider | None,
    meter_provider: metrics_api.MeterProvider | None,
    set_global: bool,
    *,
    worker: bool = False,
) -> Telemetry:
    global _current
    alerts = project_alerts() if loaded.enabled else {}
    _check_directory(loaded.directory if loaded.enabled else None)
    with _lock:
        if _current is not None:
            _current.shutdown()
        if not loaded.enabled:
            loaded = dataclasses.replace(loaded, logs=False, span_formats=(), metric_formats=(), prometheus_port=None)
        telemetry = Telemetry(
            loaded,
            tracer_provider=tracer_provider or _host_tracing(),
            meter_provider=meter_provider or _host_metering(),
            alerts=alerts,
        )
        if set_global and loaded.enabled:
            _install(telemetry)
        if loaded.enabled:
            if loaded.inherit_context:
                telemetry.runtime.inherited = propagate.from_environment(os.environ, telemetry.runtime)
            propagate.for_workers(telemetry.runtime, _for_workers(telemetry) | {"set_global": set_global})
            telemetry.activate()
            if not worker:  # else its parent has done so
                _recover(telemetry)
        else:
            runtime.activate(None, disabled=True)
        _current = telemetry
        atexit.unregister(_end)
        atexit.register(_end)
    _end_well_on_sigterm()
    _end_well_in_multiprocessing()
    return telemetry


def current() -> Telemetry | None:
    """Return what the last `configure()` of this process has made, None before the first."""
    return _current


def configure_worker(settings: bytes) -> None:
    """Configure this process with the settings that came with work from another, unless `configure()` has been called.

    Never raises: a worker that cannot use them (one warning says why) does its work all the same. Thread-safe.
    """
    global _refused
    with _lock:  # so that a second thread's work begins when telemetry is there
        if _current is not None or _refused:
            return
        try:
            given = json.loads(settings)
            set_global = given.pop("set_global")
            _begin(Settings.load(given), _host_tracing(), _host_metering(), set_global, worker=True)
        except Exception as exc:  # noqa: BLE001 - telemetry never harms
            _refused = True
            logging.getLogger(names.SCOPE).warning("this worker process records nothing: %s", exc)


def _for_workers(telemetry: Telemetry) -> dict[str, Any]:
    """Return the settings as workers get them: what looks like a secret they read from their own environment."""
    clean, settings = telemetry.cleaner, telemetry.settings
    kept = {
        name: value for name, value in settings.worker_copy().items()
        if type(value) is not str or clean.text(value) == value
    }  # fmt: skip
    return kept | {"resource": {key: clean.attribute(key, value) for key, value in settings.resource.items()}}


def _recover(telemetry: Telemetry) -> None:
    """Begin to bring back what processes that died in this directory left undone, if there seem to be any."""
    own, directory = telemetry.liveness, telemetry.directory
    if own is None or directory is None or not any(path != own.path for path in own.path.parent.glob("*.json")):
        return

    def work() -> None:
        from otel_odibi.recovery import recover

        try:
            done = recover(directory, parquet=telemetry.settings.parquet_uri, spool=telemetry.keep)
        except Exception as exc:  # noqa: BLE001 - a directory that is gone by now, for one
            telemetry.troubles.error("recovery", exc)
            return
        for line in done.runs:
            text = "run %s of pipeline %s was lost with its process; it was last heard of at %s"
            telemetry.troubles.warn("lost", line["run_id"], text, line["run_id"], line["pipeline"], line["timestamp"])
        for problem in done.files:
            telemetry.troubles.warn("recovery", problem, "recovery: %s", problem)

    telemetry.in_background(work)


def _end_well_on_sigterm() -> None:
    """Have SIGTERM shut telemetry down before it ends the process, unless the program has a handler of its own.

    Servers that have one end in their own way, and telemetry with them, at exit.
    """
    with contextlib.suppress(ValueError, OSError):  # not the main thread
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, frame: FrameType | None) -> None:
    """Shut down on another thread, as this one may hold a lock that is needed, and end by the signal all the same."""
    signal.signal(number, signal.SIG_IGN)  # another would come in between
    telemetry = _current
    if telemetry is not None:
        with contextlib.suppress(RuntimeError):  # no thread to be had
            closing = threading.Thread(target=telemetry.shutdown, daemon=True)
            closing.start()
            closing.join(telemetry.settings.exit_timeout + 0.5)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _end() -> None:
    """Shut down as the process ends, which SIGTERM does not hasten: a pool tells its workers to end in both ways."""
    with contextlib.suppress(ValueError, OSError):  # not the main thread
        if signal.getsignal(signal.SIGTERM) is _terminated:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _current is not None:
        _current.shutdown()


def _end_well_in_multiprocessing() -> None:
    """Have a child of `multiprocessing` end its telemetry: forked ones leave by `os._exit`, past atexit."""
    children = sys.modules.get("multiprocessing.process")
    if children is not None and children.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, _end_worker, exitpriority=-100)  # after its own children have ended, and its queues


def _end_worker() -> None:
    telemetry, this = _current, threading.current_thread()
    if telemetry is None:
        return
    if any(not thread.daemon and thread is not this for thread in threading.enumerate()):
        telemetry.flush(telemetry.settings.exit_timeout)  # the process waits for them yet: they may have more to tell
    else:
        _end()


def _in_child() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it
    util = sys.modules.get("multiprocessing.util")
    if util is not None and _current is not None:  # which is about to forget what was to be done at the end
        util.register_after_fork(_current, lambda telemetry: _end_well_in_multiprocessing())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _check_directory(directory: Path | None) -> None:
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)  # node_exporter, another user, reads the .prom file in it
        usable = os.access(directory, os.W_OK | os.X_OK)
    except OSError as exc:
        raise SettingError("directory", str(directory), f"cannot be made ({exc.strerror})", "give another") from None
    if not usable:
        raise SettingError("directory", str(directory), "not writable", "change its permissions or give another")


def _host_tracing() -> trace_api.TracerProvider | None:
    """Return the tracer provider that a host application has made global, if any."""
    provider = trace_api.get_tracer_provider()
    ours = (
        isinstance(provider, (trace_api.ProxyTracerProvider, trace_api.NoOpTracerProvider)) or provider is _own_tracing
    )
    return None if ours else provider


def _host_metering() -> metrics_api.MeterProvider | None:
    provider = metrics_api.get_meter_provider()
    known = provider is _own_metering or not hasattr(provider, "force_flush")  # neither proxy nor no-op can flush
    return None if known else provider


def _install(telemetry: Telemetry) -> None:
    """Make the providers global, once a process: OpenTelemetry ignores a second call."""
    global _own_tracing, _own_metering
    if _own_tracing is not None:
        for queue in telemetry.queues:  # other libraries' tracers stay with the first provider: send its spans on
            telemetry.attach(queue, _own_tracing)
    elif _host_tracing() is None and isinstance(telemetry.tracer_provider, TracerProvider):
        _own_tracing = telemetry.tracer_provider
        trace_api.set_tracer_provider(_own_tracing)
    if _own_metering is None and _host_metering() is None:
        _own_metering = telemetry.meter_provider
        metrics_api.set_meter_provider(_own_metering)


_host: tuple[Any, Any, Runtime] | None = None


def host_runtime() -> Runtime | None:
    """Make the runtime for scopes without `configure()` in a host that has set global providers; None without any."""
    global _host
    tracing, metering = trace_api.get_tracer_provider(), metrics_api.get_meter_provider()
    if _host is None or _host[0] is not tracing or _host[1] is not metering:
        if tracing is _own_tracing and metering is _own_metering:
            return None  # shut down: ours no longer record
        aggregates = Aggregates()
        troubles = Troubles(aggregates.drop)
        instruments = ApiInstruments(metering.get_meter(names.SCOPE), aggregates)
        listeners = {fact: [listener] for fact, listener in instruments.listeners().items()}
        live = Runtime(tracing.get_tracer(names.SCOPE), listeners, on_error=troubles.error, read_rss=rss_reader())
        _host = (tracing, metering, live)
    return _host[2]
