"""The commands that look at what runs have left: on a terminal, piped, as JSON, and with files that cannot be read."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from test_cli import COMMAND, environment, otel_odibi

import otel_odibi as oo
from otel_odibi import store
from otel_odibi.cli import cli
from otel_odibi.cli.options import since, size_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a `telemetry` in it: two runs of the pipeline etl, of which the second failed."""
    folder = tmp_path_factory.mktemp("looking")
    for fails in (False, True):
        with oo.configure(service_name="etl", directory=folder / "telemetry", exit_timeout=60, set_global=False):
            run(fails)
    return folder


def run(fails: bool) -> None:
    with contextlib.suppress(LookupError), oo.pipeline("etl"):
        with oo.node("read", layer="ingest") as read:
            read.cache(hit=fails)
            read.output([1, 2, 3])
        with oo.node("clean", depends_on=["read"]):
            oo.get_logger().warning("three rows only", share=0.5)
            if fails:
                raise LookupError("no\x1b[31m rows")


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def call(*args: str) -> Result:
    done = CliRunner().invoke(cli, list(args), catch_exceptions=False, standalone_mode=False)
    assert done.return_value in (None, 0)
    return done


def rows(*args: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in call(*args, "--json").stdout.splitlines()]


def test_runs_are_listed_the_newest_first(here: Path) -> None:
    """A line a run, with what went wrong; as JSON a row has everything."""
    head, newest, oldest = call("runs").stdout.splitlines()
    assert head.split()[:3] == ["started", "(UTC)", "pipeline"]
    assert "failure" in newest
    assert newest.endswith("LookupError: no [31m rows")  # made harmless for a terminal
    assert "success" in oldest
    assert [row["outcome"] for row in rows("runs")] == ["failure", "success"]
    assert [row["outcome"] for row in rows("runs", "--limit", "1")] == ["failure"]
    assert rows("runs", "--pipeline", "other") == []


def test_nodes_are_summed_up(here: Path) -> None:
    """Executions, outcomes, rows and cache hits of each node, over all runs or one."""
    read = next(row for row in rows("nodes") if row["node"] == "read")
    assert (read["count"], read["success"], read["rows_out"], read["cache_hits"]) == (2, 2, 6, 1)
    text = call("nodes").stdout
    assert "1 failure" in text
    assert "50%" in text
    assert [row["count"] for row in rows("nodes", "--run", "last")] == [1, 1]


def test_a_run_is_drawn_as_a_waterfall(here: Path) -> None:
    """By its id, by how that begins, or the last one."""
    newest, oldest = rows("runs")
    assert str(newest["run_id"]) in call("trace").stdout
    assert str(oldest["run_id"]) in call("trace", str(oldest["run_id"])[:8]).stdout
    assert str(newest["run_id"]) in call("trace", "telemetry").stdout  # a directory, and the last run in it


def test_a_run_that_is_not_there_is_named_with_those_that_are(here: Path) -> None:
    """Exit code 2, and ids to choose from."""
    done = otel_odibi("trace", "xyz", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("otel-odibi: no run begins with 'xyz'; choose from: last, ")


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--level", "warning"], ["three rows only"] * 2 + ["node clean failed", "pipeline etl failed"]),
        (["--event", "node_failed"], ["node clean failed"]),
        (["--node", "clean", "--event", "log"], ["three rows only"] * 2),
        (["--text", "three rows", "--run", "last"], ["three rows only"]),
        (["--limit", "1"], ["pipeline etl failed"]),
        (["--since", "2100-01-01"], []),
    ],
)
def test_log_lines_are_filtered(here: Path, options: list[str], messages: list[str]) -> None:
    """By level, event, node, run, text and time; with a limit the newest, still in their order."""
    found = [str(row["message"]).partition(":")[0] for row in rows("logs", *options)]
    assert sorted(found) == sorted(messages)
    lines = call("logs", *options).stdout.splitlines()
    assert len(lines) == len(messages)
    assert not any("\x1b" in line for line in lines)


def test_log_lines_of_the_user_show_their_fields(here: Path) -> None:
    """A user's own field stands behind the message."""
    assert call("logs", "--text", "three rows", "--limit", "1").stdout.rstrip().endswith("three rows only  share=0.5")


def test_logs_can_be_followed(tmp_path: Path) -> None:
    """What is there first, then each line as it is written, until Ctrl-C, which is a good end."""
    with oo.configure(service_name="etl", directory=tmp_path / "telemetry", set_global=False):
        oo.get_logger().info("before")
        command = [*COMMAND, "logs", "--follow", "--text", "e", "--json"]
        with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as process:
            timer = threading.Timer(60, process.kill)
            timer.start()
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["message"] == "before"
            writing = threading.Event()
            writer = threading.Thread(target=write_until, args=(writing,))
            writer.start()
            assert json.loads(process.stdout.readline())["message"] == "meanwhile"
            writing.set()
            writer.join()
            process.send_signal(2)
            process.stdout.read()
            timer.cancel()
    assert process.returncode == 0


def write_until(done: threading.Event) -> None:
    while not done.wait(0.05):
        oo.get_logger().info("meanwhile")


def test_sql_asks_the_views(here: Path) -> None:
    """A query's result as a table or as JSON; a wrong one is told in duckdb's words."""
    query = "SELECT node, count(*) AS n FROM nodes GROUP BY node ORDER BY node"
    assert rows("sql", query) == [{"node": "clean", "n": 2}, {"node": "read", "n": 2}]
    assert call("sql", query).stdout.splitlines() == ["node   n", "clean  2", "read   2"]
    done = otel_odibi("sql", "SELECT x FROM nodes", cwd=here)
    assert done.returncode == 2
    assert '"x" not found' in done.stderr


def test_on_a_terminal_tables_have_colours_and_fit(here: Path) -> None:
    """Run ids are cut to what is enough to name them, texts are folded, and outcomes have their colours."""
    shown = on_terminal(["runs"], here, columns=80)
    assert "\x1b[1;31mfailure" in shown
    assert max(len(line) for line in plain(shown).splitlines()) <= 80


def on_terminal(args: list[str], cwd: Path, columns: int) -> str:
    master, slave = pty.openpty()
    env = environment(TERM="xterm-256color", COLUMNS=str(columns))
    with subprocess.Popen([*COMMAND, *args], cwd=cwd, env=env, stdout=slave, stderr=slave) as process:
        os.close(slave)
        chunks = []
        with contextlib.suppress(OSError):  # the end of a terminal, on Linux
            while chunk := os.read(master, 65_536):
                chunks.append(chunk)
        os.close(master)
    assert process.returncode == 0
    return b"".join(chunks).decode()


def plain(text: str) -> str:
    from rich.text import Text

    return Text.from_ansi(text).plain


def test_a_file_that_cannot_be_read_costs_itself_alone(place: Path, tmp_path: Path) -> None:
    """It is named in one line on standard error; everything else is answered."""
    subprocess.run(["cp", "-r", str(place / "telemetry"), str(tmp_path)], check=True)
    good = next((tmp_path / "telemetry").glob("spans/*/*.parquet"))
    (good.parent / "torn.parquet").write_bytes(good.read_bytes()[:500])
    done = otel_odibi("runs", "--json", cwd=tmp_path)
    assert [json.loads(line)["outcome"] for line in done.stdout.splitlines()] == ["failure", "success"]
    assert done.stderr.count("\n") == 1
    assert "torn.parquet" in done.stderr


@pytest.mark.parametrize("text", ["30m", "1.5h", "7d", "2026-01-31", "2026-01-31T08:00", "2026-01-31T08:00:00.5Z"])
def test_times_are_told_by_age_or_by_date(text: str) -> None:
    """A date without a zone is one of UTC."""
    found = since(text)
    if text.startswith("2026-01-31T08:00:00.5"):
        assert found == 1_769_846_400_500_000_000
    assert 0 < found < 2**63


@pytest.mark.parametrize(("text", "size"), [("1B", 1), ("500MB", 500_000_000), ("1.5 GB", 1_500_000_000)])
def test_sizes_are_in_units_of_a_thousand(text: str, size: int) -> None:
    """As disks are sold."""
    assert size_of(text) == size
    with pytest.raises(click.BadParameter, match="write 500MB"):
        size_of(text.replace("B", "iB"))


@pytest.mark.parametrize("text", ["", "yesterday", "5 days", "-3h", "2026-13-01"])
def test_what_is_no_time_is_a_wrong_usage(text: str) -> None:
    """The message shows how to write one."""
    with pytest.raises(click.BadParameter, match="write 30m, 2h"):
        since(text)


def test_spans_and_logs_are_exported(here: Path, tmp_path: Path) -> None:
    """As OTLP/JSON to standard output, or as CSV to a file."""
    requests = [json.loads(line) for line in call("export", "--run", "last").stdout.splitlines()]
    spans = [span for r in requests for s in r["resourceSpans"][0]["scopeSpans"] for span in s["spans"]]
    assert {span["name"] for span in spans} == {"pipeline etl", "node read", "node clean"}
    assert "resourceLogs" in json.loads(call("export", "--what", "logs").stdout.splitlines()[0])
    call("export", "--what", "nodes", "--format", "csv", "-o", str(tmp_path / "nodes.csv"))
    with open(tmp_path / "nodes.csv", newline="") as file:
        assert [row["node"] for row in csv.DictReader(file)] == ["read", "clean"] * 2


def test_compaction_says_what_it_would_do(place: Path, tmp_path: Path) -> None:
    """Nothing, where all files are young; two files of a day into one, where it may; deleting by age and by size."""
    subprocess.run(["cp", "-r", str(place / "telemetry"), str(tmp_path)], check=True)
    where = str(tmp_path / "telemetry")
    assert "would merge 0 files into 0" in call("compact", where, "--dry-run").stdout
    old = time.time() - 3 * 86_400
    for path in Path(where).glob("*/**/*.parquet"):
        os.utime(path, (old, old))
    shutil.rmtree(tmp_path / "telemetry" / "state")
    assert "merged" in call("compact", where).stdout
    assert len(store.open(where).summaries()) == 2
    assert call("compact", where, "--keep-bytes", "1kB", "--dry-run").stdout


def commands() -> Iterator[tuple[str, click.Command]]:
    for name, command in sorted(cli.commands.items()):
        if not command.hidden:
            yield name, command


EXAMPLES = [
    line.strip()
    for name, command in commands() if name not in ("demo", "run", "doctor", "active", "recover", "replay")
    for line in (command.help or "").partition("Example")[2].splitlines() if line.strip().startswith("otel-odibi ")
]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_the_help_runs(place: Path, tmp_path: Path, example: str) -> None:
    """As it stands there, with a run and a place that exist put for those that do not."""
    run_id = store.open(place / "telemetry").summaries()[1].run_id
    subprocess.run(["cp", "-r", str(place / "telemetry"), str(tmp_path)], check=True)
    text = example.replace("s3://bucket/telemetry", "telemetry").replace("/var/telemetry", "telemetry")
    text = text.replace("7f3a2c", run_id).replace("4bf92f35", run_id).replace(" --open", "")
    text = text.replace(" --follow", "").partition(" | jq")[0]
    text = text.replace("otel-odibi", shlex.join(COMMAND), 1)
    env = environment(GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md"))
    done = subprocess.run(text, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode in ((0, 1) if " check" in text else (0,)), done.stderr
    assert "Traceback" not in done.stderr


def test_a_shell_completes_commands_and_run_ids(here: Path) -> None:
    """As click's completion scripts ask: what begins with what is typed so far."""
    assert {"runs", "run"} <= set(completed("otel-odibi ru", here))
    known = {str(row["run_id"]) for row in rows("runs")}
    assert known < set(completed("otel-odibi trace ", here))


def completed(line: str, cwd: Path) -> list[str]:
    words = line.split(" ")
    env = environment(_OTEL_ODIBI_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    code = "from otel_odibi.cli import cli; cli(prog_name='otel-odibi')"
    done = subprocess.run([COMMAND[0], "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    return [part.partition(",")[2] for part in done.stdout.splitlines()]
