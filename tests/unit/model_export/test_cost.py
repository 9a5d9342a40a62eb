"""Costs of decisions, and the thresholds that cost the least."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from model_export.cost import GRID, CostModel, cost_of, thresholds

COSTS = CostModel(
    fraud_lost_share=1.0,
    chargeback_fee_minor=1_000,
    wrong_decline_minor=200,
    wrong_decline_share=0.1,
    review_minor=300,
    review_misses_share=0.25,
)


def test_a_fraud_that_goes_through_costs_its_amount_and_the_fee_and_a_wrong_decline_costs_the_customers_trouble() -> None:
    amount, fraud = np.array([10_000, 10_000]), np.array([True, False])
    assert COSTS.of_approving(amount, fraud).tolist() == [11_000, 0]
    assert COSTS.of_declining(amount, fraud).tolist() == [0, 1_200]
    assert COSTS.of_reviewing(amount, fraud).tolist() == [300 + 0.25 * 11_000, 300]


@pytest.mark.parametrize("seed", range(2))
def test_the_chosen_pair_costs_what_trying_every_pair_finds_to_be_the_least(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 400
    amount = np.round(rng.lognormal(9, 1.5, n)).astype(np.int64)
    score = rng.integers(0, 1001, n)
    fraud = rng.random(n) < (score / 1000) ** 2
    for i, band in enumerate(thresholds(amount, fraud, score, COSTS, bands=(5_000,))):
        here = (amount <= 5_000) if i == 0 else (amount > 5_000)
        best = min(
            float(
                np.where(
                    score >= decline,
                    COSTS.of_declining(amount, fraud),
                    np.where(score >= review, COSTS.of_reviewing(amount, fraud), COSTS.of_approving(amount, fraud)),
                )[here].sum()
            )
            for review in GRID
            for decline in GRID
            if review <= decline
        )
        assert band.cost == pytest.approx(best)
        assert band.review <= band.decline
        assert band.payments == here.sum()
        assert band.cost <= band.cost_of_approving_all


def test_what_the_chosen_thresholds_cost_on_the_rows_they_were_chosen_on_is_what_they_say() -> None:
    rng = np.random.default_rng(9)
    amount = np.round(rng.lognormal(9, 1.5, 500)).astype(np.int64)
    score = rng.integers(0, 1001, 500)
    fraud = rng.random(500) < score / 1000
    chosen = thresholds(amount, fraud, score, COSTS)
    assert cost_of(amount, fraud, score, COSTS, chosen) == pytest.approx(sum(band.cost for band in chosen))


def test_the_curve_of_a_band_is_the_cost_of_declining_from_each_score_on() -> None:
    rng = np.random.default_rng(3)
    amount, score = np.full(100, 1_000), rng.integers(0, 1001, 100)
    fraud = rng.random(100) < 0.3
    (band,) = thresholds(amount, fraud, score, COSTS, bands=())
    for at, cost in zip(GRID, band.cost_curve, strict=True):
        expected = np.where(score >= at, COSTS.of_declining(amount, fraud), COSTS.of_approving(amount, fraud)).sum()
        assert cost == pytest.approx(float(expected))


def test_a_band_without_fraud_is_left_alone() -> None:
    (band,) = thresholds(np.full(50, 1_000), np.zeros(50, bool), np.arange(50) * 20, COSTS, bands=())
    assert (band.review, band.decline, band.cost) == (1001, 1001, 0)


def test_dearer_wrong_declines_never_lower_the_score_that_declines() -> None:
    rng = np.random.default_rng(1)
    amount, score = np.round(rng.lognormal(9, 1, 2_000)).astype(np.int64), rng.integers(0, 1001, 2_000)
    fraud = rng.random(2_000) < (score / 1000) ** 3
    without_reviews = dataclasses.replace(COSTS, review_minor=10**9)
    declines = [
        thresholds(amount, fraud, score, dataclasses.replace(without_reviews, wrong_decline_minor=cost), bands=())[0].decline
        for cost in (0, 500, 5_000, 50_000)
    ]
    assert declines == sorted(declines)
    assert declines[0] < declines[-1]


@pytest.mark.parametrize(("name", "value"), [("fraud_lost_share", 1.1), ("review_misses_share", -0.1), ("review_minor", -1)])
def test_a_cost_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        CostModel(**{name: value})  # type: ignore[arg-type]
