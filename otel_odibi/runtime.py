"""Which telemetry is live: the runtime that scopes work with, set by `configure()` or made from a host's providers."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.trace import Tracer

from otel_odibi import names
from otel_odibi.clean import DEFAULT, Cleaner
from otel_odibi.facts import (
    CacheLookup,
    Execution,
    Fact,
    Measure,
    NodeFinished,
    NodeRetried,
    NodeStarted,
    RunFinished,
    RunStarted,
)  # fmt: skip

Listener = Callable[[Any], None]
Inherited = tuple[Any, Context]
"""What work begins in that was handed on by another process: the run or node there, or None, and the context."""
FACTS: Final = (RunStarted, RunFinished, NodeStarted, NodeFinished, CacheLookup, NodeRetried, Execution, Measure)


class Runtime:
    """What live scopes work with: a tracer, listeners by type of fact, clocks, where errors go. Read-only in use.

    `inherited` is what the process was started in, if anything: what begins where nothing is current begins there.
    """

    __slots__ = (
        "cleaner", "clock", "inherited", "listeners", "measure", "new_run_id", "on_error", "read_rss", "tick", "tracer",
    )  # fmt: skip

    def __init__(
        self,
        tracer: Tracer,
        listeners: Mapping[type, Sequence[Listener]],
        *,
        on_error: Callable[[str, BaseException], None],
        cleaner: Cleaner = DEFAULT,
        clock: Callable[[], int] = time.time_ns,
        tick: Callable[[], int] = time.perf_counter_ns,
        new_run_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        read_rss: Callable[[], int | None] = lambda: None,
        measure: bool = True,
    ) -> None:
        self.tracer = tracer
        self.listeners = {kind: tuple(listeners.get(kind, ())) for kind in FACTS}
        self.on_error = on_error
        self.cleaner = cleaner
        self.clock = clock
        self.tick = tick
        self.new_run_id = new_run_id
        self.read_rss = read_rss
        self.measure = measure
        self.inherited: Inherited | None = None

    def emit(self, fact: Fact) -> None:
        """Hand `fact` to every listener of its type, in order. A raising listener stops neither the others nor us."""
        for listen in self.listeners[type(fact)]:
            try:
                listen(fact)
            except Exception as exc:  # noqa: BLE001, PERF203 - one that raises anything must not stop the next
                self.on_error("listener", exc)


_configured: Runtime | None = None
_disabled = False
_host_runtime: Callable[[], Runtime | None] | None = None
_host_looked_up = False
_TRACE: Final = vars(trace)
_METRICS: Final = vars(metrics._internal)


def activate(runtime: Runtime | None, *, disabled: bool = False) -> None:
    """Make `runtime` the one that every scope uses from its next call on; None goes back to the host's providers.

    `disabled` turns scopes off altogether. Takes effect for all threads at once; never raises.
    """
    global _configured, _disabled
    _configured, _disabled = runtime, disabled


def configured() -> Runtime | None:
    """Return the runtime that `activate` was last given."""
    return _configured


def on_host(factory: Callable[[], Runtime | None]) -> None:
    """Register what makes a runtime from the global providers that a host application has set."""
    global _host_runtime
    _host_runtime = factory


def live() -> Runtime | None:
    """Return the runtime in force: the configured one, else one for the host's global providers, else None.

    Never raises.
    """
    if _configured is not None:
        return _configured
    # The module attributes, as the API's functions look into os.environ on every call, which alone costs 0.6 us.
    if _host_looked_up and _TRACE.get("_TRACER_PROVIDER") is None and _METRICS.get("_METER_PROVIDER") is None:
        return None
    return None if _disabled else _host()


def _host() -> Runtime | None:
    global _host_runtime, _host_looked_up
    try:
        if not _host_looked_up:  # through the functions once, so that OTEL_PYTHON_*_PROVIDER is obeyed
            _host_looked_up = True
            trace.get_tracer_provider()
            metrics.get_meter_provider()
            return live()
        return None if _host_runtime is None else _host_runtime()
    except Exception as exc:  # noqa: BLE001 - a host's providers may raise anything
        _host_runtime = None
        logging.getLogger(names.SCOPE).warning("the host's OpenTelemetry providers cannot be used: %s", exc)
        return None
