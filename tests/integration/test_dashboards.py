"""Every query of every panel has a value in a Prometheus that scrapes a running pipeline: both doors, Spark, cases, parity, real traffic.

Quiet counters show 0 because the processes seed them; what has labels that nobody knows beforehand is made to happen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import math
import shutil
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from confluent_kafka import Producer

from deploy.monitoring.dashboards.checks import plain, queries_of
from deploy.monitoring.dashboards.commands import FOLDER
from deploy.ports import free_ports
from deploy.services import http_ok
from deploy.stack import Stack
from deploy.toolchain import find_prometheus
from gateway.contracts.decision import Outcome, Route
from gateway.contracts.model_meta import MODEL_FILE, REFERENCE_FILE, read_manifest, sha256_file, write_manifest
from gateway.contracts.reference import encode
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import DECISIONS, LIBRDKAFKA_PARTITIONER
from gateway.contracts.transaction import Transaction, encode_json
from gateway.contracts.wire import frame
from gateway.kafka.avro import encode_receipt
from gateway.policy.folder import SHIPPED
from tests.factories_drift import make_quiet, make_trained
from tests.factories_model import make_model_dir
from tests.helpers import HOST, local_settings, running_command, wait_until
from tests.integration.gateway_helpers import make_transaction, name, post, produce, ready_without
from tests.integration.test_jobs import make_receipt
from tests.otlp import collector
from tests.tools import needs_prometheus

pytestmark = [pytest.mark.integration, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(1200), needs_prometheus]

SCRAPE_S = 2
# As Grafana would with this scrape interval and some load of the machine.
RATE_INTERVAL = "1m"
READY_S = 240
ANSWERED_S = 420
MINUTE_MS = 60_000
# Receipts of as many minutes before now, so that drift has windows to compare.
DRIFT_MINUTES, DRIFT_RATE = 46, 40


@dataclasses.dataclass
class Watched:
    settings: Settings
    prometheus: str

    def value(self, expr: str) -> float | None:
        """The first value that is a number, None without any. Raises ValueError for a query that Prometheus refuses."""
        connection = http.client.HTTPConnection(self.prometheus, timeout=30)
        try:
            connection.request("GET", "/api/v1/query?" + urllib.parse.urlencode({"query": expr}))
            answer = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if answer["status"] != "success":
            raise ValueError(f"{expr}: {answer['error']}")
        values = [float(sample["value"][1]) for sample in answer["data"]["result"]]
        return next((value for value in values if not math.isnan(value)), None)


def make_models(folder: Path) -> str:
    """Champion with training rows to compare with, challenger and shadow. Returns the champion's digest."""
    for i, route in enumerate((Route.CHAMPION.value, Route.CHALLENGER.value, "shadow")):
        make_model_dir(folder, version=str(i + 1), route=route, seed=i + 1)
    routes = dict(read_manifest(folder).routes)
    champion = routes[Route.CHAMPION.value]
    path = folder / champion.directory / REFERENCE_FILE
    path.write_bytes(encode(make_trained(6_000)))
    files = champion.files | {REFERENCE_FILE: sha256_file(path)}
    routes[Route.CHAMPION.value] = msgspec.structs.replace(champion, files=files)
    write_manifest(folder, msgspec.structs.replace(read_manifest(folder), routes=routes))
    return files[MODEL_FILE]


def make_policy(folder: Path) -> str:
    """The shipped policy, whose declines and large reviews are told to a webhook, and a rule in shadow that often would have fired."""
    shutil.copytree(SHIPPED, folder)
    file = folder / "policy.yaml"
    text = file.read_text().replace("outcomes: [decline]}", "outcomes: [decline], webhooks: [desk]}")
    assert "webhooks: [desk]" in text
    file.write_text(text)
    rule = "id: any-amount, state: shadow, owner: risk, text: Nearly all., when: amount_minor > 1, outcome: review, reason: AMOUNT_UNUSUAL"
    (folder / "rules/shadow.yaml").write_text(f"rules:\n  - {{{rule}}}\n")
    return str(folder)


@contextlib.contextmanager
def a_webhook() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Tells nobody."""

    server = ThreadingHTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/in"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def a_prometheus(settings: Settings, folder: Path) -> Iterator[str]:
    """host:port of one that scrapes these settings' processes."""
    [port] = free_ports(1)
    ports = (settings.gateway_port, settings.jobs_port, settings.cases_port, settings.parity_port)
    scrapes = [{"job_name": str(p), "static_configs": [{"targets": [f"{HOST}:{p}"]}]} for p in ports]
    times = {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump({"global": times, "scrape_configs": scrapes}))
    argv = [str(find_prometheus()), f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*argv, f"--web.listen-address={HOST}:{port}"], stdout=log, stderr=log)
        try:
            wait_until(lambda: http_ok(f"http://{HOST}:{port}/-/ready"), READY_S, "Prometheus is ready")
            yield f"{HOST}:{port}"
        finally:
            process.terminate()
            process.wait(30)


def send_drift(settings: Settings, digest: str) -> None:
    """Receipts of the champion in the minutes before now: drift compares their windows once time has passed them."""
    schema_id = SchemaRegistry(settings.registry).id_of(DECISIONS)
    producer = Producer({"bootstrap.servers": settings.bootstrap, "partitioner": LIBRDKAFKA_PARTITIONER})
    first_ms = time.time_ns() // 1_000_000 - (DRIFT_MINUTES + 1) * MINUTE_MS
    run = name("drift")
    for minute in range(DRIFT_MINUTES):
        for i in range(DRIFT_RATE):
            t = make_transaction(f"{run}-{minute}-{i}", first_ms + minute * MINUTE_MS + i * 1000)
            [row] = make_quiet(np.array([t.event_time_ms], np.int64), minute * DRIFT_RATE + i).tolist()
            changes = {"features": row, "model_digest": digest, "model_name": "fraudgate", "model_version": "1"}
            receipt = msgspec.structs.replace(make_receipt(t, Outcome.APPROVE), **changes)
            producer.produce(DECISIONS, frame(schema_id, encode_receipt(receipt)), key=t.card_id)
        producer.poll(0)
    assert producer.flush(60) == 0


class Traffic:
    """Payments through both doors, some risky, some that can't be read, and what people do with reviews and lists, until stopped."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._watched = name("watched")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.failure: BaseException | None = None

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.wait(1.0):
                self._round()
        # Whatever went wrong in the thread belongs to the test.
        except BaseException as exc:  # noqa: BLE001
            self.failure = exc

    def _round(self) -> None:
        settings = self._settings
        run = name("t")
        over_http = [make_transaction(f"{run}-h{i}", amount_minor=10 ** (2 + i)) for i in range(6)]
        over_kafka = [make_transaction(f"{run}-k{i}", amount_minor=10 ** (2 + i)) for i in range(6)]
        # What stands on the list of watched cards goes to a person.
        for t in (*over_http, over_http[0], make_transaction(f"{run}-w", card_id=self._watched)):
            post(settings, t)
        post(settings, b"{")
        self._explained(make_transaction(f"{run}-e"))
        produce(settings, [*((t.card_id, encode_json(t)) for t in (*over_kafka, over_kafka[0])), ("x", b"{")])
        self._decide_a_review()
        for card in (self._watched, f"{run}-listed"):
            self._ask("POST", "/v1/lists/watched-cards/entries", {"entity_value": card, "reason": "test"})
        self._ask("GET", f"/v1/reviews/{run}-unknown")

    def _explained(self, t: Transaction) -> None:
        """With the model's reasons, whatever it comes to."""
        connection = http.client.HTTPConnection(HOST, self._settings.gateway_port, timeout=30)
        try:
            connection.request("POST", "/score", encode_json(t), {"Fraudgate-Explain": "true"})
            connection.getresponse().read()
        finally:
            connection.close()

    def _decide_a_review(self) -> None:
        _, found = self._ask("GET", "/v1/reviews?state=open&limit=1")
        for review in (found or {}).get("reviews", [])[:1]:
            path = f"/v1/reviews/{review['transaction_id']}"
            self._ask("POST", f"{path}/claim", {})
            self._ask("POST", f"{path}/decide", {"verdict": "legitimate", "note": "test"})

    def _ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(HOST, self._settings.cases_port, timeout=30)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read() or b"null")
        finally:
            connection.close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("dashboards")
    digest = make_models(folder / "models")
    with a_webhook() as url, collector() as traces:
        secret = "whsec_" + "a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s="
        (folder / "webhooks.yaml").write_text(
            f"webhooks:\n  - {{name: desk, url: '{url}', secrets: ['{secret}'], kinds: [burst]}}\n"
        )
        settings = local_settings(
            folder / "home",
            model_dir=str(folder / "models"),
            policy_path=make_policy(folder / "policy"),
            webhooks_path=str(folder / "webhooks.yaml"),
            trace_url=traces.url,
            trace_sample_permille=1000,
            decision_budget_ms=9000,
            feature_budget_ms=2000,
        )
        stack = Stack(settings)
        try:
            stack.start([service for service in stack.core_names if service != "mlflow"])
            stack.create_topics_and_schemas()
            send_drift(settings, digest)
            stack.start(["gateway", "cases", "jobs"])
            with (
                running_command(settings, "parity", "--live", "--every", "10", log_path=folder / "parity.log"),
                a_prometheus(settings, folder) as prometheus,
                Traffic(settings) as traffic,
            ):
                wait_until(lambda: ready_without(settings, "redis", "model", "kafka", "lists"), READY_S, "the gateway is ready")
                yield Watched(settings, prometheus)
                assert traffic.failure is None, repr(traffic.failure)
        finally:
            stack.stop()


def test_every_query_of_every_panel_has_a_value(watched: Watched) -> None:
    waiting = {
        (path.stem, title, plain(expr, RATE_INTERVAL))
        for path in sorted(FOLDER.glob("*.json"))
        for title, expr in queries_of(json.loads(path.read_text()))
    }
    assert len(waiting) > 150

    def all_answered() -> bool:
        for query in list(waiting):
            if watched.value(query[2]) is not None:
                waiting.discard(query)
        return not waiting

    try:
        wait_until(all_answered, ANSWERED_S, "every query has a value")
    except AssertionError:
        assert sorted(waiting) == []


def test_a_query_about_nothing_has_none(watched: Watched) -> None:
    assert watched.value('fraudgate_decisions_total{door="nowhere"}') is None
    assert watched.value("sum (fraudgate_decisions_total) / 0 * 0") is None
    with pytest.raises(ValueError, match="parse"):
        watched.value("sum (")
