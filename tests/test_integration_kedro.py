"""Kedro: one trace a run, whichever runner runs it, with no change to the project."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("kedro")
os.environ["DO_NOT_TRACK"] = "1"

from kedro.framework.session import KedroSession
from kedro.io import AbstractDataset, DataCatalog, DatasetError, MemoryDataset
from kedro.pipeline import Pipeline, node
from kedro.runner import SequentialRunner, ThreadRunner

import otel_odibi as oo
from otel_odibi.integrations.kedro import KedroInstrumentor
from otel_odibi.testing import Capture, DagNode, capture, untouched

RUN = "pipeline kedro"
RUNNERS = [SequentialRunner(), ThreadRunner(max_workers=2), SequentialRunner(is_async=True)]


@pytest.fixture
def instrumented():
    """Kedro with telemetry, put back as it was afterwards."""
    with untouched("kedro"):
        KedroInstrumentor().instrument()
        yield
        KedroInstrumentor().uninstrument()


def retried(fn):
    """Try twice, as a retry library would."""

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        with contextlib.suppress(ConnectionError), oo.current_node().attempt():
            return fn(*args, **kwargs)
        with oo.current_node().attempt():
            return fn(*args, **kwargs)

    return wrapper


def sales(failures: list[Exception]) -> Pipeline:
    """Make a pipeline of five nodes: two branches between the first and the last, one retried, one that may be done."""

    def read(raw: pd.DataFrame, least: int) -> pd.DataFrame:
        return raw[raw.amount >= least]

    def large(orders: pd.DataFrame) -> pd.DataFrame:
        oo.get_logger().info("looking for large ones")
        return orders[orders.amount > 10]

    @retried
    def small(orders: pd.DataFrame) -> pd.DataFrame:
        if failures:
            raise failures.pop()
        return orders[orders.amount <= 10]

    def rates() -> pd.DataFrame:
        return pd.DataFrame({"rate": [1.0]})

    def report(large: pd.DataFrame, small: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([large, small])

    return Pipeline([
        node(read, ["raw", "params:least"], "orders", name="read"),
        node(large, "orders", "large_orders", name="large"),
        node(small, "orders", "small_orders", name="small"),
        node(rates, None, "rates", name="rates"),
        node(report, ["large_orders", "small_orders", "rates"], "result", name="report"),
    ])  # fmt: skip


class Kept(AbstractDataset):
    """A data set in a file, of the layer "reference"."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = {"kedro-viz": {"layer": "reference"}}

    def _load(self):
        return pd.read_pickle(self.path)

    def _save(self, data) -> None:
        data.to_pickle(self.path)

    def _exists(self) -> bool:
        return self.path.exists()

    def _describe(self):
        return {"path": self.path}


def catalog(**datasets) -> DataCatalog:
    raw = MemoryDataset(pd.DataFrame({"amount": [1, 10, 20, 30]}))
    return DataCatalog({"raw": raw, "params:least": MemoryDataset(5), **datasets})


def dag_of_sales(rates: DagNode) -> dict[str, DagNode]:
    return {
        "read": DagNode("success", rows=3, parent=RUN),
        "large": DagNode("success", rows=2, after=("read",), parent=RUN),
        "small": DagNode("success", rows=1, attempts=2, after=("read",), parent=RUN),
        "rates": rates,
        "report": DagNode("success", rows=3, after=("large", "rates", "small"), parent=RUN),
    }


def traces(captured: Capture) -> set[int]:
    return {span.context.trace_id for span in captured.spans}


@pytest.mark.parametrize("runner", RUNNERS, ids=["sequential", "threads", "async"])
def test_a_run_is_one_trace(instrumented, runner):
    """Parents, links, rows, outcomes and the second attempt."""
    with capture() as captured:
        runner.run(sales([ConnectionError("reset")]), catalog())
    assert captured.dag() == dag_of_sales(DagNode("success", rows=1, parent=RUN))
    assert traces(captured) == {1}
    assert [captured.span(f"attempt {number}").parent for number in (1, 2)] == 2 * [captured.node("small").context]
    assert captured.node("small").links[0].context == captured.node("read").context
    assert captured.node("read").attributes["odibi.node.rows.in"] == 4


def test_a_runner_inside_a_pipeline(instrumented):
    """Its nodes are those of that run."""
    with capture() as captured, oo.pipeline("mine"):
        SequentialRunner().run(sales([ConnectionError("reset")]), catalog())
    assert {node.parent for node in captured.dag().values()} == {"pipeline mine"}


def test_another_engine_inside_a_node(instrumented):
    """A computation of Dask is part of the node that asks for it."""
    dask = pytest.importorskip("dask")
    from otel_odibi.integrations.dask import DaskInstrumentor

    def total(raw: pd.DataFrame) -> list[int]:
        return dask.delayed(sorted)(dask.delayed(list)([2, 1])).compute(scheduler="threads")

    DaskInstrumentor().instrument()
    try:
        with capture() as captured:
            ThreadRunner().run(Pipeline([node(total, "raw", "totals", name="total")]), catalog())
    finally:
        DaskInstrumentor().uninstrument()
    dag = captured.dag()
    assert dag["list"] == DagNode("success", rows=2, parent="node total")
    assert dag["sorted"] == DagNode("success", rows=2, after=("list",), parent="node total")
    assert dag["total"] == DagNode("success", rows=2, parent=RUN)
    assert traces(captured) == {1}


def test_a_run_that_is_under_way_when_it_is_switched_off(instrumented):
    """What goes on is no longer recorded; nothing is told of it that may be wrong."""

    def off(raw: pd.DataFrame) -> pd.DataFrame:
        KedroInstrumentor().uninstrument()
        return raw

    with capture() as captured:
        flow = Pipeline([node(off, "raw", "seen", name="off"), node(len, "seen", "count", name="len")])
        assert SequentialRunner().run(flow, catalog())["count"].load() == 4
    assert {name: found.outcome for name, found in captured.dag().items()} == {"off": "success"}
    assert captured.pipeline("kedro").attributes["odibi.pipeline.outcome"] == "success"
    KedroInstrumentor().instrument()


def test_nodes_whose_outputs_exist_are_skipped(instrumented, tmp_path):
    """Where only missing ones are asked for."""
    rates = Kept(tmp_path / "rates")
    rates.save(pd.DataFrame({"rate": [1.0]}))
    with capture() as captured:
        flow = sales([ConnectionError("reset")])
        SequentialRunner().run(flow, catalog(rates=rates, result=Kept(tmp_path / "x")), only_missing_outputs=True)
    assert captured.dag() == dag_of_sales(DagNode("skipped", parent=RUN))
    assert captured.node("rates").attributes["odibi.node.skip.reason"] == "its outputs exist"
    assert captured.node("rates").attributes["odibi.node.layer"] == "reference"
    assert captured.pipeline("kedro").attributes["odibi.pipeline.outcome"] == "success"


@pytest.mark.parametrize("runner", RUNNERS, ids=["sequential", "threads", "async"])
def test_a_failure_is_the_nodes_and_the_runs(instrumented, runner):
    """What was not reached is skipped; the exception is the function's own."""
    mistake = ValueError("no amount")
    with capture() as captured, pytest.raises(ValueError, match="no amount") as raised:
        runner.run(sales([mistake]), catalog())
    assert raised.value is mistake
    dag = captured.dag()
    assert dag["small"] == DagNode("failure", after=("read",), parent=RUN)
    assert dag["report"] == DagNode("skipped", after=("large", "rates", "small"), parent=RUN)
    assert captured.node("small").attributes["error.type"] == "ValueError"
    assert captured.pipeline("kedro").attributes["odibi.pipeline.outcome"] == "failure"
    assert len(dag) == 5


@pytest.mark.parametrize("runner", RUNNERS, ids=["sequential", "threads", "async"])
def test_a_data_set_that_cannot_be_loaded_fails_its_node(instrumented, runner, tmp_path):
    """Though its function never ran. One that cannot be saved fails the node that made it."""
    with capture() as captured, pytest.raises(DatasetError):
        runner.run(sales([]), catalog(raw=Kept(tmp_path / "nowhere")))
    assert captured.dag()["read"] == DagNode("failure", parent=RUN)
    with capture() as captured, pytest.raises(DatasetError):
        runner.run(sales([]), catalog(orders=Kept(tmp_path / "nowhere" / "x")))
    assert captured.dag()["read"] == DagNode("failure", rows=3, parent=RUN)
    assert {name for name, each in captured.dag().items() if each.outcome == "skipped"} >= {"large", "small", "report"}


def test_layer_engine_and_logs(instrumented):
    """Of the data set made, or the namespace; of the type returned; and log lines that know their node."""
    with capture() as captured:
        flow = Pipeline(sales([]), namespace="shop", inputs="raw", parameters="params:least")
        SequentialRunner().run(flow, catalog())
    large = captured.node("shop.large").attributes
    assert (large["odibi.node.layer"], large["odibi.node.engine"]) == ("shop", "pandas")
    line = next(record for record in captured.logs if record["message"] == "looking for large ones")
    assert (line["node_name"], line["pipeline"]) == ("shop.large", "kedro")


def test_chunks_of_a_generator_are_counted(instrumented):
    """As they are saved; the node ends when they all are."""

    def chunks():
        yield pd.DataFrame({"a": [1, 2]})
        yield pd.DataFrame({"a": [3]})

    with capture() as captured:
        SequentialRunner().run(Pipeline([node(chunks, None, "out", name="chunks")]), DataCatalog())
    assert captured.dag() == {"chunks": DagNode("success", rows=3, parent=RUN)}


def test_a_node_called_by_hand_is_no_node_of_a_run(instrumented):
    """Nor in the way."""
    with capture() as captured:
        step = node(lambda a: a, "a", "b", name="by_hand")
        with oo.node("outer"):
            assert step.run({"a": 1}) == {"b": 1}
    assert [span.name for span in captured.spans] == ["node outer"]


def test_a_session_that_cannot_begin_is_a_failed_run(instrumented, tmp_path):
    """As where a project's configuration is wrong: what never began is missing in no history."""
    with capture() as captured, pytest.raises(KeyError):
        KedroSession("no such session", project_path=tmp_path).run("nightly")
    assert captured.pipeline("nightly").attributes["odibi.pipeline.outcome"] == "failure"


def test_nothing_is_recorded_where_nothing_is_configured(instrumented):
    """Nor is anything in the way."""
    flow = sales([ConnectionError("reset")])
    assert len(SequentialRunner().run(flow, catalog())["result"].load()) == 3


PROJECT = {
    "pyproject.toml": """
        [tool.kedro]
        package_name = "shop"
        project_name = "shop"
        kedro_init_version = "KEDRO"
        """,
    "conf/base/catalog.yml": """
        orders:
          type: shop.files.Rows
          path: orders.json
          metadata:
            kedro-viz: {layer: raw}
        """,
    "conf/local/README": "",
    "src/shop/__init__.py": "",
    "src/shop/settings.py": "",
    "src/shop/files.py": """
        import json
        from pathlib import Path
        from kedro.io import AbstractDataset

        class Rows(AbstractDataset):
            def __init__(self, path, metadata):
                self.path, self.metadata = Path(path), metadata
            def _load(self):
                return json.loads(self.path.read_text())
            def _save(self, data):
                self.path.write_text(json.dumps(data))
            def _describe(self):
                return {}
        """,
    "src/shop/pipeline_registry.py": """
        import os
        import otel_odibi as oo
        from kedro.pipeline import Pipeline, node

        def read():
            return [1, 2, 3]

        def work(rows):
            oo.get_logger().info("working", process=os.getpid())
            return rows

        def join(left, right):
            return left + right

        def register_pipelines():
            return {"__default__": Pipeline([
                node(read, None, "orders", name="read"),
                node(work, "orders", "left", name="left"),
                node(work, "orders", "right", name="right"),
                node(join, ["left", "right"], "joined", name="join"),
            ])}
        """,
    "main.py": """
        import multiprocessing, sys
        import otel_odibi as oo
        from kedro.framework.session import KedroSession
        from kedro.framework.startup import bootstrap_project
        from kedro.runner import ParallelRunner, SequentialRunner
        from pathlib import Path

        if __name__ == "__main__":
            oo.configure(directory="telemetry", service_name="shop", span_formats="none", metric_formats="none")
            if "hooks" not in sys.argv:
                from otel_odibi.integrations.kedro import KedroInstrumentor
                KedroInstrumentor().instrument()
            if sys.argv[1] != "sequential":
                multiprocessing.set_start_method(sys.argv[1])
            bootstrap_project(Path.cwd())
            with KedroSession.create() as session:
                session.run(runner=SequentialRunner() if sys.argv[1] == "sequential" else ParallelRunner(2))
        """,
}


@pytest.mark.parametrize("how", ["sequential hooks", "fork", "spawn"])
def test_a_project_is_run(tmp_path: Path, how: str):
    """One trace and run named as the project, in processes too, by instrumentation or by `HOOKS` in settings.py."""
    import kedro

    for name, text in PROJECT.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).replace("KEDRO", kedro.__version__))
    if "hooks" in how:
        hooks = "from otel_odibi.integrations.kedro import KedroHooks\nHOOKS = (KedroHooks(),)\n"
        (tmp_path / "src/shop/settings.py").write_text(hooks)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "main.py", *how.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for path in tmp_path.glob("telemetry/logs/*") for line in path.read_text().splitlines()]
    ended = {line["node_name"]: line for line in lines if line["event_type"] == "node_complete"}
    assert {name: line["row_count"] for name, line in ended.items()} == {"read": 3, "left": 3, "right": 3, "join": 6}
    assert len({(line["trace_id"], line["run_id"]) for line in lines}) == 1
    start = next(line for line in lines if line["event_type"] == "pipeline_start")
    assert start["pipeline"] == "shop"
    assert [line["parent_span_id"] for line in ended.values()] == 4 * [start["span_id"]]
    assert ended["read"]["layer"] == "raw"
