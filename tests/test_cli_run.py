"""`otel-odibi run` instruments the engines that a program uses, when it imports them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from test_cli import QUIET, otel_odibi

from otel_odibi import store

pytest.importorskip("hamilton")

FLOW = """
    import sys
    from hamilton import driver

    def rows() -> list:
        return [1, 2, 3]

    def count(rows: list) -> int:
        return len(rows)

    driver.Builder().with_modules(sys.modules["__main__"]).build().execute(["count"])
"""


def runs_of(directory: Path) -> list[str]:
    return [run.pipeline for run in store.open(directory / "telemetry").summaries()]


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    """A directory with a program that knows nothing of telemetry."""
    (tmp_path / "flow.py").write_text(textwrap.dedent(FLOW))
    return tmp_path


def test_an_engine_is_instrumented_when_it_is_imported(flow: Path) -> None:
    """With no word about it in the program."""
    done = otel_odibi("run", "flow.py", cwd=flow)
    assert (done.returncode, done.stderr) == (0, "")
    assert runs_of(flow) == ["flow"]
    assert [node.name for node in store.open(flow / "telemetry").run().nodes] == ["rows", "count"]


def test_integrations_can_be_chosen(flow: Path) -> None:
    """By name, or none at all."""
    assert otel_odibi("run", "--integrations", "none", "flow.py", cwd=flow).returncode == 0
    assert otel_odibi("run", "--integrations", "dask,kedro", "flow.py", cwd=flow).returncode == 0
    assert runs_of(flow) == []
    assert otel_odibi("run", "--integrations", "dask,hamilton", "flow.py", cwd=flow).returncode == 0
    assert runs_of(flow) == ["flow"]


def test_engines_that_are_not_used_are_not_imported(tmp_path: Path) -> None:
    """Starting a program costs nothing for what is merely installed."""
    (tmp_path / "etl.py").write_text("import sys\nprint({'hamilton', 'kedro', 'dask', 'odibi'} & set(sys.modules))")
    assert otel_odibi("run", "etl.py", cwd=tmp_path, **QUIET).stdout == "set()\n"


def test_an_integration_there_is_not_is_wrong_usage(flow: Path) -> None:
    """The error names those there are."""
    done = otel_odibi("run", "--integrations", "hamiltn", "flow.py", cwd=flow)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no 'hamiltn'; choose from dask, hamilton, kedro, odibi, odibi_core, none" in done.stderr
    assert not (flow / "telemetry").exists()
