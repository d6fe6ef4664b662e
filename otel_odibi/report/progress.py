"""Shows nodes while they run: on a terminal a list that is redrawn, elsewhere a line for each that ends."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from otel_odibi.facts import Failure, NodeFinished, NodeRetried, NodeStarted, RunStarted
from otel_odibi.names import SKIPPED
from otel_odibi.report.texts import ASCII, STYLES, UNICODE, duration, plural, reason, safe

if TYPE_CHECKING:
    from otel_odibi.telemetry import Telemetry


class _Line(NamedTuple):
    """What is known of one execution of a node."""

    node: str
    began: float
    attempt: int = 1
    failure: Failure | None = None
    end: NodeFinished | None = None

    @property
    def time(self) -> str:
        return duration(round((time.monotonic() - self.began) * 1e9) if self.end is None else self.end.duration_ns)

    @property
    def note(self) -> str:
        """What it made of it: rows, a cache hit, an attempt, an error."""
        parts = [f"attempt {self.attempt}"] if self.attempt > 1 else []
        parts += [reason(self.failure)] if self.failure is not None else []
        if self.end is not None:
            parts += [SKIPPED] if self.end.outcome == SKIPPED else []
            parts += [plural(self.end.rows_out, "row")] if self.end.rows_out is not None else []
            parts += ["from the cache"] if self.end.cache_hit else []
        return ", ".join(parts)


class Progress:
    """A context manager that shows on `console` the nodes that `telemetry` records. Thread-safe.

    Attribute `run_ids`: the ids of the runs that began, the outermost first. What a terminal shows is gone again after
    the block, to make room for the whole picture.
    """

    def __init__(self, console: Console, telemetry: Telemetry) -> None:
        self.run_ids: list[str] = []
        self._console = console
        self._signs = ASCII if console.options.ascii_only else UNICODE
        self._spinner = Spinner("line" if console.options.ascii_only else "dots")
        self._live = Live(self, console=console, refresh_per_second=10, transient=True) if console.is_terminal else None
        self._lines: dict[int, _Line] = {}  # by span; no lock: a node's facts come one after the other
        telemetry.subscribe(RunStarted, lambda fact: self.run_ids.append(fact.run_id))
        telemetry.subscribe(NodeStarted, self._started)
        telemetry.subscribe(NodeRetried, lambda fact: self._changed(fact, attempt=fact.attempt))
        telemetry.subscribe(NodeFinished, lambda fact: self._changed(fact, end=fact))

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def _started(self, fact: NodeStarted) -> None:
        self._lines[fact.span_id] = _Line(fact.node, time.monotonic())

    def _changed(self, fact: NodeRetried | NodeFinished, **what: Any) -> None:
        key = fact.start.span_id
        self._lines[key] = line = self._lines[key]._replace(failure=fact.failure, **what)
        if self._live is None:
            text = Text(f"{safe(line.node):<24} {line.time:>7}  {line.note}".rstrip())
            self._console.print(self._sign(line), text, soft_wrap=True)

    def _sign(self, line: _Line) -> Text:
        if line.end is None:
            return Text(self._signs.retry, "yellow")
        return Text(self._signs.outcomes[line.end.outcome], STYLES[line.end.outcome])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = list(self._lines.values())
        grid = Table.grid(padding=(0, 1))
        grid.add_column()
        grid.add_column(no_wrap=True)
        grid.add_column(justify="right", style="dim", no_wrap=True)
        grid.add_column(no_wrap=True)
        for line in lines[-max(1, console.height - 2) :]:
            sign = self._spinner if line.end is None else self._sign(line)
            grid.add_row(sign, Text(safe(line.node)), line.time, Text(line.note))
        yield grid
