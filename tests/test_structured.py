"""`StructuredLogger`: what a line holds, that every line is whole and can be found again, and what cannot break it."""

from __future__ import annotations

import datetime
import gc
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import otel_odibi as oo
from otel_odibi.clean import DEFAULT
from otel_odibi.errors import SettingError
from otel_odibi.exporters.jsonl import JsonlSink, read_lines
from otel_odibi.logs import LogWriter
from otel_odibi.structured import LogLevel, StructuredLogger
from otel_odibi.testing import Capture


@pytest.fixture
def logger(tmp_path: Path) -> StructuredLogger:
    return StructuredLogger("flights", log_dir=tmp_path)


def lines(logger: StructuredLogger) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logger.log_file.read_text(encoding="utf-8").splitlines()]


def last(logger: StructuredLogger) -> dict[str, Any]:
    return lines(logger)[-1]


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_there_at_once(tmp_path: Path) -> None:
    """It is in `log_dir`, which is made, starts with the name and ends in .jsonl."""
    logger = StructuredLogger("my_pipeline", log_dir=str(tmp_path / "new" / "logs"))
    assert logger.log_file.exists()
    assert logger.log_file.parent == tmp_path / "new" / "logs"
    assert logger.log_file.name.startswith("my_pipeline_")
    assert logger.log_file.suffix == ".jsonl"


def test_loggers_of_one_name_share_nothing(tmp_path: Path) -> None:
    """Ten that are started within the same second have ten files and read back their own lines alone."""
    loggers = [StructuredLogger("flights", log_dir=tmp_path) for _ in range(10)]
    for number, logger in enumerate(loggers):
        logger.log("info", "mine", "a line", number=number)
    assert len({logger.log_file for logger in loggers}) == 10
    assert [[line["number"] for line in logger.query_logs()] for logger in loggers] == [[n] for n in range(10)]


@pytest.mark.parametrize("name", ["a/b", "../up", "", "größe", ".hidden", "x" * 300, "con", "a\nb", 7])
def test_any_name_makes_a_file_in_the_directory(tmp_path: Path, name: Any) -> None:
    """What a file name cannot hold is percent-encoded; the lines have the name as it is."""
    logger = StructuredLogger(name, log_dir=tmp_path)
    logger.log("info", "x", "there")
    assert logger.log_file.parent == tmp_path
    assert not logger.log_file.name.startswith(".")
    assert logger.query_logs()[0]["logger"] == str(name)


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf"), "100", None])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size: Any) -> None:
    """The error names the argument."""
    with pytest.raises(SettingError, match="max_file_size_mb"):
        StructuredLogger("flights", log_dir=tmp_path, max_file_size_mb=size)


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """A file is in its place, or the path cannot be one."""
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", "bad\0path"):
        with pytest.raises(SettingError, match="log_dir"):
            StructuredLogger("flights", log_dir=directory)


def test_a_logger_that_is_gone_has_closed_its_file(tmp_path: Path) -> None:
    """Nobody has to close it; its file can be locked by others afterwards."""

    def open_files() -> int:
        return len([fd for fd in os.listdir("/proc/self/fd") if _target(fd).startswith(str(tmp_path))])

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    loggers = [StructuredLogger("flights", log_dir=tmp_path) for _ in range(3)]
    assert open_files() == 3
    loggers.clear()
    gc.collect()
    assert open_files() == 0


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


# --- what the lines hold ---------------------------------------------------------------------------------------------

CALLS: list[tuple[Callable[[StructuredLogger], None], dict[str, Any]]] = [
    (
        lambda log: log.log_node_start("read", "ingest", engine="spark", metadata={"a": 1}),
        {"event_type": "node_start", "level": "info", "node_name": "read", "layer": "ingest", "engine": "spark",
         "status": "running", "metadata": {"a": 1}},
    ),
    (lambda log: log.log_node_start("read", "ingest"), {"engine": "pandas"}),
    (
        lambda log: log.log_node_complete("read", duration_ms=125.5, rows=1000, cache_hit=True),
        {"event_type": "node_complete", "level": "info", "node_name": "read", "status": "success",
         "duration_ms": 125.5, "row_count": 1000, "cache_hit": True},
    ),
    (lambda log: log.log_node_complete("read", 1.0), {"cache_hit": False}),
    (
        lambda log: log.log_node_failed("read", "ValueError: bad", duration_ms=50.0, layer="ingest"),
        {"event_type": "node_failed", "level": "error", "node_name": "read", "layer": "ingest", "status": "failed",
         "error": "ValueError: bad", "duration_ms": 50.0, "message": "node read failed: ValueError: bad"},
    ),
    (
        lambda log: log.log_node_failed("read", KeyError("delay")),
        {"error": "'delay'", "error_type": "KeyError"},
    ),
    (
        lambda log: log.log_error("scheduler", "no workers", layer="ops"),
        {"event_type": "error", "level": "error", "node_name": "scheduler", "layer": "ops", "error": "no workers"},
    ),
    (
        lambda log: log.log_cache_hit("join", "3fa9", metadata={"store": "disk"}),
        {"event_type": "cache_hit", "level": "info", "node_name": "join", "cache_hit": True, "cache_key": "3fa9",
         "metadata": {"store": "disk", "cache_key": "3fa9"}},
    ),
    (
        lambda log: log.log_cache_miss("join", "3fa9"),
        {"event_type": "cache_miss", "level": "debug", "node_name": "join", "cache_hit": False},
    ),
    (
        lambda log: log.log_pipeline_start("flights"),
        {"event_type": "pipeline_start", "level": "info", "pipeline": "flights", "status": "running",
         "metadata": {"pipeline_name": "flights"}},
    ),
    (
        lambda log: log.log_pipeline_complete("flights", 5000.0, success_count=10, failed_count=0),
        {"event_type": "pipeline_complete", "level": "info", "pipeline": "flights", "status": "success",
         "duration_ms": 5000.0, "success_count": 10, "failed_count": 0},
    ),
    (
        lambda log: log.log_pipeline_complete("flights", 5000.0, 9, 1),
        {"status": "partial_failure", "level": "warning",
         "metadata": {"pipeline_name": "flights", "success_count": 9, "failed_count": 1}},
    ),
    (
        lambda log: log.log_checkpoint_created("c-7", 3, metadata={"path": "x"}),
        {"event_type": "checkpoint_created", "level": "info", "checkpoint_id": "c-7", "nodes_completed": 3,
         "metadata": {"path": "x", "checkpoint_id": "c-7", "nodes_completed": 3}},
    ),
    (
        lambda log: log.log(LogLevel.CRITICAL, "my_event", "hello", share=0.21),
        {"event_type": "my_event", "level": "critical", "message": "hello", "share": 0.21},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "expected"), CALLS)
def test_what_each_method_writes(logger: StructuredLogger, call: Any, expected: dict[str, Any]) -> None:
    """The line is in the file when the call returns."""
    call(logger)
    line = last(logger)
    assert {key: line.get(key) for key in expected} == expected
    assert line["memory_mb"] > 0


def test_times_are_utc(logger: StructuredLogger) -> None:
    """RFC 3339 with a Z, so no reader has to guess the zone."""
    logger.log("info", "x", "now")
    written = datetime.datetime.fromisoformat(last(logger)["timestamp"].replace("Z", "+00:00"))
    assert abs(datetime.datetime.now(datetime.timezone.utc) - written) < datetime.timedelta(seconds=30)


def test_the_user_is_on_every_line(tmp_path: Path) -> None:
    """Where one was given; a line's own wins."""
    logger = StructuredLogger("flights", log_dir=tmp_path, user="henry")
    logger.log_node_start("read", "ingest")
    logger.log("info", "x", "y", user="ann")
    assert [line["user"] for line in lines(logger)] == ["henry", "ann"]


def test_lines_carry_what_is_under_way(odibi_capture: Capture, logger: StructuredLogger) -> None:
    """Trace, run and node of where they are written; a line about another node has only that one's own layer."""
    with oo.pipeline("nightly") as run, oo.node("join", layer="transform", engine="spark"):
        logger.log("info", "x", "inside")
        logger.log_node_complete("other", 1.0)
        logger.log_pipeline_start("sub")
    inside, other, sub = lines(logger)
    assert inside["trace_id"] == other["trace_id"] == run.trace_id
    assert (inside["pipeline"], inside["run_id"], inside["node_name"]) == ("nightly", "run-1", "join")
    assert (inside["layer"], inside["engine"]) == ("transform", "spark")
    assert (other["pipeline"], other["node_name"], other.get("layer"), other.get("engine")) == (
        "nightly", "other", None, None,
    )  # fmt: skip
    assert (sub["pipeline"], sub.get("run_id")) == ("sub", None)


# --- what cannot break it --------------------------------------------------------------------------------------------


class Rude:
    def __str__(self) -> str:
        raise RuntimeError("no text of me")


def test_odd_values_become_lines(logger: StructuredLogger) -> None:
    """Datetimes, unknown fields, integer keys, NaN, circles, bytes: nothing raises, and the next line is whole."""
    circle: list[Any] = []
    circle.append(circle)
    odd = {"when": datetime.datetime(2026, 1, 1), "nan": float("nan"), "circle": circle, "bytes": b"\xff", 7: Rude()}
    logger.log_node_start("read", "ingest", metadata=odd)
    logger.log("info", "x", "y", some_unknown_field=1, value=Rude(), number=float("inf"), timestamp="mine")
    logger.log_cache_hit(7, 12345)  # type: ignore[arg-type]
    logger.log_cache_miss("join", Rude(), metadata=["no", "map"])  # type: ignore[arg-type]
    logger.log_node_failed(Rude(), Rude())  # type: ignore[arg-type]
    logger.log_pipeline_complete("p", "long", None, "some")  # type: ignore[arg-type]
    logger.log(Rude(), Rude(), Rude())  # type: ignore[arg-type]
    logger.log_node_start("next", "ingest")
    found = lines(logger)
    assert [line["event_type"] for line in found[:3]] == ["node_start", "x", "cache_hit"]
    assert (found[0]["metadata"]["when"], found[0]["metadata"]["nan"]) == ("2026-01-01T00:00:00", None)
    assert (found[1]["some_unknown_field"], found[1]["number"], found[1]["timestamp_"]) == (1, None, "mine")
    assert (found[2]["node_name"], found[2]["cache_key"]) == ("7", "12345")
    assert found[-1]["node_name"] == "next"
    assert len(found) == 8
    assert not logger.dropped


@settings(max_examples=25, deadline=None)
@given(
    fields=st.dictionaries(
        st.text(), st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists)
    )
)
def test_any_fields_make_one_valid_line(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> None:
    """One line each, valid JSON, without constants that JSON has not."""
    logger = StructuredLogger("any", log_dir=tmp_path_factory.mktemp("logs"))
    given_by_name = {
        key: value for key, value in fields.items() if key not in ("self", "level", "event_type", "message")
    }
    logger.log(LogLevel.INFO, "x", "y", **given_by_name)
    (line,) = logger.log_file.read_bytes().splitlines()

    def no_constant(text: str) -> None:
        raise AssertionError(text)

    assert json.loads(line, parse_constant=no_constant)["message"] == "y"


def test_secrets_are_redacted(logger: StructuredLogger) -> None:
    """By the name of a field, however deep, and by their shape in texts."""
    logger.log_error("db", "cannot reach postgres://ann:hunter2@db/flights", metadata={"conn": {"password": "hunter2"}})
    logger.log("info", "x", "token=hunter2", api_key="hunter2")
    assert "hunter2" not in logger.log_file.read_text()
    assert "[redacted]" in logger.log_file.read_text()


def test_what_cannot_be_written_is_counted_and_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Here the sink is closed; the caller hears nothing of it."""
    logger = StructuredLogger("closed", log_dir=tmp_path)
    assert isinstance(logger._sink, JsonlSink)
    logger._sink.close()
    with caplog.at_level(logging.WARNING, logger="otel_odibi"):
        logger.log_node_start("read", "ingest")
        logger.log_node_start("read", "ingest")
    assert logger.dropped == {"closed": 2}
    assert [r.getMessage() for r in caplog.records] == [
        f"lines of the log {logger.log_file.stem} could not be written: closed"
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_writes_too(logger: StructuredLogger) -> None:
    """To a file of its own, which the parent reads back with the rest."""
    logger.log("info", "x", "parent")
    child = os.fork()
    if child == 0:
        logger.log("info", "x", "child")
        os._exit(0)
    os.waitpid(child, 0)
    assert [line["message"] for line in logger.query_logs()] == ["parent", "child"]


# --- reading back ----------------------------------------------------------------------------------------------------


def rotated(tmp_path: Path, count: int) -> StructuredLogger:
    """Return a logger whose lines fill many segments within one second, some of them compressed."""
    logger = StructuredLogger("flights", log_dir=tmp_path, max_file_size_mb=0.002)
    for number in range(count):
        logger.log(
            "error" if number % 2 else "info", f"event_{number % 3}", "x" * 300, node_name=f"n{number % 5}", n=number
        )
    return logger


def test_rotation_loses_and_overwrites_nothing(tmp_path: Path) -> None:
    """However often it happens in one second: segments are numbered, and their sizes stay below the limit."""
    logger = rotated(tmp_path, 60)
    assert len(list(tmp_path.glob("*.jsonl*"))) > 5
    assert [line["n"] for line in logger.query_logs(limit=1_000)] == list(range(60))
    assert logger.log_file.stat().st_size <= 0.002 * 2**20


def test_compressed_segments_are_read_too(tmp_path: Path) -> None:
    """As compression goes on in the background, some are compressed and some are not."""
    logger = rotated(tmp_path, 40)
    assert isinstance(logger._sink, JsonlSink)
    logger._sink.flush()
    assert list(tmp_path.glob("*.jsonl.gz"))
    assert [line["n"] for line in logger.query_logs(limit=1_000)] == list(range(40))


def test_a_query_gives_the_newest_matches_oldest_first(tmp_path: Path) -> None:
    """Across all segments, by type, node and level, alone and together."""
    logger = rotated(tmp_path, 60)
    assert [line["n"] for line in logger.query_logs(limit=3)] == [57, 58, 59]
    assert [line["n"] for line in logger.query_logs(event_type="event_0", limit=2)] == [54, 57]
    assert [line["n"] for line in logger.query_logs(node_name="n4", limit=2)] == [54, 59]
    assert [line["n"] for line in logger.query_logs(level=LogLevel.ERROR, limit=2)] == [57, 59]
    assert [line["n"] for line in logger.query_logs("event_1", "n1", LogLevel.ERROR)] == [1, 31]
    assert logger.query_logs(level="ERROR", limit=1)[0]["n"] == 59
    assert logger.query_logs(limit=0) == logger.query_logs(limit=-1) == []
    assert logger.query_logs(node_name="nobody") == []
    assert len(logger.query_logs()) == 60


def test_old_segments_are_not_read_when_the_newest_lines_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment last written to long before the oldest match holds nothing newer."""
    from otel_odibi.exporters import lines as reading

    logger = rotated(tmp_path, 20)
    assert isinstance(logger._sink, JsonlSink)
    logger._sink.flush()
    for path in tmp_path.glob("*.jsonl.gz"):
        os.utime(path, (0, 0))
    read: list[Path] = []
    monkeypatch.setattr(reading, "read_lines", lambda path: read.append(path) or read_lines(path))  # type: ignore[func-returns-value]
    assert len(logger.query_logs(limit=1)) == 1
    assert read == [logger.log_file]


def test_a_query_looks_at_fields_not_at_text(logger: StructuredLogger) -> None:
    """What looks like a match inside another field is none; a name with secrets is found by what became of it."""
    logger.log("info", "x", "y", metadata={"event_type": "z", "node_name": 'quo"te'})
    logger.log("info", "z", "y", node_name='quo"te')
    logger.log_node_start("load password=hunter2", "ingest")
    assert [line["event_type"] for line in logger.query_logs(event_type="z")] == ["z"]
    assert len(logger.query_logs(node_name='quo"te')) == 1
    assert len(logger.query_logs(node_name="load password=hunter2")) == 1


def test_the_summary_counts_everything(tmp_path: Path) -> None:
    """By level and type, over all segments; the errors are the last ten, newest last."""
    logger = rotated(tmp_path, 60)
    logger.log("critical", "crash", "boom", node_name="n9", error="out of memory")
    summary = logger.get_summary()
    assert summary["log_file"] == str(logger.log_file)
    assert summary["total_entries"] == 61
    assert summary["by_level"] == {"info": 30, "error": 30, "critical": 1}
    assert summary["by_event_type"] == {"event_0": 20, "event_1": 20, "event_2": 20, "crash": 1}
    assert [error["node_name"] for error in summary["errors"]][-3:] == ["n2", "n4", "n9"]
    assert len(summary["errors"]) == 10
    assert summary["errors"][-1]["error"] == "out of memory"
    assert set(summary["errors"][-1]) == {"timestamp", "node_name", "error"}
    assert summary["file_size_mb"] > 0


def test_torn_and_foreign_lines_are_passed_over(logger: StructuredLogger) -> None:
    """As a crash leaves them."""
    logger.log("info", "x", "before")
    with logger.log_file.open("ab") as file:
        file.write(b'{"torn": \n["no object"]\n{"event_type":"x","time_unix_nano":"soon"}\n')
    logger.log("info", "x", "after")
    assert [line.get("message") for line in logger.query_logs()] == [None, "before", "after"]
    assert logger.get_summary()["total_entries"] == 3


# --- on a telemetry's file -------------------------------------------------------------------------------------------


def over(directory: Path, level: str) -> tuple[StructuredLogger, LogWriter]:
    sink = JsonlSink(directory, "service")

    def fail(where: str, exc: BaseException) -> None:
        raise AssertionError(where) from exc

    output = (lambda record, line: sink.write(line) and None,)
    writer = LogWriter("service", output, level=level, cleaner=DEFAULT, on_error=fail)
    return StructuredLogger.over(writer, sink, "service", user="henry"), writer


def test_a_logger_over_a_telemetrys_file_reads_all_of_it(tmp_path: Path) -> None:
    """Its own lines and those of others; its level is that of the telemetry, but a cache miss is always written."""
    logger, writer = over(tmp_path, "warning")
    writer.log("error", "by another", {})
    logger.log("info", "x", "too low")
    logger.log("warning", "x", "high enough")
    logger.log_cache_miss("join", "k")
    assert [line["message"] for line in logger.query_logs()] == [
        "by another",
        "high enough",
        "cache miss for node join",
    ]
    assert logger.log_file == tmp_path / "service.jsonl"
    assert logger.query_logs()[1]["user"] == "henry"


def test_a_logger_without_a_file_has_nothing_to_read() -> None:
    """Lines go to what outputs there are."""
    seen: list[bytes] = []
    writer = LogWriter("service", (lambda record, line: seen.append(line),), cleaner=DEFAULT, on_error=print)
    logger = StructuredLogger.over(writer, None, "service")
    logger.log_node_start("read", "ingest")
    assert len(seen) == 1
    assert logger.query_logs() == []
    assert logger.get_summary()["total_entries"] == 0
    assert logger.log_file == Path(os.devnull)
