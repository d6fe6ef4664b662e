"""`otel-odibi doctor`: every check against a real server on this machine, a good one and a bad one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
from test_cli import otel_odibi
from test_otlp import grpc_sink, http_sink

from otel_odibi import doctor
from otel_odibi.doctor import Finding, examine

SECRET = "s3cr3t-t0ken-value"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the machine's, and no pyproject.toml."""
    for name in [name for name in os.environ if name.startswith("OTEL_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def check(name: str, directory: Path | None = None, prometheus: str | None = None) -> Finding:
    """Do all checks and return the finding of one."""
    return next(finding for finding in examine(directory, prometheus) if finding.check == name)


@contextlib.contextmanager
def web(answer: Callable[[str], tuple[int, str]], date: float | None = 0) -> Iterator[str]:
    """Serve over HTTP what `answer` makes of a path, `date` seconds off the clock, and yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self.path)
            self.send_response_only(status)
            if date is not None:
                self.send_header("Date", formatdate(time.time() + date, usegmt=True))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def hanging() -> Iterator[str]:
    """Accept connections and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_shown_with_where_they_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first place that counts: command line, own variable, OpenTelemetry's, pyproject.toml; secrets never."""
    assert check("settings") == Finding("settings", "ok", "all are the default")
    (tmp_path / "pyproject.toml").write_text('[tool.otel-odibi]\nservice_name = "x"\nspan_interval = 2\n')
    monkeypatch.setenv("OTEL_SERVICE_NAME", "flights")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer%20{SECRET}")
    monkeypatch.setenv("OTEL_ODIBI_PARQUET_URI", f"s3://user:{SECRET}@bucket/path")
    assert check("settings", Path("here")).found == (
        "service_name=flights (OTEL_SERVICE_NAME), directory=here (command line), "
        "parquet_uri=s3://[hidden]@bucket/path (OTEL_ODIBI_PARQUET_URI), "
        "otlp_headers=[hidden] (OTEL_EXPORTER_OTLP_HEADERS), span_interval=2.0 (pyproject.toml)"
    )


def test_a_wrong_setting_fails_and_the_versions_are_still_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else can be known without settings."""
    monkeypatch.setenv("OTEL_ODIBI_PARQUET_ROWS", "many")
    first, *others = examine()
    assert (first.check, first.status) == ("settings", "fail")
    assert first.found.startswith("setting OTEL_ODIBI_PARQUET_ROWS='many': not a number of rows")
    assert first.remedy == "give one in that range"
    assert [finding.check for finding in others] == ["versions"]


@pytest.mark.parametrize(
    ("name", "remedy"), [("OTEL_ODIBI_DIRECTOY", "write OTEL_ODIBI_DIRECTORY"), ("OTEL_ODIBI_X", "unset it")]
)
def test_a_variable_that_sets_nothing_is_warned_of(monkeypatch: pytest.MonkeyPatch, name: str, remedy: str) -> None:
    """With the name that was meant, where one is near."""
    monkeypatch.setenv(name, "x")
    found = check("settings")
    assert (found.status, found.remedy) == ("warn", remedy)
    assert found.found.startswith(f"{name} sets nothing; ")


def test_telemetry_that_is_turned_off_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever variable."""
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert check("settings")[1:3] == ("warn", "telemetry is turned off; all are the default")


# --- directory -------------------------------------------------------------------------------------------------------


def test_a_directory_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    """One that is there, and one that is not: it is not made."""
    there = check("directory", tmp_path)
    assert there.status == "ok"
    assert there.found.startswith(f"{tmp_path} can be written, ")
    missing = check("directory", tmp_path / "a" / "b")
    assert (missing.status, missing.found.split(",")[0]) == ("ok", f"{tmp_path}/a/b can be made")
    assert check("directory").found.startswith(f"{tmp_path}/telemetry can be made, ")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_fails() -> None:
    """Not even root can make a file in /proc."""
    found = check("directory", Path("/proc/telemetry"))
    assert (found.status, found.remedy) == ("fail", "give another directory, or mend its permissions")


def test_too_little_room_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the logs that are kept could fill the disk."""
    monkeypatch.setenv("OTEL_ODIBI_LOG_RETENTION_BYTES", str(2**60))
    found = check("directory", tmp_path)
    assert (found.status, found.remedy) == ("warn", "set log_retention_bytes")


def test_no_directory_is_fine_where_telemetry_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `otel-odibi run`."""
    monkeypatch.setenv("OTEL_ODIBI_PROMETHEUS_PORT", "0")
    assert check("directory") == Finding("directory", "ok", "none is set: nothing is written to files")


# --- endpoint --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_free_port_is_served_and_scraped_for_a_moment(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """So that the address is known to work; then it is free again."""
    port = free_port()
    monkeypatch.setenv("OTEL_ODIBI_PROMETHEUS_PORT", str(port))
    monkeypatch.setenv("OTEL_ODIBI_PROMETHEUS_HOST", host)
    for _ in range(2):
        found = check("endpoint")
        assert found.status == "ok"
        assert found.found.startswith(f"the port is free: http://127.0.0.1:{port}/metrics answers, ")


def test_a_port_that_a_run_has_is_scraped(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ours, so all is well."""
    with web(lambda path: (200, "odibi_process_uptime_seconds 5\n")) as url:
        monkeypatch.setenv("OTEL_ODIBI_PROMETHEUS_PORT", url.rpartition(":")[2])
        assert check("endpoint")[1:] == ("ok", f"in use by a run: {url}/metrics answers, 1 series read", "")


@pytest.mark.parametrize("body", ["<html>", "up 1\n", ""])
def test_a_port_that_another_program_has_fails(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Whatever it answers."""
    with web(lambda path: (200, body)) as url:
        monkeypatch.setenv("OTEL_ODIBI_PROMETHEUS_PORT", url.rpartition(":")[2])
        found = check("endpoint")
    assert (found.status, found.remedy) == ("fail", "give another port; 0 takes a free one")
    assert "in use" in found.found


# --- collector -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "sink", "by"), [("grpc", grpc_sink, "gRPC"), ("http/protobuf", http_sink, "HTTP")]
)
def test_a_collector_gets_one_span(monkeypatch: pytest.MonkeyPatch, protocol: str, sink: object, by: str) -> None:
    """With the service's name and the headers; the trace's id is told, to look for it."""
    with sink() as collector:  # type: ignore[operator]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"Authorization={SECRET},x-scope-orgid=4")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "flights")
        found = {finding.check: finding for finding in examine()}
    path = "/v1/traces" if by == "HTTP" else ""
    assert found[f"collector, {by}"] == Finding(
        f"collector, {by}", "ok", f"{collector.endpoint}{path} accepts requests"
    )
    (span,) = collector.spans.values()
    assert span.name == "otel-odibi doctor"
    assert found["span"] == Finding("span", "ok", f"{collector.endpoint}{path} accepts trace {span.trace_id.hex()}")
    resource = collector.requests["traces"][-1].resource_spans[0].resource
    assert "flights" in [attribute.value.string_value for attribute in resource.attributes]
    assert all(headers["authorization"] == SECRET for headers in collector.headers["traces"])


def test_a_sampler_that_leaves_spans_out_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is why runs are missing; nothing is sent."""
    with grpc_sink() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
        found = check("span")
    assert (found.status, found.remedy) == ("warn", "unset OTEL_TRACES_SAMPLER")
    assert collector.spans == {}


def test_the_variables_of_traces_alone_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoint as it is, protocol and headers."""
    with http_sink() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.endpoint}/v1/traces")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-key=traces")
        assert check("span").status == "ok"
    assert {headers["x-key"] for headers in collector.headers["traces"]} == {"traces"}


def test_both_protocols_are_tried_where_the_port_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that spans do not go by is no failure; the wrong one for the port has a remedy of its own."""
    both = {"gRPC": "http://127.0.0.1:4317", "HTTP": "http://127.0.0.1:4318/v1/traces"}
    tried = []

    def accepted(check: str, url: str, by: str, *args: object) -> Finding:
        tried.append((by, url))
        return Finding(check, "fail" if by == "gRPC" else "ok", "", "")

    monkeypatch.setattr(doctor, "_accepted", accepted)
    for port, protocol in ((4317, "http/protobuf"), (4318, "http/protobuf")):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        found = {finding.check: finding for finding in examine()}
        assert dict(tried[:2]) == both
        assert tried[2] == ("HTTP", f"http://127.0.0.1:{port}/v1/traces")
        assert found["collector, gRPC"][1:] == ("warn", "", "none, as spans go by HTTP")
        tried.clear()


@pytest.mark.parametrize(
    ("url", "by", "remedy"),
    [
        ("http://127.0.0.1:4317/v1/traces", "HTTP", "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, as the port is for that"),
        ("http://127.0.0.1:4318", "gRPC", "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, as the port is for that"),
    ],
)
def test_the_protocol_of_the_other_port_has_its_remedy(url: str, by: str, remedy: str) -> None:
    """The mistake that is made most."""
    assert doctor._accepted("span", url, by, doctor.Settings.load())[1:4:2] == ("fail", remedy)


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_is_away_fails(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    """With what went wrong."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    found = check("span")
    assert found.status == "fail"
    assert found.found.startswith("nobody listens at http://127.0.0.1:")
    assert found.remedy.startswith("start the collector")


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_hangs_fails(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    """In the time that a check may take."""
    monkeypatch.setattr(doctor, "_WAIT", 0.2)
    with hanging() as url:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        assert check("span").status == "fail"


def test_no_secret_is_shown_whatever_the_collector_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may say it all back: by header of any kind, and in the address."""
    with web(lambda path: (401, f"bad token {SECRET}")) as url:
        address = url.replace("//", f"//user:{SECRET}x@")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        for name in ("", "TRACES_"):
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}HEADERS", f"authorization=Bearer%20{SECRET}")
            findings = list(examine())
            assert next(finding for finding in findings if finding.check == "span").status == "fail"
            assert SECRET not in repr(findings)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where OTLP is asked for and not there."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    assert check("span")[1:] == ("fail", "OTLP over gRPC is not installed", "pip install 'otel-odibi[otlp]'")


def test_no_collector_is_fine() -> None:
    """Nothing is sent then."""
    assert check("collector") == Finding("collector", "ok", "no OTLP endpoint is set: nothing is sent")


# --- Prometheus and clock --------------------------------------------------------------------------------------------


def prometheus(jobs: list[str], **down: str) -> Callable[[str], tuple[int, str]]:
    """A Prometheus with metrics of the service by these jobs, one target that is up, and these that are down."""
    asked = 'count by (job) (last_over_time(odibi_process_uptime_seconds{service="fl\\"ights"}[1d]))'
    up = {"health": "up", "labels": {"job": "node"}, "lastError": ""}
    targets = [up, *({"health": "down", "labels": {"job": job}, "lastError": said} for job, said in down.items())]

    def answer(path: str) -> tuple[int, str]:
        if path == "/p/api/v1/targets?state=active":
            return 200, json.dumps({"data": {"activeTargets": targets}})
        assert doctor.parse.unquote(path) == f"/p/api/v1/query?query={asked}"
        return 200, json.dumps({"data": {"result": [{"metric": {"job": job}} for job in jobs]}})

    return answer


@pytest.mark.parametrize(
    ("jobs", "down", "status", "told"),
    [
        (["b", "a"], {}, "ok", '1 of 1 targets up; jobs that bring metrics of fl"ights: a, b'),
        (
            ["a"],
            {"x": "refused"},
            "warn",
            '1 of 2 targets up; jobs that bring metrics of fl"ights: a; x is down: refused',
        ),
        ([], {}, "warn", '1 of 1 targets up; jobs that bring metrics of fl"ights: none'),
        ([], {"x": "no"}, "fail", '1 of 2 targets up; jobs that bring metrics of fl"ights: none; x is down: no'),
    ],
)
def test_prometheus_is_asked_for_targets_and_metrics(
    monkeypatch: pytest.MonkeyPatch, jobs: list[str], down: dict[str, str], status: str, told: str
) -> None:
    """It scrapes us where it has metrics of the service; else what is down is told."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", 'fl"ights')
    with web(prometheus(jobs, **down)) as url:
        found = check("prometheus", prometheus=f"{url}/p/")
    assert (found.status, found.found, bool(found.remedy)) == (status, told, status != "ok")


@pytest.mark.parametrize("body", ["<html>", "[]", '{"data": {}}'])
def test_a_prometheus_that_is_none_fails(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Also one that is away, hangs, or whose address is none."""
    monkeypatch.setattr(doctor, "_WAIT", 0.2)
    with web(lambda path: (200, body)) as url:
        assert check("prometheus", prometheus=url).status == "fail"
    with hanging() as silent:
        for address in (url, silent, "file:///etc", "localhost:9090", "http://"):
            assert check("prometheus", prometheus=address).status == "fail"


@pytest.mark.parametrize(
    ("off", "status", "told"),
    [
        (0, "ok", "in step with"),
        (-30, "warn", "ahead of"),
        (30, "warn", "behind"),
        (86_400, "fail", "behind"),
        (None, "warn", "not compared"),
    ],
)
def test_the_clock_is_compared_with_that_of_a_server(off: float | None, status: str, told: str) -> None:
    """By the header Date of an answer, of an error, too."""
    with web(lambda path: (404, ""), off) as url:
        found = check("clock", prometheus=url)
    assert found.status == status
    assert told in found.found


def test_a_clock_that_cannot_be_compared_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no server over HTTP there is nothing to compare with; one that is away is a failure of its own check."""
    assert "clock" not in [finding.check for finding in examine()]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    assert check("clock").status == "warn"


# --- versions --------------------------------------------------------------------------------------------------------


class Distribution:
    """An installed package."""

    def __init__(self, name: str, version: str) -> None:
        self.metadata, self.version = {"Name": name}, version


GOOD = {"otel-odibi": "0.1", "opentelemetry-api": "1.45.2", "opentelemetry-sdk": "1.45.2"}
GOOD |= {"opentelemetry_exporter_prometheus": "0.66b2", "PyArrow": "14.0.1"}
REQUIRED = [
    "opentelemetry-sdk<2,>=1.45.2", "opentelemetry-exporter-prometheus<1,>=0.66b2", "pyarrow>=14",
    "tomli>=2; python_version < '3.11'", "duckdb>=0.9; extra == 'query'", "pytz; extra == 'query'",
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ({}, "ok", "OpenTelemetry 1.45.2, 6 requirements met, but for the extras query"),
        ({"duckdb": "1.4.0", "pytz": "2026.1"}, "ok", "OpenTelemetry 1.45.2, 6 requirements met"),
        ({"duckdb": "0.8.1"}, "fail", "duckdb 0.8.1 < 0.9"),
        ({"pyarrow": "13.9", "PyArrow": ""}, "fail", "pyarrow 13.9 < 14"),
        ({"PyArrow": ""}, "fail", "pyarrow is missing"),
        ({"tomli": "1.0"}, "fail", "tomli 1.0 < 2"),
        (
            {"opentelemetry-api": "1.46.0"},
            "fail",
            "not of one release, opentelemetry-api 1.46.0, opentelemetry-exporter-prometheus 0.66b2, "
            "opentelemetry-sdk 1.45.2",
        ),
        ({"opentelemetry-exporter-gcp-trace": "1.9.0"}, "ok", "OpenTelemetry 1.45.2"),
        ({"otel-odibi": ""}, "ok", "OpenTelemetry 1.45.2, 0 requirements met"),
    ],
)
def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch, change: dict[str, str], status: str, told: str) -> None:
    """OpenTelemetry's packages with each other, all with what is required; extras may be absent."""
    installed = {name: version for name, version in {**GOOD, **change}.items() if version}
    monkeypatch.setattr(metadata, "distributions", lambda: [Distribution(*pair) for pair in installed.items()])
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRED)
    found = check("versions")
    assert (found.status, found.found[: len(told)]) == (status, told)


def test_what_is_installed_here_is_in_step() -> None:
    """Whatever this is tested with."""
    assert check("versions").status == "ok"


# --- the command -----------------------------------------------------------------------------------------------------


def test_no_check_takes_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever hangs."""
    go_on = threading.Event()
    monkeypatch.setattr(doctor, "SECONDS", 0.01)
    found = doctor._checked("disk", "mend it", lambda: go_on.wait(60) and None)  # type: ignore[arg-type, return-value]
    assert found == Finding("disk", "fail", "no answer within 0.01 s", "mend it")
    go_on.set()


def test_the_command_prints_a_line_a_check(tmp_path: Path) -> None:
    """Plain where it is piped; exit code 1 where one fails, and no telemetry directory is made."""
    done = otel_odibi("doctor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "ok    settings         all are the default"
    assert [line.split()[1] for line in lines] == ["settings", "directory", "endpoint", "collector", "versions"]
    bad = otel_odibi("doctor", "/proc/x", cwd=tmp_path)
    assert bad.returncode == 1
    assert bad.stdout.splitlines()[1].startswith("fail  directory        ")
    assert bad.stdout.splitlines()[1].endswith(" -> give another directory, or mend its permissions")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_json(tmp_path: Path) -> None:
    """An array, with the same exit code."""
    done = otel_odibi("doctor", "--json", "/proc/x", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert [finding["status"] for finding in found] == ["ok", "fail", "ok", "ok", "ok"] or found[0]["status"] == "ok"
    assert found[1].keys() == {"check", "status", "found", "remedy"}


@pytest.mark.skipif(os.name != "posix", reason="there is a pty on POSIX alone")
def test_a_terminal_gets_a_table(tmp_path: Path) -> None:
    """With the remedy in a column of its own."""
    import pty
    import subprocess

    from test_cli import COMMAND, environment

    parent, child = pty.openpty()
    variables = environment(TERM="xterm", COLUMNS="120")
    with subprocess.Popen([*COMMAND, "doctor", "/proc/x"], cwd=tmp_path, env=variables, stdout=child) as process:
        os.close(child)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(parent, 65_536):
                shown += part
    os.close(parent)
    assert process.returncode == 1
    assert b"remedy" in shown
    assert b"\x1b[1;31mfail" in shown
