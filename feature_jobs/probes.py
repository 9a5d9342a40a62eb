"""The port of the feature jobs: `/metrics`, and `/healthz` and `/readyz` for whoever restarts them. Started by `fraudgate jobs`.

`/readyz` is 200 while every query runs. `/healthz` is 503 once the supervisor's loop has stood still for `STUCK_S`: then neither a failed
query is started anew nor is the process ended, and somebody else has to. Both cost microseconds; threads of their own answer them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse

# A look at everything takes a quarter of a second; a start of a query or a rebuild of Redis that it waits for may take minutes.
STUCK_S = 900.0
Report = Mapping[str, bool]


class Health:
    """Written by the supervisor's thread, read by those of the port."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._beat_s = clock_s()
        self._runs: dict[str, bool] = {}

    def beat(self, runs: Report) -> None:
        """Called at each look, with which queries run."""
        self._runs = dict(runs)
        self._beat_s = self._clock_s()

    @property
    def alive(self) -> bool:
        return self._clock_s() - self._beat_s < STUCK_S

    @property
    def ready(self) -> bool:
        """Not before the first look: Spark is still starting."""
        runs = self._runs
        return bool(runs) and all(runs.values()) and self.alive


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """A line for each scrape tells nobody anything."""


def serve(host: str, port: int, registry: CollectorRegistry, health: Health) -> WSGIServer:
    """Answer from now on, in threads of their own. Raises OSError when the port can't be had. End it by `shutdown`."""
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path not in ("/healthz", "/readyz"):
            found: Iterable[bytes] = metrics(environ, start_response)
            return found
        good = health.alive if path == "/healthz" else health.ready
        start_response("200 OK" if good else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if good else b"not ok\n"]

    server = make_server(host, port, answer, _Server, _Quiet)
    threading.Thread(target=server.serve_forever, name="jobs-port", daemon=True).start()
    return server
