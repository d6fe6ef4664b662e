"""What files there are in a telemetry directory, by kind."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from otel_odibi.exporters.jsonl import read_lines


class Files(NamedTuple):
    """The files of one kind. `path`, relative to the directory, is a pattern where it stands for several.

    `records` counts what they hold, of which one is a `unit`; None where they are no list of anything.
    """

    signal: str
    path: str
    files: int
    bytes: int
    records: int | None
    unit: str


_KINDS: Final = (
    ("logs", "logs/*.jsonl*", "line"),
    ("spans", "spans/date=*/*.parquet", "span"),
    ("spans, OTLP/JSON", "otlp/*.traces.jsonl*", "line"),
    ("metrics", "metrics/*/date=*/*.parquet", "point"),
    ("metrics, JSON", "json/*.metrics.json", ""),
    ("metrics, Prometheus", "prometheus/*.prom", "sample"),
)


def listed(directory: Path) -> tuple[Files, ...]:
    """Return what files there are, by kind, with their sizes. What cannot be read counts as empty."""
    found = ((kind, _visible(directory, kind[1])) for kind in _KINDS)
    return tuple(_described(directory, *kind, paths) for kind, paths in found if paths)


def _visible(directory: Path, pattern: str) -> list[Path]:
    return sorted(path for path in directory.glob(pattern) if not path.name.startswith("."))


def _described(directory: Path, signal: str, pattern: str, unit: str, paths: list[Path]) -> Files:
    sizes, records = zip(*map(_measured, paths), strict=True)
    named = len(paths) == 1 and paths[0].suffix != ".parquet"
    shown = paths[0].relative_to(directory).as_posix() if named else pattern
    return Files(signal, shown, len(paths), sum(sizes), sum(records) if unit else None, unit)


def _measured(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its number of records, zeros where it cannot be read."""
    try:
        size = path.stat().st_size
        if path.suffix == ".parquet":
            return size, pq.read_metadata(path).num_rows
        return size, sum(not line.startswith(b"#") for line in read_lines(path))
    except (OSError, pa.ArrowException):
        return 0, 0
