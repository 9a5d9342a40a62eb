"""Each peer answers a payment, and Locust's exit status says whether the promise was kept. Figures are no matter here."""

from __future__ import annotations

import argparse
import dataclasses
import random
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy import processes
from deploy.loadtest import drive
from deploy.ports import free_ports
from deploy.services import http_ok
from gateway.contracts.model_meta import MODEL_FILE
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import encode_json
from loadtest.openloop.payments import People
from loadtest.peers.requests import FIELDS, fill, mlflow_body
from loadtest.sla import payment
from tests.factories_model import make_model_dir
from tests.helpers import HOST, command_env, wait_until

PAYMENT = encode_json(payment(random.Random(1), 1))


@contextmanager
def peer(settings: Settings, name: str, *arguments: object, path: Path, alive: str, within_s: float = 60.0) -> Iterator[str]:
    """The peer's URL while it runs."""
    (port,) = free_ports(1)
    argv = [sys.executable, "-m", f"loadtest.peers.{name}", str(port), *map(str, arguments)]
    record = processes.spawn(argv, command_env(settings), Path.cwd(), path / f"{name}.log")
    url = f"http://{HOST}:{port}"
    try:
        wait_until(lambda: http_ok(url + alive) or not processes.is_alive(record), within_s, f"{name} answers")
        assert processes.is_alive(record), processes.log_tail(path / f"{name}.log")
        yield url
    finally:
        processes.stop(record, 10)


def post(url: str, body: bytes) -> dict[str, Any]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310
        found: dict[str, Any] = msgspec.json.decode(reply.read())
        return found


def test_the_empty_handler_answers_200_bytes(tmp_path: Path) -> None:
    with peer(Settings(home=str(tmp_path)), "empty_uvicorn", path=tmp_path, alive="/") as url:
        assert len(msgspec.json.encode(post(f"{url}/score", PAYMENT))) == 200


def test_the_empty_endpoint_checks_its_body(tmp_path: Path) -> None:
    with peer(Settings(home=str(tmp_path)), "empty_fastapi", path=tmp_path, alive="/openapi.json") as url:
        assert post(f"{url}/score", PAYMENT)["decision"] == "approve"
        with pytest.raises(urllib.error.HTTPError, match="422") as refused:
            post(f"{url}/score", b"{}")
        refused.value.close()


@pytest.mark.integration
def test_the_usual_service_scores_what_redis_knows(settings: Settings, stack: object, tmp_path: Path) -> None:
    assert sum(len(fields) for fields in FIELDS.values()) > 70
    redis_url = settings.redis.removesuffix("/0") + "/1"
    assert fill(redis_url, People(20, 10)) > 60
    manifest = make_model_dir(tmp_path / "models")
    model = tmp_path / "models" / manifest.routes["champion"].directory / MODEL_FILE
    with peer(settings, "fastapi_service", redis_url, model, path=tmp_path, alive="/openapi.json") as url:
        assert 0 <= post(f"{url}/score", PAYMENT)["probability"] <= 1


@pytest.mark.slow
def test_mlflow_serves_the_same_model(tmp_path: Path) -> None:
    manifest = make_model_dir(tmp_path / "models")
    model = tmp_path / "models" / manifest.routes["champion"].directory / MODEL_FILE
    given = (model, tmp_path / "pyfunc")
    with peer(Settings(home=str(tmp_path)), "mlflow_serve", *given, path=tmp_path, alive="/ping", within_s=120) as url:
        answer = post(f"{url}/invocations", mlflow_body())
        assert len(answer["predictions"]["probabilities"][0]) == 2


@pytest.mark.slow
def test_locust_ends_with_status_1_when_the_promise_is_broken_and_0_when_it_is_kept(tmp_path: Path) -> None:
    # The empty handler approves everything, also what must be refused: a twentieth of its answers is wrong.
    options = argparse.Namespace(users=5, seconds=8, p99_ms=10_000.0, error_budget=0.5, html=tmp_path / "out/report.html")
    with peer(Settings(home=str(tmp_path)), "empty_uvicorn", path=tmp_path, alive="/") as url:
        assert drive(url, options) == 0
        assert "<html" in options.html.read_text()
        options.p99_ms = 0.001
        assert drive(url, options) == 1
        options.p99_ms, options.error_budget = 10_000.0, 0.0
        assert drive(url, options) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_quick_run_measures_every_promised_figure(tmp_path: Path, settings: Settings) -> None:
    """From start to end on a stack of its own, in minutes: the table, the JSON and the curve are there, whatever they say."""
    report, curve = tmp_path / "bench.json", tmp_path / "latency.svg"
    argv = [sys.executable, "-m", "deploy.cli", "bench", "all", "--quick", "--json", str(report), "--svg", str(curve)]
    log = tmp_path / "bench.log"
    record = processes.spawn(argv, command_env(dataclasses.replace(settings, home=str(tmp_path / "home"))), Path.cwd(), log)
    try:
        wait_until(lambda: not processes.is_alive(record), 840.0, "the benchmark ends")
    finally:
        processes.send_signal(record, signal.SIGTERM, group=False)
        processes.stop(record, 60)
    found = msgspec.json.decode(report.read_bytes())
    assert found["run"]["not_measured"] == [], processes.log_tail(log)
    for key in (
        *("http.cpu_us", "kafka.cpu_us", "ratio.http_to_empty_uvicorn", "ratio.fastapi_service_to_http"),
        *("ratio.mlflow_serve_to_http", "http.p99_ms.5000", "http.p99_ms.10000", "kafka.p99_ms.10000"),
        "kafka_with_spark.p99_ms.10000",
    ):
        assert found[key]["value"] > 0, key
        assert {"unit", "rate_per_s", "duration_s", "cpu_us", "reach", "reached"} <= found[key].keys()
    assert found["http.cpu_us"]["cpu_us"].keys() >= {"gateway", "redis", "kafka", "generator"}
    assert curve.read_text().startswith("<?xml")
