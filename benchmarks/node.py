"""What recording one node costs, in wall time and in CPU with the flush included, as ratios to a bare SDK span.

Each contender runs in a process of its own, in rounds that alternate with the bare SDK span, so that both see the
same machine. The figure is the median over rounds.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.contenders import CONTENDERS, Contender, sdk_span

NODES, ROUNDS = 4_000, 15


def one_round(contender: Contender) -> tuple[float, float]:
    """Return wall and CPU microseconds a node; the flush counts as CPU only."""
    wall = 0.0

    def loop():
        nonlocal wall
        call = contender.call
        began = time.perf_counter()
        for _ in range(NODES):
            call()
        wall = time.perf_counter() - began

    gc.collect()  # each starts with nothing of the other's to clean up
    cpu = time.process_time()
    contender.around(loop)
    contender.flush()
    cpu = time.process_time() - cpu
    return wall / NODES * 1e6, cpu / NODES * 1e6


def measure(name: str) -> dict[str, float]:
    """Run one contender against the bare SDK span in this process."""
    with tempfile.TemporaryDirectory() as directory:
        contender, bare = CONTENDERS[name](Path(directory)), sdk_span(Path(directory))
        one_round(contender)
        one_round(bare)
        rounds = []
        for number in range(ROUNDS):  # who goes first alternates too
            first, second = (contender, bare) if number % 2 else (bare, contender)
            figures = (one_round(first), one_round(second))
            rounds.append((*figures[0], *figures[1]) if number % 2 else (*figures[1], *figures[0]))
        columns = list(zip(*rounds, strict=True))
        names = ("wall", "cpu", "bare_wall", "bare_cpu")
        figures = {key: statistics.median(column) for key, column in zip(names, columns, strict=True)}
        figures["wall_ratio"] = statistics.median(r[0] / r[2] for r in rounds)
        figures["cpu_ratio"] = statistics.median(r[1] / r[3] for r in rounds)
        sys.stdout.flush()
        return figures


def table() -> str:
    lines = ["| one node | wall, us | x SDK span | CPU with flush, us | x SDK span |", "|---|--:|--:|--:|--:|"]
    for name in CONTENDERS:
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.node", name], capture_output=True, text=True, check=True
        )
        f = json.loads(run.stdout.splitlines()[-1])
        lines.append(f"| {name} | {f['wall']:.2f} | {f['wall_ratio']:.2f} | {f['cpu']:.2f} | {f['cpu_ratio']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
