"""The same metrics through a host application's own meter, by the OpenTelemetry API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opentelemetry.metrics import Meter, Observation

from otel_odibi import names
from otel_odibi.facts import (
    CacheLookup,
    Execution,
    Measure,
    NodeFinished,
    NodeRetried,
    NodeStarted,
    RunFinished,
    RunStarted,
)
from otel_odibi.metrics import MEASURED, OUTCOMES, TIMELESS, Aggregates, known, started_by_hand
from otel_odibi.names import DURATION_BOUNDS, SUCCESS, Instrument


class ApiInstruments:
    """Listens to facts and records them through a meter of the OpenTelemetry API: a host application's own.

    The same instruments, attributes and bucket bounds as `Aggregates`; the host's SDK limits and exports them.
    """

    def __init__(self, meter: Meter, own: Aggregates) -> None:
        make = {
            "counter": meter.create_counter,
            "updowncounter": meter.create_up_down_counter,
            "gauge": meter.create_gauge,
        }
        self._of: dict[Instrument, Any] = {}
        for instrument in names.INSTRUMENTS:
            text = {"name": instrument.name, "unit": instrument.unit, "description": instrument.description}
            if instrument is names.PROCESS_UPTIME:
                meter.create_observable_gauge(callbacks=[lambda options: [Observation(own.uptime())]], **text)
            elif instrument is names.TELEMETRY_DROPPED:
                meter.create_observable_counter(callbacks=[lambda options: _losses(own)], **text)
            elif instrument.kind == "histogram":
                bounds = list(DURATION_BOUNDS)
                self._of[instrument] = meter.create_histogram(explicit_bucket_boundaries_advisory=bounds, **text)
            else:
                self._of[instrument] = make[instrument.kind](**text)

    def listeners(self) -> dict[type, Callable[[Any], None]]:
        """Return which of the methods wants which fact."""
        return {
            NodeStarted: lambda fact: self._of[names.NODE_ACTIVE].add(1, _node_key(fact)),
            NodeFinished: self.node_finished,
            NodeRetried: lambda fact: self._of[names.NODE_RETRIES].add(1, _node_key(fact.start)),
            CacheLookup: self.cache_looked_up,
            RunStarted: lambda fact: self._of[names.PIPELINE_ACTIVE].add(1, {"pipeline": fact.pipeline}),
            RunFinished: self.run_finished,
            Execution: self.executed,
            Measure: self.measured,
        }

    def node_finished(self, fact: NodeFinished) -> None:
        """Record a finished execution: duration, rows, throughput, memory, edges."""
        start, of = fact.start, self._of
        key = _node_key(start)
        attributes = {**key, **known(layer=start.layer, engine=start.engine)}
        of[names.NODE_ACTIVE].add(-1, key)
        if fact.outcome not in TIMELESS:
            seconds = fact.duration_ns / 1e9
            of[names.NODE_DURATION].record(seconds, {**attributes, "outcome": fact.outcome})
            if fact.rows_out is not None and seconds > 0:
                of[names.NODE_THROUGHPUT].set(fact.rows_out / seconds, attributes)
        for direction, rows in (("in", fact.rows_in), ("out", fact.rows_out)):
            if rows is not None:
                of[names.NODE_ROWS].add(rows, {**attributes, "direction": direction})
        if fact.rss is not None:
            of[names.NODE_MEMORY].set(fact.rss, key)
        for edge in fact.edges:
            if edge.node != start.node:
                edge_key = known(pipeline=start.pipeline, source=edge.node, target=start.node)
                of[names.NODE_EDGE].set(1, edge_key)

    def cache_looked_up(self, fact: CacheLookup) -> None:
        """Record a cache hit or miss."""
        result = "hit" if fact.hit else "miss"
        self._of[names.NODE_CACHE_LOOKUPS].add(1, {**_node_key(fact.start), "result": result})

    def run_finished(self, fact: RunFinished) -> None:
        """Record a finished run and, where it succeeded, when."""
        key = {"pipeline": fact.start.pipeline}
        self._of[names.PIPELINE_ACTIVE].add(-1, key)
        if fact.outcome not in TIMELESS:
            self._of[names.PIPELINE_DURATION].record(fact.duration_ns / 1e9, {**key, "outcome": fact.outcome})
        if fact.outcome == SUCCESS:
            self._of[names.PIPELINE_LAST_SUCCESS].set(fact.time_unix_nano / 1e9, key)

    def executed(self, fact: Execution) -> None:
        """Record an execution as if it were a decorated node's."""
        start, (time, _, _, ms, success, rows, cached, rss) = started_by_hand(fact), fact
        listeners = self.listeners()
        listeners[NodeStarted](start)
        outcome: Any = names.SKIPPED if ms is None else OUTCOMES[success]  # which records no duration
        listeners[NodeFinished](NodeFinished(start, time, round((ms or 0) * 1e6), outcome, rows_out=rows, rss=rss))
        if cached is not None:
            listeners[CacheLookup](CacheLookup(start, bool(cached), None, time))

    def measured(self, fact: Measure) -> None:
        """Record a value with the instrument that takes its type, if there is one."""
        if fact.kind not in MEASURED:
            return
        instrument, factor, _, attributes = MEASURED[fact.kind]
        start = started_by_hand(fact)
        known = {"pipeline": start.pipeline, "node": start.node, "engine": start.engine, **attributes}
        attributes = {key: value for key, value in known.items() if value and key in (*instrument.attributes, "result")}
        verb = {"counter": "add", "histogram": "record", "gauge": "set"}[instrument.kind]
        getattr(self._of[instrument], verb)(fact.value * factor, attributes)


def _losses(own: Aggregates) -> list[Observation]:
    lost = own.dropped().items()
    return [Observation(count, {"signal": signal, "reason": reason}) for (signal, reason), count in lost]


def _node_key(fact: NodeStarted) -> dict[str, str | bool]:
    return known(pipeline=fact.pipeline, node=fact.node)
