"""The store: runs and nodes read back from a telemetry directory, and what else may lie in it."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import otel_odibi as oo
from otel_odibi import StoreError, store
from otel_odibi.store.views import Span
from otel_odibi.testing import START, Capture, capture


def record(directory: Path) -> None:
    """Record a run with what can happen in one: a nested node and pipeline, a retry, a failure, a cache hit, a skip."""
    with capture(directory=directory, service_name="orders") as captured:
        with oo.pipeline("daily") as run:
            produced = read(captured)
            with oo.node("join", layer="transform", engine="pandas", inputs=[produced], depends_on=["read"]) as node:
                node.cache(hit=True)
                node.output(rows=7, bytes=700)
                with oo.node("inner"):
                    captured.clock.advance(0.5)
            with oo.pipeline("nested"), oo.node("leaf"):
                pass
            with suppress(ValueError), oo.node("publish") as node:
                with suppress(ValueError), node.attempt():
                    captured.clock.advance(0.25)
                    raise ValueError("bad day 1")
                with node.attempt():
                    raise ValueError("bad day 2")
            run.skip("notify", "publish failed", layer="publish")
        with oo.pipeline("hourly"):
            captured.clock.advance(2)


def read(captured: Capture) -> list[int]:
    with oo.node("read", layer="ingest") as node:
        captured.clock.advance(1)
        node.output(rows=10)
    return [1, 2, 3]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    record(tmp_path)
    return tmp_path


def nodes(directory: Path, run_id: str) -> dict[str, store.NodeView]:
    return {node.name: node for node in store.open(directory).run(run_id).nodes}


# --- runs ------------------------------------------------------------------------------------------------------------


def test_runs_come_newest_first(directory: Path) -> None:
    """Newest is what ended last, so that a run comes before those inside it."""
    runs = store.open(str(directory)).summaries()
    assert [run.pipeline for run in runs] == ["hourly", "daily", "nested"]
    assert [run.run_id for run in runs] == ["run-3", "run-1", "run-2"]


def test_a_run_tells_what_its_span_tells(directory: Path) -> None:
    """Name, ids, outcome and times of a run are those of its pipeline's span, to the nanosecond."""
    run = store.open(directory).run("run-1").run
    assert run == store.RunSummary(
        pipeline="daily", run_id="run-1", service=run.service, outcome="success", trace_id=f"{1:032x}",
        span_id=f"{1:016x}", start_ns=START, duration_ns=1_750_000_000, failure=None,
    )  # fmt: skip


@pytest.mark.parametrize(("wanted", "found"), [("last", "run-3"), ("run-2", "run-2"), ("run-3", "run-3")])
def test_a_run_is_found_by_its_id(directory: Path, wanted: str, found: str) -> None:
    """A whole id is found, and so is the last run."""
    assert store.open(directory).run(wanted).run.run_id == found


def test_a_run_is_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    """The beginning of an id is enough where no other run's begins so; a whole id is, whatever others begin with it."""
    with capture(directory=tmp_path):
        for _ in range(11):
            with oo.pipeline("p"):
                pass
    opened = store.open(tmp_path)
    assert opened.run("run-10").run.run_id == "run-10"
    assert opened.run("run-1").run.run_id == "run-1"
    assert opened.run("run-11"[:6]).run.run_id == "run-11"


# --- nodes -----------------------------------------------------------------------------------------------------------


def test_nodes_come_in_the_order_in_which_they_began(directory: Path) -> None:
    """Each node is followed by those inside it, which are a level deeper."""
    found = [(node.name, node.depth) for node in store.open(directory).run("run-1").nodes]
    assert found == [("read", 0), ("join", 0), ("inner", 1), ("nested", 0), ("leaf", 1), ("publish", 0), ("notify", 0)]


def test_a_node_tells_what_its_span_tells(directory: Path) -> None:
    """Data facts, cache, memory, edges and times of a node come back as they were recorded."""
    found = nodes(directory, "run-1")
    assert found["join"] == store.NodeView(
        name="join", outcome="success", span_id=f"{3:016x}", parent_span_id=f"{1:016x}", start_ns=START + 10**9,
        duration_ns=500_000_000, layer="transform", engine="pandas", rows_in=3, rows_out=7, bytes_out=700,
        rss=100 * 2**20, cache_hit=True, depends_on=("read",), links=(found["read"].span_id,),
    )  # fmt: skip


def test_attempts_of_a_node(directory: Path) -> None:
    """A retried node has its attempts, with why each failed, and its own failure."""
    node = nodes(directory, "run-1")["publish"]
    assert [(a.number, a.outcome, a.duration_ns) for a in node.attempts] == [
        (1, "failure", 250_000_000),
        (2, "failure", 0),
    ]
    assert [a.failure and a.failure.message for a in node.attempts] == ["bad day 1", "bad day 2"]
    assert node.failure is not None
    assert (node.outcome, node.attempt) == ("failure", 2)
    assert (node.failure.type, node.failure.message) == ("ValueError", "bad day 2")
    assert "raise ValueError" in node.failure.stacktrace


def test_a_pipeline_inside_a_run_is_among_its_nodes(directory: Path) -> None:
    """It has a run id of its own, under which it can be looked at alone."""
    assert nodes(directory, "run-1")["nested"].run_id == "run-2"
    assert list(nodes(directory, "run-2")) == ["leaf"]


def test_a_skipped_node_says_why(directory: Path) -> None:
    """Outcome and reason of a node that was not run."""
    node = nodes(directory, "run-1")["notify"]
    assert (node.outcome, node.skip_reason, node.layer) == ("skipped", "publish failed", "publish")


def test_spans_of_other_libraries_are_passed_through(tmp_path: Path) -> None:
    """A node inside a span that is no node belongs to the node around that."""
    with capture(directory=tmp_path) as captured:
        foreign = captured.telemetry.tracer_provider.get_tracer("requests")
        with oo.pipeline("p"), oo.node("outer"), foreign.start_as_current_span("GET"), oo.node("inner"):
            pass
    assert [(node.name, node.depth) for node in store.open(tmp_path).run().nodes] == [("outer", 0), ("inner", 1)]


def test_a_node_whose_parent_is_lost_stays_in_its_run(tmp_path: Path) -> None:
    """A span that was dropped on its way takes nothing else with it."""
    with capture(directory=tmp_path), oo.pipeline("p"), oo.node("outer"), oo.node("inner"):
        pass
    rewrite(tmp_path, lambda row: row["SpanName"] != "node outer")
    assert [(node.name, node.depth) for node in store.open(tmp_path).run().nodes] == [("inner", 0)]


def rewrite(directory: Path, keep: Any) -> None:
    """Write the span file anew, with the rows that are to be kept."""
    [path] = directory.glob("spans/*/*.parquet")
    table = pq.read_table(path)
    rows = [number for number, row in enumerate(table.select(["SpanName"]).to_pylist()) if keep(row)]
    pq.write_table(table.take(rows), path)


# --- what else may lie there -----------------------------------------------------------------------------------------


def test_foreign_files_are_passed_over(directory: Path) -> None:
    """Files of other kinds, files being written, and files of other folders do no harm."""
    [date] = directory.glob("spans/*")
    for name in (".half-written.parquet", "notes.txt", "x.parquet.tmp", "._part.parquet"):
        (date / name).write_bytes(b"PAR1 nonsense")
    (directory / "spans" / "x.parquet").write_bytes(b"nonsense")
    assert len(store.open(directory).summaries()) == 3


def test_a_span_in_two_files_counts_once(directory: Path) -> None:
    """As while files are being compacted."""
    [path] = directory.glob("spans/*/*.parquet")
    path.with_name("copy.parquet").write_bytes(path.read_bytes())
    assert len(store.open(directory).summaries()) == 3


def test_attributes_that_are_no_numbers_are_unknown(directory: Path) -> None:
    """Attributes are texts in the files, and anyone may have written them."""
    attributes = [("rows", "many"), ("hit", "yes"), ("list", '{"a": 1}'), ("broken", "[1"), ("deps", '["a", 1]')]
    ids = {"SpanId": "", "ParentSpanId": "", "Timestamp": 0, "Duration": 0}
    read = Span({**ids, "SpanAttributes": attributes})
    assert [read.value(key, int) for key in ("rows", "none")] == [None, None]
    assert read.value("hit", bool) is None
    assert [read.value(key, list) for key in ("list", "broken", "none")] == [None, None, None]
    assert read.value("deps", list) == ["a", 1]


def test_views_are_immutable(directory: Path) -> None:
    """What the store returns may be shared between threads."""
    view = store.open(directory).run()
    with pytest.raises(dataclasses.FrozenInstanceError):
        view.run = None  # type: ignore[misc, assignment]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_no_such_directory(tmp_path: Path) -> None:
    """The error names the directory, and what to do."""
    with pytest.raises(StoreError, match=r"no telemetry directory '.*nowhere'; run a pipeline after configure"):
        store.open(tmp_path / "nowhere")


def test_a_directory_without_runs(tmp_path: Path) -> None:
    """There are none to list, and none to be the last."""
    opened = store.open(tmp_path)
    assert opened.summaries() == ()
    assert opened.files() == ()
    with pytest.raises(StoreError, match=r"no run in .*; run a pipeline"):
        opened.run()


def test_a_run_that_is_not_there_or_not_alone(directory: Path) -> None:
    """The error names runs to choose from."""
    opened = store.open(directory)
    with pytest.raises(
        StoreError, match=r"no run begins with 'x'; choose from: last, run-3 \(hourly\), run-1 \(daily\)"
    ):
        opened.run("x")
    with pytest.raises(StoreError, match=r"several runs begin with 'run-'; choose from: last, run-3"):
        opened.run("run-")


def test_a_damaged_file_is_named_and_the_rest_is_answered(directory: Path) -> None:
    """What is under a name of ours and cannot be read is told of in one line, once, and is a file less, no error."""
    [date] = directory.glob("spans/*")
    [good] = date.glob("*.parquet")
    (date / "0-damaged.parquet").write_bytes(b"PAR1 nonsense")
    (date / "1-torn.parquet").write_bytes(good.read_bytes()[:-100])
    (date / "2-empty.parquet").write_bytes(b"")
    pq.write_table(pa.table({"SpanName": [1]}), date / "3-foreign.parquet")
    told: list[str] = []
    opened = store.open(directory, on_problem=told.append)
    for _ in range(2):
        assert len(opened.summaries()) == 3
        assert len(opened.run("run-1").nodes) == 7
    assert [text.partition(": ")[0] for text in sorted(told)] == [
        f"spans/{date.name}/{name}.parquet" for name in ("0-damaged", "1-torn", "2-empty", "3-foreign")
    ]
    assert "it has no column SpanId, Timestamp, TraceId" in max(told)
    assert not any("\n" in text for text in told)


def test_problems_are_logged_unless_somebody_listens(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a warning, once a file."""
    [date] = directory.glob("spans/*")
    (date / "damaged.parquet").write_bytes(b"nonsense")
    opened = store.open(directory)
    assert len(opened.summaries()) == len(opened.summaries()) == 3
    [warning] = caplog.records
    assert warning.getMessage().startswith(f"spans/{date.name}/damaged.parquet: ")


def test_columns_that_a_foreign_file_has_not_are_null(directory: Path) -> None:
    """As in files written by others in the same schema, with other types that mean the same."""
    [path] = directory.glob("spans/*/*.parquet")
    table = pq.read_table(path, partitioning=None).select(
        ["Timestamp", "TraceId", "SpanId", "SpanName", "SpanAttributes"]
    )
    table = table.set_column(0, "Timestamp", table["Timestamp"].cast(pa.timestamp("us"), safe=False))
    pq.write_table(table, path, compression="snappy")
    opened = store.open(directory)
    assert [run.pipeline for run in opened.summaries()] == ["hourly", "nested", "daily"]  # by their beginnings
    assert nodes(directory, "run-1")["join"].rows_out == 7
    assert opened.spans(name="node join", columns=["ServiceName", "Events"]).to_pylist() == [
        {"ServiceName": None, "Events": None}
    ]
    assert opened.executions(node="join")["rows_out"].to_pylist() == [7]


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_are_listed_by_kind_with_their_records(tmp_path: Path) -> None:
    """What was written, where, how much: every format with what it counts in."""
    formats = {"span_formats": "parquet,json", "metric_formats": "parquet,json,textfile"}
    with capture(directory=tmp_path, service_name="orders", **formats), oo.pipeline("p"), oo.node("a"):
        pass
    found = {files.signal: files for files in store.open(tmp_path).files()}
    assert list(found) == [
        "logs", "spans", "spans, OTLP/JSON", "metrics", "metrics, JSON", "metrics, Prometheus",
    ]  # fmt: skip
    assert found["logs"] == store.Files("logs", "logs/orders.jsonl", 1, found["logs"].bytes, 4, "line")
    assert (found["spans"].path, found["spans"].records) == ("spans/date=*/*.parquet", 2)
    assert (found["metrics, JSON"].path, found["metrics, JSON"].records) == ("json/orders.metrics.json", None)
    assert all(
        files.bytes == sum(path.stat().st_size for path in tmp_path.glob(files.path)) for files in found.values()
    )


def test_unreadable_files_count_as_empty(directory: Path) -> None:
    """A damaged Parquet file is listed all the same."""
    [date] = directory.glob("spans/*")
    (date / "damaged.parquet").write_bytes(b"nonsense")
    spans = next(files for files in store.open(directory).files() if files.signal == "spans")
    assert (spans.files, spans.records) == (2, 11)
