import math
from pathlib import Path

import numpy as np
import pytest

from gateway.contracts.decision import Outcome
from gateway.contracts.features import FEATURE_INDEX, FEATURE_NAMES
from gateway.contracts.reasons import REASONS_MAX, Reason
from gateway.contracts.transaction import Transaction
from gateway.errors import PolicyRefusedError
from gateway.job import requests_of
from gateway.policy import Columns, Decisions, Policy, load_policy
from tests.unit.gateway.factories import make_job, make_transaction

BANDS = """
version: 1
name: test
bands:
  - {up_to_minor: 1000, challenge: 500, review: 700, decline: 900, without_model: approve}
  - {up_to_minor: null, challenge: 300, review: 400, decline: 500, without_model: review}
rules:
"""


def make_policy(rules: str = "  []") -> Policy:
    return Policy((BANDS + rules).encode(), "test.yaml")


def rule(when: str, outcome: str = "review", reason: str = "CARD_VELOCITY", name: str = "r1") -> str:
    return f"  - {{id: {name}, description: d, when: [{when}], outcome: {outcome}, reason: {reason}}}\n"


def decide(policy: Policy, *batch: Transaction, score: float = math.nan, has_features: bool = True, **features: float) -> Decisions:
    matrix = np.full((len(batch), len(FEATURE_NAMES)), np.nan, np.float32)
    for name, value in features.items():
        matrix[:, FEATURE_INDEX[name]] = value
    requests = requests_of([make_job(t) for t in batch])
    rows = np.arange(len(batch))
    return policy.decide(Columns(requests=requests, rows=rows, matrix=matrix, score=np.full(len(batch), score)), has_features)


@pytest.mark.parametrize(
    ("amount", "score", "outcome"),
    [
        (1000, 499, Outcome.APPROVE),
        (1000, 500, Outcome.CHALLENGE),
        (1000, 899, Outcome.REVIEW),
        (1000, 900, Outcome.DECLINE),
        (1001, 299, Outcome.APPROVE),
        (1001, 500, Outcome.DECLINE),
    ],
)
def test_the_score_decides_by_the_band_of_the_amount(amount: int, score: float, outcome: Outcome) -> None:
    found = decide(make_policy(), make_transaction(amount_minor=amount), score=score)
    assert found.outcome == [outcome]
    assert found.reasons == [[] if outcome is Outcome.APPROVE else [Reason.MODEL_SCORE_HIGH]]


def test_without_model_and_features_the_band_decides() -> None:
    found = decide(make_policy(), make_transaction(amount_minor=10), make_transaction(amount_minor=5000), has_features=False)
    assert found.outcome == [Outcome.APPROVE, Outcome.REVIEW]
    assert found.reasons == [[], [Reason.NO_MODEL]]
    assert found.stand_in().tolist() == [0, 400]


def test_without_model_but_with_features_the_rules_decide() -> None:
    found = decide(make_policy(rule("{feature: card_count_5m, op: '>=', value: 3}")), make_transaction(amount_minor=5000))
    assert found.outcome == [Outcome.APPROVE]


def test_all_conditions_of_a_rule_must_hold() -> None:
    policy = make_policy(rule("{feature: card_count_5m, op: '>=', value: 3}, {field: channel, op: in, value: [ecom]}"))
    assert decide(policy, make_transaction(), card_count_5m=3).outcome == [Outcome.APPROVE]
    assert decide(policy, make_transaction(channel="ecom"), card_count_5m=2).outcome == [Outcome.APPROVE]
    found = decide(policy, make_transaction(channel="ecom"), make_transaction(), card_count_5m=3)
    assert found.outcome == [Outcome.REVIEW, Outcome.APPROVE]
    assert found.rule_hits == [["r1"], []]


@pytest.mark.parametrize("op", ["==", "!=", "<", "<=", ">", ">="])
def test_an_unknown_value_makes_every_comparison_false(op: str) -> None:
    for what in ("feature: card_speed", "field: latitude", "derived: card_distance_km", "score: true"):
        policy = make_policy(rule(f"{{{what}, op: '{op}', value: 0}}"))
        assert decide(policy, make_transaction()).outcome == [Outcome.APPROVE]


@pytest.mark.parametrize("condition", ["op: '!=', value: x", "op: not_in, value: [x]"])
def test_a_field_that_is_not_given_makes_a_condition_false(condition: str) -> None:
    policy = make_policy(rule(f"{{field: device_id, {condition}}}"))
    assert decide(policy, make_transaction()).outcome == [Outcome.APPROVE]
    assert decide(policy, make_transaction(device_id="y")).outcome == [Outcome.REVIEW]


def test_the_most_severe_outcome_wins_and_its_reasons_come_first() -> None:
    always = "{field: amount_minor, op: '>', value: 0}"
    rules = "".join(
        rule(always, outcome, reason, name)
        for outcome, reason, name in [
            ("challenge", "AMOUNT_UNUSUAL", "a"),
            ("decline", "DEVICE_MANY_CARDS", "b"),
            ("review", "IP_MANY_CARDS", "c"),
            ("decline", "DEVICE_MANY_CARDS", "d"),
            ("challenge", "AMOUNT_LIMIT", "e"),
        ]
    )
    found = decide(make_policy(rules), make_transaction(amount_minor=900), score=750)
    assert found.outcome == [Outcome.DECLINE]
    assert found.reasons == [[Reason.DEVICE_MANY_CARDS, Reason.MODEL_SCORE_HIGH, Reason.IP_MANY_CARDS, Reason.AMOUNT_UNUSUAL]]
    assert len(found.reasons[0]) == REASONS_MAX
    assert found.rule_hits == [["b", "d", "c", "a", "e"]]


@pytest.mark.parametrize(
    ("rules", "place"),
    [
        (rule("{feature: card_cuont_5m, op: '>', value: 3}"), "rule 'r1', condition 1: there is no feature 'card_cuont_5m'"),
        (rule("{field: amount, op: '>', value: 3}"), "there is no field 'amount'"),
        (rule("{derived: x, op: '>', value: 3}"), "there is no derived value 'x'"),
        (rule("{feature: card_speed, op: '~', value: 3}"), "rules[0].when[0].op"),
        (rule("{feature: card_speed, op: '>', value: fast}"), "must be a finite number"),
        (rule("{feature: card_speed, op: '>', value: .nan}"), "must be a finite number"),
        (rule("{feature: card_speed, op: '>', value: [1]}"), "takes one value"),
        (rule("{field: channel, op: in, value: ecom}"), "takes a list"),
        (rule("{field: channel, op: '>', value: ecom}"), "can't be compared"),
        (rule("{field: mcc, op: '==', value: 5411}"), "must be a text"),
        (rule("{op: '>', value: 3}"), "name exactly one"),
        (rule("{feature: card_speed, field: channel, op: '>', value: 3}"), "name exactly one"),
        (rule("{score: true, op: '>', value: 3}", reason="NOPE"), "reason"),
        (rule("{score: true, op: '>', value: 3}", outcome="maybe"), "outcome"),
        (rule(""), "has no condition"),
        (rule("{score: true, op: '>', value: 3}") * 2, "given twice"),
        ("  - {id: x}\n", "rules[0]"),
    ],
)
def test_a_policy_that_can_not_be_meant_is_refused_with_its_place(rules: str, place: str) -> None:
    with pytest.raises(PolicyRefusedError) as caught:
        make_policy(rules)
    assert "test.yaml" in str(caught.value)
    assert place in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("up_to_minor: null", "up_to_minor: 2000"),
        ("challenge: 500", "challenge: 800"),
        ("up_to_minor: 1000", "up_to_minor: 0"),
        ("decline: 900", "decline: 1002"),
        ("version: 1", "version: 2"),
    ],
)
def test_wrong_bands_and_versions_are_refused(old: str, new: str) -> None:
    with pytest.raises(PolicyRefusedError):
        Policy((BANDS + "  []").replace(old, new).encode(), "test.yaml")


def test_no_yaml_is_refused() -> None:
    with pytest.raises(PolicyRefusedError):
        Policy(b"{", "test.yaml")
    with pytest.raises(PolicyRefusedError):
        load_policy("/nowhere/policy.yaml")


def test_the_policy_that_ships_loads_and_its_digest_follows_the_file(tmp_path: Path) -> None:
    shipped = load_policy("")
    assert len(shipped.rule_ids) >= 6
    other = tmp_path / "policy.yaml"
    other.write_text(BANDS + "  []")
    assert load_policy(str(other)).digest != shipped.digest


def test_the_shipped_rules_fire_on_their_patterns() -> None:
    shipped = load_policy("")
    ecom = make_transaction(channel="ecom", amount_minor=120)
    assert decide(shipped, ecom, card_count_5m=10).rule_hits == [["card-burst"]]
    assert decide(shipped, ecom, device_distinct_cards_1h=6).rule_hits == [["device-many-cards"]]
    testing = decide(shipped, ecom, merchant_distinct_cards_5m=15, ip_distinct_cards_1h=5)
    assert testing.rule_hits == [["merchant-card-testing"]]
    travel = decide(shipped, ecom, card_speed=3000, card_since_last=3600)
    assert travel.rule_hits == [["impossible-travel"]]
    nearby = decide(shipped, ecom, card_speed=3000, card_since_last=10)
    assert nearby.rule_hits == [[]]
    assert decide(shipped, make_transaction(amount_minor=5_000_001)).rule_hits == [["amount-limit"]]
