"""The order of evaluation, bands, lists, rules, states and reasons: what docs/policy.md promises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gateway.contracts.decision import Outcome
from gateway.contracts.lists import ListBook
from gateway.contracts.reasons import REASONS_MAX, Reason
from gateway.policy import NO_LISTS, load_policy
from tests.unit.gateway.factories import NOW_MS, make_transaction
from tests.unit.gateway.policy.factories import NEVER_BY_SCORE, decide, make_book, make_columns, make_list, make_policy, make_rule

LISTS = (
    make_list("bad", "block"),
    make_list("odd", "block", outcome="review"),
    make_list("watched", "watch"),
    make_list("good", "allow"),
    make_list("good-merchants", "allow", "merchant_id"),
)


def standing(*list_ids: str, ends_ms: int | None = None) -> ListBook:
    """A book in which the usual payment's card or merchant stands on some lists."""
    value = {"card_id": "card-1", "merchant_id": "merchant-1"}
    fields = {declared["id"]: declared["field"] for declared in LISTS}
    return make_book(LISTS, {list_id: value[fields[list_id]] for list_id in list_ids}, ends_ms)


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
    found = decide(make_policy(make_rule("card_count_5m >= 3")), make_transaction(amount_minor=5000))
    assert found.outcome == [Outcome.APPROVE]


def test_only_the_rows_that_a_rule_is_true_of_are_touched() -> None:
    policy = make_policy(make_rule('card_count_5m >= 3 and channel in ["ecom"]'))
    assert decide(policy, make_transaction(), card_count_5m=3).outcome == [Outcome.APPROVE]
    assert decide(policy, make_transaction(channel="ecom"), card_count_5m=2).outcome == [Outcome.APPROVE]
    found = decide(policy, make_transaction(channel="ecom"), make_transaction(), card_count_5m=3)
    assert found.outcome == [Outcome.REVIEW, Outcome.APPROVE]
    assert found.rule_hits == [["r1"], []]


@pytest.mark.parametrize("op", ["==", "!=", "<", "<=", ">", ">="])
def test_an_unknown_value_makes_neither_a_comparison_nor_its_negation_true(op: str) -> None:
    for what in ("card_speed", "latitude", "card_distance_km", "score", "abs(score)", "card_speed * 2"):
        for when in (f"{what} {op} 0", f"not ({what} {op} 0)", f"0 {op} {what}"):
            assert decide(make_policy(make_rule(when)), make_transaction()).outcome == [Outcome.APPROVE]


@pytest.mark.parametrize(
    "when", ['device_id != "x"', 'device_id not in ["x"]', 'not (device_id == "x")', "device_id != ip", "known(device_id)"]
)
def test_a_field_that_is_not_given_is_unknown(when: str) -> None:
    policy = make_policy(make_rule(when))
    assert decide(policy, make_transaction()).outcome == [Outcome.APPROVE]
    assert decide(policy, make_transaction(device_id="y", ip="z")).outcome == [Outcome.REVIEW]


def test_what_is_unknown_can_be_asked_for() -> None:
    policy = make_policy(make_rule("not known(device_id) and not known(card_speed)"))
    assert decide(policy, make_transaction()).rule_hits == [["r1"]]
    assert decide(policy, make_transaction(), card_speed=1).rule_hits == [[]]


def test_the_most_severe_outcome_wins_and_its_reasons_come_first() -> None:
    rules = [
        make_rule("amount_minor > 0", name, outcome=outcome, reason=reason)
        for outcome, reason, name in [
            ("challenge", "AMOUNT_UNUSUAL", "a"),
            ("decline", "DEVICE_MANY_CARDS", "b"),
            ("review", "IP_MANY_CARDS", "c"),
            ("decline", "DEVICE_MANY_CARDS", "d"),
            ("challenge", "AMOUNT_LIMIT", "e"),
        ]
    ]
    found = decide(make_policy(*rules), make_transaction(amount_minor=900), score=750)
    assert found.outcome == [Outcome.DECLINE]
    assert found.reasons == [[Reason.DEVICE_MANY_CARDS, Reason.MODEL_SCORE_HIGH, Reason.IP_MANY_CARDS, Reason.AMOUNT_UNUSUAL]]
    assert len(found.reasons[0]) == REASONS_MAX
    assert found.rule_hits == [["b", "d", "c", "a", "e"]]


@pytest.mark.parametrize(
    "outcomes", [("approve", "challenge"), ("review", "challenge"), ("decline", "review"), ("review", "decline")]
)
def test_of_two_rules_the_more_severe_decides_in_any_order(outcomes: tuple[str, str]) -> None:
    rules = [make_rule("amount_minor > 0", f"r{i}", outcome=outcome) for i, outcome in enumerate(outcomes)]
    severest = max(outcomes, key=[o.value for o in Outcome].index)
    for order in (rules, rules[::-1]):
        assert decide(make_policy(*order, bands=NEVER_BY_SCORE), make_transaction()).outcome == [severest]


def test_a_block_list_declines_before_anything_else_is_asked() -> None:
    policy = make_policy(make_rule("amount_minor > 0", hard=True), make_rule("amount_minor > 0", "s", state="shadow"), lists=LISTS)
    found = decide(policy, make_transaction(), score=1000, lists=standing("bad", "watched", "good"))
    assert found.outcome == [Outcome.DECLINE]
    assert found.list_hits == [["bad", "watched", "good"]]
    assert found.rule_hits == found.shadow_hits == [[]]
    assert found.reasons == [[Reason.ON_BLOCK_LIST, Reason.ON_WATCH_LIST]]


def test_a_milder_block_list_is_not_outdone_by_an_allow_list_but_by_rules_and_scores() -> None:
    policy = make_policy(make_rule("card_count_5m > 3", outcome="decline"), lists=LISTS)
    book = standing("odd", "good")
    assert decide(policy, make_transaction(), score=0, lists=book).outcome == [Outcome.REVIEW]
    assert decide(policy, make_transaction(), score=999, lists=book).outcome == [Outcome.DECLINE]
    assert decide(policy, make_transaction(), score=0, lists=book, card_count_5m=4).rule_hits == [["r1"]]


def test_an_allow_list_silences_the_score_and_the_rules_that_are_not_hard() -> None:
    soft, shadow = make_rule("amount_minor > 0", "soft"), make_rule("amount_minor > 0", "shadow", state="shadow")
    hard = make_rule("amount_minor > 5000", "hard", hard=True)
    policy = make_policy(soft, shadow, hard, lists=LISTS)
    for book in (standing("good"), standing("good-merchants")):
        found = decide(policy, make_transaction(), score=1000, lists=book)
        assert found.outcome == [Outcome.APPROVE]
        assert found.reasons == found.rule_hits == found.shadow_hits == [[]]
        found = decide(policy, make_transaction(amount_minor=5001), score=1000, lists=book)
        assert (found.outcome, found.rule_hits) == ([Outcome.REVIEW], [["hard"]])
    found = decide(policy, make_transaction(amount_minor=3000), has_features=False, lists=standing("good"))
    assert found.outcome == [Outcome.APPROVE]


def test_a_watch_list_asks_for_a_review_of_who_is_allowed_too() -> None:
    policy = make_policy(lists=LISTS)
    found = decide(policy, make_transaction(), score=1000, lists=standing("watched", "good"))
    assert found.outcome == [Outcome.REVIEW]
    assert found.reasons == [[Reason.ON_WATCH_LIST]]
    found = decide(policy, make_transaction(), score=1000, lists=standing("watched"))
    assert found.outcome == [Outcome.DECLINE]
    assert found.reasons == [[Reason.MODEL_SCORE_HIGH, Reason.ON_WATCH_LIST]]


def test_a_watch_list_may_only_tell() -> None:
    lists = (make_list("told", "watch", outcome="approve"),)
    book = make_book(lists, {"told": "card-1"})
    found = decide(make_policy(lists=lists), make_transaction(), score=0, lists=book)
    assert (found.outcome, found.reasons, found.list_hits) == ([Outcome.APPROVE], [[]], [["told"]])
    assert found.ruled is None


def test_an_entry_counts_until_the_moment_it_ends_by_when_the_payment_was_received() -> None:
    book = standing("bad", ends_ms=NOW_MS)
    policy = make_policy(lists=LISTS)
    assert decide(policy, make_transaction(), at_ms=NOW_MS - 1, lists=book).outcome == [Outcome.DECLINE]
    assert decide(policy, make_transaction(), at_ms=NOW_MS, lists=book).outcome == [Outcome.APPROVE]


def test_a_rule_may_ask_for_a_list_whatever_the_list_itself_asks_for() -> None:
    when = 'merchant_id not in list("good-merchants") and card_id in list("watched")'
    policy = make_policy(make_rule(when, outcome="decline"), lists=LISTS)
    assert decide(policy, make_transaction(), lists=standing("watched")).rule_hits == [["r1"]]
    assert decide(policy, make_transaction(), lists=standing("watched", "good-merchants")).rule_hits == [[]]


def test_other_lists_bind_other_bits_and_one_list_of_a_batch_is_not_the_other_s() -> None:
    policy = make_policy(lists=LISTS)
    for first, second in (("bad", "watched"), ("watched", "bad")):
        book = make_book(LISTS, {first: "card-1", second: "card-2"})
        batch = [make_transaction("a", card_id="card-2"), make_transaction("b"), make_transaction("c", card_id="card-3")]
        assert decide(policy, *batch, lists=book).list_hits == [[second], [first], []]


def test_a_shadow_rule_is_told_and_changes_nothing() -> None:
    live = make_rule("amount_minor > 1000", "live", outcome="challenge")
    shadow = make_rule("amount_minor > 0", "tried", outcome="decline", reason="AMOUNT_LIMIT", state="shadow")
    batch = [make_transaction("a", amount_minor=10), make_transaction("b", amount_minor=2000)]
    with_it, without = decide(make_policy(live, shadow), *batch, score=10), decide(make_policy(live), *batch, score=10)
    assert with_it.shadow_hits == [["tried"], ["tried"]]
    for name in ("outcome", "reasons", "rule_hits", "rule_errors"):
        assert getattr(with_it, name) == getattr(without, name)
    assert with_it.severity.tolist() == without.severity.tolist()
    assert with_it.ruled is not None and without.ruled is not None
    assert with_it.ruled.tolist() == without.ruled.tolist() == [0, 1]


def test_a_rule_that_is_off_is_checked_and_not_evaluated() -> None:
    found = decide(make_policy(make_rule("amount_minor > 0", state="off")), make_transaction())
    assert (found.outcome, found.rule_hits, found.shadow_hits) == ([Outcome.APPROVE], [[]], [[]])


@pytest.mark.parametrize(
    ("when", "features"),
    [
        ("amount_minor / card_count_5m > 3", {"card_count_5m": 0}),
        ("amount_minor * card_amount_sum_30d * 1e300 > 3", {"card_amount_sum_30d": 3e38}),
        ("card_speed - card_speed < 1", {"card_speed": math.inf}),
        ("not (amount_minor / card_count_5m > 3)", {"card_count_5m": 0}),
        ("known(amount_minor / card_count_5m)", {"card_count_5m": 0}),
    ],
)
def test_a_rule_that_can_not_be_worked_out_is_an_error_of_its_row_and_the_others_decide(
    when: str, features: dict[str, Any]
) -> None:
    rules = [make_rule(when, "broken", outcome="decline"), make_rule("amount_minor >= 1000", "other")]
    batch = [make_transaction("a", amount_minor=900), make_transaction("b", amount_minor=1000)]
    found = make_policy(*rules).decide(make_columns(batch, **features), True, NO_LISTS)
    assert found.outcome == [Outcome.APPROVE, Outcome.REVIEW]
    assert found.rule_errors == [["broken"], ["broken"]]
    assert found.rule_hits == [[], ["other"]]


def test_a_test_guards_what_stands_behind_it() -> None:
    guarded = make_rule("card_count_5m > 0 and amount_minor / card_count_5m > 300")
    found = decide(make_policy(guarded), make_transaction(amount_minor=900), card_count_5m=0)
    assert (found.rule_errors, found.rule_hits) == ([[]], [[]])
    assert decide(make_policy(guarded), make_transaction(amount_minor=900), card_count_5m=2).rule_hits == [["r1"]]


def test_more_hits_than_a_batch_usually_has_are_all_told() -> None:
    rules = [make_rule("amount_minor > 0", f"r{i:03d}") for i in range(200)]
    found = decide(make_policy(*rules), *[make_transaction(f"t{i}") for i in range(3)])
    assert found.rule_hits == [[rule["id"] for rule in rules]] * 3


def test_an_exploration_leaves_alone_what_a_list_asked_for() -> None:
    found = decide(
        make_policy(lists=LISTS), make_transaction(), make_transaction("b", card_id="c"), score=999, lists=standing("bad")
    )
    assert found.ruled is not None
    assert found.ruled.tolist() == [3, 0]


def test_decisions_do_not_depend_on_which_rows_of_the_requests_are_decided() -> None:
    policy = make_policy(make_rule('merchant_id == "m2"'), make_rule("amount_minor == 7", "r2"))
    batch = [make_transaction("a", merchant_id="m1", amount_minor=7), make_transaction("b", merchant_id="m2")]
    whole = decide(policy, *batch)
    from_whole = decide(policy, *batch[1:])
    assert whole.rule_hits == [["r2"], ["r1"]]
    assert from_whole.rule_hits == [["r1"]]


def test_the_shipped_rules_fire_on_their_patterns() -> None:
    shipped = load_policy("")
    ecom = make_transaction(channel="ecom", amount_minor=120)
    assert decide(shipped, ecom, card_count_5m=10).rule_hits == [["card-burst"]]
    assert decide(shipped, ecom, card_count_1h=12, card_distinct_merchants_1h=4).rule_hits == [["card-fast"]]
    assert decide(shipped, ecom, device_distinct_cards_1h=6).rule_hits == [["device-many-cards"]]
    assert decide(shipped, ecom, ip_distinct_cards_1h=12).rule_hits == [["ip-many-cards"]]
    assert decide(shipped, make_transaction(channel="pos"), ip_distinct_cards_1h=12).rule_hits == [[]]
    testing = decide(shipped, ecom, merchant_distinct_cards_5m=15, ip_distinct_cards_1h=5)
    assert testing.rule_hits == [["merchant-card-testing"]]
    travel = decide(shipped, ecom, card_speed=3000, card_since_last=3600)
    assert travel.rule_hits == [["impossible-travel"]]
    nearby = decide(shipped, ecom, card_speed=3000, card_since_last=10)
    assert nearby.rule_hits == [[]]
    large = make_transaction(amount_minor=20_000)
    unusual = decide(shipped, large, card_amount_zscore_30d=6.5, card_amount_ratio_30d=8.5, card_count_30d=5)
    assert unusual.rule_hits == [["amount-unusual"]]
    assert decide(shipped, make_transaction(amount_minor=5_000_001)).rule_hits == [["amount-limit"]]


def test_what_rules_and_bands_compare_features_with_is_known() -> None:
    policy = make_policy(
        make_rule('card_count_5m >= 10 and (5 < card_speed or mcc == "5411") and not (hour in [3, 4])'),
        make_rule("amount_minor > 3 * card_amount_mean_30d and is_night == 1", "r2"),
        make_rule("card_count_1h > 99", "r3", state="off"),
    )
    assert set(policy.compared) == {
        ("amount_minor", 1000.0),
        ("card_count_5m", 10.0),
        ("card_speed", 5.0),
        ("hour", 3.0),
        ("hour", 4.0),
        ("is_night", 1.0),
    }
    assert np.isfinite([value for _, value in policy.compared]).all()
