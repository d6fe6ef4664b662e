"""What recording an execution by hand costs, and what it leaves in memory, beside what else could record it.

Each contender runs in a process of its own. The time is the median over rounds of CPU time a call, so that what else
runs on the machine counts less; memory is what Python keeps of further calls after a warm-up.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

CALLS, ROUNDS, WARM_UP = 20_000, 15, 20_000
BUDGET = 3.0

Record = Callable[[str, float, bool, int], None]


def bare_call() -> Record:
    return lambda node, ms, success, rows: None


def metrics_manager() -> Record:
    from otel_odibi.manager import MetricsManager

    record = MetricsManager().record_node_execution
    return lambda node, ms, success, rows: record(node, ms, success, rows=rows)


def metrics_manager_configured() -> Record:
    """With telemetry on, whose instruments hear of it."""
    import otel_odibi as oo

    oo.configure(service_name="bench", set_global=False)
    return metrics_manager()


def sdk_instruments() -> Record:
    """The same as a careful engineer records it with the OpenTelemetry SDK."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    meter = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False).get_meter("bench")
    duration, outcome = meter.create_histogram("duration", "ms"), meter.create_counter("outcome")
    throughput, lookups = meter.create_gauge("throughput"), meter.create_counter("lookups")

    def record(node, ms, success, rows):
        labels = {"node": node, "engine": "pandas"}
        duration.record(ms, labels)
        outcome.add(1, {**labels, "success": success})
        throughput.set(rows / ms * 1e3, labels)
        lookups.add(1, {**labels, "result": "miss"})

    return record


def prometheus_client() -> Record:
    """The same with prometheus_client, its children looked up once."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    registry: Any = CollectorRegistry()
    labels = {"node": "work", "engine": "pandas"}
    duration = Histogram("duration", "d", [*labels], registry=registry).labels(**labels)
    success, failure = (Counter(name, "o", [*labels], registry=registry).labels(**labels) for name in ("ok", "failed"))
    throughput = Gauge("throughput", "t", [*labels], registry=registry).labels(**labels)
    misses = Counter("misses", "m", [*labels], registry=registry).labels(**labels)

    def record(node, ms, is_success, rows):
        duration.observe(ms)
        (success if is_success else failure).inc()
        throughput.set(rows / ms * 1e3)
        misses.inc()

    return record


def list_of_records() -> Record:
    """A list that a record of every value is appended to, and counters: all of it is kept."""
    values, counters = [], {}

    def record(node, ms, success, rows):
        now, labels = time.time(), {"engine": "pandas"}
        counters["success", node] = counters.get(("success", node), 0) + success
        for name, value in (("duration", ms), ("success", success), ("miss", 1), ("throughput", rows / ms * 1e3)):
            values.append({"type": name, "name": node, "value": value, "timestamp": now, "labels": labels})

    return record


CONTENDERS = {
    "bare call": bare_call,
    "MetricsManager": metrics_manager,
    "MetricsManager, telemetry on": metrics_manager_configured,
    "prometheus_client, 4 metrics": prometheus_client,
    "SDK instruments, 4 metrics": sdk_instruments,
    "a list of records": list_of_records,
}


def measure(name: str) -> dict[str, float]:
    """Return microseconds a call and bytes kept of each further call."""
    record = CONTENDERS[name]()

    def loop(count):
        for number in range(count):
            record("work", 1.5 + number % 1_000, True, 1_000)

    def one_round():
        began = time.process_time()
        loop(CALLS)
        return (time.process_time() - began) / CALLS * 1e6

    loop(WARM_UP)
    rounds = [one_round() for _ in range(ROUNDS)]
    tracemalloc.start()
    loop(WARM_UP)  # what replaces older records is known to tracemalloc only from here on
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    loop(CALLS)
    gc.collect()
    kept = (tracemalloc.get_traced_memory()[0] - before) / CALLS
    return {"us": statistics.median(rounds), "bytes": kept}


def table() -> str:
    lines = [f"| one execution recorded by hand | us (budget {BUDGET:.0f}) | bytes kept |", "|---|--:|--:|"]
    for name in CONTENDERS:
        program = [sys.executable, "-m", "benchmarks.manager", name]
        run = subprocess.run(program, capture_output=True, text=True, check=True)
        found = json.loads(run.stdout.splitlines()[-1])
        lines.append(f"| {name} | {found['us']:.2f} | {max(0.0, found['bytes']):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
