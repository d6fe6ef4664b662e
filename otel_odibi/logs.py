"""JSON-lines logs: one flat object a line, correlated by trace id, secrets redacted.

Lines of nodes and pipelines are built straight from facts (the structlog chain would cost 6 us a line); a user's own
lines go through structlog. `structlog.configure` is the host's and is never called.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Final

import orjson
from opentelemetry import trace

from otel_odibi import names
from otel_odibi.calls import Node, current
from otel_odibi.clean import DEFAULT, Cleaner, clean_name, describe, to_json
from otel_odibi.facts import (
    MIB,
    CacheLookup,
    Edge,
    Failure,
    NodeFinished,
    NodeRetried,
    NodeStarted,
    RunFinished,
    RunStarted,
)
from otel_odibi.names import FAILURE, SUCCESS

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

Record = dict[str, Any]
Output = Callable[[Record, bytes], object]

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_RESERVED: Final = frozenset(
    ("pipeline", "run_id", "trace_id", "span_id", "parent_span_id", "trace_flags", "time_unix_nano")
)
"""Fields that a user's field of the same name never stands for, nor replaces any other that is there already."""
_OF_NODE: Final = frozenset(("node_name", "layer", "engine"))
_USERS_EVENTS: Final = frozenset((names.CHECKPOINT_CREATED, names.ERROR, names.LOG))
"""Event types that a user's line may have; lines of the others tell what really ran."""
_STATUS: Final = {SUCCESS: "success", FAILURE: "failed"}
_OWN_LOGGERS: Final = "otel_odibi"
_ORDINARY: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@functools.lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def timestamp(unix_nano: int) -> str:
    """Return the time as RFC 3339 text in UTC with microseconds."""
    seconds, nanos = divmod(unix_nano, 1_000_000_000)
    return f"{_second(seconds)}.{nanos // 1000:06d}Z"


class LogWriter:
    """Makes log records of facts and of users' calls and hands them to its outputs. Thread-safe; never raises.

    An output takes the record and its line, one JSON object in UTF-8 with a newline. Start lines carry `process`.
    """

    def __init__(
        self,
        service: str,
        outputs: tuple[Output, ...],
        *,
        level: str = "info",
        cleaner: Cleaner,
        clock: Callable[[], int] = time.time_ns,
        on_error: Callable[[str, BaseException], None],
        process: str = "",
    ) -> None:
        self.service = clean_name(service)
        self.process = process
        self.level = LEVELS[level]
        self.cleaner = cleaner
        self._outputs = outputs
        self._clock = clock
        self.on_error = on_error
        self._beginnings: dict[Any, tuple[Record, Record, str]] = {}

    @property
    def writes(self) -> bool:
        """Whether there is any output."""
        return bool(self._outputs)

    def listeners(self) -> dict[type, Callable[[Any], None]]:
        """Return which of the methods wants which fact."""
        return {
            RunStarted: self.run_started,
            RunFinished: self.run_finished,
            NodeStarted: self.node_started,
            NodeFinished: self.node_finished,
            CacheLookup: self.cache_looked_up,
            NodeRetried: self.node_retried,
        }

    def write(self, record: Record) -> None:
        """Write a record whose values are clean."""
        try:
            line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError:
            line = to_json(record) + b"\n"
        for output in self._outputs:
            try:
                output(record, line)
            except Exception as exc:  # noqa: BLE001, PERF203 - telemetry never harms
                self.on_error("log", exc)

    def log(self, level: str, message: object, fields: Mapping[str, Any], exc: BaseException | None = None) -> None:
        """Write a user's line: its message and fields cleaned, and bound to what is current here. Never raises.

        Of `exc` come error, error_type and stacktrace, never local variables. A field of a name that the record has
        already, or that is reserved, gets a trailing underscore.
        """
        if LEVELS.get(level, 20) < self.level:
            return
        try:
            self.write(self._user_record(level, message, fields, exc))
        except Exception as error:  # noqa: BLE001 - telemetry never harms
            self.on_error("log", error)

    def _user_record(self, level: str, message: object, fields: Mapping[str, Any], exc: BaseException | None) -> Record:
        now = self._clock()
        given = fields.get("event_type")
        event_type = given if type(given) is str and given in _USERS_EVENTS else names.LOG
        text = message if type(message) is str else describe(message)
        record = self._head(now, level, event_type, self.cleaner.text(text))
        self._add_current(record)
        if exc is not None:
            failure = self.cleaner.failure(exc)
            _add_failure(record, failure)
            record["stacktrace"] = failure.stacktrace
        return self._completed(record, now, fields)

    def event(self, level: str, event_type: str, message: str, fields: Mapping[str, Any], pipeline: str = "") -> None:
        """Write a line of any event type, whatever the level, bound to what is current here. Never raises.

        `pipeline` and the fields node_name, layer and engine tell what the line is of, instead of what is current.
        """
        try:
            now = self._clock()
            record = self._head(now, level, event_type, self.cleaner.text(message))
            self._add_current(record)
            for key in _OF_NODE if "node_name" in fields else _OF_NODE & fields.keys():
                record.pop(key, None)
            if pipeline and pipeline != record.get("pipeline"):
                record.pop("run_id", None)
                record["pipeline"] = clean_name(pipeline)
            self.write(self._completed(record, now, fields))
        except Exception as error:  # noqa: BLE001 - telemetry never harms
            self.on_error("log", error)

    def _completed(self, record: Record, now: int, fields: Mapping[str, Any]) -> Record:
        """Add a user's fields, cleaned, and the ids of the current span."""
        event_type = record["event_type"]
        for key, value in fields.items():
            name = clean_name(key)
            if name == "event_type" and value is event_type:
                continue
            while name in record or name in _RESERVED:
                name += "_"
            record[name] = self.cleaner.value(value, name)
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            record["trace_id"] = trace.format_trace_id(context.trace_id)
            record["span_id"] = trace.format_span_id(context.span_id)
        record["time_unix_nano"] = now
        if context.is_valid:
            record["trace_flags"] = int(context.trace_flags)
        return record

    def _add_current(self, record: Record) -> None:
        """Add the run and the node that are under way here."""
        call = current.get()
        if call is not None and call.run is not None:
            record["pipeline"] = call.run.name
            record["run_id"] = call.run.run_id
        if isinstance(call, Node):
            record["node_name"] = call.name
            for key, value in (("layer", call.layer), ("engine", call.engine)):
                if value:
                    record[key] = value

    def _head(self, now: int, level: str, event_type: str, message: str) -> Record:
        return {
            "timestamp": timestamp(now),
            "level": level,
            "event_type": event_type,
            "message": message,
            "service": self.service,
        }

    # --- facts -------------------------------------------------------------------------------------------------------

    def run_started(self, fact: RunStarted) -> None:
        """Write `pipeline_start`."""
        message = f"pipeline {fact.pipeline} started"
        record = self._head(fact.time_unix_nano, "info", names.PIPELINE_START, message)
        record.update(pipeline=fact.pipeline, run_id=fact.run_id, status="running")
        if self.process:
            record["process"] = self.process
        if fact.metadata:
            record["metadata"] = fact.metadata
        self.write(_identified(record, fact, fact.time_unix_nano))

    def run_finished(self, fact: RunFinished) -> None:
        """Write `pipeline_complete`."""
        start = fact.start
        status = _status(fact.outcome, fact.failed_count)
        level = "error" if fact.outcome == FAILURE else "info" if status == "success" else "warning"
        message = f"pipeline {start.pipeline} {_ended(fact.outcome, fact.failure)}"
        record = self._head(fact.time_unix_nano, level, names.PIPELINE_COMPLETE, message)
        record.update(pipeline=start.pipeline, run_id=start.run_id, status=status)
        record["duration_ms"] = fact.duration_ns / 1e6
        record.update(success_count=fact.success_count, failed_count=fact.failed_count)
        _add_failure(record, fact.failure)
        if fact.metadata:
            record["metadata"] = fact.metadata
        self.write(_identified(record, start, fact.time_unix_nano))

    def node_started(self, fact: NodeStarted) -> None:
        """Write `node_start`: it is with the operating system before the node's function runs."""
        begun, _, trace_id = self._begun(fact)
        _, _, _, _, _, _, span_id, parent_span_id, flags, now, rows_in, edges = fact
        record = begun.copy()
        record["timestamp"] = timestamp(now)
        if rows_in is not None:
            record["rows_in"] = rows_in
        _identify(record, trace_id, span_id, parent_span_id, now, flags)
        if self.process:
            record["process"] = self.process
        if edges:
            record["links"] = _links(edges)
        self.write(record)

    def node_finished(self, fact: NodeFinished) -> None:
        """Write `node_complete`, or `node_failed` for a failure."""
        start, now, duration, outcome, attempt, rows_in, rows, size, columns, cache_hit, rss, failure, edges, more = (
            fact
        )
        _, done, trace_id = self._begun(start)
        record = done.copy()
        record["timestamp"] = timestamp(now)
        if outcome != SUCCESS:
            failed = outcome == FAILURE
            record["level"] = "error" if failed else "info"
            record["event_type"] = names.NODE_FAILED if failed else names.NODE_COMPLETE
            record["message"] = f"node {start.node} {_ended(outcome, failure)}"
            record["status"] = _STATUS.get(outcome, outcome)
        record["duration_ms"] = duration / 1e6
        if rows is not None:
            record["row_count"] = rows
        if rows_in is not None:
            record["rows_in"] = rows_in
        if cache_hit is not None:
            record["cache_hit"] = cache_hit
        if rss is not None:
            record["memory_mb"] = round(rss / MIB, 2)
        record["attempt"] = attempt
        _add_failure(record, failure)
        if more:
            record["metadata"] = more
        _identify(record, trace_id, start.span_id, start.parent_span_id, now, start.trace_flags)
        if edges:
            record["links"] = _links(edges)
        if rows is not None:
            record["rows_out"] = rows
        if size is not None:
            record["bytes_out"] = size
        if columns is not None:
            record["columns"] = columns
        self.write(record)

    def _begun(self, fact: NodeStarted) -> tuple[Record, Record, str]:
        """Return what all lines of a node in a run begin with: where it starts, where it succeeds; and the trace id.

        Kept, as to put them together anew for each line would cost a tenth of a node.
        """
        key = fact[:6]
        found = self._beginnings.get(key)
        if found is None:
            begun = self._head(0, "info", names.NODE_START, f"node {fact.node} started")
            _add_node(begun, fact)
            done = {**begun, "event_type": names.NODE_COMPLETE, "message": f"node {fact.node} completed"}
            begun["status"], done["status"] = "running", "success"
            if len(self._beginnings) >= 1_000:
                self._beginnings.clear()
            found = self._beginnings[key] = begun, done, f"{fact.trace_id:032x}"
        return found

    def cache_looked_up(self, fact: CacheLookup) -> None:
        """Write `cache_hit`, or `cache_miss` at level debug, which is written whatever the level."""
        event_type, level = (names.CACHE_HIT, "info") if fact.hit else (names.CACHE_MISS, "debug")
        message = f"cache {'hit' if fact.hit else 'miss'} for node {fact.start.node}"
        record = self._head(fact.time_unix_nano, level, event_type, message)
        _add_node(record, fact.start)
        record["cache_hit"] = fact.hit
        if fact.key is not None:
            record["cache_key"] = self.cleaner.text(fact.key)
        self.write(_identified(record, fact.start, fact.time_unix_nano))

    def node_retried(self, fact: NodeRetried) -> None:
        """Write a warning that an attempt after the first begins, and why."""
        message = f"node {fact.start.node} is retried: attempt {fact.attempt}"
        record = self._head(fact.time_unix_nano, "warning", names.LOG, message)
        _add_node(record, fact.start)
        record["attempt"] = fact.attempt
        _add_failure(record, fact.failure)
        self.write(_identified(record, fact.start, fact.time_unix_nano))


def _status(outcome: str, failed_count: int) -> str:
    if outcome == SUCCESS:
        return "partial_failure" if failed_count else "success"
    return _STATUS.get(outcome, outcome)


def _ended(outcome: str, failure: Failure | None) -> str:
    if outcome == SUCCESS:
        return "completed"
    if outcome == FAILURE and failure is not None:
        return f"failed: {failure.type}: {failure.message}"
    return f"was {outcome}"


def _add_node(record: Record, fact: NodeStarted) -> None:
    if fact.run_id:
        record["pipeline"] = fact.pipeline
        record["run_id"] = fact.run_id
    record["node_name"] = fact.node
    if fact.layer:
        record["layer"] = fact.layer
    if fact.engine:
        record["engine"] = fact.engine


def _add_failure(record: Record, failure: Failure | None) -> None:
    if failure is not None:
        if failure.message:
            record["error"] = failure.message
        record["error_type"] = failure.type


def _identified(record: Record, fact: NodeStarted | RunStarted, now: int) -> Record:
    _identify(record, f"{fact.trace_id:032x}", fact.span_id, fact.parent_span_id, now, fact.trace_flags)
    return record


def _identify(record: Record, trace_id: str, span_id: int, parent_span_id: int, now: int, flags: int) -> None:
    record["trace_id"] = trace_id
    record["span_id"] = f"{span_id:016x}"
    if parent_span_id:
        record["parent_span_id"] = f"{parent_span_id:016x}"
    record["time_unix_nano"] = now
    record["trace_flags"] = int(flags)


def _links(edges: tuple[Edge, ...]) -> list[dict[str, str]]:
    return [
        {"node": e.node, "trace_id": f"{e.trace_id:032x}", "span_id": f"{e.span_id:016x}"}
        if e.span_id
        else {"node": e.node}
        for e in edges
    ]


# --- users' lines ----------------------------------------------------------------------------------------------------

_writer: LogWriter | None = None


def activate(writer: LogWriter | None) -> None:
    """Make `writer` the one every logger writes to from now on; None makes them write nothing."""
    global _writer
    _writer = writer


def active() -> LogWriter | None:
    """Return the writer that loggers write to."""
    return _writer


def get_logger(**fields: Any) -> FilteringBoundLogger:
    """Return a structlog logger that writes to the configured log file; `fields` are bound to every line.

    Lines carry trace_id, span_id, pipeline, run_id and node_name of where they are written, and what structlog's
    contextvars hold. May be called before `configure()`; without it lines go nowhere. Values are redacted and bounded,
    and calls never raise. Loggers may be shared between threads; `ainfo()` and the like are there for async code.
    """
    import structlog  # imports rich where that is installed, 130 ms: not at import of this package

    processors = (structlog.contextvars.merge_contextvars, _hand_over)
    logger: FilteringBoundLogger = structlog.wrap_logger(
        _Nowhere(), processors=processors, wrapper_class=_logger_class(), **fields
    )
    return logger


@functools.cache
def _logger_class() -> type[FilteringBoundLogger]:
    """Make structlog's own logger class over with methods that never raise: its own raise where %-formatting does."""
    import structlog

    methods: dict[str, Any] = {}
    for name in (*LEVELS, *_ALIASES):
        methods[name] = _method(name)
        methods[f"a{name}"] = _async_method(name)
    methods["log"] = lambda self, level, *args, **fields: getattr(self, _level(level))(*args, **fields)
    methods["alog"] = lambda self, level, *args, **fields: getattr(self, f"a{_level(level)}")(*args, **fields)
    base = structlog.make_filtering_bound_logger(0)  # the level is a setting and is looked at on writing
    return type("Logger", (base,), methods)


_ALIASES: Final = {"warn": "warning", "fatal": "critical", "msg": "info", "exception": "error"}


def _level(number: object) -> str:
    """Return the name of the highest level that a number reaches."""
    value = number if isinstance(number, (int, float)) else 0
    return next((name for name, least in reversed(LEVELS.items()) if value >= least), "debug")


def _method(method_name: str) -> Callable[..., None]:
    level = _ALIASES.get(method_name, method_name)

    def method(self: Any, event: object = "", /, *args: object, **fields: Any) -> None:
        if method_name == "exception":
            fields.setdefault("exc_info", True)
        for taken in {"event", "method_name"} & fields.keys():  # parameters of what comes next
            name = f"{taken}_"
            while name in fields:
                name += "_"
            fields[name] = fields.pop(taken)
        try:
            self._proxy_to_logger(level, _formatted(event, args), **fields)
        except Exception as exc:  # noqa: BLE001 - a host's processor that was bound to it, perhaps
            if _writer is not None:
                _writer.on_error("log", exc)

    return method


def _async_method(name: str) -> Callable[..., Any]:
    method = _method(name)

    async def asynchronous(self: Any, event: object = "", /, *args: object, **fields: Any) -> None:
        if name == "exception" or fields.get("exc_info") is True:
            fields["exc_info"] = sys.exc_info()  # of this thread
        call = functools.partial(contextvars.copy_context().run, method, self, event, *args, **fields)
        import asyncio

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # another event loop than asyncio's
            call()
        else:
            await loop.run_in_executor(None, call)

    return asynchronous


def _formatted(template: object, args: Any) -> object:
    """Return the message with its arguments put in, or beside it where they do not fit."""
    if not args:
        return template
    try:
        only = args[0] if isinstance(args, tuple) and len(args) == 1 else None
        return template % (only if isinstance(only, Mapping) and only else args)  # type: ignore[operator]
    except Exception:  # noqa: BLE001 - an argument's own __str__ may raise anything
        return f"{describe(template)} {to_json(DEFAULT.value(args)).decode()}"


def _hand_over(logger: Any, method: str, event_dict: MutableMapping[str, Any]) -> Any:
    """Write the event: the last processor of the chain. The logger beneath has nothing left to do."""
    writer = _writer
    if writer is not None:
        message = event_dict.pop("event", "")
        exc = _exception(event_dict.pop("exc_info", None))
        writer.log(method, message, event_dict, exc)
    return (), {}


def _exception(exc_info: Any) -> BaseException | None:
    """Return the exception that structlog's or logging's `exc_info` speaks of."""
    if isinstance(exc_info, BaseException):
        return exc_info
    if not exc_info:
        return None
    found = exc_info[1] if isinstance(exc_info, tuple) and len(exc_info) == 3 else sys.exc_info()[1]
    return found if isinstance(found, BaseException) else None


class _Nowhere:
    """What structlog would print with; the chain has written the line already."""

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: None


class LoggingHandler(logging.Handler):
    """Lets records of the standard `logging` module join the log file, cleaned and correlated like any other line.

    Extra attributes become fields. Never raises. This package's own warnings are left out, as one of them may tell
    that the file cannot be written.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        writer = _writer
        if writer is None or record.name.partition(".")[0] == _OWN_LOGGERS:
            return
        try:
            fields = {key: value for key, value in vars(record).items() if key not in _ORDINARY}
            writer.log(
                _level(record.levelno), _message(record), {"logger": record.name, **fields}, _exception(record.exc_info)
            )
        except Exception:  # noqa: BLE001 - a record's arguments may not fit its format
            self.handleError(record)


def _message(record: logging.LogRecord) -> object:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - the arguments may not fit the format
        return _formatted(record.msg, record.args)
