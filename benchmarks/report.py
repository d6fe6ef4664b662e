"""How long the HTML report of a run takes, and how large it gets: from the files of the run and 30 before it."""

from __future__ import annotations

import tempfile
import time

import otel_odibi as oo

EARLIER = 30


def _run(nodes: int) -> None:
    with oo.pipeline("bench"):
        before: list[str] = []
        for number in range(nodes):
            with oo.node(f"node_{number:04}", layer="transform", engine="pandas", depends_on=before[-2:]) as node:
                node.output(rows=number)
            before.append(node.name)


def _measure(nodes: int) -> tuple[float, int]:
    """Return seconds, the best of three, and bytes."""
    from otel_odibi import store
    from otel_odibi.report.html import render

    with tempfile.TemporaryDirectory() as folder:
        with oo.configure(service_name="bench", directory=folder, metric_formats="none", set_global=False):
            for _ in range(EARLIER + 1):
                _run(nodes)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            page = render(store.open(folder))
            times.append(time.perf_counter() - began)
    return min(times), len(page)


def table() -> str:
    lines = ["| HTML report | s | budget | kB | budget |", "|---|--:|--:|--:|--:|"]
    for nodes, seconds, size in ((200, "", "1,000"), (2_000, "2", "")):
        took, found = _measure(nodes)
        lines.append(
            f"| {nodes:,} nodes, {EARLIER} earlier runs | {took:.2f} | {seconds} | {found / 1000:,.0f} | {size} |"
        )
    return "\n".join(lines)
