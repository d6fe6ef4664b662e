"""Where losses and inner errors of this package go: into a counter, and into warnings that are few."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final

from otel_odibi import names
from otel_odibi.clean import DEFAULT, message_of

_log: Final = logging.getLogger(names.SCOPE)
_LOST: Final = "telemetry lost: %s, reason %s (counted in odibi.telemetry.dropped)"


class Troubles:
    """Where losses and inner errors go: counted in `odibi.telemetry.dropped`, warned about once a cause a minute.

    Thread-safe; never raises.
    """

    def __init__(self, drop: Callable[[str, str, int], None], *, tick: Callable[[], float] = time.monotonic) -> None:
        self._drop = drop
        self._tick = tick
        self._warned: dict[tuple[str, str], float] = {}

    def dropped(self, signal: str, reason: str, count: int = 1) -> None:
        """Count `count` lost items of a signal (spans, metrics, logs)."""
        self._drop(signal, reason, count)
        self.warn(signal, reason, _LOST, signal, reason)

    def on_drop(self, signal: str) -> Callable[[str, int], None]:
        """Return a function (reason, count) that counts losses of this signal."""
        return lambda reason, count: self.dropped(signal, reason, count)

    def error(self, where: str, exc: BaseException) -> None:
        """Count an inner error, which the user's pipeline never sees."""
        kind = type(exc).__name__
        self._drop("internal", where, 1)
        self.warn(
            where, kind, "error inside telemetry, in %s: %s", where, DEFAULT.text(f"{kind}: {message_of(exc)}", 500)
        )

    def overflow(self, instrument: str) -> None:
        """Warn that a metric has more series than the limit."""
        self.warn(
            "cardinality", instrument,
            "metric %s has reached the cardinality limit: further attribute sets (pipeline, node, layer, engine) add "
            "up in one overflow series; use fewer node names or raise cardinality_limit", instrument,
        )  # fmt: skip

    def warn(self, cause: str, detail: str, message: str, *args: object) -> None:
        """Log a warning unless this cause had one within the last minute."""
        now = self._tick()
        last = self._warned.get((cause, detail))
        if last is not None and now - last < 60:
            return
        if len(self._warned) > 1_000:
            self._warned.clear()
        self._warned[(cause, detail)] = now
        with contextlib.suppress(Exception):  # a host's logging handler may raise
            _log.warning(message, *args)
