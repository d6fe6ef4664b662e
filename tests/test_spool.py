"""What is done with batches that an OTLP endpoint takes, refuses, half takes, or does not hear of."""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections import Counter

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags
from otlp_endpoint import CUT, CUT_ANSWER, HANG, OK, PROTOCOLS, endpoint, partial, status

from otel_odibi import spool as spool_module
from otel_odibi.exporters.otlp import (
    SIGNALS,
    Answer,
    OtlpSpanExporter,
    Sender,
    _messages,
    count_items,
    from_line,
    to_line,
)
from otel_odibi.exporters.otlpjson import span_lines
from otel_odibi.settings import Settings
from otel_odibi.spool import Spool, keep, replay

RESOURCE = Resource({"service.name": "flights"})
SCOPE = InstrumentationScope("tests")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No variable of the machine's, no pyproject.toml, and little patience."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")


@pytest.fixture(params=PROTOCOLS)
def away(request):
    """An endpoint, of each protocol, that accepts everything unless told otherwise."""
    with endpoint(request.param) as made:
        yield made


def context_of(number):
    return SpanContext(1, number, False, TraceFlags(1))


def span(number, **attributes):
    context = context_of(number)
    return ReadableSpan(
        "node", context, None, RESOURCE, attributes, start_time=1, end_time=2, instrumentation_scope=SCOPE
    )


def sender_to(away, signal="traces"):
    return Sender(Settings.load({"otlp_endpoint": away.url, "otlp_protocol": away.protocol}), signal)


def line_of(*numbers):
    ((line, _),) = span_lines([span(number) for number in numbers])
    return line


class Spooled:
    """A spool with its exporter, and what was told of it."""

    def __init__(self, away, directory, **options):
        self.dropped, self.troubles, self.acked = Counter(), [], []
        self.spool = Spool(
            directory,
            lambda: f"flights.{os.getpid()}-0a1b2c3d",
            on_drop=lambda signal, reason, count: self.dropped.update({(signal, reason): count}),
            on_trouble=self.troubles.append,
            acked=self.acked.extend,
            **options,
        )
        self.exporter = OtlpSpanExporter(self.spool.outlet(sender_to(away)))
        self.folder = self.spool.folder

    def export(self, *numbers):
        """Export each span as a batch of its own."""
        for number in numbers:
            self.exporter.export([span(number)])

    def files(self):
        return sorted(self.folder.glob("*")) if self.folder.exists() else []

    def lines(self):
        return [orjson.loads(line) for path in self.files() for line in path.read_bytes().splitlines()]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.spool.shutdown(5)


def until(condition):
    """Wait for something that a thread is about to do."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- answers ---------------------------------------------------------------------------------------------------------

ANSWERS = {
    "http/protobuf": [
        (OK, Answer(items=3)),
        (partial(2), Answer(lost=2, items=3)),
        *[(status(code), Answer(f"http_{code}", True)) for code in (429, 502, 503, 504)],
        (status(429, 7), Answer("http_429", True, 7.0)),
        (status(503, 1.5), Answer("http_503", True, 1.5)),
        *[(status(code), Answer(f"http_{code}", lost=3, items=3)) for code in (301, 400, 401, 403, 404, 413, 500)],
        (CUT, Answer("ConnectionError", True)),
        (CUT_ANSWER, Answer("ChunkedEncodingError", True)),
        (HANG, Answer("ReadTimeout", True)),
    ],
    "grpc": [
        (OK, Answer(items=3)),
        (partial(2), Answer(lost=2, items=3)),
        *[
            (status(code), Answer(f"grpc_{code.lower()}", True))
            for code in ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS")
        ],
        (status("RESOURCE_EXHAUSTED", 1.5), Answer("grpc_resource_exhausted", True, 1.5)),
        (status("UNAVAILABLE", 7), Answer("grpc_unavailable", True, 7.0)),
        *[
            (status(code), Answer(f"grpc_{code.lower()}", lost=3, items=3))
            for code in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNAUTHENTICATED", "PERMISSION_DENIED", "INTERNAL")
        ],
        (HANG, Answer("grpc_deadline_exceeded", True)),
    ],
}


@pytest.mark.parametrize(
    ("protocol", "action", "expected"),
    [(protocol, *case) for protocol, cases in ANSWERS.items() for case in cases],
    ids=lambda value: "-".join(map(str, filter(None, value))) if isinstance(value, tuple) else value,
)
def test_answers_are_read_as_the_specification_has_it(protocol, action, expected, caplog):
    """Accepted, half accepted, refused for now and for how long, refused for good; by one attempt, logging nothing."""
    with endpoint(protocol) as away:
        away.then(action)
        answer = sender_to(away).send(line_of(1, 2, 3))
        assert answer == expected
        assert away.attempts == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_closed_port_is_for_now(away, signal):
    """Nobody listens, whatever the signal."""
    away.stop()
    answer = sender_to(away, signal).send(b"{}")
    assert answer.retry
    assert answer.reason in ("ConnectionError", "grpc_unavailable")


def test_compression_and_timeout_are_the_exporters_own(away, monkeypatch):
    """As OTEL_EXPORTER_OTLP_* say."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    sender = sender_to(away)
    if away.protocol == "grpc":
        assert not sender.send(line_of(1)).reason
        assert away.ids() == [1]
    else:
        assert sender.exporter._client._headers["Content-Encoding"] == "gzip"
        assert sender.exporter._client._timeout == 0.5


# --- delivery --------------------------------------------------------------------------------------------------------


def test_batches_are_delivered_in_order_and_leave_nothing_on_disk(away, tmp_path):
    """As long as the endpoint takes them."""
    with Spooled(away, tmp_path) as s:
        s.export(*range(1, 51))
        assert s.spool.flush(10)
        assert away.ids() == s.acked == list(range(1, 51))
        assert s.files() == []
    assert (s.dropped, s.troubles) == ({}, [])


def test_what_is_refused_for_good_is_counted_and_never_sent_again(away, tmp_path):
    """Neither a refused batch nor the rejected part of one."""
    away.then(status(400) if away.protocol != "grpc" else status("INVALID_ARGUMENT"), partial(1))
    with Spooled(away, tmp_path) as s:
        s.export(1, 2, 3)
        assert s.spool.flush(10)
        assert away.ids() == [3]
        assert away.attempts == 3
        assert s.acked == [1, 2, 3]
        assert sum(s.dropped.values()) == 2
        assert s.dropped["spans", "rejected"] == 1


def test_while_the_endpoint_is_away_batches_wait_on_disk_at_no_cost(away, tmp_path):
    """Only the spool's own thread tries; what waits is OTLP/JSON, readable for its owner alone, and sent in order."""
    away.stop()
    with Spooled(away, tmp_path) as s:
        s.export(1)
        until(lambda: s.troubles)
        s.export(*range(2, 101))
        ids = [item["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["spanId"] for item in s.lines()]
        assert ids == [f"{number:016x}" for number in range(1, 101)]
        assert s.acked == list(range(1, 101))  # they need no further care
        (path,) = s.files()
        assert re.fullmatch(rf"flights\.{os.getpid()}-0a1b2c3d\.\d{{16}}\.traces\.jsonl", path.name)
        assert path.stat().st_mode & 0o777 == 0o640
        assert len(s.troubles) < 3
        away.start()
        until(lambda: s.spool.flush(10))
        assert away.ids() == list(range(1, 101))
        assert s.files() == []
    assert s.dropped == {}


def test_what_was_sent_from_disk_is_blank_there(away, tmp_path):
    """So that neither a next process nor a collector that reads the file has it twice."""
    refused = status(503, 60) if away.protocol != "grpc" else status("UNAVAILABLE", 60)
    away.then(refused._replace(wait=None), OK, refused)
    with Spooled(away, tmp_path) as s:
        s.export(1)
        until(lambda: s.troubles)
        s.export(2, 3)
        assert not s.spool.flush(10)
        assert [bool(line) for line in s.lines()] == [False, True, True]
        attempts = away.attempts
        assert not s.spool.flush(10)  # the endpoint has asked to be left alone for a minute
        s.export(4)
        assert away.attempts == attempts == 3
    with Spooled(away, tmp_path) as s:  # the next process
        until(lambda: s.spool.flush(10))
    assert away.ids() == [1, 2, 3, 4]


def test_a_running_process_keeps_its_files(away, tmp_path):
    """Its neighbour takes over only what nobody holds."""
    away.stop()
    with Spooled(away, tmp_path) as mine, Spooled(away, tmp_path) as neighbour:
        mine.export(1)
        until(lambda: mine.troubles)
        neighbour.export(2)
        until(lambda: neighbour.troubles)
        assert len(mine.files()) == 2
        away.start()
        until(lambda: neighbour.spool.flush(10))
        assert away.ids() == [2]
        until(lambda: mine.spool.flush(10))
        assert away.ids() == [2, 1]


def test_a_process_that_lives_on_another_host_keeps_its_files(away, tmp_path):
    """Whoever knows says so; locks do not reach that far everywhere."""
    (tmp_path / "spool").mkdir()
    for stem, number in (("flights.1-aaaaaaaa", 1), ("a.b.2-bbbbbbbb", 2)):
        (tmp_path / "spool" / f"{stem}.000001.traces.jsonl").write_bytes(line_of(number))
    with Spooled(away, tmp_path, is_alive=lambda stem: stem == "a.b.2-bbbbbbbb") as s:
        until(lambda: away.ids() == [1])
        assert s.spool.flush(10)
    assert away.ids() == [1]


def test_spans_are_kept_for_whoever_delivers_next(away, tmp_path):
    """As recovery does: they are on disk when the call returns, and a running process sends them on its next flush."""
    with Spooled(away, tmp_path) as s:
        assert keep(tmp_path, "flights.1-aaaaaaaa", [span(1), span(2)])
        assert keep(tmp_path, "flights.1-aaaaaaaa", [span(3)])
        assert len(s.lines()) == 2
        assert s.spool.flush(10)
        assert away.ids() == [1, 2, 3]
    (tmp_path / "file").touch()
    assert not keep(tmp_path / "file", "flights.1-aaaaaaaa", [span(1)])


def test_torn_and_foreign_lines_stop_nothing(away, tmp_path):
    """A line without end is one that was being written; one that is no request is counted."""
    (tmp_path / "spool").mkdir()
    content = line_of(1) + b'{"resourceSpans": 7}\nnonsense\n{"resourceSpans": []}\n' + line_of(2) + line_of(3)[:-9]
    (tmp_path / "spool" / "x.1-aaaaaaaa.000001.traces.jsonl").write_bytes(content)
    with Spooled(away, tmp_path) as s:
        until(lambda: s.spool.flush(10))
        assert away.ids() == [1, 2]
        assert s.dropped == {("spans", "unreadable"): 2}
        assert s.files() == []


def test_the_oldest_go_where_the_bound_is_reached(away, tmp_path):
    """Counted by spans, none without trace, and never more on disk than allowed."""
    away.stop()
    size = len(line_of(1))
    with Spooled(away, tmp_path, limit=size * 3 * 40) as s:  # a third is for traces
        s.export(1)
        until(lambda: s.troubles)
        s.export(*range(2, 201))
        assert sum(path.stat().st_size for path in s.files()) <= size * 40
        away.start()
        until(lambda: s.spool.flush(10))
        ids = away.ids()
    assert 30 <= len(ids) <= 40
    assert ids == list(range(201 - len(ids), 201))
    assert s.dropped == {("spans", "spool_full"): 200 - len(ids)}


def test_without_room_on_disk_memory_has_to_do(away, tmp_path, monkeypatch):
    """For the newest; the rest is counted, and at the end what has found no place at all."""
    monkeypatch.setattr(spool_module, "_WITHOUT_DISK", 10 * len(line_of(1)))
    (tmp_path / "spool").write_text("a file where the directory should be")
    away.stop()
    with Spooled(away, tmp_path) as s:
        s.export(1)
        until(lambda: s.troubles)
        s.export(*range(2, 31))
        assert s.dropped == {("spans", "io_error"): 20}
        away.start()
        until(lambda: s.spool.flush(10))
        assert away.ids() == list(range(21, 31))
        away.stop()
        s.export(99)
        assert not s.spool.flush(1)
    assert s.dropped == {("spans", "io_error"): 21}


def test_without_a_directory_nothing_is_written(away, tmp_path):
    """Batches wait in memory; what is not delivered at the end is lost and counted."""
    away.then(status(503) if away.protocol != "grpc" else status("UNAVAILABLE"))
    with Spooled(away, None) as s:
        s.export(*range(1, 11))
        until(lambda: s.spool.flush(10))
        assert away.ids() == list(range(1, 11))
        away.stop()
        s.export(*range(11, 14))
        assert not s.spool.shutdown(5)
    assert s.dropped == {("spans", "no_directory"): 3}
    assert list(tmp_path.iterdir()) == []


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["closed", "hangs"])
def test_shutdown_leaves_on_disk_what_it_cannot_deliver(away, tmp_path, monkeypatch, kind):
    """In time, though an attempt would take longer; and a replay delivers it."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "30")
    if kind == "closed":
        away.stop()
    away.default = HANG
    s = Spooled(away, tmp_path)
    s.export(*range(1, 101))
    started = time.monotonic()
    assert s.spool.shutdown(1)
    assert time.monotonic() - started < 10  # not the thirty seconds
    s.export(101)  # a straggler
    assert len(s.lines()) == 101
    assert s.dropped == {}
    away.stop()
    away.default = OK
    away.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", away.protocol)
    assert replay(tmp_path, away.url) == (101, 0, 0)
    assert away.ids() == list(range(1, 102))
    assert s.files() == []


def test_replay_tells_what_was_refused_and_what_is_left(away, tmp_path, monkeypatch):
    """It goes on until the endpoint fails; what is left is for the next. `endpoint` wins over the environment."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", away.protocol)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1/v1/traces")
    (tmp_path / "spool").mkdir()
    lines = [line_of(1, 2), line_of(3, 4, 5), line_of(6)]
    (tmp_path / "spool" / "x.1-aaaaaaaa.000001.traces.jsonl").write_bytes(b"".join(lines))
    grpc = away.protocol == "grpc"
    away.then(OK, status("INTERNAL" if grpc else 400), status("UNAVAILABLE" if grpc else 503))
    assert replay(tmp_path, away.url) == (2, 3, 1)
    assert replay(tmp_path, away.url) == (1, 0, 0)
    assert replay(tmp_path, away.url) == (0, 0, 0)
    assert away.ids() == [1, 2, 6]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_leaves_the_parents_batches_alone(tmp_path):
    """It starts with nothing and takes no file of the parent's; its own are taken over when it is gone."""
    with endpoint() as away:
        away.stop()
        with Spooled(away, tmp_path) as s:
            s.export(1)
            until(lambda: s.troubles)
            pid = os.fork()
            if not pid:
                s.export(2)
                s.spool.shutdown(1)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
            assert len(s.files()) == 2
            away.start()
            until(lambda: s.spool.flush(10))
            assert away.ids() == [2, 1]


# --- protobuf and JSON -----------------------------------------------------------------------------------------------


SCALARS = {
    1: st.floats(allow_nan=False),
    3: st.integers(-(2**63), 2**63 - 1),
    4: st.integers(0, 2**64 - 1),
    5: st.integers(-(2**31), 2**31 - 1),
    6: st.integers(0, 2**64 - 1),
    7: st.integers(0, 2**32 - 1),
    8: st.booleans(),
    9: st.text(max_size=5),
    12: st.binary(max_size=5),
    13: st.integers(0, 2**32 - 1),
    14: st.integers(0, 2),
    16: st.integers(-(2**63), 2**63 - 1),
    17: st.integers(-(2**31), 2**31 - 1),
}
"""Values by the number of a field's type in protobuf."""


@functools.cache
def messages(kind, depth=8):
    """Make messages of a type, each field there or not."""

    def values(field):
        one = messages(field.message_type._concrete_class, depth - 1) if field.message_type else SCALARS[field.type]
        return st.lists(one, max_size=2) if field.is_repeated else one

    fields = {field.name: values(field) for field in kind.DESCRIPTOR.fields} if depth else {}
    return st.fixed_dictionaries({}, optional=fields).map(lambda found: kind(**found))


@pytest.mark.parametrize("signal", SIGNALS)
@given(data=st.data())
def test_a_request_survives_as_a_line(signal, data):
    """Every field of protobuf, through OTLP/JSON and back."""
    request = data.draw(messages(_messages(signal)[0]))
    line = to_line(request)
    assert from_line(signal, line) == request
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1


SPANS = st.builds(
    lambda number, name, parent, links, events, attributes, code: ReadableSpan(
        name, context_of(number), parent and context_of(parent), RESOURCE, attributes,
        [Event(name, attributes, 5) for name in events], [Link(context_of(link), attributes) for link in links],
        status=Status(code), start_time=7, end_time=2**62, instrumentation_scope=SCOPE,
    ),
    st.integers(1, 2**64 - 1),
    st.text(max_size=5),
    st.none() | st.integers(1, 2**64 - 1),
    st.lists(st.integers(1, 2**64 - 1), max_size=2),
    st.lists(st.text(max_size=5), max_size=2),
    st.dictionaries(
        st.text(max_size=5),
        st.text(max_size=5) | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
        | st.lists(st.text(max_size=5), max_size=3) | st.binary(max_size=5),
        max_size=3,
    ),
    st.sampled_from(StatusCode),
)  # fmt: skip


@given(st.lists(SPANS, min_size=1, max_size=5))
def test_spans_by_way_of_a_line_are_those_of_the_official_encoder(spans):
    """Though it is this package that writes the line."""
    ((line, _),) = span_lines(spans)
    official = encode_spans(spans)
    for resource in official.resource_spans:
        resource.schema_url = ""
    assert from_line("traces", line) == official
    assert count_items(official) == len(spans)
