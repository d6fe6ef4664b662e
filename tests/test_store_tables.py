"""The store's tables: runs, executions, their aggregate, spans, metrics, SQL; of runs in progress too, and from S3."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import quantiles
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import FileSystem

import otel_odibi as oo
from otel_odibi import StoreError, names, store
from otel_odibi.exporters.tables import SCHEMAS, to_parquet
from otel_odibi.store.facts import FACTS, with_facts
from otel_odibi.testing import START, capture

SECOND = 10**9


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Three runs of `daily`, a second and more each, in the last of which `join` fails; one of `hourly`."""
    with capture(directory=tmp_path, service_name="orders") as captured:
        for number in range(3):
            with suppress(ValueError), oo.pipeline("daily"):
                with oo.node("read", layer="ingest", engine="pandas") as node:
                    captured.clock.advance(1 + number)
                    node.output(rows=10)
                    node.cache(hit=number > 0)
                with oo.node("join", depends_on=["read"]) as node:
                    for _ in range(2):
                        with suppress(ValueError), node.attempt():
                            raise ValueError("bad day")
                    if number == 2:
                        raise ValueError("bad day")
        with oo.pipeline("hourly") as run:
            run.skip("notify", "nothing new")
    return tmp_path


# --- runs ------------------------------------------------------------------------------------------------------------


def test_runs_are_a_table(directory: Path) -> None:
    """A row a run, the one that began last first, with its nodes, what failed, and why."""
    runs = store.open(directory).runs()
    assert runs.schema == store.tables.RUNS
    assert runs["run_id"].to_pylist() == ["run-4", "run-3", "run-2", "run-1"]
    assert runs.slice(1, 1).drop_columns(["service", "start", "trace_id"]).to_pylist() == [
        {
            "pipeline": "daily", "run_id": "run-3", "outcome": "failure", "duration_s": 3.0,
            "nodes": 2, "failed": 1, "error_type": "ValueError", "error": "bad day",
        }
    ]  # fmt: skip
    assert runs["start"].cast(pa.int64()).to_pylist() == [START + n * SECOND for n in (6, 3, 1, 0)]


def test_runs_are_chosen(directory: Path) -> None:
    """By pipeline, by when they began, and the newest of them; summaries too."""
    opened = store.open(directory)
    assert opened.runs("daily", limit=2)["run_id"].to_pylist() == ["run-3", "run-2"]
    assert opened.runs(since_ns=START + SECOND)["run_id"].to_pylist() == ["run-4", "run-3", "run-2"]
    assert [run.run_id for run in opened.summaries("daily", START + 1, limit=1)] == ["run-3"]


# --- executions and nodes --------------------------------------------------------------------------------------------


def test_executions_are_a_table(directory: Path) -> None:
    """A row an execution, in the order in which they began; attempts are no executions."""
    executions = store.open(directory).executions()
    assert executions.schema == store.tables.EXECUTIONS
    assert executions["node"].to_pylist() == ["read", "join"] * 3 + ["notify"]
    first = executions.slice(0, 1).drop_columns(["start", "trace_id", "span_id"]).to_pylist()
    assert first == [
        {
            "pipeline": "daily", "run_id": "run-1", "node": "read", "layer": "ingest", "engine": "pandas",
            "outcome": "success", "duration_s": 1.0, "attempt": 1, "rows_in": None, "rows_out": 10, "bytes_out": None,
            "cache_hit": False, "rss": 100 * 2**20, "error_type": None,
        }
    ]  # fmt: skip
    assert executions["attempt"].to_pylist() == [1, 2, 1, 2, 1, 2, 1]
    assert executions["duration_s"].to_pylist()[-1] is None  # as it was skipped


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"pipeline": "hourly"}, ["notify"]),
        ({"node": "join"}, ["join"] * 3),
        ({"run": "run-2"}, ["read", "join"]),
        ({"runs": ["run-1", "run-4"]}, ["read", "join", "notify"]),
        ({"since_ns": START + 3 * SECOND}, ["join", "read", "join", "notify"]),
        ({"node": "nowhere"}, []),
        ({"run": "run"}, []),
    ],
)
def test_executions_are_chosen(directory: Path, asked: dict[str, Any], found: list[str]) -> None:
    """By pipeline, node, run, several runs, and time."""
    assert store.open(directory).executions(**asked)["node"].to_pylist() == found


def test_nodes_are_the_aggregate(directory: Path) -> None:
    """Counts by outcome, exact quantiles, sums of rows, cache lookups, retries, and the most memory."""
    nodes = store.open(directory).nodes()
    assert nodes.schema == store.tables.NODES
    assert nodes.filter(pa.compute.field("node") == "read").to_pylist() == [
        {
            "pipeline": "daily", "node": "read", "layer": "ingest", "engine": "pandas", "count": 3, "success": 3,
            "failure": 0, "cancelled": 0, "skipped": 0, "lost": 0, "p50_s": 2.0, "p95_s": 2.9, "p99_s": 2.98,
            "max_s": 3.0, "rows_in": None, "rows_out": 30, "cache_hits": 2, "cache_lookups": 3, "retries": 0,
            "rss_max": 100 * 2**20,
        }
    ]  # fmt: skip
    [join] = store.open(directory).nodes(run="run-3").slice(0, 1).to_pylist()
    assert (join["node"], join["layer"], join["failure"], join["retries"]) == ("join", None, 1, 1)
    [notify] = store.open(directory).nodes("hourly").to_pylist()
    assert (notify["skipped"], notify["max_s"], notify["cache_lookups"]) == (1, None, 0)


attributes = st.dictionaries(
    st.sampled_from([key for key, _ in FACTS.values()] + ["mine", ""]),
    st.one_of(st.sampled_from(["true", "12", "-3", "x", "", "9" * 18, "9" * 19]), st.text(max_size=3)),
)


@settings(max_examples=300)
@given(rows=st.lists(attributes, max_size=12), shuffled=st.booleans(), words=st.booleans())
def test_facts_are_what_the_attributes_say(rows: list[dict[str, str]], shuffled: bool, words: bool) -> None:
    """Whatever keys the rows have, in whatever order, and however the file encodes them."""
    items = [list(row.items()) for row in rows]
    for pairs in items if shuffled else []:
        random.Random(len(pairs)).shuffle(pairs)
    maps = pa.array(items, pa.map_(pa.string(), pa.string()))
    if words:
        keys, values = maps.keys.dictionary_encode(), maps.items.dictionary_encode()
        maps = pa.MapArray.from_arrays(maps.offsets, keys, values)
    table = pa.table({"at": pa.array(range(len(rows)), pa.int64()), "SpanAttributes": maps})
    found = {row["at"]: row for part in with_facts(table, list(FACTS), "node") for row in part.to_pylist()}
    assert found.keys() == {at for at, row in enumerate(rows) if names.NODE_NAME in row}
    for at, facts in found.items():
        for name, (key, kind) in FACTS.items():
            assert facts[name] == read(rows[at].get(key), kind), (name, rows[at])


def read(text: str | None, kind: pa.DataType) -> object:
    """What an attribute says, the slow way."""
    if text is None or pa.types.is_dictionary(kind):
        return text
    if pa.types.is_boolean(kind):
        return {"true": True, "false": False}.get(text)
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else None


# --- spans and metrics -----------------------------------------------------------------------------------------------


def test_spans_are_as_in_the_files(directory: Path) -> None:
    """Each once, all columns or those asked for."""
    [path] = directory.glob("spans/*/*.parquet")
    stored = pq.read_table(path, partitioning=None)
    path.with_name("copy.parquet").write_bytes(path.read_bytes())
    found = store.open(directory).spans()
    assert found.schema == SCHEMAS["spans"]
    assert found.sort_by("SpanId").equals(stored.sort_by("SpanId"))
    assert store.open(directory).spans(columns=["SpanName"]).column_names == ["SpanName"]


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({"name": "node read"}, 3),
        ({"run": "run-3"}, 3),
        ({"trace": f"{2:032x}"}, 5),
        ({"since_ns": START + 3 * SECOND}, 10),
        ({"name": "node read", "since_ns": START + SECOND}, 2),
        ({"name": "node read", "run": "run-2", "trace": f"{2:032x}"}, 1),
        ({"trace": "f" * 32}, 0),
    ],
)
def test_spans_are_chosen(directory: Path, asked: dict[str, Any], count: int) -> None:
    """By name, run, trace and time, and by several at once."""
    assert len(store.open(directory).spans(**asked, columns=["SpanId"])) == count


def test_a_column_that_there_is_not(directory: Path) -> None:
    """The error names it, and what there is."""
    with pytest.raises(StoreError, match="no column Name; choose from Timestamp, TraceId"):
        store.open(directory).spans(columns=["Name"])


def test_metrics_of_all_kinds_are_one_table(directory: Path) -> None:
    """What a kind has not is null; chosen by name and time."""
    opened = store.open(directory)
    assert {"gauge", "sum", "histogram"} <= set(opened.metrics()["Kind"].to_pylist())
    [*_, last] = opened.metrics("odibi.node.duration").select(["Count", "Value", "Kind"]).to_pylist()
    assert (last["Kind"], last["Value"]) == ("histogram", None)
    assert last["Count"] > 0
    assert len(opened.metrics("odibi.node.duration", since_ns=time.time_ns() + 3600 * SECOND)) == 0


# --- runs in progress ------------------------------------------------------------------------------------------------

GOING = """
import os, sys
import otel_odibi as oo
oo.configure(service_name="flights", directory=sys.argv[1], set_global=False)
with oo.pipeline("daily"):
    with oo.node("read", layer="ingest") as node:
        node.output(rows=10)
    try:
        with oo.node("check", depends_on=["read"]):
            raise ValueError("bad hour")
    except ValueError:
        pass
    with oo.node("join"):
        print("here", flush=True)
        sys.stdin.read()
"""


@contextmanager
def going(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the midst of a run."""
    command = [sys.executable, "-c", GOING, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        try:
            yield process
        finally:
            process.kill()


def eventually(check: Callable[[], bool]) -> None:
    """Wait until a process has told what it does."""
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_in_progress_is_shown_with_its_nodes_so_far(tmp_path: Path) -> None:
    """As running, without a duration: what has ended from its log lines, as its spans are in no file yet."""
    with going(tmp_path) as process:
        opened = store.open(tmp_path)
        eventually(lambda: len(opened.active()) == 2)
        [run] = opened.runs().to_pylist()
        assert (run["outcome"], run["duration_s"], run["nodes"], run["failed"]) == ("running", None, 3, 1)
        found = opened.executions().select(["node", "outcome", "rows_out", "error_type"]).to_pylist()
        assert [tuple(row.values()) for row in found] == [
            ("read", "success", 10, None), ("check", "failure", None, "ValueError"), ("join", "running", None, None),
        ]  # fmt: skip
        view = opened.run(run["run_id"][:8])
        assert (view.run.outcome, view.run.pipeline) == ("running", "daily")
        assert [(node.name, node.outcome) for node in view.nodes] == [
            ("read", "success"), ("check", "failure"), ("join", "running"),
        ]  # fmt: skip
        assert view.nodes[1].failure is not None
        assert (view.nodes[1].failure.message, view.nodes[1].depends_on) == ("bad hour", ("read",))
        assert opened.nodes()["node"].to_pylist() == ["check", "read"]
        assert opened.summaries() == ()
        assert opened.run().run.run_id == view.run.run_id  # as none has ended
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)
        assert opened.executions()["outcome"].to_pylist() == ["success", "failure", "success"]


def test_a_run_whose_process_is_silent_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a minute without a sign of life, before any recovery."""
    with going(tmp_path) as process:
        opened = store.open(tmp_path)
        eventually(lambda: len(opened.active()) == 2)
        os.kill(process.pid, signal.SIGKILL)
    now = time.time_ns()
    monkeypatch.setattr("otel_odibi.store.alive.time.time_ns", lambda: now + 120 * SECOND)
    assert opened.runs()["outcome"].to_pylist() == ["lost"]
    assert opened.executions()["outcome"].to_pylist() == ["success", "failure", "lost"]


# --- SQL -------------------------------------------------------------------------------------------------------------


def test_sql_over_all_views(directory: Path) -> None:
    """Runs, nodes, spans, logs and metrics can be joined."""
    pytest.importorskip("duckdb")
    opened = store.open(directory)
    query = "SELECT r.run_id, max(n.duration_s) AS s FROM runs r JOIN nodes n USING (run_id) GROUP BY 1 ORDER BY 1"
    assert opened.sql(query)["s"].to_pylist() == [1.0, 2.0, 3.0, None]
    for view in ("spans", "nodes", "runs", "logs", "metrics"):
        [row] = opened.sql(f"SELECT count(*) AS n FROM {view}").to_pylist()
        assert row["n"] > 0


@pytest.mark.parametrize(
    "query",
    [
        "SELEC 1", "SELECT * FROM nowhere", "SELECT * FROM read_csv('/etc/passwd')", "COPY (SELECT 1) TO 'x.csv'",
        "SELECT * FROM 'spans/*/*.parquet'", "SET enable_external_access = true", "ATTACH 'x.db'", "INSTALL httpfs",
        "SELECT * FROM glob('*')",
    ],
)  # fmt: skip
def test_sql_that_is_wrong_or_reaches_out(directory: Path, monkeypatch: pytest.MonkeyPatch, query: str) -> None:
    """The error has duckdb's text; there is no file and no network for a query."""
    pytest.importorskip("duckdb")
    monkeypatch.chdir(directory)
    with pytest.raises(StoreError, match=r"the query cannot be answered: .+"):
        store.open(directory).sql(query)
    assert not (directory / "x.csv").exists()


def test_sql_without_duckdb(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(oo.MissingExtraError, match=r"otel-odibi\[query\]"):
        store.open(directory).sql("SELECT 1")


# --- duplicates, many files, S3 --------------------------------------------------------------------------------------


def test_quantiles_over_many_files(tmp_path: Path) -> None:
    """Executions are aggregated over files of any number and encoding, each span once."""
    with capture(directory=tmp_path / "t", parquet_rows=7) as captured, oo.pipeline("p"):
        for number in range(100):
            with oo.node("n"):
                captured.clock.advance(number)
    paths = sorted((tmp_path / "t").glob("spans/*/*.parquet"))
    assert len(paths) > 10
    paths[3].with_name("again.parquet").write_bytes(paths[3].read_bytes())
    [node] = store.open(tmp_path / "t").nodes().to_pylist()
    cuts = quantiles(range(100), n=100, method="inclusive")
    assert node["count"] == 100
    assert [node[name] for name in ("p50_s", "p95_s", "p99_s")] == pytest.approx([cuts[49], cuts[94], cuts[98]])


def test_attribute_values_that_hardly_repeat(tmp_path: Path) -> None:
    """Values go into a dictionary or not, file by file, as is smaller: it makes no difference to what is found."""
    now = pa.scalar(START, pa.timestamp("ns", "UTC"))
    for number, different in enumerate((1, 1000)):
        rows = [
            {
                "Timestamp": now, "TraceId": "a", "SpanId": f"{number}-{at}", "SpanName": "node n",
                "SpanAttributes": [(names.NODE_NAME, "n"), (names.PIPELINE_RUN_ID, f"r{at % different}")],
            }
            for at in range(1000)
        ]  # fmt: skip
        path = tmp_path / f"spans/date=2026-01-01/{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_parquet(pa.Table.from_pylist(rows, SCHEMAS["spans"]).to_batches()))
    opened = store.open(tmp_path)
    assert opened.nodes()["count"].to_pylist() == [2000]
    assert len(opened.spans(run="r7", columns=["SpanId"])) == 1
    assert len(opened.executions(run="r0")) == 1001


@pytest.mark.stack
def test_a_directory_on_s3(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but what lives: runs, tables, logs, compaction; and errors without credentials."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    query = f"endpoint_override=http://{host}:{port}&scheme=http&region=us-east-1&allow_delayed_open=true"
    try:
        uri = f"s3://key:hidden@looked-at/prefix?{query}"
        filesystem, _ = FileSystem.from_uri(f"s3://key:hidden@looked-at/?{query}&allow_bucket_creation=true")
        filesystem.create_dir("looked-at")  # moto keeps the buckets of other tests
        with pytest.raises(StoreError, match="no telemetry directory 's3://looked-at/prefix'"):
            store.open(uri)
        for path in (path for path in directory.rglob("*") if path.is_file() and path.stat().st_size):
            with filesystem.open_output_stream(f"looked-at/prefix/{path.relative_to(directory).as_posix()}") as stream:
                stream.write(path.read_bytes())
        remote, local = store.open(uri), store.open(directory)
        assert remote.runs().equals(local.runs())
        assert remote.run("run-3") == local.run("run-3")
        assert remote.nodes().equals(local.nodes())
        assert list(remote.records(level="error")) == list(local.records(level="error")) != []
        assert (remote.active(), remote.files()) == ((), ())
        with pytest.raises(StoreError, match="cannot be followed"):
            remote.follow()
        assert len(remote.compact(age_seconds=-60).merged) % 2 == 0
        assert remote.runs().equals(local.runs())
    finally:
        server.stop()
