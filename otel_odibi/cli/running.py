"""Commands that run a program: `demo` and `run`."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import functools
import importlib.machinery
import io
import itertools
import os
import pkgutil
import runpy
import shlex
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from otel_odibi.cli import FAILED, USAGE, cli, command_name
from otel_odibi.errors import MissingExtraError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from otel_odibi.store import Store
    from otel_odibi.telemetry import Telemetry

FAST_ROWS: Final = 20_000
"""Rows of each table that `demo --fast` reads."""

_SAFE_PATH: Final = bool(getattr(sys.flags, "safe_path", False))
"""Whether Python is to leave a program's folder out of `sys.path`; else the first entry there is this command's own."""


@cli.command()
@click.argument("directory", default="telemetry", type=click.Path(file_okay=False, path_type=Path), metavar="[DIR]")
@click.option("--fail", metavar="NODE", default="", help="Let this node fail.")
@click.option("--fast", is_flag=True, help=f"Read only the first {FAST_ROWS:,} rows of each table.")
@click.option("--continuous", is_flag=True, help="Keep runs coming until Ctrl-C, some slow, some failing.")
@click.option(
    "--interval", type=click.FloatRange(0), metavar="S", help="Seconds between continuous runs, 5 by default."
)
@click.option("--runs", type=click.IntRange(1), metavar="N", help="Stop after so many continuous runs.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), hidden=True, help="Save the waterfall here.")
def demo(
    directory: Path, fail: str, fast: bool, continuous: bool, interval: float | None, runs: int | None, svg: Path | None
) -> int:
    """Run a real pipeline over 336,776 flights, and show its trace, metrics and logs.

    Telemetry and results go to DIR, by default "telemetry". Run it again to see the cache hit. With --continuous
    fast runs keep coming, a line each; OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_ODIBI_PROMETHEUS_PORT send them on.

    \b
    Examples:
      otel-odibi demo
      otel-odibi demo --fail join_weather
      otel-odibi demo --fast /tmp/telemetry
      OTEL_ODIBI_PROMETHEUS_PORT=9464 otel-odibi demo --continuous --interval 2
    """
    from rich.console import Console

    from otel_odibi import store
    from otel_odibi.report.terminal import Waterfall

    if (fail or svg) if continuous else (runs or interval is not None):
        raise click.UsageError("--interval and --runs go with --continuous, --fail and --svg without")
    pipeline = _demo_pipeline(fail)
    if continuous:
        return _continuous(pipeline, directory, 5.0 if interval is None else interval, runs)
    console = Console(highlight=False)
    if console.options.ascii_only and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names and messages may hold what this terminal cannot show
    work = functools.partial(pipeline.run, directory, rows=FAST_ROWS if fast else None, fail=fail)
    run_id, succeeded = _watched(work, directory, console)
    opened = store.open(directory)
    picture = Waterfall(opened.run(run_id))
    console.print(
        "", picture, "", "[bold]Where everything is[/]", _files(opened, directory), "", "[bold]What next[/]", sep="\n"
    )
    console.print(_hints(directory), markup=False, soft_wrap=True)
    if svg is not None:
        drawing = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
        drawing.print(picture)
        drawing.save_svg(str(svg), title="otel-odibi demo")
    return 0 if succeeded else FAILED


def _demo_pipeline(fail: str) -> types.ModuleType:
    """Return the module of the demo's pipeline, after a look at the name of the node that is to fail."""
    try:
        from otel_odibi import demo as pipeline
    except ImportError as exc:
        if exc.name != "pandas":
            raise
        raise MissingExtraError("otel-odibi demo", "demo") from None
    if fail and fail not in pipeline.NODES:
        known = ", ".join(pipeline.NODES)
        raise click.BadParameter(f"there is no node {fail!r}; choose from {known}", param_hint="--fail")
    return pipeline


def _demo_telemetry(directory: Path) -> Telemetry:
    """Turn on every kind of telemetry there is without a server; the environment may add to that."""
    from otel_odibi.process import configure
    from otel_odibi.settings import METRIC_FORMATS, SPAN_FORMATS

    return configure(
        service_name="flights", directory=directory, enabled=True, logs=True,
        span_formats=SPAN_FORMATS, metric_formats=METRIC_FORMATS,
    )  # fmt: skip


def _continuous(pipeline: types.ModuleType, directory: Path, interval: float, runs: int | None) -> int:
    """Run the pipeline again and again, and print a line a run, until that many are done, or Ctrl-C or SIGTERM."""
    from otel_odibi.facts import RunFinished
    from otel_odibi.report.texts import duration

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's way to say Ctrl-C
    finished: list[RunFinished] = []
    with _demo_telemetry(directory) as telemetry, contextlib.suppress(KeyboardInterrupt):
        telemetry.subscribe(RunFinished, finished.append)
        for number in itertools.count(1):
            with contextlib.suppress(pipeline.DataError):
                pipeline.run_number(number, directory, FAST_ROWS)
            fact = finished.pop()
            why = fact.failure.message if fact.failure else ""
            trace = f"trace {fact.start.trace_id:032x}"
            click.echo(f"{number:>5}  {fact.outcome:<7}  {duration(fact.duration_ns):>7}  {trace}  {why}".rstrip())
            if number == runs:
                break
            time.sleep(interval)
    return 0


def _watched(work: Callable[[], None], directory: Path, console: Console) -> tuple[str, bool]:
    """Do the work with every kind of telemetry on, and show progress; return the run's id, and whether it succeeded."""
    from otel_odibi.report.progress import Progress

    telemetry = _demo_telemetry(directory)
    progress = Progress(console, telemetry)
    try:
        with telemetry, progress:
            work()
    except Exception:
        if not progress.run_ids:
            raise
        return progress.run_ids[0], False  # why is in the picture
    return progress.run_ids[0], True


def _files(opened: Store, directory: Path) -> Table:
    """Return a table of where everything is: telemetry, and the results."""
    from rich.table import Table
    from rich.text import Text

    from otel_odibi.report.texts import plural, size
    from otel_odibi.store import Files

    results = [path.stat().st_size for path in directory.glob("published/*.csv")]
    results_row = Files("results", "published/*.csv", len(results), sum(results), len(results), "file")
    grid = Table.grid(padding=(0, 2))
    for found in (*opened.files(), results_row):
        number = "" if found.records is None else plural(found.records, found.unit)
        where = Text((directory / found.path).as_posix(), overflow="fold")
        grid.add_row(Text(found.signal, "bold"), where, number, Text(size(found.bytes), justify="right"))
    return grid


def _hints(directory: Path) -> str:
    """Return commands to go on with."""
    here = directory.as_posix()
    log = shlex.quote(f"{here}/logs/flights.jsonl")
    slowest = f'FROM "{here}/spans/*/*.parquet" SELECT SpanName, Duration / 1e6 AS ms ORDER BY ms DESC LIMIT 5'
    return f"""\
jq -r 'select(.level == "warning" or .level == "error") | .message' {log}
duckdb -c {shlex.quote(slowest)}
{command_name()} demo --fail join_weather {shlex.quote(here)}"""


# --- run --------------------------------------------------------------------------------------------------------------


@cli.command(context_settings={"allow_interspersed_args": False})
@click.option("-m", "as_module", is_flag=True, help="TARGET is a module, to be found as python -m finds it.")
@click.option("--integrations", metavar="NAMES", help="Engines to instrument, as in dask,kedro, or none; else all.")
@click.argument("target")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(target: str, args: tuple[str, ...], as_module: bool, integrations: str | None) -> Callable[[], None]:
    """Run a Python script or module with telemetry on, as python itself would run it.

    Settings come from OTEL_ODIBI_* and OTEL_* variables and [tool.otel-odibi] in pyproject.toml. Where they name no
    place for telemetry to go, it goes to the directory "telemetry". A configure() in the program itself wins. Engines
    are instrumented when the program imports them. The exit code is the program's own.

    \b
    Examples:
      otel-odibi run etl.py --day 2026-01-31
      otel-odibi run -m etl.daily
      otel-odibi run --integrations none etl.py
      OTEL_ODIBI_DIRECTORY=/var/telemetry otel-odibi run etl.py
    """
    from otel_odibi.integrations import enable
    from otel_odibi.process import configure
    from otel_odibi.settings import Settings
    from otel_odibi.telemetry import wants_otlp

    engines = _engines(integrations)
    settings = Settings.load()
    placed = settings.directory or settings.parquet_uri or settings.prometheus_port is not None
    program = functools.partial(_module if as_module else _script, target)
    interrupted: list[BaseException] = []
    atexit.register(_stay_interrupted, interrupted)  # called last, when telemetry is shut down
    configure(directory=None if placed or wants_otlp(settings, "TRACES") else "telemetry")
    enable(engines)
    return functools.partial(_as_python, program, ["-m" if as_module else target, *args], interrupted)


def _engines(integrations: str | None) -> list[str]:
    """Return the names of the integrations to enable, after a look at whether there are such."""
    from otel_odibi.integrations import known

    names = list(known())
    asked = names if integrations is None else [] if integrations == "none" else integrations.split(",")
    for name in asked:
        if name not in names:
            choice = ", ".join([*names, "none"])
            raise click.BadParameter(f"there is no {name!r}; choose from {choice}", param_hint="--integrations")
    return asked


def _as_python(program: Callable[[], None], argv: list[str], interrupted: list[BaseException]) -> None:
    """Run a program as `__main__`; what it raises is printed without our frames, and raised on to end the process.

    Telemetry is shut down at exit, when the program's threads have ended.
    """
    sys.argv = argv
    sys.modules["__main__"] = main_module = types.ModuleType("__main__")
    vars(main_module)["__builtins__"] = builtins
    try:
        program()
    except SystemExit:
        raise
    except BaseException as exc:
        trace = exc.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(exc), exc.with_traceback(trace), trace)
        sys.excepthook = lambda *_: None  # it has been printed; the exit code, or the signal, is for Python to set
        if isinstance(exc, KeyboardInterrupt):
            interrupted.append(exc)
        raise


def _stay_interrupted(interrupted: list[BaseException]) -> None:
    """Let the process end by SIGINT after all, so that a shell's loop ends with it.

    CPython notes an interrupt that nothing caught, and forgets it when code is compiled from text and run, as happens
    where a module is imported at exit. This makes it note the interrupt again.
    """
    if interrupted:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # noqa: S102


def _module(name: str) -> None:
    if not _SAFE_PATH:
        sys.path[0] = os.getcwd()
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]  # what `python -m` itself calls


def _script(path: str) -> None:
    """Run a script, or a directory or zip file that has a `__main__.py`."""
    if pkgutil.get_importer(path) is not None:
        sys.path[: 0 if _SAFE_PATH else 1] = [os.path.abspath(path)]
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        return
    full = os.path.abspath(path)
    try:
        with io.open_code(full) as stream:
            source = stream.read()
    except OSError as exc:
        click.echo(f"otel-odibi: can't open file {full!r}: [Errno {exc.errno}] {exc.strerror}", err=True)
        sys.exit(USAGE)
    if not _SAFE_PATH:
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    loader = importlib.machinery.SourceFileLoader("__main__", full)
    namespace = vars(sys.modules["__main__"])
    namespace.update(__file__=full, __loader__=loader, __cached__=None)
    exec(compile(source, full, "exec", dont_inherit=True), namespace)  # noqa: S102 - it is what this command is for
