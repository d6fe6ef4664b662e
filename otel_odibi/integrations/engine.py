"""What every integration is made of: advice around an engine's functions, given and taken back without a trace.

The page docs/engines.md builds one from it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Final, TypeVar

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]
from wrapt import register_post_import_hook

from otel_odibi import names
from otel_odibi.calls import Call, Node, Run, current_pipeline, inputs_of
from otel_odibi.propagate import parcel, unpacked
from otel_odibi.runtime import live

Function = Callable[..., Any]
Advised = Generator[None, Any, None]
Advice = Callable[..., Advised]
T = TypeVar("T")
_ABSENT: Final = object()
LIBRARIES: Final = frozenset(
    ["cudf", "dask", "duckdb", "geopandas", "ibis", "modin", "numpy", "pandas", "polars", "pyarrow", "pyspark", "vaex"]
)
"""Libraries of tables, whose name is the engine of a node that gives one of their values."""


class Engine(BaseInstrumentor):  # type: ignore[misc]  # untyped there
    """An instrumentor of an engine: `instrument()` calls `install`, `uninstrument()` puts back what was there before.

    Where a release of the engine is built otherwise than `install` expects, nothing is left half done: what was
    changed is put back, and one warning says so. Neither method raises. One instance a class in a process.
    """

    requires: ClassVar[tuple[str, ...]] = ()  # as pip reads it
    _undo: list[Callable[[], None]]

    def install(self) -> None:
        """Change the engine by `around` and `replace`; imports of the engine belong in here."""
        raise NotImplementedError

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return what has to be installed for this to be of use."""
        return self.requires

    def _instrument(self, **kwargs: Any) -> None:
        self._undo = []
        self._try(functools.partial(self.install, **kwargs))

    def _uninstrument(self, **kwargs: Any) -> None:
        changes, self._undo = self._undo, []
        while changes:
            ask(changes.pop())

    def _try(self, change: Callable[[], None]) -> None:
        try:
            change()
        except Exception as exc:  # noqa: BLE001 - the host's program has to start all the same
            self._uninstrument()
            absent = isinstance(exc, ModuleNotFoundError) and "." not in (exc.name or ".")  # all of the engine
            level = logging.DEBUG if absent else logging.WARNING  # opentelemetry-instrument tries every one there is
            text = "%s: this release of the engine cannot be instrumented: %r"
            logging.getLogger(names.SCOPE).log(level, text, type(self).__name__, exc)

    def when_imported(self, module: str, change: Callable[[], None]) -> None:
        """Have `change` called once the program has imported `module`, or now if it has: a part of `install`.

        For an engine whose import takes long or sets something up, in programs that do not use it.
        """
        instrumented = self._undo
        register_post_import_hook(lambda _: self._try(change) if self._undo is instrumented else None, module)

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
        rt = live()
        if rt is not None:
            rt.on_error("integration", exc)
        return default


def engine_of(kind: object) -> str:
    """Return the name of the library of tables that a type, or an annotation, is from; "" where it is from none."""
    package = str(getattr(kind, "__module__", "")).partition(".")[0]
    return package if package in LIBRARIES else ""


def take(call: Node, inputs: Sequence[object]) -> None:
    """Count the rows of a node's inputs, and look for no producers: its engine knows better who they are."""
    rt = live()
    if rt is not None:
        call.input(rows=inputs_of(rt, inputs, {})[0])


class Ticket:
    """A run or node, or the parcel of one, for those who do a part of its work in other threads and processes.

    `with ticket.inside():` makes it current for a block. Where it is pickled to, it is of the parcel, and whatever else
    a subclass holds has stayed at home. Thread-safe.
    """

    def __init__(self, of: Call | bytes) -> None:
        self.inside: Callable[[], AbstractContextManager[None]]
        self.inside = functools.partial(unpacked, of) if isinstance(of, bytes) else of.inside

    def __getstate__(self) -> bytes:
        with self.inside():
            return parcel()

    def __setstate__(self, parcel: bytes) -> None:
        Ticket.__init__(self, parcel)
        with self.inside():  # which configures a process where nothing is, so that `begin` finds it live
            pass


class Runs:
    """The runs under way, each by an object of its engine that is at hand in a pool's threads too. Thread-safe."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[Run, Any]] = {}

    @contextmanager
    def hold(self, owner: object, run: Run, note: Any = None) -> Iterator[None]:
        """Have `join(owner)` find `run`, and what is noted of it, for the time of a block."""
        held = self._runs[id(owner)] = run, note
        try:
            yield
        finally:
            if self._runs.get(id(owner)) is held:  # not the run that another thread has begun of it meanwhile
                self._runs.pop(id(owner), None)

    @contextmanager
    def join(self, owner: object) -> Iterator[Any]:
        """Make the run current where it is not, as in a thread of a pool; give what is noted of it, or None."""
        run, note = self._runs.get(id(owner), (None, None))
        with nullcontext() if run is None or current_pipeline() is run else run.inside():
            yield note


def _advised(fn: Function, advice: Advice) -> Function:
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def advised_coroutine(*args: Any, **kwargs: Any) -> Any:
            work = begin(advice, *args, **kwargs)
            try:
                result = await fn(*args, **kwargs)
            except BaseException as exc:
                _finish(work, None, exc)
                raise
            _finish(work, result, None)
            return result

        return advised_coroutine

    @functools.wraps(fn)
    def advised(*args: Any, **kwargs: Any) -> Any:
        work = begin(advice, *args, **kwargs)
        try:
            result = fn(*args, **kwargs)
        except BaseException as exc:
            _finish(work, None, exc)
            raise
        _finish(work, result, None)
        return result

    return advised


def begin(advice: Advice, /, *args: Any, **kwargs: Any) -> Advised | None:
    """Run `advice` up to its `yield`, for an engine that calls hooks before and after; its rest is run by `end`."""
    return None if live() is None else ask(_first_half, advice, args, kwargs)


def end(work: Advised | None, result: object = None, error: BaseException | None = None) -> None:
    """Run the rest of what `begin` began, in the same thread: `yield` gives `result`, or raises `error` where given.

    An interrupt that is on its way is the error where the hook was not told of one.
    """
    raised = sys.exc_info()[1]
    _finish(work, result, raised if error is None and not isinstance(raised, Exception) else error)


def _finish(work: Advised | None, result: object, error: BaseException | None) -> None:
    if work is not None:
        trace = None if error is None else error.__traceback__
        ask(_second_half, work, result, error)
        if error is not None:
            error.__traceback__ = trace


def _first_half(advice: Advice, args: Any, kwargs: Any) -> Advised | None:
    work = advice(*args, **kwargs)
    return None if next(work, _ABSENT) is _ABSENT else work


def _second_half(work: Advised, result: object, error: BaseException | None) -> None:
    try:
        work.send(result) if error is None else work.throw(error)
    except StopIteration:
        pass
    except BaseException as exc:
        if exc is not error and not (isinstance(error, StopIteration) and exc.__cause__ is error):  # as Python turns it
            raise
