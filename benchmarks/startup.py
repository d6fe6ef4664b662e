"""What `import otel_odibi` adds to `import opentelemetry.sdk.trace`, in milliseconds."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 11


def _import_time(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return (time.perf_counter() - began) * 1e3


def table() -> str:
    sdk = "import opentelemetry.sdk.trace"
    both, alone = f"{sdk}; import otel_odibi", "import otel_odibi"
    _import_time(both)
    times = [(_import_time("pass"), _import_time(sdk), _import_time(both), _import_time(alone)) for _ in range(ROUNDS)]
    nothing, base, with_us, only = (statistics.median(column) for column in zip(*times, strict=True))
    return "\n".join(
        [
            "| import | ms | budget |",
            "|---|--:|--:|",
            f"| opentelemetry.sdk.trace | {base - nothing:.0f} | |",
            f"| otel_odibi on top | {with_us - base:.0f} | 40 |",
            f"| otel_odibi alone | {only - nothing:.0f} | |",
        ]
    )
