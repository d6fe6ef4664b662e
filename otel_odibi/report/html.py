"""A run as one HTML file that needs no network: `write(store.open("telemetry"), "last", "run.html")`."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import os
import re
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from otel_odibi.exporters.files import replace_file
from otel_odibi.names import LOG
from otel_odibi.report.critical import critical_path, sources
from otel_odibi.report.graph import graph
from otel_odibi.store import LAST, RunSummary, RunView, Store

if TYPE_CHECKING:
    import pyarrow as pa

LIMIT: Final = 950_000
"""Bytes of a file above which log lines are left out of it."""
LINES: Final = 10_000
"""Log lines that are read at most; of warnings and errors as many again, as they count for more."""
LONGEST: Final = 2_000
"""Characters of an attribute or a log field that are shown."""
EARLIER: Final = 30
"""Runs of the same pipeline, before this one, that it is compared with."""
_SLACK: Final = 60_000_000_000
"""Nanoseconds by which a process's clock may be behind."""

_ELSEWHERE: Final = frozenset((
    "service", "pipeline", "run_id", "layer", "engine", "status", "process", "trace_id", "parent_span_id", "links",
    "time_unix_nano", "trace_flags", "columns",
))  # fmt: skip
"""Fields of log lines that the report has in other places."""
_MEASURED: Final = frozenset((
    "duration_ms", "row_count", "rows_in", "rows_out", "bytes_out", "memory_mb", "attempt", "cache_hit", "error",
    "error_type", "metadata", "success_count", "failed_count",
))  # fmt: skip
"""And those of the lines that tell of a node or a run itself."""


def write(store: Store, run_id: str, path: str | os.PathLike[str]) -> None:
    """Write the report of a run to `path`, whole or not at all. Raises what `render` raises, and OSError."""
    replace_file(Path(path), render(store, run_id), 0o644)


def render(store: Store, run_id: str = LAST) -> bytes:
    """Return the report of one run, finished or under way: an HTML document that loads nothing from anywhere.

    Its size stays near `LIMIT` unless a run of thousands of nodes is larger without any logs: log lines are left out,
    visibly, warnings and errors last. Raises StoreError where there is no such run. Thread-safe.
    """
    view = store.run(run_id)
    found, more = _lines(store, view)
    data = _data(store, view) | {"logs": found, "logs_cut": more}
    while len(page := _page(view.run, data)) > LIMIT and data["logs"]:
        data |= {"logs": _best(data["logs"], len(data["logs"]) // 2), "logs_cut": True}
    return page


# --- what it tells ---------------------------------------------------------------------------------------------------


def _data(store: Store, view: RunView) -> dict[str, Any]:
    before = sources(view.nodes)
    return {
        "run": view.run,
        "nodes": view.nodes,
        "sources": before,
        "critical": sorted(critical_path(view)),
        "graph": graph(view.nodes, before),
        "attributes": _attributes(store, view),
        "earlier": _earlier(store, view.run),
    }


def _attributes(store: Store, view: RunView) -> dict[str, dict[str, str]]:
    """Return the attributes of the run's and each node's span, by span id; of the run's its resource's too."""
    wanted = {view.run.span_id, *(node.span_id for node in view.nodes)}
    columns = ["SpanId", "SpanAttributes", "ResourceAttributes"]
    since = view.run.start_ns - _SLACK
    rows = store.spans(trace=view.run.trace_id, since_ns=since, columns=columns).to_pydict()
    found: dict[str, dict[str, str]] = {}
    for span_id, own, resource in zip(*(rows[column] for column in columns), strict=True):
        if span_id in wanted:
            both = [*(resource or ()), *(own or ())] if span_id == view.run.span_id else own or ()
            found[span_id] = {key: _cut(value) for key, value in both}
    return found


def _earlier(store: Store, run: RunSummary) -> dict[str, Any]:
    """Return the runs before this one, the oldest first, and of each node its mean duration in each of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    begun = pa.scalar(run.start_ns, pa.timestamp("ns", "UTC"))
    runs = store.runs(pipeline=run.pipeline)
    runs = runs.filter(pc.and_(pc.less(runs["start"], begun), pc.is_valid(runs["duration_s"])))[:EARLIER][::-1]
    ids = runs["run_id"].to_pylist()
    if not ids:
        return {"runs": [], "nodes": {}}
    starts = runs["start"].cast("int64").to_pylist()
    told = zip(ids, runs["outcome"].to_pylist(), starts, runs["duration_s"].to_pylist(), strict=True)
    executions = store.executions(pipeline=run.pipeline, runs=ids, since_ns=min(starts) - _SLACK)
    return {"runs": list(told), "nodes": _means(executions, {each: place for place, each in enumerate(ids)})}


def _means(executions: pa.Table, place: Mapping[str, int]) -> dict[str, list[float | None]]:
    import pyarrow.compute as pc

    means = executions.group_by(["node", "run_id"]).aggregate([("duration_s", "mean")])
    seconds = pc.round(means["duration_s_mean"], 6)
    found: dict[str, list[float | None]] = {}
    columns = (column.to_pylist() for column in (means["node"], means["run_id"], seconds))
    for name, run_id, each in zip(*columns, strict=True):
        found.setdefault(name, [None] * len(place))[place[run_id]] = each
    return found


def _lines(store: Store, view: RunView) -> tuple[list[dict[str, Any]], bool]:
    """Return the log lines of the run and of those inside it, by time, and whether there are more."""
    runs = {view.run.run_id, *(node.run_id for node in view.nodes if node.run_id)}
    whose = {"trace": view.run.trace_id} if len(runs) > 1 else {"run": view.run.run_id}
    asked: dict[str, Any] = {**whose, "since_ns": view.run.start_ns - _SLACK}
    every = list(store.records(**asked, limit=LINES + 1))
    if more := len(every) > LINES:
        every += store.records(**asked, level="warning", limit=LINES)
    once = {orjson.dumps(line): line for line in every if line.get("run_id") in runs}
    return sorted(map(_line, once.values()), key=lambda line: str(line["t"])), more


def _line(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is shown of a log line: time, level, event, message, node, span, and the fields there are beside."""
    known = {"t": "timestamp", "l": "level", "e": "event_type", "m": "message", "n": "node_name", "s": "span_id"}
    found: dict[str, Any] = {short: _cut(str(line.get(key, ""))) for short, key in known.items()}
    rest = line.keys() - known.values() - _ELSEWHERE - (_MEASURED if line.get("event_type") != LOG else set())
    found["f"] = {key: _cut(_text(line[key])) for key in line if key in rest}
    return found


def _best(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return so many lines, in their order: warnings and errors first, then the first lines of each node."""
    seen: Counter[str] = Counter()
    ranked = []
    for place, line in enumerate(lines):
        seen[line["s"]] += 1
        ranked.append((line["l"] in ("debug", "info"), seen[line["s"]], place))
    return [lines[place] for place in sorted(place for *_, place in sorted(ranked)[:count])]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


# --- the file --------------------------------------------------------------------------------------------------------


def _page(run: RunSummary, data: Mapping[str, Any]) -> bytes:
    """Return the document: its scripts and styles are allowed by their hashes, nothing else is."""
    packed = gzip.compress(orjson.dumps(data, default=lambda record: record._asdict()), 6, mtime=0)
    style, script = _joined("uPlot.min.css", "report.css"), _script()
    parts = {
        "title": html.escape(f"{run.pipeline}: {run.outcome}"),
        "style": style,
        "script": script,
        "policy": f"default-src 'none'; base-uri 'none'; form-action 'none'; {_allow('style', style)}; "
        + _allow("script", script),
        "data": base64.b64encode(packed).decode(),  # of which no character could end the element that it is in
    }
    return re.sub(r"\{\{(\w+)}}", lambda match: parts[match[1]], _joined("report.html")).encode("utf-8", "replace")


def _script() -> str:
    notices = _joined("dagre.LICENSE.txt", "uPlot.LICENSE.txt")
    code = _joined("dagre.min.js", "uPlot.iife.min.js", "report.js")
    return f"/*! with dagre and uPlot:\n{notices}*/\n{re.sub('(?m)^//# sourceMappingURL=.*$', '', code)}"


def _joined(*names: str) -> str:
    folder = files("otel_odibi.report") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _allow(kind: str, text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"{kind}-src 'sha256-{digest}'"
