"""What type checkers must see of the public API. Checked by mypy --strict, never run.

`assert_type` fails the check where a type is not exactly as said; an ignored error that is none fails it as well.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from typing_extensions import assert_type

import otel_odibi as oo


@oo.node
def bare(x: int, *, scale: float = 1.0) -> str:
    return str(x * scale)


@oo.node("named", layer="ingest", engine="pandas", depends_on=["bare"], attributes={"team": "data"})
def named(x: int) -> list[str]:
    return [str(x)]


@oo.node(layer="l")
async def coroutine(x: int) -> bytes:
    return bytes(x)


@oo.node
def generator(x: int) -> Iterator[int]:
    yield x


@oo.node
async def async_generator(x: int) -> AsyncIterator[int]:
    yield x


@oo.pipeline
def run_all(day: str) -> int:
    return len(day)


@oo.pipeline("nightly", attributes={"day": "monday"})
async def run_later() -> None: ...


class Job:
    @oo.node
    def method(self, x: int) -> str:
        return str(x)

    @staticmethod
    @oo.node(layer="l")
    def static(x: int) -> str:
        return str(x)

    @classmethod
    @oo.node
    def of_class(cls, x: int) -> str:
        return str(x)


async def signatures_are_kept() -> None:
    assert_type(bare(1, scale=2.0), str)
    assert_type(named(1), list[str])
    assert_type(await coroutine(1), bytes)
    waiting: Coroutine[Any, Any, bytes] = coroutine(1)
    assert_type(await waiting, bytes)
    assert_type(generator(1), Iterator[int])
    assert_type([item async for item in async_generator(1)], list[int])
    assert_type(run_all("monday"), int)
    assert_type(await run_later(), None)
    assert_type(Job().method(1), str)
    assert_type(Job.static(1), str)
    assert_type(Job.of_class(1), str)
    assert_type(oo.node(functools.partial(bare, 1))(), str)


def wrong_arguments_are_found() -> None:
    bare("1")  # type: ignore[arg-type]
    bare(1, 2)  # type: ignore[call-arg]
    named()  # type: ignore[call-arg]
    Job().method("x")  # type: ignore[arg-type]
    oo.node(layer=5)  # type: ignore[call-overload]
    oo.node(colour="red")  # type: ignore[call-overload]
    oo.pipeline(layer="l")  # type: ignore[call-overload]


async def blocks_give_handles() -> None:
    with oo.pipeline("p") as run, oo.node("n", inputs=[1, "x"], depends_on="a") as n:
        assert_type(run, oo.Run)
        assert_type(n, oo.Node)
        assert_type(n.run, oo.Run | None)
        assert_type(run.run_id, str)
        with n.attempt() as attempt:
            assert_type(attempt, oo.Attempt)
            assert_type(attempt.number, int)
    async with oo.pipeline("p") as later, oo.node("n") as m:
        assert_type(later, oo.Run)
        assert_type(m, oo.Node)
    assert_type(oo.current_node(), oo.Node)
    assert_type(oo.current_pipeline(), oo.Run)


def handles_check_what_they_are_told(run: oo.Run, n: oo.Node) -> None:
    n.output([1], rows=1, bytes=8)
    n.input(rows=1)
    n.cache(hit=True, key=("a", 1))
    n.skip("nothing new")
    n.set(share=0.5, self="fine")
    n.event("half way", done=50)
    run.skip("publish", "nothing new", layer="out")
    n.output(rows="many")  # type: ignore[arg-type]
    n.cache()  # type: ignore[call-arg]
    n.event()  # type: ignore[call-arg]
    run.skip()  # type: ignore[call-arg]


def an_exception_is_not_swallowed(x: int) -> str:
    with oo.node("n"):  # mypy would miss a return below, were this a block that may swallow
        return str(x)


def carried_functions_keep_their_signature(pool: ThreadPoolExecutor) -> None:
    assert_type(oo.carry(bare)(1), str)
    assert_type(list(pool.map(oo.carry(named), [1, 2])), list[list[str]])
    same: Callable[[int], Coroutine[Any, Any, bytes]] = oo.carry(coroutine)
    waiting: Coroutine[Any, Any, bytes] = same(1)
    waiting.close()
    oo.carry(bare)("1")  # type: ignore[arg-type]


def configuration(path: Path) -> None:
    with oo.configure(service_name="s", directory=path, environment="test", log_level="debug") as telemetry:
        assert_type(telemetry, oo.Telemetry)
        assert_type(telemetry.settings, oo.Settings)
        assert_type(telemetry.flush(5), bool)
        telemetry.shutdown()
    oo.get_logger(team="data").info("late flights", share=0.21)
