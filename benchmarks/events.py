"""What emitting an event costs, beside other ways to call three functions, with and without a limit on their time.

The figure is the median of single calls over all rounds, which alternate between the contenders.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

CALLS, ROUNDS = 400, 15
DATA = {"pipeline_name": "bench", "success_count": 3, "failed_count": 0}

Emit = Callable[[], object]


def hook(event):
    """Do nothing."""


def bus_with(hooks: int, **options) -> Emit:
    from otel_odibi import EventBus

    bus = EventBus()
    for number in range(hooks):
        bus.register_hook("pipeline_complete", hook, name=f"hook {number}", **options)
    return lambda: bus.emit("pipeline_complete", DATA)


def three_calls() -> Emit:
    """No limit on their time, and the first that raises ends it."""
    return lambda: [hook(dict(DATA)) for _ in range(3)]


def thread_pool() -> Emit:
    """With a limit on their time, as the standard library has it: an executor's future, waited for."""
    pool = ThreadPoolExecutor(1)
    return lambda: [pool.submit(hook, dict(DATA)).result(30) for _ in range(3)]


CONTENDERS = {
    "three plain calls": (three_calls, None),
    "three calls by an executor, waited for": (thread_pool, None),
    "EventBus.emit, no hooks": (lambda: bus_with(0), 1),
    "EventBus.emit, three synchronous hooks": (lambda: bus_with(3), 100),
    "EventBus.emit, three asynchronous hooks": (lambda: bus_with(3, async_execution=True), None),
}


def one_round(emit: Emit) -> list[float]:
    """Return the microseconds of each call."""
    taken = []
    for _ in range(CALLS):
        began = time.perf_counter()
        emit()
        taken.append((time.perf_counter() - began) * 1e6)
    return taken


def table() -> str:
    emits = {name: make() for name, (make, _) in CONTENDERS.items()}
    taken: dict[str, list[float]] = {name: [] for name in emits}
    for number in range(ROUNDS + 1):
        for name, emit in emits.items():
            taken[name] += one_round(emit) if number else []  # the first round is a warm-up
            time.sleep(0.02)  # for what runs on
    lines = ["| one event | us | 99 of 100 below, us | budget, us |", "|---|--:|--:|--:|"]
    for name, (_, budget) in CONTENDERS.items():
        middle, high = statistics.median(taken[name]), statistics.quantiles(taken[name], n=100)[98]
        lines.append(f"| {name} | {middle:.2f} | {high:.1f} | {budget or ''} |")
    return "\n".join(lines)
