"""Forks by the hundred from the midst of a process at work. The counts are those of `ODIBI_TEST_SCALE=1`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from otlp_endpoint import HANG, PROTOCOLS, endpoint
from test_processes import check, forked

pytestmark = pytest.mark.faults
SCALE = float(os.environ.get("ODIBI_TEST_SCALE", "0.1"))
FORKS = max(20, round(200 * SCALE))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_hundred_forks(tmp_path: Path, protocol: str) -> None:
    """No hang, nothing twice, nothing lost: in Parquet, in the log, in the `.prom` file, at the endpoint."""
    with endpoint(protocol) as collector:
        print(f"{FORKS} forks, {protocol}: {check(forked(tmp_path, collector, FORKS, timeout=600), collector)}")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_forks_while_the_endpoint_hangs_now_and_then(tmp_path: Path, protocol: str) -> None:
    """A fork in the middle of a request that does not end: it is cut after half a second, and made again."""
    with endpoint(protocol) as collector:
        collector.then(*[HANG] * (FORKS // 20))
        print(check(forked(tmp_path, collector, FORKS, timeout=600), collector, cut=True))
