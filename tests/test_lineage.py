"""What a node's values weigh and where they come from, for every kind of value."""

from __future__ import annotations

import array
import collections
import dataclasses
import enum
import gc
import os
import pathlib
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_odibi import lineage
from otel_odibi.facts import Edge
from otel_odibi.lineage import NOTHING, Size

A, B, C = Edge("a", 1, 10), Edge("b", 1, 20), Edge("c", 1, 30)


def fake(full_name: str, *bases: type, **members: Any) -> Any:
    """Make an object whose class says it is `full_name`, as those of libraries that are not installed here."""
    module, _, name = full_name.rpartition(".")
    return type(name, bases, {"__module__": module, **members})()


def rows(value: object) -> int | None:
    """Return the rows of a node's only input."""
    return lineage.inputs((value,), {})[0]


def producers(values: list[Any]) -> tuple[Edge, ...]:
    """Return the edges that a node with these inputs has."""
    return lineage.inputs(values, {})[1]


def raises(exc: type[BaseException]) -> property:
    """Make a property that raises."""

    def read(_: object) -> Any:
        raise exc("on purpose")

    return property(read)


def nobody_asks(*_: object) -> Any:
    """Stand in for what would start a job."""
    raise AssertionError("this would have run a query")


# --- pandas ----------------------------------------------------------------------------------------------------------


def test_a_pandas_frame_gives_rows_bytes_and_columns() -> None:
    """Bytes are those of the cells and the index."""
    frame = pd.DataFrame({"a": np.arange(1000), "b": np.ones(1000)}, index=np.arange(1000))
    assert lineage.measure(frame) == Size(1000, 3 * 8 * 1000, ("a", "b"))


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame(),
        pd.DataFrame(index=range(5)),
        pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5], "c": [True, False]}),
        pd.DataFrame({"a": ["x", "long text" * 100], "b": [object(), None]}, dtype=object),
        pd.DataFrame({"a": pd.to_datetime(["2026-01-01", "2026-01-02"]), "b": pd.to_timedelta(["1s", "2s"])}),
        pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "b": pd.array(["x", None], dtype="string")}),
        pd.DataFrame({"a": range(100)}).iloc[10:20],
        pd.DataFrame({"a": range(100), "b": list("ab") * 50}).groupby("b").sum(),
        pd.concat([pd.DataFrame({f"c{i}": [i]}) for i in range(50)], axis=1),
    ],
)  # fmt: skip
def test_pandas_bytes_agree_with_memory_usage(frame: pd.DataFrame) -> None:
    """The fast way gives what the public, slow one does, which counts pointers of object columns, not their objects."""
    size = lineage.measure(frame)
    assert size.rows == len(frame)
    assert size.bytes == frame.memory_usage(index=False).sum() + frame.index.nbytes


def test_pandas_categories_count_once() -> None:
    """A category column is its codes and its categories, without the lookup table that pandas may have made of them."""
    categories = pd.Categorical(["x", "y"] * 500)
    frame = pd.DataFrame({"a": categories})
    assert lineage.measure(frame).bytes == categories.nbytes + frame.index.nbytes


def test_pandas_bytes_fall_back_to_the_public_way() -> None:
    """Should pandas change inside, bytes are still there."""
    frame = pd.DataFrame({"a": [1, 2, 3]})
    members = {"_mgr": raises(AttributeError), "memory_usage": frame.memory_usage, "columns": frame.columns}
    changed = fake("pandas.DataFrame", **members, __len__=lambda _: 3)
    assert lineage.measure(changed) == Size(3, frame.memory_usage().sum(), ("a",))


def test_a_half_made_frame_has_no_size() -> None:
    """As subclasses leave it while they are being made."""
    assert lineage.measure(pd.DataFrame.__new__(pd.DataFrame)) == NOTHING


def test_pandas_text_in_many_chunks_is_counted_the_cheap_way() -> None:
    """Arrow needs 2 us a chunk for the exact figure; beyond some hundred chunks the buffers' size will do."""
    chunks = pa.chunked_array([["some text"]] * 1000)
    frame = pd.DataFrame({"a": pd.arrays.ArrowExtensionArray(chunks)})
    assert lineage.measure(frame).bytes == chunks.get_total_buffer_size() + frame.index.nbytes


def test_pandas_series_and_index() -> None:
    """A series has its name as only column, an index has none."""
    series = pd.Series([1.0, 2.0], name="x", index=np.array([1, 2]))
    assert lineage.measure(series) == Size(2, 32, ("x",))
    assert lineage.measure(series.rename(None)) == Size(2, 32, None)
    assert lineage.measure(pd.Index(np.array([1, 2, 3]), name="k")) == Size(3, 24, None)
    assert lineage.measure(pd.MultiIndex.from_tuples([(1, 2)])).rows == 1


def test_levels_of_a_multiindex_are_joined_with_dots() -> None:
    """Empty levels, as `reset_index` leaves them, are left out."""
    columns = pd.MultiIndex.from_tuples([("delay", "mean"), ("delay", 5), ("carrier", "")])
    assert lineage.measure(pd.DataFrame(columns=columns)).columns == ("delay.mean", "delay.5", "carrier")


def test_column_names_become_clean_text() -> None:
    """Any object can name a column."""
    frame = pd.DataFrame(columns=[1, None, "é", "\ud800", "x" * 2000, np.str_("n")])
    names = lineage.measure(frame).columns
    assert names is not None
    assert [type(name) for name in names] == [str] * 6
    assert names[2:4] == ("é", "\ufffd")
    assert names[4].startswith("x" * 1024 + "…")


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, pa.table])
def test_of_many_columns_256_are_named_and_the_rest_counted(make: Any) -> None:
    """Whatever the library."""
    exact = make({f"c{i}": [0] for i in range(256)})
    assert lineage.measure(exact).columns == tuple(f"c{i}" for i in range(256))
    names = lineage.measure(make({f"c{i}": [0] for i in range(1000)})).columns
    assert names == (*(f"c{i}" for i in range(256)), "…+744")


def test_subclasses_of_pandas_count_as_pandas() -> None:
    """Geopandas and many others derive from it."""
    cls = type("GeoDataFrame", (pd.DataFrame,), {"__module__": "geopandas.geodataframe"})
    assert lineage.measure(cls({"a": [1, 2]})) == lineage.measure(pd.DataFrame({"a": [1, 2]}))


def test_a_subclass_with_a_length_of_its_own_is_not_asked() -> None:
    """It may be a stand-in for something lazy."""
    cls = type("Lazy", (pd.DataFrame,), {"__len__": nobody_asks})
    assert lineage.measure(cls({"a": [1, 2]})) == NOTHING
    proxy = fake("pandas.DataFrame", type("_FastSlowProxy", (), {"__module__": "cudf.pandas"}), __len__=nobody_asks)
    assert lineage.measure(proxy) == NOTHING


# --- polars, Arrow, numpy, duckdb ------------------------------------------------------------------------------------


def test_polars_frames_and_series() -> None:
    """A lazy frame gives nothing: even its column names may need files to be opened."""
    frame = pl.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "z"]})
    assert lineage.measure(frame) == Size(3, frame.estimated_size(), ("a", "b"))
    assert lineage.measure(frame["a"]) == Size(3, 24, ("a",))
    assert lineage.measure(pl.Series([1])) == Size(1, 8, None)
    assert lineage.measure(frame.lazy()) == NOTHING


def test_a_panic_of_polars_is_no_ones_problem() -> None:
    """Its exception is no `Exception`: so the rest is given, and only the bytes are missing."""
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    frame = fake("polars.dataframe.frame.DataFrame", __len__=lambda _: 3, columns=["a"], estimated_size=raises(panic))
    assert lineage.measure(frame) == Size(3, None, ("a",))


def test_arrow_tables_batches_and_arrays() -> None:
    """Slices count their own part of the buffers."""
    table = pa.table({"a": pa.array(range(1000), pa.int64()), "b": pa.array(range(1000), pa.int32())})
    assert lineage.measure(table) == Size(1000, 12_000, ("a", "b"))
    assert lineage.measure(table.slice(10, 5)) == Size(5, 60, ("a", "b"))
    assert lineage.measure(table.to_batches()[0]) == Size(1000, 12_000, ("a", "b"))
    assert lineage.measure(table["a"]) == Size(1000, 8000, None)
    assert lineage.measure(table["a"].chunk(0)) == Size(1000, 8000, None)
    assert lineage.measure(pa.table({})) == Size(0, 0, ())


def test_arrow_in_many_chunks_is_counted_the_cheap_way() -> None:
    """20,000 chunks would take 34 ms to count exactly."""
    table = pa.concat_tables([pa.table({"a": [1, 2]})] * 1000)
    assert lineage.measure(table).bytes == table.get_total_buffer_size()


def test_arrow_types_without_an_exact_size_have_one_all_the_same() -> None:
    """Should `nbytes` refuse, the buffers' size will do."""
    members = {"num_chunks": 1, "nbytes": raises(TypeError), "get_total_buffer_size": lambda _: 77}
    assert lineage.measure(fake("pyarrow.lib.ChunkedArray", **members)) == Size(None, 77, None)


def test_arrow_datasets_and_readers_give_columns_only(tmp_path: pathlib.Path) -> None:
    """Counting their rows would read them."""
    table = pa.table({"a": [1, 2], "b": [3, 4]})
    pa.dataset.write_dataset(table, tmp_path, format="parquet")
    assert lineage.measure(pa.dataset.dataset(tmp_path)) == Size(None, None, ("a", "b"))
    reader = table.to_reader()
    assert lineage.measure(reader) == Size(None, None, ("a", "b"))
    assert reader.read_all() == table


def test_numpy_arrays_have_as_many_rows_as_their_first_axis_is_long() -> None:
    """An array without axes is a scalar; fields of a structured array are columns."""
    assert lineage.measure(np.zeros((5, 4))) == Size(5, 160, None)
    assert lineage.measure(np.array(1.0)) == Size(None, 8, None)
    assert lineage.measure(np.float64(1)) == NOTHING
    assert lineage.measure(np.zeros(3, dtype=[("x", "i4"), ("y", "i4")])) == Size(3, 24, ("x", "y"))
    assert lineage.measure(np.ma.array([1, 2, 3])).rows == 3


def test_a_duckdb_relation_gives_columns_and_runs_no_query() -> None:
    """This one would fail if it ran."""
    with duckdb.connect() as connection:
        relation = connection.sql("select error('it ran') as a, 1 as b")
        assert lineage.measure(relation) == Size(None, None, ("a", "b"))
        lineage.track(relation, A)
        assert lineage.inputs((relation,), {}) == (None, (A,))


# --- libraries that are not installed here ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["dask.dataframe.core", "dask.dataframe.dask_expr._collection", "dask_expr._collection"]
)
def test_a_dask_frame_gives_columns_and_computes_nothing(module: str) -> None:
    """Its columns are those of its empty example."""
    frame = fake(f"{module}.DataFrame", columns=pd.Index(["a", "b"]), __len__=nobody_asks, compute=nobody_asks)
    assert lineage.measure(frame) == Size(None, None, ("a", "b"))
    assert lineage.inputs((frame,), {}) == (None, ())


@pytest.mark.parametrize("module", ["pyspark.sql.dataframe", "pyspark.sql.classic.dataframe"])
def test_a_spark_frame_gives_columns_and_starts_no_job(module: str) -> None:
    """Spark knows the columns since it analysed the plan."""
    frame = fake(f"{module}.DataFrame", columns=["a", "b"], count=nobody_asks)
    assert lineage.measure(frame) == Size(None, None, ("a", "b"))
    assert rows(frame) is None


def test_spark_connect_is_not_asked_at_all() -> None:
    """Its classes derive from those of Spark, but each question is a call to a server."""
    parent = type("DataFrame", (), {"__module__": "pyspark.sql.dataframe"})
    frame = fake("pyspark.sql.connect.dataframe.DataFrame", parent, columns=property(nobody_asks))
    assert lineage.measure(frame) == NOTHING
    assert rows([frame, frame]) is None


def test_no_library_is_imported() -> None:
    """Measuring costs users nothing but what they use."""
    code = """if True:
        import sys
        from otel_odibi import lineage
        lineage.measure([{"a": 1}]), lineage.inputs((1, [2]), {}), lineage.track({1}, None)
        assert not {"pandas", "polars", "pyarrow", "numpy", "duckdb", "dask", "pyspark"} & set(sys.modules)"""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


# --- built-in containers ---------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """A namedtuple of tables."""

    train: Any
    test: Any


@dataclasses.dataclass
class Config:
    """A dataclass, which is no container."""

    items: list[int]


@pytest.mark.parametrize(
    "container",
    [
        [1, 2, 3], (1, 2, 3), {1, 2, 3}, frozenset({1, 2, 3}), {1: 1, 2: 2, 3: 3}, collections.deque([1, 2, 3]),
        range(3), array.array("d", [1, 2, 3]), {1: 1, 2: 2, 3: 3}.keys(), {1: 1, 2: 2, 3: 3}.values(),
        {1: 1, 2: 2, 3: 3}.items(), collections.OrderedDict(a=1, b=2, c=3), collections.Counter("abc"),
        collections.defaultdict(int, a=1, b=2, c=3), collections.namedtuple("Three", "a b c")(1, 2, 3),
        type("Rows", (list,), {})([1, 2, 3]),
    ],
)  # fmt: skip
def test_builtin_containers_have_rows_only(container: object) -> None:
    """A row an item; their bytes would mean looking at every one."""
    assert lineage.measure(container) == Size(3, None, None)
    assert rows(container) == 3


@pytest.mark.parametrize(
    "value",
    [
        None, True, 1, 1.5, 1j, "text", b"bytes", bytearray(3), memoryview(b"abc"), pathlib.Path("a/b"), ..., int, len,
        Config([1, 2]), iter([1, 2]), collections.UserList([1]), collections.ChainMap({}), object(), re.compile("a"),
        type("Query", (), {"__len__": nobody_asks})(), type("Query", (list,), {"__len__": nobody_asks})([1]),
    ],
)  # fmt: skip
def test_text_bytes_scalars_and_unknown_types_have_no_size(value: object) -> None:
    """Even those with a length: asking for it might run a query."""
    assert lineage.measure(value) is NOTHING
    assert rows(value) is None
    assert lineage.inputs((value,), {"key": value}) == (None, ())


def test_a_container_of_tables_is_as_big_as_they_are() -> None:
    """Whatever else it holds; columns are known where there is one table."""
    frame, table = pd.DataFrame({"a": [1, 2]}), pa.table({"b": [1, 2, 3]})
    one, other = lineage.measure(frame), lineage.measure(table)
    assert one.bytes is not None
    assert other.bytes is not None
    assert lineage.measure((frame, table)) == Size(5, one.bytes + other.bytes, None)
    assert lineage.measure(Split(frame, table)).rows == 5
    assert lineage.measure({"model": "m", "data": frame}) == one
    assert lineage.measure({"x": frame}.values()) == one
    assert rows([frame, frame, "text"]) == 4


def test_a_container_of_lazy_tables_has_no_rows() -> None:
    """The number of tables would be taken for rows."""
    assert lineage.measure([pl.LazyFrame({"a": [1]})]) == NOTHING
    assert lineage.measure([pl.LazyFrame({"a": [1]}), pl.DataFrame({"a": [1, 2]})]).rows == 2


def test_more_tables_than_are_looked_at_have_no_size() -> None:
    """The sum of the first 16 would be taken for the sum of all."""
    frame = pd.DataFrame({"a": [1, 2]})
    assert lineage.measure([frame] * 16).rows == 32
    assert lineage.measure([frame] * 17) == NOTHING
    assert rows([frame] * 17) is None


@pytest.mark.parametrize("record", [{"a": 1, "b": None}, (1, "x"), Split(1, 2), [1], Config([1]), {}, ()])
@pytest.mark.parametrize("count", [1, 16, 17, 5000])
def test_a_list_of_records_has_as_many_rows_as_records(record: object, count: int) -> None:
    """However long it is; records are no tables, so nothing is added up."""
    assert lineage.measure([record] * count) == Size(count, None, None)
    assert rows([record] * count) == count


def test_only_the_first_level_is_looked_at() -> None:
    """Deeper tables are items like any other."""
    assert lineage.measure([[pd.DataFrame({"a": [1, 2, 3]})]]) == Size(1, None, None)


def test_a_circular_list_is_a_list() -> None:
    """Nothing follows it round."""
    ring: list[Any] = [1]
    ring.append(ring)
    assert lineage.measure(ring) == Size(2, None, None)


# --- what foreign code may do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["shape", "nbytes", "dtype"])
def test_a_property_that_raises_leaves_only_that_fact_unknown(member: str) -> None:
    """The others are still given."""
    dtype = type("D", (), {"names": ("x",)})
    members = {"shape": (2, 3), "nbytes": 6, "dtype": dtype, member: raises(ValueError)}
    size = lineage.measure(fake("numpy.ndarray", **members))
    missing = {"shape": "rows", "nbytes": "bytes", "dtype": "columns"}[member]
    assert size == Size(2, 6, ("x",))._replace(**{missing: None})


@pytest.mark.parametrize(
    "name",
    ["pandas.DataFrame", "pandas.Series", "polars.frame.DataFrame", "pyarrow.lib.Table", "pyarrow.lib.RecordBatch",
     "pyarrow._dataset.Dataset", "numpy.ndarray", "dask.dataframe.DataFrame", "duckdb.DuckDBPyRelation"],
)  # fmt: skip
def test_an_object_that_is_not_what_it_says_has_no_size(name: str) -> None:
    """No attribute there is taken for granted."""
    assert lineage.measure(fake(name)) == NOTHING
    broken = fake(name, __getattr__=nobody_asks, __len__=nobody_asks)
    assert lineage.measure(broken) == NOTHING
    assert lineage.inputs((broken, [broken]), {}) == (None, ())


@pytest.mark.parametrize("exc", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes(exc: type[BaseException]) -> None:
    """Ctrl-C while a table is measured still stops the program."""
    with pytest.raises(exc):
        lineage.measure(fake("numpy.ndarray", shape=raises(exc)))


def test_a_strange_metaclass_is_no_obstacle() -> None:
    """Its hash, comparison and attributes may raise."""

    def refuse(*_: object) -> Any:
        raise RuntimeError("on purpose")

    meta = type("Meta", (type,), {"__hash__": refuse, "__eq__": refuse, "__getattribute__": refuse})
    value = meta("Strange", (), {})()
    lineage.track([value], A)
    assert lineage.measure([value]) == Size(1, None, None)
    assert lineage.inputs((value,), {}) == (None, ())


def test_a_class_is_not_kept_alive() -> None:
    """A class made inside a node may hold on to the node's values."""
    cls = type("Local", (), {"__slots__": ()})
    key, gone = id(cls), weakref.ref(cls)
    lineage.measure(cls())
    assert key in lineage._kinds
    del cls
    gc.collect()
    assert gone() is None
    assert key not in lineage._kinds


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates()
keys = st.text() | st.integers()
nested = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner).map(tuple) | st.sets(keys)
    | st.frozensets(keys) | st.lists(inner).map(collections.deque) | st.lists(inner).map(iter),
    max_leaves=40,
)  # fmt: skip


@given(nested, st.dictionaries(st.text(), nested))
def test_no_builtin_value_makes_anything_raise(value: object, kwargs: dict[str, object]) -> None:
    """Sizes are numbers or unknown, whatever comes in."""
    size = lineage.measure(value)
    assert size.rows is None or size.rows >= 0
    assert rows(value) == size.rows
    lineage.track(value, A)
    counted, edges = lineage.inputs((value,), kwargs)
    assert counted is None or counted >= (size.rows or 0)
    assert set(edges) <= {A}
    assert set(producers([value])) <= {A}


# --- who produced it -------------------------------------------------------------------------------------------------


class Model:
    """Something that no one can measure, but that a node can produce."""


class Level(enum.Enum):
    """Its members are one object each for the whole process."""

    LOW = 1


def test_rows_of_all_arguments_add_up() -> None:
    """Those by name too; what has none does not count."""
    frame = pd.DataFrame({"a": [1, 2]})
    assert lineage.inputs((frame, "text", 5), {"more": [1, 2, 3], "no": None}) == (5, ())
    assert lineage.inputs((), {}) == (None, ())


def test_producers_come_in_the_order_of_arguments_and_once() -> None:
    """An edge a producer, however many of its values come in."""
    first, second, third = pd.DataFrame(), Model(), np.zeros(3)
    lineage.track(first, B)
    lineage.track((second, third), A)
    assert lineage.inputs((second, first), {"x": third})[1] == (A, B)
    assert producers([first, second, first]) == (B, A)


@pytest.mark.parametrize(
    "value",
    [
        pd.DataFrame({"a": [1, 2]}), pd.Series([1, 2]), pd.Index([1, 2]), pl.DataFrame({"a": [1]}), pl.Series([1]),
        pl.LazyFrame({"a": [1]}), pa.table({"a": [1]}), pa.array([1]), pa.chunked_array([[1]]), np.zeros(3), {1},
        collections.deque([1]), array.array("d"), fake("pyspark.sql.dataframe.DataFrame"), lambda: None, Model(),
        pa.dataset.dataset(pa.table({"a": [1]})), pa.table({"a": [1]}).to_reader(),
    ],
)  # fmt: skip
def test_what_can_be_weakly_referenced_is_tracked(value: object) -> None:
    """Alone, and as an item of a container that cannot be."""
    lineage.track(value, A)
    assert producers([value]) == (A,)
    lineage.track({"key": value}, B)
    assert producers([[value]]) == (B,)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 7, 1.5, "text", b"bytes", (), [], {}, [1], {"a": 1}, frozenset(), Level.LOW, Level, int, sys,
        pd.NA, pd.NaT, pd.Timestamp(0), np.float64(1), np.dtype("i8"), pa.int64(), pa.scalar(None), re.compile("a"),
        pathlib.Path("a"),
    ],
)  # fmt: skip
def test_shared_and_plain_values_are_never_tracked(value: object) -> None:
    """Another node's None, or its equal enum member, is the same object."""
    lineage.track(value, A)
    lineage.track([value], A)
    assert producers([value, [value]]) == ()


def test_a_value_passed_on_belongs_to_the_node_that_passed_it_last() -> None:
    """The graph is a chain then, not a fan."""
    model = Model()
    lineage.track(model, A)
    lineage.track(model, B)
    assert producers([model]) == (B,)


def test_slices_views_and_copies_are_new_values() -> None:
    """Their edges are what `depends_on` is for."""
    frame = pd.DataFrame({"a": [1, 2]})
    lineage.track(frame, A)
    assert producers([frame[:1], frame["a"], frame.copy()]) == ()


def test_of_a_long_list_the_first_items_are_tracked() -> None:
    """A list of a million must not cost a million."""
    models = [Model() for _ in range(20)]
    lineage.track(models, A)
    assert [producers([model]) for model in models] == [(A,)] * 16 + [()] * 4
    assert producers([models]) == (A,)


def test_values_are_never_compared_nor_hashed() -> None:
    """Comparing frames gives frames, whose truth is an error."""
    value = fake("some.Table", __eq__=nobody_asks, __hash__=None, __bool__=nobody_asks, __len__=nobody_asks)
    lineage.track(value, A)
    assert lineage.inputs((value, [value]), {}) == (1, (A,))


def test_a_tracked_value_is_not_kept_alive() -> None:
    """Neither by itself nor in a cycle; and what is gone leaves nothing behind."""
    frame, model = pd.DataFrame({"a": [1]}), Model()
    model.me = model  # type: ignore[attr-defined]
    lineage.track([frame, model], A)
    keys, gone = {id(frame), id(model)}, [weakref.ref(frame), weakref.ref(model)]
    assert keys <= lineage._products.keys()
    del frame, model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert not keys & lineage._products.keys()


def test_a_new_value_at_an_old_address_has_no_producer() -> None:
    """Addresses are used again at once."""
    seen: set[int] = set()
    for _ in range(1000):
        model = Model()
        assert producers([model]) == ()
        lineage.track(model, A)
        seen.add(id(model))
        del model
    assert len(seen) < 1000


def test_what_is_remembered_of_a_dead_value_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should its entry still be there, it names another object."""
    old, new = Model(), Model()
    lineage.track(old, A)
    monkeypatch.setitem(lineage._products, id(new), lineage._products[id(old)])
    assert producers([new]) == ()
    assert producers([old]) == (A,)


def test_beyond_the_limit_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value tracked again is new again."""
    monkeypatch.setattr(lineage, "MAX_TRACKED", 100)
    monkeypatch.setattr(lineage, "_products", collections.OrderedDict())
    models = [Model() for _ in range(101)]
    for model in models[:100]:
        lineage.track(model, A)
    lineage.track(models[0], B)
    lineage.track(models[100], C)
    assert len(lineage._products) == 100
    assert producers(models) == (B, A, C)
    assert producers(models[1:2]) == ()


def test_threads_may_track_and_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds its own values with its own producer, while the oldest are forgotten."""
    monkeypatch.setattr(lineage, "MAX_TRACKED", 500)
    failures: list[object] = []

    def work(number: int) -> None:
        edge = Edge(f"n{number}", 1, number)
        for _ in range(2000):
            value = Model()
            lineage.track([value], edge)
            found = lineage.inputs(([value],), {})
            if found != (1, (edge,)):
                failures.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_container_that_changes_meanwhile_is_still_counted() -> None:
    """As it stands when it is asked."""

    def changing() -> Iterator[object]:
        yield Model()
        raise RuntimeError("set changed size during iteration")

    assert lineage._head(lineage._Kind(len, items=lambda _: changing()), [1]) == ()
