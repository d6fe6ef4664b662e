"""The command `otel-odibi`: help, errors, and `run`, which must be as `python` is."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from otlp_endpoint import endpoint

from otel_odibi import __version__, store

COMMAND = [sys.executable, "-m", "otel_odibi"]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment without what would configure telemetry."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "PYTHON"))}
    root = str(Path(__file__).parent.parent)
    return {**plain, "PYTHONPATH": root, "PYTHONHASHSEED": "0", "COLUMNS": "100", **variables}


def execute(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, encoding="utf-8", timeout=120
    )


def otel_odibi(*args: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return execute([*COMMAND, *args], cwd, **variables)


def told(done: subprocess.CompletedProcess[str]) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


# --- run -------------------------------------------------------------------------------------------------------------

PROGRAMS = {
    "namespace": """
        import sys
        from dataclasses import dataclass
        x: int = 1
        print(__name__, __file__, __package__, __spec__ and __spec__.name, __doc__, __builtins__, sys.argv)
        print(sys.path[0], sys.modules["__main__"].x, sorted(globals()))
    """,
    "pickle": """
        import pickle
        class Row: pass
        print(type(pickle.loads(pickle.dumps(Row()))) is Row)
    """,
    "exit code": "import sys; sys.exit(3)",
    "exit text": "import sys; sys.exit('no data today')",
    "exit nothing": "import sys; sys.exit()",
    "error": """
        def divide(a, b):
            return a / b
        print("before", flush=True)
        divide(1, 0)
    """,
    "chained error": """
        try:
            {}["x"]
        except KeyError as exc:
            raise ValueError("no x") from exc
    """,
    "syntax error": "print('a'\nx = = 1",
    "own hook": """
        import sys
        sys.excepthook = lambda kind, exc, tb: print("hook", kind.__name__, tb.tb_frame.f_code.co_name)
        raise LookupError("x")
    """,
    "interrupted": "raise KeyboardInterrupt",
    "at exit": """
        import atexit, threading
        atexit.register(print, "at exit")
        release = threading.Event()
        threading.Thread(target=lambda: (release.wait(), print("thread"))).start()
        threading.Timer(0.05, release.set).start()
        raise RuntimeError("main is done")
    """,
    "deprecation": """
        import warnings
        warnings.warn("old", DeprecationWarning)
    """,
    "spawn": """
        import multiprocessing
        def double(x):
            return 2 * x
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(double, [1, 2]))
    """,
    "click inside": """
        import click
        raise click.UsageError("mine")
    """,
}

QUIET = {"OTEL_ODIBI_SPAN_FORMATS": "none", "OTEL_ODIBI_METRIC_FORMATS": "none"}
"""Spares the import of pyarrow where it is not what is tested."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_script_runs_as_python_runs_it(tmp_path: Path, program: str) -> None:
    """The same output, errors, tracebacks and exit code; its arguments are its own, even where they look like ours."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "etl.py").write_text(textwrap.dedent(PROGRAMS[program]), encoding="utf-8")
    command = ["jobs/etl.py", "--help", "-m", "--", "x"]
    assert told(otel_odibi("run", *command, cwd=tmp_path, **QUIET)) == told(
        execute([sys.executable, *command], tmp_path)
    )


@pytest.mark.parametrize("program", ["namespace", "error", "spawn", "exit text"])
def test_a_module_runs_as_python_runs_it(tmp_path: Path, program: str) -> None:
    """With `-m`, as `python -m` does."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("import sys\nseen = list(sys.argv)\n")
    source = "import jobs\nif __name__ == '__main__':\n    print(jobs.seen)\n" + textwrap.dedent(PROGRAMS[program])
    (tmp_path / "jobs" / "etl.py").write_text(source, encoding="utf-8")
    command = ["-m", "jobs.etl", "--help", "x"]
    assert told(otel_odibi("run", *command, cwd=tmp_path, **QUIET)) == told(
        execute([sys.executable, *command], tmp_path)
    )


def test_folders_and_zip_files_run_as_python_runs_them(tmp_path: Path) -> None:
    """Where they have a `__main__.py`."""
    source = "import sys, helper; print(sys.argv, sys.path[0], __spec__.name, helper.x)"
    (tmp_path / "app").mkdir()
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        for name, text in (("__main__.py", source), ("helper.py", "x = 1")):
            archive.writestr(name, text)
            (tmp_path / "app" / name).write_text(text)
    for target in ("app", "app.zip"):
        expected = execute([sys.executable, target, "-h"], tmp_path)
        assert told(otel_odibi("run", target, "-h", cwd=tmp_path, **QUIET)) == told(expected)


def test_what_cannot_be_run(tmp_path: Path) -> None:
    """A script or module that is not there: exit codes as python's, and one line that says so."""
    script = otel_odibi("run", "nowhere.py", cwd=tmp_path, **QUIET)
    assert (script.returncode, script.stdout) == (2, "")
    assert "can't open file" in script.stderr
    assert "No such file or directory" in script.stderr
    module = otel_odibi("run", "-m", "nowhere", cwd=tmp_path, **QUIET)
    assert told(module) == told(execute([sys.executable, "-m", "nowhere"], tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="signals end a process on POSIX alone")
def test_an_interrupted_script_ends_by_the_signal(tmp_path: Path) -> None:
    """So that a shell's loop around it ends too, telemetry or not."""
    (tmp_path / "etl.py").write_text("raise KeyboardInterrupt")
    assert otel_odibi("run", "etl.py", cwd=tmp_path).returncode == -signal.SIGINT


ETL = """
import threading
import otel_odibi as oo

@oo.node
def work():
    return [1, 2, 3]

with oo.pipeline("plain"):
    work()

def later():
    with oo.pipeline("later"):
        work()
threading.Thread(target=later).start()
raise SystemExit(4)
"""


def test_a_script_is_run_with_telemetry(tmp_path: Path) -> None:
    """By default in "telemetry"; a thread that outlives the script's end is recorded too."""
    (tmp_path / "etl.py").write_text(ETL)
    assert otel_odibi("run", "etl.py", cwd=tmp_path).returncode == 4
    assert {run.pipeline for run in store.open(tmp_path / "telemetry").summaries()} == {"plain", "later"}


def test_settings_come_from_pyproject_and_environment(tmp_path: Path) -> None:
    """`[tool.otel-odibi]` of the directory it is run in, and variables over that."""
    (tmp_path / "etl.py").write_text(ETL)
    (tmp_path / "pyproject.toml").write_text('[tool.otel-odibi]\ndirectory = "there"\nservice_name = "orders"\n')
    otel_odibi("run", "etl.py", cwd=tmp_path, OTEL_SERVICE_NAME="night")
    assert {run.service for run in store.open(tmp_path / "there").summaries()} == {"night"}
    assert not (tmp_path / "telemetry").exists()


def test_no_directory_is_made_where_telemetry_goes_elsewhere(tmp_path: Path) -> None:
    """An endpoint is a place for telemetry to go."""
    (tmp_path / "etl.py").write_text(ETL)
    assert otel_odibi("run", "etl.py", cwd=tmp_path, OTEL_ODIBI_PROMETHEUS_PORT="0").returncode == 4
    assert not (tmp_path / "telemetry").exists()


def test_the_scripts_own_configure_wins(tmp_path: Path) -> None:
    """What the program says of itself is what counts."""
    (tmp_path / "etl.py").write_text("import otel_odibi as oo\noo.configure(directory='own', service_name='own')" + ETL)
    otel_odibi("run", "etl.py", cwd=tmp_path)
    assert {run.pipeline for run in store.open(tmp_path / "own").summaries()} == {"plain", "later"}
    assert store.open(tmp_path / "telemetry").summaries() == ()


def test_a_wrong_setting_is_wrong_usage(tmp_path: Path) -> None:
    """It is named before anything runs."""
    (tmp_path / "etl.py").write_text("print('ran')")
    done = otel_odibi("run", "etl.py", cwd=tmp_path, OTEL_ODIBI_PARQUET_ROWS="many")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("otel-odibi: setting OTEL_ODIBI_PARQUET_ROWS='many': not a number")


# --- help and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["demo"], ["run"], ["doctor"]])
def test_help_has_examples(tmp_path: Path, args: list[str]) -> None:
    """Each command's help shows how it is used."""
    done = otel_odibi(*args, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Examples:" in done.stdout
    assert all(f"  otel-odibi {name}" in done.stdout for name in args or ["demo", "run", "doctor"])


def test_help_tells_the_exit_codes(tmp_path: Path) -> None:
    """Those of all commands, in the main help."""
    assert "1  the run failed" in otel_odibi("--help", cwd=tmp_path).stdout


def test_version(tmp_path: Path) -> None:
    """`--version` prints name and version."""
    assert told(otel_odibi("--version", cwd=tmp_path)) == (0, f"otel-odibi, version {__version__}\n", "")


@pytest.mark.skipif(os.name != "posix", reason="the command is a shell script here")
@pytest.mark.parametrize("way", ["on PATH", "by its path", "as a module"])
def test_hints_can_be_typed_as_they_are_printed(tmp_path: Path, way: str) -> None:
    """They name the command as it can be found: by name only where PATH leads to the one that was started."""
    script = tmp_path / "my bin" / "otel-odibi"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom otel_odibi.__main__ import main\nmain()\n")
    script.chmod(0o755)
    variables = {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}" if way == "on PATH" else "/usr/bin:/bin"}
    command = {"on PATH": ["otel-odibi"], "by its path": ["my bin/otel-odibi"], "as a module": COMMAND}[way]
    hint = execute(["/bin/sh", "-c", shlex.join([*command, "nonsense"])], tmp_path, **variables).stderr
    [typed] = re.findall(r"Try '(.*) --help' for help", hint)
    assert typed == shlex.join(command)
    assert execute(["/bin/sh", "-c", f"{typed} --version"], tmp_path, **variables).returncode == 0


@pytest.mark.parametrize(
    "args", [["nonsense"], ["run"], ["demo", "--nonsense"], ["demo", "a", "b"], ["doctor", "a", "b"]]
)
def test_wrong_usage_exits_with_2(tmp_path: Path, args: list[str]) -> None:
    """With one error and a hint at the help, and nothing done."""
    done = otel_odibi(*args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error: " in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_the_command_says_how_to_get_it(tmp_path: Path, missing: str) -> None:
    """A plain installation has the command; what it needs is one pip command away."""
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        f"u.find_spec = lambda name, *args: None if name == {missing!r} else find(name, *args)\n"
        "from otel_odibi.__main__ import main\nmain()"
    )
    done = execute([sys.executable, "-c", code], tmp_path)
    assert told(done) == (
        2, "", "the command otel-odibi needs an optional dependency: pip install 'otel-odibi[cli]'\n",
    )  # fmt: skip


# --- after a crash, or an outage -------------------------------------------------------------------------------------

DIES = """
import os, signal
import otel_odibi as oo
oo.configure(service_name="orders", directory="telemetry")
with oo.pipeline("orders") as run:
    with oo.node("read"):
        pass
    print(run.run_id, flush=True)
    with oo.node("join"):
        {end}
"""


def test_runs_of_processes_that_died_are_closed_by_name(tmp_path: Path) -> None:
    """Once; and a directory that is not there is wrong usage."""
    died = execute([sys.executable, "-c", DIES.format(end="os.kill(os.getpid(), signal.SIGKILL)")], tmp_path)
    first, again = otel_odibi("recover", cwd=tmp_path), otel_odibi("recover", "telemetry", cwd=tmp_path)
    run_id = died.stdout.strip()
    assert first.returncode == again.returncode == 0
    lines = (
        rf"orders  run {run_id}  lost in join, last heard of at \S+Z\n1 runs and 1 nodes closed, 3 spans brought back\n"
    )
    assert re.fullmatch(lines, first.stdout)
    assert again.stdout == "0 runs and 0 nodes closed, 0 spans brought back\n"
    assert store.open(tmp_path / "telemetry").run(run_id).run.outcome == "lost"
    assert otel_odibi("recover", "nowhere", cwd=tmp_path).returncode == 2


def test_the_next_process_closes_them_too(tmp_path: Path) -> None:
    """In the background, with a warning that names the run."""
    died = execute([sys.executable, "-c", DIES.format(end="os.kill(os.getpid(), signal.SIGKILL)")], tmp_path)
    lives = execute([sys.executable, "-c", DIES.format(end="pass")], tmp_path)
    assert f"run {died.stdout.strip()} of pipeline orders was lost with its process" in lives.stderr
    outcomes = {run.run_id: run.outcome for run in store.open(tmp_path / "telemetry").summaries()}
    assert outcomes == {died.stdout.strip(): "lost", lives.stdout.strip(): "success"}


def test_what_is_under_way_is_shown(tmp_path: Path) -> None:
    """Of a process that lives: its run, and the node in it."""
    end = "print('here', flush=True); input()"
    program = "import otel_odibi.liveness as l; l.Liveness.__init__.__kwdefaults__['seconds'] = 0.05\n" + DIES
    command = [sys.executable, "-c", program.format(end=end)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdin=pipe, stdout=pipe, text=True) as process:
        run_id, _ = process.stdout.readline().strip(), process.stdout.readline()
        shown = next(out for _ in range(50) if "node join" in (out := otel_odibi("active", cwd=tmp_path).stdout))
        process.communicate("\n")
    assert re.match(rf"pipeline orders  run {run_id}  for .* of memory, heard of .* ago\n  node join  for ", shown)
    assert otel_odibi("active", cwd=tmp_path).stdout == ""


def test_what_waits_for_an_endpoint_is_sent(tmp_path: Path) -> None:
    """Exit code 1 while it is away; then everything, once."""
    with endpoint("http/protobuf") as collector:
        collector.stop()
        otlp = {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        execute([sys.executable, "-c", DIES.format(end="pass")], tmp_path, **otlp)
        away = otel_odibi("replay", cwd=tmp_path, **otlp)
        assert (away.returncode, away.stdout[:19]) == (1, "0 items delivered, ")
        collector.start()
        back = otel_odibi("replay", "telemetry", "--endpoint", collector.url, cwd=tmp_path, **otlp)
        assert back.returncode == 0
        assert back.stdout.endswith(" items delivered, 0 refused for good, 0 left in telemetry/spool\n")
        assert len(collector.ids()) == len(set(collector.ids())) == 3
    assert otel_odibi("replay", cwd=tmp_path).stdout.startswith("0 items delivered, 0 refused for good, 0 left")
