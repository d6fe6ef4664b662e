"""The hook that writes a report at the end of each run; made by `EventBus.create_report_hook`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from otel_odibi.errors import SettingError
from otel_odibi.exporters.files import make_directory
from otel_odibi.exporters.segments import safe_name

_OURS: Final = re.compile(r".+-[0-9a-f]{32}\.html")


def create(
    directory: str | os.PathLike[str] | None, reports: str | os.PathLike[str] | None = None, keep: int = 50
) -> Callable[[Mapping[str, Any]], None]:
    """Return a hook for `pipeline_complete`; see `EventBus.create_report_hook`. Raises SettingError."""
    if directory is None:
        raise SettingError("directory", None, "not known", "name the directory that the telemetry goes to")
    if not isinstance(keep, int) or keep < 1:
        raise SettingError("keep", keep, "not a number of reports", "give a whole number from 1 up")
    if reports is None and "://" in str(directory):
        raise SettingError("reports", None, "not known", "name a local folder for the reports")
    folder = Path(directory) / "reports" if reports is None else Path(reports)
    folder = folder.absolute()  # a later chdir must not move the files

    def report(event: Mapping[str, Any]) -> None:
        from otel_odibi import store
        from otel_odibi.report.html import write

        pipeline, run_id = str(event["pipeline_name"]), str(event["run_id"])
        make_directory(folder)
        write(store.open(directory), run_id, folder / f"{safe_name(pipeline)}-{safe_name(run_id)}.html")
        found = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
        for path in sorted(found, key=_modified, reverse=True)[keep:]:
            path.unlink(missing_ok=True)

    return report


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process was quicker to delete it
        return 0.0
