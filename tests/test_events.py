"""The event bus: order, time limits, isolation, asynchronous hooks, and an end that can be relied on."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import subprocess
import sys
import threading
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_odibi import events
from otel_odibi.errors import SettingError
from otel_odibi.events import MAX_DEPTH, MAX_HUNG, AutomationHook, Bus, EventPriority

CRITICAL, HIGH, MEDIUM, LOW = EventPriority
ENOUGH = 30.0
"""Longest wait for what must happen, in seconds."""


@pytest.fixture
def make():
    """Make buses that note errors and drops; they are shut down at the end."""
    made = []

    def bus(*args, **options):
        new = Bus(*args, on_error=lambda where, exc: new.errors.append((where, exc)), **options)
        new.errors = []
        made.append(new)
        return new

    yield bus
    for each in made:
        each.shutdown(timeout=0)


@pytest.fixture
def gate():
    """A hook that says when it has begun and waits until it is let go."""

    class Gate:
        def __init__(self):
            self.begun, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()

        def __call__(self, event):
            self.begun.set()
            self.go.wait(ENOUGH)
            self.ended.set()

    made = Gate()
    yield made
    made.go.set()


# --- registering -----------------------------------------------------------------------------------------------------


def test_registering_returns_the_hook(make):
    """The hook says all that was given, and may be listed."""
    bus = make()
    hook = bus.register_hook("e", print, name="shout", priority=HIGH, async_execution=True)
    assert isinstance(hook, AutomationHook)
    assert (hook.name, hook.callback, hook.priority, hook.async_execution, hook.enabled) == (
        "shout",
        print,
        HIGH,
        True,
        True,
    )
    assert bus.get_hooks("e") == [hook]
    assert bus.get_hooks("other") == []


def test_priorities_are_numbers():
    """Lower runs first."""
    assert list(EventPriority) == [0, 1, 2, 3] == [CRITICAL, HIGH, MEDIUM, LOW]


def test_default_names(make):
    """A function has its name, a partial that of its function, an object that of its class."""

    class Notifier:
        def __call__(self, event): ...

        def method(self, event): ...

    def plain(event): ...

    partial = functools.partial(functools.partial(plain))
    names = [make().register_hook("e", each).name for each in (plain, partial, Notifier(), Notifier().method)]
    assert names == ["plain", "plain", "Notifier", "method"]


def test_hooks_may_be_switched_off_and_on_by_name(make):
    """Both tell whether there was such a hook."""
    bus, seen = make(), []
    bus.register_hook("e", seen.append, name="note")
    assert bus.disable_hook("e", "note")
    bus.emit("e")
    assert not seen
    assert not bus.wants("e")
    assert bus.enable_hook("e", "note")
    bus.emit("e")
    assert len(seen) == 1
    assert not bus.disable_hook("e", "other")
    assert not bus.enable_hook("other", "note")


def test_hooks_may_be_cleared(make):
    """For one event, or for all."""
    bus = make()
    for event in "abc":
        bus.register_hook(event, print)
    bus.clear_hooks("a")
    assert [len(bus.get_hooks(event)) for event in "abc"] == [0, 1, 1]
    bus.clear_hooks()
    bus.clear_hooks("a")
    assert [len(bus.get_hooks(event)) for event in "abc"] == [0, 0, 0]


@pytest.mark.parametrize(
    ("wrong", "setting"),
    [
        (lambda: Bus(max_workers=0), "max_workers"),
        (lambda: Bus(queue_limit=0), "queue_limit"),
        (lambda: Bus(execution_timeout=0), "execution_timeout"),
        (lambda: Bus(execution_timeout=float("nan")), "execution_timeout"),
        (lambda: Bus().register_hook("e", "no function"), "callback"),
        (lambda: Bus().register_hook("e", print, priority=9), "priority"),
    ],
)
def test_what_cannot_work_is_refused_early(wrong, setting):
    """The error names the setting."""
    with pytest.raises(SettingError) as caught:
        wrong()
    assert caught.value.name == setting


# --- what a hook sees ------------------------------------------------------------------------------------------------


def test_a_hook_sees_the_event_and_the_callers_data_stays_as_it_was(make):
    """Name and time (UTC) come on top, in a copy for each hook."""
    bus, seen, data = make(), [], {"pipeline_name": "flights"}

    def vandal(event):
        seen.append(dict(event))
        event.clear()

    bus.register_hook("e", vandal)
    bus.register_hook("e", vandal)
    bus.emit("e", data)
    assert data == {"pipeline_name": "flights"}
    assert seen[0] == seen[1]
    assert seen[0]["pipeline_name"] == "flights"
    assert seen[0]["_event_name"] == "e"
    assert datetime.fromisoformat(seen[0]["_event_time"]).utcoffset() == timedelta(0)


def test_data_may_be_left_out_and_what_is_no_mapping_does_not_raise(make):
    """It is reported instead."""
    bus, seen = make(), []
    bus.register_hook("e", seen.append)
    bus.emit("e")
    bus.emit("e", 42)
    assert len(seen) == 1
    assert [where for where, _ in bus.errors] == ["event e"]


def test_hooks_run_in_the_callers_context(make):
    """They see its context variables, current span and all; what they set stays with them."""
    variable = contextvars.ContextVar("variable", default="unset")
    bus, seen = make(), []

    async def coroutine(event):
        seen.append(variable.get())

    def hook(event):
        seen.append(variable.get())
        variable.set("by a hook")

    for callback, in_background in ((hook, False), (hook, False), (coroutine, False), (hook, True)):
        bus.register_hook("e", callback, async_execution=in_background)
    variable.set("by the caller")
    bus.emit("e")
    bus.shutdown()
    assert seen == ["by the caller"] * 4
    assert variable.get() == "by the caller"


# --- order -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(EventPriority)))
def test_synchronous_hooks_run_by_priority_then_in_the_order_of_registration(priorities):
    """And have all run when `emit` returns."""
    bus, seen = Bus(), []
    for number, priority in enumerate(priorities):
        bus.register_hook("e", lambda event, mine=(priority, number): seen.append(mine), priority=priority)
    bus.emit("e")
    assert seen == sorted((priority, number) for number, priority in enumerate(priorities))


def test_an_asynchronous_hook_begins_before_a_synchronous_one_of_lower_priority(make):
    """Priorities hold across both kinds."""
    bus, seen, low = make(), [], threading.Event()

    def critical(event):
        seen.append("critical")
        low.wait(ENOUGH)

    def late(event):
        seen.append("low")
        low.set()

    bus.register_hook("e", late, priority=LOW)
    bus.register_hook("e", critical, priority=CRITICAL, async_execution=True)
    for _ in range(20):
        bus.emit("e")
        low.clear()
    assert seen == ["critical", "low"] * 20


def test_an_asynchronous_hook_does_not_overtake_a_synchronous_one_of_higher_priority(make):
    """It is queued when that has run."""
    bus, seen = make(), []
    bus.register_hook("e", lambda event: seen.append("low"), priority=LOW, async_execution=True)
    bus.register_hook("e", lambda event: seen.append("critical"), priority=CRITICAL)
    bus.emit("e")
    bus.shutdown()
    assert seen == ["critical", "low"]


def test_synchronous_hooks_do_not_wait_for_workers_that_are_all_busy(make, gate):
    """Then the pipeline's time is worth more than the order."""
    bus, seen = make(max_workers=1), []
    bus.register_hook("busy", gate, async_execution=True)
    bus.register_hook("e", lambda event: seen.append("critical"), priority=CRITICAL, async_execution=True)
    bus.register_hook("e", lambda event: seen.append("low"), priority=LOW)
    bus.emit("busy")
    assert gate.begun.wait(ENOUGH)
    bus.emit("e")
    assert seen == ["low"]
    gate.go.set()
    bus.shutdown()
    assert seen == ["low", "critical"]


def test_waiting_asynchronous_hooks_run_by_priority_then_first_come_first_served(make, gate):
    """Seen with one worker."""
    bus, seen = make(max_workers=1), []
    bus.register_hook("busy", gate, async_execution=True)
    bus.emit("busy")
    assert gate.begun.wait(ENOUGH)
    for number, priority in enumerate((LOW, MEDIUM, LOW, CRITICAL)):
        bus.register_hook(f"e{number}", lambda event: seen.append(event["_event_name"]), None, priority, True)
        bus.emit(f"e{number}")
    gate.go.set()
    bus.shutdown()
    assert seen == ["e3", "e1", "e0", "e2"]


def test_no_more_hooks_at_a_time_than_workers(make):
    """Ten hooks on three workers: three have begun together, never four."""
    bus, running, most, lock = make(max_workers=3), [], [], threading.Lock()
    together = threading.Barrier(3, timeout=ENOUGH)

    def hook(event):
        with lock:
            running.append(1)
            most.append(len(running))
        together.wait()
        with lock:
            running.pop()

    bus.register_hook("e", hook, async_execution=True)
    for _ in range(9):
        bus.emit("e")
    bus.shutdown()
    assert max(most) == 3
    assert not bus.errors


# --- isolation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("in_background", [False, True])
def test_what_a_hook_raises_goes_no_further(make, error, in_background):
    """Neither to the caller nor to the other hooks; it is counted and reported."""
    bus, seen = make(), []

    def bad(event):
        raise error

    bus.register_hook("e", bad, priority=HIGH, async_execution=in_background)
    bus.register_hook("e", seen.append)
    bus.emit("e")
    bus.shutdown()
    assert len(seen) == 1
    assert (bus.failed, bus.abandoned) == (1, 0)
    assert bus.errors == [("hook bad", error)]


def test_a_listener_to_errors_that_raises_harms_nobody():
    """There is nobody left to tell."""
    bus = Bus(on_error=lambda where, exc: 1 / 0)
    bus.register_hook("e", lambda event: 1 / 0)
    bus.emit("e")
    assert bus.failed == 1


def test_by_default_a_warning_is_logged_once_a_hook_a_minute(caplog):
    """With the type and the message of the error, secrets redacted."""
    bus = Bus()

    def bad(event):
        raise ValueError("password=hunter2hunter2")

    bus.register_hook("e", bad)
    bus.register_hook("e", bad, name="other")
    bus.emit("e")
    bus.emit("e")
    assert [record.getMessage() for record in caplog.records] == [
        "hook bad: ValueError: password=[redacted]",
        "hook other: ValueError: password=[redacted]",
    ]
    assert bus.failed == 4


# --- time limits -----------------------------------------------------------------------------------------------------


def test_a_synchronous_hook_over_its_time_is_left_behind_and_the_others_go_on(make, gate):
    """`emit` returns though the hook has not; what comes back late runs nothing twice."""
    bus, seen = make(execution_timeout=0.05), []
    for name, callback in (("first", seen.append), ("hung", gate), ("last", seen.append)):
        bus.register_hook("e", callback, name=name)
    bus.emit("e")
    assert not gate.ended.is_set()
    assert len(seen) == 2
    assert bus.abandoned == 1
    where, error = bus.errors[0]
    assert where == "hook hung"
    assert isinstance(error, TimeoutError)
    gate.go.set()
    bus.shutdown()
    assert gate.ended.wait(ENOUGH)
    assert len(seen) == 2
    assert (bus.abandoned, bus.failed) == (1, 0)


def test_an_asynchronous_hook_over_its_time_gives_its_worker_back(make, gate):
    """The one worker goes on with what waits."""
    bus, done = make(max_workers=1, execution_timeout=0.05), threading.Event()
    bus.register_hook("e", gate, async_execution=True)
    bus.register_hook("e", lambda event: done.set(), async_execution=True)
    bus.emit("e")
    assert done.wait(ENOUGH)
    assert not gate.ended.is_set()
    assert bus.abandoned == 1


def test_a_hook_that_hangs_every_time_is_passed_over(make, gate):
    """So that the threads left behind are few; once they are back it is called again."""
    bus, calls = make(execution_timeout=0.01), []

    def hung(event):
        calls.append(1)
        gate(event)

    hook = bus.register_hook("e", hung)
    for _ in range(MAX_HUNG + 3):
        bus.emit("e")
    assert len(calls) == MAX_HUNG
    assert bus.abandoned == MAX_HUNG + 3
    gate.go.set()
    while hook.hung:
        gate.ended.wait(0.001)
    bus.emit("e")
    assert len(calls) == MAX_HUNG + 1


# --- async def -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_background", [False, True])
def test_coroutine_functions_are_awaited(make, in_background):
    """Also as a partial, and as an object whose `__call__` is one."""
    bus, seen = make(), []

    async def plain(event, note="plain"):
        await asyncio.sleep(0)
        seen.append(note)

    class Notifier:
        async def __call__(self, event):
            await plain(event, "object")

    for callback in (plain, functools.partial(plain, note="partial"), Notifier(), lambda event: plain(event, "lambda")):
        bus.register_hook("e", callback, async_execution=in_background)
    bus.emit("e")
    if in_background:
        bus.shutdown()
    assert sorted(seen) == ["lambda", "object", "partial", "plain"]
    assert not bus.errors


@pytest.mark.parametrize("in_background", [False, True])
def test_a_coroutine_over_its_time_is_cancelled(make, in_background):
    """Really: it runs its `finally`. It counts as abandoned, not as failed."""
    bus, cleaned = make(execution_timeout=0.05), threading.Event()

    async def forever(event):
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    bus.register_hook("e", forever, async_execution=in_background)
    bus.emit("e")
    assert cleaned.wait(ENOUGH if in_background else 0)
    bus.shutdown()
    assert (bus.abandoned, bus.failed) == (1, 0)


def test_a_coroutine_that_ignores_its_cancellation_is_left_behind(make):
    """After a moment of grace."""
    bus, go, seen = make(execution_timeout=0.01), threading.Event(), []

    async def stubborn(event):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            go.wait(ENOUGH)

    bus.register_hook("e", stubborn)
    bus.register_hook("e", seen.append)
    bus.emit("e")
    go.set()
    assert len(seen) == 1
    assert (bus.abandoned, bus.failed) == (1, 0)


def test_a_timeout_of_the_coroutines_own_is_a_failure(make):
    """It is not mistaken for ours."""
    bus = make()

    async def impatient(event):
        raise asyncio.TimeoutError

    bus.register_hook("e", impatient)
    bus.emit("e")
    assert (bus.abandoned, bus.failed) == (0, 1)


def test_hooks_run_where_an_event_loop_is_running_already(make):
    """A coroutine hook of an event emitted from a coroutine has a loop of its own."""
    bus, seen = make(), []

    async def hook(event):
        seen.append(1)

    async def main():
        bus.emit("e")

    bus.register_hook("e", hook)
    asyncio.run(main())
    assert seen == [1]


# --- events within events --------------------------------------------------------------------------------------------


def test_a_hook_may_emit(make):
    """Deeper than there are workers, and synchronously all the way."""
    bus, seen = make(max_workers=1), []
    for number in range(MAX_DEPTH - 1):
        bus.register_hook(f"e{number}", lambda event, following=number + 1: bus.emit(f"e{following}"))
    bus.register_hook(f"e{MAX_DEPTH - 1}", seen.append)
    bus.emit("e0")
    assert len(seen) == 1
    assert not bus.errors


@pytest.mark.parametrize("in_background", [False, True])
def test_an_event_that_emits_itself_comes_to_an_end(make, in_background):
    """And is reported."""
    bus, calls = make(), []

    def echo(event):
        calls.append(1)
        bus.emit("e")

    bus.register_hook("e", echo, async_execution=in_background)
    bus.emit("e")
    while not bus.errors:
        threading.Event().wait(0.001)
    assert len(calls) == MAX_DEPTH
    assert isinstance(bus.errors[0][1], RecursionError)


# --- the queue -------------------------------------------------------------------------------------------------------


def test_a_full_queue_drops_the_newest_of_the_lowest_priority(make, gate):
    """And counts it."""
    drops, seen = [], []
    bus = make(max_workers=1, queue_limit=2, on_drop=lambda reason, count: drops.append((reason, count)))
    bus.register_hook("busy", gate, async_execution=True)
    bus.emit("busy")
    assert gate.begun.wait(ENOUGH)
    for event, priority in (("a", LOW), ("b", LOW), ("c", CRITICAL)):
        bus.register_hook(event, lambda event: seen.append(event["_event_name"]), None, priority, True)
        bus.emit(event)
    assert bus.dropped == 1
    assert drops == [("queue_full", 1)]
    gate.go.set()
    bus.shutdown()
    assert seen == ["c", "a"]


def test_work_may_be_deferred_to_the_workers(make):
    """It is bounded, isolated and waited for as hooks are."""
    bus, seen = make(), []
    bus.defer("work", lambda: seen.append(1))
    bus.defer("bad", lambda: 1 / 0)
    bus.shutdown()
    assert seen == [1]
    assert [where for where, _ in bus.errors] == ["hook bad"]


# --- the end ---------------------------------------------------------------------------------------------------------


def test_shutdown_waits_for_what_runs_and_what_waits(make):
    """Everything emitted before it is done after it."""
    bus, seen = make(max_workers=2), []
    bus.register_hook("e", lambda event: seen.append(event["n"]), async_execution=True)
    for number in range(100):
        bus.emit("e", {"n": number})
    bus.shutdown()
    assert sorted(seen) == list(range(100))
    assert (bus.abandoned, bus.dropped) == (0, 0)


def test_after_shutdown_nothing_happens(make):
    """`emit` is silent, a second shutdown too."""
    bus, seen = make(), []
    bus.register_hook("e", seen.append)
    bus.shutdown()
    assert bus.emit("e") is None
    bus.shutdown()
    assert not seen
    assert not bus.wants("e")
    assert not bus.errors


def test_shutdown_abandons_what_takes_too_long_and_counts_it_once(make, gate):
    """The hook that runs, and the two that wait; they are never run."""
    bus, seen = make(max_workers=1), []
    bus.register_hook("e", gate, async_execution=True)
    bus.register_hook("e", seen.append, async_execution=True)
    bus.register_hook("e", seen.append, async_execution=True)
    bus.emit("e")
    assert gate.begun.wait(ENOUGH)
    bus.shutdown(timeout=0.01)
    assert bus.abandoned == 3
    assert [where for where, _ in bus.errors] == ["shutdown"]
    gate.go.set()
    assert gate.ended.wait(ENOUGH)
    assert not seen


def test_a_hook_may_shut_its_bus_down(make):
    """It does not wait for itself, and the hooks after it run."""
    bus, seen = make(), []
    bus.register_hook("e", lambda event: bus.shutdown())
    bus.register_hook("e", seen.append)
    bus.emit("e")
    assert len(seen) == 1
    assert bus.abandoned == 0


def test_many_threads_emit_while_others_register_and_shut_down(make):
    """Nothing is lost before the end, nothing raises after it."""
    bus, seen, errors = make(), [], []
    bus.register_hook("e", lambda event: seen.append(1))
    bus.register_hook("e", lambda event: seen.append(2), async_execution=True)

    def work():
        try:
            for _ in range(50):
                bus.emit("e")
                bus.register_hook("other", print)
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ENOUGH)
    bus.shutdown()
    assert not errors
    assert (seen.count(1), seen.count(2)) == (400, 400)
    assert len(bus.get_hooks("other")) == 400


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_fresh_threads_and_locks(make, gate):
    """Though the parent's lock was held and its worker busy at that moment."""
    bus = make(max_workers=1)
    bus.register_hook("busy", gate, async_execution=True)
    bus.register_hook("e", lambda event: event["seen"].append("sync"))
    bus.register_hook("e", lambda event: event["seen"].append("async"), async_execution=True)
    bus.emit("busy")
    bus.emit("e", {"seen": []})
    assert gate.begun.wait(ENOUGH)
    with bus._lock:
        child = os.fork()
        if not child:
            seen = []
            bus.emit("e", {"seen": seen})
            bus.shutdown(ENOUGH)
            os._exit(0 if seen == ["sync", "async"] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_do_not_keep_the_interpreter_alive():
    """A program with a hook that hangs, in either way, ends; and hooks run while it ends."""
    program = """if True:
        import atexit, sys, threading
        from otel_odibi.events import Bus
        bus = Bus(execution_timeout=0.05)
        bus.register_hook("hang", lambda event: threading.Event().wait())
        bus.register_hook("hang", lambda event: threading.Event().wait(), async_execution=True)
        bus.register_hook("end", lambda event: print("end"))
        atexit.register(lambda: bus.emit("end"))
        bus.emit("hang")
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "end\n"


def test_hooks_run_in_the_caller_where_no_thread_can_be_had(make, monkeypatch):
    """As while the interpreter ends, from Python 3.12 on."""

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(events, "_idle", [])
    monkeypatch.setattr(events._Thread, "start", refuse)
    bus, seen = make(), []
    bus.register_hook("e", lambda event: seen.append(threading.current_thread()))
    bus.register_hook("e", lambda event: seen.append(threading.current_thread()), async_execution=True)
    bus.emit("e")
    assert seen == [threading.current_thread()] * 2


def test_buses_share_threads(make):
    """A second bus does not start new ones where idle ones are."""
    threads = []
    for _ in range(3):
        bus = make()
        bus.register_hook("e", lambda event: threads.append(threading.current_thread()))
        bus.emit("e")
        while threads[-1] not in events._idle:
            threading.Event().wait(0.001)
    assert len(set(threads)) == 1


def test_threads_that_are_idle_for_long_end(monkeypatch):
    """A bus that is forgotten leaves none behind."""
    monkeypatch.setattr(events, "_IDLE_SECONDS", 0.001)
    monkeypatch.setattr(events, "_idle", [])
    threads, bus = [], Bus()
    bus.register_hook("e", lambda event: threads.append(threading.current_thread()))
    for _ in range(20):
        bus.emit("e")
    for thread in threads:
        thread.join(ENOUGH)
        assert not thread.is_alive()
    assert len(threads) == 20
