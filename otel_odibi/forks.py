"""Who has to start afresh in a forked child: locks that a thread held which the child does not have, files, queues."""

from __future__ import annotations

import importlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import MethodType
from typing import Any, Final, cast

_followers: Final[weakref.WeakKeyDictionary[Any, list[Callable[[Any], object]]]] = weakref.WeakKeyDictionary()
_guards: Final[weakref.WeakSet[ForkGuard]] = weakref.WeakSet()
_held: Final = threading.local()
_PATIENCE: Final = 0.5
_IMPORTED_LATE: Final = ("structlog", "pyarrow", "opentelemetry", "google", "grpc", "otel_odibi")
_bootstrap: Final[Any] = importlib._bootstrap


def after_fork(method: Callable[[], object]) -> None:
    """Call a bound method in every forked child, as long as its object lives. Thread-safe."""
    bound = cast(MethodType, method)
    _followers.setdefault(bound.__self__, []).append(bound.__func__)


class ForkGuard:
    """A reentrant lock that forks wait for: a child, which has a new one, is not to be made within what holds it.

    All together they are waited for half a second. `close` is called before every fork, at the latest then: it is to
    end what goes on, and leave nothing open that a child must not have.
    """

    def __init__(self, close: Callable[[], object] = lambda: None) -> None:
        self.close = close
        self.lock = threading.RLock()
        _guards.add(self)


arrow: Final = ForkGuard()
"""Held while a thread is inside of pyarrow, which has locks that a child would find held for ever."""


def _half_imported() -> bool:
    """Tell whether another thread imports what this package does: such a module's lock is never free in a child."""
    locks = ((name.partition(".")[0], ref()) for name, ref in list(_bootstrap._module_locks.items()))
    here = (None, threading.get_ident())
    return any(lock is not None and lock.owner not in here for name, lock in locks if name in _IMPORTED_LATE)


def _before() -> None:
    _held.locks, began = [], time.monotonic()
    with suppress(Exception):  # of a Python that imports in another way
        while _half_imported() and time.monotonic() < began + 4 * _PATIENCE:
            time.sleep(0.001)
    deadline = time.monotonic() + _PATIENCE
    for guard in list(_guards):
        with suppress(Exception):
            if not guard.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                guard.close()
                if not guard.lock.acquire(timeout=_PATIENCE):
                    continue
            _held.locks.append(guard.lock)
            guard.close()


def _in_parent() -> None:
    for lock in _held.locks:
        lock.release()


def _in_child() -> None:
    for guard in list(_guards):
        guard.lock = threading.RLock()
    for follower, functions in list(_followers.items()):
        for function in functions:
            with suppress(Exception):  # one that fails must not keep the others from their new locks
                function(follower)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
