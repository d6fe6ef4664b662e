"""Jaeger behind the collector: a run's trace, fetched from its query API by id, is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from programs import built, fetch, free_ports, otelcol, running, wait_for
from test_collector_stack import demo, spans_of

pytestmark = pytest.mark.stack

JAEGER = """
extensions:
  jaeger_storage: {backends: {memory: {memory: {max_traces: 10000}}}}
  jaeger_query:
    storage: {traces: memory}
    http: {endpoint: "127.0.0.1:QUERY"}
    grpc: {endpoint: "127.0.0.1:QUERY_GRPC"}
receivers: {otlp: {protocols: {http: {endpoint: "127.0.0.1:OTLP"}}}}
exporters: {jaeger_storage_exporter: {trace_storage: memory}}
service:
  extensions: [jaeger_storage, jaeger_query]
  telemetry: {metrics: {level: none}}
  pipelines: {traces: {receivers: [otlp], exporters: [jaeger_storage_exporter]}}
"""


@contextmanager
def jaeger(folder: Path) -> Iterator[tuple[str, str]]:
    """Run Jaeger, traces in memory; yields where it takes OTLP over HTTP and where its query API is."""
    otlp, query, query_grpc = map(str, free_ports(3))
    config = JAEGER.replace("QUERY_GRPC", query_grpc).replace("QUERY", query).replace("OTLP", otlp)
    (folder / "jaeger.yaml").write_text(config, encoding="utf-8")
    api = f"http://127.0.0.1:{query}/api"
    command = [built("jaeger"), "--config", folder / "jaeger.yaml"]
    with running(command, folder / "jaeger.log", {}, lambda: fetch(f"{api}/services")):
        yield f"http://127.0.0.1:{otlp}", api


def test_jaeger_gives_the_whole_trace_of_a_run(tmp_path):
    """Every span of the demo, under its parent, with its links, attributes and duration."""
    with jaeger(tmp_path) as (otlp, api), otelcol("local.yaml", tmp_path, TEMPO_ENDPOINT=otlp) as collector:
        demo(tmp_path, collector.otlp("grpc"))
        want = spans_of(tmp_path)
        (trace_id,) = {span[0] for span in want}

        def fetched() -> list[dict]:
            (trace,) = json.loads(fetch(f"{api}/traces/{trace_id}"))["data"]
            return trace["spans"]

        wait_for(lambda: len(fetched()) >= len(want), "the trace in Jaeger")
        got = {span["spanID"]: span for span in fetched()}
    assert got.keys() == {span[1] for span in want}
    for _, span_id, parent, name, nanoseconds, links, attributes, _ in want:
        span = got[span_id]
        references = {(each["refType"], each["spanID"]) for each in span["references"]}
        child_of = {("CHILD_OF", parent)} if parent else set()
        assert references == child_of | {("FOLLOWS_FROM", link[1]) for link in links}
        assert span["operationName"] == name
        assert abs(span["duration"] * 1000 - nanoseconds) < 1000
        assert {tag["key"] for tag in span["tags"]} >= set(attributes)
