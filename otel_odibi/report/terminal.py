"""A run as a waterfall for the terminal: a pure function of what the store returns.

    rich.print(Waterfall(store.open("telemetry").run("last")))
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from otel_odibi.facts import Failure
from otel_odibi.names import CANCELLED, FAILURE, LOST, SKIPPED, SUCCESS
from otel_odibi.store import AttemptView, NodeView, RunView

MIN_BAR: Final = 12
"""Characters that the bars get at least; columns are left out before they would get less."""
MAX_MESSAGE: Final = 400
"""Characters of an error message that are shown."""


class Signs(NamedTuple):
    """The characters of one view: `eighths` are the ends of bars, by eighths of a character."""

    outcomes: dict[str, str]
    retry: str
    arrow: str
    inside: str
    cut: str
    eighths: str
    right_half: str


_OUTCOMES: Final = (SUCCESS, FAILURE, CANCELLED, SKIPPED, LOST)
UNICODE: Final = Signs(dict(zip(_OUTCOMES, "✓✗◼⊘?", strict=True)), "↻", "→", "└ ", "…", " ▏▎▍▌▋▊▉█", "▐")
ASCII: Final = Signs(dict(zip(_OUTCOMES, "+x!-?", strict=True)), "r", "->", "` ", "..", " ########", "#")
STYLES: Final = {SUCCESS: "green", FAILURE: "bold red", CANCELLED: "yellow", SKIPPED: "dim", LOST: "magenta"}
_LAYER_COLOURS: Final = ("cyan", "blue", "magenta", "yellow", "green")

_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


def safe(text: str) -> str:
    """Return `text` on one line, without what would steer a terminal: control and direction characters."""
    return _CONTROLS.sub(" ", text).strip()


def duration(nanoseconds: int) -> str:
    """Return a duration in three figures or so: 0.4 ms, 274 ms, 1.84 s, 2 m 05 s, 3 h 12 m."""
    milliseconds = nanoseconds / 1e6
    if milliseconds < 999.5:
        return f"{milliseconds:.{0 if milliseconds >= 9.95 else 1}f} ms"
    if milliseconds < 59_995:
        return f"{milliseconds / 1000:.{2 if milliseconds < 9_995 else 1}f} s"
    minutes, seconds = divmod(round(milliseconds / 1000), 60)
    return f"{minutes} m {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} m"


def size(number: int | None) -> str:
    """Return a size in three figures or so, in units of 1,000: 12 B, 3.4 kB, 212 MB; the empty text for None."""
    if number is None:
        return ""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.{0 if unit == 'B' or value >= 9.95 else 1}f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def count(number: int | None) -> str:
    """Return a number with commas; the empty text for None."""
    return "" if number is None else f"{number:,}"


class Bar:
    """A bar from one fraction of the width to another, exact to an eighth of a character; never too short to see."""

    def __init__(self, begin: float, end: float, style: str, signs: Signs) -> None:
        self.begin = begin
        self.end = end
        self.style = style
        self.signs = signs

    def text(self, width: int) -> str:
        """Return the bar in `width` characters."""
        eighths = self.signs.eighths
        start = min(max(0, round(self.begin * width * 8)), width * 8 - 1)
        stop = min(max(round(self.end * width * 8), start + 1), width * 8)
        first, last = start // 8, stop // 8
        if first == last:
            return f"{' ' * first}{eighths[stop % 8]}".ljust(width)
        head = self.signs.right_half if start % 8 >= 4 else eighths[8]
        return f"{' ' * first}{head}{eighths[8] * (last - first - 1)}{eighths[stop % 8]}"[:width].ljust(width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self.text(options.max_width), console.get_style(self.style))


class Layout(NamedTuple):
    """Which columns there is room for. `edges` is how the nodes that a node depends on are given."""

    edges: str = "numbers"
    layer: bool = True
    rows: bool = True
    memory: bool = True
    cache: bool = True


LAYOUTS: Final = (
    Layout(edges="names"),
    Layout(),
    Layout(layer=False),
    Layout(layer=False, memory=False),
    Layout(edges="", layer=False, memory=False, cache=False),
    Layout(edges="", layer=False, memory=False, cache=False, rows=False),
)
"""From the widest to the narrowest: the first in which the bars get their room is taken."""


class Waterfall:
    """A rich renderable of one run: header, a row a node with its bar to scale, totals, and what failed.

    Pure: what it shows depends on the run and the console alone, which decides on the columns there is room for, and on
    plain characters where its encoding is not UTF-8. Names and messages are shown as text, whatever is in them.
    """

    def __init__(self, view: RunView) -> None:
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        signs = ASCII if options.ascii_only else UNICODE
        yield from _header(self.view.run, signs)
        if self.view.nodes:
            yield Text()
            yield _table(self.view, signs, options.max_width)
        yield Text()
        yield _totals(self.view.nodes, signs)
        yield from _failures(self.view, signs)


def _header(run: RunSummary, signs: Signs) -> Iterator[Text]:
    style = STYLES.get(run.outcome, "")
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.start_ns / 1e9))
    yield Text.assemble(
        (f"{signs.outcomes.get(run.outcome, '?')} ", style),
        (safe(run.pipeline), "bold"),
        (f"  {safe(run.outcome)}", style),
        f" in {duration(run.duration_ns)}",
        (f"  {safe(run.service)}, {began}", "dim"),
    )
    yield Text(f"  run {safe(run.run_id)}  trace {safe(run.trace_id)}", "dim")


# --- the table -------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One line of the table: a node, or an attempt of one, which has no `node`."""

    label: str
    outcome: str
    start_ns: int
    duration_ns: int
    colour: str
    number: str = ""
    node: NodeView | None = None


class _Column(NamedTuple):
    header: str
    justify: JustifyMethod
    cells: list[Text]

    @property
    def width(self) -> int:
        return max(cell_len(self.header), *(cell.cell_len for cell in self.cells))


def _table(view: RunView, signs: Signs, width: int) -> Table:
    """Return the table in the first layout that leaves the bars their room."""
    rows = list(_rows(view.nodes, signs))
    for layout in LAYOUTS:
        columns = _columns(rows, layout, signs, width)
        left = width - sum(column.width + 1 for column in columns)
        if left >= MIN_BAR:
            break
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column.header, justify=column.justify, width=column.width, no_wrap=True, overflow="crop")
    bars: list[list[RenderableType]] = [[] for _ in rows]
    if left >= 4:
        table.add_column(_axis(view.run, left), width=left, no_wrap=True, overflow="crop")
        bars = [[_bar(row, view.run, signs, left)] for row in rows]
    for number, bar in enumerate(bars):
        table.add_row(*(column.cells[number] for column in columns), *bar)
    return table


def _rows(nodes: Sequence[NodeView], signs: Signs) -> Iterator[_Row]:
    layers = list(dict.fromkeys(node.layer for node in nodes if node.layer))
    for number, node in enumerate(nodes, 1):
        place = layers.index(node.layer) if node.layer else 0
        colour = "red" if node.outcome == FAILURE else _LAYER_COLOURS[place % len(_LAYER_COLOURS)]
        label = _indented(safe(node.name) + (" (pipeline)" if node.run_id else ""), node.depth, signs)
        yield _Row(label, node.outcome, node.start_ns, node.duration_ns, colour, str(number), node)
        for attempt in node.attempts:
            label = _indented(f"attempt {attempt.number}", node.depth + 1, signs)
            colour_of_attempt = "red" if attempt.outcome == FAILURE else colour
            yield _Row(label, attempt.outcome, attempt.start_ns, attempt.duration_ns, colour_of_attempt)


def _indented(label: str, depth: int, signs: Signs) -> str:
    return f"{'  ' * (depth - 1)}{signs.inside}{label}" if depth else label


def _columns(rows: Sequence[_Row], layout: Layout, signs: Signs, width: int) -> list[_Column]:
    def column(header: str, justify: JustifyMethod, cell: Callable[[_Row], Text]) -> _Column:
        return _Column(header, justify, [cell(row) for row in rows])

    def of_node(cell: Callable[[NodeView], Text]) -> Callable[[_Row], Text]:
        return lambda row: Text() if row.node is None else cell(row.node)

    limit = max(10, width // 3)
    edges = _Edges(rows, layout.edges == "names", signs, limit)
    columns = [
        column("", "left", lambda row: Text(signs.outcomes.get(row.outcome, "?"), STYLES.get(row.outcome, ""))),
        column("", "right", lambda row: Text(row.number, "dim")),
        column("node", "left", lambda row: _cut(row.label, limit, signs, "" if row.node else "dim")),
        column("depends on" if layout.edges == "names" else "after", "left", of_node(edges.cell)),
        column("layer", "left", lambda row: _cut(safe(row.node.layer) if row.node else "", 12, signs, row.colour)),
        column(f"rows in {signs.arrow} out", "right", _RowCounts(rows, signs).cell),
        column("memory", "right", of_node(lambda node: Text(size(node.rss)))),
        column("cache", "left", of_node(_cache)),
        column("time", "right", lambda row: Text(duration(row.duration_ns), "" if row.node else "dim")),
    ]
    shown = (True, bool(layout.edges), True, bool(layout.edges), layout.layer, layout.rows, layout.memory, layout.cache)
    return [column for column, wanted in zip(columns, (*shown, True), strict=True) if wanted]
