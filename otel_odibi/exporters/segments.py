"""Names, locks and rotated segments of the JSON-lines files; `jsonl` writes and reads them.

Names in a directory, for the service `flights`::

    flights.jsonl             active file of the process that came first
    flights.4711.jsonl        active file of process 4711, which came while another held the first (then 4711-2, ...)
    flights.000012.jsonl      segment 12 of the service, not compressed yet; its number starts with 0, a pid never does
    flights.000012.jsonl.gz   the same, compressed; never looked at while the plain one is there

Whoever writes, moves or compresses a file holds an exclusive lock on it, so every file has one writer and what a dead
process left can be told from what a live one uses. Numbers belong to the service: its processes share one sequence.
On a filesystem without locks every process has a file of its own, and segments stay plain.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

import orjson

if sys.platform == "win32":
    import msvcrt

    def _lock(fd: int, operation: int = msvcrt.LK_NBLCK) -> bool:
        os.lseek(fd, 2**62, os.SEEK_SET)  # far behind the data: what is locked cannot be read by others
        try:
            msvcrt.locking(fd, operation, 1)
        except PermissionError:
            return False
        return True

    def _unlock(fd: int) -> None:
        _lock(fd, msvcrt.LK_UNLCK)
else:
    import fcntl

    def _lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)


NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})
"""Errors that say that a filesystem has no locks."""
_BINARY: Final[int] = getattr(os, "O_BINARY", 0)
_CHUNK: Final = 2**20
# Log lines of 560 bytes: level 1 packs 3.9 : 1 at 197 MiB/s, level 3 4.0 : 1 at 158, level 6 4.4 : 1 at 68.
_GZIP_LEVEL: Final = 1
_TEMPORARY: Final = ".gz.tmp"
_NEW_SECONDS: Final = 60.0  # far longer than a live process takes from creating a file to locking it
_LONGEST_NAME: Final = 100
_LIKE_A_PID: Final = re.compile(r"\.(?=\d+(?:-\d+)?\Z)")
_WINDOWS_DEVICE: Final = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?=\.|\Z)", re.IGNORECASE)


def safe_name(name: str) -> str:
    """Return `name` as the stem of a file name: at most 122 ASCII characters, different for different names.

    Letters, digits and `_ . - ~` stay; the rest is percent-encoded, and so is a dot where it would hide the file or
    make the name look like that of another service's pid file. A long name is cut and gets a hash. Never raises.
    """
    text = _LIKE_A_PID.sub("%2E", quote(name, safe="", errors="surrogatepass"))
    if text.startswith(".") or _WINDOWS_DEVICE.match(text):
        text = f"%{ord(text[0]):02X}{text[1:]}"
    if len(text) > _LONGEST_NAME:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()
        return f"{text[:_LONGEST_NAME]}%~{digest}"
    return text or "%"


class Found(NamedTuple):
    """A file of a sink. Sorts by service and age, and a plain segment before its compressed self."""

    name: str
    number: float  # of a segment; infinity for an active file, which is younger than all segments
    packed: bool
    pid: str
    entry: str

    @property
    def is_active(self) -> bool:
        """Whether records are appended to it, or were until its process died."""
        return self.number == math.inf


@lru_cache
def pattern(suffix: str, name: str | None = None) -> re.Pattern[str]:
    """Return what the file names of a service match; without `name` those of every service."""
    stem = r"[\w~%-][\w.~%-]*?" if name is None else re.escape(safe_name(name))
    end = re.escape(suffix)
    segment, active = rf"\.(?P<number>0\d{{5,}}){end}(?P<gz>\.gz)?", rf"(?:\.(?P<pid>[1-9]\d*(?:-\d+)?))?{end}"
    return re.compile(f"(?P<name>{stem})(?:{segment}|{active})", re.ASCII)


def parse(entries: Iterable[str], wanted: re.Pattern[str]) -> list[Found]:
    """Return those entries of a directory that match, sorted."""
    matches = (found for found in map(wanted.fullmatch, entries) if found and not _LIKE_A_PID.search(found["name"]))
    return sorted(Found(m["name"], float(m["number"] or "inf"), bool(m["gz"]), m["pid"] or "", m[0]) for m in matches)


def is_at(fd: int, path: Path) -> bool:
    """Tell whether the open file is still the one that `path` names. Raises OSError where `fd` is not open."""
    mine = os.fstat(fd)
    try:
        return os.path.samestat(mine, os.stat(path))
    except FileNotFoundError:
        return False
    except PermissionError:  # privileges dropped after opening: no sign of a move, and writing goes on
        return True


def acquire(path: Path, flags: int) -> int | None:
    """Open and lock `path`; None where another holds it or has just moved it. Raises OSError.

    On a filesystem without locks only a file that this call creates (O_EXCL) can be had.
    """
    fd = os.open(path, flags | _BINARY, 0o640)
    try:
        if _lock(fd) and is_at(fd, path):
            return fd
    except OSError as exc:
        if exc.errno in NO_LOCKS and flags & os.O_EXCL:
            return fd
        os.close(fd)
        raise
    os.close(fd)
    return None


def release(fd: int) -> None:
    """Unlock and close. A process forked meanwhile may have the file open too: closing alone would leave it locked."""
    with contextlib.suppress(OSError):
        _unlock(fd)
    with contextlib.suppress(OSError):
        os.close(fd)


def is_object(text: bytes) -> bool:
    """Tell whether this is a whole JSON object."""
    try:
        return isinstance(orjson.loads(text), dict)
    except ValueError:
        return False


def drop_torn_line(fd: int) -> None:
    """Take the end of a locked file away that is no whole record; one that lacks but its newline gets it.

    Raises OSError.
    """
    start = size = os.lseek(fd, 0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail:
        start -= (step := min(start, 2**16))
        os.lseek(fd, start, os.SEEK_SET)
        tail = os.read(fd, step) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    if is_object(torn):
        os.lseek(fd, 0, os.SEEK_END)
        os.write(fd, b"\n")
    elif torn:
        os.ftruncate(fd, size - len(torn))


def packed(segment: Path) -> Path:
    """Return the path that a plain segment has once it is compressed."""
    return segment.with_name(segment.name + ".gz")


def _delete(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


class Segments:
    """The rotated files of one service in one directory: numbers them, compresses them in the background, deletes old.

    The thread starts when there is work and ends when there is none. Safe from any thread, from signal handlers, and
    from several processes at once.
    """

    def __init__(self, directory: Path, name: str, suffix: str, retention_bytes: int) -> None:
        self._directory, self._stem, self._suffix = directory, safe_name(name), suffix
        self._pattern = pattern(suffix, name)
        self._retention_bytes = retention_bytes
        self._last = 0
        self._stop = False
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._pending = False
        self._held: set[int] = set()

    def at(self, part: str = "") -> Path:
        """Return the path of the file `<service><part><suffix>`."""
        return self._directory / f"{self._stem}{part}{self._suffix}"

    def add(self, path: Path) -> None:
        """Rename a file that the caller holds to the service's next number. Raises OSError."""
        while True:
            taken = (int(found.number) for found in self._own() if not found.is_active)
            number = max(self._last, *taken, 0) + 1
            with contextlib.suppress(FileExistsError):
                if self._rename(path, self.at(f".0{number:05d}")):
                    self._last = number
                    return

    def _rename(self, path: Path, segment: Path) -> bool:
        if sys.platform == "win32":  # where rename never replaces, nor touches what is open
            os.rename(path, segment)
            return True
        # One process alone creates this file. The number is free unless it was used and compressed meanwhile.
        with self._holding(segment, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
            renamed = False
            try:
                if fd is not None and not packed(segment).exists():
                    os.replace(path, segment)
                    renamed = True
            finally:
                if fd is not None and not renamed:
                    _delete(segment)
            return renamed

    def wake(self, *, if_needed: bool = False) -> None:
        """Have the background thread look for work; `if_needed` looks first whether there seems to be any."""
        with self._lock, contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: no thread to be had
            if if_needed and not any(found.pid or not (found.is_active or found.packed) for found in self._own()):
                return
            self._pending = True
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="otel-odibi-compress", daemon=True)
                thread.start()
                self._thread = thread

    def wait(self, timeout: float) -> None:
        """Wait until the thread has nothing to do, at most `timeout` seconds."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def stop(self) -> None:
        """Have the thread end soon and for good. What it leaves is for the next process."""
        self._stop = True

    def forked(self) -> None:
        """Start afresh in a child process: close the copies of what the parent's thread holds."""
        for fd in self._held:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._forget()

    def _own(self) -> list[Found]:
        return parse(os.listdir(self._directory), self._pattern)

    @contextlib.contextmanager
    def _holding(self, path: Path, flags: int = os.O_RDWR) -> Iterator[int | None]:
        fd = acquire(path, flags)
        if fd is None:
            yield None
            return
        self._held.add(fd)
        try:
            yield fd
        finally:
            self._held.discard(fd)
            release(fd)

    # --- in the background -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._next():
            with contextlib.suppress(OSError):
                self._sweep()

    def _next(self) -> bool:
        with self._lock:
            goes_on = self._pending and not self._stop
            self._pending = False
            if not goes_on:
                self._thread = None
            return goes_on

    def _sweep(self) -> None:
        """Compress the segments that nobody is compressing; first make segments of what dead processes left."""
        for found in self._own():
            if found.pid:
                self._adopt(self._directory / found.entry)
        compressed = False
        for found in self._own():
            if self._stop:
                return
            if not (found.is_active or found.packed) and self._compress(self._directory / found.entry):
                compressed = True
                self._retain()  # every time: where segments come faster than they are compressed, they must not pile up
        if not compressed:
            self._retain()
        self._tidy()

    def _adopt(self, path: Path) -> None:
        with contextlib.suppress(OSError), self._left_behind(path) as fd:
            if fd is not None:
                drop_torn_line(fd)
                self.add(path)

    def _compress(self, segment: Path) -> bool:
        done = False
        with contextlib.suppress(OSError), self._left_behind(segment) as fd:
            done = fd is not None and self._pack(fd, segment)
        if done:  # after closing, for Windows
            _delete(segment)
        return done

    @contextlib.contextmanager
    def _left_behind(self, path: Path) -> Iterator[int | None]:
        """Hold a file that nobody else holds and that has content; an empty one is deleted, unless it is new."""
        info = os.stat(path)
        if not info.st_size and abs(time.time() - info.st_mtime) < _NEW_SECONDS:
            yield None
            return
        with self._holding(path) as fd:
            if fd is not None and not os.fstat(fd).st_size:
                _delete(path)
                fd = None
            yield fd

    def _pack(self, fd: int, segment: Path) -> bool:
        """Write the compressed file under a name that readers pass over, then rename it; tell whether that was done."""
        info = os.fstat(fd)
        temporary = segment.with_name(f".{segment.name}{_TEMPORARY}")
        with contextlib.suppress(OSError):
            if self._deflate(fd, temporary) and segment.exists():  # else retention was quicker
                os.utime(temporary, ns=(info.st_atime_ns, info.st_mtime_ns))
                os.replace(temporary, packed(segment))
                return True
        _delete(temporary)
        return False

    def _deflate(self, source: int, target: Path) -> bool:
        gzip_stream = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31)
        os.lseek(source, 0, os.SEEK_SET)
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o640), "wb") as out:
            while chunk := os.read(source, _CHUNK):
                if self._stop:
                    return False
                out.write(gzip_stream.compress(chunk))
            out.write(gzip_stream.flush())
        return True

    def _retain(self) -> None:
        """Delete the oldest segments until the rest fits. Those waiting for compression count in full."""
        sizes: list[tuple[str, int]] = []
        for found in self._own():
            if not found.is_active:
                path = os.path.join(self._directory, found.entry)
                with contextlib.suppress(FileNotFoundError):
                    sizes.append((path, os.stat(path).st_size))
        total = sum(size for _, size in sizes)
        for path, size in sizes:
            if total <= self._retention_bytes:
                return
            if _delete(Path(path)):
                total -= size

    def _tidy(self) -> None:
        """Delete temporary files whose segment is gone."""
        for entry in os.listdir(self._directory):
            plain = entry[1:].removesuffix(_TEMPORARY)
            is_ours = entry == f".{plain}{_TEMPORARY}" and self._pattern.fullmatch(plain)
            if is_ours and not (self._directory / plain).exists():
                _delete(self._directory / entry)
