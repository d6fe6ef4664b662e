"""Dask: a `compute()` is a run, each of its tasks a node, in whatever thread, process or worker that is executed.

A task goes to its thread or process as a `Traced`, and its result comes back with the span that made it: dask's graph,
its callbacks and the values that tasks see are what they were. For clusters see dask_distributed.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Final, NamedTuple

from otel_odibi.calls import Call, Node, current_pipeline, innermost
from otel_odibi.facts import Edge
from otel_odibi.integrations.engine import Engine, Function, Ticket, ask
from otel_odibi.runtime import live
from otel_odibi.scope import NodeScope, node, pipeline
from otel_odibi.wrap import wrap

MAX_NAMES: Final = 500  # that a process tells apart; tasks of further ones are nodes `other`
MAX_SKIPPED: Final = 100  # tasks that are reported as skipped after a failure
MAX_LINKS: Final = 128  # producers that a node is linked to

_scopes: Final[dict[str, NodeScope]] = {}


class DaskInstrumentor(Engine):
    """Instruments dask's local schedulers (synchronous, threads, processes), and `distributed` where it is installed.

    A computation outside any pipeline is a run of the pipeline `dask`. Tasks are nodes, named as dask names their
    groups: by the function, without token and number.
    """

    requires = ("dask >= 2025.1",)

    def install(self) -> None:
        """Change the one function that all local schedulers work with, wherever it was imported to."""
        from dask import local, multiprocessing, threaded

        for module in (local, threaded, multiprocessing):
            self.replace(module, "get_async", _get_async)
        self.when_imported("distributed.worker_client", self._install_distributed)  # its last, after client and worker

    def _install_distributed(self) -> None:
        from otel_odibi.integrations import dask_distributed

        dask_distributed.install(self)


def node_name(key: object) -> str:
    """Return the name of a task's group, as dask's own dashboard shows it."""
    from dask.utils import key_split

    name = str(key_split(key))
    return name if name in _scopes or len(_scopes) < MAX_NAMES else "other"


def run() -> Any:
    """Return a context manager that gives the call which the nodes of a computation belong to."""
    return nullcontext(innermost()) if current_pipeline() else pipeline("dask")


def _flat(keys: Any) -> list[Any]:
    return [key for part in keys for key in _flat(part)] if isinstance(keys, (list, set)) else [keys]


class Traced:
    """A task that is a node where it is executed: called with the values it depends on, as the task itself is."""

    __slots__ = ("edge", "edges", "task", "ticket")

    def __init__(self, task: Any, edges: Iterable[Edge], ticket: Ticket) -> None:
        self.task, self.edges, self.ticket = task, tuple(edges)[:MAX_LINKS], ticket
        self.edge: Edge | None = None

    def __call__(self, data: dict[Any, Any]) -> Any:
        with self.ticket.inside():
            return _execute(self, data)

    def begun(self, call: Node) -> None:
        """Link the node to those it depends on; called when it has begun."""
        self.edge = call.edge
        call.after(self.edges)
        call.set(**{"dask.key": str(self.task.key)})

    def _work(self, data: dict[Any, Any]) -> Any:
        return self.task(data)


def _open(traced: Traced, data: dict[Any, Any]) -> Node | None:
    name = node_name(traced.task.key)
    scope = _scopes.get(name) or _scopes.setdefault(name, NodeScope(name, engine="dask"))
    if (call := scope.begin(tuple(data.values()), {})) is not None:
        ask(traced.begun, call)
    return call


_execute = wrap(lambda traced, data: traced._work(data), lambda args, kwargs: ask(_open, *args))


class _Done(NamedTuple):
    value: Any
    key: Any
    edge: Edge | None


class _Local(Traced):
    __slots__ = ()

    def __call__(self, data: dict[Any, Any]) -> _Done:
        return _Done(super().__call__(data), self.task.key, self.edge)


class _Codec(functools.partial[Any]):
    """Dask's `dumps` or `loads`, given to ours; in another process it is dask's alone."""

    def __reduce__(self) -> Any:
        return _same, self.args


def _same(value: Any) -> Any:
    return value


class _Graph(Ticket):
    """A computation: which of its tasks have begun, and the spans of those that are done."""

    def __init__(self, call: Call, dumps: Function = _same, loads: Function = _same, **kwargs: Any) -> None:
        super().__init__(call)
        self._begun, self._edges = set[Any](), dict[Any, Edge]()
        self.options = {**kwargs, "dumps": _Codec(self._dump, dumps), "loads": _Codec(self._load, loads)}

    def _dump(self, dumps: Function, value: Any) -> Any:
        task, data = value  # or a result and its worker, or an exception and its traceback
        return dumps((ask(self._traced, task, default=task), data) if isinstance(data, dict) else value)

    def _traced(self, task: Any) -> Any:
        self._begun.add(task.key)
        edges = [self._edges[key] for key in task.dependencies if key in self._edges]
        if not hasattr(task, "target"):
            return _Local(task, edges, self)
        self._edges.update((task.key, edge) for edge in edges)  # another name of a task: no work, so no node
        return task

    def _load(self, loads: Function, value: Any) -> Any:
        done, worker = loads(value)
        if type(done) is not _Done:
            return done, worker
        self._edges.update({} if done.edge is None else {done.key: done.edge})
        return done.value, worker

    def skip_rest(self, dsk: Any, keys: Any) -> None:
        from dask._task_spec import DataNode, convert_legacy_graph

        graph = convert_legacy_graph(dsk if isinstance(dsk, Mapping) else dsk.__dask_graph__())
        wanted, skipped = _flat(keys), 0
        for key in wanted:  # which grows
            task = graph.get(key)
            if key in self._begun or task is None or isinstance(task, DataNode) or skipped == MAX_SKIPPED:
                continue
            self._begun.add(key)
            wanted += task.dependencies
            if not hasattr(task, "target"):
                skipped += 1
                with self.inside():
                    skip(key, task.dependencies)


def skip(key: object, dependencies: Iterable[object]) -> None:
    """Report, inside the run it belongs to, a task that was not executed, as another one has failed."""
    with node(node_name(key), depends_on=map(node_name, dependencies), engine="dask") as call:
        call.set(**{"dask.key": str(key)})
        call.skip("not reached")


def _get_async(fn: Function) -> Function:
    @functools.wraps(fn)
    def get_async(submit: Any, num_workers: Any, dsk: Any, result: Any, **kwargs: Any) -> Any:
        with (live() and ask(run)) or nullcontext() as call:
            if not call:
                return fn(submit, num_workers, dsk, result, **kwargs)
            graph = _Graph(call, **kwargs)
            try:
                return fn(submit, num_workers, dsk, result, **graph.options)
            except BaseException:
                ask(graph.skip_rest, dsk, result)
                raise

    return get_async
