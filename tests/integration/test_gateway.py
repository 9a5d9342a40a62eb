"""The gateway on the real Kafka, Redis and schema registry, with a real model: both doors."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Iterator

import fastavro
import pytest

from deploy.stack import Stack
from gateway.contracts.features import FEATURE_INDEX
from gateway.contracts.registry import SchemaRegistry
from gateway.contracts.settings import Settings
from gateway.contracts.topics import QUARANTINE, SCORED_HEADER, SCORED_NEVER, TOPICS, TRANSACTIONS
from gateway.contracts.transaction import AMOUNT_MINOR_MIN, encode_json
from gateway.contracts.wire import frame, unframe
from gateway.kafka.avro import encode_transaction
from loadtest.hostile import hostile_cases
from tests.helpers import run_command, running_command
from tests.integration.gateway_helpers import (
    Decisions,
    Tail,
    make_transaction,
    name,
    post,
    post_together,
    produce,
    ready_without,
    request,
)
from tests.unit.gateway.factories import write_model

pytestmark = pytest.mark.integration
READY_WITHIN_S = 40


@pytest.fixture(scope="module")
def served(stack: Stack, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """The settings of a running gateway with a model of its own."""
    folder = tmp_path_factory.mktemp("gateway")
    write_model(folder / "models")
    # Wide budgets: what is tested here is what is answered, on machines however busy.
    own = dataclasses.replace(
        settings, model_dir=str(folder / "models"), feature_budget_ms=1000, decision_budget_ms=3000, publish_budget_ms=1000
    )
    with running_command(own, "serve", log_path=folder / "gateway.log") as command:
        command.wait_until(lambda: ready_without(own, "redis", "model", "kafka"), READY_WITHIN_S, "the gateway is ready")
        yield own
        assert command.stop(), "the gateway didn't leave on SIGTERM"


@pytest.fixture
def decisions(served: Settings) -> Iterator[Decisions]:
    tail = Decisions(served)
    yield tail
    tail.close()


def test_each_door_gives_one_receipt_with_the_models_decision(served: Settings, decisions: Decisions) -> None:
    schema_id = SchemaRegistry(served.registry, served.schemas_path).id_of(TRANSACTIONS)
    http, by_json, by_avro = (make_transaction(name(door)) for door in ("http", "json", "avro"))
    status, answer = post(served, http)
    assert status == 200
    produce(
        served,
        [
            (by_json.card_id, encode_json(by_json)),
            (by_avro.card_id, frame(schema_id, encode_transaction(by_avro))),
        ],
    )
    found = decisions.of(t.transaction_id for t in (http, by_json, by_avro))
    for t in (http, by_json, by_avro):
        receipt = found[t.transaction_id]
        assert receipt.transaction == t
        assert receipt.model_name == "fraudgate"
        assert receipt.probability is not None
        assert receipt.features[FEATURE_INDEX["card_count_5m"]] == 0
        assert [seq > 0 for seq in receipt.observed_seq] == [True, True, True, False, False]
        assert receipt.label_changes == [0, 0]
    assert answer["probability"] == found[http.transaction_id].probability
    assert answer["decision"] == found[http.transaction_id].decision
    assert (found[http.transaction_id].door, found[by_json.transaction_id].door) == ("http", "kafka")


def test_what_http_scored_stands_on_the_transactions_topic_and_is_not_scored_again(served: Settings, decisions: Decisions) -> None:
    transactions = Tail(served, TRANSACTIONS)
    t, history, after = (make_transaction(name(n)) for n in ("once", "history", "after"))
    assert post(served, t)[0] == 200
    produce(served, [(history.card_id, encode_json(history))], [(SCORED_HEADER, SCORED_NEVER)])
    produce(served, [(after.card_id, encode_json(after))])
    transactions.read_until(lambda: len(transactions.messages) == 3)
    transactions.close()
    [published] = [m for m in transactions.messages if (m.value() or b"").endswith(encode_transaction(t))]
    assert published.headers() == [(SCORED_HEADER, b"http")]
    assert published.key() == t.card_id.encode()
    found = decisions.of([t.transaction_id, after.transaction_id])
    assert history.transaction_id not in {r.transaction_id for r in decisions.receipts()}
    assert len(found) == 2


def test_of_fifty_simultaneous_charges_on_one_card_the_kth_sees_k_minus_one(served: Settings, decisions: Decisions) -> None:
    card, now_ms = name("busy"), time.time_ns() // 1_000_000
    charges = [make_transaction(f"{card}-{i}", now_ms, card_id=card) for i in range(50)]
    assert {status for status, _ in post_together(served, charges)} == {200}
    found = decisions.of(t.transaction_id for t in charges)
    assert sorted(r.features[FEATURE_INDEX["card_count_5m"]] for r in found.values()) == list(range(50))


def test_a_retry_gets_the_same_answer_and_another_body_a_conflict(served: Settings, decisions: Decisions) -> None:
    t = make_transaction(name("retry"))
    answers = [answer for _, answer in post_together(served, [t] * 8)]
    answers.append(post(served, t)[1])
    assert all(answer == answers[0] for answer in answers)
    status, problem = post(served, make_transaction(t.transaction_id, t.event_time_ms, amount_minor=1))
    assert (status, problem["reason"]) == (409, "idempotency_conflict")
    # The same once more through the other door: a retry is skipped, another body is quarantined.
    quarantine = Tail(served, QUARANTINE)
    other = make_transaction(t.transaction_id, t.event_time_ms, amount_minor=2)
    produce(served, [(t.card_id, encode_json(t)), (t.card_id, encode_json(other))])
    quarantine.read_until(lambda: len(quarantine.messages) == 1)
    quarantine.close()
    assert quarantine.messages[0].headers() == [("reason", b"idempotency_conflict")]
    decisions.of([t.transaction_id])


def test_hostile_messages_are_quarantined_once_each_and_their_neighbours_are_scored(served: Settings, decisions: Decisions) -> None:
    schema_id = SchemaRegistry(served.registry, served.schemas_path).id_of(TRANSACTIONS)
    cases = list(hostile_cases(time.time_ns() // 1_000_000, schema_id, prefix=name("hk")))
    quarantine = Tail(served, QUARANTINE)
    neighbours = [make_transaction(name(f"neighbour{i}")) for i in range(len(cases))]
    produce(
        served,
        (
            pair
            for case, t in zip(cases, neighbours, strict=True)
            for pair in (("hostile", case.value), ("hostile", encode_json(t)))
        ),
    )
    refused = [case for case in cases if case.refusal is not None]
    valid = [case.transaction_id for case in cases if case.refusal is None and case.transaction_id is not None]
    decisions.of([*(t.transaction_id for t in neighbours), *valid])
    quarantine.read_until(lambda: len(quarantine.messages) >= len(refused))
    quarantine.close()
    schema = fastavro.parse_schema(json.loads(TOPICS[QUARANTINE].schema_text))
    records = [read_quarantined(m.value() or b"", schema) for m in quarantine.messages]
    assert sorted((r["reason"], r["value"]) for r in records) == sorted((c.refusal or "", c.value) for c in refused)


def read_quarantined(value: bytes, schema: object) -> dict[str, str | bytes]:
    record: dict[str, str | bytes] = fastavro.schemaless_reader(io.BytesIO(unframe(value)[1]), schema, None)
    return record


def test_hostile_bodies_get_their_documented_error_and_their_neighbours_are_scored(served: Settings) -> None:
    for case in hostile_cases(time.time_ns() // 1_000_000, 1, prefix=name("hh")):
        if case.kind == "avro":
            continue
        status, body = post(served, case.value)
        if case.refusal is None:
            assert status == 200, case.name
        else:
            assert 400 <= status < 500, case.name
            assert body["reason"] == case.refusal.value, case.name
        assert post(served, make_transaction(name("neighbour")))[0] == 200


def test_the_command_prints_a_decision_and_says_what_is_wrong(served: Settings) -> None:
    t = make_transaction(name("cli"))
    good = run_command(served, "score", "-", stdin=encode_json(t).decode())
    assert good.returncode == 0
    assert t.transaction_id in good.stdout
    assert "risk score" in good.stdout
    bad = run_command(served, "score", "{}")
    assert bad.returncode == 1
    assert "missing_field" in bad.stderr
    nobody = run_command(dataclasses.replace(served, gateway_port=1), "score", "{}")
    assert nobody.returncode == 1
    assert "fraudgate serve" in nobody.stderr


def test_a_port_that_is_taken_ends_the_command_and_is_named(served: Settings) -> None:
    ended = run_command(served, "serve", "--no-kafka", timeout_s=60)
    assert ended.returncode == 3
    assert f"can't listen on {served.host}:{served.gateway_port}" in ended.stderr
    assert request(served, "GET", "/healthz")[0] == 200


def test_the_api_describes_score_and_the_metrics_count(served: Settings) -> None:
    status, api = request(served, "GET", "/openapi.json")
    assert status == 200
    score = api["paths"]["/score"]["post"]
    assert set(score["responses"]) == {"200", "400", "401", "403", "408", "409", "413", "422", "429", "431", "503"}
    assert api["components"]["schemas"]["Transaction"]["properties"]["amount_minor"]["minimum"] == AMOUNT_MINOR_MIN
    assert request(served, "GET", "/healthz")[0] == 200
    status, problem = request(served, "GET", "/score")
    assert (status, problem["reason"]) == (405, "method_not_allowed")
