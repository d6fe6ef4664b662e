"""The events that the core emits: what happened to runs and nodes, for hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from otel_odibi.events import Bus
from otel_odibi.facts import CacheLookup, NodeFinished, NodeRetried, NodeStarted, RunFinished, RunStarted
from otel_odibi.forks import after_fork
from otel_odibi.names import (
    CACHE_HIT,
    CACHE_MISS,
    FAILURE,
    NODE_COMPLETE,
    NODE_FAILED,
    NODE_RETRY,
    NODE_START,
    PIPELINE_COMPLETE,
    PIPELINE_FAILED,
    PIPELINE_START,
)

_MAX_RUNS: Final = 1_000


class _Tally:
    """What a run's nodes have shown so far."""

    def __init__(self) -> None:
        self.failed: dict[str, None] = {}
        self.error: dict[str, str] = {}
        self.rows: int | None = None


class FactEvents:
    """Listens to facts and emits events. Thread-safe; next to nothing is done for events that nobody wants.

    Events of pipelines carry pipeline_name, run_id, trace_id, span_id; at the end also duration_ms, outcome,
    success_count, failed_count, failed_nodes (names), rows_out (of all nodes together), error and error_type (of the
    run, else of the first node that failed), and `metrics_manager` where there is one. `flush` is called before those,
    so that hooks find complete files, unless all of them have an attribute `needs_files` that is false. A failed run
    emits `pipeline_complete` and then `pipeline_failed`.

    Events of nodes carry node_name, layer, engine and the same ids; at the end duration_ms, outcome, rows, attempt,
    cache_hit and the error; a retry its attempt and the error before it; a cache lookup cache_key.
    """

    def __init__(self, bus: Bus, *, metrics_manager: Any = None, flush: Callable[[], object] = lambda: None) -> None:
        self._bus, self._metrics_manager, self._flush = bus, metrics_manager, flush
        self._runs: dict[str, _Tally] = {}
        self._reset()
        after_fork(self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()

    def listeners(self) -> dict[type, Callable[[Any], None]]:
        """Return what listens to which fact."""
        return {
            RunStarted: lambda fact: self._emit(PIPELINE_START, fact),
            RunFinished: self.run_finished,
            NodeStarted: lambda fact: self._emit(NODE_START, fact),
            NodeFinished: self.node_finished,
            NodeRetried: lambda fact: self._emit(NODE_RETRY, fact.start, attempt=fact.attempt, **_error(fact)),
            CacheLookup: lambda fact: self._emit(CACHE_HIT if fact.hit else CACHE_MISS, fact.start, cache_key=fact.key),
        }

    def _emit(self, event: str, start: RunStarted | NodeStarted, **more: Any) -> None:
        if self._bus.wants(event):
            self._bus.emit(event, {**_ids(start), **more})

    def node_finished(self, fact: NodeFinished) -> None:
        """Emit `node_failed` for a failure, else `node_complete`."""
        if fact.start.run_id and (self._bus.wants(PIPELINE_COMPLETE) or self._bus.wants(PIPELINE_FAILED)):
            self._count(fact)
        event = NODE_FAILED if fact.outcome == FAILURE else NODE_COMPLETE
        if self._bus.wants(event):
            self._emit(
                event, fact.start, duration_ms=fact.duration_ns / 1e6, outcome=fact.outcome, rows=fact.rows_out,
                attempt=fact.attempt, cache_hit=fact.cache_hit, **_error(fact),
            )  # fmt: skip

    def _count(self, fact: NodeFinished) -> None:
        with self._lock:
            tally = self._runs.setdefault(fact.start.run_id, _Tally())
            if fact.rows_out is not None:
                tally.rows = (tally.rows or 0) + fact.rows_out
            if fact.outcome == FAILURE:
                tally.error = tally.error or _error(fact)
                tally.failed[fact.start.node] = None
            if len(self._runs) > _MAX_RUNS:  # of runs that never ended
                del self._runs[next(iter(self._runs))]

    def run_finished(self, fact: RunFinished) -> None:
        """Emit `pipeline_complete` and, where it failed, `pipeline_failed`."""
        with self._lock:
            tally = self._runs.pop(fact.start.run_id, None) or _Tally()
        events = [PIPELINE_COMPLETE, PIPELINE_FAILED] if fact.outcome == FAILURE else [PIPELINE_COMPLETE]
        if not any(map(self._bus.wants, events)):
            return
        hooks = (hook for event in events for hook in self._bus.get_hooks(event) if hook.enabled)
        if any(getattr(hook.callback, "needs_files", True) for hook in hooks):
            self._flush()
        data = {
            "duration_ms": fact.duration_ns / 1e6, "outcome": fact.outcome, "success_count": fact.success_count,
            "failed_count": fact.failed_count, "failed_nodes": list(tally.failed), "rows_out": tally.rows,
            **(_error(fact) or tally.error),
        }  # fmt: skip
        if self._metrics_manager is not None:
            data["metrics_manager"] = self._metrics_manager
        for event in events:
            self._emit(event, fact.start, **data)


def _ids(start: RunStarted | NodeStarted) -> dict[str, Any]:
    ids = {"pipeline_name": start.pipeline, "run_id": start.run_id}
    ids |= {"trace_id": f"{start.trace_id:032x}", "span_id": f"{start.span_id:016x}"}
    if isinstance(start, NodeStarted):
        ids |= {"node_name": start.node, "layer": start.layer, "engine": start.engine}
    return ids


def _error(fact: RunFinished | NodeFinished | NodeRetried) -> dict[str, str]:
    return {"error": fact.failure.message, "error_type": fact.failure.type} if fact.failure else {}
