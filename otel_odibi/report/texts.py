"""Texts and signs that every view of a run is made of."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from otel_odibi.facts import Failure
from otel_odibi.names import CANCELLED, FAILURE, LOST, SKIPPED, SUCCESS

MAX_MESSAGE: Final = 400
"""Characters of an error message that are shown."""


class Signs(NamedTuple):
    """The characters of a view. `eighths` are the ends of bars: nothing, an eighth of a character ... all of it."""

    outcomes: dict[str, str]
    retry: str
    critical: str
    arrow: str
    inside: str
    cut: str
    line: str
    eighths: str
    right_half: str


_OUTCOMES: Final = (SUCCESS, FAILURE, CANCELLED, SKIPPED, LOST, "running")
UNICODE: Final = Signs(dict(zip(_OUTCOMES, "✓✗◼⊘?▸", strict=True)), "↻", "┃", "→", "└ ", "…", "─", " ▏▎▍▌▋▊▉█", "▐")
ASCII: Final = Signs(dict(zip(_OUTCOMES, "+x!-?>", strict=True)), "r", "*", "->", "` ", "..", "-", " ########", "#")
STYLES: Final = dict(zip(_OUTCOMES, ("green", "bold red", "yellow", "dim", "magenta", "blue"), strict=True))
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")


def safe(text: str) -> str:
    """Return `text` on one line, without what would steer a terminal: control and direction characters."""
    return _UNPRINTABLE.sub(" ", text).strip()


def duration(nanoseconds: int) -> str:
    """Return a duration in about three figures: 0.04 ms, 7.2 ms, 274 ms, 1.84 s, 2 m 05 s, 3 h 12 m."""
    milliseconds = nanoseconds / 1e6
    if milliseconds < 999.5:
        return f"{milliseconds:.{0 if milliseconds >= 9.95 else 1 if milliseconds >= 0.095 else 2}f} ms"
    if milliseconds < 59_950:
        return f"{milliseconds / 1000:.{2 if milliseconds < 9_995 else 1}f} s"
    minutes, seconds = divmod(round(milliseconds / 1000), 60)
    return f"{minutes} m {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} m"


def size(number: int | None) -> str:
    """Return a size in about three figures, in units of 1,000: 12 B, 3.4 kB, 212 MB; the empty text for None."""
    if number is None:
        return ""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.{0 if unit == 'B' or value >= 9.95 else 1}f} {unit}"
        value /= 1000
    return f"{value:.{0 if value >= 9.95 else 1}f} TB"


def reason(failure: Failure) -> str:
    """Return an error's type, without its module, and its message, cut where long."""
    kind = safe(failure.type).rpartition(".")[2]
    message = safe(failure.message[:MAX_MESSAGE]) + ("..." if len(failure.message) > MAX_MESSAGE else "")
    return f"{kind}: {message}" if message else kind


def plural(number: int, noun: str) -> str:
    """Return the number with its noun: 1 node, 2 nodes."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def bar(begin: float, end: float, width: int, signs: Signs = UNICODE) -> str:
    """Return a bar from one fraction of `width` characters to another, exact to an eighth of a character at its end.

    However short, there is some of it to see.
    """
    start = min(max(0, round(begin * width * 8)), width * 8 - 1)
    stop = min(max(round(end * width * 8), start + 1), width * 8)
    first, last = start // 8, stop // 8
    if first == last:
        return (" " * first + signs.eighths[stop % 8]).ljust(width)
    head = signs.right_half if start % 8 >= 4 else signs.eighths[8]
    return (" " * first + head + signs.eighths[8] * (last - first - 1) + signs.eighths[stop % 8])[:width].ljust(width)
