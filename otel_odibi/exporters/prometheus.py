"""The Prometheus endpoint: a metric reader that collects when it is scraped, over HTTP, in text or OpenMetrics.

The official reader (opentelemetry-exporter-prometheus) is not subclassed: its collector, with its own queue, is what is
to be replaced, and it registers with the process-wide registry. See `translate` for the rest.
"""

from __future__ import annotations

import errno
import io
import os
import socketserver
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from socket import AF_INET6
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from opentelemetry.sdk.environment_variables import OTEL_EXPORTER_PROMETHEUS_HOST, OTEL_EXPORTER_PROMETHEUS_PORT
from opentelemetry.sdk.metrics.export import MetricReader, MetricsData
from prometheus_client import make_wsgi_app
from prometheus_client.core import Metric

from otel_odibi.errors import SettingError
from otel_odibi.exporters.families import Families, Losses, Source, expose
from otel_odibi.exporters.translate import families
from otel_odibi.forks import after_fork

__all__ = ["PrometheusReader", "expose", "families"]

PATH: Final = "/metrics"
_TEXT: Final = ("Content-Type", "text/plain; charset=utf-8")


class PrometheusReader(MetricReader):
    """Serves the metrics of a MeterProvider on `url`, for Prometheus to scrape. Thread-safe.

    `host` is OTEL_EXPORTER_PROMETHEUS_HOST by default, else 127.0.0.1; `port` is OTEL_EXPORTER_PROMETHEUS_PORT, else
    9464; port 0 takes a free one. Clients that ask for OpenMetrics get exemplars. A scrape takes at most `timeout`
    seconds: one that fails, or hangs in somebody's callback, is answered with 503; scrapes at the same time share one
    collection. `on_drop(reason, count)` is told what was left out. `among` puts what other processes count to what this
    one does: see `TextfileMetricExporter.among`. A forked child serves nothing: its parent goes on.

    Raises `SettingError` where it cannot listen there.
    """

    def __init__(
        self,
        host: str | None = None,
        port: int | None = None,
        *,
        timeout: float = 10.0,
        on_drop: Callable[[str, int], None] | None = None,
        among: Callable[[Families], Families] = lambda own: own,
    ) -> None:
        super().__init__()
        self._among = among
        self._timeout = timeout
        self._losses = Losses(on_drop)
        self._latest: MetricsData | None = None
        self._lock = threading.Lock()
        self._scrape: Future[list[Metric]] | None = None
        self._write = make_wsgi_app(Source(self._families))
        self._server: _Server | None = _listen(host, port)
        self._server.set_app(self._app)
        self.url = f"http://{reachable(self._server.server_name)}:{self._server.server_port}{PATH}"
        serve = partial(self._server.serve_forever, 0.1)  # polls often, as shutdown waits for the next poll
        self._thread = threading.Thread(target=serve, name="otel_odibi-prometheus", daemon=True)
        self._thread.start()
        after_fork(self._forked)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Close the port and end the thread. Idempotent; never raises."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self._thread.join(timeout_millis / 1000)

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        self._latest = metrics_data

    def _forked(self) -> None:
        """Let go of the parent's socket: left open here, it would outlive the parent and keep the port."""
        self._lock = threading.Lock()
        server, self._server = self._server, None
        if server is not None:
            server.socket.close()

    def _app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != PATH:
            start_response("404 Not Found", [_TEXT])
            return [f"the metrics are at {PATH}\n".encode()]
        environ["QUERY_STRING"] = ""  # name[]=... needs a registry that knows its names before it collects
        try:
            return self._write(environ, start_response)  # type: ignore[no-any-return]
        except Exception as exc:  # noqa: BLE001 - callbacks and views are other people's
            problem = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
            self._losses("scrape_failed", problem[:500], 1)
            start_response("503 Service Unavailable", [_TEXT])
            return [f"metrics could not be collected: {problem[:500]}\n".encode(errors="replace")]

    def _families(self) -> list[Metric]:
        """Return what is collected now, in a thread of its own: only so can a scrape end while a callback does not."""
        with self._lock:
            scrape = self._scrape
            if scrape is None or scrape.done():
                scrape = Future()
                threading.Thread(target=self._collect_into, args=(scrape,), daemon=True).start()
                self._scrape = scrape
        return scrape.result(self._timeout)

    def _collect_into(self, scrape: Future[list[Metric]]) -> None:
        try:
            self._latest = None
            self.collect(timeout_millis=self._timeout * 1000)
            found = self._latest
            scrape.set_result([] if found is None else families(found, lose=self._losses, among=self._among))
        except BaseException as exc:  # noqa: BLE001 - whoever waits must hear of it
            scrape.set_exception(exc)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere it lets two servers have one port
    allow_reuse_port = False

    def server_bind(self) -> None:
        """Bind without looking up the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away, or that sent nothing in time."""


class _Server6(_Server):
    address_family = AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds for a client to send its request

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log no access."""

    def get_stderr(self) -> io.StringIO:
        """Keep the server's own tracebacks from the console."""
        return io.StringIO()


def _listen(host: str | None, port: int | None) -> _Server:
    """Return a server that listens. Raises `SettingError`, which names the argument or the variable that is wrong."""
    host = host or os.environ.get(OTEL_EXPORTER_PROMETHEUS_HOST, "").strip() or "127.0.0.1"
    name = "prometheus_port" if port is not None else OTEL_EXPORTER_PROMETHEUS_PORT
    value = port if port is not None else os.environ.get(name, "").strip() or 9464
    try:
        return (_Server6 if ":" in host else _Server)((host, int(value)), _Handler)
    except (OSError, UnicodeError) as exc:
        problem, code = f"cannot listen there: {getattr(exc, 'strerror', None) or exc}", getattr(exc, "errno", None)
        if code in (errno.EADDRINUSE, errno.EACCES):
            raise SettingError(name, value, problem, "give another port; 0 takes a free one") from None
        raise SettingError("prometheus_host", host, problem, "give an address of this machine: 127.0.0.1") from None
    except (TypeError, ValueError, OverflowError):
        raise SettingError(name, value, "not a port", "give a number from 0 to 65535; 0 takes a free one") from None


def reachable(host: str) -> str:
    """Return the host to put into a URL: an address that stands for all is no address to call."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{host}]" if ":" in host else host
