"""The registry of names: no name twice, and what Prometheus will call each metric."""

from __future__ import annotations

import re

import pytest
from opentelemetry.exporter.prometheus._mapping import map_unit, sanitize_full_name

from otel_odibi import names
from otel_odibi.names import DURATION_BOUNDS, INSTRUMENTS

CONSTANTS = {key: value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}
BY_NAME = pytest.mark.parametrize("instrument", INSTRUMENTS, ids=lambda instrument: instrument.name)


def test_no_name_is_there_twice():
    """Attributes, events, outcomes and metrics each have one constant."""
    assert len(set(CONSTANTS.values())) == len(CONSTANTS)
    assert len({i.name for i in INSTRUMENTS}) == len({i.prometheus for i in INSTRUMENTS}) == len(INSTRUMENTS)


def test_the_registry_holds_every_instrument():
    """What is defined is exported."""
    assert set(INSTRUMENTS) == {value for value in vars(names).values() if isinstance(value, names.Instrument)}


def test_attribute_names_follow_the_rules_of_opentelemetry():
    """Lower case, dots between namespaces, underscores between words; ours are under `odibi.`."""
    dotted = [value for value in CONSTANTS.values() if "." in value]
    assert dotted
    for name in (*dotted, *(i.name for i in INSTRUMENTS)):
        assert re.fullmatch(r"[a-z]+(?:[._][a-z]+)*", name)
    standard = {"error", "exception", "code", "thread", "service", "deployment", "otel"}
    assert {name.partition(".")[0] for name in dotted} == {"odibi", *standard}


@BY_NAME
def test_prometheus_names_are_those_of_the_official_mapping(instrument):
    """Name, unit and, for counters, `_total`, as OpenTelemetry's own exporter puts them together."""
    name, unit = sanitize_full_name(instrument.name), map_unit(instrument.unit)
    if unit and not name.endswith(unit):
        name = f"{name}_{unit}"
    suffix = "_total" if instrument.kind == "counter" else ""
    assert instrument.prometheus == name + suffix


@BY_NAME
def test_an_instrument_says_what_it_measures(instrument):
    """Kind, attributes and a sentence; run ids and trace ids are never attributes, as each would be a series."""
    assert instrument.kind in ("counter", "updowncounter", "gauge", "histogram")
    assert instrument.description.endswith(".")
    assert len(set(instrument.attributes)) == len(instrument.attributes)
    assert not {"run_id", "trace_id", "span_id"} & set(instrument.attributes)


def test_bucket_bounds_rise_from_a_millisecond_to_half_a_day():
    """In seconds."""
    assert list(DURATION_BOUNDS) == sorted(set(DURATION_BOUNDS))
    assert (DURATION_BOUNDS[0], DURATION_BOUNDS[-1]) == (0.001, 12 * 3600)
