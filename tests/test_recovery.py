"""Recovery: what processes that died had not delivered is brought back, once. The processes here are really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from opentelemetry.sdk.trace import ReadableSpan

from otel_odibi import liveness, recovery, store
from otel_odibi.errors import StoreError
from otel_odibi.exporters.jsonl import JsonlSink, files, read_lines
from otel_odibi.recovery import Recovered, recover

PREAMBLE = """
import os, signal, sys, threading, time
from contextlib import suppress
import otel_odibi as oo
from otel_odibi import telemetry

def start(otlp=False, **settings):
    made = telemetry.Liveness
    telemetry.Liveness = lambda *args, **options: made(*args, **{**options, "otlp": otlp})
    return oo.configure(service_name="flights", directory=sys.argv[1], set_global=False, **settings)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def wait():
    print("here", flush=True)
    sys.stdin.read()

def work(dying):
    with oo.pipeline("daily", attributes={"day": "2026-01-31"}) as run:
        with oo.node("read", layer="ingest", engine="pandas") as node:
            node.output(rows=10, bytes=80)
            node.set(source="s3")
            node.cache(hit=False)
        with oo.node("join", depends_on=["read"]) as node:
            node.input(rows=10)
            oo.get_logger().info("joining", rows=3)
        with suppress(ValueError), oo.node("retried") as node:
            for _ in range(2):
                with node.attempt():
                    raise ValueError("bad hour")
        run.skip("notify", "nothing new")
        with oo.pipeline("inner"), oo.node("publish"):
            dying()
"""
NAMES = ["read", "join", "retried", "notify"]


def program(code: str, directory: Path, *arguments: Path) -> list[str]:
    return [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), str(directory), *map(str, arguments)]


def killed(directory: Path, code: str = "start()\nwork(die)") -> None:
    """Run a program until it kills itself."""
    assert subprocess.run(program(code, directory), timeout=60).returncode == -signal.SIGKILL


def beside(directory: Path, code: str, check: Callable[[], None]) -> None:
    """Check something while a program waits, then kill it."""
    command = program(code, directory)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        try:
            check()
        finally:
            process.kill()


def rows(directory: Path) -> list[dict[str, Any]]:
    """All spans in Parquet, duplicates too. Raises for a torn file."""
    return [row for path in directory.glob("spans/*/[!.]*.parquet") for row in pq.read_table(path).to_pylist()]


def records(directory: Path) -> list[dict[str, Any]]:
    """All log records; a kill in the midst of a write leaves a line that is none."""
    found: list[dict[str, Any]] = []
    for path in files(directory / "logs"):
        for line in read_lines(path):
            with suppress(orjson.JSONDecodeError):
                found.append(orjson.loads(line))
    return found


def names(found: tuple[dict[str, Any], ...]) -> list[str]:
    return [line.get("node_name") or line["pipeline"] for line in found]


def write_state(directory: Path, process: str = "0badcafe", **about: Any) -> Path:
    """Write the state file of a process of this host that is no more."""
    path = directory / "state" / f"flights.4711-{process}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {**liveness._here(), "service": "flights", "started_unix_nano": time.time_ns(), "otlp": True}
    path.write_bytes(orjson.dumps({**told, "heartbeat_unix_nano": time.time_ns(), **about}))
    return path


def line(kind: str, number: int = 1, **fields: Any) -> dict[str, Any]:
    """Return a line of a node, as the log writer has it."""
    ids = {"trace_id": f"{7:032x}", "span_id": f"{number:016x}", "time_unix_nano": time.time_ns(), "trace_flags": 1}
    own = {"process": "0badcafe"} if kind == "node_start" else {"status": "success", "attempt": 1}
    return {"event_type": kind, "service": "flights", "node_name": f"n{number}", **ids, **own, **fields}


def ended(*numbers: int, **fields: Any) -> list[dict[str, Any]]:
    return [line(kind, number, **fields) for number in numbers for kind in ("node_start", "node_complete")]


def write_lines(directory: Path, *lines: dict[str, Any], torn: bytes = b"") -> None:
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    with open(directory / "logs" / "flights.jsonl", "ab") as file:
        file.writelines([*(orjson.dumps(line) + b"\n" for line in lines), torn])


# --- what comes back -------------------------------------------------------------------------------------------------


def test_finished_nodes_come_back_as_they_were(tmp_path: Path) -> None:
    """Rebuilt spans have all that those of a process that ended well have, but what no log line tells."""
    killed(tmp_path / "dead")
    subprocess.run(program("with start():\n    work(int)", tmp_path / "well"), check=True, timeout=60)
    recover(tmp_path / "dead")
    unknown = {"thread.id", "thread.name", "odibi.node.memory.rss", "odibi.pipeline.run.id", "service.instance.id"}
    found: dict[str, list[Any]] = {f"node {name}": [] for name in NAMES}
    for row in [*rows(tmp_path / "dead"), *rows(tmp_path / "well")]:
        told = {**dict(row["SpanAttributes"]), **dict(row["ResourceAttributes"])}
        events = [{**dict(event["Attributes"]), "exception.stacktrace": ""} for event in row["Events"]]
        kept = [row[key] for key in ("SpanKind", "ServiceName", "ScopeName", "StatusCode", "StatusMessage")]
        known = {key: value for key, value in told.items() if key not in unknown}
        found.setdefault(row["SpanName"], []).append([known, events, len(row["Links"]), *kept])
    for name in NAMES:
        dead, well = found[f"node {name}"]
        assert dead == well


def test_what_was_under_way_ends_as_lost(tmp_path: Path) -> None:
    """The dying node and its runs are named, in the result, in the log, and in the store, at the time last heard of."""
    killed(tmp_path)
    found = recover(tmp_path)
    assert (names(found.nodes), names(found.runs), found.files) == (["publish"], ["inner", "daily"], ())
    assert found.spans == len(rows(tmp_path)) == 7
    daily = next(run for run in store.open(tmp_path).summaries() if run.pipeline == "daily")
    assert (daily.outcome, daily.failure.message if daily.failure else "") == ("lost", "its process is gone")
    outcomes = {node.name: node.outcome for node in store.open(tmp_path).run(daily.run_id).nodes}
    lost = {"inner": "lost", "publish": "lost"}
    assert outcomes == {"read": "success", "join": "success", "retried": "failure", "notify": "skipped", **lost}
    closed = [record for record in records(tmp_path) if record.get("status") == "lost"]
    assert [record["event_type"] for record in closed] == ["node_failed", *["pipeline_complete"] * 2]
    assert (closed[-1]["success_count"], closed[-1]["failed_count"]) == (2, 1)
    last = max(record["time_unix_nano"] for record in records(tmp_path) if record not in closed)
    assert {record["time_unix_nano"] for record in closed} == {last, daily.start_ns + daily.duration_ns}
    assert recover(tmp_path) == Recovered((), (), 0, ())
    assert not list(tmp_path.glob("state/*"))


@pytest.mark.parametrize(("code", "before"), [("t.flush()", 50), ("t._sinks[0].flush()", 0)])
def test_spans_come_back_once_from_all_segments(tmp_path: Path, code: str, before: int) -> None:
    """What is in Parquet already is not written again; what is not is read from compressed segments too."""
    killed(
        tmp_path,
        f"""
        t = start(log_max_bytes=5_000)
        for number in range(50):
            with oo.node(f"n{{number}}"):
                pass
        {code}
        with oo.node("last"):
            die()
        """,
    )
    assert len(rows(tmp_path)) == before
    assert list(tmp_path.glob("logs/*.gz"))
    assert recover(tmp_path).spans == 51 - before
    expected = {f"node n{number}": 1 for number in range(50)} | {"node last": 1}
    assert Counter(row["SpanName"] for row in rows(tmp_path)) == expected


@pytest.mark.parametrize(("beat", "line_after", "heard"), [(3, 5, 5), (9, 5, 9)])
def test_a_user_line_or_a_heartbeat_was_last_heard(tmp_path: Path, beat: int, line_after: int, heard: int) -> None:
    """Whichever is later is when a lost node ends."""
    begun = line("node_start")
    write_state(tmp_path, heartbeat_unix_nano=begun["time_unix_nano"] + beat)
    write_lines(tmp_path, begun, line("log", time_unix_nano=begun["time_unix_nano"] + line_after))
    assert recover(tmp_path).nodes[0]["duration_ms"] == heard / 1e6


# --- what is left alone ----------------------------------------------------------------------------------------------


def test_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    """Not until it is gone are its runs closed; a child that it forked dies for itself."""

    def check() -> None:
        found = recover(tmp_path)
        assert (names(found.nodes), found.runs, found.spans) == (["in_child"], (), 1)
        assert len(list(tmp_path.glob("state/*"))) == 1

    forking = "start()\nif not os.fork():\n    with oo.node('in_child'):\n        die()\nos.wait()\n"
    beside(tmp_path, forking + "work(wait)", check)
    assert names(recover(tmp_path).nodes) == ["publish"]


def test_another_host_is_given_a_minute(tmp_path: Path) -> None:
    """Where a free lock tells little, the heartbeat does; so too for a state file that tells nothing at all."""
    path = write_state(tmp_path, host="elsewhere")
    write_lines(tmp_path, *ended(1, 2), torn=b'{"event_type":"node_start","span_')
    assert recover(tmp_path).spans == 0
    assert liveness.lives_elsewhere(path)
    path.write_bytes(b"")
    assert recover(tmp_path).spans == 0
    assert recover(tmp_path, clock=lambda: time.time_ns() + 61 * 10**9).spans == 2


def test_other_lines_are_left_alone(tmp_path: Path) -> None:
    """Those of other processes, of no process, not sampled, or written by hand; torn and odd ones too."""
    path = write_state(tmp_path, resource={"service.name": "flights", "team": "sky"})
    path.write_bytes(path.read_bytes()[:-1] + b',\n"heartbeat_unix_na')
    start = line("node_start", 5)
    odd = [{**start, key: value} for key in (*start, "metadata", "links") for value in (None, [], -1, 2**63)]
    others = [*ended(1, process="deadbeef"), line("node_start", 2, process=""), *ended(3, trace_flags=0)]
    write_lines(tmp_path, *others, *odd, *ended(5, status="failed"), torn=b'[]\n1\n{"event_type":[]}\n{"event\n')
    write_lines(tmp_path, line("node_start", 4), line("node_complete", 4, logger="app"))
    assert names(recover(tmp_path).nodes) == ["n4"]
    assert {row["SpanName"] for row in rows(tmp_path)} == {"node n5", "node n4"}
    assert dict(rows(tmp_path)[0]["ResourceAttributes"])["team"] == "sky"


# --- faults ----------------------------------------------------------------------------------------------------------


def test_recoveries_at_once_do_it_once(tmp_path: Path) -> None:
    """Eight recoveries of twenty processes bring back each span, and close each node, once."""
    for number in range(20):
        process = f"{number:08x}"
        write_state(tmp_path, process)
        write_lines(tmp_path, *ended(*range(number * 10 + 1, number * 10 + 11), process=process))
        write_lines(tmp_path, line("node_start", 1000 + number, process=process))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(recover, [tmp_path] * 8))
    assert set(Counter(row["SpanId"] for row in rows(tmp_path)).values()) == {1}
    assert sum(one.spans for one in found) == len(rows(tmp_path)) == 220
    assert sum(len(one.nodes) for one in found) == 20 == sum(r.get("status") == "lost" for r in records(tmp_path))


class Crash(BaseException):
    """What a kill is to the code it hits."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("step", ["JsonlSink.write", "_Dead._flush", "os.replace", "append_ids", "Path.unlink"])
def test_a_recovery_that_dies_is_made_good_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, nth: int, after: bool
) -> None:
    """Whatever the step it dies before or after: once in the store and in the log, at most a batch twice by OTLP."""
    monkeypatch.setattr(recovery, "_SENT", 4)
    monkeypatch.setattr(recovery, "_BATCH", 8)
    write_state(tmp_path)
    write_lines(tmp_path, *ended(*range(1, 11)), line("node_start", 11), line("node_start", 12))
    sent: list[ReadableSpan] = []
    owner, calls = eval(step.rpartition(".")[0] or "recovery", {**vars(recovery), "recovery": recovery, "os": os}), 0
    name = step.rpartition(".")[2]
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            raise Crash
        result = real(*args, **kwargs)
        if calls == nth:
            raise Crash
        return result

    with monkeypatch.context() as patched, suppress(Crash):
        patched.setattr(owner, name, dying)
        recover(tmp_path, spool=sent.extend)
    recover(tmp_path, spool=sent.extend)
    assert Counter(row["SpanName"] for row in rows(tmp_path)) == {f"node n{number}": 1 for number in range(1, 13)}
    assert Counter(r["node_name"] for r in records(tmp_path) if r.get("status") == "lost") == {"n11": 1, "n12": 1}
    assert len({span.name for span in sent}) == 12
    assert len(sent) <= 16
    assert not list(tmp_path.glob("state/*.json"))


def test_what_cannot_be_handed_over_is_kept(tmp_path: Path) -> None:
    """A spool that raises or says False, a store that cannot be written: named with the reason, and made good later."""
    path, refusals = write_state(tmp_path), [lambda spans: 1 / 0, lambda spans: False]
    liveness.append_ids(path, [1, 2])
    with open(path.with_suffix(".acked"), "ab") as file:
        file.write(b"\3\0\0")
    write_lines(tmp_path, *ended(1, 2, 3))
    (tmp_path / "spans").write_text("in the way")
    assert str(path) in recover(tmp_path).files[0]
    (tmp_path / "spans").unlink()
    for refuse in refusals:
        assert str(path) in recover(tmp_path, spool=refuse).files[0]
    sent: list[ReadableSpan] = []
    assert recover(tmp_path, spool=sent.extend).files == ()
    assert ([span.name for span in sent], len(rows(tmp_path))) == (["node n3"], 3)
    write_state(tmp_path, otlp=False)
    assert recover(tmp_path, spool=sent.extend) == Recovered((), (), 0, ())
    assert len(sent) == 1


def test_spans_may_be_kept_elsewhere(tmp_path: Path) -> None:
    """`parquet` names where, as a path or URI, and what is there already counts."""
    write_lines(tmp_path, *ended(1))
    for where in ((tmp_path / "else where").as_uri(), tmp_path / "else where"):
        write_state(tmp_path)
        recover(tmp_path, parquet=where)
    assert (len(rows(tmp_path / "else where")), len(rows(tmp_path))) == (1, 0)


def test_only_a_missing_directory_raises(tmp_path: Path) -> None:
    """Foreign files among the state files are passed over."""
    with pytest.raises(StoreError, match="no telemetry directory"):
        recover(tmp_path / "nowhere")
    write_state(tmp_path).with_name("notes.json").write_text("{}")
    (tmp_path / "state" / "folder.1-00000000.json").mkdir()
    assert recover(tmp_path).files == ()


def test_durable_lines_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `fsync` each line does, and the name of the file; where it fails the line counts as dropped."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    dropped: list[str] = []
    with closing(JsonlSink(tmp_path, "a", fsync=True, on_drop=lambda reason, count: dropped.append(reason))) as sink:
        assert sink.write(b"{}\n")
        assert len(synced) == 2
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
        assert not sink.write(b"{}\n")
    assert dropped == ["disk_full"]
