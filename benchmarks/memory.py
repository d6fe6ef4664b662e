"""Memory growth after warm-up, in bytes an execution, with everything on."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile

WARM_UP, NODES = 50_000, 200_000

_PROGRAM = """
import gc, sys, tracemalloc
import otel_odibi as oo
telemetry = oo.configure(service_name="bench", directory=sys.argv[1], set_global=False)
node = oo.node(layer="transform", engine="pandas")(lambda x: x)
def run(count):
    with oo.pipeline("bench"):
        for _ in range(count):
            node(1)
    telemetry.flush(60)
    gc.collect()
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
run({warm_up})
before = rss()
run({nodes})
after = rss()
tracemalloc.start()
run(20_000)
first = tracemalloc.get_traced_memory()[0]
run(20_000)
second = tracemalloc.get_traced_memory()[0]
print((after - before) / {nodes}, (second - first) / 20_000)
"""


def table() -> str:
    gc.collect()
    with tempfile.TemporaryDirectory() as directory:
        program = _PROGRAM.format(warm_up=WARM_UP, nodes=NODES)
        run = subprocess.run([sys.executable, "-c", program, directory], capture_output=True, text=True, check=True)
    rss, allocated = map(float, run.stdout.split())
    return "\n".join(
        [
            "| memory growth after warm-up | bytes an execution | budget |",
            "|---|--:|--:|",
            f"| Python allocations, over 20,000 executions | {allocated:.2f} | 0 |",
            f"| resident memory, over {NODES:,} executions | {rss:.2f} | 0 |",
        ]
    )
