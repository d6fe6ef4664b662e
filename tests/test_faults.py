"""What a long life, a full disk and hostile data do to a whole `Telemetry`: real processes, real files.

The counts are those of `ODIBI_TEST_SCALE=1`; a tenth by default.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from otlp_endpoint import HANG, OK, endpoint
from prometheus_client.parser import text_string_to_metric_families
from secret_samples import SECRETS, leaked

import otel_odibi as oo
from otel_odibi import store
from otel_odibi.errors import StoreError
from otel_odibi.exporters.jsonl import files, read_lines
from otel_odibi.exporters.lines import newest
from otel_odibi.recovery import recover
from otel_odibi.spool import keep, replay

pytestmark = pytest.mark.faults
SCALE = float(os.environ.get("ODIBI_TEST_SCALE", "0.1"))
EVERYTHING = {"span_formats": "parquet,json", "metric_formats": "parquet,textfile,json", "set_global": False}


def worker(code: str, *arguments: str, within: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a program in a process of its own; return the JSON object that it prints last."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the default one keeps 20 MB more or less of what it has freed
    command = [*within, sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def records(directory: Path, suffix: str = ".jsonl") -> Iterator[dict[str, Any]]:
    for path in files(directory, suffix=suffix):
        yield from map(orjson.loads, read_lines(path))


# --- a long life -----------------------------------------------------------------------------------------------------

SOAK = """if True:
    import ctypes, gc, json, os, sys, threading
    import otel_odibi as oo
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)  # or what is free, and kept, would count
    directory, count = sys.argv[1], int(sys.argv[2])
    telemetry = oo.configure(
        service_name="soak", directory=directory, log_max_bytes=20 * 2**20, log_retention_bytes=60 * 2**20,
    )
    seen = []

    @oo.node(layer="transform", engine="pandas")
    def work(rows):
        oo.current_node().cache(hit=False)
        return rows

    def measure():
        telemetry.flush(60)
        gc.collect()
        trim(0)
        with open("/proc/self/statm") as file:
            rss = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        seen.append([rss, len(os.listdir("/proc/self/fd")), threading.active_count()])

    for part in range(20):
        for _ in range(count // 20 // 1000):
            with oo.pipeline("soak"):
                for number in range(1000):
                    work([number])
        measure()
    print(json.dumps({"seen": seen, "dropped": len(telemetry.aggregates.dropped())}))
"""


def test_a_soak_leaves_memory_descriptors_and_threads_as_they_were(tmp_path: Path) -> None:
    """2,000,000 nodes with everything on: within 5 MB after a warm-up of a quarter, first third against last third."""
    found = worker(SOAK, str(tmp_path), str(round(2_000_000 * SCALE)))
    rss, descriptors, threads = zip(*found["seen"][5:], strict=True)
    assert abs(mean(rss[-5:]) - mean(rss[:5])) < 5e6, [value // 1000 for value in rss]
    print(f"resident: {mean(rss[:5]) / 1e6:.1f} MB, then {mean(rss[-5:]) / 1e6:.1f}; {min(rss):,} to {max(rss):,}")
    assert max(descriptors) - min(descriptors) <= 2, descriptors  # a segment being compressed
    assert max(threads) - min(threads) <= 1, threads
    assert found["dropped"] == 0


# --- a full disk -----------------------------------------------------------------------------------------------------

FULL = """if True:
    import contextlib, json, os, sys, time
    import otel_odibi as oo
    directory = sys.argv[1]
    telemetry = oo.configure(
        service_name="full", directory=directory, span_formats="parquet,json", metric_formats="parquet,textfile,json",
        parquet_seconds=0.1, exit_timeout=20,
    )
    results = []

    def work(count):
        for number in range(count):
            with oo.node("work"):
                results.append(number)

    work(200)
    telemetry.flush()
    ballast = os.open(directory + "/ballast", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for size in (65536, 4096, 64, 1):
        with contextlib.suppress(OSError):
            while os.write(ballast, b"x" * size):
                pass
    os.close(ballast)
    work(300)
    telemetry.flush()
    os.unlink(directory + "/ballast")
    time.sleep(1.1)  # a file that could not be opened is tried again once a second
    work(200)
    telemetry.shutdown()
    dropped = {}
    for (signal, _), count in telemetry.aggregates.dropped().items():
        dropped[signal] = dropped.get(signal, 0) + count
    import pyarrow.parquet as pq
    from pathlib import Path
    from otel_odibi.exporters.jsonl import files, read_lines
    lines = [json.loads(line) for path in files(Path(directory) / "logs") for line in read_lines(path)]
    requests = [json.loads(line) for path in files(Path(directory) / "otlp", suffix=".traces.jsonl")
                for line in read_lines(path)]
    otlp = [s for r in requests for x in r["resourceSpans"] for y in x["scopeSpans"] for s in y["spans"]]
    print(json.dumps({"results": len(results), "dropped": dropped, "lines": len(lines), "otlp": len(otlp),
                      "parquet": pq.read_table(directory + "/spans").num_rows, "last": lines[-1]["event_type"],
                      "prom": os.path.getsize(directory + "/prometheus/full.prom")}))
"""


def test_a_full_disk_costs_what_is_counted_and_no_more(tmp_path: Path) -> None:
    """A tmpfs filled to the last byte under way, then freed: the nodes run, every loss is counted, service resumes."""
    mount = f"mount -t tmpfs -o size=3m tmpfs {tmp_path}"
    own_root = ("--map-root-user",) if os.geteuid() else ()
    found = worker(
        FULL, str(tmp_path), within=("unshare", "--mount", *own_root, "sh", "-c", f'{mount} && exec "$@"', "sh")
    )
    assert found["results"] == 700
    assert found["dropped"]["logs"] > 0
    assert found["lines"] + found["dropped"]["logs"] == 1400
    # Parquet keeps its spans in memory meanwhile; the lines of OTLP/JSON are lost, and counted.
    assert found["parquet"] == 700
    assert found["otlp"] + found["dropped"]["spans"] == 700
    assert found["last"] == "node_complete"
    assert found["prom"] > 0


# --- the end of a process --------------------------------------------------------------------------------------------

ENDING = """if True:
    import os, signal, sys, threading, time
    import otel_odibi as oo
    oo.configure(service_name="ending", directory=sys.argv[1])
    for _ in range(20):
        with oo.pipeline("p"), oo.node("n"):
            pass
    print(time.time(), flush=True)
"""
ENDS = {
    "return": "",
    "exception": "raise ValueError('the program fails')",
    "sys.exit": "sys.exit(3)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
    "SIGINT": "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
    "os._exit": "os._exit(0)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "daemon threads": "threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "handler of its own, as servers have": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    ),
}


@pytest.mark.parametrize("away", ["closed", "hangs"])
@pytest.mark.parametrize("end", ENDS)
def test_however_a_process_ends_with_the_collector_away_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, away: str
) -> None:
    """In Parquet at once, or after a recovery where it had no time to end; at the endpoint when that is back."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with endpoint("http/protobuf") as collector:
        collector.default = HANG
        if away == "closed":
            collector.stop()
        environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        code = ENDING + "    " + ENDS[end]
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        took = time.time() - float(done.stdout.split()[-1])
        killed = end in ("os._exit", "SIGKILL")
        recovered = recover(tmp_path, spool=functools.partial(keep, tmp_path, "recovered.0-00000000"))
        assert not recovered.files
        assert bool(recovered.spans) == killed
        assert pq.read_table(tmp_path / "spans").num_rows == 40
        warnings = [line for line in done.stderr.splitlines() if "OTLP endpoint of" in line]
        assert len(warnings) <= 2, "one a signal"
        assert ("Traceback" in done.stderr) == (end in ("exception", "SIGINT"))
        collector.stop()
        collector.default = OK
        collector.start()
        delivered, lost, left = replay(tmp_path, collector.url)
        assert (delivered >= 40, lost, left) == (True, 0, 0)
        assert len(collector.ids()) == len(set(collector.ids())) == 40
    assert not list(tmp_path.glob("spool/*")) + list(tmp_path.glob("state/*"))
    print(f"{end}, collector {away}: ended after {took:.2f} s")


KILLED = """if True:
    import os, random, sys, threading, time
    import otel_odibi as oo
    oo.configure(service_name="killed", directory=sys.argv[1], span_interval=0.02, parquet_seconds=0.1)

    def work():
        while True:
            with oo.node("step") as node:
                time.sleep(random.choice((0, 0, 0.001, 0.01)))
            os.write(1, b"%016x\\n" % node.span.get_span_context().span_id)

    with oo.pipeline("daily"):
        for _ in range(4):
            threading.Thread(target=oo.carry(work)).start()
"""


def test_whenever_a_process_is_killed_its_endpoint_has_every_node_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 kills while four threads finish nodes: in Parquet once, at the endpoint at least once."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    chance, returned, kills = random.Random(5), set[int](), max(10, round(300 * SCALE))
    with endpoint("http/protobuf") as collector:
        environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        for _ in range(kills):
            command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
            with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
                returned.add(int(process.stdout.readline(), 16))
                time.sleep(chance.uniform(0, 0.4))
                process.kill()
                returned |= {int(line, 16) for line in process.stdout if line.endswith(b"\n")}
            assert not recover(tmp_path, spool=functools.partial(keep, tmp_path, "recovered.0-00000000")).files
            assert replay(tmp_path, collector.url)[1:] == (0, 0)
        delivered = Counter(collector.ids())
    stored = [int(span_id, 16) for span_id in pq.read_table(tmp_path / "spans")["SpanId"].to_pylist()]
    assert len(stored) == len(set(stored))
    assert returned <= set(stored) == delivered.keys()
    assert delivered.total() - len(delivered) <= kills * 1_000, "a batch a kill"
    assert not list(tmp_path.glob("spool/*")) + list(tmp_path.glob("state/*"))
    print(f"{kills} kills: {len(stored):,} spans, {delivered.total() - len(delivered):,} delivered twice")


# --- hostile data ----------------------------------------------------------------------------------------------------


def test_secrets_are_in_no_file(tmp_path: Path) -> None:
    """Every shape of secret, in attributes, names, log lines, exceptions and cache keys: none is found in any file."""
    directory = tmp_path / "t"
    away = {"otlp_endpoint": "http://127.0.0.1:1", "otlp_protocol": "http/protobuf", "otlp_logs": True}
    with oo.configure(service_name="s", directory=directory, **away, **EVERYTHING) as telemetry:
        for text, _ in SECRETS.values():
            with contextlib.suppress(ValueError), oo.pipeline("p") as run, oo.node("n") as node:
                node.set(note=text)
                run.set(note=text)
                node.cache(hit=False, key=text)
                node.event("note", text=text)
                oo.get_logger().warning(text, note=text, nested={"list": [text]})
                telemetry.logger.log_node_failed("n", text, metadata={"note": text})
                raise ValueError(text)
    assert len(SECRETS) >= 60
    assert {path.suffixes[-2] for path in directory.glob("spool/*")} == {".traces", ".metrics", ".logs"}
    tables = [pq.read_table(path).to_pylist() for path in directory.rglob("*.parquet")]
    plain = [path.read_bytes().decode("utf-8", "replace") for path in directory.rglob("*.*") if path.is_file()]
    everything = "\n".join([json.dumps(tables, default=str), *plain])
    assert {shape for shape, (_, secrets) in SECRETS.items() if leaked(secrets, everything)} == set()


texts = st.text(max_size=40) | st.text(st.characters(codec=None), max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=20) | st.dates() | st.uuids(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4) | st.sets(texts, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[oo.Telemetry]:
    directory = tmp_path_factory.mktemp("fuzzed")
    # The next test's configure() shuts it down, which takes its time with thousands of series on a busy machine.
    telemetry = oo.configure(service_name="fuzz", directory=directory, span_interval=0.2, exit_timeout=60, **EVERYTHING)
    yield telemetry
    telemetry.shutdown()
    lines = list(records(directory / "logs"))
    spans = [s for line in records(directory / "otlp", ".traces.jsonl") for s in spans_of(line)]
    stored = pq.read_table(directory / "spans")
    assert stored.num_rows == len(spans) == len({span["spanId"] for span in spans})
    assert sum(line["event_type"] in ("node_complete", "node_failed") for line in lines) > 0
    prom = (directory / "prometheus" / "fuzz.prom").read_bytes().decode()  # a label may hold a carriage return
    assert list(text_string_to_metric_families(prom))
    dropped = telemetry.aggregates.dropped()
    assert not {key: count for key, count in dropped.items() if key[0] in ("internal", "logs", "spans")}


def spans_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    return [span for r in request["resourceSpans"] for scope in r["scopeSpans"] for span in scope["spans"]]


@settings(max_examples=max(100, round(150_000 * SCALE)))
@given(name=texts, key=texts, value=values, message=values, fails=st.booleans())
def test_no_name_attribute_or_value_harms(
    fuzzed: oo.Telemetry, name: str, key: str, value: Any, message: Any, fails: bool
) -> None:
    """Whatever it is, nothing is raised, and what is written is valid: JSON, Parquet and Prometheus' own format."""
    raised = pytest.raises(RuntimeError) if fails else contextlib.nullcontext()
    with oo.pipeline("fuzz"), raised as caught, oo.node(name, layer=name, engine=key, inputs=[value]) as node:
        node.set(**{key: value})
        node.event(name, **{key: value})
        node.cache(hit=fails, key=value)
        node.output(value)
        oo.get_logger().info(message, **{key: value})
        if fails:
            raise RuntimeError(message)
    assert not fails or caught.value.args == (message,)
    assert threading.active_count() < 50


damage = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 40)), max_size=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is in order."""
    directory = tmp_path_factory.mktemp("whole")
    with oo.configure(service_name="whole", directory=directory, **EVERYTHING):
        for _ in range(3):
            with oo.pipeline("p"), oo.node("n"):
                pass
    return directory


def changed(before: bytes, damaged: list[tuple[float, bytes, int]], torn: float) -> bytes:
    """Return a file's content with its end missing, perhaps, and other bytes in places."""
    data = bytearray(before[: int(len(before) * torn)] if torn < 0.9 else before)
    for place, new, length in damaged:
        start = int(place * len(data))
        data[start : start + length] = new
    return bytes(data)


@settings(max_examples=max(100, round(40_000 * SCALE)))
@given(damaged=damage, torn=st.floats(0, 1))
def test_no_damaged_file_harms_its_reader(whole: Path, damaged: list[tuple[float, bytes, int]], torn: float) -> None:
    """Logs give the lines that are left; the store names the file that it cannot read, or reads on."""
    for path in [*whole.glob("logs/*.jsonl"), *whole.glob("spans/*/*.parquet")]:
        before = path.read_bytes()
        path.write_bytes(changed(before, damaged, torn))
        try:
            if path.suffix == ".jsonl":
                assert all(isinstance(record, dict) for record in newest([path], {}, 100))
            else:
                with contextlib.suppress(StoreError):
                    store.open(whole).summaries()
        finally:
            path.write_bytes(before)


CRASHED = """if True:
    import os, sys
    import otel_odibi as oo
    telemetry = oo.configure(service_name="crashed", directory=sys.argv[1], span_formats="none", metric_formats="none",
                             otlp_endpoint="http://127.0.0.1:1", otlp_protocol="http/protobuf")
    for _ in range(3):
        with oo.pipeline("p"), oo.node("n"):
            pass
    telemetry.flush(1)
    with oo.pipeline("p"), oo.node("dying"):
        os._exit(0)
"""


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process leaves that dies within a node, with its endpoint away."""
    directory = tmp_path_factory.mktemp("crashed")
    subprocess.run([sys.executable, "-c", CRASHED, str(directory)], check=True, capture_output=True)
    assert {path.name for path in directory.iterdir()} == {"logs", "state", "spool"}
    return directory


@settings(max_examples=max(50, round(10_000 * SCALE)))
@given(damaged=damage, torn=st.floats(0, 1), which=st.integers(0, 3))
def test_recovery_and_replay_pass_over_what_is_damaged(
    crashed: Path, damaged: list[tuple[float, bytes, int]], torn: float, which: int
) -> None:
    """Whichever file it is: nothing is raised, what comes out is valid, and a second recovery finds nothing to do."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "t"
        shutil.copytree(crashed, directory)
        chosen = sorted(path for path in directory.rglob("*") if path.is_file())
        path = chosen[which % len(chosen)]
        path.write_bytes(changed(path.read_bytes(), damaged, torn))
        recover(directory, spool=functools.partial(keep, directory, "recovered.0-00000000"))
        assert recover(directory).runs == ()
        if (directory / "spans").exists():
            ids = pq.read_table(directory / "spans")["SpanId"].to_pylist()
            assert len(ids) == len(set(ids))
        store.open(directory).active()
        sent, lost, left = replay(directory, "http://127.0.0.1:1", timeout=5)
        assert sent == 0 <= lost + left
