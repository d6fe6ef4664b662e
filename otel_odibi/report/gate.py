"""The regression gate: the newest runs of each pipeline against the runs before, and what became worse.

`check` does it for a store, `compare` for the runs of one pipeline; `noise` tells what is news. A run is a row as
`Store.runs` has it, with its rows as `Store.executions` has them under `executions`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_odibi.errors import StoreError
from otel_odibi.names import SKIPPED, SUCCESS
from otel_odibi.report.noise import Baseline, Step, beyond_chance
from otel_odibi.settings import _flag, _number, _setting, collect, project_check

if TYPE_CHECKING:
    from otel_odibi.store import Store

Run = Mapping[str, Any]
REGRESSED, UNSURE, OK, UNKNOWN = STATUSES = ("regressed", "unsure", "ok", "unknown")
_Series = tuple[str, str, Hashable]  # kind of number, node, and what has to be alike besides for a comparison
# Kinds of numbers: whether more is worse (1) or less (-1), and the limit.
_KINDS: Final = {
    "duration": (1, "max_slowdown"), "rows": (-1, "max_row_drop"), "memory": (1, "max_memory_growth"),
    "cache hits": (-1, "max_cache_drop"),
}  # fmt: skip
_JUMP: Final = 4  # spreads, which normal noise hardly ever jumps
_SURE: Final = 0.98  # what is just at its limit is taken for less in 1 of 50 cases
_ratio, _share = _number(1, 1000, "a ratio", float), _number(0, 1, "a share", float)
_count, _seconds = _number(1, 1000, "a number of runs", int), _number(0, 86_400, "a number of seconds", float)


def _runs_or_run(name: str, value: Any) -> int | str:
    is_run = isinstance(value, str) and not (value.isdecimal() and len(value) < 6)
    return str(value) if is_run else int(_count(name, value))


@dataclass(frozen=True, slots=True)
class Limits:
    """What the gate compares and tolerates, checked. Immutable. Make one with `load`."""

    baseline: int | str = _setting(20, "Successful runs to compare with; or a run: that and 19 before.", _runs_or_run)
    runs: int = _setting(1, "Newest runs of a pipeline that are judged together.", _count)
    min_runs: int = _setting(5, "Earlier runs that it takes to compare.", _number(4, 1000, "a number of runs", int))
    max_slowdown: float = _setting(1.3, "Ratio of durations from which a slowdown counts.", _ratio)
    min_change: float = _setting(0.01, "Seconds that a slowdown costs at least to count.", _seconds)
    max_row_drop: float = _setting(0.2, "Share of a node's rows from which a loss counts.", _share)
    max_memory_growth: float = _setting(1.3, "Ratio of a run's highest memory from which growth counts.", _ratio)
    max_cache_drop: float = _setting(0.2, "Share of a run's cache hit ratio from which a loss counts.", _share)
    risk: float = _setting(0.05, "Chance of any false alarm where nothing has changed.", _share)
    strict: bool = _setting(False, "Fail too where there is not enough history.", _flag)

    @classmethod
    def load(cls, arguments: Mapping[str, Any], project: Mapping[str, Any] | None = None) -> Limits:
        """Collect `arguments` that are not None, `[tool.otel-odibi.check]`, the defaults. Raises SettingError."""
        table = project_check() if project is None else project
        return cls(**collect(cls, arguments, {}, table, "[tool.otel-odibi.check] "))


class Finding(NamedTuple):
    """One comparison, in seconds, rows, bytes or hits a lookup; of the whole run where `node` is empty.

    `before` is the median of `runs` runs, `noise` their spread as a share of it, `chance` that of such a change by it.
    """

    status: str
    node: str
    what: str
    before: float | None = None
    now: float | None = None
    noise: float | None = None
    chance: float | None = None
    runs: int = 0
    why: str = ""


class Checked(NamedTuple):
    """What was found of the runs of one pipeline, regressions first."""

    pipeline: str
    runs: tuple[str, ...]
    baseline: tuple[str, ...]
    findings: tuple[Finding, ...]


def check(store: Store, limits: Limits, pipeline: str = "", candidate: str = "") -> list[Checked]:
    """Check the newest runs of each pipeline, or of one, or those up to a candidate. Raises StoreError."""
    newest = store.run(candidate).run if candidate else None
    since = store.run(limits.baseline).run if isinstance(limits.baseline, str) else None
    named = next((run.pipeline for run in (newest, since) if run), pipeline)
    finished = defaultdict[str, list[Run]](list)
    columns = ["pipeline", "run_id", "outcome", "duration_s", "error_type"]
    for row in store.runs(named).select(columns).to_pylist():
        is_later = newest and not finished and row["run_id"] != newest.run_id
        if row["outcome"] != "running" and not is_later:
            finished[row["pipeline"]].append(row)
    if not finished:
        raise StoreError(f"there is no finished run of {named or 'a pipeline'!r} to check; name another, or run it")
    return [_checked(store, limits, rows, since.run_id if since else "") for rows in finished.values()]


def _checked(store: Store, limits: Limits, rows: Sequence[Run], since: str) -> Checked:
    earlier = [row for row in rows[limits.runs :] if row["outcome"] == SUCCESS]
    while since and earlier and earlier[0]["run_id"] != since:
        del earlier[0]
    if since and not earlier:
        raise StoreError(f"the baseline {since!r} is no successful run before those that are checked; name another")
    new, old = rows[: limits.runs], earlier[: 20 if since else int(limits.baseline)]
    inside = defaultdict[str, list[Run]](list)
    columns = ["run_id", "node", "outcome", "duration_s", "rows_out", "cache_hit", "rss", "error_type"]
    ids = [row["run_id"] for row in (*new, *old)]
    for each in store.executions(rows[0]["pipeline"], runs=ids).select(columns).to_pylist():
        inside[each["run_id"]].append(each)
    runs = [{**row, "executions": inside[row["run_id"]]} for row in (*new, *old)]
    findings = compare(runs[: len(new)], runs[len(new) :], limits)
    return Checked(rows[0]["pipeline"], tuple(ids[: len(new)]), tuple(ids[len(new) :]), findings)


def compare(runs: Sequence[Run], baseline: Sequence[Run], limits: Limits) -> tuple[Finding, ...]:
    """Compare runs, judged together, with earlier successful runs of the same pipeline."""
    found = [*_outcomes(runs, baseline, limits), *_numbers(runs, baseline, limits)]
    return tuple(sorted(found, key=lambda finding: (STATUSES.index(finding.status), finding.node, finding.what)))


def _outcomes(runs: Sequence[Run], baseline: Sequence[Run], limits: Limits) -> Iterator[Finding]:
    """Yield what did not succeed and what is missing, as never before: there is no noise in that."""
    known = {failed for run in baseline for failed in _failed(run)}
    for (node, outcome), error in {key: error for run in runs for key, error in _failed(run).items()}.items():
        if baseline and (node, outcome) not in known:
            why = f"{outcome}: {error}" if error else outcome
            yield Finding(REGRESSED, node, "outcome", runs=len(baseline), why=f"{why}, as in no run before")
    if len(baseline) >= limits.min_runs and all(run["outcome"] == SUCCESS for run in runs):
        here = {each["node"] for run in runs for each in run["executions"]}
        always = set.intersection(*({each["node"] for each in run["executions"]} for run in baseline))
        for node in always - here:
            yield Finding(REGRESSED, node, "outcome", runs=len(baseline), why="missing, as in no run before")


def _failed(run: Run) -> dict[tuple[str, str], str]:
    parts = ({**run, "node": ""}, *run["executions"])
    fine = (SUCCESS, SKIPPED, "running")
    return {(p["node"], p["outcome"]): p["error_type"] or "" for p in parts if p["outcome"] not in fine}


def _numbers(runs: Sequence[Run], baseline: Sequence[Run], limits: Limits) -> Iterator[Finding]:
    old, new = series_of(baseline), series_of(runs)
    known = {series: Baseline.of(old[series]) for series in new if len(old[series]) >= limits.min_runs}
    steps = {series: Step.to(new[series], before) for series, before in known.items()}
    news = beyond_chance([step.chance() for step in steps.values()], limits.risk)
    for (series, step), is_news in zip(steps.items(), news, strict=True):
        before, (kind, node, _) = known[series], series
        status, why = _judged(series, step, known, limits) if is_news else (OK, "")
        usual, now = (exp(_KINDS[kind][0] * value) for value in (before.middle, before.middle + step.excess))
        shown = (round(usual, 8), round(now, 8), exp(before.spread) - 1, step.chance())
        yield Finding(status, node, kind, *shown, len(before.values), why)
    for series in new.keys() - steps.keys():
        why = f"not enough history ({len(old[series])} of {limits.min_runs} runs)"
        yield Finding(UNKNOWN, series[1], series[0], runs=len(old[series]), why=why)


def _judged(series: _Series, step: Step, known: Mapping[_Series, Baseline], limits: Limits) -> tuple[str, str]:
    """Tell whether what is beyond chance counts: not if it is surely below its limit, or no news in this pipeline.

    By Good and Turing, what happened to so many nodes just once, happens to as many for the first time in as many runs
    again. A node that jumps time and again says nothing of the others.
    """
    before, (sign, name) = known[series], _KINDS[series[0]]
    limit, allowed = getattr(limits, name), limits.risk * len(before.values)
    least = _scaled(sign, limit if sign > 0 else 1 - limit)
    is_small = step.chance(least) > _SURE
    if series[0] == "duration":
        is_small |= exp(before.middle + step.excess) - exp(before.middle) < limits.min_change
    if is_small or before.reached(max(step.excess - least, step.excess * 2 / 3)) > allowed:
        return OK, ""
    worse = f"{'more' if sign > 0 else 'less'} than noise explains{', from the cache' if series[2] is True else ''}"
    far = min(step.excess / before.spread, _JUMP)
    others = (other for key, other in known.items() if key[0] == series[0] and key[1] != series[1])
    similar = max(step.excess / 2, min(step.excess, least))
    once = sum(other.reached(max(far * other.spread, similar)) == 1 for other in others)
    if step.amount > 1 or once <= allowed:
        return REGRESSED, worse
    return UNSURE, f"{once} others jumped once before: judge several --runs"


def _scaled(sign: int, number: float) -> float:
    """Return the number on a scale where noise adds up, and more is worse."""
    return sign * log(max(number, 1e-9))


def series_of(runs: Iterable[Run]) -> defaultdict[_Series, list[float]]:
    """Return the scaled numbers of each series, one of each run that has some. Only what succeeded counts.

    The duration of a node is the median of its executions: more of them make the run slower, not the node. The run as
    a whole is compared with runs that executed the same nodes, the same of them from the cache.
    """
    series = defaultdict[_Series, list[float]](list)
    for run in runs:
        seconds, rows = defaultdict[_Series, list[float]](list), Counter[_Series]()
        done = [each for each in run["executions"] if each["outcome"] == SUCCESS]
        for each in done:
            seconds["duration", each["node"], bool(each["cache_hit"])].append(each["duration_s"])
            if each["rows_out"] is not None:
                rows["rows", each["node"], None] += each["rows_out"]
        numbers = {key: median(values) for key, values in seconds.items()} | dict[_Series, float](rows)
        if run["outcome"] == SUCCESS:
            numbers["duration", "", frozenset(seconds)] = run["duration_s"]
        if memory := [each["rss"] for each in done if each["rss"] is not None]:
            numbers["memory", "", None] = max(memory)
        if lookups := [each["cache_hit"] for each in done if each["cache_hit"] is not None]:
            numbers["cache hits", "", None] = sum(lookups) / len(lookups)
        for key, number in numbers.items():
            series[key].append(_scaled(_KINDS[key[0]][0], number))
    return series
