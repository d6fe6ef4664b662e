"""Wrap a function so that a call is begun before it and finished after it, whatever kind of function it is."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from types import CoroutineType
from typing import Any

from otel_odibi.calls import NO_NODE, Call

Begin = Callable[[Sequence[object], Mapping[str, object]], "Call | None"]
Function = Callable[..., Any]


def wrap(fn: Function, begin: Begin) -> Function:
    """Return `fn` with `begin` called before each execution, and what it gives finished after it.

    The kind of `fn` is looked at once, here. A plain function that returns a coroutine is timed until that is done.
    Exceptions pass untouched. The wrapper keeps no state between calls.
    """
    return functools.update_wrapper(_wrapper_for(_innermost(fn))(fn, begin), fn)


def _innermost(fn: Function) -> Function:
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.isroutine(fn):
        return fn
    return type(fn).__call__.__get__(fn)  # type: ignore[no-any-return]  # an instance with __call__, maybe async


def _wrapper_for(fn: Function) -> Callable[[Function, Begin], Function]:
    if inspect.iscoroutinefunction(fn):
        return _async
    if inspect.isasyncgenfunction(fn):
        return _async_generator
    if inspect.isgeneratorfunction(fn):
        return _generator
    return _sync


def _sync(fn: Function, begin: Begin) -> Function:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = begin(args, kwargs)
        if call is None:
            return fn(*args, **kwargs)
        try:
            result = fn(*args, **kwargs)
        except BaseException as exc:
            call.finish(exc)
            raise
        if type(result) is CoroutineType:
            return _later(call, result)
        call.finish(None, result)
        return result

    return wrapper


def _later(call: Call, coroutine: CoroutineType[Any, Any, Any]) -> Any:
    call.suspend()
    later: Any = _finish_later(call, coroutine)
    later.__qualname__ = coroutine.__qualname__  # as Python names it where nobody awaits it
    _end_with(later, call, coroutine)  # a task cancelled before its first step never enters it
    return later


def _end_with(work: object, call: Call, coroutine: CoroutineType[Any, Any, Any] | None = None) -> None:
    """End the call when `work` is gone, should it be suspended then."""

    def gone() -> None:
        if coroutine is not None:
            coroutine.close()  # so that it is not called forgotten; most often it has ended
        call.abandon()

    weakref.finalize(work, gone).atexit = False


async def _finish_later(call: Call, coroutine: CoroutineType[Any, Any, Any]) -> Any:
    call.resume()
    try:
        result = await coroutine
    except BaseException as exc:
        call.finish(exc)
        raise
    call.finish(None, result)
    return result


def _async(fn: Function, begin: Begin) -> Function:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = begin(args, kwargs)
        if call is None:
            return await fn(*args, **kwargs)
        try:
            result = await fn(*args, **kwargs)
        except BaseException as exc:
            call.finish(exc)
            raise
        call.finish(None, result)
        return result

    return wrapper


def _generator(fn: Function, begin: Begin) -> Function:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = begin(args, kwargs)
        if call is None:
            return (yield from fn(*args, **kwargs))
        sent: Any = None
        try:
            generator = fn(*args, **kwargs)
            step = generator.send
            while True:
                item = step(sent)
                call.yielded(item)
                call.suspend()
                try:
                    step, sent = generator.send, (yield item)
                except BaseException as exc:  # noqa: BLE001 - thrown in below: in here it would become a `__context__`
                    step, sent = generator.throw, exc
                call.resume()
        except StopIteration as stop:
            call.finish(sent if isinstance(sent, GeneratorExit) else None)
            return stop.value
        except BaseException as exc:
            call.finish(exc)
            raise
        finally:
            sent = None  # an exception and the frame it passed through would keep each other alive

    return wrapper


def _async_generator(fn: Function, begin: Begin) -> Function:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = begin(args, kwargs) or NO_NODE
        sent: Any = None
        waiting: Any = None
        try:
            generator = fn(*args, **kwargs)
            if call:
                _end_with(generator, call)  # an event loop may end before it has closed what was forgotten
            waiting = _begun(generator)
            while True:
                item = await waiting
                call.yielded(item)
                call.suspend()
                try:
                    step, sent = generator.asend, (yield item)
                except BaseException as exc:  # noqa: BLE001 - as above
                    step, sent = generator.athrow, exc
                call.resume()
                waiting = step(sent)
        except StopAsyncIteration:
            call.finish(sent if isinstance(sent, GeneratorExit) else None)
        except BaseException as exc:
            call.finish(exc)
            raise
        finally:
            sent = waiting = None

    return wrapper


def _begun(generator: AsyncGenerator[Any, Any]) -> Awaitable[Any]:
    """Ask for the first item, unseen by the event loop: what it closes at its end is the wrapper, and that alone."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(firstiter=None, finalizer=lambda forgotten: None)
    try:
        return generator.asend(None)
    finally:
        sys.set_asyncgen_hooks(*hooks)
