"""Commands about telemetry itself: `doctor`, and after a crash or an outage `active`, `recover`, `replay`."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from pathlib import Path

import click

from otel_odibi.cli import DIRECTORY, FAILED, cli


@cli.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path), metavar="[DIR]")
@click.option("--prometheus", metavar="URL", help="Ask this Prometheus whether it has metrics of the service.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def doctor(directory: Path | None, prometheus: str | None, as_json: bool) -> int:
    """Check that telemetry can go where the settings say: directory, port, collector, versions.

    DIR is the telemetry directory, by default the one that is set, else "telemetry". Each check is one line: ok, warn
    or fail, what was found, and the remedy. A collector gets a test span; nothing else is left behind. A check
    takes at most 2 seconds. The exit code is 1 where a check fails.

    \b
    Examples:
      otel-odibi doctor
      OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4317 otel-odibi doctor
      otel-odibi doctor --prometheus http://localhost:9090
      otel-odibi doctor --json | jq '.[] | select(.status != "ok")'
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from otel_odibi.doctor import examine
    from otel_odibi.report.texts import safe

    console = Console(highlight=False)
    findings = []
    with console.status("checking") if console.is_terminal and not as_json else contextlib.nullcontext():
        for finding in examine(directory, prometheus):
            findings.append(finding)
            if not (as_json or console.is_terminal):
                remedy = f" -> {finding.remedy}" if finding.remedy else ""
                click.echo(safe(f"{finding.status:<4}  {finding.check:<15}  {finding.found}{remedy}"))
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    elif console.is_terminal:
        table = Table("", "check", "found", "remedy", box=None, pad_edge=False)
        for finding in findings:
            style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[finding.status]
            table.add_row(Text(finding.status, style), *(Text(safe(text)) for text in (finding.check, *finding[2:])))
        console.print(table)
    return FAILED if any(finding.status == "fail" for finding in findings) else 0


@cli.command()
@DIRECTORY
def recover(directory: Path) -> None:
    """Close the runs of processes that died, and bring back their spans.

    The next run that writes to DIR does so as well. What still runs is left alone.

    \b
    Example:
      otel-odibi recover /var/telemetry
    """
    from otel_odibi.recovery import recover as bring_back
    from otel_odibi.settings import Settings
    from otel_odibi.spool import keep

    waiting = functools.partial(keep, directory, "recovered.0-00000000")
    done = bring_back(directory, parquet=Settings.load().parquet_uri, spool=waiting)
    for line in done.runs:
        nodes = [node["node_name"] for node in done.nodes if node.get("run_id") == line["run_id"]]
        during = f" in {', '.join(nodes)}" if nodes else ""
        click.echo(f"{line['pipeline']}  run {line['run_id']}  lost{during}, last heard of at {line['timestamp']}")
    for line in done.nodes:
        if not line.get("run_id"):
            click.echo(f"node {line['node_name']}  lost, last heard of at {line['timestamp']}")
    for problem in done.files:
        click.echo(problem, err=True)
    click.echo(f"{len(done.runs)} runs and {len(done.nodes)} nodes closed, {done.spans} spans brought back")


@cli.command()
@DIRECTORY
def active(directory: Path) -> None:
    """Show the runs and nodes that are under way, as their processes told within the last seconds.

    What has not been heard of for long may have died: `otel-odibi recover` closes it.

    \b
    Example:
      otel-odibi active /var/telemetry
    """
    from otel_odibi.report.texts import duration, size
    from otel_odibi.store import open as open_store

    for found in open_store(directory).active():
        what = f"  node {found.node}" if found.node else f"pipeline {found.pipeline}  run {found.run_id}"
        heard = duration(max(0, time.time_ns() - found.heard_ns))
        memory = "" if found.rss is None or found.node else f", {size(found.rss)} of memory"
        click.echo(f"{what}  for {duration(found.heard_ns - found.start_ns)}{memory}, heard of {heard} ago")


@cli.command()
@DIRECTORY
@click.option("--endpoint", metavar="URL", help="Send it there, not where settings and environment say.")
def replay(directory: Path, endpoint: str | None) -> int:
    """Send what waits in DIR/spool for an OTLP endpoint that was away.

    \b
    Example:
      otel-odibi replay /var/telemetry --endpoint http://localhost:4317
    """
    from otel_odibi.spool import replay as send

    sent, lost, left = send(directory, endpoint)
    click.echo(f"{sent} items delivered, {lost} refused for good, {left} left in {directory / 'spool'}")
    return FAILED if left or lost else 0
