"""A gateway that is silently out of its consumer group notices by itself."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.stack import Stack
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import encode_json
from gateway.kafka.watchdog import EXIT_STUCK
from tests.helpers import command_env, wait_until
from tests.integration.gateway_helpers import Decisions, make_transaction, name, produce, request

pytestmark = [pytest.mark.integration, pytest.mark.slow]
LIMIT_S = 3


@contextmanager
def stuck_gateway(settings: Settings, how: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-m", "tests.integration.stuck_gateway", how]
    with log.open("wb") as out, subprocess.Popen(argv, env=command_env(settings), stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def own(stack: Stack, settings: Settings) -> Settings:
    """Settings of a group that nobody else moves."""
    assert stack.pid("kafka")
    return dataclasses.replace(settings, consumer_group=name("group"), kafka_watchdog_s=LIMIT_S)


def test_a_session_that_gets_nothing_is_replaced(own: Settings, tmp_path: Path) -> None:
    t = make_transaction(name("t"))
    tail = Decisions(own)
    with stuck_gateway(own, "once", tmp_path / "gateway.log") as process:
        produce(own, [(t.card_id, encode_json(t))])
        assert tail.of([t.transaction_id])[t.transaction_id].transaction == t
        assert process.poll() is None
        assert "stand still; a new session starts" in (tmp_path / "gateway.log").read_text()
    tail.close()


def test_a_process_that_gets_nothing_ends_for_its_supervisor(own: Settings, tmp_path: Path) -> None:
    t = make_transaction(name("t"))
    produce(own, [(t.card_id, encode_json(t))])
    with stuck_gateway(own, "always", tmp_path / "gateway.log") as process:
        wait_until(lambda: "stand still" in (tmp_path / "gateway.log").read_text(), 60, "it is noticed")
        assert "kafka" in request(own, "GET", "/readyz")[1]["degraded"]
        assert process.wait(60) == EXIT_STUCK
