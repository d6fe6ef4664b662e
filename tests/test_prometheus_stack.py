"""What promtool says to the endpoint and to the file: needs promtool (Debian: apt-get install prometheus)."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prometheus import (
    MAKERS,
    TENFOLD,
    counter,
    data,
    distribution,
    exponential,
    gauge,
    histogram,
    number,
    random_batch,
)

from otel_odibi import names
from otel_odibi.exporters.prometheus import expose, families
from otel_odibi.exporters.textfile import TextfileMetricExporter

pytestmark = pytest.mark.stack


def promtool(text: bytes) -> tuple[int, str]:
    """Return the exit code of `promtool check metrics` (1: not valid, 3: complaints about names) and what it said."""
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=120, check=False)
    return result.returncode, (result.stdout + result.stderr).decode()


@TENFOLD
@given(seed=st.integers(0, 2**64))
def test_promtool_accepts_ten_thousand_random_names(seed):
    """A thousand a batch, in four of this package's instruments, without a complaint."""
    assert promtool(expose(families(random_batch(seed)[1]))) == (0, "")


def test_promtool_has_no_complaint_about_any_instrument():
    """Names, units and help texts of all of them are as Prometheus wants them."""
    metrics = [
        MAKERS[i.kind](
            i.name,
            distribution([1] * 24, names.DURATION_BOUNDS, 9.0)
            if i.kind == "histogram"
            else number(1, {"pipeline": "p"}),
            unit=i.unit,
            text=i.description,
        )
        for i in names.INSTRUMENTS
    ]
    found = families(
        data(*metrics, scope=names.SCOPE, resource={"service.name": "s", "deployment.environment.name": "test"})
    )
    assert len(found) == len(names.INSTRUMENTS) + 1
    assert promtool(expose(found)) == (0, "")


@settings(TENFOLD, max_examples=3)
@given(seed=st.integers(0, 2**64))
def test_promtool_accepts_the_file_that_several_runs_have_written(tmp_path_factory, seed):
    """After a state that was lost, too, when the file itself is what counts go on from."""
    target = tmp_path_factory.mktemp("prom")
    for _ in range(3):
        exporter = TextfileMetricExporter(target, service="flights")
        exporter.export(random_batch(seed)[1])
        exporter.shutdown()
        (target / "prometheus" / ".flights.state.json").unlink()
    assert promtool((target / "prometheus" / "flights.prom").read_bytes()) == (0, "")


def test_promtool_accepts_foreign_metrics():
    """Names of others may bring complaints, but nothing invalid."""
    metrics = [
        exponential("latency", 3, [1, 0, 2], [1], zeros=1, total=2.0),
        histogram("h", distribution([1, 1], [1.0], float("nan"), {"le": "x", "a.b": "1", "a_b": "2"})),
        counter("9 lives", number(1, {"": "é\n", "__name__": '"'}), unit="ms"),
        gauge("a.b", number(float("nan"))),
        gauge("a-b", number(1, {"k": "\ud800"})),
        gauge("h.count", number(1)),
    ]
    code, said = promtool(expose(families(data(*metrics, scope="lib", version="1"))))
    assert code in (0, 3), said
