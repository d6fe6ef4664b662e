"""ODIBI_CORE under instrumentation: one trace a run, attempts, cache lookups, rows and outcomes, and no harm done."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

import pytest

import otel_odibi as oo
from otel_odibi.integrations import odibi_core as integration
from otel_odibi.integrations.odibi_core import OdibiCoreInstrumentor
from otel_odibi.testing import Capture, DagNode, capture, untouched

pytest.importorskip("odibi_core", reason="ODIBI_CORE is on no package index: install it from its repository")

from odibi_core.core import CacheManager, DAGBuilder, DAGExecutor, EventEmitter, NodeBase, Orchestrator, Step, Tracker
from odibi_core.engine.pandas_context import PandasEngineContext
from odibi_core.nodes import NODE_REGISTRY

Start = Callable[..., object]
FUNCTIONS: dict[str, Callable[..., object]] = {}


class Task(NodeBase):
    """A node that calls a function of this module with its inputs."""

    def run(self, data_map):
        result = FUNCTIONS[self.step.value](*(data_map[key] for key in self.step.inputs.values()))
        return {**data_map, **dict.fromkeys(self.step.outputs.values(), result)}


@pytest.fixture(autouse=True)
def instrumented(tmp_path, monkeypatch) -> Iterator[None]:
    """Instrument ODIBI_CORE for the test, in a directory of its own, as its caches and logs go to the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(NODE_REGISTRY, "task", Task)
    logging.disable(logging.CRITICAL)
    OdibiCoreInstrumentor().instrument()
    yield
    OdibiCoreInstrumentor().uninstrument()
    logging.disable(logging.NOTSET)


def step(name: str, *inputs: str, work: Callable[..., object]) -> Step:
    FUNCTIONS[name] = work
    return Step("task", name, "function", "pandas", name, inputs={key: key for key in inputs}, outputs={"data": name})


def shop() -> list[Step]:
    """Return five nodes: two of them side by side, one that fails once, one that fails for good, one never reached."""
    import pandas as pd

    tries = itertools.count(1)

    def join(left: object, right: object) -> None:
        oo.get_logger().info("joining")
        raise KeyError("customer")

    def flaky(orders):
        if next(tries) == 1:
            raise ConnectionError("lost")
        return orders.head(2)

    return [
        step("orders", work=lambda: pd.DataFrame({"customer": ["ann", "bob", "ann"], "amount": [1, 2, 3]})),
        step("totals", "orders", work=lambda orders: orders.groupby("customer").sum()),
        step("rates", "orders", work=flaky),
        step("join", "totals", "rates", work=join),
        step("publish", "join", work=len),
    ]


def executor(steps: list[Step], **options: object) -> DAGExecutor:
    options = {"use_cache": False, "retry_delay": 0, **options}
    return DAGExecutor(DAGBuilder(steps).build(), PandasEngineContext(), Tracker(), EventEmitter(), **options)


def orchestrator(steps: list[Step], **options: object) -> Orchestrator:
    options = {"use_cache": False, "retry_delay": 0, **options}
    return Orchestrator(steps, PandasEngineContext(), Tracker(), EventEmitter(), **options)


STARTS = {
    "Orchestrator.run": lambda steps: orchestrator(steps).run(),
    "DAGExecutor.execute": lambda steps: executor(steps).execute(),
}
START = pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
PARENT = "pipeline odibi_pipeline"


@START
def test_a_run_is_one_trace_whatever_threads_its_nodes_run_in(start: Start, odibi_capture: Capture) -> None:
    """Parallel branches, a retried node, a failing one and one that was never reached."""
    with pytest.raises(RuntimeError, match="Node 'join' failed"):
        start(shop())
    assert odibi_capture.dag() == {
        "orders": DagNode("success", rows=3, parent=PARENT),
        "totals": DagNode("success", rows=2, after=("orders",), parent=PARENT),
        "rates": DagNode("success", rows=2, attempts=2, after=("orders",), parent=PARENT),
        "join": DagNode("failure", attempts=2, after=("rates", "totals"), parent=PARENT),
        "publish": DagNode("skipped", after=("join",), parent=PARENT),
    }
    assert len({span.context.trace_id for span in odibi_capture.spans}) == 1
    assert odibi_capture.pipeline("odibi_pipeline").attributes["odibi.pipeline.outcome"] == "failure"


@START
def test_a_node_fails_with_the_exception_of_its_own_code(start: Start, odibi_capture: Capture) -> None:
    """Not with the RuntimeError that ODIBI_CORE makes of it; each attempt is a span."""
    with pytest.raises(RuntimeError):
        start(shop())
    node = odibi_capture.node("join")
    assert (node.status.status_code.name, node.attributes["error.type"]) == ("ERROR", "KeyError")
    attempts = [span for span in odibi_capture.spans if span.parent and span.parent.span_id == node.context.span_id]
    assert [(span.name, span.attributes["error.type"]) for span in attempts] == [
        ("attempt 1", "KeyError"), ("attempt 2", "KeyError"),
    ]  # fmt: skip


@START
def test_what_a_node_logs_leads_to_its_span(start: Start, odibi_capture: Capture) -> None:
    """Lines carry pipeline, node, layer and trace id, in a pool's threads too."""
    with pytest.raises(RuntimeError):
        start(shop())
    line = next(record for record in odibi_capture.logs if record["message"] == "joining")
    assert (line["pipeline"], line["node_name"], line["layer"]) == ("odibi_pipeline", "join", "task")
    assert int(line["trace_id"], 16) == odibi_capture.node("join").context.trace_id


def test_a_sequential_run_has_the_same_nodes_and_edges(odibi_capture: Capture) -> None:
    """Without attempts, as ODIBI_CORE makes one of each node there."""
    with pytest.raises(ConnectionError):
        orchestrator(shop(), parallel=False).run()
    assert odibi_capture.dag() == {
        "orders": DagNode("success", rows=3, parent=PARENT),
        "totals": DagNode("success", rows=2, after=("orders",), parent=PARENT),
        "rates": DagNode("failure", after=("orders",), parent=PARENT),
        "join": DagNode("skipped", after=("rates", "totals"), parent=PARENT),
        "publish": DagNode("skipped", after=("join",), parent=PARENT),
    }
    assert odibi_capture.node("totals").attributes["odibi.node.rows.in"] == 3
    assert odibi_capture.pipeline("odibi_pipeline").attributes["error.type"] == "ConnectionError"


def test_cache_lookups_are_told_apart(odibi_capture: Capture, tmp_path) -> None:
    """The first run misses, the second hits, and has its rows from there."""
    for _ in range(2):
        executor(shop()[:2], use_cache=True, cache_manager=CacheManager(str(tmp_path / "cache"))).execute()
        assert odibi_capture.dag()["totals"] == DagNode("success", rows=2, after=("orders",), parent=PARENT)
    lookups = {result: odibi_capture.metric("odibi.node.cache.lookups", result=result) for result in ("hit", "miss")}
    assert lookups == {"hit": 2, "miss": 2}


def test_nodes_that_a_resumed_run_leaves_out_are_skipped(odibi_capture: Capture) -> None:
    """Their reason is that they were done before."""
    work = executor(shop()[:3], skip_nodes={"totals"})
    work.execute()
    assert odibi_capture.dag()["totals"] == DagNode("skipped", after=("orders",), parent=PARENT)
    assert odibi_capture.node("totals").attributes["odibi.node.skip.reason"] == "done before"


def test_every_iteration_of_a_continuous_run_is_a_trace(odibi_capture: Capture) -> None:
    """Each is a run of its own."""
    executor(shop()[:3]).run_continuous(max_iterations=3, sleep_seconds=0)
    runs = [span for span in odibi_capture.spans if span.name == PARENT]
    assert len({span.context.trace_id for span in odibi_capture.spans}) == len(runs) == 3


def test_a_pipeline_around_it_gives_the_run_its_name(odibi_capture: Capture) -> None:
    """ODIBI_CORE has no names for pipelines, so the one that is open takes the nodes."""
    with oo.pipeline("shop"):
        orchestrator(shop()[:3]).run()
    assert {node.parent for node in odibi_capture.dag().values()} == {"pipeline shop"}
    assert PARENT not in {span.name for span in odibi_capture.spans}


@pytest.mark.parametrize("broken", ["_scope", "_producers", "_inputs", "_outputs", "_left_out"])
@pytest.mark.parametrize("parallel", [True, False])
def test_what_fails_in_the_integration_fails_nothing_else(broken: str, parallel: bool, monkeypatch) -> None:
    """Results and exceptions are those of ODIBI_CORE alone, whatever of its objects could not be read."""

    def fail(*args: object) -> None:
        raise AttributeError("of another shape")

    monkeypatch.setattr(integration, broken, fail)
    with capture():
        steps = [found for found in shop() if found.name in ("orders", "totals")]
        assert len(orchestrator(steps, parallel=parallel).run().data_map["totals"]) == 2
        with pytest.raises((RuntimeError, ConnectionError)) as raised:
            orchestrator(shop(), parallel=parallel).run()
    assert "of another shape" not in str(raised.value)


def test_values_of_strange_shapes_do_no_harm(odibi_capture: Capture) -> None:
    """A value that raises at any touch passes from node to node; what cannot be measured has no rows."""

    class Hostile:
        def __getattr__(self, name: str) -> object:
            raise ValueError(name)

        __len__ = __iter__ = __eq__ = __hash__ = __bool__ = lambda *_: 1 / 0

    steps = [step("odd", work=Hostile), step("next", "odd", work=type)]
    assert executor(steps).execute()["next"] is Hostile
    assert odibi_capture.dag()["odd"] == DagNode("success", parent=PARENT)


def test_a_run_that_is_under_way_when_it_is_switched_off(odibi_capture: Capture) -> None:
    """What goes on is no longer recorded; nothing is told of it that may be wrong."""
    executor([step("off", work=OdibiCoreInstrumentor().uninstrument), step("next", "off", work=repr)]).execute()
    assert {name: found.outcome for name, found in odibi_capture.dag().items()} == {"off": "success"}
    OdibiCoreInstrumentor().instrument()


def test_without_telemetry_it_runs_as_ever() -> None:
    """Nothing is configured here: results and exceptions are the same, and nothing is recorded."""
    assert len(orchestrator(shop()[:2]).run().data_map["totals"]) == 2
    with pytest.raises(RuntimeError, match="Node 'join' failed"):
        executor(shop()).execute()


def test_uninstrument_puts_everything_back() -> None:
    """Every attribute of every module and class of the engine is the one it was."""
    OdibiCoreInstrumentor().uninstrument()
    with untouched("odibi_core"):
        OdibiCoreInstrumentor().instrument()
        assert hasattr(DAGExecutor.execute, "__wrapped__")
        OdibiCoreInstrumentor().uninstrument()
    OdibiCoreInstrumentor().instrument()
