"""What carrying a task costs beyond handing it over bare, in a pool of threads and to a process.

Tasks that do nothing go through a pool of one worker, in rounds of bare tasks, of tasks carried by one `carry`, and by
one each, that take turns in one run; differences and ratios are medians over the rounds. As pools are at the mercy of
the scheduler, their CPU time is measured too, and what a pool of processes does to a task is also done by hand.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import otel_odibi as oo

TASKS, ROUNDS, BUDGET = 500, 41, 15


def task(number: int) -> int:
    return number


def _submitted(pool: Executor, function: Callable[[], Any]) -> None:
    for future in [pool.submit(function(), number) for number in range(TASKS)]:
        future.result()


def _cpu_of_both(pool: Executor) -> float:
    return time.process_time() + pool.submit(time.process_time).result()


def _pickled(function: Callable[[], Any]) -> None:
    for number in range(TASKS):
        sent, argument = pickle.loads(pickle.dumps((function(), number)))
        sent(argument)


def _row(name: str, work: Callable[[Callable[[], Any]], None], clock: Callable[[], float] = time.perf_counter) -> str:
    """Measure bare tasks, tasks carried from one node, and carried anew from it, in rounds that take turns."""
    ready = oo.carry(task)
    kinds: tuple[Callable[[], Any], ...] = (lambda: task, lambda: ready, lambda: oo.carry(task))
    rounds = []
    for _ in range(ROUNDS):
        times = [clock()]
        for kind in kinds:
            work(kind)
            times.append(clock())
        rounds.append([(after - before) / TASKS * 1e6 for before, after in pairwise(times)])
    bare, once, each = (statistics.median(column) for column in zip(*rounds, strict=True))
    more = [statistics.median(r[kind] - r[0] for r in rounds) for kind in (1, 2)]
    return f"| {name} | {bare:.1f} | {more[0]:.1f} | {once / bare:.2f} | {more[1]:.1f} | {each / bare:.2f} | {BUDGET} |"


def table() -> str:
    head = "| one task, us | bare | carried once, more | x | carried each, more | x | budget |"
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(oo.configure(directory=directory, set_global=False))
        threads = stack.enter_context(ThreadPoolExecutor(1))
        processes = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
        stack.enter_context(oo.pipeline("bench"))
        stack.enter_context(oo.node("hands_on"))
        processes.submit(oo.carry(task), 0).result()  # which configures the worker
        in_threads, in_processes = partial(_submitted, threads), partial(_submitted, processes)
        rows = [
            _row("thread pool", in_threads),
            _row("thread pool, CPU", in_threads, time.process_time),
            _row("process pool", in_processes),
            _row("process pool, CPU of both", in_processes, lambda: _cpu_of_both(processes)),
            _row("pickled, unpickled and called, CPU", _pickled, time.thread_time),
        ]
    return "\n".join([head, "|---|--:|--:|--:|--:|--:|--:|", *rows])


if __name__ == "__main__":
    print(table())
