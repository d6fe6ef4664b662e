"""A run as a waterfall for the terminal: `rich.print(Waterfall(store.open("telemetry").run("last")))`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from otel_odibi.names import FAILURE, SKIPPED
from otel_odibi.report.critical import critical_path
from otel_odibi.report.texts import ASCII, STYLES, UNICODE, Signs, bar, duration, plural, reason, safe, size
from otel_odibi.store import NodeView, RunSummary, RunView

MIN_BAR: Final = 10
"""Characters that the bars get at least: columns are left out before they would get less."""
_COLOURS: Final = ("cyan", "blue", "magenta", "yellow", "green")
"""Of layers, in the order in which they come."""


class Waterfall:
    """A rich renderable of one run: header, a row a node with its bar to scale, totals, and what failed.

    Pure: what it shows depends on the run and the console alone. The console's width decides on the columns, and its
    encoding on the characters: plain ones where it is not UTF-8. Names and messages stay text, whatever is in them.
    """

    def __init__(self, view: RunView) -> None:
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        signs = ASCII if options.ascii_only else UNICODE
        yield from _header(self.view.run, signs)
        yield Text()
        if self.view.nodes:
            yield _table(self.view, signs, options.max_width)
            yield Text()
        yield _totals(self.view, signs)
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


def _totals(view: RunView, signs: Signs) -> Text:
    """Return one line: nodes by outcome, retries, cache lookups, rows made, highest memory, the critical path."""
    executed = [node for node in view.nodes if not node.run_id]
    outcomes = Counter(node.outcome for node in executed)
    parts = [Text(plural(len(executed), "node"))]
    parts += [
        Text(f"{sign} {outcomes[name]} {name}", STYLES[name]) for name, sign in signs.outcomes.items() if outcomes[name]
    ]
    retries = sum(node.attempt - 1 for node in executed)
    if retries:
        parts.append(Text(f"{signs.retry} {retries} retried", "yellow"))
    lookups = Counter(node.cache_hit for node in executed if node.cache_hit is not None)
    if lookups:
        parts.append(Text(f"cache {plural(lookups[True], 'hit')} of {lookups.total()}"))
    parts.append(Text(f"{plural(sum(node.rows_out or 0 for node in executed), 'row')} out"))
    memory = max((node.rss or 0 for node in executed), default=0)
    if memory:
        parts.append(Text(f"memory up to {size(memory)}"))
    if path := critical_path(view):
        parts.append(Text(f"{signs.critical} critical path: {plural(len(path), 'node')}"))
    return Text(", ").join(parts)


def _failures(view: RunView, signs: Signs) -> Iterator[RenderableType]:
    """Yield a line for each failure: of attempts, of nodes, and of the pipeline where it is none of these."""
    lines = [line for node in view.nodes for line in _failures_of(node, signs)]
    if view.run.failure is not None and all(reason(view.run.failure) != why for *_, why in lines):
        lines.append((signs.outcomes[FAILURE], view.run.pipeline, reason(view.run.failure)))
    if not lines:
        return
    grid = Table.grid(padding=(0, 1))
    for sign, name, why in lines:
        style = "yellow" if sign == signs.retry else STYLES[FAILURE]
        grid.add_row(Text(sign, style), Text(safe(name), style, overflow="fold"), Text(why, overflow="fold"))
    yield Text()
    yield grid


def _failures_of(node: NodeView, signs: Signs) -> Iterator[tuple[str, str, str]]:
    for attempt in node.attempts:
        if attempt.failure is not None and attempt.number < node.attempt:
            yield signs.retry, f"{node.name}, attempt {attempt.number}", reason(attempt.failure)
    if node.failure is not None:
        yield signs.outcomes[FAILURE], node.name, reason(node.failure)


# --- the table -------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One line of the table: a node, or an attempt of one, which has neither `node` nor number."""

    label: str
    outcome: str
    start_ns: int
    duration_ns: int
    colour: str
    number: int = 0
    node: NodeView | None = None
    critical: bool = False

    @property
    def style(self) -> str:
        return "" if self.node is not None and self.outcome != SKIPPED else "dim"


def _rows(view: RunView, signs: Signs) -> Iterator[_Row]:
    layers, critical = list(dict.fromkeys(node.layer for node in view.nodes)), critical_path(view)
    for number, node in enumerate(view.nodes, 1):
        colour = _COLOURS[layers.index(node.layer) % len(_COLOURS)]
        note = " (pipeline)" if node.run_id else f" {signs.retry}{node.attempt}" if node.attempt > 1 else ""
        label = _indented(safe(node.name) + note, node.depth, signs)
        yield _Row(label, node.outcome, node.start_ns, node.duration_ns, colour, number, node, number - 1 in critical)
        for attempt in node.attempts:
            label = _indented(f"attempt {attempt.number}", node.depth + 1, signs)
            yield _Row(label, attempt.outcome, attempt.start_ns, attempt.duration_ns, colour)


def _indented(label: str, depth: int, signs: Signs) -> str:
    return f"{'  ' * (depth - 1)}{signs.inside}{label}" if depth else label


def _cut(text: str, width: int, signs: Signs) -> str:
    """Return `text` in at most `width` terminal cells."""
    return text if cell_len(text) <= width else set_cell_size(text, width - len(signs.cut)).rstrip() + signs.cut


def _table(view: RunView, signs: Signs, width: int) -> Table:
    """Return the table with the first choice of columns that leaves the bars their room."""
    rows, gap = list(_rows(view, signs)), 2 if width >= 120 else 1
    cells = _cells(rows, signs, max(8, width // 4))
    headers = {key: _HEADERS[key].replace("->", signs.arrow) for key in _HEADERS}
    widths = {key: max(cell_len(headers[key]), *(row[key].cell_len for row in cells)) for key in headers}
    for layout in LAYOUTS:
        left = width - sum(widths[key] + gap for key in layout)
        if left >= MIN_BAR:
            break
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for key in layout:
        justify: JustifyMethod = "right" if key in _NUMBERS else "left"
        table.add_column(headers[key], justify=justify, width=widths[key], no_wrap=True, overflow="crop")
    if left >= 4:
        table.add_column(_axis(view.run, left, signs), width=left, no_wrap=True, overflow="crop")
    for row, texts in zip(rows, cells, strict=True):
        table.add_row(*(texts[key] for key in layout), *([_lane(row, view.run, left, signs)] if left >= 4 else []))
    return table


def _axis(run: RunSummary, width: int, signs: Signs) -> str:
    end = f" {duration(run.duration_ns)}"
    return f"0 {signs.line * (width - 2 - len(end))}{end}" if width > len(end) + 2 else ""


def _lane(row: _Row, run: RunSummary, width: int, signs: Signs) -> Text:
    """Return a row's bar, on the scale of the run; in place of one, why a node was skipped."""
    if row.node is not None and row.outcome == SKIPPED:
        return Text(_cut(safe(row.node.skip_reason), width, signs), "dim")
    scale = max(run.duration_ns, 1)
    begin = (row.start_ns - run.start_ns) / scale
    style = "red" if row.outcome == FAILURE else row.colour if row.node else f"dim {row.colour}"
    return Text(bar(begin, begin + row.duration_ns / scale, width, signs), style)


# --- the columns -----------------------------------------------------------------------------------------------------

_HEADERS: Final = {
    "outcome": "", "number": "", "node": "node", "depends on": "depends on", "after": "after", "layer": "layer",
    "rows": "rows in -> out", "memory": "memory", "cache": "cache", "time": "time",
}  # fmt: skip
_NUMBERS: Final = ("number", "rows", "memory", "time")
LAYOUTS: Final = (
    ("outcome", "number", "node", "depends on", "layer", "rows", "memory", "cache", "time"),
    ("outcome", "number", "node", "after", "layer", "rows", "memory", "cache", "time"),
    ("outcome", "number", "node", "after", "rows", "memory", "cache", "time"),
    ("outcome", "number", "node", "after", "rows", "time"),
    ("outcome", "node", "rows", "time"),
    ("outcome", "node", "time"),
)
"""Columns from the widest choice to the narrowest."""


def _cells(rows: Sequence[_Row], signs: Signs, limit: int) -> list[dict[str, Text]]:
    """Return for each row its text in every column; names are cut at `limit`."""
    made = max((len(_count(row.node.rows_out)) for row in rows if row.node), default=0)
    after = _after(rows)
    found = []
    for row in rows:
        cells = dict.fromkeys(_HEADERS, Text())
        cells["outcome"] = Text(signs.outcomes.get(row.outcome, "?"), STYLES.get(row.outcome, ""))
        cells["outcome"].append(signs.critical if row.critical else " ", "default")
        cells["node"] = Text(_cut(row.label, limit, signs), row.style)
        cells["time"] = Text("" if row.outcome == SKIPPED else duration(row.duration_ns), row.style)
        node = row.node
        if node is not None:
            depends_on = ", ".join(map(safe, node.depends_on))
            cells["number"] = Text(str(row.number), "dim")
            cells["depends on"] = Text(_cut(depends_on, limit, signs), "dim")
            cells["after"] = Text(_cut(after(node), limit, signs), "dim")
            cells["layer"] = Text(_cut(safe(node.layer), limit, signs), row.colour)
            if node.rows_in is not None or node.rows_out is not None:
                out = "-" if node.rows_out is None else _count(node.rows_out)
                cells["rows"] = Text(f"{_count(node.rows_in)} {signs.arrow} {out:>{made}}".lstrip())
            cells["memory"] = Text("" if row.outcome == SKIPPED else size(node.rss))
            if node.cache_hit is not None:
                cells["cache"] = Text("hit", "green") if node.cache_hit else Text("miss", "yellow")
        found.append(cells)
    return found


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _after(rows: Sequence[_Row]) -> Callable[[NodeView], str]:
    """Make what gives the rows of the nodes that a node depends on; the name of one that is no row."""
    nodes = [(row.number, row.node) for row in rows if row.node]
    by_span = {node.span_id: (number, node.name) for number, node in nodes}
    by_name = {node.name: number for number, node in nodes}

    def after(node: NodeView) -> str:
        linked = [by_span[span_id] for span_id in node.links if span_id in by_span]
        named = [name for name in node.depends_on if name not in {name for _, name in linked}]
        numbers = [number for number, _ in linked] + [by_name[name] for name in named if name in by_name]
        return " ".join([*_ranges(numbers), *(safe(name) for name in named if name not in by_name)])

    return after


def _ranges(numbers: Iterable[int]) -> list[str]:
    """Return the numbers in order, three or more in a row as one: 2, 5-8."""
    groups: list[list[int]] = []
    for number in sorted(set(numbers)):
        if groups and groups[-1][-1] == number - 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return [text for g in groups for text in ([f"{g[0]}-{g[-1]}"] if len(g) > 2 else map(str, g))]
