"""The checks behind `otel-odibi doctor`: from settings to a span that a collector accepts, each with its remedy.

No check takes longer than `SECONDS`, whatever hangs, and none raises. Nothing is left behind but one test span, which
is what a collector is asked to accept. Header values and logins are never shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib import error, parse, request

from opentelemetry.util.re import parse_env_headers
from prometheus_client.parser import text_string_to_metric_families

from otel_odibi import names
from otel_odibi.clean import DEFAULT, message_of
from otel_odibi.errors import SettingError
from otel_odibi.exporters.prometheus import PATH, reachable
from otel_odibi.report.texts import size
from otel_odibi.settings import PREFIX, Settings, _without_login, read_project
from otel_odibi.telemetry import Telemetry, wants_otlp

OK, WARN, FAIL = "ok", "warn", "fail"
SECONDS: Final = 2.0
"""Longest time for one check; a request in it gets three quarters of that."""
_WAIT: Final = 0.75 * SECONDS
_OWN: Final = "OTEL_EXPORTER_OTLP_TRACES_"
_PATH: Final = {"gRPC": "", "HTTP": "/v1/traces"}
_PORTS: Final = {"4317": "gRPC", "4318": "HTTP"}
"""Where collectors listen. Source: OpenTelemetry protocol specification, OTLP/gRPC and OTLP/HTTP Default Port."""
_TRAIN: Final = "opentelemetry-(api|sdk|proto|semantic-conventions|instrumentation|exporter-(otlp-.+|prometheus))"
_REQUIREMENT: Final = re.compile(r"([\w.-]+)[^;]*?(?:>=([\w.]+)[^;]*)?(?:; *(.*))?")


class Finding(NamedTuple):
    """What one check found: ok, warn or fail; and what to do about it, where there is something to do."""

    check: str
    status: str
    found: str
    remedy: str = ""


def examine(directory: Path | None = None, prometheus: str | None = None) -> Iterator[Finding]:
    """Do all checks, one after the other; `directory` and `prometheus` are what the command line gave."""
    try:
        settings = Settings.load({"directory": directory})
    except SettingError as exc:  # it does not show secrets
        yield Finding("settings", FAIL, _public(str(exc).removesuffix(f"; {exc.remedy}"), None), exc.remedy)
        yield _versions()
        return
    yield _sources(settings, directory)
    yield _checked("directory", "give another directory, or mend its permissions", lambda: _writable(settings))
    yield _endpoint(settings)
    by, url, places = _destination(settings)
    yield from _collector(settings, by, url, places)
    if prometheus:
        remedy = "start Prometheus, or give another --prometheus"
        yield _checked("prometheus", remedy, lambda: _prometheus(prometheus, settings.service_name), settings)
    if server := prometheus or places.get("HTTP"):
        yield _checked("clock", "let the server be reached over HTTP", lambda: _clock(server), settings)
    yield _versions()


def _checked(check: str, remedy: str, work: Callable[[], Finding], settings: Settings | None = None) -> Finding:
    """Return what `work` finds, in a thread of its own: only so can a check end while what it looks at hangs."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as exc:  # noqa: BLE001 - what fails here is the finding
            better = getattr(exc, "remedy", remedy)
            found.append(Finding(check, FAIL, message_of(exc).removesuffix(f"; {better}"), better))

    thread = threading.Thread(target=run, name=f"otel-odibi-doctor-{check}", daemon=True)
    thread.start()
    thread.join(SECONDS)
    finding = found[0] if found else Finding(check, FAIL, f"no answer within {SECONDS:g} s", remedy)
    return finding._replace(found=_public(finding.found, settings))


def _public(text: str, settings: Settings | None) -> str:
    """Return a text that others may have written on one line, without secrets: no longer word of a header is shown."""
    values = list(settings.otlp_headers.values()) if settings else []
    values += parse_env_headers(os.environ.get(f"{_OWN}HEADERS", ""), liberal=True).values()
    for word in sorted({word for value in values for word in (value, *value.split())}, key=len, reverse=True):
        text = text.replace(word, "[hidden]") if len(word) > 3 else text
    return DEFAULT.text(" ".join(_without_login(text).split()), 400)


def _sources(settings: Settings, directory: Path | None) -> Finding:
    """Tell which settings are given, and where; warn of variables that set nothing."""
    project, given = read_project(Path.cwd()), {name for name, text in os.environ.items() if text.strip()}
    known, told = {PREFIX + field.name.upper() for field in dataclasses.fields(settings)}, []
    for field in dataclasses.fields(settings):
        sources = ["command line"] if field.name == "directory" and directory else []
        sources += [name for name in (PREFIX + field.name.upper(), *field.metadata["otel"]) if name in given]
        sources += ["pyproject.toml"] if field.name in project else []
        value = "[hidden]" if field.metadata["secret"] else getattr(settings, field.name)
        told += [f"{field.name}={value} ({sources[0]})"] if sources else []
    found = _public(", ".join(told) or "all are the default", settings)
    for name in sorted(name for name in given - known if name.startswith(PREFIX)):
        near = difflib.get_close_matches(name, known, 1, 0.9)
        return Finding("settings", WARN, f"{name} sets nothing; {found}", f"write {near[0]}" if near else "unset it")
    if not settings.enabled:
        return Finding("settings", WARN, f"telemetry is turned off; {found}", "set OTEL_ODIBI_ENABLED=true")
    return Finding("settings", OK, found)


def _writable(settings: Settings) -> Finding:
    """Write a file that nobody sees into the directory, or where it is to be made."""
    elsewhere = settings.parquet_uri or settings.prometheus_port is not None or wants_otlp(settings, "TRACES")
    if settings.directory is None and elsewhere:
        return Finding("directory", OK, "none is set: nothing is written to files")
    path = (settings.directory or Path("telemetry")).absolute()  # where `otel-odibi run` would write
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"x")
    free, most = shutil.disk_usage(place).free, settings.log_retention_bytes
    found = f"{path} can be {'written' if place == path else 'made'}, {size(free)} free"
    if free >= most:
        return Finding("directory", OK, found)
    return Finding("directory", WARN, f"{found}, and logs alone may take {size(most)}", "set log_retention_bytes")


def _endpoint(settings: Settings) -> Finding:
    """Scrape the Prometheus endpoint: that of a run which is there, else one that is there for this."""
    host, port = settings.prometheus_host, settings.prometheus_port
    if port is None:
        return Finding("endpoint", OK, "prometheus_port is not set: metrics are not served")

    def work() -> Finding:
        try:
            telemetry = _telemetry(settings, prometheus_port=port)
        except SettingError:
            with contextlib.suppress(Exception):  # another program may answer anything
                return Finding("endpoint", OK, f"in use by a run: {_scraped(f'http://{reachable(host)}:{port}{PATH}')}")
            raise
        with telemetry:
            return Finding("endpoint", OK, f"the port is free: {_scraped(str(telemetry.prometheus_url))}")

    return _checked("endpoint", "give another prometheus_port and prometheus_host", work)


def _telemetry(settings: Settings, prometheus_port: int | None = None) -> Telemetry:
    """Return telemetry as runs have it, but for all that it writes and sends."""
    nowhere = {"directory": None, "parquet_uri": None, "otlp_endpoint": None, "prometheus_port": prometheus_port}
    return Telemetry(dataclasses.replace(settings, **nowhere), environ={})  # type: ignore[arg-type]


def _scraped(url: str) -> str:
    series = [sample.name for family in text_string_to_metric_families(_get(url)[0]) for sample in family.samples]
    if not any(name.startswith("odibi_") for name in series):
        raise ValueError(f"{url} has no metrics of this package")
    return f"{url} answers, {len(series)} series read"


def _get(url: str) -> tuple[str, Any]:
    """Return body and headers, of an error page too."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} is not an http:// or https:// URL")
    try:
        answer = request.urlopen(url, timeout=_WAIT)  # noqa: S310 - of these two schemes
    except error.HTTPError as exc:
        answer = exc
    with answer:
        return answer.read().decode(errors="replace"), answer.headers


def _destination(settings: Settings) -> tuple[str, str, dict[str, str]]:
    """Return by which protocol spans go, to where, and where a collector may be by each: its ports tell which."""
    by = "gRPC" if (os.environ.get(f"{_OWN}PROTOCOL") or settings.otlp_protocol) == "grpc" else "HTTP"
    if not wants_otlp(settings, "TRACES"):
        return by, "", {}
    url = os.environ.get(f"{_OWN}ENDPOINT", "").strip() or f"{settings.otlp_endpoint}{_PATH[by]}"
    parts = parse.urlsplit(url if "://" in url else f"http://{url}")
    host, _, port = parts.netloc.rpartition(":")
    both = {other: f"{parts.scheme}://{host}:{port}{_PATH[other]}" for port, other in _PORTS.items()}
    return by, url, both if port in _PORTS else {by: url}


def _collector(settings: Settings, by: str, url: str, places: dict[str, str]) -> Iterator[Finding]:
    """Send no span, which a collector accepts, by each protocol; then one by that which is set."""
    for protocol, place in places.items():
        finding = _accepted(f"collector, {protocol}", place, protocol, settings)
        harmless = finding.status == FAIL and protocol != by
        yield finding._replace(status=WARN, remedy=f"none, as spans go by {by}") if harmless else finding
    with _telemetry(settings) as telemetry:
        span = telemetry.tracer_provider.get_tracer(names.SCOPE).start_span("otel-odibi doctor")
    if not url:
        yield Finding("collector", OK, "no OTLP endpoint is set: nothing is sent")
    elif not span.is_recording():
        yield Finding("span", WARN, "the sampler leaves it out, as it may spans of runs", "unset OTEL_TRACES_SAMPLER")
    else:
        span.end()
        yield _accepted("span", url, by, settings, [span])


def _accepted(check: str, url: str, by: str, settings: Settings, spans: Sequence[Any] = ()) -> Finding:
    """Export a span, or none, with the exporter that runs use."""
    remedy = "start the collector, or set OTEL_EXPORTER_OTLP_ENDPOINT, and _HEADERS as it wants them"
    if _PORTS.get(parse.urlsplit(url).netloc.rpartition(":")[2], by) != by:
        right = "grpc" if by == "HTTP" else "http/protobuf"
        remedy = f"set OTEL_EXPORTER_OTLP_PROTOCOL={right}, as the port is for that"
    try:
        module = importlib.import_module(f"opentelemetry.exporter.otlp.proto.{by.lower()}.trace_exporter")
    except ImportError:
        return Finding(check, FAIL, f"OTLP over {by} is not installed", "pip install 'otel-odibi[otlp]'")
    headers = {} if os.environ.get(f"{_OWN}HEADERS") else {k.lower(): v for k, v in settings.otlp_headers.items()}

    def work() -> Finding:
        heard, handler, logger = [""], logging.Handler(), logging.getLogger("opentelemetry")
        handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(handler)  # exporters log why they fail, and tell it in no other way
        exporter = module.OTLPSpanExporter(endpoint=url, headers=headers or None, timeout=_WAIT)
        try:
            accepted = exporter.export(spans).name == "SUCCESS"
        finally:
            logger.removeHandler(handler)
            exporter.shutdown()
        if not accepted:
            why = max(heard, key=len)  # the longest tells most
            refused = "Connection refused" in why
            raise ConnectionError(f"nobody listens at {url}" if refused else why or f"{url} does not accept it")
        what = [f"trace {span.context.trace_id:032x}" for span in spans] or ["requests"]
        return Finding(check, OK, f"{url} accepts {what[0]}")

    return _checked(check, remedy, work, settings)


def _prometheus(url: str, service: str) -> Finding:
    """Ask Prometheus for its targets, and for metrics of the service."""

    def asked(path: str) -> Any:
        return json.loads(_get(f"{url.rstrip('/')}/api/v1/{path}")[0])["data"]

    targets = asked("targets?state=active")["activeTargets"]
    down = [f"{t['labels'].get('job')} is down: {t.get('lastError')}" for t in targets if t["health"] == "down"]
    series = f"{names.PROCESS_UPTIME.prometheus}{{service={json.dumps(service, ensure_ascii=False)}}}[1d]"
    found = asked(f"query?query={parse.quote(f'count by (job) (last_over_time({series}))')}")["result"]
    jobs = ", ".join(sorted(result["metric"].get("job", "") for result in found)) or "none"
    up = f"{len(targets) - len(down)} of {len(targets)} targets up"
    text = "; ".join([up, f"jobs that bring metrics of {service}: {jobs}", *down[:1]])
    remedy = "let it scrape the collector or the endpoint, mend targets that are down, and run a pipeline"
    status = OK if found and not down else WARN if found or not down else FAIL
    return Finding("prometheus", status, text, "" if status == OK else remedy)


def _clock(url: str) -> Finding:
    """Compare the clock with the header Date of a server, which has whole seconds."""
    began = time.time()
    try:
        date = parsedate_to_datetime(_get(url)[1]["Date"]).timestamp()
    except (OSError, TypeError, ValueError) as exc:  # the last two where there is no date
        why = message_of(getattr(exc, "reason", exc))
        return Finding("clock", WARN, f"not compared: {url}: {why}", "let the server be reached over HTTP")
    ahead = (began + time.time()) / 2 - date - 0.5
    if abs(ahead) < 2:
        return Finding("clock", OK, f"in step with {url}")
    text = f"{abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} {url}"
    return Finding("clock", FAIL if abs(ahead) > 60 else WARN, text, "set both clocks by NTP")


def _versions() -> Finding:
    """Compare OpenTelemetry's packages with each other, and what is installed with what this package requires."""
    distributions = [found for found in metadata.distributions() if found.metadata["Name"]]
    have = {re.sub("[-_.]+", "-", found.metadata["Name"]).lower(): found.version for found in distributions}
    train = {name: _numbers(version) for name, version in sorted(have.items()) if re.fullmatch(_TRAIN, name)}
    # The stable packages of a release are 1.N, the others 0.(N + 21): 1.45 and 0.66 belong together.
    bad = ["not of one release"] if len({n[1] if n[0] else n[1] - 21 for n in train.values()}) > 1 else []
    bad += [f"{name} {have[name]}" for name in train] if bad else []
    lines = metadata.requires("otel-odibi") or () if "otel-odibi" in have else ()
    wanted = [(m[1].lower(), m[2] or "0", m[3] or "") for m in map(_REQUIREMENT.fullmatch, lines) if m]
    bad += [f"{n} {have[n]} < {least}" for n, least, _ in wanted if n in have and _numbers(have[n]) < _numbers(least)]
    bad += [f"{n} is missing" for n, _, marker in wanted if n not in have and not marker]
    if bad:
        return Finding("versions", FAIL, ", ".join(bad), "pip install -U otel-odibi opentelemetry-sdk")
    lacking = {marker.split("'")[1] for n, _, marker in wanted if n not in have and "extra ==" in marker}
    text = f"OpenTelemetry {have['opentelemetry-sdk']}, {len(wanted)} requirements met"
    return Finding("versions", OK, text + (f", but for the extras {', '.join(sorted(lacking))}" if lacking else ""))


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
