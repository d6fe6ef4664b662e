"""Engines that are instrumented with no change to their users' code; see docs/engines.md.

Each integration is an instrumentor of OpenTelemetry, under the name of the package that it instruments.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from wrapt import register_post_import_hook


def known() -> dict[str, EntryPoint]:
    """Return this package's integrations by name, whether or not what they instrument is installed."""
    points = entry_points(group="opentelemetry_instrumentor")
    return {point.name: point for point in sorted(points) if point.value.startswith(f"{__name__}.")}


def enable(names: Iterable[str]) -> None:
    """Have engines instrumented as soon as the program imports them; one that it does not use is not imported.

    Takes names that `known()` gives. An integration that cannot be loaded is a warning.
    """
    points = known()
    for name in names:
        register_post_import_hook(functools.partial(_instrument, points[name]), name)


def _instrument(point: EntryPoint, module: Any) -> None:
    try:
        instrumentor = point.load()()
        if not instrumentor.is_instrumented_by_opentelemetry:  # a second time is warned of
            instrumentor.instrument()
    except Exception as exc:  # noqa: BLE001 - else the program's own import would fail
        logging.getLogger("otel_odibi").warning("%s cannot be instrumented: %r", point.name, exc)
