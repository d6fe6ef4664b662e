"""Endpoints that fail in every way, processes that are killed: nothing is lost, and hardly anything sent twice."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from otlp_endpoint import CUT, CUT_ANSWER, HANG, OK, PROTOCOLS, endpoint, partial, status
from test_spool import Spooled, clean_environment, span, until

from otel_odibi import spool as spool_module
from otel_odibi.spool import replay

pytestmark = pytest.mark.faults
__all__ = ["clean_environment"]
SCALE = float(os.environ.get("ODIBI_TEST_SCALE", "0.1"))
BATCH = 100


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_endpoint_that_fails_in_every_way_loses_nothing(protocol, tmp_path):
    """100,000 spans; twice come only those whose acknowledgement was cut, and little waits in memory."""
    throttled, down = (429, 503) if protocol != "grpc" else ("RESOURCE_EXHAUSTED", "UNAVAILABLE")
    moods = [OK, None, HANG, status(throttled, 0.2), status(down), partial(3), CUT, CUT_ANSWER] * 2
    number, held = 0, 0
    with endpoint(protocol) as away, Spooled(away, tmp_path) as s:
        for mood in moods:
            away.stop()
            away.default = mood or OK
            if mood is not None:
                away.start()
            troubles, attempts = len(s.troubles), away.attempts
            for _ in range(max(1, int(100_000 * SCALE) // BATCH // len(moods))):
                s.exporter.export([span(number + i + 1) for i in range(BATCH)])
                number += BATCH
                held = max(held, s.spool.channels[0]._held)
            s.spool.flush(0.1)
            until(lambda: len(s.troubles) > troubles or away.attempts > attempts or s.spool.flush(0.1))  # noqa: B023
        away.stop()
        away.default = OK
        away.start()
        until(lambda: s.spool.flush(30))
        times = Counter(away.ids())
        assert s.files() == []
    assert set(s.dropped) <= {("spans", "rejected")}
    assert len(times) + sum(s.dropped.values()) == number
    assert set(times) <= set(range(1, number + 1))
    assert {id_ for id_, count in times.items() if count > 1} <= away.unsure
    assert held <= spool_module._IN_MEMORY + 2**20


CHILD = """
import struct, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from test_spool import span
from otel_odibi.exporters.otlp import OtlpSpanExporter, Sender
from otel_odibi.settings import Settings
from otel_odibi.spool import Spool

url, directory, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
journal = open(directory / "acked", "ab", buffering=0)
acked = lambda ids: journal.write(b"".join(struct.pack(">Q", id_) for id_ in ids))
spool = Spool(directory, lambda: f"flights.1-{first:08x}", acked=acked)
sender = Sender(Settings.load({"otlp_endpoint": url, "otlp_protocol": "http/protobuf"}), "traces")
exporter = OtlpSpanExporter(spool.outlet(sender))
print("up", flush=True)
for start in range(first, first + 100_000_000, 10):
    exporter.export([span(number) for number in range(start, start + 10)])
    if start % 500 == 0:
        spool.flush(0.05)
"""


def test_killed_processes_lose_nothing_that_was_said_to_be_safe(tmp_path, monkeypatch):
    """30 of them, at random moments, the endpoint coming and going; at most one batch a kill is sent twice."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    chance = random.Random(5)
    here = str(Path(__file__).parent)
    kills = max(3, int(30 * SCALE))
    with endpoint("http/protobuf") as away:
        for kill in range(kills):
            first = 1_000_000_000 * (kill + 1)
            command = [sys.executable, "-c", CHILD, away.url, str(tmp_path), str(first), here]
            child = subprocess.Popen(command, stdout=subprocess.PIPE)
            child.stdout.readline()
            deadline = time.monotonic() + chance.uniform(0.05, 0.5)
            while time.monotonic() < deadline:
                away.default = chance.choice([OK, status(503), status(429, 0.01), CUT])
                time.sleep(0.02)
            child.kill()
            child.wait()
            child.stdout.close()
        away.default = OK
        until(lambda: not replay(tmp_path, away.url)[2])
        times = Counter(away.ids())
    safe = {id_ for (id_,) in struct.iter_unpack(">Q", (tmp_path / "acked").read_bytes())}
    assert len(safe) > kills
    assert safe <= set(times)
    assert sum(times.values()) - len(times) <= 10 * kills
    assert list((tmp_path / "spool").iterdir()) == []
