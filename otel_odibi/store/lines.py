"""Finds log lines in the files of a directory, by time: bytes first, so that what cannot match is never parsed."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import posixpath
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from threading import Event
from typing import Any, BinaryIO, Final

import orjson
import pyarrow as pa
from pyarrow.fs import FileInfo

from otel_odibi.errors import StoreError
from otel_odibi.exporters.segments import is_object, parse, pattern
from otel_odibi.store.place import ODD, Place

Record = dict[str, Any]
Block = tuple[bytes, int, int]
LEVELS: Final = ("debug", "info", "warning", "error", "critical")
_BLOCK: Final = 2**18
_PLAIN: Final = re.compile(r"[ -!#-.0-\[\]-~]+")  # what every JSON writer leaves as it is
_SLACK: Final = 2 * 10**9  # by which a file's time of change may lag behind the last line in it
_FIELDS: Final = {"event": "event_type", "node": "node_name", "run": "run_id", "trace": "trace_id"}


@dataclass(frozen=True)
class Wanted:
    """Which records are asked for; empty texts stand for all, a level for itself and those above."""

    event: str = ""
    node: str = ""
    level: str = ""
    run: str = ""
    trace: str = ""
    since_ns: int | None = None
    text: str = ""

    def __post_init__(self) -> None:
        if self.level and self.level not in LEVELS:
            raise StoreError(f"there is no level {self.level!r}; choose from {', '.join(LEVELS)}")

    @property
    def exact(self) -> dict[str, str]:
        return {field: text for name, field in _FIELDS.items() if (text := getattr(self, name))}

    @property
    def levels(self) -> tuple[str, ...]:
        return LEVELS[LEVELS.index(self.level) :] if self.level and self.level != LEVELS[0] else ()

    def needles(self, spaced: bool) -> list[tuple[bytes, ...]]:
        """Return texts of which a line must have one of each tuple, what is rarest first."""
        colon = b": " if spaced else b":"
        found: list[tuple[bytes, ...]] = [
            (b'"%b"%b%b' % (field.encode(), colon, _start(text)),) for field, text in self.exact.items()
        ]
        if self.text and (plain := max(_PLAIN.findall(self.text), key=len, default="")):
            found.append((plain.encode(),))
        if len(self.levels) in (1, 2, 3):
            found.append(tuple(b'"level"%b"%b"' % (colon, level.encode()) for level in self.levels))
        return sorted(found, key=lambda texts: (len(texts), -len(texts[0])))

    def meets(self, record: Record) -> bool:
        """Tell whether a record is asked for."""
        return (
            all(record.get(field) == text for field, text in self.exact.items())
            and (not self.levels or record.get("level") in self.levels)
            and (self.since_ns is None or time_of(record) >= stamp(self.since_ns))
            and (not self.text or orjson.dumps(self.text)[1:-1] in orjson.dumps(record))
        )


def _start(text: str) -> bytes:
    """Return the beginning of a JSON text, as every writer has it; with its end where there is nothing else."""
    found = _PLAIN.match(text)
    whole = found is not None and found[0] == text
    return b'"%b%b' % (found[0].encode() if found else b"", b'"' if whole else b"")


def stamp(unix_nano: int) -> str:
    """Return a time as lines have it, for comparing: RFC 3339 without the zone, which is UTC."""
    seconds, nanos = divmod(unix_nano, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanos // 1000:06d}"


def time_of(record: Record) -> str:
    """Return the time of a record, to compare with others; empty where it has none."""
    found = record.get("timestamp")
    return found if isinstance(found, str) else ""


def records(place: Place, wanted: Wanted, limit: int | None = None, newest_first: bool = False) -> Iterator[Record]:
    """Yield the records asked for, by time; those of one file as they lie there."""
    found = (_timed(place, info, wanted, newest_first) for info in log_files(place) if _recent(info, wanted))
    ordered = heapq.merge(*found, key=itemgetter(0), reverse=newest_first)
    return itertools.islice((record for _, record in ordered if record), limit)


def log_files(place: Place) -> list[FileInfo]:
    """Return the log files, each record in one of them: of a segment half-way through compression the plain one."""
    infos = {info.base_name: info for info in place.files("logs") if posixpath.dirname(info.path) == place.path("logs")}
    chosen: dict[tuple[str, float, str], FileInfo] = {}
    for found in parse(infos, pattern(".jsonl")):
        if found.is_active or infos[found.entry].size:
            chosen.setdefault((found.name, found.number, found.entry if found.is_active else ""), infos[found.entry])
    return list(chosen.values())


def _recent(info: FileInfo, wanted: Wanted) -> bool:
    return wanted.since_ns is None or (info.mtime_ns or 0) + _SLACK >= wanted.since_ns


def _timed(place: Place, info: FileInfo, wanted: Wanted, newest_first: bool) -> Iterator[tuple[str, Record | None]]:
    """Yield records of a file with their times; before them a mark, so that merging opens the file no sooner."""
    first = next((block[begin:end] for block, begin, end in _blocks(place, info)), b"").partition(b"\n")[0]
    yield (stamp((info.mtime_ns or 0) + _SLACK), None) if newest_first else (time_of(_parsed(first) or {}), None)
    needles = wanted.needles(b'": ' in first)
    blocks = _backwards(place, info) if newest_first else _blocks(place, info)
    found: Iterable[list[bytes]] = (_hits(*block, needles) for block in blocks)
    if newest_first and info.path.endswith(".gz"):
        found = [[line for lines in found for line in lines]]
    for line in (line for lines in found for line in (reversed(lines) if newest_first else lines)):
        record = _parsed(line)
        if record is None:
            place.problem(info.path, "a line that is no JSON object is passed over")
        elif wanted.meets(record):
            yield time_of(record), record


def _parsed(line: bytes) -> Record | None:
    """Return a line as a record, None if it is none."""
    try:
        found = orjson.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _hits(block: bytes, begin: int, end: int, needles: list[tuple[bytes, ...]]) -> list[bytes]:
    """Return the lines between two places that have one of each of the texts in them."""
    if not needles:
        return [line for line in block[begin:end].split(b"\n") if line.strip(b"\0 \r")]
    found: dict[int, int] = {}
    for text in needles[0]:
        at = block.find(text, begin, end)
        while at >= 0:
            start, stop = block.rfind(b"\n", begin, at) + 1 or begin, block.find(b"\n", at, end)
            found[start] = stop = stop if stop >= 0 else end
            at = block.find(text, stop, end)
    lines = (block[start : found[start]] for start in sorted(found))
    return [line for line in lines if all(any(text in line for text in texts) for texts in needles[1:])]


def _blocks(place: Place, info: FileInfo) -> Iterator[Block]:
    """Yield bytes and where in them whole lines begin and end; no last one that is not whole yet. Never raises."""
    rest = b""
    try:
        with _opened(place, info.path) as stream:
            while block := stream.read(_BLOCK):
                first, last = block.find(b"\n") + 1, block.rfind(b"\n") + 1
                if last:
                    line = rest + block[:first]
                    yield line, 0, len(line)
                    yield block, first, last
                rest = block[last:] if last else rest + block
    except ODD as exc:
        place.problem(info.path, exc)
    if is_object(rest):  # no proper part of an object is one
        yield rest, 0, len(rest)


def _opened(place: Place, path: str) -> Any:
    try:
        return place.filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None)
    except FileNotFoundError:  # compressed since it was listed
        return place.filesystem.open_input_stream(f"{path}.gz", compression="gzip")


def _backwards(place: Place, info: FileInfo) -> Iterator[Block]:
    """Yield bytes that hold whole lines, the last ones first; of a compressed file the first ones first."""
    if info.path.endswith(".gz"):
        yield from _blocks(place, info)
        return
    rest = b""
    try:
        with place.filesystem.open_input_file(info.path) as source:
            end = source.size()
            while end:
                start = max(0, end - _BLOCK)
                block = source.read_at(end - start, start) + rest
                first = block.find(b"\n") + 1 if start else 0
                if start and first == 0:
                    rest = block
                else:
                    yield block, first, len(block)
                    rest = block[:first]
                end = start
    except ODD as exc:
        place.problem(info.path, exc)


# --- a table ---------------------------------------------------------------------------------------------------------

LOGS: Final = pa.schema([
    *((name, pa.string()) for name in (
        "timestamp", "level", "event_type", "message", "service", "pipeline", "run_id", "node_name", "layer", "engine",
        "status",
    )),
    ("duration_ms", pa.float64()), ("row_count", pa.int64()), ("rows_in", pa.int64()), ("cache_hit", pa.bool_()),
    ("memory_mb", pa.float64()), ("attempt", pa.int64()), ("error", pa.string()), ("error_type", pa.string()),
    ("trace_id", pa.string()), ("span_id", pa.string()), ("parent_span_id", pa.string()), ("fields", pa.string()),
])  # fmt: skip
_KINDS: Final = {pa.string(): (str,), pa.float64(): (float, int), pa.int64(): (int,), pa.bool_(): (bool,)}
_COLUMNS: Final = {field.name: _KINDS[field.type] for field in LOGS if field.name != "fields"}


def table(found: Iterator[Record]) -> pa.Table:
    """Return records as a table. A value that is not of its column's kind is in `fields` with what has no column."""
    batches = []
    while rows := [_row(record) for record in itertools.islice(found, 10_000)]:
        batches.append(pa.RecordBatch.from_pylist(rows, LOGS))
    return pa.Table.from_batches(batches, LOGS)


def _row(record: Record) -> Record:
    row = {name: record.pop(name) for name, kinds in _COLUMNS.items() if type(record.get(name)) in kinds}
    return {**row, "fields": orjson.dumps(record).decode()} if record else row


# --- what comes ------------------------------------------------------------------------------------------------------


def follow(place: Place, wanted: Wanted, stop: Event, seconds: float = 0.2) -> Iterator[Record]:
    """Return the records asked for that are written from now on, until `stop` is set; whatever is rotated meanwhile."""
    return _following(place, wanted, stop, seconds, {_identity(info.path): info.size for info in log_files(place)})


def _following(place: Place, wanted: Wanted, stop: Event, seconds: float, known: dict[Any, int]) -> Iterator[Record]:
    streams: dict[Any, BinaryIO] = {}
    rests: dict[Any, bytes] = {}
    try:
        while True:
            ended, found = stop.is_set(), list[Record]()
            for info in log_files(place):
                if not info.path.endswith(".gz") and _identity(info.path) not in streams:
                    with contextlib.suppress(OSError):
                        stream: BinaryIO = open(info.path, "rb")  # noqa: SIM115 - it can be read on though it is renamed
                        key = _identity(stream.fileno())  # it may have been renamed just now
                        stream.seek(known.pop(key, 0))  # once: numbers of deleted files come again
                        if streams.setdefault(key, stream) is not stream:
                            stream.close()
            for key, stream in list(streams.items()):
                gone = not os.fstat(stream.fileno()).st_nlink
                *lines, rests[key] = (rests.get(key, b"") + stream.read()).split(b"\n")
                found += [record for line in lines if (record := _parsed(line)) and wanted.meets(record)]
                if gone:
                    streams.pop(key).close()
                    del rests[key]
            yield from sorted(found, key=time_of)
            if ended:
                return
            stop.wait(seconds)
    finally:
        for stream in streams.values():
            stream.close()


def _identity(path: str | int) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        info = os.stat(path)
        return info.st_dev, info.st_ino
    return 0, 0
