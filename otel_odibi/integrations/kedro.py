"""Kedro: one trace a run of a pipeline, whichever runner runs it, loading and saving of data included.

Advice rather than Kedro's hooks: these do not tell when a node begins to load and ends to save, nor whose data set
fails, and know nothing of the run in the processes of a ParallelRunner. See docs/kedro.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from typing import Any, Final, get_type_hints

from otel_odibi.calls import Node, Run, current_node, innermost
from otel_odibi.integrations.engine import LIBRARIES, Advised, Engine, Ticket, ask, engine_of, take
from otel_odibi.scope import PipelineScope, node

_here: Final[ContextVar[_Execution | None]] = ContextVar("otel_odibi_kedro", default=None)


class KedroInstrumentor(Engine):
    """Instruments Kedro for the whole process, and in the processes of a ParallelRunner."""

    requires = ("kedro >= 0.19.12",)

    def install(self) -> None:
        """Put advice around sessions, runners, tasks and nodes; their import, which sets up logging, is awaited."""
        self.when_imported("kedro.framework.session", self._sessions)
        self.when_imported("kedro.runner", self._runners)

    def _sessions(self) -> None:
        from kedro.framework import session

        for name in {"KedroSession", "KedroServiceSession"} & vars(session).keys():
            self.around(getattr(session, name), "run", _session)

    def _runners(self) -> None:
        from kedro.pipeline.node import Node as Step
        from kedro.runner.runner import AbstractRunner
        from kedro.runner.task import Task

        self.around(AbstractRunner, "run", _run)
        self.around(Task, "__init__", _handed_out)
        self.around(Task, "execute", _node)
        self.around(Step, "run", _function)


class KedroHooks:
    """For `HOOKS` in a project's settings.py, which each of its processes reads: instruments Kedro, unless it is."""

    def __init__(self) -> None:
        if not KedroInstrumentor().is_instrumented_by_opentelemetry:
            KedroInstrumentor().instrument()


class _Execution(Ticket):
    """A run of a pipeline under way; in another process it is the ticket alone, which has Kedro instrumented there."""

    def __init__(self, run: Run, flow: Any) -> None:
        super().__init__(run)
        self.parents = {step.name: sorted(needed.name for needed in of) for step, of in flow.node_dependencies.items()}
        self.left = {step.name: step for step in flow.nodes}

    def __setstate__(self, parcel: bytes) -> None:
        super().__setstate__(parcel)
        KedroHooks()

    def about(self, step: Any, catalog: Any) -> dict[str, Any]:
        return {"depends_on": self.parents.get(step.name, ()), **(ask(_kind, step, catalog) or {})}


def _session(session: Any, *args: Any, **kwargs: Any) -> Advised:
    from kedro.framework import project

    asked = inspect.signature(type(session).run).bind(session, *args, **kwargs).arguments
    chosen = asked.get("pipeline_names") or [asked.get("pipeline_name")]
    with PipelineScope(",".join(filter(None, chosen)) or project.PACKAGE_NAME or session._project_path.name):
        yield


def _run(runner: Any, pipeline: Any, catalog: Any, *args: Any, **kwargs: Any) -> Advised:
    begun, skipped = innermost(), "its outputs exist"  # a session's run, or the user's own
    with nullcontext(begun) if isinstance(begun, Run) else PipelineScope("kedro") as run:
        execution = _Execution(run, pipeline)
        token = _here.set(execution)
        try:
            yield
        except BaseException:
            skipped = "not reached"
            raise
        finally:
            _here.reset(token)
            seen = KedroInstrumentor().is_instrumented_by_opentelemetry  # still: else what began is not known
            for step in execution.left.values() if seen else ():
                with node(step.name, **execution.about(step, catalog)) as call:
                    call.skip(skipped)


def _handed_out(task: Any, *args: Any, **kwargs: Any) -> Advised:
    yield
    execution = _here.get()
    if execution is not None:
        execution.left.pop(task.node.name, None)
        vars(task)["_otel_odibi"] = execution, execution.about(task.node, task.catalog)


def _node(task: Any) -> Advised:
    if "_otel_odibi" in vars(task):
        execution, about = task._otel_odibi
        with execution.inside(), node(task.node.name, **about):
            yield


def _function(step: Any, inputs: dict[str, Any] | None = None) -> Advised:
    call = current_node()
    if call.name != step.name:  # called by hand
        return
    take(call, [value for name, value in (inputs or {}).items() if not name.startswith(("params:", "parameters"))])
    outputs = yield
    for name, value in outputs.items():
        if inspect.isgeneratorfunction(step.func):
            outputs[name] = _counted(call, value)
        else:
            call.output(value)


def _counted(call: Node, chunks: Any) -> Iterator[Any]:
    for chunk in chunks:
        call.yielded(chunk)
        yield chunk


def _kind(step: Any, catalog: Any) -> dict[str, str]:
    """Return a node's layer and engine: what its data sets tell, or else its namespace and the type it returns."""
    known = getattr(catalog, "_datasets", {})
    made = [known[name] for name in step.outputs if name in known]
    layers = [(getattr(dataset, "metadata", None) or {}).get("kedro-viz", {}).get("layer") for dataset in made]
    modules = [type(dataset).__module__.split(".") for dataset in made]
    engines = [module[1] for module in modules if module[0] == "kedro_datasets" and module[1] in {*LIBRARIES, "spark"}]
    with suppress(Exception):  # annotations may be anything
        engines.append(engine_of(get_type_hints(step.func).get("return")))
    return {"layer": next(filter(None, [*layers, step.namespace]), ""), "engine": next(filter(None, engines), "")}
