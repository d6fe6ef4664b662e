"""Every name this package puts on the wire, with its unit: spans, attributes, metrics, events.

Code, dashboards and documentation are built from this one registry. Attribute names follow the OpenTelemetry
naming rules (https://opentelemetry.io/docs/specs/semconv/general/naming/); Prometheus names follow the
OpenTelemetry-to-Prometheus compatibility specification.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

SCOPE: Final = "otel_odibi"
"""Instrumentation scope of every span and metric of this package."""

# --- spans -----------------------------------------------------------------------------------------------------------

PIPELINE_SPAN: Final = "pipeline {name}"
NODE_SPAN: Final = "node {name}"
ATTEMPT_SPAN: Final = "attempt {number}"

# --- span attributes -------------------------------------------------------------------------------------------------

PIPELINE_NAME: Final = "odibi.pipeline.name"
PIPELINE_RUN_ID: Final = "odibi.pipeline.run.id"
PIPELINE_OUTCOME: Final = "odibi.pipeline.outcome"
NODE_NAME: Final = "odibi.node.name"
NODE_LAYER: Final = "odibi.node.layer"
NODE_ENGINE: Final = "odibi.node.engine"
NODE_OUTCOME: Final = "odibi.node.outcome"
NODE_ATTEMPT: Final = "odibi.node.attempt"
NODE_ROWS_IN: Final = "odibi.node.rows.in"
NODE_ROWS_OUT: Final = "odibi.node.rows.out"
NODE_BYTES_OUT: Final = "odibi.node.bytes.out"
NODE_COLUMNS: Final = "odibi.node.columns"
NODE_CACHE_HIT: Final = "odibi.node.cache.hit"
NODE_MEMORY_RSS: Final = "odibi.node.memory.rss"
NODE_DEPENDS_ON: Final = "odibi.node.depends_on"
NODE_SKIP_REASON: Final = "odibi.node.skip.reason"

ERROR_TYPE: Final = "error.type"
EXCEPTION_TYPE: Final = "exception.type"
EXCEPTION_MESSAGE: Final = "exception.message"
EXCEPTION_STACKTRACE: Final = "exception.stacktrace"
CODE_FUNCTION_NAME: Final = "code.function.name"
THREAD_ID: Final = "thread.id"
THREAD_NAME: Final = "thread.name"
SERVICE_NAME: Final = "service.name"
SERVICE_INSTANCE_ID: Final = "service.instance.id"
SERVICE_VERSION: Final = "service.version"
DEPLOYMENT_ENVIRONMENT_NAME: Final = "deployment.environment.name"

# --- outcomes --------------------------------------------------------------------------------------------------------

Outcome = Literal["success", "failure", "cancelled", "skipped", "lost"]
SUCCESS: Final = "success"
FAILURE: Final = "failure"
CANCELLED: Final = "cancelled"
SKIPPED: Final = "skipped"
LOST: Final = "lost"

# --- log event types and events --------------------------------------------------------------------------------------

NODE_START: Final = "node_start"
NODE_COMPLETE: Final = "node_complete"
NODE_FAILED: Final = "node_failed"
CACHE_HIT: Final = "cache_hit"
CACHE_MISS: Final = "cache_miss"
PIPELINE_START: Final = "pipeline_start"
PIPELINE_COMPLETE: Final = "pipeline_complete"
CHECKPOINT_CREATED: Final = "checkpoint_created"
ERROR: Final = "error"
LOG: Final = "log"
PIPELINE_FAILED: Final = "pipeline_failed"
NODE_RETRY: Final = "node_retry"

LOG_EVENT_TYPES: Final = (
    NODE_START, NODE_COMPLETE, NODE_FAILED, CACHE_HIT, CACHE_MISS,
    PIPELINE_START, PIPELINE_COMPLETE, CHECKPOINT_CREATED, ERROR, LOG,
)  # fmt: skip
EVENTS: Final = (
    PIPELINE_START, NODE_START, NODE_COMPLETE, NODE_FAILED, NODE_RETRY, CACHE_HIT, CACHE_MISS, PIPELINE_COMPLETE,
    PIPELINE_FAILED,
)  # fmt: skip
"""Events of the event bus that the core emits."""

# --- span events of the engines' integrations ------------------------------------------------------------------------

PHASE_TIMINGS: Final = "phase_timings"
STORY: Final = "story"
ALERT: Final = "alert"

# --- metrics ---------------------------------------------------------------------------------------------------------

Kind = Literal["counter", "updowncounter", "gauge", "histogram"]


class Instrument(NamedTuple):
    """One metric: OpenTelemetry name, kind and UCUM unit, the name Prometheus sees, its attribute keys, its meaning."""

    name: str
    kind: Kind
    unit: str
    prometheus: str
    attributes: tuple[str, ...]
    description: str


DURATION_BOUNDS: Final[tuple[float, ...]] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0, 43200.0,
)  # fmt: skip
"""Upper bucket bounds of the duration histograms, in seconds: from a millisecond to half a day."""

NODE_DURATION: Final = Instrument(
    "odibi.node.duration", "histogram", "s", "odibi_node_duration_seconds",
    ("pipeline", "node", "layer", "engine", "outcome"), "Time one execution of a node took.",
)  # fmt: skip
NODE_ROWS: Final = Instrument(
    "odibi.node.rows", "counter", "{row}", "odibi_node_rows_total",
    ("pipeline", "node", "layer", "engine", "direction"), "Rows that went into (in) and came out of (out) a node.",
)  # fmt: skip
NODE_THROUGHPUT: Final = Instrument(
    "odibi.node.throughput", "gauge", "{row}/s", "odibi_node_throughput_per_second",
    ("pipeline", "node", "layer", "engine"), "Rows out a second of a node's last execution.",
)  # fmt: skip
NODE_CACHE_LOOKUPS: Final = Instrument(
    "odibi.node.cache.lookups", "counter", "{lookup}", "odibi_node_cache_lookups_total",
    ("pipeline", "node", "result"), "Cache lookups a node declared, by result (hit, miss).",
)  # fmt: skip
NODE_RETRIES: Final = Instrument(
    "odibi.node.retries", "counter", "{retry}", "odibi_node_retries_total",
    ("pipeline", "node"), "Attempts after the first.",
)  # fmt: skip
NODE_MEMORY: Final = Instrument(
    "odibi.node.memory.rss", "gauge", "By", "odibi_node_memory_rss_bytes",
    ("pipeline", "node"), "Resident memory of the process when the node last finished.",
)  # fmt: skip
NODE_ACTIVE: Final = Instrument(
    "odibi.node.active", "updowncounter", "{node}", "odibi_node_active",
    ("pipeline", "node"), "Executions under way.",
)  # fmt: skip
NODE_EDGE: Final = Instrument(
    "odibi.node.edge", "gauge", "{edge}", "odibi_node_edge",
    ("pipeline", "source", "target"), "An edge of the DAG, seen at run time; always 1.",
)  # fmt: skip
PIPELINE_DURATION: Final = Instrument(
    "odibi.pipeline.duration", "histogram", "s", "odibi_pipeline_duration_seconds",
    ("pipeline", "outcome"), "Time one run of a pipeline took.",
)  # fmt: skip
PIPELINE_ACTIVE: Final = Instrument(
    "odibi.pipeline.active", "updowncounter", "{run}", "odibi_pipeline_active",
    ("pipeline",), "Runs under way.",
)  # fmt: skip
PIPELINE_LAST_SUCCESS: Final = Instrument(
    "odibi.pipeline.last_success.timestamp", "gauge", "s", "odibi_pipeline_last_success_timestamp_seconds",
    ("pipeline",), "Unix time at which a run of the pipeline last succeeded.",
)  # fmt: skip
PROCESS_UPTIME: Final = Instrument(
    "odibi.process.uptime", "gauge", "s", "odibi_process_uptime_seconds",
    (), "Time since telemetry was configured in this process.",
)  # fmt: skip
TELEMETRY_DROPPED: Final = Instrument(
    "odibi.telemetry.dropped", "counter", "{item}", "odibi_telemetry_dropped_total",
    ("signal", "reason"), "Telemetry that was lost, by signal and reason.",
)  # fmt: skip

INSTRUMENTS: Final[tuple[Instrument, ...]] = (
    NODE_DURATION, NODE_ROWS, NODE_THROUGHPUT, NODE_CACHE_LOOKUPS, NODE_RETRIES, NODE_MEMORY, NODE_ACTIVE, NODE_EDGE,
    PIPELINE_DURATION, PIPELINE_ACTIVE, PIPELINE_LAST_SUCCESS, PROCESS_UPTIME, TELEMETRY_DROPPED,
)  # fmt: skip

OVERFLOW_ATTRIBUTE: Final = "otel.metric.overflow"
"""Attribute of the series that takes what the cardinality limit turned away (metrics SDK spec, Cardinality limits)."""
