"""Commands that look at what runs have left: `runs`, `nodes`, `trace`, `logs`, `sql`, `export`, `compact`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click

from otel_odibi.cli import cli
from otel_odibi.cli.options import (
    JSON,
    PIPELINE,
    RUN,
    SINCE,
    WHERE,
    WHICH,
    age,
    console,
    opened,
    run_and_directory,
    run_id_of,
    size_of,
)  # fmt: skip
from otel_odibi.errors import StoreError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_VIEWS: Final = ("spans", "logs", "nodes", "runs", "metrics")
_LEVELS: Final = ("debug", "info", "warning", "error", "critical")
_STYLES: Final = {"debug": "dim", "warning": "yellow", "error": "red", "critical": "bold red"}


# --- runs and nodes --------------------------------------------------------------------------------------------------


@cli.command()
@WHERE
@PIPELINE
@SINCE
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="The newest so many.")
@JSON
def runs(directory: str, pipeline: str, since_ns: int | None, limit: int, as_json: bool) -> None:
    """List the runs, the newest first, those under way too.

    \b
    Examples:
      otel-odibi runs
      otel-odibi runs --pipeline flights --since 7d
      otel-odibi runs --json s3://bucket/telemetry | jq 'select(.outcome == "failure")'
    """
    from otel_odibi.report.tables import Column, moment, number, outcome, plain, seconds, show
    from otel_odibi.report.texts import safe

    why = Column("error", lambda row: safe(": ".join(filter(None, (row["error_type"], row["error"])))), folds=True)
    columns = (
        moment("start", "started (UTC)"), plain("pipeline"), outcome(), seconds("duration_s", "took"), number("nodes"),
        number("failed"), plain("run_id", "run")._replace(most=8, folds=False), why,
    )  # fmt: skip
    rows = opened(directory).runs(pipeline, since_ns, limit).to_pylist()
    show(console(), rows, columns, json=as_json)


@cli.command()
@WHERE
@PIPELINE
@RUN
@SINCE
@JSON
def nodes(directory: str, pipeline: str, run: str, since_ns: int | None, as_json: bool) -> None:
    """Sum up the nodes: executions, outcomes, durations, rows, cache, memory.

    p50, p95 and p99 are of the time that an execution took: half, 95 and 99 of 100 took no longer.

    \b
    Examples:
      otel-odibi nodes
      otel-odibi nodes --pipeline flights --since 30d
      otel-odibi nodes --run last
    """
    from otel_odibi.report.tables import Column, memory, number, plain, seconds, show

    def share(row: Any) -> str:
        return f"{row['cache_hits'] / row['cache_lookups']:.0%}" if row["cache_lookups"] else ""

    def bad(row: Any) -> str:
        found = [f"{row[name]:,} {name}" for name in ("failure", "cancelled", "skipped", "lost") if row[name]]
        return ", ".join(found)

    def style(row: Any) -> str:
        return "red" if row["failure"] or row["lost"] else "yellow"

    columns = (
        plain("pipeline")._replace(spare=6), plain("node"), number("count", "runs"),
        Column("not successful", bad, style=style, folds=True),
        seconds("p50_s", "p50"), seconds("p95_s", "p95"), seconds("p99_s", "p99")._replace(spare=4),
        seconds("max_s", "max")._replace(spare=5), number("rows_in", "rows in")._replace(spare=2),
        number("rows_out", "rows out"), Column("cache hits", share, right=True, spare=1),
        Column("retries", lambda row: f"{row['retries']:,}" if row["retries"] else "", right=True, spare=3),
        memory("rss_max", "memory")._replace(spare=1),
    )  # fmt: skip
    found = opened(directory)
    table = found.nodes(pipeline, run_id_of(found, run), since_ns)
    show(console(), table.to_pylist(), columns, json=as_json)


# --- one run ---------------------------------------------------------------------------------------------------------


@cli.command()
@WHICH
@WHERE
def trace(run: str, directory: str) -> None:
    """Draw one run as a waterfall, its critical path marked.

    RUN is a run id, how one begins, or "last", the default.

    \b
    Examples:
      otel-odibi trace
      otel-odibi trace 7f3a2c
      otel-odibi trace last s3://bucket/telemetry
    """
    from otel_odibi.report.terminal import Waterfall

    run, directory = run_and_directory(run, directory)
    console().print(Waterfall(opened(directory).run(run)))


# --- logs ------------------------------------------------------------------------------------------------------------


@cli.command()
@WHERE
@click.option("--event", default="", metavar="TYPE", help="Only lines of this event type, such as node_failed.")
@click.option("--node", default="", metavar="NAME", help="Only lines of this node.")
@click.option("--level", default="", type=click.Choice(("", *_LEVELS)), metavar="LEVEL", help="This level and above.")
@RUN
@click.option("--trace", default="", metavar="ID", help="Only lines of this trace.")
@SINCE
@click.option("--text", default="", metavar="TEXT", help="Only lines in which this text stands.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the newest N.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@JSON
def logs(directory: str, run: str, limit: int | None, follow: bool, as_json: bool, **filters: Any) -> None:
    """Print log lines, the oldest first, also of compressed files and of several processes.

    \b
    Examples:
      otel-odibi logs --level error
      otel-odibi logs --node join_weather --since 2h
      otel-odibi logs --run last --json | jq .message
      otel-odibi logs --follow
    """
    found = opened(directory)
    filters["run"] = run_id_of(found, run)
    records: Iterable[dict[str, Any]] = found.records(**filters, limit=limit, newest_first=limit is not None)
    if limit is not None:
        records = reversed(list(records))
    if follow:
        records = _and_then(records, found.follow(**filters))
    out = console()
    with contextlib.suppress(KeyboardInterrupt):
        for record in records:
            _print_record(out, record, as_json)
            if follow:
                out.file.flush()


def _and_then(first: Iterable[dict[str, Any]], then: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from first
    yield from then


def _print_record(out: Console, record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        from otel_odibi.report.tables import as_json as line_of

        out.file.write(line_of(record) + "\n")
    elif out.is_terminal:
        out.print(_line(record), soft_wrap=True)
    else:
        out.file.write(f"{_line(record).plain}\n")


_SHOWN: Final = frozenset(
    ("timestamp", "level", "event_type", "message", "service", "pipeline", "run_id", "node_name", "layer", "engine",
     "trace_id", "span_id", "parent_span_id", "time_unix_nano", "trace_flags", "links", "process", "user", "error",
     "metadata", "columns", "bytes_out")
)  # fmt: skip


def _line(record: dict[str, Any]) -> Text:
    from rich.text import Text

    from otel_odibi.report.texts import safe

    level, error = str(record.get("level", "")), record.get("error")
    rest = [f"{key}={value}" for key, value in record.items() if key not in _SHOWN and value is not None]
    message = str(record.get("message", ""))
    why = f" {error}" if error and str(error) not in message else ""
    return Text.assemble(
        (f"{safe(str(record.get('timestamp', '')))} ", "dim"),
        (f"{level:<8}", _STYLES.get(level, "")),
        (f" {safe(str(record.get('node_name') or record.get('pipeline') or ''))} ", "bold"),
        safe(message + why),
        (safe(" " + " ".join(rest)) and f"  {safe(' '.join(rest))}", "dim"),
    )


# --- tables ----------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("query")
@WHERE
@JSON
def sql(query: str, directory: str, as_json: bool) -> None:
    """Ask in SQL: the views are spans, nodes, runs, logs and metrics. Needs the extra "query".

    \b
    Examples:
      otel-odibi sql "SELECT node, median(duration_s) FROM nodes GROUP BY node"
      otel-odibi sql "DESCRIBE nodes"
      otel-odibi sql "SELECT * FROM logs WHERE level = 'error'" --json
    """
    from otel_odibi.report.tables import plain, show

    table = opened(directory).sql(query)
    numbers = {field.name for field in table.schema if str(field.type).startswith(("int", "uint", "float", "double"))}
    columns = [plain(name) for name in table.column_names]
    columns = [column._replace(right=column.title in numbers) for column in columns]
    show(console(), table.to_pylist(), columns, json=as_json)


# --- files -----------------------------------------------------------------------------------------------------------


@cli.command()
@WHERE
@click.option("--what", type=click.Choice(_VIEWS), default="spans", show_default=True)
@click.option("--format", "form", type=click.Choice(("otlp", "csv")), default="otlp", show_default=True)
@RUN
@SINCE
@click.option("-o", "--output", type=click.File("wb"), default="-", metavar="FILE", help="Write there.")
def export(directory: str, what: str, form: str, run: str, since_ns: int | None, output: BinaryIO) -> None:
    """Write spans or logs as OTLP/JSON lines, as collectors read them, or any table as CSV.

    \b
    Examples:
      otel-odibi export --run last > run.traces.jsonl
      otel-odibi export --what logs --since 7d -o week.logs.jsonl
      otel-odibi export --what nodes --format csv -o nodes.csv
    """
    found = opened(directory)
    found.export(what, output, form, run=run_id_of(found, run), since_ns=since_ns)


@cli.command()
@WHERE
@click.option("--older-than", "young", type=age, default="1h", show_default=True, help="Leave younger files alone.")
@click.option("--keep", type=age, metavar="AGE", help="Delete days and compressed log files that are older.")
@click.option("--keep-bytes", type=size_of, metavar="SIZE", help="Delete the oldest days until the rest fits.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def compact(directory: str, young: float, keep: float | None, keep_bytes: int | None, dry_run: bool) -> None:
    """Make few large Parquet files out of many small ones, and delete what is too old or too much.

    Programs may read and write meanwhile. Days that running programs write to are left alone.

    \b
    Examples:
      otel-odibi compact --dry-run
      otel-odibi compact --keep 90d --keep-bytes 20GB /var/telemetry
    """
    from otel_odibi.report.texts import plural, size

    keep_days = None if keep is None else keep / 86_400
    try:
        done = opened(directory).compact(age_seconds=young, keep_days=keep_days, keep_bytes=keep_bytes, dry_run=dry_run)
    except OSError as exc:
        raise StoreError(f"cannot write to {directory!r}: {exc}; look at its permissions and its space") from None
    for path in done.removed:
        click.echo(f"{'would delete' if dry_run else 'deleted'} {path}")
    what = f"{plural(len(done.merged), 'file')} into {len(done.made)}"
    sizes = "" if dry_run else f", {size(done.bytes_before)} before, {size(done.bytes_after)} now"
    click.echo(f"{'would merge' if dry_run else 'merged'} {what}{sizes}")
