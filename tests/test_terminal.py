"""The terminal's view of a run, and of the nodes while they run."""

from __future__ import annotations

import io
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import otel_odibi as oo
from otel_odibi.facts import Failure
from otel_odibi.report.progress import Progress
from otel_odibi.report.terminal import Waterfall
from otel_odibi.report.texts import ASCII, bar, duration, plural, reason, safe, size
from otel_odibi.store import AttemptView, NodeView, RunSummary, RunView
from otel_odibi.testing import Capture

SECOND = 1_000_000_000
TIMEOUT = Failure("TimeoutError", "the share did not answer", "")
RUN = RunSummary("daily", "a1" * 16, "orders", "success", "b2" * 16, "c3" * 8, 0, 10 * SECOND)


def node(name: str, begin: float = 0, seconds: float = 1, **facts: Any) -> NodeView:
    facts = {"outcome": "success", "span_id": name, "parent_span_id": "", **facts}
    return NodeView(name=name, start_ns=round(begin * SECOND), duration_ns=round(seconds * SECOND), **facts)


NODES = (
    node("read", 0, 5, layer="ingest", rows_out=336_776, rss=234 * 10**6),
    node(
        "clean", 5, 2.5, layer="clean", rows_in=336_776, rows_out=327_346, rss=300 * 10**6, cache_hit=True,
        depends_on=("read",),
    ),
    node("step", 6, 0.5, depth=1),
    node(
        "publish", 7.5, 2.5, layer="publish", attempt=2, cache_hit=False,
        depends_on=("read", "clean"), links=("read", "clean"),
        attempts=(
            AttemptView(1, "failure", 7 * SECOND, SECOND, TIMEOUT), AttemptView(2, "success", 8 * SECOND, SECOND, None),
        ),
    ),
    node("notify", 10, 0, outcome="skipped", skip_reason="nobody asked"),
)  # fmt: skip


def shown(view: RunView, width: int = 100, encoding: str = "utf-8", **options: Any) -> str:
    """Return what a console of that width and encoding shows."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
    Console(file=file, width=width, **options).print(Waterfall(view))
    file.seek(0)
    return file.read()


def table(text: str) -> list[list[str]]:
    """Return the lines of the table, each as its words."""
    rows = text.split("\n\n")[1].splitlines()
    return [re.sub(r"  +", " ", row).split() for row in rows]


# --- the whole picture -----------------------------------------------------------------------------------------------


def test_a_run_at_a_hundred_columns() -> None:
    """Header, a row for each node and attempt, those of the critical path marked, totals, and what failed."""
    assert [line.rstrip() for line in shown(RunView(RUN, NODES)).splitlines()] == [
        "✓ daily  success in 10.0 s  orders, 1970-01-01 00:00:00 UTC",
        "  run a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1  trace b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2",
        "",
        "     node        depends on  layer       rows in → out memory cache   time 0 ──────────────── 10.0 s",
        "✓┃ 1 read                    ingest          → 336,776 234 MB       5.00 s ████████████▌",
        "✓┃ 2 clean       read        clean   336,776 → 327,346 300 MB hit   2.50 s             ▐█████▊",
        "✓┃ 3 └ step                                                         500 ms                █▎",
        "✓┃ 4 publish ↻2  read, clean publish                          miss  2.50 s                   ▐██████",
        "✗    └ attempt 1                                                    1.00 s                  ▐██",
        "✓    └ attempt 2                                                    1.00 s                     ██▌",
        "⊘  5 notify                                                                nobody asked",
        "",
        "5 nodes, ✓ 4 success, ⊘ 1 skipped, ↻ 1 retried, cache 1 hit of 2, 664,122 rows out, memory up to 300",
        "MB, ┃ critical path: 4 nodes",
        "",
        "↻ publish, attempt 1 TimeoutError: the share did not answer",
    ]


@pytest.mark.parametrize(
    ("width", "header"),
    [
        (140, "node depends on layer rows in → out memory cache time 0"),
        (80, "node after rows in → out memory cache time 0"),
        (70, "node after rows in → out time 0"),
        (56, "node rows in → out time 0"),
        (40, "node time 0"),
    ],
)
def test_columns_for_which_there_is_no_room_are_left_out(width: int, header: str) -> None:
    """The bars keep their room; no line is wider than the console."""
    long_names = tuple(replace(n, depends_on=(), name=n.name + "_from_source") for n in NODES)
    text = shown(RunView(RUN, (*long_names, node("last", depends_on=("read_from_source", "clean_from_source")))), width)
    assert " ".join(table(text)[0]).startswith(header)
    assert max(map(cell_len, text.splitlines())) <= width


def test_a_failed_run() -> None:
    """Type and message of what failed stand under the table; once, where the pipeline failed by it too."""
    failed = replace(NODES[0], outcome="failure", failure=Failure("pandas.errors.ParserError", "line 3:\nbad", "tb"))
    text = shown(RunView(replace(RUN, outcome="failure", failure=failed.failure), (failed,)))
    assert text.startswith("✗ daily  failure in 10.0 s")
    assert text.rstrip().splitlines()[-1].rstrip() == "✗ read ParserError: line 3: bad"


def test_a_run_that_failed_outside_its_nodes() -> None:
    """Then what failed is the pipeline."""
    text = shown(RunView(replace(RUN, outcome="failure", failure=Failure("KeyError", "", "")), ()))
    assert text.rstrip().splitlines()[-1].rstrip() == "✗ daily KeyError"


def test_edges_as_row_numbers() -> None:
    """Where names have no room, edges are given by row: the span a link points at, else the last of that name."""
    parts = [
        node(f"part {number}", span_id=f"s{number}", rows_out=10**9, rss=10**9, layer="x" * 20)
        for number in range(1, 5)
    ]
    last = node("sum", depends_on=("part 1", "part 2", "part 3", "part 4", "elsewhere"), links=("s1", "s2", "s4"))
    assert table(shown(RunView(RUN, (*parts, last)), 80))[-1][:5] == ["✓┃", "5", "sum", "1-4", "elsewhere"]


def test_a_pipeline_inside_a_run_is_marked() -> None:
    """It is a row like a node's, and does not count as one."""
    text = shown(RunView(RUN, (node("nested", run_id="r2"), node("leaf", depth=1))))
    assert "nested (pipeline)" in text
    assert "1 node, ✓ 1 success" in text


# --- any console, any name -------------------------------------------------------------------------------------------


def test_without_utf8_the_picture_is_plain_ascii() -> None:
    """A console of another encoding gets signs that it can show."""
    text = shown(RunView(RUN, NODES), encoding="ascii")
    assert "x    ` attempt 1" in text
    assert "#####" in text


def test_without_colour_there_is_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR takes the colours from a terminal, and a pipe gets no escape codes at all."""
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3\d", shown(RunView(RUN, NODES), force_terminal=True))
    assert "\x1b" not in shown(RunView(RUN, NODES))


anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
numbers = st.none() | st.integers(0, 2**63)
nodes = st.builds(
    NodeView,
    name=anything, outcome=st.sampled_from(["success", "failure", "skipped", "odd"]), span_id=anything,
    parent_span_id=st.just(""), start_ns=st.integers(-SECOND, 20 * SECOND), duration_ns=st.integers(0, 2**63),
    layer=anything, depth=st.integers(0, 60), rows_in=numbers, rows_out=numbers, rss=numbers,
    cache_hit=st.sampled_from([None, True, False]), depends_on=st.lists(anything, max_size=3).map(tuple),
    skip_reason=anything, failure=st.none() | st.builds(Failure, anything, anything, anything),
)  # fmt: skip


@given(st.lists(nodes, max_size=5), anything, st.integers(40, 150), st.sampled_from(["utf-8", "ascii"]))
def test_whatever_is_in_a_run_stays_text_within_the_width(
    found: list[NodeView], name: str, width: int, encoding: str
) -> None:
    """No name wraps a row, steers the terminal, is taken for markup, or stops the picture."""
    view = RunView(replace(RUN, pipeline=name, duration_ns=0), tuple(found))
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    console.print(Waterfall(view))
    lines = file.getvalue().split("\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", file.getvalue())
    assert max(map(cell_len, lines)) <= width


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0.00 ms"), (40_000, "0.04 ms"), (7_200_000, "7.2 ms"), (9_960_000, "10 ms"), (274_000_000, "274 ms"),
        (999_600_000, "1.00 s"), (1_840_000_000, "1.84 s"), (59_940_000_000, "59.9 s"), (59_960_000_000, "1 m 00 s"),
        (125 * SECOND, "2 m 05 s"), (3599 * SECOND, "59 m 59 s"), (11_520 * SECOND, "3 h 12 m"),
        (90_000 * SECOND, "25 h 00 m"),
    ],
)  # fmt: skip
def test_durations(nanoseconds: int, text: str) -> None:
    """Durations have about three figures, from microseconds to days."""
    assert duration(nanoseconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, ""),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_950, "10 kB"),
        (234_000_000, "234 MB"),
        (5 * 10**12, "5.0 TB"),
    ],
)
def test_sizes(number: int | None, text: str) -> None:
    """Sizes have about three figures, in units of 1,000."""
    assert size(number) == text


@given(st.integers(0, 10**14))
def test_durations_and_sizes_are_short(number: int) -> None:
    """Up to a day and to 100 TB they fit their columns."""
    assert len(duration(number)) <= 9
    assert len(size(number)) <= 6


@pytest.mark.parametrize(
    ("begin", "end", "text"),
    [
        (0, 1, "████"), (0, 0.5, "██  "), (0.5, 1, "  ██"), (0, 0, "▏   "), (1, 1, "   ▐"), (0.125, 0.5, "▐█  "),
        (0, 0.28125, "█▏  "), (0.25, 0.375, " ▌  "), (-1, 5, "████"), (3, 4, "   ▐"),
    ],
)  # fmt: skip
def test_bars(begin: float, end: float, text: str) -> None:
    """A bar ends on an eighth of a character, begins on a half, and is there however short."""
    assert bar(begin, end, 4) == text


@given(st.floats(-1, 2), st.floats(-1, 2), st.integers(1, 200))
def test_a_bar_is_as_wide_as_it_is_to_be(begin: float, end: float, width: int) -> None:
    """It has something to see, in both sets of signs."""
    assert len(bar(begin, end, width)) == len(bar(begin, end, width, ASCII)) == width
    assert bar(begin, end, width).strip()
    assert set(bar(begin, end, width, ASCII)) <= {"#", " "}


@given(st.text())
def test_safe_text_is_one_line_and_steers_nothing(text: str) -> None:
    """Control and direction characters become blanks; nothing else is lost."""
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", safe(text))
    assert safe("plain [red]text[/red] ünï") == "plain [red]text[/red] ünï"


def test_reasons_and_plurals() -> None:
    """Types go without their module, long messages are cut, one is no many."""
    assert reason(Failure("a.b.C", "x" * 500, "")) == "C: " + "x" * 400 + "..."
    assert (plural(0, "node"), plural(1, "node"), plural(1200, "row")) == ("0 nodes", "1 node", "1,200 rows")


# --- progress --------------------------------------------------------------------------------------------------------


def work(captured: Capture) -> None:
    """Run nodes of every kind of end."""
    with oo.pipeline("daily") as run:
        with oo.node("read") as read:
            captured.clock.advance(1.5)
            read.cache(hit=True)
            read.output(rows=1200)
        with suppress(ValueError), oo.node("publish") as publish:
            with suppress(TimeoutError), publish.attempt():
                raise TimeoutError("no answer")
            with publish.attempt():
                raise ValueError("bad [bold]day")
        run.skip("notify")


def test_progress_in_a_pipe_is_a_line_for_each_node_that_ends(odibi_capture: Capture) -> None:
    """With its outcome, time and rows; and a line for each retry."""
    file = io.StringIO()
    with Progress(Console(file=file, width=20), odibi_capture.telemetry) as progress:
        work(odibi_capture)
    lines = [re.sub(r"  +", "  ", line.rstrip()) for line in file.getvalue().splitlines()]
    assert lines[0] == "✓ read  1.50 s  1,200 rows, from the cache"
    assert re.fullmatch(r"↻ publish  [\d.]+ ms  attempt 2, TimeoutError: no answer", lines[1])
    assert lines[2:] == ["✗ publish  0.00 ms  attempt 2, ValueError: bad [bold]day", "⊘ notify  0.00 ms  skipped"]
    assert progress.run_ids == ["run-1"]


def test_progress_on_a_terminal_is_a_list(odibi_capture: Capture) -> None:
    """Nodes under way have a spinner and their time so far; when all is over, the list is taken away."""
    file = io.StringIO()
    console = Console(file=file, width=80, height=20, force_terminal=True, color_system=None)
    with Progress(console, odibi_capture.telemetry) as progress, oo.node("outer"):
        work(odibi_capture)
        other = Console(file=io.StringIO(), width=80, height=20)
        with other.capture() as picture:
            other.print(progress)
    rows = [line.split() for line in picture.get().splitlines()]
    assert [row[1] for row in rows] == ["outer", "read", "publish", "notify"]
    assert [row[0] for row in rows[1:]] == ["✓", "✗", "⊘"]
    assert file.getvalue().endswith("\x1b[2K")


def test_progress_shows_the_latest_where_there_are_more_than_lines(odibi_capture: Capture) -> None:
    """A low terminal shows the nodes that began last."""
    console = Console(file=io.StringIO(), width=80, height=5, force_terminal=True, color_system=None)
    progress = Progress(console, odibi_capture.telemetry)
    for number in range(9):
        with oo.node(f"n{number}"):
            pass
    with console.capture() as picture:
        console.print(progress)
    assert [line.split()[1] for line in picture.get().splitlines()] == ["n6", "n7", "n8"]
