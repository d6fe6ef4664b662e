"""Several processes of one program: forked from the midst of it, or side by side in one directory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
from otlp_endpoint import Endpoint, endpoint
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from otel_odibi.exporters.jsonl import files, read_lines
from otel_odibi.forks import ForkGuard
from otel_odibi.recovery import recover
from otel_odibi.spool import keep, replay

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

FORKS = """if True:
    import contextlib, faulthandler, multiprocessing, os, signal, sys, threading, time
    import otel_odibi as oo

    directory, forks, ways = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
    options = dict(service_name="forks", directory=directory, span_interval=0.01, metric_interval=0.3,
                   parquet_seconds=0.1, exit_timeout=60, log_max_bytes=1_000_000)
    telemetry = oo.configure(**options)
    faulthandler.register(signal.SIGALRM, chain=True)
    truth = os.open(directory + "/truth", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    fork = multiprocessing.get_context("fork")

    def note(way, call):
        os.write(truth, b"%s %d %016x\\n" % (way.encode(), os.getpid(), call.span.get_span_context().span_id))

    def work(way, nodes):
        for _ in range(nodes):
            with oo.node("work", layer=way) as node:
                node.output(rows=1)
                oo.get_logger().info("under way", way=way)
            note(way, node)

    def child(way):
        signal.alarm(60)  # a hang fails, and tells where
        if way == "configure":
            oo.configure(**options)
        with oo.pipeline("child") as run:
            work(way, 3)
            if way == "nested":
                process = fork.Process(target=child, args=("process",))
                process.start()
                process.join()
                assert process.exitcode == 0
        note(way, run)
        if way == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
        if way == "idle":
            telemetry.flush()

    def begin(way):
        if way in ("process", "nested"):
            process = fork.Process(target=child, args=(way,))
            process.start()
            return lambda: process.join() or process.exitcode
        pid = os.fork()
        if pid == 0:
            multiprocessing.process._children.clear()  # or it would wait for its brothers
            child(way)
            os._exit(0) if way == "os._exit" else sys.exit(0)
        return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def busy():
        while not stop.is_set():
            work("parent", 1)
            time.sleep(0.005)

    stop = threading.Event()
    with oo.pipeline("parent") as run:
        threads = [threading.Thread(target=oo.carry(busy)) for _ in range(4)]
        for thread in threads:
            thread.start()
        living, ends = [], []
        for number in range(forks):
            living.append((ways[number % len(ways)], begin(ways[number % len(ways)])))
            while len(living) > (3 if number < forks - 1 else 0):
                way, wait = living.pop(0)
                ends.append((way, wait()))
        stop.set()
        for thread in threads:
            thread.join()
    note("parent", run)
    telemetry.shutdown()
    bad = [end for end in ends if end[1] != (-signal.SIGTERM if end[0] == "terminated" else 0)]
    print(bad or "good")
"""
WAYS = "process,sys.exit,os._exit,configure,terminated,nested"


class Seen(NamedTuple):
    """What there is in the end, and what there should be."""

    truth: dict[str, tuple[str, int]]
    """By span id, how its process ended, and which process."""
    parquet: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    prom: dict[str, float]


def forked(directory: Path, collector: Endpoint, forks: int, ways: str = WAYS, timeout: float = 120) -> Seen:
    """Fork so often from a process at work, recover what there is to recover, and collect what there is."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_EXPORTER_OTLP_PROTOCOL": collector.protocol}
    command = [sys.executable, "-W", "ignore", "-c", FORKS, str(directory), str(forks), ways]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout)
    assert done.stdout == "good\n", done.stdout + done.stderr[-10_000:]
    assert "Traceback" not in done.stderr, done.stderr
    assert "lost: spans" not in done.stderr, done.stderr
    recovered = recover(directory, spool=partial(keep, directory, "recovered.0-00000000"))
    assert not recovered.files
    collector._next.clear()
    with patch.dict(os.environ, environ):
        assert replay(directory, collector.url)[1:] == (0, 0)
    truth = {
        span_id: (way, int(pid)) for way, pid, span_id in map(str.split, (directory / "truth").read_text().splitlines())
    }
    lines = [json.loads(line) for path in files(directory / "logs") for line in read_lines(path)]
    return Seen(truth, pq.read_table(directory / "spans").to_pylist(), lines, rows_in_prom(directory))


def rows_in_prom(directory: Path) -> dict[str, float]:
    """Return the rows counted, by layer."""
    [path] = directory.glob("prometheus/*.prom")
    rows: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples if family.name == "odibi_node_rows" else ():
            rows[sample.labels["layer"]] += sample.value
    return rows


def check(seen: Seen, collector: Endpoint, *, cut: bool = False) -> str:
    """Nothing is there twice, nothing is missing; say how much there was. With `cut` answers of the endpoint were."""
    truth = seen.truth
    stored = Counter(row["SpanId"] for row in seen.parquet)
    assert stored == dict.fromkeys(truth, 1)
    delivered = Counter(f"{span_id:016x}" for span_id in collector.ids())
    assert Counter(truth[span_id][0] for span_id in truth.keys() - delivered.keys()) == {}
    assert delivered.keys() <= truth.keys()
    twice = {truth[span_id][0] for span_id, count in delivered.items() if count > 1}
    assert cut or twice <= {"os._exit"}, "between its delivery and the note of that it may have ended"
    told = Counter((line["span_id"], line["event_type"]) for line in seen.lines)
    assert set(told.values()) == {1}
    ends = {span_id for span_id, kind in told if kind in ("node_complete", "pipeline_complete")}
    assert ends == truth.keys()
    nodes = {line["span_id"] for line in seen.lines if line["event_type"] == "node_complete"}
    assert {span_id for span_id, kind in told if kind == "log"} == nodes
    counted = Counter(truth[span_id][0] for span_id in nodes)
    by_otlp: dict[str, float] = defaultdict(float)
    for metric in collector.accepted["metrics"]:
        for point in metric.sum.data_points if metric.name == "odibi.node.rows" else ():
            layer = next(a.value.string_value for a in point.attributes if a.key == "layer")
            by_otlp[layer] += point.as_int
    for counts in (seen.prom, by_otlp):
        # Of a process that is killed the counts since its last export are lost.
        assert counts.get("os._exit", 0) <= counted["os._exit"]
        assert {**counts, "os._exit": 0} == {**counted, "os._exit": 0}, f"{counts}, and in truth {counted}"
    instances: dict[int, set[str]] = defaultdict(set)
    for row in seen.parquet:
        instances[truth[row["SpanId"]][1]].add(dict(row["ResourceAttributes"])["service.instance.id"])
    assert len(set.union(*instances.values())) == len(instances), "one for each process, and another for each"
    again = delivered.total() - len(delivered)
    return f"{len(instances)} processes, {len(truth):,} spans, {len(seen.lines):,} lines; {again} delivered twice"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_process_at_work_forks(tmp_path: Path, protocol: str) -> None:
    """Spans, lines and counts of parent and children are there once, however a child ends."""
    with endpoint(protocol) as collector:
        check(forked(tmp_path, collector, 18), collector)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_waits_for_an_import() -> None:
    """A child could never import what another thread of its parent has half imported."""
    held, done = threading.Event(), threading.Event()

    def imports() -> None:
        with importlib._bootstrap._ModuleLockManager("pyarrow.made_up"):
            held.set()
            done.wait(0.2)
            done.set()

    thread = threading.Thread(target=imports)
    thread.start()
    held.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0 if done.is_set() else 1)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_has_what_does_not_end_cut() -> None:
    """What holds a guard is hurried after a while; parent and child can have the guard after that."""
    held, hurried = threading.Event(), threading.Event()
    guard = ForkGuard(hurried.set)

    def calls() -> None:
        with guard.lock:
            held.set()
            hurried.wait(10)

    thread = threading.Thread(target=calls)
    thread.start()
    held.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0 if hurried.is_set() and guard.lock.acquire(timeout=5) else 1)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert guard.lock.acquire(timeout=5)


# --- metrics of several processes ------------------------------------------------------------------------------------

POOLS = """if True:
    import json, multiprocessing, os, sys, urllib.request
    from concurrent.futures import ProcessPoolExecutor
    from contextlib import suppress
    import otel_odibi as oo
    from otel_odibi import process

    @oo.node(layer="worker")
    def work(rows):
        oo.current_node().output(rows=rows)
        return os.getpid()

    def killed(item):
        work(3)
        process._current.flush()  # as it does once a minute
        os.kill(os.getpid(), 9)

    def scrape(url):
        request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text"})
        return urllib.request.urlopen(request).read().decode()

    if __name__ == "__main__":
        directory, method = sys.argv[1:]
        with oo.configure(service_name="pools", directory=directory):   # what an earlier program counted
            work(1000)
        telemetry = oo.configure(service_name="pools", directory=directory, prometheus_port=0, metric_interval=60)
        pages = []
        with oo.pipeline("pools"):
            work(1)
            for pool in range(2):
                with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context(method)) as executor:
                    assert len(set(executor.map(oo.carry(work), [1] * 60))) <= 3
                if pool:
                    telemetry.flush()  # then its own counts are in the file too
                pages += [scrape(telemetry.prometheus_url), scrape(telemetry.prometheus_url)]
            with suppress(Exception), ProcessPoolExecutor(1, multiprocessing.get_context(method)) as executor:
                executor.submit(oo.carry(killed), 1).result()
            pages.append(scrape(telemetry.prometheus_url))
        telemetry.shutdown()
        print(json.dumps(pages))
"""


def samples(page: str) -> dict[str, float]:
    """Return the values of a page, by name and labels."""
    families = openmetrics(page)
    return {f"{s.name}{json.dumps(s.labels, sort_keys=True)}": s.value for family in families for s in family.samples}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_count_at_their_parents_endpoint(tmp_path: Path, method: str) -> None:
    """Each once; nothing goes down when a pool ends or a worker is killed; what was before does not count."""
    program = tmp_path / "program.py"
    program.write_text("\n".join(line[4:] for line in POOLS.splitlines()[1:]))
    directory = tmp_path / "t"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("OTEL")}
    environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, "-W", "ignore", str(program), str(directory), method]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    pages = [samples(text) for text in texts]
    own = '{"direction": "out", "layer": "worker", "node": "work", "pipeline": "pools", "service": "pools"}'
    assert [page["odibi_node_rows_total" + own] for page in pages] == [61, 61, 121, 121, 124]
    counted = own.replace('"direction": "out", ', "").replace('"pipeline"', '"outcome": "success", "pipeline"')
    assert [page["odibi_node_duration_seconds_count" + counted] for page in pages] == [61, 61, 121, 121, 122]
    for before, after in pairwise(pages):
        for key, value in before.items():
            if "_total{" in key or "_bucket{" in key or "_count{" in key or "_sum{" in key:
                assert after[key] >= value, key
    assert {value for key, value in pages[-1].items() if key.startswith("odibi_node_active")} == {0}
    assert "# {" in texts[-1], "exemplars of what this process measured"
    assert rows_in_prom(directory) == {"worker": 1124}


# --- side by side ----------------------------------------------------------------------------------------------------

BESIDE = """if True:
    import sys
    import otel_odibi as oo

    with oo.configure(service_name="beside", directory=sys.argv[1], log_max_bytes=100_000, parquet_rows=50,
                      exit_timeout=60):
        for number in range(300):
            with oo.node("n", layer="beside") as node:
                node.output(rows=1)
                oo.get_logger().info("under way", number=number, text="x" * 200)
"""


def test_eight_programs_share_a_directory(tmp_path: Path) -> None:
    """With files rotated, compressed and rolled all the while: lines are whole and there once, and spans, and rows."""
    command = [sys.executable, "-W", "ignore", "-c", BESIDE, str(tmp_path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    told = [process.communicate(timeout=100)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 8, told
    paths = files(tmp_path / "logs")
    assert len(paths) > 8
    lines = [json.loads(line) for path in paths for line in read_lines(path)]
    spans = pq.read_table(tmp_path / "spans")["SpanId"].to_pylist()
    assert len(spans) == len(set(spans)) == 8 * 300
    once = Counter((line["span_id"], line["event_type"]) for line in lines)
    assert once == {(span_id, kind): 1 for span_id in spans for kind in ("node_start", "log", "node_complete")}
    assert rows_in_prom(tmp_path) == {"beside": 8 * 300}
    assert not list(tmp_path.glob("state/*"))
