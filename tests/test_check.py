"""The regression gate `otel-odibi check`, and `otel-odibi diff`: what they find, what they let pass, what they say."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import otel_odibi as oo
from otel_odibi import store
from otel_odibi.cli import main
from otel_odibi.errors import SettingError
from otel_odibi.report.gate import Finding, Limits, check, compare
from otel_odibi.report.noise import Baseline, Step, beyond_chance, tail
from otel_odibi.testing import Capture, capture

sys.path.insert(0, str(Path(__file__).parent.parent))
simulation = importlib.import_module("benchmarks.gate")
execution = simulation.execution

SCALE = float(os.environ.get("ODIBI_TEST_SCALE", "0.1"))
LIMITS = Limits()


def run(*executions: dict[str, Any], outcome: str = "success", error: str = "") -> dict[str, Any]:
    seconds = sum(each["duration_s"] or 0 for each in executions)
    row = {"run_id": "", "outcome": outcome, "duration_s": seconds, "error_type": error}
    return {**row, "executions": list(executions)}


def told(now: dict[str, Any], before: Sequence[dict[str, Any]], limits: Limits = LIMITS) -> list[tuple[str, str, str]]:
    """Return what is not fine: status, node and what; the whole run is the node without a name."""
    findings = compare([now], before, limits)
    return [(f.status, f.node, f.what) for f in findings if f.status in ("regressed", "unsure")]


def noisy(
    count: int = 20, seconds: float = 1.0, share: float = 0.04, seed: int = 1, **more: Any
) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [run(execution("n", seconds * rng.lognormvariate(0, share), **more)) for _ in range(count)]


# --- how well it finds what is slower --------------------------------------------------------------------------------


def slow_node_is_found(histories: int) -> None:
    null, slower = simulation.rates(simulation.normal(0.04), (1.0, 1.3), histories=histories)
    print(null, slower)
    assert slower.found >= 0.95
    assert max(null.false, slower.false) <= 0.05


def test_a_30_percent_slowdown_of_one_node_of_20_is_found() -> None:
    """At 4 % noise and against 20 runs, in 19 of 20 histories and more, with 1 false alarm in 20 at most."""
    slow_node_is_found(200)


@pytest.mark.faults
def test_a_30_percent_slowdown_is_found_in_1000_histories() -> None:
    """The same over 1,000 seeded histories, whatever the scale."""
    slow_node_is_found(max(1000, round(10_000 * SCALE)))


@pytest.mark.faults
@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize(
    ("noise", "most"),
    [
        (simulation.normal(0.1), 0.05),
        (simulation.normal(0.3), 0.05),
        (simulation.with_outliers(0.04, 0.005), 0.05),
        (simulation.with_outliers(0.04, 0.02), 0.05),
        (simulation.heavy_tails(0.04), 0.15),
        (lambda rng: rng.choice((0.0, 0.0, 0.0, 1.0)) + rng.gauss(0, 0.04), 0.1),
    ],
    ids=["10 %", "30 %", "0.5 % outliers", "2 % outliers", "heavy tails", "two modes"],
)
def test_noise_of_other_kinds_raises_few_false_alarms(noise: Any, most: float, runs: int) -> None:
    """Where nothing has changed; 5 % where two runs are judged together. 2 % more are left to luck."""
    (null,) = simulation.rates(noise, (1.0,), runs, histories=round(5000 * SCALE))
    assert null.false <= (most if runs == 1 else 0.05) + 0.02


def test_a_slow_trend_is_no_regression_of_one_run() -> None:
    """Half a percent a run: no single run is to blame, though a fixed baseline tells it in the end."""
    rng = random.Random(3)
    runs = [run(execution("n", 1.005**day * rng.lognormvariate(0, 0.02))) for day in range(100)]
    assert [told(runs[day], runs[day - 20 : day]) for day in range(20, 100)] == [[]] * 80
    assert told(runs[99], runs[:20]) == [("regressed", "", "duration"), ("regressed", "n", "duration")]


def test_what_happens_every_week_is_no_regression() -> None:
    """Sundays with a tenth of the rows and three times the duration: as bad happened more than once in 20 runs."""
    rng = random.Random(4)
    runs = [
        run(execution("n", rng.lognormvariate(0, 0.04) * (3 if sunday else 1), rows_out=100 if sunday else 1000))
        for sunday in (day % 7 == 6 for day in range(21))
    ]
    assert told(runs[20], runs[:20]) == []


def test_one_outlier_in_a_pipeline_that_has_them_is_no_proof() -> None:
    """Three nodes took twice as long just once each: of a fourth one that is left unsure, but not of two runs of it."""
    names = "abcdef"
    runs = [
        run(
            *(execution(name, 2.0 if name in "abc" and at == 3 + names.index(name) else 1 + at / 1e3) for name in names)
        )
        for at in range(20)
    ]
    slow = run(*(execution(name, 2.0 if name == "d" else 1.0) for name in names))
    assert ("unsure", "d", "duration") in told(slow, runs)
    regressed = [f.node for f in compare([slow, slow], runs, LIMITS) if f.status == "regressed"]
    assert "d" in regressed


def test_a_node_that_jumps_time_and_again_hides_no_other() -> None:
    """Its own jumps are no news; a slowdown of another node is."""
    runs = [run(execution("flaky", 5.0 if at % 4 == 0 else 1.0), execution("n", 1 + at / 1e3)) for at in range(20)]
    found = told(run(execution("flaky", 5.0), execution("n", 1.5)), runs)
    assert ("regressed", "n", "duration") in found
    assert ("regressed", "flaky", "duration") not in found


# --- what is compared ------------------------------------------------------------------------------------------------


def test_executions_from_the_cache_are_compared_with_each_other_only() -> None:
    """A miss among hits is no slowdown of the node; a slow hit among misses is one."""
    hits = noisy(seconds=0.1, cache_hit=True)
    misses = noisy(seconds=5.0, cache_hit=False)
    assert told(run(execution("n", 5.0, cache_hit=False)), hits + misses) == []
    slow_hit = told(run(execution("n", 5.0, cache_hit=True)), hits + misses)
    assert slow_hit == [("regressed", "", "duration"), ("regressed", "n", "duration")]


def test_a_lost_cache_is_told_of() -> None:
    """Where all lookups used to hit."""
    assert told(run(execution("n", 1.0, cache_hit=False)), noisy(cache_hit=True)) == [("regressed", "", "cache hits")]


def test_twice_as_many_executions_slow_the_run_and_not_the_node() -> None:
    """A node's duration is the median of its executions."""
    before = [run(*(execution("n", 1 + at / 1e3) for _ in range(3))) for at in range(20)]
    assert told(run(*(execution("n", 1.01) for _ in range(6))), before) == [("regressed", "", "duration")]


def test_a_new_node_slows_no_run() -> None:
    """The run as a whole is compared with runs of the same nodes, of which there are none."""
    before = noisy()
    now = run(execution("n", 1.0), execution("new", 9.0))
    assert told(now, before) == []
    unknown = [f for f in compare([now], before, LIMITS) if f.status == "unknown"]
    assert [(f.node, f.why) for f in unknown] == [
        ("", "not enough history (0 of 5 runs)"), ("new", "not enough history (0 of 5 runs)"),
    ]  # fmt: skip


def test_rows_that_are_missing_are_told_of() -> None:
    """Beyond a fifth where they never change; where they swing, beyond that."""
    steady, swinging = ([1000] * 20, [round(1000 * random.Random(at).lognormvariate(0, 0.5)) for at in range(20)])
    for history, rows, expected in (
        (steady, 790, [("regressed", "n", "rows")]), (steady, 810, []), (steady, 0, [("regressed", "n", "rows")]),
        (swinging, 400, []), (swinging, 10, [("regressed", "n", "rows")]),
    ):  # fmt: skip
        before = [run(execution("n", 1.0, rows_out=count)) for count in history]
        assert told(run(execution("n", 1.0, rows_out=rows)), before) == expected


def test_growing_memory_is_told_of_once_a_run() -> None:
    """It is that of the process: the highest of a run counts, wherever it was seen."""
    before = [run(execution("a", 1.0, rss=100_000_000 + at), execution("b", 1.0, rss=200_000_000)) for at in range(20)]
    now = run(execution("a", 1.0, rss=300_000_000), execution("b", 1.0, rss=300_000_000))
    assert told(now, before) == [("regressed", "", "memory")]


def test_a_node_of_a_millisecond_may_take_two() -> None:
    """Less than --min-change is not worth a word."""
    assert told(run(execution("n", 0.002)), noisy(seconds=0.001)) == []
    assert told(run(execution("n", 0.002)), noisy(seconds=0.001), Limits(min_change=0)) != []


def test_failures_need_no_statistics() -> None:
    """What failed as in no run before is told of, with one earlier run; what always failed, and was caught, is not."""
    failed = run(execution("n", 1.0, outcome="failure", error_type="KeyError"), outcome="failure", error="KeyError")
    findings = compare([failed], noisy(1), LIMITS)
    assert [(f.status, f.node, f.why) for f in findings] == [
        ("regressed", "", "failure: KeyError, as in no run before"),
        ("regressed", "n", "failure: KeyError, as in no run before"),
    ]
    caught = run(execution("n", 1.0, outcome="failure", error_type="KeyError"))
    assert told(caught, [caught] * 20) == []


def test_a_missing_node_is_told_of_unless_the_run_failed() -> None:
    """A node that was in all runs before; after a failure it is missing for that. Skipped is not missing."""
    before = [run(execution("a"), execution("b")) for _ in range(20)]
    assert told(run(execution("a")), before) == [("regressed", "b", "outcome")]
    assert told(run(execution("a"), outcome="failure"), before) == [("regressed", "", "outcome")]
    assert told(run(execution("a"), execution("b", None, outcome="skipped")), before) == []


def test_too_few_runs_prove_nothing() -> None:
    """Four runs are no history."""
    findings = compare([run(execution("n", 100.0))], noisy(4), LIMITS)
    assert {(f.status, f.why) for f in findings} == {("unknown", "not enough history (4 of 5 runs)")}


# --- properties ------------------------------------------------------------------------------------------------------

durations = st.floats(0.5, 500)
histories = st.lists(st.tuples(durations, durations, durations), min_size=5, max_size=25)


def of(seconds: Sequence[float], scale: float = 1.0) -> dict[str, Any]:
    return run(*(execution(f"n{index}", each * scale, rows_out=10) for index, each in enumerate(seconds)))


@given(histories, st.tuples(durations, durations, durations), st.sampled_from([0.25, 4.0, 1024.0]))
def test_a_machine_of_another_speed_changes_nothing(
    before: list[tuple[float, ...]], now: tuple[float, ...], scale: float
) -> None:
    """All durations times a factor: the same findings."""
    limits = Limits(min_change=0)
    at_once = compare([of(now)], list(map(of, before)), limits)
    scaled = compare([of(now, scale)], [of(each, scale) for each in before], limits)
    assert [(f.status, f.node, f.what, f.why) for f in at_once] == [(f.status, f.node, f.what, f.why) for f in scaled]


@given(st.tuples(durations, durations, durations), st.integers(0, 25), st.integers(1, 4))
def test_identical_runs_never_alarm(seconds: tuple[float, ...], before: int, runs: int) -> None:
    """Whatever they are, and however few."""
    findings = compare([of(seconds)] * runs, [of(seconds)] * before, LIMITS)
    assert {f.status for f in findings} <= {"ok", "unknown"}


@given(histories, st.tuples(durations, durations, durations), st.randoms(use_true_random=False))
def test_the_order_of_nodes_and_of_earlier_runs_does_not_matter(
    before: list[tuple[float, ...]], now: tuple[float, ...], chance: random.Random
) -> None:
    """Findings are the same, and in the same order."""

    def shuffled(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "executions": chance.sample(row["executions"], len(row["executions"]))}

    runs = [of(now), *map(of, before)]
    again = [shuffled(row) for row in runs]
    assert compare(runs[:1], runs[1:], LIMITS) == compare(again[:1], chance.sample(again[1:], len(before)), LIMITS)


@given(histories, st.tuples(durations, durations, durations))
def test_slower_is_never_better(before: list[tuple[float, ...]], now: tuple[float, ...]) -> None:
    """What regressed in isolation does so as well if it takes twice as long."""
    alone = [of(each[:1]) for each in before]
    if told(of(now[:1]), alone):
        assert told(of(now[:1], 2.0), alone)


# --- the statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "freedom", "chance"),
    [(6.314, 1, 0.05), (2.92, 2, 0.05), (2.353, 3, 0.05), (3.747, 4, 0.01), (4.032, 5, 0.005), (2.552, 18, 0.01),
     (3.385, 30, 0.001), (0, 7, 0.5), (-2.353, 3, 0.95)],
)  # fmt: skip
def test_students_t_is_that_of_the_textbooks(t: float, freedom: int, chance: float) -> None:
    """One-sided quantiles as printed in tables."""
    assert tail(t, freedom) == pytest.approx(chance, rel=2e-3)


@given(st.floats(-1e9, 1e9), st.integers(1, 200))
def test_a_chance_is_one(t: float, freedom: int) -> None:
    """From 0 to 1, less the farther out."""
    assert 0 <= tail(t, freedom) <= 1
    assert tail(t + 1, freedom) <= tail(t, freedom) + 1e-12


@pytest.mark.parametrize("count", [6, 10, 20])
@pytest.mark.parametrize("runs", [1, 3])
def test_chances_hold_for_normal_noise(count: int, runs: int) -> None:
    """As small a chance as 1 in 50 comes up once in 50 times, or less often, for few values too."""
    rng = random.Random(count)
    draws = 4000
    chances = [
        Step.to([rng.gauss(0, 1) for _ in range(runs)], Baseline.of([rng.gauss(0, 1) for _ in range(count)])).chance()
        for _ in range(draws)
    ]
    assert sum(chance <= 0.02 for chance in chances) <= draws * 0.02 + 3 * (draws * 0.02) ** 0.5


def test_outliers_do_not_widen_the_spread() -> None:
    """Three of 20 far off leave it about as it was; without any it is about the standard deviation."""
    rng = random.Random(5)
    values = [rng.gauss(0, 1) for _ in range(20)]
    assert Baseline.of(values).spread == pytest.approx(statistics.stdev(values), rel=0.15)
    assert Baseline.of([*values[:17], 50, 60, 70]).spread < 1.5 * statistics.stdev(values)


def test_many_comparisons_ask_for_more_of_each() -> None:
    """Holm's steps: the least chance has to be a fifth of the risk, the next a quarter."""
    assert beyond_chance([0.04], 0.05) == [True]
    assert beyond_chance([0.04, 0.5, 0.5, 0.5, 0.5], 0.05) == [False] * 5
    assert beyond_chance([0.5, 0.0124, 0.5, 0.0099, 0.5], 0.05) == [False, True, False, True, False]


# --- settings --------------------------------------------------------------------------------------------------------


def test_limits_come_from_the_command_line_then_pyproject_then_defaults() -> None:
    """The first that says something counts."""
    found = Limits.load({"max_slowdown": "1.5", "runs": None}, {"max_slowdown": 2, "runs": 3, "baseline": "7f3a2c"})
    assert found == Limits(max_slowdown=1.5, runs=3, baseline="7f3a2c")
    assert Limits.load({"baseline": "30"}, {}) == Limits(baseline=30)
    assert Limits.load({"baseline": "123456"}, {}) == Limits(baseline="123456")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"max_slowdown": 0.5}, "max_slowdown=0.5: not a ratio from 1 to 1000; give one in that range"),
        ({"runs": 1.5}, "runs=1.5: not a number of runs from 1 to 1000; give one in that range"),
        ({"baseline": 0}, "baseline=0: not a number of runs from 1 to 1000; give one in that range"),
        ({"max_row_drop": "a"}, "max_row_drop='a': not a share from 0 to 1; give one in that range"),
        ({"slowdown": 2}, "slowdown='[hidden]': there is no such setting; choose from baseline, max_cache_drop, "),
    ],
)
def test_a_wrong_limit_is_named_with_its_remedy(table: dict[str, Any], message: str) -> None:
    """From pyproject.toml, whose table is named too."""
    with pytest.raises(SettingError) as caught:
        Limits.load({}, table)
    assert str(caught.value).startswith(f"setting [tool.otel-odibi.check] {message}")


# --- the commands ----------------------------------------------------------------------------------------------------


def record(directory: Path, *runs: dict[str, Any]) -> list[str]:
    """Write runs of three nodes that take a second each, but for what is asked for; return their ids."""
    with capture(directory=directory, service_name="s") as captured:
        return [recorded(captured, **run) for run in runs]


def recorded(
    captured: Capture, pipeline: str = "flights", slowdown: float = 1, rows: int = 1000, nodes: str = "abc"
) -> str:
    with oo.pipeline(pipeline) as run:
        for name in nodes:
            with oo.node(f"{name}|<b>") as node:
                captured.clock.advance(slowdown if name == "b" else 1)
                node.output(rows=rows if name == "c" else 7)
                node.cache(hit=False)
    captured.clock.advance(60)
    return run.run_id


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(args)
    return (int(ended.value.code or 0), *capsys.readouterr())


USUAL: dict[str, Any] = {}
WORSE: dict[str, Any] = {"slowdown": 2, "rows": 100, "nodes": "bc"}


def test_a_regression_is_a_table_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What regressed and why; a pipeline without enough history passes, but for --strict."""
    *before, young, last = record(tmp_path, *[USUAL] * 6, {"pipeline": "young"}, WORSE)
    assert command(capsys, "check", str(tmp_path)) == (
        1,
        f"""\
flights: 3 regressed, 4 ok, 1 unknown; run {last} against 6
status     node   what      before  noise     now  change  why
regressed  a|<b>  outcome                                  missing, as in no run before
regressed  b|<b>  duration  1.00 s    ±0%  2.00 s   +100%  more than noise explains
regressed  c|<b>  rows       1,000    ±0%     100    -90%  less than noise explains
young: not enough history (0 of 5 runs), 9 unknown; run {young} against 0
""",
        "",
    )
    assert command(capsys, "check", str(tmp_path), "--pipeline", "young")[0] == 0
    assert command(capsys, "check", str(tmp_path), "--pipeline", "young", "--strict")[0] == 1
    assert command(capsys, "check", str(tmp_path), "--candidate", before[-1])[:2] == (
        0,
        f"flights: 9 ok; run {before[-1]} against 5\n",
    )


def test_the_table_in_markdown_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In Markdown, names stay text; JSON has all that was compared, in seconds."""
    *before, last = record(tmp_path, *[USUAL] * 6, WORSE)
    lines = command(capsys, "check", str(tmp_path), "--format", "markdown")[1].splitlines()
    assert lines[0] == f"### flights: 3 regressed, 4 ok, 1 unknown; run {last} against 6"
    assert lines[5] == (
        r"| regressed | b\|&lt;b&gt; | duration | 1.00 s | ±0% | 2.00 s | +100% | more than noise explains |"
    )
    (found,) = json.loads(command(capsys, "check", str(tmp_path), "--format", "json")[1])
    assert (found["pipeline"], found["runs"], found["baseline"]) == ("flights", [last], before[::-1])
    duration = next(f for f in found["findings"] if f["what"] == "duration" and f["node"] == "b|<b>")
    assert (duration["before"], duration["now"], duration["runs"]) == (1.0, 2.0, 6)
    assert set(duration) == set(Finding._fields)


def test_a_baseline_may_be_a_run(tmp_path: Path) -> None:
    """That run and those before it, so that what has become slow since is still told."""
    ids = record(tmp_path, *[USUAL] * 8, *[{"slowdown": 2}] * 8)
    regressed = {
        baseline: [f.node for f in check(store.open(tmp_path), Limits(baseline=baseline))[0].findings
                   if f.status == "regressed"]
        for baseline in (7, ids[7])
    }  # fmt: skip
    assert regressed == {7: [], ids[7]: ["", "b|<b>"]}
    (checked,) = check(store.open(tmp_path), Limits(baseline=ids[7], runs=3))
    assert (checked.runs, checked.baseline) == (tuple(ids[:12:-1]), tuple(ids[7::-1]))


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("--max-slowdown", "0.5"), "setting max_slowdown='0.5': not a ratio from 1 to 1000; give one in that range"),
        (("--pipeline", "x"), "there is no finished run of 'x' to check; name another, or run it"),
        (("--candidate", "zzz"), "no run begins with 'zzz'; choose from: last, "),
        (("--baseline", "last"), "is no successful run before those that are checked; name another"),
        (("--format", "xml"), "'xml' is not one of 'table', 'markdown', 'json'"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], error: str
) -> None:
    """With one line that says what to do."""
    record(tmp_path, *[USUAL] * 2)
    code, _, told = command(capsys, "check", str(tmp_path), *args)
    assert code == 2
    assert error in told


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What changed is there from both; what is the same, once."""
    a, b = record(tmp_path, {"nodes": "abbc"}, {"nodes": "bcd", "slowdown": 1.5, "rows": 10})
    assert command(capsys, "diff", a, b, str(tmp_path)) == (
        0,
        f"""\
flights {a} (success, 4.00 s) → flights {b} (success, 3.50 s)
node   duration         change  rows        outcome      cache hits  executions
b|<b>  2.00 s → 1.50 s    -25%  14 → 7      success      0%          2 → 1
c|<b>  1.00 s              +0%  1,000 → 10  success      0%          1
d|<b>  - → 1.00 s          new  - → 7       - → success  - → 0%      - → 1
a|<b>  1.00 s → -         gone  7 → -       success → -  0% → -      1 → -
""",
        "",
    )
    document = json.loads(command(capsys, "diff", a, "last", str(tmp_path), "--format", "json")[1])
    assert (document["a"], document["b"], [row["node"][0] for row in document["nodes"]]) == (a, b, list("bcda"))
    assert document["nodes"][3]["b"] is None


def test_settings_in_the_documentation_are_those_there_are() -> None:
    """Names, defaults and meanings."""
    page = (Path(__file__).parent.parent / "docs" / "check.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Limits):
        default = str(field.default).lower()
        assert f"| `{field.name}` | `{default}` | {field.metadata['doc']} |" in page
