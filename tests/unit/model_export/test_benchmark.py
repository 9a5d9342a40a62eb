"""The published split and metrics on payments few enough to follow by hand."""

from __future__ import annotations

import numpy as np
import pytest

from model_export.benchmark import Payments, card_precision, fold, ranking

TEST_DAY = 100


def make_payments(*rows: tuple[int, int, bool]) -> Payments:
    """From (day, customer, is_fraud), in order of day."""
    day, customer, fraud = zip(*sorted(rows), strict=True)
    return Payments(np.array(day), np.array(customer), np.array(fraud))


def make_weeks() -> list[tuple[int, int, bool]]:
    """A genuine payment of customer 1 on each day, and one fraud of another customer in the training and in the test week."""
    return [(day, 1, False) for day in range(TEST_DAY - 40, TEST_DAY + 7)] + [(TEST_DAY - 10, 90, True), (TEST_DAY + 3, 91, True)]


def test_the_training_week_ends_a_week_before_the_test_week_so_that_its_labels_are_known() -> None:
    payments = make_payments(*make_weeks())
    found = fold(payments, TEST_DAY)
    assert set(payments.day[found.train]) == set(range(TEST_DAY - 14, TEST_DAY - 7))
    assert set(payments.day[found.test]) == set(range(TEST_DAY, TEST_DAY + 7))


def test_no_row_of_the_training_is_younger_than_the_oldest_of_the_test_less_the_delay() -> None:
    payments = make_payments(*make_weeks())
    for days in (7, 14, 28):
        found = fold(payments, TEST_DAY, days)
        assert payments.day[found.train].max() < payments.day[found.test].min() - 7
        assert np.intersect1d(found.train, found.test).size == 0


def test_more_training_adds_older_days_and_leaves_the_test_as_it_is() -> None:
    payments = make_payments(*make_weeks(), (TEST_DAY - 20, 1, True))
    week, month = fold(payments, TEST_DAY), fold(payments, TEST_DAY, 28)
    assert payments.day[month.train].min() == TEST_DAY - 35
    assert np.array_equal(week.test, month.test)


@pytest.mark.parametrize(
    ("fraud_day", "kept_until"),
    [
        (TEST_DAY - 15, 7),  # before the last training week: not looked at
        (TEST_DAY - 14, 0),
        (TEST_DAY - 8, 0),
        (TEST_DAY - 7, 1),  # known a week later: when the test's first day is over
        (TEST_DAY - 5, 3),
        (TEST_DAY - 1, 7),
    ],
)
def test_a_customer_is_left_out_from_the_day_a_fraud_is_known(fraud_day: int, kept_until: int) -> None:
    of_customer = [(day, 7, False) for day in range(TEST_DAY, TEST_DAY + 7)]
    payments = make_payments(*make_weeks(), *of_customer, (fraud_day, 7, True))
    found = fold(payments, TEST_DAY)
    kept = payments.day[found.test][payments.customer[found.test] == 7]
    assert kept.tolist() == list(range(TEST_DAY, TEST_DAY + kept_until))


def test_a_week_without_fraud_is_refused_with_its_date() -> None:
    rows = [(day, 1, False) for day in range(TEST_DAY - 40, TEST_DAY + 7)]
    with pytest.raises(ValueError, match="training days of the test week from 1970-04-11 have 7 payments, 0 of them frauds"):
        fold(make_payments(*rows), TEST_DAY)


def test_a_card_counts_once_a_day_by_its_highest_score_and_not_again_once_found() -> None:
    #                       card 1 pays twice, card 2 is fraud with a middling score; on the next day card 2 would lead again
    payments = make_payments((0, 1, False), (0, 1, False), (0, 2, True), (0, 3, False), (1, 2, True), (1, 3, True), (1, 4, False))
    rows = np.arange(7)
    score = np.array([0.1, 0.9, 0.5, 0.2, 0.9, 0.8, 0.1])
    # Day 0: of the two highest cards (1, 2) one is compromised. Day 1: card 2 is known; of 3 and 4 one is.
    assert card_precision(payments, rows, score, cards=2) == pytest.approx((1 / 2 + 1 / 2) / 2)
    # Day 0: only card 1 is looked at, in vain; so day 1 finds card 2.
    assert card_precision(payments, rows, score, cards=1) == pytest.approx((0 + 1) / 2)


def test_fewer_cards_than_places_still_divide_by_the_places() -> None:
    payments = make_payments((0, 1, True), (0, 2, False))
    assert card_precision(payments, np.arange(2), np.array([0.9, 0.1])) == pytest.approx(1 / 100)


def test_a_perfect_order_has_an_auc_and_an_ap_of_one_and_equal_scores_have_the_rate() -> None:
    payments = make_payments(*[(0, i, i >= 8) for i in range(10)])
    perfect = ranking(payments, np.arange(10), np.arange(10) / 10)
    assert (perfect.auc, perfect.ap) == (1.0, 1.0)
    equal = ranking(payments, np.arange(10), np.full(10, 0.5))
    assert equal.auc == 0.5
    assert equal.ap == pytest.approx(0.2)
