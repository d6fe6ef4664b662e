"""Log lines of a directory: by their fields, by time, over rotated segments and many processes, and as they come."""

from __future__ import annotations

import gzip
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_odibi import StoreError, store
from otel_odibi.exporters.jsonl import JsonlSink
from otel_odibi.store import lines
from otel_odibi.store.lines import LEVELS, Wanted, stamp

START = 1_767_225_600_000_000_000


def line(number: int, **fields: Any) -> dict[str, Any]:
    """The record of the second `number`."""
    return {"timestamp": stamp(START + number * 10**9) + "Z", "level": "info", "message": f"m{number}", **fields}


def write(path: Path, *records: Any) -> Path:
    """Write records as lines; bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(r if isinstance(r, bytes) else orjson.dumps(r) + b"\n" for r in records)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def messages(directory: Path, **asked: Any) -> list[str]:
    return [record["message"] for record in store.open(directory).records(**asked)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Lines of two services, in a packed segment, a plain one, and two active files."""
    logs = tmp_path / "logs"
    write(logs / "a.000001.jsonl.gz", line(1, node_name="read", level="debug"), line(2, run_id="r1", level="error"))
    write(logs / "a.000002.jsonl", line(4, event_type="node_failed", level="error", error='disk "full" at café'))
    write(logs / "a.jsonl", line(7, trace_id="t1"), line(8, level="critical", user={"id": 3}))
    write(logs / "a.4711.jsonl", line(3, node_name="read", run_id="r1"), line(6, level="warning", run_id="r10"))
    write(logs / "b.jsonl", line(5, node_name="reader"))
    return tmp_path


# --- what is found ---------------------------------------------------------------------------------------------------


def test_records_come_by_time(directory: Path) -> None:
    """Whatever files they are in; the newest first where that is asked for."""
    assert messages(directory) == [f"m{number}" for number in range(1, 9)]
    assert messages(directory, newest_first=True) == [f"m{number}" for number in range(8, 0, -1)]
    assert messages(directory, limit=2) == ["m1", "m2"]
    assert messages(directory, limit=2, newest_first=True) == ["m8", "m7"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"event": "node_failed"}, ["m4"]),
        ({"node": "read"}, ["m1", "m3"]),
        ({"run": "r1"}, ["m2", "m3"]),
        ({"trace": "t1"}, ["m7"]),
        ({"level": "critical"}, ["m8"]),
        ({"level": "error"}, ["m2", "m4", "m8"]),
        ({"level": "warning"}, ["m2", "m4", "m6", "m8"]),
        ({"level": "debug", "node": "read"}, ["m1", "m3"]),
        ({"level": "info", "node": "read"}, ["m3"]),
        ({"since_ns": START + 6 * 10**9}, ["m6", "m7", "m8"]),
        ({"text": "m5"}, ["m5"]),
        ({"text": 'disk "full" at café'}, ["m4"]),
        ({"text": "é"}, ["m4"]),
        ({"run": "r1", "level": "error", "text": "m"}, ["m2"]),
        ({"node": "nowhere"}, []),
    ],
)
def test_records_are_chosen(directory: Path, asked: dict[str, Any], found: list[str]) -> None:
    """By their fields, all of them at once; a level stands for those above it too."""
    assert messages(directory, **asked) == found
    assert messages(directory, **asked, newest_first=True) == found[::-1]


def test_a_level_that_there_is_not() -> None:
    """The error names those that there are."""
    with pytest.raises(StoreError, match="no level 'loud'; choose from debug, info, warning, error, critical"):
        Wanted(level="loud")


texts = st.one_of(
    st.sampled_from(["read", "a b", 'say "x"', "c:\\d", "x/y", "é", "\n", "error", ""]), st.text(max_size=4)
)
fields = st.fixed_dictionaries({}, optional={
    "level": st.sampled_from([*LEVELS, "odd"]), "node_name": texts, "event_type": texts, "run_id": texts,
    "user": st.one_of(texts, st.dictionaries(st.sampled_from(["level", "node_name"]), texts)),
})  # fmt: skip


@settings(max_examples=300)
@given(
    records=st.lists(fields, max_size=20), node=texts, event=texts, text=texts, level=st.sampled_from(["", *LEVELS]),
    spaced=st.booleans(), block=st.integers(1, 200), newest_first=st.booleans(),
)  # fmt: skip
def test_what_is_found_is_what_a_plain_look_at_each_line_finds(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], node: str, event: str, text: str,
    level: str, spaced: bool, block: int, newest_first: bool,
) -> None:  # fmt: skip
    """Whatever is in the lines, whoever wrote them, and wherever blocks of bytes begin and end."""
    import json

    directory = tmp_path_factory.mktemp("d")
    made = [line(number, **record) for number, record in enumerate(records)]
    whole = [json.dumps(r).encode() + b"\n" for r in made] if spaced else made
    write(directory / "logs/a.jsonl", *whole)
    levels = LEVELS[LEVELS.index(level) :] if level not in ("", "debug") else None
    expected = [
        record for record in made
        if (not node or record.get("node_name") == node) and (not event or record.get("event_type") == event)
        and (levels is None or record["level"] in levels) and orjson.dumps(text)[1:-1] in orjson.dumps(record)
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_BLOCK", block)
        opened = store.open(directory)
        found = list(opened.records(event, node, level, text=text, newest_first=newest_first))
    assert found == (expected[::-1] if newest_first else expected)


# --- what else may lie there -----------------------------------------------------------------------------------------


def test_damaged_files_are_named_and_the_rest_is_found(directory: Path) -> None:
    """A line each, once; a line that is being written is no damage."""
    logs = directory / "logs"
    whole = write(logs / "c.000001.jsonl.gz", *(line(number, pad="x" * 999) for number in range(999)))
    whole.write_bytes(whole.read_bytes()[:-50])
    write(logs / "c.000002.jsonl.gz", b"")
    (logs / "c.000003.jsonl.gz").write_bytes(b"no gzip at all")
    write(logs / "d.jsonl", line(9), b"torn {\n", b"[1]\n", b"\0\0\0\n", line(10), b'{"timestamp": "20')
    write(logs / "notes.txt", b"hello")
    (logs / "e.jsonl").mkdir()
    told: list[str] = []
    opened = store.open(directory, on_problem=told.append)
    for _ in range(2):
        assert {f"m{number}" for number in range(1, 11)} <= {record["message"] for record in opened.records()}
    assert sorted(text.partition(": ")[0] for text in told) == [
        "logs/c.000001.jsonl.gz", "logs/c.000003.jsonl.gz", "logs/d.jsonl",
    ]  # fmt: skip


@settings(max_examples=200)
@given(data=st.binary(max_size=300), packed=st.booleans(), newest_first=st.booleans())
def test_no_file_harms_its_reader(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, packed: bool, newest_first: bool
) -> None:
    """Whatever bytes there are: what comes out is a dictionary."""
    directory = tmp_path_factory.mktemp("d")
    write(directory / "logs/a.jsonl", data)
    (directory / "logs/b.000001.jsonl.gz").write_bytes(gzip.compress(data) if packed else data)
    opened = store.open(directory, on_problem=lambda text: None)
    assert all(isinstance(record, dict) for record in opened.records(newest_first=newest_first))
    assert len(opened.logs()) == len(list(opened.records()))


def test_a_last_line_without_its_end(tmp_path: Path) -> None:
    """It counts if it is a whole record."""
    write(tmp_path / "logs/a.jsonl", line(1), orjson.dumps(line(2)))
    write(tmp_path / "logs/b.jsonl", line(3), orjson.dumps(line(4))[:-1])
    assert messages(tmp_path) == ["m1", "m2", "m3"]
    assert messages(tmp_path, newest_first=True) == ["m3", "m2", "m1"]


# --- a table ---------------------------------------------------------------------------------------------------------


def test_logs_are_a_table(directory: Path) -> None:
    """The fields that lines have, in their types; what else a line has, or has otherwise, is JSON in `fields`."""
    write(directory / "logs/f.jsonl", line(9, duration_ms=3, attempt="two", rows_in=5, share=0.5))
    table = store.open(directory).logs(since_ns=START + 8 * 10**9)
    assert table.schema == lines.LOGS
    first, last = table.to_pylist()
    assert (first["level"], first["fields"]) == ("critical", '{"user":{"id":3}}')
    assert (last["duration_ms"], last["attempt"], last["rows_in"]) == (3.0, None, 5)
    assert orjson.loads(last["fields"]) == {"attempt": "two", "share": 0.5}
    assert store.open(directory).logs(node="nowhere").num_rows == 0


# --- what comes ------------------------------------------------------------------------------------------------------


def test_following_tells_what_is_written_from_now_on(tmp_path: Path) -> None:
    """Nothing twice, nothing lost, while files are rotated and compressed, and of files that come later too."""
    write(tmp_path / "logs/a.jsonl", line(0))
    stop, seen, wanted = threading.Event(), threading.Semaphore(0), 6
    found = store.open(tmp_path).follow(level="info", stop=stop)

    def work() -> None:
        with closing(JsonlSink(tmp_path / "logs", "a", max_bytes=500)) as one:
            with closing(JsonlSink(tmp_path / "logs", "b")) as other:
                for number in range(1, 1 + 10 * wanted, wanted):
                    for at in range(number, number + wanted):
                        (one, other)[at % 2].write(orjson.dumps(line(at)) + b"\n")
                    one.write(orjson.dumps(line(-1, level="debug")) + b"\n")
                    for _ in range(wanted):
                        assert seen.acquire(timeout=30)
            one.flush()
        stop.set()

    writer = threading.Thread(target=work)
    writer.start()
    told = []
    for record in found:
        told.append(record["message"])
        seen.release()
    writer.join()
    assert len(list(tmp_path.glob("logs/a.0*"))) > 5
    assert told == [f"m{at}" for at in range(1, 1 + 10 * wanted)]
