"""`install_carry()`: whole programs whose threads, pools and processes carry the context, their code unchanged."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from otel_odibi.propagate import Carried, carry
from otel_odibi.runtime import live

Function = Callable[..., Any]
_MACHINERY: Final = (
    "asyncio", "concurrent", "grpc", "multiprocessing", "opentelemetry", "otel_odibi", "prometheus_client",
    "socketserver",
)  # fmt: skip
_lock = threading.Lock()
_undo: list[Callable[[], None]] = []


def install_carry() -> Callable[[], None]:
    """Have every thread, pool and process begin its work in the context of the code that handed it over, as by `carry`.

    Covers `ThreadPoolExecutor`, `ProcessPoolExecutor`, `threading.Thread`, `multiprocessing.Process` and
    `multiprocessing.Pool`, and what is built on them, such as `loop.run_in_executor`. What has been carried already is
    left as it is; so is everything while no telemetry is live, and threads of the machinery itself, as a pool's
    threads serve many. Returns a callable that undoes it; calling either twice changes nothing. Neither raises, and
    nothing that worked before raises because of it. Thread-safe.
    """
    with _lock:
        if not _undo:
            for install in (_threads, _process_pools, _processes, _pools):
                with suppress(ImportError, AttributeError):  # a platform without processes, or built otherwise
                    install()
    return _uninstall


def _uninstall() -> None:
    with _lock:
        while _undo:
            _undo.pop()()


def _threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    _patch(ThreadPoolExecutor, "submit", _handing_on)
    _patch(threading.Thread, "start", _starting)


def _process_pools() -> None:
    from concurrent.futures import ProcessPoolExecutor

    _patch(ProcessPoolExecutor, "submit", _handing_on)


def _processes() -> None:
    from multiprocessing.process import BaseProcess

    _patch(BaseProcess, "start", _starting)


def _pools() -> None:
    from multiprocessing.pool import Pool

    for name in ("apply_async", "_map_async", "imap", "imap_unordered"):
        _patch(Pool, name, _handing_on)


def _patch(owner: type, name: str, make: Callable[[Function], Function]) -> None:
    before = vars(owner)[name]
    ours = make(before)
    setattr(owner, name, ours)

    def undo() -> None:
        if vars(owner)[name] is ours:  # else somebody has wrapped it in turn: it stays there, and does nothing
            setattr(owner, name, before)

    _undo.append(undo)


def _handing_on(original: Function) -> Function:
    """Wrap a method whose first argument is a function, to be called elsewhere."""

    @functools.wraps(original)
    def handing_on(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if _undo and live() is not None:
            if args:
                args = (_carried(args[0]), *args[1:])
            elif "func" in kwargs:
                kwargs["func"] = _carried(kwargs["func"])
        return original(self, *args, **kwargs)

    return handing_on


def _starting(original: Function) -> Function:
    """Wrap `start` of a thread or process, which calls its `run` elsewhere."""

    @functools.wraps(original)
    def starting(self: Any) -> Any:
        if not _undo or live() is None or _is_machinery(self) or "run" in vars(self):
            return original(self)
        self.run = _carried(self.run)
        try:
            return original(self)
        finally:
            # By now it has been sent, or looked up, or will be.
            vars(self).pop("run", None)

    return starting


def _is_machinery(worker: Any) -> bool:
    target = getattr(worker, "_target", None)
    module = getattr(type(worker) if target is None else target, "__module__", None)
    return str(module).partition(".")[0] in _MACHINERY


def _carried(fn: Any) -> Any:
    """Return the function carried, unless it is; a part of a pool's `map` wraps it."""
    parts = (fn.func, *fn.args[:1]) if isinstance(fn, functools.partial) else (fn,)
    if any(isinstance(part, Carried) for part in parts):
        return fn
    try:
        return carry(fn)
    except Exception:  # noqa: BLE001 - what is no function is for the original to refuse
        return fn
