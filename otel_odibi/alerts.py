"""Alerts: told once when a pipeline goes wrong, and once when it is well again.

What was told is kept in small files under a lock, one for each alert, pipeline and condition, so that a failure that
repeats in another process stays quiet as well.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson
from opentelemetry.instrumentation.utils import suppress_instrumentation

from otel_odibi.channels import Email, Webhook, problem_of
from otel_odibi.clean import DEFAULT, REDACTED, Cleaner
from otel_odibi.errors import SettingError
from otel_odibi.events import Bus
from otel_odibi.exporters.files import make_directory
from otel_odibi.exporters.segments import acquire, release, safe_name
from otel_odibi.forks import after_fork
from otel_odibi.names import FAILURE, SUCCESS

Event = Mapping[str, Any]
Condition = Callable[[Event], "bool | str | None"]

LOCK_SECONDS: Final = 1.0
"""Longest wait for another process that looks at the same alert."""
_FIRST_PAUSE: Final = 0.5
# A source of its own: a program that has seeded `random` counts on the numbers to come.
_jitter: Final = random.Random().uniform  # noqa: S311
_TOLD: Final = ("node_name", "run_id", "trace_id", "failed_nodes", "failed_count", "error_type", "error", "duration_ms")


# --- conditions: they return what is wrong, "" where all is well, None where the event does not say ------------------


def failed_nodes(event: Event) -> int:
    """Return how many nodes failed; at least 1 for a failure that does not say so."""
    count = event.get("failed_count", len(event.get("failed_nodes") or ())) or 0
    return int(count or event.get("outcome") == FAILURE or str(event.get("_event_name")).endswith("_failed"))


def _failed_nodes(event: Event, limit: float) -> str:
    failed = failed_nodes(event)
    return f"{failed} node{'s' * (failed != 1)} failed" if failed >= limit else ""


def _duration_over(event: Event, limit: float) -> str | None:
    if event.get("duration_ms") is None:
        return None
    seconds = event["duration_ms"] / 1000
    return f"took {seconds:.1f} s, more than {limit:g} s" if seconds > limit else ""


def _rows_under(event: Event, limit: float) -> str | None:
    rows = event.get("rows_out", event.get("rows"))
    return None if rows is None else f"{rows} rows, fewer than {limit:g}" if rows < limit else ""


CONDITIONS: Final[Mapping[str, Callable[[Event, float], str | None]]] = {
    "failed_nodes": _failed_nodes,
    "duration_over": _duration_over,
    "rows_under": _rows_under,
}


def _condition(condition: str | Condition | None, value: float | None, threshold: float) -> tuple[str, Condition]:
    if callable(condition):
        return getattr(condition, "__name__", "condition"), condition
    kind = condition or "failed_nodes"
    check = CONDITIONS.get(kind)
    if check is None:
        raise SettingError("condition", condition, "unknown", f"choose from {', '.join(CONDITIONS)} or give a function")
    limit = threshold if value is None and kind == "failed_nodes" else value
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 0:
        raise SettingError("value", limit, f"no limit for {kind}", "give a number: of nodes, of seconds or of rows")
    return kind, lambda event: check(event, limit)


# --- what was told ---------------------------------------------------------------------------------------------------


class _Memory:
    """What was told, by key: in files for all processes where there is a directory, else in this process alone."""

    def __init__(self, directory: Path | None, on_error: Callable[[str, BaseException], None]) -> None:
        self._directory, self._on_error = directory, on_error
        self._own: dict[str, dict[str, float]] = {}
        self._reset()
        after_fork(self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()

    def knows(self, key: str) -> bool:
        """Tell whether there may be an entry."""
        return bool(self._own.get(key)) or (self._directory is not None and self._path(self._directory, key).exists())

    @contextlib.contextmanager
    def entry(self, key: str) -> Iterator[dict[str, float]]:
        """Give the entry of a key to read and change, which nobody else does meanwhile. Raises nothing of its own."""
        with self._lock:
            entry = self._own.setdefault(key, {})
            fd = None
            try:
                fd = self._open(key)
                if fd is not None:
                    entry.clear()
                    entry.update(_parsed(os.read(fd, 4096)))
            except OSError as exc:
                self._on_error("alert state", exc)
            try:
                yield entry
            finally:
                if fd is not None:
                    _replace(fd, orjson.dumps(entry))
                    release(fd)

    @staticmethod
    def _path(directory: Path, key: str) -> Path:
        return directory / f"{safe_name(key)}.json"

    def _open(self, key: str) -> int | None:
        if self._directory is None:
            return None
        until = time.monotonic() + LOCK_SECONDS
        make_directory(self._directory)
        while (fd := acquire(self._path(self._directory, key), os.O_RDWR | os.O_CREAT)) is None:
            if time.monotonic() > until:
                raise TimeoutError("another process holds it")
            time.sleep(0.005)
        return fd


def _replace(fd: int, text: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk: then an alert may be told twice
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, text)


def _parsed(text: bytes) -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in orjson.loads(text).items()}
    except (ValueError, TypeError, AttributeError):  # new, or cut short by a crash: better told twice than never
        return {}


class _Courier:
    """Takes notices to one channel, one after the other, so that a recovery never overtakes its alert."""

    def __init__(self, channel: Webhook | Email) -> None:
        self.channel = channel
        self.waiting: deque[tuple[str, dict[str, Any]]] = deque()
        self._reset()
        after_fork(self._reset)

    def _reset(self) -> None:
        self.lock = threading.Lock()
        self.waiting.clear()  # the parent has them


class Alert:
    """A hook that tells what its condition finds, and when that is over. Made by `EventBus.create_alert_hook`.

    `condition` is `failed_nodes` (by default, from `threshold_failed` or `value` on), `duration_over` (`value` in
    seconds), `rows_under` (`value` in rows), or a function that gets the event and returns whether, or in words why, to
    alert. Notices have pipeline, run id, trace id, failed nodes and error, secrets redacted. They go to the console, by
    `webhook` (a URL; `webhook_format` slack or json), by `email` (an `Email`, or a mapping of its fields).

    One alert for one pipeline is told once in `quiet_seconds`, by whichever of the processes that share `state_dir`
    (without one: by this object), and its end once, unless `recovery` is false. Deliveries are left to the bus, so
    emitting never waits for them: up to `retries` more tries of `timeout` seconds, `execution_timeout` of the bus in
    all. `pipeline` limits it to one pipeline; with `on` it tells of that event alone, others only end it.

    Thread-safe. Raises `SettingError` for what cannot work; called, what a function given as condition raises.
    """

    needs_files = False

    def __init__(
        self,
        bus: Bus,
        threshold_failed: int = 1,
        *,
        condition: str | Condition | None = None,
        value: float | None = None,
        webhook: str | None = None,
        webhook_format: str = "slack",
        email: Email | Mapping[str, Any] | None = None,
        console: bool = True,
        quiet_seconds: float = 3600.0,
        state_dir: str | os.PathLike[str] | None = None,
        name: str | None = None,
        retries: int = 3,
        timeout: float = 10.0,
        recovery: bool = True,
        pipeline: str | None = None,
        on: str | None = None,
        cleaner: Cleaner = DEFAULT,
    ) -> None:
        self._kind, self._check = _condition(condition, value, threshold_failed)
        for setting, number in (("quiet_seconds", quiet_seconds), ("retries", retries), ("timeout", timeout)):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < 1e9:
                raise SettingError(setting, number, "not a usable number", "give one from 0 up")
        self.__name__ = name or f"alert_{self._kind}"
        self._couriers = [_Courier(Webhook(webhook, webhook_format))] if webhook else []
        if email:
            self._couriers.append(_Courier(Email.of(email)))
        self._console, self._quiet, self._retries, self._timeout = console, quiet_seconds, int(retries), timeout
        self._recovery, self._pipeline, self._on = recovery, pipeline, on
        self._bus, self._cleaner = bus, cleaner
        self._limit = min(0.9 * bus.execution_timeout, (retries + 1) * timeout)
        self._memory = _Memory(None if state_dir is None else Path(state_dir).absolute(), bus.report)

    def __call__(self, event: Event) -> None:
        """Look at an event, and tell of it where there is something to tell."""
        pipeline = str(event.get("pipeline_name") or "unknown")
        if self._pipeline not in (None, pipeline):
            return
        key = "~".join((self.__name__, pipeline, self._kind, str(event.get("node_name") or "")))
        watched = self._on in (None, event.get("_event_name"))
        found = self._check(event) if watched else ""
        if found:
            self._fire(key, pipeline, event, found if isinstance(found, str) else self._kind)
        elif found is not None and event.get("outcome", SUCCESS) == SUCCESS and (watched or not failed_nodes(event)):
            self._recover(key, pipeline, event)

    def _fire(self, key: str, pipeline: str, event: Event, reason: str) -> None:
        now = time.time()
        with self._memory.entry(key) as entry:
            entry["count"] = count = entry.get("count", 0) + 1
            since = entry.setdefault("since", now)
            if now < entry.get("until", 0) <= now + self._quiet:  # further away only if the clock was set back
                return
            # Until it has arrived it holds for as long as that may take: if this process dies, the next one tells.
            entry["until"] = now + (min(self._quiet, self._limit + 1) if self._couriers else self._quiet)
            entry["arrived"] = 0
        again = f" (failure {count:.0f} since {_utc(since)})" if count > 1 else ""
        self._tell(key, self._notice("firing", f"ALERT {pipeline}: {reason}{again}", pipeline, event))

    def _recover(self, key: str, pipeline: str, event: Event) -> None:
        if not self._memory.knows(key):
            return
        with self._memory.entry(key) as entry:
            count, since = entry.get("count", 0), entry.get("since", 0)
            entry.clear()
        if count and self._recovery:
            text = f"RECOVERED {pipeline}: {self._kind} is over ({count:.0f} since {_utc(since)})"
            self._tell(key, self._notice("resolved", text, pipeline, event))

    def _notice(self, status: str, head: str, pipeline: str, event: Event) -> dict[str, Any]:
        known = {key: event[key] for key in _TOLD if event.get(key)}
        error = ": ".join(str(known[key]) for key in ("error_type", "error") if key in known)
        ids = ", ".join(f"{key[:-3]} {known[key]}" for key in ("run_id", "trace_id") if key in known)
        nodes = f"failed: {', '.join(map(str, known['failed_nodes']))}" if "failed_nodes" in known else ""
        text = "\n".join(filter(None, (head, nodes, error, ids)))
        notice = {"alert": self.__name__, "status": status, "condition": self._kind, "pipeline": pipeline, **known}
        notice.update(text=text, time=_utc(time.time()), id=uuid.uuid4().hex)
        return {key: self._without_secrets(self._cleaner.value(value, key)) for key, value in notice.items()}

    def _without_secrets(self, value: Any) -> Any:
        for secret in (secret for courier in self._couriers for secret in courier.channel.secrets):
            if isinstance(value, str):
                value = value.replace(secret, REDACTED)
        return value

    # --- telling -----------------------------------------------------------------------------------------------------

    def _tell(self, key: str, notice: dict[str, Any]) -> None:
        if self._console:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed or missing stdout
                sys.stdout.write(f"{notice['text']}\n")
        for courier in self._couriers:
            courier.waiting.append((key, notice))
            self._bus.defer(self.__name__, partial(self._deliver, courier))

    def _deliver(self, courier: _Courier) -> None:
        if not courier.lock.acquire(timeout=self._limit):
            return  # what waits is for whoever holds it
        try:
            with suppress_instrumentation():
                while courier.waiting:
                    key, notice = courier.waiting.popleft()
                    arrived = self._sent(courier.channel, notice)
                    if notice["status"] == "firing":
                        self._remember(key, arrived)
        finally:
            courier.lock.release()

    def _remember(self, key: str, arrived: bool) -> None:
        with self._memory.entry(key) as entry:
            if entry and arrived:
                entry["arrived"], entry["until"] = 1, time.time() + self._quiet
            elif entry and not entry.get("arrived"):
                entry["until"] = 0  # nobody knows yet: tell the next time

    def _sent(self, channel: Webhook | Email, notice: dict[str, Any]) -> bool:
        """Try until it has arrived, it makes no sense to go on, or the time is over."""
        until = time.monotonic() + self._limit
        for pause in (*(_FIRST_PAUSE * 2**n * _jitter(0.5, 1.5) for n in range(self._retries)), None):
            try:
                channel.send(notice, max(0.001, min(self._timeout, until - time.monotonic())))
                return True
            except Exception as exc:  # noqa: BLE001 - sockets, TLS, HTTP and SMTP have many
                problem, may_pass = problem_of(exc)
            if pause is None or not may_pass or time.monotonic() + pause >= until:
                break
            time.sleep(pause)
        self._bus.report(f"alert {self.__name__}", ConnectionError(f"{channel}: {problem}"))
        return False


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")
