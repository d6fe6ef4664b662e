"""Reads a telemetry directory: runs, nodes, spans, metrics and logs, from the files alone, local or on an object store.

::

    opened = store.open("telemetry")          # or "s3://bucket/prefix", or any URI that pyarrow knows
    opened.run("last").nodes                  # views of one run
    opened.nodes(pipeline="daily")            # pyarrow Tables: .to_pandas(), .to_pylist(), ...
    opened.records(level="error")             # log lines
    opened.sql("SELECT * FROM runs")

A file that cannot be read is told of and passed over, everything else is answered; so are files of other kinds and
names that start with a dot. Columns that a foreign file has not are null. Identifiers are lower-case hexadecimal,
`..._ns` Unix nanoseconds, `..._s` seconds, sizes bytes. A `Store` keeps nothing of what it reads, so what is written
later is seen by the next call. Importing this module imports pyarrow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Event
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.compute as pc

from otel_odibi.errors import StoreError
from otel_odibi.exporters.files import Target
from otel_odibi.exporters.tables import SCHEMAS
from otel_odibi.store import alive, lines, spans, tables
from otel_odibi.store.facts import among, begins
from otel_odibi.store.files import Files, listed
from otel_odibi.store.lines import LEVELS, Record, Wanted
from otel_odibi.store.parquet import EVER, Part, clashes, distinct, each, parted, parts, steady
from otel_odibi.store.place import Place, Problem
from otel_odibi.store.tables import EXECUTIONS, RUNNING, Asked
from otel_odibi.store.views import (
    Active,
    AttemptView,
    NodeView,
    RunSummary,
    RunView,
    Span,
    as_rows,
    nodes_of,
    summary_of,
)  # fmt: skip

if TYPE_CHECKING:
    from otel_odibi.store.compaction import Compacted

__all__ = [
    "LAST", "LEVELS", "RUNNING", "Active", "AttemptView", "Files", "NodeView", "RunSummary", "RunView", "Store", "open",
]  # fmt: skip

LAST: Final = "last"
"""In place of a run id: the run that ended last, so never one inside another; where none has, one under way."""
_AT_ONCE: Final = 60_000  # rows: less take longer, more take more memory
_SLACK: Final = 3600 * 10**9  # by which clocks may differ
_RUN: Final = (*tables.RUN_COLUMNS, "Events")


class Store:
    """A telemetry directory, open for reading. Thread-safe.

    `on_problem(text)` is told, once each, of files that cannot be read; by default they are logged as warnings. Raises
    StoreError if there is no such directory. Methods raise StoreError for what is asked for and not there, nothing
    else, whatever lies in the directory.
    """

    def __init__(self, directory: str | os.PathLike[str], on_problem: Problem | None = None) -> None:
        self._place, self._target = Place(directory, on_problem), Target(directory)
        self.directory = self._place.directory

    # --- views ---------------------------------------------------------------------------------------------------

    def summaries(
        self, pipeline: str = "", since_ns: int | None = None, limit: int | None = None
    ) -> tuple[RunSummary, ...]:
        """Return the finished runs, the one that ended last first."""
        found = tables.by_end(self._runs(_RUN, pipeline, since_ns))
        finished = found.filter(pc.invert(among(found["outcome"], [RUNNING])))
        return tuple(map(summary_of, as_rows(finished.slice(0, limit))))

    def run(self, run_id: str = LAST) -> RunView:
        """Return one run: by its id, by the beginning of its id, or the "last" that ended.

        A run in progress has the outcome "running" (or "lost", where its process is silent), and its nodes so far.
        Raises StoreError where there is no such run, or several.
        """
        run = self._find(run_id)
        stored = spans.find(
            self._place, tables.SPANS.names, tables.SPANS, trace=run.trace_id, since_ns=run.start_ns - _SLACK
        )
        rows = [*as_rows(alive.rows_under_way(self._place)), *as_rows(stored)]  # what is stored counts
        found = {row["SpanId"]: Span(row) for row in rows if row["TraceId"] == run.trace_id}
        ordered = sorted(found.values(), key=lambda span: (span.start_ns, span.span_id))
        return RunView(run, tuple(nodes_of(run, ordered)))

    def active(self) -> tuple[Active, ...]:
        """Return what is under way, what began first first: as state files tell, every 5 seconds anew.

        Of services without any: as start lines without an end tell, in log files not rotated yet. Both are local.
        """
        return alive.active(self.directory)

    def files(self) -> tuple[Files, ...]:
        """Return what files there are, by kind, with their sizes. What cannot be read counts as empty. Local only."""
        return () if self.directory is None else listed(self.directory)

    # --- tables --------------------------------------------------------------------------------------------------

    def runs(self, pipeline: str = "", since_ns: int | None = None, limit: int | None = None) -> pa.Table:
        """Return a row a run, the one that began last first; those in progress too, without a duration."""
        counts = self._executions(Asked(pipeline, since_ns=since_ns), ("run_id", "outcome"), tables.counted)
        return tables.runs_table(self._runs(tables.RUN_COLUMNS, pipeline, since_ns), counts, limit)

    def executions(
        self, pipeline: str = "", node: str = "", run: str = "", since_ns: int | None = None, runs: Iterable[str] = ()
    ) -> pa.Table:
        """Return a row an execution of a node, in the order in which they began; those under way too.

        `duration_s` is null for what was skipped, lost or is under way. `runs` are run ids.
        """
        chosen = {*([run] if run else []), *runs} if run or runs else None
        asked = Asked(pipeline, node, chosen, since_ns)
        return (
            self._executions(asked, EXECUTIONS.names)
            .cast(EXECUTIONS)
            .sort_by([("start", "ascending"), ("span_id", "ascending")])
        )

    def nodes(self, pipeline: str = "", run: str = "", since_ns: int | None = None) -> pa.Table:
        """Return the aggregate of what is not under way: a row a node, with exact quantiles of its duration."""
        asked = Asked(pipeline, "", [run] if run else None, since_ns)
        return tables.nodes_table(self._executions(asked, tables.AGGREGATED, tables.aggregated))

    def spans(
        self, name: str = "", run: str = "", trace: str = "", since_ns: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:  # fmt: skip
        """Return spans as they are in the files, each once. Raises StoreError for a column that there is not."""
        schema = SCHEMAS["spans"]
        if unknown := set(columns or ()) - set(schema.names):
            raise StoreError(
                f"spans have no column {', '.join(sorted(unknown))}; choose from {', '.join(schema.names)}"
            )
        chosen = schema.names if columns is None else list(columns)
        return spans.find(self._place, chosen, schema, name=name, run=run, trace=trace, since_ns=since_ns)

    def metrics(self, name: str = "", since_ns: int | None = None) -> pa.Table:
        """Return metric points by time, of all kinds in one table: what a kind has not is null."""
        return spans.points(self._place, name, since_ns)

    # --- log lines -----------------------------------------------------------------------------------------------

    def records(
        self, event: str = "", node: str = "", level: str = "", run: str = "", trace: str = "",
        since_ns: int | None = None, text: str = "", limit: int | None = None, newest_first: bool = False,
    ) -> Iterator[Record]:  # fmt: skip
        """Yield log lines by time, whole: of rotated segments and all processes; lines of one file as they lie there.

        `level` stands for itself and what is above; `text` is somewhere in the line.
        """
        return lines.records(self._place, Wanted(event, node, level, run, trace, since_ns, text), limit, newest_first)

    def logs(
        self, event: str = "", node: str = "", level: str = "", run: str = "", trace: str = "",
        since_ns: int | None = None, text: str = "", limit: int | None = None, newest_first: bool = False,
    ) -> pa.Table:  # fmt: skip
        """Return log lines as a table: the fields that lines of this package have, the rest as JSON in `fields`."""
        return lines.table(self.records(event, node, level, run, trace, since_ns, text, limit, newest_first))

    def follow(
        self, event: str = "", node: str = "", level: str = "", run: str = "", trace: str = "",
        since_ns: int | None = None, text: str = "", stop: Event | None = None,
    ) -> Iterator[Record]:  # fmt: skip
        """Yield log lines that are written from now on, until `stop` is set. Raises StoreError if not local."""
        if self.directory is None:
            raise StoreError(f"logs in {str(self._place)!r} cannot be followed; follow them where they are written")
        wanted = Wanted(event, node, level, run, trace, since_ns, text)
        return lines.follow(self._place, wanted, stop or Event())

    # --- SQL -----------------------------------------------------------------------------------------------------

    def sql(self, query: str) -> pa.Table:
        """Return what duckdb makes of a query over the views spans, nodes (executions), runs, logs and metrics.

        The query sees nothing else: no file, no network. Raises StoreError with duckdb's text for one that is wrong,
        MissingExtraError without the extra `query`.
        """
        from otel_odibi.store.sql import run

        return run(query, self._views())

    def _views(self) -> dict[str, Callable[..., pa.Table]]:
        views: dict[str, Callable[..., pa.Table]] = {"spans": self.spans, "nodes": self.executions, "logs": self.logs}
        return {**views, "runs": self.runs, "metrics": self.metrics}

    # --- files ---------------------------------------------------------------------------------------------------

    def export(
        self, what: str, out: BinaryIO, form: str = "otlp", *, run: str = "", since_ns: int | None = None
    ) -> None:
        """Write spans or logs as OTLP/JSON lines (`form="otlp"`), or any of the views of `sql` as CSV (`form="csv"`).

        Raises StoreError for another form or view, and what `out` raises.
        """
        from otel_odibi.store import export

        filters: dict[str, Any] = {"since_ns": since_ns, **({"run": run} if run else {})}
        if form not in ("csv", "otlp") or what not in (self._views() if form == "csv" else ("spans", "logs")):
            raise StoreError(f"cannot export {what!r} as {form!r}; spans and logs go as otlp, these and others as csv")
        if run and what in ("runs", "metrics"):
            raise StoreError(f"cannot export the {what} of a run; leave the run out")
        if form == "csv":
            export.write_csv(self._views()[what](**filters), out)
        elif what == "spans":
            export.write_spans(self.spans(**filters), out)
        else:
            export.write_logs(self.records(**filters), out)

    def compact(
        self, *, age_seconds: float = 3600, keep_days: float | None = None, keep_bytes: int | None = None,
        rows: int = 1_000_000, dry_run: bool = False,
    ) -> Compacted:  # fmt: skip
        """Merge small Parquet files of a day into files of so many rows; delete what is too old or too much.

        Files younger than `age_seconds`, and days that running processes write to, are left alone. `keep_days` deletes
        days, and rotated log segments, that are older; `keep_bytes` the oldest days until the rest fits. Readers and
        writers go on meanwhile, and a compaction that dies harms nothing. On an object store, run one at a time.
        Raises StoreError where another is at work, OSError and pyarrow's errors where files cannot be written.
        """
        from otel_odibi.store.compaction import compact

        return compact(self._place, self._target, age_seconds, keep_days, keep_bytes, rows, dry_run)

    # --- inside --------------------------------------------------------------------------------------------------

    @steady
    def _executions(
        self, asked: Asked, wanted: Sequence[str], reduce: Callable[[pa.Table], pa.Table] | None = None
    ) -> pa.Table:
        """Return executions, or what `reduce` makes of some of them at a time, so that memory holds no more."""
        found = parts(self._place, "spans", tables.NEEDED, asked.since_ns, SpanName=asked.span_name)
        going = alive.rows_under_way(self._place)
        within = [EVER] if len(going) else clashes(self._place, found)
        more = list(dict.fromkeys([*wanted, *(("start", "span_id") if within else ())]))
        made = reduce or (lambda table: table.select(wanted))

        def of(part: Part) -> tuple[pa.Table, pa.Table] | None:
            table = asked.of(part, more)
            if table is None:
                return None
            return parted(table, within, "start")

        pairs = each(self._place, found, of)
        done, waiting, suspects = list[pa.Table](), list[pa.Table](), [asked.table(going, more)]
        for sure, suspect in pairs:
            waiting.append(sure)
            suspects.insert(-1, suspect)
            if sum(map(len, waiting)) >= _AT_ONCE:
                done.append(made(pa.concat_tables(waiting)))
                waiting.clear()
        rest = pa.concat_tables(suspects)
        return pa.concat_tables(
            [*done, made(pa.concat_tables([*waiting, distinct(rest, "span_id") if within else rest]))]
        )

    @steady
    def _runs(
        self, columns: Sequence[str], pipeline: str = "", since_ns: int | None = None, mention: str = ""
    ) -> pa.Table:
        """Return runs as rows of spans; with `mention`, those perhaps alone whose ids begin with it."""
        found = parts(self._place, "spans", tables.NEEDED, since_ns)

        def of(part: Part) -> pa.Table | None:
            if not part.may_mention([mention] if mention else None):
                return None
            keep = begins(part.read(["SpanName"], tables.SPANS)["SpanName"], tables.PIPELINE)
            if not pc.any(keep).as_py():
                return None
            return tables.runs_of(part.read(columns, tables.SPANS).filter(keep), pipeline, since_ns)

        going = tables.runs_of(alive.rows_under_way(self._place).select(list(columns)), pipeline, since_ns)
        return distinct(pa.concat_tables([*each(self._place, found, of), going]), "SpanId")

    def _find(self, run_id: str) -> RunSummary:
        runs = tables.by_end(self._runs(_RUN, mention="" if run_id == LAST else run_id))
        if not len(runs) and run_id != LAST:
            runs = tables.by_end(self._runs(_RUN))
        finished = runs.filter(pc.invert(among(runs["outcome"], [RUNNING])))
        if not len(runs):
            raise StoreError(f"no run in {str(self._place)!r}; run a pipeline, or name another directory")
        if run_id == LAST:
            return summary_of(as_rows((finished if len(finished) else runs).slice(0, 1))[0])
        found = runs.filter(among(runs["run_id"], [run_id]))
        if not len(found):
            found = runs.filter(begins(runs["run_id"], run_id))
        if len(found) == 1:
            return summary_of(as_rows(found)[0])
        shown = as_rows((found if len(found) else runs).slice(0, 5))
        known = ", ".join(f"{run['run_id']} ({run['pipeline']})" for run in shown)
        problem = "several runs begin" if len(found) else "no run begins"
        raise StoreError(f"{problem} with {run_id!r}; choose from: last, {known}")


open = Store  # noqa: A001 - meant to be read as store.open
