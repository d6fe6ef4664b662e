"""Python objects as Arrow columns, without an object a row in between: what `tables` is built with.

Importing this module imports pyarrow.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa

from otel_odibi.clean import plain_text, to_json

TEXT: Final = pa.string()
TIME: Final = pa.timestamp("ns", tz="UTC")
MAP: Final = pa.map_(pa.string(), pa.string())
FLOAT: Final = pa.float64()
WHOLE: Final = (b"otel_odibi.words", b"whole")
"""Metadata of a file whose attribute values are all in the dictionary of their row group: to look there is enough."""

_RANGES: Final = {
    TIME: (1 - 2**63, 2**63 - 1),
    pa.uint64(): (0, 2**64 - 1),
    pa.uint32(): (0, 2**32 - 1),
    pa.int32(): (-(2**31), 2**31 - 1),
}


class Column(NamedTuple):
    """One column: `read` takes the rows and returns a value for each.

    With `of`, what `read` returns are objects of which few are distinct, and `of(object)` is the value. With
    `children`, each value is a sequence of objects, which become a list of structs.
    """

    name: str
    type: pa.DataType | None
    read: Callable[[Sequence[Any]], Sequence[Any]]
    of: Callable[[Any], Any] | None = None
    children: tuple[Column, ...] = ()


def text(value: Any) -> str:
    """Return an attribute value as text: true, false, shortest numbers, base64 of bytes, JSON of lists and maps.

    None is the empty text. Never raises for what OpenTelemetry allows as a value, at any size or depth.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return int.__repr__(value) if value.bit_length() < 10_000 else hex(value)  # Python prints no longer ones
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return to_json(value).decode()


def _texts(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values, TEXT)
    except (UnicodeEncodeError, pa.ArrowException):
        return pa.array([plain_text(text(value)) for value in values], TEXT)


def _integers(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return an array of integers (or times); those that the type cannot hold become the nearest it can."""
    try:
        return pa.array(values, kind)
    except (OverflowError, pa.ArrowException):
        low, high = _RANGES[kind]
        return pa.array([min(max(value, low), high) for value in values], kind)


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(list(itertools.accumulate(lengths, initial=0)), pa.int32())


def _maps(attributes: Sequence[Any]) -> pa.MapArray:
    """Return maps of texts, from one flat list of keys and one of values: an object a row would cost far more."""
    keys: list[str] = []
    values: list[str] = []
    lengths: list[int] = []
    for mapping in attributes:
        # The SDK's attributes are slow to iterate and quick to copy.
        items = mapping.copy() if hasattr(mapping, "copy") else mapping or {}
        keys.extend(items)
        values.extend([value if type(value) is str else text(value) for value in items.values()])
        lengths.append(len(items))
    return pa.MapArray.from_arrays(_offsets(lengths), _texts(keys), _texts(values))


def _distinct(objects: Sequence[Any], of: Callable[[Any], Any], kind: pa.DataType) -> pa.Array:
    """Return a column in which one object stands for many rows: each is converted once, then taken by its index."""
    found = {id(item): item for item in objects}
    values = _array([of(item) for item in found.values()], kind)
    if len(found) == 1:
        return values.take(pa.repeat(0, len(objects)))
    index = {key: number for number, key in enumerate(found)}
    return values.take(pa.array([index[id(item)] for item in objects], pa.int64()))


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if kind == TEXT:
        return _texts(values)
    if kind == MAP:
        return _maps(values)
    if kind in _RANGES:
        return _integers(values, kind)
    if kind == FLOAT:
        return pa.array([None if value is None else float(value) for value in values], FLOAT)
    return pa.array(values, kind)


def build(column: Column, rows: Sequence[Any]) -> pa.Array:
    """Return the column's values for these rows. Raises whatever a row that cannot be read raises."""
    values = column.read(rows)
    if column.children:
        flat = [item for items in values for item in items]
        fields = [pa.field(child.name, type_of(child)) for child in column.children]
        structs = pa.StructArray.from_arrays([build(child, flat) for child in column.children], fields=fields)
        return pa.ListArray.from_arrays(_offsets(map(len, values)), structs)
    if column.of is not None:
        return _distinct(values, column.of, column.type)
    return _array(values, column.type)


def type_of(column: Column) -> pa.DataType:
    """Return the Arrow type of a column."""
    if column.children:
        return pa.list_(pa.struct([(child.name, type_of(child)) for child in column.children]))
    return column.type
