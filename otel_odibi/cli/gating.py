"""Commands that compare runs: `check`, the regression gate, and `diff`."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import click

from otel_odibi.cli import FAILED, cli
from otel_odibi.cli.options import PIPELINE, WHERE, console, opened
from otel_odibi.report import gate
from otel_odibi.report.texts import duration, safe, size

Row = Mapping[str, Any]
FORMAT: Final = click.option("--format", "form", type=click.Choice(("table", "markdown", "json")), default="table")
_STYLES: Final = dict(zip(gate.STATUSES, ("bold red", "yellow", "green", "dim"), strict=True))
_TEXTS: Final[Mapping[str, Callable[[Any], str]]] = {
    "duration": lambda value: duration(round(value * 1e9)), "rows": lambda value: f"{value:,.0f}",
    "memory": lambda value: size(round(value)), "cache hits": lambda value: f"{value:.0%}",
    "executions": lambda value: f"{value:,}", "outcome": str,
}  # fmt: skip


def _limits(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for each limit; those not given are None, so that pyproject.toml has its say."""
    for field in reversed(dataclasses.fields(gate.Limits)):
        name, help_text = f"--{field.name.replace('_', '-')}", f"{field.metadata['doc']}  [default: {field.default}]"
        kind = {"is_flag": True, "default": None} if field.default is False else {"metavar": "N"}
        command = click.option(name, help=help_text.replace("  [default: False]", ""), **kind)(command)
    return command


@cli.command()
@WHERE
@PIPELINE
@click.option("--candidate", default="", metavar="RUN", help="Judge this run, not the newest.")
@click.option("--all", "everything", is_flag=True, help="Show what is fine, or not compared, too.")
@FORMAT
@_limits
def check(directory: str, pipeline: str, candidate: str, everything: bool, form: str, **given: Any) -> int:
    """Compare the newest run of each pipeline with the runs before; exit with 1 where something regressed.

    Regressed is what is slower, has fewer rows, more memory or fewer cache hits than noise explains, and than is
    tolerated; and what failed or is missing as in no run before. Defaults: [tool.otel-odibi.check] in pyproject.toml.

    \b
    Examples:
      otel-odibi check
      otel-odibi check --max-slowdown 1.5 --runs 3
      otel-odibi check --baseline 7f3a2c --format markdown >> "$GITHUB_STEP_SUMMARY"
    """
    limits = gate.Limits.load(given)
    found = gate.check(opened(directory), limits, pipeline, candidate)
    if form == "json":
        click.echo(
            json.dumps([{**c._asdict(), "findings": [f._asdict() for f in c.findings]} for c in found], indent=2)
        )
    for one in found if form != "json" else ():
        counts = [(sum(f.status == status for f in one.findings), status) for status in gate.STATUSES]
        summary = ", ".join(f"{count} {status}" for count, status in counts if count)
        if len(one.baseline) < limits.min_runs:
            summary = f"not enough history ({len(one.baseline)} of {limits.min_runs} runs), {summary}"
        which = f"run {one.runs[0]}" if len(one.runs) == 1 else f"{len(one.runs)} runs up to {one.runs[0]}"
        rows = [f._asdict() for f in one.findings if everything or f.status in (gate.REGRESSED, gate.UNSURE)]
        for row in rows:
            ratio = row["now"] / row["before"] if row["before"] else 0
            row |= {key: None if row[key] is None else _TEXTS[row["what"]](row[key]) for key in ("before", "now")}
            row["change"] = f"{ratio - 1:+.0%}" if ratio else None
            row["noise"] = None if row["noise"] is None else f"±{row['noise']:.0%}"
            row["node"] = row["node"] or "(whole run)"
        names = ("status", "node", "what", "before", "noise", "now", "change", "why")
        _print(f"{one.pipeline}: {summary}; {which} against {len(one.baseline)}", rows, names, form)
    lacking = limits.strict and any(len(one.baseline) < limits.min_runs for one in found)
    return FAILED if lacking or any(f.status == gate.REGRESSED for one in found for f in one.findings) else 0


@cli.command()
@click.argument("a")
@click.argument("b")
@WHERE
@FORMAT
def diff(a: str, b: str, directory: str, form: str) -> None:
    """Show two runs side by side: durations, rows, outcomes, cache, nodes that are new or gone.

    A and B are run ids, how one begins, or "last". All executions of a node in a run are taken together.

    \b
    Example:
      otel-odibi diff 7f3a2c last
    """
    from otel_odibi.report.diff import diff as sides_of

    store = opened(directory)
    views = store.run(a), store.run(b)
    rows = sides_of(*views)
    if form == "json":
        click.echo(json.dumps({"a": views[0].run.run_id, "b": views[1].run.run_id, "nodes": rows}, indent=2))
        return
    for row in rows:
        sides = row.pop("a"), row.pop("b")
        old, new = (side and side["duration"] for side in sides)
        change = f"{new / old - 1:+.0%}" if old and new is not None else ""
        row["change"] = "new" if sides[0] is None else "gone" if sides[1] is None else change
        for name in ("duration", "rows", "outcome", "cache hits", "executions"):
            texts = ["-" if not side or side[name] is None else _TEXTS[name](side[name]) for side in sides]
            row[name] = texts[0].strip("-") if texts[0] == texts[1] else " → ".join(texts)
    heads = [f"{v.run.pipeline} {v.run.run_id} ({v.run.outcome}, {duration(v.run.duration_ns)})" for v in views]
    _print(" → ".join(heads), rows, ("node", "duration", "change", "rows", "outcome", "cache hits", "executions"), form)


def _print(title: str, rows: Sequence[Row], names: Sequence[str], form: str) -> None:
    """Print a title and a table, on a terminal in colours, or in Markdown."""
    from otel_odibi.report.tables import plain, show

    numbers = ("before", "noise", "now", "change")
    columns = [plain(name)._replace(right=name in numbers) for name in names]
    columns[0] = columns[0]._replace(style=lambda row: _STYLES.get(row[names[0]], ""))
    if form == "table":
        click.echo(safe(title))
        if rows:
            show(console(), rows, columns)
        return
    shown = [column for column in columns if any(map(column.text, rows))]
    lines = [[column.title for column in shown], ["---:" if column.right else "---" for column in shown]]
    lines += [[_cell(column.text(row)) for column in shown] for row in rows]
    click.echo(f"### {_cell(title)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines if line))


def _cell(text: str) -> str:
    """Return what Markdown shows as this text."""
    return "".join(f"\\{sign}" if sign in "\\|`*_[]#~" else sign for sign in html.escape(safe(text), quote=False))
