"""The gateway when something is killed with -9 in the middle: Redis, and the gateway itself."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from deploy.stack import Stack
from gateway.contracts.features import FEATURE_INDEX
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import encode_json
from tests.helpers import RunningCommand, running_command
from tests.integration.gateway_helpers import Decisions, make_transaction, name, post, produce, ready_without
from tests.unit.gateway.factories import write_model

pytestmark = pytest.mark.integration
READY_WITHIN_S = 40
CARDS = 97
REPLAYED = 6000


@pytest.fixture
def patient(settings: Settings) -> Settings:
    """Wide budgets: what is tested here is what is answered, on machines however busy."""
    return dataclasses.replace(settings, feature_budget_ms=1000, decision_budget_ms=3000)


def wait_ready(command: RunningCommand, settings: Settings) -> None:
    command.wait_until(lambda: ready_without(settings, "redis", "kafka"), READY_WITHIN_S, "the gateway is ready")


def test_redis_killed_in_traffic_costs_its_features_and_no_answer(stack: Stack, patient: Settings, tmp_path: Path) -> None:
    with running_command(
        patient, "serve", log_path=tmp_path / "gateway.log", env={"FRAUDGATE_MODEL_DIR": str(tmp_path)}
    ) as command:
        write_model(tmp_path)
        wait_ready(command, patient)
        command.wait_until(lambda: ready_without(patient, "model"), READY_WITHIN_S, "the model is taken up")
        assert "request_only" not in post(patient, make_transaction(name("before")))[1]["degraded"]
        stack.kill("redis")
        try:
            for i in range(20):
                status, answer = post(patient, make_transaction(name(f"dead{i}")))
                assert (status, answer["degraded"]) == (200, ["request_only"])
                assert answer["probability"] is not None
        finally:
            stack.start(["redis"])
        command.wait_until(
            lambda: "request_only" not in post(patient, make_transaction(name("again")))[1]["degraded"], 10, "full service is back"
        )


def test_a_gateway_killed_in_a_replay_decides_and_counts_each_transaction_once(
    stack: Stack, patient: Settings, tmp_path: Path
) -> None:
    assert stack.pid("kafka")
    tail = Decisions(patient)
    prefix = name("replay")
    transactions = [make_transaction(f"{prefix}-{i}", card_id=f"card-{prefix}-{i % CARDS}") for i in range(REPLAYED)]
    produce(patient, ((t.card_id, encode_json(t)) for t in transactions))
    for attempt in range(3):
        with running_command(patient, "serve", log_path=tmp_path / f"gateway-{attempt}.log") as command:
            tail.read_some(500)
            command.send_signal(signal.SIGKILL)
    with running_command(patient, "serve", log_path=tmp_path / "gateway-last.log"):
        found = tail.of(t.transaction_id for t in transactions)
    tail.close()
    assert {r.transaction for r in found.values()} == set(transactions)
    for card in range(CARDS):
        of_card = [found[f"{prefix}-{i}"] for i in range(card, REPLAYED, CARDS)]
        assert [r.features[FEATURE_INDEX["card_count_30d"]] for r in of_card] == list(range(len(of_card)))


def test_kafka_killed_in_traffic_costs_no_answer_and_every_receipt_comes_once_it_is_back(
    stack: Stack, patient: Settings, tmp_path: Path
) -> None:
    tail = Decisions(patient)
    http = [make_transaction(name(f"down{i}")) for i in range(20)]
    after = make_transaction(name("after"))
    with running_command(patient, "serve", log_path=tmp_path / "gateway.log") as command:
        wait_ready(command, patient)
        stack.kill("kafka")
        try:
            assert {post(patient, t)[0] for t in http} == {200}
        finally:
            stack.start(["kafka"])
        produce(patient, [(after.card_id, encode_json(after))])
        found = tail.of(t.transaction_id for t in [*http, after])
    tail.close()
    assert found[after.transaction_id].door == "kafka"
