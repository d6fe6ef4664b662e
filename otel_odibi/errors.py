"""The exceptions this package raises: from `configure()` and the command line, never from inside a pipeline.

::

    OdibiTelemetryError
    ├── SettingError        a setting has a value that cannot work; also a ValueError
    ├── MissingExtraError   a feature needs an extra that is not installed; also an ImportError
    └── StoreError          a telemetry directory or run cannot be read
"""

from __future__ import annotations


class OdibiTelemetryError(Exception):
    """Base of every exception that this package raises on purpose."""


class SettingError(OdibiTelemetryError, ValueError):
    """A setting cannot work. The message gives its name, the value, what is wrong and the remedy.

    Attributes `name`, `value` and `remedy` hold the parts.
    """

    def __init__(self, name: str, value: object, problem: str, remedy: str) -> None:
        self.name = name
        self.value = value
        self.remedy = remedy
        super().__init__(f"setting {name}={value!r}: {problem}; {remedy}")


class MissingExtraError(OdibiTelemetryError, ImportError):
    """A feature needs an optional dependency; the message gives the `pip install` that brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f"{feature} needs an optional dependency: pip install 'otel-odibi[{extra}]'")


class StoreError(OdibiTelemetryError):
    """A telemetry directory, or a run in it, cannot be found or read."""
