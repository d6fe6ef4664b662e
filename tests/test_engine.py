"""What integrations are made of: advice around an engine's functions, which changes nothing of what they do."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import pickle
import sys
import traceback
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

import otel_odibi as oo
from otel_odibi import runtime
from otel_odibi.integrations.engine import Engine, Runs, Ticket, ask, begin, end, engine_of, take
from otel_odibi.testing import capture, untouched


class Base:
    def inherited(self, x):
        return self, x


class Runner(Base):
    """A made-up engine."""

    def run(self, x, *, fail=None):
        """Run."""
        if fail is not None:
            raise fail
        return x

    async def run_later(self, x):
        await asyncio.sleep(0)
        return x

    @staticmethod
    def static(x):
        return x

    @classmethod
    def made(cls, x):
        return cls, x


@pytest.fixture
def acme():
    """A package of one module, `acme`, with the engine's class and a function."""
    module = types.ModuleType("acme")
    module.Runner = type("Runner", (Runner,), {**vars(Runner), "__module__": "acme"})
    module.run = lambda x: x
    sys.modules["acme"] = module
    yield module
    del sys.modules["acme"]


@pytest.fixture
def instrument(acme):
    """Instrument the engine by what is given; all of it is put back at the end."""
    undo = []

    def instrument(*changes):
        kind = type("AcmeInstrumentor", (Engine,), {"install": lambda self: [change(self) for change in changes]})
        kind().instrument()
        undo.append(kind().uninstrument)
        return kind()

    with untouched("acme"):
        yield instrument
        for uninstrument in undo:
            uninstrument()


def recorded(calls):
    """Return advice that notes what it is given and gets."""

    def advice(*args, **kwargs):
        try:
            calls.append((args, kwargs, (yield)))
        except BaseException as exc:
            calls.append((args, kwargs, exc))
            raise

    return advice


def test_advice_sees_arguments_and_result(acme, instrument):
    """The function itself looks as before."""
    calls = []
    instrument(lambda engine: engine.around(acme.Runner, "run", recorded(calls)))
    with capture():
        runner = acme.Runner()
        assert runner.run(1) == 1
    assert calls == [((runner, 1), {}, 1)]
    assert (runner.run.__name__, runner.run.__doc__) == ("run", "Run.")
    assert inspect.signature(runner.run) == inspect.signature(Runner().run)


@pytest.mark.parametrize(
    ("name", "result"),
    [("static", lambda kind: 1), ("made", lambda kind: (kind, 1)), ("inherited", lambda kind: (None, 1))],
)
def test_static_class_and_inherited_methods(acme, instrument, name, result):
    """Stay what they are; an inherited one is put on the class alone, not on its base."""
    calls = []
    instrument(lambda engine: engine.around(acme.Runner, name, recorded(calls)))
    with capture():
        assert getattr(acme.Runner, name)(*([None] if name == "inherited" else []), 1) == result(acme.Runner)
        assert len(calls) == 1
        Base().inherited(1)
    assert len(calls) == 1


def test_functions_of_modules(acme, instrument):
    """By the name they are looked up by."""
    calls = []
    instrument(lambda engine: engine.around(acme, "run", recorded(calls)))
    with capture():
        assert acme.run(3) == 3
    assert calls == [((3,), {}, 3)]


def test_coroutine_functions_stay_coroutine_functions(acme, instrument):
    """Their advice ends when the coroutine does."""

    def advice(runner, x):
        with oo.node("later") as node:
            node.output((yield))

    instrument(lambda engine: engine.around(acme.Runner, "run_later", advice))
    assert inspect.iscoroutinefunction(acme.Runner.run_later)
    with capture() as captured:
        assert asyncio.run(acme.Runner().run_later([1, 2])) == [1, 2]
    assert captured.node("later").attributes["odibi.node.rows.out"] == 2


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), GeneratorExit(), StopIteration()]
)
def test_exceptions_are_untouched(acme, instrument, error):
    """The very object, its traceback but for the one frame of ours, its cause and its context."""

    def raised_by(runner):
        try:
            runner.run(1, fail=error)
        except BaseException as exc:
            frames = [frame.name for frame in traceback.extract_tb(exc.__traceback__)]
            found = exc, frames, exc.__cause__, exc.__context__
            exc.__traceback__ = None
            return found

    instrument(lambda engine: engine.around(acme.Runner, "run", recorded([])))
    expected = raised_by(Runner())
    with capture() as captured:
        found = raised_by(acme.Runner())
    assert captured.metric("odibi.telemetry.dropped") == 0
    assert found[0] is expected[0]
    assert [frame for frame in found[1] if frame != "advised"] == expected[1]
    assert found[2:] == expected[2:]


def test_advice_may_use_the_exception(acme, instrument):
    """As any `with` statement does."""

    def advice(runner, x, fail=None):
        with oo.node("n"):
            yield

    instrument(lambda engine: engine.around(acme.Runner, "run", advice))
    with capture() as captured, pytest.raises(ValueError, match="bad"):
        acme.Runner().run(1, fail=ValueError("bad"))
    assert captured.node("n").attributes["error.type"] == "ValueError"


def before(*_, **__):
    raise LookupError("before")
    yield


def after(*_, **__):
    yield
    raise LookupError("after")


def swallows(*_, **__):
    with contextlib.suppress(ValueError):
        yield


def replaces(*_, **__):
    try:
        yield
    except ValueError:
        raise LookupError("instead") from None


def indifferent(*_, **__):
    return
    yield


@pytest.mark.parametrize("advice", [before, after, swallows, replaces, indifferent])
def test_advice_that_fails_is_not_noticed(acme, instrument, advice):
    """Result and exception are the function's own; what our side raises is counted."""
    instrument(lambda engine: engine.around(acme.Runner, "run", advice))
    with capture() as captured:
        assert acme.Runner().run(1) == 1
        mistake = ValueError("bad")
        with pytest.raises(ValueError, match="bad") as raised:
            acme.Runner().run(1, fail=mistake)
        assert raised.value is mistake
        dropped = captured.metric("odibi.telemetry.dropped")
    assert dropped == {before: 2, after: 1, swallows: 0, replaces: 1, indifferent: 0}[advice]


def test_nothing_is_asked_where_nothing_is_configured(acme, instrument):
    """A call costs one look."""
    calls = []
    instrument(lambda engine: engine.around(acme.Runner, "run", recorded(calls)))
    assert runtime.configured() is None
    assert acme.Runner().run(1) == 1
    assert calls == []


def test_an_install_that_fails_half_way_is_put_back(acme, instrument, caplog):
    """With one warning; the program goes on."""
    with untouched("acme"):
        instrument(
            lambda engine: engine.around(acme.Runner, "run", recorded([])),
            lambda engine: engine.around(acme.Runner, "renamed", recorded([])),
        )
    assert acme.Runner.run is vars(acme.Runner)["run"]
    assert [record.getMessage() for record in caplog.records if record.name == "otel_odibi"] == [
        "AcmeInstrumentor: this release of the engine cannot be instrumented: AttributeError('renamed')"
    ]


def test_what_is_put_back_is_byte_for_byte(acme, instrument):
    """In the reverse order, with whatever else an integration has to undo."""
    undone = []
    engine = instrument(
        lambda engine: engine.around(acme.Runner, "run", recorded([])),
        lambda engine: engine.around(acme.Runner, "run", recorded([])),
        lambda engine: engine.replace(acme.Runner, "inherited", lambda fn: lambda *args: 0),
        lambda engine: engine.undo(lambda: undone.append(acme.Runner().inherited(1))),
    )
    engine.undo(lambda: undone.append(1 / 0))  # which keeps nothing else from being put back
    engine.uninstrument()
    assert undone == [0]
    assert "inherited" not in vars(acme.Runner)
    engine.instrument()


def test_a_part_of_an_engine_is_instrumented_when_it_is_imported(acme, instrument, tmp_path, monkeypatch):
    """Nothing is imported for it, and nothing happens to it once the instrumentation is gone."""
    monkeypatch.syspath_prepend(tmp_path)
    changed = []
    for name in ("acme_early", "acme_late"):
        (tmp_path / f"{name}.py").write_text("")
    engine = instrument(
        lambda engine: engine.when_imported("acme", lambda: changed.append("acme")),
        lambda engine: engine.when_imported("acme_early", lambda: changed.append("early")),
        lambda engine: engine.when_imported("acme_late", lambda: changed.append("late")),
    )
    assert changed == ["acme"]
    assert "acme_early" not in sys.modules
    __import__("acme_early")
    assert changed == ["acme", "early"]
    engine.uninstrument()
    __import__("acme_late")
    assert changed == ["acme", "early"]
    engine.instrument()


def test_hooks_before_and_after_are_advice_in_two_parts():
    """For engines that call something of yours rather than let themselves be wrapped."""

    def advice(name):
        with oo.node(name) as node:
            node.output((yield))

    with capture() as captured:
        end(begin(advice, "fine"), [1, 2, 3])
        end(begin(advice, "failed"), error=ValueError("x"))
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            end(begin(advice, "stopped"))
        end(begin(before, "x"))
    outcomes = [(span.name, span.attributes["odibi.node.outcome"]) for span in captured.spans]
    assert outcomes == [("node fine", "success"), ("node failed", "failure"), ("node stopped", "cancelled")]


def test_a_ticket_is_the_run_in_threads_and_its_parcel_elsewhere():
    """Nodes of both are children of the run."""
    with capture() as captured:
        with oo.pipeline("daily") as run:
            ticket = Ticket(run)

        def work(ticket):
            with ticket.inside(), oo.node("part"):
                assert oo.current_pipeline().run_id == run.run_id
                return oo.current_pipeline()

        elsewhere = pickle.loads(pickle.dumps(ticket))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(work, ticket).result() is run
            assert pool.submit(work, elsewhere).result() is not run
            pool.submit(work, pickle.loads(pickle.dumps(elsewhere))).result()
    parts = [span for span in captured.spans if span.name == "node part"]
    assert [span.parent.span_id for span in parts] == 3 * [captured.pipeline("daily").context.span_id]


def test_a_run_is_found_by_an_object_of_the_engine():
    """In a thread where no run is current, or another one, but never after it has ended."""
    runs, flow = Runs(), object()

    def work():
        with runs.join(flow) as note, oo.node("part"):
            return note, oo.current_pipeline()

    with capture() as captured, ThreadPoolExecutor(1) as pool:
        with oo.pipeline("daily") as run, runs.hold(flow, run, "silver"), oo.node("group"):
            assert work() == ("silver", run)
            assert pool.submit(work).result() == ("silver", run)
            with oo.pipeline("another"):
                assert work() == ("silver", run)
        assert pool.submit(work).result()[0] is None
    parents = [span.parent and span.parent.span_id for span in captured.spans if span.name == "node part"]
    daily = captured.pipeline("daily").context.span_id
    assert parents == [captured.node("group").context.span_id, daily, daily, None]


def test_an_object_may_be_run_twice_at_once():
    """What joins it belongs to the run that began last, and nothing is held in the end."""
    runs, flow = Runs(), object()
    with capture(), contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(runs.hold(flow, first.enter_context(oo.pipeline("first"))))
        second.enter_context(runs.hold(flow, second.enter_context(oo.pipeline("second")), "second"))
        first.close()
        with runs.join(flow) as note:
            assert note == "second"
        second.close()
        with runs.join(flow) as note:
            assert note is None


def test_inputs_are_counted_without_a_look_for_their_producers():
    """As an engine that knows its graph tells them itself."""
    rows = {1, 2, 3}
    with capture() as captured:
        with oo.node("first") as first:
            first.output(rows)
        with oo.node("second") as second:
            take(second, [rows, [4]])
    second = captured.node("second")
    assert second.attributes["odibi.node.rows.in"] == 4
    assert not second.links


def test_a_question_that_raises_has_no_answer():
    """It is counted; an engine's objects may be of another shape than expected."""
    with capture() as captured:
        assert ask(int, "3") == 3
        assert ask(int, "x") is None
        assert ask(int, "x", default=0) == 0
        assert captured.metric("odibi.telemetry.dropped") == 2
    assert ask(int, "x") is None


def test_the_engine_of_a_type_is_its_library():
    """Where that is one of tables."""
    frame = type("DataFrame", (), {"__module__": "pandas.core.frame"})
    assert [engine_of(kind) for kind in (frame, int, "pd.DataFrame", None, list[int])] == ["pandas", "", "", "", ""]
