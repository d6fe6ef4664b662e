"""What happened, as immutable records. One fact, many listeners: log line, metrics, hooks.

Named tuples rather than frozen dataclasses: as immutable, without a `__dict__`, and four times cheaper to make,
which counts because every node makes two.
All times are Unix time in nanoseconds; identifiers are the integers of the OpenTelemetry API.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from otel_odibi.names import Instrument, Outcome

MIB: Final = 1_048_576
Labels = tuple[tuple[str, str], ...]


class Failure(NamedTuple):
    """An exception, made safe to write: secrets redacted, long texts cut."""

    type: str
    message: str
    stacktrace: str


class Edge(NamedTuple):
    """A producer of one of a node's inputs: its node name, and its span where that is known (0 where it is not)."""

    node: str
    trace_id: int
    span_id: int


class RunStarted(NamedTuple):
    """A run of a pipeline began."""

    pipeline: str
    run_id: str
    trace_id: int
    span_id: int
    parent_span_id: int
    trace_flags: int
    time_unix_nano: int
    metadata: Mapping[str, Any] | None = None


class RunFinished(NamedTuple):
    """A run of a pipeline ended. `success_count` and `failed_count` count the node executions inside it."""

    start: RunStarted
    time_unix_nano: int
    duration_ns: int
    outcome: Outcome
    success_count: int
    failed_count: int
    failure: Failure | None = None
    metadata: Mapping[str, Any] | None = None


class NodeStarted(NamedTuple):
    """A node is about to run."""

    pipeline: str
    run_id: str
    node: str
    layer: str
    engine: str
    trace_id: int
    span_id: int
    parent_span_id: int
    trace_flags: int
    time_unix_nano: int
    rows_in: int | None = None
    edges: tuple[Edge, ...] = ()


class NodeFinished(NamedTuple):
    """A node ended. Its span is still current while this is handed to the listeners."""

    start: NodeStarted
    time_unix_nano: int
    duration_ns: int
    outcome: Outcome
    attempt: int = 1
    rows_in: int | None = None
    rows_out: int | None = None
    bytes_out: int | None = None
    columns: tuple[str, ...] | None = None
    cache_hit: bool | None = None
    rss: int | None = None
    failure: Failure | None = None
    edges: tuple[Edge, ...] = ()
    metadata: Mapping[str, Any] | None = None


class CacheLookup(NamedTuple):
    """A node looked in its cache."""

    start: NodeStarted
    hit: bool
    key: str | None
    time_unix_nano: int


class NodeRetried(NamedTuple):
    """An attempt after the first begins; `failure` is why the one before it failed, where that is known."""

    start: NodeStarted
    attempt: int
    time_unix_nano: int
    failure: Failure | None = None


class MetricType(str, enum.Enum):
    """What a value of a `MetricsManager` measures. A member equals its value, the name in exports."""

    NODE_DURATION = "node_duration_ms"
    THROUGHPUT = "throughput_rows_per_sec"
    CACHE_HIT = "cache_hit"
    CACHE_MISS = "cache_miss"
    ERROR_COUNT = "error_count"
    RETRY_COUNT = "retry_count"
    CHECKPOINT_SIZE = "checkpoint_size_bytes"
    DATA_SIZE = "data_size_bytes"
    WORKER_UTILIZATION = "worker_utilization_pct"
    MEMORY_USAGE = "memory_usage_mb"
    SUCCESS_COUNT = "success_count"
    FAILURE_COUNT = "failure_count"


class Execution(NamedTuple):
    """An execution of a node, recorded by hand. None where not known; `success` too where it was cancelled."""

    time_unix_nano: int
    node: str
    engine: str
    duration_ms: float | None
    success: bool | None
    rows: int | None
    cached: bool | None
    rss: int | None = None


class Measure(NamedTuple):
    """A value of one type, recorded by hand: what is `counted` adds to a total, else it is the value there is now."""

    time_unix_nano: int
    kind: MetricType
    node: str
    labels: Labels
    value: float
    counted: bool


Fact = RunStarted | RunFinished | NodeStarted | NodeFinished | CacheLookup | NodeRetried | Execution | Measure


class Exemplar(NamedTuple):
    """One measurement kept beside an aggregate, with the span it was made in."""

    value: float
    time_unix_nano: int
    trace_id: int
    span_id: int


class Number(NamedTuple):
    """A point of a counter, up-down counter or gauge: the total so far, or the last value."""

    attributes: Mapping[str, str | bool]
    value: float


class Distribution(NamedTuple):
    """A point of a histogram, cumulative since the start: `counts` has one bucket more than there are bounds."""

    attributes: Mapping[str, str | bool]
    counts: tuple[int, ...]
    sum: float
    count: int  # type: ignore[assignment]  # the field hides tuple.count, which nobody calls
    min: float
    max: float
    exemplars: tuple[Exemplar, ...] = ()


class Family(NamedTuple):
    """All points of one instrument at one moment."""

    instrument: Instrument
    points: tuple[Number, ...] | tuple[Distribution, ...]
