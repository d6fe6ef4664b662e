"""Delivers OTLP batches in order, and keeps on disk what cannot be delivered now: nobody waits for an endpoint.

::

    <directory>/spool/<service>.<pid>-<8 hex>.<microseconds>.<traces|metrics|logs>.jsonl

A line is a request in OTLP/JSON, as the collector's otlpjsonfile receiver reads it. One that was acknowledged, or
refused for good, is overwritten with `{}` and spaces, and a file of nothing else deleted: what can be read is what is
still to be sent, but for at most one batch after a crash. Whoever writes or sends a file holds an exclusive lock on it;
the files of a process that is gone are taken over by the next one, or by `replay`.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from opentelemetry.instrumentation.utils import suppress_instrumentation

from otel_odibi.exporters.files import make_directory, reason_of
from otel_odibi.exporters.otlp import SIGNALS, Answer, Batch, Sender, count_items, from_line
from otel_odibi.exporters.otlpjson import span_lines
from otel_odibi.exporters.segments import acquire, is_at, release
from otel_odibi.forks import after_fork
from otel_odibi.settings import Settings

_IN_MEMORY, _WITHOUT_DISK = 16 * 2**20, 64 * 2**20
"""Bytes that may wait in memory: while an endpoint answers, and where there is no room on disk either."""
_LONGEST, _LONGEST_ASKED = 30.0, 3600.0
_SCAN_SECONDS: Final = 30.0
_SEGMENT: Final = 16 * 2**20
_CHUNK: Final = 2**18


class _Segment:
    """A locked file of lines: read and blanked at `at`, appended to at `size`."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd, self.at, self.size = path, fd, 0, os.fstat(fd).st_size

    def append(self, line: bytes) -> None:
        os.lseek(self.fd, self.size, os.SEEK_SET)
        if os.write(self.fd, line) < len(line):
            os.ftruncate(self.fd, self.size)
            raise OSError(errno.ENOSPC, "no room for the line")
        self.size += len(line)

    def next(self) -> bytes:
        """Return the next line that was not sent, b"" where there is none: one without newline is torn."""
        while self.at < self.size and (line := self._read()):
            if not line.startswith(b"{}"):
                return line
            self.at += len(line)
        return b""

    def _read(self) -> bytes:
        os.lseek(self.fd, self.at, os.SEEK_SET)
        chunks: list[bytes] = []
        while chunk := os.read(self.fd, _CHUNK):
            line, newline, _ = chunk.partition(b"\n")
            chunks += (line, newline)
            if newline:
                return b"".join(chunks)
        return b""

    def settle(self, length: int) -> None:
        """Blank the line that was sent; pass it by even where that fails."""
        with contextlib.suppress(OSError):
            os.lseek(self.fd, self.at, os.SEEK_SET)
            os.write(self.fd, b"{}".ljust(length - 1))
        self.at += length

    def count(self, signal: str) -> int:
        """Return how many items are still to be sent."""
        items, at = 0, self.at
        while line := self.next():
            self.at += len(line)
            with contextlib.suppress(Exception):
                items += count_items(from_line(signal, line))
        self.at = at
        return items

    def close(self) -> None:
        release(self.fd)


class Channel:
    """Delivers the batches of one signal, on a thread of its own, which starts with the first.

    Batches wait in memory as long as the endpoint takes them. Otherwise, or where they become too many, they go to
    disk, and new ones behind them; the thread alone tries again, after 1 s, twice that, up to 30 s, or when the
    endpoint has asked for it. Files of other processes come first. A forked child that must not send puts all on disk,
    from where its parent takes it.
    """

    def __init__(self, spool: Spool, sender: Sender) -> None:
        self._spool, self._sender, self.signal = spool, sender, sender.signal
        self._bytes = min(_SEGMENT, spool.share // 8)
        self._stopped = sender.cut_off
        self.delivered = 0
        self._reset()
        after_fork(self._forked)
        self.hurry()

    def _reset(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._memory: deque[Batch] = deque()
        self._held = 0  # bytes in memory
        self._segments: list[_Segment] = []
        self._active: _Segment | None = None
        self._sending: tuple[Batch | None, _Segment | None] = (None, None)
        self._thread: threading.Thread | None = None
        self._failures, self._failed = 0, 0  # in a row, and in all
        self._retry_at = self._asked_until = self._scan_at = 0.0
        self._why = "no_directory"

    def _forked(self) -> None:
        for segment in self._segments:  # the parent's: unlocking them would be for both
            os.close(segment.fd)
        self._stopped = self._stopped or self._sender.cut_off
        self._reset()

    def put(self, batch: Batch) -> None:
        """Take a batch. Waits for no endpoint, and never raises."""
        if not batch.line:
            self.drop("unreadable", batch.items)
            return
        with self._changed:
            self._memory.append(batch)
            self._held += len(batch.line)
            if self._failures or self._segments or self._stopped or self._held > _IN_MEMORY:
                self._spill()
            if self._stopped:
                self._close()
            self._start()
            self._changed.notify_all()

    def drop(self, reason: str, count: int) -> None:
        """Count lost items."""
        if count:
            self._spool.on_drop(SIGNALS[self.signal][2], reason, count)

    def hurry(self) -> None:
        """Look for files, and try again, at once, unless the endpoint has asked to be left alone."""
        with self._changed:
            self._retry_at = self._asked_until
            self._adopt()
            if self._segments:
                self._start()
            self._changed.notify_all()

    def flush(self, deadline: float) -> bool:
        """Wait until all is delivered, which is True, until the endpoint fails, or until time is up."""
        with self._changed:
            before = self._failed
            if not self.empty and self._retry_at <= time.monotonic():
                self._start()
                timeout = max(0.0, deadline - time.monotonic())
                self._changed.wait_for(lambda: self.empty or self._failed != before, timeout)
            return self.empty

    def stop(self, deadline: float) -> bool:
        """Deliver what waits until the deadline, and put the rest on disk; where that fails, it is lost: False."""
        with self._changed:
            self._adopt()  # what forked children have left
        self.flush(deadline)
        with self._changed:
            self._stopped = True
            self._spill()
            kept = not self._memory
            self._close()
            self._changed.notify_all()
        self._sender.close()
        return kept

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not (self._memory or self._segments)

    def left(self) -> int:
        """Return how many items wait on disk."""
        with self._changed:
            return sum(segment.count(self.signal) for segment in self._segments)

    # --- under the lock ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None and not self._stopped:
            thread = threading.Thread(target=self._work, name=f"otel-odibi-otlp-{self.signal}", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread to be had just now
                thread.start()
                self._thread = thread

    def _close(self) -> None:
        while self._memory:
            self.drop(self._why, self._memory.popleft().items)
        for segment in self._segments:
            segment.close()
        self._segments, self._active, self._held = [], None, 0

    def _spill(self) -> None:
        """Put on disk what is in memory. Where that fails, the newest of it stays there."""
        while self._memory and self._spool.folder is not None:
            batch = self._memory[0]
            try:
                segment = self._room(self._spool.folder, len(batch.line))
                segment.append(batch.line)
            except OSError as exc:
                self._why = "spool_full" if exc.errno == errno.EFBIG else reason_of(exc)
                break
            self._forget(0)
            self._safe(batch)
            if batch is self._sending[0]:
                self._sending = (batch, segment)
        while self._held > _WITHOUT_DISK and len(self._memory) > 1:
            self.drop(self._why, self._forget(int(self._memory[0] is self._sending[0])))

    def _forget(self, index: int) -> int:
        batch = self._memory[index]
        del self._memory[index]
        self._held -= len(batch.line)
        return batch.items

    def _safe(self, batch: Batch) -> None:
        with contextlib.suppress(Exception):  # a journal on a full disk, for one
            self._spool.acked(batch.ids)

    def _room(self, folder: Path, length: int) -> _Segment:
        """Return the file to append to. Raises OSError."""
        active = self._active
        if active is not None and active.size + length <= self._bytes and is_at(active.fd, active.path):
            return active
        used = sum(_size(path) for path in self._files())
        while used + max(length, self._bytes) > self._spool.share:
            oldest = next((segment for segment in self._segments if segment is not self._sending[1]), None)
            if oldest is None:
                raise OSError(errno.EFBIG, "the spool is full")
            used -= oldest.size
            self.drop("spool_full", oldest.count(self.signal))
            self._done_with(oldest)
        self._active = _created(folder, self._spool.stem(), self.signal)
        self._segments.append(self._active)
        return self._active

    def _files(self) -> list[Path]:
        folder = self._spool.folder
        return [] if folder is None else sorted(folder.glob(f"[!.]*.{self.signal}.jsonl"))

    def _adopt(self) -> None:
        """Take over the files of processes that are gone."""
        self._scan_at = time.monotonic() + _SCAN_SECONDS
        found: list[_Segment] = []
        for path in () if self._stopped else self._files():
            if not self._spool.is_alive(path.name.rsplit(".", 3)[0]):
                with contextlib.suppress(OSError):
                    if (fd := acquire(path, os.O_RDWR)) is not None:
                        found.append(_Segment(path, fd))
        self._segments[:0] = found

    def _done_with(self, segment: _Segment, *, delete: bool = True) -> None:
        self._segments.remove(segment)
        self._active = None if segment is self._active else self._active
        segment.close()
        with contextlib.suppress(OSError):
            if delete:
                segment.path.unlink()

    # --- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with suppress_instrumentation():
            while line := self._next():
                answer = self._sender.send(line)
                with self._changed:
                    if not self._stopped:
                        self._settle(answer, len(line))
                        self._changed.notify_all()

    def _next(self) -> bytes:
        """Wait for a line to send. An empty one: stopped."""
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                if now >= self._scan_at:
                    self._adopt()
                if now >= self._retry_at and (line := self._head()):
                    return line
                self._changed.wait(min(self._scan_at, math.inf if self.empty else self._retry_at) - now)
        return b""

    def _head(self) -> bytes:
        for segment in tuple(self._segments):
            try:
                if line := segment.next():
                    self._sending = (None, segment)
                    return line
                self._done_with(segment)
            except OSError:  # noqa: PERF203 - a disk that fails: perhaps not the next time
                self._done_with(segment, delete=False)
        self._changed.notify_all()
        self._sending = (self._memory[0] if self._memory else None, None)
        return self._memory[0].line if self._memory else b""

    def _settle(self, answer: Answer, length: int) -> None:
        (batch, segment), self._sending = self._sending, (None, None)
        if answer.retry:
            now = time.monotonic()
            self._asked_until = now + min(answer.wait or 0.0, _LONGEST_ASKED)
            self._retry_at = max(self._asked_until, now if answer.wait else now + min(2.0**self._failures, _LONGEST))
            self._failures = min(self._failures + 1, 10)
            self._failed += 1
            self._spill()
            self._spool.on_trouble(f"OTLP endpoint of {self.signal} fails: {answer.reason}; what is to be sent waits")
            return
        self._failures = 0
        self.delivered += answer.items - answer.lost
        if segment is not None:
            segment.settle(length)
            if segment.at >= segment.size:
                self._done_with(segment)
        elif batch is not None:
            self._forget(0)
            self._safe(batch)
        self.drop(answer.reason or "rejected", answer.lost)


def _created(folder: Path, stem: str, signal: str) -> _Segment:
    """Make a file that sorts behind those of this stem. Raises OSError."""
    make_directory(folder)
    while True:
        path = folder / f"{stem}.{time.time_ns() // 1000:016d}.{signal}.jsonl"
        with contextlib.suppress(FileExistsError):
            if (fd := acquire(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)) is not None:
                return _Segment(path, fd)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # sent meanwhile
        return 0


class Spool:
    """The outlets of all signals, over one telemetry directory; without a directory they keep to memory.

    `stem()` is the beginning of file names, `<service>.<pid>-<8 hex>`, and `limit` what all files may take, in bytes,
    each signal a third: then the oldest go. `on_drop(signal, reason, count)` hears of every lost item, `on_trouble`
    in words of every failed attempt, `acked` which spans need no further care: acknowledged, refused for good, or on
    disk. `is_alive(stem)` says of a process on another host whether it lives; those of this one hold locks.
    """

    def __init__(
        self, directory: Path | None, stem: Callable[[], str], *, limit: int = 512 * 2**20,
        on_drop: Callable[[str, str, int], None] = lambda signal, reason, count: None,
        on_trouble: Callable[[str], None] = lambda text: None,
        acked: Callable[[Sequence[int]], None] = lambda ids: None, is_alive: Callable[[str], bool] = lambda stem: False,
    ) -> None:  # fmt: skip
        self.folder = None if directory is None else directory.absolute() / "spool"
        self.stem, self.share = stem, limit // len(SIGNALS)
        self.on_drop, self.on_trouble, self.acked, self.is_alive = on_drop, on_trouble, acked, is_alive
        self.channels: list[Channel] = []

    def outlet(self, sender: Sender) -> Callable[[Batch], None]:
        """Return what takes the batches of this sender."""
        self.channels.append(channel := Channel(self, sender))
        return channel.put

    def flush(self, timeout: float) -> bool:
        """Deliver what waits; True where all of it was. A failing endpoint is tried once more, not waited for."""
        deadline = time.monotonic() + timeout
        for channel in self.channels:
            channel.hurry()
        done = [channel.flush(deadline) for channel in self.channels]
        return all(done)

    def shutdown(self, timeout: float) -> bool:
        """Deliver what waits, and put on disk what is not delivered in time; True where nothing was lost.

        Takes no longer, and never raises.
        """
        deadline = time.monotonic() + timeout - min(0.3, timeout / 3)  # for the disk
        for channel in self.channels if timeout else ():  # or an attempt would begin of which nobody waits for the end
            channel.hurry()
        kept = [channel.stop(deadline) for channel in self.channels]
        return all(kept)


def keep(directory: Path, stem: str, spans: Sequence[Any]) -> bool:
    """Put spans on disk, in a file that whoever delivers next from this directory takes over; False where that fails.

    `Spool.flush` looks for such files at once.
    """
    lines = [line for line, _ in span_lines(spans)]
    try:
        with contextlib.closing(_created(directory.absolute() / "spool", stem, "traces")) as segment:
            segment.append(b"".join(lines))
    except OSError:
        return False
    return all(lines)


def replay(directory: Path, endpoint: str | None = None, timeout: float = 3600.0) -> tuple[int, int, int]:
    """Send what processes that are gone left in a directory's spool, as far as the endpoint takes it.

    Where to: `endpoint`, or what settings and environment say. Returns how many items were delivered, refused for good
    and left. Raises `SettingError`, `MissingExtraError`.
    """
    settings = Settings.load({"otlp_endpoint": endpoint})
    lost: list[int] = []
    spool = Spool(directory, str, on_drop=lambda signal, reason, count: lost.append(count))
    for signal in SIGNALS:
        if any(directory.glob(f"spool/*.{signal}.jsonl")):
            spool.outlet(Sender(settings, signal, endpoint))
    spool.flush(timeout)
    left = sum(channel.left() for channel in spool.channels)
    spool.shutdown(0.0)
    return sum(channel.delivered for channel in spool.channels), sum(lost), left
