"""How long a question to a telemetry directory takes: 1,000,000 log records and 1,000,000 spans, 20 a trace."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags

SPANS, A_TRACE, CHUNK = 1_000_000, 20, 50_000
RECORDS, ROUNDS = 1_000_000, 5
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


def _best(work: Callable[[], object]) -> float:
    """Return the seconds that the quickest of some rounds takes: others use the machine too."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _command(*words: str) -> Callable[[], object] | None:
    """Return what runs a program, None where there is none."""
    if shutil.which(words[0]) is None:
        return None
    return lambda: subprocess.run(words, check=True, stdout=subprocess.PIPE)


def _scan(path: Path) -> int:
    with path.open("rb") as file:
        return sum(json.loads(line)["level"] in ("error", "critical") for line in file)


def _rows(directory: Path) -> Iterator[tuple[str, Callable[[], object] | None, str]]:
    import duckdb

    from otel_odibi import store

    opened, log = store.open(directory), directory / "logs" / "bench.jsonl"
    files, json_log = f"'{directory}/spans/*/*.parquet'", f"read_json('{log}', format = 'newline_delimited')"
    run = opened.runs(limit=1)["run_id"][0].as_py()
    since = BEGAN + (SPANS - CHUNK) * 3_000_000
    yield 'log lines of level error: `records(level="error")`', lambda: deque(opened.records(level="error"), 0), "0.4"
    yield "grep -c", _command("grep", "-c", '"level":"error"', str(log)), ""
    yield "duckdb", lambda: duckdb.sql(f"SELECT * FROM {json_log} WHERE level = 'error'").fetchall(), ""
    yield "jq", _command("jq", "-c", 'select(.level == "error")', str(log)), ""
    yield "a loop over json.loads", lambda: _scan(log), ""
    yield "spans of a name since a time: `spans(name, since_ns)`", lambda: opened.spans(NAME, since_ns=since), "0.05"
    query = f"SELECT * FROM {files} WHERE SpanName = '{NAME}' AND epoch_ns(Timestamp) >= {since}"
    yield "duckdb", lambda: duckdb.sql(query).fetchall(), ""
    yield "spans of a run: `spans(run)`", lambda: opened.spans(run=run), "0.05"
    query = f"SELECT * FROM {files} WHERE SpanAttributes['odibi.pipeline.run.id'] = '{run}'"
    yield "duckdb", lambda: duckdb.sql(query).fetchall(), ""
    yield "all nodes, with quantiles, rows, cache, memory: `nodes()`", opened.nodes, "0.3"
    yield "duckdb", lambda: duckdb.sql(AGGREGATE.format(files)).fetchall(), ""
    yield "all runs: `runs()`", opened.runs, ""


NAME = "node node_03"
AGGREGATE = """
SELECT SpanAttributes['odibi.pipeline.name'], SpanAttributes['odibi.node.name'], count(*),
       quantile_cont(Duration, [0.5, 0.95, 0.99, 1.0]), sum(SpanAttributes['odibi.node.rows.in']::BIGINT),
       sum(SpanAttributes['odibi.node.rows.out']::BIGINT), max(SpanAttributes['odibi.node.memory.rss']::BIGINT),
       count(*) FILTER (SpanAttributes['odibi.node.cache.hit'] = 'true')
FROM {} WHERE SpanName LIKE 'node %' GROUP BY ALL
"""


def _memory(directory: Path) -> int:
    """Return the MB that a process takes at most that asks each of the questions once."""
    code = f"""
from otel_odibi import store
s = store.open({str(directory)!r})
sum(1 for _ in s.records(level="error"))
s.nodes()
s.spans(name={NAME!r}, since_ns={BEGAN + (SPANS - CHUNK) * 3_000_000})
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) // 1024


def _measured(directory: Path, files: str) -> list[str]:
    lines = [f"| {files} | s | budget |", "|---|--:|--:|"]
    for name, work, budget in _rows(directory):
        lines.append(f"| {name} | {'-' if work is None else f'{_best(work):.3f}'} | {budget} |")
    return [*lines, f"| memory of the process at most, MB | {_memory(directory)} | 300 |"]


def table() -> str:
    from otel_odibi import store

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_logs(directory / "logs")
        write_spans(directory)
        lines = _measured(directory, "1,000,000 lines and spans, as written: files of 50,000 spans")
        began = time.perf_counter()
        done = store.open(directory).compact(age_seconds=-60)
        took = time.perf_counter() - began
        lines += ["", *_measured(directory, "the same after `compact`")]
        lines += [f"| `compact` itself | {took:.1f} | |", f"| bytes a span | {done.bytes_after / SPANS:.1f} | 48 |"]
        log = directory / "logs" / "bench.jsonl"
        with log.open("rb") as plain, gzip.open(log.with_name("bench.000001.jsonl.gz"), "wb", 1) as packed:
            shutil.copyfileobj(plain, packed)
        log.unlink()
        packed_time = _best(lambda: deque(store.open(directory).records(level="error"), 0))
        return "\n".join([*lines, f"| log lines of level error, from a `.gz` segment | {packed_time:.3f} | |"])
