"""Tables for people and for programs: on a terminal with colours and cut to its width, else whole, as text or JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from otel_odibi.report.texts import STYLES, duration, safe, size

Row = Mapping[str, Any]
_FOLDED: Final = 24
"""Characters of a text that a column is to have before it is folded."""


class Column(NamedTuple):
    """A column of a table: its title, what it says of a row, whether it holds numbers, which style a row's has.

    On a terminal it is cut to `most` characters where that is given, folded only where it `folds`, and left out where
    there is no room for all columns: those with the highest `spare` first, never those without.
    """

    title: str
    text: Callable[[Row], str]
    right: bool = False
    style: Callable[[Row], str] = lambda row: ""
    most: int | None = None
    folds: bool = False
    spare: int = 0


def plain(name: str, title: str = "") -> Column:
    """Return a column of a value as it is."""
    return Column(title or name, lambda row: "" if row[name] is None else safe(str(row[name])), folds=True)


def number(name: str, title: str = "") -> Column:
    """Return a column of whole numbers."""
    return Column(title or name, lambda row: "" if row[name] is None else f"{row[name]:,}", right=True)


def seconds(name: str, title: str = "") -> Column:
    """Return a column of durations in seconds."""
    return Column(title or name, lambda row: "" if row[name] is None else duration(round(row[name] * 1e9)), right=True)


def memory(name: str, title: str = "") -> Column:
    """Return a column of sizes in bytes."""
    return Column(title or name, lambda row: size(row[name]), right=True)


def moment(name: str, title: str = "") -> Column:
    """Return a column of times, in UTC, to the second."""
    return Column(title or name, lambda row: "" if row[name] is None else f"{row[name]:%Y-%m-%d %H:%M:%S}")


def outcome(name: str = "outcome") -> Column:
    """Return a column of outcomes, in their colours."""
    return Column(name, lambda row: safe(row[name] or ""), style=lambda row: STYLES.get(row[name], ""))


def as_json(row: Row) -> str:
    """Return a row as a line of JSON: times as RFC 3339, what has no form in JSON as text."""
    return orjson.dumps(dict(row), default=str, option=orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS).decode()


def show(console: Console, rows: Sequence[Row], columns: Iterable[Column], *, json: bool = False) -> None:
    """Print rows: as JSON lines, whole; or as a table, on a terminal cut to its width, with colours."""
    if json:
        for row in rows:
            console.file.write(as_json(row) + "\n")
        return
    shown = [column for column in columns if any(map(column.text, rows))]
    if not console.is_terminal:
        _aligned(console, rows, shown)
        return
    widths = {column: _width(column, rows) for column in shown}
    while (
        sum(widths.values()) + 2 * len(widths) > console.width and (spare := max(widths, key=lambda c: c.spare)).spare
    ):
        del widths[spare]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in widths:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=not column.folds)
    for row in rows:
        table.add_row(*(Text(c.text(row)[: c.most], c.style(row), overflow="fold") for c in widths))
    console.print(table)


def _width(column: Column, rows: Sequence[Row]) -> int:
    """Return the characters that a column takes on a terminal, or is to have at least where it folds."""
    widest = max(cell_len(column.text(row)[: column.most]) for row in rows)
    return max(cell_len(column.title), min(widest, _FOLDED) if column.folds else widest)


def _aligned(console: Console, rows: Sequence[Row], columns: Sequence[Column]) -> None:
    lines = [[column.title for column in columns], *([column.text(row) for column in columns] for row in rows)]
    widths = [max(map(cell_len, texts)) for texts in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, columns, strict=True)
        padded = [" " * (width - cell_len(text)) + text if column.right else text + " " * (width - cell_len(text))
                  for text, width, column in cells]  # fmt: skip
        console.file.write("  ".join(padded).rstrip() + "\n")
