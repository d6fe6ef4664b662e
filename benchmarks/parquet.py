"""What a span costs in Parquet: bytes on disk, and microseconds of CPU to convert and write.

1,000,000 spans, 20 a trace, with the attributes of a node and one link each.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, TraceFlags

SPANS, A_TRACE, CHUNK = 1_000_000, 20, 50_000
NODES = [f"node_{number:02d}" for number in range(A_TRACE)]


def spans(first: int, count: int, rng: random.Random) -> list[ReadableSpan]:
    """Make `count` finished spans of nodes, the first of each trace its pipeline's."""
    resource, scope = Resource({"service.name": "bench"}), InstrumentationScope("otel_odibi")
    out, now = [], 1_767_225_600_000_000_000 + first * 3_000_000
    for trace in range(count // A_TRACE):
        trace_id, run_id = rng.getrandbits(128), f"{rng.getrandbits(128):032x}"
        contexts = [SpanContext(trace_id, rng.getrandbits(64), False, TraceFlags(1)) for _ in range(A_TRACE)]
        for number, context in enumerate(contexts):
            start = now + (trace * A_TRACE + number) * 3_000_000
            attributes = {
                "odibi.pipeline.name": "bench",
                "odibi.pipeline.run.id": run_id,
                "odibi.node.name": NODES[number],
                "odibi.node.layer": ("ingest", "transform", "publish")[number % 3],
                "odibi.node.engine": "pandas",
                "code.function.name": f"bench.{NODES[number]}",
                "odibi.node.outcome": "success",
                "odibi.node.attempt": 1,
                "odibi.node.memory.rss": 100_000_000 + 4096 * rng.randrange(100),
                "odibi.node.rows.in": 1_000 * number,
                "odibi.node.rows.out": 1_000 * number + rng.randrange(10),
                "odibi.node.depends_on": (NODES[number - 1],),
            }
            parent = None if number == 0 else contexts[0]
            links = () if number == 0 else (Link(contexts[number - 1]),)
            end = start + 2_000_000 + rng.randrange(1_000_000)
            out.append(
                ReadableSpan(
                    name=f"node {NODES[number]}", context=context, parent=parent, resource=resource,
                    attributes=attributes, links=links, start_time=start, end_time=end, instrumentation_scope=scope,
                )
            )  # fmt: skip
    return out


def measure(rows_a_file: int) -> tuple[float, float]:
    """Return bytes and CPU microseconds a span."""
    from otel_odibi.exporters.parquet import ParquetSpanExporter

    rng = random.Random(8)
    with tempfile.TemporaryDirectory() as directory:
        exporter = ParquetSpanExporter(directory, rows=rows_a_file, seconds=86_400)
        cpu = 0.0
        for first in range(0, SPANS, CHUNK):
            batch = spans(first, CHUNK, rng)
            began = time.process_time()
            exporter.export(batch)
            cpu += time.process_time() - began
        began = time.process_time()
        exporter.shutdown()
        cpu += time.process_time() - began
        size = sum(path.stat().st_size for path in Path(directory).rglob("*.parquet"))
    return size / SPANS, cpu / SPANS * 1e6


def table() -> str:
    lines = ["| a span in Parquet | bytes | budget | CPU, us |", "|---|--:|--:|--:|"]
    for name, rows, budget in (("50,000 rows a file", 50_000, ""), ("1,000,000 rows a file", SPANS, "48")):
        size, cpu = measure(rows)
        lines.append(f"| {name} | {size:.1f} | {budget} | {cpu:.1f} |")
    return "\n".join(lines)
