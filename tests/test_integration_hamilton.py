"""Hamilton: one trace a run, whatever executes its functions, with no change to the dataflow."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

pytest.importorskip("hamilton")

from hamilton import async_driver, base, driver, lifecycle
from hamilton.ad_hoc_utils import create_temporary_module
from hamilton.execution.executors import MultiThreadingExecutor
from hamilton.function_modifiers import tag
from hamilton.htypes import Collect, Parallelizable
from hamilton.io.materialization import to
from hamilton.plugins.h_threadpool import FutureAdapter

import otel_odibi as oo
from otel_odibi.integrations.hamilton import HamiltonInstrumentor, HamiltonTracker
from otel_odibi.testing import Capture, DagNode, capture, untouched

RUN = "pipeline sales"


@pytest.fixture
def instrumented():
    """Hamilton with telemetry, put back as it was afterwards."""
    with untouched("hamilton"):
        HamiltonInstrumentor().instrument()
        yield
        HamiltonInstrumentor().uninstrument()


def retried(fn):
    """Try twice, as a retry library would."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        with contextlib.suppress(ConnectionError), oo.current_node().attempt():
            return fn(*args, **kwargs)
        with oo.current_node().attempt():
            return fn(*args, **kwargs)

    return wrapper


def dataflow(name: str, *functions) -> ModuleType:
    sys.modules.pop(name, None)
    return create_temporary_module(*functions, module_name=name)


def sales(failures: list[Exception]) -> ModuleType:
    """Make a dataflow of five functions: two branches between the first and the last, one retried, one to override."""

    @tag(layer="ingest")
    def orders(day: str) -> pd.DataFrame:
        return pd.DataFrame({"amount": [10, 20, 30]})

    def large(orders: pd.DataFrame) -> pd.DataFrame:
        oo.get_logger().info("looking for large ones")
        return orders[orders.amount > 10]

    @retried
    def small(orders: pd.DataFrame) -> pd.DataFrame:
        if failures:
            raise failures.pop()
        return orders[orders.amount <= 10]

    def rates(orders: pd.DataFrame) -> pd.DataFrame:
        return orders

    def report(large: pd.DataFrame, small: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([large, small])

    return dataflow("sales", orders, large, small, rates, report)


def execute(flow: ModuleType, *adapters, **options):
    dr = driver.Builder().with_modules(flow).with_adapters(*adapters).build()
    return dr.execute(["report"], inputs={"day": "2026-01-31"}, **options)


def dag_of_sales(rates: DagNode) -> dict[str, DagNode]:
    return {
        "orders": DagNode("success", rows=3, parent=RUN),
        "large": DagNode("success", rows=2, after=("orders",), parent=RUN),
        "small": DagNode("success", rows=1, attempts=2, after=("orders",), parent=RUN),
        "rates": rates,
        "report": DagNode("success", rows=3, after=("large", "rates", "small"), parent=RUN),
    }


def traces(captured: Capture) -> set[int]:
    return {span.context.trace_id for span in captured.spans}


def test_a_run_is_one_trace(instrumented):
    """Parents, links, rows, outcomes, the second attempt, and the function that was overridden."""
    with capture() as captured:
        execute(sales([ConnectionError("reset")]), overrides={"rates": pd.DataFrame({"rate": [1.0]})})
    assert captured.dag() == dag_of_sales(DagNode("skipped", after=("orders",), parent=RUN))
    assert traces(captured) == {1}
    assert captured.pipeline("sales").attributes["odibi.pipeline.outcome"] == "success"
    attempts = [captured.span(f"attempt {number}") for number in (1, 2)]
    assert [attempt.parent for attempt in attempts] == 2 * [captured.node("small").context]
    assert captured.node("small").links[0].context == captured.node("orders").context
    assert captured.node("rates").attributes["odibi.node.skip.reason"] == "overridden"


def test_layer_engine_and_logs(instrumented):
    """The tag `layer`, the library of the return type, and log lines that know their node."""
    with capture() as captured:
        execute(sales([]))
    orders = captured.node("orders").attributes
    assert (orders["odibi.node.layer"], orders["odibi.node.engine"]) == ("ingest", "pandas")
    line = next(record for record in captured.logs if record["message"] == "looking for large ones")
    assert (line["node_name"], line["pipeline"]) == ("large", "sales")
    assert captured.metric("odibi.node.edge", source="orders", target="large") == 1
    assert captured.metric("odibi.node.rows", node="report", direction="in") == 2 + 1 + 3


def test_a_failure_is_the_nodes_and_the_runs(instrumented):
    """What was not reached is skipped; the exception is the function's own."""
    mistake = ValueError("no amount")
    with capture() as captured, pytest.raises(ValueError, match="no amount") as raised:
        execute(sales([mistake]))
    assert raised.value is mistake
    assert captured.dag() == {
        **dag_of_sales(DagNode("skipped", after=("orders",), parent=RUN)),
        "small": DagNode("failure", after=("orders",), parent=RUN),
        "report": DagNode("skipped", after=("large", "rates", "small"), parent=RUN),
    }
    assert captured.node("small").attributes["error.type"] == "ValueError"
    assert captured.pipeline("sales").attributes["odibi.pipeline.outcome"] == "failure"
    assert captured.node("report").attributes["odibi.node.skip.reason"] == "not reached"


def test_an_interrupt_is_no_success(instrumented):
    """Though Hamilton tells hooks of exceptions alone; a handled exception around the run is none of it."""
    with capture() as captured:
        try:
            raise LookupError
        except LookupError:
            with pytest.raises(KeyboardInterrupt):
                execute(sales([KeyboardInterrupt()]))
            execute(sales([]))
    outcomes = [span.attributes.get("odibi.pipeline.outcome") for span in captured.spans]
    assert [outcome for outcome in outcomes if outcome] == ["cancelled", "success"]
    assert "cancelled" in {span.attributes.get("odibi.node.outcome") for span in captured.spans}


def test_a_tracker_for_a_single_driver():
    """Without instrumentation, and named; other drivers are not recorded."""
    with untouched("hamilton"), capture() as captured:
        execute(sales([]), HamiltonTracker("nightly"))
        execute(sales([]))
    assert len(captured.spans) == 6
    assert captured.node("report").parent == captured.pipeline("nightly").context


def test_a_tracker_of_ones_own_is_not_doubled(instrumented):
    """Nor are drivers recorded that outlive the instrumentation."""
    with capture() as captured:
        execute(sales([]), HamiltonTracker())
        assert len(captured.spans) == 6
        flow = driver.Builder().with_modules(sales([])).build()
        HamiltonInstrumentor().uninstrument()
        flow.execute(["orders"], inputs={"day": ""})
        HamiltonInstrumentor().instrument()
        assert len(captured.spans) == 6


def test_materialize_is_a_run_too(instrumented, tmp_path):
    """What saves is a node like others."""
    with capture() as captured:
        dr = driver.Builder().with_modules(sales([])).build()
        saver = to.pickle(id="saved", dependencies=["report"], path=str(tmp_path / "report"), combine=base.DictResult())
        dr.materialize(saver, inputs={"day": ""})
    assert captured.dag()["saved"].parent == RUN
    assert traces(captured) == {1}


def blocks() -> ModuleType:
    def region(count: int) -> Parallelizable[int]:
        yield from range(count)

    def loaded(region: int) -> list[int]:
        return [region] * region

    def total(loaded: Collect[list]) -> int:
        return sum(map(len, loaded))

    return dataflow("regions", region, loaded, total)


def test_blocks_run_in_threads(instrumented):
    """Of dynamic execution: as many executions of a node as there are items, all in the run's trace."""
    with capture() as captured:
        build = driver.Builder().with_modules(blocks()).enable_dynamic_execution(allow_experimental_mode=True)
        dr = build.with_remote_executor(MultiThreadingExecutor(max_tasks=4)).build()
        assert dr.execute(["total"], inputs={"count": 8}) == {"total": 28}
    executions = [span for span in captured.spans if span.name == "node loaded"]
    assert sorted(span.attributes["odibi.node.rows.out"] for span in executions) == list(range(8))
    assert [span.parent for span in executions] == 8 * [captured.pipeline("regions").context]
    assert [span.links[0].context for span in executions] == 8 * [captured.node("region").context]
    assert traces(captured) == {1}
    assert captured.dag()["total"].after == ("loaded",)


def test_functions_run_in_a_pool_of_threads(instrumented):
    """Of the adapter that makes a future of each."""
    with capture() as captured:
        execute(sales([ConnectionError("reset")]), FutureAdapter(max_workers=3))
    assert captured.dag() == dag_of_sales(DagNode("success", rows=3, after=("orders",), parent=RUN))
    assert traces(captured) == {1}


def async_flow(release: asyncio.Event, clock) -> ModuleType:
    async def slow() -> list[int]:
        await release.wait()
        clock.advance(5)
        oo.get_logger().info("released")
        return [1, 2, 3]

    async def quick() -> list[int]:
        release.set()
        return [4]

    def both(slow: list[int], quick: list[int]) -> list[int]:
        clock.advance(1)
        return slow + quick

    async def broken(both: list[int]) -> list[int]:
        raise ValueError(both)

    async def after(broken: list[int]) -> list[int]:
        return broken

    return dataflow("fetch", slow, quick, both, broken, after)


def test_coroutines_are_timed_until_they_are_done(instrumented):
    """Not from when they were made, nor to when they were; two runs at once keep apart."""

    async def main(captured):
        async def once():
            flow = async_flow(asyncio.Event(), captured.clock)
            dr = await async_driver.Builder().with_modules(flow).build()
            before = {name: node.callable for name, node in dr.graph.nodes.items()}
            await dr.execute(["both"])
            assert {name: node.callable for name, node in dr.graph.nodes.items()} == before

        await asyncio.gather(once(), once())

    with capture() as captured:
        asyncio.run(main(captured))
    assert len(traces(captured)) == 2
    parent = "pipeline fetch"
    assert captured.dag() == {
        "quick": DagNode("success", rows=1, parent=parent),
        "slow": DagNode("success", rows=3, parent=parent),
        "both": DagNode("success", rows=4, after=("quick", "slow"), parent=parent),
    }
    both = captured.node("both")
    assert both.end_time - both.start_time == 10**9
    assert [record["node_name"] for record in captured.logs if record["message"] == "released"] == ["slow", "slow"]


def test_a_failed_coroutine_ends_the_run(instrumented):
    """What waits for it is never called, and skipped."""

    async def main(captured):
        flow = async_flow(asyncio.Event(), captured.clock)
        dr = await async_driver.Builder().with_modules(flow).build()
        with pytest.raises(ValueError, match="1, 2, 3, 4"):
            await dr.execute(["after"])

    with capture() as captured:
        asyncio.run(main(captured))
    outcomes = {name: node.outcome for name, node in captured.dag().items()}
    assert outcomes == {"quick": "success", "slow": "success", "both": "success"} | {
        "broken": "failure",
        "after": "skipped",
    }
    assert captured.pipeline("fetch").attributes["odibi.pipeline.outcome"] == "failure"


def test_lookups_of_the_cache_are_told(instrumented, tmp_path):
    """Misses at first, then hits; a node that is not cached looks nothing up."""
    with capture() as captured:
        for _ in range(2):
            cache = {"path": str(tmp_path), "disable": ["large"]}
            dr = driver.Builder().with_modules(sales([])).with_cache(**cache).build()
            dr.execute(["large", "small"], inputs={"day": ""})
    assert captured.metric("odibi.node.cache.lookups", node="orders", result="miss") == 1
    assert captured.metric("odibi.node.cache.lookups", node="orders", result="hit") == 1
    assert captured.metric("odibi.node.cache.lookups", node="large") == 0
    assert captured.dag()["orders"].rows == 3


class Strict(lifecycle.NodeExecutionHook, lifecycle.GraphExecutionHook):
    """An adapter that raises where it is told to."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _hook(self, where: str) -> None:
        if where == self.where:
            raise AssertionError(where)

    def run_before_node_execution(self, **_):
        self._hook("before node")

    def run_after_node_execution(self, **_):
        self._hook("after node")

    def run_before_graph_execution(self, **_):
        self._hook("before graph")

    def run_after_graph_execution(self, **_):
        self._hook("after graph")


@pytest.mark.parametrize("where", ["before node", "after node", "before graph", "after graph"])
def test_hooks_of_others_that_raise_leave_nothing_open(instrumented, where):
    """Neither a node nor a run stays current."""
    with capture() as captured:
        with pytest.raises(AssertionError, match=where):
            execute(sales([]), Strict(where))
        assert not oo.current_pipeline()
        assert not oo.current_node()
    assert len({record["node_name"] for record in captured.logs if record["event_type"] == "node_start"}) == len(
        captured.dag()
    )


def test_of_two_names_of_the_package_one_will_do(monkeypatch):
    """The one that is installed; where none is, the error names the first."""
    monkeypatch.setattr(HamiltonInstrumentor, "requires", ("no-such-package >= 1", "pytest >= 1"))
    assert list(HamiltonInstrumentor().instrumentation_dependencies()) == ["pytest >= 1"]
    monkeypatch.setattr(HamiltonInstrumentor, "requires", ("no-such-package >= 1", "nor-this-one"))
    assert list(HamiltonInstrumentor().instrumentation_dependencies()) == ["no-such-package >= 1"]


def test_nothing_is_recorded_where_nothing_is_configured(instrumented):
    """Nor is anything in the way."""
    assert len(execute(sales([ConnectionError("reset")]))["report"]) == 3


FLOW = """
import os
import otel_odibi as oo
from hamilton.htypes import Collect, Parallelizable

def region(count: int) -> Parallelizable[int]:
    yield from range(count)

def loaded(region: int) -> list[int]:
    oo.get_logger().info("loading", process=os.getpid())
    return [region] * region

def checked(loaded: list[int]) -> list[int]:
    return loaded

def total(checked: Collect[list]) -> int:
    return sum(map(len, checked))
"""
PROGRAM = """
import multiprocessing, sys
import regions
import otel_odibi as oo
from hamilton import driver
from hamilton.execution.executors import MultiProcessingExecutor
from otel_odibi.integrations.hamilton import HamiltonInstrumentor

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    oo.configure(directory="telemetry", service_name="regions", span_formats="none", metric_formats="none")
    HamiltonInstrumentor().instrument()
    build = driver.Builder().with_modules(regions).enable_dynamic_execution(allow_experimental_mode=True)
    dr = build.with_remote_executor(MultiProcessingExecutor(max_tasks=2)).build()
    assert dr.execute(["total"], inputs={"count": 6}) == {"total": 15}
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_blocks_run_in_processes(tmp_path: Path, method: str):
    """All in one trace and run, each process writing what it does, though nothing is instrumented in there."""
    (tmp_path / "regions.py").write_text(FLOW)
    (tmp_path / "main.py").write_text(PROGRAM)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "main.py", method]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for path in tmp_path.glob("telemetry/logs/*") for line in path.read_text().splitlines()]
    ended = [line for line in lines if line["event_type"] == "node_complete"]
    assert sorted(line["node_name"] for line in ended) == sorted(["region", "total"] + 6 * ["loaded", "checked"])
    assert sorted(line["row_count"] for line in ended if line["node_name"] == "loaded") == list(range(6))
    assert len({(line["trace_id"], line["run_id"]) for line in lines}) == 1
    start = next(line for line in lines if line["event_type"] == "pipeline_start")
    assert {line["parent_span_id"] for line in ended} == {start["span_id"]}
    assert len({line["process"] for line in lines if line["message"] == "loading"} - {None}) >= 1
