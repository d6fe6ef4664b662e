"""Reads the Parquet files of a dataset row group by row group, in a few threads, and passes over damaged files."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from otel_odibi.errors import StoreError
from otel_odibi.exporters.columns import TIME, WHOLE
from otel_odibi.store.place import ODD, Place

P = ParamSpec("P")
R = TypeVar("R")
Interval = tuple[int, int]
EVER: Final = (-(2**63), 2**63 - 1)
_THREADS: Final = min(4, os.cpu_count() or 1)
_FORMAT: Final = ds.ParquetFileFormat()
# What is read as dictionaries, at a third of the price of texts, if it is encoded so.
_WORDS: Final = ("SpanName", "ServiceName", "StatusCode", "SpanAttributes.", "MetricName")


class Part(NamedTuple):
    """A row group of a file; `words`, common to those of a file, are the columns to be read as dictionaries.

    Of the file's metadata nothing is asked that is particular to a chunk of a column: where a damaged file has made
    nonsense of that, asking would end the process.
    """

    place: Place
    path: str
    metadata: pq.FileMetaData
    words: list[str]
    group: int

    def read(self, columns: Iterable[str], schema: pa.Schema) -> pa.Table:
        """Return columns; those that the file has not are null. Raises what a damaged file makes pyarrow raise."""
        wanted, rows = list(columns), self.metadata.row_group(self.group).num_rows
        try:
            with self._opened() as file:
                table = file.read_row_group(self.group, columns=wanted, use_threads=False)
        except (OSError, NotImplementedError) as exc:
            if not self.words or "Not yet implemented" not in str(exc):
                raise
            # Values are encoded otherwise if they hardly repeat; others may have encoded anything otherwise.
            self.words[:] = [path for path in self.words if not path.endswith(".value") and len(self.words) > 4]
            return self.read(wanted, schema)
        has, kinds = set(table.column_names), {name: schema.field(name).type for name in wanted}
        return pa.table({n: _as(table[n], kinds[n]) if n in has else pa.nulls(rows, kinds[n]) for n in wanted})

    def may_mention(self, beginnings: Collection[str] | None) -> bool:
        """Tell whether a value of an attribute can begin with one of these: not if no word of the file does."""
        values = [path for path in self.words if path.startswith("SpanAttributes.") and path.endswith(".value")]
        if beginnings is None or not values or (self.metadata.metadata or {}).get(WHOLE[0]) != WHOLE[1]:
            return True
        with self._opened() as file:  # the first row comes with all words
            batch = next(file.iter_batches(1, row_groups=[self.group], columns=values, use_threads=False))
        words = batch.column(0).flatten().field(0).dictionary
        return any(pc.any(pc.starts_with(words, text)).as_py() for text in beginnings)

    def times(self, column: str) -> Interval:
        """Return the times of the first and the last row."""
        schema = pa.schema([(column, TIME)])
        found = pc.min_max(self.read([column], schema)[column].cast(pa.int64())).as_py()
        return (found["min"], found["max"]) if found["min"] is not None else (EVER[1], EVER[0])

    @contextlib.contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        with self.place.filesystem.open_input_file(self.path) as source:
            yield pq.ParquetFile(source, metadata=self.metadata, read_dictionary=self.words)


def _as(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    is_words = pa.types.is_dictionary(column.type) or (
        pa.types.is_map(column.type) and pa.types.is_dictionary(column.type.key_type)
    )
    return column if column.type == kind or is_words else column.cast(kind)


def parts(place: Place, folder: str, needed: Sequence[str], since_ns: int | None = None, **texts: str) -> list[Part]:
    """Return the row groups that may have rows since then, of which columns are such texts, if these are not empty.

    The first of the columns that are `needed` is the time. Files that cannot be read are told of.
    """
    day = "" if since_ns is None else time.strftime("%Y-%m-%d", time.gmtime(max(0, since_ns) // 10**9))

    def opened(path: str) -> list[Part]:
        fragment = _FORMAT.make_fragment(path, place.filesystem)
        metadata, schema = fragment.metadata, fragment.physical_schema
        if missing := set(needed) - set(schema.names):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
        for column, text in texts.items():
            fragment = fragment.subset(pc.field(column) == text) if text else fragment
        if since_ns is not None:
            since = pa.scalar(since_ns, TIME).cast(schema.field(needed[0]).type, safe=False)
            fragment = fragment.subset(pc.field(needed[0]) >= since)
        columns = map(metadata.schema.column, range(metadata.num_columns))
        words = [c.path for c in columns if c.path.startswith(_WORDS) and c.physical_type == "BYTE_ARRAY"]
        return [Part(place, path, metadata, words, group.id) for group in fragment.row_groups]

    found = each(place, [info.path for info in place.dated(folder, day)], opened, str)
    return [part for group in found for part in group]


class Vanished(Exception):
    """A file is gone since it was listed: what it held is in another one, if a compaction was it."""


def steady(read: Callable[P, R]) -> Callable[P, R]:
    """Make a function begin anew, with a new list of files, where one of them vanishes under it."""

    @functools.wraps(read)
    def again(*args: P.args, **kwargs: P.kwargs) -> R:
        for _ in range(20):
            try:
                return read(*args, **kwargs)
            except Vanished:  # noqa: PERF203
                continue
            finally:
                pa.default_memory_pool().release_unused()
        raise StoreError("files vanish faster than they can be read; try again when the directory is at rest")

    return again


def path_of(part: Part) -> str:
    """Return the path of a row group's file."""
    return part.path


def each(
    place: Place, items: Sequence[Any], work: Callable[[Any], Any], path_of: Callable[[Any], str] = path_of
) -> Iterator[Any]:
    """Yield what `work` makes of each item, without those that cannot be read, which are told of."""

    def guarded(item: Any) -> Any:
        try:
            return work(item)
        except FileNotFoundError:
            raise Vanished(path_of(item)) from None
        except ODD as exc:
            place.problem(path_of(item), exc)
            return None

    with ThreadPoolExecutor(_THREADS, "otel-odibi-store") as pool:
        yield from (made for made in pool.map(guarded, items) if made is not None)


def clashes(place: Place, found: Sequence[Part]) -> list[Interval]:
    """Return the times in which several files have rows: only there can a row be in two of them."""
    files: dict[str, Interval] = {}
    if len({part.path for part in found}) > 1:
        for path, times in each(place, found, lambda part: (part.path, part.times("Timestamp")), path_of):
            first, last = files.get(path, times)
            files[path] = min(first, times[0]), max(last, times[1])
    out: list[Interval] = []
    reached = EVER[0]
    for first, last in sorted(files.values()):
        if first <= reached:
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
