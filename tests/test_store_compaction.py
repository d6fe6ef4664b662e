"""Compaction: small files into large ones while others read and write, retention by age and size; and exports."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import otel_odibi as oo
from benchmarks.query import spans as made
from otel_odibi import StoreError, store
from otel_odibi.exporters.parquet import ParquetSpanExporter
from otel_odibi.exporters.segments import acquire, release
from otel_odibi.exporters.tables import SCHEMAS
from otel_odibi.store import compaction
from otel_odibi.testing import START, capture

DAY = 86_400 * 10**9
OLD = {"age_seconds": -60}
"""No file is too young."""


def record(directory: Path, days: int = 1, runs: int = 4) -> None:
    """Leave files of many days: a few a day."""
    with capture(directory=directory, service_name="orders", parquet_rows=3) as captured:
        for _ in range(days):
            for _ in range(runs):
                with oo.pipeline("daily"), oo.node("read") as node:
                    captured.clock.advance(1)
                    node.output(rows=10)
            captured.telemetry.flush()
            captured.clock.advance(86_400)


def spans(directory: Path) -> list[Path]:
    return sorted(directory.glob("spans/*/*.parquet"))


def state(directory: Path) -> tuple[Any, ...]:
    """All that is stored, however it is distributed."""
    opened = store.open(directory)
    return opened.spans().sort_by("SpanId").to_pydict(), len(opened.metrics()), opened.nodes().to_pylist()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    record(tmp_path)
    return tmp_path


# --- merging ---------------------------------------------------------------------------------------------------------


def test_small_files_become_one(directory: Path) -> None:
    """What is stored stays the same; a second compaction finds nothing to do."""
    before, files = state(directory), spans(directory)
    done = store.open(directory).compact(**OLD)
    assert len(files) > 2
    assert {str(path.relative_to(directory)) for path in files} <= set(done.merged)
    [path] = spans(directory)
    assert str(path.relative_to(directory)) in done.made
    assert pq.read_schema(path).equals(SCHEMAS["spans"])
    assert state(directory) == before
    assert done.bytes_after < done.bytes_before
    assert done.bytes_after == sum(p.stat().st_size for p in directory.rglob("*.parquet"))
    assert not list(directory.rglob("*.merged"))
    again = store.open(directory).compact(**OLD)
    assert (again.merged, again.made, again.removed) == ((), (), ())


def test_a_dry_run_changes_nothing(directory: Path) -> None:
    """It names the files that would go."""
    record(directory, days=3)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.parquet")}
    done = store.open(directory).compact(**OLD, keep_bytes=1, dry_run=True)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*.parquet")} == before
    assert set(done.removed) == {str(path.relative_to(directory)) for path in before}
    assert (done.made, done.bytes_before) == ((), done.bytes_after)


def test_files_have_at_most_so_many_rows(directory: Path) -> None:
    """Files that are large already, half of that or more, are left alone."""
    before = state(directory)
    store.open(directory).compact(**OLD, rows=4)
    assert {pq.read_metadata(path).num_rows for path in spans(directory)} <= {2, 3, 4}
    assert state(directory) == before


def test_young_files_are_left_alone(directory: Path) -> None:
    """Their writers may be about to write more."""
    assert store.open(directory).compact(age_seconds=3600).merged == ()


def test_days_that_running_processes_write_to_are_left_alone(directory: Path) -> None:
    """That is today, and each day since the beginning of what is under way."""
    state_file = directory / "state" / "flights.1-0badcafe.json"
    state_file.parent.mkdir(exist_ok=True)
    told = {"service": "flights", "heartbeat_unix_nano": time.time_ns(), "active": [{"time_unix_nano": START}]}
    state_file.write_bytes(orjson.dumps(told))
    assert store.open(directory).compact(**OLD, keep_bytes=0).merged == ()
    state_file.write_bytes(orjson.dumps({**told, "active": []}))
    assert store.open(directory).compact(**OLD).merged != ()


def test_what_cannot_be_read_or_is_not_ours_is_left_alone(directory: Path) -> None:
    """Damaged files are told of; foreign ones, with other columns, stay as they are; the rest is merged."""
    folder = spans(directory)[0].parent
    good = spans(directory)[0].read_bytes()
    (folder / "0-damaged.parquet").write_bytes(b"nonsense")
    (folder / "1-torn.parquet").write_bytes(good[:4] + b"\0" * 3000 + good[3004:])
    pq.write_table(
        pq.read_table(spans(directory)[-1]).append_column("Mine", pa.array([1] * 2)), folder / "2-mine.parquet"
    )
    told: list[str] = []
    done = store.open(directory, told.append).compact(**OLD)
    assert {path.name for path in spans(directory)} >= {"0-damaged.parquet", "1-torn.parquet", "2-mine.parquet"}
    assert len(spans(directory)) == 4
    assert not {f"spans/{folder.name}/{name}.parquet" for name in ("0-damaged", "1-torn", "2-mine")} & set(done.merged)
    assert sorted(text.partition(": ")[0] for text in told) == [
        f"spans/{folder.name}/{name}.parquet" for name in ("0-damaged", "1-torn")
    ]


def test_two_compactions_do_not_meet(directory: Path) -> None:
    """The second is told so."""
    fd = acquire(directory / ".compaction.lock", os.O_RDWR | os.O_CREAT)
    assert fd is not None
    with pytest.raises(StoreError, match=r"another compaction of .* is at work"):
        store.open(directory).compact()
    release(fd)


@pytest.mark.parametrize("step", range(12))
def test_a_compaction_may_die_at_any_moment(directory: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Every span is there and counts once, and the next compaction makes good what is left to do."""
    before, calls = state(directory), iter(range(step + 1))

    def dying(function: Any) -> Any:
        def call(*args: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(compaction._Work, "_delete", dying(compaction._Work._delete))
        patch.setattr(compaction.Target, "write", dying(compaction.Target.write))
        with pytest.raises(KeyboardInterrupt):
            store.open(directory).compact(**OLD)
    after = state(directory)
    assert (after[0], after[2]) == (before[0], before[2])
    store.open(directory).compact(**OLD)
    assert state(directory) == before
    assert len(spans(directory)) == 1
    assert not list(directory.rglob(".*.merged"))


def test_a_note_of_somebody_else_deletes_nothing_elsewhere(directory: Path) -> None:
    """Names in it count in its own folder alone."""
    [logs] = directory.glob("logs/*.jsonl")
    folder = spans(directory)[0].parent
    told = {"made": spans(directory)[0].name, "merged": [f"../../logs/{logs.name}", str(logs)]}
    (folder / ".x.merged").write_bytes(orjson.dumps(told))
    (folder / ".y.merged").write_bytes(b"nonsense")
    store.open(directory).compact()
    assert logs.exists()


WRITER = """
import sys
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext
from otel_odibi.exporters.parquet import ParquetSpanExporter
exporter = ParquetSpanExporter(sys.argv[1], rows=1)
for line in sys.stdin:
    span = ReadableSpan("node n", SpanContext(1, int(line), False), start_time=1, end_time=2, attributes={"a": line})
    exporter.export([span])
    print(line, end="", flush=True)
"""


@pytest.mark.faults
def test_readers_and_writers_go_on_while_files_are_merged(tmp_path: Path) -> None:
    """A reader sees every span that was written before it began, each once; also when compactions are killed."""
    rounds = max(3, round(30 * float(os.environ.get("ODIBI_TEST_SCALE", "1"))))
    compact = f"from otel_odibi import store\nwhile True: store.open({str(tmp_path)!r}).compact(age_seconds=-60)"
    command, pipe = [sys.executable, "-c", WRITER, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for first in range(1, 1 + 20 * rounds, 20):
            writer.stdin.writelines(f"{number}\n" for number in range(first, first + 20))
            with subprocess.Popen([sys.executable, "-c", compact], stderr=subprocess.DEVNULL) as compactor:
                for _ in range(10):
                    written = int(writer.stdout.readline()), int(writer.stdout.readline())
                    ids = store.open(tmp_path).spans(columns=["SpanId"])["SpanId"].to_pylist()
                    assert len(ids) == len(set(ids))
                    assert {f"{number:016x}" for number in range(1, written[1] + 1)} <= set(ids)
                compactor.send_signal(signal.SIGKILL)
        writer.stdin.close()


# --- retention -------------------------------------------------------------------------------------------------------


def test_old_days_go(directory: Path) -> None:
    """And rotated log segments that are as old; active log files never do."""
    today = time.strftime("%Y-%m-%d", time.gmtime())
    new = directory / f"spans/date={today}/new.parquet"
    new.parent.mkdir()
    new.write_bytes(spans(directory)[0].read_bytes())
    segment = directory / "logs/orders.000001.jsonl.gz"
    segment.write_bytes(b"old")
    os.utime(segment, ns=(START, START))
    done = store.open(directory).compact(keep_days=7)
    assert spans(directory) == [new]
    assert [path.name for path in sorted(directory.glob("logs/*"))] == ["orders.jsonl"]
    assert "logs/orders.000001.jsonl.gz" in done.removed
    assert {path.name for path in directory.glob("spans/*")} == {f"date={today}"}  # no empty folders are left


def test_the_oldest_days_go_until_the_rest_fits(tmp_path: Path) -> None:
    """Spans and metrics of a day go together."""
    record(tmp_path, days=3)
    sizes = {path.name: sum(p.stat().st_size for p in path.iterdir()) for path in tmp_path.glob("spans/*")}
    metrics = sum(path.stat().st_size for path in tmp_path.glob("metrics/*/*/*.parquet"))
    others = sorted(sizes)[1:]
    store.open(tmp_path).compact(keep_bytes=sum(sizes[day] for day in others) + metrics)
    assert sorted(path.name for path in tmp_path.glob("spans/*")) == others


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_values_that_repeat_are_kept_once(tmp_path: Path) -> None:
    """After compaction a span takes at most 48 bytes and some for the file."""
    exporter = ParquetSpanExporter(tmp_path, rows=2_000)
    exporter.export(made(0, 20_000, random.Random(8)))
    exporter.shutdown()
    done = store.open(tmp_path).compact(**OLD)
    assert len(spans(tmp_path)) == 1
    assert done.bytes_after <= 48 * 20_000


# --- exports ---------------------------------------------------------------------------------------------------------


def exported(directory: Path, what: str, form: str = "otlp", **asked: Any) -> Iterator[dict[str, Any]]:
    out = io.BytesIO()
    store.open(directory).export(what, out, form, **asked)
    return map(json.loads, out.getvalue().splitlines())


def test_spans_as_otlp_are_what_the_exporter_would_have_written(tmp_path: Path) -> None:
    """Attributes that are known get their types back; the others are texts, as in Parquet."""
    with capture(directory=tmp_path, span_formats="parquet,json") as captured, oo.pipeline("p"):
        with oo.node("a", layer="x") as node:
            node.output(rows=3)
            node.cache(hit=True)
            node.set(mine=2.5)
        with suppress(ValueError), oo.node("b", depends_on=["a"]):
            captured.clock.advance(1)
            raise ValueError("bad")
    [path] = tmp_path.glob("otlp/*.jsonl")
    written = {span["spanId"]: span for line in path.read_text().splitlines() for span in spans_of(json.loads(line))}
    found = {span["spanId"]: span for request in exported(tmp_path, "spans") for span in spans_of(request)}
    assert found.keys() == written.keys()
    for key, span in found.items():
        for name in (
            "traceId",
            "parentSpanId",
            "flags",
            "name",
            "kind",
            "startTimeUnixNano",
            "endTimeUnixNano",
            "status",
        ):
            assert span.get(name) == written[key].get(name), name
        assert plain(span) == plain(written[key])
        assert [event["name"] for event in span.get("events", [])] == [
            e["name"] for e in written[key].get("events", [])
        ]
    assert len(list(exported(tmp_path, "spans", run="nobody"))) == 0


def spans_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        span for resource in request["resourceSpans"] for scope in resource["scopeSpans"] for span in scope["spans"]
    ]


def plain(span: dict[str, Any]) -> dict[str, Any]:
    """Attributes by key; what is a fraction becomes a text, as in Parquet."""
    found = {each["key"]: each["value"] for each in span["attributes"]}
    return {k: {"stringValue": str(v["doubleValue"])} if "doubleValue" in v else v for k, v in found.items()}


def test_logs_as_otlp(directory: Path) -> None:
    """Message, level, times and ids have their places, every other field is an attribute."""
    requests = list(exported(directory, "logs", run="run-1"))
    [resource] = requests[0]["resourceLogs"]
    logs = resource["scopeLogs"][0]["logRecords"]
    assert resource["resource"]["attributes"] == [{"key": "service.name", "value": {"stringValue": "orders"}}]
    assert [log["eventName"] for log in logs] == ["pipeline_start", "node_start", "node_complete", "pipeline_complete"]
    assert (logs[0]["timeUnixNano"], logs[0]["severityNumber"], logs[0]["severityText"]) == (str(START), 9, "INFO")
    assert logs[0]["body"] == {"stringValue": "pipeline daily started"}
    assert {"key": "row_count", "value": {"intValue": "10"}} in logs[2]["attributes"]
    assert logs[2]["traceId"] == f"{1:032x}"


@pytest.mark.parametrize("what", ["spans", "nodes", "runs", "logs", "metrics"])
def test_tables_as_csv(directory: Path, what: str) -> None:
    """With a header; maps and lists are JSON."""
    out = io.BytesIO()
    store.open(directory).export(what, out, "csv")
    rows = list(csv.DictReader(io.StringIO(out.getvalue().decode())))
    assert len(rows) > 0
    if what == "spans":
        assert json.loads(rows[0]["SpanAttributes"])["odibi.pipeline.name"] == "daily"
        assert json.loads(rows[0]["Events"]) == []


def test_exports_that_there_are_not(directory: Path) -> None:
    """The error says what there is."""
    opened = store.open(directory)
    for what, form in (("runs", "otlp"), ("spans", "xml"), ("cells", "csv")):
        with pytest.raises(StoreError, match=f"cannot export '{what}' as '{form}'; spans and logs go as otlp"):
            opened.export(what, io.BytesIO(), form)
    with pytest.raises(StoreError, match="cannot export the runs of a run"):
        opened.export("runs", io.BytesIO(), "csv", run="run-1")
