"""What the port of the feature jobs says to whoever restarts them."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from feature_jobs.probes import STUCK_S, Health, serve


class Clock:
    now_s = 1000.0

    def read(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(clock.read)


@pytest.fixture
def url(health: Health) -> Iterator[str]:
    registry = CollectorRegistry()
    Counter("something", "Anything", registry=registry).inc()
    server = serve("127.0.0.1", 0, registry, health)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310
            return int(reply.status)
    except urllib.error.HTTPError as exc:
        exc.close()
        return exc.code


def test_while_spark_starts_the_jobs_are_alive_and_not_ready(url: str) -> None:
    assert (status_of(url + "/healthz"), status_of(url + "/readyz")) == (200, 503)


def test_they_are_ready_when_every_query_runs(url: str, health: Health) -> None:
    health.beat({"bronze": True, "silver": False})
    assert status_of(url + "/readyz") == 503
    health.beat({"bronze": True, "silver": True})
    assert status_of(url + "/readyz") == 200


def test_a_supervisor_that_stands_still_is_neither_alive_nor_ready(url: str, health: Health, clock: Clock) -> None:
    health.beat({"bronze": True})
    clock.now_s += STUCK_S - 1
    assert (status_of(url + "/healthz"), status_of(url + "/readyz")) == (200, 200)
    clock.now_s += 1
    assert (status_of(url + "/healthz"), status_of(url + "/readyz")) == (503, 503)


def test_metrics_are_beside_them(url: str) -> None:
    with urllib.request.urlopen(url + "/metrics", timeout=5) as reply:  # noqa: S310
        assert b"something_total 1.0" in reply.read()
