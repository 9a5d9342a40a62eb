"""Which alerts fired during a soak, which of them reached the webhook, and which should have.

Prometheus keeps every alert's state as the series ALERTS; asking for it afterwards takes nothing from what is measured. Alertmanager sends
what it tells people to `Webhook`, which notes when. Where the stack has no Prometheus nothing is said, and the report says that.
"""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

from deploy.soak.plan import KINDS, Happened

STEP_S = 5
QUERY_TIMEOUT_S = 20.0
# Alertmanager waits a little for more of a group before it tells.
TELLING_S = 60.0
QUERY = 'ALERTS{alertstate="firing"}'


class AlertsUnknownError(RuntimeError):
    """Prometheus doesn't say. The message says why."""


@dataclass(frozen=True)
class Firing:
    """An alert that fired, in seconds of the measured time. `what` are its labels but for the name, as text."""

    name: str
    what: str
    begin_s: float
    end_s: float


class _Series(msgspec.Struct):
    metric: dict[str, str]
    values: list[tuple[float, str]]


class _Data(msgspec.Struct):
    result: list[_Series]


class _Reply(msgspec.Struct):
    data: _Data


@dataclass(frozen=True)
class Told:
    """An alert that reached the webhook, in seconds since the epoch."""

    name: str
    at_s: float


class _Message(msgspec.Struct):
    status: str
    labels: dict[str, str]


class _Messages(msgspec.Struct):
    alerts: list[_Message]


BODY_BYTES_MAX = 1_000_000
TOLD_MAX = 10_000


class Webhook:
    """Listens on loopback, from `start` to `close`, and notes what Alertmanager sends."""

    def __init__(self) -> None:
        self.told: list[Told] = []
        told = self.told

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                status = 400
                if 0 < size <= BODY_BYTES_MAX:
                    with contextlib.suppress(msgspec.DecodeError):
                        found = msgspec.json.decode(self.rfile.read(size), type=_Messages)
                        now_s = time.time()
                        new = [Told(a.labels.get("alertname", ""), now_s) for a in found.alerts if a.status == "firing"]
                        told.extend(new[: TOLD_MAX - len(told)])
                        status = 200
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Nothing: the report tells."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="webhook", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


def firings(prometheus_url: str, begin_s: float, end_s: float) -> list[Firing]:
    """Between two times (seconds since the epoch). Times of what is returned count from `begin_s`. Raises `AlertsUnknownError`."""
    query = urllib.parse.urlencode({"query": QUERY, "start": begin_s, "end": end_s, "step": STEP_S})
    try:
        with urllib.request.urlopen(f"{prometheus_url}/api/v1/query_range?{query}", timeout=QUERY_TIMEOUT_S) as reply:  # noqa: S310
            found = msgspec.json.decode(reply.read(), type=_Reply)
    except (OSError, msgspec.DecodeError) as exc:
        raise AlertsUnknownError(f"{prometheus_url} doesn't tell of alerts: {exc}") from exc
    return [f for series in found.data.result for f in stretches(series.metric, [at - begin_s for at, _ in series.values])]


def stretches(labels: dict[str, str], at_s: Sequence[float]) -> list[Firing]:
    """One for each stretch of samples that follow each other without a gap."""
    name = labels.get("alertname", "")
    what = " ".join(f"{k}={v}" for k, v in sorted(labels.items()) if k not in ("alertname", "alertstate", "__name__"))
    out: list[Firing] = []
    for at in at_s:
        if out and at - out[-1].end_s <= 2 * STEP_S:
            out[-1] = Firing(name, what, out[-1].begin_s, at)
        else:
            out.append(Firing(name, what, at, at))
    return out


def missing(happened: Sequence[Happened], fired: Sequence[Firing], told: Sequence[Told], began_s: float) -> list[str]:
    """Complaints: alerts that a fault should have set off, which lasted long enough, and that didn't fire in its window or told nobody.

    `began_s` is when the measured time began, in seconds since the epoch.
    """
    found = []
    for fault in happened:
        kind = KINDS[fault.kind]
        begin_s, end_s = fault.window
        if fault.error or fault.end_s - fault.begin_s < kind.alert_after_s:
            continue
        for name in kind.alerts:
            if not any(f.name == name and f.begin_s <= end_s and f.end_s >= begin_s for f in fired):
                found.append(f"{name} should have fired during {fault.kind} at {begin_s:.0f} s and didn't")
            elif not any(t.name == name and begin_s <= t.at_s - began_s <= end_s + TELLING_S for t in told):
                found.append(f"{name} fired during {fault.kind} at {begin_s:.0f} s and nobody was told")
    return found
