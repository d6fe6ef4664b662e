"""How long a question to a telemetry directory takes: 1,000,000 log records and 1,000,000 spans, 20 a trace."""

from __future__ import annotations

import random
from pathlib import Path

import orjson
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags

SPANS, A_TRACE, CHUNK = 1_000_000, 20, 50_000
RECORDS = 1_000_000
NODES = [f"node_{number:02d}" for number in range(A_TRACE)]
BEGAN = 1_767_225_600_000_000_000
RESOURCE, SCOPE = Resource({"service.name": "bench"}), InstrumentationScope("otel_odibi")


def spans(first: int, count: int, rng: random.Random) -> list[ReadableSpan]:
    """Make `count` finished spans, those of a run one after the other: its nodes, then the run; 1 % of nodes fail."""
    out = []
    for trace in range(first // A_TRACE, (first + count) // A_TRACE):
        trace_id, run_id = rng.getrandbits(128), f"{rng.getrandbits(128):032x}"
        contexts = [SpanContext(trace_id, rng.getrandbits(64), False, TraceFlags(1)) for _ in range(A_TRACE)]
        began = BEGAN + trace * A_TRACE * 3_000_000
        run = {"odibi.pipeline.name": "bench", "odibi.pipeline.run.id": run_id}
        for number in range(1, A_TRACE):
            failed, start = rng.random() < 0.01, began + number * 3_000_000
            end = start + 2_000_000 + rng.randrange(1_000_000)
            attributes = {
                "odibi.node.name": NODES[number],
                "odibi.node.layer": ("ingest", "transform", "publish")[number % 3],
                "odibi.node.engine": "pandas",
                "code.function.name": f"bench.{NODES[number]}",
                "thread.id": 139677982423936,
                "thread.name": "MainThread",
                **run,
                "odibi.node.outcome": "failure" if failed else "success",
                "odibi.node.attempt": 1,
                "odibi.node.memory.rss": 100_000_000 + 4096 * rng.randrange(100),
                "odibi.node.rows.in": 1_000 * number,
                "odibi.node.rows.out": 1_000 * number + rng.randrange(10),
                "odibi.node.cache.hit": rng.random() < 0.2,
                "odibi.node.depends_on": (NODES[number - 1],),
            }
            out.append(
                ReadableSpan(
                    name=f"node {NODES[number]}", context=contexts[number], parent=contexts[0], resource=RESOURCE,
                    attributes=attributes, links=[Link(contexts[number - 1])] if number > 1 else (), start_time=start,
                    end_time=end, instrumentation_scope=SCOPE,
                    status=Status(StatusCode.ERROR, "bad row") if failed else Status(),
                )
            )  # fmt: skip
        out.append(
            ReadableSpan(
                name="pipeline bench", context=contexts[0], resource=RESOURCE, start_time=began,
                end_time=began + A_TRACE * 3_000_000, instrumentation_scope=SCOPE,
                attributes=run | {"odibi.pipeline.outcome": "success"},
            )
        )  # fmt: skip
    return out


def write_spans(directory: Path, rows_a_file: int = CHUNK) -> None:
    from otel_odibi.exporters.parquet import ParquetSpanExporter

    rng, exporter = random.Random(8), ParquetSpanExporter(directory, rows=rows_a_file, seconds=86_400)
    for first in range(0, SPANS, CHUNK):
        exporter.export(spans(first, CHUNK, rng))
    exporter.shutdown()


def write_logs(directory: Path) -> None:
    """Write the lines of nodes, two each, by the writer that writes them in earnest."""
    from otel_odibi.clean import DEFAULT
    from otel_odibi.facts import Failure, NodeFinished, NodeStarted
    from otel_odibi.logs import LogWriter

    rng = random.Random(8)
    directory.mkdir(parents=True)
    with (directory / "bench.jsonl").open("wb") as file:
        write = file.write
        writer = LogWriter(
            "bench", (lambda record, line: write(line),), cleaner=DEFAULT, on_error=print, process="0badcafe"
        )
        for number in range(RECORDS // 2):
            if number % A_TRACE == 0:
                trace_id, run_id = rng.getrandbits(128), f"{rng.getrandbits(128):032x}"
            now, node = BEGAN + number * 3_000_000, NODES[number % A_TRACE]
            start = NodeStarted("bench", run_id, node, "transform", "pandas", trace_id, rng.getrandbits(64), 7, 1, now)
            writer.node_started(start)
            failure = Failure("ValueError", "bad row", "") if rng.random() < 0.01 else None
            outcome, rows = "failure" if failure else "success", 1_000 + rng.randrange(10)
            writer.node_finished(
                NodeFinished(
                    start, now + 2_000_000, 2_000_000, outcome, rows_in=1000, rows_out=rows,
                    rss=100_000_000 + 4096 * rng.randrange(100), failure=failure,
                )
            )  # fmt: skip
