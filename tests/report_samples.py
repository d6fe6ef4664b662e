"""Runs to make reports of, as a store would tell them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from otel_odibi.facts import Failure
from otel_odibi.store import AttemptView, NodeView, RunSummary, RunView

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
BEGAN = 1_780_000_000 * SECOND
EVIL = '</script><img src=x onerror="document.title=1">'
TRACEBACK = "Traceback (most recent call last):\n  File \"etl.py\", line 8, in join\nKeyError: 'customer_id'\n"
RUN = RunSummary("daily", "a1" * 16, "orders", "success", "b2" * 16, "c3" * 8, BEGAN, 10 * SECOND)


def node(name: str, begin: float = 0, seconds: float = 1, **facts: Any) -> NodeView:
    """Return a node that began so many seconds into the run; its span id is its name unless told."""
    facts = {"outcome": "success", "span_id": name, "parent_span_id": "", **facts}
    return NodeView(name=name, start_ns=BEGAN + round(begin * SECOND), duration_ns=round(seconds * SECOND), **facts)


@dataclass
class Told:
    """What a store answers where it holds one run, the durations of earlier ones, and log lines."""

    view: RunView
    lines: Sequence[dict[str, Any]] = ()
    earlier: Sequence[float] = ()
    attributes: dict[str, str] = field(default_factory=lambda: {"odibi.node.engine": "pandas"})

    def run(self, run_id: str = "last") -> RunView:
        return self.view

    def runs(self, pipeline: str = "") -> pa.Table:
        """Return this run and, a day apart each, the earlier ones."""
        run = self.view.run
        count, times = len(self.earlier) + 1, [run.duration_ns / 1e9, *(10 * part for part in self.earlier)]
        starts = pa.array([run.start_ns - day * DAY for day in range(count)], pa.timestamp("ns", "UTC"))
        ids = [run.run_id, *(f"{day:032x}" for day in range(1, count))]
        outcomes = [run.outcome, *("failure" if day % 7 == 5 else "success" for day in range(1, count))]
        return pa.table({"run_id": ids, "outcome": outcomes, "start": starts, "duration_s": times})

    def executions(self, pipeline: str = "", runs: Sequence[str] = (), since_ns: int = 0) -> pa.Table:
        rows = [
            (found.name, run, self.earlier[int(run, 16) - 1] * found.duration_ns / 1e9)
            for found in self.view.nodes
            for run in runs
        ]
        return pa.table(list(map(list, zip(*rows, strict=True))) or [[], [], []], ["node", "run_id", "duration_s"])

    def spans(self, trace: str = "", since_ns: int = 0, columns: Sequence[str] = ()) -> pa.Table:
        ids = [self.view.run.span_id, *(found.span_id for found in self.view.nodes)]
        pairs, kind = list(self.attributes.items()), pa.map_(pa.string(), pa.string())
        maps = [pa.array([pairs] * len(ids), kind)] * 2
        return pa.table([pa.array(ids), *maps], ["SpanId", "SpanAttributes", "ResourceAttributes"])

    def records(self, level: str = "", limit: int | None = None, **filters: Any) -> Iterator[dict[str, Any]]:
        wanted = [line for line in self.lines if not level or line["level"] in ("warning", "error")]
        return iter(wanted[:limit])


def line(message: str, span: str = "", seconds: float = 0, level: str = "info", **fields: Any) -> dict[str, Any]:
    """Return a log line of the run."""
    stamp = f"2026-05-28T20:26:{40 + int(seconds):02}.{round(seconds % 1 * 1e6):06}Z"
    ids = {"run_id": RUN.run_id, "trace_id": RUN.trace_id, "span_id": span, "service": "orders"}
    return {"timestamp": stamp, "level": level, "event_type": "log", "message": message, **ids, **fields}


def small() -> Told:
    """A run with a node of every kind: retried, failed, skipped, lost, cancelled, running, nested, badly named."""
    timeout = Failure("TimeoutError", "the share did not answer", "")
    failed = Failure("KeyError", "'customer_id'", TRACEBACK)
    tries = (
        AttemptView(1, "failure", BEGAN + 4 * SECOND, SECOND, timeout),
        AttemptView(2, "success", BEGAN + 5 * SECOND, SECOND, None),
    )
    nodes = (
        node("read_orders", 0, 3, layer="ingest", engine="pandas", rows_out=336_776, bytes_out=10**8, rss=234 * 10**6),
        node("read_customers", 0, 1, layer="ingest", engine="polars", rows_out=1_200, rss=150 * 10**6, cache_hit=True),
        node(EVIL, 3, 1, layer="clean", rows_in=336_776, rows_out=327_346, rss=300 * 10**6, links=("read_orders",)),
        node("publish", 4, 2, layer="publish", attempt=2, attempts=tries, links=(EVIL,), rows_in=327_346, rows_out=9,
             cache_hit=False, rss=310 * 10**6),
        node("inner", 6, 3, run_id="d4" * 16),
        node("inner_step", 6.5, 2, depth=1, outcome="cancelled", depends_on=("publish",)),
        node("join", 6, 3.5, outcome="failure", failure=failed, links=(EVIL, "read_customers"), layer="transform"),
        node("gone", 1, 8, outcome="lost"),
        node("still_at_it", 2, 8, outcome="running"),
        node("notify", 9.5, 0, outcome="skipped", skip_reason="join failed", depends_on=("join",), layer="publish"),
    )  # fmt: skip
    lines = [
        line("orders read", "read_orders", 1.5, files=3),
        line(f"odd {EVIL}", EVIL, 3.5, level="warning", key="\u2028</script>"),
        line("no such column", "join", 9, level="error", column="customer_id"),
    ]
    run = replace(RUN, outcome="failure", failure=failed)
    return Told(RunView(run, nodes), lines, earlier=[0.9, 1, 0.95, 1.1, 0.97, 1.04, 0.99, 1.02])


def large(count: int, lines: int = 0, names: str = "step_{}") -> Told:
    """A run of so many nodes, each but the first made from one or two before it, eight at a time."""
    rng, nodes = random.Random(7), list[NodeView]()
    for number in range(count):
        begin, seconds = number // 8 * 0.01, rng.uniform(0.001, 0.0095)
        links = tuple({f"{rng.randrange(max(0, number - 20), number):016x}" for _ in range(2)}) if number else ()
        nodes.append(
            node(
                names.format(number), begin, seconds, span_id=f"{number:016x}", links=links, engine="pandas",
                layer=("ingest", "clean", "transform", "publish")[4 * number // count], rows_in=rng.randrange(10**6),
                rows_out=rng.randrange(10**6), bytes_out=rng.randrange(10**9), rss=2 * 10**8 + rng.randrange(10**7),
            )
        )  # fmt: skip
    told = [
        line(f"rows read {rng.getrandbits(64):x}", f"{rng.randrange(count):016x}", number % 19, size=rng.random())
        for number in range(lines)
    ]
    attributes = {f"odibi.node.{part}": f"the {part}" for part in ("name", "layer", "engine", "outcome", "columns")}
    run = replace(RUN, duration_ns=max(found.start_ns + found.duration_ns for found in nodes) - BEGAN)
    return Told(RunView(run, tuple(nodes)), told, [0.9 + 0.01 * day for day in range(30)], attributes)
