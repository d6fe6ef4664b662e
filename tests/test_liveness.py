"""State files: that a process lives, and what it has under way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from otel_odibi import liveness, store
from otel_odibi.exporters.segments import acquire, release
from otel_odibi.facts import NodeFinished, NodeStarted, RunFinished, RunStarted
from otel_odibi.liveness import Liveness, append_ids, read_state
from otel_odibi.testing import START, FakeClock

RUN = RunStarted("daily", "run-1", 7, 1, 0, 1, START)


def node(span_id: int, name: str = "join") -> NodeStarted:
    return NodeStarted("daily", "run-1", name, "", "", 7, span_id, 1, 1, START)


def tell(live: Liveness, *facts: Any) -> None:
    for fact in facts:
        live.listeners()[type(fact)](fact)


@contextmanager
def alive(directory: Path, resource: dict[str, Any] | None = None, **options: Any) -> Iterator[Liveness]:
    live = Liveness(directory, "flights", resource or {}, **{"seconds": 0.01, **options})
    yield live
    live._active.clear()
    live.close(delivered=False)


def wait_for(check: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def state(path: Path) -> dict[str, Any]:
    found = read_state(path)
    assert found is not None
    return found


def locked(path: Path) -> bool:
    fd = acquire(path, os.O_RDWR)
    if fd is not None:
        release(fd)
    return fd is None


def test_a_state_file_tells_what_the_process_is_and_does(tmp_path: Path) -> None:
    """It is one JSON object, private to owner and group, its secrets redacted; a heartbeat brings it up to date."""
    clock = FakeClock()
    with alive(tmp_path, {"team": "sky", "api_key": "k3y"}, clock=clock.time_ns, rss=lambda: 42, otlp=True) as live:
        tell(live, RUN, node(2), node(3), NodeFinished(node(2), START, 1, "success"))
        clock.advance(90)
        wait_for(lambda: state(live.path)["heartbeat_unix_nano"] > START)
        told = json.loads(live.path.read_text())
        assert live.path.name == f"flights.{os.getpid()}-{live.process}.json"
        assert live.path.stat().st_mode & 0o777 == 0o640
        assert told["resource"] == {"team": "sky", "api_key": "[redacted]"}
        assert (told["pid"], told["started_unix_nano"], told["otlp"], told["rss"]) == (os.getpid(), START, True, 42)
        assert [(entry["node_name"], entry["elapsed_seconds"]) for entry in told["active"]] == [("", 90), ("join", 90)]
        tell(live, NodeFinished(node(3), START, 1, "success"), RunFinished(RUN, START, 1, "success", 2, 0))
        wait_for(lambda: not state(live.path)["active"])
        assert json.loads(live.path.read_text())["active_count"] == 0


def test_the_store_tells_what_is_under_way(tmp_path: Path) -> None:
    """From state files; for a service without any, from start lines in the log that have no end."""
    with alive(tmp_path, rss=lambda: 42) as live:
        tell(live, RUN, node(2))
        wait_for(lambda: len(state(live.path)["active"]) == 2)
        found = store.open(tmp_path).active()
        assert [(each.node, each.pipeline, each.start_ns, each.rss) for each in found] == [
            ("", "daily", START, 42), ("join", "daily", START, 42),
        ]  # fmt: skip
    (tmp_path / "logs").mkdir()
    start = {"event_type": "node_start", "service": "old", "node_name": "n", "span_id": "1", "time_unix_nano": 5}
    lines = [start, {**start, "span_id": "2"}, {**start, "event_type": "node_complete"}, [], {"event_type": 1}]
    (tmp_path / "logs" / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    live.path.write_text('{"active": [1, {"time_unix_nano": "?"}]}')
    assert [(each.service, each.span_id, each.host) for each in store.open(tmp_path).active()] == [("old", "2", "")]


def test_a_clean_end_leaves_what_was_not_delivered(tmp_path: Path) -> None:
    """Delivered, file and ids go; else they stay, unlocked; with a node under way locked too, as its process lives."""
    for delivered, under_way, stays, held in (
        (True, False, False, False), (False, False, True, False), (True, True, True, True),
    ):  # fmt: skip
        live = Liveness(tmp_path, "flights", {})
        live.acked([1, 2**64 - 1])
        tell(live, *([node(2)] if under_way else []))
        live.close(delivered)
        live.acked([3])
        assert (live.path.exists(), live.path.with_suffix(".acked").exists()) == (stays, stays)
        assert stays is False or (locked(live.path), live.path.with_suffix(".acked").stat().st_size) == (held, 16)


def test_a_forked_child_gets_its_own_file_on_first_use(tmp_path: Path) -> None:
    """The parent's stays locked by the parent alone, and unchanged."""
    heard: list[str] = []
    with alive(tmp_path, on_process=heard.append, seconds=3600) as live:
        tell(live, node(2))
        before, child = live.path.read_bytes(), os.fork()
        if not child:
            alone = len(list(tmp_path.glob("state/*"))) == 1
            tell(live, node(3))
            mine = live.path.name.startswith(f"flights.{os.getpid()}-") and locked(live.path)
            os._exit(0 if alone and mine and heard[1] == live.process and list(live._active) == [3] else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert len(list(tmp_path.glob("state/*"))) == 2
        assert (live.path.read_bytes(), heard, locked(live.path)) == (before, [live.process], True)


@pytest.mark.parametrize("fault", ["deleted", "closed"])
def test_a_lost_file_is_taken_again(tmp_path: Path, fault: str) -> None:
    """As after a clean-up of the directory, or where a program closes all its files to become a daemon."""
    with alive(tmp_path) as live:
        live.path.unlink() if fault == "deleted" else os.close(live._fd)
        wait_for(lambda: live.path.exists() and locked(live.path))


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand runs and nodes are listed; of very many ids the older half goes."""
    with alive(tmp_path) as live:
        tell(live, *map(node, range(1, 1500)))
        wait_for(lambda: state(live.path).get("active_count") == 1499)
        assert len(state(live.path)["active"]) == 1000
    monkeypatch.setattr(liveness, "_MAX_ACKED", 79)
    for first in range(0, 30, 10):
        append_ids(live.path, range(first, first + 10))
    assert live.path.with_suffix(".acked").stat().st_size < 200


def test_a_directory_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    """Nothing raises, and the file is made once it can be."""
    (tmp_path / "state").write_text("in the way")
    with alive(tmp_path) as live:
        tell(live, RUN)
        live.acked([1])
        (tmp_path / "state").unlink()
        wait_for(live.path.exists)
