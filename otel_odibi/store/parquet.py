"""Reads the Parquet files of a dataset row group by row group, in a few threads, and passes over damaged files."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from otel_odibi.errors import StoreError
from otel_odibi.exporters.columns import WHOLE
from otel_odibi.store.place import ODD, Place

P = ParamSpec("P")
R = TypeVar("R")
Interval = tuple[int, int]
TIME: Final = pa.timestamp("ns", tz="UTC")
EVER: Final = (-(2**63), 2**63 - 1)
_THREADS: Final = min(4, os.cpu_count() or 1)
_UNITS: Final = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
# What can be read as a dictionary, at a third of the price of texts, if it is encoded as one.
_WORDS: Final = ("SpanName", "ServiceName", "StatusCode", "SpanAttributes.", "MetricName")
_AS_DICTIONARY: Final = frozenset(("PLAIN", "RLE", "BIT_PACKED", "RLE_DICTIONARY", "PLAIN_DICTIONARY"))
_ZSTD: Final = b"\x28\xb5\x2f\xfd"


class Part(NamedTuple):
    """A row group of a file. `times`: of its first and last row in time, as far as the file tells."""

    place: Place
    path: str
    metadata: pq.FileMetaData
    schema: pa.Schema
    words: list[str]
    group: int
    times: Interval

    def read(self, columns: Iterable[str], schema: pa.Schema) -> pa.Table:
        """Return columns; those that the file has not are null. Raises what a damaged file makes pyarrow raise."""
        wanted, rows = list(columns), self.metadata.row_group(self.group).num_rows
        with self.place.filesystem.open_input_file(self.path) as source:
            file = pq.ParquetFile(source, metadata=self.metadata, read_dictionary=self.words)
            table = file.read_row_group(self.group, columns=wanted, use_threads=False)
        has = set(table.column_names)
        made = [
            _as(table[n], schema.field(n).type) if n in has else pa.nulls(rows, schema.field(n).type) for n in wanted
        ]
        return pa.table(dict(zip(wanted, made, strict=True)))

    def may_hold(self, column: str, text: str) -> bool:
        """Tell whether a text can be among those of a column, as far as the file tells."""
        told = self._statistics(column) if text else None
        return told is None or bool(told.min_raw <= text.encode() <= told.max_raw)

    def may_mention(self, texts: Collection[str] | None) -> bool:
        """Tell whether one of some attribute values can occur: not if it is in no dictionary that holds them all."""
        if texts is None or (self.metadata.metadata or {}).get(WHOLE[0]) != WHOLE[1]:
            return True
        chunk = self._chunk("SpanAttributes.", ".value")
        start, end = chunk.dictionary_page_offset, chunk.data_page_offset
        with self.place.filesystem.open_input_file(self.path) as source:
            page = source.read_at(end - start, start)
        with pa.input_stream(pa.py_buffer(page[page.index(_ZSTD) :]), compression="zstd") as stream:
            words = stream.read()
        return any(text.encode() in words for text in texts)

    def _chunk(self, start: str, end: str = "") -> Any:
        group = self.metadata.row_group(self.group)
        chunks = (group.column(number) for number in range(group.num_columns))
        return next((c for c in chunks if c.path_in_schema.startswith(start) and c.path_in_schema.endswith(end)), None)

    def _statistics(self, column: str) -> Any:
        chunk = self._chunk(column)
        told = None if chunk is None or chunk.path_in_schema != column else chunk.statistics
        return told if told is not None and told.has_min_max else None


def _as(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    is_words = pa.types.is_dictionary(column.type) or (
        pa.types.is_map(column.type) and pa.types.is_dictionary(column.type.key_type)
    )
    return column if column.type == kind or is_words else column.cast(kind)


def parts(
    place: Place, folder: str, time_column: str, needed: Iterable[str], since_ns: int | None = None
) -> list[Part]:
    """Return the row groups of a dataset that may have rows since then. Files that cannot be read are told of."""
    day = "" if since_ns is None else time.strftime("%Y-%m-%d", time.gmtime(max(0, since_ns) // 10**9))

    def opened(path: str) -> list[Part]:
        with place.filesystem.open_input_file(path) as source:
            metadata = pq.read_metadata(source)
        schema, words = metadata.schema.to_arrow_schema(), _words(metadata)
        if missing := set(needed) - set(schema.names):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        return [
            part._replace(times=_times(part, time_column))
            for group in range(metadata.num_row_groups)
            for part in [Part(place, path, metadata, schema, words, group, EVER)]
        ]

    found = each(place, [info.path for info in place.dated(folder, day)], opened, str)
    return [part for group in found for part in group if since_ns is None or part.times[1] >= since_ns]


class Vanished(Exception):
    """A file is gone since it was listed: what it held is in another one, if a compaction was it."""


def steady(read: Callable[P, R]) -> Callable[P, R]:
    """Make a function begin anew, with a new list of files, where one of them vanishes under it."""

    @functools.wraps(read)
    def again(*args: P.args, **kwargs: P.kwargs) -> R:
        for _ in range(20):
            with contextlib.suppress(Vanished):
                return read(*args, **kwargs)
        raise StoreError("files vanish faster than they can be read; try again when the directory is at rest")

    return again


def each(place: Place, items: Sequence[Any], work: Callable[[Any], Any], path_of: Callable[[Any], str]) -> list[Any]:
    """Return what `work` makes of each item, without those that cannot be read, which are told of."""

    def guarded(item: Any) -> Any:
        try:
            return work(item)
        except FileNotFoundError:
            raise Vanished(path_of(item)) from None
        except ODD as exc:
            place.problem(path_of(item), exc)
            return None

    with ThreadPoolExecutor(_THREADS, "otel-odibi-store") as pool:
        return [made for made in pool.map(guarded, items) if made is not None]


def _words(metadata: pq.FileMetaData) -> list[str]:
    """Return the columns to be read as dictionaries: in older files, and those of others, not all can be."""
    cannot, found = set[str](), set[str]()
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.startswith(_WORDS):
                good = chunk.physical_type == "BYTE_ARRAY" and _AS_DICTIONARY.issuperset(chunk.encodings)
                (found if good else cannot).add(chunk.path_in_schema)
    return sorted(found - cannot)


def _times(part: Part, column: str) -> Interval:
    kind, told = part.schema.field(column).type, part._statistics(column)
    if told is None or not pa.types.is_timestamp(kind):
        return EVER
    return told.min_raw * _UNITS[kind.unit], (told.max_raw + 1) * _UNITS[kind.unit] - 1


def clashes(found: Sequence[Part]) -> list[Interval]:
    """Return the times in which several files have rows: only there can a row be in two of them."""
    files: dict[str, Interval] = {}
    for part in found:
        first, last = files.get(part.path, part.times)
        files[part.path] = min(first, part.times[0]), max(last, part.times[1])
    out: list[Interval] = []
    reached = EVER[0]
    for first, last in sorted(files.values()):
        if first <= reached and len(files) > 1:
            end = min(last, reached)
            if out and first <= out[-1][1]:
                first, end = out[-1][0], max(out.pop()[1], end)
            out.append((first, end))
        reached = max(reached, last)
    return out


def parted(table: pa.Table, within: Sequence[Interval], time_column: str) -> tuple[pa.Table, pa.Table]:
    """Return the rows that are in one file only, and those that may be in several."""
    if not within:
        return table, table.slice(0, 0)
    times, suspect = table[time_column].cast(pa.int64()), pa.repeat(pa.scalar(False), len(table))
    for first, last in within:
        suspect = pc.or_(suspect, pc.and_(pc.greater_equal(times, first), pc.less_equal(times, last)))
    return table.filter(pc.invert(suspect)), table.filter(suspect)


def distinct(table: pa.Table, key: str) -> pa.Table:
    """Return the rows of a table of spans, each span once: the first where there are several."""
    if pc.count_distinct(table[key]).as_py() == len(table):
        return table
    numbered = pa.table({"id": table[key], "at": pa.array(range(len(table)), pa.int64())})
    return table.take(numbered.group_by("id").aggregate([("at", "min")])["at_min"])
