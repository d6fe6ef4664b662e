"""The command `otel-odibi`, and what its subcommands share. Each module here adds its own to the group."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from otel_odibi import __version__
from otel_odibi.errors import OdibiTelemetryError

FAILED: Final = 1
"""Exit code where a run failed."""
USAGE: Final = 2
"""Exit code where the command cannot do what it was told to: also click's own."""

DIRECTORY: Final = click.argument(
    "directory", default="telemetry", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="[DIR]"
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="otel-odibi")
def cli() -> None:
    """OpenTelemetry for data pipelines: see what your pipelines did, with no server.

    \b
    Examples:
      otel-odibi demo                    a real pipeline, and all it leaves behind
      otel-odibi run etl.py              a program of yours, its engine included
      otel-odibi runs                    which runs there were, and which are under way
      otel-odibi trace                   the last run as a waterfall
      otel-odibi logs --level error      what went wrong
      otel-odibi report --open           the last run as a page in the browser
      otel-odibi check                   is the newest run worse than those before it?
      otel-odibi doctor                  is everything set up, and does the collector answer?
      otel-odibi recover                 close the runs of processes that died

    \b
    Exit codes:
      0  all went well
      1  the run failed, or a check did
      2  wrong usage: an option, a setting, a directory, or something not installed
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line, and exit the process with its exit code."""
    try:
        done = cli.main(args, command_name(), standalone_mode=False, windows_expand_args=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(FAILED)
    except OdibiTelemetryError as exc:
        click.echo(f"otel-odibi: {exc}", err=True)
        sys.exit(USAGE)
    if callable(done):  # a user's program: outside of click, which would take its interrupts and errors for its own
        done()
    else:
        sys.exit(done)


def command_name() -> str:
    """Return what to type to call this command again: its name where that finds it, else the way it was started."""
    started, found = Path(sys.argv[0]), shutil.which("otel-odibi")
    if found is not None and Path(found).resolve().with_suffix("") == started.resolve().with_suffix(""):
        return "otel-odibi"
    return (
        shlex.quote(sys.executable) + " -m otel_odibi" if started.name == "__main__.py" else shlex.quote(str(started))
    )


from otel_odibi.cli import gating, health, looking, reporting, running  # noqa: E402, F401 - they add their commands to the group above
