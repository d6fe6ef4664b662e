"""The `.prom` file: counts go on from process to process, live processes are put together, dead ones leave no trace."""

from __future__ import annotations

import json
import math
import os
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from prometheus_client.parser import text_string_to_metric_families
from test_prometheus import (
    TENFOLD,
    counter,
    data,
    distribution,
    exemplar,
    exponential,
    gauge,
    histogram,
    number,
    random_batch,
    updown,
)

from otel_odibi.errors import SettingError
from otel_odibi.exporters.segments import acquire, release
from otel_odibi.exporters.textfile import TextfileMetricExporter

OK, FAILED = MetricExportResult.SUCCESS, MetricExportResult.FAILURE


class Directory:
    """A telemetry directory, exporters on it, and what is in the file of the service `flights`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path / "prometheus"
        self.file = self.folder / "flights.prom"
        self.state = self.folder / ".flights.state.json"
        self.lost: list[tuple[str, int]] = []

    def exporter(self, **options) -> TextfileMetricExporter:
        options = {"service": "flights", "on_drop": lambda reason, count: self.lost.append((reason, count)), **options}
        return TextfileMetricExporter(self.path, **options)

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Values of a sample by its label values, the service's left out."""
        text = self.file.read_bytes().decode()
        samples = (s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name)
        return {tuple(v for k, v in sorted(s.labels.items()) if k != "service"): s.value for s in samples}

    def value(self, name: str) -> float:
        (value,) = self.values(name).values()
        return value


@pytest.fixture
def directory(tmp_path):
    return Directory(tmp_path)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a process of its own; it finds this module's names."""
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


PREAMBLE = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_textfile import *
directory = Directory(Path(sys.argv[1]))
"""


# --- one process -----------------------------------------------------------------------------------------------------


def test_the_file_is_what_node_exporter_wants(directory):
    """Whole, readable for all whatever the umask, without timestamps or exemplars, every series with the service."""
    before = os.umask(0o077)
    try:
        exporter = directory.exporter()
        point = number(5, {"node": "a"}, exemplars=[exemplar(1)])
        assert exporter.export(data(counter("odibi.node.rows", point, text="Rows."), resource={"a": "b"})) is OK
    finally:
        os.umask(before)
    assert directory.file.read_text() == (
        "# HELP odibi_node_rows_total Rows.\n"
        "# TYPE odibi_node_rows_total counter\n"
        'odibi_node_rows_total{node="a",service="flights"} 5.0\n'
    )
    assert stat.S_IMODE(directory.file.stat().st_mode) == 0o644
    others = [entry.name for entry in directory.folder.iterdir() if entry != directory.file]
    assert sorted(others) == [".flights.lock", ".flights.state.json"]


def test_a_series_tells_its_environment_too(directory):
    """Where the resource has one; of the same service in another it is a series of its own, after a lost state too."""
    for environment in ("prod", "test", "prod"):
        about = {"service.name": "other", "deployment.environment.name": environment}
        exporter = directory.exporter()
        exporter.export(data(counter("c", number(2)), resource=about))
        exporter.shutdown()
        directory.state.unlink()
    assert directory.file.read_text().splitlines()[2:] == [
        'c_total{environment="prod",service="flights"} 4.0',
        'c_total{environment="test",service="flights"} 2.0',
    ]


def test_an_attribute_named_service_wins(directory):
    """As on the endpoint."""
    directory.exporter().export(data(gauge("g", number(1, {"service": "own"}))))
    assert directory.file.read_text().splitlines()[-1] == 'g{service="own"} 1.0'


def test_two_services_have_no_series_in_common(directory):
    """node_exporter puts the files of a directory together, and fails where a series comes twice."""
    for service in ("a", "b/c"):
        directory.exporter(service=service).export(data(gauge("odibi.process.uptime", number(1), unit="s")))
    found = [path.read_text().splitlines()[-1] for path in sorted(directory.folder.glob("*.prom"))]
    wanted = ['odibi_process_uptime_seconds{service="a"} 1.0', 'odibi_process_uptime_seconds{service="b/c"} 1.0']
    assert sorted(found) == wanted


def test_cumulative_values_are_not_added_twice(directory):
    """The SDK hands over totals since the start, at every export."""
    exporter = directory.exporter()
    for total in (1, 3, 3, 7):
        exporter.export(data(counter("c", number(total)), histogram("h", distribution([total, 0], [1.0], total / 2))))
        assert directory.value("c_total") == total
        assert directory.values("h_bucket") == {("1.0",): total, ("+Inf",): total}
        assert directory.value("h_sum") == total / 2


def test_a_count_that_begins_anew_is_added(directory):
    """A later start time, or less than before: the counter was reset."""
    exporter = directory.exporter()
    for value, start in ((5, 1), (3, 2), (1, 2)):
        exporter.export(data(counter("c", number(value, start=start))))
    assert directory.value("c_total") == 5 + 3 + 1


def test_a_counter_that_was_silent_for_an_export_is_not_added_again(directory):
    """The callback of an observable one may fail once; its next total is compared with the one before."""
    exporter, other = directory.exporter(), gauge("g", number(1))
    for metrics in ((counter("c", number(5)), other), (other,), (counter("c", number(6)), other)):
        exporter.export(data(*metrics))
    assert directory.value("c_total") == 6


def test_the_service_is_that_of_the_resource(tmp_path, monkeypatch):
    """Where none is given; and the directory is OTEL_ODIBI_DIRECTORY, so that OTEL_METRICS_EXPORTER can name it."""
    monkeypatch.setenv("OTEL_ODIBI_DIRECTORY", str(tmp_path / "here"))
    TextfileMetricExporter().export(data(gauge("g", number(1)), resource={"service.name": "night run"}))
    assert (tmp_path / "here" / "prometheus" / "night%20run.prom").exists()


def test_a_target_that_cannot_be_a_directory_is_told(tmp_path):
    """At construction."""
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", "s3://bucket/path"):
        with pytest.raises(SettingError, match="directory="):
            TextfileMetricExporter(target)


def test_any_metric_of_the_sdk_can_be_exported(directory):
    """Through the SDK's own reader, exponential histograms included; the next run goes on from there."""
    for _ in range(2):
        reader = PeriodicExportingMetricReader(directory.exporter(service=None), math.inf)
        view = View(instrument_name="e", aggregation=ExponentialBucketHistogramAggregation())
        provider = MeterProvider([reader], Resource({"service.name": "flights"}), views=[view], shutdown_on_exit=False)
        meter = provider.get_meter("m")
        meter.create_counter("c").add(5)
        meter.create_up_down_counter("u").add(2)
        meter.create_gauge("g").set(7)
        for value in (1, 2, 300):
            meter.create_histogram("e").record(value)
            provider.force_flush()
        provider.shutdown()
    assert directory.value("c_total") == 10
    assert directory.value("e_count") == 6
    assert directory.value("e_sum") == 606
    assert directory.value("u") == 0
    assert directory.value("g") == 7
    assert directory.lost == []


# --- one process after the other -------------------------------------------------------------------------------------


def test_counters_and_histograms_go_on_from_the_last_process(directory):
    """A first run counts 5, a second 3: the file shows 8, so that rate() sees them."""
    for count in (5, 3):
        exporter = directory.exporter()
        exporter.export(data(counter("c", number(count)), histogram("h", distribution([count, 1], [1.0], 2.5))))
        exporter.shutdown()
    assert directory.value("c_total") == 8
    assert directory.values("h_bucket") == {("1.0",): 8, ("+Inf",): 10}
    assert directory.value("h_sum") == 5


def test_what_a_process_had_under_way_ends_with_it(directory):
    """Of an up-down counter 0 stays, of a gauge its last value."""
    exporter = directory.exporter()
    exporter.export(data(updown("odibi.node.active", number(2)), gauge("g", number(9))))
    assert directory.value("odibi_node_active") == 2
    exporter.shutdown()
    assert directory.value("odibi_node_active") == 0
    assert directory.value("g") == 9
    assert exporter.export(data(counter("c", number(1)))) is FAILED


def test_a_later_process_sets_a_gauge_lower(directory):
    """What is live counts, however high it was."""
    first, second = directory.exporter(), directory.exporter()
    first.export(data(gauge("g", number(9))))
    first.shutdown()
    second.export(data(gauge("g", number(4))))
    assert directory.value("g") == 4


def test_a_timestamp_keeps_its_maximum_for_ever(directory):
    """A run that is late must not set back when a pipeline last succeeded."""
    for moment in (200, 100):
        exporter = directory.exporter()
        exporter.export(data(gauge("odibi.pipeline.last_success.timestamp", number(moment), unit="s")))
        assert directory.value("odibi_pipeline_last_success_timestamp_seconds") == 200
        exporter.shutdown()


def test_new_bounds_of_a_histogram_win(directory):
    """Counts go on where a bound was there before, else from the next lower one; of all its series."""
    first, second = directory.exporter(), directory.exporter()
    points = [distribution([1, 1, 1], [1.0, 5.0], 10.0, {"k": k}) for k in "ab"]
    first.export(data(histogram("h", *points)))
    second.export(data(histogram("h", distribution([1, 1, 1], [2.0, 5.0], 10.0, {"k": "a"}))))
    assert directory.values("h_bucket") == {
        ("a", "2.0"): 2, ("a", "5.0"): 4, ("a", "+Inf"): 6,
        ("b", "2.0"): 1, ("b", "5.0"): 2, ("b", "+Inf"): 3,
    }  # fmt: skip
    assert directory.values("h_sum") == {("a",): 20, ("b",): 10}


def test_exponential_histograms_keep_the_bounds_of_all(directory):
    """Each process has bounds where it has values."""
    directory.exporter().export(data(exponential("e", 0, [1], total=1.5)))
    directory.exporter().export(data(exponential("e", 0, [0, 0, 2], total=12.0)))
    buckets = directory.values("e_bucket")
    assert buckets == {("1.0",): 0, ("2.0",): 1, ("4.0",): 1, ("8.0",): 3, ("+Inf",): 3}


def test_a_metric_that_changed_its_type_starts_anew(directory):
    """The new one wins, and the file stays valid."""
    first = directory.exporter()
    first.export(data(gauge("x", number(7))))
    first.shutdown()
    directory.exporter().export(data(histogram("x", distribution([1, 0], [1.0], 1.0))))
    assert directory.file.read_text().count("# TYPE x ") == 1
    assert directory.value("x_count") == 1


# --- several processes at once ---------------------------------------------------------------------------------------


def test_live_processes_are_put_together(directory):
    """Counters, histograms and up-down counters are added up, of gauges the maximum is taken."""
    for count in (1, 2):
        metrics = (
            counter("c", number(count)),
            updown("u", number(count)),
            gauge("g", number(count * 10)),
            histogram("h", distribution([count, 0], [1.0], 1.0)),
        )
        directory.exporter().export(data(*metrics))
    assert [directory.value(name) for name in ("c_total", "u", "g", "h_count")] == [3, 3, 20, 3]


COUNT = """
exporter = directory.exporter()
for total in range(1, 21):
    assert exporter.export(data(counter("c", number(total)))) is OK
exporter.shutdown()
"""


def test_processes_that_write_at_the_same_time_lose_nothing(directory):
    """They wait for each other."""
    command = [sys.executable, "-c", PREAMBLE + COUNT, str(directory.path)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]
    assert directory.value("c_total") == 80


WAIT = """
exporter = directory.exporter()
exporter.export(data(counter("c", number(5)), updown("u", number(1)), gauge("g", number(70))))
print("written", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_its_counts_and_nothing_under_way(directory):
    """What it had written counts; the next process to write takes its up-down counters and gauges out."""
    command = [sys.executable, "-c", PREAMBLE + WAIT, str(directory.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        exporter = directory.exporter()
        mine = data(counter("c", number(3)), updown("u", number(1)), gauge("g", number(2)))
        exporter.export(mine)
        assert [directory.value(name) for name in ("c_total", "u", "g")] == [8, 2, 70]
        process.kill()
    exporter.export(mine)
    assert [directory.value(name) for name in ("c_total", "u", "g")] == [8, 1, 2]


def test_the_part_of_another_machine_ends_when_it_is_old(directory, monkeypatch):
    """Whether a process runs there cannot be seen from here."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "elsewhere")
        directory.exporter().export(data(updown("u", number(5))))
    here = directory.exporter()
    here.export(data(updown("u", number(1))))
    assert directory.value("u") == 6
    text = directory.state.read_text()
    state = json.loads(text)
    for part in state["parts"].values():
        part["updated"] -= 3_600
    directory.state.write_text(json.dumps(state))
    here.export(data(updown("u", number(1))))
    assert directory.value("u") == 1


def test_a_pid_that_is_used_again_is_not_the_same_process(directory):
    """A process is known by its start, too."""
    directory.exporter().export(data(updown("u", number(5))))
    state = json.loads(directory.state.read_text())
    for part in state["parts"].values():
        part["started"] -= 100
    directory.state.write_text(json.dumps(state))
    directory.exporter().export(data(updown("u", number(1))))
    assert directory.value("u") == 1


FORK = """
exporter = directory.exporter()
exporter.export(data(counter("old", number(5)), counter("new", number(5)), updown("u", number(1))))
pid = os.fork()
if pid == 0:
    # 3 more of what the parent had counted 5 of; 7 of what counts from 0 in a child; 2 more under way
    own = data(counter("old", number(8)), counter("new", number(7, start=2)), updown("u", number(3)))
    assert exporter.export(own) is OK
    assert [directory.value(name) for name in ("old_total", "new_total", "u")] == [8, 12, 3]
    exporter.shutdown()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
exporter.export(data(counter("old", number(6)), counter("new", number(6)), updown("u", number(1))))
"""


def test_a_forked_child_adds_what_it_counts_itself(directory):
    """Not what its parent had counted before the fork; and the parent goes on as if nothing had happened."""
    result = run(FORK, directory.path)
    assert result.returncode == 0, result.stderr
    assert [directory.value(name) for name in ("old_total", "new_total", "u")] == [9, 13, 1]


# --- bad luck --------------------------------------------------------------------------------------------------------


def test_without_a_state_the_file_itself_is_the_base(directory, caplog):
    """Counts, last gauges and timestamps come from there; a live process goes on with what is new."""
    metrics = [
        counter("c", number(5, {"k": 'a"\\\n{},=é'})),
        histogram("h", distribution([1, 2], [1.0], 9.0, {"k": "x"})),
        updown("odibi.node.active", number(1)),
        gauge("g", number(-3)),
    ]
    first, live = directory.exporter(), directory.exporter()
    first.export(data(*metrics))
    live.export(data(counter("c", number(2, {"k": "live"}))))
    first.shutdown()
    directory.state.unlink()
    live.export(data(counter("c", number(3, {"k": "live"}))))
    assert directory.values("c_total") == {('a"\\\n{},=é',): 5, ("live",): 3}
    assert directory.values("h_bucket") == {("x", "1.0"): 1, ("x", "+Inf"): 3}
    assert directory.values("h_sum") == {("x",): 9}
    assert directory.value("odibi_node_active") == 0
    assert directory.value("g") == -3
    assert caplog.records == []


@settings(TENFOLD, max_examples=3)
@given(seed=st.integers(0, 2**64))
def test_any_file_can_be_the_base_of_the_next(tmp_path_factory, seed):
    """A thousand random names come back from the text as they were: after a second run every count is doubled."""
    directory = Directory(tmp_path_factory.mktemp("base"))
    _, batch = random_batch(seed, 500)
    directory.exporter().export(batch)
    before = directory.values("odibi_node_rows_total")
    directory.state.unlink()
    directory.exporter().export(batch)
    assert directory.values("odibi_node_rows_total") == {labels: 2 * value for labels, value in before.items()}
    assert directory.lost == []


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b'{"version":2}', b'{"version":1,"base":{"c":["counter","",""]},"parts":{}}', b"\xff\x00"],
)
def test_a_damaged_state_is_replaced(directory, caplog, text):
    """By what the file says; with one warning."""
    directory.exporter().export(data(counter("c", number(5))))
    directory.state.write_bytes(text)
    exporter = directory.exporter()
    for _ in range(2):
        assert exporter.export(data(counter("c", number(3)))) is OK
    assert directory.value("c_total") == 8
    assert len(caplog.records) == 1


@given(
    damage=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    ),
    place=st.integers(0, 5),
)
@settings(deadline=None, max_examples=50)
def test_no_state_makes_an_export_fail(tmp_path_factory, damage, place):
    """Whatever is found where something else should be."""
    directory = Directory(tmp_path_factory.mktemp("state"))
    exporter = directory.exporter()
    exporter.export(data(counter("c", number(5)), histogram("h", distribution([1], [], 1.0)), gauge("g", number(1))))
    state = json.loads(directory.state.read_text())
    (part,) = state["parts"].values()
    places = [
        (state, "base"),
        (state, "parts"),
        (state["base"], "c"),
        (state["base"]["h"], 3),
        (part, "families"),
        (part, "host"),
    ]
    holder, key = places[place]
    holder[key] = damage
    directory.state.write_text(json.dumps(state))
    assert exporter.export(data(counter("c", number(6)))) is OK


@pytest.mark.parametrize(
    "rest", ["c_total{", "# TYPE h histogram\nh_bucket 5\n", 'h_bucket{le="x"} 1\n', "\x00\n", "x 1 2 3\n", "# TYPE\n"]
)
def test_of_a_damaged_file_is_used_what_can_be_read(directory, rest):
    """Somebody may have edited it."""
    directory.exporter().export(data(counter("c", number(5))))
    directory.state.unlink()
    directory.file.write_text(directory.file.read_text() + rest)
    assert directory.exporter().export(data(counter("c", number(3)))) is OK
    assert directory.value("c_total") == 8


def test_a_failed_write_loses_nothing(directory, caplog):
    """It is counted each time and warned about once; the next that succeeds brings everything."""
    exporter = directory.exporter()
    directory.folder.touch()
    for total in (1, 2):
        assert exporter.export(data(counter("c", number(total)))) is FAILED
    assert directory.lost == [("write_failed", 1)] * 2
    assert len(caplog.records) == 1
    directory.folder.unlink()
    assert exporter.export(data(counter("c", number(3)))) is OK
    assert directory.value("c_total") == 3


def test_a_write_that_fails_half_way_adds_nothing_twice(directory):
    """The state is there, the file is not: the next export must know."""
    exporter = directory.exporter()
    directory.folder.mkdir()
    directory.file.mkdir()
    assert exporter.export(data(counter("c", number(5)))) is FAILED
    directory.file.rmdir()
    assert exporter.export(data(counter("c", number(6)))) is OK
    assert directory.value("c_total") == 6


def test_the_wait_for_other_processes_is_bounded(directory):
    """A process that hangs with the lock held costs an export, not the program."""
    exporter = directory.exporter()
    directory.folder.mkdir()
    held = acquire(directory.folder / ".flights.lock", os.O_RDWR | os.O_CREAT)
    assert exporter.export(data(counter("c", number(5))), timeout_millis=20) is FAILED
    exporter.shutdown(timeout_millis=20)
    release(held)
    assert not directory.file.exists()
    assert [reason for reason, _ in directory.lost] == ["write_failed", "write_failed"]


def test_series_are_bounded(directory):
    """What has not been reported lately makes room for what is; what was dropped is counted."""
    exporter = directory.exporter(limit=3)
    exporter.export(data(counter("c", *(number(1, {"k": f"old{i}"}) for i in range(2)))))
    exporter.shutdown()
    live = directory.exporter(limit=3)
    live.export(data(counter("c", *(number(1, {"k": f"new{i}"}) for i in range(2))), gauge("g", number(1))))
    assert set(directory.values("c_total")) == {("new0",), ("new1",)}
    assert directory.value("g") == 1
    assert directory.lost == [("series_limit", 1)]


def test_an_exporter_that_was_never_used_leaves_no_file(directory):
    """A program that stops before its first export."""
    exporter = directory.exporter()
    exporter.shutdown()
    exporter.shutdown()
    assert not directory.folder.exists()
    assert exporter.force_flush()
