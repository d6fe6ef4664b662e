"""`carry` to other processes: one trace, one run, every record once, whatever executes the nodes, however it ends."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.dataset
import pytest
from programs import environment
from secret_samples import SECRETS, leaked

import otel_odibi as oo
from otel_odibi import propagate, runtime
from otel_odibi.recovery import recover
from otel_odibi.testing import Capture

HEAD = """
import multiprocessing, os, signal, sys, threading
from concurrent.futures import ProcessPoolExecutor
import otel_odibi as oo

@oo.node
def work(item):
    oo.get_logger().info("working", item=item)
    return oo.current_pipeline().run_id, oo.current_pipeline().trace_id

def look(_):
    run = oo.current_pipeline()
    return oo.current_node().name, run.name, run.run_id, run.trace_id, bool(run)

def leave_out(_):
    oo.current_pipeline().skip("left_out", "no data")
"""

WORKERS = """
def main(method, directory):
    oo.configure(service_name="etl", directory=directory)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, context) as pool:
        with oo.pipeline("first") as run:
            with oo.node("in_pool") as node:
                told = set(pool.map(oo.carry(work), range(8)))
                assert told == {(run.run_id, run.trace_id)}, told
                looked = pool.submit(oo.carry(look), 0).result()
                assert looked == ("in_pool", "first", run.run_id, run.trace_id, True), looked
                pool.submit(oo.carry(leave_out), 0).result()
            with oo.node("in_pool_of_multiprocessing"), context.Pool(2) as other:
                other.map(oo.carry(work), range(8))
            with oo.node("in_process"):
                process = context.Process(target=oo.carry(work), args=(0,))
                process.start()
                process.join()
        with oo.pipeline("second") as run:
            assert pool.submit(oo.carry(work), 0).result() == (run.run_id, run.trace_id)
        assert pool.submit(oo.carry(look), 0).result()[2:] == ("", "0" * 32, False)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


class Span(NamedTuple):
    name: str
    parent: str
    run: str
    outcome: str
    trace_id: str
    span_id: str


COLUMNS = ["SpanName", "SpanId", "ParentSpanId", "TraceId", "SpanAttributes"]


def spans_in(directory: Path) -> list[Span]:
    """Return every span in a directory's Parquet files, none of them twice, with the name of its parent."""
    rows = pyarrow.dataset.dataset(directory / "spans", format="parquet").to_table(COLUMNS).to_pylist()
    named = {row["SpanId"]: row["SpanName"] for row in rows}
    assert len(named) == len(rows)
    return [_span(row, dict(row["SpanAttributes"]), named) for row in rows]


def _span(row: dict[str, Any], attributes: dict[str, str], named: dict[str, str]) -> Span:
    run, outcome = (attributes.get(f"odibi.{key}", "") for key in ("pipeline.run.id", "node.outcome"))
    parent = named.get(row["ParentSpanId"], row["ParentSpanId"])
    return Span(row["SpanName"], parent, run, outcome, row["TraceId"], row["SpanId"])


def lines_in(directory: Path) -> list[dict[str, Any]]:
    files = sorted((directory / "logs").iterdir())
    texts = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in files)
    return [json.loads(line) for text in texts for line in text.splitlines() if line.strip()]


def run(folder: Path, body: str, *arguments: object) -> None:
    """Run a program that begins with HEAD; on a busy machine it has a minute, not two seconds, to end."""
    (folder / "etl.py").write_text(HEAD + body)
    env = environment({"PYTHONPATH": f"{Path(oo.__file__).parent.parent}", "OTEL_ODIBI_EXIT_TIMEOUT": "60"})
    command = [sys.executable, "etl.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=["fork", "spawn", "forkserver"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The telemetry of one program that has used every kind of worker, each started this way."""
    folder = tmp_path_factory.mktemp(request.param)
    run(folder, WORKERS, request.param, folder / "telemetry")
    return folder / "telemetry"


def test_one_trace_whatever_executes_the_nodes(directory: Path) -> None:
    """Nodes in workers are children of the node that handed them over; nobody flushed anything, and nothing is lost."""
    found = Counter((span.name, span.parent) for span in spans_in(directory))
    assert found == {
        ("pipeline first", ""): 1,
        ("node in_pool", "pipeline first"): 1,
        ("node work", "node in_pool"): 8,
        ("node left_out", "pipeline first"): 1,
        ("node in_pool_of_multiprocessing", "pipeline first"): 1,
        ("node work", "node in_pool_of_multiprocessing"): 8,
        ("node in_process", "pipeline first"): 1,
        ("node work", "node in_process"): 1,
        ("pipeline second", ""): 1,
        ("node work", "pipeline second"): 1,
    }
    assert not list((directory / "state").iterdir())  # every process has ended as it should


def test_two_runs_share_a_pool(directory: Path) -> None:
    """Each task belongs to the run it was handed over in, also where a worker was forked during another."""
    traces: dict[str, set[str]] = {}
    for span in spans_in(directory):
        traces.setdefault(span.run, set()).add(span.trace_id)
    assert sorted(map(len, traces.values())) == [1, 1]
    assert not set.intersection(*traces.values())


def test_log_lines_correlate(directory: Path) -> None:
    """A line that a worker writes tells of the span it was written in, and of the run."""
    spans = {(span.trace_id, span.span_id): span for span in spans_in(directory)}
    lines = [line for line in lines_in(directory) if line.get("message") == "working"]
    assert len(lines) == 18
    for line in lines:
        span = spans[line["trace_id"], line["span_id"]]
        assert (span.name, span.run) == (f"node {line['node_name']}", line["run_id"])


def test_a_skipped_node_of_a_run_elsewhere(directory: Path) -> None:
    """`current_pipeline().skip()` in a worker reports the node as one of the run."""
    assert [span.outcome for span in spans_in(directory) if span.name == "node left_out"] == ["skipped"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_worker_s_own_configure_wins(method: str, tmp_path: Path) -> None:
    """A process that has been configured is left as it is; its nodes belong to the run all the same."""
    body = """
def own(directory):
    oo.configure(service_name="worker", directory=directory)

if __name__ == "__main__":
    oo.configure(service_name="etl", directory=sys.argv[2])
    context = multiprocessing.get_context(sys.argv[1])
    with oo.pipeline("p") as run, ProcessPoolExecutor(1, context, own, (sys.argv[3],)) as pool:
        assert pool.submit(oo.carry(work), 0).result() == (run.run_id, run.trace_id)
"""
    run(tmp_path, body, method, tmp_path / "parent", tmp_path / "worker")
    [parent], [worker] = spans_in(tmp_path / "parent"), spans_in(tmp_path / "worker")
    assert (worker.parent, worker.run, worker.trace_id) == (parent.span_id, parent.run, parent.trace_id)


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """What it had finished is brought back, what it was at is lost, both where they belong: under the parent's run."""
    body = """
@oo.node
def die():
    os.kill(os.getpid(), signal.SIGKILL)

def both():
    work(0)
    die()

if __name__ == "__main__":
    oo.configure(service_name="etl", directory=sys.argv[1])
    with oo.pipeline("p"):
        process = multiprocessing.Process(target=oo.carry(both))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
"""
    run(tmp_path, body, tmp_path / "telemetry")
    recover(tmp_path / "telemetry")
    found = {span.name: span for span in spans_in(tmp_path / "telemetry")}
    assert {name: span.outcome for name, span in found.items()} == {
        "node work": "success", "node die": "lost", "pipeline p": ""
    }  # fmt: skip
    assert {span.parent for span in found.values()} == {"", "pipeline p"}


@pytest.mark.parametrize("leave", ["sys.exit()", "os._exit(0)"])
def test_a_bare_fork(leave: str, tmp_path: Path) -> None:
    """A forked child ends its own nodes alone, not the run it was forked in, also where it leaves the same block."""
    body = f"""
if __name__ == "__main__":
    oo.configure(service_name="etl", directory=sys.argv[1])
    with oo.pipeline("p"), oo.node("forks"):
        child = os.fork()
        if child == 0:
            work(0)
            {leave}
        os.waitpid(child, 0)
"""
    run(tmp_path, body, tmp_path / "telemetry")
    recover(tmp_path / "telemetry")
    found = {span.name: span.parent for span in spans_in(tmp_path / "telemetry")}
    assert found == {"pipeline p": "", "node forks": "pipeline p", "node work": "node forks"}
    lines = Counter(line["event_type"] for line in lines_in(tmp_path / "telemetry"))
    assert (lines["pipeline_start"], lines["pipeline_complete"], lines["node_complete"]) == (1, 1, 2)


def test_threads_that_outlive_a_worker_s_task(tmp_path: Path) -> None:
    """A process waits for its threads; what they do when its own function has returned is not lost either."""
    body = """
returned = threading.Event()

def late():
    returned.wait()
    work(0)

def starts():
    threading.Thread(target=oo.carry(late)).start()

class Worker(multiprocessing.get_context("fork").Process):
    def run(self):
        super().run()
        returned.set()

if __name__ == "__main__":
    oo.configure(service_name="etl", directory=sys.argv[1])
    with oo.pipeline("p"):
        process = Worker(target=oo.carry(starts))
        process.start()
        process.join()
"""
    run(tmp_path, body, tmp_path / "telemetry")
    recover(tmp_path / "telemetry")
    found = {span.name: (span.parent, span.outcome) for span in spans_in(tmp_path / "telemetry")}
    assert found == {"pipeline p": ("", ""), "node work": ("pipeline p", "success")}


# --- what is sent ----------------------------------------------------------------------------------------------------


def double(number: int) -> int:
    return number * 2


def test_no_secret_is_sent(tmp_path: Path) -> None:
    """Headers stay here, and so does what looks like a secret in any other setting, before a worker can leak it."""
    for text, secrets in SECRETS.values():
        resource = {"text": text, "password": secrets[0]}
        with oo.configure(
            set_global=False, directory=tmp_path, resource=resource, otlp_headers={"authorization": secrets[0]},
            environment=text, logs=False, span_formats="none", metric_formats="none",
        ):  # fmt: skip
            sent = pickle.dumps(oo.carry(double))
        assert not leaked(secrets, sent.decode("utf-8", "replace")), text


def test_redaction_is_sent(tmp_path: Path) -> None:
    """What a program has declared secret is secret in its workers too, whatever the pattern looks like."""
    patterns = [r"https://[^@]+:hunter\d@example", "password=hunter2-hunter2"]
    with oo.configure(set_global=False, redact_patterns=patterns, redact_keys=["pin"]):
        settings = json.loads(propagate.parcel().partition(b"\n")[2])
    assert (settings["redact_patterns"], settings["redact_keys"]) == (patterns, ["pin"])


def test_a_worker_gets_no_port_to_bind(tmp_path: Path) -> None:
    """The endpoint is the parent's; the directory is where the parent has it, wherever the worker runs."""
    with oo.configure(set_global=False, prometheus_port=0, directory=tmp_path):
        settings = json.loads(propagate.parcel().partition(b"\n")[2])
    assert settings.pop("set_global") is False
    environ = {"OTEL_ODIBI_PROMETHEUS_PORT": "9464"}
    worker = oo.Settings.resolve(settings, environ, {})
    assert (worker.prometheus_port, worker.directory) == (None, tmp_path.absolute())


def test_a_parcel_of_one_place_is_made_once(odibi_capture: Capture) -> None:
    """A thousand tasks handed over in one node share it."""
    with oo.node("n"):
        assert propagate.parcel() is propagate.parcel()
        first = propagate.parcel()
    assert propagate.parcel() != first


def test_nothing_live() -> None:
    """A carried function is the function then, in this process or another."""
    carried = oo.carry(double)
    assert pickle.loads(pickle.dumps(carried))(21) == carried(21) == 42
    assert (carried.__name__, carried.__wrapped__) == ("double", double)  # type: ignore[attr-defined]
    assert runtime.live() is None


def test_what_cannot_be_pickled_says_what_it_always_said() -> None:
    """The message names the function, not what carried it."""

    def refused(fn: Callable[..., Any]) -> str:
        with pytest.raises((AttributeError, pickle.PicklingError)) as raised:
            pickle.dumps(fn)
        return repr(raised.value)

    def inner() -> None: ...

    assert refused(oo.carry(inner)) == refused(inner)


def test_a_parcel_of_another_release(odibi_capture: Capture) -> None:
    """Work is done whatever comes with it."""
    for odd in (b"", b"\n", b"[1,2]\n{}", b"[{}, null, null]\n{", b"[{}, [], []]"):
        with propagate.unpacked(odd):
            assert double(2) == 4


def test_unpacked_gives_back_what_was_current(odibi_capture: Capture) -> None:
    """A worker that runs something of its own in between is itself again."""
    with oo.pipeline("sender"), oo.node("n"):
        sent = propagate.parcel()
    with oo.pipeline("own") as own:
        with propagate.unpacked(sent):
            assert (oo.current_pipeline().name, oo.current_node().name) == ("sender", "n")
            with oo.node("inside", depends_on=["before"]):
                pass
        assert oo.current_pipeline() is own
    inside, n = odibi_capture.node("inside"), odibi_capture.node("n")
    assert inside.parent is not None
    assert (inside.parent.span_id, inside.context.trace_id) == (n.context.span_id, n.context.trace_id)


def test_a_carried_task_carries_on(odibi_capture: Capture) -> None:
    """What has arrived may be sent on: the third process is of the same run."""
    with oo.pipeline("p") as run:
        first = propagate.parcel()
    with propagate.unpacked(first):
        second = propagate.parcel()
    with propagate.unpacked(second), oo.node("far"):
        assert oo.current_pipeline().run_id == run.run_id
    far = odibi_capture.node("far")
    assert far.parent is not None
    assert far.parent.span_id == odibi_capture.pipeline("p").context.span_id
