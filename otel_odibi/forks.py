"""Who has to start afresh in a forked child: locks that a thread held which the child does not have, files, queues."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import MethodType
from typing import Any, Final, cast

_followers: Final[weakref.WeakKeyDictionary[Any, list[Callable[[Any], object]]]] = weakref.WeakKeyDictionary()


def after_fork(method: Callable[[], object]) -> None:
    """Call a bound method in every forked child, as long as its object lives. Thread-safe."""
    bound = cast(MethodType, method)
    _followers.setdefault(bound.__self__, []).append(bound.__func__)


def _in_child() -> None:
    for follower, functions in list(_followers.items()):
        for function in functions:
            with suppress(Exception):  # one that fails must not keep the others from their new locks
                function(follower)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
