"""odibi 3.15 and newer: one trace a run, whatever threads its nodes run in, with attempts, rows and failures.

    from otel_odibi.integrations.odibi import OdibiInstrumentor

    OdibiInstrumentor().instrument()

A pipeline is a pipeline span; a run of several has one around them, named as the project. odibi's own `node_execution`
span becomes the node span, with odibi's attributes on it, and odibi's histogram of node durations, whose first bucket
ends at five seconds, makes room for `odibi.node.duration`. See docs/odibi.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from opentelemetry.trace import Span

from otel_odibi import names
from otel_odibi.calls import Node, Run, current_node, innermost
from otel_odibi.integrations.engine import Advised, Engine, Runs, ask
from otel_odibi.scope import NodeScope, node, pipeline

MAX_WRAPPED: Final = 8
"""Exceptions around the original one that are looked through."""

_runs: Final = Runs()  # by the context that a pipeline shares with its nodes; the note is the pipeline's layer


class OdibiInstrumentor(Engine):
    """Instruments odibi for the whole process, to be switched on and off from one thread."""

    requires = ("odibi >= 3.15",)

    def install(self) -> None:
        """Wait for a program that runs pipelines: odibi's other commands import little, and stay as quick."""
        self.when_imported("odibi.pipeline", self._change)

    def _change(self) -> None:
        """Put advice around runs, nodes, attempts and alerts, and lead odibi's own span and histogram to ours."""
        from odibi import pipeline as pipelines
        from odibi.node import Node, NodeExecutor
        from odibi.utils import alerting, telemetry

        native: Any = _Native
        self.around(pipelines.PipelineManager, "run", _project)
        self.around(pipelines.Pipeline, "run", _run)
        self.around(Node, "execute", _node)
        self.around(NodeExecutor, "execute", _attempt)
        self.around(alerting, "send_alert", _alert)
        self.around(pipelines, "send_alert", _alert)
        self.replace(telemetry, "tracer", native)
        self.replace(telemetry, "node_duration", native)


def _project(manager: Any, pipelines: Any = None, *args: Any, **kwargs: Any) -> Advised:
    chosen = list(manager._pipelines) if pipelines is None else pipelines
    if isinstance(chosen, str) or len(chosen) < 2:
        return
    with pipeline(manager.project_config.project) as run:
        results = yield
        run.fail(ask(lambda: _first_error(results.values())))


def _run(flow: Any, *args: Any, tag: Any = None, node: Any = None, **kwargs: Any) -> Advised:
    with pipeline(flow.config.pipeline) as run, _runs.hold(flow.context, run, flow.config.layer or ""):
        results = yield
        run.fail(ask(_first_error, [results]))
        ask(_left_out, flow, run, results, bool(tag or node))
        ask(_story, run, results)


def _node(step: Any, *args: Any, **kwargs: Any) -> Advised:
    with _runs.join(step.context) as layer, _scope(step.config, step, layer or "") as call:
        result = yield
        call.fail(ask(_error_of, result))
        ask(_measure, call, step, result)


def _attempt(executor: Any, *args: Any, **kwargs: Any) -> Advised:
    call = current_node()
    with call.attempt() as attempt:
        result = yield
        attempt.fail(ask(_error_of, result))
        ask(_phases, call, attempt.number, result)


def _alert(config: Any, message: str, context: Any, *args: Any, **kwargs: Any) -> Advised:
    sent = yield
    call = innermost()
    if call is not None:
        call.event(names.ALERT, event_type=context.get("event_type", ""), channel=config.type.value, sent=bool(sent))


def _scope(config: Any, owner: Any, layer: str) -> NodeScope:
    return node(config.name, layer=layer, engine=owner.engine.name, depends_on=config.depends_on)


def _error_of(result: Any) -> BaseException | None:
    """Return why a result is no success: what the node's own code raised, without what odibi wrapped around it."""
    if result.success:
        return None
    error: BaseException = result.error or RuntimeError(f"node {result.node_name!r} failed without an exception")
    for _ in range(MAX_WRAPPED):
        inner = getattr(error, "original_error", None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    return error


def _first_error(results: Iterable[Any]) -> BaseException | None:
    for found in results:
        for name in found.failed:
            result = found.node_results.get(name)
            return (result and _error_of(result)) or RuntimeError(f"node {name!r} failed without a result")
    return None


def _left_out(flow: Any, run: Run, results: Any, chosen: bool) -> None:
    """Report the nodes that were never begun; where some were chosen by name or tag, those that odibi tells of."""
    seen = OdibiInstrumentor().is_instrumented_by_opentelemetry  # still: else what began is not known
    for config in flow.graph.nodes.values() if seen else ():
        result = results.node_results.get(config.name)
        if run.last(config.name).span_id or (result is None and chosen):
            continue
        with _scope(config, flow, flow.config.layer or "") as call:
            if result is None or result.metadata.get("skipped"):
                call.skip("not reached" if result is None else str(result.metadata.get("reason") or ""))
            else:
                call.fail(_error_of(result))


def _story(run: Run, results: Any) -> None:
    if results.story_path:
        run.event(names.STORY, path=str(results.story_path))


def _measure(call: Node, step: Any, result: Any) -> None:
    if result.metadata.get("dry_run"):
        call.skip("dry run")
        return
    name, context = step.config.name, step.context
    read = getattr(step.executor, "_read_row_count", None)  # the last attempt's; a failed result does not tell
    if read is not None:
        call.input(rows=read)
    for producer in step.config.depends_on:
        if read is None and context.has(producer):
            call.input(context.get(producer))
    made = context.get(name) if result.success and context.has(name) else None
    call.output(made, rows=result.rows_processed)


def _phases(call: Node, attempt: int, result: Any) -> None:
    timings = result.metadata.get("phase_timings_ms") or {}
    took = {f"{phase}_ms": float(ms) for phase, ms in timings.items() if ms}
    if took:
        call.event(names.PHASE_TIMINGS, attempt=attempt, **took)


class _Native:
    """odibi's own tracer or histogram, which stands back inside a node of ours."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def start_as_current_span(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """Give the node's span in place of a second one."""
        call = current_node()
        return nullcontext(_NodeSpan(call.span)) if call else self._original.start_as_current_span(*args, **kwargs)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Record nothing that is recorded already: both metrics have one name in Prometheus."""
        if not current_node():
            self._original.record(*args, **kwargs)


class _NodeSpan:
    """The node's span for odibi: its attributes go there, how the node ended is for our own end of it to say."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def __getattr__(self, name: str) -> Any:
        return getattr(self._span, name)

    def set_status(self, *args: Any, **kwargs: Any) -> None:
        """Set none."""

    def record_exception(self, *args: Any, **kwargs: Any) -> None:
        """Record none."""
