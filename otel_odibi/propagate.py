"""Context that travels: a node's work handed to another thread stays in its trace, run and node."""

from __future__ import annotations

import contextvars
import functools
import inspect
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def carry(fn: F) -> F:
    """Return `fn` bound to the context of here and now: trace, run, node, baggage, every context variable.

    For threads: `pool.submit(carry(work), item)`, `pool.map(carry(work), items)`, `Thread(target=carry(work))`. Each
    call runs in a copy of the context taken when `carry` was called, so one carried function may run in many threads
    at once, and what it changes in its context stays there. Coroutine functions need none (tasks take their context
    along) but may be carried to a loop in another thread. Raises nothing of its own; exceptions of `fn` pass untouched.
    """
    context = contextvars.copy_context()
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def carried_coroutine(*args: Any, **kwargs: Any) -> Any:
            return await _in_context(context.copy(), fn(*args, **kwargs))

        return carried_coroutine  # type: ignore[return-value]

    @functools.wraps(fn)
    def carried(*args: Any, **kwargs: Any) -> Any:
        return context.copy().run(fn, *args, **kwargs)

    return carried  # type: ignore[return-value]


@types.coroutine
def _in_context(context: contextvars.Context, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run every step of `coroutine` in `context`, and leave the context of the task that awaits it alone."""
    step: Callable[[Any], Any] = coroutine.send
    sent: Any = None
    try:
        while True:
            waited = context.run(step, sent)
            try:
                step, sent = coroutine.send, (yield waited)
            except BaseException as exc:  # noqa: BLE001 - thrown in above: in here it would become a `__context__`
                step, sent = coroutine.throw, exc
    except StopIteration as stop:
        return stop.value
    finally:
        sent = None  # an exception and the frame it passed through would keep each other alive
