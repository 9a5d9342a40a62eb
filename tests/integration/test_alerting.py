"""Real Prometheus and Alertmanager: every alert is seen firing and arriving at a webhook, and what follows from another is held back."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deploy.monitoring import config, rules
from deploy.monitoring.alerts import ALERTS, BY_NAME
from deploy.ports import free_ports
from deploy.stack import Stack
from gateway.contracts.metrics import SERIES
from gateway.contracts.settings import Settings
from tests.helpers import HOST, local_settings, wait_until
from tests.tools import needs_alertmanager, needs_prometheus

pytestmark = [needs_prometheus, needs_alertmanager]

WITHIN_S = 150
TOKEN = "token-of-the-pager"
# So much faster than in life do the windows of the rules pass here.
FASTER = 30
UNIT_S = {"m": 60, "h": 3600, "d": 86_400, "s": 1}


class Server:
    """Answers on loopback with what `answer` makes of method, path, headers and body."""

    def __init__(self, port: int, answer: Callable[[str, Any, bytes], bytes]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(b"")

            def do_POST(self) -> None:
                self._reply(self.rfile.read(int(self.headers["content-length"])))

            def _reply(self, body: bytes) -> None:
                said = answer(self.path, self.headers, body)
                # Who asked may have given up.
                with contextlib.suppress(ConnectionError):
                    self.send_response(200)
                    self.send_header("content-length", str(len(said)))
                    self.end_headers()
                    self.wfile.write(said)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer((HOST, port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Webhook:
    """Remembers what Alertmanager brought: (path, status, alert)."""

    def __init__(self, port: int) -> None:
        self.messages: list[tuple[str, str, dict[str, Any]]] = []
        self.tokens: set[str | None] = set()
        self.server = Server(port, self._take)

    def _take(self, path: str, headers: Any, body: bytes) -> bytes:
        self.tokens.add(headers["authorization"])
        self.messages += [(path, alert["status"], alert) for alert in json.loads(body)["alerts"]]
        return b""

    def now(self) -> set[str]:
        """What was last told to be firing."""
        last = {alert["labels"]["alertname"]: status for _, status, alert in list(self.messages)}
        return {name for name, status in last.items() if status == "firing"}

    def names(self, status: str) -> set[str]:
        return {alert["labels"]["alertname"] for _, told, alert in list(self.messages) if told == status}


class Exporter:
    """Metrics of a system in which everything is wrong, under the names of the catalogue."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._frozen_s: float | None = None
        self.well = False

    def freeze(self) -> None:
        self._frozen_s = time.monotonic() - self._began_s

    def text(self) -> bytes:
        s = time.monotonic() - self._began_s if self._frozen_s is None else self._frozen_s
        lines = [f"{name} {value:.3f}" for name, value in self._values(s).items()]
        for line in lines:
            assert re.split(r"[{ ]", line)[0] in SERIES, line
        return ("\n".join(lines) + "\n").encode()

    def _values(self, s: float) -> dict[str, float]:
        if self.well:
            return {"fraudgate_policy_refused": 0, "fraudgate_guard_out": 0}
        door = 'door="http"'
        counters = {
            f'fraudgate_sli_decisions_total{{{door},quality="good"}}': 500,
            f'fraudgate_sli_decisions_total{{{door},quality="bad"}}': 500,
            f"fraudgate_decision_latency_seconds_count{{{door}}}": 1000,
            f'fraudgate_decision_latency_seconds_bucket{{{door},le="0.1"}}': 500,
            f'fraudgate_decisions_total{{{door},outcome="approve"}}': 1000,
            'fraudgate_degraded_total{kind="request_only"}': 500,
            'fraudgate_degraded_total{kind="stale_features"}': 500,
            'fraudgate_refused_total{door="kafka",reason="malformed_avro"}': 500,
            "fraudgate_consumed_total": 1000,
            "fraudgate_publish_dropped_total": 1,
            f"fraudgate_redis_timeouts_total{{{door}}}": 10,
            f"fraudgate_batch_rows_count{{{door}}}": 100,
            "fraudgate_redis_writes_refused_total": 1,
            "fraudgate_unobserved_dropped_total": 1,
            "fraudgate_model_refused_total": 1,
            'fraudgate_parity_different_total{feature="amount_minor"}': 1,
            'fraudgate_rule_errors_total{rule="r-1"}': 1,
            'fraudgate_webhook_dead_total{webhook="risk-desk"}': 1,
            # A gauge that grows.
            "fraudgate_spool_records": 10,
        }
        gauges = {
            "fraudgate_kafka_connected": 0,
            'fraudgate_consumer_lag_records{partition="0"}': 20_000,
            "fraudgate_consumer_standstill_seconds": 100,
            "fraudgate_spool_age_seconds": 100,
            "fraudgate_redis_ready": 0,
            'fraudgate_redis_memory_used_bytes{node="127.0.0.1:6379"}': 95,
            'fraudgate_redis_memory_limit_bytes{node="127.0.0.1:6379"}': 100,
            'fraudgate_jobs_up{query="gold"}': 0,
            'fraudgate_jobs_batch_timestamp_seconds{query="bronze"}': time.time() - 1000,
            "fraudgate_jobs_kafka_lag_records": 200_000,
            'fraudgate_jobs_freshness_seconds{query="bronze"}': 100,
            "fraudgate_model_serving": 0,
            "fraudgate_guard_out": 1,
            'fraudgate_jobs_drift_alarm{measure="amount_minor"}': 1,
            "fraudgate_policy_refused": 1,
            "fraudgate_lists_trouble": 1,
            "fraudgate_cases_outbox_records": 5,
            "fraudgate_cases_outbox_delivered_total": 7,
            "fraudgate_cases_intake_paused": 1,
        }
        return {name: rate * s for name, rate in counters.items()} | {name: float(value) for name, value in gauges.items()}


def hurried(text: str) -> str:
    """Rules whose windows are `FASTER` times shorter and that wait for a second: a day passes in 48 minutes."""

    def shorter(match: re.Match[str]) -> str:
        seconds = max(6, int(match[2]) * UNIT_S[match[3]] // FASTER)
        return f"{match[1]}{seconds}s"

    text = re.sub(r"(\[|offset\s+)(\d+)([smhd])", shorter, text)
    return re.sub(r"for: \d+[smhd]", "for: 1s", text)


def watched(home: Path, webhook_port: int) -> Settings:
    token = home / "token"
    token.write_text(TOKEN)
    return local_settings(
        home,
        # As long as a busy machine may take to answer: a reading that comes too late is none.
        prometheus_scrape_ms=1500,
        prometheus_evaluate_ms=1000,
        alert_group_wait_ms=100,
        alert_page_url=f"http://{HOST}:{webhook_port}/page",
        alert_ticket_url=f"http://{HOST}:{webhook_port}/ticket",
        alert_token_path=str(token),
    )


@pytest.fixture
def webhook() -> Iterator[tuple[Webhook, int]]:
    [port] = free_ports(1)
    made = Webhook(port)
    try:
        yield made, port
    finally:
        made.server.close()


def test_every_alert_fires_and_reaches_the_webhook_of_its_severity(
    tmp_path: Path, webhook: tuple[Webhook, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First everything is wrong but no process is gone, then no payments come, then nobody answers."""
    told, port = webhook
    settings = watched(tmp_path, port)
    # Here each is to be seen, also what follows from another.
    monkeypatch.setattr(config, "INHIBITED", ())
    plain = rules.text
    monkeypatch.setattr(rules, "text", lambda runbooks=rules.RUNBOOKS: hurried(plain(runbooks)))
    exporter, nothing = Exporter(), b""
    servers = [
        Server(settings.gateway_port, lambda *_: exporter.text()),
        Server(settings.jobs_port, lambda *_: nothing),
        Server(settings.cases_port, lambda *_: nothing),
    ]
    stack = Stack(settings)
    later = {"TrafficGone", "GatewayDown", "JobsDown", "CasesDown"}
    try:
        stack.start(["alertmanager", "prometheus"])
        wait_until(lambda: told.names("firing") >= set(BY_NAME) - later, WITHIN_S, "all but four alerts arrive")
        exporter.freeze()
        wait_until(lambda: "TrafficGone" in told.names("firing"), WITHIN_S, "no traffic is told")
        exporter.well = True
        wait_until(
            lambda: {"PolicyRefused", "ChallengerTakenOut"} <= told.names("resolved"), WITHIN_S, "what is well again is told"
        )
        while servers:
            servers.pop().close()
        wait_until(lambda: told.now() >= later - {"TrafficGone"}, WITHIN_S, "three processes that don't answer are told")
        assert told.names("firing") == set(BY_NAME)
    finally:
        stack.stop()
        for server in servers:
            server.close()
    for path, _, alert in told.messages:
        name, text = alert["labels"]["alertname"], alert["annotations"]["summary"]
        assert path == f"/{BY_NAME[name].severity}"
        assert alert["annotations"]["runbook_url"] == f"{rules.RUNBOOKS_PATH.as_uri()}/{name}.md"
        # A template that names a label which isn't there leaves a hole.
        assert not re.search(r"\{\{|<no value>|error|NaN|  ", text), text
    assert told.tokens == {f"Bearer {TOKEN}"}


def test_what_follows_from_another_alert_is_not_told_beside_it(tmp_path: Path, webhook: tuple[Webhook, int]) -> None:
    told, port = webhook
    settings = watched(tmp_path, port)
    stack = Stack(settings)

    def tell(names: list[str]) -> None:
        alerts = [{"labels": {"alertname": n, "severity": BY_NAME[n].severity, "component": BY_NAME[n].component}} for n in names]
        url = f"{settings.alertmanager}/api/v2/alerts"
        request = urllib.request.Request(url, json.dumps(alerts).encode(), {"content-type": "application/json"})  # noqa: S310
        urllib.request.urlopen(request, timeout=5).close()  # noqa: S310

    def suppressed() -> set[str]:
        with urllib.request.urlopen(f"{settings.alertmanager}/api/v2/alerts", timeout=5) as reply:  # noqa: S310
            return {a["labels"]["alertname"] for a in json.load(reply) if a["status"]["inhibitedBy"]}

    try:
        stack.start(["alertmanager"])
        tell(["GatewayDown"])
        wait_until(lambda: told.names("firing") == {"GatewayDown"}, WITHIN_S, "the cause is told")
        rest = [a.name for a in ALERTS if a.name != "GatewayDown"]
        tell(rest)
        follows = {a.name for a in ALERTS if a.component in ("decisions", "kafka", "redis", "models", "policy")} | {"TrafficGone"}
        others = {a.name for a in ALERTS} - follows
        # JobsDown is among the others, and takes what follows from it along.
        of_jobs = {n for n in others if n.startswith(("Stream", "Freshness")) or n == "JobsLagGrows"}
        wait_until(lambda: suppressed() >= follows | of_jobs, WITHIN_S, "what follows is held back")
        assert suppressed() == follows | of_jobs
        wait_until(lambda: told.names("firing") >= others - of_jobs, WITHIN_S, "what doesn't follow is told")
        assert not told.names("firing") & follows
    finally:
        stack.stop()
