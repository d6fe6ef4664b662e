"""What is under way: from state files and log lines, as rows like those that the span files will have."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow as pa

from otel_odibi import names
from otel_odibi.exporters.columns import text
from otel_odibi.exporters.jsonl import files, read_lines
from otel_odibi.exporters.lines import ATTRIBUTES
from otel_odibi.exporters.segments import parse, pattern, safe_name
from otel_odibi.liveness import read_state
from otel_odibi.names import LOST, NODE_COMPLETE, NODE_FAILED
from otel_odibi.store.lines import Record, Wanted, records
from otel_odibi.store.place import Place
from otel_odibi.store.tables import RUNNING, SPANS
from otel_odibi.store.views import Active

SILENT: Final = 60 * 10**9  # a process tells every 5 seconds that it lives
_OUTCOMES: Final = {"failed": names.FAILURE, "partial_failure": names.SUCCESS}


def active(directory: Path | None, *, logs: bool = True) -> tuple[Active, ...]:
    """Return what is under way, what began first first; without `logs` as state files alone tell."""
    if directory is None:
        return ()
    states = [state for state in map(read_state, directory.glob("state/*.json")) if state is not None]
    told = [(state, entry) for state in states for entry in state["active"]]
    if logs:
        told += _unended(directory / "logs", {safe_name(state["service"]) for state in states})
    found = [active for state, entry in told for active in _active(state, entry)]
    return tuple(sorted(found, key=lambda active: active.start_ns))


def _unended(logs: Path, told: set[str]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for found in parse((path.name for path in files(logs)), pattern(".jsonl")):
        begun, heard = dict[Any, dict[str, Any]](), {"heartbeat_unix_nano": 0}
        for line in read_lines(logs / found.entry) if found.is_active and found.name not in told else ():
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                record = orjson.loads(line)
                heard["heartbeat_unix_nano"] = record["time_unix_nano"]
                if record["event_type"].endswith("_start"):
                    begun[record["span_id"]] = record
                elif record["event_type"].startswith(("node_", "pipeline_")):
                    begun.pop(record["span_id"], None)
        yield from (({**record, **heard}, record) for record in begun.values())


def _active(state: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[Active]:
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # anyone may have written it
        texts = [str(entry.get(key, "")) for key in ("pipeline", "run_id", "node_name", "trace_id", "span_id")]
        where, rss = [str(state.get(key, "")) for key in ("service", "host")], state.get("rss")
        times = int(entry.get("time_unix_nano", 0)), int(state["heartbeat_unix_nano"])
        yield Active._make((*where, *texts, *times, rss if isinstance(rss, int) else None))


def rows_under_way(place: Place) -> pa.Table:
    """Return rows of spans for runs under way and their nodes: those too that have ended but are in no file yet.

    The outcome is "running", or "lost" where a process has been silent for a minute.
    """
    rows: list[dict[str, Any]] = []
    now = time.time_ns()
    for each in active(place.directory, logs=False):
        rows.append(_open_row(each, now))
        if not each.node and each.run_id:
            wanted = Wanted(run=each.run_id, since_ns=each.start_ns)
            ended = (r for r in records(place, wanted) if r.get("event_type") in (NODE_COMPLETE, NODE_FAILED))
            rows += [row for record in ended for row in _ended_row(record)]
    return pa.Table.from_pylist(rows, SPANS)


def _open_row(of: Active, now: int) -> dict[str, Any]:
    outcome = LOST if of.host and now - of.heard_ns > SILENT else RUNNING
    told = {names.PIPELINE_NAME: of.pipeline, names.PIPELINE_RUN_ID: of.run_id, names.NODE_NAME: of.node}
    told[names.NODE_OUTCOME if of.node else names.PIPELINE_OUTCOME] = outcome
    return {
        "Timestamp": of.start_ns, "TraceId": of.trace_id, "SpanId": of.span_id, "ParentSpanId": "",
        "SpanName": f"node {of.node}" if of.node else f"pipeline {of.pipeline}", "ServiceName": of.service,
        "SpanAttributes": [(key, value) for key, value in told.items() if value],
        "Duration": max(0, of.heard_ns - of.start_ns), "StatusCode": "Unset", "StatusMessage": "",
        "Events": [], "Links": [],
    }  # fmt: skip


def _ended_row(end: Record) -> Iterator[dict[str, Any]]:
    """Yield the row of a node that has ended, from its line; none where the line is not of that kind."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        told: dict[str, str] = {
            key: text(end[field]) for key, field in ATTRIBUTES.items() if end.get(field) is not None
        }
        links = end.get("links", [])
        status, duration = end["status"], round(end["duration_ms"] * 1e6)
        told[names.NODE_OUTCOME] = _OUTCOMES.get(str(status), str(status))
        if "memory_mb" in end:
            told[names.NODE_MEMORY_RSS] = str(round(end["memory_mb"] * 2**20))
        if links:
            told[names.NODE_DEPENDS_ON] = text(list(dict.fromkeys(link["node"] for link in links)))
        failed = status in ("failed", LOST)
        raised = [(names.EXCEPTION_TYPE, end.get("error_type", "")), (names.EXCEPTION_MESSAGE, end.get("error", ""))]
        yield {
            "Timestamp": end["time_unix_nano"] - duration, "TraceId": end["trace_id"], "SpanId": end["span_id"],
            "ParentSpanId": end.get("parent_span_id", ""), "SpanName": f"node {end['node_name']}",
            "ServiceName": end.get("service", ""), "SpanAttributes": list(told.items()), "Duration": duration,
            "StatusCode": "Error" if failed else "Unset", "StatusMessage": end.get("error", "") if failed else "",
            "Events": [{"Timestamp": end["time_unix_nano"], "Name": "exception", "Attributes": raised}][: failed],
            "Links": [{"TraceId": link["trace_id"], "SpanId": link["span_id"]} for link in links if "span_id" in link],
        }  # fmt: skip
