"""Tells that a process lives and what it has under way: a file, locked while it lives, rewritten every 5 seconds.

The first line of `state/flights.4711-5f2c9d0a.json` tells what the process is, and is written once; the second what
it does; both are one JSON object. `….acked` beside it holds ids of delivered spans, 8 bytes each.
"""

from __future__ import annotations

import os
import platform
import re
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import orjson

from otel_odibi.clean import DEFAULT, to_json
from otel_odibi.exporters.files import make_directory, replace_file
from otel_odibi.exporters.segments import acquire, is_at, release, safe_name
from otel_odibi.facts import NodeFinished, NodeStarted, RunFinished, RunStarted
from otel_odibi.forks import after_fork

_NAME: Final = re.compile(r"(.+)\.\d+-([0-9a-f]{8})\.json")
_MAX_ACKED: Final = 128 * 2**20  # half of that is more spans than the kept logs can tell of


class Liveness:
    """The state file of this process. Thread-safe; never raises; a forked child gets its own on first use.

    `process` is what start lines in the log carry; `on_process` hears of it, of a child's too; `resource` is told by
    whichever file comes next. `otlp`: spans go to an OTLP endpoint. The listeners come before the log writer's.
    """

    def __init__(
        self, directory: Path, service: str, resource_attributes: Mapping[str, Any], *,
        rss: Callable[[], int | None] = lambda: None, otlp: bool = False,
        on_process: Callable[[str], object] = lambda process: None,
        clock: Callable[[], int] = time.time_ns, seconds: float = 5.0,
    ) -> None:  # fmt: skip
        self.resource = {key: DEFAULT.attribute(key, value) for key, value in resource_attributes.items()}
        self._about: dict[str, Any] = {"service": service, "otlp": otlp, "resource": self.resource}
        self._stem = Path(directory).absolute() / "state" / safe_name(service)
        self._rss, self._clock, self._seconds, self._on_process = rss, clock, seconds, on_process
        self._reset()
        self._open(os.O_EXCL)
        after_fork(self._forked)

    def _reset(self) -> None:
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(self._stop,), name="otel-odibi-alive", daemon=True)
        self._active: dict[int, Any] = {}
        self._fd, self._length, self._new = -1, 0, True
        self.process, pid = os.urandom(4).hex(), os.getpid()
        self.path = self._stem.with_name(f"{self._stem.name}.{pid}-{self.process}.json")
        self._head = to_json({**self._about, **_here(), "pid": pid, "started_unix_nano": self._clock()})[:-1] + b",\n"
        self._on_process(self.process)

    def _forked(self) -> None:
        with suppress(OSError):
            if self._fd >= 0 and is_at(self._fd, self.path):
                os.close(self._fd)  # not unlocking: the lock is the parent's, and a copy would outlive it
        self._reset()

    def listeners(self) -> dict[type, Callable[[Any], None]]:
        """Return what wants which fact."""
        return {RunStarted: self._began, NodeStarted: self._began, RunFinished: self._ended, NodeFinished: self._ended}

    def _began(self, fact: RunStarted | NodeStarted) -> None:
        self._active[fact.span_id] = fact
        if self._new:
            self._open(os.O_EXCL)

    def _ended(self, fact: RunFinished | NodeFinished) -> None:
        self._active.pop(fact.start.span_id, None)

    def acked(self, ids: Iterable[int]) -> None:
        """Note spans that an OTLP endpoint has acknowledged, or that wait for it on disk: recovery leaves them out."""
        with self._lock, suppress(OSError):
            if not self._stop.is_set():
                append_ids(self.path, ids)

    def close(self, delivered: bool) -> None:
        """Delete the file where all was delivered; with something under way it stays, locked until the process ends."""
        with self._lock, suppress(OSError):
            self._stop.set()
            if is_at(self._fd, self.path):
                self._write()
                if not self._active:
                    for path in (self.path, self.path.with_suffix(".acked")) if delivered else ():
                        path.unlink(missing_ok=True)
                    release(self._fd)
                    self._fd = -1
        with suppress(RuntimeError):  # never started
            self._thread.join(1)

    def _open(self, exclusive: int = 0) -> None:
        with self._lock:
            if self._new:
                self._new = False
                with suppress(RuntimeError):  # no thread to be had
                    self._thread.start()
            with suppress(OSError):
                make_directory(self.path.parent)
                fd = acquire(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | exclusive)
                self._fd, self._length = -1 if fd is None else fd, 0
                self._write()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(self._seconds):
            ours = False
            with self._lock:
                with suppress(OSError):  # a program that becomes a daemon closes all its files
                    ours = is_at(self._fd, self.path)
                if not stop.is_set():
                    self._write() if ours else self._open()

    def _write(self) -> None:
        now, active = self._clock(), self._active.copy()
        listed = [_told(fact, now) for fact in list(active.values())[:1000]]
        beat = {"heartbeat_unix_nano": now, "rss": self._rss(), "active_count": len(active), "active": listed}
        # In one go, over the last one and as long as the longest: a reader meets no remains of another.
        text = (to_json(beat)[1:] + b"\n").rjust(self._length)
        with suppress(OSError):
            os.lseek(self._fd, len(self._head) if self._length else 0, os.SEEK_SET)
            os.write(self._fd, text if self._length else self._head + text)
            self._length = len(text)


def _told(fact: RunStarted | NodeStarted, now: int) -> dict[str, Any]:
    told = {"pipeline": fact.pipeline, "run_id": fact.run_id, "node_name": getattr(fact, "node", "")}
    ids = {"trace_id": f"{fact.trace_id:032x}", "span_id": f"{fact.span_id:016x}"}
    return told | ids | {"time_unix_nano": fact.time_unix_nano, "elapsed_seconds": (now - fact.time_unix_nano) / 1e9}


def _here() -> dict[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id")  # tells this boot from others, and from a host of the same name
    return {"host": platform.node(), "boot_id": boot.read_text().strip() if boot.is_file() else ""}


def read_state(path: Path) -> dict[str, Any] | None:
    """Return what a state file says, of a torn one what its name and first line say; None where it is none, or gone."""
    try:
        text, changed = path.read_bytes(), path.stat().st_mtime_ns
    except OSError:
        return None
    about: dict[str, Any] = {}
    for part in (text, text.partition(b",\n")[0] + b"}"):
        with suppress(ValueError, TypeError):
            about = about or dict(orjson.loads(part))
    if (named := _NAME.fullmatch(path.name)) is None:
        return None
    service, active = about.get("service"), about.get("active")
    about["service"] = service if safe_name(str(service)) == named[1] else unquote(named[1])
    about["active"] = [entry for entry in active if isinstance(entry, dict)] if isinstance(active, list) else []
    for key, otherwise in (("heartbeat_unix_nano", changed), ("started_unix_nano", 0)):
        if type(told := about.get(key)) is not int or not 0 <= told < 2**63:
            about[key] = otherwise
    return {**about, "path": path, "process": named[2], "here": _here().items() <= about.items()}


def lives_elsewhere(path: Path, clock: Callable[[], int] = time.time_ns) -> bool:
    """Tell whether a state file is not of this boot of this host, where its lock tells all, and under a minute old."""
    state = read_state(path)
    return state is not None and not state["here"] and clock() - state["heartbeat_unix_nano"] < 60 * 10**9


def append_ids(state: Path, ids: Iterable[int]) -> None:
    """Add delivered ids to those of a state file: over a torn last one, and without the older half of very many."""
    path = state.with_suffix(".acked")
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o640), "r+b", buffering=0) as file:
        end = file.seek(file.seek(0, os.SEEK_END) // 8 * 8)
        file.write(array("Q", ids))
    if end > _MAX_ACKED:
        replace_file(path, path.read_bytes()[end // 16 * 8 :])
