"""The command that writes a run as an HTML file: `report`."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from otel_odibi.cli import USAGE, cli
from otel_odibi.cli.options import WHERE, opened, run_and_directory


@cli.command()
@click.argument("run", default="last", metavar="[RUN]")
@WHERE
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default="run.html", show_default=True,
    metavar="FILE", help="Where to write it.",
)  # fmt: skip
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def report(run: str, directory: str, output: Path, show: bool) -> int:
    """Write a run as one HTML file, to look at, keep and pass on.

    RUN is a run's id, the beginning of one, or "last", the default; DIR is the telemetry directory, by default
    "telemetry". One argument that names a directory is DIR. The file loads nothing from anywhere: data flow, waterfall
    with critical path, nodes, logs, memory, earlier runs and failures are all in it.

    \b
    Examples:
      otel-odibi report
      otel-odibi report 4bf92f35 -o monday.html
      otel-odibi report last /var/telemetry --open
      otel-odibi report s3://bucket/telemetry
    """
    from otel_odibi.report.html import write
    from otel_odibi.report.texts import size

    run, directory = run_and_directory(run, directory)
    try:
        write(opened(directory), run, output)
    except OSError as exc:
        click.echo(f"otel-odibi: cannot write {str(output)!r}: {exc}; name another file with -o", err=True)
        return USAGE
    click.echo(f"{output} ({size(output.stat().st_size)})")
    if show:
        webbrowser.open(output.absolute().as_uri())
    return 0
