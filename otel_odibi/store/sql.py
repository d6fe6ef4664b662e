"""SQL over a telemetry directory: duckdb over what the other readers return."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from otel_odibi.errors import MissingExtraError, StoreError


def run(query: str, views: Mapping[str, Callable[[], Any]]) -> pa.Table:
    """Return what duckdb makes of a query; of the views those are made that it names. Raises StoreError."""
    try:
        import duckdb
    except ImportError:
        raise MissingExtraError("Store.sql()", "query") from None
    with duckdb.connect(":memory:", config={"enable_external_access": "false"}) as connection:
        with contextlib.suppress(duckdb.Error):  # from 1.1 on there is a setting against looking at Python's variables
            connection.execute("SET python_enable_replacements = false")
        connection.execute("SET lock_configuration = true")
        for name, make in views.items():
            if name in query.lower():
                connection.register(name, make())
        try:
            found = connection.sql(query)
            return pa.table({}) if found is None else found.to_arrow_table()
        except (duckdb.Error, RuntimeError) as exc:
            raise StoreError(f"the query cannot be answered: {exc}") from None
