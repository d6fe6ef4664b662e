"""The pytest fixture `odibi_capture`. A module of its own, so that pytest does not load the SDK to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from otel_odibi.testing import Capture


@pytest.fixture
def odibi_capture() -> Iterator[Capture]:
    """Record spans, log records and metric points of the test in memory; see `otel_odibi.testing.capture`."""
    from otel_odibi.testing import capture

    with capture() as captured:
        yield captured
