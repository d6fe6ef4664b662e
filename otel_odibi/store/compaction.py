"""Small Parquet files into large ones, and retention by age and size."""

from __future__ import annotations

import contextlib
import os
import posixpath
import time
import uuid
from collections.abc import Iterator
from typing import Final, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo

from otel_odibi.errors import StoreError
from otel_odibi.exporters.files import Target
from otel_odibi.exporters.segments import acquire, parse, pattern, release
from otel_odibi.exporters.tables import GROUP, SCHEMAS, few_values, writer
from otel_odibi.liveness import read_state
from otel_odibi.store.alive import SILENT
from otel_odibi.store.place import ODD, Place

_DAY: Final = 86_400 * 10**9
_DATASETS: Final = tuple(SCHEMAS)


class Compacted(NamedTuple):
    """What a compaction did, or would do: paths in the directory; bytes of all Parquet files before and after."""

    merged: tuple[str, ...]
    made: tuple[str, ...]
    removed: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def compact(
    place: Place, target: Target, age_seconds: float, keep_days: float | None, keep_bytes: int | None, rows: int,
    dry_run: bool,
) -> Compacted:  # fmt: skip
    """Merge the small files of each day, delete days that are too old or too much. Raises StoreError."""
    with _alone(place):
        now = time.time_ns()
        work = _Work(place, target, now - int(age_seconds * 1e9), rows, dry_run)
        for folder in [] if dry_run else _DATASETS:
            work.finish(folder)
        days, until = work.days(), _busy_since(place, now)
        sizes = {day: sum(info.size for info in infos) for day, infos in days.items()}
        left, oldest = sum(sizes.values()), "" if keep_days is None else _day(now - int(keep_days * _DAY))
        for day in sorted(day for day in days if day < until):
            if day < oldest or (keep_bytes is not None and left > keep_bytes):
                work.remove(days[day])
                left -= sizes[day]
            else:
                for folder in _DATASETS:
                    path = f"{place.path(folder)}/date={day}"
                    work.merge(folder, day, [info for info in days[day] if posixpath.dirname(info.path) == path])
        if keep_days is not None:
            work.remove(_segments(place, now - int(keep_days * _DAY)))
        after = sum(info.size for infos in work.days().values() for info in infos)
        return Compacted(tuple(work.merged), tuple(work.made), tuple(work.removed), sum(sizes.values()), after)


class _Work:
    """One compaction: what it did so far."""

    def __init__(self, place: Place, target: Target, before: int, rows: int, dry_run: bool) -> None:
        self._place, self._target, self._before, self._rows, self._dry = place, target, before, rows, dry_run
        self.merged, self.made, self.removed = list[str](), list[str](), list[str]()

    def days(self) -> dict[str, list[FileInfo]]:
        """Return the Parquet files by day."""
        found: dict[str, list[FileInfo]] = {}
        for info in (info for folder in _DATASETS for info in self._place.dated(folder)):
            found.setdefault(posixpath.basename(posixpath.dirname(info.path))[5:], []).append(info)
        return found

    def remove(self, infos: list[FileInfo]) -> None:
        """Delete files, and their folders where that leaves them empty."""
        for info in infos:
            self.removed.append(self._place.relative(info.path))
            if not self._dry:
                self._delete(info.path)
                if self._place.directory is not None:
                    with contextlib.suppress(OSError):
                        os.rmdir(os.path.dirname(info.path))

    def merge(self, folder: str, day: str, infos: list[FileInfo]) -> None:
        """Merge the small files of a day that are old enough, in the order in which they were written."""
        batch: list[tuple[FileInfo, int]] = []
        for info in infos:
            count = self._count(folder, info) if (info.mtime_ns or 0) <= self._before else self._rows
            if count >= self._rows // 2:
                continue
            if sum(rows for _, rows in batch) + count > self._rows:
                self._into_one(folder, day, [info for info, _ in batch])
                batch = []
            batch.append((info, count))
        self._into_one(folder, day, [info for info, _ in batch])

    def finish(self, folder: str) -> None:
        """Do what a compaction that died had left to do: delete files that are merged already."""
        for info in self._place.files(folder, hidden=True):
            if info.path.endswith(".merged"):
                with contextlib.suppress(*ODD), self._place.filesystem.open_input_stream(info.path) as stream:
                    told = orjson.loads(stream.read())
                    self._clear(info.path, str(told["made"]), list(map(str, told["merged"])))

    def _count(self, folder: str, info: FileInfo) -> int:
        """Return the rows of a file that can be merged: not one that lacks columns, or has others."""
        try:
            with self._place.filesystem.open_input_file(info.path) as source:
                metadata = pq.read_metadata(source)
        except ODD as exc:
            self._place.problem(info.path, exc)
            return self._rows
        is_ours = metadata.schema.to_arrow_schema().names == SCHEMAS[folder].names
        return int(metadata.num_rows) if is_ours else self._rows

    def _into_one(self, folder: str, day: str, infos: list[FileInfo]) -> None:
        if len(infos) < 2:
            return
        if not self._dry:
            data, infos = self._merged(infos, SCHEMAS[folder])
            stem = f"{posixpath.basename(infos[-1].path).partition('-')[0]}-{uuid.uuid4().hex[:16]}"
            note, names = f"{folder}/date={day}/.{stem}.merged", [info.base_name for info in infos]
            self._target.write(note, orjson.dumps({"made": f"{stem}.parquet", "merged": names}))
            self._target.write(f"{folder}/date={day}/{stem}.parquet", data)
            self.made.append(f"{folder}/date={day}/{stem}.parquet")
            self._clear(self._place.path(note), f"{stem}.parquet", names)
        self.merged += [self._place.relative(info.path) for info in infos]

    def _merged(self, infos: list[FileInfo], schema: pa.Schema, few: bool = True) -> tuple[pa.Buffer, list[FileInfo]]:
        """Return the files as one, and which were read, in row groups that need little memory."""
        sink, read, waiting = pa.BufferOutputStream(), list[FileInfo](), schema.empty_table()
        with writer(sink, schema, few) as file:
            for info in [*infos, None]:
                if info is not None:
                    try:
                        with self._place.filesystem.open_input_file(info.path) as source:
                            waiting = pa.concat_tables([waiting, pq.read_table(source, use_threads=False).cast(schema)])
                        read.append(info)
                    except ODD as exc:
                        self._place.problem(info.path, exc)
                while len(waiting) >= (GROUP if info is not None else 1):
                    group, waiting = waiting.slice(0, GROUP).combine_chunks(), waiting.slice(GROUP)
                    if few and not few_values(group):
                        return self._merged(infos, schema, few=False)
                    file.write_table(group)
        return sink.getvalue(), read

    def _clear(self, note: str, made: str, merged: list[str]) -> None:
        folder = posixpath.dirname(note)
        if self._place.filesystem.get_file_info(f"{folder}/{posixpath.basename(made)}").is_file:
            for name in merged:
                self._delete(f"{folder}/{posixpath.basename(name)}")
        self._delete(note)

    def _delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._place.filesystem.delete_file(path)


@contextlib.contextmanager
def _alone(place: Place) -> Iterator[None]:
    """Hold the lock of compactions; there is none on an object store."""
    if place.directory is None:
        yield
        return
    fd = acquire(place.directory / ".compaction.lock", os.O_RDWR | os.O_CREAT)
    if fd is None:
        raise StoreError(f"another compaction of {str(place)!r} is at work; wait until it has ended")
    try:
        yield
    finally:
        release(fd)


def _busy_since(place: Place, now: int) -> str:
    """Return the first day that a running process may write to."""
    if place.directory is None:  # who writes there is not known
        return _day(now)
    states = filter(None, map(read_state, place.directory.glob("state/*.json")))
    alive = [state for state in states if now - state["heartbeat_unix_nano"] < SILENT]
    begun = [entry.get("time_unix_nano") for state in alive for entry in state["active"]]
    return _day(min([now, *(at for at in begun if isinstance(at, int))])) if alive else "~"


def _day(unix_nano: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(max(0, unix_nano) // 10**9))


def _segments(place: Place, before: int) -> list[FileInfo]:
    """Return the rotated log files that were not written to since then."""
    infos = {info.base_name: info for info in place.files("logs") if (info.mtime_ns or 0) < before}
    return [infos[found.entry] for found in parse(infos, pattern(".jsonl")) if not found.is_active]
