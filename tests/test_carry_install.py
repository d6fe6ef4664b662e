"""`install_carry()`: a whole program's threads, pools and processes carry the context, with no change to its code."""

from __future__ import annotations

import asyncio
import concurrent.futures.process  # noqa: F401 - loaded, so that it is looked at
import functools
import multiprocessing.pool
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from test_carry_processes import run, spans_in

import otel_odibi as oo
from otel_odibi import propagate
from otel_odibi.testing import Capture, untouched


@pytest.fixture
def installed() -> Iterator[None]:
    """Carry everywhere for the time of a test."""
    undo = oo.install_carry()
    yield
    undo()


@oo.node
def work(item: int = 0) -> str:
    return oo.current_pipeline().run_id


class Working(threading.Thread):
    """A thread of the program's own making."""

    def run(self) -> None:
        work()


def test_threads(installed: None, odibi_capture: Capture) -> None:
    """Made of a function, of a class, or to begin later: each begins where it was started."""
    threads = [threading.Thread(target=work), Working(), threading.Timer(0, work)]
    with oo.pipeline("p"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [span.parent for span in odibi_capture.spans if span.name == "node work"] == [
        odibi_capture.pipeline("p").context
    ] * 3
    assert not any("run" in vars(thread) for thread in threads)


def test_thread_pools(installed: None, odibi_capture: Capture) -> None:
    """Each task begins where it was handed over, by whatever method, though the threads stay the same."""
    with ThreadPoolExecutor(1) as pool, multiprocessing.pool.ThreadPool(1) as other:
        for run_id in ("run-1", "run-2"):
            with oo.pipeline("p"):
                assert list(pool.map(work, range(2))) == [run_id] * 2
                assert pool.submit(work, item=1).result() == run_id
                assert other.map(work, range(2)) == [run_id] * 2
                assert other.apply(func=work) == run_id
                assert list(other.imap_unordered(work, range(2))) == [run_id] * 2
                assert list(other.imap(func=work, iterable=[0], chunksize=2)) == [run_id]
                assert other.starmap(work, [(0,)]) == [run_id]
        assert pool.submit(work).result() == other.apply(work) == ""


def test_an_event_loop_s_executor(installed: None, odibi_capture: Capture) -> None:
    """`run_in_executor`, unlike `asyncio.to_thread`, does not hand the context on by itself."""

    async def main() -> str:
        async with oo.pipeline("p"):
            return await asyncio.get_running_loop().run_in_executor(None, work)

    assert asyncio.run(main()) == "run-1"


def times_carried() -> int:
    """Return how often what calls this was carried."""
    return sum(frame.name == "__call__" and frame.filename == propagate.__file__ for frame in traceback.extract_stack())


def test_what_is_carried_is_not_carried_again(installed: None, odibi_capture: Capture) -> None:
    """The place where the program said `carry` counts, also where it gives arguments along."""
    with oo.pipeline("p"):
        carried = oo.carry(lambda *_: (times_carried(), work()))
    with ThreadPoolExecutor(1) as pool, oo.pipeline("q"):
        assert pool.submit(carried).result() == (1, "run-1")
        assert pool.submit(functools.partial(carried, 1)).result() == (1, "run-1")
        assert pool.submit(times_carried).result() == 1


def test_a_pool_s_own_threads_begin_nowhere(installed: None, odibi_capture: Capture) -> None:
    """They outlive the run that happened to need them first, and keep nothing of it alive."""
    with ThreadPoolExecutor(1) as pool:
        with oo.pipeline("p"):
            pool.submit(work).result()
        undone = oo.install_carry()
        undone()
        assert pool.submit(work).result() == ""


def test_it_is_undone_to_the_letter(odibi_capture: Capture) -> None:
    """However often it was installed and undone."""
    with ExitStack() as stack:
        for package in ("concurrent", "multiprocessing", "threading"):
            stack.enter_context(untouched(package))
        undo, again = oo.install_carry(), oo.install_carry()
        assert vars(ThreadPoolExecutor)["submit"].__wrapped__.__qualname__ == "ThreadPoolExecutor.submit"
        assert not hasattr(vars(ThreadPoolExecutor)["submit"].__wrapped__, "__wrapped__")
        undo()
        again()
        undo()


def test_somebody_who_wraps_it_in_turn(odibi_capture: Capture) -> None:
    """What another library has put on top stays when ours is undone, which then does nothing in there."""
    undo = oo.install_carry()
    ours = threading.Thread.start
    threading.Thread.start = lambda self: ours(self)  # type: ignore[method-assign]
    try:
        undo()
        with oo.pipeline("p"):
            thread = Working()
            thread.start()
            thread.join()
        assert odibi_capture.node("work").parent is None
    finally:
        threading.Thread.start = ours.__wrapped__  # type: ignore[attr-defined,method-assign]


def test_nothing_is_carried_where_nothing_is_live(installed: None) -> None:
    """The program's own functions go to the pool as they are."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(times_carried).result() == 0


def test_errors_are_those_of_the_program(installed: None, odibi_capture: Capture) -> None:
    """No argument, no function, started twice: as before."""
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            pool.submit()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            pool.submit(None).result()  # type: ignore[arg-type]
    thread = Working()
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="threads can only be started once"):
        thread.start()


PROGRAM = """
import pickle

def failure(fn):
    try:
        fn()
    except Exception as exc:
        return repr(exc)

class Worker(multiprocessing.get_context("spawn").Process):
    def run(self):
        work(0)

def main(directory):
    oo.configure(service_name="etl", directory=directory)
    undo = oo.install_carry()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool, context.Pool(1) as other, oo.pipeline("p") as run:
        with oo.node("in_pool"):
            assert set(pool.map(work, range(4), chunksize=2)) == {(run.run_id, run.trace_id)}
            local = lambda: 0
            assert failure(pool.submit(local).result) == failure(lambda: pickle.dumps(local))
        with oo.node("in_pool_of_multiprocessing"):
            other.map(work, range(2))
            other.apply(work, (0,))
            list(other.imap(work, [0]))
        with oo.node("in_process"):
            for process in (context.Process(target=work, args=(0,)), Worker()):
                process.start()
                process.join()
                assert process.exitcode == 0
                assert "run" not in vars(process)
    undo()

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def test_processes(tmp_path: Path) -> None:
    """Process pools, pools and processes of `multiprocessing`, also of a class of its own: one trace, right parents."""
    run(tmp_path, PROGRAM, tmp_path / "telemetry")
    assert Counter((span.name, span.parent) for span in spans_in(tmp_path / "telemetry")) == {
        ("pipeline p", ""): 1,
        ("node in_pool", "pipeline p"): 1,
        ("node work", "node in_pool"): 4,
        ("node in_pool_of_multiprocessing", "pipeline p"): 1,
        ("node work", "node in_pool_of_multiprocessing"): 4,
        ("node in_process", "pipeline p"): 1,
        ("node work", "node in_process"): 2,
    }
