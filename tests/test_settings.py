"""Settings: where each value comes from, what is a wrong one, and how the error helps."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_odibi.errors import SettingError
from otel_odibi.settings import PREFIX, Settings, read_project

# For every setting: a value as argument (and as Settings holds it), as text of a variable, as TOML; all different.
SOURCES = {
    "service_name": ("a", "b", "c"),
    "directory": (Path("a"), "b", "c"),
    "environment": ("a", "b", "c"),
    "resource": ({"k": "a"}, "k=b", {"k": "c"}),
    "enabled": (False, "true", False),
    "logs": (False, "true", False),
    "log_level": ("error", "warning", "debug"),
    "log_max_bytes": (4096, "8192", 16384),
    "log_retention_bytes": (4096, "8192", 16384),
    "capture_logging": (True, "false", True),
    "span_formats": (("json",), "json,parquet", ["none"]),
    "metric_formats": (("json",), "textfile,json", ["parquet"]),
    "parquet_uri": ("s3://a", "s3://b", "s3://c"),
    "parquet_rows": (1, "2", 3),
    "parquet_seconds": (1.0, "2", 3),
    "prometheus_port": (0, "9464", 9465),
    "prometheus_host": ("::1", "0.0.0.0", "localhost"),
    "otlp_endpoint": ("http://a", "http://b", "http://c"),
    "otlp_protocol": ("http/protobuf", "grpc", "http/protobuf"),
    "otlp_headers": ({"k": "a"}, "k=b", {"k": "c"}),
    "otlp_logs": (True, "false", True),
    "durability": ("fsync", "process", "fsync"),
    "spool_bytes": (4096, "8192", 9000),
    "span_interval": (1.0, "2", 3),
    "span_queue": (1, "2", 3),
    "metric_interval": (1.0, "2", 3),
    "cardinality_limit": (1, "2", 3),
    "measure": (False, "true", False),
    "redact_keys": (("a", "b"), "c,d", ["e"]),
    "redact_patterns": (("a", "b"), "c,d", ["e"]),
    "inherit_context": (False, "true", False),
    "exit_timeout": (1.0, "2", 3),
}
FROM_TEXT = {
    "directory": Path("b"), "resource": {"k": "b"}, "otlp_headers": {"k": "b"}, "enabled": True, "logs": True,
    "capture_logging": False, "otlp_logs": False, "measure": True, "inherit_context": True,
    "span_formats": ("json", "parquet"),
    "metric_formats": ("textfile", "json"), "redact_keys": ("c", "d"), "redact_patterns": ("c,d",),
}  # fmt: skip
FROM_TOML = {
    "directory": Path("c"), "span_formats": (), "metric_formats": ("parquet",), "redact_keys": ("e",),
    "redact_patterns": ("e",),
}  # fmt: skip
# Variables of OpenTelemetry: text, and what it means here.
STANDARD = {
    "service_name": ("OTEL_SERVICE_NAME", "x", "x"),
    "resource": ("OTEL_RESOURCE_ATTRIBUTES", "team=data%20eng, k=v", {"team": "data eng", "k": "v"}),
    "otlp_endpoint": ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://x:4317/", "http://x:4317"),
    "otlp_protocol": ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "http/protobuf"),
    "otlp_headers": ("OTEL_EXPORTER_OTLP_HEADERS", "k=x", {"k": "x"}),
    "span_interval": ("OTEL_BSP_SCHEDULE_DELAY", "2500", 2.5),
    "span_queue": ("OTEL_BSP_MAX_QUEUE_SIZE", "7", 7),
    "metric_interval": ("OTEL_METRIC_EXPORT_INTERVAL", "2500", 2.5),
}


def resolved(name, *, arguments=None, environ=None, project=None):
    """Return one setting as it results from these sources."""
    return getattr(Settings.resolve(arguments or {}, environ or {}, project or {}), name)


def test_every_setting_is_in_these_tests():
    """A new setting needs a line in the table above."""
    assert set(SOURCES) == {f.name for f in dataclasses.fields(Settings)}


@pytest.mark.parametrize("name", SOURCES)
def test_an_argument_wins_over_a_variable_over_pyproject_over_the_default(name):
    """The order in which a value is looked for, for every kind of setting."""
    argument, text, toml = SOURCES[name]
    number = {int: int, float: float}.get(type(argument), lambda value: value)
    variable = {PREFIX + name.upper(): text}
    everything = {"environ": variable, "project": {name: toml}}
    default = next(f.default for f in dataclasses.fields(Settings) if f.name == name)

    assert resolved(name, arguments={name: argument}, **everything) == argument
    assert resolved(name, arguments={name: None}, **everything) == FROM_TEXT.get(name, number(text))
    assert resolved(name, project={name: toml}) == FROM_TOML.get(name, toml)
    assert resolved(name, environ={PREFIX + name.upper(): "  "}, project={name: toml}) == FROM_TOML.get(name, toml)
    assert (resolved(name) or default) == default


@pytest.mark.parametrize("name", STANDARD)
def test_the_variables_of_opentelemetry_come_after_our_own_and_before_pyproject(name):
    """They are given in OpenTelemetry's units: milliseconds where ours are seconds."""
    variable, text, value = STANDARD[name]
    _, own, toml = SOURCES[name]
    assert resolved(name, environ={variable: text}, project={name: toml}) == value
    assert resolved(name, environ={variable: text, PREFIX + name.upper(): own}) != value


def test_a_service_name_among_the_resource_attributes_counts_where_no_other_is_given():
    """OpenTelemetry lets OTEL_RESOURCE_ATTRIBUTES name the service too."""
    environ = {"OTEL_RESOURCE_ATTRIBUTES": "service.name=flights"}
    assert resolved("service_name", environ=environ) == "flights"
    assert resolved("service_name", environ={**environ, "OTEL_SERVICE_NAME": "planes"}) == "planes"
    assert resolved("service_name", environ=environ, arguments={"service_name": "odibi"}) == "odibi"


@pytest.mark.parametrize(
    ("environ", "arguments", "enabled"),
    [
        ({}, {}, True),
        ({"OTEL_SDK_DISABLED": "True"}, {}, False),
        ({"OTEL_SDK_DISABLED": "false"}, {}, True),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_ODIBI_ENABLED": "true"}, {}, True),
        ({"OTEL_SDK_DISABLED": "true"}, {"enabled": True}, True),
        ({"OTEL_ODIBI_ENABLED": "no"}, {}, False),
    ],
)
def test_opentelemetry_can_be_disabled_altogether(environ, arguments, enabled):
    """OTEL_SDK_DISABLED turns this package off too, unless it is turned on by its own name."""
    assert resolved("enabled", environ=environ, arguments=arguments) is enabled


# --- wrong values ----------------------------------------------------------------------------------------------------

WRONG = {
    "service_name": ["", "  ", 5, b"x"],
    "directory": [5, "s3://bucket/x", "a\0b", "x" * 5000, "~nobody-of-that-name/x", f"{__file__}/x", __file__],
    "environment": [5],
    "resource": ["novalue", "=x", 5, [5]],
    "enabled": ["maybe", 2, []],
    "logs": ["maybe"],
    "log_level": ["loud", 10],
    "log_max_bytes": ["100MB", 0, 1023, -1, True, 1e30, 5000.5, math.nan, math.inf, "1e5", 2**61],
    "log_retention_bytes": ["2GB", 0],
    "durability": ["forever", 5],
    "spool_bytes": ["1GB", 0],
    "capture_logging": ["x"],
    "span_formats": ["xml", ["parquet", "xml"], 5, "parquet;json"],
    "metric_formats": ["prom", 5],
    "parquet_uri": ["bucket/x", 5, "S3:bucket"],
    "parquet_rows": [0, 1.5, "many"],
    "parquet_seconds": [0, "soon", math.nan],
    "prometheus_port": [-1, 65536, "http", 80.5, True],
    "prometheus_host": ["", 5],
    "otlp_endpoint": ["localhost:4317", "grpc://x", 5, "http://"],
    "otlp_protocol": ["http/json", 5],
    "otlp_headers": ["novalue", 5],
    "otlp_logs": ["perhaps"],
    "span_interval": [0, 1e9],
    "span_queue": [0],
    "metric_interval": [0, -5],
    "cardinality_limit": [0],
    "measure": ["x"],
    "inherit_context": ["x"],
    "redact_keys": [5],
    "redact_patterns": ["(", [b"x"], 5, "a*", ["ok", "["], [5]],
    "exit_timeout": [-1, 601],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_an_error_that_names_setting_value_and_remedy(name):
    """Whatever is wrong is found when telemetry is configured, and the message is enough to mend it."""
    assert set(WRONG) == set(SOURCES)
    for value in WRONG[name]:
        with pytest.raises(SettingError, match=name) as caught:
            resolved(name, arguments={name: value})
        error = caught.value
        assert error.name == name
        assert error.remedy
        assert error.remedy in str(error)
        if name != "otlp_headers":
            assert repr(error.value) in str(error)
            assert error.value == value or str(error.value) in str(value) or value != value


@pytest.mark.parametrize("name", sorted(set(WRONG) - {"service_name", "environment", "prometheus_host", "redact_keys"}))
def test_the_error_names_the_source(name):
    """Variable, or pyproject's table: where the user wrote it."""
    text = next(value for value in (*WRONG[name], "?") if isinstance(value, str) and value.strip())
    with pytest.raises(SettingError, match=f"setting {PREFIX}{name.upper()}="):
        resolved(name, environ={PREFIX + name.upper(): text})
    with pytest.raises(SettingError, match=rf"setting \[tool.otel-odibi\] {name}="):
        resolved(name, project={name: text})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
        ("OTEL_BSP_SCHEDULE_DELAY", "1"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "nan"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4317"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team"),
    ],
)
def test_the_error_shows_a_standard_variable_as_it_was_written(variable, text):
    """In its own unit, not converted."""
    with pytest.raises(SettingError, match=f"setting {variable}='{text}'"):
        Settings.resolve({}, {variable: text}, {})


@pytest.mark.parametrize("source", ["arguments", "project"])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(source):
    """A misspelt setting must not be passed over; its value may be a secret and is not shown."""
    with pytest.raises(SettingError, match=r"otlp_header=.*there is no such setting.*otlp_headers") as caught:
        resolved("logs", **{source: {"otlp_header": "authorization=Bearer hunter2hunter2"}})
    assert "hunter2" not in str(caught.value)


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_headers_are_never_shown():
    """Neither in the settings' repr, nor in an error about them, nor in what goes to a worker process."""
    settings = Settings.resolve({"otlp_headers": {"authorization": "Bearer hunter2"}}, {}, {})
    assert settings.otlp_headers == {"authorization": "Bearer hunter2"}
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in repr(settings.worker_copy())
    for environ in ({"OTEL_EXPORTER_OTLP_HEADERS": "hunter2"}, {"OTEL_ODIBI_OTLP_HEADERS": "=hunter2"}):
        with pytest.raises(SettingError) as caught:
            Settings.resolve({}, environ, {})
        assert "hunter2" not in str(caught.value)
        assert "hunter2" not in repr(vars(caught.value))
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


@pytest.mark.parametrize("name", ["otlp_endpoint", "parquet_uri"])
def test_a_login_within_a_url_is_never_shown(name):
    """The URL is; user and password in it are not, and a worker process must read it for itself."""
    scheme = "https" if name == "otlp_endpoint" else "s3"
    settings = Settings.resolve({name: f"{scheme}://key:hunter2@host/x"}, {}, {})
    assert getattr(settings, name) == f"{scheme}://key:hunter2@host/x"
    assert repr(settings) == f"Settings({name}='{scheme}://[hidden]@host/x')"
    assert name not in settings.worker_copy()
    assert Settings.resolve({name: f"{scheme}://host/x"}, {}, {}).worker_copy()[name] == f"{scheme}://host/x"


@pytest.mark.parametrize("name", ["otlp_endpoint", "parquet_uri", "directory"])
def test_a_login_within_a_wrong_url_is_not_shown_either(name):
    """The message still shows enough of it to be found."""
    with pytest.raises(SettingError) as caught:
        resolved(name, arguments={name: "9x://key:hunter2@host/x"})
    assert "hunter2" not in str(caught.value) + repr(vars(caught.value))
    assert "9x://[hidden]@host/x" in str(caught.value)


def test_a_worker_makes_the_same_settings_of_its_copy():
    """All that is no secret travels, to a process that may run elsewhere and finds the port taken."""
    settings = Settings.resolve({name: argument for name, (argument, *_) in SOURCES.items()}, {}, {})
    copied = Settings.resolve(settings.worker_copy(), {}, {})
    kept = {"otlp_headers": {}, "directory": Path("a").absolute(), "prometheus_port": None}
    assert copied == dataclasses.replace(settings, **kept)


def test_the_repr_shows_what_differs_from_the_defaults():
    """Short enough for a log line."""
    assert repr(Settings.resolve({}, {}, {})) == "Settings()"
    assert repr(Settings()) == "Settings()"
    assert (
        repr(Settings.resolve({"span_formats": "none", "logs": False}, {}, {}))
        == "Settings(logs=False, span_formats=())"
    )


# --- pyproject.toml --------------------------------------------------------------------------------------------------


def test_the_nearest_pyproject_at_or_above_is_read(tmp_path):
    """Its table counts, without the sub-tables of other purposes; no table is no settings."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.otel-odibi]\nservice_name = "flights"\nspan_formats = ["json"]\n[tool.otel-odibi.check]\nx = 1\n'
    )
    assert read_project(inner) == {"service_name": "flights", "span_formats": ["json"]}
    assert Settings.load(environ={}, cwd=inner).service_name == "flights"
    (inner / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert read_project(inner) == {}


@pytest.mark.parametrize("text", ["", "tool = 5", "[tool]\notel-odibi = 'x'", "[tool.other]\nx = 1"])
def test_a_pyproject_without_the_table_is_no_settings(tmp_path, text):
    """Whatever else is in it."""
    (tmp_path / "pyproject.toml").write_text(text)
    assert read_project(tmp_path) == {}


@pytest.mark.parametrize("content", [b"[tool", b"\xff\xfe", b"x = \n"])
def test_a_broken_pyproject_is_an_error_that_names_the_file(tmp_path, content):
    """It would otherwise be passed over, and its settings with it."""
    (tmp_path / "pyproject.toml").write_bytes(content)
    with pytest.raises(SettingError, match=r"pyproject.toml.*not valid TOML"):
        Settings.load(environ={}, cwd=tmp_path)


def test_a_deleted_working_directory_is_no_reason_to_fail(tmp_path, monkeypatch):
    """A long-lived process may have lost its directory."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert Settings.load(environ={}).service_name == "odibi"
    os.chdir(tmp_path)


# --- any text at all -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.sampled_from(sorted(SOURCES)),
    st.text(max_size=30) | st.integers() | st.floats() | st.none() | st.lists(st.none()),
)
def test_any_value_gives_settings_or_a_setting_error(name, value):
    """Never another exception."""
    with contextlib.suppress(SettingError):
        assert repr(Settings.resolve({name: value}, {}, {}))
