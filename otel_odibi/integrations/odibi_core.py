"""ODIBI_CORE: one trace a run, whichever threads its nodes run in, with attempts, cache lookups, rows and failures.

    from otel_odibi.integrations.odibi_core import OdibiCoreInstrumentor

    OdibiCoreInstrumentor().instrument()

`Orchestrator.run` and `DAGExecutor.execute` are pipeline spans, each iteration of `run_continuous` too. ODIBI_CORE
gives its pipelines no name: they are called `odibi_pipeline`, or run as part of a `pipeline()` that is opened around
them. See docs/odibi_core.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from typing import Any, Final

from otel_odibi.calls import Node, Run, current_node, innermost
from otel_odibi.integrations.engine import Advised, Engine, Runs, ask
from otel_odibi.scope import NodeScope, node, pipeline

PIPELINE: Final = "odibi_pipeline"
"""Name of a pipeline, as ODIBI_CORE's own tracker has it."""

Planned = tuple[Any, Iterable[str]]  # a step, and the names of those it depends on

_runs: Final = Runs()  # by executor


class OdibiCoreInstrumentor(Engine):
    """Instruments ODIBI_CORE for the whole process, to be switched on and off from one thread."""

    requires = ("odibi-core >= 1.1",)

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return nothing where a clone on the path, of which pip knows nothing, can be imported."""
        return () if importlib.util.find_spec("odibi_core") else self.requires

    def install(self) -> None:
        """Wait for a program that runs pipelines."""
        self.when_imported("odibi_core.core.orchestrator", self._change)

    def _change(self) -> None:
        """Put advice around runs, nodes, attempts and cache lookups."""
        from odibi_core.core.dag_executor import DAGExecutor
        from odibi_core.core.orchestrator import Orchestrator

        self.around(Orchestrator, "run", _orchestrator_run)
        self.around(Orchestrator, "run_step", _run_step)
        self.around(DAGExecutor, "execute", _execute)
        self.around(DAGExecutor, "_execute_node", _execute_node)
        self.around(DAGExecutor, "_run_node_logic", _run_node_logic)
        self.around(DAGExecutor, "_check_cache", _check_cache)


def _orchestrator_run(orchestrator: Any) -> Advised:
    yield from _run(orchestrator, lambda: [(step, _producers(orchestrator, step)) for step in orchestrator.steps])


def _execute(executor: Any) -> Advised:
    yield from _run(executor, lambda: [(found.step, found.dependencies) for found in executor.dag.values()])


def _run(owner: Any, plan: Callable[[], list[Planned]]) -> Advised:
    outer = innermost()  # the run that an Orchestrator began for its executor, or the user's own
    with nullcontext(outer) if isinstance(outer, Run) else pipeline(PIPELINE) as run, _runs.hold(owner, run):
        try:
            yield
        finally:
            ask(_left_out, run, plan, getattr(owner, "skip_nodes", ()))


def _run_step(orchestrator: Any, step: Any) -> Advised:
    with _scope(step, _producers(orchestrator, step)) as call:
        ask(_inputs, call, step, orchestrator.data_map)
        yield
        ask(_outputs, call, step, orchestrator.data_map)


def _execute_node(executor: Any, found: Any) -> Advised:
    with _runs.join(executor), _scope(found.step, found.dependencies) as call:
        ask(_inputs, call, found.step, executor.data_map)
        try:
            yield
        except RuntimeError as exc:
            call.fail(exc.__cause__)
            raise


def _run_node_logic(executor: Any, found: Any, *args: Any, **kwargs: Any) -> Advised:
    call = current_node()
    with call.attempt():
        made = yield
    ask(_outputs, call, found.step, made)


def _check_cache(executor: Any, found: Any) -> Advised:
    cached = yield
    call = current_node()
    call.cache(hit=cached is not None)
    ask(_outputs, call, found.step, cached or {})


def _scope(step: Any, dependencies: Iterable[str]) -> NodeScope:
    return node(step.name, layer=step.layer, engine=step.engine, depends_on=dependencies)


def _producers(orchestrator: Any, step: Any) -> list[str]:
    wanted = set(step.inputs.values())
    return [other.name for other in orchestrator.steps if wanted & set(other.outputs.values())]


def _inputs(call: Node, step: Any, data_map: Any) -> None:
    for key in step.inputs.values():
        call.input(data_map.get(key))


def _outputs(call: Node, step: Any, data_map: Any) -> None:
    for key in step.outputs.values():
        if key in data_map:
            call.output(data_map[key])


def _left_out(run: Run, plan: Callable[[], list[Planned]], done: Collection[str]) -> None:
    """Report the nodes of a run that were never begun."""
    seen = OdibiCoreInstrumentor().is_instrumented_by_opentelemetry  # still: else what began is not known
    for step, dependencies in plan() if seen else ():
        if not run.last(step.name).span_id:
            with _scope(step, dependencies) as call:
                call.skip("done before" if step.name in done else "not reached")
