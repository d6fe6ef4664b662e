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
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
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

    rows: Callable[[Any], int | None] | None = None
    bytes: Callable[[Any], int | None] | None = None
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
    tables = _tables(_head(kind, value)) if kind.items else None
    if not tables:
        return _size(kind, value)
    if len(value) > FIRST:  # type: ignore[arg-type]  # the sum of a part would be taken for the whole
        return NOTHING
    sizes = [_size(_kind_of(table), table) for table in tables]
    columns = sizes[0].columns if len(sizes) == 1 else None
    return Size(_sum(size.rows for size in sizes), _sum(size.bytes for size in sizes), columns)


def rows(value: object) -> int | None:
    """Return how many rows a value has, which costs less than `measure`. Never raises."""
    kind = _kind_of(value)
    return _rows(kind, value, _head(kind, value))


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
        count = _rows(kind, value, head)
        if count is not None:
            total = count if total is None else total + count
        if edges is None:
            edges = {}
        _collect(edges, value, head)
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


def producers(values: Iterable[object]) -> tuple[Edge, ...]:
    """Return the nodes that produced these values or their first items, in order and each once. Never raises."""
    edges: dict[Edge, None] = {}
    for value in values:
        _collect(edges, value, _head(_kind_of(value), value))
    return tuple(edges)


# --- reading one value -----------------------------------------------------------------------------------------------


def _read(reader: Callable[[Any], T | None] | None, value: object) -> T | None:
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


def _size(kind: _Kind, value: object) -> Size:
    return Size(_read(kind.rows, value), _read(kind.bytes, value), _read(kind.columns, value))


def _head(kind: _Kind, value: object) -> tuple[object, ...]:
    """Return the first items of a container, or none where they hold nothing of interest."""
    if kind.items is None:
        return ()
    try:
        head = tuple(islice(kind.items(value), FIRST))
    except RuntimeError:  # another thread changes it meanwhile
        return ()
    return () if _plain_ids.issuperset(map(id, map(type, head))) else head


def _tables(head: tuple[object, ...]) -> list[object]:
    return [item for item in head if _kind_of(item).table]


def _rows(kind: _Kind, value: Any, head: tuple[object, ...]) -> int | None:
    tables = _tables(head) if head else None
    if not tables:
        return _read(kind.rows, value)
    return None if len(value) > FIRST else _sum(_read(_kind_of(table).rows, table) for table in tables)


def _sum(numbers: Iterable[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


# --- readers ---------------------------------------------------------------------------------------------------------


def _names(names: Sequence[Any], total: int) -> tuple[str, ...]:
    """Return as clean text the names kept, out of `total`."""
    if total > MAX_COLUMNS:
        return (*_names(names, len(names)), f"…+{total - MAX_COLUMNS}")
    plain = {str}.issuperset(map(type, names)) and "".join(names).isascii()
    if plain and max(map(len, names), default=0) <= MAX_NAME:  # all are clean, and looking at each would take 5 us
        return tuple(names)
    return tuple(map(_name, names))


def _name(name: object) -> str:
    """Return one column name; levels of a MultiIndex are joined with dots, empty ones left out."""
    if type(name) is not tuple:
        return clean_name(name)
    return clean_name(".".join([clean_name(level) for level in name if type(level) is not str or level]))


def _index_names(value: Any) -> tuple[str, ...]:
    """Read the columns of what keeps them in a pandas Index."""
    index = value.columns
    total = len(index)
    return _names((index if total <= MAX_COLUMNS else index[:MAX_COLUMNS]).tolist(), total)


def _list_names(value: Any) -> tuple[str, ...]:
    names = value.columns
    return _names(names[:MAX_COLUMNS], len(names))


def _schema_names(value: Any) -> tuple[str, ...]:
    names = value.schema.names
    return _names(names[:MAX_COLUMNS], len(names))


def _own_name(value: Any) -> tuple[str, ...] | None:
    """Read a series' name; polars calls a nameless one ""."""
    name = value.name
    return None if name is None or (type(name) is str and not name) else (_name(name),)


def _frame_bytes(frame: Any) -> int:
    """Read the bytes of a pandas DataFrame: `memory_usage()` makes a Series a column, which takes 15 times as long."""
    try:
        blocks = frame._mgr.blocks
        return int(sum([_block_bytes(block.values, len(blocks)) for block in blocks]) + frame.index.nbytes)
    except Exception:  # noqa: BLE001 - not public, so it may change
        return int(frame.memory_usage(deep=False).sum())


def _block_bytes(values: Any, blocks: int) -> int:
    chunks = getattr(values, "_pa_array", None)
    return int(values.nbytes) if chunks is None else _arrow_bytes(chunks, blocks * chunks.num_chunks)


def _series_bytes(series: Any) -> int:
    return int(series.nbytes + series.index.nbytes)


def _own_bytes(value: Any) -> int:
    return int(value.nbytes)


def _polars_bytes(value: Any) -> int:
    return int(value.estimated_size())


def _arrow_bytes(value: Any, pieces: int = 1) -> int:
    """Read Arrow's bytes. `nbytes` is right for slices, but takes 2 us a piece and does not know every type."""
    try:
        return int(value.nbytes if pieces <= MAX_ARROW_PIECES else value.get_total_buffer_size())
    except Exception:  # noqa: BLE001 - string views, for one
        return int(value.get_total_buffer_size())


def _chunked_bytes(value: Any) -> int:
    return _arrow_bytes(value, value.num_chunks)


def _batch_bytes(value: Any) -> int:
    return _arrow_bytes(value, value.num_columns)


def _table_bytes(value: Any) -> int:
    width = value.num_columns
    return _arrow_bytes(value, width * value.column(0).num_chunks if width else 0)


def _array_rows(value: Any) -> int | None:
    shape = value.shape
    return shape[0] if shape else None


def _field_names(value: Any) -> tuple[str, ...] | None:
    names = value.dtype.names
    return None if names is None else _names(names[:MAX_COLUMNS], len(names))


# --- kinds by type ---------------------------------------------------------------------------------------------------

_PLAIN: Final = _Kind()
"""Nothing to read, and never remembered."""
_OPAQUE: Final = _Kind(tracked=True)
_LAZY: Final = _Kind(table=True)
_LISTED: Final = _Kind(columns=_list_names, table=True)
_SCHEMA: Final = _Kind(columns=_schema_names, table=True)
_LENGTH: Final = _Kind(len)

# By "package.Class", or by "full.module.Class" where a package has several classes of that name.
_BY_NAME: Final[Mapping[str, _Kind]] = {
    "builtins.list": _Kind(len, items=list.__iter__),
    "builtins.tuple": _Kind(len, items=tuple.__iter__),
    "builtins.set": _Kind(len, items=set.__iter__),
    "builtins.frozenset": _Kind(len, items=frozenset.__iter__),
    "builtins.dict": _Kind(len, items=dict.values),
    "builtins.dict_values": _Kind(len, items=iter),
    "collections.deque": _Kind(len, items=deque.__iter__),
    "builtins.dict_keys": _LENGTH,
    "builtins.dict_items": _LENGTH,
    "builtins.range": _LENGTH,
    "array.array": _LENGTH,
    "pandas.DataFrame": _Kind(len, _frame_bytes, _index_names, table=True),
    "pandas.Series": _Kind(len, _series_bytes, _own_name, table=True),
    "pandas.Index": _Kind(len, _own_bytes, table=True),
    "polars.DataFrame": _Kind(len, _polars_bytes, _list_names, table=True),
    "polars.Series": _Kind(len, _polars_bytes, _own_name, table=True),
    "polars.LazyFrame": _LAZY,  # even its column names may need files to be opened
    "pyarrow.Table": _Kind(len, _table_bytes, _schema_names, table=True),
    "pyarrow.RecordBatch": _Kind(len, _batch_bytes, _schema_names, table=True),
    "pyarrow.ChunkedArray": _Kind(len, _chunked_bytes, table=True),
    "pyarrow.Array": _Kind(len, _arrow_bytes, table=True),
    "pyarrow.Dataset": _SCHEMA,
    "pyarrow.RecordBatchReader": _SCHEMA,
    "numpy.ndarray": _Kind(_array_rows, _own_bytes, _field_names, table=True),
    "duckdb.DuckDBPyRelation": _LISTED,
    "_duckdb.DuckDBPyRelation": _LISTED,
    "dask.DataFrame": _Kind(columns=_index_names, table=True),
    "dask_expr.DataFrame": _Kind(columns=_index_names, table=True),
    "pyspark.sql.dataframe.DataFrame": _LISTED,
    "pyspark.sql.classic.dataframe.DataFrame": _LISTED,
    "pyspark.sql.connect.dataframe.DataFrame": _LAZY,  # its columns cost a call to the server
    "pyspark.pandas.frame.DataFrame": _LAZY,
    "pandas.NAType": _PLAIN,
    "pyarrow.DataType": _PLAIN,
    "pyarrow.NullScalar": _PLAIN,
}

# One object of these may stand for many equal values, so it tells nothing about who made it.
_SHARED: Final = (
    int, float, complex, str, bytes, type(None), frozenset, type, ModuleType, enum.Enum, re.Pattern,
    datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
)  # fmt: skip

# Keyed by identity, as hashing a class may run its metaclass's code; an entry goes before its class does.
_kinds: Final[dict[int, _Kind]] = {}
_plain_ids: Final[set[int]] = set()
_type_refs: Final[dict[int, weakref.ref[type]]] = {}


def _kind_of(value: object) -> _Kind:
    cls = type(value)
    return _kinds.get(id(cls)) or _learn(cls)


def _learn(cls: type) -> _Kind:
    """Decide how values of a type are read, and keep that for as long as the type lives."""
    try:
        kind = _classify(cls)
    except Exception:  # noqa: BLE001 - a metaclass may raise anything
        kind = _PLAIN
    key = id(cls)

    def forget(_: object) -> None:
        _kinds.pop(key, None)
        _plain_ids.discard(key)
        _type_refs.pop(key, None)

    _type_refs[key] = weakref.ref(cls, forget)
    if kind is _PLAIN:
        _plain_ids.add(key)
    _kinds[key] = kind
    return kind


def _classify(cls: type) -> _Kind:
    kind = _named(cls)
    tracked = kind is not _PLAIN and cls.__weakrefoffset__ != 0 and not issubclass(cls, _SHARED)
    if kind is _OPAQUE or kind is _PLAIN:
        return _OPAQUE if tracked else _PLAIN
    return kind._replace(tracked=tracked)


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


class _Product(weakref.ref[Any]):
    """A weak reference to a value, with its producer and the key it is kept under."""

    __slots__ = ("edge", "key")
    edge: Edge
    key: int


# No lock: each step on the dict is atomic, and a lock would be taken again by the callback that a collection may run
# inside it. An id is used again only after the callback of its former owner.
_products: Final[dict[int, _Product]] = {}


def _forget(product: weakref.ref[Any]) -> None:
    key = product.key  # type: ignore[attr-defined]
    if _products.get(key) is product:
        _products.pop(key, None)


def _remember(value: object, edge: Edge) -> None:
    product = _Product(value, _forget)
    product.edge = edge
    product.key = key = id(value)
    _products.pop(key, None)  # so that it becomes the newest
    _products[key] = product
    if len(_products) > MAX_TRACKED:
        _forget_oldest()


def _forget_oldest() -> None:
    """Forget a tenth at once, as finding the oldest of a dict takes longer the more were removed before it."""
    try:
        oldest = list(islice(_products, MAX_TRACKED // 10 + 1))
    except RuntimeError:  # another thread changed it; the next value tries again
        return
    for key in oldest:
        _products.pop(key, None)


def _collect(edges: dict[Edge, None], value: object, head: tuple[object, ...]) -> None:
    for item in (value, *head) if head else (value,):
        product = _products.get(id(item))
        if product is not None and product() is item:
            edges[product.edge] = None
