"""Every setting: its name, type, default, environment variable, meaning, and the check that fails early.

One value is looked for in this order: argument of `configure()`, `OTEL_ODIBI_<NAME>`, the OpenTelemetry variable where
there is one, `[tool.otel-odibi]` in the nearest pyproject.toml, the default.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from otel_odibi.errors import SettingError

PREFIX: Final = "OTEL_ODIBI_"
SPAN_FORMATS: Final = ("parquet", "json")
METRIC_FORMATS: Final = ("parquet", "json", "textfile")
PROTOCOLS: Final = ("grpc", "http/protobuf")
LEVELS: Final = ("debug", "info", "warning", "error", "critical")


def _setting(
    default: Any,
    doc: str,
    check: Callable[[str, Any], Any],
    *,
    otel: tuple[str, ...] = (),
    scale: float = 1.0,
    secret: bool = False,
) -> Any:
    """Declare one field: `otel` names OpenTelemetry variables that also set it, whose unit is `scale` of ours."""
    return field(default=default, metadata={"doc": doc, "check": check, "otel": otel, "scale": scale, "secret": secret})


# --- checks: each takes the name, and the value as given (text of a variable, or any object), and returns the value ---


def _text(name: str, value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise SettingError(name, value, "not a text", "give a non-empty string")


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None or value == "" else check(name, value)


def _flag(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise SettingError(name, value, "neither true nor false", "use true or false")


def _number(minimum: float, maximum: float, unit: str, kind: type[int] | type[float]) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        try:
            number = None if isinstance(value, bool) else kind(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        cut_off = isinstance(value, float) and number != value  # int() of it
        if number is not None and minimum <= number <= maximum and not cut_off:
            return number
        raise SettingError(name, value, f"not {unit} from {minimum:g} to {maximum:g}", "give one in that range")

    return check


def _choices(*allowed: str) -> Callable[[str, Any], tuple[str, ...]]:
    def check(name: str, value: Any) -> tuple[str, ...]:
        items = _items(name, value)
        for item in items:
            if item not in allowed:
                raise SettingError(
                    name, value, f"{item!r} is unknown", f"choose from {', '.join(allowed)}; none for nothing"
                )
        return tuple(dict.fromkeys(items))

    return check


def _choice(*allowed: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        text = str(value).strip().lower()
        if text not in allowed:
            raise SettingError(name, value, "unknown", f"choose from {', '.join(allowed)}")
        return text

    return check


def _items(name: str, value: Any) -> tuple[str, ...]:
    """Read a list: comma-separated text, or a sequence of texts; the word none is the empty list."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        items = tuple(str(part).strip() for part in parts)
    except TypeError:
        raise SettingError(name, value, "not a list", "give a list, or text with commas") from None
    return tuple(item for item in items if item and item != "none")


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    """Read regular expressions: a sequence, or one in text (a pattern may hold commas)."""
    try:
        patterns = (value,) if isinstance(value, str) else tuple(value)
    except TypeError:
        raise SettingError(name, value, "not a list", "give a list of regular expressions, or one") from None
    for pattern in patterns:
        _check_pattern(name, pattern)
    return patterns


def _check_pattern(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise SettingError(name, pattern, "not a text", "give a regular expression as text")
    try:
        found = re.compile(pattern).search("")
    except re.error as exc:
        raise SettingError(name, pattern, f"not a regular expression ({exc})", "mend the pattern") from None
    if found:
        raise SettingError(name, pattern, "matches the empty text, which is everywhere", "make it match something")


def _mapping(name: str, value: Any) -> Mapping[str, str]:
    """Read key=value pairs, percent-encoded in text (OTEL_RESOURCE_ATTRIBUTES), or a mapping."""
    if isinstance(value, Mapping):
        return {str(key): str(item) for key, item in value.items()}
    pairs: dict[str, str] = {}
    for item in _items(name, value):
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise SettingError(name, value, f"{item!r} is no key=value", "write key=value,key=value")
        pairs[key.strip()] = unquote(text.strip())
    return pairs


def _directory(name: str, value: Any) -> Path:
    if "://" in str(value):
        remedy = "keep the directory local and set parquet_uri for Parquet elsewhere"
        raise SettingError(name, _without_login(str(value)), "not local", remedy)
    try:
        path = Path(value).expanduser()
        existing = next((p for p in (path, *path.absolute().parents) if p.exists()), None)
        usable = "\0" not in str(path)
    except (TypeError, ValueError, RuntimeError, OSError):  # RuntimeError: no such user's home
        usable = False
    if not usable:
        raise SettingError(name, value, "not a usable path", "give the path of a directory")
    if existing is not None and not existing.is_dir():
        raise SettingError(name, str(path), f"{existing} is not a directory", "give another path")
    return path


def _without_login(text: str) -> str:
    """Return the text of a URL without user and password, to be shown."""
    return re.sub(r"://[^/\s]*@", "://[hidden]@", text)


def _url(name: str, value: Any) -> str:
    text = _text(name, value)
    if not re.match(r"https?://[^/\s]+", text):
        shown = _without_login(text)
        raise SettingError(name, shown, "not an http:// or https:// URL", "write it as http://localhost:4317")
    return text.rstrip("/")


def _uri(name: str, value: Any) -> str:
    text = _text(name, value)
    if not re.match(r"[a-z][a-z0-9+.\-]*://", text):
        shown = _without_login(text)
        raise SettingError(name, shown, "not a filesystem URI", "write it as s3://bucket/path or file:///path")
    return text.rstrip("/")


_port = _number(0, 65535, "a port", int)
_positive_bytes = _number(1024, 2**60, "a number of bytes", int)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one `Telemetry`, checked. Immutable. Make one with `load()`, which `configure()` does."""

    service_name: str = _setting(
        "odibi", "Name of the service: `service.name`, and the name of its files.", _text, otel=("OTEL_SERVICE_NAME",)
    )
    directory: Path | None = _setting(  # noqa: RUF009 - it declares a field
        None,
        "Directory for logs, spans, metrics and the `.prom` file. Without it nothing is written to disk.",
        _optional(_directory),
    )
    environment: str | None = _setting(None, "Deployment environment: `deployment.environment.name`.", _optional(_text))
    resource: Mapping[str, str] = _setting(
        (), "Further resource attributes.", _mapping, otel=("OTEL_RESOURCE_ATTRIBUTES",)
    )
    enabled: bool = _setting(True, "False turns everything off; scopes then cost next to nothing.", _flag)

    logs: bool = _setting(True, "Write `logs/<service>.jsonl` in the directory.", _flag)
    log_level: str = _setting("info", "Lowest level of user log lines that are written.", _choice(*LEVELS))
    log_max_bytes: int = _setting(
        100 * 2**20, "Size at which the log file is rotated to a compressed segment, in bytes.", _positive_bytes
    )
    log_retention_bytes: int = _setting(
        2 * 2**30, "Size of all rotated segments kept, in bytes; the oldest go first.", _positive_bytes
    )
    durability: str = _setting(
        "process",
        "What a written log line survives: the end of the `process`, or with `fsync` a power cut too.",
        _choice("process", "fsync"),
    )
    capture_logging: bool = _setting(False, "Let records of the standard `logging` module join the log file.", _flag)

    span_formats: tuple[str, ...] = _setting(
        ("parquet",), "Span files: `parquet`, `json` (OTLP/JSON lines), or `none`.", _choices(*SPAN_FORMATS)
    )
    metric_formats: tuple[str, ...] = _setting(
        ("parquet", "textfile"),
        "Metric files: `parquet`, `json` (a snapshot), `textfile` (`.prom`), or `none`.",
        _choices(*METRIC_FORMATS),
    )
    parquet_uri: str | None = _setting(
        None,
        "Where Parquet goes instead of the directory: any pyarrow filesystem URI (`s3://`, `gs://`, `abfs://`).",
        _optional(_uri),
    )
    parquet_rows: int = _setting(
        50_000,
        "Rows after which a Parquet file is closed and the next begun.",
        _number(1, 10_000_000, "a number of rows", int),
    )
    parquet_seconds: float = _setting(
        60.0, "Age at which a Parquet file is closed, in seconds.", _number(0.1, 86_400, "a number of seconds", float)
    )

    prometheus_port: int | None = _setting(
        None, "Port of the Prometheus endpoint; 0 takes a free one; unset means no endpoint.", _optional(_port)
    )
    prometheus_host: str = _setting("127.0.0.1", "Address the Prometheus endpoint listens on.", _text)

    otlp_endpoint: str | None = _setting(
        None,
        "Send spans and metrics to this OTLP endpoint. `OTEL_EXPORTER_OTLP_*` in full are followed too.",
        _optional(_url),
        otel=("OTEL_EXPORTER_OTLP_ENDPOINT",),
    )
    otlp_protocol: str = _setting(
        "grpc", "OTLP protocol: `grpc` or `http/protobuf`.", _choice(*PROTOCOLS), otel=("OTEL_EXPORTER_OTLP_PROTOCOL",)
    )
    otlp_headers: Mapping[str, str] = _setting(
        (),
        "Headers sent with every OTLP request, such as credentials. Never written anywhere.",
        _mapping,
        otel=("OTEL_EXPORTER_OTLP_HEADERS",),
        secret=True,
    )
    otlp_logs: bool | None = _setting(
        None,
        "Send logs by OTLP too. Unset: only where no log file is written, so that a collector never reads them twice.",
        _optional(_flag),
    )
    spool_bytes: int = _setting(
        512 * 2**20,
        "Size of what waits in `spool/` for an OTLP endpoint, in bytes, a third a signal; the oldest goes first.",
        _positive_bytes,
    )

    span_interval: float = _setting(
        5.0,
        "Longest time a finished span waits for its exporter, in seconds.",
        _number(0.01, 3600, "a number of seconds", float),
        otel=("OTEL_BSP_SCHEDULE_DELAY",),
        scale=0.001,
    )
    span_queue: int = _setting(
        65_536,
        "Finished spans that may wait; what comes on top is counted as dropped.",
        _number(1, 10_000_000, "a number of spans", int),
        otel=("OTEL_BSP_MAX_QUEUE_SIZE",),
    )
    metric_interval: float = _setting(
        15.0,
        "Time between two metric exports, in seconds.",
        _number(0.05, 86_400, "a number of seconds", float),
        otel=("OTEL_METRIC_EXPORT_INTERVAL",),
        scale=0.001,
    )
    cardinality_limit: int = _setting(
        2_000,
        "Series kept for one metric; further ones add up in one overflow series.",
        _number(1, 1_000_000, "a number of series", int),
    )

    measure: bool = _setting(True, "Measure rows, bytes and columns of arguments and results.", _flag)
    redact_keys: tuple[str, ...] = _setting((), "Further field names whose values are secret.", _items)
    redact_patterns: tuple[str, ...] = _setting((), "Further regular expressions whose matches are secret.", _patterns)
    inherit_context: bool = _setting(
        True,
        "Begin in the trace and run that TRACEPARENT, TRACESTATE and BAGGAGE tell of, where nothing else is current.",
        _flag,
    )
    exit_timeout: float = _setting(
        2.0,
        "Longest time that shutdown may take when the process ends, in seconds.",
        _number(0.0, 600, "a number of seconds", float),
    )

    @classmethod
    def load(
        cls,
        arguments: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Settings:
        """Collect the settings from every source and check them.

        `arguments` of value None count as not given. Raises `SettingError` naming the setting, the value and the
        remedy: for an unknown name, a wrong value, or an unreadable pyproject.toml.
        """
        env = os.environ if environ is None else environ
        return cls.resolve(arguments or {}, env, read_project(cwd or _current_directory()))

    @classmethod
    def resolve(cls, arguments: Mapping[str, Any], environ: Mapping[str, str], project: Mapping[str, Any]) -> Settings:
        """Collect the settings from these three sources and check them; see `load`."""
        values = collect(cls, arguments, environ, project)
        given = {name for name, value in arguments.items() if value is not None}
        decided = "enabled" in given or environ.get(f"{PREFIX}ENABLED", "").strip()
        if not decided and environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            values["enabled"] = False
        if "service_name" not in given and values["service_name"] == cls.__dataclass_fields__["service_name"].default:
            values["service_name"] = values["resource"].get("service.name", "").strip() or values["service_name"]
        return cls(**values)

    def worker_copy(self) -> dict[str, Any]:
        """Return the settings to hand to a worker process: all but those with secrets, which it reads for itself.

        The directory is absolute, as a worker may run elsewhere; the port of the endpoint stays with this process.
        """
        given = {
            name: value for name, value in self._public().items()
            if _without_login(str(value)) == str(value) or name.startswith("redact_")
        }  # fmt: skip
        place = None if self.directory is None else str(self.directory.absolute())
        return {**given, "directory": place, "prometheus_port": ""}

    def _public(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["secret"]}

    def __repr__(self) -> str:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = {n: value for n, value in self._public().items() if value != defaults[n] and (value or defaults[n])}
        return f"Settings({', '.join(f'{name}={_without_login(repr(value))}' for name, value in changed.items())})"


def collect(
    declared: type[Any],
    arguments: Mapping[str, Any],
    environ: Mapping[str, str],
    project: Mapping[str, Any],
    table: str = "[tool.otel-odibi] ",
) -> dict[str, Any]:
    """Return the checked values of all fields of a class of settings, from these three sources and the defaults.

    Raises `SettingError` for an unknown name or a wrong value.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    fields = {f.name: f for f in dataclasses.fields(declared)}
    for source, names in (("", given), (table, project)):
        for name in names:
            if name not in fields:
                remedy = f"choose from {', '.join(sorted(fields))}"  # the value may be a secret: it is not shown
                raise SettingError(source + name, "[hidden]", "there is no such setting", remedy)
    return {name: _resolve(f, given, environ, project, table) for name, f in fields.items()}


def _resolve(
    f: dataclasses.Field[Any], given: Mapping[str, Any], env: Mapping[str, str], project: Mapping[str, Any], table: str
) -> Any:
    own = PREFIX + f.name.upper()
    if f.name in given:
        return _checked(f, f.name, given[f.name])
    if env.get(own, "").strip():
        return _checked(f, own, env[own])
    for variable in f.metadata["otel"]:
        text = env.get(variable, "").strip()
        if text:
            return _checked(f, variable, text, f.metadata["scale"])
    if f.name in project:
        return _checked(f, f"{table}{f.name}", project[f.name])
    return {} if f.metadata["check"] is _mapping else f.default


def _checked(f: dataclasses.Field[Any], name: str, value: Any, scale: float = 1.0) -> Any:
    """Return the checked value. The error of a secret setting does not show it, nor what the check says of it."""
    try:
        return f.metadata["check"](name, value if scale == 1.0 else float(value) * scale)
    except SettingError as exc:
        if f.metadata["secret"]:
            raise SettingError(name, "[hidden]", "cannot be used", "write key=value,key=value") from None
        if scale != 1.0:  # shown as it was written, not as it was understood
            raise SettingError(name, value, "out of range for milliseconds", exc.remedy) from None
        raise
    except ValueError:
        raise SettingError(name, value, "not a number of milliseconds", "give a number") from None


def _current_directory() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return Path("/")


def read_project(start: Path) -> dict[str, Any]:
    """Return the settings in `[tool.otel-odibi]` of the nearest pyproject.toml at or above `start`.

    Raises `SettingError` where that file is not valid TOML. An unreadable file counts as absent.
    """
    return {key: value for key, value in _project_table(start).items() if key not in SUB_TABLES}


def project_alerts(start: Path | None = None) -> Mapping[str, Any]:
    """Return `[tool.otel-odibi.alerts]` of the nearest pyproject.toml; raises as `read_project` does."""
    return _sub_table("alerts", "write [tool.otel-odibi.alerts.NAME]", start)


def project_check(start: Path | None = None) -> Mapping[str, Any]:
    """Return `[tool.otel-odibi.check]` of the nearest pyproject.toml; raises as `read_project` does."""
    return _sub_table("check", "write [tool.otel-odibi.check]", start)


def _sub_table(name: str, remedy: str, start: Path | None) -> Mapping[str, Any]:
    table = _project_table(start or _current_directory()).get(name, {})
    if not isinstance(table, Mapping):
        raise SettingError(f"[tool.otel-odibi] {name}", table, "not a table", remedy)
    return table


def _project_table(start: Path) -> dict[str, Any]:
    for folder in (start, *start.absolute().parents):
        path = folder / "pyproject.toml"
        if os.path.isfile(path):  # which, unlike Path.is_file, is false where access is denied
            return _read_toml(path)
    return {}


SUB_TABLES: Final = ("alerts", "check")
"""Tables under `[tool.otel-odibi]` that hold other things than settings."""


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as exc:
        raise SettingError("pyproject.toml", str(path), f"not valid TOML ({exc})", "mend the file") from None
    tool = document.get("tool")
    table = tool.get("otel-odibi") if isinstance(tool, dict) else None
    return table if isinstance(table, dict) else {}
