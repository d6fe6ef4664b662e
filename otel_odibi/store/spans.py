"""Chosen spans and metric points from the files, each once."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from otel_odibi.exporters.tables import SCHEMAS
from otel_odibi.store.facts import among, with_facts
from otel_odibi.store.parquet import Part, clashes, distinct, each, parted, parts, steady
from otel_odibi.store.place import Place
from otel_odibi.store.tables import NEEDED, kept, plain, since


@steady
def find(
    place: Place, columns: Sequence[str], schema: pa.Schema, *, name: str = "", run: str = "", trace: str = "",
    since_ns: int | None = None,
) -> pa.Table:  # fmt: skip
    """Return columns of the spans asked for, read only where they may be."""
    found = parts(place, "spans", NEEDED, since_ns, SpanName=name, TraceId=trace)
    within = clashes(place, found)
    wanted = list(dict.fromkeys([*columns, *(("Timestamp", "SpanId") if within else ())]))
    texts = {column: text for column, text in (("SpanName", name), ("TraceId", trace)) if text}

    def of(part: Part) -> pa.Table | None:
        if not part.may_mention([run] if run else None):
            return None
        tested = part.read(["Timestamp", *texts, *(["SpanAttributes"] if run else [])], schema)
        masks = [among(tested[column], [text]) for column, text in texts.items()] + since(tested, since_ns)
        if run:
            numbered = tested.append_column("at", pa.array(range(len(tested)), pa.int64()))
            chosen = [kept(t, [among(t["run_id"], [run])])["at"] for t in with_facts(numbered, ["run_id"], "run_id")]
            masks.append(
                pc.is_in(
                    numbered["at"].combine_chunks(), value_set=pa.chunked_array(chosen, pa.int64()).combine_chunks()
                )
            )
        if not all(pc.any(mask).as_py() for mask in masks):
            return None
        return plain(kept(part.read(wanted, schema), masks))

    tables = each(place, found, of)
    empty = pa.schema([schema.field(column) for column in wanted]).empty_table()
    sure, suspect = parted(pa.concat_tables([empty, *tables]), within, "Timestamp")
    return pa.concat_tables([sure, distinct(suspect, "SpanId")] if len(suspect) else [sure]).select(list(columns))


def points(place: Place, name: str, since_ns: int | None) -> pa.Table:
    """Return metric points of all kinds in one table, by time: what a kind has not is null."""
    made = [_of_kind(place, folder, name, since_ns) for folder in SCHEMAS if folder != "spans"]
    return pa.concat_tables(made, promote_options="default").sort_by("TimeUnix")


@steady
def _of_kind(place: Place, folder: str, name: str, since_ns: int | None) -> pa.Table:
    schema = SCHEMAS[folder]

    def of(part: Part) -> pa.Table:
        table = part.read(schema.names, schema)
        named = [among(table["MetricName"], [name])] if name else []
        return plain(kept(table, [*named, *since(table, since_ns, "TimeUnix")]))

    found = parts(place, folder, ("TimeUnix", "MetricName"), since_ns, MetricName=name)
    table = pa.concat_tables([schema.empty_table(), *each(place, found, of)])
    return table.add_column(0, "Kind", pa.repeat(pa.scalar(folder.partition("/")[2]), len(table)))
