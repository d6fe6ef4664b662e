"""`carry`: work handed to another thread stays in its trace, run and node."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context

import otel_odibi as oo
from otel_odibi.testing import Capture

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def in_thread(fn: Callable[[], Any]) -> None:
    thread = threading.Thread(target=fn)
    thread.start()
    thread.join()


@oo.node
def work(item: int) -> tuple[int, str]:
    """Do one item, and tell which run it belongs to."""
    return item, oo.current_pipeline().run_id


def test_without_carry_a_thread_knows_nothing(odibi_capture: Capture) -> None:
    """Which is why `carry` is there: a new thread begins with an empty context."""
    with oo.pipeline("p"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(work, 1).result() == (1, "")
    assert odibi_capture.node("work").parent is None


def test_a_thread(odibi_capture: Capture) -> None:
    """The node in the thread is a child of the node that started it."""
    with oo.pipeline("p"), oo.node("outer"):
        in_thread(oo.carry(functools.partial(work, 1)))
    assert odibi_capture.node("work").parent == odibi_capture.node("outer").context
    assert odibi_capture.node("work").attributes["odibi.pipeline.run.id"] == "run-1"


def test_a_thread_pool(odibi_capture: Capture) -> None:
    """One carried function may run in all threads of a pool at once, by `map` and by `submit`."""
    with oo.pipeline("p") as run, ThreadPoolExecutor(8) as pool:
        carried = oo.carry(work)
        done = [*pool.map(carried, range(50)), pool.submit(carried, item=50).result()]
        assert done == [(item, run.run_id) for item in range(51)]
    spans = odibi_capture.spans
    run_span = odibi_capture.pipeline("p").context
    assert all(span.parent == run_span for span in spans if span.name == "node work")
    assert len(spans) == 52


def test_two_runs_share_a_pool(odibi_capture: Capture) -> None:
    """What a worker did last is not what it does now."""
    with ThreadPoolExecutor(1) as pool:
        for run_id in ("run-1", "run-2"):
            with oo.pipeline("p"):
                assert pool.submit(oo.carry(work), 0).result() == (0, run_id)
        assert pool.submit(work, 0).result() == (0, "")


def test_carried_inside_carried(odibi_capture: Capture) -> None:
    """A thread may hand on in turn: the chain of parents goes through both."""

    @oo.node
    def split() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(oo.carry(work), range(2)))

    with oo.pipeline("p"):
        in_thread(oo.carry(split))
    parents = {span.name: span.parent for span in odibi_capture.spans}
    assert parents["node work"] == odibi_capture.node("split").context
    assert parents["node split"] == odibi_capture.pipeline("p").context


def test_every_context_variable_comes_along() -> None:
    """Baggage and others' variables too, as they were when `carry` was called; changes inside stay inside."""
    variable.set("before")
    token = otel_context.attach(baggage.set_baggage("tenant", "a"))
    seen: list[Any] = []

    def look() -> None:
        seen.append((variable.get(), baggage.get_baggage("tenant")))
        variable.set("inside")

    carried = oo.carry(look)
    variable.set("after")
    in_thread(carried)
    in_thread(carried)
    carried()
    otel_context.detach(token)
    assert seen == [("before", "a")] * 3
    assert variable.get() == "after"


def test_results_and_exceptions_pass_untouched() -> None:
    """`carry` is no more than a change of context."""
    exc = ValueError("bad")

    def fail() -> None:
        raise exc

    with pytest.raises(ValueError, match="bad") as raised:
        oo.carry(fail)()
    assert raised.value is exc
    assert (exc.__context__, exc.__cause__) == (None, None)
    assert oo.carry(max)(3, 5) == 5
    assert oo.carry(work).__name__ == "work"
    assert oo.carry(functools.partial(max, 3))(5) == 5


def test_a_run_that_ended_meanwhile(odibi_capture: Capture) -> None:
    """Work that outlives its run still belongs to it."""
    with oo.pipeline("p"):
        carried = oo.carry(work)
    in_thread(functools.partial(carried, 1))
    assert odibi_capture.node("work").parent == odibi_capture.pipeline("p").context
    assert odibi_capture.logs[-1]["run_id"] == "run-1"


def test_tasks_need_no_carry(odibi_capture: Capture) -> None:
    """asyncio hands the context to tasks, and `asyncio.to_thread` to its threads."""

    async def main() -> None:
        async with oo.pipeline("p"):
            await asyncio.to_thread(work, 1)

    asyncio.run(main())
    assert odibi_capture.node("work").parent == odibi_capture.pipeline("p").context


# --- coroutine functions ---------------------------------------------------------------------------------------------


@oo.node
async def later(item: int) -> tuple[int, str]:
    """As `work`, after a wait."""
    await asyncio.sleep(0)
    return item, oo.current_pipeline().run_id


def test_a_coroutine_in_another_thread_s_loop(odibi_capture: Capture) -> None:
    """A carried coroutine function is still one, and runs in the context it was carried from."""
    with oo.pipeline("p") as run:
        carried = oo.carry(later)
        assert inspect.iscoroutinefunction(carried)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(asyncio.run, carried(1)).result() == (1, run.run_id)
    assert odibi_capture.node("later").parent == odibi_capture.pipeline("p").context


def test_the_awaiter_of_a_carried_coroutine_keeps_its_context(odibi_capture: Capture) -> None:
    """Before, between and after its steps the awaiting task's own variables are current."""
    variable.set("carried")

    async def look() -> str:
        assert variable.get() == "carried"
        await asyncio.sleep(0)
        variable.set("changed inside")
        await asyncio.sleep(0)
        return variable.get()

    carried = oo.carry(look)

    async def main() -> None:
        variable.set("awaiter")
        async with oo.node("n") as n:
            assert await carried() == "changed inside"
            assert variable.get() == "awaiter"
            assert oo.current_node() is n
            assert trace.get_current_span() is n.span
            assert await asyncio.gather(carried(), carried()) == ["changed inside"] * 2

    asyncio.run(main())
    assert variable.get() == "carried"


@pytest.mark.parametrize("handled", [True, False])
def test_cancelling_a_carried_coroutine(handled: bool) -> None:
    """Cancellation goes in, may be handled there, and comes out as it would without `carry`."""
    log: list[str] = []

    async def wait() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            log.append(variable.get())
            if not handled:
                raise
        return "handled"

    variable.set("inside")
    carried = oo.carry(wait)

    async def main() -> None:
        variable.set("outside")
        task = asyncio.create_task(carried())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() is not handled
        assert not handled or task.result() == "handled"

    asyncio.run(main())
    assert log == ["inside"]


def test_a_carried_coroutine_closed_early() -> None:
    """Its clean-up runs, in its own context."""
    log: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            log.append(variable.get())

    variable.set("inside")
    coroutine = oo.carry(wait)()
    variable.set("outside")
    coroutine.send(None)
    coroutine.close()
    assert log == ["inside"]
