"""The JSON-lines files of this package (log lines, OTLP/JSON spans): append, rotate, list, read.

How the files are named, locked and kept is told in `segments`.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import itertools
import math
import os
import stat
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from otel_odibi.errors import SettingError
from otel_odibi.exporters.files import make_directory, reason_of
from otel_odibi.exporters.segments import (
    NO_LOCKS,
    Segments,
    acquire,
    drop_torn_line,
    is_at,
    is_object,
    packed,
    parse,
    pattern,
    release,
    safe_name,
)
from otel_odibi.forks import after_fork

__all__ = ["JsonlSink", "files", "read_lines", "safe_name"]

_APPEND: Final = os.O_RDWR | os.O_APPEND | os.O_CREAT
_STALE: Final = frozenset({errno.EBADF, errno.ESTALE})
_CHECK_SECONDS: Final = 1.0


def files(directory: Path, name: str | None = None, suffix: str = ".jsonl") -> list[Path]:
    """Return every segment and active file of the service `name`, oldest first; of all services, one after the other.

    Each record is in one of them only: of a segment half-way through compression the plain file counts. Active files
    come last, those idle longest first. Never raises: a directory that cannot be read is empty.
    """
    directory = Path(directory)
    try:
        # Listed twice, or a file renamed during the listing could be missed under both its names.
        entries = {*os.listdir(directory), *os.listdir(directory)}
    except (OSError, ValueError):
        return []
    chosen: dict[tuple[str, float, str], tuple[str, float, int, Path]] = {}
    for found in parse(entries, pattern(suffix, name)):
        path = directory / found.entry
        with contextlib.suppress(OSError):
            try:
                info = path.stat()
            except FileNotFoundError:  # compressed since it was listed
                path = packed(path)
                info = path.stat()
            # An empty segment is a number being taken; it must not hide anything.
            if stat.S_ISREG(info.st_mode) and (found.is_active or info.st_size):
                age = info.st_mtime_ns if found.is_active else 0
                key = (found.name, found.number, found.entry if found.is_active else "")
                chosen.setdefault(key, (found.name, found.number, age, path))
    return [path for *_, path in sorted(chosen.values())]


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a plain or `.gz` file as written, each ending in a newline. Never raises.

    A last line without newline is a record being written or torn by a crash: it is yielded (with a newline) only if
    it parses as a JSON object, because no proper part of an object is one. A torn line that a later process has ended
    is yielded as it is: skip what does not parse. Of a damaged `.gz` come the lines before the damage. A segment
    compressed since `files()` named it is read from its `.gz`.
    """
    try:
        with _opened(Path(path)) as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield line
                elif is_object(line):
                    yield line + b"\n"
    except (OSError, ValueError, EOFError, zlib.error):
        return


def _opened(path: Path) -> BinaryIO | gzip.GzipFile:
    if path.suffix != ".gz":
        try:
            return open(path, "rb")
        except FileNotFoundError:
            path = packed(path)
    return gzip.open(path, "rb")


def _identity(fd: int) -> tuple[int, int]:
    info = os.fstat(fd)
    return info.st_dev, info.st_ino


def _with_whole_lines(fd: int) -> int:
    """Return the locked file without a line that a crash has torn: the next record must not join it."""
    try:
        drop_torn_line(fd)
    except OSError:
        release(fd)
        raise
    return fd


def _reason(exc: OSError | ValueError) -> str:
    return reason_of(exc) if isinstance(exc, OSError) else "bad_path"


class JsonlSink:
    """Appends whole lines to `<directory>/<name>.jsonl`: one write call a line, so a written line survives the process.

    `max_bytes` is the size at which the file becomes a numbered segment, which a background thread compresses;
    `retention_bytes` bounds all segments of the service together; the oldest are deleted first. `on_drop(reason, 1)` is
    called, outside the lock, for each line that could not be written; reasons are disk_full, read_only,
    permission_denied, too_many_open_files, bad_path, io_error, closed. `path` is the active file: it may change when
    the file is rotated, moved or deleted, and in a forked child. With `fsync` a written line survives a power cut too.

    Safe from any thread, from several processes on one directory, from signal handlers, and across fork. Raises
    `SettingError` for sizes that cannot work; nothing else raises, an unwritable directory neither.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        max_bytes: int = 100 * 2**20,
        retention_bytes: int = 2 * 2**30,
        suffix: str = ".jsonl",
        on_drop: Callable[[str, int], None] | None = None,
        fsync: bool = False,
    ) -> None:
        for setting, value in (("max_bytes", max_bytes), ("retention_bytes", retention_bytes)):
            if value < 1:
                raise SettingError(setting, value, "not a size", "give a number of bytes above 0")
        self._directory = Path(directory)
        with contextlib.suppress(OSError):  # a later chdir must not move the files
            self._directory = self._directory.absolute()
        self._segments = Segments(self._directory, name, suffix, retention_bytes)
        self.path = self._segments.at()
        self._max_bytes, self._on_drop, self._fsync = max_bytes, on_drop, fsync
        self._fd, self._id, self._size = -1, (0, 0), 0
        self._limit, self._check_at, self._why = float(max_bytes), 0.0, "io_error"
        self._closed = False
        # Reentrant, for the same price: a signal handler or finaliser that logs must not wait for what it interrupted.
        self._lock = threading.RLock()
        self._open()
        self._segments.wake(if_needed=True)
        after_fork(self._forked)

    def write(self, line: bytes) -> bool:
        """Append one record, which ends in a newline. True: it is with the operating system. False: it was dropped."""
        with self._lock:
            if time.monotonic() >= self._check_at:
                self._check()
            if self._size and self._size + len(line) > self._limit:
                self._rotate()
            try:
                written = os.write(self._fd, line)
                if written == len(line):
                    self._size += written
                    if self._fsync:
                        os.fsync(self._fd)
                    return True
                reason = self._undo(written)
            except OSError as exc:
                reason = self._failed(exc, line)
        if not reason:
            return True
        if self._on_drop is not None:
            with contextlib.suppress(Exception):
                self._on_drop(reason, 1)
        return False

    def rotate(self) -> None:
        """Turn the active file into a segment now, unless it is empty."""
        with self._lock:
            if self._fd >= 0 and self._size:
                self._rotate()

    def flush(self, timeout: float = 10.0) -> None:
        """Wait until what there is to compress is compressed, at most `timeout` seconds. (Lines need no flushing.)"""
        self._segments.wait(timeout)

    def close(self, timeout: float = 2.0) -> None:
        """Let go of the file. Compression gets `timeout` seconds; what is left then is for the next process."""
        with self._lock:
            self._closed, self._why, self._check_at = True, "closed", math.inf
            self._let_go()
        self._segments.wait(timeout)
        self._segments.stop()

    # --- all under the lock ------------------------------------------------------------------------------------------

    def _failed(self, exc: OSError, line: bytes) -> str:
        """Return why nothing was written. A file closed behind our back is opened anew for the line."""
        if self._fd < 0:
            return self._why
        if exc.errno not in _STALE:
            return _reason(exc)
        self._reopen()
        try:
            written = os.write(self._fd, line)
        except OSError as again:
            return self._why if self._fd < 0 else _reason(again)
        if written != len(line):
            return self._undo(written)
        self._size += written
        return ""

    def _undo(self, written: int) -> str:
        """Take back a record that the disk had no room for the whole of."""
        try:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
        except OSError:
            self._let_go()  # opening it again ends the torn line
            self._check_at = 0.0
        return "disk_full"

    def _check(self) -> None:
        """Once a second: take another file where ours was moved, deleted or closed; allow rotation again."""
        self._check_at, self._limit = time.monotonic() + _CHECK_SECONDS, float(self._max_bytes)
        with contextlib.suppress(OSError):
            if self._fd >= 0 and is_at(self._fd, self.path):
                self._size = os.fstat(self._fd).st_size
                return
        self._reopen()

    def _rotate(self) -> None:
        """Rename the active file to a segment and take a new one. Where that fails, write on and retry in a second."""
        self._limit = math.inf  # until the next check; and no second rotation from a signal handler meanwhile
        try:
            if not is_at(self._fd, self.path):
                self._reopen()
                return
            if sys.platform == "win32":  # where open files cannot be renamed
                self._let_go()
            self._segments.add(self.path)
        except OSError:
            return
        old = self._fd
        self._open()
        if self._fd == old:
            self._fd = -1
        release(old)
        self._segments.wake()

    def _reopen(self) -> None:
        self._let_go()
        self._open()

    def _open(self) -> None:
        """Take an active file, or remember why there is none and when to try again."""
        self._check_at = math.inf  # a signal handler that logs now must not open a second one
        try:
            self.path, fd = self._claim()
            self._id, self._size, self._limit = _identity(fd), os.fstat(fd).st_size, float(self._max_bytes)
            self._fd = fd
            if self._fsync:  # the file's name too, else the lines in it are nowhere
                folder = os.open(self._directory, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        except (OSError, ValueError) as exc:
            self._why = _reason(exc)
        finally:
            self._check_at = time.monotonic() + _CHECK_SECONDS

    def _claim(self) -> tuple[Path, int]:
        """Open the first active file that nobody else holds. Raises OSError, ValueError."""
        make_directory(self._directory)
        pid = os.getpid()
        for part in itertools.chain(("", f".{pid}"), (f".{pid}-{count}" for count in range(2, 1000))):
            path = self._segments.at(part)
            try:
                fd = acquire(path, _APPEND)
            except OSError as exc:
                if exc.errno in NO_LOCKS:
                    path = self._segments.at(f".{pid}-{time.time_ns()}")
                    fd = acquire(path, _APPEND | os.O_EXCL)
                elif part:
                    raise
                else:  # perhaps another user's file, in a directory that we may write to
                    continue
            if fd is not None:
                return path, _with_whole_lines(fd)
        raise OSError(errno.EMFILE, "too many sinks of one name")

    def _let_go(self, *, unlock: bool = True) -> None:
        fd, self._fd = self._fd, -1
        with contextlib.suppress(OSError):
            # A program that closed all its files may use the number for another file by now.
            if fd >= 0 and _identity(fd) == self._id:
                release(fd) if unlock else os.close(fd)

    def _forked(self) -> None:
        """Start afresh in a child process; its copy of the file would keep that locked after the parent's end."""
        self._lock = threading.RLock()
        self._let_go(unlock=False)
        self._segments.forked()
        self._check_at = math.inf if self._closed else 0.0
