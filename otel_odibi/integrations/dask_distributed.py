"""Dask's distributed scheduler: what goes along with a task to its worker, and the plugins that make use of it there.

With a task travels the context it was submitted in, an annotation, to which the scheduler's plugin adds its attempt and
the spans of the tasks it depends on. Workers tell the scheduler of spans in the metadata of tasks.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from typing import Any, Final

import distributed.worker
from dask.base import annotate
from distributed.client import Client
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin
from opentelemetry import trace

from otel_odibi import names, process
from otel_odibi.calls import Attempt, Node, current_node
from otel_odibi.facts import Edge
from otel_odibi.integrations.dask import MAX_LINKS, MAX_SKIPPED, DaskInstrumentor, Traced, node_name, run, skip
from otel_odibi.integrations.engine import Engine, Function, Ticket, ask
from otel_odibi.propagate import parcel, unpacked
from otel_odibi.runtime import live

NAME: Final = "otel_odibi"
CONTEXT, PRODUCERS, ATTEMPT = NAME, f"{NAME}_producers", f"{NAME}_attempt"
SECONDS_TO_BEGIN, SECONDS_TO_CLOSE = 30.0, 3.0
_GIVEN_UP: Final = (("waiting", "released"), ("released", "erred"))


def install(engine: Engine) -> None:
    """Let clients send context along and set their workers up, and this process, if it is a worker, make use of it."""
    engine.replace(Client, "_start", _with_plugins)
    engine.around(Client, "_graph_to_futures", _sending)
    engine.around(Client, "get", _computing)
    engine.replace(distributed.worker, "_run_task_simple", _tracing)
    engine.replace(distributed.worker, "_run_task_async", _tracing)


def _computing(client: Client, *args: Any, sync: bool = True, **kwargs: Any) -> Any:
    if sync and not client.asynchronous:
        with run():
            yield


def _sending(client: Client, *args: Any, **kwargs: Any) -> Any:
    with annotate(**{CONTEXT: parcel().partition(b"\n")[0]}):  # the settings went with the plugin
        yield


def _with_plugins(fn: Function) -> Function:
    @functools.wraps(fn)
    async def start(client: Client, *args: Any, **kwargs: Any) -> Any:
        started = await fn(client, *args, **kwargs)
        try:
            await asyncio.wait_for(_register(client), SECONDS_TO_BEGIN)
        except Exception as exc:  # noqa: BLE001 - workers without this package, for one, work all the same
            logging.getLogger(names.SCOPE).warning("dask's workers record nothing: %r", exc)
        return started

    return start


async def _register(client: Client) -> None:
    if live() is not None:
        await client._register_scheduler_plugin(plugin=OdibiSchedulerPlugin(), name=NAME, idempotent=True)
        await client._register_worker_plugin(plugin=OdibiWorkerPlugin(), name=NAME, idempotent=True)


def OdibiWorkerPlugin() -> WorkerPlugin:
    """Return the plugin by which a worker makes each task it executes a node, in the trace and run it was submitted in.

    It takes the settings along that it finds here, without secrets; a worker with settings of its own keeps those. Each
    client of an instrumented program registers one; by hand: `client.register_plugin(OdibiWorkerPlugin())`.
    """
    settings = parcel()

    class Plugin(WorkerPlugin):
        # In here it is pickled by value: a worker without this package has to start, and says what it lacks.
        name, idempotent = NAME, True

        async def setup(self, worker: Any) -> None:
            from otel_odibi.integrations import dask_distributed

            await asyncio.to_thread(dask_distributed.begin, settings)

        async def teardown(self, worker: Any) -> None:
            from otel_odibi.integrations import dask_distributed

            await asyncio.to_thread(dask_distributed.flush)

    return Plugin()


def begin(settings: bytes) -> None:
    """Configure telemetry in this process and instrument it, unless that was done."""
    with unpacked(settings):
        if not DaskInstrumentor().is_instrumented_by_opentelemetry:
            DaskInstrumentor().instrument()
    # What a first export has to import is there when the worker closes, for which its nanny gives it four seconds.
    threading.Thread(target=flush, name="otel-odibi-dask", daemon=True).start()


def flush() -> None:
    """Write and send what was recorded so far."""
    telemetry = process.current()
    if telemetry is not None:
        telemetry.flush(SECONDS_TO_CLOSE)


class _Remote(Traced):
    __slots__ = ("_attempt", "_state")

    def __init__(self, task: Any, state: Any, told: dict[str, Any]) -> None:
        known = [Edge(name, int(trace_id, 16), span_id) for name, trace_id, span_id in told.get(PRODUCERS, {}).values()]
        unknown = {node_name(key) for key in task.dependencies} - {edge.node for edge in known}
        super().__init__(task, (*known, *(Edge(name, 0, 0) for name in unknown)), Ticket(told.get(CONTEXT, b"")))
        self._state, self._attempt = state, told.get(ATTEMPT, 1) if told.get("retries") else 0

    def begun(self, call: Node) -> None:
        super().begun(call)
        if self.edge is not None:
            name, trace_id, span_id = self.edge
            self._state.metadata[CONTEXT] = [name, trace.format_trace_id(trace_id), span_id]

    def _work(self, data: dict[Any, Any]) -> Any:
        if not self._attempt:
            return self.task(data)
        attempt = current_node().attempt(self._attempt)  # those before were nodes of their own, on whatever worker
        if self.task.is_coro:
            return self._attempted(attempt, data)
        with attempt:
            return self.task(data)

    async def _attempted(self, attempt: Attempt, data: dict[Any, Any]) -> Any:
        with attempt:
            return await self.task(data)


def _tracing(fn: Function) -> Function:
    @functools.wraps(fn)
    def run_task(task: Any, data: Any, *args: Any) -> Any:
        return fn(task if live() is None else ask(_remote, task, default=task), data, *args)

    return run_task


def _remote(task: Any) -> Any:
    state = distributed.worker.get_worker().state.tasks[task.key]
    told = state.annotations or {}
    if not hasattr(task, "target"):
        return _Remote(task, state, told)
    state.metadata.update((CONTEXT, producer) for producer in told.get(PRODUCERS, {}).values())
    return task  # another name of a task: no work, so no node


class OdibiSchedulerPlugin(SchedulerPlugin):
    """Tells workers of a task's attempt, and of the spans it depends on; reports tasks that will not be executed."""

    name, idempotent = NAME, True

    def __init__(self) -> None:
        self._parcel = parcel()
        self._skipped: tuple[Any, set[Any]] = None, set()

    async def start(self, scheduler: Any) -> None:
        """Configure telemetry in the scheduler's process, unless that was done."""
        self._tasks = scheduler.tasks
        await asyncio.to_thread(begin, self._parcel)

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Take note of what became of a task. Never raises."""
        task: Any = self._tasks.get(key)
        if task is None or CONTEXT not in (task.annotations or ()):
            return
        if finish == "memory" and CONTEXT in (task.metadata or ()):
            ask(self._finished, task)
        elif start == "processing" and finish == "released":
            task.annotations[ATTEMPT] = task.annotations.get("retries", 0) - task.retries + 1
        elif (start, finish) in _GIVEN_UP and task.exception_blame not in (None, task):
            ask(self._skip, task)

    def _finished(self, task: Any) -> None:
        for told in (dependent.annotations for dependent in task.dependents):
            if CONTEXT in (told or ()) and len(producers := told.setdefault(PRODUCERS, {})) < MAX_LINKS:
                producers[str(task.key)] = task.metadata[CONTEXT]

    def _skip(self, task: Any) -> None:
        context = task.annotations[CONTEXT]
        if self._skipped[0] != context:
            self._skipped = context, set()
        if task.key not in (keys := self._skipped[1]) and len(keys) < MAX_SKIPPED:
            keys.add(task.key)
            with unpacked(context):
                skip(task.key, [dependency.key for dependency in task.dependencies])
