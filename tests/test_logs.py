"""Log lines: their fields, that each is valid JSON, what they are bound to, and that logging never harms."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_values import Hostile, Unreadable, keys, ring, values
from opentelemetry import trace
from secret_samples import SECRETS, leaked

import otel_odibi as oo
from otel_odibi import logs
from otel_odibi.clean import MAX_NAME, MAX_TEXT, Cleaner
from otel_odibi.facts import Edge, NodeStarted
from otel_odibi.logs import LoggingHandler, LogWriter, timestamp
from otel_odibi.testing import FakeClock, capture

HEAD = ["timestamp", "level", "event_type", "message", "service"]
IN_RUN = ["pipeline", "run_id"]
IDS = ["trace_id", "span_id", "parent_span_id", "time_unix_nano", "trace_flags"]


@contextlib.contextmanager
def written(**options):
    """Let loggers write for the time of the block; gives the lines, as bytes."""
    lines: list[bytes] = []
    errors: list[BaseException] = []
    options = {"outputs": (lambda record, line: lines.append(line),), "cleaner": Cleaner(), **options}
    writer = LogWriter("flights", clock=FakeClock().time_ns, on_error=lambda where, exc: errors.append(exc), **options)
    before = logs.active()
    logs.activate(writer)
    try:
        yield lines
    finally:
        logs.activate(before)
    assert not errors


def parsed(line):
    """Return a line's record: JSON by the letter of RFC 8259, one line, in UTF-8."""
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return json.loads(line.decode("utf-8", "strict"), parse_constant=pytest.fail)


# --- fields ----------------------------------------------------------------------------------------------------------


def test_lines_of_a_run_have_their_fields_in_order(odibi_capture):
    """The same fields in the same order each time, absent where unknown."""
    with contextlib.suppress(ValueError), oo.pipeline("daily"):
        with oo.node("read", layer="raw", engine="pandas", inputs=[[1, 2]]) as n:
            n.cache(hit=False, key="3fa9")
            n.set(source="crm")
            n.output(rows=3, bytes=4)
        with oo.node("join", depends_on="read") as n:
            with contextlib.suppress(OSError), n.attempt():
                raise OSError("gone")
            with n.attempt():
                raise ValueError("bad row")
    run, start, miss, done, start_join, retry, failed, end = odibi_capture.logs

    node = ["node_name", "layer", "engine"]
    assert list(run) == [*HEAD, *IN_RUN, "status", *IDS[:2], *IDS[3:]]
    assert list(start) == [*HEAD, *IN_RUN, *node, "status", "rows_in", *IDS]
    assert list(miss) == [*HEAD, *IN_RUN, *node, "cache_hit", "cache_key", *IDS]
    assert list(done) == [
        *HEAD, *IN_RUN, *node, "status", "duration_ms", "row_count", "rows_in", "cache_hit", "memory_mb", "attempt",
        "metadata", *IDS, "rows_out", "bytes_out",
    ]  # fmt: skip
    assert list(start_join) == [*HEAD, *IN_RUN, "node_name", "status", *IDS, "links"]
    assert list(retry) == [*HEAD, *IN_RUN, "node_name", "attempt", "error", "error_type", *IDS]
    assert list(failed) == [
        *HEAD, *IN_RUN, "node_name", "status", "duration_ms", "memory_mb", "attempt", "error", "error_type", *IDS,
        "links",
    ]  # fmt: skip
    assert list(end) == [
        *HEAD, *IN_RUN, "status", "duration_ms", "success_count", "failed_count", "error", "error_type",
        *IDS[:2], *IDS[3:],
    ]  # fmt: skip
    assert [(r["event_type"], r["level"], r.get("status")) for r in odibi_capture.logs] == [
        ("pipeline_start", "info", "running"),
        ("node_start", "info", "running"),
        ("cache_miss", "debug", None),
        ("node_complete", "info", "success"),
        ("node_start", "info", "running"),
        ("log", "warning", None),
        ("node_failed", "error", "failed"),
        ("pipeline_complete", "error", "failed"),
    ]
    assert (done["row_count"], done["rows_in"], done["rows_out"], done["bytes_out"]) == (3, 2, 3, 4)
    assert (done["memory_mb"], done["attempt"], done["metadata"]) == (100.0, 1, {"source": "crm"})
    assert (failed["error"], failed["error_type"], failed["attempt"]) == ("bad row", "ValueError", 2)
    assert failed["links"] == [{"node": "read", "trace_id": done["trace_id"], "span_id": done["span_id"]}]
    assert (end["success_count"], end["failed_count"]) == (1, 1)


def test_durations_are_in_milliseconds_and_time_stamps_are_those_of_the_event(odibi_capture):
    """A start line tells when the node began, the other when it ended."""
    with oo.node("wait"):
        odibi_capture.clock.advance(1.25)
    start, done = odibi_capture.logs
    assert (start["timestamp"], done["timestamp"]) == ("2026-01-01T00:00:00.000000Z", "2026-01-01T00:00:01.250000Z")
    assert done["duration_ms"] == 1250.0
    assert done["time_unix_nano"] - start["time_unix_nano"] == 1_250_000_000


@settings(deadline=None)
@given(st.integers(0, 253_402_300_799_999_999_999))
def test_time_stamps_are_rfc_3339_in_utc_with_microseconds(nanoseconds):
    """They read back as the same moment, cut to the microsecond."""
    text = timestamp(nanoseconds)
    moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    assert (moment - epoch) // datetime.timedelta(microseconds=1) == nanoseconds // 1_000
    assert len(text) == 27


@pytest.mark.parametrize(
    ("error", "level", "status"),
    [
        (KeyboardInterrupt(), "warning", "cancelled"),
        (asyncio.CancelledError(), "warning", "cancelled"),
        (SystemExit(0), "info", "success"),
        (SystemExit(3), "error", "failed"),
    ],
)
def test_every_way_to_end_has_its_status(odibi_capture, error, level, status):
    """A cancelled run is no failure, and an exit with code 0 is a success."""
    with pytest.raises(type(error)), oo.pipeline("p"), oo.node("n"):
        raise error
    *_, node, run = odibi_capture.logs
    assert (run["level"], run["status"], node["status"]) == (level, status, status)


def test_a_run_with_failed_nodes_that_completes_is_a_partial_failure(odibi_capture):
    """Its counts say how many."""
    with oo.pipeline("p"), contextlib.suppress(ValueError), oo.node("n"):
        raise ValueError
    assert odibi_capture.logs[-1]["status"] == "partial_failure"
    assert odibi_capture.logs[-1]["level"] == "warning"
    assert odibi_capture.logs[-1]["failed_count"] == 1


def test_edges_without_a_known_span_are_links_by_name():
    """Where the producer ran in another process, only its name is known."""
    started = NodeStarted("", "", "n", "", "", 1, 2, 0, 1, 0, None, (Edge("a", 0, 0), Edge("b", 3, 4)))
    with written() as lines:
        logs.active().node_started(started)
    assert parsed(lines[0])["links"] == [{"node": "a"}, {"node": "b", "trace_id": f"{3:032x}", "span_id": f"{4:016x}"}]


# --- users' lines ----------------------------------------------------------------------------------------------------


def test_a_users_line_is_bound_to_run_node_and_span(odibi_capture):
    """Fields are top-level keys; ids are those of the current span, which may be the user's own."""
    log = oo.get_logger(team="data")
    log.info("outside")
    with oo.pipeline("daily") as run, oo.node("join", layer="silver", engine="polars") as n:
        log.bind(batch=7).warning("late flights", share=0.21)
    outside, inside = (record for record in odibi_capture.logs if record["event_type"] == "log")
    assert list(outside) == [*HEAD, "team", "time_unix_nano"]
    assert list(inside) == [
        *HEAD, *IN_RUN, "node_name", "layer", "engine", "team", "batch", "share",
        "trace_id", "span_id", "time_unix_nano", "trace_flags",
    ]  # fmt: skip
    assert inside["level"] == "warning"
    assert inside["trace_id"] == run.trace_id == n.trace_id
    assert inside["span_id"] == trace.format_span_id(n.span.get_span_context().span_id)


def test_structlogs_context_variables_are_fields(odibi_capture):
    """As the host application has bound them."""
    with structlog.contextvars.bound_contextvars(request="r-1", password="hunter2hunter2"):
        oo.get_logger().info("x")
    assert odibi_capture.logs[0]["request"] == "r-1"
    assert odibi_capture.logs[0]["password"] == "[redacted]"


@pytest.mark.parametrize(
    "field",
    [
        "timestamp", "level", "event_type", "message", "service", "pipeline", "run_id", "node_name", "layer", "engine",
        "trace_id", "span_id", "parent_span_id", "trace_flags", "time_unix_nano", "event", "method_name",
    ],
)  # fmt: skip
def test_what_a_line_is_bound_to_cannot_be_overwritten(odibi_capture, field):
    """A user's field of the same name gets an underscore; nothing is lost."""
    with oo.pipeline("daily"), oo.node("join", layer="silver", engine="polars"):
        oo.get_logger().info("late", x=1)
        oo.get_logger().info("late", **{field: "mine", f"{field}_": "too", "x": 1})
    plain, line = (record for record in odibi_capture.logs if record["event_type"] == "log")
    assert {key: value for key, value in line.items() if value not in ("mine", "too")} == plain
    assert {line[f"{field}_"], line[f"{field}__"]} == {"mine", "too"}


@pytest.mark.parametrize("field", ["pipeline", "run_id", "trace_id", "span_id", "parent_span_id", "time_unix_nano"])
def test_ids_cannot_be_made_up_outside_a_run_either(odibi_capture, field):
    """What reads the file may trust them."""
    oo.get_logger().info("late", **{field: "mine"})
    assert odibi_capture.logs[0][f"{field}_"] == "mine"
    assert odibi_capture.logs[0].get(field) != "mine"


def test_a_users_line_may_be_a_checkpoint_or_an_error_but_not_a_node(odibi_capture):
    """Lines of nodes and runs tell what really ran."""
    log = oo.get_logger()
    log.info("saved", event_type="checkpoint_created", row_count=5)
    log.info("faked", event_type="node_start")
    log.info("odd", event_type=ring())
    saved, faked, odd = odibi_capture.logs
    assert (saved["event_type"], saved["row_count"]) == ("checkpoint_created", 5)
    assert "event_type_" not in saved
    assert (faked["event_type"], faked["event_type_"]) == ("log", "node_start")
    assert odd["event_type"] == "log"


def test_lines_in_threads_are_bound_to_the_node_of_their_thread(odibi_capture):
    """Sixteen nodes at once, each with lines of its own."""
    log, barrier = oo.get_logger(), threading.Barrier(16)

    @oo.node
    def work(number):
        barrier.wait()
        log.info("working", number=number)
        return number

    with oo.pipeline("p"), ThreadPoolExecutor(16) as pool:
        list(pool.map(oo.carry(work), range(16)))
    spans = {span.context.span_id: span for span in odibi_capture.spans}
    lines = [record for record in odibi_capture.logs if record["event_type"] == "log"]
    assert sorted(line["number"] for line in lines) == list(range(16))
    assert len({line["span_id"] for line in lines}) == 16
    assert all(spans[int(line["span_id"], 16)].name == "node work" for line in lines)
    assert {line["run_id"] for line in lines} == {"run-1"}


def test_lines_in_tasks_are_bound_to_the_node_of_their_task(odibi_capture):
    """Also those written by the asynchronous methods, which write in another thread."""
    log = oo.get_logger()

    @oo.node
    async def work(number, everyone_is_there):
        with oo.node(f"inner {number}"):
            await everyone_is_there.wait()
            await log.ainfo("working", number=number)
            await log.alog(30, "working %s", "still", number=number)

    async def main():
        everyone_is_there = asyncio.Event()
        tasks = [asyncio.create_task(work(number, everyone_is_there)) for number in range(8)]
        await asyncio.sleep(0)
        everyone_is_there.set()
        await asyncio.gather(*tasks)

    with oo.pipeline("p"):
        asyncio.run(main())
    spans = {span.context.span_id: span.name for span in odibi_capture.spans}
    lines = [record for record in odibi_capture.logs if record["event_type"] == "log"]
    assert len(lines) == 16
    assert all(
        spans[int(line["span_id"], 16)] == f"node inner {line['number']}" == f"node {line['node_name']}"
        for line in lines
    )


def test_the_lowest_level_is_a_setting():
    """Of users' lines; those of nodes are written whatever it is."""
    with capture(log_level="error") as captured:
        log = oo.get_logger()
        for level in ("debug", "info", "warning", "error", "critical", "exception", "warn", "fatal", "msg"):
            getattr(log, level)(level)
        with oo.node("n") as n:
            n.cache(hit=False)
    levels = [(r["event_type"], r["level"]) for r in captured.logs]
    assert levels[:4] == [("log", "error"), ("log", "critical"), ("log", "error"), ("log", "critical")]
    assert levels[4:] == [("node_start", "info"), ("cache_miss", "debug"), ("node_complete", "info")]


@pytest.mark.parametrize(
    ("number", "level"), [(10, "debug"), (15, "debug"), (20, "info"), (45, "error"), (99, "critical"), ("x", "debug")]
)
def test_a_level_may_be_a_number(number, level):
    """The name of the highest level that it reaches."""
    with written(level="debug") as lines:
        oo.get_logger().log(number, "x")
    assert parsed(lines[0])["level"] == level


# --- exceptions ------------------------------------------------------------------------------------------------------


def failing(hidden):
    """Raise, with something in a local variable that must not be shown."""
    local_password = f"{hidden}!"
    raise ValueError(f"no login at https://etl:{hidden}@host, {len(local_password)}")


@pytest.mark.parametrize("way", ["exception", "exc_info", "instance", "tuple", "logging", "aexception"])
def test_exceptions_are_fields_without_local_variables(way):
    """Type, message and stack trace, redacted; structlog's own rendering would dump the locals."""
    secret = "hunter2" * 2  # not in one piece, as stack traces show lines of source
    with capture(capture_logging=True) as captured:
        log = oo.get_logger()
        try:
            failing(secret)
        except ValueError as exc:
            as_tuple = (ValueError, exc, exc.__traceback__)
            if way == "exception":
                log.exception("failed")
            elif way == "aexception":
                asyncio.run(log.aexception("failed"))
            elif way == "logging":
                logging.getLogger("host").exception("failed")
            else:
                log.error("failed", exc_info={"exc_info": True, "instance": exc, "tuple": as_tuple}[way])
    (line,) = captured.logs
    assert (line["level"], line["error_type"]) == ("error", "ValueError")
    assert line["error"] == "no login at https://etl:[redacted]@host, 15"
    assert "in failing" in line["stacktrace"]
    assert "exc_info" not in line
    assert secret not in json.dumps(line)


def test_exc_info_without_an_exception_is_nothing(odibi_capture):
    """A field of the user's by the name of one of ours is kept beside it."""
    log = oo.get_logger()
    for nothing in (True, False, None, (None, None, None), "yes"):
        log.info("fine", exc_info=nothing)
    log.info("failed", exc_info=ValueError("x"), error="mine")
    assert all("error" not in record for record in odibi_capture.logs[:5])
    assert (odibi_capture.logs[5]["error"], odibi_capture.logs[5]["error_"]) == ("x", "mine")


# --- any value -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(values, st.dictionaries(keys.map(str), values, max_size=3))
def test_any_message_and_fields_make_a_valid_line(message, fields):
    """Through the logger's methods, its bound fields, and structlog's context variables."""
    with written(level="debug") as lines, structlog.contextvars.bound_contextvars(**fields):
        log = oo.get_logger()
        log.info(message, **fields)
        log.info(message, message, **fields)
        log.bind(**{f"bound {key}": value for key, value in fields.items()}).debug("x")
    assert len(lines) == 3
    assert all(list(parsed(line))[:5] == HEAD for line in lines)


@settings(deadline=None)
@given(values, values)
def test_any_record_of_the_standard_library_makes_a_valid_line(message, extra):
    """Whether its arguments fit its format or not."""
    handler = LoggingHandler()
    with written(level="debug") as lines:
        for arguments in ((), (message,), (1, 2)):
            record = logging.LogRecord("host.module", logging.INFO, __file__, 1, message, arguments, None)
            record.extra = extra
            handler.handle(record)
    assert [parsed(line)["logger"] for line in lines] == ["host.module"] * 3


@settings(deadline=None)
@given(st.dictionaries(keys.map(str), values, max_size=3), values, values)
def test_any_attribute_of_a_node_makes_valid_lines(attributes, key, error):
    """Set on the node, given for its cache key or as the text of an exception."""
    with written(level="debug") as lines, capture() as captured:
        logs.activate(None)
        captured.telemetry.log_writer._outputs = (lambda record, line: lines.append(line),)
        with contextlib.suppress(ValueError), oo.pipeline("p") as run:
            run.set(**attributes)
            with oo.node("n") as n:
                n.set(**attributes)
                n.event("e", **attributes)
                n.cache(hit=True, key=key)
                raise ValueError(error)
    assert [parsed(line)["event_type"] for line in lines] == [
        "pipeline_start", "node_start", "cache_hit", "node_failed", "pipeline_complete",
    ]  # fmt: skip
    assert captured.metric("odibi.telemetry.dropped") == 0


def test_names_and_values_as_long_as_allowed_are_never_cut(odibi_capture):
    """Names of 1,024 characters and values of 64 kB; longer ones are cut with a mark."""
    name, value = "n" * MAX_NAME, "v" * MAX_TEXT
    with oo.pipeline(name), oo.node(name, layer=name) as n:
        n.set(kept=value, long=value + "x")
        oo.get_logger().info(value, **{name: value, "x" * 2000: "long"})
    user, done = odibi_capture.logs[2:4]
    assert user["message"] == user[name] == value
    assert user["x" * MAX_NAME + "…[cut 976 characters]"] == "long"
    assert user["pipeline"] == user["node_name"] == done["layer"] == name
    assert done["metadata"] == {"kept": value, "long": value + "…[cut 1 characters]"}


def test_ten_megabytes_make_a_short_line():
    """Text, bytes, lists: a mark tells how long they were."""
    with written() as lines:
        oo.get_logger().info("x" * 10**7, text="x" * 10**7, data=b"\xff" * 10**7, items=["x"] * 10**6, number=10**10**5)
    line = parsed(lines[0])
    assert len(lines[0]) < 200_000
    assert line["text"].endswith("…[cut 9934464 characters]")
    assert line["data"] == "<10000000 bytes>"
    assert line["items"][-1] == "…[cut 999001 items]"


def test_no_secret_comes_through(odibi_capture):
    """Of any shape; in messages, fields, names of fields, nested values, exceptions."""
    log = oo.get_logger()
    for text, _ in SECRETS.values():
        log.info(
            text, text=text, nested={"a": [text]}, keyed={text: 1}, error_like=ValueError(text), data=text.encode()
        )
        log.info("values: %s", text, **{text: text})
        with contextlib.suppress(ValueError), oo.node("n") as n:
            n.set(note=text)
            n.cache(hit=True, key=text)
            raise ValueError(text)
    everything = json.dumps(odibi_capture.logs, ensure_ascii=False)
    assert {shape for shape, (_, secrets) in SECRETS.items() if leaked(secrets, everything)} == set()


# --- never harms -----------------------------------------------------------------------------------------------------


def test_without_configure_lines_go_nowhere():
    """A logger may be made before; it writes once there is something to write to."""
    log = oo.get_logger(early=True)
    log.info("lost")
    with written() as lines:
        log.info("kept")
    log.info("lost too")
    assert [parsed(line)["message"] for line in lines] == ["kept"]


def test_structlogs_own_configuration_is_the_hosts():
    """It is neither set nor obeyed."""
    oo.get_logger().info("x")
    assert not structlog.is_configured()


def test_a_message_whose_arguments_do_not_fit_is_written_with_them_beside_it():
    """structlog would raise into the pipeline."""
    with written() as lines:
        log = oo.get_logger()
        log.info("%d rows", "many")
        log.info("%s and %s", 1)
        log.info("%(rows)d rows", {"rows": 3})
        log.info("%s %s", 1, 2)
        log.info("100% of %s", Hostile())
        log.error()
    messages = [
        '%d rows ["many"]',
        "%s and %s [1]",
        "3 rows",
        "1 2",
        '100% of %s ["<Hostile: RuntimeError while reading>"]',
        "",
    ]
    assert [parsed(line)["message"] for line in lines] == messages


def test_asynchronous_methods_work_without_asyncio():
    """Under another event loop they write in this thread."""
    with written() as lines:
        coroutine = oo.get_logger().ainfo("from trio")
        with pytest.raises(StopIteration):
            coroutine.send(None)
    assert parsed(lines[0])["message"] == "from trio"


def test_an_output_that_raises_is_reported_and_the_others_still_write():
    """And so is whatever else goes wrong inside."""

    def broken(record, line):
        raise OSError("disk gone")

    errors: list[tuple[str, BaseException]] = []
    lines: list[bytes] = []
    outputs = (broken, lambda record, line: lines.append(line))
    writer = LogWriter("s", outputs, cleaner=Cleaner(), on_error=lambda where, exc: errors.append((where, exc)))
    writer.log("info", "x", {})
    assert [(where, type(exc)) for where, exc in errors] == [("log", OSError)]
    assert parsed(lines[0])["message"] == "x"
    writer._clock = lambda: 1 // 0
    writer.log("info", "x", {})
    assert type(errors[1][1]) is ZeroDivisionError


def test_a_service_name_of_any_kind_makes_valid_lines():
    """An environment variable may hold bytes that are no UTF-8."""
    lines: list[bytes] = []
    writer = LogWriter("s\udcff", (lambda record, line: lines.append(line),), cleaner=Cleaner(), on_error=pytest.fail)
    writer.log("info", "x", {})
    assert parsed(lines[0])["service"] == "s\ufffd"


def test_records_of_the_standard_library_join_in():
    """With their logger's name, their extra fields, their level and their exception; bound to the node."""
    with capture(capture_logging=True, log_level="debug") as captured:
        with oo.node("n"):
            logging.getLogger("host.db").warning("%d rows", 3, extra={"table": "t", "password": "hunter2hunter2"})
        logging.getLogger("otel_odibi").warning("our own are left out")
        logging.getLogger("host").error("odd", exc_info=Unreadable())
    line, odd = (record for record in captured.logs if record["event_type"] == "log")
    assert (line["message"], line["level"], line["logger"], line["table"]) == ("3 rows", "warning", "host.db", "t")
    assert (line["node_name"], line["password"]) == ("n", "[redacted]")
    assert odd["error"] == "<Unreadable: RuntimeError while reading>"
