"""What commands that look at a telemetry directory have in common: arguments, options, where they print."""

from __future__ import annotations

import contextlib
import math
import re
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from rich.console import Console

    from otel_odibi.store import Store

WHERE: Final = click.argument("directory", default="telemetry", metavar="[DIR]")
"""A directory or a URI, such as s3://bucket/prefix."""
JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON, a line a row.")
_THOUSANDS: Final = {"": 1e0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def age(text: str) -> float:
    """Read a length of time (30m, 2h, 7d) and return seconds. Raises click.BadParameter."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)):
        raise click.BadParameter(f"{text!r} is no length of time; write 30m, 2h, 7d")
    return float(found[1]) * _UNITS[found[2]]


def size_of(text: str) -> int:
    """Read a size (500MB, 20GB) in units of 1,000 and return bytes. Raises click.BadParameter."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)B", text)):
        raise click.BadParameter(f"{text!r} is no size; write 500MB, 20GB")
    return round(float(found[1]) * _THOUSANDS[found[2]])


def since(text: str) -> int:
    """Read so long ago, or a date or time of ISO 8601, in UTC where it names no zone; return Unix nanoseconds.

    Raises click.BadParameter.
    """
    with contextlib.suppress(click.BadParameter):
        return time.time_ns() - round(age(text) * 1e9)
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
        found = found if found.tzinfo else found.replace(tzinfo=timezone.utc)
        return math.floor(found.timestamp()) * 1_000_000_000 + found.microsecond * 1000
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{text!r} is no time; write 30m, 2h, 7d, 2026-01-31 or 2026-01-31T08:00") from None


def _run_ids(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """Return the ids of the newest runs that a shell may complete this to."""
    from otel_odibi import store

    try:
        rows = store.open(ctx.params.get("directory") or "telemetry", on_problem=lambda text: None).runs(limit=100)
    except Exception:  # noqa: BLE001 - a shell has no use for it
        return []
    return [run_id for run_id in ("last", *rows["run_id"].to_pylist()) if run_id.startswith(begun)]


WHICH: Final = click.argument("run", default="last", metavar="[RUN]", shell_complete=_run_ids)
SINCE: Final = click.option("--since", "since_ns", type=since, metavar="TIME", help="Only what began since then.")
PIPELINE: Final = click.option("--pipeline", default="", metavar="NAME", help="Only this pipeline.")
RUN: Final = click.option(
    "--run", default="", metavar="RUN", help='Only this run: its id, how it begins, or "last".',
    shell_complete=_run_ids,
)  # fmt: skip


def opened(directory: str) -> Store:
    """Open a telemetry directory; what cannot be read in it is named on standard error, a line a file."""
    from otel_odibi import store
    from otel_odibi.report.texts import safe

    return store.open(directory, on_problem=lambda text: click.echo(f"otel-odibi: {safe(text)}", err=True))


def run_id_of(found: Store, run: str) -> str:
    """Return the whole id of a run that was asked for, the empty text where none was."""
    return found.run(run).run.run_id if run else ""


def run_and_directory(run: str, directory: str) -> tuple[str, str]:
    """Take what names a directory and no run for the directory."""
    is_place = "://" in run or Path(run).is_dir()
    return ("last", run) if directory == "telemetry" and is_place else (run, directory)


def console() -> Console:
    """Return a console on standard output, which a reader may leave early."""
    from rich.console import Console

    return Console(highlight=False)
