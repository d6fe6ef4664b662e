"""How big a value is, and which node produced it. Asks only what is free to ask.

Libraries are recognised by the names of a value's classes, none is imported. No cell is read, no lazy or remote table
is run: what would need that (rows of Spark, dask, duckdb and polars' lazy tables; all of Spark Connect) is unknown.

A table is a pandas, polars, Arrow, numpy, Spark, dask or duckdb object; a container is a built-in list, tuple, set,
frozenset, dict, deque, range, array or dict view. Subclasses count as their base, unless they define a `__len__` of
their own, which may do anything. Text, bytes, paths and all other types have no size, even where they have a length.
A container of tables is as big as its tables together; only its first 16 items are looked at, and only their types.

Nothing here raises; all of it is safe from any thread.
"""

from __future__ import annotations

import datetime
import enum
import re
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice, repeat
from operator import attrgetter, is_, methodcaller
from types import ModuleType
from typing import Any, Final, NamedTuple, TypeVar

from otel_odibi.clean import MAX_NAME, clean_name
from otel_odibi.facts import Edge

T = TypeVar("T")

MAX_COLUMNS: Final = 256
"""Column names kept; a longer list ends with `…+N`, where N is how many are left out."""
MAX_TRACKED: Final = 100_000
"""Values whose producer is remembered; beyond it the oldest are forgotten."""
FIRST: Final = 16
"""Items of a container that are looked at."""
MAX_ARROW_PIECES: Final = 512
"""Chunks, over all columns, up to which Arrow bytes are counted exactly."""


class Size(NamedTuple):
    """How big a value is; None for what is unknown.

    `bytes` are those of the buffers a table uses: slices and views count their own part, object columns of pandas and
    numpy count pointers and not what these point at, and containers of other things have none.
    """

    rows: int | None
    bytes: int | None
    columns: tuple[str, ...] | None


NOTHING: Final = Size(None, None, None)
"""The size of what has none."""


class _Kind(NamedTuple):
    """How values of a type are read; None where there is nothing to read. Only containers have `items`."""

    rows: Callable[[Any], int] | None = None
    bytes: Callable[[Any], int] | None = None
    columns: Callable[[Any], tuple[str, ...] | None] | None = None
    items: Callable[[Any], Iterable[Any]] | None = None
    table: bool = False
    tracked: bool = False


# --- questions -------------------------------------------------------------------------------------------------------


def measure(value: object) -> Size:
    """Return rows, bytes and column names of a node's result. Never raises."""
    kind = _kind_of(value)
    if kind is _PLAIN or kind is _OPAQUE:
        return NOTHING
    head = _head(kind, value)
    parts = _parts(value, head) if head else (value,)
    if len(parts) == 1:
        return _size(parts[0])
    sizes = list(map(_size, parts))
    return Size(_sum(size.rows for size in sizes), _sum(size.bytes for size in sizes), None)


def inputs(args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[int | None, tuple[Edge, ...]]:
    """Return the rows of all arguments together, and the nodes that produced them, in order and each once.

    Never raises. A call with scalars alone costs a fraction of a microsecond.
    """
    total: int | None = None
    edges: dict[Edge, None] | None = None
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = _kinds.get(id(type(value))) or _learn(type(value))
        if kind is _PLAIN:
            continue
        head = _head(kind, value) if kind.items else ()
        for part in _parts(value, head) if head else (value,):
            rows = _read(_kind_of(part).rows, part)
            if rows is not None:
                total = rows + (total or 0)
        for item in (value, *head):
            found = _products.get(id(item))
            if found is not None and found[0]() is item:
                edges = edges or {}
                edges[found[1]] = None
    return total, tuple(edges) if edges else ()


def track(value: object, edge: Edge) -> None:
    """Remember that `edge`'s node produced `value`, and the first items of it where it is a container. Never raises.

    The value is not kept alive. A later node that returns the same object becomes its producer. Objects that cannot be
    weakly referenced (numbers, text, paths, lists and dicts themselves) or that all share (enum members, classes,
    dates) are not remembered, and slices, views and copies are new objects: `depends_on` is for those.
    """
    kind = _kind_of(value)
    if kind.tracked:
        _remember(value, edge)
    for item in _head(kind, value):
        if _kind_of(item).tracked:
            _remember(item, edge)


def _head(kind: _Kind, value: object) -> tuple[object, ...]:
    """Return the first items of a container, or none where they hold nothing of interest."""
    if kind.items is None:
        return ()
    try:
        head = tuple(islice(kind.items(value), FIRST))
    except RuntimeError:  # another thread changes it meanwhile
        return ()
    return () if all(map(is_, map(_kinds.get, map(id, map(type, head))), repeat(_PLAIN))) else head


def _parts(value: Any, head: tuple[object, ...]) -> Sequence[object]:
    """Return what makes up a value's size: itself, or the tables in it; nothing where these are not all in its head."""
    tables = [item for item in head if _kind_of(item).table]
    if not tables:
        return (value,)
    return tables if len(value) <= FIRST else ()  # the sum of a part would be taken for the whole


def _size(value: object) -> Size:
    kind = _kind_of(value)
    return Size(_read(kind.rows, value), _read(kind.bytes, value), _read(kind.columns, value))


def _sum(numbers: Iterable[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _read(reader: Callable[[Any], T] | None, value: object) -> T | None:
    if reader is None:
        return None
    try:
        return reader(value)
    except Exception:  # noqa: BLE001 - a foreign object's own methods may raise anything
        return None
    except BaseException as exc:
        if type(exc).__name__ == "PanicException":  # how polars reports a bug of its own; no Exception
            return None
        raise


# --- readers ---------------------------------------------------------------------------------------------------------


def _names_at(path: str) -> Callable[[Any], tuple[str, ...] | None]:
    """Make the reader of column names that are kept at that path of attributes, in a sequence or a pandas Index."""
    get = attrgetter(path)

    def read(value: Any) -> tuple[str, ...] | None:
        names = get(value)
        if names is None:  # as of an array without fields
            return None
        left_out = len(names) - MAX_COLUMNS
        kept = names[:MAX_COLUMNS] if left_out > 0 else names
        kept = kept.tolist() if hasattr(kept, "tolist") else kept
        plain = {str}.issuperset(map(type, kept)) and "".join(kept).isascii()
        if not plain or max(map(len, kept), default=0) > MAX_NAME:  # else all are clean, and a look at each takes 5 us
            kept = map(_name, kept)
        return (*kept, f"…+{left_out}") if left_out > 0 else tuple(kept)

    return read


def _name(name: object) -> str:
    """Return one column name; levels of a MultiIndex are joined with dots, empty ones left out."""
    if type(name) is not tuple:
        return clean_name(name)
    return clean_name(".".join([clean_name(level) for level in name if type(level) is not str or level]))


def _own_name(value: Any) -> tuple[str, ...] | None:
    """Read a series' name; polars calls a nameless one ""."""
    name = value.name
    return None if name is None or (type(name) is str and not name) else (_name(name),)


def _frame_bytes(frame: Any) -> int:
    """Read the bytes of a pandas DataFrame: `memory_usage()` makes a Series a column, which takes 15 times as long."""
    try:
        blocks = [block.values for block in frame._mgr.blocks]
        arrow = [getattr(block, "_pa_array", None) for block in blocks]
        sizes = [b.nbytes if a is None else _arrow_bytes(a, len(blocks)) for a, b in zip(arrow, blocks, strict=True)]
        return int(sum(sizes) + frame.index.nbytes)
    except Exception:  # noqa: BLE001 - not public, so it may change
        return int(frame.memory_usage(deep=False).sum())


def _arrow_bytes(value: Any, columns: int = 1) -> int:
    """Read Arrow's bytes. `nbytes` is right for slices, but takes 2 us a piece and does not know every type.

    `columns` is how many there are of a column that is read alone.
    """
    try:
        width = getattr(value, "num_columns", None)
        column = value.column(0) if width else value
        exact = getattr(column, "num_chunks", 1) * (width or columns) <= MAX_ARROW_PIECES
        return int(value.nbytes if exact else value.get_total_buffer_size())
    except Exception:  # noqa: BLE001 - string views, for one
        return int(value.get_total_buffer_size())


# --- kinds by type ---------------------------------------------------------------------------------------------------

_PLAIN: Final = _Kind()
"""Nothing to read, and never remembered."""
_OPAQUE: Final = _Kind(tracked=True)
_LAZY: Final = _Kind(table=True)
_LISTED: Final = _Kind(columns=_names_at("columns"), table=True)
_SCHEMA: Final = _Kind(columns=_names_at("schema.names"), table=True)
_POLARS: Final = _Kind(len, methodcaller("estimated_size"), table=True)
_BUFFERS: Final = _Kind(len, attrgetter("nbytes"), table=True)
_ARROW: Final = _Kind(len, _arrow_bytes, table=True)

# By "package.Class", or by "full.module.Class" where a package has several classes of that name.
_NAMED: Final = (
    ("builtins.list", _Kind(len, items=list.__iter__)),
    ("builtins.tuple", _Kind(len, items=tuple.__iter__)),
    ("builtins.set", _Kind(len, items=set.__iter__)),
    ("builtins.frozenset", _Kind(len, items=frozenset.__iter__)),
    ("builtins.dict", _Kind(len, items=dict.values)),
    ("builtins.dict_values", _Kind(len, items=iter)),
    ("collections.deque", _Kind(len, items=deque.__iter__)),
    ("builtins.dict_keys builtins.dict_items builtins.range array.array", _Kind(len)),
    ("pandas.DataFrame", _LISTED._replace(rows=len, bytes=_frame_bytes)),
    ("pandas.Series", _Kind(len, lambda series: int(series.nbytes + series.index.nbytes), _own_name, table=True)),
    ("pandas.Index", _BUFFERS),
    ("polars.DataFrame", _POLARS._replace(columns=_LISTED.columns)),
    ("polars.Series", _POLARS._replace(columns=_own_name)),
    ("pyarrow.Table pyarrow.RecordBatch", _ARROW._replace(columns=_SCHEMA.columns)),
    ("pyarrow.ChunkedArray pyarrow.Array", _ARROW),
    ("pyarrow.Dataset pyarrow.RecordBatchReader", _SCHEMA),
    ("numpy.ndarray", _BUFFERS._replace(rows=lambda array: array.shape[0], columns=_names_at("dtype.names"))),
    ("duckdb.DuckDBPyRelation _duckdb.DuckDBPyRelation dask.DataFrame dask_expr.DataFrame", _LISTED),
    ("pyspark.sql.dataframe.DataFrame pyspark.sql.classic.dataframe.DataFrame", _LISTED),
    # Columns of the first may need files to be opened, of the second a call to the server.
    ("polars.LazyFrame pyspark.sql.connect.dataframe.DataFrame pyspark.pandas.frame.DataFrame", _LAZY),
    ("pandas.NAType pyarrow.DataType pyarrow.NullScalar", _PLAIN),
)
_BY_NAME: Final = {name: kind for names, kind in _NAMED for name in names.split()}

# One object of these may stand for many equal values, so it tells nothing about who made it.
_SHARED: Final = (
    int, float, complex, str, bytes, type(None), frozenset, type, ModuleType, enum.Enum, re.Pattern,
    datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
)  # fmt: skip

# Keyed by identity, as hashing a class may run its metaclass's code; an entry goes before its class does.
_kinds: Final[dict[int, _Kind]] = {}


def _kind_of(value: object) -> _Kind:
    return _kinds.get(id(type(value))) or _learn(type(value))


def _learn(cls: type) -> _Kind:
    """Decide how values of a type are read, and keep that for as long as the type lives."""
    try:
        kind = _named(cls)
        tracked = kind is not _PLAIN and cls.__weakrefoffset__ != 0 and not issubclass(cls, _SHARED)
    except Exception:  # noqa: BLE001 - a metaclass may raise anything
        kind, tracked = _PLAIN, False
    if kind is not _OPAQUE:
        kind = kind._replace(tracked=True) if tracked else kind
    elif not tracked:
        kind = _PLAIN
    weakref.finalize(cls, _kinds.pop, id(cls), None).atexit = False
    _kinds[id(cls)] = kind
    return kind


def _named(cls: type) -> _Kind:
    """Find the kind of the nearest known base class."""
    mro = cls.__mro__
    if any(_package(base) == "cudf" for base in mro):  # its stand-ins for pandas classes copy from the GPU when asked
        return _OPAQUE
    for base in mro:
        kind = _BY_NAME.get(f"{base.__module__}.{base.__name__}") or _BY_NAME.get(f"{_package(base)}.{base.__name__}")
        if kind is not None:
            counting = next((owner for owner in mro if "__len__" in vars(owner)), base)
            return kind if _package(counting) == _package(base) else _OPAQUE
    return _OPAQUE


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


# --- producers -------------------------------------------------------------------------------------------------------


# No lock: each step on the dict is atomic, and a lock would be taken again by the callback that a collection may run
# inside it. An id is used again only after the callback of its former owner.
_products: Final[OrderedDict[int, tuple[weakref.ref[Any], Edge]]] = OrderedDict()


def _remember(value: object, edge: Edge) -> None:
    key = id(value)
    _products.pop(key, None)  # so that it becomes the newest
    _products[key] = weakref.ref(value, partial(_products.pop, key)), edge
    if len(_products) > MAX_TRACKED:
        _products.popitem(last=False)
