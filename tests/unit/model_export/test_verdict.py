"""The sequential verdict: seldom wrong however often it is looked at, and costs as they are defined."""

from __future__ import annotations

import numpy as np
import pytest

from model_export.verdict import BETTER, OPEN, WORSE, Costs, judge

DECLINE, APPROVE, REVIEW = 3, 0, 2


Payments = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def made(rows: int, seed: int, skill: float) -> Payments:
    """(champion, challenger, amount, fraud, seen, chance): models of equal quality that err apart; `skill` of the champion's errors the
    challenger doesn't make. A tenth of the declines explored."""
    rng = np.random.default_rng(seed)
    fraud = rng.random(rows) < 0.1
    amount = rng.lognormal(8, 1, rows)
    one, other = (np.where(rng.random(rows) < 0.8, fraud, rng.random(rows) < 0.1) * DECLINE for _ in range(2))
    other = np.where(rng.random(rows) < skill, fraud * DECLINE, other)
    chance = np.where(one == DECLINE, 0.2, 1.0)
    seen = rng.random(rows) < chance
    return one, other, amount, fraud & seen, seen, chance


def test_two_models_of_equal_worth_are_seldom_told_apart() -> None:
    verdicts = [judge(*made(3_000, seed, 0.0), Costs()).verdict for seed in range(200)]
    # Allowed are 5 %: 10 of 200, and 17 are exceeded once in 50 times.
    assert sum(v != OPEN for v in verdicts) <= 17


def test_a_better_challenger_is_found_and_the_forecast_shrinks_with_labels() -> None:
    few, many = (judge(*made(rows, 3, 0.7), Costs()) for rows in (150, 60_000))
    assert few.verdict == OPEN
    assert many.verdict == BETTER
    assert many.labels_needed == 0
    assert few.labels_needed is None or 0 < few.labels_needed < 1_000_000


def test_the_models_exchanged_exchange_the_verdict() -> None:
    one, other, amount, fraud, seen, chance = made(60_000, 3, 0.7)
    # What is seen is as the second's policy would have it.
    forth = judge(one, other, amount, fraud, seen, chance, Costs())
    back = judge(other, one, amount, fraud, seen, chance, Costs())
    assert (forth.verdict, back.verdict) == (BETTER, WORSE)
    assert forth.evidence_better == pytest.approx(back.evidence_worse)


def test_costs_are_what_each_outcome_costs() -> None:
    costs = Costs(
        review_minor=300, challenge_minor=10, declined_minor=500, declined_share=0.1, challenge_stops=0.5, review_stops=0.9
    )
    amount = np.full(4, 1_000.0)
    outcomes = np.arange(4)
    assert costs.of(outcomes, amount, np.ones(4, bool)).tolist() == pytest.approx([1_000, 510, 400, 0])
    assert costs.of(outcomes, amount, np.zeros(4, bool)).tolist() == pytest.approx([0, 10, 300, 600])


def test_no_difference_is_larger_than_the_bound_that_the_test_bets_within() -> None:
    rng = np.random.default_rng(1)
    for costs in (Costs(), Costs(declined_share=1, declined_minor=9_000), Costs(review_minor=1e6)):
        a, b = rng.integers(0, 4, (2, 10_000))
        amount = rng.uniform(0, costs.amount_cap_minor, 10_000)
        fraud = rng.random(10_000) < 0.5
        assert np.abs(costs.of(a, amount, fraud) - costs.of(b, amount, fraud)).max() <= costs.difference_max


def test_without_payments_nothing_is_decided() -> None:
    empty = np.zeros(0)
    found = judge(empty.astype(int), empty.astype(int), empty, empty.astype(bool), empty.astype(bool), empty, Costs())
    assert (found.verdict, found.labels, found.labels_needed) == (OPEN, 0, None)


def test_impossible_costs_are_named() -> None:
    assert "challenge_stops" in str(Costs(challenge_stops=2).complaint())
    assert Costs().complaint() is None
