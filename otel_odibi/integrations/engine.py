"""What every integration is made of: advice around an engine's functions, given and taken back without a trace.

    class AcmeInstrumentor(Engine):
        requires = ("acme >= 2",)

        def install(self) -> None:
            from acme.runner import Runner
            self.around(Runner, "run", _run)

    def _run(runner, flow, *args, **kwargs):
        with pipeline(flow.name):
            yield                          # the engine's function runs here; what it raises is raised here

See docs/engines.md.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Collection, Generator
from typing import Any, ClassVar, Final, TypeVar

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]

from otel_odibi import names
from otel_odibi.runtime import live

Function = Callable[..., Any]
Advice = Callable[..., Generator[None, Any, object]]
T = TypeVar("T")
_ABSENT: Final = object()


class Engine(BaseInstrumentor):  # type: ignore[misc]  # untyped there
    """An instrumentor of an engine: `instrument()` calls `install`, `uninstrument()` puts back what was there before.

    Where a release of the engine is built otherwise than `install` expects, nothing is left half done: what was
    changed is put back, and one warning says so. Neither method raises. One instance a class in a process.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    """Requirements as pip reads them, all of which have to be met."""

    _undo: list[Callable[[], None]]

    def install(self) -> None:
        """Change the engine by `around` and `replace`; imports of the engine belong in here."""
        raise NotImplementedError

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return what has to be installed for this to be of use."""
        return self.requires

    def _instrument(self, **kwargs: Any) -> None:
        self._undo = []
        try:
            self.install(**kwargs)
        except Exception as exc:  # noqa: BLE001 - the host's program has to start all the same
            self._uninstrument()
            logger = logging.getLogger(names.SCOPE)
            logger.warning("%s: this release of the engine cannot be instrumented: %r", type(self).__name__, exc)

    def _uninstrument(self, **kwargs: Any) -> None:
        while self._undo:
            self._undo.pop()()

    def undo(self, action: Callable[[], None]) -> None:
        """Have `uninstrument()` call this too; what was given last is called first."""
        self._undo.append(action)

    def replace(self, owner: Any, name: str, make: Callable[[Function], Function]) -> None:
        """Put `make(function)` in the place of a function of a module or class, static and class methods included.

        Raises AttributeError where there is none.
        """
        raw = inspect.getattr_static(owner, name)
        own = vars(owner).get(name, _ABSENT)
        if isinstance(raw, (staticmethod, classmethod)):
            setattr(owner, name, type(raw)(make(raw.__func__)))
        else:
            setattr(owner, name, make(raw))
        self.undo(lambda: delattr(owner, name) if own is _ABSENT else setattr(owner, name, own))

    def around(self, owner: Any, name: str, advice: Advice) -> None:
        """Run `advice`, a generator function, around every call of `owner.name`, with the same arguments.

        It runs up to its `yield`, which gives the result of the call or raises what the call raised, and then to its
        end. One that ends without `yield` has no interest in this call. What it raises of its own is reported as any
        trouble of telemetry; arguments, result and exceptions of the call pass untouched.
        """
        self.replace(owner, name, lambda fn: _advised(fn, advice))


def ask(fn: Callable[..., T], *args: Any, default: T | None = None) -> T | None:
    """Call what looks into the engine's objects; where that raises, report it and return `default`."""
    try:
        return fn(*args)
    except Exception as exc:  # noqa: BLE001 - telemetry never harms
        _report(exc)
        return default


def _advised(fn: Function, advice: Advice) -> Function:
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def advised_coroutine(*args: Any, **kwargs: Any) -> Any:
            work = _begin(advice, args, kwargs)
            try:
                result = await fn(*args, **kwargs)
            except BaseException as exc:
                _fail(work, exc)
                raise
            _succeed(work, result)
            return result

        return advised_coroutine

    @functools.wraps(fn)
    def advised(*args: Any, **kwargs: Any) -> Any:
        work = _begin(advice, args, kwargs)
        try:
            result = fn(*args, **kwargs)
        except BaseException as exc:
            _fail(work, exc)
            raise
        _succeed(work, result)
        return result

    return advised


def _begin(advice: Advice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator[None, Any, object] | None:
    if live() is None:
        return None
    try:
        work = advice(*args, **kwargs)
        next(work)
    except StopIteration:
        return None
    except Exception as exc:  # noqa: BLE001 - telemetry never harms
        _report(exc)
        return None
    return work


def _succeed(work: Generator[None, Any, object] | None, result: object) -> None:
    try:
        if work is not None:
            work.send(result)
    except StopIteration:
        pass
    except Exception as exc:  # noqa: BLE001 - telemetry never harms
        _report(exc)


def _fail(work: Generator[None, Any, object] | None, raised: BaseException) -> None:
    trace = raised.__traceback__
    try:
        if work is not None:
            work.throw(raised)
    except StopIteration:
        pass
    except BaseException as exc:
        if exc is not raised and not isinstance(exc, Exception):
            raise
        if exc is not raised:
            _report(exc)
    finally:
        raised.__traceback__ = trace


def _report(exc: BaseException) -> None:
    rt = live()
    if rt is not None:
        rt.on_error("integration", exc)
