"""A worker of a dask cluster is killed in the middle of its tasks: what was finished is there, each once, in one trace.

Tasks themselves keep the truth: each appends its key and its process to a file as its last act. The counts are those
of `ODIBI_TEST_SCALE=1`; a tenth by default.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from test_integration_dask import survived_kill

from otel_odibi.integrations.dask import DaskInstrumentor

pytestmark = pytest.mark.faults
ROUNDS = max(1, int(10 * float(os.environ.get("ODIBI_TEST_SCALE", "0.1"))))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_killed_worker_costs_no_finished_task_its_span(tmp_path: Path, seed: int) -> None:
    """Four worker processes, 1,000 tasks, one SIGKILL at a random moment."""
    DaskInstrumentor().instrument()
    try:
        survived_kill(tmp_path, workers=4, tasks=1_000, kill_after=random.Random(seed).randrange(100, 700))
    finally:
        DaskInstrumentor().uninstrument()
