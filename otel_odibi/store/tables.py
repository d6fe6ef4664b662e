"""Runs, executions of nodes and their aggregate as Arrow tables, straight from the columns of the span files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from otel_odibi import names
from otel_odibi.exporters.columns import MAP, TEXT, TIME
from otel_odibi.exporters.tables import SCHEMAS
from otel_odibi.names import CANCELLED, FAILURE, LOST, SKIPPED, SUCCESS
from otel_odibi.store.facts import FACTS, among, begins, with_facts
from otel_odibi.store.parquet import Part

RUNNING: Final = "running"
NODE: Final = names.NODE_SPAN.format(name="")
PIPELINE: Final = names.PIPELINE_SPAN.format(name="")
NEEDED: Final = ("Timestamp", "TraceId", "SpanId", "SpanName")
"""Columns without which a file holds no spans."""


def _schema(**columns: Any) -> pa.Schema:
    """Return a schema from names of columns by type."""
    return pa.schema(list(columns.items()))


_VIEWED: Final = (
    "Timestamp", "TraceId", "SpanId", "ParentSpanId", "SpanName", "ServiceName", "SpanAttributes", "Duration",
    "StatusCode", "StatusMessage", "Events", "Links",
)  # fmt: skip
SPANS: Final = pa.schema([SCHEMAS["spans"].field(name) for name in _VIEWED])
"""What of a span the store makes views of."""
RUN_COLUMNS: Final = tuple(name for name in SPANS.names if name not in ("ParentSpanId", "Links", "Events"))
EXECUTIONS: Final = _schema(
    pipeline=TEXT, run_id=TEXT, node=TEXT, layer=TEXT, engine=TEXT, outcome=TEXT, start=TIME, duration_s=pa.float64(),
    attempt=pa.int64(), rows_in=pa.int64(), rows_out=pa.int64(), bytes_out=pa.int64(), cache_hit=pa.bool_(),
    rss=pa.int64(), error_type=TEXT, trace_id=TEXT, span_id=TEXT,
)  # fmt: skip
RUNS: Final = _schema(
    pipeline=TEXT, run_id=TEXT, service=TEXT, outcome=TEXT, start=TIME, duration_s=pa.float64(), nodes=pa.int64(),
    failed=pa.int64(), trace_id=TEXT, error_type=TEXT, error=TEXT,
)  # fmt: skip
_OUTCOMES: Final = (SUCCESS, FAILURE, CANCELLED, SKIPPED, LOST)
_KEY: Final = ("pipeline", "node", "layer", "engine")
_QUANTILES: Final = {"p50_s": 0.5, "p95_s": 0.95, "p99_s": 0.99, "max_s": 1.0}
NODES: Final = _schema(
    **dict.fromkeys(_KEY, TEXT), count=pa.int64(), **dict.fromkeys(_OUTCOMES, pa.int64()),
    **dict.fromkeys(_QUANTILES, pa.float64()),
    **dict.fromkeys(("rows_in", "rows_out", "cache_hits", "cache_lookups", "retries", "rss_max"), pa.int64()),
)  # fmt: skip
AGGREGATED: Final = (*_KEY, "outcome", "duration_s", "attempt", "rows_in", "rows_out", "cache_hit", "rss")
_COLUMNS: Final = {"start": "Timestamp", "trace_id": "TraceId", "span_id": "SpanId"}


class Asked:
    """Which executions are asked for; empty texts and sequences stand for all."""

    def __init__(
        self, pipeline: str = "", node: str = "", runs: Collection[str] | None = None, since_ns: int | None = None
    ) -> None:
        self.since_ns, self.span_name, self._runs = since_ns, NODE + node if node else "", runs
        texts = {"pipeline": [pipeline] if pipeline else None, "node": [node] if node else None, "run_id": runs}
        self._texts = {name: chosen for name, chosen in texts.items() if chosen is not None}

    def of(self, part: Part, wanted: Sequence[str]) -> pa.Table | None:
        """Return the executions in a row group, as columns of EXECUTIONS in which words are dictionaries."""
        if not part.may_mention(self._runs):
            return None
        more = {_COLUMNS[name] for name in wanted if name in _COLUMNS} | ({"Timestamp"} if self.since_ns else set())
        columns = ["SpanName", "SpanAttributes", "StatusCode", "Duration", *sorted(more)]
        return self.table(part.read(columns, SPANS), wanted)

    def table(self, spans: pa.Table, wanted: Sequence[str]) -> pa.Table:
        """Return the executions among spans; `duration_s` is null where there was no work to measure."""
        facts = [name for name in {*wanted, *self._texts, "outcome"} if name in FACTS]
        made = [self._chosen(table, wanted) for table in with_facts(spans, facts, "node")]
        return pa.concat_tables(made) if made else _worded(EXECUTIONS, wanted).empty_table()

    def _chosen(self, table: pa.Table, wanted: Sequence[str]) -> pa.Table:
        keep = [begins(table["SpanName"], NODE), *(among(table[name], texts) for name, texts in self._texts.items())]
        table = kept(table, [*keep, *since(table, self.since_ns)])
        outcome = _outcome(table["outcome"], table["StatusCode"])
        columns = {name: table[_COLUMNS.get(name, name)] for name in wanted if name not in ("duration_s", "outcome")}
        if "duration_s" in wanted:
            worked = pc.invert(among(outcome, (SKIPPED, LOST, RUNNING)))
            columns["duration_s"] = pc.if_else(worked, pc.divide(table["Duration"].cast(pa.float64()), 1e9), None)
        return pa.table({name: outcome if name == "outcome" else columns[name] for name in wanted})


def _worded(schema: pa.Schema, names_: Iterable[str]) -> pa.Schema:
    return pa.schema([(name, FACTS[name][1] if name in FACTS else schema.field(name).type) for name in names_])


def kept(table: pa.Table, masks: Sequence[Any]) -> pa.Table:
    """Return the rows of which all masks are true."""
    for mask in masks:
        if not pc.all(mask).as_py():
            whole = masks[0]
            for other in masks[1:]:
                whole = pc.and_(whole, other)
            return table.filter(whole)
    return table


def since(table: pa.Table, since_ns: int | None, column: str = "Timestamp") -> list[pa.Array]:
    """Return no mask, or that of the rows since then."""
    return [] if since_ns is None else [pc.greater_equal(table[column].combine_chunks().cast(pa.int64()), since_ns)]


def plain(table: pa.Table) -> pa.Table:
    """Return a table without dictionaries."""
    return table.cast(pa.schema([field.with_type(_plain(field.type)) for field in table.schema]))


def _plain(kind: pa.DataType) -> pa.DataType:
    return TEXT if pa.types.is_dictionary(kind) else MAP if pa.types.is_map(kind) else kind


def _outcome(stated: pa.ChunkedArray, status: pa.ChunkedArray) -> Any:
    """Return outcomes, or what the status says where a foreign writer has left none."""
    if not stated.null_count:
        return stated
    of_status = pc.if_else(among(status, ["Error"]), FAILURE, SUCCESS)
    return pc.coalesce(stated.cast(TEXT), pa.chunked_array([of_status])).combine_chunks().dictionary_encode()


def runs_of(spans: pa.Table, pipeline: str, since_ns: int | None) -> pa.Table:
    """Return those of the spans that are runs, with facts as columns in place of attributes."""
    columns = [SPANS.field(name) for name in spans.column_names if name != "SpanAttributes"]
    made = [
        pa.schema([*columns, *((name, TEXT) for name in ("pipeline", "run_id", "error_type", "outcome"))]).empty_table()
    ]
    for table in with_facts(spans, ("pipeline", "run_id", "ending", "error_type"), "run_id"):
        keep = [begins(table["SpanName"], PIPELINE), *([among(table["pipeline"], [pipeline])] if pipeline else [])]
        chosen = kept(table, [*keep, *since(table, since_ns)])
        outcome = _outcome(chosen["ending"], chosen["StatusCode"]).cast(TEXT)
        made.append(plain(chosen.drop_columns(["ending"])).append_column("outcome", outcome))
    return pa.concat_tables(made)


def by_end(runs: pa.Table) -> pa.Table:
    """Return runs, the one that ended last first, and one before those inside it."""
    ends = pc.add(runs["Timestamp"].cast(pa.int64()), pc.fill_null(runs["Duration"].cast(pa.int64()), 0))
    return runs.append_column("end", ends).sort_by([("end", "descending"), ("Timestamp", "ascending")])


def counted(executed: pa.Table) -> pa.Table:
    """Return how many nodes each run had, and how many failed."""
    failed = among(executed["outcome"], [FAILURE]).cast(pa.int64())
    table = pa.table({"run_id": executed["run_id"].cast(TEXT), "nodes": executed["outcome"], "failed": failed})
    found = table.group_by("run_id").aggregate([("nodes", "count"), ("failed", "sum")])
    return found.select(["run_id", "nodes_count", "failed_sum"]).rename_columns(["run_id", "nodes", "failed"])


def runs_table(runs: pa.Table, counts: pa.Table, limit: int | None) -> pa.Table:
    """Return runs as a table, the one that began last first, with what is counted of them."""
    runs = runs.sort_by([("Timestamp", "descending")]).slice(0, limit)
    found = counts.group_by("run_id").aggregate([("nodes", "sum"), ("failed", "sum")])
    at = pc.index_in(runs["run_id"], value_set=found["run_id"].combine_chunks())
    going = among(runs["outcome"], [RUNNING])
    columns = {
        "pipeline": runs["pipeline"], "run_id": runs["run_id"], "service": runs["ServiceName"],
        "outcome": runs["outcome"], "start": runs["Timestamp"],
        "duration_s": pc.if_else(going, None, pc.divide(runs["Duration"].cast(pa.float64()), 1e9)),
        **{name: pc.fill_null(found[f"{name}_sum"].take(at), 0) for name in ("nodes", "failed")},
        "trace_id": runs["TraceId"], "error_type": runs["error_type"], "error": runs["StatusMessage"],
    }  # fmt: skip
    return pa.table(columns).cast(RUNS)


def aggregated(executed: pa.Table) -> pa.Table:
    """Return the aggregate of some executions, columns AGGREGATED, without what is under way; durations as lists."""
    table = kept(executed, [pc.invert(among(executed["outcome"], [RUNNING]))]).unify_dictionaries().combine_chunks()
    words = {name: table[name].combine_chunks() for name in (*_KEY, "outcome")}
    code = pa.repeat(pa.scalar(0, pa.int64()), len(table))
    for name in _KEY:  # several words as one number, as grouping by words takes several times as long
        of_word = pc.add(pc.fill_null(words[name].indices.cast(pa.int64()), -1), 1)
        code = pc.add(pc.multiply(code, len(words[name].dictionary) + 1), of_word)
        code = code.dictionary_encode().indices.cast(pa.int64())
    outcomes = {name: words["outcome"].dictionary.index(name).as_py() for name in _OUTCOMES}
    columns = {
        **{name: words[name].indices for name in _KEY},
        **{name: pc.equal(words["outcome"].indices, number).cast(pa.int64()) for name, number in outcomes.items()},
        "count": table["outcome"].is_valid().cast(pa.int64()),
        "cache_hits": table["cache_hit"].cast(pa.int64()),
        "cache_lookups": table["cache_hit"].is_valid().cast(pa.int64()),
        "retries": pc.subtract(table["attempt"], 1),
        "rows_in": table["rows_in"], "rows_out": table["rows_out"], "rss_max": table["rss"],
        "durations": table["duration_s"],
    }  # fmt: skip
    how = {**dict.fromkeys(_KEY, "min"), "rss_max": "max", "durations": "list"}
    grouped = pa.table({"code": code, **columns}).group_by("code", use_threads=False)
    found = grouped.aggregate([(name, how.get(name, "sum")) for name in columns])
    made = {name: found[f"{name}_{how.get(name, 'sum')}"] for name in columns}
    return pa.table(made | {name: words[name].dictionary.take(made[name].combine_chunks()) for name in _KEY})


def nodes_table(parts: pa.Table) -> pa.Table:
    """Return aggregates of parts as one."""
    summed = [name for name in parts.column_names if name not in (*_KEY, "rss_max", "durations")]
    numbered = parts.append_column("at", pa.array(range(len(parts)), pa.int64()))
    found = numbered.group_by(list(_KEY)).aggregate(
        [("at", "list"), ("rss_max", "max"), *((name, "sum") for name in summed)]
    )
    made = {name: found[name] for name in _KEY} | {name: found[f"{name}_sum"] for name in summed}
    made["rss_max"] = found["rss_max_max"]
    rows = []
    for at in found["at_list"].to_pylist():
        durations = pa.concat_arrays([parts["durations"][number].values for number in at]).drop_null()
        rows.append(pc.quantile(durations, list(_QUANTILES.values())).to_pylist())
    for number, name in enumerate(_QUANTILES):
        made[name] = pa.array([row[number] for row in rows], pa.float64())
    return pa.table({name: made[name] for name in NODES.names}).cast(NODES).sort_by([(n, "ascending") for n in _KEY])
