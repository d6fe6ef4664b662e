"""Where a telemetry directory is, on which filesystem, and what files there are in it."""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from otel_odibi.clean import DEFAULT
from otel_odibi.errors import StoreError
from otel_odibi.exporters.files import Target
from otel_odibi.names import SCOPE

Problem = Callable[[str], object]
_log: Final = logging.getLogger(SCOPE)
ODD: Final = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, IndexError, NotImplementedError)
"""What reading a file that anyone may have written can raise."""


class Place:
    """A directory on a filesystem. `str(place)` holds no credentials. Thread-safe.

    Each file that cannot be read is told of once, to `on_problem`, as one line: its path and why. Raises StoreError if
    there is no such directory, or no such filesystem.
    """

    def __init__(self, where: str | os.PathLike[str], on_problem: Problem | None) -> None:
        target = Target(where)
        self.directory, self._name = target.directory, str(target)
        self._on_problem = on_problem or (lambda text: _log.warning("%s", text))
        self._told: set[str] = set()
        try:
            if self.directory is not None:
                self.filesystem, self._base = LocalFileSystem(), self.directory.as_posix()
            else:
                self.filesystem, self._base = FileSystem.from_uri(str(where))
            found = self.filesystem.get_file_info(self._base).type
        except ODD as exc:
            raise StoreError(f"cannot open {self._name!r}: {target.describe(exc)}") from None
        if found is not FileType.Directory:
            remedy = f"run a pipeline after configure(directory={self._name!r}), or name another"
            raise StoreError(f"there is no telemetry directory {self._name!r}; {remedy}")

    def __str__(self) -> str:
        return self._name

    def files(self, folder: str, *, hidden: bool = False) -> list[FileInfo]:
        """Return the files below a folder, sorted by path: those whose names start with a dot, or the others."""
        try:
            infos = self.filesystem.get_file_info(FileSelector(self.path(folder), recursive=True, allow_not_found=True))
        except OSError as exc:
            self.problem(folder, exc)
            return []
        visible = (info for info in infos if info.is_file and info.base_name.startswith(".") is hidden)
        return sorted(visible, key=lambda info: info.path)

    def dated(self, folder: str, day: str = "") -> list[FileInfo]:
        """Return the Parquet files of a dataset, of that day and later."""
        found = (info for info in self.files(folder) if info.path.endswith(".parquet"))
        dates = ((posixpath.basename(posixpath.dirname(info.path)), info) for info in found)
        return [info for date, info in dates if date.startswith("date=") and date[5:] >= day]

    def path(self, folder: str) -> str:
        """Return the path of a folder on the filesystem."""
        return f"{self._base.rstrip('/')}/{folder}"

    def relative(self, path: str) -> str:
        """Return a path below the directory, as people know it."""
        return path.removeprefix(self.path(""))

    def local(self, folder: str) -> Path | None:
        """Return a folder as a local path, None on other filesystems."""
        return None if self.directory is None else self.directory / folder

    def problem(self, path: str, why: Any) -> None:
        """Tell, once, that a file cannot be read."""
        path = self.relative(path)
        if path not in self._told:
            self._told.add(path)
            reason = f"{type(why).__name__}: {why}" if isinstance(why, BaseException) else str(why)
            self._on_problem(DEFAULT.text(" ".join(f"{path}: {reason}".split()), 300))
