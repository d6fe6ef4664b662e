"""What an OTLP endpoint that fails costs a pipeline of 100 nodes of 10 ms: wall time, as a ratio to telemetry off.

Each run is a process of its own; those of all cases are interleaved, so that all see the same machine. The endpoint is
one of the tests', and does the same to every request.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS, NODES = 9, 100
BUDGET = 1.05
ROOT = Path(__file__).parent.parent
PIPELINE = f"""if True:
    import sys, time
    import otel_odibi as oo
    oo.configure(service_name="bench", directory=sys.argv[1], enabled=sys.argv[2] != "off", span_interval=0.1)

    @oo.node(layer="transform")
    def work(rows):
        time.sleep(0.01)
        return rows

    def pipeline(count):
        began = time.perf_counter()
        with oo.pipeline("bench"):
            for number in range(count):
                work([number])
        return time.perf_counter() - began

    pipeline(5)
    print(pipeline({NODES}))
"""


def run(case: str, url: str) -> float:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    environ |= {"PYTHONPATH": str(ROOT), "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": url} if url else {}
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-c", PIPELINE, directory, case]
        return float(subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout)


def table() -> str:
    sys.path.insert(0, str(ROOT / "tests"))
    from otlp_endpoint import CUT, HANG, OK, endpoint, partial, status

    moods = {
        "off": None, "files only": None, "accepts": OK, "is closed": OK, "hangs": HANG, "answers 429": status(429, 0.2),
        "answers 503": status(503), "answers 400": status(400), "accepts a part": partial(1),
        "cuts the connection": CUT,
    }  # fmt: skip
    taken: dict[str, list[float]] = {case: [] for case in moods}
    for _ in range(ROUNDS):
        for case, mood in moods.items():
            with endpoint("http/protobuf") as other:
                other.default = mood or OK
                if case == "is closed":
                    other.stop()
                taken[case].append(run(case, other.url if mood else ""))
    lines = ["| the endpoint | wall, s | x telemetry off |", "|---|--:|--:|"]
    off = statistics.median(taken["off"])
    for case, seconds in taken.items():
        middle = statistics.median(seconds)
        lines.append(f"| {case} | {middle:.3f} | {middle / off:.3f} (budget {BUDGET}) |")
    return "\n".join(lines)
