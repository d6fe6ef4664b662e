"""The HTML report of a run: what is in the file, how large it gets, and that whatever is in a run stays text."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import BEGAN, EVIL, RUN, SECOND, Told, large, line, node, small

import otel_odibi as oo
from otel_odibi import store
from otel_odibi.cli import cli
from otel_odibi.errors import SettingError
from otel_odibi.facts import Failure
from otel_odibi.hooks import EventBus, declared
from otel_odibi.report import hook, html
from otel_odibi.report.critical import critical_path, sources
from otel_odibi.report.graph import MOST, graph
from otel_odibi.report.html import LIMIT, LINES, render
from otel_odibi.store import NodeView, RunView
from otel_odibi.testing import Capture

ASSETS = files("otel_odibi.report") / "assets"


def inside(page: bytes) -> Any:
    """Return the data in a report."""
    found = re.search(rb'id="data">([A-Za-z0-9+/=]*)</script>', page)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_report_tells_everything_of_its_run() -> None:
    """Nodes with their attributes, edges, critical path, log lines, and the same nodes in earlier runs."""
    told = small()
    data = inside(render(told))
    assert [found["name"] for found in data["nodes"]] == [found.name for found in told.view.nodes]
    assert data["run"]["failure"]["stacktrace"].startswith("Traceback")
    assert data["attributes"]["join"] == {"odibi.node.engine": "pandas"}
    assert data["sources"][6] == [2, 1]
    assert [found["m"] for found in data["logs"]] == ["orders read", f"odd {EVIL}", "no such column"]
    assert data["logs"][0]["f"] == {"files": "3"}
    assert len(data["earlier"]["runs"]) == 8
    assert data["earlier"]["nodes"]["read_orders"] == [3.06, 2.97, 3.12, 2.91, 3.3, 2.85, 3, 2.7]


def test_nothing_in_the_file_is_loaded_from_elsewhere() -> None:
    """The policy allows its own script and style by their hashes, and nothing else; nothing refers to an address."""
    page = render(small()).decode()
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    texts = [re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL) for tag in ("style", "script")]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for (text,) in texts]
    assert policy == [
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    ]
    named = {"http://www.w3.org/2000/svg", "https://github.com/leeoniya/uPlot"}  # a namespace, and a library's comment
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) == named
    loading = r"<(?:link|img|iframe|object|embed)\b|\ssrc=|@import|url\((?!#arrow)"
    assert not re.findall(loading, page)
    assert "sourceMappingURL" not in page


anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    [EVIL, "{{script}}", "\\1", "\u2028", "<!--", "]]>", "&lt;", "\x00"]
)
numbers = st.none() | st.integers(0, 2**63)
any_node = st.builds(
    NodeView,
    name=anything, outcome=st.sampled_from(["success", "failure", "skipped", "running", "odd"]), span_id=anything,
    parent_span_id=st.just(""), start_ns=st.integers(0, 2**62), duration_ns=st.integers(0, 2**62), layer=anything,
    depth=st.integers(0, 3), rows_in=numbers, rows_out=numbers, rss=numbers, run_id=st.sampled_from(["", "d4"]),
    depends_on=st.lists(anything, max_size=3).map(tuple), links=st.lists(anything, max_size=3).map(tuple),
    skip_reason=anything, failure=st.none() | st.builds(Failure, anything, anything, anything),
)  # fmt: skip


@settings(max_examples=40)
@given(st.lists(any_node, max_size=6), anything, anything)
def test_whatever_is_in_a_run_stays_data(found: list[NodeView], name: str, message: str) -> None:
    """No name or message changes the document around it: but for its title and data, it is always the same."""
    run = replace(RUN, pipeline=name, failure=Failure(name, message, message))
    page = render(Told(RunView(run, tuple(found)), [line(message, name, key=message)])).decode()
    data = inside(page.encode())
    assert [each["name"] for each in data["nodes"]] == [each.name for each in found]
    assert data["logs"][0]["m"] == message
    around = re.sub(r'<title>[^<>]*</title>|id="data">[A-Za-z0-9+/=]*<', "", page)
    assert around == re.sub(r'<title>[^<>]*</title>|id="data">[A-Za-z0-9+/=]*<', "", render(small()).decode())


def test_the_report_of_200_nodes_is_under_a_megabyte() -> None:
    """However much they logged: lines are left out then, visibly, and warnings last."""
    told = large(200, 9_000)
    noise = "".join(map(chr, range(33, 127))) * 4
    random = [hashlib.sha512(each["message"].encode()).hexdigest() for each in told.lines]
    lines = [{**each, "message": f"{text} {noise}"} for each, text in zip(told.lines, random, strict=True)]
    lines[8_990] = {**lines[8_990], "level": "warning", "message": "look at this"}
    page = render(replace(told, lines=lines))
    data = inside(page)
    assert len(page) <= LIMIT < 1_000_000
    assert data["logs_cut"] is True
    assert 1_000 < len(data["logs"]) < 9_000
    assert "look at this" in {each["m"] for each in data["logs"]}
    assert data["logs"] == sorted(data["logs"], key=lambda each: each["t"])


def test_the_report_of_2000_nodes_has_all_of_them() -> None:
    """Of the log lines the first are read, and warnings wherever they are."""
    told = large(2_000, LINES + 500)
    last = line("disk nearly full", seconds=19, level="warning")
    page = render(replace(told, lines=[*told.lines, last]))
    data = inside(page)
    assert len(data["nodes"]) == 2_000
    assert len(page) < 1_000_000
    assert data["logs_cut"] is True
    assert data["logs"][-1]["m"] == "disk nearly full"


def test_long_values_are_cut() -> None:
    """An attribute of 64 kB is shown by its beginning."""
    told = replace(small(), attributes={"key": "v" * 64_000})
    assert len(inside(render(told))["attributes"]["join"]["key"]) < 3_000


def test_a_report_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that cannot be made leaves what was there before."""
    path = tmp_path / "run.html"
    html.write(small(), "last", path)
    before = path.read_bytes()
    monkeypatch.setattr(html, "_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        html.write(small(), "last", path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["run.html"]


# --- the libraries in it ---------------------------------------------------------------------------------------------


def test_vendored_files_are_what_they_are_pinned_to() -> None:
    """`docs/report_assets.py` fetched them from npm; their licences lie beside them, and are in each report."""
    pins = json.loads((ASSETS / "vendored.json").read_text(encoding="utf-8"))
    for name, pin in pins.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == pin["sha256"], name
    page = render(small()).decode()
    assert {pin["package"] for pin in pins.values()} == {"@dagrejs/dagre", "uplot"}
    assert page.count("The above copyright notice and this permission notice shall be included") >= 2


# --- the critical path -----------------------------------------------------------------------------------------------


def names_on_path(*nodes: NodeView, seconds: float = 10) -> list[str]:
    view = RunView(replace(RUN, duration_ns=round(seconds * SECOND)), nodes)
    return [nodes[row].name for row in sorted(critical_path(view))]


def test_the_critical_path_is_what_the_run_waited_for() -> None:
    """From the node that ended last, back to what ended last before each."""
    fast, slow = node("fast", 0, 2), node("slow", 0, 5)
    join, last = node("join", 5, 2, links=("fast", "slow")), node("last", 7, 3)
    assert names_on_path(fast, slow, join, last) == ["slow", "join", "last"]


def test_of_two_that_ended_together_it_is_the_one_whose_result_went_in() -> None:
    """Nodes that run side by side are told apart by what they gave to whom."""
    first, other = node("first", 0, 4.99), node("other", 0, 5)
    assert names_on_path(first, other, node("last", 5, 5, depends_on=("first",))) == ["first", "last"]


def test_what_ran_in_between_is_waited_for_too() -> None:
    """Where nodes run one after the other, each is on the path, whatever it depends on."""
    load, first, second = node("load", 0, 9), node("first", 9, 0.01), node("second", 9.01, 0.02, depends_on=("load",))
    assert names_on_path(load, first, second) == ["load", "first", "second"]


def test_the_critical_path_goes_on_inside_a_node() -> None:
    """What is inside a node of the path is looked at in the same way; what is inside others is not."""
    idle = (node("idle", 0, 1), node("in idle", 0, 1, depth=1))
    outer = (node("outer", 2, 8), node("a", 2, 3, depth=1), node("b", 2, 4, depth=1), node("c", 6, 4, depth=1))
    assert names_on_path(*idle, *outer) == ["idle", "in idle", "outer", "b", "c"]


def test_skipped_nodes_are_on_no_critical_path() -> None:
    """They took no time; a run of nothing else, or of nothing, has none."""
    assert names_on_path(node("a", 0, 5), node("b", 10, 0, outcome="skipped")) == ["a"]
    assert names_on_path(node("b", 10, 0, outcome="skipped")) == names_on_path() == []


@given(st.lists(any_node, max_size=12))
def test_any_run_has_a_critical_path(nodes: list[NodeView]) -> None:
    """Whatever its times, names and links: it ends, and holds the node that ended last."""
    view = RunView(replace(RUN, duration_ns=10), tuple(replace(found, depth=0) for found in nodes))
    executed = [found for found in view.nodes if found.outcome != "skipped"]
    path = {view.nodes[row].start_ns + view.nodes[row].duration_ns for row in critical_path(view)}
    assert max((found.start_ns + found.duration_ns for found in executed), default=None) == max(path, default=None)


# --- the graph -------------------------------------------------------------------------------------------------------


def test_executions_of_one_node_are_one_box() -> None:
    """With the rows of all of them on its edges; a pipeline inside the run is none where its nodes are."""
    nodes = (
        node("load", span_id="1", rows_out=5), node("load", span_id="2", rows_out=7), node("other", span_id="3"),
        node("sub", span_id="4", run_id="d4"), node("sum", span_id="5", depth=1, links=("1", "2", "3")),
    )  # fmt: skip
    drawn = graph(nodes, sources(nodes))
    assert drawn["boxes"] == [("load", [0, 1]), ("other", [2]), ("sum", [4])]
    assert drawn["edges"] == [(0, 2, 12), (1, 2, None)]


@pytest.mark.parametrize(
    ("names", "boxes", "grouped"),
    [
        ("step_{}", ["ingest: step_*", "clean: step_*", "transform: step_*", "publish: step_*"], "numbers alone"),
        ("{0:b}", ["ingest", "clean", "transform", "publish"], "layer"),
    ],
)
def test_more_nodes_than_can_be_told_apart_are_grouped(names: str, boxes: list[str], grouped: str) -> None:
    """By their names without numbers, where that is enough, else by layer."""
    words = str.maketrans("01", "ab")
    nodes = [replace(found, name=found.name.translate(words) if "b" in names else found.name)
             for found in large(MOST * 2, names=names).view.nodes]  # fmt: skip
    drawn = graph(nodes, sources(nodes))
    assert [name for name, _ in drawn["boxes"]] == boxes
    assert grouped in drawn["grouped"]


# --- the hook and the command ----------------------------------------------------------------------------------------


def run_once(telemetry: oo.Telemetry, fails: bool = False) -> str:
    try:
        with oo.pipeline("orders") as run, oo.node("join", layer="transform"):
            if fails:
                raise KeyError("customer_id")
    except KeyError:
        pass
    return run.run_id


def test_the_hook_writes_a_report_of_each_run(tmp_path: Path) -> None:
    """Also of one that failed; the newest `keep` stay, and files of others are left alone."""
    mine = tmp_path / "telemetry" / "reports" / "notes.html"
    with oo.configure(service_name="orders", directory=tmp_path / "telemetry", set_global=False) as telemetry:
        hooked = telemetry.events.create_report_hook(keep=2)
        telemetry.events.register_hook("pipeline_complete", hooked)
        ids = [run_once(telemetry)]
        mine.write_text("mine", encoding="utf-8")
        ids += [run_once(telemetry, fails=True), run_once(telemetry)]
        assert telemetry.events.failed == 0
    found = {path.name for path in mine.parent.iterdir()}
    assert found == {"notes.html", f"orders-{ids[1]}.html", f"orders-{ids[2]}.html"}
    assert inside((mine.parent / f"orders-{ids[1]}.html").read_bytes())["run"]["outcome"] == "failure"


def test_the_hook_can_be_declared() -> None:
    """In pyproject.toml it is `hook = "report"`; it runs on a worker, so that no run waits for it."""
    ((event, _, options),) = declared({"pages": {"hook": "report", "directory": "t", "keep": 9}}, EventBus())
    assert (event, options["async_execution"]) == ("pipeline_complete", True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "directory=None: not known"),
        ({"directory": "t", "keep": 0}, "keep=0: not a number of reports"),
        ({"directory": "s3://bucket/t"}, "reports=None: not known"),
    ],
)
def test_a_hook_that_cannot_work_is_refused(options: dict[str, Any], problem: str) -> None:
    """With the name, the value and the remedy."""
    with pytest.raises(SettingError, match=re.escape(problem)):
        hook.create(**{"directory": None, **options})


@pytest.fixture
def telemetry_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory `telemetry` with a run, in the current one."""
    monkeypatch.chdir(tmp_path)
    with oo.configure(service_name="orders", directory="telemetry", set_global=False) as telemetry:
        run_once(telemetry)
    return tmp_path


@pytest.mark.parametrize("args", [[], ["last"], ["telemetry"], ["last", "telemetry", "-o", "run.html"]])
def test_the_command_writes_a_report(telemetry_directory: Path, args: list[str]) -> None:
    """Of the last run in `telemetry`, unless told of another run, of another directory, or of both."""
    done = CliRunner().invoke(cli, ["report", *args])
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.fullmatch(r"run\.html \(\d+ kB\)\n", done.stdout)
    assert inside((telemetry_directory / "run.html").read_bytes())["run"]["pipeline"] == "orders"


def test_the_command_opens_the_browser(telemetry_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--open`."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    CliRunner().invoke(cli, ["report", "--open"])
    assert opened == [(telemetry_directory / "run.html").as_uri()]


def test_the_command_tells_where_it_cannot_write(telemetry_directory: Path) -> None:
    """In one line, with the remedy; the exit code is that of wrong usage."""
    done = CliRunner().invoke(cli, ["report", "-o", "no/such/folder/run.html"], standalone_mode=False)
    assert done.return_value == 2
    assert done.stderr.startswith("otel-odibi: cannot write 'no/such/folder/run.html'")


def test_a_real_run_is_told_whole(odibi_capture: Capture, telemetry_directory: Path) -> None:
    """From the files alone: resource and span attributes, and log lines."""
    data = inside(render(store.open("telemetry")))
    assert data["attributes"][data["run"]["span_id"]]["service.name"] == "orders"
    assert data["attributes"][data["nodes"][0]["span_id"]]["odibi.node.layer"] == "transform"
    assert {found["e"] for found in data["logs"]} >= {"pipeline_start", "node_complete"}
    assert data["run"]["start_ns"] > BEGAN
