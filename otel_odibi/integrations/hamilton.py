"""Apache Hamilton: one trace a run of a driver, one node a function, with no change to the dataflow.

`HamiltonInstrumentor().instrument()` is for every driver built from then on, `HamiltonTracker` an adapter for a single
one: `driver.Builder().with_adapters(HamiltonTracker())`. See docs/hamilton.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from hamilton.async_driver import AsyncGraphAdapter
from hamilton.caching.adapter import HamiltonCacheAdapter
from hamilton.lifecycle import base
from opentelemetry.instrumentation.dependencies import get_dependency_conflicts

from otel_odibi.calls import Node, Run
from otel_odibi.integrations.engine import Advised, Engine, Ticket, ask, begin, end, engine_of, take
from otel_odibi.scope import node, pipeline
from otel_odibi.wrap import wrap


class HamiltonInstrumentor(Engine):
    """Gives a `HamiltonTracker` to every driver built from now on; after `uninstrument()` that one records nothing."""

    requires = ("apache-hamilton >= 1.88", "sf-hamilton >= 1.88")  # two names of one package

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return the name by which it is installed."""
        met = [name for name in self.requires if get_dependency_conflicts([name]) is None]
        return met or self.requires[:1]

    def install(self) -> None:
        """Change how sets of adapters are made, of which every driver has one."""
        tracker = HamiltonTracker()
        self.undo(partial(setattr, tracker, "_run", lambda *_, **asked: iter(())))
        self.replace(base.LifecycleAdapterSet, "__init__", partial(_with_tracker, tracker))


def _with_tracker(tracker: HamiltonTracker, init: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, *given: Any) -> None:
        init(self, next((each for each in given if isinstance(each, HamiltonTracker)), tracker), *given)
        for hook in ("pre_graph_execute", "pre_node_execute"):  # begin last and end first: nothing of ours stays open
            self.sync_hooks[hook].append(self.sync_hooks[hook].pop(0))  # where a hook of another adapter raises

    return __init__


class _Execution(Ticket):
    """A run of a driver under way; in another process it is the ticket alone."""

    def __init__(self, run: Run, graph: Any) -> None:
        super().__init__(run)
        self.executor = next(iter(graph.adapter.sync_methods.get("do_node_execute", ())), None)
        self.started: set[str] = set()

    def __setstate__(self, parcel: bytes) -> None:
        super().__setstate__(parcel)
        self.executor, self.started = None, set()

    def start(self, step: Any, args: Any, inputs: dict[str, Any]) -> Node:
        self.started.add(step.name)
        needs = [needed.name for needed in step.dependencies if not needed.user_defined]
        scope = node(step.name, layer=step.tags.get("layer", ""), engine=engine_of(step.type), depends_on=needs)
        call = scope.__enter__()
        take(call, list(inputs.values()))
        return call

    def skip(self, steps: Iterable[Any], reason: str) -> None:
        for step in steps:
            if not step.user_defined and step.name not in self.started:
                call = self.start(step, (), {})
                call.skip(reason)
                call.finish()


class HamiltonTracker(
    base.BasePreGraphExecute, base.BasePostGraphExecute, base.BasePreTaskSubmission,  # type: ignore[misc]
    base.BasePreNodeExecute, base.BasePostNodeExecute,  # type: ignore[misc]
):  # fmt: skip
    """Records the runs of the drivers it is given to, called `name` or as the modules. Thread-safe; never raises."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self._executions: dict[str, _Execution] = {}
        self._work: dict[tuple[str, ...], Advised | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_executions": dict(self._executions), "_work": {}}

    def pre_graph_execute(self, *, run_id: str, **request: Any) -> None:
        self._work[run_id,] = begin(self._run, run_id, **request)

    def post_graph_execute(self, *, run_id: str, error: Any, **_: Any) -> None:
        end(self._work.pop((run_id,), None), None, error)

    def pre_task_submission(self, *, run_id: str, nodes: Iterable[Any], **_: Any) -> None:
        if run_id in self._executions:  # whether they start is not seen from here where that is in another process
            self._executions[run_id].started.update(step.name for step in nodes)

    def pre_node_execute(self, *, run_id: str, node_: Any, kwargs: Any, task_id: str | None) -> None:
        if run_id in self._executions:
            key = (run_id, node_.name, task_id or "")
            self._work[key] = begin(_node, self._executions[run_id], key, node_, kwargs)

    def post_node_execute(self, *, run_id: str, node_: Any, error: Any, result: Any, task_id: Any, **_: Any) -> None:
        end(self._work.pop((run_id, node_.name, task_id or ""), None), result, error)

    def _run(self, run_id: str, graph: Any, final_vars: Any, inputs: Any, overrides: Any) -> Advised:
        modules = dict.fromkeys(step.tags["module"] for step in graph.nodes.values() if "module" in step.tags)
        name = ",".join(Path(sys.argv[0]).stem if module == "__main__" else module for module in modules)
        with pipeline(self.name or name or "hamilton") as run:
            execution = self._executions[run_id] = _Execution(run, graph)
            try:
                execution.skip([graph.nodes[name] for name in overrides or () if name in graph.nodes], "overridden")
                yield
            except BaseException:
                ask(lambda: execution.skip(graph.get_upstream_nodes(final_vars, inputs, overrides)[0], "not reached"))
                raise
            finally:
                del self._executions[run_id]


def _node(execution: _Execution, key: tuple[str, str, str], step: Any, inputs: Any) -> Advised:
    if isinstance(execution.executor, AsyncGraphAdapter):  # it is called later, with inputs yet to come
        function = step._callable
        step._callable = wrap(function, partial(ask, execution.start, step))
        try:
            yield
        finally:
            step._callable = function
        return
    with execution.inside():
        call = execution.start(step, (), inputs)
        try:
            result = yield
        except BaseException as exc:
            call.finish(exc)
            raise
        if isinstance(execution.executor, HamiltonCacheAdapter):
            ask(_looked_up, execution.executor, *key, call)
        call.finish(None, result)


def _looked_up(cache: Any, run_id: str, name: str, task: str, call: Node) -> None:
    if cache.behaviors[run_id][name].name == "DEFAULT":
        event = cache.logs(run_id)[(name, task) if task else name][-1].event_type.name
        call.cache(event == "GET_RESULT", cache.get_cache_key(run_id, name, task or None))
