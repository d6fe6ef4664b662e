"""Runs killed at random moments while four threads finish nodes: nothing is lost, nothing is there twice.

The counts are those of `ODIBI_TEST_SCALE=1`; a tenth by default.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import orjson
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from test_recovery import program, records, rows

from otel_odibi.exporters.jsonl import JsonlSink, files, read_lines
from otel_odibi.recovery import recover

pytestmark = pytest.mark.faults
KILLS = max(10, int(300 * float(os.environ.get("ODIBI_TEST_SCALE", "0.1"))))
BATCH = 256
# Tells, unbuffered, of each node that began, and of each whose call has returned.
WORKER = f"""
import random
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from otel_odibi.delivery import SpanQueue
t = start(otlp=True, span_interval=0.02, parquet_seconds=0.1, log_max_bytes=200_000)
file = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

class Endpoint(SpanExporter):
    def export(self, spans):
        ids = [span.context.span_id for span in spans]
        os.write(file, b"".join(b"%016x\\n" % number for number in ids))
        t.liveness.acked(ids)
        return SpanExportResult.SUCCESS

queue = SpanQueue(Endpoint(), cleaner=t.cleaner, interval=0.02, limit={BATCH * 8}, on_drop=print)
t.attach(queue, t.tracer_provider)

def tell(what, node):
    os.write(1, b"%s %016x\\n" % (what, node.span.get_span_context().span_id))

def work():
    while True:
        with suppress(ValueError), oo.node("step") as node:
            tell(b"began", node)
            time.sleep(random.choice((0, 0, 0.001, 0.01)))
            if random.random() < 0.1:
                raise ValueError("bad luck")
        tell(b"returned", node)

with oo.pipeline("daily"):
    threads = [threading.Thread(target=oo.carry(work)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""


def begun(directory: Path, sink: Path) -> subprocess.Popen[bytes]:
    """Start a run; it has a node under way by now."""
    process = subprocess.Popen(program(WORKER, directory, sink), stdout=subprocess.PIPE, pipesize=2**20)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"began")
    return process


def kill(process: subprocess.Popen[bytes]) -> tuple[set[str], set[str]]:
    """Kill a run; return the ids of the nodes whose calls had returned, and of those under way."""
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    told = [line.split() for line in out.decode().splitlines(keepends=True) if line.endswith("\n")]
    returned = {span_id for what, span_id in told if what == "returned"}
    return returned, {span_id for what, span_id in told if what == "began"} - returned


@pytest.mark.parametrize("seed", range(KILLS // 10))
def test_after_any_kill_every_node_is_there_once_and_the_dying_are_named(tmp_path: Path, seed: int) -> None:
    """Ten kills a directory: one run is recovered while the next goes on beside it."""
    chance, sent, sink, directory = random.Random(seed), list[ReadableSpan](), tmp_path / "sink", tmp_path / "telemetry"
    returned, dying, lost = set[str](), set[str](), set[str]()
    alive = begun(directory, sink)
    for number in range(10):
        following = begun(directory, sink) if number < 9 else alive
        time.sleep(chance.uniform(0, 0.4))
        done, open_ = kill(alive)
        returned, dying, alive = returned | done, dying | open_, following
        found = recover(directory, spool=sent.extend)
        assert (found.files, len(found.runs)) == ((), 1)
        lost |= {line["span_id"] for line in found.nodes}
    assert not list(directory.glob("state/*"))
    stored = {row["SpanId"]: dict(row["SpanAttributes"]) for row in rows(directory)}
    assert len(stored) == len(rows(directory))
    assert returned | dying <= stored.keys()
    assert {span_id for span_id, told in stored.items() if told.get("odibi.node.outcome") == "lost"} == lost
    assert not lost & returned
    assert 10 <= len(lost) <= 40, "nearly all the time a node sleeps"
    closed = [record["span_id"] for record in records(directory) if record.get("status") == "lost"]
    assert len(set(closed)) == len(closed) == len(lost) + 10
    JsonlSink(directory / "logs", "flights").close()  # takes over what is left, as the next run will
    assert all(orjson.loads(line) for path in files(directory / "logs") for line in read_lines(path)), "no torn line"
    delivered = Counter(sink.read_text().split())
    delivered.update(f"{span.context.span_id:016x}" for span in sent)
    assert delivered.keys() == stored.keys()
    assert delivered.total() - len(delivered) <= 10 * BATCH
    print(f"{len(stored):,} spans, {len(sent):,} recovered, {delivered.total() - len(delivered):,} delivered twice")
