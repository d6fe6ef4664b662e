"""The event bus: whoever registered a hook for an event is called when it is emitted, in order of priority.

Hooks run on other threads while somebody waits, as a limit on their time cannot be kept otherwise: for synchronous
hooks the caller waits, for asynchronous ones a worker. The stock hooks are in `hooks`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import IntEnum
from typing import Any, Final

from otel_odibi import names
from otel_odibi.clean import DEFAULT
from otel_odibi.errors import SettingError
from otel_odibi.forks import after_fork

Callback = Callable[[dict[str, Any]], Any]

PATIENCE: Final = (0.01, 1.0)
"""Longest wait for asynchronous hooks of higher priority to begin, in seconds: where all workers are busy, else."""
GRACE: Final = 0.1
"""Time a cancelled coroutine has to clean up before its thread is left behind, in seconds."""
MAX_HUNG: Final = 4
"""Executions of one hook that may hang at a time; it is passed over until one of them comes back."""
MAX_DEPTH: Final = 8
"""Events emitted from within hooks of events, and so on."""
_IDLE_SECONDS: Final = 10.0
_IDLE_THREADS: Final = 8
_depth: ContextVar[int] = ContextVar("otel_odibi_event_depth", default=0)


class EventPriority(IntEnum):
    """When a hook runs among those of one event: lower runs first."""

    CRITICAL = 0
    HIGH = 1
    MEDIUM = 2
    LOW = 3


@dataclass(slots=True, eq=False)
class AutomationHook:
    """A registered hook. `enabled` may be changed at any time and is looked at when the event is emitted."""

    name: str
    callback: Callback
    priority: EventPriority = EventPriority.MEDIUM
    async_execution: bool = False
    enabled: bool = True
    hung: int = field(default=0, init=False, repr=False)


class _Thread(threading.Thread):
    """A daemon thread that does one piece of work after another; idle for long, it ends."""

    def __init__(self) -> None:
        super().__init__(name="otel-odibi-hooks", daemon=True)
        self._ready = threading.Lock()
        self._ready.acquire()

    def give(self, work: Callable[[], None]) -> None:
        self._work = work
        self._ready.release()

    def run(self) -> None:
        while self._waited():
            self._work()
            del self._work
            if len(_idle) >= _IDLE_THREADS:
                return
            _idle.append(self)

    def _waited(self) -> bool:
        if self._ready.acquire(timeout=_IDLE_SECONDS):
            return True
        try:
            _idle.remove(self)
        except ValueError:  # taken from the idle ones this moment: work is on its way
            return self._ready.acquire()
        return False


_idle: Final[list[_Thread]] = []


def _on_thread(work: Callable[[], None]) -> None:
    """Do `work` on another thread. Raises RuntimeError where none can be had, as while the interpreter ends."""
    try:
        thread = _idle.pop()
    except IndexError:
        thread = _Thread()
        thread.start()
    thread.give(work)


@dataclass(slots=True, eq=False)
class _Emission:
    """The hooks of one event on their way, or the one hook of a job for an asynchronous worker."""

    hooks: Iterator[AutomationHook]
    data: dict[str, Any]
    context: Context
    began: threading.Event | None = None  # of a job: whether its hook has begun
    queued: list[tuple[EventPriority, threading.Event, float]] = field(default_factory=list)
    done: threading.Lock = field(default_factory=threading.Lock)
    # Until when the hook under way may run, and itself: in a list that holds it until it returns or is left behind.
    running: tuple[float, list[AutomationHook]] = (0.0, [])

    def let_begin(self, priority: EventPriority) -> None:
        """Wait a while until the asynchronous hooks of higher priority have begun."""
        for other, began, patience in self.queued:
            if other < priority and not began.wait(patience):
                break
        self.queued = [each for each in self.queued if each[0] >= priority]

    def call(self, hook: AutomationHook, deadline: float, running: list[AutomationHook]) -> None:
        """Call the hook with a copy of the data, and await what it returns where that can be. Raises what it raises."""
        if self.began is not None:
            self.began.set()
        result = hook.callback(dict(self.data))
        if result is not None and inspect.isawaitable(result):
            import asyncio  # 20 ms, for those who use it

            if running:
                self.running = deadline + GRACE, running
            asyncio.run(asyncio.wait_for(result, max(0.0, deadline - time.monotonic())))


class Bus:
    """Registers hooks and calls them. Thread-safe; safe across fork; `emit` never raises.

    A hook may take `execution_timeout` seconds; then a coroutine is cancelled, and any other hook left behind on its
    thread, as no thread can be stopped, while those after it go on. Asynchronous hooks run at most `max_workers` at a
    time; of more than `queue_limit` waiting ones the newest of the lowest priority is dropped. Counters: `failed`
    (hooks that raised), `abandoned` (over their time, or not done at shutdown), `dropped`. `on_error(where, exc)` is
    told of every failure and abandonment (by default a warning is logged, once a hook a minute), `on_drop(reason, 1)`
    of every drop, `on_first_hook()` when somebody begins to listen. Raises `SettingError` for limits that cannot work.
    """

    def __init__(
        self,
        max_workers: int = 4,
        execution_timeout: float = 30.0,
        *,
        queue_limit: int = 1_000,
        on_error: Callable[[str, BaseException], None] | None = None,
        on_drop: Callable[[str, int], None] | None = None,
        on_first_hook: Callable[[], None] | None = None,
    ) -> None:
        for setting, value in (("max_workers", max_workers), ("queue_limit", queue_limit)):
            if not isinstance(value, int) or value < 1:
                raise SettingError(setting, value, "not a number above 0", "give a whole number of at least 1")
        if not 0 < execution_timeout <= threading.TIMEOUT_MAX / 2:
            raise SettingError("execution_timeout", execution_timeout, "not a time", "give seconds above 0")
        self.max_workers, self.execution_timeout = max_workers, execution_timeout
        self.failed = self.abandoned = self.dropped = 0
        self._queue_limit, self._on_drop, self._on_first_hook = queue_limit, on_drop, on_first_hook
        self._on_error = on_error or self._warn
        self._warned: dict[str, float] = {}
        self._hooks: dict[str, tuple[AutomationHook, ...]] = {}
        self._closed = False
        self._reset()
        after_fork(self._forked)

    def _forked(self) -> None:
        _idle.clear()
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._calm = threading.Condition(self._lock)
        self._queues: tuple[deque[_Emission], ...] = tuple(deque() for _ in EventPriority)
        self._going: set[_Emission] = set()
        self._workers = 0

    # --- hooks -------------------------------------------------------------------------------------------------------

    def register_hook(
        self,
        event_name: str,
        callback: Callback,
        name: str | None = None,
        priority: EventPriority = EventPriority.MEDIUM,
        async_execution: bool = False,
    ) -> AutomationHook:
        """Have `callback` called with the data of every event of this name: any callable, `async def` too.

        By default its name is that of the function (of a `partial`, of the function inside) or of the object's class.
        Raises `SettingError` for what cannot be called and for unknown priorities.
        """
        if not callable(callback):
            raise SettingError("callback", callback, "cannot be called", "give a function")
        if priority not in tuple(EventPriority):
            raise SettingError("priority", priority, "unknown", "give an EventPriority")
        hook = AutomationHook(name or _name_of(callback), callback, EventPriority(priority), bool(async_execution))
        with self._lock:
            hooks = (*self._hooks.get(event_name, ()), hook)
            self._hooks[event_name] = tuple(sorted(hooks, key=lambda each: each.priority))
            first, self._on_first_hook = self._on_first_hook, None
        if first is not None:
            first()
        return hook

    def enable_hook(self, event_name: str, hook_name: str) -> bool:
        """Switch the hooks of this name on; False where there is none."""
        return self._switch(event_name, hook_name, True)

    def disable_hook(self, event_name: str, hook_name: str) -> bool:
        """Switch the hooks of this name off; False where there is none."""
        return self._switch(event_name, hook_name, False)

    def _switch(self, event_name: str, hook_name: str, enabled: bool) -> bool:
        found = [hook for hook in self.get_hooks(event_name) if hook.name == hook_name]
        for hook in found:
            hook.enabled = enabled
        return bool(found)

    def clear_hooks(self, event_name: str | None = None) -> None:
        """Forget the hooks of an event, or of all."""
        with self._lock:
            for name in list(self._hooks) if event_name is None else [event_name]:
                self._hooks.pop(name, None)

    def get_hooks(self, event_name: str) -> list[AutomationHook]:
        """Return the hooks of an event, in the order in which they run."""
        return list(self._hooks.get(event_name, ()))

    def wants(self, event_name: str) -> bool:
        """Tell whether anybody would be called for this event."""
        hooks = self._hooks.get(event_name)
        return hooks is not None and not self._closed and any(hook.enabled for hook in hooks)

    # --- events ------------------------------------------------------------------------------------------------------

    def emit(self, event_name: str, event_data: Mapping[str, Any] | None = None) -> None:
        """Call the hooks of an event. Synchronous ones have run when this returns, or were over their time.

        Each gets its own copy of the data, one level deep, with `_event_name` and `_event_time` (ISO 8601, UTC), and a
        copy of the caller's context variables. An asynchronous hook of higher priority has begun before a synchronous
        one of lower priority runs, unless every worker is busy. After `shutdown()` nothing happens. Never raises.
        """
        hooks = self._hooks.get(event_name)
        if hooks and not self._closed:
            try:
                self._emit(event_name, event_data or {}, [hook for hook in hooks if hook.enabled])
            except Exception as exc:  # noqa: BLE001 - such as data that is no mapping
                self.report(f"event {event_name}", exc)

    def _emit(self, event_name: str, event_data: Mapping[str, Any], hooks: list[AutomationHook]) -> None:
        depth = _depth.get()
        if hooks and depth >= MAX_DEPTH:
            raise RecursionError(f"{depth} events were emitted from within each other's hooks")
        context = copy_context()
        context.run(_depth.set, depth + 1)
        now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        emission = _Emission(iter(hooks), {**event_data, "_event_name": event_name, "_event_time": now}, context)
        if all(hook.async_execution for hook in hooks):
            self._walk(emission)
        else:
            with self._lock:
                self._going.add(emission)
            self._perform(emission)

    def _perform(self, emission: _Emission) -> None:
        """Have a thread go through the hooks, and wait; what is over its time is left behind, and another goes on."""
        emission.done.acquire()
        walk = functools.partial(self._walk, emission)
        try:
            self._start(walk)
            while not emission.done.acquire(timeout=max(0.001, emission.running[0] - time.monotonic())):
                deadline, running = emission.running
                hook = _taken(running) if time.monotonic() >= deadline else None
                if hook is not None:
                    self._abandon(hook, emission, f"was left behind after {self.execution_timeout:g} s", hung=1)
                    self._start(walk)
        finally:
            with self._lock:
                self._going.discard(emission)
                self._calm.notify_all()

    def _start(self, work: Callable[[], None]) -> None:
        try:
            _on_thread(work)
        except RuntimeError:  # then here, without a limit on the time
            work()

    def _walk(self, emission: _Emission) -> None:
        for hook in emission.hooks:
            if hook.async_execution and emission.began is None:
                self._enqueue(hook, emission)
            elif hook.hung >= MAX_HUNG:
                self._abandon(hook, emission, f"was passed over, as {hook.hung} of its executions hang")
            elif not self._call(hook, emission):
                return
        if emission.done.locked():
            emission.done.release()

    def _call(self, hook: AutomationHook, emission: _Emission) -> bool:
        """Call a hook; False where it returned too late, and another thread goes on with the rest."""
        emission.let_begin(hook.priority)
        error: BaseException | None = None
        deadline, running = emission.running = time.monotonic() + self.execution_timeout, [hook]
        try:
            emission.context.copy().run(emission.call, hook, deadline, running)
        except BaseException as exc:  # noqa: BLE001 - SystemExit too ends no more than the hook
            error = exc
        if _taken(running) is None:
            with self._lock:
                hook.hung -= 1
            return False
        if error is not None and time.monotonic() >= deadline:
            self._abandon(hook, emission, f"was cancelled after {self.execution_timeout:g} s")
        elif error is not None:
            self.report(f"hook {hook.name}", error)
        return True

    # --- asynchronous hooks ------------------------------------------------------------------------------------------

    def defer(self, name: str, work: Callable[[], object]) -> None:
        """Do `work` as an asynchronous hook of high priority would be run; `shutdown()` waits for it too."""
        hook = AutomationHook(name, lambda data: work(), EventPriority.HIGH, async_execution=True)
        self._enqueue(hook, _Emission(iter(()), {}, copy_context()))

    def _enqueue(self, hook: AutomationHook, emission: _Emission) -> None:
        began = threading.Event()
        job = _Emission(iter((hook,)), emission.data, emission.context, began)
        with self._lock:
            self._queues[hook.priority].append(job)
            self._going.add(job)
            starts = self._workers < self.max_workers
            self._workers += starts
            full = sum(map(len, self._queues)) > self._queue_limit
            if full:
                self._going.discard(next(filter(None, reversed(self._queues))).pop())
                self.dropped += 1
        emission.queued.append((hook.priority, began, PATIENCE[starts]))
        if full:
            self._tell(self._on_drop, "queue_full", 1)
        if starts:
            self._start(self._work)

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            self._perform(job)

    def _next_job(self) -> _Emission | None:
        with self._lock:
            queue = next(filter(None, self._queues), None)
            if queue:
                return queue.popleft()
            self._workers -= 1
            return None

    # --- the end, and troubles ---------------------------------------------------------------------------------------

    def shutdown(self, timeout: float | None = None) -> None:
        """Take no more events; wait for the hooks that run or are queued, `execution_timeout` or `timeout` seconds.

        What is not done then is abandoned and counted. Called from within a hook it does not wait for that hook.
        Idempotent; never raises. No thread keeps the interpreter alive.
        """
        seconds, own = self.execution_timeout if timeout is None else timeout, _depth.get()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._calm.wait_for(lambda: len(self._going) <= own, seconds):
                return
            left = len(self._going) - own
            self.abandoned += left
            self._going.clear()
            for queue in self._queues:
                queue.clear()
        self._tell(self._on_error, "shutdown", TimeoutError(f"{left} hooks were not done within {seconds:g} s"))

    def _abandon(self, hook: AutomationHook, emission: _Emission, problem: str, hung: int = 0) -> None:
        with self._lock:
            hook.hung += hung
            if emission not in self._going:  # shutdown() has counted it
                return
            if emission.began is not None:  # a job has no other hook
                self._going.discard(emission)
            self.abandoned += 1
        self._tell(self._on_error, f"hook {hook.name}", TimeoutError(problem))

    def report(self, where: str, exc: BaseException) -> None:
        """Count a failure and tell `on_error`. Never raises."""
        with self._lock:
            self.failed += 1
        self._tell(self._on_error, where, exc)

    @staticmethod
    def _tell(listener: Callable[..., None] | None, *args: object) -> None:
        try:
            if listener is not None:
                listener(*args)
        except Exception:  # noqa: BLE001, S110 - there is nobody left to tell
            pass

    def _warn(self, where: str, exc: BaseException) -> None:
        now = time.monotonic()
        if now >= self._warned.get(where, 0.0):
            self._warned[where] = now + 60
            text = DEFAULT.text(f"{type(exc).__name__}: {exc}", 500)
            logging.getLogger(names.SCOPE).warning("%s: %s", where, text)


def _taken(running: list[AutomationHook]) -> AutomationHook | None:
    """Take the hook: who gets it, the thread it ran on or the one that waited, goes on. `list.pop` is atomic."""
    try:
        return running.pop()
    except IndexError:
        return None


def _name_of(callback: object) -> str:
    while isinstance(callback, functools.partial):
        callback = callback.func
    name = getattr(callback, "__name__", None)
    return name if isinstance(name, str) else type(callback).__name__
