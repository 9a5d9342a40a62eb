"""The local HAProxy before the two gateways: its configuration, and what it is told and asked over its admin socket.

It repeats a request at the other gateway when the connection to one fails, ends without an answer or brings a 500. That repeats a POST,
which is right only because /score is idempotent by transaction_id: nothing but /score and GET is repeated.
"""

from __future__ import annotations

import csv
import resource
import socket
from dataclasses import dataclass
from pathlib import Path

from deploy.rollout.state import BLUE, SLOTS, RolloutError, State, port_of
from gateway.contracts.settings import CONSOLE_GUARDED, Settings

BACKEND = "gateways"
# As in gateway.http.door, which would load the whole gateway.
SCORE_PATH = "/score"
ADMIN_TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 1_048_576
# sun_path holds 108, and HAProxy appends a process id and a suffix while it binds.
SOCKET_PATH_MAX = 90
# One is judged down 1.5 s after it stopped answering. A gateway that is merely busy answers its check late, which is no reason.
CHECK_INTERVAL_MS, CHECK_FALLS, CHECK_RISES, CHECK_TIMEOUT_MS = 500, 3, 1, 5000
# A whole request of the largest body that is taken fits, and so can be repeated.
BUFFER_BYTES = 65_536
RETRIES = 3
CONNECT_TIMEOUT_MS = 1000
# Each connection takes two files, one at either side; listeners, checks and the log take some.
FILES_ASIDE = 256
# HAProxy's words for what a server may be told.
READY, DRAIN, MAINT = "ready", "drain", "maint"


@dataclass(frozen=True)
class ServerStat:
    """One line of `show stat`. `requests` and the others count since the proxy started; `sessions` are requests under way.

    `failed` are answers of 5xx, connections that failed and answers that broke off, as callers saw them. What was repeated elsewhere
    instead is in `repeated` of the server that failed. `status` is HAProxy's, for instance UP, DOWN, DRAIN, MAINT, no check.
    """

    status: str
    sessions: int
    requests: int
    failed: int
    repeated: int

    @property
    def up(self) -> bool:
        return self.status.startswith("UP")


def socket_path(settings: Settings) -> Path:
    return settings.home_path / "run/proxy.sock"


def connections_max(settings: Settings, files_max: int) -> int:
    """As many as a gateway takes, or as the process may have open files for: HAProxy doesn't start with more."""
    if files_max == resource.RLIM_INFINITY:
        return settings.connections_max
    return max(1, min(settings.connections_max, (files_max - FILES_ASIDE) // 2))


def configuration(settings: Settings, state: State | None) -> str:
    """The file for a start: the place that has the traffic is checked, the other is out until a deploy puts it in."""
    active = BLUE if state is None else state.active
    servers = "".join(
        f"    server {slot} {settings.host}:{port_of(settings, slot)} check{'' if slot == active else ' disabled'}\n"
        for slot in SLOTS
    )
    return f"""\
# Written by fraudgate each time the proxy starts.
global
    stats socket {socket_path(settings)} mode 600 level admin
    nbthread 1
    maxconn {connections_max(settings, resource.getrlimit(resource.RLIMIT_NOFILE)[1])}
    hard-stop-after 30s
    tune.bufsize {BUFFER_BYTES}

defaults
    mode http
    option http-keep-alive
    # A connection that was opened ahead and never used is closed, and not told 408, which its caller would take for its next answer.
    option http-ignore-probes
    option redispatch 1
    retries {RETRIES}
    retry-on conn-failure empty-response junk-response 500
    timeout connect {CONNECT_TIMEOUT_MS}ms
    timeout client {settings.keep_alive_s}s
    timeout http-keep-alive {settings.keep_alive_s}s
    timeout http-request {settings.request_timeout_ms}ms
    timeout server {settings.keep_alive_s}s
    timeout check {CHECK_TIMEOUT_MS}ms

frontend payments
    bind {settings.host}:{settings.proxy_port}
{_guard(settings)}    default_backend {BACKEND}

backend {BACKEND}
    balance roundrobin
    http-reuse always
    http-request disable-l7-retry unless {{ path {SCORE_PATH} }} || {{ method GET }}
    option httpchk GET /readyz
    http-check expect status 200
    default-server weight 100 inter {CHECK_INTERVAL_MS}ms fall {CHECK_FALLS} rise {CHECK_RISES}
{servers}"""


def _guard(settings: Settings) -> str:
    """Without API keys the console is for this machine alone, and to a gateway behind the proxy everybody is of this machine."""
    if settings.api_keys_path or settings.console_access != CONSOLE_GUARDED:
        return ""
    return "    http-request deny if { path_beg /console } !{ src 127.0.0.0/8 ::1 }\n"


class Proxy:
    """The running proxy, by its admin socket. Each method raises `RolloutError` when it doesn't answer or refuses."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def answers(self) -> bool:
        try:
            return bool(self._ask("show info"))
        except RolloutError:
            return False

    def stats(self) -> dict[str, ServerStat]:
        """By place."""
        text = self._ask("show stat")
        rows = csv.DictReader(text.removeprefix("# ").splitlines())
        return {row["svname"]: server_stat(row) for row in rows if row["pxname"] == BACKEND and row["svname"] in SLOTS}

    def set_state(self, slot: str, state: str) -> None:
        """`state` is READY, DRAIN or MAINT. A server that is made ready is checked from then on."""
        if state == READY:
            self._tell(f"enable health {BACKEND}/{slot}")
        self._tell(f"set server {BACKEND}/{slot} state {state}")

    def set_weight(self, slot: str, percent: int) -> None:
        self._tell(f"set server {BACKEND}/{slot} weight {percent}%")

    def _tell(self, command: str) -> None:
        refusal = self._ask(command).strip()
        if refusal:
            raise RolloutError(f"the proxy refused {command!r}: {refusal}")

    def _ask(self, command: str) -> str:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(ADMIN_TIMEOUT_S)
                connection.connect(str(self._path))
                connection.sendall(command.encode() + b"\n")
                answer = b""
                while chunk := connection.recv(65_536):
                    answer += chunk
                    if len(answer) > ANSWER_BYTES_MAX:
                        raise RolloutError(f"the proxy's answer to {command!r} has no end")
        except OSError as exc:
            raise RolloutError(f"the proxy's admin socket {self._path} doesn't answer: {exc}") from exc
        return answer.decode(errors="replace")


def server_stat(row: dict[str, str]) -> ServerStat:
    """Of a line of `show stat`, where an empty field is a 0."""

    def number(*names: str) -> int:
        return sum(int(row.get(name) or 0) for name in names)

    return ServerStat(
        status=row["status"],
        sessions=number("scur"),
        requests=number("stot"),
        failed=number("hrsp_5xx", "econ", "eresp"),
        repeated=number("wretr"),
    )
