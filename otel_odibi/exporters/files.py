"""Whole files on their way to a directory or an object store: written at once, kept for a next try where that fails."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

from otel_odibi.clean import DEFAULT
from otel_odibi.errors import SettingError
from otel_odibi.names import SCOPE

OnDrop = Callable[[str, int], None]
_log: Final = logging.getLogger(SCOPE)
_REMOTE: Final = re.compile(r"[a-z][a-z0-9+.\-]+://", re.IGNORECASE)
_REASONS: Final = {
    errno.ENOSPC: "disk_full", errno.EDQUOT: "disk_full", errno.EROFS: "read_only", errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied", errno.EMFILE: "too_many_open_files", errno.ENFILE: "too_many_open_files",
}  # fmt: skip
_RETRY_SECONDS: Final = 5.0


def make_directory(directory: Path) -> None:
    """Create `directory` and what is missing above it, mode 0750. Raises OSError."""
    for folder in reversed((directory, *directory.parents)):
        if not folder.is_dir():
            with contextlib.suppress(FileExistsError):
                folder.mkdir(0o750)


def replace_file(path: Path, data: Any, mode: int = 0o640) -> None:
    """Write `data` (bytes or a buffer) so that `path` is either as it was or whole, after a power cut too.

    The temporary file is in the same folder and its name starts with a dot, which dataset readers pass over. Raises
    OSError, and leaves no temporary file then where it can help it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def reason_of(exc: BaseException) -> str:
    """Return the reason to count a loss under: disk_full, read_only, permission_denied, ..., else io_error."""
    return _REASONS.get(getattr(exc, "errno", None) or 0, "io_error")


class Target:
    """A local directory (path or `file://`), or any pyarrow filesystem URI (`s3://`, `gs://`, `abfs://`).

    `str(target)` is safe to print: credentials and query are left out of a URI. Raises `SettingError` where `where` is
    neither a path nor a URI; whether it can be written to shows on writing.
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        self._where = where if isinstance(where, str) else _path(where)
        if not self._where:
            raise SettingError("target", where, "empty", "give a directory or a filesystem URI")
        self.directory: Path | None = None
        if self._where.lower().startswith("file://"):
            self.directory = Path(url2pathname(urlsplit(self._where).path))
        elif not _REMOTE.match(self._where):
            self.directory = Path(self._where)
            with contextlib.suppress(OSError):  # a later chdir must not move the files
                self.directory = self.directory.absolute()
        self._remote: tuple[Any, str] | None = None

    def __str__(self) -> str:
        if self.directory is not None:
            return str(self.directory)
        scheme, _, rest = self._where.partition("://")
        return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"

    def write(self, name: str, data: Any) -> None:
        """Write one whole file, at a path below the target; remotely in one put. Raises OSError or pyarrow errors."""
        if self.directory is not None:
            path = self.directory / name
            make_directory(path.parent)
            replace_file(path, data)
            return
        filesystem, base = self._remote = self._remote or _connect(self._where)
        with filesystem.open_output_stream(f"{base.rstrip('/')}/{name}") as stream:
            stream.write(data)

    def describe(self, exc: BaseException) -> str:
        """Return the error as text without the credentials a message may quote from the URI."""
        return DEFAULT.text(f"{type(exc).__name__}: {exc}".replace(self._where, str(self)), 500)

    def forget(self) -> None:
        """Connect anew on the next write; for a forked child."""
        self._remote = None


def _connect(uri: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem

    if uri.lower().startswith("s3://"):
        with contextlib.suppress(ValueError):  # pyarrow 14 knows no other way than a multipart upload, three requests
            return FileSystem.from_uri(f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true")  # type: ignore[no-any-return]
    return FileSystem.from_uri(uri)  # type: ignore[no-any-return]


def _path(where: Any) -> str:
    try:
        return os.fsdecode(where)
    except TypeError:
        raise SettingError("target", where, "not a path", "give a directory or a filesystem URI") from None


class Outbox:
    """Files to be written to a target in order; what fails stays for the next try, up to `limit` rows.

    `on_drop(reason, rows)` is called for the oldest files that no longer fit. Failing is warned about once, until a
    write succeeds. Not thread-safe; never raises.
    """

    def __init__(self, target: Target, limit: int, on_drop: OnDrop) -> None:
        self.target = target
        self._limit = limit
        self._on_drop = on_drop
        self.clear()

    def clear(self) -> None:
        """Forget everything; for a forked child, whose parent still has it."""
        self._files: deque[tuple[str, Any, int]] = deque()
        self._retry_at, self._reason = 0.0, "io_error"

    def put(self, name: str, data: Any, rows: int) -> None:
        """Add a file that holds so many rows."""
        self._files.append((name, data, rows))

    def send(self, *, now: bool = False) -> bool:
        """Write what waits; True where nothing is left. After a failure only every 5 seconds, or with `now`."""
        failing = self._retry_at > 0.0
        if now or time.monotonic() >= self._retry_at:
            while self._files and self._write(failing):
                failing = False
        while sum(rows for *_, rows in self._files) > self._limit:
            self._on_drop(self._reason, self._files.popleft()[2])
        return not self._files

    def give_up(self) -> None:
        """Drop, and count, whatever still waits."""
        self._limit = 0
        self.send()

    def _write(self, failing: bool) -> bool:
        file = self._files.popleft()
        try:
            self.target.write(file[0], file[1])
        except BaseException as exc:
            self._files.appendleft(file)
            if not isinstance(exc, Exception):
                raise
            self._reason, self._retry_at = reason_of(exc), time.monotonic() + _RETRY_SECONDS
            if not failing:
                with contextlib.suppress(Exception):  # a host's logging handler may raise
                    _log.warning("cannot write to %s, will try again: %s", self.target, self.target.describe(exc))
            return False
        self._retry_at = 0.0
        return True
