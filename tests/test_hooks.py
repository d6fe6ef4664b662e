"""The stock hooks, alerts told once, alerts from pyproject.toml, and the events of the core."""

from __future__ import annotations

import builtins
import contextlib
import contextvars
import inspect
import io
import json
import os
import re
import smtplib
import ssl
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from email.message import Message
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import otel_odibi as oo
from otel_odibi import alerts, hooks
from otel_odibi.channels import Email, Webhook, problem_of
from otel_odibi.clean import Cleaner
from otel_odibi.emitted import FactEvents
from otel_odibi.errors import SettingError
from otel_odibi.events import EventPriority
from otel_odibi.exporters.jsonl import JsonlSink
from otel_odibi.hooks import EventBus, declared
from otel_odibi.manager import MetricsManager
from otel_odibi.names import EVENTS
from otel_odibi.testing import capture

SECRET = "https://hooks.example.com/services/T0000/B0000/XyzXyzXyz"
FAILED = {
    "pipeline_name": "flights",
    "run_id": "r1",
    "trace_id": "4bf92f",
    "failed_count": 2,
    "outcome": "failure",
    "failed_nodes": ["read", "join"],
    "error_type": "ValueError",
    "error": "bad token=abcdefgh12345678",
}
FINE = {"pipeline_name": "flights", "run_id": "r2", "failed_count": 0, "success_count": 3, "outcome": "success"}


@pytest.fixture
def bus():
    """A bus that notes its errors."""
    made = EventBus(on_error=lambda where, exc: made.errors.append((where, str(exc))))
    made.errors = []
    yield made
    made.shutdown(timeout=0)


@pytest.fixture
def clock(monkeypatch):
    """The clock of alerts, which moves when told; pauses take no time."""
    fake = SimpleNamespace(now=1_700_000_000.0, ticks=0.0, pauses=[])

    def sleep(seconds):
        fake.pauses.append(seconds)
        fake.ticks += seconds

    fake.time, fake.monotonic, fake.sleep = lambda: fake.now, lambda: fake.ticks, sleep
    monkeypatch.setattr(alerts, "time", fake)
    return fake


@pytest.fixture
def posts(monkeypatch):
    """What webhooks were sent; `posts.answers` holds errors to raise first."""
    made = SimpleNamespace(sent=[], answers=[])

    def send(self, notice, timeout):
        if made.answers:
            raise made.answers.pop(0)
        made.sent.append(dict(notice))

    monkeypatch.setattr(Webhook, "send", send)
    return made


def http_error(code):
    return urllib.error.HTTPError(SECRET, code, f"error at {SECRET}", Message(), io.BytesIO())


# --- summary, cache statistics ---------------------------------------------------------------------------------------


def test_the_summary_shows_what_there_is(bus, capsys):
    """Name, counts, duration, cache hit rate."""
    manager = SimpleNamespace(get_cache_hit_rate=lambda: 62.5)
    event = {**FINE, "duration_ms": 5000.0, "metrics_manager": manager}
    bus.register_hook("pipeline_complete", bus.create_summary_hook())
    bus.emit("pipeline_complete", event)
    shown = capsys.readouterr().out
    for text in ("flights", "succeeded", "3", "failed", "0", "5.000 s", "62.5 %", "r2"):
        assert text in shown
    assert not bus.errors


ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.builds(object)
KEYS = ("pipeline_name", "success_count", "failed_count", "duration_ms", "cache_hit_rate", "metrics_manager", "error")


@given(st.dictionaries(st.sampled_from(KEYS), ODD))
def test_the_summary_never_fails(event):
    """Whatever keys are missing, whatever values are there."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        EventBus().create_summary_hook()(event)
    assert "Pipeline" in out.getvalue()


def test_the_summary_is_a_table_on_a_terminal(bus, monkeypatch):
    """Where rich is installed; square brackets in names are no markup."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    bus.create_summary_hook()({**FINE, "run_id": "[red]r2"})
    assert "│ run" in terminal.getvalue()
    assert "[red]r2" in terminal.getvalue()


def test_without_rich_and_without_stdout_the_summary_does_without(bus, monkeypatch):
    """As text, and not at all."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(hooks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "stdout", terminal)
    bus.create_summary_hook()(FINE)
    assert "│" not in terminal.getvalue()
    assert "flights" in terminal.getvalue()
    monkeypatch.setattr(sys, "stdout", None)
    bus.create_summary_hook()(FINE)


@pytest.mark.parametrize(
    ("stats", "shown"),
    [
        (
            {"enabled": True, "entry_count": 3, "total_size_mb": 1.5, "total_hits": 7},
            {"hits": "7", "entries": "3", "size, MB": "1.50"},
        ),
        ({"hits": 3, "misses": 1, "hit_rate": 0.1}, {"hits": "3", "misses": "1", "hit rate": "75.0 %"}),
        ({"total_hits": 0, "total_misses": 0}, {"hits": "0", "misses": "0", "hit rate": "0.0 %"}),
        ({"hit_rate": 0.5}, {"hit rate": "50.0 %"}),
        ({"hit_rate": 50}, {"hit rate": "50.0 %"}),
        ({}, {}),
    ],
)
def test_cache_statistics_under_all_names(bus, capsys, stats, shown):
    """The cache manager's own, which has `total_hits`, and others'."""
    bus.create_cache_stats_hook()({"cache_manager": SimpleNamespace(get_stats=lambda: stats)})
    lines = capsys.readouterr().out.splitlines()[1:]
    assert dict(re.split(r"  +", line.strip()) for line in lines) == shown


def test_hooks_without_what_they_need_do_nothing(bus, tmp_path, capsys):
    """No cache manager, no metrics manager, no directory."""
    bus.create_cache_stats_hook()({})
    bus.create_metrics_export_hook(tmp_path / "new")({})
    bus.create_log_rotation_hook(tmp_path / "missing")({})
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


# --- metrics export --------------------------------------------------------------------------------------------------


@pytest.fixture
def manager():
    """A metrics manager that knows of one execution."""
    made = MetricsManager()
    made.record_node_execution("read", 12.5, True, rows=3)
    return made


def test_metrics_are_exported_as_json_and_prometheus_text(bus, tmp_path, manager):
    """By default; the directory is made. The JSON document is the one that dashboards read."""
    bus.create_metrics_export_hook(tmp_path / "new" / "metrics")({"metrics_manager": manager})
    found = {path.suffix: path for path in (tmp_path / "new" / "metrics").iterdir()}
    assert set(found) == {".json", ".prom"}
    assert [node["node_name"] for node in json.loads(found[".json"].read_text())["by_node"]] == ["read"]
    assert 'odibi_node_duration_ms{engine="pandas",node="read"} 12.5' in found[".prom"].read_text()
    assert all(re.fullmatch(r"metrics_\d{8}T\d{6}_\d{6}_\d+_\d+", path.stem) for path in found.values())


def test_metrics_are_exported_in_the_formats_asked_for(bus, tmp_path, manager):
    """Parquet too; one that is unknown is refused at once."""
    bus.create_metrics_export_hook(str(tmp_path), formats=["parquet"])({"metrics_manager": manager})
    assert [path.suffix for path in tmp_path.iterdir()] == [".parquet"]
    with pytest.raises(SettingError, match="choose from json, prometheus, parquet"):
        bus.create_metrics_export_hook(tmp_path, ["xml"])


def test_a_metrics_manager_is_exported_in_every_format(bus, tmp_path, manager):
    """What was recorded by hand is in all three files."""
    bus.register_hook("pipeline_complete", bus.create_metrics_export_hook(tmp_path, ["json", "prometheus", "parquet"]))
    bus.emit("pipeline_complete", {"metrics_manager": manager})
    assert not bus.errors
    found = {path.suffix: path for path in tmp_path.iterdir()}
    assert "read" in found[".json"].read_text()
    assert 'node="read"' in found[".prom"].read_text()
    assert "read" in pq.read_table(found[".parquet"]).column("name").to_pylist()


def test_exports_at_the_same_moment_have_different_names(bus, tmp_path, manager, monkeypatch):
    """Even where the clock stands still."""
    monkeypatch.setattr(hooks.time, "time_ns", lambda: 1_700_000_000_123_456_789)
    hook = bus.create_metrics_export_hook(tmp_path, ["json"])
    for _ in range(5):
        hook({"metrics_manager": manager})
    assert len(list(tmp_path.iterdir())) == 5


# --- log rotation ----------------------------------------------------------------------------------------------------


def test_log_rotation_deletes_the_oldest_finished_segments_only(bus, tmp_path):
    """Never an active file, a dead process's one, or another program's."""
    with contextlib.closing(JsonlSink(tmp_path, "flights", max_bytes=1)) as sink:
        for number in range(6):
            sink.write(b'{"n": %d}\n' % number)
        sink.flush()
        for number in range(1, 6):
            os.utime(tmp_path / f"flights.00000{number}.jsonl.gz", (number, number))
        foreign = {"data.jsonl", "other.4711.jsonl", "notes.000001.txt", "flights.jsonl"}
        for name in foreign - {"flights.jsonl"}:
            (tmp_path / name).touch()
        bus.create_log_rotation_hook(tmp_path, max_files=2)({})
        assert {path.name for path in tmp_path.iterdir()} == foreign | {
            "flights.000004.jsonl.gz",
            "flights.000005.jsonl.gz",
        }
        bus.create_log_rotation_hook(tmp_path, max_files=0)({})
        assert {path.name for path in tmp_path.iterdir()} == foreign
    with pytest.raises(SettingError):
        bus.create_log_rotation_hook(tmp_path, max_files=-1)


# --- alerts: when ----------------------------------------------------------------------------------------------------


def test_an_alert_says_what_went_wrong(bus, capsys):
    """Pipeline, nodes, error without its secret, run and trace."""
    bus.create_alert_hook()(FAILED)
    assert capsys.readouterr().out.splitlines() == [
        "ALERT flights: 2 nodes failed",
        "failed: read, join",
        "ValueError: bad token=[redacted]",
        "run r1, trace 4bf92f",
    ]


def test_the_threshold_counts(bus, capsys):
    """Below it nothing is said."""
    hook = bus.create_alert_hook(threshold_failed=2)
    hook({"pipeline_name": "test", "failed_count": 1})
    assert capsys.readouterr().out == ""
    hook({"pipeline_name": "test", "failed_count": 2})
    assert "ALERT test: 2 nodes failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "event", "text"),
    [
        ({}, {"_event_name": "pipeline_failed"}, "1 node failed"),
        ({}, {"_event_name": "node_failed", "node_name": "read"}, "1 node failed"),
        ({}, {"outcome": "failure"}, "1 node failed"),
        ({}, {"failed_nodes": ["a", "b"]}, "2 nodes failed"),
        ({"condition": "failed_nodes", "value": 3}, {"failed_count": 2}, None),
        ({"condition": "duration_over", "value": 2}, {"duration_ms": 2500.0}, "took 2.5 s, more than 2 s"),
        ({"condition": "duration_over", "value": 2}, {"duration_ms": 2000.0}, None),
        ({"condition": "duration_over", "value": 2}, {}, None),
        ({"condition": "rows_under", "value": 100}, {"rows_out": 99}, "99 rows, fewer than 100"),
        ({"condition": "rows_under", "value": 100}, {"rows": 0}, "0 rows, fewer than 100"),
        ({"condition": "rows_under", "value": 100}, {"rows_out": None}, None),
        ({"condition": lambda event: "too many " + event["what"]}, {"what": "flights"}, "too many flights"),
        ({"condition": lambda event: True}, {}, "<lambda>"),
        ({"condition": lambda event: False}, {}, None),
        ({"pipeline": "flights"}, {"failed_count": 1}, None),
        ({"pipeline": "test"}, {"failed_count": 1}, "1 node failed"),
    ],
)
def test_conditions(bus, capsys, options, event, text):
    """Failed nodes, duration, rows, or a function's word."""
    bus.create_alert_hook(**options)({"pipeline_name": "test", **event})
    assert capsys.readouterr().out.partition("\n")[0] == ("" if text is None else f"ALERT test: {text}")


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"condition": "moon"}, "condition"),
        ({"condition": "duration_over"}, "value"),
        ({"condition": "rows_under", "value": "many"}, "value"),
        ({"quiet_seconds": -1}, "quiet_seconds"),
        ({"retries": None}, "retries"),
        ({"timeout": float("nan")}, "timeout"),
        ({"webhook": "ftp://example.com/XyzXyzXyz"}, "webhook"),
        ({"webhook": "https://me:XyzXyzXyz@example.com/"}, "webhook"),
        ({"webhook": "https://[XyzXyzXyz"}, "webhook"),
        ({"webhook": 42}, "webhook"),
        ({"webhook": SECRET, "webhook_format": "xml"}, "webhook_format"),
        ({"email": {"host": "mail", "pass": "XyzXyzXyz"}}, "email"),
        ({"email": {"host": "mail", "sender": "a@b", "recipients": []}}, "email.recipients"),
        ({"email": {"host": "mail", "sender": "a@b\nBcc: c@d", "recipients": "e@f"}}, "email.sender"),
        ({"email": {"host": "mail", "sender": "a@b", "recipients": "e@f", "port": "smtp"}}, "email.port"),
        (
            {"email": {"host": "m", "sender": "a@b", "recipients": "e@f", "starttls": False, "password": "XyzXyzXyz"}},
            "email.starttls",
        ),
    ],
)
def test_an_alert_that_cannot_work_is_refused_early_and_keeps_its_secrets(bus, options, setting):
    """The error names the setting and the remedy, and never shows a URL or a password."""
    with pytest.raises(SettingError) as caught:
        bus.create_alert_hook(**options)
    assert caught.value.name == setting
    assert caught.value.remedy
    assert "XyzXyzXyz" not in str(caught.value)


# --- alerts: once ----------------------------------------------------------------------------------------------------


def test_five_equal_failures_make_one_alert_and_one_recovery(bus, capsys):
    """However often it fails, and however often it is well then."""
    hook = bus.create_alert_hook()
    for event in (FINE, FAILED, FAILED, FAILED, FAILED, FAILED, FINE, FINE):
        hook(event)
    out = capsys.readouterr().out
    assert out.count("ALERT") == 1
    assert out.count("RECOVERED flights: failed_nodes is over (5 since 20") == 1


def test_it_is_told_again_when_the_quiet_period_is_over(bus, capsys, clock):
    """And says how often it has happened."""
    hook = bus.create_alert_hook(quiet_seconds=100)
    for step in (0, 99, 1, 99):
        clock.now += step
        hook(FAILED)
    out = capsys.readouterr().out
    assert out.count("ALERT") == 2
    assert "(failure 3 since 2023-11-14T22:13:20+00:00)" in out


def test_after_a_recovery_a_failure_is_news(bus, capsys):
    """Even within the quiet period, and where recoveries are not told."""
    hook = bus.create_alert_hook(recovery=False)
    for event in (FAILED, FINE, FAILED):
        hook(event)
    out = capsys.readouterr().out
    assert out.count("ALERT") == 2
    assert "RECOVERED" not in out


def test_pipelines_nodes_and_conditions_are_told_apart(bus, capsys):
    """Each is quiet for itself."""
    slow = bus.create_alert_hook(condition="duration_over", value=0)
    failed = bus.create_alert_hook()
    for _ in range(2):
        failed(FAILED)
        slow({**FINE, "duration_ms": 1})
        failed({**FAILED, "pipeline_name": "trains"})
        for node in ("read", "join"):
            failed({"_event_name": "node_failed", "pipeline_name": "flights", "node_name": node})
    assert capsys.readouterr().out.count("ALERT") == 5


@pytest.mark.parametrize("outcome", ["cancelled", "failure"])
def test_only_a_run_that_went_well_is_a_recovery(bus, capsys, outcome):
    """A cancelled one tells nothing, nor does one that failed otherwise."""
    hook = bus.create_alert_hook(condition="duration_over", value=2)
    hook({"pipeline_name": "flights", "duration_ms": 3000})
    hook({"pipeline_name": "flights", "duration_ms": 1000, "outcome": outcome})
    hook({"pipeline_name": "flights", "outcome": "success"})  # does not say how long
    assert "RECOVERED" not in capsys.readouterr().out
    hook({"pipeline_name": "flights", "duration_ms": 1000, "outcome": "success"})
    assert "RECOVERED" in capsys.readouterr().out


PROGRAM = """if True:
    import json, sys
    from otel_odibi.hooks import EventBus
    bus = EventBus(state_dir=sys.argv[1])
    bus.register_hook("e", bus.create_alert_hook(name="nightly"))
    for event in json.loads(sys.argv[2]):
        bus.emit("e", event)
"""


def test_what_was_told_is_remembered_across_processes(tmp_path):
    """Once, then nothing, then the recovery, each in a process of its own."""

    def run(*events):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "state"), json.dumps(events)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    assert run(FAILED).startswith("ALERT flights")
    assert run(FAILED) == ""
    assert run(FINE).startswith("RECOVERED flights")
    assert run(FINE) == ""
    assert run(FAILED).startswith("ALERT flights")


def test_processes_that_fail_together_tell_it_once(tmp_path):
    """Whoever has the lock of the file tells."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps([FAILED] * 5)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert "".join(each.communicate(timeout=60)[0] for each in running).count("ALERT") == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"until": "soon"}', b'{"until": 1e300, "count": 1, "since": 0}']
)
def test_a_damaged_state_file_is_no_reason_to_be_silent(bus, tmp_path, capsys, content):
    """Better told twice than never; a time too far away is taken for a wrong clock."""
    hook = bus.create_alert_hook(state_dir=tmp_path)
    hook(FAILED)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    hook(FAILED)
    assert capsys.readouterr().out.count("ALERT") == 2


def test_without_a_state_directory_that_can_be_used_this_process_remembers(bus, tmp_path, capsys):
    """And says why."""
    (tmp_path / "file").touch()
    hook = bus.create_alert_hook(state_dir=tmp_path / "file" / "state")
    hook(FAILED)
    hook(FAILED)
    assert capsys.readouterr().out.count("ALERT") == 1
    assert bus.errors[0][0] == "alert state"


def test_a_state_file_that_another_process_holds_is_not_waited_for_long(bus, tmp_path, capsys, clock, monkeypatch):
    """Then this process remembers."""
    monkeypatch.setattr(alerts, "acquire", lambda path, flags: None)
    bus.create_alert_hook(state_dir=tmp_path)(FAILED)
    assert "ALERT" in capsys.readouterr().out
    assert sum(clock.pauses) <= 1.1 * alerts.LOCK_SECONDS
    assert bus.errors == [("alert state", "another process holds it")]


# --- alerts: delivery ------------------------------------------------------------------------------------------------


def test_a_webhook_gets_the_alert_and_the_recovery_in_order(bus, posts):
    """All that is known, as fields."""
    hook = bus.create_alert_hook(webhook=SECRET, webhook_format="json", console=False, name="nightly")
    hook(FAILED)
    hook(FAILED)
    hook(FINE)
    bus.shutdown()
    assert [notice["status"] for notice in posts.sent] == ["firing", "resolved"]
    first = posts.sent[0]
    assert (first["alert"], first["pipeline"], first["run_id"], first["trace_id"]) == (
        "nightly",
        "flights",
        "r1",
        "4bf92f",
    )
    assert first["failed_nodes"] == ["read", "join"]
    assert first["error"] == "bad token=[redacted]"
    assert first["id"] != posts.sent[1]["id"]


def test_delivery_is_tried_again_with_growing_pauses(bus, posts, clock):
    """After what may pass by itself."""
    posts.answers = [http_error(503), http_error(429), ConnectionResetError(104, "reset")]
    bus.create_alert_hook(webhook=SECRET)(FAILED)
    bus.shutdown()
    assert len(posts.sent) == 1
    assert not bus.errors
    for pause, base in zip(clock.pauses, (0.5, 1, 2), strict=True):
        assert base * 0.5 <= pause <= base * 1.5


@pytest.mark.parametrize(
    "answers",
    [[http_error(404)], [http_error(302)], [ssl.SSLCertVerificationError(1, SECRET)], [http_error(500)] * 4],
    ids=str,
)
def test_what_cannot_be_delivered_is_reported_without_its_secret_and_told_the_next_time(
    bus, posts, clock, capsys, answers
):
    """A failed delivery leaves no quiet period behind."""
    posts.answers = list(answers)
    hook = bus.create_alert_hook(webhook=SECRET)
    hook(FAILED)
    while not bus.errors:
        threading.Event().wait(0.001)
    (error,) = bus.errors
    assert error[0] == "alert alert_failed_nodes"
    assert error[1].startswith("webhook https://hooks.example.com: ")
    assert "Xyz" not in error[1]
    hook._deliver(hook._couriers[0])  # waits for the end of the delivery under way
    hook(FAILED)
    bus.shutdown()
    assert len(posts.sent) == 1
    assert capsys.readouterr().out.count("ALERT") == 2


def test_the_time_of_all_tries_together_is_limited(posts, clock):
    """However many there may be."""
    bus = EventBus(execution_timeout=20, on_error=lambda where, exc: None)
    posts.answers = [http_error(503)] * 100
    bus.create_alert_hook(webhook=SECRET, retries=100)(FAILED)
    bus.shutdown()
    assert sum(clock.pauses) <= 20
    assert not posts.sent


def test_one_channel_that_arrives_is_enough(bus, posts, clock, monkeypatch, capsys):
    """The mail server is away, the webhook is not: the quiet period holds."""
    posts.away = threading.Event()

    def refuse(self, notice, timeout):
        posts.away.set()
        raise smtplib.SMTPAuthenticationError(535, b"no")

    monkeypatch.setattr(Email, "send", refuse)
    mail = Email("mail.example.com", "a@b", ["c@d"], password="XyzXyzXyz", username="etl")
    hook = bus.create_alert_hook(webhook=SECRET, email=mail)
    hook(FAILED)
    assert posts.away.wait(30)
    for courier in hook._couriers:
        hook._deliver(courier)
    clock.now += 60
    hook(FAILED)
    bus.shutdown()
    assert capsys.readouterr().out.count("ALERT") == 1
    assert bus.errors == [("alert alert_failed_nodes", "mail server mail.example.com: SMTPAuthenticationError 535")]


def test_an_alert_of_a_process_that_died_before_delivery_is_told_by_the_next(bus, tmp_path, clock, capsys):
    """What was claimed but has not arrived holds only for as long as a delivery takes."""
    dead = SimpleNamespace(execution_timeout=30.0, report=bus.report, defer=lambda name, work: None)
    alerts.Alert(dead, webhook=SECRET, state_dir=tmp_path, name="a")(FAILED)
    following = alerts.Alert(dead, webhook=SECRET, state_dir=tmp_path, name="a")
    clock.now += 20
    following(FAILED)
    assert capsys.readouterr().out.count("ALERT") == 1
    clock.now += 20
    following(FAILED)
    assert capsys.readouterr().out.count("ALERT") == 1


def test_a_hanging_endpoint_holds_nobody_up(posts, monkeypatch):
    """`emit` returns while the delivery hangs, other asynchronous hooks run, and shutdown waits no longer than told."""
    hangs, go, other = threading.Event(), threading.Event(), threading.Event()

    def hang(self, notice, timeout):
        hangs.set()
        go.wait(30)

    monkeypatch.setattr(Webhook, "send", hang)
    bus = EventBus(on_error=lambda where, exc: None)
    bus.register_hook("pipeline_complete", bus.create_alert_hook(webhook=SECRET, console=False))
    bus.register_hook("pipeline_complete", lambda event: other.set(), async_execution=True)
    bus.emit("pipeline_complete", FAILED)
    assert hangs.wait(30)
    assert other.wait(30)
    bus.shutdown(timeout=0.01)
    assert bus.abandoned == 1
    assert not go.is_set()
    go.set()


def test_a_delivery_waits_for_the_one_before_it_only_so_long(bus, posts):
    """What it leaves is delivered by whoever comes next."""
    hook = bus.create_alert_hook(webhook=SECRET, timeout=0.01, retries=0, console=False)
    (courier,) = hook._couriers
    with courier.lock:
        hook(FAILED)
        while bus._going:
            threading.Event().wait(0.001)
    assert not posts.sent
    hook(FINE)
    bus.shutdown()
    assert [notice["status"] for notice in posts.sent] == ["firing", "resolved"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_alerts_though_its_parent_was_delivering(bus, posts):
    """Locks held by the parent's threads are fresh in the child, and the parent's notices are the parent's."""
    hook = bus.create_alert_hook(webhook=SECRET, console=False)
    with hook._couriers[0].lock, hook._memory._lock:
        child = os.fork()
        if not child:
            hook(FAILED)
            bus.shutdown(30)
            os._exit(0 if len(posts.sent) == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_secrets_are_kept_out_of_payloads_and_reprs(posts, monkeypatch, capsys):
    """Though an error quotes the webhook's URL and the mail password, and a pattern of the host's own."""
    monkeypatch.setattr(Email, "send", Webhook.send)
    mail = {"host": "mail.example.com", "sender": "a@b", "recipients": ["c@d"], "password": "correct horse"}
    bus = EventBus(cleaner=Cleaner(patterns=["PNR[0-9]+"]), on_error=lambda where, exc: None)
    hook = bus.create_alert_hook(webhook=SECRET, email=mail)
    error = f"POST {SECRET} for PNR123 with correct horse failed at /services/T0000/B0000/XyzXyzXyz"
    hook({**FAILED, "error": error})
    bus.shutdown()
    told = json.dumps(posts.sent) + capsys.readouterr().out
    for secret in ("Xyz", "correct horse", "PNR123"):
        assert secret not in told
        assert secret not in repr([hook, hook._couriers[0].channel, hook._couriers[1].channel])


@pytest.mark.parametrize(
    ("error", "text", "may_pass"),
    [
        (http_error(500), "HTTP 500", True),
        (http_error(408), "HTTP 408", True),
        (http_error(400), "HTTP 400", False),
        (urllib.error.URLError(ConnectionRefusedError(111, SECRET)), "ConnectionRefusedError Connection refused", True),
        (urllib.error.URLError(ssl.SSLCertVerificationError(1, SECRET)), "SSLCertVerificationError", False),
        (TimeoutError(SECRET), "TimeoutError", True),
        (smtplib.SMTPDataError(451, SECRET.encode()), "SMTPDataError 451", True),
        (smtplib.SMTPSenderRefused(550, SECRET.encode(), "a@b"), "SMTPSenderRefused 550", False),
        (smtplib.SMTPServerDisconnected(SECRET), "SMTPServerDisconnected", True),
        (ValueError(SECRET), "ValueError", False),
    ],
    ids=str,
)
def test_errors_are_told_by_type_and_number(error, text, may_pass):
    """Their words may hold secrets."""
    told, passes = problem_of(error)
    assert told.startswith(text)
    assert "Xyz" not in told
    assert passes is may_pass


def test_a_webhook_is_not_redirected(monkeypatch):
    """Neither the notice nor the URL goes to another host."""
    made = []
    monkeypatch.setattr(urllib.request, "build_opener", lambda *handlers: made.extend(handlers) or real(*handlers))
    real = urllib.request.OpenerDirector
    with contextlib.suppress(Exception):
        Webhook(SECRET).send({"text": "t"}, 1)
    request = urllib.request.Request(SECRET)
    assert made[0]().redirect_request(request, None, 302, "", {}, "https://elsewhere.example.com") is None


def test_closed_consoles_do_no_harm(bus, monkeypatch):
    """Nor missing ones."""
    closed = io.StringIO()
    closed.close()
    for stdout in (closed, None):
        monkeypatch.setattr(sys, "stdout", stdout)
        bus.create_alert_hook()(FAILED)


# --- alerts: declared ------------------------------------------------------------------------------------------------


def test_alerts_are_declared_in_pyproject(bus, posts, capsys):
    """An alert on a failure is registered for the success that ends it, too; an empty variable turns a channel off."""
    mail = {"host": "mail", "sender": "a@b", "recipients": ["c@d"], "username": "etl", "password_env": "SMTP_PASSWORD"}
    table = {
        "nightly": {"webhook_env": "SLACK", "email": mail},
        "late": {"on": "pipeline_complete", "pipeline": "flights", "condition": "duration_over", "value": 900},
    }
    pairs = declared(table, bus, {"SLACK": SECRET, "SMTP_PASSWORD": ""})
    for event, hook, options in pairs:
        bus.register_hook(event, hook, **options)
    assert [(event, hook.__name__) for event, hook, _ in pairs] == [
        ("pipeline_failed", "nightly"),
        ("pipeline_complete", "nightly"),
        ("pipeline_complete", "late"),
    ]
    for event in ("pipeline_complete", "pipeline_failed"):
        bus.emit(event, {**FAILED, "duration_ms": 1000})
    bus.emit("pipeline_complete", {**FINE, "duration_ms": 901_000})
    bus.shutdown()
    assert [notice["status"] for notice in posts.sent] == ["firing", "resolved"]
    assert re.findall("^[A-Z]{5,}", capsys.readouterr().out, re.M) == ["ALERT", "RECOVERED", "ALERT"]
    assert bus.disable_hook("pipeline_complete", "late")


def test_the_documented_declaration_works(bus):
    """The one in the docstring names every key."""
    tomllib = pytest.importorskip("tomllib")
    example = textwrap.dedent(inspect.getdoc(declared).partition("::\n")[2].partition("An alert on")[0])
    table = tomllib.loads(example)["tool"]["otel-odibi"]["alerts"]
    environ = {"SLACK_WEBHOOK_URL": SECRET, "SMTP_PASSWORD": "XyzXyzXyz"}
    (event, hook, _), (other, _, how) = declared(table, bus, environ)
    assert event == other == "pipeline_complete"
    assert how == {"name": "numbers", "priority": EventPriority.LOW, "async_execution": True}
    assert [str(courier.channel) for courier in hook._couriers] == [
        "webhook https://hooks.example.com",
        "mail server mail.example.com",
    ]
    assert set(hooks._KEYS) - set(table["late"]) == {"webhook"}


def test_hooks_are_declared_in_pyproject(bus, tmp_path, capsys):
    """Stock ones with what makes them, or any function of a module."""
    table = {
        "numbers": {"hook": "metrics_export", "export_dir": str(tmp_path), "formats": ["parquet"]},
        "show": {"hook": "builtins:print", "on": "pipeline_start", "priority": "critical"},
    }
    for event, hook, options in declared(table, bus, {}):
        bus.register_hook(event, hook, **options)
    (show,) = bus.get_hooks("pipeline_start")
    assert (show.name, show.priority, show.async_execution) == ("show", EventPriority.CRITICAL, False)
    bus.emit("pipeline_start", {"pipeline_name": "flights"})
    bus.emit("pipeline_complete", {"metrics_manager": oo.MetricsManager()})
    assert "'pipeline_name': 'flights'" in capsys.readouterr().out
    assert [path.suffix for path in tmp_path.iterdir()] == [".parquet"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"on": "full_moon"}, "on"),
        ({"onn": "pipeline_failed"}, "onn"),
        ({"condition": "moon"}, "condition"),
        ({"value": {"nodes: ": "; 1"}}, "value"),
        ({"webhook_env": "MISSING"}, "webhook_env"),
        ({"webhook": "XyzXyzXyz"}, "webhook"),
        ({"email": {"host": "mail", "password": "XyzXyzXyz"}}, "email"),
        ({"hook": "full_moon"}, "hook"),
        ({"hook": "no.such.module:function"}, "hook"),
        ({"hook": "summary", "export_dir": "x"}, "hook"),
        ({"hook": "builtins:print", "end": ""}, "hook"),
        ({"hook": "log_rotation", "log_dir": "logs", "max_files": -1}, "max_files"),
        ({"hook": "summary", "priority": "whenever"}, "priority"),
        ({"hook": "summary", "on": "full_moon"}, "on"),
    ],
)
def test_a_declaration_that_cannot_work_names_its_place(bus, options, name):
    """Alert, key and remedy; never a secret."""
    with pytest.raises(SettingError) as caught:
        declared({"nightly": options}, bus, {})
    assert caught.value.name == f"[tool.otel-odibi.alerts.nightly] {name}"
    assert caught.value.remedy
    assert str(caught.value).count(caught.value.remedy) == 1
    assert "XyzXyzXyz" not in str(caught.value)


def test_a_declaration_is_a_table(bus):
    """Nothing else."""
    with pytest.raises(SettingError, match="not a table"):
        declared({"nightly": True}, bus)


# --- the events of the core ------------------------------------------------------------------------------------------


@pytest.fixture
def core(bus):
    """A bus that the scopes of this test feed, and what was emitted."""
    with capture() as captured:
        core = SimpleNamespace(bus=bus, seen=[], flushed=[], captured=captured)
        core.facts = FactEvents(bus, metrics_manager="manager", flush=lambda: core.flushed.append(len(core.seen)))
        for kind, listener in core.facts.listeners().items():
            captured.telemetry.subscribe(kind, listener)
        core.listen = lambda *events: [bus.register_hook(event, core.seen.append) for event in events]
        yield core


def run_flights(fails=False):
    with oo.pipeline("flights"):
        with oo.node("read", layer="ingest", engine="pandas") as node:
            node.cache(hit=False, key="3fa9")
            with contextlib.suppress(KeyError), node.attempt():
                raise KeyError("first")
            with node.attempt():
                node.output(rows=5)
        with contextlib.nullcontext() if fails else contextlib.suppress(ValueError), oo.node("join") as node:
            node.cache(hit=True)
            raise ValueError("no planes")


def test_a_pipeline_emits_events(core):
    """With the ids of its trace, in the order in which things happened."""
    core.listen(*EVENTS)
    run_flights()
    assert [event["_event_name"] for event in core.seen] == [
        "pipeline_start", "node_start", "cache_miss", "node_retry", "node_complete",
        "node_start", "cache_hit", "node_failed", "pipeline_complete",
    ]  # fmt: skip
    assert {(event["pipeline_name"], event["run_id"], event["trace_id"]) for event in core.seen} == {
        ("flights", "run-1", f"{1:032x}")
    }
    start, read, miss, retry, done, _, _, failed, complete = core.seen
    assert start["span_id"] == f"{1:016x}"
    assert (read["node_name"], read["layer"], read["engine"]) == ("read", "ingest", "pandas")
    assert miss["cache_key"] == "3fa9"
    assert (retry["attempt"], retry["error_type"]) == (2, "KeyError")
    assert (done["outcome"], done["rows"], done["attempt"], done["cache_hit"]) == ("success", 5, 2, False)
    assert done["duration_ms"] == 0
    assert (failed["outcome"], failed["error"], failed["error_type"]) == ("failure", "no planes", "ValueError")
    assert (complete["success_count"], complete["failed_count"], complete["outcome"]) == (1, 1, "success")
    assert (complete["failed_nodes"], complete["rows_out"]) == (["join"], 5)
    assert (complete["error"], complete["error_type"]) == ("no planes", "ValueError")
    assert complete["metrics_manager"] == "manager"


def test_a_pipeline_that_fails_completes_and_then_fails(core):
    """After all was flushed once, so that hooks find complete files."""
    core.listen("pipeline_complete", "pipeline_failed")
    with pytest.raises(ValueError, match="no planes"):
        run_flights(fails=True)
    assert [event["_event_name"] for event in core.seen] == ["pipeline_complete", "pipeline_failed"]
    assert core.seen[1]["outcome"] == "failure"
    assert core.flushed == [0]


def test_nothing_is_flushed_for_alerts_alone(core):
    """They want no files, so a pipeline does not wait for any."""
    core.bus.register_hook("pipeline_complete", core.bus.create_alert_hook())
    run_flights()
    assert not core.flushed


def test_events_that_nobody_wants_are_not_made(core, monkeypatch):
    """No data is put together, nothing is flushed, nothing kept."""
    monkeypatch.setattr(core.bus, "emit", builtins.exit)
    core.bus.register_hook("pipeline_complete", print, name="off")
    core.bus.disable_hook("pipeline_complete", "off")
    run_flights()
    assert not core.flushed
    assert not core.facts._runs


def test_nodes_outside_pipelines_and_runs_that_never_end_leave_nothing_behind(core, monkeypatch):
    """What is remembered of runs is bounded."""
    monkeypatch.setattr("otel_odibi.emitted._MAX_RUNS", 2)
    core.listen("pipeline_complete")
    with oo.node("alone"):
        pass
    assert not core.facts._runs

    def begin_without_end():
        oo.pipeline("lost").__enter__()
        with oo.node("read"):
            pass

    for _ in range(4):
        contextvars.copy_context().run(begin_without_end)
    assert len(core.facts._runs) == 2


def test_a_hook_on_a_nodes_event_runs_within_its_span(core):
    """So that what it logs is correlated."""
    core.bus.register_hook("node_complete", lambda event: oo.current_node().event("seen"))
    with oo.pipeline("flights"), oo.node("read"):
        pass
    assert [event.name for event in core.captured.node("read").events] == ["seen"]


def test_an_alert_of_a_real_run_has_its_trace_id(core, capsys):
    """The one of the exported span."""
    core.bus.register_hook("pipeline_complete", core.bus.create_alert_hook())
    run_flights()
    trace_id = f"{core.captured.pipeline('flights').context.trace_id:032x}"
    assert f"run run-1, trace {trace_id}" in capsys.readouterr().out
