"""How often the regression gate finds a slowdown, and raises a false alarm, over seeded histories.

A history is earlier runs of 20 nodes, and the newest ones, in which one node may be slower. Noise is lognormal. It
takes some ten minutes; ODIBI_HISTORIES is how many a row, 400 by default.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from math import exp, log
from typing import Any, NamedTuple

from otel_odibi.report.gate import REGRESSED, UNSURE, Limits, compare

HISTORIES = int(os.environ.get("ODIBI_HISTORIES", "400"))
NODES, SLOW = 20, "node_3"

Run = Mapping[str, Any]
Noise = Callable[[random.Random], float]


def normal(share: float) -> Noise:
    """Noise of this share of a duration."""
    return lambda rng: rng.gauss(0, share)


def with_outliers(share: float, often: float) -> Noise:
    """The same, but every now and then it takes 1.5 to 5 times as long."""
    return lambda rng: rng.gauss(0, share) + (log(rng.uniform(1.5, 5)) if rng.random() < often else 0)


def heavy_tails(share: float) -> Noise:
    """Student's t with 3 degrees of freedom, in place of normal noise."""
    return lambda rng: share * rng.gauss(0, 1) / (rng.gammavariate(1.5, 2) / 3) ** 0.5


def run(rng: random.Random, noise: Noise, usual: Sequence[float], slowdown: float = 1.0) -> Run:
    """Return one run, in which one node is slower."""
    executions = []
    for number, seconds in enumerate(usual):
        node = f"node_{number}"
        took = seconds * exp(noise(rng)) * (slowdown if node == SLOW else 1)
        executions.append(execution(node, took))
    total = sum(each["duration_s"] for each in executions)
    return {"run_id": "", "outcome": "success", "duration_s": total, "error_type": "", "executions": executions}


def execution(node: str, seconds: float | None = 1.0, **more: Any) -> dict[str, Any]:
    row = {"node": node, "outcome": "success", "duration_s": seconds, "rows_out": None, "cache_hit": None, "rss": None}
    return {**row, "error_type": "", **more}


class Rates(NamedTuple):
    """How often the slower node is found, how often that is left unsure, and how often another node is blamed."""

    found: float
    unsure: float
    false: float


def rates(
    noise: Noise, slowdowns: Sequence[float], runs: int = 1, before: int = 20, histories: int = HISTORIES
) -> list[Rates]:
    """Return the rates for each slowdown of one node; that the run as a whole is slower then is no false alarm."""
    counts = [[0, 0, 0] for _ in slowdowns]
    limits = Limits(baseline=before, runs=runs)
    for seed in range(histories):
        rng = random.Random(seed)
        usual = [exp(rng.uniform(log(0.2), log(60))) for _ in range(NODES)]
        baseline = [run(rng, noise, usual) for _ in range(before)]
        state = rng.getstate()
        for count, slowdown in zip(counts, slowdowns, strict=True):
            rng.setstate(state)
            found = compare([run(rng, noise, usual, slowdown) for _ in range(runs)], baseline, limits)
            told = {finding.node: finding.status for finding in found if finding.status in (REGRESSED, UNSURE)}
            slower = told.pop(SLOW, "") if slowdown > 1 else ""
            if slowdown > 1:
                told.pop("", None)
            count[0] += slower == REGRESSED
            count[1] += slower == UNSURE
            count[2] += REGRESSED in told.values()
    return [Rates(*(number / histories for number in count)) for count in counts]


SLOWDOWNS = (1.0, 1.2, 1.3, 1.5, 2.0)
HEAD = f"""{HISTORIES:,} histories a row, of {NODES} nodes, one of which becomes slower; how often that is found.

| noise | earlier runs | `--runs` | false alarms | {" | ".join(f"{slowdown:g}x" for slowdown in SLOWDOWNS[1:])} |
|---|---|---|---|{"---|" * (len(SLOWDOWNS) - 1)}"""
CASES = [
    *((f"{share} %", normal(share / 100), before, 1) for share in (2, 4, 10, 20, 30) for before in (10, 20, 50)),
    *((f"{share} %", normal(share / 100), 20, runs) for share in (4, 10, 20) for runs in (2, 3, 5)),
    *(("4 %, heavy tails", heavy_tails(0.04), 20, runs) for runs in (1, 2, 3)),
    *((f"4 %, and {often:g} % outliers", with_outliers(0.04, often / 100), 20, runs)
      for often in (0.5, 2) for runs in (1, 2, 3)),
]  # fmt: skip


def table() -> str:
    """Return the table of docs/check.md."""
    lines = [HEAD]
    for name, noise, before, runs in CASES:
        null, *found = rates(noise, SLOWDOWNS, runs, before)
        cells = [name, str(before), str(runs), f"{100 * null.false:.1f} %"]
        cells += [f"{100 * row.found:.0f} %" + (f" ({100 * row.unsure:.0f} %)" if row.unsure else "") for row in found]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
