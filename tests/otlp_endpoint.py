"""An OTLP endpoint for tests, over HTTP or gRPC, that does to each request what it is told to.

::

    with endpoint("grpc") as e:
        e.then(status("UNAVAILABLE"), CUT, HANG)    # to the next three requests; all others are accepted
        ...
        assert e.ids("traces") == [...]             # of everything that was accepted, in the order of arrival

`stop()` closes the port, `start()` opens the same again. What `HANG` holds goes on, unaccepted, at `stop()`.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

SERVICES = {
    "traces": ("Trace", trace_service_pb2, trace_service_pb2_grpc),
    "metrics": ("Metrics", metrics_service_pb2, metrics_service_pb2_grpc),
    "logs": ("Logs", logs_service_pb2, logs_service_pb2_grpc),
}
PROTOCOLS = ("grpc", "http/protobuf")


class Action(NamedTuple):
    """What is done to a request: `kind` is ok, status, cut, cut_answer or hang."""

    kind: str
    code: Any = None
    wait: float | None = None  # Retry-After, RetryInfo
    rejected: int = 0


OK, HANG = Action("ok"), Action("hang")
CUT = Action("cut")
"""Cut the connection before the request was read; over gRPC, which has no such thing, refuse it as UNAVAILABLE."""
CUT_ANSWER = Action("cut_answer")
"""Accept the request, then cut the connection in the middle of the answer, so that nobody knows."""


def status(code: int | str, wait: float | None = None) -> Action:
    """Refuse the request, by an HTTP status or a gRPC status name."""
    return Action("status", code, wait)


def partial(rejected: int) -> Action:
    """Accept the request but for its first items."""
    return Action("ok", rejected=rejected)


def items(signal: str, request: Any) -> list[Any]:
    """Return the spans, metrics or log records of a request."""
    names = {"traces": ("spans", "spans"), "metrics": ("metrics", "metrics"), "logs": ("logs", "log_records")}[signal]
    resources = getattr(request, f"resource_{names[0]}")
    return [i for r in resources for s in getattr(r, f"scope_{names[0]}") for i in getattr(s, names[1])]


class Endpoint:
    """What was received, and what is done next."""

    def __init__(self, protocol: str) -> None:
        self.protocol, self.default = protocol, OK
        self.requests: dict[str, list[Any]] = {signal: [] for signal in SERVICES}  # accepted
        self.headers: dict[str, list[dict[str, str]]] = {signal: [] for signal in SERVICES}
        self.accepted: dict[str, list[Any]] = {signal: [] for signal in SERVICES}
        self.attempts = 0
        self.unsure: set[int] = set()  # span ids of which the acknowledgement was cut
        self._next: deque[Action] = deque()
        self._lock = threading.Lock()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._stop: Any = None

    def then(self, *actions: Action) -> None:
        """Do these to the next requests, one each."""
        self._next.extend(actions)

    def ids(self) -> list[int]:
        """Return the ids of the accepted spans."""
        return [int.from_bytes(span.span_id, "big") for span in self.accepted["traces"]]

    def receive(self, signal: str, request: Any, headers: Any) -> Action:
        """Note a request, and say what to do to it."""
        with self._lock:
            self.attempts += 1
            action = self._next.popleft() if self._next else self.default
            self.headers[signal].append({key.lower(): value for key, value in headers})
            if action.kind in ("ok", "cut_answer"):
                self.requests[signal].append(request)
                taken = items(signal, request)[action.rejected :]
                self.accepted[signal] += taken
                if action.kind == "cut_answer":
                    self.unsure |= {int.from_bytes(span.span_id, "big") for span in taken}
            return action

    def answer(self, signal: str, action: Action) -> Any:
        """Return the response to an accepted request."""
        name, module, _ = SERVICES[signal]
        response = getattr(module, f"Export{name}ServiceResponse")()
        if action.rejected:
            setattr(response.partial_success, response.partial_success.DESCRIPTOR.fields[0].name, action.rejected)
        return response

    def start(self) -> None:
        """Open the port."""
        self._released = threading.Event()
        self._stop = (self._start_grpc if self.protocol == "grpc" else self._start_http)()

    def stop(self) -> None:
        """Close the port, and cut every connection."""
        stop, self._stop = self._stop, None
        if stop is not None:
            self._released.set()
            stop()

    def _start_http(self) -> Any:
        endpoint, released = self, self._released

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                signal = self.path.removeprefix("/v1/")
                name, module, _ = SERVICES[signal]
                length = int(self.headers["Content-Length"])
                upcoming = endpoint._next[0] if endpoint._next else endpoint.default
                body = self.rfile.read(length // 2 if upcoming is CUT else length)
                kind = getattr(module, f"Export{name}ServiceRequest")
                request = kind() if upcoming is CUT else kind.FromString(body)
                self.perform(signal, endpoint.receive(signal, request, self.headers.items()))

            def perform(self, signal: str, action: Action) -> None:
                self.close_connection = True
                if action.kind == "hang":
                    released.wait(60)
                if action.kind in ("hang", "cut"):
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                payload = b"" if action.kind == "status" else endpoint.answer(signal, action).SerializeToString()
                self.send_response(action.code or 200)
                if action.wait is not None:
                    self.send_header("Retry-After", str(action.wait))
                self.send_header("Content-Length", str(len(payload) + 10 * (action.kind == "cut_answer")))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop

    def _start_grpc(self) -> Any:
        pool = ThreadPoolExecutor(8)
        server = grpc.server(pool, options=(("grpc.so_reuseport", 0),))
        for signal, (name, _, module) in SERVICES.items():
            servicer = getattr(module, f"{name}ServiceServicer")()
            servicer.Export = functools.partial(self._export, signal, self._released)
            getattr(module, f"add_{name}ServiceServicer_to_server")(servicer, server)
        assert server.add_insecure_port(f"127.0.0.1:{self.port}") == self.port
        server.start()

        def stop() -> None:
            server.stop(None).wait()
            pool.shutdown()

        return stop

    def _export(self, signal: str, released: threading.Event, request: Any, context: Any) -> Any:
        action = self.receive(signal, request, context.invocation_metadata())
        if action.kind == "hang":
            released.wait(60)
        if action.kind in ("hang", "cut", "cut_answer"):
            context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        if action.kind == "status":
            if action.wait is not None:
                info, detail = RetryInfo(), AnyMessage()
                info.retry_delay.FromNanoseconds(int(action.wait * 1e9))
                detail.Pack(info)
                details = Status(code=8, details=[detail]).SerializeToString()
                context.set_trailing_metadata((("grpc-status-details-bin", details),))
            context.abort(grpc.StatusCode[action.code], "refused")
        return self.answer(signal, action)


@contextlib.contextmanager
def endpoint(protocol: str = "http/protobuf") -> Iterator[Endpoint]:
    """Serve OTLP on a free port of this machine."""
    made = Endpoint(protocol)
    made.start()
    try:
        yield made
    finally:
        made.stop()
