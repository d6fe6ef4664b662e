"""The JSON-lines sink: every record is in its files once and whole, whatever threads, processes and disks do."""

from __future__ import annotations

import contextlib
import errno
import gzip
import itertools
import multiprocessing
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_odibi.errors import SettingError
from otel_odibi.exporters import jsonl, segments
from otel_odibi.exporters.jsonl import JsonlSink, files, read_lines, safe_name

SCALE = float(os.environ.get("ODIBI_TEST_SCALE", "0.01"))
WORDS = " ".join(f"word{number * 7919 % 10_007}" for number in range(20_000)).encode()


@pytest.fixture
def make(tmp_path):
    """Make sinks for the service `flights` in one directory; they are closed at the end."""
    with contextlib.ExitStack() as stack:

        def sink(name="flights", directory=tmp_path, **options):
            made = JsonlSink(directory, name, **options)
            stack.callback(made.close)
            return made

        yield sink


@pytest.fixture
def clock(monkeypatch):
    """Replace the sink's clock by one that moves when told."""
    fake = SimpleNamespace(now=1000.0, monotonic=lambda: fake.now, time_ns=lambda: int(fake.now * 1e9))
    monkeypatch.setattr(jsonl, "time", fake)
    return fake


@pytest.fixture
def drops():
    """Count drops by reason; `drops.on_drop` is the callback."""
    counts = Counter()
    counts.on_drop = lambda reason, count: counts.update({reason: count})
    return counts


def line(number, **fields):
    return orjson.dumps({"i": number, **fields}) + b"\n"


def leave(path, content, age=3600):
    """Make a file as a process that died some time ago would have left it."""
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)


def numbers(directory, name="flights"):
    """The numbers of all records of a service, in the order in which they are read."""
    return [orjson.loads(text)["i"] for path in files(directory, name) for text in read_lines(path)]


def names(directory):
    return sorted(os.listdir(directory))


def pid_file(name="flights"):
    return f"{name}.{os.getpid()}.jsonl"


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_written_line_is_in_the_file_when_write_returns(make, tmp_path):
    """Nothing is buffered: the bytes are there as soon as `write` says so."""
    sink = make()
    assert sink.write(line(1)) is True
    assert sink.path == tmp_path / "flights.jsonl"
    assert sink.path.read_bytes() == line(1)


def test_one_record_is_one_system_call(make, monkeypatch):
    """A record written in parts could be torn by a kill between them."""
    sink, calls, write = make(), [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(bytes(data)) or write(fd, data))
    sink.write(line(1))
    sink.write(line(2))
    assert calls == [line(1), line(2)]


def test_sinks_of_one_name_in_one_process_have_files_of_their_own(make, tmp_path):
    """The first gets the plain name, the second the process id, the third a counter too."""
    sinks = [make() for _ in range(3)]
    pid = os.getpid()
    assert [sink.path.name for sink in sinks] == ["flights.jsonl", f"flights.{pid}.jsonl", f"flights.{pid}-2.jsonl"]
    for number, sink in enumerate(sinks):
        assert sink.write(line(number))
    assert sorted(numbers(tmp_path)) == [0, 1, 2]


def test_a_file_held_by_another_process_is_left_to_it(make, tmp_path):
    """While a live process holds the plain name, this one adds its process id; after that one's death it need not."""
    code = "import sys; from otel_odibi.exporters.jsonl import JsonlSink; from pathlib import Path\n"
    code += (
        "JsonlSink(Path(sys.argv[1]), 'flights').write(b'{\"i\": 1}\\n'); print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        assert make().path.name == pid_file()
        other.kill()
    later = make()
    assert later.path.name == "flights.jsonl"
    later.write(line(2))
    assert numbers(tmp_path) == [1, 2]


def test_a_file_rotated_between_opening_and_locking_is_not_taken(make, tmp_path, monkeypatch):
    """Another process renamed it and let go of it just then: it is a segment now, and nothing may be added to it."""
    (tmp_path / "flights.jsonl").write_bytes(line(1))
    lock = segments._lock

    def late(fd):
        monkeypatch.setattr(segments, "_lock", lock)
        (tmp_path / "flights.jsonl").rename(tmp_path / "flights.000001.jsonl")
        return lock(fd)

    monkeypatch.setattr(segments, "_lock", late)
    assert make().path.name == pid_file()


def test_a_later_sink_appends(make, tmp_path):
    """A file that nobody holds is continued."""
    for number in (1, 2):
        sink = make()
        sink.write(line(number))
        sink.close()
    assert names(tmp_path) == ["flights.jsonl"]
    assert numbers(tmp_path) == [1, 2]


@pytest.mark.parametrize("before", [b"", line(1), line(1) * 9_000])
@pytest.mark.parametrize("torn", [b'{"i": 2, "mess', b"x" * 200_000])
def test_a_torn_last_line_is_taken_away_before_the_next_record(make, tmp_path, before, torn):
    """What a crash or a power cut left of a record is no record: the file stays valid."""
    (tmp_path / "flights.jsonl").write_bytes(before + torn)
    make().write(line(3))
    assert (tmp_path / "flights.jsonl").read_bytes() == before + line(3)


def test_a_last_record_that_lacks_but_its_newline_stays(make, tmp_path):
    """It gets one."""
    (tmp_path / "flights.jsonl").write_bytes(line(1) + line(2)[:-1])
    make().write(line(3))
    assert numbers(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("setting", ["max_bytes", "retention_bytes"])
def test_sizes_that_cannot_work_are_refused(tmp_path, setting):
    """The constructor says which setting is wrong."""
    with pytest.raises(SettingError, match=setting):
        JsonlSink(tmp_path, "flights", **{setting: 0})


def test_files_and_directories_are_not_for_everyone(make, tmp_path):
    """Owner and group read; others do not, whatever the umask lets through."""
    before = os.umask(0)
    try:
        sink = make(directory=tmp_path / "a" / "b", max_bytes=10)
        sink.write(line(1))
        sink.write(line(2))
        sink.flush()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").rglob("*")}
    assert modes == {"b": 0o750, "flights.jsonl": 0o640, "flights.000001.jsonl.gz": 0o640}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750


def test_a_relative_directory_stays_where_it_was(make, tmp_path, monkeypatch):
    """A change of the working directory does not move the files."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    sink = make(directory=Path("logs"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    sink.write(line(1))
    sink.rotate()
    sink.write(line(2))
    assert numbers(tmp_path / "logs") == [1, 2]


def test_a_signal_handler_may_log_while_a_line_is_being_written(make, tmp_path, monkeypatch):
    """The handler interrupts `write` in the same thread: it must neither wait for itself nor tear the line."""
    sink, write = make(), os.write

    def interrupted(fd, data):
        if data == line(1):
            assert sink.write(line(2))
        return write(fd, data)

    monkeypatch.setattr(os, "write", interrupted)
    assert sink.write(line(1))
    assert sorted(numbers(tmp_path)) == [1, 2]


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_short_write_leaves_no_torn_record(make, tmp_path, monkeypatch, drops):
    """A disk that takes half a record gets that half taken back, and the record counts as dropped."""
    sink, write = make(on_drop=drops.on_drop), os.write
    sink.write(line(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
        assert sink.write(line(2)) is False
        assert sink.write(line(3)) is False
    assert sink.write(line(4))
    assert sink.path.read_bytes() == line(1) + line(4)
    assert drops == {"disk_full": 2}


def test_a_short_write_that_cannot_be_taken_back_at_once_is_later(make, tmp_path, monkeypatch, drops):
    """Where not even truncation works, the next record does not join the torn one."""
    sink, write = make(on_drop=drops.on_drop), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
        patch.setattr(os, "ftruncate", _raising(errno.EIO))
        assert sink.write(line(1)) is False
    assert sink.write(line(2))
    assert sink.path.read_bytes() == line(2)
    assert drops == {"disk_full": 1}


def _raising(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "disk_full"),
        (errno.EDQUOT, "disk_full"),
        (errno.EROFS, "read_only"),
        (errno.EACCES, "permission_denied"),
        (errno.EIO, "io_error"),
        (errno.EBADF, "io_error"),
        (errno.ESTALE, "io_error"),
    ],
)
def test_errors_are_counted_by_cause_and_pass(make, tmp_path, monkeypatch, drops, number, reason):
    """Every record that could not be written counts once; when the trouble is over, writing goes on."""
    sink = make(on_drop=drops.on_drop)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _raising(number))
        assert [sink.write(line(number)) for number in range(5)] == [False] * 5
    assert sink.write(line(9))
    assert drops == {reason: 5}
    assert numbers(tmp_path) == [9]


def test_a_file_closed_behind_our_back_is_opened_again(make, tmp_path, drops):
    """A program that turns itself into a daemon closes every file it finds; no record is lost by that."""
    sink = make(on_drop=drops.on_drop)
    os.close(sink._fd)
    assert sink.write(line(1))
    assert numbers(tmp_path) == [1]
    assert not drops


def test_a_descriptor_that_became_another_file_is_not_closed(make, tmp_path, clock):
    """The number of a file closed behind our back may by now be another file's: the check sees it and lets it be."""
    sink = make()
    with open(tmp_path / "theirs", "wb") as theirs:
        os.dup2(theirs.fileno(), sink._fd)
        stolen = sink._fd
        clock.now += 2
        assert sink.write(line(1))
        assert numbers(tmp_path) == [1]
        assert os.path.samestat(os.fstat(stolen), os.fstat(theirs.fileno()))
        os.close(stolen)
    assert (tmp_path / "theirs").read_bytes() == b""


def test_a_directory_that_cannot_be_made_degrades_and_recovers(make, tmp_path, clock, drops, monkeypatch):
    """No exception; every record counted; opening is tried once a second, and works when the obstacle is gone."""
    obstacle, attempts, make_path = tmp_path / "logs", [], jsonl.make_directory
    obstacle.write_text("a file where the directory should be")
    monkeypatch.setattr(jsonl, "make_directory", lambda path: attempts.append(path) or make_path(path))
    sink = make(directory=obstacle, on_drop=drops.on_drop)
    for number in range(10):
        assert sink.write(line(number)) is False
        clock.now += 0.3
    assert drops == {"io_error": 10}
    assert len(attempts) == 3
    obstacle.unlink()
    clock.now += 1
    assert sink.write(line(10))
    assert numbers(obstacle) == [10]


def test_a_path_that_no_system_has_degrades(make, drops):
    """A NUL in the directory is refused by Python, not by the system; that does not raise either."""
    sink = make(directory=Path("logs\0"), on_drop=drops.on_drop)
    assert sink.write(line(1)) is False
    assert drops == {"bad_path": 1}


def test_a_file_that_is_someone_elses_is_passed_over(make, tmp_path):
    """Where the plain name cannot be opened (here: it is a directory), the process's own name serves."""
    (tmp_path / "flights.jsonl").mkdir()
    sink = make()
    assert sink.write(line(1))
    assert sink.path.name == pid_file()
    assert numbers(tmp_path) == [1]


def test_a_callback_may_raise_or_log(make, tmp_path):
    """`on_drop` is called outside the lock and guarded: it can write to the sink and its errors stay inside."""
    seen = []

    def on_drop(reason, count):
        seen.append(reason)
        if len(seen) < 3:
            sink.write(line(0))
        raise RuntimeError("from the callback")

    sink = make(on_drop=on_drop)
    sink.close()
    assert sink.write(line(1)) is False
    assert seen == ["closed"] * 3


@pytest.mark.parametrize("remove", [Path.unlink, lambda path: path.rename(path.with_suffix(".old"))])
def test_a_deleted_or_moved_file_is_noticed(make, tmp_path, clock, remove):
    """After logrotate or a clean-up, records go to a new file of the old name within a second."""
    sink = make()
    sink.write(line(1))
    remove(sink.path)
    clock.now += 2
    sink.write(line(2))
    assert numbers(tmp_path) == [2]


def test_a_deleted_directory_is_made_again(make, tmp_path, clock):
    """The same for the whole directory."""
    sink = make(directory=tmp_path / "logs")
    sink.path.unlink()
    sink.path.parent.rmdir()
    clock.now += 2
    assert sink.write(line(1))
    assert numbers(tmp_path / "logs") == [1]


def test_a_truncated_file_is_filled_anew(make, tmp_path, clock):
    """`copytruncate` leaves the file in place: the size is measured again, so rotation comes when it is due."""
    sink = make(max_bytes=30)
    sink.write(line(1))
    sink.write(line(2))
    os.truncate(sink.path, 0)
    clock.now += 2
    sink.write(line(3))
    assert names(tmp_path) == ["flights.jsonl"]


def test_a_filesystem_without_locks_gets_a_file_per_sink(make, tmp_path, monkeypatch):
    """No lock, no sharing: each sink has a file whose name nobody else can have. Segments stay plain."""
    monkeypatch.setattr(segments, "_lock", _raising(errno.ENOTSUP))
    sinks = [make(max_bytes=20) for _ in range(2)]
    assert all(re.fullmatch(rf"flights\.{os.getpid()}-\d+\.jsonl", sink.path.name) for sink in sinks)
    assert sinks[0].path != sinks[1].path
    for number in range(6):
        assert sinks[number % 2].write(line(number))
    for sink in sinks:
        sink.flush()
    assert sorted(numbers(tmp_path)) == list(range(6))
    assert not list(tmp_path.glob("*.gz*"))


def test_close_is_final_and_may_be_repeated(make, tmp_path, drops):
    """After `close` a record is dropped and counted, and the file is free for others."""
    sink = make(on_drop=drops.on_drop)
    sink.close()
    sink.close()
    assert sink.write(line(1)) is False
    sink.rotate()
    assert drops == {"closed": 1}
    assert make().path == sink.path


# --- rotation --------------------------------------------------------------------------------------------------------


def test_a_full_file_becomes_a_numbered_compressed_segment(make, tmp_path):
    """At `max_bytes` the file is renamed, compressed, and a new one begun; reading gives all records in order."""
    sink = make(max_bytes=3 * len(line(1)))
    for number in range(8):
        sink.write(line(number))
    sink.flush()
    assert names(tmp_path) == ["flights.000001.jsonl.gz", "flights.000002.jsonl.gz", "flights.jsonl"]
    assert gzip.decompress((tmp_path / "flights.000001.jsonl.gz").read_bytes()) == line(0) + line(1) + line(2)
    assert numbers(tmp_path) == list(range(8))


def test_a_record_larger_than_the_limit_is_written_whole(make, tmp_path):
    """The limit never tears or refuses a record."""
    sink = make(max_bytes=50)
    for number in range(3):
        assert sink.write(line(number, text="x" * 1000))
    sink.flush()
    assert numbers(tmp_path) == [0, 1, 2]
    assert names(tmp_path) == ["flights.000001.jsonl.gz", "flights.000002.jsonl.gz", "flights.jsonl"]


def test_an_empty_file_is_not_rotated(make, tmp_path):
    """`rotate` on nothing does nothing."""
    sink = make()
    sink.rotate()
    assert names(tmp_path) == ["flights.jsonl"]


def test_processes_of_a_service_share_one_sequence_of_numbers(make, tmp_path):
    """Segments of several writers are numbered in the order in which they were rotated."""
    first, second = make(), make()
    for number in range(6):
        sink = (first, second)[number % 2]
        sink.write(line(number))
        sink.rotate()
    for sink in (first, second):
        sink.flush()
    assert numbers(tmp_path) == list(range(6))
    assert len([name for name in names(tmp_path) if name.endswith(".gz")]) == 6


def test_a_number_taken_by_another_process_is_never_overwritten(make, tmp_path, monkeypatch):
    """Another process took, filled and compressed the next number between our listing and our claim."""
    sink = make()
    sink.write(line(2))
    theirs, listdir = tmp_path / "flights.000001.jsonl.gz", os.listdir

    def late(path):
        entries = listdir(path)
        theirs.write_bytes(gzip.compress(line(1)))
        monkeypatch.setattr(os, "listdir", listdir)
        return entries

    monkeypatch.setattr(os, "listdir", late)
    sink.rotate()
    sink.flush()
    assert numbers(tmp_path) == [1, 2]


def test_rotation_that_fails_is_tried_again_later(make, tmp_path, clock, monkeypatch):
    """Where the file cannot be renamed, records go on into it."""
    sink = make(max_bytes=20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _raising(errno.EACCES))
        assert all(sink.write(line(number)) for number in range(6))
        assert sink.path.read_bytes() == b"".join(map(line, range(6)))
    clock.now += 2
    sink.write(line(6))
    sink.flush()
    assert names(tmp_path) == ["flights.000001.jsonl.gz", "flights.jsonl"]
    assert numbers(tmp_path) == list(range(7))


def test_a_thread_lives_only_while_there_is_something_to_compress(make, tmp_path):
    """No thread before the first rotation, none when all is done."""
    sink = make()

    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "otel-odibi-compress"]

    sink.write(line(1))
    assert not threads()
    sink.rotate()
    sink.flush()
    assert not threads()
    assert names(tmp_path) == ["flights.000001.jsonl.gz", "flights.jsonl"]


def test_close_leaves_pending_compression_to_the_next_process(make, tmp_path, monkeypatch):
    """`close` does not wait for a long compression; the next sink of the name does the work."""
    begun, goes_on = threading.Event(), threading.Event()
    read = os.read

    def slow(fd, count):
        begun.set()
        goes_on.wait()
        return read(fd, count)

    sink = make()
    sink.write(line(1))
    monkeypatch.setattr(segments, "os", SimpleNamespace(**{**vars(os), "read": slow}))
    sink.rotate()
    begun.wait()
    thread = next(thread for thread in threading.enumerate() if thread.name == "otel-odibi-compress")
    sink.close(timeout=0)
    goes_on.set()
    thread.join()
    assert names(tmp_path) == ["flights.000001.jsonl", "flights.jsonl"]
    make().flush()
    assert names(tmp_path) == ["flights.000001.jsonl.gz", "flights.jsonl"]


def test_a_full_disk_leaves_the_segment_plain(make, tmp_path, monkeypatch):
    """Where there is no room for the compressed copy, the plain segment stays and can be read."""
    sink = make()
    sink.write(line(1))
    monkeypatch.setattr(segments.Segments, "_deflate", _raising(errno.ENOSPC))
    sink.rotate()
    sink.flush()
    assert names(tmp_path) == ["flights.000001.jsonl", "flights.jsonl"]
    assert numbers(tmp_path) == [1]


# --- retention -------------------------------------------------------------------------------------------------------


def _incompressible(number):
    return line(number, text=os.urandom(1000).hex())


def test_the_oldest_segments_go_first(make, tmp_path):
    """The segments of all the service's processes together stay within the limit; the rest is untouched."""
    untouched = {
        "flights.x.000001.jsonl.gz": gzip.compress(line(1)),  # of the service flights.x
        "other.000001.jsonl": line(1),
        "flights.000001.jsonl.gz.bak": b"x" * 100_000,
        "flights.log": b"x" * 100_000,
    }
    for name, content in untouched.items():
        (tmp_path / name).write_bytes(content)
    sinks = [make(retention_bytes=5000) for _ in range(2)]
    for number in range(20):
        sinks[number % 2].write(_incompressible(number))
        sinks[number % 2].rotate()
        sinks[number % 2].flush()
    for sink in sinks:
        sink.write(_incompressible(20))
    kept = numbers(tmp_path)
    assert kept == [*range(kept[0], 20), 20, 20]
    assert 2 <= 20 - kept[0] <= 4
    sizes = [path.stat().st_size for path in files(tmp_path, "flights") if path.suffix == ".gz"]
    assert sum(sizes) <= 5000
    assert {name: (tmp_path / name).read_bytes() for name in untouched} == untouched


def test_numbers_go_on_when_retention_leaves_nothing(make, tmp_path):
    """A limit smaller than one segment keeps none; no number comes twice."""
    sink, seen = make(retention_bytes=1), []
    remove = Path.unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **options: seen.append(path.name) or remove(path, **options))
        for number in range(3):
            sink.write(line(number))
            sink.rotate()
            sink.flush()
    assert [name for name in seen if name.endswith(".gz")] == [f"flights.00000{n}.jsonl.gz" for n in (1, 2, 3)]
    assert names(tmp_path) == ["flights.jsonl"]


def test_a_segment_deleted_during_its_compression_stays_deleted(make, tmp_path, monkeypatch):
    """Retention, of this process or another, may be quicker than compression."""
    sink, deflate = make(), segments.Segments._deflate

    def slow(self, source, target):
        (tmp_path / "flights.000001.jsonl").unlink()
        return deflate(self, source, target)

    monkeypatch.setattr(segments.Segments, "_deflate", slow)
    sink.write(line(1))
    sink.rotate()
    sink.flush()
    assert names(tmp_path) == ["flights.jsonl"]


# --- what a crash leaves ---------------------------------------------------------------------------------------------


def test_a_crash_before_the_plain_segment_was_deleted(make, tmp_path):
    """Plain and compressed file are there: a reader sees the records once, the next sink tidies up."""
    (tmp_path / "flights.000001.jsonl").write_bytes(line(1))
    (tmp_path / "flights.000001.jsonl.gz").write_bytes(gzip.compress(line(1)))
    (tmp_path / ".flights.000001.jsonl.gz.tmp").write_bytes(b"half of it")
    assert numbers(tmp_path) == [1]
    make().flush()
    assert names(tmp_path) == ["flights.000001.jsonl.gz", "flights.jsonl"]
    assert numbers(tmp_path) == [1]


def test_a_crash_before_compression(make, tmp_path):
    """The next sink of the service compresses what is left, and nothing of other services."""
    for name in ("flights.000001.jsonl", "flights.000007.jsonl", "flights.x.000001.jsonl", "other.000001.jsonl"):
        (tmp_path / name).write_bytes(line(1))
    make().flush()
    assert names(tmp_path) == [
        "flights.000001.jsonl.gz",
        "flights.000007.jsonl.gz",
        "flights.jsonl",
        "flights.x.000001.jsonl",
        "other.000001.jsonl",
    ]


def test_a_crash_after_a_number_was_taken(make, tmp_path):
    """The empty file that takes a number hides no compressed segment, and goes away."""
    leave(tmp_path / "flights.000001.jsonl", b"")
    leave(tmp_path / "flights.000001.jsonl.gz", gzip.compress(line(1)))
    leave(tmp_path / "flights.000002.jsonl", b"")
    leave(tmp_path / "flights.000003.jsonl", b"", age=0)  # may be that of a live process, which is about to lock it
    assert numbers(tmp_path) == [1]
    make().flush()
    assert names(tmp_path) == ["flights.000001.jsonl.gz", "flights.000003.jsonl", "flights.jsonl"]


def test_what_a_live_process_is_compressing_is_left_to_it(make, tmp_path):
    """Its lock on the segment says so."""
    segment = tmp_path / "flights.000001.jsonl"
    segment.write_bytes(line(1))
    held = segments.acquire(segment, os.O_RDWR)
    make().flush()
    assert names(tmp_path) == ["flights.000001.jsonl", "flights.jsonl"]
    segments.release(held)
    make().flush()
    assert "flights.000001.jsonl.gz" in names(tmp_path)


def test_the_file_of_a_dead_process_becomes_a_segment(make, tmp_path):
    """So that retention reaches it. The file of a live process stays, and so does one of another service."""
    (tmp_path / "flights.999999999.jsonl").write_bytes(line(1))
    leave(tmp_path / "flights.999999998-2.jsonl", b"")
    (tmp_path / "flights.x.999999999.jsonl").write_bytes(line(1))
    live = [make() for _ in range(2)]
    live[1].write(line(2))
    for sink in live:  # whichever of them does it
        sink.flush()
    assert names(tmp_path) == sorted(
        ["flights.000001.jsonl.gz", "flights.jsonl", pid_file(), "flights.x.999999999.jsonl"]
    )
    assert numbers(tmp_path) == [1, 2]


def test_temporary_files_without_a_segment_are_deleted(make, tmp_path):
    """Retention may have deleted a segment while a process that then died was compressing it."""
    for name in (".flights.000001.jsonl.gz.tmp", ".other.000001.jsonl.gz.tmp", ".flights.gz.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "flights.000002.jsonl").write_bytes(line(1))
    make().flush()
    assert names(tmp_path) == [
        ".flights.gz.tmp",
        ".other.000001.jsonl.gz.tmp",
        "flights.000002.jsonl.gz",
        "flights.jsonl",
    ]


def _write_until_killed(directory, life):
    sink = JsonlSink(directory, "flights", max_bytes=2000)
    for number in itertools.count():
        sink.write(line(number, life=life, text="x" * (number % 300)))


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.faults)])
def test_a_killed_process_loses_and_doubles_nothing(make, tmp_path, kills):
    """Each life of the process leaves the records 0 to n, each once and whole, wherever in a rotation it was killed."""
    spawn = multiprocessing.get_context("spawn")
    for life in range(kills):
        process = spawn.Process(target=_write_until_killed, args=(tmp_path, life))
        process.start()
        while not any(b'"life":%d,' % life in text for text in read_lines(tmp_path / "flights.jsonl")):
            process.join(0.01)
        process.join(0.05 + life % 7 * 0.013)
        process.kill()
        process.join()
    make().flush()
    lives = {}
    for path in files(tmp_path, "flights"):
        for text in read_lines(path):
            record = orjson.loads(text)
            lives.setdefault(record["life"], []).append(record["i"])
    assert sorted(lives) == list(range(kills))
    assert all(found == list(range(len(found))) for found in lives.values())
    assert not [name for name in names(tmp_path) if name.startswith(".")]


# --- fork ------------------------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
may_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


@contextlib.contextmanager
def child(action):
    """Run `action` in a forked child (killed if it hangs) while the block runs; it must succeed."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            signal.alarm(60)
            action()
            os._exit(0)
        os._exit(1)
    try:
        yield pid
    finally:
        _, status = os.waitpid(pid, 0)
    assert status == 0


@needs_fork
@may_fork
def test_a_forked_child_gets_a_file_of_its_own(make, tmp_path):
    """Parent and child never write to one file; the parent's goes on as before."""
    sink = make()
    sink.write(line(1))
    with child(lambda: sink.write(line(2)) and sink.close()) as pid:
        pass
    sink.write(line(3))
    assert (tmp_path / "flights.jsonl").read_bytes() == line(1) + line(3)
    assert (tmp_path / f"flights.{pid}.jsonl").read_bytes() == line(2)


@needs_fork
@may_fork
def test_a_forked_child_can_rotate(make, tmp_path):
    """Its compression thread is its own."""
    sink = make()
    sink.write(line(1))
    sink.rotate()
    with child(lambda: (sink.write(line(2)), sink.rotate(), sink.flush())):
        pass
    sink.flush()
    assert [name for name in names(tmp_path) if name.endswith(".gz")] == [
        "flights.000001.jsonl.gz",
        "flights.000002.jsonl.gz",
    ]
    assert sorted(numbers(tmp_path)) == [1, 2]


@needs_fork
@may_fork
def test_a_child_that_does_not_write_does_not_keep_the_file_locked(make, tmp_path):
    """The parent ends, the child lives: the next process gets the plain name."""
    sink, (reader, writer) = make(), os.pipe()
    with child(lambda: (os.close(writer), os.read(reader, 1))):
        sink.close()
        assert make().path == sink.path
        os.close(writer)
    os.close(reader)


@needs_fork
def test_a_child_that_outlives_its_parent_does_not_keep_the_file_locked(make, tmp_path):
    """A parent that is killed unlocks nothing itself, so its children must have let go at the fork."""
    code = "import os, sys; from otel_odibi.exporters.jsonl import JsonlSink; from pathlib import Path\n"
    code += "sink = JsonlSink(Path(sys.argv[1]), 'flights')\n"
    code += "if os.fork() == 0: print('ready', flush=True); sys.stdin.read(); os._exit(0)\n"
    code += "os._exit(0)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"ready\n"
        parent.wait()
        assert make().path.name == "flights.jsonl"


@needs_fork
@may_fork
def test_a_fork_while_another_thread_writes_does_not_hang(make, tmp_path, monkeypatch):
    """The child starts with a fresh lock, even if the old one was held by a thread that the child does not have."""
    sink, write = make(), os.write
    inside, goes_on = threading.Event(), threading.Event()

    def blocking(fd, data):
        if data == line(1):
            inside.set()
            goes_on.wait()
        return write(fd, data)

    monkeypatch.setattr(os, "write", blocking)
    thread = threading.Thread(target=sink.write, args=(line(1),))
    thread.start()
    inside.wait()
    with child(lambda: sink.write(line(2)) and sink.close()):
        pass
    goes_on.set()
    thread.join()
    assert sorted(numbers(tmp_path)) == [1, 2]


# --- all at once -----------------------------------------------------------------------------------------------------


def size_of(writer, number):
    """The bytes of text in a record: 1 to 64 kB, different from record to record."""
    return 1000 + (writer * 7919 + number * 104_729) % 63_000


def write_many(sink, writer, count):
    for number in range(count):
        size = size_of(writer, number)
        offset = number * 31 % (len(WORDS) - 64_000)
        assert sink.write(b'{"writer":%d,"i":%d,"text":"%b"}\n' % (writer, number, WORDS[offset : offset + size]))


def write_from_threads(directory, writers, count, **options):
    """Write `count` records from each of some threads through one sink."""
    sink = JsonlSink(directory, "flights", **options)
    threads = [threading.Thread(target=write_many, args=(sink, writer, count)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close(timeout=600)


def write_from_processes(directory, processes, count, **options):
    """The same from each of some processes, four threads in each."""
    spawn = multiprocessing.get_context("spawn")
    running = [
        spawn.Process(target=write_from_threads, args=(directory, range(4 * n, 4 * n + 4), count), kwargs=options)
        for n in range(processes)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * processes


def check_all_there(directory, writers, count):
    """Every record exactly once, every line valid JSON and of its full size; the segments are all compressed."""
    seen = [bytearray(count) for _ in range(writers)]
    paths = files(directory, "flights")
    for path in paths:
        for text in read_lines(path):
            record = orjson.loads(text)
            assert len(record["text"]) == size_of(record["writer"], record["i"])
            seen[record["writer"]][record["i"]] += 1
    assert seen == [bytearray(b"\1" * count)] * writers
    assert not [path.name for path in paths if re.search(r"\.0\d{5,}\.jsonl$", path.name)]
    return paths


STRESS = {"max_bytes": 2 * 2**20, "retention_bytes": 2**40}


def test_many_threads_with_rotation_under_way(tmp_path):
    """16 threads, records of 1 to 64 kB, dozens of rotations: every record there once."""
    write_from_threads(tmp_path, range(16), 200, **STRESS)
    assert len(check_all_there(tmp_path, 16, 200)) > 20


def test_many_processes_with_rotation_under_way(tmp_path):
    """The same from 4 processes on one directory."""
    write_from_processes(tmp_path, 4, 200, **STRESS)
    assert len(check_all_there(tmp_path, 16, 200)) > 20


@pytest.mark.faults
@pytest.mark.parametrize(
    "write",
    [
        lambda *a, **k: write_from_threads(a[0], range(16), *a[1:], **k),
        lambda *a, **k: write_from_processes(a[0], 4, *a[1:], **k),
    ],
    ids=["threads", "processes"],
)
def test_the_same_at_scale(tmp_path, write):
    """20,000 records a thread times ODIBI_TEST_SCALE."""
    count = max(1, round(20_000 * SCALE))
    write(tmp_path, count, **STRESS)
    check_all_there(tmp_path, 16, count)


@pytest.mark.faults
def test_a_full_disk_and_its_end(tmp_path, drops):
    """On a filesystem of 1 MB: what is written is whole, what is dropped is counted, and writing resumes with space."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "odibi-test", str(tmp_path)], check=True)
    try:
        sink, written = JsonlSink(tmp_path, "flights", max_bytes=300_000, on_drop=drops.on_drop), []
        (tmp_path / "filler").write_bytes(b"x" * 400_000)
        written += [number for number in range(2000) if sink.write(_incompressible(number))]
        assert drops == {"disk_full": 2000 - len(written)}
        assert drops["disk_full"] > 0
        (tmp_path / "filler").unlink()
        written += [number for number in range(2000, 2020) if sink.write(_incompressible(number))]
        sink.close()
        assert written[-20:] == list(range(2000, 2020))
        assert numbers(tmp_path) == written
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b'{"i":1}\n{"i":2}\n', [b'{"i":1}\n', b'{"i":2}\n']),
        (b'{"i":1}\n{"i":2}', [b'{"i":1}\n', b'{"i":2}\n']),
        (b'{"i":1}\n{"i":2, "mess', [b'{"i":1}\n']),
        (b'{"i":1}\n12', [b'{"i":1}\n']),
        (b'{"i":1}\n\0\0\0\0', [b'{"i":1}\n']),
        (b'{"i":1}\n{"torn\n{"i":3}\n', [b'{"i":1}\n', b'{"torn\n', b'{"i":3}\n']),
    ],
)
def test_a_last_line_without_newline_is_read_if_it_is_complete(tmp_path, content, expected):
    """The same for plain and compressed files."""
    (tmp_path / "plain.jsonl").write_bytes(content)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(content))
    assert list(read_lines(tmp_path / "plain.jsonl")) == expected
    assert list(read_lines(tmp_path / "packed.jsonl.gz")) == expected


@given(cut=st.integers(0, 3000), flip=st.integers(0, 3000))
def test_a_damaged_compressed_file_gives_what_it_can(cut, flip):
    """Cut off or altered anywhere: no exception, and the lines read before the damage are right."""
    original = [_plain_line(number) for number in range(100)]
    packed = gzip.compress(b"".join(original), mtime=0)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "flights.000001.jsonl.gz"
        path.write_bytes(packed[:cut])
        found = list(read_lines(path))
        assert found == original[: len(found)]
        damaged = bytearray(packed)
        damaged[flip % len(packed)] ^= 0x55
        path.write_bytes(damaged)
        list(read_lines(path))


def _plain_line(number):
    return line(number, text=f"{number * 104_729 % 7919:x}" * 5)


def test_a_long_compressed_file_cut_short_gives_most_of_itself(tmp_path):
    """What lies well before the damage is all there."""
    original = [_plain_line(number) for number in range(50_000)]
    packed = gzip.compress(b"".join(original))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    found = list(read_lines(tmp_path / "a.jsonl.gz"))
    assert found == original[: len(found)]
    assert len(found) > 20_000


def test_a_segment_compressed_since_it_was_listed_is_found(tmp_path, monkeypatch):
    """A reader that holds the plain name reads the compressed file, and `files` itself may be the reader."""
    packed = tmp_path / "flights.000001.jsonl.gz"
    packed.write_bytes(gzip.compress(line(1)))
    assert list(read_lines(tmp_path / "flights.000001.jsonl")) == [line(1)]
    monkeypatch.setattr(os, "listdir", lambda path: ["flights.000001.jsonl"])
    assert files(tmp_path, "flights") == [packed]


@pytest.mark.parametrize("path", ["missing.jsonl", "missing.jsonl.gz", "", "nul\0.jsonl"])
def test_what_cannot_be_read_is_empty(tmp_path, path):
    """A missing file, a directory, an impossible name: no lines, no exception."""
    assert list(read_lines(tmp_path / path)) == []
    assert files(tmp_path / path / "x") == []


# --- names -----------------------------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(codec=None), max_size=400)
TRICKY = st.one_of(
    ANY_TEXT,
    st.text("./%~-0123456789\0aA", max_size=12),
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "../../etc/passwd",
            "a" * 300,
            "flights.12",
            "flights.000001",
            "a.12-3",
            "con",
            "NUL.x",
            "\ud800",
        ]
    ),
)


@given(TRICKY)
def test_any_name_becomes_a_short_plain_file_name(name):
    """Not hidden, no separator, ASCII, room for what is added to it within 143 bytes (the least limit in use)."""
    safe = safe_name(name)
    assert re.fullmatch(r"[\w~%-][\w.~%-]*", safe, re.ASCII)
    assert len(f".{safe}.0123456.jsonl.gz.tmp") <= 147
    assert len(f"{safe}.4194304.jsonl") <= 143


@given(TRICKY, TRICKY)
def test_different_names_have_different_files(one, other):
    """No two services share a file, and none sees the other's as its own."""
    assert (safe_name(one) == safe_name(other)) == (one == other)
    found = segments.parse(
        [
            f"{safe_name(other)}{part}"
            for part in (".jsonl", ".12.jsonl", ".12-3.jsonl", ".000001.jsonl", ".000001.jsonl.gz")
        ],
        segments.pattern(".jsonl", one),
    )
    assert len(found) == (5 if one == other else 0)


@pytest.mark.parametrize("name", ["flights", "my-service", "my.service", "v1.2b", "A_b~c"])
def test_ordinary_names_stay_as_they_are(name):
    """Nobody has to look for their file."""
    assert safe_name(name) == name


@pytest.mark.parametrize("name", ["../x", "a/b", "nul\0", "é" * 300, "\ud800", "", "..", "flights.12", "x" * 1024])
def test_a_sink_of_any_name_works(make, tmp_path, name):
    """Whatever the service is called, its records are in the directory and found under its name."""
    sink = make(name=name, max_bytes=10)
    assert sink.path.parent == tmp_path
    for number in range(3):
        assert sink.write(line(number))
    sink.flush()
    assert numbers(tmp_path, name) == [0, 1, 2]
    assert len(files(tmp_path)) == 3


def test_a_process_id_is_never_taken_for_a_segment_number(make, tmp_path):
    """Six digits or more may be either: a segment's number starts with 0."""
    (tmp_path / "flights.123456.jsonl").write_bytes(line(2))
    (tmp_path / "flights.000001.jsonl").write_bytes(line(1))
    held = segments.acquire(tmp_path / "flights.123456.jsonl", os.O_RDWR)
    sink = make(retention_bytes=1)
    sink.flush()
    assert names(tmp_path) == ["flights.123456.jsonl", "flights.jsonl"]
    segments.release(held)


def test_files_of_a_service_come_oldest_first(tmp_path):
    """Segments by number, however many digits; then the active files, those idle longest first."""
    expected = [
        "flights.000002.jsonl.gz", "flights.000010.jsonl", "flights.099999.jsonl.gz", "flights.0100000.jsonl.gz",
        "flights.88.jsonl", "flights.jsonl", "flights.77-2.jsonl",
    ]  # fmt: skip
    for age, name in enumerate(expected):
        (tmp_path / name).write_bytes(line(1))
        os.utime(tmp_path / name, (age, age))
    for name in ("flights.x.jsonl", "flights.x.000001.jsonl.gz", "flights.jsonl.gz", "flights.12.jsonl.gz"):
        (tmp_path / name).write_bytes(line(1))
    assert [path.name for path in files(tmp_path, "flights")] == expected
    assert [path.name for path in files(tmp_path, "flights.x")] == ["flights.x.000001.jsonl.gz", "flights.x.jsonl"]
    assert [path.name for path in files(tmp_path)] == [*expected, "flights.x.000001.jsonl.gz", "flights.x.jsonl"]


OTHER_FILES = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20),
        st.from_regex(r"\.?(flights|other)(\.[0-9x-]{1,8})?\.jsonl(\.gz|\.tmp|\.1)?", fullmatch=True),
    ).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200),
    max_size=10,
    unique=True,
)


@given(OTHER_FILES)
def test_foreign_files_are_never_listed_or_touched(others):
    """Whatever else lies in the directory, `files` lists only what a sink writes, and a sink leaves the rest alone."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for other in others:
            (directory / other).write_bytes(b"foreign")
        listed = {path.name for path in files(directory)}
        own = r"(?!\.)[\w.~%-]+?(\.[1-9]\d*(-\d+)?|\.0\d{5,})?\.jsonl|(?!\.)[\w.~%-]+?\.0\d{5,}\.jsonl\.gz"
        assert all(re.fullmatch(own, entry, re.ASCII) for entry in listed)
        flights = {path.name for path in files(directory, "flights")}
        assert flights <= listed
        sink = JsonlSink(directory, "flights", retention_bytes=1)
        sink.rotate()
        sink.close()
        left = set(os.listdir(directory))
        assert {other for other in others if other not in flights} <= left
