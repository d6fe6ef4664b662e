"""What the attributes of spans say of nodes and runs, as columns: found without a Python object a row."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from otel_odibi import names
from otel_odibi.exporters.columns import MAP, TEXT

WORD: Final = pa.dictionary(pa.int32(), TEXT)
FACTS: Final[Mapping[str, tuple[str, pa.DataType]]] = {
    "pipeline": (names.PIPELINE_NAME, WORD), "run_id": (names.PIPELINE_RUN_ID, WORD),
    "node": (names.NODE_NAME, WORD), "layer": (names.NODE_LAYER, WORD), "engine": (names.NODE_ENGINE, WORD),
    "outcome": (names.NODE_OUTCOME, WORD), "ending": (names.PIPELINE_OUTCOME, WORD),
    "error_type": (names.ERROR_TYPE, WORD), "attempt": (names.NODE_ATTEMPT, pa.int64()),
    "rows_in": (names.NODE_ROWS_IN, pa.int64()), "rows_out": (names.NODE_ROWS_OUT, pa.int64()),
    "bytes_out": (names.NODE_BYTES_OUT, pa.int64()), "rss": (names.NODE_MEMORY_RSS, pa.int64()),
    "cache_hit": (names.NODE_CACHE_HIT, pa.bool_()),
}  # fmt: skip
_PATTERNS: Final = {pa.int64(): "^-?[0-9]{1,18}$", pa.bool_(): "^(?:true|false)$"}


def with_facts(spans: pa.Table, wanted: Collection[str], needs: str) -> Iterator[pa.Table]:
    """Yield the rows whose attributes have the fact `needs`, with facts as columns in place of the attributes.

    Rows of one kind have the same keys in the same places, so that a fact of all of them is taken at one go; that is
    several times as fast as looking it up row by row. What is no number where one should be is null.
    """
    spans = spans.combine_chunks()
    maps = spans["SpanAttributes"].combine_chunks() if len(spans) else pa.array([], MAP)
    maps = maps.chunk(0) if isinstance(maps, pa.ChunkedArray) else maps
    if not isinstance(maps.keys, pa.DictionaryArray) or not isinstance(maps.items, pa.DictionaryArray):
        maps = pa.MapArray.from_arrays(maps.offsets, maps.keys.dictionary_encode(), maps.items.dictionary_encode())
    rest, keys = spans.drop_columns(["SpanAttributes"]), maps.keys.dictionary.to_pylist()
    codes = {name: keys.index(FACTS[name][0]) for name in {*wanted, needs} if FACTS[name][0] in keys}
    words = _Words(maps.items.dictionary)
    for rows, places in _kinds(maps, keys, set(codes.values())):
        if codes.get(needs) in places:
            columns = {}
            for name in wanted:
                at = places.get(codes.get(name))
                kind = FACTS[name][1]
                columns[name] = pa.nulls(len(rows), kind) if at is None else words.of(maps.items.indices.take(at), kind)
            yield pa.table({**dict(zip(rest.column_names, rest.take(rows).columns, strict=True)), **columns})


def _kinds(maps: pa.MapArray, keys: list[str], wanted: set[int]) -> Iterator[tuple[pa.Array, dict[Any, pa.Array]]]:
    """Yield rows that have the same keys, and where the values of the wanted ones are."""
    begins, ends, used = maps.offsets[:-1], maps.offsets[1:], maps.keys.indices
    order, counts = _by_kind(begins, ends, used, keys)
    start = 0
    for count in counts:
        rows, start = order.slice(start, count), start + count
        first, at = rows[0].as_py(), begins.take(rows)
        shape = used[begins[first].as_py() : ends[first].as_py()].to_pylist()
        places = {code: pc.add(at, pa.scalar(shape.index(code), pa.int32())) for code in wanted & set(shape)}
        for code, place in places.items():
            if not pc.all(pc.equal(used.take(place), code)).as_py():  # they have the same keys in another order
                found = pc.indices_nonzero(pc.equal(used, code))
                owners = pc.list_parent_indices(pa.ListArray.from_arrays(maps.offsets, used)).take(found)
                places[code] = found.take(pc.index_in(rows.cast(owners.type), value_set=owners))
        yield rows, places


def _by_kind(begins: pa.Array, ends: pa.Array, used: pa.Array, keys: list[str]) -> tuple[pa.Array, list[int]]:
    """Return the rows ordered by the set of their keys, and how many have the same.

    The sum of a number for each key tells them apart; sums wrap, which does no harm.
    """
    numbers = pa.array([zlib.crc32(key.encode()) - 2**31 for key in keys], pa.int32())
    sums = pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(numbers.take(used))])
    kinds = pc.subtract(sums.take(ends), sums.take(begins)).dictionary_encode().indices
    order = pc.sort_indices(kinds).cast(pa.int32())
    return order, pc.value_counts(kinds.take(order)).field("counts").to_pylist()


class _Words:
    """The texts that occur, and what they are as numbers, parsed once."""

    def __init__(self, texts: pa.Array) -> None:
        self._texts, self._parsed = texts, dict[pa.DataType, pa.Array]()

    def of(self, indices: pa.Array, kind: pa.DataType) -> pa.Array:
        if kind == WORD:
            used = indices.dictionary_encode()
            return pa.DictionaryArray.from_arrays(used.indices, self._texts.take(used.dictionary))
        if kind not in self._parsed:  # anyone may have written them
            good = pc.match_substring_regex(self._texts, _PATTERNS[kind])
            self._parsed[kind] = pc.if_else(good, self._texts, pa.scalar(None, TEXT)).cast(kind)
        return self._parsed[kind].take(indices)


def among(column: Any, texts: Iterable[str]) -> pa.Array:
    """Return which values of a column of texts are among these: false where null."""
    return where(column, lambda words: pc.is_in(words, value_set=pa.array(list(texts), TEXT)))


def begins(column: Any, text: str) -> pa.Array:
    """Return which values begin with `text`: false where null."""
    return where(column, lambda words: pc.starts_with(words, text))


def where(column: Any, holds: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Return of which values a condition holds, asked of distinct ones where these are known: false where null."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column, pa.DictionaryArray):
        return pc.fill_null(holds(column.dictionary).take(column.indices), False)
    return pc.fill_null(holds(column), False)
