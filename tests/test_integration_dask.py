"""Dask: local schedulers and distributed clusters, one trace a computation wherever its tasks are executed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import dask
import pyarrow.dataset
import pytest
from dask import delayed
from dask.callbacks import Callback
from distributed import Client, LocalCluster, get_worker, worker_client
from programs import wait_for
from prometheus_client.parser import text_string_to_metric_families

import otel_odibi as oo
from otel_odibi.integrations import dask as integration
from otel_odibi.integrations.dask import MAX_SKIPPED, DaskInstrumentor
from otel_odibi.recovery import recover
from otel_odibi.testing import Capture, DagNode, capture, untouched

LOCAL = ("synchronous", "threads")


@pytest.fixture
def instrumented() -> Iterator[None]:
    DaskInstrumentor().instrument()
    yield
    DaskInstrumentor().uninstrument()


@contextmanager
def cluster(directory: Path, workers: int = 1, *, processes: bool = False) -> Iterator[Client]:
    """Run a cluster on this machine's loopback, of one thread a worker."""
    host = {"host": "127.0.0.1"} if processes else {}
    options: dict[str, Any] = {"n_workers": workers, "threads_per_worker": 1, "processes": processes, **host}
    options |= {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
    options["local_directory"] = str(directory / "dask")
    with LocalCluster(**options) as local, Client(local) as client:
        yield client


def read(rows: int) -> list[int]:
    return list(range(rows))


def even(rows: list[int]) -> list[int]:
    return rows[::2]


tries = Counter[str]()


def odd(rows: list[int]) -> list[int]:
    tries["odd"] += 1
    if tries["odd"] == 1:
        raise OSError("bad luck")
    return rows[1::2]


def odd_retried(rows: list[int]) -> list[int]:
    """Dask's local schedulers have no retries: a task that needs them has its own, of whatever library."""
    with suppress(OSError), oo.current_node().attempt():
        return odd(rows)
    with oo.current_node().attempt():
        return odd(rows)


def join(left: list[int], right: list[int]) -> list[int]:
    oo.get_logger().info("joining")
    raise LookupError("nothing to join")


def publish(rows: list[int]) -> None:
    raise AssertionError("never reached")


def flights(odds: Any, **annotations: Any) -> Any:
    """Return a graph of five tasks: read, even and odd (which fails once), join (which fails), publish."""
    rows = delayed(read)(6)
    with dask.annotate(**annotations):
        right = delayed(odds)(rows)
    return delayed(publish)(delayed(join)(delayed(even)(rows), right))


def check_flights(captured: Capture, odds: str) -> None:
    parent = "pipeline dask"
    assert captured.dag() == {
        "read": DagNode("success", rows=6, parent=parent),
        "even": DagNode("success", rows=3, after=("read",), parent=parent),
        odds: DagNode("success", rows=3, attempts=2, after=("read",), parent=parent),
        "join": DagNode("failure", after=("even", odds), parent=parent),
        "publish": DagNode("skipped", after=("join",), parent=parent),
    }
    assert len({span.context.trace_id for span in captured.spans}) == 1
    by_id = {span.context.span_id: span.name for span in captured.spans}
    linked = {by_id[link.context.span_id] for link in captured.node("join").links}
    assert linked == {"node even", f"node {odds}"}, "by their spans, not their names alone"
    assert captured.pipeline("dask").attributes["odibi.pipeline.outcome"] == "failure"
    line = next(record for record in captured.logs if record["message"] == "joining")
    assert (line["node_name"], line["span_id"]) == ("join", f"{captured.node('join').context.span_id:016x}")
    assert captured.metric("odibi.node.retries", node=odds) == 1


@pytest.mark.parametrize("scheduler", LOCAL)
def test_a_local_computation_is_one_run(instrumented: None, scheduler: str) -> None:
    """A failing-then-retried task, a parallel branch, and one that the failure of another kept from running."""
    tries.clear()
    with capture() as captured, pytest.raises(LookupError, match="nothing to join"):
        flights(odd_retried).compute(scheduler=scheduler)
    check_flights(captured, "odd_retried")


def test_a_distributed_computation_is_one_run(instrumented: None, tmp_path: Path) -> None:
    """The same on a cluster, whose own retries are attempts: each is an execution, with its number."""
    tries.clear()
    with capture() as captured, cluster(tmp_path, workers=2):
        with pytest.raises(LookupError, match="nothing to join"):
            flights(odd, retries=1).compute()
        check_flights(captured, "odd")
        outcomes = [s.attributes["odibi.node.outcome"] for s in captured.spans if s.name == "node odd"]
        assert outcomes == ["failure", "success"]
        assert [s.name for s in captured.spans if s.name.startswith("attempt")] == ["attempt 1", "attempt 2"]


def test_tasks_of_another_process_are_in_the_same_trace(instrumented: None, tmp_path: Path) -> None:
    """With scheduler="processes" each process configures itself, and tells of its tasks in the same directory."""
    with configured_at(tmp_path / "telemetry"):
        count = delayed(len)(delayed(even)(delayed(read)(6)))
        assert count.compute(scheduler="processes", num_workers=1) == 3
    spans = {span["SpanName"]: span for span in spans_in(tmp_path / "telemetry")}
    assert sorted(spans) == ["node even", "node len", "node read", "pipeline dask"]
    assert {span["TraceId"] for span in spans.values()} == {spans["pipeline dask"]["TraceId"]}
    assert [link["SpanId"] for link in spans["node len"]["Links"]] == [spans["node even"]["SpanId"]]
    assert dict(spans["node even"]["SpanAttributes"])["odibi.node.rows.out"] == "3"


def test_futures_belong_to_the_run_they_were_submitted_in(instrumented: None, tmp_path: Path) -> None:
    """Submit and map, coroutines, and tasks that submit tasks of their own, which are children of the one that did."""

    async def wait(rows: list[int]) -> list[int]:
        oo.get_logger().info("waiting")
        return rows

    def within(rows: list[int]) -> Any:
        with worker_client() as client:
            return client.submit(sum, rows).result()

    with capture() as captured, cluster(tmp_path, workers=2) as client:
        with oo.pipeline("etl"):
            rows = client.submit(read, 4)
            assert client.gather(client.map(even, [rows])) == [[0, 2]]
            assert client.submit(within, client.submit(wait, rows, retries=1)).result() == 6
        assert captured.dag() == {
            "read": DagNode("success", rows=4, parent="pipeline etl"),
            "even": DagNode("success", rows=2, after=("read",), parent="pipeline etl"),
            "wait": DagNode("success", rows=4, after=("read",), parent="pipeline etl"),
            "within": DagNode("success", after=("wait",), parent="pipeline etl"),
            "sum": DagNode("success", parent="node within"),
        }
        waiting = next(record for record in captured.logs if record["message"] == "waiting")
        assert (waiting["node_name"], waiting["pipeline"], waiting["run_id"]) == ("wait", "etl", "run-1")


def test_an_asynchronous_client_is_instrumented_too(instrumented: None, tmp_path: Path) -> None:
    """What is awaited rather than waited for."""
    import asyncio

    async def main() -> int:
        async with (
            LocalCluster(1, processes=False, dashboard_address="127.0.0.1:0", asynchronous=True) as local,
            Client(local, asynchronous=True) as client,
        ):
            with oo.pipeline("etl"):
                return await client.submit(len, [1, 2])

    with capture() as captured:
        assert asyncio.run(main()) == 2
        assert captured.dag() == {"len": DagNode("success", parent="pipeline etl")}


def test_a_computation_joins_the_run_and_node_it_is_made_in(instrumented: None) -> None:
    """In a pipeline there is no second one; in a node, or another task, tasks are its children."""
    inner = delayed(len)([1, 2])

    def outer() -> Any:
        return inner.compute(scheduler="synchronous")

    with capture() as captured:
        with oo.pipeline("etl"), oo.node("prepare"):
            delayed(outer)().compute(scheduler="threads")
        assert captured.dag()["outer"].parent == "node prepare"
        assert captured.dag()["len"].parent == "node outer"
        assert [span.name for span in captured.spans if span.name.startswith("pipeline")] == ["pipeline etl"]


class Watching(Callback):
    """What a user's own callback sees of a computation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def _pretask(self, key: str, dsk: Any, state: Any) -> None:
        self.seen.append(("pretask", type(dsk[key]).__name__))

    def _posttask(self, key: str, result: Any, dsk: Any, state: Any, worker_id: Any) -> None:
        self.seen.append(("posttask", repr(result)))


@pytest.mark.parametrize("telemetry", [True, False])
@pytest.mark.parametrize("scheduler", LOCAL)
def test_callbacks_results_and_exceptions_are_what_they_were(
    instrumented: None, scheduler: str, telemetry: bool
) -> None:
    """Dask's graph and values are never ours to see, with telemetry configured or without."""
    failure = ZeroDivisionError("mine")

    def fail() -> None:
        raise failure

    with capture() if telemetry else nullcontext(), Watching() as watching:
        assert delayed(even)([1, 2, 3]).compute(scheduler=scheduler) == [1, 3]
        assert watching.seen == [("pretask", "Task"), ("posttask", "[1, 3]")]
        with pytest.raises(ZeroDivisionError) as raised:
            delayed(fail)().compute(scheduler=scheduler)
        assert raised.value is failure


@pytest.mark.parametrize("name", ["node_name", "run", "_open"])
def test_trouble_of_ours_never_reaches_a_task(
    instrumented: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever goes wrong in here, tasks are executed, and their results arrive."""

    def broken(*args: Any) -> Any:
        raise RuntimeError("ours")

    monkeypatch.setattr(integration, name, broken)
    with capture():
        assert delayed(even)([1, 2, 3]).compute(scheduler="threads") == [1, 3]
        with cluster(tmp_path) as client:
            assert client.submit(even, [1, 2, 3]).result() == [1, 3]
            assert delayed(even)([1, 2, 3]).compute() == [1, 3]


def test_names_are_those_of_groups_and_no_more_than_a_process_tells_apart(
    instrumented: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys have a token or a number; made by hand they may be anything. The span has the whole key."""
    monkeypatch.setattr(integration, "_scopes", {})
    monkeypatch.setattr(integration, "MAX_NAMES", 3)
    with capture() as captured:
        for name in ("load-6f1e2d3c", "load-7", "a", "b", "c", "d"):
            delayed(len)([1], dask_key_name=name).compute(scheduler="synchronous")
        assert Counter(span.name for span in captured.spans if "dask.key" in span.attributes) == {
            "node load": 2, "node a": 1, "node b": 1, "node other": 2,
        }  # fmt: skip
        assert captured.node("a").attributes["dask.key"] == "a"


@pytest.mark.parametrize("distributed", [False, True])
def test_what_a_failure_kept_from_running_is_told_up_to_a_bound(
    instrumented: None, tmp_path: Path, distributed: bool
) -> None:
    """A graph may have millions of tasks; only those are told of that were needed for the result."""

    def fail() -> list[int]:
        raise LookupError

    source = delayed(fail)()
    graph = delayed(len)([delayed(even)(source, dask_key_name=f"even-{n}") for n in range(MAX_SKIPPED + 50)])
    with capture() as captured, cluster(tmp_path) if distributed else nullcontext(), pytest.raises(LookupError):
        graph.compute(scheduler=None if distributed else "synchronous")
    skipped = [span for span in captured.spans if span.attributes.get("odibi.node.outcome") == "skipped"]
    assert len(skipped) == MAX_SKIPPED
    assert {span.attributes["odibi.node.depends_on"] for span in skipped} >= {("fail",)}


def test_uninstrument_puts_everything_back(instrumented: None) -> None:
    """Modules and classes of both packages are as they were, byte for byte."""
    DaskInstrumentor().uninstrument()
    with untouched("dask"), untouched("distributed"):
        DaskInstrumentor().instrument()
        assert "otel_odibi" in dask.threaded.get_async.__globals__["__name__"]
        DaskInstrumentor().uninstrument()
    DaskInstrumentor().instrument()


@pytest.mark.parametrize("first", ["import dask, dask.threaded", "from distributed import Client"])
def test_a_program_may_import_what_it_likes_first(first: str) -> None:
    """Instrumented as dask is imported, be that by distributed, whose own import takes a while."""
    code = f"""
from otel_odibi.integrations.dask import DaskInstrumentor
from wrapt import register_post_import_hook
register_post_import_hook(lambda module: DaskInstrumentor().instrument(), "dask")
{first}
import dask.threaded, distributed
print(dask.threaded.get_async.__wrapped__.__name__, distributed.worker._run_task_simple.__wrapped__.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "get_async _run_task_simple\n"


def test_a_worker_without_this_package_starts_all_the_same() -> None:
    """The plugin can be unpickled there; that its setup fails is for dask to log."""
    from distributed.protocol.pickle import dumps

    from otel_odibi.integrations.dask_distributed import OdibiWorkerPlugin

    code = """
import asyncio, pickle, sys
sys.modules["otel_odibi"] = None
plugin = pickle.load(sys.stdin.buffer)
try:
    asyncio.run(plugin.setup(None))
except ImportError as exc:
    print(plugin.name, exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=dumps(OdibiWorkerPlugin()), stdout=-1, cwd="/", check=True
    )
    assert done.stdout.startswith(b"otel_odibi No module named")


# --- a worker is killed ----------------------------------------------------------------------------------------------


@contextmanager
def configured_at(directory: Path) -> Iterator[oo.Telemetry]:
    """Configure telemetry that leaves OpenTelemetry's globals alone, here and in workers."""
    telemetry = oo.configure(service_name="flights", directory=directory, set_global=False, metric_interval=0.2)
    try:
        yield telemetry
    finally:
        telemetry.shutdown()


def spans_in(directory: Path) -> list[dict[str, Any]]:
    columns = ["TraceId", "SpanId", "SpanName", "SpanAttributes", "Links"]
    return pyarrow.dataset.dataset(directory / "spans").to_table(columns).to_pylist()


def counted(directory: Path) -> dict[str, float]:
    """Return the executions of `task` that the service's metrics tell of, by outcome."""
    text = (directory / "prometheus/flights.prom").read_text()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    name = "odibi_node_duration_seconds_count"
    return {s.labels["outcome"]: s.value for s in samples if s.name == name and s.labels["node"] == "task"}


def task(number: int, truth: str) -> int:
    """Work for a while, and say so at the very end: one line, whole or not there."""
    time.sleep(0.002 * (number % 5))
    file = os.open(truth, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{get_worker().name} {os.getpid()} {number}\n".encode())
    os.close(file)
    return number


def survived_kill(tmp_path: Path, *, workers: int, tasks: int, kill_after: int) -> None:
    """Kill a worker after so many tasks; check spans, log lines and metrics against what the tasks have told."""
    directory, truth = tmp_path / "telemetry", tmp_path / "truth"

    def told() -> list[list[str]]:
        return [line.split() for line in truth.read_text().splitlines()]

    with configured_at(directory), cluster(tmp_path, workers, processes=True) as client, oo.pipeline("etl"):
        futures = client.map(task, range(tasks), truth=str(truth), key=[f"task-{number}" for number in range(tasks)])
        wait_for(lambda: len(told()) >= kill_after, "the first tasks")
        killed = told()[-1][1]
        os.kill(int(killed), signal.SIGKILL)
        assert client.gather(futures) == list(range(tasks))
        of_others = sum(pid != killed for _, pid, _ in told())
        wait_for(lambda: counted(directory).get("success", 0) >= of_others, "the metrics of those that live")
    recover(directory)
    spans = [span for span in spans_in(directory) if span["SpanName"] == "node task"]
    outcomes = [dict(span["SpanAttributes"]) for span in spans]
    done = Counter(a["dask.key"] for a in outcomes if a["odibi.node.outcome"] == "success")
    lost = sum(a["odibi.node.outcome"] == "lost" for a in outcomes)
    true = Counter(f"task-{number}" for _, _, number in told())
    assert len({span["SpanId"] for span in spans}) == len(spans)
    assert len({span["TraceId"] for span in spans_in(directory)}) == 1
    # One task a worker is under way at a time: at most it is lost, and it may have just told that it was done.
    assert lost <= 1
    assert (true - done).total() <= lost
    assert not done - true
    assert len(spans) == done.total() + lost
    metric = counted(directory)
    assert set(metric) == {"success"}
    assert of_others <= metric["success"] <= true.total(), "what the killed one counted after its last export is gone"
    print(
        f"{true.total():,} executions of {tasks:,} tasks, {true.total() - of_others:,} by the killed worker, "
        f"{lost} lost; {done.total():,} spans, {metric['success']:,.0f} in the metrics"
    )


def test_a_killed_worker_costs_no_finished_task_its_span(instrumented: None, tmp_path: Path) -> None:
    """Two worker processes, 50 tasks."""
    survived_kill(tmp_path, workers=2, tasks=50, kill_after=20)
